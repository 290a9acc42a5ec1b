//! Projected gradient ascent (Madry et al. 2018, §2.1).

use candle_core::{D, Device, Tensor, Var};

use super::{Epsilon, Norm, Threat, search::choice};
use crate::{Result, kernels, rng};

named! {
    /// What [`pgd`] makes large.
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

/// How hard [`pgd`] tries.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PgdConfig {
    /// Gradient steps from each start.
    pub steps: usize,
    /// The length of a step, in the norm of the threat.
    pub step_size: f64,
    /// How many starts; the worst image of them counts.
    pub restarts: usize,
    /// Whether to start from a random point of the ball, else from the image itself.
    pub random_start: bool,
    /// What is made large.
    pub loss: PgdLoss,
}

impl PgdConfig {
    /// Fails with [`Error::Usage`](crate::Error::Usage) if the settings cannot be meant.
    pub fn validate(&self) -> Result<()> {
        if !(self.step_size >= 0.0 && self.step_size.is_finite()) {
            bail!(Usage, "the attack's step size is {}, expected a number from 0", self.step_size);
        }
        if self.restarts == 0 {
            bail!(Usage, "the attack's restarts are 0, expected at least 1");
        }
        if self.restarts > 1 && !self.random_start {
            bail!(Usage, "the attack's restarts are {} without a random start, expected 1", self.restarts);
        }
        Ok(())
    }

    /// Where the attack on `x` begins, the `restart`-th time.
    fn start(&self, threat: &Threat, x: &Tensor, seed: u64, restart: usize, ids: &[u64]) -> Result<Tensor> {
        match self.random_start {
            true => threat.random_start(x, rng::uint(seed, restart as u64, rng::stream::ATTACK), ids),
            false => Ok(x.clone()),
        }
    }
}

/// An attack that is ready to run: [`pgd`] with its ball, its settings and the seed of its random starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pgd {
    /// The ball.
    pub threat: Threat,
    /// How hard it tries.
    pub config: PgdConfig,
    /// The seed of the random starts.
    pub seed: u64,
}

impl Pgd {
    /// `steps` steps of size `step_ratio · epsilon / steps`, from `restarts` random starts.
    ///
    /// Fails with [`Error::Usage`](crate::Error::Usage), naming the value, if one of them cannot be.
    pub fn new(
        norm: Norm,
        epsilon: Epsilon,
        steps: usize,
        step_ratio: f64,
        restarts: usize,
        seed: u64,
    ) -> Result<Self> {
        if steps == 0 || !(step_ratio > 0.0 && step_ratio.is_finite()) {
            bail!(
                Usage,
                "attack_steps is {steps} and attack_step_ratio {step_ratio}, expected at least 1 and more than 0"
            );
        }
        let step_size = step_ratio * epsilon.get() / steps as f64;
        let config = PgdConfig { steps, step_size, restarts, random_start: true, loss: PgdLoss::Ce };
        config.validate()?;
        Ok(Self { threat: Threat::new(norm, epsilon)?, config, seed })
    }

    /// What the attack makes of the images `x` with `labels`; see [`pgd`].
    pub fn perturb(
        &self,
        logits_of: &dyn Fn(&Tensor) -> Result<Tensor>,
        x: &Tensor,
        labels: &Tensor,
        sample_ids: &[u64],
    ) -> Result<Tensor> {
        pgd(logits_of, x, labels, &self.threat, &self.config, self.seed, sample_ids)
    }

