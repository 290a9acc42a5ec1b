//! Samplers: from noise to images, one sampler a file.
//!
//! A sampler is one function from an image at a noise level to the image at the next one. It sees the network only
//! through the denoiser D(x; σ), the predicted image, and knows no schedule: see [`Level`]. [`sample`] does the
//! rest, so that every sampler can be stopped, saved and resumed, and treats every element of a batch alike.

mod ddim;
mod ddpm;
mod dpm_solver;
mod euler;
mod heun;
mod ipndm;
mod plan;

use candle_core::Tensor;
pub use plan::{Plan, Stride};
use serde::{Deserialize, Serialize};

use super::{Level, Process};
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
    /// Heun's method, two calls of the network a step (Karras et al. 2022, Alg. 1).
    Heun,
    /// Euler's method (Karras et al. 2022, Alg. 1 without its correction).
    Euler,
}

impl SamplerKind {
    /// How many steps are made if nobody says, for a model of `total` training steps: all of them with the samplers that
    /// models are trained for, 50 with the solvers.
    pub fn default_steps(self, total: usize) -> usize {
        match self {
            Self::Ddpm | Self::Ddim => total,
            _ => total.min(50),
        }
    }
}

/// The variance of the noise that ancestral sampling adds (Ho et al. 2020, §3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variance {
    /// β̃, right for data that are one point.
    FixedSmall,
    /// β, right for data that are N(0, 1).
    FixedLarge,
}

named! {
    /// Which of the T training steps are visited when there are fewer sampling steps (Lin et al. 2024, Table 2).
    pub enum Spacing {
        /// Every ⌊T / steps⌋-th, from 0.
        Leading = "leading",
        /// Every T / steps-th, from T - 1 down.
        Trailing = "trailing",
        /// In equal steps from 0 to T - 1, both included.
        Linspace = "linspace",
    }
}

/// How to sample. [`SchedulerConfig::sampler`](super::SchedulerConfig::sampler) is what a model asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerConfig {
    /// Which sampler.
    pub kind: SamplerKind,
    /// Steps: calls of the network, of which Heun's method makes twice as many less one.
    pub steps: usize,
    /// DDIM's share of noise: 0 is deterministic, 1 is ancestral sampling. Of no effect with the others.
    pub eta: f64,
    /// To which absolute value DDPM, DDIM and Heun's method clip the predicted image at every step. Of no effect
    /// with the others, as in `diffusers`.
    pub clip: Option<f64>,
    /// DDPM's noise. Of no effect with the others.
    pub variance: Variance,
    /// Which steps are visited, of no effect with EDM.
    pub spacing: Spacing,
    /// Added to the steps of leading spacing.
    pub steps_offset: usize,
    /// Whether DDIM ends at ᾱ = 1, instead of the ᾱ of step 0.
    pub final_alpha_bar_is_one: bool,
    /// Whether σ falls from the first to the last in equal steps of σ^(1/7) (Karras et al. 2022, Eq. 5), with Euler,
    /// Heun and DPM-Solver++. EDM's always do.
    pub karras_sigmas: bool,
}

/// An image on its way, and what its sampler remembers of earlier steps.
#[derive(Clone, Debug)]
pub struct Trajectory {
    /// The image and σ times its noise.
    pub x: Tensor,
    /// Predicted images or noise of the steps before, the latest first.
    pub history: Vec<Tensor>,
}

/// D(x; σ): the image predicted from `x`, an image and `level.sigma` times its noise.
pub type Denoise<'a> = &'a mut dyn FnMut(&Tensor, Level) -> Result<Tensor>;

/// Fresh noise for a sampling step, asked for only where some is added.
pub type Noise<'a> = &'a mut dyn FnMut(u32) -> Result<Tensor>;

/// What a sampler sees of a step.
struct Step<'a> {
    config: &'a SamplerConfig,
    strides: &'a [Stride],
    i: usize,
    x: &'a Tensor,
    history: &'a [Tensor],
}

impl Step<'_> {
    fn stride(&self) -> Stride {
        self.strides[self.i]
    }

    /// The predicted image, within the bounds that are set.
    fn clipped(&self, x_start: &Tensor) -> Result<Tensor> {
        Ok(match self.config.clip {
            Some(bound) => x_start.clamp(-bound, bound)?,
            None => x_start.clone(),
        })
    }
}

/// `a · x + b · y`; a term whose factor is 0 is left out, and not even read.
fn mix(a: f64, x: &Tensor, b: f64, y: &Tensor) -> Result<Tensor> {
    Ok(match (a, b) {
        (_, 0.0) => (x * a)?,
        (0.0, _) => (y * b)?,
        _ => ((x * a)? + (y * b)?)?,
    })
}

/// Turns noise into images.
///
/// `start`: noise `(b, h, w, c)` f32 from N(0, 1), or what an earlier run had saved. `on_step(done, …)` is called after
/// each step with the number of steps done; a run that saved them goes on to the same images.
///
/// Returns images in about [-1, 1], shaped like the noise. An element never depends on another one of the batch,
/// unless `denoise` makes it so. Fails with what the closures fail with, and with
/// [`Error::Usage`](crate::Error::Usage) if the plan has fewer steps than are done.
pub fn sample(
    config: &SamplerConfig,
    plan: &Plan,
    start: Start,
    denoise: Denoise,
    noise: Noise,
    on_step: &mut dyn FnMut(usize, &Trajectory) -> Result<()>,
) -> Result<Tensor> {
    let strides = plan.strides();
    let (first, mut at) = match start {
        Start::Noise(noise) => (0, Trajectory { x: (noise * plan.initial_scale())?, history: Vec::new() }),
        Start::Saved(done, at) => (done, at),
    };
    if first > strides.len() {
        bail!(Usage, "the sampler is to start at step {first}, but has {}", strides.len());
    }
    for i in first..strides.len() {
        let step = Step { config, strides, i, x: &at.x, history: &at.history };
        at = match config.kind {
            SamplerKind::Ddpm => ddpm::step(&step, denoise, noise),
            SamplerKind::Ddim => ddim::step(&step, denoise, noise),
            SamplerKind::DpmSolver => dpm_solver::step(&step, denoise),
            SamplerKind::Ipndm => ipndm::step(&step, denoise),
            SamplerKind::Heun => heun::step(&step, denoise),
            SamplerKind::Euler => euler::step(&step, denoise),
        }?;
        let scale = plan.scale_after(i);
        if scale != 1.0 {
            at.x = (at.x * scale)?;
        }
        on_step(i + 1, &at)?;
    }
    Ok(at.x)
}

/// Where [`sample`] begins.
pub enum Start {
    /// With noise from N(0, 1).
    Noise(Tensor),
    /// With what was saved after that many steps.
    Saved(usize, Trajectory),
}

#[cfg(test)]
mod tests;
