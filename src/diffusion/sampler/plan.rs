//! Which noise levels a sampler visits.

use super::{SamplerConfig, SamplerKind, Spacing, Stride};
use crate::{
    Result,
    diffusion::{Level, NoiseSchedule, Process, SigmaRange, process::continuous_level},
};

/// The ρ of Karras' levels on a discrete schedule.
const RHO: f64 = 7.0;

/// The path from noise to an image.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    strides: Vec<Stride>,
    initial_scale: f64,
}

/// No noise, where a step ends with the image.
const CLEAN: Level = Level { sigma: 0.0, t: 0.0 };

impl Plan {
    /// A sampler's path through the levels of a model; on a discrete schedule it is that of `diffusers`.
    ///
    /// Fails with [`Error::Usage`](crate::Error::Usage) if `steps`, `steps_offset` or `eta` do not fit.
    pub fn new(config: &SamplerConfig, process: &Process) -> Result<Self> {
        if !(0.0..=1.0).contains(&config.eta) {
            bail!(Usage, "eta is {}, expected from 0 to 1", config.eta);
        }
        match process {
            Process::Discrete(schedule) => Self::discrete(config, schedule),
            Process::Continuous(range) => Self::continuous(config, range),
        }
    }

    /// The steps, each beginning where the one before ended; with DDIM this holds only if `steps` divides the
    /// number of training steps.
    pub fn strides(&self) -> &[Stride] {
        &self.strides
    }

    /// The factor by which noise from N(0, 1) is multiplied.
    pub fn initial_scale(&self) -> f64 {
        self.initial_scale
    }

    /// The factor by which the image is multiplied after step `i`, nearly always 1.
    ///
    /// DDIM ends each step ⌊T / steps⌋ below its beginning, as in `diffusers`, which need not be where the next one
    /// begins. What stays the same there is the image at variance 1, x / √(1 + σ²), which is also what is returned
    /// if the last step does not end at σ = 0.
    pub(super) fn scale_after(&self, i: usize) -> f64 {
        let end = self.strides[i].to.sigma;
        let next = self.strides.get(i + 1).map_or(0.0, |stride| stride.from.sigma);
        if end == next { 1.0 } else { ((1.0 + next * next) / (1.0 + end * end)).sqrt() }
    }

    /// Steps that each end where the next one begins, the last one without noise.
    fn through(levels: &[Level]) -> Vec<Stride> {
        let next = levels.iter().skip(1).copied().chain([CLEAN]);
        levels.iter().zip(next).map(|(&from, to)| Stride { from, to }).collect()
    }

    fn continuous(config: &SamplerConfig, range: &SigmaRange) -> Result<Self> {
        if config.steps == 0 {
            bail!(Usage, "the sampler's steps are 0, expected at least 1");
        }
        let levels: Vec<Level> = range.sigmas(config.steps).map(continuous_level).collect();
        // The total variance of noise and data of variance 1 at the first level.
        Ok(Self { strides: Self::through(&levels), initial_scale: (1.0 + range.max * range.max).sqrt() })
    }

    fn discrete(config: &SamplerConfig, schedule: &NoiseSchedule) -> Result<Self> {
        let times = config.timesteps(schedule)?;
        let mut levels: Vec<Level> = times.iter().map(|&t| schedule.level_between(t)).collect();
        let by_sigma = config.kind.goes_by_sigma();
        if config.karras_sigmas && (by_sigma || config.kind == SamplerKind::DpmSolver) {
            // diffusers' DPM-Solver++ goes through the whole schedule, to the nearest steps.
            let whole = !by_sigma;
            let (max, min) = if whole {
                (schedule.level(schedule.len() - 1).sigma, schedule.level(0).sigma)
            } else {
                (levels[0].sigma, levels[levels.len() - 1].sigma)
            };
            let range = SigmaRange { min, max, rho: RHO };
            levels = range.sigmas(config.steps).map(|sigma| schedule.level_of(sigma)).collect();
            if whole {
                levels.iter_mut().for_each(|level| level.t = level.t.round_ties_even());
            }
        }
        let mut strides = Self::through(&levels);
        if config.kind == SamplerKind::Ddim {
            let gap = (schedule.len() / config.steps) as f64;
            for stride in &mut strides {
                stride.to = match stride.from.t - gap {
                    before if before >= 0.0 => schedule.level(before as usize),
                    _ if config.final_alpha_bar_is_one => CLEAN,
                    _ => schedule.level(0),
                };
            }
        }
        let sigma = levels[0].sigma;
        let pure = by_sigma && config.spacing != Spacing::Leading;
        // An image at variance 1 is all noise at the first level, except for two samplers of diffusers.
        let initial_scale = if pure { sigma } else { (1.0 + sigma * sigma).sqrt() };
        Ok(Self { strides, initial_scale })
    }
}

impl SamplerConfig {
    /// The training steps in the order in which they are visited, from noisy to clean: whole ones, except for
    /// linspace spacing with the samplers that go by σ.
    ///
    /// Fails with [`Error::Usage`](crate::Error::Usage) if `steps` or `steps_offset` do not fit the schedule.
    pub fn timesteps(&self, schedule: &NoiseSchedule) -> Result<Vec<f64>> {
        let (n, total) = (self.steps, schedule.len());
        if n == 0 || n > total {
            bail!(Usage, "the sampler's steps are {n}, expected from 1 to {total}, the steps in training");
        }
        // diffusers' DPM-Solver++ places one more step, and leaves out the one without noise.
        let places = if self.kind == SamplerKind::DpmSolver { n + 1 } else { n };
        let skipped = places - n;
        let fractional = self.kind.goes_by_sigma();
        let times: Vec<f64> = match self.spacing {
            Spacing::Leading => {
                (skipped..places).rev().map(|i| (i * (total / places) + self.steps_offset) as f64).collect()
            }
            Spacing::Trailing => {
                let ratio = total as f64 / n as f64;
                (0..n).map(|i| (total as f64 - i as f64 * ratio).round_ties_even() - 1.0).collect()
            }
            Spacing::Linspace => {
                // The division comes last, so that the first step is exactly the last training step.
                let last = (places - 1).max(1) as f64;
                let exact = (skipped..places).rev().map(|i| (i * (total - 1)) as f64 / last);
                exact.map(|t| if fractional { t } else { t.round_ties_even() }).collect()
            }
        };
        let (offset, first) = (self.steps_offset, times[0]);
        if first >= total as f64 {
            bail!(Usage, "with steps_offset {offset} the first step is {first}, expected below {total}");
        }
        if let Some(twice) = times.windows(2).find(|pair| pair[0] <= pair[1]).map(|pair| pair[0]) {
            bail!(
                Usage,
                "{n} steps of this sampler visit step {twice} of {total} twice, expected fewer steps"
            );
        }
        Ok(times)
    }
}
