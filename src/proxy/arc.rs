//! ARC, the area under the robust discrimination curve (Sehwag et al. 2022, §2.2):
//! `ARC = ∫ (acc(ε) − ½) dε`, with `acc(ε)` the accuracy under attack at radius ε of a discriminator trained
//! for that radius. Low = hard to tell from real = good proxy.
//!
//! Estimate and interval come from the *signed* area; only the printed point is clipped at 0. `4·ARC` is an
//! estimate of a lower bound on the Wasserstein distance, not a bound: a weak attack overstates it, a weak
//! network understates it.

use serde::{Deserialize, Serialize};

use crate::{
    rng::{Stream, stream},
    stats::{student_975, variance},
};

/// The results of one set of discriminators (one network per radius) on images that it had not seen.
#[derive(Clone, Debug)]
pub struct SetResult {
    /// `correct[j][i]`: image `i` was classified correctly under attack at radius `j`.
    pub correct: Vec<Vec<bool>>,
    /// Whether image `i` is synthetic.
    pub synthetic: Vec<bool>,
    /// The class of image `i`, for stratified resampling.
    pub class: Vec<u32>,
}

/// One point of the curve.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Point {
    /// The radius.
    pub epsilon: f64,
    /// Accuracy under attack, the mean of the accuracies on real and on synthetic images.
    pub accuracy: f64,
    /// Accuracy on the real images.
    pub accuracy_real: f64,
    /// Accuracy on the synthetic images.
    pub accuracy_synthetic: f64,
    /// Standard error, over images and sets.
    pub se: f64,
}

/// ARC with its uncertainty.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Estimate {
    /// The signed area, clipped at 0. In units of ε.
    pub arc: f64,
    /// The area as measured, which chance can make negative.
    pub signed: f64,
    /// 95 % interval of the signed area: Student's, with Satterthwaite's degrees of freedom.
    pub interval: [f64; 2],
    /// Standard error due to the images: a bootstrap over all radii jointly, stratified by source and class.
    pub se_images: f64,
    /// Standard error due to training: between sets (seeds and folds).
    pub se_sets: f64,
    /// The signed area of each set.
    pub signed_by_set: Vec<f64>,
    /// Whether `acc − ½` at the last radius exceeds two standard errors, in which case the true area is larger.
    pub truncated: bool,
    /// The largest rise of the curve from one radius to the next, in standard errors of that difference. Accuracy
    /// should fall with ε; a value above 2 means that a network or an attack is too weak.
    pub largest_rise_se: f64,
    /// The curve.
    pub curve: Vec<Point>,
    /// Images measured in each set: real, synthetic.
    pub images: Vec<[usize; 2]>,
    /// Number of bootstrap draws.
    pub bootstrap: usize,
}

