//! Which samples of a pool are kept: gates that refuse, one order that ranks, quotas.
//!
//! All of it works on columns: a few bytes for each sample of the pool, whatever its score table holds.

mod arm;
mod duplicates;
mod gate;
mod selector;

pub use arm::Arm;
pub use duplicates::{NearDuplicates, repeated};
pub use gate::{Condition, Gate, Operator, PASSED, verdicts};
pub use selector::{Group, keep_first};
