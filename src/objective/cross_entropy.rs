//! Plain training.

use candle_core::Tensor;

use super::{LogitsOf, Targets};
use crate::Result;

/// The cross-entropy of each clean image, in nats.
///
/// `tracked`: the network, with gradients to its parameters. `x`: `(b, h, w, c)` in [0, 1]. Returns `(b,)`.
pub fn plain(tracked: LogitsOf, x: &Tensor, targets: &Targets) -> Result<Tensor> {
    targets.cross_entropy(&tracked(x)?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;

    #[test]
    fn equal_logits_cost_the_logarithm_of_the_number_of_classes() {
        let logits = Tensor::full(3f32, (2, 10), &Device::Cpu).unwrap();
        let labels = Tensor::new(&[0u32, 7], &Device::Cpu).unwrap();
        let losses = plain(&|x| Ok(x.clone()), &logits, &Targets::new(&labels, 0.0))
            .unwrap()
            .to_vec1::<f32>()
            .unwrap();
        losses.iter().for_each(|loss| assert!((loss - 10f32.ln()).abs() < 1e-6));
    }

    /// ∂(mean L)/∂logits = (softmax - one-hot) / b.
    #[test]
    fn the_gradient_is_the_error_of_the_probabilities() {
        let logits = Var::zeros((2, 4), DType::F32, &Device::Cpu).unwrap();
        let labels = Tensor::new(&[1u32, 3], &Device::Cpu).unwrap();
        let losses = plain(&|x| Ok(x.clone()), logits.as_tensor(), &Targets::new(&labels, 0.0)).unwrap();
        let grads = losses.mean_all().unwrap().backward().unwrap();
        let found = grads.get(logits.as_tensor()).unwrap().to_vec2::<f32>().unwrap();
        let expected = [[0.125, -0.375, 0.125, 0.125], [0.125, 0.125, 0.125, -0.375]];
        for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
            assert!((found - expected).abs() < 1e-6);
        }
    }
}
