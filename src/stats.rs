//! Intervals for proportions and for paired comparisons of training arms; order statistics.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use statrs::distribution::{Beta, Binomial, ContinuousCDF, DiscreteCDF, Normal, StudentsT};

use crate::rng::{Stream, stream};

/// The Clopper-Pearson interval of a proportion: `x` of `n`, two-sided at `alpha`. Conservative.
pub fn clopper_pearson(x: u64, n: u64, alpha: f64) -> [f64; 2] {
    let high = if x == n { 1.0 } else { beta_quantile(x as f64 + 1.0, (n - x) as f64, 1.0 - alpha / 2.0) };
    [proportion_at_least(x, n, alpha / 2.0), high]
}

/// The one-sided lower Clopper-Pearson bound of a proportion, `x` of `n`: below it with probability at most `alpha`.
pub fn proportion_at_least(x: u64, n: u64, alpha: f64) -> f64 {
    if x == 0 { 0.0 } else { beta_quantile(x as f64, (n - x) as f64 + 1.0, alpha) }
}

fn beta_quantile(a: f64, b: f64, p: f64) -> f64 {
    Beta::new(a, b).map_or(f64::NAN, |beta| beta.inverse_cdf(p))
}

/// The probability that a fair coin splits `n` throws at least as unevenly as `x` to `n - x`: the two-sided
/// binomial test of one half.
pub fn fair_split_p_value(x: u64, n: u64) -> f64 {
    let less = x.min(n - x);
    match Binomial::new(0.5, n) {
        Ok(coin) => (2.0 * coin.cdf(less)).min(1.0),
        Err(_) => f64::NAN,
    }
}

/// The standard normal quantile Φ⁻¹(p).
pub fn normal_quantile(p: f64) -> f64 {
    Normal::standard().inverse_cdf(p)
}

/// A comparison of two arms over the same seeds and test images.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Comparison {
    /// The mean over seeds of the arm's accuracy minus the baseline's.
    pub difference: f64,
    /// 95 % interval.
    pub interval: [f64; 2],
    /// Standard error of the difference.
    pub se: f64,
    /// The smallest true difference that this design would find significant four times in five: `(t + 0.84) · se`,
    /// with the interval's `t`.
    pub resolvable: f64,
    /// Whether the interval excludes 0. If not, the result is "not resolved".
    pub resolved: bool,
}

/// Compares two arms on the same seeds and test images. Seeds and images are never pooled as independent.
///
/// The variance has two parts: one due to the images, from a paired bootstrap that draws the same images for every
/// seed and both arms, and one between seeds. The interval is Student's, with Satterthwaite's degrees of freedom,
/// since few seeds say little about the variance between seeds; with one seed nothing is resolved.
///
/// `arm[s][i]`, `baseline[s][i]`: seed `s` was right on image `i`. Both must have the same shape.
pub fn compare(arm: &[Vec<bool>], baseline: &[Vec<bool>], draws: usize, seed: u64) -> Comparison {
    let (seeds, images) = (arm.len(), arm[0].len());
    let delta = |s: usize, i: usize| f64::from(u8::from(arm[s][i])) - f64::from(u8::from(baseline[s][i]));
    let by_image: Vec<f64> =
        (0..images).map(|i| (0..seeds).map(|s| delta(s, i)).sum::<f64>() / seeds as f64).collect();
    let by_seed: Vec<f64> =
        (0..seeds).map(|s| (0..images).map(|i| delta(s, i)).sum::<f64>() / images as f64).collect();
    let difference = by_seed.iter().sum::<f64>() / seeds as f64;
    let drawn: Vec<f64> = (0..draws)
        .map(|b| {
            let mut stream = Stream::new(seed, b as u64, stream::BOOTSTRAP);
            (0..images).map(|_| by_image[stream.below(images)]).sum::<f64>() / images as f64
        })
        .collect();
    let (images_variance, seeds_variance) = (variance(&drawn), variance(&by_seed) / seeds as f64);
    let se = (images_variance + seeds_variance).sqrt();
    let t = student_975(&[(images_variance, images - 1), (seeds_variance, seeds - 1)]);
    let interval = [difference - t * se, difference + t * se];
    Comparison {
        difference,
        interval,
        se,
        resolvable: (t + 0.84) * se,
        resolved: seeds > 1 && (interval[0] > 0.0 || interval[1] < 0.0),
    }
}

