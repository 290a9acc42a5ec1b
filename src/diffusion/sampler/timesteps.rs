//! Which training steps a sampler visits, to the last bit those of numpy in `diffusers`.

use super::{SamplerConfig, SamplerKind, Spacing, pndm::RUNGE_KUTTA_STEPS};
use crate::{Result, diffusion::NoiseSchedule};

impl SamplerConfig {
    /// The training steps in the order in which they are visited, from noisy to clean: whole ones, except for
    /// linspace spacing with the samplers that go by σ.
    ///
    /// With trailing spacing and some numbers of steps, such as 61 of 1000, `diffusers` makes one step more, at -1;
    /// here it is left out.
    ///
    /// Fails with [`Error::Usage`](crate::Error::Usage) if `steps` or `steps_offset` do not fit the schedule.
    pub fn timesteps(&self, schedule: &NoiseSchedule) -> Result<Vec<f64>> {
        let (n, total) = (self.steps, schedule.len());
        let least = match self.kind {
            SamplerKind::Pndm if !self.step.skip_prk_steps => RUNGE_KUTTA_STEPS + 1,
            _ => 1,
        };
        if !(least..=total).contains(&n) {
            bail!(
                Usage,
                "the sampler's steps are {n}, expected from {least} to {total}, the steps in training"
            );
        }
        let places = if self.kind.skips_last() { n + 1 } else { n };
        let skipped = places - n;
        let times: Vec<f64> = match self.spacing {
            Spacing::Leading => {
                (skipped..places).rev().map(|i| (i * (total / places) + self.steps_offset) as f64).collect()
            }
            Spacing::Trailing => {
                // arange adds multiples of the rounded difference of its first two numbers.
                let total = total as f64;
                let difference = (total - total / n as f64) - total;
                (0..n).map(|i| (total + i as f64 * difference).round_ties_even() - 1.0).collect()
            }
            Spacing::Linspace => {
                // linspace multiplies a rounded step, but ends exactly.
                let last = (places - 1).max(1);
                let step = (total - 1) as f64 / last as f64;
                let exact = (skipped..places).rev().map(|i| match i {
                    i if i == last => (total - 1) as f64,
                    i => i as f64 * step,
                });
                match self.kind.goes_by_sigma() {
                    true => exact.map(|t| f64::from(t as f32)).collect(),
                    false => exact.map(f64::round_ties_even).collect(),
                }
            }
        };
        if times[0] >= total as f64 {
            bail!(
                Usage,
                "with {n} steps and steps_offset {} the first step is {}, expected below {total}: lower steps",
                self.steps_offset,
                times[0]
            );
        }
        if let Some(twice) = times.windows(2).find(|pair| pair[0] <= pair[1]) {
            bail!(
                Usage,
                "{n} steps of this sampler visit step {} of {total} twice, expected fewer steps",
                twice[0]
            );
        }
        Ok(times)
    }
}
