//! The real program, in fresh folders, as a user would run it.

mod arc;
mod bad_input;
mod convert;
mod cuda;
mod curate;
mod discriminators;
mod documents;
#[cfg(feature = "extractors")]
mod extractors;
mod generate;
mod layers;
mod parts;
mod pipeline;
mod resume;
mod run;
mod training;
