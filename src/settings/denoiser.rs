//! Architectures of denoisers.

use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    data::Shape,
    error::expect_within,
    nn::{AdmConfig, DenoiserConfig, DhariwalUNetConfig, SampleSize, SongUNetConfig, UNetConfig},
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
    /// Fails with [`Error::Usage`] for images that cannot be halved that often.
    pub fn config(
        &self,
        shape: Shape,
        num_class_embeds: Option<usize>,
        num_train_timesteps: usize,
    ) -> Result<UNetConfig> {
        let levels = self.block_out_channels.len();
        expect_halved("block_out_channels", levels, shape)?;
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

    /// Fails with [`Error::Usage`] at the first impossible value.
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
        expect_levels(attention_levels, block_out_channels.len())?;
        expect_within("dropout", self.dropout, 0.0, 0.999)
    }
}

/// Fails with [`Error::Usage`] unless images are square and can be halved after each level but the last.
fn expect_halved(key: &str, levels: usize, shape: Shape) -> Result<()> {
    let multiple = 1 << (levels - 1);
    if shape.height != shape.width || !shape.height.is_multiple_of(multiple) {
        bail!(
            Usage,
            "{key} has {levels} levels, expected square images whose side {multiple} divides; found {shape}"
        );
    }
    Ok(())
}

/// Fails with [`Error::Usage`] at the first level that does not exist.
fn expect_levels(found: &[usize], levels: usize) -> Result<()> {
    match found.iter().find(|level| **level >= levels) {
        Some(level) => bail!(Usage, "attention_levels has {level}, expected 0 to {}", levels - 1),
        None => Ok(()),
    }
}

/// A U-Net whose levels have multiples of the same number of channels.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LevelsSettings {
    /// The channels of which each level has a multiple.
    #[arg(long, default_value_t = 32)]
    pub model_channels: usize,
    /// The multiple of each level; each level after the first halves the image.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2])]
    pub channel_mult: Vec<usize>,
    /// Residual blocks in each level on the way down; on the way up there is one more.
    #[arg(long, default_value_t = 1)]
    pub layers_per_block: usize,
    /// The levels that have attention, counted from 0; the middle block always has it.
    #[arg(long, value_delimiter = ',')]
    pub attention_levels: Vec<usize>,
    /// Dropout rate of the residual blocks in training (Ho et al. 2020: 0.1 for CIFAR-10).
    #[arg(long, default_value_t = 0.0)]
    pub dropout: f64,
}

impl LevelsSettings {
    /// DDPM++ for square images of a shape and this many classes.
    fn config(&self, shape: Shape, num_classes: Option<usize>) -> SongUNetConfig {
        SongUNetConfig {
            img_resolution: shape.height,
            in_channels: shape.channels,
            out_channels: shape.channels,
            label_dim: num_classes.unwrap_or(0),
            model_channels: self.model_channels,
            channel_mult: self.channel_mult.clone(),
            num_blocks: self.layers_per_block,
            attn_resolutions: self.attention_levels.iter().map(|level| shape.height >> level).collect(),
            dropout: self.dropout,
            ..SongUNetConfig::default()
        }
    }

    /// Fails with [`Error::Usage`] at the first impossible value.
    pub fn validate(&self) -> Result<()> {
        expect_within("levels of channel_mult", self.channel_mult.len(), 1, 6)?;
        for multiple in &self.channel_mult {
            expect_within("channel_mult", *multiple, 1, 64)?;
        }
        expect_within("model_channels", self.model_channels, 4, 4096)?;
        expect_within("layers_per_block", self.layers_per_block, 1, 16)?;
        expect_levels(&self.attention_levels, self.channel_mult.len())?;
        expect_within("dropout", self.dropout, 0.0, 0.999)
    }

    fn summary(&self) -> String {
        format!("{} x {:?}", self.model_channels, self.channel_mult)
    }
}

/// The U-Net of guided-diffusion.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdmSettings {
    /// Its levels.
    #[command(flatten)]
    #[serde(flatten)]
    pub levels: LevelsSettings,
    /// Channels per attention head.
    #[arg(long, default_value_t = 32)]
    pub attention_head_dim: usize,
    /// Let the timestep and class scale and shift the features instead of being added to them (Dhariwal & Nichol
    /// 2021, §3).
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub scale_shift: bool,
    /// Change the resolution within residual blocks instead of by convolutions (Dhariwal & Nichol 2021, §3).
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub resblock_updown: bool,
}

impl AdmSettings {
    fn config(&self, shape: Shape, num_classes: Option<usize>) -> AdmConfig {
        let levels = &self.levels;
        AdmConfig {
            image_size: shape.height,
            in_channels: shape.channels,
            out_channels: shape.channels,
            model_channels: levels.model_channels,
            channel_mult: levels.channel_mult.iter().map(|multiple| *multiple as f64).collect(),
            num_res_blocks: levels.layers_per_block,
            attention_resolutions: levels.attention_levels.iter().map(|level| 1 << level).collect(),
            dropout: levels.dropout,
            num_classes,
            num_head_channels: self.attention_head_dim as i64,
            use_scale_shift_norm: self.scale_shift,
            resblock_updown: self.resblock_updown,
            ..AdmConfig::default()
        }
    }
}

