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
    let denoised = denoise(step.x, stride.from)?;
    let x_start = step.clipped(&denoised.image)?;
    let (from, to) = (stride.from.sigma.powi(2), stride.to.sigma.powi(2));
    let kept = to / from;
    let mut x = mix(1.0 - kept, &x_start, kept, step.x)?;
    // 1 - ᾱ / ᾱ_next, over ᾱ_next as all images are.
    let large = (1.0 + to) * (from - to) / (1.0 + from);
    let variance = match step.config.variance {
        Variance::FixedSmall | Variance::FixedSmallLog => to * (1.0 - kept),
        // The first training step gets no noise.
        _ if stride.from.t == 0.0 => return Ok(Trajectory { x, history: Vec::new() }),
        Variance::FixedLarge => large,
        Variance::Learned | Variance::LearnedRange => {
            let Some(output) = denoised.variance else {
                bail!(Alarm, "the network predicts no variance, but variance_type says so")
            };
            let deviation = if step.config.variance == Variance::Learned {
                (output * (1.0 + to))?.sqrt()?
            } else {
                // Nichol & Dhariwal 2021, Eq. 15. A last step's small variance is 0; its logarithm is diffusers'.
                let small = (to * (1.0 - kept)).max(1e-20 * (1.0 + to)).ln();
                let share = output.affine(0.5, 0.5)?;
                share.affine((large.ln() - small) / 2.0, small / 2.0)?.exp()?
            };
            x = (x + (deviation * noise(step.i as u32)?)?)?;
            return Ok(Trajectory { x, history: Vec::new() });
        }
    };
    if variance > 0.0 {
        x = mix(1.0, &x, variance.sqrt(), &noise(step.i as u32)?)?;
    }
    Ok(Trajectory { x, history: Vec::new() })
}
