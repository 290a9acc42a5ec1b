//! Architectures of denoisers.

use serde::{Deserialize, Serialize};

use crate::{
    Result,
    data::Shape,
    error::expect_within,
    nn::{DenoiserConfig, SampleSize, UNetConfig},
};

/// A U-Net.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UNetSettings {
    /// Channels of each level of the U-Net; each level after the first halves the image.
    #[arg(long, value_delimiter = ',', default_values_t = [32, 64])]
    pub block_out_channels: Vec<usize>,
    /// Residual blocks in each level on the way down; on the way up there is one more.
    #[arg(long, default_value_t = 1)]
    pub layers_per_block: usize,
    /// The levels that have attention, counted from 0; the middle block always has it.
    #[arg(long, value_delimiter = ',')]
    pub attention_levels: Vec<usize>,
    /// Channels per attention head.
    #[arg(long, default_value_t = 32)]
    pub attention_head_dim: usize,
    /// Number of groups in the group norms.
    #[arg(long, default_value_t = 8)]
    pub norm_num_groups: usize,
    /// Let the timestep and class scale and shift the features instead of being added to them (Dhariwal & Nichol
    /// 2021, §3).
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub scale_shift: bool,
    /// Dropout rate of the residual blocks in training (Ho et al. 2020: 0.1 for CIFAR-10).
    #[arg(long, default_value_t = 0.0)]
    pub dropout: f64,
}

impl UNetSettings {
    /// The network for square images of a shape. `num_class_embeds`: the number of classes that it is conditioned
    /// on, if any.
    ///
    /// Fails with [`Error::Usage`](crate::Error::Usage) for images that cannot be halved that often.
    pub fn config(
        &self,
        shape: Shape,
        num_class_embeds: Option<usize>,
        num_train_timesteps: usize,
    ) -> Result<UNetConfig> {
        let levels = self.block_out_channels.len();
        let unit = 1 << (levels - 1);
        if shape.height != shape.width || !shape.height.is_multiple_of(unit) {
            bail!(
                Usage,
                "block_out_channels has {levels} levels, expected square images whose side {unit} divides; found {shape}"
            );
        }
        let block = |level: usize, way: &str| {
            let attention = if self.attention_levels.contains(&level) { "Attn" } else { "" };
            format!("{attention}{way}Block2D")
        };
        Ok(UNetConfig {
            sample_size: Some(SampleSize::Square(shape.height)),
            in_channels: shape.channels,
            out_channels: shape.channels,
            down_block_types: (0..levels).map(|level| block(level, "Down")).collect(),
            up_block_types: (0..levels).rev().map(|level| block(level, "Up")).collect(),
            block_out_channels: self.block_out_channels.clone(),
            layers_per_block: self.layers_per_block,
            attention_head_dim: Some(self.attention_head_dim),
            norm_num_groups: self.norm_num_groups,
            num_class_embeds,
            num_train_timesteps: Some(num_train_timesteps),
            dropout: self.dropout,
            resnet_time_scale_shift: if self.scale_shift { "scale_shift" } else { "default" }.into(),
            ..UNetConfig::default()
        })
    }

    /// Fails with [`Error::Usage`](crate::Error::Usage) at the first impossible value.
    pub fn validate(&self) -> Result<()> {
        let Self { block_out_channels, attention_levels, norm_num_groups, .. } = self;
        expect_within("levels of block_out_channels", block_out_channels.len(), 1, 6)?;
        expect_within("layers_per_block", self.layers_per_block, 1, 16)?;
        expect_within("norm_num_groups", *norm_num_groups, 1, 1024)?;
        expect_within("attention_head_dim", self.attention_head_dim, 1, 4096)?;
        if let Some(c) = block_out_channels.iter().find(|c| **c == 0 || !c.is_multiple_of(*norm_num_groups)) {
            bail!(
                Usage,
                "block_out_channels has {c}, expected multiples of norm_num_groups = {norm_num_groups}"
            );
        }
        if let Some(level) = attention_levels.iter().find(|level| **level >= block_out_channels.len()) {
            bail!(Usage, "attention_levels has {level}, expected 0 to {}", block_out_channels.len() - 1);
        }
        expect_within("dropout", self.dropout, 0.0, 0.999)
    }
}

tagged! {
    /// The denoiser's network.
    pub enum DenoiserSettings("architecture", default "unet") {
        /// The U-Net of Ho et al. 2020, as in `diffusers`' UNet2DModel.
        UNet(UNetSettings) = "unet",
    }
}

impl DenoiserSettings {
    /// The network for square images of a shape; see [`UNetSettings::config`].
    pub fn config(
        &self,
        shape: Shape,
        num_class_embeds: Option<usize>,
        num_train_timesteps: usize,
    ) -> Result<DenoiserConfig> {
        match self {
            Self::UNet(unet) => {
                unet.config(shape, num_class_embeds, num_train_timesteps).map(DenoiserConfig::UNet)
            }
        }
    }

    /// Fails with [`Error::Usage`](crate::Error::Usage) at the first impossible value.
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::UNet(unet) => unet.validate(),
        }
    }

    /// A description in a few words.
    pub fn summary(&self) -> String {
        match self {
            Self::UNet(unet) => format!("U-Net {:?}", unet.block_out_channels),
        }
    }
}
