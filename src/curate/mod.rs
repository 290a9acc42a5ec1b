//! Which samples of a pool are kept: gates that remove, one order that ranks, quotas per class.
//!
//! The selector streams: it holds one key for each sample that is kept.

mod rule;
mod selector;

pub use rule::{Arm, Candidate, Gates, Reason};
pub use selector::{Quota, Selector};
