//! Samplers.

use serde::{Deserialize, Serialize};

use super::flags::named;
use crate::{
    Result,
    diffusion::{
        SchedulerConfig,
        sampler::{SamplerConfig, SamplerKind, Spacing},
    },
    error::expect_within,
};

/// The steps of a sampler.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepsSettings {
    /// Sampling steps. If not given, ddpm and ddim take all training steps, the others 50. Heun's method calls the
    /// network twice in every step but the last.
    #[arg(long)]
    pub steps: Option<usize>,
    /// Which of the training steps the sampler visits; if not given, as the model folder says.
    #[arg(long, value_parser = named::<Spacing>())]
    pub spacing: Option<Spacing>,
}

/// DDIM.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DdimSettings {
    /// The steps.
    #[command(flatten)]
    #[serde(flatten)]
    pub steps: StepsSettings,
    /// How much noise DDIM adds: 0 is deterministic, 1 is ancestral sampling.
    #[arg(long, default_value_t = 0.0)]
    pub eta: f64,
}

/// A sampler in terms of σ.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SigmaSettings {
    /// The steps.
    #[command(flatten)]
    #[serde(flatten)]
    pub steps: StepsSettings,
    /// Space the noise levels as in Karras et al. 2022, Eq. 5. If not given, as the model folder says.
    #[arg(long, action = clap::ArgAction::Set)]
    pub karras_sigmas: Option<bool>,
}

tagged! {
    /// The sampler, the method that turns noise into images.
    pub enum SamplerSettings("sampler", default "model") {
        /// The sampler of the model folder's scheduler.
        Model(StepsSettings) = "model",
        /// Ancestral sampling (Ho et al. 2020, Alg. 2).
        Ddpm(StepsSettings) = "ddpm",
        /// Denoising diffusion implicit models (Song et al. 2021, Eq. 12).
        Ddim(DdimSettings) = "ddim",
        /// DPM-Solver++(2M) (Lu et al. 2022, Alg. 2).
        DpmSolver(SigmaSettings) = "dpm-solver++",
        /// Improved pseudo numerical methods of order 4 (Zhang & Chen 2023, App. H.2).
        Ipndm(StepsSettings) = "ipndm",
        /// Heun's method, with two network calls per step (Karras et al. 2022, Alg. 1).
        Heun(SigmaSettings) = "heun",
        /// Euler's method (Karras et al. 2022, Alg. 1 without the correction step).
        Euler(SigmaSettings) = "euler",
    }
}

impl SamplerSettings {
    /// The sampler's steps and spacing, where they are set.
    pub fn steps(&self) -> &StepsSettings {
        match self {
            Self::Model(steps) | Self::Ddpm(steps) | Self::Ipndm(steps) => steps,
            Self::Ddim(ddim) => &ddim.steps,
            Self::DpmSolver(sigma) | Self::Heun(sigma) | Self::Euler(sigma) => &sigma.steps,
        }
    }

    /// The sampler for a model; what is not set here is taken from its scheduler.
    pub fn sampler(&self, scheduler: &SchedulerConfig) -> SamplerConfig {
        let mut sampler = scheduler.sampler();
        sampler.kind = match self {
            Self::Model(_) => sampler.kind,
            Self::Ddpm(_) => SamplerKind::Ddpm,
            Self::Ddim(_) => SamplerKind::Ddim,
            Self::DpmSolver(_) => SamplerKind::DpmSolver,
            Self::Ipndm(_) => SamplerKind::Ipndm,
            Self::Heun(_) => SamplerKind::Heun,
            Self::Euler(_) => SamplerKind::Euler,
        };
        let StepsSettings { steps, spacing } = *self.steps();
        sampler.steps = steps.unwrap_or_else(|| sampler.kind.default_steps(scheduler.num_train_timesteps));
        sampler.spacing = spacing.unwrap_or(sampler.spacing);
        match self {
            Self::Ddim(ddim) => sampler.eta = ddim.eta,
            Self::DpmSolver(sigma) | Self::Heun(sigma) | Self::Euler(sigma) => {
                sampler.karras_sigmas = sigma.karras_sigmas.unwrap_or(sampler.karras_sigmas);
            }
            Self::Model(_) | Self::Ddpm(_) | Self::Ipndm(_) => {}
        }
        sampler
    }

    /// Fails with [`Error::Usage`](crate::Error::Usage) at the first impossible value.
    pub fn validate(&self) -> Result<()> {
        if let Some(steps) = self.steps().steps {
            expect_within("steps", steps, 1, 100_000)?;
        }
        match self {
            Self::Ddim(ddim) => expect_within("eta", ddim.eta, 0.0, 1.0),
            _ => Ok(()),
        }
    }
}
