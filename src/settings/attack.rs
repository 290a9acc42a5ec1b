//! Attacks: the ball, and how hard PGD searches it.

use serde::{Deserialize, Serialize};

use super::{NoSettings, flags::named};
use crate::{
    Result,
    attack::{
        Attack, Counted, Epsilon, METHODS, Method, Norm, PLUS, Pgd, PgdConfig, PgdLoss, PgdSearch, STANDARD,
        Threat,
    },
};

/// The ball of an attack.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BallSettings {
    /// The norm of the attack.
    #[arg(long, value_parser = named::<Norm>(), default_value_t = Norm::Linf)]
    pub norm: Norm,
    /// The radius of the attack, for pixels in [0, 1].
    #[arg(long, default_value = "8/255")]
    pub epsilon: Epsilon,
}

impl BallSettings {
    /// The ball. Fails with [`Error::Usage`](crate::Error::Usage) if the radius is impossible.
    pub fn threat(&self) -> Result<Threat> {
        Threat::new(self.norm, self.epsilon)
    }
}

/// The steps of PGD.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepSettings {
    /// Number of steps of the attack.
    #[arg(id = "attack_steps", long = "attack-steps", value_name = "STEPS", default_value_t = 10)]
    pub steps: usize,
    /// The attack's step size as a multiple of epsilon / steps; 2.5 in Madry et al.
    #[arg(id = "attack_step_ratio", long = "attack-step-ratio", value_name = "RATIO", default_value_t = 2.5)]
    pub step_ratio: f64,
}

impl StepSettings {
    /// The attack in a ball, from a random start. Fails with [`Error::Usage`](crate::Error::Usage), naming the
    /// value, if one of them is impossible.
    pub fn pgd(&self, norm: Norm, epsilon: Epsilon, seed: u64) -> Result<Pgd> {
        Pgd::new(norm, epsilon, self.steps, self.step_ratio, seed)
    }
}

/// PGD from one random start (Madry et al. 2018).
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttackSettings {
    /// The ball.
    #[command(flatten)]
    #[serde(flatten)]
    pub ball: BallSettings,
    /// The steps.
    #[command(flatten)]
    #[serde(flatten)]
    pub steps: StepSettings,
}

impl AttackSettings {
    /// The attack. Fails with [`Error::Usage`](crate::Error::Usage), naming the value, if one of them is
    /// impossible.
    pub fn pgd(&self, seed: u64) -> Result<Pgd> {
        self.steps.pgd(self.ball.norm, self.ball.epsilon, seed)
    }
}

/// PGD as an evaluation runs it.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(mut_args(super::defaults(&[("attack_steps", "20", &[])])))]
pub struct PgdSettings {
    /// Ball and steps.
    #[command(flatten)]
    #[serde(flatten)]
    pub attack: AttackSettings,
    /// The loss that the attack maximises.
    #[arg(id = "attack_loss", long = "attack-loss", value_name = "LOSS", value_parser = named::<PgdLoss>(), default_value_t = PgdLoss::Ce)]
    pub loss: PgdLoss,
    /// Number of random starts of the attack. An image has to withstand all of them.
    #[arg(long, default_value_t = 2)]
    pub restarts: usize,
}

impl PgdSettings {
    /// The attack. Fails with [`Error::Usage`](crate::Error::Usage), naming the value, if one of them is
    /// impossible.
    pub fn search(&self, seed: u64) -> Result<PgdSearch> {
        let pgd = self.attack.pgd(seed)?;
        let config = PgdConfig { loss: self.loss, ..pgd.config };
        PgdSearch::new(Pgd { config, ..pgd }, self.restarts, Counted::Last)
    }
}

