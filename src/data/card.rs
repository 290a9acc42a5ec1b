//! `README.md`, the card of a data set: first what the Hub and `datasets` read, then what people read.
//!
//! The front matter is YAML in which each top-level value is written as JSON, which is also YAML, so no YAML parser
//! is needed to read it back. A card whose front matter was rewritten by hand in another style still works on the
//! Hub, but not here.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value as Json, json};

use super::{
    hub::{Feature, Features},
    manifest::FileEntry,
};
use crate::{Error, Result, fs};

/// The name of the card in its data-set folder.
pub const FILE_NAME: &str = "README.md";

/// The contents of a card.
#[derive(Clone, Debug, PartialEq)]
pub struct Card {
    /// The display name.
    pub pretty_name: String,
    /// The Hub's id of a licence, such as `cc-by-4.0`, or `other`.
    pub license: String,
    /// The name of a licence that is `other`.
    pub license_name: Option<String>,
    /// Where a licence that is `other` can be read.
    pub license_link: Option<String>,
    /// Hub ids of the real data behind it, or `original`.
    pub source_datasets: Vec<String>,
    /// Tags for search; `synthetic` is one of them.
    pub tags: Vec<String>,
    /// The first is the default.
    pub configs: Vec<Config>,
    /// Markdown: generator, sampler, seeds, rule and thresholds, counts, known risks, licence of real data.
    pub text: String,
}

/// A set of files that are loaded together.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Its name in `load_dataset(…, name)`.
    pub name: String,
    /// The columns of its files.
    pub features: Features,
    /// Its splits.
    pub splits: Vec<CardSplit>,
}

/// A split of a [`Config`]; without its files, an item of `splits` as the Hub spells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CardSplit {
    /// `train` or `test`.
    pub name: String,
    /// The pattern of its files, relative to the card, such as `data/train-*`. The Hub has it in `configs`.
    #[serde(skip)]
    pub path: String,
    /// The size of its files in bytes.
    pub num_bytes: u64,
    /// The number of its rows. `datasets` refuses to load a split with a different number.
    pub num_examples: u64,
}

impl Config {
    /// A configuration whose only split is `train`, in these files.
    pub fn train(name: &str, path: &str, features: Features, files: &[FileEntry]) -> Self {
        let split = CardSplit {
            name: "train".into(),
            path: path.into(),
            num_bytes: files.iter().map(|file| file.bytes).sum(),
            num_examples: files.iter().map(|file| file.rows).sum(),
        };
        Self { name: name.into(), features, splits: vec![split] }
    }
}

/// An item of `configs`, as the Hub spells it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ConfigItem {
    pub(super) config_name: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) default: bool,
    pub(super) data_files: Vec<DataFiles>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct DataFiles {
    pub(super) split: String,
    pub(super) path: String,
}

/// An item of `dataset_info`, as the Hub spells it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct InfoItem {
    pub(super) config_name: String,
    /// What [`feature_items`] makes.
    pub(super) features: Vec<Json>,
    pub(super) splits: Vec<CardSplit>,
    pub(super) download_size: u64,
    pub(super) dataset_size: u64,
}

/// The features as a card lists them. Class numbers are keys, quoted.
pub(super) fn feature_items(features: &Features) -> Vec<Json> {
    let dtype = |feature: &Feature| match feature {
        Feature::Image => json!("image"),
        Feature::ClassLabel(names) => {
            let names: Map<_, _> =
                names.iter().enumerate().map(|(i, name)| (i.to_string(), name.as_str().into())).collect();
            json!({"class_label": {"names": names}})
        }
        Feature::Value(dtype) => json!(dtype),
    };
    features.iter().map(|(name, feature)| json!({"name": name, "dtype": dtype(feature)})).collect()
}

impl Card {
    /// The whole card: front matter, title, text.
    pub fn render(&self) -> String {
        let mut out = String::from("---\n");
        let mut field = |key: &str, value: String| out.push_str(&format!("{key}:{value}\n"));
        field("pretty_name", inline(&self.pretty_name));
        field("license", inline(&self.license));
        if let Some(name) = &self.license_name {
            field("license_name", inline(name));
        }
        if let Some(link) = &self.license_link {
            field("license_link", inline(link));
        }
        field("task_categories", inline(&["image-classification"]));
        field("size_categories", inline(&[self.size_category()]));
        field("annotations_creators", inline(&["machine-generated"]));
        field("source_datasets", inline(&self.source_datasets));
        field("tags", inline(&self.tags));
        field("configs", block(&self.config_items()));
        field("dataset_info", block(&self.info_items()));
        format!("{out}---\n\n# {}\n\n{}\n", self.pretty_name, self.text.trim())
    }

    /// Publishes the card in the data-set folder `dir`.
    pub fn write(&self, dir: &Path) -> Result<()> {
        fs::publish(&dir.join(FILE_NAME), self.render().as_bytes())
    }

    fn config_items(&self) -> Vec<ConfigItem> {
        let files = |split: &CardSplit| DataFiles { split: split.name.clone(), path: split.path.clone() };
        let item = |(i, config): (usize, &Config)| ConfigItem {
            config_name: config.name.clone(),
            default: i == 0,
            data_files: config.splits.iter().map(files).collect(),
        };
        self.configs.iter().enumerate().map(item).collect()
    }

    fn info_items(&self) -> Vec<InfoItem> {
        let item = |config: &Config| {
            let bytes = config.splits.iter().map(|split| split.num_bytes).sum();
            InfoItem {
                config_name: config.name.clone(),
                features: feature_items(&config.features),
                splits: config.splits.clone(),
                download_size: bytes,
                dataset_size: bytes,
            }
        };
        self.configs.iter().map(item).collect()
    }

