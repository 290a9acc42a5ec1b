//! What the program knows about each stage before one is made: the entries of the lists in `stages`.

use clap::{ArgMatches, Command, Error};
use toml::Table;

use super::{AnyStage, Input, Stage};
use crate::settings;

/// The stage that a table describes, or what is wrong with the table.
type OfTable = Result<Box<dyn AnyStage>, String>;

/// A kind of stage: what verbs and pipelines need in order to make one.
#[derive(Clone, Copy, Debug)]
pub struct StageKind {
    /// [`Stage::NAME`].
    pub name: &'static str,
    /// [`Stage::ABOUT`].
    pub about: &'static str,
    /// [`Stage::INPUTS`].
    pub inputs: &'static [Input],
    /// [`Stage::RUNTIME`].
    pub runtime: &'static [&'static str],
    /// Adds the stage's flags to a verb.
    pub add_flags: fn(Command) -> Command,
    /// The stage with these flags.
    pub of_flags: fn(&ArgMatches) -> Result<Box<dyn AnyStage>, Error>,
    /// The stage of the table of this name, with defaults for what it does not say. See [`settings::from_table`].
    pub of_table: fn(&str, &Table) -> OfTable,
}

impl StageKind {
    /// The kind of stage `S`.
    pub const fn of<S: Stage>() -> Self {
        Self {
            name: S::NAME,
            about: S::ABOUT,
            inputs: S::INPUTS,
            runtime: S::RUNTIME,
            add_flags: S::augment_args,
            of_flags: |matches| Ok(Box::new(S::from_arg_matches(matches)?)),
            of_table: |name, table| Ok(Box::new(settings::from_table::<S>(name, table)?)),
        }
    }
}

/// Registers the stages of a folder, in the order in which a run executes them: each with its verb, its table, and
/// its defaults, which are those of its flags.
macro_rules! register_stages {
    ($($module:ident::$stage:ident),+ $(,)?) => {
        $(
            pub use $module::$stage;

            impl Default for $stage {
                fn default() -> Self {
                    $crate::settings::from_flags(&[]).expect("every flag has a default")
                }
            }
        )+

        /// The stages of this folder, in the order in which a run executes them.
        pub const STAGES: &[$crate::stage::StageKind] = &[$($crate::stage::StageKind::of::<$stage>()),+];
    };
}
