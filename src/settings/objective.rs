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

impl AttackedSettings {
    /// The attack of training step `step`, whose radius may still grow.
    fn pgd(&self, step: usize, seed: u64) -> Result<Pgd> {
        let mut attack = self.attack.clone();
        attack.ball.epsilon = attack.ball.epsilon.grown(step, self.epsilon_warmup_steps);
        attack.pgd(seed)
    }
}

/// FGSM from random starts.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FgsmSettings {
    /// FGSM's step size as a multiple of epsilon; 1.25 in Wong et al.
    #[arg(long, value_name = "RATIO", default_value_t = 1.25)]
    pub fgsm_step_ratio: f64,
    /// The ball, and the attack on the held-out images.
    #[command(flatten)]
    #[serde(flatten)]
    pub attacked: AttackedSettings,
}

impl FgsmSettings {
    /// FGSM at training step `step`, when the radius may still grow; from [`AttackedSettings::epsilon_warmup_steps`]
    /// on it has its full size.
    pub fn pgd(&self, step: usize, seed: u64) -> Result<Pgd> {
        let mut attacked = self.attacked.clone();
        (attacked.attack.steps.steps, attacked.attack.steps.step_ratio) = (1, self.fgsm_step_ratio);
        attacked.pgd(step, seed)
    }
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

/// SmoothAdv.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(mut_args(super::defaults(&[("norm", "l2", &[]), ("epsilon", "0.5", &[])])))]
pub struct SmoothAdvSettings {
    /// The noise.
    #[command(flatten)]
    #[serde(flatten)]
    pub noise: NoiseSettings,
    /// Noisy copies of each image; 1 to 8 in the paper.
    #[arg(long, default_value_t = 2)]
    pub noise_samples: usize,
    /// The attack.
    #[command(flatten)]
    #[serde(flatten)]
    pub attacked: AttackedSettings,
}

tagged! {
    /// The objective that training minimises.
    pub enum ObjectiveSettings("objective", default "pgd-at") {
        /// Cross-entropy on clean images.
        Plain(NoSettings) = "plain",
        /// Cross-entropy on PGD adversarial examples (Madry et al. 2018).
        PgdAt(AttackedSettings) = "pgd-at",
        /// Cross-entropy after one attack step from a random start (Wong et al. 2020); the number and size of the
        /// attack's steps apply to the held-out images only.
        FgsmRs(FgsmSettings) = "fgsm-rs",
        /// TRADES: cross-entropy plus the largest divergence of the predictions that an attack finds (Zhang et al.
        /// 2019).
        Trades(TradesSettings) = "trades",
        /// Cross-entropy plus the divergence of the predictions under Gaussian noise (Zheng et al. 2016; Carmon et
        /// al. 2019).
        Stability(StabilitySettings) = "stability",
        /// Cross-entropy under Gaussian noise (Cohen et al. 2019).
        Gaussian(NoiseSettings) = "gaussian",
        /// Cross-entropy under Gaussian noise on adversarial examples of the smoothed classifier (Salman et al. 2019).
        SmoothAdv(SmoothAdvSettings) = "smooth-adv",
    }
}

impl ObjectiveSettings {
    /// The attack that training guards against, if there is one.
    pub fn attacked(&self) -> Option<&AttackedSettings> {
        match self {
            Self::PgdAt(attacked) => Some(attacked),
            Self::FgsmRs(fgsm) => Some(&fgsm.attacked),
            Self::Trades(trades) => Some(&trades.attacked),
            Self::SmoothAdv(smooth) => Some(&smooth.attacked),
            Self::Plain(_) | Self::Stability(_) | Self::Gaussian(_) => None,
        }
    }

    /// The noise that training guards against, if there is any.
    pub fn noise(&self) -> Option<&NoiseSettings> {
        match self {
            Self::Stability(stability) => Some(&stability.noise),
            Self::Gaussian(noise) => Some(noise),
            Self::SmoothAdv(smooth) => Some(&smooth.noise),
            Self::Plain(_) | Self::PgdAt(_) | Self::FgsmRs(_) | Self::Trades(_) => None,
        }
    }

    /// The attack of training step `step`, whose radius may still grow, if there is one.
    pub fn attack_at(&self, step: usize, seed: u64) -> Result<Option<Pgd>> {
        match self {
            Self::FgsmRs(fgsm) => fgsm.pgd(step, seed).map(Some),
            _ => self.attacked().map(|attacked| attacked.pgd(step, seed)).transpose(),
        }
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
            Self::FgsmRs(fgsm) => expect_within("fgsm_step_ratio", fgsm.fgsm_step_ratio, 1e-6, 1e6),
            Self::Trades(TradesSettings { beta, .. }) | Self::Stability(StabilitySettings { beta, .. }) => {
                expect_within("beta", *beta, 0.0, 1e6)
            }
            Self::SmoothAdv(smooth) => expect_within("noise_samples", smooth.noise_samples, 1, 1024),
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
            Self::FgsmRs(fgsm) => {
                format!("FGSM with steps of {} epsilon from random starts {at}", fgsm.fgsm_step_ratio)
            }
            Self::Trades(TradesSettings { beta, .. }) => format!("TRADES-{steps} {at}, beta {beta}"),
            Self::Stability(StabilitySettings { beta, noise }) => {
                format!("stability at sigma {}, beta {beta}", noise.sigma)
            }
            Self::Gaussian(noise) => format!("Gaussian noise of sigma {}", noise.sigma),
            Self::SmoothAdv(SmoothAdvSettings { noise, noise_samples, .. }) => {
                format!("SmoothAdv-{steps} {at}, {noise_samples} copies of sigma {}", noise.sigma)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::from_flags;

    #[test]
    fn fgsm_makes_one_step_of_its_own_size_and_pgd_on_held_out_images_keeps_the_attack_s() {
        let flags = ["--objective=fgsm-rs", "--epsilon=0.1", "--fgsm-step-ratio=2", "--attack-steps=5"];
        let objective: ObjectiveSettings = from_flags(&flags.map(str::to_owned)).unwrap();
        let fgsm = objective.attack_at(0, 7).unwrap().unwrap().config;
        assert_eq!((fgsm.steps, fgsm.step_size), (1, 0.2));
        let held_out = objective.attacked().unwrap().attack.pgd(7).unwrap().config;
        assert_eq!((held_out.steps, held_out.step_size), (5, 0.05));
        let standard: ObjectiveSettings = from_flags(&["--objective=fgsm-rs".to_owned()]).unwrap();
        let step_size = standard.attack_at(0, 7).unwrap().unwrap().config.step_size;
        assert!((step_size - 1.25 * 8.0 / 255.0).abs() < 1e-12, "{step_size}");
        let flags = ["--objective=fgsm-rs", "--fgsm-step-ratio=0"].map(str::to_owned);
        let error = from_flags::<ObjectiveSettings>(&flags).unwrap().validate().unwrap_err();
        assert!(error.to_string().starts_with("fgsm_step_ratio is 0, expected"), "{error}");
        assert!(from_flags::<ObjectiveSettings>(&["--fgsm-step-ratio=1".to_owned()]).is_err());
    }
}
