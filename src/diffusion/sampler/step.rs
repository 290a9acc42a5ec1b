//! A sampling step: what a sampler is given and what it returns.

use candle_core::Tensor;

use crate::{Result, diffusion::Level};

named! {
    /// The variance of the noise that ancestral sampling adds (Ho et al. 2020, §3.2), under `diffusers`' names.
    pub enum Variance {
        /// β̃, right for data that are a single point.
        FixedSmall = "fixed_small",
        /// The same as fixed_small, which `diffusers` computes from its logarithm.
        FixedSmallLog = "fixed_small_log",
        /// β, right for data that are N(0, 1).
        FixedLarge = "fixed_large",
    }
}

/// A step of a sampler, from one noise level to a lower one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stride {
    /// The level of the image.
    pub from: Level,
    /// The level of the next image.
    pub to: Level,
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
pub type Denoise<'a> = &'a mut dyn FnMut(&Tensor, Level) -> Result<Tensor>;

/// Fresh noise for a sampling step, drawn only where some is added.
pub type Noise<'a> = &'a mut dyn FnMut(u32) -> Result<Tensor>;

/// What a sampler is given for a step.
pub(super) struct Step<'a> {
    /// The share of fresh noise, with DDIM.
    pub(super) eta: f64,
    /// The absolute value to which predicted images are clipped.
    pub(super) clip: Option<f64>,
    /// The variance of ancestral sampling's noise.
    pub(super) variance: Variance,
    pub(super) strides: &'a [Stride],
    pub(super) i: usize,
    pub(super) x: &'a Tensor,
    pub(super) history: &'a [Tensor],
}

impl Step<'_> {
    pub(super) fn stride(&self) -> Stride {
        self.strides[self.i]
    }

    /// The predicted image, within the bounds that are set.
    pub(super) fn clipped(&self, x_start: &Tensor) -> Result<Tensor> {
        Ok(match self.clip {
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
