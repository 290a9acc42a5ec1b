//! Randomised smoothing (Cohen et al. 2019): a classifier that answers with the class that a network most often
//! gives to the image under Gaussian noise, and the ℓ2 radius within which that answer provably does not change.
//!
//! `g(x) = argmax_c P(f(x + ε) = c)`, `ε ~ N(0, σ² I)`. The network is passed as a function that counts its
//! answers.

use serde::{Deserialize, Serialize};

use crate::{
    Result,
    stats::{fair_split_p_value, normal_quantile, proportion_at_least},
};

/// How often a network gave each class to `n` noisy copies of an image: `counts(first, n)` draws copies
/// `first .. first + n`, each by its own key.
pub type Counts<'a> = &'a dyn Fn(u64, u64) -> Result<Vec<u64>>;

/// The settings of [`Smoothing::certify`] and [`Smoothing::predict`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Smoothing {
    /// The standard deviation σ of the noise, for pixels in [0, 1].
    pub sigma: f64,
    /// Number of copies that choose the class.
    pub n0: u64,
    /// Number of copies that bound its probability.
    pub n: u64,
    /// The probability that a certificate is wrong, or that a prediction is not the smoothed classifier's.
    pub alpha: f64,
}

/// The least number of copies with which [`Smoothing::certify`] can certify anything: if all `n` of them agree, the
/// bound is `α^(1/n)`, which has to be over 1/2. `alpha` is between 0 and 1.
pub fn least_to_certify(alpha: f64) -> u64 {
    (-alpha.log2()).floor() as u64 + 1
}

/// The least number of copies with which [`Smoothing::predict`] can predict anything: if all `n` of them agree, the
/// test's p-value is `2^(1-n)`, which has to be at most α. `alpha` is between 0 and 1.
pub fn least_to_predict(alpha: f64) -> u64 {
    (1.0 - alpha.log2()).ceil() as u64
}

/// What is certified about an image.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    /// The class; `None` if the smoothed classifier abstains.
    pub class: Option<u32>,
    /// The ℓ2 radius within which the answer is this class with probability 1 - α; 0 without a class.
    pub radius: f64,
    /// The lower bound of the class's probability; if it abstains, of the most frequent class.
    pub lower: f64,
}

impl Smoothing {
    /// CERTIFY (Cohen et al. 2019, §3.2.2): `n0` copies choose a class, `n` others bound its probability from below
    /// by `p`, one-sided at α; if `p > 1/2` the radius is `σ Φ⁻¹(p)`, else it abstains.
    pub fn certify(&self, counts: Counts) -> Result<Certificate> {
        let top = most_frequent(&counts(0, self.n0)?)[0];
        let hits = counts(self.n0, self.n)?[top];
        let lower = proportion_at_least(hits, self.n, self.alpha);
        Ok(if lower > 0.5 {
            Certificate { class: Some(top as u32), radius: self.sigma * normal_quantile(lower), lower }
        } else {
            Certificate { class: None, radius: 0.0, lower }
        })
    }

    /// PREDICT (Cohen et al. 2019, §3.2.1): the most frequent of `n` copies' classes, if it is more frequent than the
    /// second by a two-sided binomial test at α; else it abstains.
    pub fn predict(&self, counts: Counts) -> Result<Option<u32>> {
        let counts = counts(0, self.n)?;
        let order = most_frequent(&counts);
        let (first, second) = (counts[order[0]], order.get(1).map_or(0, |&class| counts[class]));
        let sure = fair_split_p_value(first, first + second) <= self.alpha;
        Ok(sure.then_some(order[0] as u32))
    }
}

