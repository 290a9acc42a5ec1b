//! Synthetic image data sets that make classifiers more robust to adversarial examples, and the proof
//! that they do.
//!
//! (crate documentation is completed below by the map of modules)

#[macro_use]
mod error;

pub mod attack;
pub mod cli;
pub mod curate;
pub mod data;
pub mod device;
pub mod diffusion;
pub mod fs;
pub mod kernels;
pub mod nn;
pub mod objective;
pub mod pipeline;
pub mod progress;
pub mod proxy;
pub mod rng;
pub mod stage;
pub mod stats;

pub use error::{Error, Result, ResultExt};