    /// The Hub's size category of the default configuration.
    fn size_category(&self) -> &'static str {
        let splits = self.configs.first().map_or(&[][..], |config| &config.splits);
        match splits.iter().map(|split| split.num_examples).sum::<u64>() {
            0..1_000 => "n<1K",
            1_000..10_000 => "1K<n<10K",
            10_000..100_000 => "10K<n<100K",
            100_000..1_000_000 => "100K<n<1M",
            1_000_000..10_000_000 => "1M<n<10M",
            10_000_000..100_000_000 => "10M<n<100M",
            100_000_000..1_000_000_000 => "100M<n<1B",
            _ => "n>1B",
        }
    }
}

/// A value on the line of its key.
fn inline<T: Serialize + ?Sized>(value: &T) -> String {
    format!(" {}", serde_json::to_string(value).expect("strings and lists of them are JSON"))
}

/// A value on lines of its own, all of them indented, as YAML requires.
fn block<T: Serialize>(value: &T) -> String {
    let json = serde_json::to_string_pretty(value).expect("maps with string keys are JSON");
    format!("\n  {}", json.replace('\n', "\n  "))
}

/// The front matter of a card that [`Card::render`] made.
#[derive(Debug)]
pub(super) struct FrontMatter(BTreeMap<String, Json>);

impl FrontMatter {
    /// Reads the card in a data-set folder. Fails with [`Error::Data`] if it has no front matter, or if one of its
    /// values is not JSON.
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE_NAME);
        let card = std::fs::read(&path).map_err(Error::io(&path))?;
        let card = String::from_utf8_lossy(&card);
        let front = card.strip_prefix("---\n").and_then(|rest| rest.split_once("\n---\n"));
        let Some((front, _)) = front else {
            bail!(Data, "{}: no front matter between two lines '---'", path.display())
        };
        let mut values = BTreeMap::new();
        let mut lines = front.lines().peekable();
        while let Some(line) = lines.next() {
            let Some((key, first)) = line.split_once(':') else {
                bail!(Data, "{}: front matter has '{line}', expected a key", path.display())
            };
            let mut value = first.to_owned();
            while let Some(more) = lines.next_if(|line| line.starts_with(' ')) {
                value.push_str(more);
            }
            let value = serde_json::from_str(&value).map_err(|e| {
                Error::Data(format!("{}: '{key}' of the front matter is no JSON: {e}", path.display()))
            })?;
            values.insert(key.to_owned(), value);
        }
        Ok(Self(values))
    }

    /// A value by key, as `T`. Fails with [`Error::Data`] if it is missing or something else.
    pub(super) fn get<T: DeserializeOwned>(&self, key: &str) -> Result<T> {
        let value = self.0.get(key).cloned().unwrap_or_default();
        serde_json::from_value(value).map_err(|e| Error::Data(format!("{FILE_NAME}: '{key}': {e}")))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::data) fn card(features: Features, splits: Vec<CardSplit>) -> Card {
        Card {
            pretty_name: "Digits: \"robust\"".into(),
            license: "other".into(),
            license_name: Some("as the digits".into()),
            license_link: None,
            source_datasets: vec!["original".into()],
            tags: vec!["synthetic".into(), "adversarial-robustness".into()],
            configs: vec![Config { name: "curated".into(), features, splits }],
            text: "Made in a test.\n---\nStill text.".into(),
        }
    }

    fn digits() -> Card {
        let names: Vec<_> = (0..12).map(|i| format!("class {i}")).collect();
        let split = CardSplit {
            name: "train".into(),
            path: "data/train-*".into(),
            num_bytes: 5_000,
            num_examples: 1_000,
        };
        card(Features::image_and_label(&names), vec![split])
    }

    #[test]
    fn a_card_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        digits().write(dir.path()).unwrap();
        let front = FrontMatter::read(dir.path()).unwrap();
        assert_eq!(front.get::<String>("pretty_name").unwrap(), "Digits: \"robust\"");
        assert_eq!(front.get::<Vec<String>>("size_categories").unwrap(), ["1K<n<10K"]);
        let info = front.get::<Vec<InfoItem>>("dataset_info").unwrap();
        assert_eq!(info[0].features, feature_items(&digits().configs[0].features));
        assert_eq!((info[0].splits[0].num_examples, info[0].download_size), (1_000, 5_000));
        let configs = front.get::<Vec<ConfigItem>>("configs").unwrap();
        assert!(configs[0].default && configs[0].data_files[0].path == "data/train-*");
        assert!(front.get::<String>("license_link").is_err());
    }

    #[test]
    fn yaml_sees_keys_and_indented_values() {
        let card = digits().render();
        let (front, text) = card.strip_prefix("---\n").unwrap().split_once("\n---\n").unwrap();
        assert!(front.lines().all(|line| line.starts_with("  ") || line.contains(':')), "{front}");
        assert!(front.contains("\"10\": \"class 10\""));
        assert!(text.starts_with("\n# Digits"));
    }

    #[test]
    fn front_matter_in_another_style_is_bad_data() {
        let dir = tempfile::tempdir().unwrap();
        for card in ["no front matter", "---\nconfigs:\n- config_name: x\n---\n", "---\nlicense: mit\n---\n"]
        {
            fs::publish(&dir.path().join(FILE_NAME), card.as_bytes()).unwrap();
            assert_eq!(FrontMatter::read(dir.path()).unwrap_err().exit_code(), 65, "{card}");
        }
    }
}
