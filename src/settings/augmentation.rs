//! Augmentation of training images.

use serde::{Deserialize, Serialize};

use crate::data::Augment;

/// Random changes to training images.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AugmentationSettings {
    /// Pixels of padding before a random crop; 0 for no crop.
    #[arg(long, default_value_t = 0)]
    pub crop_pad: usize,
    /// Mirror images with probability 1/2. Unsuitable for digits.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub flip: bool,
}

impl AugmentationSettings {
    /// The augmentation.
    pub fn augment(&self) -> Augment {
        Augment { pad: self.crop_pad, flip: self.flip }
    }
}
