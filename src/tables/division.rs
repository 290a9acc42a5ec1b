//! The division of the real images by purpose.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{
    Result,
    data::{self, Dataset, Part, Source},
    fs::{self, Record},
    stage::Input,
};

/// The input of stages that read the divided real images.
pub const SPLIT: Input = Input::of("split", &["split"]);

/// `split.json`: the indices of the training images that serve each purpose, ascending.
#[derive(Debug, Serialize, Deserialize)]
pub struct Division {
    /// `proxyset.split/1`.
    pub schema: String,
    /// The real data.
    pub source: Source,
    /// How many training images, from the first on, it divides; 0 for all, or for those drawn.
    pub limit: usize,
    /// How many training images, drawn evenly over the classes, it divides; 0 for all, or for the first.
    #[serde(default)]
    pub drawn: usize,
    /// Unreadable rows that were tolerated.
    pub max_bad: usize,
    /// The fingerprint of the training file or files.
    pub source_fingerprint: String,
    /// The fingerprint of the test files, if there are any, so that later comparisons use the same images.
    pub test_fingerprint: Option<String>,
    /// The names of the classes.
    pub class_names: Vec<String>,
    /// For generators, classifiers and discriminators to learn from.
    pub fit: Vec<usize>,
    /// For stopping, calibrating and measuring discriminators; unseen by generators.
    pub proxy: Vec<Vec<usize>>,
}

/// The real training data with its division.
pub struct Real {
    /// All training images.
    pub train: Dataset,
    /// What each of them is used for.
    pub division: Division,
}

impl Record for Division {
    const FILE: &'static str = "split.json";
}

impl Real {
    /// Reads `split.json` in `dir` and the data that it divides.
    ///
    /// Fails with [`crate::Error::Data`] if the data have changed since.
    pub fn load(dir: &Path) -> Result<Self> {
        let division = Division::read(dir)?;
        let found = division.source.fingerprint(data::OfficialSplit::Train)?;
        if found != division.source_fingerprint {
            bail!(
                Data,
                "{} has changed since it was split: BLAKE3 {}, expected {}",
                division.source,
                fs::short(&found, 16),
                fs::short(&division.source_fingerprint, 16)
            );
        }
        let part = match division {
            Division { limit: 0, drawn: 0, .. } => Part::All,
            Division { limit: 0, drawn, .. } => Part::Drawn(drawn),
            Division { limit, .. } => Part::First(limit),
        };
        Ok(Self { train: load_train(&division.source, part, division.max_bad)?, division })
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
pub(crate) fn test_fingerprint(source: &Source) -> Result<Option<String>> {
    source.has(data::OfficialSplit::Test).then(|| source.fingerprint(data::OfficialSplit::Test)).transpose()
}

/// The training images to divide.
pub(crate) fn load_train(source: &Source, part: Part, max_bad: usize) -> Result<Dataset> {
    source.load_part(data::OfficialSplit::Train, part, max_bad)
}
