//! What a sampler sees of a step, and what it makes of it.

use candle_core::Tensor;

use super::{SamplerConfig, Stride};
use crate::{Result, diffusion::Level};

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
pub(super) struct Step<'a> {
    pub(super) config: &'a SamplerConfig,
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
        Ok(match self.config.clip {
            Some(bound) => x_start.clamp(-bound, bound)?,
            None => x_start.clone(),
        })
    }
}

/// `a · x + b · y`; a term whose factor is 0 is left out, and not even read.
pub(super) fn mix(a: f64, x: &Tensor, b: f64, y: &Tensor) -> Result<Tensor> {
    Ok(match (a, b) {
        (_, 0.0) => (x * a)?,
        (0.0, _) => (y * b)?,
        _ => ((x * a)? + (y * b)?)?,
    })
}
