//! Which noise levels a sampler visits.

use super::{SamplerConfig, SamplerKind, Spacing, Stride, pndm::RUNGE_KUTTA_STEPS};
use crate::{
    Result,
    diffusion::{Level, NoiseSchedule, Prediction, Process, SigmaRange, process::continuous_level},
};

/// The ρ of Karras' levels on a discrete schedule.
const RHO: f64 = 7.0;

/// Above any σ but that of a last step with zero terminal SNR.
const NO_SIGNAL: f64 = 1e9;

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
        let eta = config.step.eta;
        if !(0.0..=1.0).contains(&eta) {
            bail!(Usage, "eta is {eta}, expected from 0 to 1");
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
        levels.iter().zip(next).map(|(&from, to)| Stride::new(from, to)).collect()
    }

    fn continuous(config: &SamplerConfig, range: &SigmaRange) -> Result<Self> {
        if config.steps == 0 {
            bail!(Usage, "the sampler's steps are 0, expected at least 1");
        }
        if config.kind == SamplerKind::Pndm {
            bail!(
                Usage,
                "the sampler is pndm, expected another: it goes by the steps of training, which EDM has not"
            );
        }
        let levels: Vec<Level> = range.sigmas(config.steps).map(continuous_level).collect();
        let mut strides = Self::through(&levels);
        config.churn(&mut strides, continuous_level);
        // The total variance of noise and data of variance 1 at the first level.
        Ok(Self { strides, initial_scale: (1.0 + range.max * range.max).sqrt() })
    }

    fn discrete(config: &SamplerConfig, schedule: &NoiseSchedule) -> Result<Self> {
        let times = config.timesteps(schedule)?;
        let mut levels: Vec<Level> = times.iter().map(|&t| schedule.level_between(t)).collect();
        let by_sigma = config.kind.goes_by_sigma();
        // diffusers' multistep solvers go through the whole schedule, to the nearest steps.
        let whole = config.kind.skips_last();
        if config.karras_sigmas && (by_sigma || whole) {
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
        if levels[0].sigma > NO_SIGNAL && config.step.prediction == Prediction::Epsilon {
            bail!(
                Usage,
                "the first step is the last of training, where nothing of the image is left: the noise that the network \
                 predicts does not tell it; expected fewer steps with spacing leading, or another sampler"
            );
        }
        let mut strides = Self::through(&levels);
        if matches!(config.kind, SamplerKind::Ddim | SamplerKind::Pndm) {
            let gap = (schedule.len() / config.steps) as f64;
            for stride in &mut strides {
                stride.to = config.level_at(schedule, stride.from.t - gap);
            }
            if config.kind == SamplerKind::Pndm {
                config.first_steps(&mut strides, &levels, schedule, gap);
            }
        }
        config.churn(&mut strides, |sigma| schedule.level_of(sigma));
        let sigma = levels[0].sigma;
        let pure = by_sigma && config.spacing != Spacing::Leading;
        // An image at variance 1 is all noise at the first level, except for some samplers of diffusers.
        let initial_scale = if pure { sigma } else { (1.0 + sigma * sigma).sqrt() };
        Ok(Self { strides, initial_scale })
    }
}

impl SamplerConfig {
    /// The level of a training step; a negative one is the end.
    fn level_at(&self, schedule: &NoiseSchedule, t: f64) -> Level {
        match t {
            t if t >= 0.0 => schedule.level(t as usize),
            _ if self.final_alpha_bar_is_one => CLEAN,
            _ => schedule.level(0),
        }
    }

    /// The levels on the way of PNDM's first steps, which end where the next ones begin.
    fn first_steps(&self, strides: &mut [Stride], levels: &[Level], schedule: &NoiseSchedule, gap: f64) {
        let (count, way) = match self.step.skip_prk_steps {
            true => (1, gap),
            false => (RUNGE_KUTTA_STEPS, (gap / 2.0).floor()),
        };
        for (stride, next) in strides.iter_mut().zip(&levels[1..]).take(count) {
            stride.to = *next;
            stride.between = [stride.from.t - way, next.t + way].map(|t| self.level_at(schedule, t));
        }
    }

    /// Raises the levels at which Euler's and Heun's methods ask the network.
    fn churn(&self, strides: &mut [Stride], level_of: impl Fn(f64) -> Level) {
        let steps = strides.len();
        if !matches!(self.kind, SamplerKind::Euler | SamplerKind::Heun) {
            return;
        }
        for stride in strides {
            let raised = self.step.churn.raised(stride.from.sigma, steps);
            if raised > stride.from.sigma {
                stride.between[0] = level_of(raised);
            }
        }
    }
}