tagged! {
    /// How the classifier is attacked.
    pub enum EvaluationAttackSettings("attack", default "pgd") {
        /// No attack: clean accuracy only.
        None(NoSettings) = "none",
        /// Projected gradient descent (Madry et al. 2018).
        Pgd(PgdSettings) = "pgd",
        /// AutoAttack's version `standard` (Croce & Hein 2020): apgd-ce, apgd-t, fab-t and square, each on the
        /// images that withstood the ones before.
        AutoAttack(BallSettings) = "autoattack",
        /// AutoAttack's version `plus`: apgd-ce, apgd-dlr and fab from five starts each, square, apgd-t and fab-t.
        AutoAttackPlus(BallSettings) = "autoattack-plus",
        /// APGD on the cross-entropy, 100 steps.
        ApgdCe(BallSettings) = "apgd-ce",
        /// APGD on the difference-of-logits ratio, 100 steps.
        ApgdDlr(BallSettings) = "apgd-dlr",
        /// APGD towards nine target classes, 100 steps each.
        ApgdT(BallSettings) = "apgd-t",
        /// FAB towards the nearest boundary of all classes, from five starts of 100 steps.
        Fab(BallSettings) = "fab",
        /// FAB towards nine target classes, 100 steps each.
        FabT(BallSettings) = "fab-t",
        /// Square, with 5,000 queries.
        Square(BallSettings) = "square",
    }
}

impl EvaluationAttackSettings {
    /// The ball, if there is an attack.
    pub fn ball(&self) -> Option<&BallSettings> {
        match self {
            Self::None(_) => None,
            Self::Pgd(pgd) => Some(&pgd.attack.ball),
            Self::AutoAttack(ball)
            | Self::AutoAttackPlus(ball)
            | Self::ApgdCe(ball)
            | Self::ApgdDlr(ball)
            | Self::ApgdT(ball)
            | Self::Fab(ball)
            | Self::FabT(ball)
            | Self::Square(ball) => Some(ball),
        }
    }

    /// The ball. Fails with [`Error::Usage`](crate::Error::Usage) if there is no attack, or if the radius is
    /// impossible.
    pub fn threat(&self) -> Result<Threat> {
        match self.ball() {
            Some(ball) => ball.threat(),
            None => bail!(Usage, "attack is {}, expected one", self.kind()),
        }
    }

    /// The attacks with a name of their own, in order.
    pub fn methods(&self) -> Vec<Method> {
        match self {
            Self::AutoAttack(_) => STANDARD.into(),
            Self::AutoAttackPlus(_) => PLUS.into(),
            _ => METHODS.into_iter().filter(|method| method.name() == self.kind()).collect(),
        }
    }

    /// The attacks and their names, in order. Fails as [`Self::validate`] does.
    pub fn sequence(&self, seed: u64) -> Result<Vec<(&'static str, Box<dyn Attack>)>> {
        let Some(ball) = self.ball() else { return Ok(Vec::new()) };
        if let Self::Pgd(pgd) = self {
            return Ok(vec![(self.kind(), Box::new(pgd.search(seed)?))]);
        }
        let threat = ball.threat()?;
        let named = |method: Method| (method.name(), method.attack(threat, seed));
        Ok(self.methods().into_iter().map(named).collect())
    }

    /// If all that is climbed is the cross-entropy: the largest probability of all wrong classes together that the
    /// attack does not tell from 0, since PGD computes in single precision and APGD in double.
    pub fn cross_entropy_rounding(&self) -> Option<f32> {
        match self {
            Self::Pgd(PgdSettings { loss: PgdLoss::Ce, .. }) => Some(f32::EPSILON / 2.0),
            Self::ApgdCe(_) => Some((f64::EPSILON / 2.0) as f32),
            _ => None,
        }
    }

    /// Fails with [`Error::Usage`](crate::Error::Usage), naming the value, if one of them is impossible.
    pub fn validate(&self) -> Result<()> {
        self.sequence(0).map(drop)
    }

    /// A description in a few words.
    pub fn summary(&self) -> String {
        let Some(BallSettings { norm, epsilon }) = self.ball() else { return "clean".into() };
        match self {
            Self::Pgd(PgdSettings { attack, restarts, .. }) => {
                format!("PGD-{} with {restarts} restarts at {norm} {epsilon}", attack.steps.steps)
            }
            _ => format!("{} at {norm} {epsilon}", self.kind()),
        }
    }
}
