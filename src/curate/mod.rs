//! Which samples of a pool are kept: gates that remove, one order that ranks, quotas per class.
//!
//! The selector streams: memory grows with what is kept, not with the pool.

mod rule;
mod selector;

pub use rule::{Arm, Candidate, Gates, Reason};
pub use selector::{Quota, Selector};
