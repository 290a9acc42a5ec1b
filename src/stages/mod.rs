//! The stages, one a file, in folders that follow the data: images are made, judged, chosen, learned from, and told about.
//!
//! A new stage is a file in one of the folders, and its name in the folder's list.

pub mod choosing;
pub mod judging;
pub mod learning;
pub mod making;
pub mod telling;

use crate::stage::StageKind;

/// Every stage, in the order in which a run meets them.
pub fn all() -> impl Iterator<Item = &'static StageKind> {
    [making::STAGES, judging::STAGES, choosing::STAGES, learning::STAGES, telling::STAGES]
        .into_iter()
        .flatten()
}

/// The stage of this name, and its place in the order.
pub fn find(name: &str) -> Option<(usize, &'static StageKind)> {
    all().enumerate().find(|(_, kind)| kind.name == name)
}

/// The names of all stages, in order.
pub fn names() -> Vec<&'static str> {
    all().map(|kind| kind.name).collect()
}
