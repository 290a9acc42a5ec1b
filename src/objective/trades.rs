//! The loss that both TRADES and stability training minimise: predictions should be right, and the same nearby.

use candle_core::Tensor;

use super::{LogitsOf, Targets};
use crate::{
    Result,
    attack::{Norm, Pgd, ascend},
    data::{Shape, gaussian_noise},
    kernels, rng,
};

/// The standard deviation of the noise that [`trades_perturb`] starts from.
const START: f64 = 0.001;

/// `CE(f(x), y) + β · KL(f(x) ‖ f(x'))` of each image, in nats, with gradients through both predictions (TRADES,
/// Zhang et al. 2019, Eq. 5; with Gaussian noise for `x' - x` stability training, Zheng et al. 2016, as in Carmon
/// et al. 2019).
///
/// `x`, `x_near`: `(b, h, w, c)`. The two go through the network one after the other, each with its own batch
/// statistics. Returns `(b,)`.
pub fn stable(
    tracked: LogitsOf,
    x: &Tensor,
    x_near: &Tensor,
    targets: &Targets,
    beta: f64,
) -> Result<Tensor> {
    let logits = tracked(x)?;
    let near = tracked(x_near)?;
    let right = targets.cross_entropy(&logits)?;
    Ok((right + (kernels::kl_divergence(&logits, &near)? * beta)?)?)
}

/// The images within the ball of `attack` whose predictions are farthest from those for `x`: the inner maximisation
/// of TRADES, by the attack's steps on `KL(f(x) ‖ f(x'))` from `x` with Gaussian noise of 0.001.
///
/// `sample_ids` are the keys of the noise, from which both ℓ∞ and ℓ2 start.
pub fn trades_perturb(frozen: LogitsOf, x: &Tensor, attack: &Pgd, sample_ids: &[u64]) -> Result<Tensor> {
    let clean = frozen(x)?.detach();
    let noise = noise_like(x, attack.seed, sample_ids, rng::stream::ATTACK)?;
    let mut start = (x + (noise * START)?)?;
    if attack.threat.norm() == Norm::L2 {
        // At a radius smaller than the noise, the start would be outside the ball.
        start = attack.threat.project(x, &start)?;
    }
    ascend(frozen, &|logits| kernels::kl_divergence(&clean, logits), x, start, &attack.threat, &attack.config)
}

/// Images with Gaussian noise of standard deviation `sigma`, for pixels in [0, 1]; they may leave that range, as
/// the images that a smoothed classifier sees do (Cohen et al. 2019).
pub fn augment_gaussian(x: &Tensor, sigma: f64, seed: u64, sample_ids: &[u64]) -> Result<Tensor> {
    Ok((x + (noise_like(x, seed, sample_ids, rng::stream::GAUSSIAN)? * sigma)?)?)
}