/// The mean of a sequence of numbers and its variance, in one pass (Welford 1962).
#[derive(Clone, Copy, Debug, Default)]
pub struct Moments {
    /// How many there were.
    pub count: usize,
    /// Their mean; 0 if there were none.
    pub mean: f64,
    squares: f64,
}

impl Moments {
    /// Adds a number.
    pub fn add(&mut self, value: f64) {
        self.count += 1;
        let off = value - self.mean;
        self.mean += off / self.count as f64;
        self.squares += off * (value - self.mean);
    }

    /// The variance of the mean: the sample variance over the count. 0 for fewer than two numbers.
    pub fn mean_variance(&self) -> f64 {
        if self.count < 2 {
            return 0.0;
        }
        self.squares / (self.count - 1) as f64 / self.count as f64
    }
}

/// The 95 % interval of the difference of two means, `a - b`, of independent samples (Welch 1947).
pub fn mean_difference_interval(a: &Moments, b: &Moments) -> [f64; 2] {
    let parts = [a, b].map(|m| (m.mean_variance(), m.count.saturating_sub(1)));
    let half = student_975(&parts) * (parts[0].0 + parts[1].0).sqrt();
    let difference = a.mean - b.mean;
    [difference - half, difference + half]
}

/// Sample variance; 0 for fewer than two values.
pub fn variance(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0)
}

/// The 97.5 % quantile of Student's t for a sum of variances, each with its degrees of freedom. Those of the sum
/// are Satterthwaite's (1946), `(Σ v)² / Σ (v² / df)`. Parts that are 0 are ignored.
pub fn student_975(parts: &[(f64, usize)]) -> f64 {
    let total: f64 = parts.iter().map(|(v, _)| v).sum();
    let spread: f64 = parts.iter().filter(|(v, _)| *v > 0.0).map(|(v, df)| v * v / (*df).max(1) as f64).sum();
    let df = if spread > 0.0 { total * total / spread } else { f64::INFINITY };
    if df > 1e6 {
        return 1.959_963_984_540_054;
    }
    StudentsT::new(0.0, 1.0, df).map_or(f64::NAN, |d| d.inverse_cdf(0.975))
}

