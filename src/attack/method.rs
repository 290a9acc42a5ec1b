//! The attacks by their names.

use std::fmt;

use super::{APGD_CE, APGD_DLR, APGD_T, Attack, FAB_T, SQUARE, Threat};
use crate::rng;

/// An attack that goes by a name, with the settings that it has in AutoAttack: 100 steps, one start, nine targets, 5,000
/// queries.
#[derive(Clone, Copy)]
pub struct Method {
    name: &'static str,
    pub(super) key: u64,
    make: fn(Threat, u64) -> Box<dyn Attack>,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 5] = [APGD_CE, APGD_DLR, APGD_T, FAB_T, SQUARE];

    /// `key`: that of its draws, which no other method has; `make`: the attack within a ball, by the seed of its draws.
    pub(super) const fn new(name: &'static str, key: u64, make: fn(Threat, u64) -> Box<dyn Attack>) -> Self {
        Self { name, key, make }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// The attack within this ball.
    pub fn attack(self, threat: Threat, seed: u64) -> Box<dyn Attack> {
        // Another seed for each: attacks that begin alike find alike.
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
