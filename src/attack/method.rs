//! What an attack that `evaluate --attack` knows by a name consists of. The list of them is `METHODS`, in the module above.

use std::fmt;

use super::{Attack, Threat};
use crate::rng;

/// Gradient steps of APGD and FAB.
pub const STEPS: usize = 100;
/// Random starts of APGD.
pub const RESTARTS: usize = 1;
/// How many classes the targeted attacks try.
pub const TARGETS: usize = 9;
/// Square's queries for each image.
pub const QUERIES: usize = 5000;

/// An attack with a name and the settings that it has in AutoAttack: [`STEPS`], [`RESTARTS`], [`TARGETS`],
/// [`QUERIES`].
#[derive(Clone, Copy)]
pub struct Method {
    name: &'static str,
    pub(super) key: u64,
    make: fn(Threat, u64) -> Box<dyn Attack>,
}

impl Method {
    /// `key`: the key of its random draws, unique to this method; `make`: makes the attack within a ball from the
    /// seed of its draws.
    pub(super) const fn new(name: &'static str, key: u64, make: fn(Threat, u64) -> Box<dyn Attack>) -> Self {
        Self { name, key, make }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// The attack within this ball.
    pub fn attack(self, threat: Threat, seed: u64) -> Box<dyn Attack> {
        // A different seed for each, because attacks that begin alike find the same.
        (self.make)(threat, rng::uint(seed, self.key, rng::stream::ATTACK))
    }
}

impl PartialEq for Method {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Method {}

impl fmt::Debug for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}
