//! The weighting of real and synthetic images.

use crate::Result;

/// What each image of a batch contributes to γ · L(real) + (1 − γ) · L(synthetic), with both losses means over
/// their own images (PORT, Sehwag et al. 2022, §2.1).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GammaMix {
    /// The weight of a real image's loss.
    pub real: f64,
    /// The weight of a synthetic image's loss.
    pub synthetic: f64,
}

impl GammaMix {
    /// The weights for a batch of `real` and `synthetic` images. Without synthetic images γ has no effect.
    ///
    /// Fails with [`Error::Usage`](crate::Error::Usage) unless `gamma` is from 0 to 1 and the batch has images of
    /// each kind whose weight is not 0.
    pub fn new(gamma: f64, real: usize, synthetic: usize) -> Result<Self> {
        if !(0.0..=1.0).contains(&gamma) {
            bail!(Usage, "gamma is {gamma}, expected from 0 (synthetic images only) to 1 (real images only)");
        }
        let gamma = if synthetic == 0 { 1.0 } else { gamma };
        if real == 0 && gamma > 0.0 {
            bail!(
                Usage,
                "gamma is {gamma}, but the batch has no real images; expected 0 or fewer synthetic ones"
            );
        }
        Ok(Self { real: gamma / real.max(1) as f64, synthetic: (1.0 - gamma) / synthetic.max(1) as f64 })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::objective::{Targets, plain};

    #[test]
    fn gamma_at_the_share_of_real_images_is_the_mean_over_the_concatenated_batch() {
        let logits: Vec<_> = (0..8 * 3).map(|i| (i as f32 * 0.9).sin()).collect();
        let logits = Tensor::from_vec(logits, (8, 3), &Device::Cpu).unwrap();
        let labels = Tensor::new(&[0u32, 1, 2, 0, 1, 2, 0, 1], &Device::Cpu).unwrap();
        let losses = plain(&|x| Ok(x.clone()), &logits, &Targets::new(&labels, 0.0))
            .unwrap()
            .to_vec1::<f32>()
            .unwrap();
        let mean = |part: &[f32]| part.iter().map(|&l| f64::from(l)).sum::<f64>() / part.len() as f64;
        let mixed = |gamma: f64| -> f64 {
            let mix = GammaMix::new(gamma, 3, 5).unwrap();
            let weight = |i: usize| if i < 3 { mix.real } else { mix.synthetic };
            losses.iter().enumerate().map(|(i, &l)| weight(i) * f64::from(l)).sum()
        };
        assert!((mixed(3.0 / 8.0) - mean(&losses)).abs() < 1e-9);
        assert!((mixed(0.5) - mean(&losses)).abs() > 1e-3);
        assert!((mixed(1.0) - mean(&losses[..3])).abs() < 1e-9);
        assert!((mixed(0.0) - mean(&losses[3..])).abs() < 1e-9);
    }

    #[test]
    fn a_batch_of_real_images_alone_is_their_mean_whatever_gamma() {
        assert_eq!(GammaMix::new(0.4, 8, 0).unwrap(), GammaMix { real: 1.0 / 8.0, synthetic: 0.0 });
    }

    #[test]
    fn weights_outside_of_0_to_1_and_weights_of_nothing_are_refused() {
        for gamma in [-0.1, 1.5, f64::NAN] {
            let error = GammaMix::new(gamma, 1, 1).unwrap_err().to_string();
            assert!(error.starts_with(&format!("gamma is {gamma}, expected from 0")), "{error}");
        }
        assert!(GammaMix::new(0.4, 0, 8).is_err());
        assert!(GammaMix::new(0.0, 0, 8).is_ok());
    }
}
