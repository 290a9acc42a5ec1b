//! What an attack that `evaluate --attack` knows by a name consists of. The list of them is `METHODS`, in the module above.

use std::fmt;

use super::{Attack, Example, Search, Threat};
use crate::rng;

/// The search for one image, within a ball, from the seed of the attack's draws.
type Begin = fn(Threat, u64, Example) -> Box<dyn Search>;

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
    begin: Begin,
}

impl Method {
    /// `key`: the key of its random draws, unique to this method.
    pub(super) const fn new(name: &'static str, key: u64, begin: Begin) -> Self {
        Self { name, key, begin }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// The attack within this ball.
    pub fn attack(self, threat: Threat, seed: u64) -> Box<dyn Attack> {
        // A different seed for each, because attacks that begin alike find the same.
        let seed = rng::uint(seed, self.key, rng::stream::ATTACK);
        Box::new(move |example| Ok((self.begin)(threat, seed, example)))
    }
}

impl fmt::Debug for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}
