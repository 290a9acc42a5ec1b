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
mod pndm;
mod sample;
mod step;
mod timesteps;
mod unipc;

use serde::{Deserialize, Serialize};

use self::step::Step;

pub use self::{
    plan::Plan,
    sample::{Start, sample},
    step::{Churn, Denoise, Noise, StepConfig, Stride, Trajectory, UniPcVariant, Variance},
};
use crate::Result;

/// Which sampler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SamplerKind {
    /// Ancestral sampling (Ho et al. 2020, Alg. 2).
    Ddpm,
    /// Denoising diffusion implicit models (Song et al. 2021, Eq. 12).
    Ddim,
    /// DPM-Solver++(2M) (Lu et al. 2022, Alg. 2).
    #[serde(rename = "dpm-solver++")]
    DpmSolver,
    /// SDE-DPM-Solver++(2M), which adds fresh noise (Lu et al. 2022, §5).
    #[serde(rename = "sde-dpm-solver++")]
    SdeDpmSolver,
    /// UniPC, a unified predictor-corrector (Zhao et al. 2023).
    #[serde(rename = "unipc")]
    UniPc,
    /// Pseudo numerical methods (Liu et al. 2022).
    Pndm,
    /// Improved pseudo numerical methods of order 4 (Zhang & Chen 2023, App. H.2).
    Ipndm,
    /// Heun's method, with two network calls per step (Karras et al. 2022, Alg. 2).
    Heun,
    /// Euler's method (Karras et al. 2022, Alg. 2 without its correction).
    Euler,
    /// Ancestral sampling with the small variance at the levels of Euler's method.
    EulerAncestral,
}

impl SamplerKind {
    /// Whether it is one of those that in `diffusers` go by σ, not by t: with Karras' levels between the first and the last
    /// that are visited, linspace spacing between whole steps, and noise of σ alone at the first level.
    fn goes_by_sigma(self) -> bool {
        matches!(self, Self::Heun | Self::Euler | Self::EulerAncestral)
    }

    /// One step of the sampler.
    fn step(self, step: &Step, denoise: Denoise, noise: Noise) -> Result<Trajectory> {
        match self {
            Self::Ddpm | Self::EulerAncestral => ddpm::step(step, denoise, noise),
            Self::Ddim => ddim::step(step, denoise, noise),
            Self::DpmSolver => dpm_solver::step(step, denoise, None),
            Self::SdeDpmSolver => dpm_solver::step(step, denoise, Some(noise)),
            Self::UniPc => unipc::step(step, denoise),
            Self::Pndm => pndm::step(step, denoise),
            Self::Ipndm => ipndm::step(step, denoise),
            Self::Heun => heun::step(step, denoise, noise),
            Self::Euler => euler::step(step, denoise, noise),
        }
    }

    /// Whether `diffusers` places one more step for it, and leaves out the one without noise.
    fn skips_last(self) -> bool {
        matches!(self, Self::DpmSolver | Self::SdeDpmSolver | Self::UniPc)
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
    /// Which steps are visited. No effect with EDM.
    pub spacing: Spacing,
    /// An offset added to the steps with leading spacing.
    pub steps_offset: usize,
    /// Whether DDIM ends at ᾱ = 1, instead of the ᾱ of step 0.
    pub final_alpha_bar_is_one: bool,
    /// Whether σ falls from the first to the last in equal steps of σ^(1/7) (Karras et al. 2022, Eq. 5), with
    /// Euler, Heun, DPM-Solver++ and UniPC. EDM's σ always does.
    pub karras_sigmas: bool,
    /// What belongs to single samplers.
    pub step: StepConfig,
}

#[cfg(test)]
mod tests;
