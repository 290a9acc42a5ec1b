//! What the stages that train share: the loop over steps with its moving average and checkpoints, and which image a batch
//! shows.

mod mix;
mod trainer;

pub(crate) use self::{
    mix::Mix,
    trainer::{Part, Trainer},
};
use crate::{Result, error::expect_within};

/// Refuses channels of a network's stages that its norms cannot divide into `groups`.
pub(crate) fn expect_channels(channels: &[usize], groups: usize) -> Result<()> {
    expect_within("groups", groups, 1, 4096)?;
    if channels.is_empty() || channels.iter().any(|c| *c == 0 || !c.is_multiple_of(groups)) {
        bail!(Usage, "channels is {channels:?}, expected multiples of groups = {groups}");
    }
    Ok(())
}