    /// For each image whether it is answered by its label wherever the attack comes by: at the image itself, at the random
    /// starts and after each step. Who is answered otherwise leaves, so that steps are made for those only that stand.
    ///
    /// `x`: `(b, …)` f32, in [0, 1]; `labels` and `sample_ids`: one an image. At least as strong as [`Pgd::perturb`], which
    /// looks at the last points only. For the rest see [`pgd`].
    pub fn withstood(
        &self,
        logits_of: &dyn Fn(&Tensor) -> Result<Tensor>,
        x: &Tensor,
        labels: &[u32],
        sample_ids: &[u64],
    ) -> Result<Vec<bool>> {
        let Self { threat, config, .. } = self;
        config.validate()?;
        let x = x.detach();
        let n = x.dim(0)?;
        if (labels.len(), sample_ids.len()) != (n, n) {
            bail!(Alarm, "{n} images have {} labels and {} ids", labels.len(), sample_ids.len());
        }
        let mut stands = vec![true; n];
        leave(&mut stands, &(0..n).collect::<Vec<_>>(), labels, &logits_of(&x)?)?;
        if threat.epsilon() == 0.0 {
            return Ok(stands);
        }
        for restart in 0..config.restarts {
            self.withstood_from(restart, logits_of, &x, labels, sample_ids, &mut stands)?;
        }
        Ok(stands)
    }

    /// The attack's way from one start, for the images that stand.
    fn withstood_from(
        &self,
        restart: usize,
        logits_of: &dyn Fn(&Tensor) -> Result<Tensor>,
        x: &Tensor,
        labels: &[u32],
        sample_ids: &[u64],
        stands: &mut [bool],
    ) -> Result<()> {
        let Self { threat, config, seed } = self;
        let mut rows: Vec<usize> = (0..stands.len()).filter(|&row| stands[row]).collect();
        if rows.is_empty() {
            return Ok(());
        }
        let mut x = x.index_select(&indices(&rows, x.device())?, 0)?;
        let ids: Vec<u64> = rows.iter().map(|&row| sample_ids[row]).collect();
        let mut x_adv = config.start(threat, &x, *seed, restart, &ids)?;
        for _ in 0..config.steps {
            let var = Var::from_tensor(&x_adv)?;
            let logits = logits_of(var.as_tensor())?;
            leave(stands, &rows, labels, &logits)?;
            let kept: Vec<usize> = (0..rows.len()).filter(|&i| stands[rows[i]]).collect();
            if kept.is_empty() {
                return Ok(());
            }
            let expected: Vec<u32> = rows.iter().map(|&row| labels[row]).collect();
            let loss = config.loss.of(&logits, &Tensor::new(expected, x.device())?)?;
            x_adv = threat.step(&x, &x_adv, &gradient(&loss, &var)?, config.step_size)?;
            if kept.len() < rows.len() {
                let places = indices(&kept, x.device())?;
                (x, x_adv) = (x.index_select(&places, 0)?, x_adv.index_select(&places, 0)?);
                rows = kept.into_iter().map(|i| rows[i]).collect();
            }
        }
        leave(stands, &rows, labels, &logits_of(&x_adv)?)
    }
}

/// Takes those of `rows` down that the logits, one row of them each, do not answer by their label.
fn leave(stands: &mut [bool], rows: &[usize], labels: &[u32], logits: &Tensor) -> Result<()> {
    let logits = logits.detach().to_vec2::<f32>()?;
    if logits.len() != rows.len() {
        bail!(Alarm, "{} images have logits for {}", rows.len(), logits.len());
    }
    for (&row, logits) in rows.iter().zip(logits) {
        stands[row] = choice(&logits) == Some(labels[row] as usize);
    }
    Ok(())
}

fn indices(rows: &[usize], device: &Device) -> Result<Tensor> {
    Ok(Tensor::new(rows.iter().map(|&row| row as u32).collect::<Vec<_>>(), device)?)
}

