//! What a diffusion model is trained on.

use candle_core::Tensor;

use super::{Schedule, q_sample};
use crate::Result;

/// The mean squared error of the predicted noise: L_simple, Ho et al. 2020, Eq. 14.
///
/// `x_start`, `noise`: `(b, h, w, c)` f32, pixels in [-1, 1]. `t`: `b` steps. `denoise` gets `x_t` and the
/// steps as `(b,)` f32 and predicts the noise. Returns a scalar, the mean over images and pixels.
pub fn eps_mse(
    schedule: &Schedule,
    x_start: &Tensor,
    t: &[u32],
    noise: &Tensor,
    denoise: &dyn Fn(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let x_t = q_sample(schedule, x_start, t, noise)?;
    let steps: Vec<_> = t.iter().map(|t| *t as f32).collect();
    let steps = Tensor::from_vec(steps, t.len(), x_start.device())?;
    Ok((denoise(&x_t, &steps)? - noise)?.sqr()?.mean_all()?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn the_loss_is_the_mean_square_of_what_was_not_predicted() {
        let schedule = Schedule::linear(10, 1e-4, 0.02).unwrap();
        let x = Tensor::zeros((2, 2, 2, 1), DType::F32, &Device::Cpu).unwrap();
        let noise = Tensor::full(3f32, (2, 2, 2, 1), &Device::Cpu).unwrap();
        let loss = |denoise: &dyn Fn(&Tensor, &Tensor) -> Result<Tensor>| {
            eps_mse(&schedule, &x, &[0, 7], &noise, denoise).unwrap().to_scalar::<f32>().unwrap()
        };
        assert_eq!(loss(&|_, _| Ok(noise.clone())), 0.0);
        assert_eq!(loss(&|x_t, _| Ok(x_t.zeros_like()?)), 9.0);
        // The second image alone is off, by its step.
        let off = loss(&|_, t| Ok(noise.broadcast_add(&t.reshape((2, 1, 1, 1))?)?));
        assert!((off - 49.0 / 2.0).abs() < 1e-5, "{off}");
    }
}
