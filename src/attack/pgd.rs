//! Projected gradient ascent (Madry et al. 2018, §2.1).

use candle_core::{D, Device, Tensor, Var};

use super::{Attack, Epsilon, Example, Loss, Norm, Search, Threat};
use crate::{Result, kernels, rng};

named! {
    /// The loss that [`Pgd`] maximises.
    pub enum PgdLoss default Ce {
        /// Cross-entropy (Madry et al. 2018).
        Ce = "ce",
        /// The margin of the best wrong class, `max_{i≠y} z_i - z_y` (Carlini & Wagner 2017, f₆ without its bound).
        Cw = "cw",
    }
}

impl PgdLoss {
    /// The loss of each image. `logits`: `(b, classes)`; `labels`: `(b,)` u32. Returns `(b,)`.
    fn of(self, logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
        match self {
            Self::Ce => kernels::cross_entropy(logits, labels),
            Self::Cw => {
                let label = labels.unsqueeze(1)?;
                let right = logits.gather(&label, 1)?;
                let far = Tensor::full(-1e9f32, right.shape(), logits.device())?;
                let wrong = logits.detach().zeros_like()?.scatter_add(&label, &far, 1)?;
                let best = (logits.detach() + wrong)?.argmax_keepdim(D::Minus1)?;
                Ok((logits.gather(&best, 1)? - right)?.squeeze(1)?)
            }
        }
    }
}

/// How hard [`Pgd`] searches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PgdConfig {
    /// Gradient steps from each start.
    pub steps: usize,
    /// The length of a step, in the norm of the threat.
    pub step_size: f64,
    /// Whether to start from a random point in the ball instead of the image itself.
    pub random_start: bool,
    /// The loss to maximise.
    pub loss: PgdLoss,
}

impl PgdConfig {
    /// Fails with [`Error::Usage`](crate::Error::Usage) if the settings make no sense.
    pub fn validate(&self) -> Result<()> {
        if !(self.step_size >= 0.0 && self.step_size.is_finite()) {
            bail!(Usage, "the attack's step size is {}, expected a number from 0", self.step_size);
        }
        Ok(())
    }

    /// Where the attack on `x` begins at start number `restart`, counted from 0.
    fn start(&self, threat: &Threat, x: &Tensor, seed: u64, restart: usize, ids: &[u64]) -> Result<Tensor> {
        match self.random_start {
            true => threat.random_start(x, rng::uint(seed, restart as u64, rng::stream::ATTACK), ids),
            false => Ok(x.clone()),
        }
    }
}

/// An attack ready to run, with its ball, its settings and the seed of its random start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pgd {
    /// The ball.
    pub threat: Threat,
    /// How hard it searches.
    pub config: PgdConfig,
    /// The seed of the random start.
    pub seed: u64,
}

impl Pgd {
    /// `steps` steps of size `step_ratio · epsilon / steps`, from a random start.
    ///
    /// Fails with [`Error::Usage`](crate::Error::Usage), naming the value, if one of them is impossible.
    pub fn new(norm: Norm, epsilon: Epsilon, steps: usize, step_ratio: f64, seed: u64) -> Result<Self> {
        if steps == 0 || !(step_ratio > 0.0 && step_ratio.is_finite()) {
            bail!(
                Usage,
                "attack_steps is {steps} and attack_step_ratio {step_ratio}, expected at least 1 and more than 0"
            );
        }
        let step_size = step_ratio * epsilon.get() / steps as f64;
        let config = PgdConfig { steps, step_size, random_start: true, loss: PgdLoss::Ce };
        config.validate()?;
        Ok(Self { threat: Threat::new(norm, epsilon)?, config, seed })
    }