/// The images within `threat` of `x` that PGD finds to have the highest loss.
///
/// `x`: `(b, …)` f32, in [0, 1]. `labels`: `(b,)` u32. `sample_ids`: a number for each image, which with
/// `seed` decides on its random starts. `logits_of` returns `(b, classes)`, its parameters best frozen: their
/// gradients are of no use here. Returns images shaped like `x`, without a graph. The result for an image does
/// not depend on the batch, as long as its logits do not. A radius of 0 returns `x`.
///
/// Fails with [`Error::Usage`](crate::Error::Usage) for settings that cannot be meant, with
/// [`Error::Alarm`](crate::Error::Alarm) if no gradient reaches the images, and with what `logits_of` fails with.
pub fn pgd(
    logits_of: &dyn Fn(&Tensor) -> Result<Tensor>,
    x: &Tensor,
    labels: &Tensor,
    threat: &Threat,
    config: &PgdConfig,
    seed: u64,
    sample_ids: &[u64],
) -> Result<Tensor> {
    config.validate()?;
    let x = x.detach();
    if threat.epsilon() == 0.0 {
        return Ok(x);
    }
    let mut worst: Option<(Tensor, Tensor)> = None;
    for restart in 0..config.restarts {
        let start = config.start(threat, &x, seed, restart, sample_ids)?;
        let loss_of = |logits: &Tensor| config.loss.of(logits, labels);
        let x_adv = ascend(logits_of, &loss_of, &x, start, threat, config)?;
        if config.restarts == 1 {
            return Ok(x_adv);
        }
        // Wrong beats right, whatever the loss: with more than two classes a right answer can cost more.
        let logits = logits_of(&x_adv)?.detach();
        let wrong = logits.argmax(D::Minus1)?.ne(labels)?.to_dtype(logits.dtype())?;
        let loss = (kernels::cross_entropy(&logits, labels)? + (wrong * 1e6)?)?;
        // An answer that is no number is the worst of all; as such it compares with nothing.
        let none = loss.ne(&loss)?;
        let loss = none.where_cond(&loss.ones_like()?.affine(1e30, 0.0)?, &loss)?;
        worst = Some(match worst {
            None => (x_adv, loss),
            Some((worst_x, worst_loss)) => {
                let worse = loss.gt(&worst_loss)?;
                let mut shape = vec![1; x.rank()];
                shape[0] = x.dim(0)?;
                let image = worse.reshape(shape)?.broadcast_as(x.shape())?;
                (image.where_cond(&x_adv, &worst_x)?, worse.where_cond(&loss, &worst_loss)?)
            }
        });
    }
    Ok(worst.map_or(x, |(x_adv, _)| x_adv))
}

/// The steps of the attack: from `start` up the gradient of `loss_of(logits_of(x'))`, projected onto the ball around `x`
/// after each. `loss_of` returns a number an image. For the rest see [`pgd`].
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

