//! Cross-entropy and Kullback-Leibler divergence.

use candle_core::{D, DType, Shape, Tensor};

use super::{
    attention::softmax_row,
    microkernel::{Arithmetic, Loop, run},
    shell::{self, Backward, Gradients, Node, Op, Operand, Output},
};
use crate::{Result, device::CpuLevel};

/// Cross-entropy of each sample, in nats. `logits`: `(b, classes)`; `labels`: `(b,)` u32. Returns `(b,)`.
/// Fails if a label is not below the number of classes.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    smoothed_cross_entropy(logits, labels, 0.0)
}

/// [`cross_entropy`] with the target `(1 - smoothing) · one-hot + smoothing / classes` (Szegedy et al. 2016, §7):
/// PyTorch's `label_smoothing`.
pub fn smoothed_cross_entropy(logits: &Tensor, labels: &Tensor, smoothing: f64) -> Result<Tensor> {
    shell::run(CrossEntropy::new(CpuLevel::get(), logits, labels, smoothing)?, [logits])
}

struct CrossEntropy {
    level: CpuLevel,
    labels: Tensor,
    /// The same, if they are on the CPU: checking others would mean waiting for a GPU.
    known: Vec<usize>,
    smoothing: f64,
}

impl CrossEntropy {
    fn new(level: CpuLevel, logits: &Tensor, labels: &Tensor, smoothing: f64) -> Result<Self> {
        let (b, classes) = logits.dims2()?;
        let (dims, dtype) = (labels.dims(), labels.dtype());
        if dims != [b] || dtype != DType::U32 {
            bail!(Alarm, "{b} samples have labels {dims:?} of type {dtype:?}, expected u32");
        }
        let known = if labels.device().is_cpu() { labels.to_vec1::<u32>()? } else { Vec::new() };
        let known: Vec<usize> = known.into_iter().map(|label| label as usize).collect();
        if let Some(label) = known.iter().find(|&&label| label >= classes) {
            bail!(Data, "label {label} of {classes} classes");
        }
        Ok(Self { level, labels: labels.clone(), known, smoothing })
    }
}

/// Writes the probabilities of each row of logits; returns the losses.
struct Losses<'a> {
    of: &'a CrossEntropy,
    logits: &'a [f32],
    probabilities: &'a mut [f32],
}

impl Loop for Losses<'_> {
    type Output = Vec<f32>;
    #[inline(always)]
    fn run<A: Arithmetic>(self) -> Vec<f32> {
        let Self { of: CrossEntropy { known: labels, smoothing, .. }, logits, probabilities } = self;
        let classes = logits.len() / labels.len().max(1);
        let rows = logits.chunks_exact(classes.max(1)).zip(probabilities.chunks_exact_mut(classes.max(1)));
        let loss = |(&label, (logits, probabilities)): (&usize, (&[f32], &mut [f32]))| {
            let (largest, total) = softmax_row::<A>(1.0, logits, probabilities);
            let mut expected = f64::from(logits[label] - largest);
            if *smoothing > 0.0 {
                let sum: f64 = logits.iter().map(|&z| f64::from(z - largest)).sum();
                expected = (1.0 - smoothing) * expected + smoothing * sum / classes as f64;
            }
            (f64::from(total).ln() - expected) as f32
        };
        labels.iter().zip(rows).map(loss).collect()
    }
}

impl CrossEntropy {
    fn losses_and_probabilities(&self, logits: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let mut probabilities = vec![0f32; logits.len()];
        let losses = run(self.level, Losses { of: self, logits, probabilities: &mut probabilities });
        (losses, probabilities)
    }
}

impl Node<1> for CrossEntropy {
    const NAME: &'static str = "cross-entropy";

    fn forward(&self, [logits]: [Operand; 1]) -> Output {
        let (losses, _) = self.losses_and_probabilities(&logits);
        Ok((losses, Shape::from(self.known.len())))
    }

    fn backward(&self, [logits]: [Operand; 1], Backward { dy, .. }: Backward<1>) -> Gradients<1> {
        let (_, mut gradient) = self.losses_and_probabilities(&logits);
        let (_, classes) = logits.shape().dims2()?;
        for ((row, &label), &dy) in gradient.chunks_exact_mut(classes.max(1)).zip(&self.known).zip(dy) {
            row[label] -= (1.0 - self.smoothing) as f32;
            let even = (self.smoothing / classes as f64) as f32;
            row.iter_mut().for_each(|v| *v = (*v - even) * dy);
        }
        Ok([Some(gradient)])
    }
}

