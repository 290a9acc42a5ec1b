//! Samplers, which turn noise into images, one per file.
//!
//! A sampler is one function from an image at a noise level to the image at the next one. It sees the network only
//! through the denoiser D(x; σ), the predicted image, and knows no schedule: see [`Level`](super::Level).
//! [`sample()`] does the rest, so that every sampler can be stopped, saved and resumed, and treats all elements of a
//! batch alike.

mod ddim;
mod ddpm;
mod dpm_solver;
mod euler;
mod heun;
mod ipndm;
mod plan;
mod sample;
mod step;

use serde::{Deserialize, Serialize};

use self::step::Step;
pub use self::{
    plan::Plan,
    sample::{Start, sample},
    step::{Denoise, Noise, Stride, Trajectory, Variance},
};
use crate::Result;

/// Which sampler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SamplerKind {
    /// Ancestral sampling (Ho et al. 2020, Alg. 2).
    Ddpm,
    /// Denoising diffusion implicit models (Song et al. 2021, Eq. 12).
    Ddim,
    /// DPM-Solver++(2M) (Lu et al. 2022, Alg. 2).
    #[serde(rename = "dpm-solver++")]
    DpmSolver,
    /// Improved pseudo numerical methods of order 4 (Zhang & Chen 2023, App. H.2).
    Ipndm,
    /// Heun's method, with two network calls per step (Karras et al. 2022, Alg. 1).
    Heun,
    /// Euler's method (Karras et al. 2022, Alg. 1 without its correction).
    Euler,
}

impl SamplerKind {
    /// The default number of steps for a model with `total` training steps: all of them with ddpm and ddim, 50 with
    /// the solvers.
    pub fn default_steps(self, total: usize) -> usize {
        match self {
            Self::Ddpm | Self::Ddim => total,
            _ => total.min(50),
        }
    }

    /// Whether it is one of those that in `diffusers` go by σ, not by t: with Karras' levels between the first and the last
    /// that are visited, linspace spacing between whole steps, and noise of σ alone at the first level.
    fn goes_by_sigma(self) -> bool {
        matches!(self, Self::Heun | Self::Euler)
    }

    /// One step of the sampler.
    fn step(self, step: &Step, denoise: Denoise, noise: Noise) -> Result<Trajectory> {
        match self {
            Self::Ddpm => ddpm::step(step, denoise, noise),
            Self::Ddim => ddim::step(step, denoise, noise),
            Self::DpmSolver => dpm_solver::step(step, denoise),
            Self::Ipndm => ipndm::step(step, denoise),
            Self::Heun => heun::step(step, denoise),
            Self::Euler => euler::step(step, denoise),
        }
    }
}

named! {
    /// Which of the T training steps are visited when there are fewer sampling steps (Lin et al. 2024, Table 2).
    pub enum Spacing {
        /// Every ⌊T / steps⌋-th training step, from 0.
        Leading = "leading",
        /// Every T / steps-th training step, from T - 1 downwards.
        Trailing = "trailing",
        /// Evenly spaced from 0 to T - 1, both included.
        Linspace = "linspace",
    }
}

/// How to sample. [`SchedulerConfig::sampler`](crate::diffusion::SchedulerConfig::sampler) is what a model asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerConfig {
    /// Which sampler.
    pub kind: SamplerKind,
    /// The number of steps. Each is one call of the network; Heun's method makes twice as many, less one.
    pub steps: usize,
    /// How much noise DDIM adds: 0 is deterministic, 1 is ancestral sampling. No effect with other samplers.
    pub eta: f64,
    /// The absolute value to which DDPM, DDIM and Heun's method clip the predicted image at every step. No effect
    /// with other samplers, as in `diffusers`.
    pub clip: Option<f64>,
    /// The variance of DDPM's noise. No effect with other samplers.
    pub variance: Variance,
    /// Which steps are visited. No effect with EDM.
    pub spacing: Spacing,
    /// An offset added to the steps with leading spacing.
    pub steps_offset: usize,
    /// Whether DDIM ends at ᾱ = 1, instead of the ᾱ of step 0.
    pub final_alpha_bar_is_one: bool,
    /// Whether σ falls from the first to the last in equal steps of σ^(1/7) (Karras et al. 2022, Eq. 5), with
    /// Euler, Heun and DPM-Solver++. EDM's σ always does.
    pub karras_sigmas: bool,
}

#[cfg(test)]
mod tests;