/// The gradient by the images of their losses, `(b,)`.
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

    const WEIGHTS: [f32; 6] = [0.5, -1.0, 2.0, 0.25, -0.75, 1.5];

    fn threat(norm: Norm, epsilon: f64) -> Threat {
        Threat::new(norm, Epsilon::try_from(epsilon).unwrap()).unwrap()
    }

    fn config(steps: usize, step_size: f64) -> PgdConfig {
        PgdConfig { steps, step_size, restarts: 1, random_start: true, loss: PgdLoss::Ce }
    }

    /// Logits (0, w·x + 0.3): a linear model with margin w·x + 0.3 for label 1.
    fn linear(x: &Tensor) -> Result<Tensor> {
        let w = Tensor::from_slice(&WEIGHTS, (1, 6), x.device())?;
        let margin = (kernels::linear(x, &w, None)? + 0.3)?;
        Ok(Tensor::cat(&[&margin.zeros_like()?, &margin], 1)?)
    }

    /// Far from the sides of the box, so that only the ball binds.
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
            let x_adv = pgd(&linear, &x, &labels, &threat(norm, 0.1), &config, 1, &[4, 5, 6]).unwrap();
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
            let x_adv = pgd(&linear, &edge, &labels, &threat(norm, 0.3), &config(10, 0.2), 0, &[0]).unwrap();
            let delta = (&x_adv - &edge).unwrap().to_vec2::<f32>().unwrap().remove(0);
            let size = match norm {
                Norm::Linf => delta.iter().fold(0f32, |m, d| m.max(d.abs())),
                Norm::L2 => delta.iter().map(|d| d * d).sum::<f32>().sqrt(),
            };
            assert!(size <= 0.3 + 1e-6 && size > 0.2, "{norm:?}: {size}");
            assert!(x_adv.to_vec2::<f32>().unwrap()[0].iter().all(|v| (0.0..=1.0).contains(v)));
        }
    }

    /// A model with several maxima, on which restarts and starts matter.
    fn wavy(x: &Tensor) -> Result<Tensor> {
        linear(&((x * 40.0)?.sin()? + x)?)
    }

    #[test]
    fn an_image_is_attacked_alike_in_any_batch() {
        let (x, labels) = (images(4), Tensor::new(&[1u32, 0, 1, 0], &Device::Cpu).unwrap());
        for norm in [Norm::Linf, Norm::L2] {
            let config = PgdConfig { restarts: 3, ..config(5, 0.03) };
            let attack = |from: usize, n: usize| {
                let ids: Vec<_> = (10..14).skip(from).take(n).collect();
                let (x, labels) = (x.narrow(0, from, n).unwrap(), labels.narrow(0, from, n).unwrap());
                let x_adv = pgd(&wavy, &x, &labels, &threat(norm, 0.1), &config, 2, &ids).unwrap();
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
    fn restarts_keep_the_worst_for_each_image() {
        let n = 16;
        let (x, ids) = (images(n), (0..n as u64).collect::<Vec<_>>());
        let labels = Tensor::ones(n, candle_core::DType::U32, &Device::Cpu).unwrap();
        let run = |restarts| {
            let config = PgdConfig { restarts, ..config(3, 0.02) };
            let x_adv = pgd(&wavy, &x, &labels, &threat(Norm::Linf, 0.1), &config, 5, &ids).unwrap();
            losses(&wavy, &x_adv, &labels)
        };
        let (one, four) = (run(1), run(4));
        assert!(one.iter().zip(&four).all(|(one, four)| four >= &(one - 1e-6)));
        assert!(one.iter().zip(&four).filter(|(one, four)| *four > &(*one + 1e-4)).count() > n / 2);
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
                let pgd = Pgd { threat, config: PgdConfig { restarts: restart + 1, ..once }, seed: 5 };
                assert_eq!(pgd.withstood(&wavy, &x, &labels, &ids).unwrap(), all, "{norm:?}, {restart}");
            }
            // Else this would show little: images leave on the way, not all at once, and not all of them.
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
        assert_eq!(pgd.withstood(&blind, &images(2), &[1, 0], &[0, 1]).unwrap(), [false, false]);
    }

    #[test]
    fn a_radius_of_0_returns_the_image() {
        let (x, labels) = (images(2), Tensor::new(&[1u32, 0], &Device::Cpu).unwrap());
        let x_adv = pgd(&linear, &x, &labels, &threat(Norm::L2, 0.0), &config(3, 0.1), 0, &[0, 1]).unwrap();
        assert_eq!(x_adv.to_vec2::<f32>().unwrap(), x.to_vec2::<f32>().unwrap());
    }

    #[test]
    fn settings_that_cannot_be_meant_are_refused() {
        let error = |config: PgdConfig| config.validate().unwrap_err().to_string();
        assert!(error(config(3, f64::NAN)).starts_with("the attack's step size is NaN"));
        assert!(error(PgdConfig { restarts: 0, ..config(3, 0.1) }).contains("restarts are 0"));
        let fixed = PgdConfig { restarts: 3, random_start: false, ..config(3, 0.1) };
        assert!(error(fixed).contains("restarts are 3 without a random start"));
    }

    #[test]
    fn logits_without_a_gradient_raise_the_alarm() {
        let (x, labels) = (images(1), Tensor::new(&[1u32], &Device::Cpu).unwrap());
        let cut = |x: &Tensor| linear(&x.detach());
        let error = pgd(&cut, &x, &labels, &threat(Norm::Linf, 0.1), &config(1, 0.1), 0, &[0]).unwrap_err();
        assert_eq!(error.exit_code(), 70);
    }
}
