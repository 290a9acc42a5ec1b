//! Cross-entropy.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Tensor};

use super::{
    Elements,
    attention::softmax_row,
    elements,
    microkernel::{Arithmetic, Loop, run},
    on_cpu, reference, tensor,
};
use crate::{Result, device::CpuLevel};

/// Cross-entropy of each sample, in nats. `logits`: `(b, classes)`; `labels`: `(b,)` u32. Returns `(b,)`.
/// Fails if a label is not below the number of classes.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    if on_cpu(&[logits]) && labels.device().is_cpu() {
        cross_entropy_at(CpuLevel::get(), logits, labels)
    } else {
        reference::cross_entropy(logits, labels)
    }
}

fn cross_entropy_at(level: CpuLevel, logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let (b, classes) = logits.dims2()?;
    if labels.dims() != [b] || labels.dtype() != DType::U32 {
        bail!(
            Alarm,
            "{b} samples have labels {:?} of type {:?}, expected u32",
            labels.dims(),
            labels.dtype()
        );
    }
    let labels: Vec<usize> = labels.to_vec1::<u32>()?.into_iter().map(|label| label as usize).collect();
    if let Some(label) = labels.iter().find(|&&label| label >= classes) {
        bail!(Data, "label {label} of {classes} classes");
    }
    Ok(logits.contiguous()?.apply_op1(CrossEntropy { level, labels, classes })?)
}

struct CrossEntropy {
    level: CpuLevel,
    labels: Vec<usize>,
    classes: usize,
}

/// Writes the probabilities of each row of logits; returns the losses.
struct Losses<'a> {
    labels: &'a [usize],
    logits: &'a [f32],
    probabilities: &'a mut [f32],
}

impl Loop for Losses<'_> {
    type Output = Vec<f32>;
    #[inline(always)]
    fn run<A: Arithmetic>(self) -> Vec<f32> {
        let Self { labels, logits, probabilities } = self;
        let classes = logits.len() / labels.len().max(1);
        let rows = logits.chunks_exact(classes.max(1)).zip(probabilities.chunks_exact_mut(classes.max(1)));
        let loss = |(&label, (logits, probabilities)): (&usize, (&[f32], &mut [f32]))| {
            let (largest, total) = softmax_row::<A>(1.0, logits, probabilities);
            (f64::from(total).ln() - f64::from(logits[label] - largest)) as f32
        };
        labels.iter().zip(rows).map(loss).collect()
    }
}

impl CrossEntropy {
    fn losses_and_probabilities(&self, logits: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let mut probabilities = vec![0f32; logits.len()];
        let losses = Losses { labels: &self.labels, logits, probabilities: &mut probabilities };
        (run(self.level, losses), probabilities)
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (losses, _) = self.losses_and_probabilities(elements(logits, layout)?);
        Ok((CpuStorage::F32(losses), Shape::from(self.labels.len())))
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if !logits.track_op() {
            return Ok(None);
        }
        let dy = dy.contiguous()?;
        let (_, mut gradient) = self.losses_and_probabilities(&Elements::of(logits)?);
        let rows = gradient.chunks_exact_mut(self.classes.max(1)).zip(&self.labels);
        for ((row, &label), &dy) in rows.zip(&*Elements::of(&dy)?) {
            row[label] -= 1.0;
            row.iter_mut().for_each(|v| *v *= dy);
        }
        Ok(Some(tensor(gradient, logits)?))
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
            check(
                &logits,
                |level, t| cross_entropy_at(level, &t[0], &labels),
                |t| reference::cross_entropy(&t[0], &labels),
            );
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
}