impl Op<1> for CrossEntropy {
    fn reference(&self, [logits]: [&Tensor; 1]) -> Result<Tensor> {
        let Self { labels, smoothing, .. } = self;
        let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
        let log_z = shifted.exp()?.sum(D::Minus1)?.log()?;
        let chosen = shifted.gather(&labels.unsqueeze(1)?, 1)?.squeeze(1)?;
        let expected = ((chosen * (1.0 - smoothing))? + (shifted.mean(D::Minus1)? * *smoothing)?)?;
        Ok((log_z - expected)?)
    }
}

/// KL(softmax(p) ‖ softmax(q)) of each sample, in nats, with gradients to both. TRADES (Zhang et al. 2019) and
/// stability training (Zheng et al. 2016) use it to compare the predictions for two images.
///
/// `p_logits`, `q_logits`: `(b, classes)`. Returns `(b,)`. Fails if their shapes differ.
pub fn kl_divergence(p_logits: &Tensor, q_logits: &Tensor) -> Result<Tensor> {
    p_logits.dims2()?;
    let (p, q) = (p_logits.dims(), q_logits.dims());
    if p != q {
        bail!(Alarm, "logits {p:?} and {q:?} are compared, expected one shape");
    }
    shell::run(KlDivergence, [p_logits, q_logits])
}

/// In double precision, because for nearly equal predictions, which training aims at, it is a small difference of
/// larger terms. Compared with the networks that make the logits, this costs nothing.
struct KlDivergence;

/// The logarithms of the probabilities of one row.
fn log_softmax(logits: &[f32]) -> impl Iterator<Item = f64> {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let log_z = logits.iter().map(|&v| (f64::from(v) - largest).exp()).sum::<f64>().ln();
    logits.iter().map(move |&v| f64::from(v) - largest - log_z)
}

/// The divergence of one row, and `(log p, log q)` of its classes.
fn divergence(p_logits: &[f32], q_logits: &[f32]) -> (f64, Vec<(f64, f64)>) {
    let logs: Vec<_> = log_softmax(p_logits).zip(log_softmax(q_logits)).collect();
    (logs.iter().map(|(log_p, log_q)| log_p.exp() * (log_p - log_q)).sum(), logs)
}

impl Node<2> for KlDivergence {
    const NAME: &'static str = "kl-divergence";

    fn forward(&self, [p, q]: [Operand; 2]) -> Output {
        let (b, classes) = p.shape().dims2()?;
        let mut losses = vec![0f32; b];
        let rows = p.chunks_exact(classes.max(1)).zip(q.chunks_exact(classes.max(1)));
        losses.iter_mut().zip(rows).for_each(|(loss, (p, q))| *loss = divergence(p, q).0 as f32);
        Ok((losses, Shape::from(b)))
    }

    /// `∂/∂p_logits = p · (log p - log q - KL)`, `∂/∂q_logits = q - p`.
    fn backward(&self, [p, q]: [Operand; 2], Backward { dy, wanted, .. }: Backward<2>) -> Gradients<2> {
        let (_, classes) = p.shape().dims2()?;
        let rows = p.chunks_exact(classes.max(1)).zip(q.chunks_exact(classes.max(1)));
        let (mut dp, mut dq) = (Vec::new(), Vec::new());
        for ((p, q), &dy) in rows.zip(dy) {
            let (kl, logs) = divergence(p, q);
            let dy = f64::from(dy);
            if wanted[0] {
                dp.extend(logs.iter().map(|(log_p, log_q)| (dy * log_p.exp() * (log_p - log_q - kl)) as f32));
            }
            if wanted[1] {
                dq.extend(logs.iter().map(|(log_p, log_q)| (dy * (log_q.exp() - log_p.exp())) as f32));
            }
        }
        Ok([Some(dp), Some(dq)])
    }
}

