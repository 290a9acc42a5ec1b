//! Denoising diffusion implicit models (Song et al. 2021, Eq. 12 and 16).

use super::step::{Denoise, Noise, Step, Trajectory, mix};
use crate::Result;

/// The predicted image with the noise of the next level; `eta` says how much of that is fresh.
///
/// The rest is the noise as predicted before the image was clipped.
pub(super) fn step(step: &Step, denoise: Denoise, noise: Noise) -> Result<Trajectory> {
    let stride = step.stride();
    let x_start = denoise(step.x, stride.from)?.image;
    let (from, to) = (stride.from.sigma.powi(2), stride.to.sigma.powi(2));
    let fresh = step.config.eta.powi(2) * to * (1.0 - to / from);
    let predicted = ((to - fresh).sqrt(), stride.from.sigma);
    let eps = ((step.x - &x_start)? / predicted.1)?;
    let mut x = mix(1.0, &step.clipped(&x_start)?, predicted.0, &eps)?;
    if fresh > 0.0 {
        x = mix(1.0, &x, fresh.sqrt(), &noise(step.i as u32)?)?;
    }
    Ok(Trajectory { x, history: Vec::new() })
}
