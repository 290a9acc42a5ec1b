//! Auto-PGD: projected gradient ascent with momentum and adaptive step sizes (Croce & Hein 2020, Alg. 1).

use super::{
    Attack, Example, Loss, Method, Norm, Search, Threat, method,
    search::{Targeted, length, random_point},
};
use crate::{Result, rng};

/// APGD on the cross-entropy.
pub const APGD_CE: Method = Method::new("apgd-ce", 0, |threat, seed, _, example| {
    let apgd = Apgd { threat, steps: method::STEPS, loss: Loss::CrossEntropy, seed };
    Box::new(Climb::new(apgd, 0, example))
});

/// APGD on the difference-of-logits ratio.
pub const APGD_DLR: Method = Method::new("apgd-dlr", 1, |threat, seed, _, example| {
    let apgd = Apgd { threat, steps: method::STEPS, loss: Loss::Dlr, seed };
    Box::new(Climb::new(apgd, 0, example))
});

/// APGD on the targeted DLR loss, in turn for each of the classes ranked after the best one in the prediction for
/// the image.
pub const APGD_T: Method = Method::new("apgd-t", 2, |threat, seed, _, example| {
    Box::new(Targeted::new(example.image.clone(), method::TARGETS, move |rank, class| {
        let apgd = Apgd { threat, steps: method::STEPS, loss: Loss::TargetedDlr(class), seed };
        Climb::new(apgd, rank as u64, example.clone())
    }))
});

/// The share of the new step in a step with momentum, α in the paper.
const ALPHA: f32 = 0.75;
/// The share of steps between two checkpoints that must raise the loss, ρ in the paper.
const RHO: f64 = 0.75;

/// APGD from one random start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Apgd {
    /// The ball.
    pub threat: Threat,
    /// Gradient steps; 100 in AutoAttack.
    pub steps: usize,
    /// The loss to climb.
    pub loss: Loss,
    /// The seed of the random start.
    pub seed: u64,
}

impl Attack for Apgd {
    fn search(&self, example: Example) -> Result<Box<dyn Search>> {
        Ok(Box::new(Climb::new(*self, 0, example)))
    }
}

/// The number of steps before each checkpoint: first 22 % of all steps, then 3 % less each time, but at least 6 %
/// (Croce & Hein 2020, §3.2), rounded down as in the authors' code.
fn periods(steps: usize) -> (usize, usize, usize) {
    let share = |percent: usize| (percent * steps / 100).max(1);
    (share(22), share(3), share(6))
}

/// APGD on one image.
struct Climb {
    settings: Apgd,
    example: Example,
    /// Where the gradient is evaluated next, and where it was evaluated before.
    point: Vec<f32>,
    former: Vec<f32>,
    /// The highest loss so far, where it was, and the gradient there.
    best_loss: f32,
    best: Vec<f32>,
    best_gradient: Vec<f32>,
    step_size: f32,
    /// The loss that the last step reached.
    last_loss: f32,
    asked: usize,
    /// Steps since the last checkpoint and those of them that raised the loss; steps between checkpoints.
    since: usize,
    raised: usize,
    period: usize,
    /// At the last checkpoint: the highest loss, and whether the step was halved.
    best_at_checkpoint: f32,
    halved_at_checkpoint: bool,
    value: f32,
    adversarial: Option<Vec<f32>>,
}

impl Climb {
    /// `draw`: which of the image's random starts it is.
    fn new(settings: Apgd, draw: u64, example: Example) -> Self {
        let seed = rng::uint(settings.seed, draw, rng::stream::ATTACK);
        let start = random_point(&settings.threat, &example, seed, 1.0);
        Self {
            former: start.clone(),
            best: start.clone(),
            point: start,
            best_loss: f32::NEG_INFINITY,
            best_gradient: Vec::new(),
            step_size: 2.0 * settings.threat.epsilon() as f32,
            last_loss: f32::NEG_INFINITY,
            asked: 0,
            since: 0,
            raised: 0,
            period: periods(settings.steps).0,
            best_at_checkpoint: f32::NEG_INFINITY,
            halved_at_checkpoint: true,
            value: 0.0,
            adversarial: None,
            example,
            settings,
        }
    }

    /// A step from `self.point` along `gradient`, with momentum except in the first step.
    fn step(&mut self, gradient: &[f32]) {
        let threat = &self.settings.threat;
        let alpha = if self.asked > 1 { ALPHA } else { 1.0 };
        let mut plain = self.point.clone();
        match threat.norm() {
            Norm::Linf => {
                for (v, g) in plain.iter_mut().zip(gradient) {
                    if *g != 0.0 {
                        *v += self.step_size * g.signum();
                    }
                }
            }
            Norm::L2 => {
                let scale = self.step_size / (length(Norm::L2, gradient.iter().copied()) + 1e-12);
                plain.iter_mut().zip(gradient).for_each(|(v, g)| *v += scale * g);
            }
        }
        threat.project_image(&self.example.image, &mut plain);
        let mut next = plain;
        for ((next, point), former) in next.iter_mut().zip(&self.point).zip(&self.former) {
            *next = point + alpha * (*next - point) + (1.0 - alpha) * (point - former);
        }
        threat.project_image(&self.example.image, &mut next);
        self.former = std::mem::replace(&mut self.point, next);
    }
}

impl Search for Climb {
    fn point(&self) -> Option<&[f32]> {
        let over = self.adversarial.is_some() || self.asked > self.settings.steps;
        (!over).then_some(self.point.as_slice())
    }

    /// Not the point that the last step led to.
    fn wants_gradient(&self) -> bool {
        self.asked < self.settings.steps
    }

    fn weights(&mut self, logits: &[f32]) -> Result<Vec<f32>> {
        let (value, gradient) = self.settings.loss.of(logits, self.example.label);
        self.value = value;
        Ok(gradient)
    }

    fn advance(&mut self, logits: &[f32], gradient: &[f32]) -> Result<()> {
        if !self.example.is_right(logits) {
            self.adversarial = Some(self.point.clone());
            return Ok(());
        }
        let first = self.asked == 0;
        self.asked += 1;
        if self.asked > self.settings.steps {
            return Ok(());
        }
        let value = self.value;
        if first {
            (self.best_loss, self.best_at_checkpoint) = (value, value);
            self.best_gradient = gradient.to_vec();
        } else {
            // The first step is compared with a loss of 0, as in the authors' code, whose table of losses begins
            // with it.
            let before = if self.asked == 2 { 0.0 } else { self.last_loss };
            self.raised += usize::from(value > before);
            self.last_loss = value;
            if value > self.best_loss {
                self.best_loss = value;
                self.best.clone_from(&self.point);
                self.best_gradient = gradient.to_vec();
            }
            self.since += 1;
        }
        let mut gradient = gradient;
        let kept;
        if self.since == self.period {
            let few = self.raised as f64 <= RHO * self.period as f64;
            let stuck = !self.halved_at_checkpoint && self.best_at_checkpoint >= self.best_loss;
            self.halved_at_checkpoint = few || stuck;
            self.best_at_checkpoint = self.best_loss;
            if self.halved_at_checkpoint {
                self.step_size /= 2.0;
                self.point.clone_from(&self.best);
                kept = self.best_gradient.clone();
                gradient = &kept;
            }
            let (_, less, least) = periods(self.settings.steps);
            self.period = self.period.saturating_sub(less).max(least);
            (self.since, self.raised) = (0, 0);
        }
        self.step(gradient);
        Ok(())
    }

    fn found(&self) -> Option<&[f32]> {
        self.adversarial.as_deref()
    }
}
