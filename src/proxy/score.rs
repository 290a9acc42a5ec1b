//! The per-sample score: how confidently robust discriminators call an image synthetic.

/// Trapezoid weights of a grid of radii, summing to 1: `score = Σ w_j · p_j(synthetic | image)`.
///
/// The mean over ε of the probability, as ARC integrates over ε. `epsilons` ascends; a single radius has the weight
/// 1.
pub fn trapezoid_weights(epsilons: &[f64]) -> Vec<f64> {
    let n = epsilons.len();
    if n < 2 {
        return vec![1.0; n];
    }
    let span = epsilons[n - 1] - epsilons[0];
    (0..n)
        .map(|j| {
            let left = if j > 0 { epsilons[j] - epsilons[j - 1] } else { 0.0 };
            let right = if j + 1 < n { epsilons[j + 1] - epsilons[j] } else { 0.0 };
            (left + right) / (2.0 * span)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_integrate_lines_exactly() {
        let epsilons = [0.0, 0.1, 0.15, 0.4];
        let weights = trapezoid_weights(&epsilons);
        let mean: f64 = weights.iter().zip(epsilons).map(|(w, e)| w * (3.0 * e + 1.0)).sum();
        assert!((mean - (3.0 * 0.2 + 1.0)).abs() < 1e-12);
        assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        assert_eq!(trapezoid_weights(&[0.1]), [1.0]);
    }
}