    /// The images within the ball around `x` that the attack reaches by climbing the loss.
    ///
    /// `x`: `(b, …)` f32, in [0, 1]. `labels`: `(b,)` u32. `sample_ids`: a number for each image, which together with
    /// the seed determines its random start. `logits_of` returns `(b, classes)`; its parameters are best frozen,
    /// because their gradients are not used here. Returns images shaped like `x`, without a graph. The result for an
    /// image does not depend on its batch, as long as its logits do not. A radius of 0 returns `x`.
    ///
    /// Fails with [`Error::Usage`](crate::Error::Usage) for settings that make no sense, with
    /// [`Error::Alarm`](crate::Error::Alarm) if no gradient reaches the images, and with any error of `logits_of`.
    pub fn perturb(
        &self,
        logits_of: &dyn Fn(&Tensor) -> Result<Tensor>,
        x: &Tensor,
        labels: &Tensor,
        sample_ids: &[u64],
    ) -> Result<Tensor> {
        self.climb(logits_of, &|logits| self.config.loss.of(logits, labels), x, sample_ids)
    }

    /// [`Pgd::perturb`] by another loss, which is one number for each image's logits.
    pub fn climb(
        &self,
        logits_of: &dyn Fn(&Tensor) -> Result<Tensor>,
        loss_of: &dyn Fn(&Tensor) -> Result<Tensor>,
        x: &Tensor,
        sample_ids: &[u64],
    ) -> Result<Tensor> {
        let Self { threat, config, seed } = self;
        config.validate()?;
        let x = x.detach();
        if threat.epsilon() == 0.0 {
            return Ok(x);
        }
        let start = config.start(threat, &x, *seed, 0, sample_ids)?;
        ascend(logits_of, loss_of, &x, start, threat, config)
    }
}

/// Which points on [`Pgd`]'s paths count in an evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// The last point of each path, which [`Pgd::perturb`] returns.
    Last,
    /// Every point, beginning with the image itself.
    Every,
}

/// PGD image by image: an image is finished once it is misclassified at a point that counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PgdSearch {
    pgd: Pgd,
    restarts: usize,
    counted: Counted,
}

impl PgdSearch {
    /// An attack from `restarts` starts, until one of them succeeds.
    ///
    /// Fails with [`Error::Usage`](crate::Error::Usage) for no starts, or for several that would all be the same.
    pub fn new(pgd: Pgd, restarts: usize, counted: Counted) -> Result<Self> {
        pgd.config.validate()?;
        if restarts == 0 {
            bail!(Usage, "the attack's restarts are 0, expected at least 1");
        }
        if restarts > 1 && !pgd.config.random_start {
            bail!(Usage, "the attack's restarts are {restarts} without a random start, expected 1");
        }
        Ok(Self { pgd, restarts, counted })
    }

    /// The ball.
    pub fn threat(&self) -> Threat {
        self.pgd.threat
    }
}

impl Attack for PgdSearch {
    fn search(&self, example: Example) -> Result<Box<dyn Search>> {
        let x = example.tensor(&example.image)?;
        let point = Some(example.image.clone());
        let mut way = Way { settings: *self, example, x, point, starts: 0, steps_left: 0, found: None };
        if self.counted == Counted::Last && way.starts_left() {
            way.start()?;
        }
        Ok(Box::new(way))
    }
}

/// PGD on one image.
struct Way {
    settings: PgdSearch,
    example: Example,
    /// The image, `(1, h, w, c)`.
    x: Tensor,
    /// The point to evaluate next; `None` if the search is over.
    point: Option<Vec<f32>>,
    /// Starts made so far, and steps still to come from the last one.
    starts: usize,
    steps_left: usize,
    found: Option<Vec<f32>>,
}

impl Way {
    fn starts_left(&self) -> bool {
        self.starts < self.settings.restarts && self.settings.pgd.threat.epsilon() > 0.0
    }

    fn start(&mut self) -> Result<()> {
        let Pgd { threat, config, seed } = self.settings.pgd;
        let start = config.start(&threat, &self.x, seed, self.starts, &[self.example.id])?;
        self.point = Some(start.flatten_all()?.to_vec1()?);
        self.starts += 1;
        self.steps_left = config.steps;
        Ok(())
    }
}

