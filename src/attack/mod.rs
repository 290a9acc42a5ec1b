//! Attacks: the worst image within a ball around the given one. Networks come in as closures.
//!
//! [`pgd()`] serves training: it runs on tensors, where the network is. The attacks of [`AutoAttack`] serve evaluation:
//! each image is searched on its own ([`search`]), so that what is found for it does not depend on the images beside
//! it, and who has found leaves the batch.

mod apgd;
pub mod autoattack;
mod fab;
mod loss;
mod pgd;
pub mod search;
mod square;
#[cfg(test)]
mod tests;
mod threat;

pub use apgd::Apgd;
pub use autoattack::AutoAttack;
pub use fab::Fab;
pub use loss::Loss;
pub use pgd::{Pgd, PgdConfig, PgdLoss, ascend, pgd};
pub use search::Victim;
pub use square::Square;
pub use threat::{Epsilon, Norm, Threat};
