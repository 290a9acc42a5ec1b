//! SmoothAdv: adversarial training of a smoothed classifier (Salman et al. 2019).

use candle_core::Tensor;

use super::{LogitsOf, Targets, trades::noise_like};
use crate::{Result, attack::Pgd, rng};

/// The cross-entropy of each image at the point in its ball that the smoothed classifier errs at most, the mean over
/// noisy copies of that point (Salman et al. 2019, Pseudocode 1).
///
/// The noise of standard deviation `sigma` is drawn `samples` times for each image, by the attack's seed and
/// `sample_ids`; all steps of the attack and the loss see the same. `tracked` and `frozen` are views of one network as
/// in [`super::pgd_at()`]. Returns `(b,)`.
pub fn smooth_adv(
    tracked: LogitsOf,
    frozen: LogitsOf,
    x: &Tensor,
    targets: &Targets,
    attack: &Pgd,
    (sigma, samples): (f64, usize),
    sample_ids: &[u64],
) -> Result<Tensor> {
    let draw = |i| Ok((noise_like(x, attack.seed, sample_ids, rng::stream::SMOOTHING + i)? * sigma)?);
    let noise = (0..samples as u32).map(draw).collect::<Result<Vec<_>>>()?;
    let hard = Targets { smoothing: 0.0, ..*targets };
    let loss_of = |log_probabilities: &Tensor| hard.cross_entropy(log_probabilities);
    let smoothed = |x: &Tensor| log_mean_probabilities(frozen, x, &noise);
    let x_adv = attack.climb(&smoothed, &loss_of, x, sample_ids)?;
    let losses = noisy(tracked, &x_adv, &noise)?;
    let losses = losses.iter().map(|logits| targets.cross_entropy(logits)).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::stack(&losses, 0)?.mean(0)?)
}

/// The logits, `(b, classes)`, of each noisy copy of the images.
fn noisy(logits_of: LogitsOf, x: &Tensor, noise: &[Tensor]) -> Result<Vec<Tensor>> {
    let copies = noise.iter().map(|noise| x + noise).collect::<candle_core::Result<Vec<_>>>()?;
    Ok(logits_of(&Tensor::cat(&copies, 0)?)?.chunk(noise.len(), 0)?)
}

/// `log (1/m) Σᵢ softmax(f(x + δᵢ))`, the logits of the classifier that is smoothed with the noise δ₁ … δₘ: with
/// these the cross-entropy is the loss of Salman et al. 2019, Eq. 6.
fn log_mean_probabilities(logits_of: LogitsOf, x: &Tensor, noise: &[Tensor]) -> Result<Tensor> {
    let logits = Tensor::stack(&noisy(logits_of, x, noise)?, 0)?;
    let log_probabilities = logits.broadcast_sub(&logits.log_sum_exp(2)?.unsqueeze(2)?)?;
    Ok((log_probabilities.log_sum_exp(0)? - (noise.len() as f64).ln())?)
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, path::PathBuf};

    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::{
        attack::{Epsilon, Norm, PgdConfig, PgdLoss, Threat, ascend},
        kernels,
    };

    fn l2(epsilon: f64) -> Threat {
        Threat::new(Norm::L2, Epsilon::try_from(epsilon).unwrap()).unwrap()
    }

    #[track_caller]
    fn assert_close(found: &Tensor, expected: &Tensor) {
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(found.dims(), expected.dims());
        for (found, expected) in values(found).iter().zip(values(expected)) {
            assert!((found - expected).abs() < 1e-5, "{found}, expected {expected}");
        }
    }

    /// tests/golden/smooth_adv.py: the attack from the images, then losses and gradients at what it found.
    #[test]
    fn attack_loss_and_gradient_are_those_of_the_authors_formulas_in_pytorch() {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/smooth_adv.safetensors");
        let golden: HashMap<String, Tensor> = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let [weight, bias] = ["weight", "bias"].map(|name| Var::from_tensor(&golden[name]).unwrap());
        let network = |x: &Tensor| -> Result<Tensor> {
            let hidden = kernels::linear(&x.flatten_from(1)?, weight.as_tensor(), Some(bias.as_tensor()))?;
            kernels::linear(&hidden.tanh()?, &golden["last"], None)
        };
        let labels = golden["labels"].to_dtype(DType::U32).unwrap();
        let noise: Vec<Tensor> = (0..3).map(|i| golden["noise"].get(i).unwrap()).collect();
        let targets = Targets::new(&labels, 0.0);
        let config = PgdConfig { steps: 4, step_size: 0.25, random_start: false, loss: PgdLoss::Ce };
        let smoothed = |x: &Tensor| log_mean_probabilities(&network, x, &noise);
        let loss_of = |logits: &Tensor| targets.cross_entropy(logits);
        let x = &golden["x"];
        let x_adv = ascend(&smoothed, &loss_of, x, x.clone(), &l2(0.5), &config).unwrap();
        assert_close(&x_adv, &golden["x_adv"]);
        assert_close(&loss_of(&smoothed(&x_adv).unwrap()).unwrap(), &golden["smoothed_losses"]);
        let each = noisy(&network, &x_adv, &noise).unwrap();
        let losses: Vec<_> = each.iter().map(|logits| targets.cross_entropy(logits).unwrap()).collect();
        let losses = Tensor::stack(&losses, 0).unwrap().mean(0).unwrap();
        assert_close(&losses, &golden["losses"]);
        let grads = losses.mean_all().unwrap().backward().unwrap();
        assert_close(grads.get(&weight).unwrap(), &golden["grad_weight"]);
    }

    /// On logits (0, w·x) noise does not turn the direction of the attack, which ends at `x - ε w / |w|`.
    #[test]
    fn on_a_linear_model_the_loss_is_the_closed_form_for_the_noise_of_each_image() {
        let w = Tensor::new(&[[0.6f32, -0.8]], &Device::Cpu).unwrap();
        let logits = |x: &Tensor| -> Result<Tensor> {
            let margin = kernels::linear(&x.flatten_from(1)?, &w, None)?;
            Ok(Tensor::cat(&[&margin.zeros_like()?, &margin], 1)?)
        };
        let x = Tensor::new(&[0.5f32, 0.4, 0.6, 0.5], &Device::Cpu).unwrap().reshape((2, 1, 2, 1)).unwrap();
        let labels = Tensor::new(&[1u32, 1], &Device::Cpu).unwrap();
        let config = PgdConfig { steps: 40, step_size: 0.05, random_start: true, loss: PgdLoss::Ce };
        let attack = Pgd { threat: l2(0.1), config, seed: 3 };
        let targets = Targets::new(&labels, 0.0);
        let losses = smooth_adv(&logits, &logits, &x, &targets, &attack, (0.5, 4), &[7, 9]).unwrap();
        for (i, id) in [7, 9].into_iter().enumerate() {
            let margin = |image: &[f32]| 0.6 * image[0] - 0.8 * image[1];
            let image = x.get(i).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let expected = (0..4).map(|copy| {
                let mut noise = [0.0; 2];
                rng::normals(3, id, rng::stream::SMOOTHING + copy, &mut noise);
                (1.0 + (-(margin(&image) - 0.1 + 0.5 * margin(&noise))).exp()).ln()
            });
            let (found, expected) =
                (losses.get(i).unwrap().to_scalar::<f32>().unwrap(), expected.sum::<f32>() / 4.0);
            assert!((found - expected).abs() < 1e-5, "{found}, expected {expected}");
        }
    }
}
