//! A sampling step: what a sampler is given and what it returns.

use candle_core::Tensor;

use crate::{
    Result,
    diffusion::{Denoised, Level, Prediction},
};

named! {
    /// The variance of the noise that ancestral sampling adds (Ho et al. 2020, §3.2), under `diffusers`' names.
    pub enum Variance {
        /// β̃, right for data that are a single point.
        FixedSmall = "fixed_small",
        /// The same as fixed_small, which `diffusers` computes from its logarithm.
        FixedSmallLog = "fixed_small_log",
        /// β, right for data that are N(0, 1).
        FixedLarge = "fixed_large",
        /// What the network predicts.
        Learned = "learned",
        /// Between β̃ and β on a logarithmic scale, as the network predicts (Nichol & Dhariwal 2021, Eq. 15).
        LearnedRange = "learned_range",
    }
}

impl Variance {
    /// Whether the network predicts it.
    pub fn is_learned(self) -> bool {
        matches!(self, Self::Learned | Self::LearnedRange)
    }
}

named! {
    /// The function B(h) of UniPC, under `diffusers`' names.
    pub enum UniPcVariant {
        /// B(h) = h.
        Bh1 = "bh1",
        /// B(h) = eʰ - 1.
        Bh2 = "bh2",
    }
}

/// The noise that is added before each step, to a level above the image's: σ (1 + γ) with γ = min(`amount` / steps,
/// √2 - 1) (Karras et al. 2022, Alg. 2).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Churn {
    /// S_churn; 0 is none.
    pub amount: f64,
    /// S_min: the lowest σ at which noise is added.
    pub min: f64,
    /// S_max: the highest.
    pub max: f64,
    /// S_noise: the standard deviation of the added noise.
    pub noise: f64,
}

impl Churn {
    /// No added noise.
    pub const NONE: Self = Self { amount: 0.0, min: 0.0, max: f64::INFINITY, noise: 1.0 };

    /// The noise level to which σ is raised.
    pub(super) fn raised(&self, sigma: f64, steps: usize) -> f64 {
        let within = (self.min..=self.max).contains(&sigma);
        let gamma = (self.amount / steps as f64).min(std::f64::consts::SQRT_2 - 1.0);
        if within { sigma * (1.0 + gamma) } else { sigma }
    }
}

/// What belongs to single samplers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepConfig {
    /// How much noise DDIM adds: 0 is deterministic, 1 is ancestral sampling.
    pub eta: f64,
    /// The absolute value to which DDPM, DDIM and Heun's method clip the predicted image at every step. The
    /// others do not, as in `diffusers`.
    pub clip: Option<f64>,
    /// The variance of DDPM's noise.
    pub variance: Variance,
    /// The noise that Heun's and Euler's methods add at every step.
    pub churn: Churn,
    /// Whether PNDM begins without Runge-Kutta steps.
    pub skip_prk_steps: bool,
    /// The order of UniPC.
    pub solver_order: usize,
    /// The function B(h) of UniPC.
    pub unipc: UniPcVariant,
    /// What the network predicts, which PNDM extrapolates.
    pub prediction: Prediction,
}

/// A step of a sampler, from one noise level to a lower one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stride {
    /// The level of the image.
    pub from: Level,
    /// The level of the next image.
    pub to: Level,
    /// Levels on the way, for samplers that have any, otherwise `from`: with churn the one to which noise is added, with
    /// PNDM where the first prediction leads, and where the second is made or begins.
    pub between: [Level; 2],
}

impl Stride {
    /// A step without levels on the way.
    pub(super) fn new(from: Level, to: Level) -> Self {
        Self { from, to, between: [from; 2] }
    }
}

/// An image being sampled, and what its sampler remembers of earlier steps.
#[derive(Clone, Debug)]
pub struct Trajectory {
    /// The image and σ times its noise.
    pub x: Tensor,
    /// Predicted images or noise of the previous steps, the latest first.
    pub history: Vec<Tensor>,
}

/// D(x; σ): the image predicted from `x`, an image and `level.sigma` times its noise.
pub type Denoise<'a> = &'a mut dyn FnMut(&Tensor, Level) -> Result<Denoised>;

/// Fresh noise for a sampling step, drawn only where some is added.
pub type Noise<'a> = &'a mut dyn FnMut(u32) -> Result<Tensor>;

/// What a sampler is given for a step.
pub(super) struct Step<'a> {
    pub(super) config: &'a StepConfig,
    pub(super) strides: &'a [Stride],
    pub(super) i: usize,
    pub(super) x: &'a Tensor,
    pub(super) history: &'a [Tensor],
}

impl Step<'_> {
    pub(super) fn stride(&self) -> Stride {
        self.strides[self.i]
    }

    /// The image with the noise of churn added (Karras et al. 2022, Alg. 2, line 6), and its level.
    pub(super) fn churned(&self, noise: Noise) -> Result<(Tensor, Level)> {
        let Stride { from, between: [at, _], .. } = self.stride();
        if at == from {
            return Ok((self.x.clone(), from));
        }
        let added = self.config.churn.noise * (at.sigma.powi(2) - from.sigma.powi(2)).sqrt();
        Ok((mix(1.0, self.x, added, &noise(self.i as u32)?)?, at))
    }

    /// The predicted image, within the bounds that are set.
    pub(super) fn clipped(&self, x_start: &Tensor) -> Result<Tensor> {
        Ok(match self.config.clip {
            Some(bound) => x_start.clamp(-bound, bound)?,
            None => x_start.clone(),
        })
    }
}

/// `a · x + b · y`; a term whose factor is 0 is left out without being read.
pub(super) fn mix(a: f64, x: &Tensor, b: f64, y: &Tensor) -> Result<Tensor> {
    Ok(match (a, b) {
        (_, 0.0) => (x * a)?,
        (0.0, _) => (y * b)?,
        _ => ((x * a)? + (y * b)?)?,
    })
}
