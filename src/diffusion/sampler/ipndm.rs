//! Improved pseudo numerical methods for diffusion models, order 4 (iPNDM: Zhang & Chen 2023, arXiv 2204.13902,
//! App. H.2; after Liu et al. 2022).

use super::step::{Denoise, Step, Trajectory, mix};
use crate::Result;

/// The Adams-Bashforth weights for equal steps, the latest slope first.
pub(super) const WEIGHTS: [&[f64]; 4] = [
    &[1.0],
    &[3.0 / 2.0, -1.0 / 2.0],
    &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
    &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
];

/// DDIM's step with the noise extrapolated from up to four predictions; the first three steps are of lower order.
pub(super) fn step(step: &Step, denoise: Denoise) -> Result<Trajectory> {
    let stride = step.stride();
    let x_start = denoise(step.x, stride.from)?.image;
    let mut history = vec![((step.x - x_start)? / stride.from.sigma)?];
    history.extend(step.history.iter().take(3).cloned());
    let weights = WEIGHTS[history.len() - 1];
    let mut eps = (&history[0] * weights[0])?;
    for (slope, weight) in history.iter().zip(weights).skip(1) {
        eps = mix(1.0, &eps, *weight, slope)?;
    }
    let x = mix(1.0, step.x, stride.to.sigma - stride.from.sigma, &eps)?;
    Ok(Trajectory { x, history })
}
