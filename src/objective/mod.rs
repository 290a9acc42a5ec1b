//! The objectives that classifiers are trained to minimise. Each loss is one number per image; networks are passed
//! as closures.

mod cross_entropy;
mod gamma;
mod pgd_at;
mod smooth_adv;
mod targets;
#[cfg(test)]
mod tests;
mod trades;

use candle_core::Tensor;
pub use cross_entropy::plain;
pub use gamma::GammaMix;
pub use pgd_at::pgd_at;
pub use smooth_adv::smooth_adv;
pub use targets::Targets;
pub use trades::{augment_gaussian, stable, trades_perturb};

use crate::Result;

/// A network as an objective sees it: images `(b, h, w, c)` f32 in [0, 1] to logits `(b, classes)`.
pub type LogitsOf<'a> = &'a dyn Fn(&Tensor) -> Result<Tensor>;
