//! The inputs of a stage: finished folders of other stages, or something from elsewhere.

use std::path::{Path, PathBuf};

use super::folder::{CONFIG, read_config, read_done};
use crate::{Error, Result, fs};

/// A key of a stage's settings that names an input.
#[derive(Clone, Copy, Debug)]
pub struct Input {
    /// The key.
    pub key: &'static str,
    /// Where a run takes the input from, if the stage's table does not say.
    pub from: Origin,
    /// Whether the key takes a list of inputs.
    pub several: bool,
}

/// Where a run takes an input from.
#[derive(Clone, Copy, Debug)]
pub enum Origin {
    /// The folder of the first of these stages that the run has.
    Stages(&'static [&'static str]),
    /// The real data that split divides.
    RealData,
    /// Nowhere: only a table or a flag can name the input.
    Given,
}

impl Input {
    /// The folder of one of these finished stages.
    pub const fn of(key: &'static str, stages: &'static [&'static str]) -> Self {
        Self { key, from: Origin::Stages(stages), several: false }
    }

    /// The folders of all finished stages of these kinds that a run has, and those that the table names.
    pub const fn several(key: &'static str, stages: &'static [&'static str]) -> Self {
        Self { key, from: Origin::Stages(stages), several: true }
    }

    /// The real data.
    pub const fn real_data(key: &'static str) -> Self {
        Self { key, from: Origin::RealData, several: false }
    }

    /// Something that no stage makes.
    pub const fn given(key: &'static str) -> Self {
        Self { key, from: Origin::Given, several: false }
    }

    /// Whether the input is the folder of a stage of this name.
    pub fn is_of(&self, stage: &str) -> bool {
        matches!(self.from, Origin::Stages(stages) if stages.contains(&stage))
    }

    /// Returns what is `given` as this input. Fails with [`crate::Error::Usage`] if nothing is.
    pub fn set<T>(&self, given: Option<T>, expected: &str) -> Result<T> {
        let unset = || Error::Usage(format!("{} is not set, expected {expected}", self.key));
        given.ok_or_else(unset)
    }

    /// Returns `dir`, which must be the finished work of one of the stages that make this input.
    ///
    /// Fails with [`crate::Error::Usage`] if it is missing, belongs to another stage, or is not finished.
    pub fn finished(&self, dir: Option<&Path>) -> Result<PathBuf> {
        let key = self.key;
        let stages = match self.from {
            Origin::Stages(stages) => stages,
            Origin::RealData | Origin::Given => &[],
        };
        let expected = stages.join(" or ");
        let dir = self.set(dir, &format!("the folder of a finished {expected}"))?;
        let found = dir.display();
        if !dir.join(CONFIG).is_file() {
            bail!(Usage, "{key} is '{found}', expected the folder of a finished {expected}");
        }
        let stage = read_config(dir)?.stage;
        if !stages.contains(&&*stage) {
            bail!(Usage, "{key} is '{found}', a folder of {stage}; expected one of {expected}");
        }
        if read_done(dir)?.is_none() {
            bail!(Usage, "{key} is '{found}', which is not finished; run its {stage} again first");
        }
        Ok(dir.to_path_buf())
    }

    /// The fingerprint of what the stage in `dir` was given as this input.
    pub fn fingerprint_in(&self, dir: &Path) -> Result<Option<String>> {
        let inputs = read_config(dir)?.inputs;
        Ok(inputs.into_iter().find(|input| input.key == self.key).map(|input| input.fingerprint))
    }

    /// Fails with [`crate::Error::Usage`] unless the stage in `dir`, the input `name`, was itself made with `input`
    /// as its input of this kind.
    pub fn expect_in(&self, name: &str, dir: &Path, input: &Path) -> Result<()> {
        self.expect_same(name, dir, self.fingerprint_in(dir)?.as_deref(), input)
    }

    /// Fails with [`crate::Error::Usage`] unless the input of this kind with which `dir`, the input `name`, was made,
    /// has the fingerprint of `input`.
    pub(crate) fn expect_same(
        &self,
        name: &str,
        dir: &Path,
        found: Option<&str>,
        input: &Path,
    ) -> Result<()> {
        let (key, given) = (self.key, read_config(input)?.fingerprint);
        if found != Some(&given) {
            bail!(
                Usage,
                "{name} is '{}', which was made with {key} {}, expected {}, that of '{}': give that one, or make {name} again",
                dir.display(),
                found.map_or_else(|| "unknown".into(), |found| fs::short(found, 8)),
                fs::short(&given, 8),
                input.display()
            );
        }
        Ok(())
    }
}
