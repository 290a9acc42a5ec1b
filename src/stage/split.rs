//! Split: which real image serves what. Made once, obeyed by every stage.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Job, Outcome, Stage, expect};
use crate::{
    Result,
    data::{self, Dataset, Source},
    fs,
    rng::{Permutation, stream},
};

/// Divides the training images of a data set, class by class, into `fit` and the proxy folds.
///
/// `fit` is what generators, classifiers and discriminators learn from. The proxy images are seen by no
/// generator: with `k` folds, the discriminators of set `f` are stopped on fold `f mod k` (proxy-stop) and measured on
/// the others (proxy-measure), so that a small set wastes none. The test split is not touched here.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Split {
    /// The real data: `builtin:digits`, or a folder or file of Hugging Face Parquet.
    #[arg(long, default_value = "builtin:digits")]
    pub source: Source,
    /// Use only the first N training images; 0 for all.
    #[arg(long, default_value_t = 0)]
    pub limit: usize,
    /// The share of the training images that no generator sees.
    #[arg(long, default_value_t = 0.3)]
    pub proxy_fraction: f64,
    /// Folds of the proxy images, at least 2.
    #[arg(long, default_value_t = 2)]
    pub proxy_folds: usize,
    /// Unreadable rows of the source that are tolerated, skipped and counted.
    #[arg(long, default_value_t = 0)]
    pub max_bad: usize,
    /// Seed of the division.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// `split.json`: the indices of the training images that serve each purpose, ascending.
#[derive(Debug, Serialize, Deserialize)]
pub struct Division {
    /// `proxyset.split/1`.
    pub schema: String,
    /// The real data.
    pub source: Source,
    /// [`Split::limit`].
    pub limit: usize,
    /// [`Split::max_bad`].
    pub max_bad: usize,
    /// The fingerprint of the training file or files.
    pub source_fingerprint: String,
    /// That of the test files, if there are any: what is held against them later are the same images.
    pub test_fingerprint: Option<String>,
    /// The names of the classes.
    pub class_names: Vec<String>,
    /// For generators, classifiers and discriminators to learn from.
    pub fit: Vec<usize>,
    /// For stopping, calibrating and measuring discriminators: unseen by generators.
    pub proxy: Vec<Vec<usize>>,
}

/// The real training data with its division.
pub struct Real {
    /// All training images.
    pub train: Dataset,
    /// Which of them serve what.
    pub division: Division,
}

impl Real {
    /// Reads `split.json` of `dir` and the data that it divides.
    ///
    /// Fails with [`crate::Error::Data`] if the data has changed since.
    pub fn load(dir: &Path) -> Result<Self> {
        let division: Division = fs::read_json(&dir.join("split.json"))?;
        let found = division.source.fingerprint(data::Split::Train)?;
        if found != division.source_fingerprint {
            bail!(
                Data,
                "{} has changed since it was split: BLAKE3 {}, expected {}",
                division.source,
                &found[..16],
                division.source_fingerprint.get(..16).unwrap_or_default()
            );
        }
        Ok(Self { train: load_train(&division.source, division.limit, division.max_bad)?, division })
    }

    /// The images to learn from.
    pub fn fit(&self) -> Dataset {
        self.train.subset(&self.division.fit)
    }

    /// The images on which discriminator set `f` is stopped and calibrated.
    pub fn proxy_stop(&self, f: usize) -> Dataset {
        self.train.subset(&self.division.proxy[f % self.division.proxy.len()])
    }

    /// The images on which discriminator set `f` of `sets` is measured: unseen by generator and discriminators.
    ///
    /// Each image measures one set only, so that the sets' results are independent.
    pub fn proxy_measure(&self, f: usize, sets: usize) -> Dataset {
        let mut chosen = Vec::new();
        for (fold, part) in self.division.proxy.iter().enumerate() {
            let may: Vec<usize> = (0..sets).filter(|set| set % self.division.proxy.len() != fold).collect();
            chosen.extend(
                part.iter().enumerate().filter(|(i, _)| may[i % may.len()] == f).map(|(_, &image)| image),
            );
        }
        self.train.subset(&chosen)
    }

    /// All images that no generator saw.
    pub fn proxy(&self) -> Dataset {
        self.train.subset(&self.division.proxy.concat())
    }
}

/// The fingerprint of the test files, if there are any.
pub(super) fn test_fingerprint(source: &Source) -> Result<Option<String>> {
    source.has(data::Split::Test).then(|| source.fingerprint(data::Split::Test)).transpose()
}

fn load_train(source: &Source, limit: usize, max_bad: usize) -> Result<Dataset> {
    source.load(data::Split::Train, (limit > 0).then_some(limit), max_bad)
}

