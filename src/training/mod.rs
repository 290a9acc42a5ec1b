//! What the training stages share: the loop over steps with its moving average and checkpoints, and the choice of
//! the images in each batch.

mod mix;
mod trainer;

pub(crate) use self::{
    mix::{Draw, Mix},
    trainer::{Part, Trainer},
};
