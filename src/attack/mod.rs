//! Attacks: the worst image within a ball around the given one. Networks come in as closures.
//!
//! [`pgd()`] serves training: it runs on tensors, where the network is. An [`Attack`] serves evaluation: each image is
//! searched on its own ([`search`]), so that what is found for it does not depend on the images beside it, and an image
//! that is done with makes place for the next. The [`Method`]s are those that go by a name.

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

pub use apgd::{APGD_CE, APGD_DLR, APGD_T, Apgd, ApgdT};
pub use fab::{FAB_T, Fab};
pub use loss::Loss;
pub use method::Method;
pub use pgd::{Counted, Pgd, PgdConfig, PgdLoss, PgdSearch, ascend, pgd};
pub use search::{Attack, Example, Search, Victim};
pub use square::{SQUARE, Square};
pub use threat::{Epsilon, Norm, Threat};

/// The attacks that go by a name.
pub const METHODS: [Method; 5] = [APGD_CE, APGD_DLR, APGD_T, FAB_T, SQUARE];

/// AutoAttack's version `standard` (Croce & Hein 2020): four attacks without parameters to choose, each on what the others left
/// standing.
pub const STANDARD: [Method; 4] = [APGD_CE, APGD_T, FAB_T, SQUARE];
