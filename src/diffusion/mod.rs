//! Denoising diffusion (Ho et al. 2020; Karras et al. 2022): noise levels, what networks predict, loss, samplers.
//!
//! Networks are passed as closures. Only [`DiffusionModel`], the model folder, knows about actual networks.

mod loss;
mod model;
mod precondition;
mod process;
pub mod sampler;
mod schedule;
mod scheduler_config;
mod scheduler_file;
mod weights;

pub use loss::denoising_loss;
pub use model::{ClassConditioning, DiffusionModel};
pub use precondition::{Denoised, Level, Preconditioning, Prediction, PredictionType};
pub use process::{Process, SigmaRange, TrainingPair};
pub use schedule::NoiseSchedule;
pub use scheduler_config::{AlgorithmType, BetaSchedule, SchedulerClass, SchedulerConfig};

#[cfg(test)]
mod tests;
