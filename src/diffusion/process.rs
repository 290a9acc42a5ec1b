//! The forward process: how images become noise.

use candle_core::Tensor;

use super::Schedule;
use crate::Result;

/// Diffuses `x_start` to the steps `t`: q(x_t | x_0), Ho et al. 2020, Eq. 4.
///
/// `x_start`, `noise`: `(b, h, w, c)` f32, pixels in [-1, 1]. `t`: `b` steps, 0 = one step of noise. Returns
/// `x_t`, shaped like `x_start`. Fails with [`Error::Usage`](crate::Error::Usage) if there is not one step of
/// the schedule for each image.
pub fn q_sample(schedule: &Schedule, x_start: &Tensor, t: &[u32], noise: &Tensor) -> Result<Tensor> {
    let images = x_start.dim(0)?;
    if t.len() != images {
        bail!(Usage, "there are {} diffusion steps, expected one for each of {images} images", t.len());
    }
    if let Some(t) = t.iter().find(|t| **t as usize >= schedule.len()) {
        bail!(Usage, "the diffusion step is {t}, expected below {}", schedule.len());
    }
    let alpha_bar = t.iter().map(|t| schedule.alphas_cumprod()[*t as usize]);
    let (signal, sigma): (Vec<_>, Vec<_>) =
        alpha_bar.map(|a| (a.sqrt() as f32, (1.0 - a).sqrt() as f32)).unzip();
    let mut per_image = vec![1; x_start.rank()];
    per_image[0] = images;
    let signal = Tensor::from_vec(signal, per_image.as_slice(), x_start.device())?;
    let sigma = Tensor::from_vec(sigma, per_image.as_slice(), x_start.device())?;
    Ok((x_start.broadcast_mul(&signal)? + noise.broadcast_mul(&sigma)?)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn signal_and_noise_have_the_variances_of_their_step() {
        let schedule = Schedule::linear(1000, 1e-4, 0.02).unwrap();
        let ones = Tensor::ones((2, 1, 1, 1), candle_core::DType::F32, &Device::Cpu).unwrap();
        let zeros = ones.zeros_like().unwrap();
        let at = |x: &Tensor, noise: &Tensor| {
            let x_t = q_sample(&schedule, x, &[99, 999], noise).unwrap();
            x_t.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        for (i, alpha_bar) in [0.8970181457, 4.035829765e-5f64].into_iter().enumerate() {
            assert!((f64::from(at(&ones, &zeros)[i]) - alpha_bar.sqrt()).abs() < 1e-7);
            assert!((f64::from(at(&zeros, &ones)[i]) - (1.0 - alpha_bar).sqrt()).abs() < 1e-7);
        }
    }

    #[test]
    fn steps_must_fit_images_and_schedule() {
        let schedule = Schedule::linear(10, 1e-4, 0.02).unwrap();
        let x = Tensor::zeros((2, 1, 1, 1), candle_core::DType::F32, &Device::Cpu).unwrap();
        let error = q_sample(&schedule, &x, &[3, 10], &x).unwrap_err();
        assert_eq!(error.to_string(), "the diffusion step is 10, expected below 10");
        assert!(q_sample(&schedule, &x, &[3], &x).is_err());
    }
}
