//! Samplers: from noise to images, one sampler a file.
//!
//! A sampler says, for a step and the one after it, how the next image is mixed from the predicted image,
//! the current one, the predicted noise and fresh noise: four numbers, in f64. [`sample`] does the rest, so that
//! every sampler can be stopped, saved and resumed, and treats every element of a batch alike.

mod ddim;
mod ddpm;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::Schedule;
use crate::Result;

/// Which sampler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum SamplerKind {
    /// Ancestral sampling (Ho et al. 2020, Alg. 2).
    Ddpm,
    /// Denoising diffusion implicit models (Song et al. 2021, Eq. 12).
    Ddim,
}

/// The variance of the noise that ancestral sampling adds (Ho et al. 2020, §3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variance {
    /// β̃, right for data that are one point.
    FixedSmall,
    /// β, right for data that are N(0, 1).
    FixedLarge,
}

/// Which of the T training steps are visited when there are fewer sampling steps (Lin et al. 2024, Table 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spacing {
    /// Every ⌊T / steps⌋-th, from 0.
    Leading,
    /// Every T / steps-th, from T - 1 down.
    Trailing,
    /// In equal steps from 0 to T - 1, both included.
    Linspace,
}

/// How to sample. [`SchedulerConfig::sampler`](super::SchedulerConfig::sampler) is what a model asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerConfig {
    /// Which sampler.
    pub kind: SamplerKind,
    /// How often the network is called: from 1 to the number of training steps.
    pub steps: usize,
    /// DDIM's share of noise: 0 is deterministic, 1 is ancestral sampling. Of no effect with DDPM.
    pub eta: f64,
    /// To which absolute value the predicted image is clipped at every step.
    pub clip: Option<f64>,
    /// DDPM's noise. Of no effect with DDIM.
    pub variance: Variance,
    /// Which steps are visited.
    pub spacing: Spacing,
    /// Added to the steps of leading spacing.
    pub steps_offset: usize,
    /// Whether DDIM ends at ᾱ = 1, instead of the ᾱ of step 0.
    pub final_alpha_bar_is_one: bool,
}

/// How the next image is mixed. What is multiplied by 0 is left out.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Update {
    x_start: f64,
    x_t: f64,
    eps: f64,
    noise: f64,
}

impl SamplerConfig {
    /// The training steps in the order in which they are visited, from noisy to clean.
    ///
    /// Fails with [`Error::Usage`](crate::Error::Usage) if `steps`, `steps_offset` or `eta` do not fit the
    /// schedule.
    pub fn timesteps(&self, schedule: &Schedule) -> Result<Vec<usize>> {
        let (n, total) = (self.steps, schedule.len());
        if n == 0 || n > total {
            bail!(Usage, "the sampler's steps are {n}, expected from 1 to {total}, the steps in training");
        }
        if !(0.0..=1.0).contains(&self.eta) {
            bail!(Usage, "eta is {}, expected from 0 to 1", self.eta);
        }
        let ratio = total as f64 / n as f64;
        let timesteps: Vec<_> = match self.spacing {
            Spacing::Leading => (0..n).rev().map(|i| i * (total / n) + self.steps_offset).collect(),
            Spacing::Trailing => {
                (0..n).map(|i| (total as f64 - i as f64 * ratio).round_ties_even() as usize - 1).collect()
            }
            Spacing::Linspace => {
                let gap = (total - 1) as f64 / (n - 1).max(1) as f64;
                (0..n).rev().map(|i| (i as f64 * gap).round_ties_even() as usize).collect()
            }
        };
        if timesteps[0] >= total {
            bail!(
                Usage,
                "with steps_offset {} the first step is {}, expected below {total}",
                self.steps_offset,
                timesteps[0]
            );
        }
        Ok(timesteps)
    }

    /// The update at `timesteps[i]`.
    fn update(&self, schedule: &Schedule, timesteps: &[usize], i: usize) -> Update {
        match self.kind {
            SamplerKind::Ddpm => ddpm::update(self, schedule, timesteps, i),
            SamplerKind::Ddim => ddim::update(self, schedule, timesteps, i),
        }
    }
}

/// Turns noise into images.
///
/// `x`: `(b, h, w, c)` f32: noise from N(0, 1) for `start_step` 0. `denoise` predicts the noise in x_t at
/// training step t. `noise(i)` is fresh noise for sampling step `i`, asked for only where some is added.
/// `on_step(done, x)` is called after each step with the number of steps done; a run that saved them goes on,
/// to the same images, with `x` and `start_step = done`.
///
/// Returns images in about [-1, 1], shaped like `x`. An element never depends on another one of the batch,
/// unless `denoise` makes it so. Fails with [`Error::Usage`](crate::Error::Usage) if the configuration does
/// not fit the schedule, and with what the closures fail with.
pub fn sample(
    schedule: &Schedule,
    config: &SamplerConfig,
    x: Tensor,
    start_step: usize,
    denoise: &mut dyn FnMut(&Tensor, usize) -> Result<Tensor>,
    noise: &mut dyn FnMut(u32) -> Result<Tensor>,
    on_step: &mut dyn FnMut(usize, &Tensor) -> Result<()>,
) -> Result<Tensor> {
    let timesteps = config.timesteps(schedule)?;
    if start_step > timesteps.len() {
        bail!(Usage, "the sampler is to start at step {start_step}, but has {}", timesteps.len());
    }
    let mut x = x;
    for (i, &t) in timesteps.iter().enumerate().skip(start_step) {
        let eps = denoise(&x, t)?;
        let update = config.update(schedule, &timesteps, i);
        let alpha_bar = schedule.alphas_cumprod()[t];
        // Ho et al. 2020, Eq. 15.
        let mut x_start = ((&x - (&eps * (1.0 - alpha_bar).sqrt())?)? / alpha_bar.sqrt())?;
        if let Some(bound) = config.clip {
            x_start = x_start.clamp(-bound, bound)?;
        }
        let mut next = (x_start * update.x_start)?;
        if update.x_t != 0.0 {
            next = (next + (&x * update.x_t)?)?;
        }
        if update.eps != 0.0 {
            next = (next + (eps * update.eps)?)?;
        }
        if update.noise != 0.0 {
            next = (next + (noise(i as u32)? * update.noise)?)?;
        }
        x = next;
        on_step(i + 1, &x)?;
    }
    Ok(x)
}

#[cfg(test)]
mod tests;
