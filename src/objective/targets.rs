//! What images should be taken for.

use candle_core::Tensor;

use crate::{Result, kernels};

/// The classes that images should be taken for.
#[derive(Clone, Copy)]
pub struct Targets<'a> {
    /// `(b,)` u32.
    pub labels: &'a Tensor,
    /// Of mixed images, the class of the other part, `(b,)` u32, and its share of the target, `(b,)` f32 in [0, 1].
    pub mixed: Option<(&'a Tensor, &'a Tensor)>,
    /// The share of the target that is spread over all classes (Szegedy et al. 2016, §7).
    pub smoothing: f64,
}

impl<'a> Targets<'a> {
    /// One class for each image.
    pub fn new(labels: &'a Tensor, smoothing: f64) -> Self {
        Self { labels, mixed: None, smoothing }
    }

    /// The cross-entropy of each image, in nats. `logits`: `(b, classes)`. Returns `(b,)`.
    pub fn cross_entropy(&self, logits: &Tensor) -> Result<Tensor> {
        let of = |labels| kernels::smoothed_cross_entropy(logits, labels, self.smoothing);
        let first = of(self.labels)?;
        match self.mixed {
            None => Ok(first),
            Some((labels, share)) => Ok((&first + ((of(labels)? - &first)? * share)?)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// torch 2.15: `cross_entropy` with the targets (0.75, 0, 0.25) and (0, 1, 0), then with `label_smoothing=0.1`.
    #[test]
    fn a_mixed_target_is_that_of_pytorchs_probabilities() {
        let logits = Tensor::new(&[[1f32, -0.5, 2.0], [0.3, 0.1, -1.2]], &Device::Cpu).unwrap();
        let labels = Tensor::new(&[0u32, 1], &Device::Cpu).unwrap();
        let (others, share) =
            (Tensor::new(&[2u32, 0], &Device::Cpu), Tensor::new(&[0.25f32, 0.0], &Device::Cpu));
        let (others, share) = (others.unwrap(), share.unwrap());
        for (smoothing, expected) in [(0.0, [1.121_539, 0.9138616]), (0.1, [1.1632057, 0.9505283])] {
            let targets = Targets { labels: &labels, mixed: Some((&others, &share)), smoothing };
            let found = targets.cross_entropy(&logits).unwrap().to_vec1::<f32>().unwrap();
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 1e-6, "{found}, expected {expected}");
            }
        }
    }
}
