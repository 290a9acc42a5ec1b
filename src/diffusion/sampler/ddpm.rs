//! Ancestral sampling (Ho et al. 2020, Alg. 2), also with fewer steps than in training.

use super::{
    Variance,
    step::{Denoise, Noise, Step, Trajectory, mix},
};
use crate::Result;

/// A draw from q(x_next | x, x_0) with the predicted x_0.
///
/// That is Ho et al. 2020, Eq. 6 and 7, for images that are x_0 + σ ε: the mean goes from x to x_0 by the share of
/// the noise's variance that is removed.
pub(super) fn step(step: &Step, denoise: Denoise, noise: Noise) -> Result<Trajectory> {
    let stride = step.stride();
    let x_start = step.clipped(&denoise(step.x, stride.from)?)?;
    let (from, to) = (stride.from.sigma.powi(2), stride.to.sigma.powi(2));
    let kept = to / from;
    let mut x = mix(1.0 - kept, &x_start, kept, step.x)?;
    let variance = match step.variance {
        Variance::FixedSmall | Variance::FixedSmallLog => to * (1.0 - kept),
        // 1 - ᾱ / ᾱ_next, over ᾱ_next. The first training step gets no noise.
        Variance::FixedLarge if stride.from.t == 0.0 => 0.0,
        Variance::FixedLarge => (1.0 + to) * (from - to) / (1.0 + from),
    };
    if variance > 0.0 {
        x = mix(1.0, &x, variance.sqrt(), &noise(step.i as u32)?)?;
    }
    Ok(Trajectory { x, history: Vec::new() })
}
