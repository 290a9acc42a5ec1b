//! What a stage is: the unit of composition of a run.
//!
//! A stage is a struct of settings: its fields are the verb's flags *and* the keys of the pipeline's TOML table.
//! Defaults are written once (as flags), and unknown keys are refused. A stage reads input folders, computes a pure
//! function of them and its settings, and writes one output folder:
//!
//! ```text
//! <stage>-<fingerprint8>/  config.toml   what is computed here: settings, inputs, fingerprint; written first
//!                          …             what the stage makes
//!                          done.json     what was made, how long it took, hashes; written last
//! ```
//!
//! A folder with `done.json` is finished; work in a folder without it continues where it stopped. The stages
//! themselves are in `stages`, the tables that they exchange in `tables`.

mod contract;
mod execute;
mod fingerprint;
mod folder;
mod input;
mod job;
#[macro_use]
mod registry;

pub use self::{
    contract::{AnyStage, Outcome, Stage, note},
    execute::execute,
    fingerprint::{fingerprint, input_fingerprint},
    folder::{
        Done, FileRecord, FolderConfig, InputRecord, State, is_stage_folder, read_config, read_done, state,
        verify_files,
    },
    input::{Input, Origin},
    job::Job,
    registry::StageKind,
};
