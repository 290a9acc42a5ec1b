//! Heun's method (Karras et al. 2022, Alg. 1; deterministic, as their S_churn = 0).

use super::step::{Denoise, Step, Trajectory, mix};
use crate::Result;

/// Euler's step, corrected by the slope where it ended; the step to σ = 0 is uncorrected.
pub(super) fn step(step: &Step, denoise: Denoise) -> Result<Trajectory> {
    let stride = step.stride();
    let (from, to) = (stride.from.sigma, stride.to.sigma);
    let x_start = step.clipped(&denoise(step.x, stride.from)?)?;
    let kept = to / from;
    let mut x = mix(1.0 - kept, &x_start, kept, step.x)?;
    if to > 0.0 {
        let slope = ((step.x - x_start)? / from)?;
        let there = ((&x - step.clipped(&denoise(&x, stride.to)?)?)? / to)?;
        x = mix(1.0, step.x, (to - from) / 2.0, &(slope + there)?)?;
    }
    Ok(Trajectory { x, history: Vec::new() })
}
