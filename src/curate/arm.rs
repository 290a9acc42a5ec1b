//! Arms: the orders in which samples that pass the gates are kept.

use crate::{
    rng::{self, stream},
    stats::ascending,
};

named! {
    /// The order in which samples that pass the gates are kept.
    pub enum Arm {
        /// Lowest `synthetic_score` first: closest to the real data (Sehwag et al. 2022, §2.3).
        Score = "arc",
        /// Highest label confidence first (Wang et al. 2023).
        Confidence = "confidence",
        /// Discriminator rejection sampling (Azadi et al. 2019): each sample is kept with probability min(1, w /
        /// M), where w = (1 - s) / s is the density ratio that the score s implies, and M is such that the quota is
        /// filled.
        Rejection = "rejection",
        /// A random order, another one for each seed.
        Random = "random",
        /// Keep all samples that pass the gates, whatever the quota.
        All = "all",
    }
}

impl Arm {
    /// The place of a sample in the arm's order: lower comes first.
    ///
    /// `row`: the sample's place in the pool, which determines its random number; `score` and `confidence` are in
    /// [0, 1].
    ///
    /// Rejection sampling is an order too: a sample with the uniform number u is accepted if u ≤ w / M, that is, if
    /// u / w is at most 1 / M. So the first k by u / w are the ones accepted with the M that yields k.
    pub fn rank(self, seed: u64, row: u64, score: f32, confidence: f32) -> u32 {
        let random = || rng::uint(seed, row, stream::SUBSET);
        match self {
            Self::Score => ascending(score),
            Self::Confidence => !ascending(confidence),
            Self::Rejection => {
                let uniform = (random() >> 11) as f64 / (1u64 << 53) as f64;
                let score = f64::from(score).clamp(1e-6, 1.0 - 1e-6);
                ascending((uniform * score / (1.0 - score)) as f32)
            }
            Self::Random => (random() >> 32) as u32,
            Self::All => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_sort_like_the_numbers() {
        let values = [f32::NEG_INFINITY, -1.0, -0.0, 0.0, 1e-30, 0.5, 1.0, f32::INFINITY];
        assert!(values.windows(2).all(|v| ascending(v[0]) < ascending(v[1])));
        assert!(
            values.windows(2).all(|v| Arm::Score.rank(0, 7, v[0], 0.5) < Arm::Score.rank(0, 3, v[1], 0.5))
        );
        assert!(
            values
                .windows(2)
                .all(|v| { Arm::Confidence.rank(0, 7, 0.5, v[0]) > Arm::Confidence.rank(0, 3, 0.5, v[1]) })
        );
    }

    #[test]
    fn random_orders_differ_by_seed_and_not_by_score() {
        let order =
            |seed: u64| (0..100).map(|i| Arm::Random.rank(seed, i, i as f32, 0.5)).collect::<Vec<_>>();
        assert_eq!(order(1), (0..100).map(|i| Arm::Random.rank(1, i, 0.3, 0.1)).collect::<Vec<_>>());
        assert_ne!(order(1), order(2));
    }

    /// With the M that fits the quota, a sample of density ratio w is kept with probability min(1, w / M), so two
    /// kinds are kept at rates in proportion to their ratios.
    #[test]
    fn rejection_keeps_in_proportion_to_the_density_ratio() {
        let n = 40_000;
        // Ratios 1/4 and 1/16: a quota of 3,125 from 20,000 + 20,000 means M = 2, so the rates are 1/8 and 1/32.
        let score = |i: u64| if i.is_multiple_of(2) { 0.8f32 } else { 16.0 / 17.0 };
        let mut ranked: Vec<(u32, u64)> =
            (0..n).map(|i| (Arm::Rejection.rank(5, i, score(i), 0.0), i)).collect();
        ranked.sort_unstable();
        let kept = &ranked[..3125];
        let likely = kept.iter().filter(|(_, i)| i.is_multiple_of(2)).count() as f64;
        assert!((likely / 20_000.0 - 0.125).abs() < 0.01, "{likely}");
    }

    /// From N(0, 1) by the density ratio to N(0, ¼), which never exceeds 2: the kept samples pass the
    /// Kolmogorov-Smirnov test for N(0, ¼).
    #[test]
    fn rejection_from_one_gaussian_gives_another() {
        use statrs::distribution::{Continuous, ContinuousCDF, Normal};
        let (proposal, target) = (Normal::standard(), Normal::new(0.0, 0.5).unwrap());
        let n = 20_000;
        let mut noise = vec![0f32; n];
        crate::rng::normals(3, 0, 0, &mut noise);
        let mut ranked: Vec<(u32, f64)> = (0..)
            .zip(&noise)
            .map(|(i, &x)| {
                let (p, q) = (target.pdf(f64::from(x)), proposal.pdf(f64::from(x)));
                (Arm::Rejection.rank(5, i, (q / (p + q)) as f32, 0.0), f64::from(x))
            })
            .collect();
        ranked.sort_unstable_by_key(|(rank, _)| *rank);
        let kept = n * 10 / 21;
        let mut values: Vec<f64> = ranked[..kept].iter().map(|(_, x)| *x).collect();
        values.sort_unstable_by(f64::total_cmp);
        let steps = values.iter().enumerate().map(|(i, &x)| {
            let cdf = target.cdf(x) * kept as f64;
            (cdf - i as f64).abs().max((cdf - (i + 1) as f64).abs()) / kept as f64
        });
        let distance = steps.fold(0.0, f64::max);
        // One sample in a hundred exceeds 1.63 / √n.
        assert!(distance < 1.63 / (kept as f64).sqrt(), "{distance}");
    }
}
