//! Learning-rate schedules.

use serde::{Deserialize, Serialize};

use crate::{
    Result,
    error::expect_within,
    nn::{LrDecay, LrSchedule},
};

/// How a schedule begins.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WarmupSettings {
    /// Steps of the learning rate's warm-up, at most half of all steps; a 20th of them if left out.
    #[arg(long)]
    pub warmup_steps: Option<usize>,
}

/// A warm-up, followed by half a cosine.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CosineSettings {
    /// How it begins.
    #[command(flatten)]
    #[serde(flatten)]
    pub warmup: WarmupSettings,
    /// The last learning rate as a share of the peak.
    #[arg(long, default_value_t = 0.0)]
    pub final_fraction: f64,
}

tagged! {
    /// The learning rate's schedule after the warm-up.
    pub enum ScheduleSettings("schedule", default "cosine") {
        /// Decrease along half a cosine.
        Cosine(CosineSettings) = "cosine",
        /// PyTorch's OneCycleLR: up along half a cosine during the warm-up, then down along another to nearly 0.
        OneCycle(WarmupSettings) = "one-cycle",
        /// Keep it constant.
        Constant(WarmupSettings) = "constant",
    }
}

impl ScheduleSettings {
    /// The learning rate at each of this many steps.
    pub fn schedule(&self, peak: f64, total_steps: usize) -> LrSchedule {
        let (warmup, decay) = match self {
            Self::Cosine(cosine) => (&cosine.warmup, LrDecay::Cosine { min: cosine.final_fraction * peak }),
            Self::OneCycle(warmup) => (warmup, LrDecay::OneCycle),
            Self::Constant(warmup) => (warmup, LrDecay::Constant),
        };
        let warmup_steps = warmup.warmup_steps.unwrap_or(total_steps / 20).min(total_steps / 2);
        LrSchedule { peak, warmup_steps, total_steps, decay }
    }

    /// Fails with [`Error::Usage`](crate::Error::Usage) at the first impossible value.
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::Cosine(cosine) => expect_within("final_fraction", cosine.final_fraction, 0.0, 1.0),
            Self::OneCycle(_) | Self::Constant(_) => Ok(()),
        }
    }
}
