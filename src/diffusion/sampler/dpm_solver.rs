//! DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Alg. 2) and its form with fresh noise, SDE-DPM-Solver++(2M)
//! (§5 there).

use super::step::{Denoise, Noise, Step, Trajectory, mix};
use crate::Result;

/// A step of order 2 in λ = -ln σ, from the predicted images of this step and the previous one. The first step is
/// of order 1, and so is the last, where λ has no end. `noise` is given for the form with fresh noise.
pub(super) fn step(step: &Step, denoise: Denoise, noise: Option<Noise>) -> Result<Trajectory> {
    let stride = step.stride();
    let x_start = denoise(step.x, stride.from)?.image;
    let ratio = stride.to.sigma / stride.from.sigma;
    let direction = match (step.history.first(), step.i.checked_sub(1)) {
        (Some(before), Some(i)) if stride.to.sigma > 0.0 => {
            let (h_before, h) = (
                (step.strides[i].from.sigma / stride.from.sigma).ln(),
                (stride.from.sigma / stride.to.sigma).ln(),
            );
            let ahead = h / (2.0 * h_before);
            mix(1.0 + ahead, &x_start, -ahead, before)?
        }
        _ => x_start.clone(),
    };
    let history = vec![x_start];
    let Some(noise) = noise else {
        return Ok(Trajectory { x: mix(1.0 - ratio, &direction, ratio, step.x)?, history });
    };
    let kept = ratio * ratio;
    let mut x = mix(1.0 - kept, &direction, kept, step.x)?;
    if stride.to.sigma > 0.0 {
        x = mix(1.0, &x, stride.to.sigma * (1.0 - kept).sqrt(), &noise(step.i as u32)?)?;
    }
    Ok(Trajectory { x, history })
}
