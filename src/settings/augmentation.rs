//! Augmentation of training images.

use serde::{Deserialize, Serialize};

use crate::{
    Result,
    data::{Augment, Crop},
    error::expect_within,
};

/// Random changes to training images.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AugmentationSettings {
    /// Pixels of padding before a random crop; 0 for no crop.
    #[arg(long, default_value_t = 0)]
    pub crop_pad: usize,
    /// Show a random part of each image, of this share of its area or more, stretched to the image's size; 0.08 is
    /// usual for ImageNet.
    #[arg(long)]
    pub crop_area: Option<f64>,
    /// Mirror images with probability 1/2. Unsuitable for digits.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub flip: bool,
}

impl AugmentationSettings {
    /// The augmentation.
    pub fn augment(&self) -> Augment {
        Augment { crop: self.crop_area.map_or(Crop::Padded(self.crop_pad), Crop::Resized), flip: self.flip }
    }

    /// Fails with [`Error::Usage`](crate::Error::Usage) at the first impossible value.
    pub fn validate(&self) -> Result<()> {
        let Some(area) = self.crop_area else { return Ok(()) };
        if self.crop_pad > 0 {
            bail!(Usage, "crop_pad is {} and crop_area {area}, expected one of them", self.crop_pad);
        }
        expect_within("crop_area", area, 1e-6, 1.0)
    }
}
