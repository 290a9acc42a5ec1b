//! AutoAttack (Croce & Hein 2020): four attacks without parameters to choose, each on what the others left standing.

use super::{APGD_CE, APGD_T, FAB_T, Method, SQUARE};

/// Gradient steps of APGD and FAB.
pub const STEPS: usize = 100;
/// Random starts of APGD.
pub const RESTARTS: usize = 1;
/// Classes that the targeted attacks try.
pub const TARGETS: usize = 9;
/// Questions that Square asks about an image.
pub const QUERIES: usize = 5000;

/// The version `standard`, in its order.
pub const STANDARD: [Method; 4] = [APGD_CE, APGD_T, FAB_T, SQUARE];