/// Estimates ARC from `sets` on the ascending radii `epsilons`, with `bootstrap` draws keyed by `seed`.
///
/// There is at least one set, each with images from both sources; `correct` has one row per radius.
pub fn estimate(sets: &[SetResult], epsilons: &[f64], bootstrap: usize, seed: u64) -> Estimate {
    let measured: Vec<Vec<[f64; 2]>> = sets.iter().map(|s| accuracies(s, &all_of(s))).collect();
    let curves: Vec<Vec<f64>> = measured.iter().map(|m| curve_of(m)).collect();
    let mean_curve = mean_of(&curves);
    let signed_by_set: Vec<f64> = curves.iter().map(|c| area(c, epsilons)).collect();
    let signed = area(&mean_curve, epsilons);

    // Each draw resamples the images of every set, keeping an image's results at all radii together.
    let strata: Vec<Vec<Vec<usize>>> = sets.iter().map(strata_of).collect();
    let draws: Vec<Vec<f64>> = (0..bootstrap)
        .map(|b| {
            let mut stream = Stream::new(seed, b as u64, stream::BOOTSTRAP);
            let resampled: Vec<Vec<f64>> = sets
                .iter()
                .zip(&strata)
                .map(|(set, strata)| {
                    let mut chosen = Vec::with_capacity(set.synthetic.len());
                    for stratum in strata {
                        chosen.extend(stratum.iter().map(|_| stratum[stream.below(stratum.len())]));
                    }
                    curve_of(&accuracies(set, &chosen))
                })
                .collect();
            mean_of(&resampled)
        })
        .collect();

    // The standard errors of what `f` makes of a curve, over images and over sets.
    let errors = |f: &dyn Fn(&[f64]) -> f64| {
        let sd = |curves: &[Vec<f64>]| variance(&curves.iter().map(|c| f(c)).collect::<Vec<_>>()).sqrt();
        (sd(&draws), sd(&curves) / (sets.len() as f64).sqrt())
    };
    let se_of = |f: &dyn Fn(&[f64]) -> f64| {
        let (images, sets) = errors(f);
        images.hypot(sets)
    };
    let (se_images, se_sets) = errors(&|c| area(c, epsilons));
    let se = se_images.hypot(se_sets);
    let images = sets.iter().map(|s| s.synthetic.len()).sum::<usize>();
    let t = student_975(&[(se_images.powi(2), images - 1), (se_sets.powi(2), sets.len() - 1)]);
    let curve: Vec<Point> = epsilons
        .iter()
        .enumerate()
        .map(|(j, &epsilon)| {
            let over_sets =
                |side: usize| measured.iter().map(|m| m[j][side]).sum::<f64>() / sets.len() as f64;
            Point {
                epsilon,
                accuracy: mean_curve[j],
                accuracy_real: over_sets(0),
                accuracy_synthetic: over_sets(1),
                se: se_of(&|c| c[j]),
            }
        })
        .collect();
    let largest_rise_se = (1..epsilons.len())
        .map(|j| (mean_curve[j] - mean_curve[j - 1]) / se_of(&|c| c[j] - c[j - 1]).max(1e-12))
        .fold(f64::NEG_INFINITY, f64::max);
    let truncated = curve.last().is_some_and(|p| p.accuracy - 0.5 > 2.0 * p.se);
    Estimate {
        arc: signed.max(0.0),
        signed,
        interval: [signed - t * se, signed + t * se],
        se_images,
        se_sets,
        signed_by_set,
        truncated,
        largest_rise_se,
        curve,
        images: sets
            .iter()
            .map(|s| {
                let synthetic = s.synthetic.iter().filter(|&&s| s).count();
                [s.synthetic.len() - synthetic, synthetic]
            })
            .collect(),
        bootstrap,
    }
}

/// The 95 % interval of the difference `a - b` of two independently estimated signed areas.
pub fn difference_interval(a: &Estimate, b: &Estimate) -> [f64; 2] {
    let parts = [a, b].map(|e| {
        let images = e.images.iter().flatten().sum::<usize>();
        [(e.se_images.powi(2), images - 1), (e.se_sets.powi(2), e.images.len() - 1)]
    });
    let parts = parts.concat();
    let half = student_975(&parts) * parts.iter().map(|(variance, _)| variance).sum::<f64>().sqrt();
    [a.signed - b.signed - half, a.signed - b.signed + half]
}

/// The signed area alone; see [`estimate`].
pub fn signed_area(sets: &[SetResult], epsilons: &[f64]) -> f64 {
    let curves: Vec<Vec<f64>> = sets.iter().map(|set| curve_of(&accuracies(set, &all_of(set)))).collect();
    area(&mean_of(&curves), epsilons)
}

/// The accuracy on both sources, equally weighted, by radius.
fn curve_of(sides: &[[f64; 2]]) -> Vec<f64> {
    sides.iter().map(|[real, synthetic]| (real + synthetic) / 2.0).collect()
}

/// `∫ (acc − ½) dε` by the trapezoid rule.
fn area(curve: &[f64], epsilons: &[f64]) -> f64 {
    (1..epsilons.len())
        .map(|j| (epsilons[j] - epsilons[j - 1]) * ((curve[j] + curve[j - 1]) / 2.0 - 0.5))
        .sum()
}

/// Accuracy on the chosen real and on the chosen synthetic images, per radius.
fn accuracies(set: &SetResult, chosen: &[usize]) -> Vec<[f64; 2]> {
    let mut n = [0u32; 2];
    chosen.iter().for_each(|&i| n[usize::from(set.synthetic[i])] += 1);
    set.correct
        .iter()
        .map(|correct| {
            let mut right = [0u32; 2];
            chosen.iter().for_each(|&i| right[usize::from(set.synthetic[i])] += u32::from(correct[i]));
            [0, 1].map(|side| f64::from(right[side]) / f64::from(n[side].max(1)))
        })
        .collect()
}

