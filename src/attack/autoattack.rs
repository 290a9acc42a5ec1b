//! The attacks by their names, and AutoAttack (Croce & Hein 2020): four of them without parameters to choose, each on what the
//! others left standing.

use super::{APGD_CE, APGD_DLR, APGD_T, FAB_T, Method, SQUARE};

/// All attacks that go by a name.
pub const METHODS: [Method; 5] = [APGD_CE, APGD_DLR, APGD_T, FAB_T, SQUARE];

/// AutoAttack's version `standard`, in its order.
pub const STANDARD: [Method; 4] = [APGD_CE, APGD_T, FAB_T, SQUARE];
