//! AutoAttack (Croce & Hein 2020): four attacks without parameters to choose, each on what the others left standing.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Apgd, Fab, Loss, Square, Threat, Victim};
use crate::Result;

/// Gradient steps of APGD and FAB.
pub const STEPS: usize = 100;
/// Random starts of APGD.
pub const RESTARTS: usize = 1;
/// Classes that the targeted attacks try.
pub const TARGETS: usize = 9;
/// Questions that Square asks about an image.
pub const QUERIES: usize = 5000;

/// The attacks that AutoAttack is made of, with its settings: 100 steps, one start, nine targets, 5,000 queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AutoAttack {
    /// APGD on the cross-entropy.
    ApgdCe,
    /// APGD on the difference of logits ratio; with two classes, where that is not defined, on the margin.
    ApgdDlr,
    /// APGD on the targeted difference of logits ratio; with fewer than four classes, where that is not defined, on the
    /// margin of the target.
    ApgdT,
    /// FAB towards each target.
    FabT,
    /// Square.
    Square,
}

impl AutoAttack {
    /// The version `standard`, in its order.
    pub const STANDARD: [Self; 4] = [Self::ApgdCe, Self::ApgdT, Self::FabT, Self::Square];

    /// Searches for adversarial images: for each one within the ball, if it was found. `images` in HWC order; `labels`
    /// and `ids`, the keys of all draws, one an image.
    pub fn run(
        self,
        victim: &Victim,
        threat: Threat,
        seed: u64,
        (images, labels, ids): (&[&[f32]], &[usize], &[u64]),
    ) -> Result<Vec<Option<Vec<f32>>>> {
        // Another seed for each: attacks that begin alike find alike.
        let seed = crate::rng::uint(seed, self as u64, crate::rng::stream::ATTACK);
        let apgd = Apgd { threat, steps: STEPS, restarts: RESTARTS, seed };
        match self {
            Self::ApgdCe => apgd.run(victim, Loss::CrossEntropy, images, labels, ids),
            Self::ApgdDlr => {
                let Some(first) = images.first() else { return Ok(Vec::new()) };
                let classes = victim.logits(&[first])?[0].len();
                let loss = if classes < 3 { Loss::Margin } else { Loss::Dlr };
                apgd.run(victim, loss, images, labels, ids)
            }
            Self::ApgdT => apgd.run_targeted(victim, TARGETS, images, labels, ids),
            Self::FabT => Fab { threat, steps: STEPS, targets: TARGETS }.run(victim, images, labels),
            Self::Square => Square { threat, queries: QUERIES, seed }.run(victim, images, labels, ids),
        }
    }
}

impl fmt::Display for AutoAttack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ApgdCe => "apgd-ce",
            Self::ApgdDlr => "apgd-dlr",
            Self::ApgdT => "apgd-t",
            Self::FabT => "fab-t",
            Self::Square => "square",
        })
    }
}
