//! What the stages that train share: the loop over steps with its moving average and checkpoints, and which image a batch
//! shows.

mod mix;
mod trainer;

pub(crate) use self::{
    mix::Mix,
    trainer::{Part, Trainer},
};
