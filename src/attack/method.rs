//! What an attack that `evaluate --attack` knows by a name consists of. The list of them is `METHODS`, in the module above.

use std::fmt;

use super::{Attack, Example, Search, Threat, search::Restarted};
use crate::rng;

/// The search for one image, within a ball, from the seed of the attack's draws and the number of the start.
type Begin = fn(Threat, u64, usize, Example) -> Box<dyn Search>;

/// Gradient steps of APGD and FAB.
pub const STEPS: usize = 100;
/// Starts of APGD and FAB in AutoAttack's version `plus`, and of FAB by itself.
pub const STARTS: usize = 5;
/// How many classes the targeted attacks try.
pub const TARGETS: usize = 9;
/// Square's queries for each image.
pub const QUERIES: usize = 5000;

/// An attack with a name and the settings that it has in AutoAttack: [`STEPS`], [`TARGETS`], [`QUERIES`], and one start
/// unless it is given more.
#[derive(Clone, Copy)]
pub struct Method {
    name: &'static str,
    pub(super) key: u64,
    starts: usize,
    begin: Begin,
}

impl Method {
    /// `key`: the key of its random draws, unique to this method.
    pub(super) const fn new(name: &'static str, key: u64, begin: Begin) -> Self {
        Self { name, key, starts: 1, begin }
    }

    /// The attack from this many starts in turn, until one of them finds something. The first is that of one start.
    pub(super) const fn with_starts(self, starts: usize) -> Self {
        Self { starts, ..self }
    }

    /// From how many starts it searches.
    pub fn starts(self) -> usize {
        self.starts
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// The attack within this ball.
    pub fn attack(self, threat: Threat, seed: u64) -> Box<dyn Attack> {
        // A different seed for each, because attacks that begin alike find the same.
        let seed = rng::uint(seed, self.key, rng::stream::ATTACK);
        let Self { starts, begin, .. } = self;
        Box::new(move |example: Example| {
            let search = move |start| begin(threat, seed.wrapping_add(start as u64), start, example.clone());
            Ok(Box::new(Restarted::new(starts, search)) as Box<dyn Search>)
        })
    }
}

impl fmt::Debug for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}