impl Search for Way {
    fn point(&self) -> Option<&[f32]> {
        self.point.as_deref()
    }

    fn wants_gradient(&self) -> bool {
        self.steps_left > 0
    }

    fn weights(&mut self, logits: &[f32]) -> Result<Vec<f32>> {
        let label = self.example.label;
        if self.settings.pgd.config.loss == PgdLoss::Cw {
            return Ok(Loss::Margin.of(logits, label).1);
        }
        // Not `Loss::CrossEntropy`, which is in double precision: the bits are those of the op that `perturb` climbs.
        let logits = Tensor::from_slice(logits, (1, logits.len()), &Device::Cpu)?;
        let mut gradient: Vec<f32> = kernels::softmax(&logits)?.flatten_all()?.to_vec1()?;
        gradient[label] -= 1.0;
        Ok(gradient)
    }

    fn advance(&mut self, logits: &[f32], gradient: &[f32]) -> Result<()> {
        let Pgd { threat, config, .. } = self.settings.pgd;
        let Some(point) = self.point.take() else { return Ok(()) };
        let counts = self.steps_left == 0 || self.settings.counted == Counted::Every;
        if counts && !self.example.is_right(logits) {
            self.found = Some(point);
        } else if self.steps_left > 0 {
            let (x_adv, gradient) = (self.example.tensor(&point)?, self.example.tensor(gradient)?);
            let moved = threat.step(&self.x, &x_adv, &gradient, config.step_size)?;
            self.point = Some(moved.flatten_all()?.to_vec1()?);
            self.steps_left -= 1;
        } else if self.starts_left() {
            self.start()?;
        }
        Ok(())
    }

    fn found(&self) -> Option<&[f32]> {
        self.found.as_deref()
    }
}

/// The steps of the attack: from `start` up the gradient of `loss_of(logits_of(x'))`, with a projection onto the
/// ball around `x` after each. `loss_of` returns one number per image. For the rest see [`Pgd::perturb`].
pub fn ascend(
    logits_of: &dyn Fn(&Tensor) -> Result<Tensor>,
    loss_of: &dyn Fn(&Tensor) -> Result<Tensor>,
    x: &Tensor,
    start: Tensor,
    threat: &Threat,
    config: &PgdConfig,
) -> Result<Tensor> {
    let mut x_adv = start;
    for _ in 0..config.steps {
        let var = Var::from_tensor(&x_adv)?;
        let loss = loss_of(&logits_of(var.as_tensor())?)?;
        x_adv = threat.step(x, &x_adv, &gradient(&loss, &var)?, config.step_size)?;
    }
    Ok(x_adv)
}

