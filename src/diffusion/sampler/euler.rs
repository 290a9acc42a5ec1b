//! Euler's method (Karras et al. 2022, Alg. 1 without its correction).

use super::step::{Denoise, Step, Trajectory, mix};
use crate::Result;

/// A step along dx/dσ = (x - D(x; σ)) / σ (Karras et al. 2022, Eq. 1 and 3).
pub(super) fn step(step: &Step, denoise: Denoise) -> Result<Trajectory> {
    let stride = step.stride();
    let x_start = denoise(step.x, stride.from)?;
    let kept = stride.to.sigma / stride.from.sigma;
    Ok(Trajectory { x: mix(1.0 - kept, &x_start, kept, step.x)?, history: Vec::new() })
}
