//! Which samples of a pool are kept: gates that refuse samples, one order that ranks the rest, and quotas.
//!
//! Everything works on columns and takes a few bytes for each sample of the pool, whatever else its score table
//! holds.

mod arm;
mod duplicates;
mod gate;
mod selector;

pub use arm::Arm;
pub use duplicates::{NearDuplicates, repeated};
pub use gate::{Condition, Gate, Operator, PASSED, verdicts};
pub use selector::{Group, keep_first};