/// The gradient of the losses, `(b,)`, with respect to the images.
fn gradient(loss: &Tensor, images: &Var) -> Result<Tensor> {
    // The sum, not the mean: the gradient of an image then does not depend on the batch.
    match loss.sum_all()?.backward()?.remove(images.as_tensor()) {
        Some(gradient) => Ok(gradient),
        None => bail!(Alarm, "the logits do not depend on the images: there is no gradient to follow"),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::attack::{
        Victim,
        search::{LogitsOf, choice},
        tests,
    };

    const WEIGHTS: [f32; 6] = [0.5, -1.0, 2.0, 0.25, -0.75, 1.5];

    fn threat(norm: Norm, epsilon: f64) -> Threat {
        Threat::new(norm, Epsilon::try_from(epsilon).unwrap()).unwrap()
    }

    fn pgd(threat: Threat, config: PgdConfig, seed: u64) -> Pgd {
        Pgd { threat, config, seed }
    }

    fn config(steps: usize, step_size: f64) -> PgdConfig {
        PgdConfig { steps, step_size, random_start: true, loss: PgdLoss::Ce }
    }

    /// What the attack finds for images whose ids are their positions.
    fn find(attack: &PgdSearch, logits_of: LogitsOf, x: &Tensor, labels: &[u32]) -> Vec<Option<Vec<f32>>> {
        let victim = Victim { logits_of, shape: (1, 6, 1), device: &Device::Cpu };
        let images = x.to_vec2().unwrap().into_iter().zip(labels).enumerate();
        let examples: Vec<Example> = images
            .map(|(i, (image, &label))| Example {
                image,
                shape: (1, 6, 1),
                label: label as usize,
                id: i as u64,
            })
            .collect();
        tests::find(&victim, 7, attack, &examples)
    }

    /// Logits (0, w·x + 0.3): a linear model with margin w·x + 0.3 for label 1.
    fn linear(x: &Tensor) -> Result<Tensor> {
        let w = Tensor::from_slice(&WEIGHTS, (1, 6), x.device())?;
        let margin = (kernels::linear(&x.flatten_from(1)?, &w, None)? + 0.3)?;
        Ok(Tensor::cat(&[&margin.zeros_like()?, &margin], 1)?)
    }

    /// Far from the sides of the box, so that only the ball constrains the attack.
    fn images(n: usize) -> Tensor {
        let pixels = (0..n * 6).map(|i| 0.5 + 0.1 * (i as f32 * 1.7).sin()).collect();
        Tensor::from_vec(pixels, (n, 6), &Device::Cpu).unwrap()
    }

    fn losses(logits_of: &dyn Fn(&Tensor) -> Result<Tensor>, x: &Tensor, labels: &Tensor) -> Vec<f32> {
        kernels::cross_entropy(&logits_of(x).unwrap(), labels).unwrap().to_vec1().unwrap()
    }

    /// The margin falls by ε times the dual norm of w: ℓ1 for ℓ∞, ℓ2 for ℓ2.
    #[test]
    fn on_a_linear_model_the_loss_reaches_the_closed_form() {
        let (x, labels) = (images(3), Tensor::new(&[1u32, 0, 1], &Device::Cpu).unwrap());
        let l1: f32 = WEIGHTS.iter().map(|w| w.abs()).sum();
        let l2 = WEIGHTS.iter().map(|w| w * w).sum::<f32>().sqrt();
        for (norm, dual, start) in
            [(Norm::Linf, l1, true), (Norm::Linf, l1, false), (Norm::L2, l2, true), (Norm::L2, l2, false)]
        {
            let config = PgdConfig { random_start: start, ..config(40, 0.02) };
            let x_adv = pgd(threat(norm, 0.1), config, 1).perturb(&linear, &x, &labels, &[4, 5, 6]).unwrap();
            let margins = linear(&x).unwrap().to_vec2::<f32>().unwrap();
            let found = losses(&linear, &x_adv, &labels);
            for (i, sign) in [1f32, -1.0, 1.0].into_iter().enumerate() {
                let expected = (1.0 + (-(sign * margins[i][1] - 0.1 * dual)).exp()).ln();
                assert!((found[i] - expected).abs() < 1e-4, "{norm:?}: {} {expected}", found[i]);
            }
        }
    }

    #[test]
    fn what_it_returns_is_in_ball_and_box() {
        let edge = Tensor::new(&[[0f32, 1.0, 0.01, 0.99, 0.5, 0.2]], &Device::Cpu).unwrap();
        let labels = Tensor::new(&[1u32], &Device::Cpu).unwrap();
        for norm in [Norm::Linf, Norm::L2] {
            let x_adv =
                pgd(threat(norm, 0.3), config(10, 0.2), 0).perturb(&linear, &edge, &labels, &[0]).unwrap();
            let delta = (&x_adv - &edge).unwrap().to_vec2::<f32>().unwrap().remove(0);
            let size = match norm {
                Norm::Linf => delta.iter().fold(0f32, |m, d| m.max(d.abs())),
                Norm::L2 => delta.iter().map(|d| d * d).sum::<f32>().sqrt(),
            };
            assert!(size <= 0.3 + 1e-6 && size > 0.2, "{norm:?}: {size}");
            assert!(x_adv.to_vec2::<f32>().unwrap()[0].iter().all(|v| (0.0..=1.0).contains(v)));
        }
    }

    /// A model with several maxima, where the starts and their number matter.
    fn wavy(x: &Tensor) -> Result<Tensor> {
        linear(&((x * 40.0)?.sin()? + x)?)
    }

    #[test]
    fn an_image_is_attacked_alike_in_any_batch() {
        let (x, labels) = (images(4), Tensor::new(&[1u32, 0, 1, 0], &Device::Cpu).unwrap());
        for norm in [Norm::Linf, Norm::L2] {
            let config = config(5, 0.03);
            let attack = |from: usize, n: usize| {
                let ids: Vec<_> = (10..14).skip(from).take(n).collect();
                let (x, labels) = (x.narrow(0, from, n).unwrap(), labels.narrow(0, from, n).unwrap());
                let x_adv = pgd(threat(norm, 0.1), config, 2).perturb(&wavy, &x, &labels, &ids).unwrap();
                x_adv.to_vec2::<f32>().unwrap()
            };
            let together = attack(0, 4);
            for (i, image) in together.iter().enumerate() {
                for (a, b) in image.iter().zip(&attack(i, 1)[0]) {
                    assert!((a - b).abs() < 1e-5, "image {i}");
                }
            }
        }
    }

    #[test]
    fn what_the_first_start_finds_is_where_pgd_arrives_and_other_starts_find_more() {
        let n = 60;
        let (x, ids) = (images(n), (0..n as u64).collect::<Vec<_>>());
        let labels: Vec<u32> = wavy(&x).unwrap().argmax(D::Minus1).unwrap().to_vec1().unwrap();
        for (norm, epsilon) in [(Norm::Linf, 0.015), (Norm::L2, 0.03)] {
            for loss in [PgdLoss::Ce, PgdLoss::Cw] {
                let config = PgdConfig { loss, ..config(4, 2.0 * epsilon) };
                let pgd = Pgd { threat: threat(norm, epsilon), config, seed: 5 };
                let find = |restarts: usize| {
                    find(&PgdSearch::new(pgd, restarts, Counted::Last).unwrap(), &wavy, &x, &labels)
                };
                let (one, four) = (find(1), find(4));
                let y = Tensor::new(labels.as_slice(), &Device::Cpu).unwrap();
                let last = pgd.perturb(&wavy, &x, &y, &ids).unwrap();
                let answers = wavy(&last).unwrap().to_vec2::<f32>().unwrap();
                for (i, point) in last.to_vec2::<f32>().unwrap().into_iter().enumerate() {
                    let fooled = choice(&answers[i]) != Some(labels[i] as usize);
                    assert_eq!(one[i], fooled.then_some(point), "{norm} {loss:?} {i}");
                    assert!(one[i].is_none() || four[i] == one[i], "{norm} {loss:?} {i}");
                }
                let count = |found: &[Option<Vec<f32>>]| found.iter().flatten().count();
                assert!(0 < count(&one) && count(&one) < count(&four) && count(&four) < n, "{norm} {loss:?}");
            }
        }
    }

    #[test]
    fn an_image_stands_if_no_point_on_the_way_of_the_attack_is_answered_otherwise() {
        let n = 60;
        let (x, ids) = (images(n), (0..n as u64).collect::<Vec<_>>());
        let chosen =
            |x: &Tensor| -> Vec<u32> { wavy(x).unwrap().argmax(D::Minus1).unwrap().to_vec1().unwrap() };
        let mut labels = chosen(&x);
        labels[3] = 1 - labels[3];
        let y = Tensor::new(labels.as_slice(), &Device::Cpu).unwrap();
        let loss_of = |logits: &Tensor| kernels::cross_entropy(logits, &y);
        for (norm, epsilon) in [(Norm::Linf, 0.015), (Norm::L2, 0.03)] {
            // Steps beyond the maxima of the waves.
            let once = config(4, 2.0 * epsilon);
            let threat = threat(norm, epsilon);
            let (mut all, mut last, mut standing) = (vec![true; n], vec![true; n], Vec::new());
            let and_right = |stands: &mut [bool], points: &Tensor| {
                chosen(points).iter().enumerate().for_each(|(i, chosen)| stands[i] &= *chosen == labels[i]);
                stands.iter().filter(|&&stands| stands).count()
            };
            standing.push(and_right(&mut all, &x));
            for restart in 0..3 {
                // Each number of steps by the attack that returns the last point.
                let start = once.start(&threat, &x, 5, restart, &ids).unwrap();
                for steps in 0..=4 {
                    let config = PgdConfig { steps, ..once };
                    let points = ascend(&wavy, &loss_of, &x, start.clone(), &threat, &config).unwrap();
                    standing.push(and_right(&mut all, &points));
                    if steps == 4 {
                        and_right(&mut last, &points);
                    }
                }
                let pgd = Pgd { threat, config: once, seed: 5 };
                let attack = PgdSearch::new(pgd, restart + 1, Counted::Every).unwrap();
                let found = find(&attack, &wavy, &x, &labels);
                let stands: Vec<bool> = found.iter().map(Option::is_none).collect();
                assert_eq!(stands, all, "{norm:?}, {restart}");
            }
            // Otherwise this test would show little: some images leave, not all at the same time.
            standing.dedup();
            assert!(
                standing.len() > 3 && standing[0] < n && standing.last() > Some(&0),
                "{norm:?}: {standing:?}"
            );
            assert!(norm == Norm::L2 || all != last, "the last points tell as much");
        }
    }

    #[test]
    fn an_answer_that_is_no_number_does_not_stand() {
        let pgd = Pgd { threat: threat(Norm::Linf, 0.1), config: config(2, 0.1), seed: 0 };
        let blind = |x: &Tensor| Ok((linear(x)? * f64::NAN)?);
        for counted in [Counted::Last, Counted::Every] {
            let attack = PgdSearch::new(pgd, 1, counted).unwrap();
            assert!(find(&attack, &blind, &images(2), &[1, 0]).iter().all(Option::is_some), "{counted:?}");
        }
    }

    #[test]
    fn a_radius_of_0_returns_the_image() {
        let (x, labels) = (images(2), Tensor::new(&[1u32, 0], &Device::Cpu).unwrap());
        let x_adv =
            pgd(threat(Norm::L2, 0.0), config(3, 0.1), 0).perturb(&linear, &x, &labels, &[0, 1]).unwrap();
        assert_eq!(x_adv.to_vec2::<f32>().unwrap(), x.to_vec2::<f32>().unwrap());
    }

    #[test]
    fn settings_that_cannot_be_meant_are_refused() {
        let error = |config: PgdConfig| config.validate().unwrap_err().to_string();
        assert!(error(config(3, f64::NAN)).starts_with("the attack's step size is NaN"));
        let error = |restarts: usize, random_start: bool| {
            let config = PgdConfig { random_start, ..config(3, 0.1) };
            let pgd = Pgd { threat: threat(Norm::Linf, 0.1), config, seed: 0 };
            PgdSearch::new(pgd, restarts, Counted::Last).unwrap_err().to_string()
        };
        assert!(error(0, true).contains("restarts are 0"));
        assert!(error(3, false).contains("restarts are 3 without a random start"));
    }

    #[test]
    fn logits_without_a_gradient_raise_the_alarm() {
        let (x, labels) = (images(1), Tensor::new(&[1u32], &Device::Cpu).unwrap());
        let cut = |x: &Tensor| linear(&x.detach());
        let error =
            pgd(threat(Norm::Linf, 0.1), config(1, 0.1), 0).perturb(&cut, &x, &labels, &[0]).unwrap_err();
        assert_eq!(error.exit_code(), 70);
    }
}
