//! Adversarial training (Madry et al. 2018, Eq. 2.1).

use candle_core::Tensor;

use super::{LogitsOf, Targets, plain};
use crate::{Result, attack::Pgd};

/// The cross-entropy of the adversarial version of each image.
///
/// `tracked` and `frozen` are views of one network, with and without gradients to its parameters: the attack runs
/// on the latter to avoid computing gradients that nobody uses, and climbs the cross-entropy without label smoothing.
/// For the rest see [`Pgd::perturb`]. Returns `(b,)`.
pub fn pgd_at(
    tracked: LogitsOf,
    frozen: LogitsOf,
    x: &Tensor,
    targets: &Targets,
    attack: &Pgd,
    sample_ids: &[u64],
) -> Result<Tensor> {
    let hard = Targets { smoothing: 0.0, ..*targets };
    let x_adv = attack.climb(frozen, &|logits| hard.cross_entropy(logits), x, sample_ids)?;
    plain(tracked, &x_adv, targets)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::{
        attack::{Epsilon, Norm, PgdConfig, PgdLoss, Threat},
        kernels,
    };

    /// On logits (0, w·x) the attack reduces the margin by ε|w|₁, so the loss and its gradient are known.
    #[test]
    fn on_a_linear_model_loss_and_gradient_are_the_closed_form() {
        let w = Var::new(&[[1f32, -2.0]], &Device::Cpu).unwrap();
        let logits = |x: &Tensor, w: &Tensor| -> Result<Tensor> {
            let margin = kernels::linear(x, w, None)?;
            Ok(Tensor::cat(&[&margin.zeros_like()?, &margin], 1)?)
        };
        let tracked = |x: &Tensor| logits(x, w.as_tensor());
        let frozen = |x: &Tensor| logits(x, &w.as_detached_tensor());
        let x = Tensor::new(&[[0.6f32, 0.3]], &Device::Cpu).unwrap();
        let labels = Tensor::new(&[1u32], &Device::Cpu).unwrap();
        let threat = Threat::new(Norm::Linf, Epsilon::try_from(0.1).unwrap()).unwrap();
        let config = PgdConfig { steps: 5, step_size: 0.05, random_start: true, loss: PgdLoss::Ce };
        let attack = Pgd { threat, config, seed: 0 };
        let loss = pgd_at(&tracked, &frozen, &x, &Targets::new(&labels, 0.0), &attack, &[0])
            .unwrap()
            .sum_all()
            .unwrap();
        let margin = 0.6 - 2.0 * 0.3 - 0.1 * 3.0;
        assert!((loss.to_scalar::<f32>().unwrap() - (1.0 + (-margin as f32).exp()).ln()).abs() < 1e-5);
        // dL/dw = -(1 - p) x_adv, x_adv = x - ε sign(w)
        let grads = loss.backward().unwrap();
        let found = grads.get(w.as_tensor()).unwrap().to_vec2::<f32>().unwrap();
        let wrong = 1.0 / (1.0 + (margin as f32).exp());
        assert!((found[0][0] + wrong * 0.5).abs() < 1e-5, "{found:?}");
        assert!((found[0][1] + wrong * 0.4).abs() < 1e-5, "{found:?}");
    }
}
