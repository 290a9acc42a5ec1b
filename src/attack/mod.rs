//! Attacks: the worst image within a ball around the given one. Networks come in as closures.
//!
//! [`Pgd`] is for training: it runs on tensors, on the network's device. An [`Attack`] is for evaluation: each
//! image has a search of its own ([`search`]), so that its result does not depend on the other images, and a
//! finished image makes room for the next. The [`Method`]s are the attacks with a name.

mod apgd;
mod fab;
mod loss;
pub mod method;
mod pgd;
pub mod search;
mod square;
#[cfg(test)]
mod tests;
mod threat;

pub use apgd::{APGD_CE, APGD_DLR, APGD_T, Apgd};
pub use fab::{FAB, FAB_T};
pub use loss::Loss;
pub use method::Method;
pub use pgd::{Counted, Pgd, PgdConfig, PgdLoss, PgdSearch, ascend};
pub use search::{Attack, Example, Search, Victim};
pub use square::SQUARE;
pub use threat::{Epsilon, Norm, Threat};

/// The attacks with a name.
pub const METHODS: [Method; 6] = [APGD_CE, APGD_DLR, APGD_T, FAB, FAB_T, SQUARE];

/// AutoAttack's version `standard` (Croce & Hein 2020): four attacks without free parameters, each on the images
/// that withstood the ones before.
pub const STANDARD: [Method; 4] = [APGD_CE, APGD_T, FAB_T, SQUARE];

/// AutoAttack's version `plus`: six attacks, APGD and the untargeted FAB from several starts.
///
/// There is no version `rand`, whose APGD averages gradients over the draws of a randomised network: no classifier of
/// this program is one.
pub const PLUS: [Method; 6] =
    [APGD_CE.with_starts(method::STARTS), APGD_DLR.with_starts(method::STARTS), FAB, SQUARE, APGD_T, FAB_T];
