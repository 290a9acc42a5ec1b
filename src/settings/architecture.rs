//! Architectures of classifiers.

use serde::{Deserialize, Serialize};

use super::flags::named;
use crate::{
    Result,
    data::Shape,
    error::expect_within,
    nn::{
        Activation, Architecture, ResNetBlock, ResNetConfig, ResNetLayout, ResNetStem, SmallCnnConfig,
        Standardization, WideResNetConfig, WideResNetLayout,
    },
};

/// A small convolutional network.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SmallCnnSettings {
    /// Channels of each stage of the network; every stage after the first halves the image.
    #[arg(long, value_delimiter = ',', default_values_t = [32, 64, 64])]
    pub channels: Vec<usize>,
    /// Number of groups in the group norms.
    #[arg(long, default_value_t = 8)]
    pub groups: usize,
}

/// A residual network.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResNetSettings {
    /// Channels of each stage of the network; every stage after the first halves the image.
    #[arg(long, value_delimiter = ',', default_values_t = [64, 128, 256, 512])]
    pub channels: Vec<usize>,
    /// Residual blocks of each stage; two each if left out.
    #[arg(long, value_delimiter = ',')]
    pub blocks: Vec<usize>,
    /// What a residual block consists of; basic if left out.
    #[arg(long, value_parser = named::<ResNetBlock>())]
    pub block: Option<ResNetBlock>,
    /// What comes before the blocks; cifar if left out. With imagenet the parameters are named as in torchvision, with
    /// cifar as in RobustBench.
    #[arg(long, value_parser = named::<ResNetStem>())]
    pub stem: Option<ResNetStem>,
    /// Standardise images by the mean and standard deviation of the real training images.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub standardize: bool,
}

/// A wide residual network.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WideResNetSettings {
    /// Number of layers: 4 plus a multiple of 6.
    #[arg(long, default_value_t = 28)]
    pub depth: usize,
    /// The factor that widens the 16, 32 and 64 channels of the three groups.
    #[arg(long, default_value_t = 10)]
    pub width: usize,
    /// The activation function. With silu the parameters are named as in RobustBench's DMWideResNet, with relu as
    /// in its WideResNet.
    #[arg(long, value_parser = named::<Activation>(), default_value_t = Activation::Relu)]
    pub activation: Activation,
    /// Standardise images by the mean and standard deviation of the real training images.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub standardize: bool,
}

tagged! {
    /// The classifier's network.
    pub enum ArchitectureSettings("architecture", default "small-cnn") {
        /// A small network of convolutions with group norm and SiLU; an image's result does not depend on its
        /// batch.
        SmallCnn(SmallCnnSettings) = "small-cnn",
        /// ResNet in its form for small images; ResNet-18 with the defaults.
        Resnet(ResNetSettings) = "resnet",
        /// WRN-depth-width; WRN-28-10 with the defaults.
        WideResnet(WideResNetSettings) = "wide-resnet",
    }
}

impl ArchitectureSettings {
    /// Whether the network standardises its images.
    pub fn standardizes(&self) -> bool {
        match self {
            Self::SmallCnn(_) => false,
            Self::Resnet(resnet) => resnet.standardize,
            Self::WideResnet(resnet) => resnet.standardize,
        }
    }

    /// The network for square images of a shape and this many classes. `standardize` is applied to the images
    /// first, if the network [standardises](Self::standardizes) them.
    pub fn network(
        &self,
        shape: Shape,
        num_classes: usize,
        standardize: Option<Standardization>,
    ) -> Architecture {
        let (in_channels, image_size) = (shape.channels, shape.height);
        match self {
            Self::SmallCnn(SmallCnnSettings { channels, groups }) => Architecture::SmallCnn(SmallCnnConfig {
                in_channels,
                image_size,
                channels: channels.clone(),
                num_classes,
                groups: *groups,
            }),
            Self::Resnet(ResNetSettings { channels, blocks, block, stem, .. }) => {
                Architecture::Resnet(ResNetConfig {
                    block: block.unwrap_or_default(),
                    final_norm: *block == Some(ResNetBlock::Preactivation),
                    stem: stem.unwrap_or_default(),
                    layout: match stem.unwrap_or_default() {
                        ResNetStem::Cifar => ResNetLayout::RobustBench,
                        ResNetStem::Imagenet => ResNetLayout::Torchvision,
                    },
                    widths: channels.clone(),
                    blocks: if blocks.is_empty() { vec![2; channels.len()] } else { blocks.clone() },
                    standardize,
                    ..ResNetConfig::resnet18(in_channels, image_size, num_classes)
                })
            }
            Self::WideResnet(WideResNetSettings { depth, width, activation, .. }) => {
                Architecture::WideResnet(WideResNetConfig {
                    in_channels,
                    image_size,
                    num_classes,
                    depth: *depth,
                    width: *width,
                    activation: *activation,
                    layout: match activation {
                        Activation::Relu => WideResNetLayout::Trades,
                        Activation::Silu => WideResNetLayout::Deepmind,
                    },
                    standardize,
                })
            }
        }
    }

    /// Whether the network normalises by batch statistics in training.
    pub fn has_batch_norm(&self) -> bool {
        self.network(Shape { height: 32, width: 32, channels: 3 }, 2, None).has_batch_norm()
    }

    /// Fails with [`Error::Usage`](crate::Error::Usage) at the first impossible value.
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::SmallCnn(SmallCnnSettings { channels, groups }) => {
                expect_within("groups", *groups, 1, 4096)?;
                if channels.is_empty() || channels.iter().any(|c| *c == 0 || !c.is_multiple_of(*groups)) {
                    bail!(Usage, "channels is {channels:?}, expected multiples of groups = {groups}");
                }
            }
            Self::Resnet(ResNetSettings { channels, blocks, block, stem, .. }) => {
                if let (Some(block), Some(ResNetStem::Imagenet)) = (block, stem)
                    && block.is_preactivation()
                {
                    bail!(Usage, "stem is imagenet, expected cifar with {block}");
                }
                if channels.is_empty() || channels.contains(&0) || blocks.contains(&0) {
                    bail!(Usage, "channels is {channels:?} and blocks {blocks:?}, expected positive numbers");
                }
                if !blocks.is_empty() && blocks.len() != channels.len() {
                    let stages = channels.len();
                    bail!(Usage, "blocks is {blocks:?}, expected a number for each of {stages} stages");
                }
            }
            Self::WideResnet(WideResNetSettings { depth, width, .. }) => {
                if *depth < 10 || !(depth - 4).is_multiple_of(6) {
                    bail!(Usage, "depth is {depth}, expected 10, 16, 22, 28, 34, …");
                }
                expect_within("width", *width, 1, 1024)?;
            }
        }
        Ok(())
    }
}