impl Op<2> for KlDivergence {
    fn reference(&self, operands: [&Tensor; 2]) -> Result<Tensor> {
        let log_softmax = |logits: &Tensor| -> candle_core::Result<Tensor> {
            let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
            shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)
        };
        let [log_p, log_q] = [log_softmax(operands[0])?, log_softmax(operands[1])?];
        Ok((log_p.exp()? * (log_p - log_q)?)?.sum(D::Minus1)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::{super::testing::*, *};

    #[test]
    fn cross_entropy_matches_the_reference_in_double_precision() {
        for (b, classes) in [(2, 3), (7, 10), (5, 33)] {
            let labels: Vec<u32> = (0..b).map(|i| (i * 7 % classes) as u32).collect();
            let labels = Tensor::new(labels, &Device::Cpu).unwrap();
            let logits = [(random(1, (b, classes)) * 5.0).unwrap()];
            for smoothing in [0.0, 0.1, 1.0] {
                check(&logits, |level| CrossEntropy::new(level, &logits[0], &labels, smoothing).unwrap());
            }
        }
    }

    #[test]
    fn even_logits_cost_the_logarithm_of_the_classes() {
        let labels = Tensor::new(&[3u32], &Device::Cpu).unwrap();
        let loss =
            values(&cross_entropy(&Tensor::new(&[[1e4f32; 10]], &Device::Cpu).unwrap(), &labels).unwrap());
        assert!((loss[0] - 10f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn a_label_out_of_range_is_named() {
        let labels = Tensor::new(&[1u32, 10], &Device::Cpu).unwrap();
        let error = cross_entropy(&random(1, (2, 10)), &labels).unwrap_err();
        assert_eq!((error.to_string().as_str(), error.exit_code()), ("label 10 of 10 classes", 65));
    }
    #[test]
    fn the_divergence_matches_the_reference_in_double_precision() {
        for (b, classes) in [(2, 3), (7, 10), (5, 33)] {
            let logits = [(random(1, (b, classes)) * 5.0).unwrap(), (random(2, (b, classes)) * 5.0).unwrap()];
            check(&logits, |_| KlDivergence);
        }
    }

    #[test]
    fn the_divergence_of_equal_answers_is_zero_and_of_near_ones_half_a_square() {
        let logits = random(1, (3, 10));
        let shifted = (&logits + 2.0).unwrap();
        assert!(values(&kl_divergence(&logits, &logits).unwrap()).iter().all(|&v| v == 0.0));
        assert!(values(&kl_divergence(&logits, &shifted).unwrap()).iter().all(|&v| v.abs() < 1e-12));
        // Even odds against those of ± d/2: ln cosh(d/2), which is d² / 8 to within d⁴ / 192.
        let (even, d) = (Tensor::new(&[[0f32, 0.0]], logits.device()).unwrap(), 2f32.powi(-10));
        let near = Tensor::new(&[[d / 2.0, -d / 2.0]], logits.device()).unwrap();
        let kl = values(&kl_divergence(&even, &near).unwrap())[0];
        assert!((kl / (d * d / 8.0) - 1.0).abs() < 1e-6, "{kl}");
    }

    #[test]
    fn the_divergence_of_two_classes_is_that_of_their_odds() {
        // Odds 3 : 1 against 1 : 4, so p = (3/4, 1/4) and q = (1/5, 4/5).
        let p = Tensor::new(&[[3f32.ln(), 0.0]], &Device::Cpu).unwrap();
        let q = Tensor::new(&[[0.0, 4f32.ln()]], &Device::Cpu).unwrap();
        let expected = 0.75 * (0.75f32 / 0.2).ln() + 0.25 * (0.25f32 / 0.8).ln();
        let kl = values(&kl_divergence(&p, &q).unwrap())[0];
        assert!((kl - expected).abs() < 1e-6, "{kl}, expected {expected}");
    }

    #[test]
    fn the_divergence_of_extreme_logits_is_finite() {
        let p = Tensor::new(&[[1e4f32, 0.0]], &Device::Cpu).unwrap();
        let q = Tensor::new(&[[0f32, 1e4]], &Device::Cpu).unwrap();
        assert_eq!(values(&kl_divergence(&p, &q).unwrap()), [1e4]);
    }

    #[test]
    fn gradients_of_the_divergence_are_finite_differences_and_for_tracked_logits_only() {
        let logits = [random(1, (3, 5)), random(2, (3, 5))];
        check_finite_differences(&logits, |t| kl_divergence(&t[0], &t[1]));
        check_untracked(&logits, |t| kl_divergence(&t[0], &t[1]));
    }

    #[test]
    fn answers_of_two_shapes_are_not_compared() {
        let error = kl_divergence(&random(1, (2, 3)), &random(1, (2, 4))).unwrap_err().to_string();
        assert_eq!(error, "logits [2, 3] and [2, 4] are compared, expected one shape");
    }
}
