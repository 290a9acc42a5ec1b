//! Attacks: the worst image within a ball around the given one. Networks come in as closures.

mod pgd;
mod threat;

pub use pgd::{Pgd, PgdConfig, pgd};
pub use threat::{Epsilon, Norm, Threat};
