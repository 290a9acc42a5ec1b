//! How much noise each diffusion step adds, and what follows from it. All in f64.

use std::f64::consts::FRAC_PI_2;

use crate::Result;

/// The variances β of the forward process and their products, one a step, indexed from 0.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    betas: Vec<f64>,
    alphas_cumprod: Vec<f64>,
}

/// The Gaussian q(x_prev | x_t, x_0) of Ho et al. 2020, Eq. 6 and 7, for any earlier step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Posterior {
    /// What x_0 is multiplied by in the mean.
    pub x_start_coef: f64,
    /// What x_t is multiplied by in the mean.
    pub x_t_coef: f64,
    /// The variance, β̃.
    pub variance: f64,
    /// The variance of the forward process from the earlier step to this one, β.
    pub beta: f64,
}

impl Schedule {
    /// A schedule of these variances. Fails with [`Error::Data`](crate::Error::Data) if there are none or
    /// one is not above 0 and below 1.
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
        Ok(Self { betas, alphas_cumprod })
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

    /// The number of steps, T.
    #[expect(clippy::len_without_is_empty, reason = "a schedule has at least one step")]
    pub fn len(&self) -> usize {
        self.betas.len()
    }

    /// β of each step.
    pub fn betas(&self) -> &[f64] {
        &self.betas
    }

    /// ᾱ of each step, the product of 1 - β up to it: the part of the signal's variance that is left.
    pub fn alphas_cumprod(&self) -> &[f64] {
        &self.alphas_cumprod
    }

    /// ᾱ of step `t`, and 1 before the first.
    pub(super) fn alpha_bar(&self, t: Option<usize>) -> f64 {
        t.map_or(1.0, |t| self.alphas_cumprod[t])
    }

    /// q(x_prev | x_t, x_0); `prev` is an earlier step than `t`, or `None` for x_0 itself.
    ///
    /// # Panics
    /// If `t` is not a step of the schedule.
    pub fn posterior(&self, t: usize, prev: Option<usize>) -> Posterior {
        let (alpha_bar, alpha_bar_prev) = (self.alphas_cumprod[t], self.alpha_bar(prev));
        let alpha = alpha_bar / alpha_bar_prev;
        let beta = 1.0 - alpha;
        Posterior {
            x_start_coef: alpha_bar_prev.sqrt() * beta / (1.0 - alpha_bar),
            x_t_coef: alpha.sqrt() * (1.0 - alpha_bar_prev) / (1.0 - alpha_bar),
            variance: (1.0 - alpha_bar_prev) / (1.0 - alpha_bar) * beta,
            beta,
        }
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

    /// Own float64 computation in numpy; the posterior is Ho et al. 2020, Eq. 6 and 7.
    #[test]
    fn the_linear_schedule_has_the_known_coefficients() {
        let schedule = Schedule::linear(1000, 1e-4, 0.02).unwrap();
        let table = [
            (1, 0.9997800921, 5.4531877e-5, 0.5452915, 0.4547085),
            (99, 0.8970181457, 2.0345963e-3, 0.019076345, 0.98089602),
            (499, 0.07858724288, 1.0031355e-2, 3.0700711e-3, 0.99410667),
            (999, 4.035829765e-5, 1.9999984e-2, 1.2835149e-4, 0.98994868),
        ];
        for (t, alpha_bar, variance, x_start_coef, x_t_coef) in table {
            let posterior = schedule.posterior(t, Some(t - 1));
            close(schedule.alphas_cumprod()[t], alpha_bar, 10);
            close(posterior.variance, variance, 8);
            close(posterior.x_start_coef, x_start_coef, 7);
            close(posterior.x_t_coef, x_t_coef, 7);
            close(posterior.beta, schedule.betas()[t], 10);
        }
        close(schedule.alphas_cumprod().iter().sum(), 275.51323341, 11);
        let last = schedule.posterior(0, None);
        assert_eq!((last.variance, last.x_t_coef), (0.0, 0.0));
        close(last.x_start_coef, 1.0, 12);
    }

    /// Own float64 computation of Nichol & Dhariwal 2021, Eq. 17.
    #[test]
    fn the_cosine_schedule_has_the_known_values_and_one_capped_beta() {
        let schedule = Schedule::squared_cosine(1000).unwrap();
        close(schedule.betas()[0], 4.1284225e-5, 8);
        for (t, expected) in
            [(249, 0.84701216), (499, 0.49384359), (749, 0.1442721), (998, 2.4287669e-6), (999, 2.4287669e-9)]
        {
            close(schedule.alphas_cumprod()[t], expected, 7);
        }
        assert_eq!(schedule.betas().iter().filter(|beta| **beta == 0.999).count(), 1);
    }

    /// `diffusers`' own constants: tests/schedulers/test_scheduler_ddpm.py and test_scheduler_ddim.py.
    #[test]
    fn variances_are_those_of_diffusers() {
        let schedule = Schedule::linear(1000, 1e-4, 0.02).unwrap();
        let variance = |t, prev| schedule.posterior(t, Some(prev)).variance;
        assert!((variance(487, 486) - 0.00979).abs() < 1e-5);
        assert!((variance(999, 998) - 0.02).abs() < 1e-5);
        assert!((variance(420, 400) - 0.14771).abs() < 1e-5);
        assert!((variance(980, 960) - 0.32460).abs() < 1e-5);
    }

    #[test]
    fn scaled_linear_is_linear_in_the_root_and_keeps_the_ends() {
        let betas = Schedule::scaled_linear(3, 0.01, 0.09).unwrap().betas().to_vec();
        for (found, expected) in betas.iter().zip([0.01, 0.04, 0.09]) {
            close(*found, expected, 12);
        }
    }

    #[test]
    fn variances_outside_of_0_to_1_are_refused_by_step_and_value() {
        let error = Schedule::new(vec![0.1, 1.5]).unwrap_err();
        assert_eq!(error.to_string(), "beta of step 1 is 1.5, expected above 0 and below 1");
        assert!(Schedule::new(vec![f64::NAN]).is_err());
        assert!(Schedule::new(vec![]).is_err());
    }
}
