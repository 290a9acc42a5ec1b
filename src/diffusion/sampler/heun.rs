//! Heun's method (Karras et al. 2022, Alg. 2).

use super::step::{Denoise, Noise, Step, Trajectory, mix};
use crate::Result;

/// Euler's step, after the noise of churn, corrected by the slope where it ended; the step to σ = 0 is uncorrected.
pub(super) fn step(step: &Step, denoise: Denoise, noise: Noise) -> Result<Trajectory> {
    let (x, at) = step.churned(noise)?;
    let (from, to) = (at.sigma, step.stride().to);
    let x_start = step.clipped(&denoise(&x, at)?.image)?;
    let kept = to.sigma / from;
    let mut next = mix(1.0 - kept, &x_start, kept, &x)?;
    if to.sigma > 0.0 {
        let slope = ((&x - x_start)? / from)?;
        let there = ((&next - step.clipped(&denoise(&next, to)?.image)?)? / to.sigma)?;
        next = mix(1.0, &x, (to.sigma - from) / 2.0, &(slope + there)?)?;
    }
    Ok(Trajectory { x: next, history: Vec::new() })
}
