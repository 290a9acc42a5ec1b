//! The trait of a stage, and its type-erased form.

use serde_json::Value;

use super::{Input, Job};
use crate::{Result, progress, settings::Settings};

/// A stage; see the module.
pub trait Stage: Settings + Default + Clone + Send + Sync + 'static {
    /// The verb, and the name of the pipeline's table.
    const NAME: &'static str;
    /// What the stage does, in one line.
    const ABOUT: &'static str;
    /// The keys that name inputs. In the fingerprint, each is replaced by the fingerprint of the input.
    const INPUTS: &'static [Input];
    /// The keys that do not change a byte of the output and are therefore not part of the fingerprint.
    const RUNTIME: &'static [&'static str] = &[];
    /// How often the output of this stage alone has changed. It is added to the format version, so that this
    /// stage's work is redone, but not that of the stages before it.
    const REVISION: u32 = 0;

    /// Whether the output contains the inputs' names, so that these matter as much as the inputs themselves.
    const KEEPS_NAMES: bool = false;

    /// The keys that have no effect given the other settings and are therefore not part of the fingerprint: for
    /// tables that several pieces of work share.
    fn unused(&self) -> Vec<&'static str> {
        Vec::new()
    }

    /// Refuses impossible settings with [`Error::Usage`](crate::Error::Usage), before anything is read or written.
    fn validate(&self) -> Result<()>;
    /// Refuses finished inputs that do not belong together, as [`Self::run`] would, so that a run notices before it
    /// does long work for other stages. Cheap; ignores inputs that are not finished.
    fn check_inputs(&self) -> Result<()> {
        Ok(())
    }
    /// How much work this is, for `plan`: `5000 steps of 64 images`.
    fn amount(&self) -> String;
    /// Does the work. All problems with the inputs are found before [`Job::open`] is called.
    ///
    /// Returns the summary that goes into `done.json` and, with `--json`, to stdout.
    fn run(&self, job: &Job) -> Result<Outcome>;
}

/// What a stage reports when it returns.
pub enum Outcome {
    /// Everything is made; the summary is kept in `done.json`.
    Done(Value),
    /// This process's share is made, but others' are not yet (`generate --shards`).
    Partial(Value),
}

/// A stage with its type erased.
pub trait AnyStage: Send + Sync {
    /// [`Stage::NAME`].
    fn name(&self) -> &'static str;
    /// [`Stage::REVISION`].
    fn revision(&self) -> u32;
    /// [`Stage::validate`].
    fn validate(&self) -> Result<()>;
    /// [`Stage::check_inputs`].
    fn check_inputs(&self) -> Result<()>;
    /// [`Stage::amount`].
    fn amount(&self) -> String;
    /// [`Stage::run`].
    fn run(&self, job: &Job) -> Result<Outcome>;
    /// The settings that are set, as JSON.
    fn settings(&self) -> Value;
    /// The inputs that are set, as keys and what they name.
    fn inputs(&self) -> Vec<(&'static str, String)>;
    /// The settings that determine the output: all but inputs and run-time keys.
    fn identity(&self) -> Value;
}

impl<S: Stage> AnyStage for S {
    fn name(&self) -> &'static str {
        S::NAME
    }
    fn revision(&self) -> u32 {
        S::REVISION
    }
    fn validate(&self) -> Result<()> {
        Stage::validate(self)
    }
    fn check_inputs(&self) -> Result<()> {
        Stage::check_inputs(self)
    }
    fn amount(&self) -> String {
        Stage::amount(self)
    }
    fn run(&self, job: &Job) -> Result<Outcome> {
        Stage::run(self, job)
    }
    fn settings(&self) -> Value {
        let mut settings = serde_json::to_value(self).unwrap_or(Value::Null);
        drop_nulls(&mut settings);
        settings
    }
    fn inputs(&self) -> Vec<(&'static str, String)> {
        let settings = self.settings();
        let mut inputs = Vec::new();
        for &Input { key, .. } in S::INPUTS {
            let given = match &settings[key] {
                Value::Array(all) => all.as_slice(),
                one => std::slice::from_ref(one),
            };
            inputs.extend(given.iter().filter_map(Value::as_str).map(|name| (key, name.to_owned())));
        }
        inputs
    }
    fn identity(&self) -> Value {
        let mut settings = self.settings();
        if let Value::Object(map) = &mut settings {
            let input = |key: &str| S::INPUTS.iter().any(|input| input.key == key) && !S::KEEPS_NAMES;
            let without_effect = [S::RUNTIME, &self.unused()].concat();
            map.retain(|k, _| !input(k) && !without_effect.contains(&&**k));
        }
        settings
    }
}

/// Leaves out what is not set: TOML has no null.
fn drop_nulls(value: &mut Value) {
    if let Value::Object(map) = value {
        map.retain(|_, value| !value.is_null());
        map.values_mut().for_each(drop_nulls);
    }
}

/// A note on stderr, prefixed with the stage's name.
pub fn note<S: Stage>(_: &S, line: &str) {
    progress::note(&format!("{}: {line}", S::NAME));
}
