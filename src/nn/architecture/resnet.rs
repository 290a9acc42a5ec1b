//! Residual networks under the names of RobustBench's and torchvision's checkpoints.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::residual::{BasicBlock, Bottleneck, Preactivation, Residual};
use crate::{
    Result, kernels,
    nn::{
        layers::{BatchNorm, BatchNormMode, Conv2d, Linear, Standardization, to_compute},
        network::{ClassifierArchitecture, ClassifierNetwork, expect_images, expect_sizes},
        params::Builder,
    },
};

named! {
    /// What a residual block consists of.
    pub enum ResNetBlock default Basic {
        /// Two 3 × 3 convolutions, each with a norm behind it: ResNet-18 and 34.
        Basic = "basic",
        /// Convolutions of 1 × 1, 3 × 3 and 1 × 1, the last to four times as many channels: ResNet-50 and deeper ones.
        Bottleneck = "bottleneck",
        /// Two 3 × 3 convolutions, each with a norm before it; where the shape changes, the shortcut takes what comes
        /// out of the first ReLU: PreActResNet-18 of Rice et al. 2020.
        Preactivation = "preactivation",
        /// The same, but the shortcut takes the block's input: PreActResNet-18 of Wong et al. 2020.
        PreactivationRaw = "preactivation-raw",
    }
}

impl ResNetBlock {
    /// Whether norms come before the convolutions.
    pub fn is_preactivation(self) -> bool {
        matches!(self, Self::Preactivation | Self::PreactivationRaw)
    }
}

named! {
    /// What comes before the residual blocks.
    pub enum ResNetStem default Cifar {
        /// A 3 × 3 convolution, for images of about 32 pixels.
        Cifar = "cifar",
        /// A 7 × 7 convolution and a maximum over 3 × 3, each of stride 2, for images of 64 to 224 pixels.
        Imagenet = "imagenet",
    }
}

named! {
    /// Whose names the parameters have.
    pub enum ResNetLayout default RobustBench {
        /// RobustBench's: `shortcut` and `linear`.
        RobustBench = "robustbench",
        /// torchvision's: `downsample` and `fc`.
        Torchvision = "torchvision",
    }
}

/// ResNet (He et al. 2016): a stem, stages of residual blocks, the mean over the remaining positions, and a linear
/// layer. By default it is ResNet-18 in its form for small images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResNetConfig {
    /// Channels of the images, usually 1 or 3.
    pub in_channels: usize,
    /// Height and width of the images.
    pub image_size: usize,
    /// The number of logits.
    pub num_classes: usize,
    /// Channels of each stage, which bottlenecks multiply by four; every stage after the first halves the image.
    #[serde(default = "resnet18_widths")]
    pub widths: Vec<usize>,
    /// Residual blocks of each stage.
    #[serde(default = "resnet18_blocks")]
    pub blocks: Vec<usize>,
    /// What each of them consists of.
    #[serde(default, skip_serializing_if = "is_default")]
    pub block: ResNetBlock,
    /// Whether there are a norm and ReLU behind the last block, as in PreActResNet-18 of Rice et al. 2020.
    #[serde(default, skip_serializing_if = "is_default")]
    pub final_norm: bool,
    /// What comes before the blocks.
    #[serde(default, skip_serializing_if = "is_default")]
    pub stem: ResNetStem,
    /// The names of the parameters.
    #[serde(default, skip_serializing_if = "is_default")]
    pub layout: ResNetLayout,
    /// The side of the windows whose means go into the linear layer: 4 in the form for CIFAR, where image sizes
    /// other than 32 change the number of inputs accordingly. Without it the mean is over the whole image (adaptive
    /// pooling).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<usize>,
    /// The standardisation applied to the images first, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standardize: Option<Standardization>,
}

fn resnet18_widths() -> Vec<usize> {
    vec![64, 128, 256, 512]
}

