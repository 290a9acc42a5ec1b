//! Samplers.

use serde::{Deserialize, Serialize};

use super::flags::named;
use crate::{
    Result,
    diffusion::{
        SchedulerConfig,
        sampler::{Churn, SamplerConfig, SamplerKind, Spacing},
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

/// Euler's or Heun's method.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChurnSettings {
    /// The steps and levels.
    #[command(flatten)]
    #[serde(flatten)]
    pub sigma: SigmaSettings,
    /// S_churn of Karras et al. 2022, Alg. 2: how much noise is added before the steps, in all; 0 is none.
    #[arg(long, default_value_t = 0.0)]
    pub s_churn: f64,
    /// S_min: the lowest noise level at which noise is added.
    #[arg(long, default_value_t = 0.0)]
    pub s_min: f64,
    /// S_max: the highest noise level at which noise is added; if not given, the highest there is.
    #[arg(long)]
    pub s_max: Option<f64>,
    /// S_noise: the standard deviation of the added noise.
    #[arg(long, default_value_t = 1.0)]
    pub s_noise: f64,
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
        /// SDE-DPM-Solver++(2M), which adds fresh noise (Lu et al. 2022, §5).
        SdeDpmSolver(SigmaSettings) = "sde-dpm-solver++",
        /// UniPC, a unified predictor-corrector (Zhao et al. 2023).
        UniPc(SigmaSettings) = "unipc",
        /// Pseudo numerical methods (Liu et al. 2022).
        Pndm(StepsSettings) = "pndm",
        /// Improved pseudo numerical methods of order 4 (Zhang & Chen 2023, App. H.2).
        Ipndm(StepsSettings) = "ipndm",
        /// Heun's method, with two network calls per step (Karras et al. 2022, Alg. 2).
        Heun(ChurnSettings) = "heun",
        /// Euler's method (Karras et al. 2022, Alg. 2 without the correction step).
        Euler(ChurnSettings) = "euler",
        /// Ancestral sampling at the noise levels of Euler's method.
        EulerAncestral(StepsSettings) = "euler-ancestral",
    }
}

/// The sampler, unless it is the model's, with its steps and what it says about σ.
type Parts<'a> = (Option<SamplerKind>, &'a StepsSettings, Option<&'a SigmaSettings>);

impl SamplerSettings {
    fn parts(&self) -> Parts<'_> {
        fn of_sigma(kind: SamplerKind, sigma: &SigmaSettings) -> Parts<'_> {
            (Some(kind), &sigma.steps, Some(sigma))
        }
        match self {
            Self::Model(steps) => (None, steps, None),
            Self::Ddpm(steps) => (Some(SamplerKind::Ddpm), steps, None),
            Self::Ddim(ddim) => (Some(SamplerKind::Ddim), &ddim.steps, None),
            Self::DpmSolver(sigma) => of_sigma(SamplerKind::DpmSolver, sigma),
            Self::SdeDpmSolver(sigma) => of_sigma(SamplerKind::SdeDpmSolver, sigma),
            Self::UniPc(sigma) => of_sigma(SamplerKind::UniPc, sigma),
            Self::Pndm(steps) => (Some(SamplerKind::Pndm), steps, None),
            Self::Ipndm(steps) => (Some(SamplerKind::Ipndm), steps, None),
            Self::Heun(churn) => of_sigma(SamplerKind::Heun, &churn.sigma),
            Self::Euler(churn) => of_sigma(SamplerKind::Euler, &churn.sigma),
            Self::EulerAncestral(steps) => (Some(SamplerKind::EulerAncestral), steps, None),
        }
    }

    /// The sampler; `None` for that of the model folder.
    pub fn sampler_kind(&self) -> Option<SamplerKind> {
        self.parts().0
    }

    /// The sampler's steps and spacing, where they are set.
    pub fn steps(&self) -> &StepsSettings {
        self.parts().1
    }

    /// The sampler for a model, whose scheduler was [read for it](SchedulerConfig::load); what is not set here is
    /// taken from there.
    pub fn sampler(&self, scheduler: &SchedulerConfig) -> SamplerConfig {
        let (kind, steps, sigma) = self.parts();
        let mut sampler = scheduler.sampler();
        sampler.kind = kind.unwrap_or(sampler.kind);
        sampler.steps = steps.steps.unwrap_or_else(|| scheduler.default_steps(sampler.kind));
        sampler.spacing = steps.spacing.unwrap_or(sampler.spacing);
        if let Some(karras_sigmas) = sigma.and_then(|sigma| sigma.karras_sigmas) {
            sampler.karras_sigmas = karras_sigmas;
        }
        match self {
            Self::Ddim(ddim) => sampler.step.eta = ddim.eta,
            Self::Heun(churn) | Self::Euler(churn) => {
                sampler.step.churn = Churn {
                    amount: churn.s_churn,
                    min: churn.s_min,
                    max: churn.s_max.unwrap_or(f64::INFINITY),
                    noise: churn.s_noise,
                }
            }
            _ => {}
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
            Self::Heun(churn) | Self::Euler(churn) => {
                expect_within("s_churn", churn.s_churn, 0.0, 1e6)?;
                expect_within("s_min", churn.s_min, 0.0, 1e30)?;
                expect_within("s_max", churn.s_max.unwrap_or(1e30), churn.s_min, 1e30)?;
                expect_within("s_noise", churn.s_noise, 0.0, 100.0)
            }
            _ => Ok(()),
        }
    }
}
