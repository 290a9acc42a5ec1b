//! Pseudo numerical methods for diffusion models (PNDM: Liu et al. 2022, arXiv 2202.09778).

use candle_core::Tensor;

use super::{
    ipndm::WEIGHTS,
    step::{Denoise, Step, Stride, Trajectory, mix},
};
use crate::{
    Result,
    diffusion::{Level, Prediction},
};

/// Steps with the Runge-Kutta method at the start, unless they are skipped.
pub(super) const RUNGE_KUTTA_STEPS: usize = 3;

/// A linear multistep of order 4 in the network's output. It begins with three Runge-Kutta steps (Eq. 12 and 13), or
/// with a single corrected one and lower orders.
///
/// Images are held at variance 1 throughout: `diffusers` goes from one step to the next with the same image there,
/// even if the next does not begin where this one ended.
pub(super) fn step(step: &Step, denoise: Denoise) -> Result<Trajectory> {
    let Stride { from, to, between: [ahead, again] } = step.stride();
    let network = step.config.prediction;
    let x = (step.x * (1.0 / unit(from)))?;
    let mut ask = |x: &Tensor, at: Level| -> Result<Tensor> {
        let x = (x * unit(at))?;
        let x_start = denoise(&x, at)?.image;
        network.output(&x, &x_start, at.sigma)
    };
    let output = ask(&x, from)?;
    let mut history = vec![output.clone()];
    history.extend(step.history.iter().take(3).cloned());
    let x = if !step.config.skip_prk_steps && step.i < RUNGE_KUTTA_STEPS {
        let second = ask(&moved(network, &x, from, ahead, &output)?, again)?;
        let third = ask(&moved(network, &x, from, again, &second)?, again)?;
        let fourth = ask(&moved(network, &x, from, to, &third)?, to)?;
        let mean = (((output + fourth)? + ((second + third)? * 2.0)?)? / 6.0)?;
        moved(network, &x, from, to, &mean)?
    } else if step.config.skip_prk_steps && step.i == 0 && step.strides.len() > 1 {
        let second = ask(&moved(network, &x, from, ahead, &output)?, to)?;
        moved(network, &x, again, to, &((output + second)? / 2.0)?)?
    } else {
        let weights = WEIGHTS[history.len() - 1];
        let mut sum = (&history[0] * weights[0])?;
        for (output, weight) in history.iter().zip(weights).skip(1) {
            sum = mix(1.0, &sum, *weight, output)?;
        }
        moved(network, &x, from, to, &sum)?
    };
    Ok(Trajectory { x: (x * unit(to))?, history })
}

/// The standard deviation of an image there, if that of the data is 1.
fn unit(level: Level) -> f64 {
    (1.0 + level.sigma * level.sigma).sqrt()
}

/// DDIM's step with a given output of the network (Eq. 11), of an image at variance 1.
fn moved(network: Prediction, x: &Tensor, from: Level, to: Level, output: &Tensor) -> Result<Tensor> {
    let x = (x * unit(from))?;
    let x_start = network.image(&x, output, from.sigma)?;
    let kept = to.sigma / from.sigma;
    Ok((mix(1.0 - kept, &x_start, kept, &x)? / unit(to))?)
}
