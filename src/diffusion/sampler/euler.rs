//! Euler's method (Karras et al. 2022, Alg. 2 without its correction).

use super::step::{Denoise, Noise, Step, Trajectory, mix};
use crate::Result;

/// A step along dx/dσ = (x - D(x; σ)) / σ (Karras et al. 2022, Eq. 1 and 3), after the noise of churn.
pub(super) fn step(step: &Step, denoise: Denoise, noise: Noise) -> Result<Trajectory> {
    let (x, at) = step.churned(noise)?;
    let x_start = denoise(&x, at)?.image;
    let kept = step.stride().to.sigma / at.sigma;
    Ok(Trajectory { x: mix(1.0 - kept, &x_start, kept, &x)?, history: Vec::new() })
}
