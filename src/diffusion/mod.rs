//! Denoising diffusion (Ho et al. 2020): schedule, forward process, loss, samplers.
//!
//! Networks come in as closures. Only [`DiffusionModel`], the model folder, knows that they are U-Nets.

mod loss;
mod model;
mod process;
pub mod sampler;
mod schedule;
mod scheduler_config;

pub use loss::eps_mse;
pub use model::DiffusionModel;
pub use process::q_sample;
pub use schedule::{Posterior, Schedule};
pub use scheduler_config::{BetaSchedule, PredictionType, SchedulerClass, SchedulerConfig, VarianceType};
