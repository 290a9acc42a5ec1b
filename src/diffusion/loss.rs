//! The loss that diffusion models are trained on.

use candle_core::Tensor;

use super::TrainingPair;
use crate::Result;

/// The mean squared error of the network's output, for each image: `(b,)`.
///
/// With ε-prediction the mean is L_simple (Ho et al. 2020, Eq. 14); with EDM's preconditioning it is their loss
/// with the weight λ(σ) = 1 / c_out² (Karras et al. 2022, Eq. 8). `network` gets the noisy images and what it is
/// told about the noise, `(b,)` f32.
pub fn denoising_loss(
    pair: &TrainingPair,
    network: &dyn Fn(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let error = (network(&pair.input, &pair.t)? - &pair.target)?.sqr()?;
    Ok(error.flatten_from(1)?.mean(1)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::{
        super::{NoiseSchedule, Prediction},
        *,
    };

    #[test]
    fn the_loss_is_the_mean_square_of_what_was_not_predicted() {
        let schedule = NoiseSchedule::linear(10, 1e-4, 0.02).unwrap();
        let x = Tensor::full(0.5f32, (2, 2, 2, 1), &Device::Cpu).unwrap();
        let noise = Tensor::full(3f32, (2, 2, 2, 1), &Device::Cpu).unwrap();
        let levels = [schedule.level(0), schedule.level(7)];
        let pair = TrainingPair::new(Prediction::Epsilon, &x, &levels, &noise).unwrap();
        let loss = |network: &dyn Fn(&Tensor, &Tensor) -> Result<Tensor>| {
            denoising_loss(&pair, network).unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(loss(&|_, _| Ok(noise.clone())), [0.0, 0.0]);
        assert_eq!(loss(&|x, _| Ok(x.zeros_like()?)), [9.0, 9.0]);
        // Only the second image is off, by its step.
        let off = loss(&|_, t| Ok(noise.broadcast_add(&t.reshape((2, 1, 1, 1))?)?));
        assert!(off[0] == 0.0 && (off[1] - 49.0).abs() < 1e-5, "{off:?}");
    }
}