tagged! {
    /// The denoiser's network.
    pub enum DenoiserSettings("architecture", default "unet") {
        /// The U-Net of Ho et al. 2020, as in `diffusers`' UNet2DModel.
        UNet(UNetSettings) = "unet",
        /// The U-Net of Dhariwal & Nichol 2021, as in guided-diffusion's UNetModel, without a learned variance.
        Adm(AdmSettings) = "adm",
        /// DDPM++ of Song et al. 2021, as in EDM's SongUNet.
        DdpmPlusPlus(LevelsSettings) = "ddpm++",
        /// NCSN++ of Song et al. 2021, as in EDM's SongUNet; for the process edm.
        NcsnPlusPlus(LevelsSettings) = "ncsn++",
        /// The U-Net of Dhariwal & Nichol 2021, as in EDM's DhariwalUNet: attention is in heads of 64 channels, and
        /// absent below that.
        Dhariwal(LevelsSettings) = "dhariwal",
    }
}

impl DenoiserSettings {
    /// The network for square images of a shape and this many classes, if it is conditioned on them.
    ///
    /// Fails with [`Error::Usage`] for images that cannot be halved that often, and for channels that the network
    /// cannot have.
    pub fn config(
        &self,
        shape: Shape,
        num_classes: Option<usize>,
        num_train_timesteps: usize,
    ) -> Result<DenoiserConfig> {
        if let Some(levels) = self.levels() {
            expect_halved("channel_mult", levels.channel_mult.len(), shape)?;
        }
        let config = match self {
            Self::UNet(unet) => DenoiserConfig::UNet(unet.config(shape, num_classes, num_train_timesteps)?),
            Self::Adm(adm) => DenoiserConfig::Adm(adm.config(shape, num_classes)),
            Self::DdpmPlusPlus(levels) => DenoiserConfig::Song(levels.config(shape, num_classes)),
            Self::NcsnPlusPlus(levels) => DenoiserConfig::Song(SongUNetConfig {
                embedding_type: "fourier".into(),
                channel_mult_noise: 2,
                encoder_type: "residual".into(),
                resample_filter: vec![1.0, 3.0, 3.0, 1.0],
                ..levels.config(shape, num_classes)
            }),
            Self::Dhariwal(levels) => {
                DenoiserConfig::Dhariwal(DhariwalUNetConfig::from(levels.config(shape, num_classes)))
            }
        };
        config.macs().map_err(|e| Error::Usage(e.to_string()))?;
        Ok(config)
    }

    fn levels(&self) -> Option<&LevelsSettings> {
        match self {
            Self::UNet(_) => None,
            Self::Adm(adm) => Some(&adm.levels),
            Self::DdpmPlusPlus(levels) | Self::NcsnPlusPlus(levels) | Self::Dhariwal(levels) => Some(levels),
        }
    }

    /// Fails with [`Error::Usage`] at the first impossible value.
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::UNet(unet) => unet.validate()?,
            Self::Adm(adm) => expect_within("attention_head_dim", adm.attention_head_dim, 1, 4096)?,
            _ => {}
        }
        self.levels().map_or(Ok(()), LevelsSettings::validate)
    }

    /// A description in a few words.
    pub fn summary(&self) -> String {
        match self {
            Self::UNet(unet) => format!("U-Net {:?}", unet.block_out_channels),
            Self::Adm(adm) => format!("ADM {}", adm.levels.summary()),
            Self::DdpmPlusPlus(levels) => format!("DDPM++ {}", levels.summary()),
            Self::NcsnPlusPlus(levels) => format!("NCSN++ {}", levels.summary()),
            Self::Dhariwal(levels) => format!("DhariwalUNet {}", levels.summary()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::from_flags;

    const DIGITS: Shape = Shape { height: 8, width: 8, channels: 1 };

    #[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
    struct Settings {
        #[command(flatten)]
        architecture: DenoiserSettings,
    }

    fn settings(flags: &str) -> DenoiserSettings {
        let flags: Vec<String> = flags.split_whitespace().map(str::to_owned).collect();
        from_flags::<Settings>(&flags).unwrap().architecture
    }

    #[test]
    fn every_kind_makes_a_network_for_the_images_and_their_classes() {
        for kind in ["unet", "adm", "ddpm++", "ncsn++", "dhariwal"] {
            let settings = settings(&format!("--architecture {kind} --attention-levels 1"));
            settings.validate().unwrap();
            for classes in [None, Some(11)] {
                let config = settings.config(DIGITS, classes, 1000).unwrap();
                assert_eq!((config.image_shape().unwrap(), config.num_classes()), ((8, 8, 1), classes));
                assert!(!config.predicts_variance() && config.macs().unwrap() > 0, "{config:?}");
            }
            let odd = Shape { height: 9, width: 9, channels: 1 };
            assert_eq!(settings.config(odd, None, 1000).unwrap_err().exit_code(), 2);
        }
    }

    #[test]
    fn channels_that_a_network_cannot_have_are_told_before_it_is_made() {
        for (flags, expected) in [
            ("--architecture adm --model-channels 40", "expected multiples of 32 channels, found [40, 80]"),
            ("--architecture ddpm++ --model-channels 10", "30 channels cannot be normalised in 7 groups"),
            ("--architecture dhariwal --model-channels 36", "cannot be normalised in"),
        ] {
            let error = settings(flags).config(DIGITS, None, 1000).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(expected), "{error}");
        }
        let error =
            settings("--architecture ncsn++ --attention-levels 2").validate().unwrap_err().to_string();
        assert_eq!(error, "attention_levels has 2, expected 0 to 1");
    }
}
