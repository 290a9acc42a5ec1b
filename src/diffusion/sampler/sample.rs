//! The loop over the steps of a sampler.

use candle_core::Tensor;

use super::{
    Plan, SamplerConfig,
    step::{Denoise, Noise, Step, Trajectory},
};
use crate::Result;

/// Turns noise into images.
///
/// `start`: noise `(b, h, w, c)` f32 from N(0, 1), or what an earlier run saved. `on_step(done, …)` is called after
/// each step with the number of steps done; a run that saved its state continues to the same images.
///
/// Returns images in about [-1, 1], shaped like the noise. An element never depends on others in the batch, unless
/// `denoise` makes it so. Fails with any error of the closures, and with [`Error::Usage`](crate::Error::Usage) if
/// the plan has fewer steps than are done.
pub fn sample(
    config: &SamplerConfig,
    plan: &Plan,
    start: Start,
    denoise: Denoise,
    noise: Noise,
    on_step: &mut dyn FnMut(usize, &Trajectory) -> Result<()>,
) -> Result<Tensor> {
    let strides = plan.strides();
    let (first, mut at) = match start {
        Start::Noise(noise) => (0, Trajectory { x: (noise * plan.initial_scale())?, history: Vec::new() }),
        Start::Saved(done, at) => (done, at),
    };
    if first > strides.len() {
        bail!(Usage, "the sampler is to start at step {first}, but has {}", strides.len());
    }
    for i in first..strides.len() {
        let step = Step { config: &config.step, strides, i, x: &at.x, history: &at.history };
        at = config.kind.step(&step, denoise, noise)?;
        let scale = plan.scale_after(i);
        if scale != 1.0 {
            at.x = (at.x * scale)?;
        }
        on_step(i + 1, &at)?;
    }
    Ok(at.x)
}

/// Where [`sample`] begins.
pub enum Start {
    /// With noise from N(0, 1).
    Noise(Tensor),
    /// With what was saved after that many steps.
    Saved(usize, Trajectory),
}