impl Stage for Split {
    const NAME: &'static str = "split";
    const INPUTS: &'static [&'static str] = &["source"];
    const KEEPS_NAMES: bool = true;

    fn validate(&self) -> Result<()> {
        expect("proxy_fraction", self.proxy_fraction, 0.01, 0.9)?;
        expect("proxy_folds", self.proxy_folds, 2, 100)
    }

    fn amount(&self) -> String {
        let images =
            if self.limit > 0 { format!("the first {} images", self.limit) } else { "all images".into() };
        format!("{images} of {}, {:.0} % of them proxy", self.source, 100.0 * self.proxy_fraction)
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let train = load_train(&self.source, self.limit, self.max_bad)?;
        let (fit, proxy) = divide(&train, self)?;
        let (out, _lock) = job.open("run")?;
        let summary = json!({
            "images": train.len(),
            "bad_rows": train.bad_rows,
            "classes": train.class_names.len(),
            "shape": train.shape,
            "fit": fit.len(),
            "proxy": proxy.iter().map(Vec::len).collect::<Vec<_>>(),
        });
        let division = Division {
            schema: "proxyset.split/1".into(),
            source: self.source.clone(),
            limit: self.limit,
            max_bad: self.max_bad,
            source_fingerprint: self.source.fingerprint(data::Split::Train)?,
            test_fingerprint: test_fingerprint(&self.source)?,
            class_names: train.class_names.clone(),
            fit,
            proxy,
        };
        fs::publish_json(&out.join("split.json"), &division)?;
        Ok(Outcome::Done(summary))
    }
}

/// Deals the images of each class, in a keyed order, first to the proxy folds in turn, then to `fit`.
fn divide(train: &Dataset, config: &Split) -> Result<(Vec<usize>, Vec<Vec<usize>>)> {
    let mut fit = Vec::new();
    let mut proxy = vec![Vec::new(); config.proxy_folds];
    for class in 0..train.class_names.len() {
        let members: Vec<usize> = (0..train.len()).filter(|&i| train.labels[i] as usize == class).collect();
        let n_proxy = (members.len() as f64 * config.proxy_fraction).round() as usize;
        if n_proxy < config.proxy_folds || n_proxy == members.len() {
            bail!(
                Data,
                "class {class} ('{}') of {} has {} images: too few for {} proxy folds of {:.0} % together",
                train.class_names[class],
                config.source,
                members.len(),
                config.proxy_folds,
                100.0 * config.proxy_fraction
            );
        }
        let order = Permutation::new(
            config.seed,
            (u64::from(stream::ORDER) << 32) | class as u64,
            members.len() as u64,
        );
        for position in 0..members.len() {
            let image = members[order.at(position as u64) as usize];
            if position < n_proxy {
                proxy[position % config.proxy_folds].push(image);
            } else {
                fit.push(image);
            }
        }
    }
    fit.sort_unstable();
    proxy.iter_mut().for_each(|fold| fold.sort_unstable());
    Ok((fit, proxy))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_disjoint_complete_and_stratified() -> Result<()> {
        let config = Split::default();
        let train = load_train(&config.source, 0, 0)?;
        let (fit, proxy) = divide(&train, &config)?;
        let mut all: Vec<usize> = fit.iter().chain(proxy.iter().flatten()).copied().collect();
        all.sort_unstable();
        assert_eq!(all, (0..train.len()).collect::<Vec<_>>());
        for class in 0..10 {
            let of = |part: &[usize]| part.iter().filter(|&&i| train.labels[i] == class).count() as f64;
            let share = of(&proxy.concat()) / (of(&fit) + of(&proxy.concat()));
            assert!((share - 0.3).abs() < 0.01, "class {class}: {share}");
        }
        Ok(())
    }

    #[test]
    fn a_set_is_stopped_and_measured_on_different_images() -> Result<()> {
        let config = Split::default();
        let train = load_train(&config.source, 0, 0)?;
        let (fit, proxy) = divide(&train, &config)?;
        let division = Division {
            schema: String::new(),
            source: config.source.clone(),
            limit: 0,
            max_bad: 0,
            source_fingerprint: String::new(),
            test_fingerprint: None,
            class_names: Vec::new(),
            fit,
            proxy,
        };
        let real = Real { train, division };
        assert_eq!(real.proxy_stop(0).pixels, real.proxy_measure(1, 2).pixels);
        assert_eq!(real.proxy_stop(1).pixels, real.proxy_measure(0, 2).pixels);
        // Three sets on two folds: sets 0 and 2 are stopped on fold 0 and share fold 1.
        let measured: Vec<Dataset> = (0..3).map(|f| real.proxy_measure(f, 3)).collect();
        assert_eq!(measured.iter().map(Dataset::len).sum::<usize>(), real.proxy().len());
        assert!(measured.iter().all(|part| part.len() > 100));
        Ok(())
    }
}
