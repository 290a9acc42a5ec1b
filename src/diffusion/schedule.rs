//! How much noise each diffusion step adds, and quantities derived from it, all in f64.

use std::f64::consts::FRAC_PI_2;

use super::Level;
use crate::Result;

/// The noise of the forward process, step by step, indexed from 0.
#[derive(Clone, Debug, PartialEq)]
pub struct NoiseSchedule {
    /// ᾱ of each step, the product of 1 - β up to it: the share of the signal's variance that is left.
    pub(super) alphas_cumprod: Vec<f64>,
}

impl NoiseSchedule {
    /// A schedule of these variances β. Fails with [`Error::Data`](crate::Error::Data) if there are none, or if one
    /// is not above 0 and below 1.
    pub fn new(betas: Vec<f64>) -> Result<Self> {
        if betas.is_empty() {
            bail!(Data, "the schedule has no steps, expected at least 1");
        }
        if let Some((t, beta)) = betas.iter().enumerate().find(|(_, b)| !(**b > 0.0 && **b < 1.0)) {
            bail!(Data, "beta of step {t} is {beta}, expected above 0 and below 1");
        }
        let alphas_cumprod = betas
            .iter()
            .scan(1.0, |product, beta| {
                *product *= 1.0 - beta;
                Some(*product)
            })
            .collect();
        Self::of(alphas_cumprod)
    }

    fn of(alphas_cumprod: Vec<f64>) -> Result<Self> {
        let schedule = Self { alphas_cumprod };
        // Images are f32 and are viewed as x_0 + σ ε.
        let sigma = |t: usize| schedule.level(t).sigma;
        if let Some(t) = (0..schedule.len()).find(|&t| !(1e-30..1e30).contains(&sigma(t))) {
            bail!(
                Data,
                "after {} steps the noise is {:e} times the image, expected from 1e-30 to 1e30: the schedule's betas \
                 or its number of steps are too small or too large",
                t + 1,
                sigma(t)
            );
        }
        Ok(schedule)
    }

    /// β in equal steps from `start` to `end` (Ho et al. 2020, §4: 1000 steps from 1e-4 to 0.02).
    pub fn linear(steps: usize, start: f64, end: f64) -> Result<Self> {
        Self::new(linspace(steps, start, end).collect())
    }

    /// √β in equal steps from √`start` to √`end` (Rombach et al. 2022).
    pub fn scaled_linear(steps: usize, start: f64, end: f64) -> Result<Self> {
        Self::new(linspace(steps, start.sqrt(), end.sqrt()).map(|root| root * root).collect())
    }

    /// ᾱ falls like a squared cosine, β capped at 0.999 (Nichol & Dhariwal 2021, Eq. 17).
    pub fn squared_cosine(steps: usize) -> Result<Self> {
        let alpha_bar = |step: usize| {
            let time = step as f64 / steps as f64;
            ((time + 0.008) / 1.008 * FRAC_PI_2).cos().powi(2)
        };
        Self::new((0..steps).map(|t| (1.0 - alpha_bar(t + 1) / alpha_bar(t)).min(0.999)).collect())
    }

    /// β grows like the logistic function from -6 to 6, from `start` to `end` (Xu et al. 2022, GeoDiff).
    pub fn sigmoid(steps: usize, start: f64, end: f64) -> Result<Self> {
        Self::new(linspace(steps, -6.0, 6.0).map(|x| start + (end - start) / (1.0 + (-x).exp())).collect())
    }

    /// The schedule with √ᾱ shifted and stretched so that it falls to nothing at the last step, whose ᾱ becomes
    /// `last` (Lin et al. 2024, Alg. 1).
    pub fn with_zero_terminal_snr(self, last: f64) -> Result<Self> {
        let roots: Vec<f64> = self.alphas_cumprod.iter().map(|alpha_bar| alpha_bar.sqrt()).collect();
        let (first, end) = (roots[0], roots[roots.len() - 1]);
        let mut alphas_cumprod: Vec<f64> =
            roots.iter().map(|root| ((root - end) * first / (first - end)).powi(2)).collect();
        alphas_cumprod[roots.len() - 1] = last;
        Self::of(alphas_cumprod)
    }