/// Bits that sort like the float, as in `total_cmp`, as an unsigned number.
pub fn ascending(value: f32) -> u32 {
    let bits = value.to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// The number whose [`ascending`] bits these are.
fn of_ascending(bits: u32) -> f32 {
    f32::from_bits(if bits >> 31 == 1 { bits & !(1 << 31) } else { !bits })
}

/// The values that would stand at the places `ranks`, from 0, if all were sorted by `total_cmp`.
///
/// `all` passes every value to the function that it is given. It is called twice and must give the same values each
/// time. Memory use does not grow with their number.
///
/// # Panics
/// If a rank is not below the number of values.
pub fn order_statistics<E>(
    ranks: &[u64],
    mut all: impl FnMut(&mut dyn FnMut(f32)) -> Result<(), E>,
) -> Result<Vec<f32>, E> {
    const HALF: usize = 1 << 16;
    /// The bucket of the value at a place, and how many values of that bucket stand before it.
    fn find(counts: &[u64], rank: u64) -> (usize, u64) {
        let mut before = 0;
        let bucket = counts.iter().position(|&count| {
            before += count;
            before > rank
        });
        let bucket = bucket.unwrap_or_else(|| panic!("rank {rank} of {before} values"));
        (bucket, rank - (before - counts[bucket]))
    }
    let mut high = vec![0u64; HALF];
    all(&mut |value| high[(ascending(value) >> 16) as usize] += 1)?;
    let buckets: Vec<(usize, u64)> = ranks.iter().map(|&rank| find(&high, rank)).collect();
    let mut low: BTreeMap<usize, Vec<u64>> =
        buckets.iter().map(|&(bucket, _)| (bucket, vec![0; HALF])).collect();
    all(&mut |value| {
        let bits = ascending(value) as usize;
        if let Some(counts) = low.get_mut(&(bits >> 16)) {
            counts[bits % HALF] += 1;
        }
    })?;
    let value = |(bucket, rest)| of_ascending((bucket << 16 | find(&low[&bucket], rest).0) as u32);
    Ok(buckets.into_iter().map(value).collect())
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

    /// Arms that differ only by the luck of their seeds: a seed moves the accuracy by ±10 points.
    #[test]
    fn seed_noise_alone_is_resolved_about_one_time_in_twenty() {
        let resolved = (0..400)
            .filter(|&k| {
                let arm = |base: u64| -> Vec<Vec<bool>> {
                    let mut luck = Stream::new(base, 1 << 40, stream::BOOTSTRAP);
                    (0..3)
                        .flat_map(|s| {
                            let normal = (0..12).map(|_| luck.uniform()).sum::<f64>() - 6.0;
                            simulated(0.6 + 0.1 * normal, 1, 200, base * 1000 + s)
                        })
                        .collect()
                };
                compare(&arm(1 + 2 * k), &arm(2 + 2 * k), 100, k).resolved
            })
            .count();
        assert!((4..=40).contains(&resolved), "{resolved} of 400");
    }

    /// SciPy 1.17.1: `ttest_ind(a, b, equal_var=False).confidence_interval()`.
    #[test]
    fn the_interval_of_a_difference_of_means_is_welchs() {
        let moments = |values: &[f64]| {
            let mut m = Moments::default();
            values.iter().for_each(|&v| m.add(v));
            m
        };
        let (a, b) = (moments(&[27.5, 21.0, 19.0, 23.6, 17.0]), moments(&[27.1, 22.0, 20.8, 23.4]));
        assert!((a.mean - 21.62).abs() < 1e-12 && (b.mean - 23.325).abs() < 1e-12);
        let [low, high] = mean_difference_interval(&a, &b);
        assert!(
            (low + 7.130_282_230_791).abs() < 1e-9 && (high - 3.720_282_230_791).abs() < 1e-9,
            "{low} {high}"
        );
        assert_eq!(moments(&[4.0]).mean_variance(), 0.0);
    }

    #[test]
    fn one_seed_resolves_nothing() {
        assert!(!compare(&simulated(0.9, 1, 400, 1), &simulated(0.1, 1, 400, 2), 100, 0).resolved);
    }

    /// t tables: 12.706 at 1 degree of freedom, 4.303 at 2; the normal's at infinity.
    #[test]
    fn student_quantiles_are_those_of_the_tables() {
        assert!((student_975(&[(1.0, 1)]) - 12.706).abs() < 1e-3);
        assert!((student_975(&[(2.0, 2), (0.0, 7)]) - 4.303).abs() < 1e-3);
        assert!((student_975(&[(0.0, 1)]) - 1.960).abs() < 1e-3);
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

    #[test]
    fn order_statistics_are_those_of_the_sorted() {
        let mut stream = Stream::new(4, 0, 0);
        let mut values: Vec<f32> = (0..5000).map(|_| (stream.uniform() - 0.3) as f32).collect();
        values.extend([0.5; 100]);
        values.extend([f32::NAN, f32::INFINITY, -0.0, 0.0, 1e-42]);
        let ranks: Vec<u64> = (0..values.len() as u64).step_by(7).chain([5104, 0]).collect();
        let found = order_statistics(&ranks, |give| {
            values.iter().for_each(|&value| give(value));
            Ok::<(), ()>(())
        });
        let mut sorted = values.clone();
        sorted.sort_unstable_by(f32::total_cmp);
        let expected = ranks.iter().map(|&rank| sorted[rank as usize].to_bits());
        assert!(found.unwrap().into_iter().map(f32::to_bits).eq(expected));
    }
}