/// The classes, the most frequent first; ties by index.
fn most_frequent(counts: &[u64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..counts.len()).collect();
    order.sort_by_key(|&class| std::cmp::Reverse(counts[class]));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    const COHEN: Smoothing = Smoothing { sigma: 1.0, n0: 100, n: 100_000, alpha: 0.001 };

    /// Certificates when `hits` of `n` copies have class 1.
    fn certificate(smoothing: Smoothing, hits: u64) -> Certificate {
        smoothing
            .certify(&|_, n| Ok(if n == smoothing.n0 { vec![0, n, 0] } else { vec![n - hits, hits, 0] }))
            .unwrap()
    }

    /// Radii in units of σ, computed from the Beta quantile in double precision.
    #[test]
    fn radii_are_those_of_cohens_code() {
        for (hits, radius) in
            [(100_000, 3.811457), (99_999, 3.739127), (99_000, 2.290000), (90_000, 1.264845)]
        {
            let found = certificate(COHEN, hits);
            assert_eq!(found.class, Some(1));
            assert!((found.radius - radius).abs() < 1e-5, "{hits}: {found:?}");
        }
        for (n, hits, radius) in
            [(100, 100, 1.500475), (100, 99, 1.349259), (1000, 1000, 2.463263), (10_000, 10_000, 3.198578)]
        {
            let found = certificate(Smoothing { n, n0: 7, ..COHEN }, hits);
            assert!((found.radius - radius).abs() < 1e-5, "{hits} of {n}: {found:?}");
        }
        let half = Smoothing { sigma: 0.5, ..COHEN };
        assert!((certificate(half, 99_000).radius - 1.145).abs() < 1e-5);
        assert!((certificate(COHEN, 100_000).lower - 0.999930925).abs() < 1e-8);
    }

    #[test]
    fn it_abstains_below_50490_of_100000() {
        assert_eq!(certificate(COHEN, 50_489).class, None);
        let least = certificate(COHEN, 50_490);
        assert_eq!(least.class, Some(1));
        assert!((least.lower - 0.50000895).abs() < 1e-7 && least.radius > 0.0);
    }

    /// The eight largest radii of the published logs of ResNet-110, σ = 0.12, N = 100,000.
    #[test]
    fn the_published_logs_are_on_the_grid_of_radii() {
        let noise = Smoothing { sigma: 0.12, ..COHEN };
        let radius = |missed: u64| (certificate(noise, 100_000 - missed).radius * 1000.0).round() as u64;
        let grid: Vec<u64> = (0..8).map(radius).collect();
        assert_eq!(grid, [457, 449, 443, 438, 434, 431, 428, 425]);
    }

    #[test]
    fn predictions_abstain_when_two_classes_are_close() {
        let smoothing = Smoothing { n: 100, alpha: 0.001, ..COHEN };
        let predict = |counts: [u64; 3]| smoothing.predict(&|_, _| Ok(counts.to_vec())).unwrap();
        // Two-sided binomial tests of 67 : 33 (p = 0.00087) and 66 : 34 (p = 0.0018).
        assert_eq!(predict([33, 67, 0]), Some(1));
        assert_eq!(predict([34, 66, 0]), None);
        assert_eq!(predict([0, 100, 0]), Some(1));
    }

    #[test]
    fn one_copy_less_than_the_least_number_decides_nothing() {
        for alpha in [0.4, 0.2, 0.1, 0.05, 0.01, 0.001, 1e-4, 1e-6, 1e-12] {
            let all_agree = |n: u64| Smoothing { n, n0: 1, sigma: 1.0, alpha };
            let certified = |n| all_agree(n).certify(&|_, n| Ok(vec![0, n])).unwrap().class;
            let predicted = |n| all_agree(n).predict(&|_, n| Ok(vec![0, n])).unwrap();
            let (certify, predict) = (least_to_certify(alpha), least_to_predict(alpha));
            assert_eq!((certified(certify - 1), certified(certify)), (None, Some(1)), "{alpha}: {certify}");
            assert_eq!((predicted(predict - 1), predicted(predict)), (None, Some(1)), "{alpha}: {predict}");
        }
        assert_eq!([least_to_certify(0.001), least_to_predict(0.001)], [10, 11]);
    }

    #[test]
    fn certify_chooses_by_the_first_copies_and_bounds_by_the_others() {
        let asked = std::cell::RefCell::new(Vec::new());
        let counts = |first: u64, n: u64| {
            asked.borrow_mut().push((first, n));
            Ok(if first == 0 { vec![n, 0] } else { vec![0, n] })
        };
        let found = COHEN.certify(&counts).unwrap();
        assert_eq!(*asked.borrow(), [(0, 100), (100, 100_000)]);
        assert_eq!((found.class, found.lower), (None, 0.0));
    }
}
