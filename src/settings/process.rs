//! Diffusion processes: the noise, and what the network predicts of it.

use serde::{Deserialize, Serialize};

use super::{NoSettings, flags::named};
use crate::{
    Result,
    diffusion::{BetaSchedule, PredictionType, SchedulerClass, SchedulerConfig, sampler::Variance},
    error::expect_within,
};

/// A discrete process.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiscreteSettings {
    /// What the network predicts.
    #[arg(long, value_parser = named::<PredictionType>(), default_value_t = PredictionType::Epsilon)]
    pub prediction: PredictionType,
    /// The number of diffusion steps, T.
    #[arg(long, default_value_t = 1000)]
    pub num_train_timesteps: usize,
    /// The noise schedule.
    #[arg(long, value_parser = named::<BetaSchedule>(), default_value_t = BetaSchedule::Linear)]
    pub beta_schedule: BetaSchedule,
    /// The variance of the noise that ancestral sampling adds (Ho et al. 2020, §3.2).
    #[arg(long, value_parser = named::<Variance>(), default_value_t = Variance::FixedSmall)]
    pub variance: Variance,
}

tagged! {
    /// The diffusion process: the noise that the network learns to remove.
    pub enum ProcessSettings("process", default "discrete") {
        /// A process in T discrete steps (Ho et al. 2020).
        Discrete(DiscreteSettings) = "discrete",
        /// EDM's continuous process, with σ from 0.002 to 80 and data of standard deviation 0.5 (Karras et al.
        /// 2022).
        Edm(NoSettings) = "edm",
    }
}

impl ProcessSettings {
    /// The configuration in `diffusers`' terms.
    pub fn scheduler(&self) -> SchedulerConfig {
        match self {
            Self::Discrete(discrete) => SchedulerConfig {
                num_train_timesteps: discrete.num_train_timesteps,
                beta_schedule: discrete.beta_schedule,
                variance_type: discrete.variance,
                prediction_type: discrete.prediction,
                ..SchedulerClass::DDPMScheduler.defaults()
            },
            Self::Edm(_) => SchedulerClass::EDMEulerScheduler.defaults(),
        }
    }

    /// Fails with [`Error::Usage`](crate::Error::Usage) at the first impossible value.
    pub fn validate(&self) -> Result<()> {
        if let Self::Discrete(DiscreteSettings { variance, .. }) = self
            && variance.is_learned()
        {
            bail!(Usage, "variance is {variance}, expected a fixed one: the variance is not learned here");
        }
        let steps = self.scheduler().num_train_timesteps;
        expect_within("num_train_timesteps", steps, 2, 100_000)?;
        if let Err(error) = self.scheduler().process() {
            bail!(Usage, "num_train_timesteps is {steps}: {error}");
        }
        Ok(())
    }

    /// A description in a few words.
    pub fn summary(&self) -> String {
        match self {
            Self::Discrete(DiscreteSettings { prediction, num_train_timesteps, beta_schedule, .. }) => {
                let what = match prediction {
                    PredictionType::Epsilon => "ε",
                    PredictionType::Sample => "x₀",
                    PredictionType::VPrediction => "v",
                };
                format!("T = {num_train_timesteps}, {beta_schedule:?} β, {what}-prediction")
            }
            Self::Edm(_) => "EDM, any σ from 0.002 to 80".into(),
        }
    }
}
