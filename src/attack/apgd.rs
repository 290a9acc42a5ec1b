//! Auto-PGD: projected gradient ascent with momentum that chooses its step sizes itself (Croce & Hein 2020, Alg. 1).

use super::{
    Loss, Norm, Threat,
    search::{Search, Victim, choice, length, ranking, run},
};
use crate::{Result, rng};

/// The share of the new step in a step with momentum, α of the paper.
const ALPHA: f32 = 0.75;
/// The share of steps between two checkpoints that must raise the loss, ρ of the paper.
const RHO: f64 = 0.75;

/// The settings of APGD.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Apgd {
    /// The ball.
    pub threat: Threat,
    /// Gradient steps of a run; 100 in AutoAttack.
    pub steps: usize,
    /// Random starts.
    pub restarts: usize,
    /// The seed of the random starts.
    pub seed: u64,
}

impl Apgd {
    /// Searches for images that are not answered by their label, climbing `loss`; restarts are for those that still
    /// stand. `images`, in HWC order; `labels` and `ids`, the keys of the random starts, one an image.
    ///
    /// Returns for each image an adversarial one within the ball, if it was found.
    pub fn run(
        &self,
        victim: &Victim,
        loss: Loss,
        images: &[&[f32]],
        labels: &[usize],
        ids: &[u64],
    ) -> Result<Vec<Option<Vec<f32>>>> {
        let mut found = vec![None; images.len()];
        for restart in 0..self.restarts {
            self.run_on_standing(victim, &mut found, images, labels, ids, restart as u64, &|_| loss)?;
        }
        Ok(found)
    }

    /// The targeted version: in turn for each of the `targets` classes that come next to the best in the answer to the
    /// image itself, on the images that still stand. The loss is the targeted DLR loss, or with fewer than four classes,
    /// where that is not defined, the margin of the target.
    pub fn run_targeted(
        &self,
        victim: &Victim,
        targets: usize,
        images: &[&[f32]],
        labels: &[usize],
        ids: &[u64],
    ) -> Result<Vec<Option<Vec<f32>>>> {
        let mut found = vec![None; images.len()];
        if images.is_empty() {
            return Ok(found);
        }
        let orders: Vec<Vec<usize>> = victim.logits(images)?.iter().map(|row| ranking(row)).collect();
        let classes = orders[0].len();
        let ranks = 1..=targets.min(classes - 1);
        for rank in ranks {
            for restart in 0..self.restarts {
                let draw = (rank * self.restarts + restart) as u64;
                let loss = |i: usize| {
                    let target = orders[i][rank];
                    if classes < 4 { Loss::TargetedMargin(target) } else { Loss::TargetedDlr(target) }
                };
                self.run_on_standing(victim, &mut found, images, labels, ids, draw, &loss)?;
            }
        }
        Ok(found)
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "what is the same for all runs of an attack, and what is not"
    )]
    fn run_on_standing(
        &self,
        victim: &Victim,
        found: &mut [Option<Vec<f32>>],
        images: &[&[f32]],
        labels: &[usize],
        ids: &[u64],
        draw: u64,
        loss: &dyn Fn(usize) -> Loss,
    ) -> Result<()> {
        let standing: Vec<usize> = (0..images.len()).filter(|&i| found[i].is_none()).collect();
        let seed = rng::uint(self.seed, draw, rng::stream::ATTACK);
        let searches = standing.iter().map(|&i| {
            let start = self.start(images[i], seed, ids[i], victim.shape);
            Climb::new(*self, loss(i), images[i].to_vec(), labels[i], start)
        });
        for (i, image) in standing.iter().zip(run(victim, searches.collect())?) {
            found[*i] = image;
        }
        Ok(())
    }

    /// A random point on the surface of the ball, then clipped to the box; elements are drawn in CHW order.
    fn start(&self, x: &[f32], seed: u64, id: u64, (h, w, c): (usize, usize, usize)) -> Vec<f32> {
        let mut draws = vec![0f32; x.len()];
        match self.threat.norm() {
            Norm::Linf => {
                rng::uniforms(seed, id, rng::stream::ATTACK, &mut draws);
                draws.iter_mut().for_each(|u| *u = 2.0 * *u - 1.0);
            }
            Norm::L2 => rng::normals(seed, id, rng::stream::ATTACK, &mut draws),
        }
        let scale = self.threat.epsilon() as f32
            / length(self.threat.norm(), draws.iter().copied()).max(f32::MIN_POSITIVE);
        let chw = |position: usize, channel: usize| draws[channel * h * w + position];
        let pixels = x.iter().enumerate();
        pixels.map(|(i, x)| (x + scale * chw(i / c, i % c)).clamp(0.0, 1.0)).collect()
    }
}

/// After how many steps each checkpoint comes: first 22 % of the steps, then each time 3 % less, at least 6 %
/// (Croce & Hein 2020, §3.2), rounded down as in the authors' code.
fn periods(steps: usize) -> (usize, usize, usize) {
    let share = |percent: usize| (percent * steps / 100).max(1);
    (share(22), share(3), share(6))
}

/// APGD on one image.
struct Climb {
    settings: Apgd,
    loss: Loss,
    x: Vec<f32>,
    label: usize,
    /// Where the gradient is taken next, and where it was taken before.
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
    fn new(settings: Apgd, loss: Loss, x: Vec<f32>, label: usize, start: Vec<f32>) -> Self {
        Self {
            loss,
            label,
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
            x,
            settings,
        }
    }

    /// A step from `self.point` along `gradient`, with momentum but for the first one.
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
        threat.project_image(&self.x, &mut plain);
        let mut next = plain;
        for ((next, point), former) in next.iter_mut().zip(&self.point).zip(&self.former) {
            *next = point + alpha * (*next - point) + (1.0 - alpha) * (point - former);
        }
        threat.project_image(&self.x, &mut next);
        self.former = std::mem::replace(&mut self.point, next);
    }
}

impl Search for Climb {
    const GRADIENTS: bool = true;

    fn point(&self) -> Option<&[f32]> {
        let over = self.adversarial.is_some() || self.asked > self.settings.steps;
        (!over).then_some(self.point.as_slice())
    }

    fn weights(&mut self, logits: &[f32]) -> Vec<f32> {
        let (value, gradient) = self.loss.of(logits, self.label);
        self.value = value;
        gradient
    }

    fn advance(&mut self, logits: &[f32], gradient: &[f32]) {
        if choice(logits) != Some(self.label) {
            self.adversarial = Some(self.point.clone());
            return;
        }
        let first = self.asked == 0;
        self.asked += 1;
        let value = self.value;
        if first {
            (self.best_loss, self.best_at_checkpoint) = (value, value);
            self.best_gradient = gradient.to_vec();
        } else {
            // The first step is compared with a loss of 0, as in the authors' code, whose table of losses begins there.
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
    }

    fn found(self) -> Option<Vec<f32>> {
        self.adversarial
    }
}
