//! Settings of what classifiers are trained to minimise. The losses themselves are in `objective`.

use serde::{Deserialize, Serialize};

use super::{NoSettings, attack::AttackSettings, flags::named};
use crate::{Result, attack::Pgd, error::expect_within, nn::BatchNormMode};

named! {
    /// Which statistics batch norms use while the training attack runs.
    pub enum AttackBatchNorm {
        /// The running statistics, as in evaluation: the attack changes nothing in the network.
        Eval = "eval",
        /// The batch's statistics; the attack's steps also update the running ones, as in the paper's released
        /// code.
        Train = "train",
    }
}

/// An attack for training and for the held-out images.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttackedSettings {
    /// The attack.
    #[command(flatten)]
    pub attack: AttackSettings,
    /// Steps over which the radius grows from 0 to epsilon.
    #[arg(long, default_value_t = 0)]
    pub epsilon_warmup_steps: usize,
    /// Which statistics batch norms use while the attack runs, in networks that have batch norms.
    #[arg(long, value_parser = named::<AttackBatchNorm>(), default_value_t = AttackBatchNorm::Eval)]
    pub attack_batch_norm: AttackBatchNorm,
}

/// TRADES.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TradesSettings {
    /// The weight of the divergence; 6 in the paper.
    #[arg(long, default_value_t = 6.0)]
    pub beta: f64,
    /// The attack.
    #[command(flatten)]
    #[serde(flatten)]
    pub attacked: AttackedSettings,
}

/// Gaussian noise on the images.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NoiseSettings {
    /// The standard deviation of the noise, for pixels in [0, 1].
    #[arg(long, default_value_t = 0.25)]
    pub sigma: f64,
}

/// Stability training.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StabilitySettings {
    /// The weight of the divergence; 6 in the paper.
    #[arg(long, default_value_t = 6.0)]
    pub beta: f64,
    /// The noise.
    #[command(flatten)]
    #[serde(flatten)]
    pub noise: NoiseSettings,
}

tagged! {
    /// The objective that training minimises.
    pub enum ObjectiveSettings("objective", default "pgd-at") {
        /// Cross-entropy on clean images.
        Plain(NoSettings) = "plain",
        /// Cross-entropy on PGD adversarial examples (Madry et al. 2018).
        PgdAt(AttackedSettings) = "pgd-at",
        /// Cross-entropy after one attack step of 1.25 epsilon from a random start (Wong et al. 2020); the attack's
        /// settings apply to the held-out images only.
        FgsmRs(AttackedSettings) = "fgsm-rs",
        /// TRADES: cross-entropy plus the largest divergence of the predictions that an attack finds (Zhang et al.
        /// 2019).
        Trades(TradesSettings) = "trades",
        /// Cross-entropy plus the divergence of the predictions under Gaussian noise (Zheng et al. 2016; Carmon et
        /// al. 2019).
        Stability(StabilitySettings) = "stability",
        /// Cross-entropy under Gaussian noise (Cohen et al. 2019).
        Gaussian(NoiseSettings) = "gaussian",
    }
}

impl ObjectiveSettings {
    /// The attack that training guards against, if there is one.
    pub fn attacked(&self) -> Option<&AttackedSettings> {
        match self {
            Self::PgdAt(attacked) | Self::FgsmRs(attacked) => Some(attacked),
            Self::Trades(trades) => Some(&trades.attacked),
            Self::Plain(_) | Self::Stability(_) | Self::Gaussian(_) => None,
        }
    }

    /// The noise that training guards against, if there is any.
    pub fn noise(&self) -> Option<&NoiseSettings> {
        match self {
            Self::Stability(stability) => Some(&stability.noise),
            Self::Gaussian(noise) => Some(noise),
            Self::Plain(_) | Self::PgdAt(_) | Self::FgsmRs(_) | Self::Trades(_) => None,
        }
    }

    /// The attack of training step `step`, whose radius may still grow, if there is one.
    pub fn attack_at(&self, step: usize, seed: u64) -> Result<Option<Pgd>> {
        let Some(AttackedSettings { attack, epsilon_warmup_steps, .. }) = self.attacked() else {
            return Ok(None);
        };
        let mut attack = attack.clone();
        attack.ball.epsilon = attack.ball.epsilon.grown(step, *epsilon_warmup_steps);
        if matches!(self, Self::FgsmRs(_)) {
            (attack.steps.steps, attack.steps.step_ratio) = (1, 1.25);
        }
        attack.pgd(seed).map(Some)
    }

    /// Which statistics batch norms use while the training attack runs.
    pub fn attack_mode(&self) -> BatchNormMode {
        match self.attacked().map(|attacked| attacked.attack_batch_norm) {
            Some(AttackBatchNorm::Train) => BatchNormMode::Train,
            Some(AttackBatchNorm::Eval) | None => BatchNormMode::Eval,
        }
    }

    /// Fails with [`Error::Usage`](crate::Error::Usage) at the first impossible value.
    pub fn validate(&self) -> Result<()> {
        if let Some(attacked) = self.attacked() {
            attacked.attack.pgd(0)?;
        }
        if let Some(noise) = self.noise() {
            expect_within("sigma", noise.sigma, 0.0, 1e3)?;
        }
        match self {
            Self::Trades(TradesSettings { beta, .. }) | Self::Stability(StabilitySettings { beta, .. }) => {
                expect_within("beta", *beta, 0.0, 1e6)
            }
            _ => Ok(()),
        }
    }

    /// A description in a few words.
    pub fn summary(&self) -> String {
        let of_attack = |attacked: &AttackedSettings| {
            let AttackSettings { ball, steps } = &attacked.attack;
            (steps.steps, format!("at {} {}", ball.norm, ball.epsilon))
        };
        let (steps, at) = self.attacked().map(of_attack).unwrap_or_default();
        match self {
            Self::Plain(_) => "plain".into(),
            Self::PgdAt(_) => format!("PGD-{steps} {at}"),
            Self::FgsmRs(_) => format!("FGSM from random starts {at}"),
            Self::Trades(TradesSettings { beta, .. }) => format!("TRADES-{steps} {at}, beta {beta}"),
            Self::Stability(StabilitySettings { beta, noise }) => {
                format!("stability at sigma {}, beta {beta}", noise.sigma)
            }
            Self::Gaussian(noise) => format!("Gaussian noise of sigma {}", noise.sigma),
        }
    }
}