fn resnet18_blocks() -> Vec<usize> {
    vec![2; 4]
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl ResNetConfig {
    /// ResNet-18.
    pub fn resnet18(in_channels: usize, image_size: usize, num_classes: usize) -> Self {
        Self {
            in_channels,
            image_size,
            num_classes,
            widths: resnet18_widths(),
            blocks: resnet18_blocks(),
            block: ResNetBlock::default(),
            final_norm: false,
            stem: ResNetStem::default(),
            layout: ResNetLayout::default(),
            pool: None,
            standardize: None,
        }
    }

    /// Fails with [`Error::Data`](crate::Error::Data) at the first unsupported value.
    fn validate(&self) -> Result<()> {
        let Self { in_channels, image_size, num_classes, widths, blocks, block, stem, layout, .. } = self;
        expect_sizes(*in_channels, *image_size, *num_classes)?;
        if widths.is_empty() || widths.contains(&0) {
            bail!(Data, "widths is {widths:?}, expected a positive number for each stage");
        }
        let stages = widths.len();
        if blocks.len() != stages || blocks.contains(&0) {
            bail!(Data, "blocks is {blocks:?}, expected a positive number for each of {stages} stages");
        }
        if block.is_preactivation() && (*stem, *layout) != Default::default() {
            bail!(Data, "stem is {stem} and layout {layout}, expected cifar and robustbench with {block}");
        }
        let side = self.last_side();
        if let Some(pool) = self.pool.filter(|pool| !(1..=side).contains(pool)) {
            bail!(Data, "pool is {pool}, expected 1 to {side}, the side of the last images");
        }
        self.standardize.as_ref().map_or(Ok(()), |s| s.validate(*in_channels))
    }

    /// The side of the images before the first stage.
    fn first_side(&self) -> usize {
        match self.stem {
            ResNetStem::Cifar => self.image_size,
            ResNetStem::Imagenet => self.image_size.div_ceil(4),
        }
    }

    /// The side of the images after the last stage.
    fn last_side(&self) -> usize {
        (1..self.widths.len()).fold(self.first_side(), |side, _| side.div_ceil(2))
    }

    /// Channels that come out of a block of this width.
    fn channels(&self, width: usize) -> usize {
        match self.block {
            ResNetBlock::Bottleneck => Bottleneck::EXPANSION * width,
            _ => width,
        }
    }
}

impl ClassifierArchitecture for ResNetConfig {
    fn num_classes(&self) -> usize {
        self.num_classes
    }

    fn image_shape(&self) -> (usize, usize, usize) {
        (self.image_size, self.image_size, self.in_channels)
    }

    fn has_batch_norm(&self) -> bool {
        true
    }

    fn build(&self, b: &Builder) -> Result<Box<dyn ClassifierNetwork>> {
        Ok(Box::new(ResNet::new(self, b)?))
    }
}

struct ResNet {
    conv1: Conv2d,
    /// The norm of the stem; with preactivation the first block begins with one.
    bn1: Option<BatchNorm>,
    /// Each with its stride.
    blocks: Vec<(usize, Box<dyn Residual>)>,
    /// The norm behind the last block.
    bn: Option<BatchNorm>,
    linear: Linear,
    config: ResNetConfig,
}

impl ResNet {
    fn new(config: &ResNetConfig, b: &Builder) -> Result<Self> {
        config.validate()?;
        let ResNetConfig { in_channels, num_classes, widths, blocks, block, stem, layout, .. } = config;
        let (kernel, stride) = match stem {
            ResNetStem::Cifar => (3, 1),
            ResNetStem::Imagenet => (7, 2),
        };
        let (shortcut, linear) = match layout {
            ResNetLayout::RobustBench => ("shortcut", "linear"),
            ResNetLayout::Torchvision => ("downsample", "fc"),
        };
        let norm =
            |channels, name, there: bool| there.then(|| BatchNorm::new(channels, &b.pp(name))).transpose();
        let conv1 = Conv2d::without_bias(*in_channels, widths[0], kernel, stride, &b.pp("conv1"))?;
        let bn1 = norm(widths[0], "bn1", !block.is_preactivation())?;
        let mut channels = widths[0];
        let mut built: Vec<(usize, Box<dyn Residual>)> = Vec::new();
        for (i, (&width, &n)) in widths.iter().zip(blocks).enumerate() {
            for j in 0..n {
                let b = b.pp(format!("layer{}", i + 1)).pp(j);
                let stride = if i > 0 && j == 0 { 2 } else { 1 };
                let block: Box<dyn Residual> = match *block {
                    ResNetBlock::Basic => Box::new(BasicBlock::new(channels, width, stride, shortcut, &b)?),
                    ResNetBlock::Bottleneck => {
                        Box::new(Bottleneck::new(channels, width, stride, shortcut, &b)?)
                    }
                    ResNetBlock::Preactivation | ResNetBlock::PreactivationRaw => {
                        let activated_shortcut = *block == ResNetBlock::Preactivation;
                        Box::new(Preactivation::new(channels, width, stride, activated_shortcut, &b)?)
                    }
                };
                built.push((stride, block));
                channels = config.channels(width);
            }
        }
        let windows = config.pool.map_or(1, |pool| (config.last_side() / pool).pow(2));
        Ok(Self {
            conv1,
            bn1,
            blocks: built,
            bn: norm(channels, "bn", config.final_norm)?,
            linear: Linear::new(windows * channels, *num_classes, &b.pp(linear))?,
            config: config.clone(),
        })
    }
}

impl ClassifierNetwork for ResNet {
    fn features_and_logits(&self, x: &Tensor, mode: BatchNormMode) -> Result<(Tensor, Tensor)> {
        let Self { conv1, bn1, blocks, bn, linear, config } = self;
        expect_images(x, config.image_size, config.in_channels)?;
        let norm = |bn: &Option<BatchNorm>, x: Tensor| match bn {
            Some(bn) => bn.forward(&x, mode, true),
            None => Ok(x),
        };
        let x = Standardization::apply(config.standardize.as_ref(), x)?;
        let mut x = norm(bn1, conv1.forward(&to_compute(&x)?)?)?;
        if config.stem == ResNetStem::Imagenet {
            x = kernels::max_pool2d(&x, 3, 2, 1)?;
        }
        for (_, block) in blocks {
            x = block.forward(&x, mode)?;
        }
        let x = norm(bn, x)?;
        let features = match config.pool {
            None => kernels::global_avg_pool(&x)?,
            // PyTorch flattens channel by channel.
            Some(pool) => kernels::avg_pool2d(&x, pool)?.permute((0, 3, 1, 2))?.flatten_from(1)?,
        };
        let logits = linear.forward(&features)?;
        Ok((features, logits))
    }

    fn macs(&self) -> u64 {
        let conv1_side = match self.config.stem {
            ResNetStem::Cifar => self.config.image_size,
            ResNetStem::Imagenet => self.config.image_size.div_ceil(2),
        };
        let mut side = self.config.first_side();
        let blocks = self.blocks.iter().map(|(stride, block)| {
            let before = side;
            side = side.div_ceil(*stride);
            block.macs(before.pow(2), side.pow(2))
        });
        self.conv1.macs(conv1_side.pow(2)) + blocks.sum::<u64>() + self.linear.macs(1)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::{super::golden::Golden, *};
    use crate::nn::params::{self, Params};

    /// tests/golden/resnet.py: odd images, a stage of two blocks, widths that differ.
    fn configs() -> Vec<(&'static str, ResNetConfig)> {
        let small = |image_size, widths: [usize; 3], block, stem, layout| ResNetConfig {
            widths: widths.into(),
            blocks: vec![1, 2, 1],
            block,
            stem,
            layout,
            ..ResNetConfig::resnet18(3, image_size, 5)
        };
        use ResNetBlock::{Basic, Bottleneck, Preactivation, PreactivationRaw};
        use ResNetLayout::{RobustBench, Torchvision};
        use ResNetStem::{Cifar, Imagenet};
        let wong = small(16, [4, 6, 8], PreactivationRaw, Cifar, RobustBench);
        let rice = small(16, [4, 6, 8], Preactivation, Cifar, RobustBench);
        let standardize = Some(Standardization { mean: vec![0.5, 0.4, 0.3], std: vec![0.2, 0.25, 0.3] });
        vec![
            ("resnet", small(9, [4, 6, 10], Basic, Cifar, RobustBench)),
            ("resnet_bottleneck", small(16, [4, 6, 8], Bottleneck, Cifar, RobustBench)),
            ("resnet_torchvision", small(35, [4, 6, 8], Basic, Imagenet, Torchvision)),
            ("resnet_torchvision_bottleneck", small(35, [4, 6, 8], Bottleneck, Imagenet, Torchvision)),
            ("preact_resnet", ResNetConfig { standardize, ..wong }),
            ("preact_resnet_final_norm", ResNetConfig { final_norm: true, ..rice }),
        ]
    }

    fn each(check: impl Fn(&Golden, &dyn Fn(&Builder) -> Result<ResNet>)) {
        for (name, config) in configs() {
            let build = |b: &Builder| ResNet::new(&config, b);
            check(&Golden::read(name, build), &build);
        }
    }

    #[test]
    fn names_are_those_of_robustbench_and_torchvision() {
        each(|golden, build| golden.names_are_theirs(build));
    }

    #[test]
    fn logits_by_running_statistics_are_those_of_the_originals_and_move_nothing() {
        each(|golden, build| golden.evaluates_alike(build));
    }

    #[test]
    fn logits_gradients_and_running_statistics_of_a_training_step_are_those_of_the_originals() {
        each(|golden, build| golden.trains_alike(build));
    }

    #[test]
    fn an_image_sees_its_batch_only_in_training() {
        let (name, config) = configs().swap_remove(0);
        let build = |b: &Builder| ResNet::new(&config, b);
        let golden = Golden::read(name, build);
        let (net, x) = (golden.params.frozen(build).unwrap(), golden.x());
        let first =
            |x: &Tensor, mode| net.logits_by(x, mode).unwrap().to_vec2::<f32>().unwrap().swap_remove(0);
        let alone = x.narrow(0, 0, 1).unwrap();
        assert_eq!(first(&x, BatchNormMode::Eval), first(&alone, BatchNormMode::Eval));
        assert_ne!(first(&x, BatchNormMode::Train), first(&alone, BatchNormMode::Train));
    }

    /// Counted by hand: stem 32² · 27 · 64; stage 1 32² · 4 · 576 · 64, a quarter of it for each convolution; in
    /// each later stage the first convolution has half the inputs, and a shortcut a ninth of that; linear 5120.
    #[test]
    fn resnet18_has_the_known_parameters_and_multiply_adds() {
        let config = ResNetConfig::resnet18(3, 32, 10);
        assert_eq!(params::skeleton(|b| ResNet::new(&config, b)).unwrap().1, 11_173_962);
        let stage = 150_994_944;
        let later = stage - stage / 8 + stage / 72;
        assert_eq!(config.macs().unwrap(), 1_769_472 + stage + 3 * later + 5120);
        assert_eq!(config.macs().unwrap(), 555_422_720);
    }

    /// Parameters as counted by torchvision 0.29 and RobustBench; multiply-adds as in torchvision's table of models
    /// (1.81 and 4.09 G).
    #[test]
    fn the_networks_of_the_benchmarks_have_the_known_parameters_and_multiply_adds() {
        let cifar = ResNetConfig::resnet18(3, 32, 10);
        let imagenet = ResNetConfig {
            stem: ResNetStem::Imagenet,
            layout: ResNetLayout::Torchvision,
            ..ResNetConfig::resnet18(3, 224, 1000)
        };
        let resnet50 = |config: &ResNetConfig| ResNetConfig {
            block: ResNetBlock::Bottleneck,
            blocks: vec![3, 4, 6, 3],
            ..config.clone()
        };
        let preactivation = ResNetConfig { block: ResNetBlock::PreactivationRaw, ..cifar.clone() };
        let networks = [
            (imagenet.clone(), 11_689_512, 1_814_073_344),
            (resnet50(&imagenet), 25_557_032, 4_089_184_256),
            (resnet50(&cifar), 23_520_842, 1_297_829_888),
            (preactivation, 11_171_146, 555_422_720),
        ];
        for (config, parameters, macs) in networks {
            let (net, count) = params::skeleton(|b| ResNet::new(&config, b)).unwrap();
            assert_eq!((count, net.macs()), (parameters, macs), "{config:?}");
        }
    }

    /// The form for CIFAR pools windows of 4 x 4: for images of 64 pixels four of them go into the linear layer.
    #[test]
    fn windows_are_flattened_channel_by_channel() {
        let config = ResNetConfig {
            widths: vec![2, 3],
            blocks: vec![1, 1],
            pool: Some(2),
            ..ResNetConfig::resnet18(3, 9, 5)
        };
        let build = |b: &Builder| ResNet::new(&config, b);
        let params = Params::init(1, &Device::Cpu, build).unwrap();
        let linear = params.vars().iter().find(|(name, _)| name == "linear.weight").unwrap();
        assert_eq!(linear.1.dims(), [5, 2 * 2 * 3]);
        let x: Vec<f32> = (0..2 * 81 * 3).map(|i| (i % 13) as f32 / 13.0).collect();
        let x = Tensor::from_vec(x, (2, 9, 9, 3), &Device::Cpu).unwrap();
        let net = params.frozen(build).unwrap();
        let windows = net.features_and_logits(&x, BatchNormMode::Eval).unwrap().0.to_vec2::<f32>().unwrap();
        // Windows of 5 x 5 images leave the last row and column out, so their mean is not that of all positions;
        // but the mean over a channel's windows is the same as that of one window of the four pixels' means.
        let config = ResNetConfig { pool: Some(4), ..config.clone() };
        let whole = Params::init(1, &Device::Cpu, |b| ResNet::new(&config, b)).unwrap();
        let net = whole.frozen(|b| ResNet::new(&config, b)).unwrap();
        let means = net.features_and_logits(&x, BatchNormMode::Eval).unwrap().0.to_vec2::<f32>().unwrap();
        for (windows, means) in windows.iter().zip(&means) {
            for (channel, mean) in windows.chunks(4).zip(means) {
                assert!(
                    (channel.iter().sum::<f32>() / 4.0 - mean).abs() < 1e-5,
                    "{channel:?}, expected {mean}"
                );
            }
        }
        let error = ResNetConfig { pool: Some(6), ..config }.validate().unwrap_err();
        assert_eq!(error.to_string(), "pool is 6, expected 1 to 5, the side of the last images");
    }

    #[test]
    fn what_cannot_be_built_is_named() {
        let config = ResNetConfig::resnet18(3, 32, 10);
        let error = ResNetConfig { blocks: vec![2, 2], ..config.clone() }.validate().unwrap_err();
        assert_eq!(error.to_string(), "blocks is [2, 2], expected a positive number for each of 4 stages");
        let error = ResNetConfig { num_classes: 0, ..config }.validate().unwrap_err();
        assert_eq!(error.to_string(), "num_classes is 0, expected at least 1");
        let block = ResNetBlock::Preactivation;
        let error = ResNetConfig { block, stem: ResNetStem::Imagenet, ..ResNetConfig::resnet18(3, 64, 10) };
        assert_eq!(
            error.validate().unwrap_err().to_string(),
            "stem is imagenet and layout robustbench, expected cifar and robustbench with preactivation"
        );
    }

    #[test]
    fn widths_and_blocks_are_by_default_those_of_resnet18() {
        let json = r#"{"in_channels": 3, "image_size": 32, "num_classes": 10}"#;
        let config: ResNetConfig = serde_json::from_str(json).unwrap();
        assert_eq!(config, ResNetConfig::resnet18(3, 32, 10));
        let written = serde_json::to_value(&config).unwrap();
        let keys: Vec<_> = written.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["blocks", "image_size", "in_channels", "num_classes", "widths"]);
    }
}