    /// The number of steps, T.
    #[expect(clippy::len_without_is_empty, reason = "a schedule has at least one step")]
    pub fn len(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// The noise level of step `t`.
    ///
    /// # Panics
    /// If `t` is not a step of the schedule.
    pub fn level(&self, t: usize) -> Level {
        let alpha_bar = self.alphas_cumprod[t];
        Level { sigma: ((1.0 - alpha_bar) / alpha_bar).sqrt(), t: t as f64 }
    }

    /// The noise level between two steps: σ is interpolated.
    ///
    /// # Panics
    /// If `t` is not between the first and the last step.
    pub fn level_between(&self, t: f64) -> Level {
        let before = self.level(t.floor() as usize);
        let after = self.level(t.ceil() as usize);
        Level { sigma: before.sigma + (after.sigma - before.sigma) * t.fract(), t }
    }

    /// The step of a noise level: ln σ is interpolated. A σ outside of the schedule gets its first or last step.
    pub fn level_of(&self, sigma: f64) -> Level {
        let steps = self.len();
        let log = |t: usize| self.level(t).sigma.ln();
        let low = (0..steps).rev().find(|&t| log(t) <= sigma.ln()).unwrap_or(0).min(steps.saturating_sub(2));
        let high = (low + 1).min(steps - 1);
        let width = log(high) - log(low);
        let part = if width > 0.0 { ((sigma.ln() - log(low)) / width).clamp(0.0, 1.0) } else { 0.0 };
        Level { sigma, t: low as f64 + part }
    }
}

#[cfg(test)]
impl NoiseSchedule {
    /// β of each step.
    pub(super) fn betas(&self) -> Vec<f64> {
        let before = std::iter::once(&1.0).chain(&self.alphas_cumprod);
        self.alphas_cumprod.iter().zip(before).map(|(after, before)| 1.0 - after / before).collect()
    }
}

fn linspace(n: usize, start: f64, end: f64) -> impl Iterator<Item = f64> {
    let last = n.saturating_sub(1).max(1) as f64;
    (0..n).map(move |i| start + (end - start) * (i as f64 / last))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64, digits: i32) {
        let error = (found - expected).abs() / expected.abs();
        assert!(error < 0.51 * 10f64.powi(1 - digits), "{found}, expected {expected}");
    }

    /// Own float64 computation in numpy.
    #[test]
    fn the_linear_schedule_has_the_known_values() {
        let schedule = NoiseSchedule::linear(1000, 1e-4, 0.02).unwrap();
        for (t, alpha_bar) in
            [(1, 0.9997800921), (99, 0.8970181457), (499, 0.07858724288), (999, 4.035829765e-5)]
        {
            close(schedule.alphas_cumprod[t], alpha_bar, 10);
        }
        close(schedule.alphas_cumprod.iter().sum(), 275.51323341, 11);
    }

    /// Own float64 computation of Nichol & Dhariwal 2021, Eq. 17.
    #[test]
    fn the_cosine_schedule_has_the_known_values_and_one_capped_beta() {
        let schedule = NoiseSchedule::squared_cosine(1000).unwrap();
        close(schedule.betas()[0], 4.1284225e-5, 8);
        for (t, expected) in
            [(249, 0.84701216), (499, 0.49384359), (749, 0.1442721), (998, 2.4287669e-6), (999, 2.4287669e-9)]
        {
            close(schedule.alphas_cumprod[t], expected, 7);
        }
        assert_eq!(schedule.betas().iter().filter(|beta| (*beta - 0.999).abs() < 1e-9).count(), 1);
    }

    #[test]
    fn levels_are_found_again_by_their_noise() {
        let schedule = NoiseSchedule::linear(1000, 1e-4, 0.02).unwrap();
        for t in [0, 1, 437, 998, 999] {
            let level = schedule.level(t);
            close(level.sigma.powi(2), 1.0 / schedule.alphas_cumprod[t] - 1.0, 12);
            assert!((schedule.level_of(level.sigma).t - t as f64).abs() < 1e-9);
            assert_eq!(schedule.level_between(t as f64), level);
        }
        let (a, b) = (schedule.level(10).sigma, schedule.level(11).sigma);
        close(schedule.level_between(10.25).sigma, 0.75 * a + 0.25 * b, 12);
        close(schedule.level_of((a * b).sqrt()).t, 10.5, 9);
        assert_eq!((schedule.level_of(1e-9).t, schedule.level_of(1e9).t), (0.0, 999.0));
    }

    #[test]
    fn scaled_linear_is_linear_in_the_root_and_keeps_the_ends() {
        let betas = NoiseSchedule::scaled_linear(3, 0.01, 0.09).unwrap().betas();
        for (found, expected) in betas.iter().zip([0.01, 0.04, 0.09]) {
            close(*found, expected, 12);
        }
    }

    #[test]
    fn variances_outside_of_0_to_1_are_refused_by_step_and_value() {
        let error = NoiseSchedule::new(vec![0.1, 1.5]).unwrap_err();
        assert_eq!(error.to_string(), "beta of step 1 is 1.5, expected above 0 and below 1");
        assert!(NoiseSchedule::new(vec![f64::NAN]).is_err());
        assert!(NoiseSchedule::new(vec![]).is_err());
        let error = NoiseSchedule::linear(100_000, 1e-4, 0.02).unwrap_err().to_string();
        assert!(error.contains("times the image, expected from 1e-30 to 1e30"), "{error}");
        assert!(
            NoiseSchedule::linear(10_000, 1e-4, 0.02).is_ok() && NoiseSchedule::new(vec![1e-17]).is_err()
        );
    }
}