/// Standard normal noise for the images `x`.
pub(super) fn noise_like(x: &Tensor, seed: u64, sample_ids: &[u64], stream: u32) -> Result<Tensor> {
    let (n, height, width, channels) = x.dims4()?;
    if sample_ids.len() != n {
        bail!(Usage, "there are {} sample ids, expected one for each of {n} images", sample_ids.len());
    }
    gaussian_noise(seed, sample_ids, stream, Shape { height, width, channels }, x.device())
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::{attack::Epsilon, objective::plain};

    fn images() -> Tensor {
        let values: Vec<f32> = (0..3 * 12).map(|i| 0.2 + 0.6 * ((i * 7 % 12) as f32 / 12.0)).collect();
        Tensor::from_vec(values, (3, 2, 2, 3), &Device::Cpu).unwrap()
    }

    /// Logits of three classes that are linear in the image.
    fn linear(x: &Tensor) -> Result<Tensor> {
        let weights: Vec<f32> = (0..36).map(|i| (i as f32 * 1.7).sin()).collect();
        let weights = Tensor::from_vec(weights, (3, 12), x.device())?;
        kernels::linear(&x.flatten_from(1)?, &weights, None)
    }

    fn values(t: &Tensor) -> Vec<f32> {
        t.to_vec1().unwrap()
    }

    #[test]
    fn without_weight_it_is_cross_entropy_and_at_the_image_itself_the_divergence_is_0() {
        let (x, labels) = (images(), Tensor::new(&[0u32, 2, 1], &Device::Cpu).unwrap());
        let near = (&x + 0.1).unwrap();
        let plain = values(&plain(&linear, &x, &Targets::new(&labels, 0.1)).unwrap());
        assert_eq!(values(&stable(&linear, &x, &near, &Targets::new(&labels, 0.1), 0.0).unwrap()), plain);
        assert_eq!(values(&stable(&linear, &x, &x, &Targets::new(&labels, 0.1), 6.0).unwrap()), plain);
        let weighed = values(&stable(&linear, &x, &near, &Targets::new(&labels, 0.1), 6.0).unwrap());
        let once = values(&stable(&linear, &x, &near, &Targets::new(&labels, 0.1), 1.0).unwrap());
        for ((weighed, once), plain) in weighed.iter().zip(&once).zip(&plain) {
            assert!(once > plain && ((weighed - plain) - 6.0 * (once - plain)).abs() < 1e-5);
        }
    }

    /// Two classes that differ by w·x: the divergence grows with |w·(x' - x)|, so its maximum is at x ± ε sign(w).
    #[test]
    fn the_inner_maximisation_finds_the_corner_of_the_ball_on_a_linear_model() {
        let w: Vec<f32> = (0..12).map(|i| if i % 3 == 0 { 1.0 } else { -0.5 }).collect();
        let logits_of = |x: &Tensor| {
            let w = Tensor::from_slice(&w, (1, 12), x.device())?;
            let margin = kernels::linear(&x.flatten_from(1)?, &w, None)?;
            Ok(Tensor::cat(&[&margin.zeros_like()?, &margin], 1)?)
        };
        let attack = Pgd::new(Norm::Linf, Epsilon::try_from(0.05).unwrap(), 20, 2.5, 3).unwrap();
        let x = images();
        let found = trades_perturb(&logits_of, &x, &attack, &[4, 5, 6]).unwrap();
        let delta = (&found - &x).unwrap().flatten_from(1).unwrap().to_vec2::<f32>().unwrap();
        for delta in delta {
            let side = delta[0].signum();
            for (delta, w) in delta.iter().zip(&w) {
                assert!((delta - side * 0.05 * w.signum()).abs() < 1e-6, "{delta}");
            }
        }
        let small = Pgd::new(Norm::L2, Epsilon::try_from(1e-4).unwrap(), 1, 2.0, 3).unwrap();
        let near = (trades_perturb(&logits_of, &x, &small, &[4, 5, 6]).unwrap() - &x).unwrap();
        let lengths = values(&near.flatten_from(1).unwrap().sqr().unwrap().sum(1).unwrap().sqrt().unwrap());
        assert!(lengths.iter().all(|&l| l < 1.01e-4), "{lengths:?}");
    }

    #[test]
    fn gradients_go_through_both_answers() {
        let (x, near) =
            (Var::from_tensor(&images()).unwrap(), Var::from_tensor(&(images() + 0.1).unwrap()).unwrap());
        let labels = Tensor::new(&[0u32, 2, 1], &Device::Cpu).unwrap();
        let loss = stable(&linear, &x, &near, &Targets::new(&labels, 0.0), 2.0).unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();
        for var in [&x, &near] {
            let size = grads.get(var).unwrap().abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(size > 1e-3, "{size}");
        }
    }

    #[test]
    fn gaussian_noise_has_its_deviation_and_depends_on_seed_and_id_alone() {
        let x = Tensor::full(0.5f32, (8, 16, 16, 3), &Device::Cpu).unwrap();
        let ids: Vec<u64> = (0..8).collect();
        let noisy = augment_gaussian(&x, 0.25, 7, &ids).unwrap();
        let delta = (noisy.clone() - &x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let variance = delta.iter().map(|d| f64::from(*d).powi(2)).sum::<f64>() / delta.len() as f64;
        assert!((variance.sqrt() - 0.25).abs() < 0.01, "{variance}");
        let alone = augment_gaussian(&x.narrow(0, 5, 1).unwrap(), 0.25, 7, &[5]).unwrap();
        let same = (alone - noisy.narrow(0, 5, 1).unwrap()).unwrap().abs().unwrap().sum_all().unwrap();
        assert_eq!(same.to_scalar::<f32>().unwrap(), 0.0);
    }
}
