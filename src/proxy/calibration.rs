//! Platt scaling: makes the probabilities of different networks comparable.

use serde::{Deserialize, Serialize};

/// `p(synthetic) = 1 / (1 + exp(-(slope · margin + offset)))`, with `margin` the network's logit difference
/// (synthetic minus real). Platt 1999.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// At least 0: a network that ranks its own calibration images the wrong way round says nothing.
    pub slope: f64,
    /// Log-odds at margin 0.
    pub offset: f64,
}

impl Calibration {
    /// The calibrated probability that an image with this `margin` is synthetic.
    pub fn probability(&self, margin: f64) -> f64 {
        sigmoid(self.slope * margin + self.offset)
    }

    /// Fits by maximum likelihood (Newton with step halving) to images that the network was not trained on.
    ///
    /// Both sources have equal weight, whatever their numbers. The targets are Platt's smoothed ones, so that
    /// separable margins give finite values. If one side is empty, there is nothing to fit, and the slope is 0.
    pub fn fit(real: &[f64], synthetic: &[f64]) -> Self {
        if real.is_empty() || synthetic.is_empty() {
            return Self { slope: 0.0, offset: 0.0 };
        }
        let (n_real, n_syn) = (real.len() as f64, synthetic.len() as f64);
        let target = (1.0 / (n_real + 2.0), (n_syn + 1.0) / (n_syn + 2.0));
        let points: Vec<(f64, f64, f64)> = real
            .iter()
            .map(|&m| (m, target.0, 0.5 / n_real))
            .chain(synthetic.iter().map(|&m| (m, target.1, 0.5 / n_syn)))
            .collect();
        // In units of the margins' own spread, Newton's method needs only a few steps, whatever the network's
        // scale.
        let scale = (points.iter().map(|&(m, _, w)| w * m * m).sum::<f64>()).sqrt().max(1e-12);
        let loss = |a: f64, b: f64| -> f64 {
            points.iter().map(|&(m, t, w)| w * (softplus(a * m / scale + b) - t * (a * m / scale + b))).sum()
        };
        let (mut a, mut b) = (1.0, 0.0);
        let mut current = loss(a, b);
        for _ in 0..50 {
            let (mut ga, mut gb, mut haa, mut hab, mut hbb) = (0.0, 0.0, 1e-9, 0.0, 1e-9);
            for &(m, t, w) in &points {
                let x = m / scale;
                let p = sigmoid(a * x + b);
                let (g, h) = (w * (p - t), w * p * (1.0 - p));
                ga += g * x;
                gb += g;
                haa += h * x * x;
                hab += h * x;
                hbb += h;
            }
            let det = haa * hbb - hab * hab;
            let (da, db) = ((hbb * ga - hab * gb) / det, (haa * gb - hab * ga) / det);
            let mut step = 1.0;
            let next = loop {
                let next = loss(a - step * da, b - step * db);
                if next <= current || step < 1e-6 {
                    break next;
                }
                step *= 0.5;
            };
            if current - next <= 1e-12 || !next.is_finite() {
                break;
            }
            (a, b, current) = (a - step * da, b - step * db, next);
        }
        if a < 0.0 {
            return Self { slope: 0.0, offset: 0.0 };
        }
        Self { slope: a / scale, offset: b }
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Stream, stream};

    /// For N(0, 1) against N(d, 1) the true log-odds are `d·m − d²/2`.
    #[test]
    fn gaussian_margins_give_their_own_log_odds() {
        let d = 1.5;
        let mut stream = Stream::new(7, 0, stream::BOOTSTRAP);
        let mut normals = |shift: f64, scale: f64| -> Vec<f64> {
            (0..20_000)
                .map(|_| {
                    let (u, v) = (stream.uniform().max(1e-12), stream.uniform());
                    scale * (shift + (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos())
                })
                .collect()
        };
        let (real, synthetic) = (normals(0.0, 10.0), normals(d, 10.0));
        let fitted = Calibration::fit(&real, &synthetic);
        assert!((fitted.slope - d / 10.0).abs() < 0.01, "{fitted:?}");
        assert!((fitted.offset + d * d / 2.0).abs() < 0.06, "{fitted:?}");
    }

    #[test]
    fn separable_and_inverted_margins_stay_finite() {
        let separable = Calibration::fit(&[-3.0, -2.0], &[2.0, 3.0]);
        assert!(separable.slope.is_finite() && separable.slope > 0.0);
        let inverted = Calibration::fit(&[2.0, 3.0], &[-3.0, -2.0]);
        assert_eq!(inverted.probability(5.0), 0.5);
    }
}
