//! Split: decides what each real image is used for. Made once, respected by every stage.

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    Result,
    data::{self, Dataset, Source},
    error::expect_within as expect,
    fs::Record,
    rng::{Permutation, stream},
    settings::PartSettings,
    stage::{Input, Job, Outcome, Stage},
    tables::division::{Division, load_train, test_fingerprint},
};

/// Divides the training images of a data set, class by class, into the `fit` images and the proxy folds.
///
/// Generators, classifiers and discriminators learn from the `fit` images. No generator sees the proxy images: with
/// `k` folds, the discriminators of set `f` are stopped on fold `f mod k` (proxy-stop) and measured on the others
/// (proxy-measure), so that a small data set wastes none. The test split is not touched here.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
pub struct Split {
    /// The real data: `builtin:digits`, or a folder or file of Hugging Face Parquet.
    #[arg(long, default_value = "builtin:digits")]
    pub source: Source,
    /// Which of the training images are used.
    #[command(flatten)]
    #[serde(flatten)]
    pub part: PartSettings,
    /// The share of the training images that is kept from all generators: the proxy images.
    #[arg(long, default_value_t = 0.3)]
    pub proxy_fraction: f64,
    /// Number of folds of the proxy images, at least 2.
    #[arg(long, default_value_t = 2)]
    pub proxy_folds: usize,
    /// How many unreadable rows of the source to tolerate; they are skipped and counted.
    #[arg(long, default_value_t = 0)]
    pub max_bad: usize,
    /// Seed of the division.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl Stage for Split {
    const NAME: &'static str = "split";
    const ABOUT: &'static str = "Divide the real data into images to learn from and images to measure on";
    const INPUTS: &'static [Input] = &[Input::given("source")];
    const KEEPS_NAMES: bool = true;

    fn validate(&self) -> Result<()> {
        self.part.validate()?;
        expect("proxy_fraction", self.proxy_fraction, 0.01, 0.9)?;
        expect("proxy_folds", self.proxy_folds, 2, 100)
    }

    fn amount(&self) -> String {
        let Self { part, source, proxy_fraction, .. } = self;
        format!("{} of {source}, {:.0} % of them proxy", part.part(), 100.0 * proxy_fraction)
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let train = load_train(&self.source, self.part.part(), self.max_bad)?;
        let (fit, proxy) = divide(&train, self)?;
        let out = job.open()?;
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
            limit: self.part.first.unwrap_or(0),
            drawn: self.part.limit,
            max_bad: self.max_bad,
            source_fingerprint: self.source.fingerprint(data::OfficialSplit::Train)?,
            test_fingerprint: test_fingerprint(&self.source)?,
            class_names: train.class_names.clone(),
            fit,
            proxy,
        };
        division.write(out)?;
        Ok(Outcome::Done(summary))
    }
}

/// Deals out the images of each class, in a keyed order: first to the proxy folds in turn, then to `fit`.
fn divide(train: &Dataset, config: &Split) -> Result<(Vec<usize>, Vec<Vec<usize>>)> {
    let Split { source, part, proxy_fraction, proxy_folds, seed, .. } = config;
    let mut fit = Vec::new();
    let mut proxy = vec![Vec::new(); *proxy_folds];
    for (class, name) in train.class_names.iter().enumerate() {
        let members: Vec<usize> = (0..train.len()).filter(|&i| train.labels[i] as usize == class).collect();
        let n_proxy = (members.len() as f64 * proxy_fraction).round() as usize;
        if n_proxy < *proxy_folds || n_proxy == members.len() {
            bail!(
                Data,
                "class {class} ('{name}') has {} images in {} of {source}: too few for {proxy_folds} proxy folds of {:.0} % \
                 together",
                members.len(),
                part.part(),
                100.0 * proxy_fraction
            );
        }
        let tweak = (u64::from(stream::ORDER) << 32) | class as u64;
        let order = Permutation::new(*seed, tweak, members.len() as u64);
        for position in 0..members.len() {
            let image = members[order.at(position as u64) as usize];
            if position < n_proxy {
                proxy[position % proxy_folds].push(image);
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
    use crate::{data::Part, tables::division::Real};

    #[test]
    fn parts_are_disjoint_complete_and_stratified() -> Result<()> {
        let config = Split::default();
        let train = load_train(&config.source, Part::All, 0)?;
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
    fn a_part_of_a_file_sorted_by_class_is_divided_if_it_is_drawn() -> Result<()> {
        let mut sorted = load_train(&Split::default().source, Part::All, 0)?;
        let mut order: Vec<usize> = (0..sorted.len()).collect();
        order.sort_by_key(|&row| sorted.labels[row]);
        sorted = sorted.subset(&order);
        let dir = tempfile::tempdir().expect("a temporary folder");
        for (row, label) in sorted.labels.iter().enumerate() {
            let class = dir.path().join(label.to_string());
            std::fs::create_dir_all(&class).expect("a folder");
            let png = data::encode_png(sorted.image(row), sorted.shape);
            std::fs::write(class.join(format!("{row:05}.png")), png).expect("a file");
        }
        let source: Source = dir.path().to_string_lossy().parse().map_err(crate::Error::Usage)?;
        let of = |limit, first| Split {
            part: PartSettings { limit, first },
            source: source.clone(),
            ..Split::default()
        };
        let divided = |config: Split| divide(&load_train(&config.source, config.part.part(), 0)?, &config);
        let (fit, proxy) = divided(of(100, None))?;
        assert_eq!((fit.len(), proxy.concat().len()), (70, 30));
        let error = divided(of(0, Some(100))).unwrap_err();
        assert_eq!(error.exit_code(), 65);
        assert!(error.to_string().contains("('1') has 0 images in the first 100 images of"), "{error}");
        Ok(())
    }

    #[test]
    fn a_set_is_stopped_and_measured_on_different_images() -> Result<()> {
        let config = Split::default();
        let train = load_train(&config.source, Part::All, 0)?;
        let (fit, proxy) = divide(&train, &config)?;
        let division = Division {
            schema: String::new(),
            source: config.source.clone(),
            limit: 0,
            drawn: 0,
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
