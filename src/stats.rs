//! Intervals: proportions, and paired comparisons of training arms.

use serde::{Deserialize, Serialize};
use statrs::distribution::{Beta, ContinuousCDF};

use crate::rng::{Stream, stream};

/// The Clopper-Pearson interval of a proportion: `x` of `n`, two-sided at `alpha`. Conservative.
pub fn clopper_pearson(x: u64, n: u64, alpha: f64) -> [f64; 2] {
    let quantile = |a: f64, b: f64, p: f64| Beta::new(a, b).map_or(f64::NAN, |d| d.inverse_cdf(p));
    let (x, n) = (x as f64, n as f64);
    let low = if x == 0.0 { 0.0 } else { quantile(x, n - x + 1.0, alpha / 2.0) };
    let high = if x == n { 1.0 } else { quantile(x + 1.0, n - x, 1.0 - alpha / 2.0) };
    [low, high]
}

/// One arm against another over the same seeds and test images.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Comparison {
    /// Mean over seeds of the accuracy of the arm minus that of the baseline.
    pub difference: f64,
    /// 95 % interval: paired hierarchical bootstrap, images within seeds.
    pub interval: [f64; 2],
    /// Standard error of the difference.
    pub se: f64,
    /// The smallest true difference that this design would find significant four times in five:
    /// `(1.96 + 0.84) · se`.
    pub resolvable: f64,
    /// The interval excludes 0. If not, "not resolved" is the result.
    pub resolved: bool,
}

/// Compares two arms by the paired hierarchical bootstrap: seeds are drawn with replacement, then images
/// within; both arms share each draw. Seeds and images are never pooled as independent.
///
/// `arm[s][i]`, `baseline[s][i]`: seed `s` was right on image `i`. Both must have the same shape.
pub fn compare(arm: &[Vec<bool>], baseline: &[Vec<bool>], draws: usize, seed: u64) -> Comparison {
    let (seeds, images) = (arm.len(), arm[0].len());
    let delta = |s: usize, i: usize| f64::from(u8::from(arm[s][i])) - f64::from(u8::from(baseline[s][i]));
    let difference =
        (0..seeds).flat_map(|s| (0..images).map(move |i| delta(s, i))).sum::<f64>() / (seeds * images) as f64;
    let mut sampled: Vec<f64> = (0..draws)
        .map(|b| {
            let mut stream = Stream::new(seed, b as u64, stream::BOOTSTRAP);
            // Images are crossed with seeds, not nested: the same test image is met by every seed.
            let drawn: Vec<usize> = (0..images).map(|_| stream.below(images)).collect();
            let sum: f64 = (0..seeds)
                .map(|_| {
                    let s = stream.below(seeds);
                    drawn.iter().map(|&i| delta(s, i)).sum::<f64>()
                })
                .sum();
            sum / (seeds * images) as f64
        })
        .collect();
    sampled.sort_by(f64::total_cmp);
    let mean = sampled.iter().sum::<f64>() / draws as f64;
    let bootstrap_variance = sampled.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (draws - 1) as f64;
    // Drawing S seeds from S understates the variance between seeds by (S − 1)/S: with three seeds by a third.
    let by_seed: Vec<f64> =
        (0..seeds).map(|s| (0..images).map(|i| delta(s, i)).sum::<f64>() / images as f64).collect();
    let between = by_seed.iter().map(|d| (d - difference).powi(2)).sum::<f64>() / (seeds.max(2) - 1) as f64;
    let se = (bootstrap_variance + between / (seeds * seeds) as f64).sqrt();
    let widen = se / bootstrap_variance.sqrt().max(1e-12);
    let quantile = |p: f64| sampled[((draws - 1) as f64 * p).round() as usize];
    let interval = [0.025, 0.975].map(|p| difference + (quantile(p) - mean) * widen);
    Comparison {
        difference,
        interval,
        se,
        resolvable: (1.96 + 0.84) * se,
        resolved: interval[0] > 0.0 || interval[1] < 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bisection of the exact binomial tails (Python, `math.comb`); the closed form for 0 of n at the end.
    #[test]
    fn clopper_pearson_inverts_the_binomial_tails() {
        let [low, high] = clopper_pearson(45, 50, 0.05);
        assert!((low - 0.781_864_633_6).abs() < 1e-9, "{low}");
        assert!((high - 0.966_724_906_4).abs() < 1e-9, "{high}");
        assert_eq!(clopper_pearson(0, 100, 0.05)[0], 0.0);
        assert!((clopper_pearson(0, 100, 0.05)[1] - (1.0 - 0.025f64.powf(0.01))).abs() < 1e-9);
    }

    fn simulated(rate: f64, seeds: u64, images: usize, base: u64) -> Vec<Vec<bool>> {
        (0..seeds)
            .map(|s| {
                let mut stream = Stream::new(base, s, stream::BOOTSTRAP);
                (0..images).map(|_| stream.uniform() < rate).collect()
            })
            .collect()
    }

    #[test]
    fn a_large_difference_is_resolved_and_none_is_not() {
        let (good, bad) = (simulated(0.8, 3, 400, 1), simulated(0.5, 3, 400, 2));
        let found = compare(&good, &bad, 500, 0);
        assert!(found.resolved && (found.difference - 0.3).abs() < 0.06, "{found:?}");
        let same = compare(&good, &good, 500, 0);
        assert!(!same.resolved && same.difference == 0.0);
    }

    #[test]
    fn the_interval_of_equal_arms_holds_zero_about_nineteen_times_in_twenty() {
        let held = (0..100)
            .filter(|&k| {
                let (a, b) = (simulated(0.6, 3, 200, 10 + k), simulated(0.6, 3, 200, 1000 + k));
                !compare(&a, &b, 200, k).resolved
            })
            .count();
        assert!(held >= 90, "{held} of 100");
    }
}