fn all_of(set: &SetResult) -> Vec<usize> {
    (0..set.synthetic.len()).collect()
}

fn strata_of(set: &SetResult) -> Vec<Vec<usize>> {
    let mut strata = std::collections::BTreeMap::<(bool, u32), Vec<usize>>::new();
    for i in 0..set.synthetic.len() {
        strata.entry((set.synthetic[i], set.class[i])).or_default().push(i);
    }
    strata.into_values().collect()
}

fn mean_of(curves: &[Vec<f64>]) -> Vec<f64> {
    (0..curves[0].len()).map(|j| curves.iter().map(|c| c[j]).sum::<f64>() / curves.len() as f64).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::{
        attack::{Epsilon, Norm, Pgd},
        rng::normals,
    };

    /// `n` images per source, of 10 classes; each is classified correctly with probability `p(ε)`, independently.
    fn simulate(n: usize, epsilons: &[f64], p: impl Fn(f64) -> f64, seed: u64) -> SetResult {
        let mut stream = Stream::new(seed, 1 << 40, stream::BOOTSTRAP);
        let synthetic: Vec<bool> = (0..2 * n).map(|i| i >= n).collect();
        let correct =
            epsilons.iter().map(|&e| (0..2 * n).map(|_| stream.uniform() < p(e)).collect()).collect();
        SetResult { correct, class: (0..2 * n as u32).map(|i| i % 10).collect(), synthetic }
    }

    #[test]
    fn indistinguishable_sources_give_an_interval_that_holds_zero_nineteen_times_in_twenty() {
        let epsilons = [0.0, 0.02, 0.05, 0.1];
        let held = (0..200)
            .filter(|&seed| {
                let set = simulate(150, &epsilons, |_| 0.5, seed);
                let [low, high] = estimate(&[set], &epsilons, 200, seed).interval;
                low <= 0.0 && 0.0 <= high
            })
            .count();
        assert!((180..=198).contains(&held), "{held} of 200");
    }

    #[test]
    fn a_grid_that_ends_early_is_truncated_and_a_rising_curve_is_seen() {
        let epsilons = [0.0, 0.1];
        let falling = estimate(&[simulate(500, &epsilons, |e| 0.9 - e, 5)], &epsilons, 100, 0);
        assert!(falling.truncated && falling.largest_rise_se < 2.0);
        let rising = estimate(&[simulate(500, &epsilons, |e| 0.6 + 2.0 * e, 5)], &epsilons, 100, 0);
        assert!(rising.largest_rise_se > 2.0);
    }

    #[test]
    fn arc_scales_with_the_radii() {
        let epsilons = [0.0, 0.1, 0.2];
        let set = simulate(300, &epsilons, |e| 0.9 - e, 9);
        let one = estimate(std::slice::from_ref(&set), &epsilons, 10, 0);
        let three = estimate(&[set], &epsilons.map(|e| 3.0 * e), 10, 0);
        assert!((three.signed - 3.0 * one.signed).abs() < 1e-12);
    }

    /// `n` images of 4 × 4 pixels per source, from N(½ ± m/2, s² I), ‖m‖ = d, and which of them the optimal
    /// discriminators get right under PGD in ℓ2: the hyperplane between the means below radius d/2, a constant
    /// answer from there on.
    fn gaussians(n: usize, d: f64, s: f64, epsilons: &[f64], seed: u64) -> SetResult {
        let device = Device::Cpu;
        let direction: Vec<f64> = (0..16).map(|i| f64::from(1 + i % 3)).collect();
        let length = direction.iter().map(|v| v * v).sum::<f64>().sqrt();
        let m: Vec<f64> = direction.iter().map(|v| v * d / length).collect();
        let mut noise = vec![0f32; 2 * n * 16];
        normals(seed, 0, 0, &mut noise);
        let pixel = |(i, z): (usize, &f32)| {
            let side = if i / 16 < n { -0.5 } else { 0.5 };
            (0.5 + side * m[i % 16] + s * f64::from(*z)) as f32
        };
        let pixels: Vec<f32> = noise.iter().enumerate().map(pixel).collect();
        let x = Tensor::from_vec(pixels, (2 * n, 4, 4, 1), &device).unwrap();
        let synthetic: Vec<bool> = (0..2 * n).map(|i| i >= n).collect();
        let labels: Vec<u32> = synthetic.iter().map(|&s| u32::from(s)).collect();
        let y = Tensor::new(labels.as_slice(), &device).unwrap();
        // The likelihood ratio's at s = d / 4; its length decides nothing.
        let scale = 16.0 / (d * d);
        let w: Vec<f32> = m.iter().map(|v| (v * scale) as f32).collect();
        let w = Tensor::from_vec(w, (16, 1), &device).unwrap();
        let bias = -0.5 * m.iter().sum::<f64>() * scale;
        let optimal = |x: &Tensor| -> crate::Result<Tensor> {
            let margin = (x.flatten_from(1)?.matmul(&w)? + bias)?;
            Ok(Tensor::cat(&[&margin.affine(-0.5, 0.0)?, &margin.affine(0.5, 0.0)?], 1)?)
        };
        let ids: Vec<u64> = (0..2 * n as u64).collect();
        let correct = epsilons.iter().map(|&epsilon| {
            if epsilon >= d / 2.0 {
                return synthetic.clone();
            }
            let radius: Epsilon = epsilon.to_string().parse().unwrap();
            let attacked = match epsilon > 0.0 {
                true => Pgd::new(Norm::L2, radius, 10, 2.5, seed)
                    .unwrap()
                    .perturb(&optimal, &x, &y, &ids)
                    .unwrap(),
                false => x.clone(),
            };
            let chosen = optimal(&attacked).unwrap().argmax(1).unwrap().to_vec1::<u32>().unwrap();
            chosen.iter().zip(&labels).map(|(a, b)| a == b).collect()
        });
        SetResult { correct: correct.collect(), class: vec![0; 2 * n], synthetic: synthetic.clone() }
    }

    /// Point masses at distance d: acc = 1 below d/2, ½ above: ARC = d/4.
    #[test]
    fn the_interval_holds_the_known_arc_of_point_masses() {
        let (d, h) = (0.4, 0.01);
        let epsilons: Vec<f64> = (0..=30).map(|i| f64::from(i) * h).collect();
        let found = estimate(&[gaussians(50, d, 0.0, &epsilons, 3)], &epsilons, 20, 0);
        let [low, high] = found.interval;
        // In the last step below d/2, the trapezoid rule loses h/4.
        assert!(low <= d / 4.0 && d / 4.0 <= high + h / 4.0 + 1e-9, "{low} {high}");
        assert!(high - low < 1e-9 && !found.truncated, "{low} {high}: nothing is left to chance");
    }

    /// ARC = s (a (Φ(a) - ½) + φ(a) - φ(0)), a = d / 2s (numeric checks §6.4).
    #[test]
    fn the_interval_holds_the_known_arc_of_gaussians() {
        use statrs::distribution::{Continuous, ContinuousCDF, Normal};
        let (d, s) = (0.2f64, 0.05);
        let normal = Normal::standard();
        let a = d / (2.0 * s);
        let truth = s * (a * (normal.cdf(a) - 0.5) + normal.pdf(a) - normal.pdf(0.0));
        assert!((truth / s - 0.6095).abs() < 1e-3, "{truth}");
        let epsilons: Vec<f64> = (0..=10).map(|i| f64::from(i) * d / 20.0).collect();
        let held = (0..40)
            .filter(|&seed| {
                let set = gaussians(300, d, s, &epsilons, seed);
                let [low, high] = estimate(&[set], &epsilons, 200, seed).interval;
                low <= truth && truth <= high
            })
            .count();
        // 95 % of 40 is 38; on these radii the trapezoid rule is off by a tenth of a standard error.
        assert!((34..=40).contains(&held), "{held} of 40");
        // The same images twice as far apart, at twice the radii.
        let twice: Vec<f64> = epsilons.iter().map(|e| 2.0 * e).collect();
        let one = estimate(&[gaussians(300, d, s, &epsilons, 1)], &epsilons, 10, 0).signed;
        let two = estimate(&[gaussians(300, 2.0 * d, 2.0 * s, &twice, 1)], &twice, 10, 0).signed;
        assert!((two / one - 2.0).abs() < 0.02, "{one} {two}");
    }
}
