//! The residual network of the robustness benchmarks, under RobustBench's names.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::{
    Result, kernels,
    nn::{
        layers::{
            BatchNorm, BatchNormMode, Conv2d, Linear, RunningStatistics, Standardization, fused, fused_macs,
            to_compute,
        },
        network::{ClassifierArchitecture, ClassifierNetwork, expect_images, expect_sizes, macs_of_stages},
        params::{Builder, Packed},
    },
};

/// ResNet (He et al. 2016) in its form for small images: a 3 × 3 stem without pooling, stages of basic blocks, the
/// mean over the remaining positions, and a linear layer. By default `widths` and `blocks` are those of ResNet-18.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResNetConfig {
    /// Channels of the images, usually 1 or 3.
    pub in_channels: usize,
    /// Height and width of the images.
    pub image_size: usize,
    /// The number of logits.
    pub num_classes: usize,
    /// Channels of each stage; every stage after the first halves the image.
    #[serde(default = "resnet18_widths")]
    pub widths: Vec<usize>,
    /// Residual blocks of each stage.
    #[serde(default = "resnet18_blocks")]
    pub blocks: Vec<usize>,
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

impl ResNetConfig {
    /// ResNet-18.
    pub fn resnet18(in_channels: usize, image_size: usize, num_classes: usize) -> Self {
        let (widths, blocks) = (resnet18_widths(), resnet18_blocks());
        Self { in_channels, image_size, num_classes, widths, blocks, pool: None, standardize: None }
    }

    /// Fails with [`Error::Data`](crate::Error::Data) at the first unsupported value.
    fn validate(&self) -> Result<()> {
        let Self { in_channels, image_size, num_classes, widths, blocks, .. } = self;
        expect_sizes(*in_channels, *image_size, *num_classes)?;
        if widths.is_empty() || widths.contains(&0) {
            bail!(Data, "widths is {widths:?}, expected a positive number for each stage");
        }
        let stages = widths.len();
        if blocks.len() != stages || blocks.contains(&0) {
            bail!(Data, "blocks is {blocks:?}, expected a positive number for each of {stages} stages");
        }
        let side = self.last_side();
        if let Some(pool) = self.pool.filter(|pool| !(1..=side).contains(pool)) {
            bail!(Data, "pool is {pool}, expected 1 to {side}, the side of the last images");
        }
        self.standardize.as_ref().map_or(Ok(()), |s| s.validate(*in_channels))
    }

    /// The side of the images after the last stage.
    fn last_side(&self) -> usize {
        (1..self.widths.len()).fold(self.image_size, |side, _| side.div_ceil(2))
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
    bn1: BatchNorm,
    stages: Vec<Vec<BasicBlock>>,
    linear: Linear,
    config: ResNetConfig,
}

impl ResNet {
    fn new(config: &ResNetConfig, b: &Builder) -> Result<Self> {
        config.validate()?;
        let ResNetConfig { in_channels, num_classes, widths, blocks, .. } = config;
        let stages = blocks.iter().enumerate().map(|(i, &n)| {
            let b = b.pp(format!("layer{}", i + 1));
            let block = |j: usize| {
                let first = j == 0 && i > 0;
                let (c_in, stride) = if first { (widths[i - 1], 2) } else { (widths[i], 1) };
                BasicBlock::new(c_in, widths[i], stride, &b.pp(j))
            };
            (0..n).map(block).collect::<Result<_>>()
        });
        let windows = config.pool.map_or(1, |pool| (config.last_side() / pool).pow(2));
        Ok(Self {
            conv1: Conv2d::without_bias(*in_channels, widths[0], 3, 1, &b.pp("conv1"))?,
            bn1: BatchNorm::new(widths[0], &b.pp("bn1"))?,
            stages: stages.collect::<Result<_>>()?,
            linear: Linear::new(windows * widths[widths.len() - 1], *num_classes, &b.pp("linear"))?,
            config: config.clone(),
        })
    }
}

impl ClassifierNetwork for ResNet {
    fn features_and_logits(&self, x: &Tensor, mode: BatchNormMode) -> Result<(Tensor, Tensor)> {
        expect_images(x, self.config.image_size, self.config.in_channels)?;
        let x = Standardization::apply(self.config.standardize.as_ref(), x)?;
        let mut x = self.bn1.forward(&self.conv1.forward(&to_compute(&x)?)?, mode, true)?;
        for block in self.stages.iter().flatten() {
            x = block.forward(&x, mode)?;
        }
        let features = match self.config.pool {
            None => kernels::global_avg_pool(&x)?,
            // PyTorch flattens channel by channel.
            Some(pool) => kernels::avg_pool2d(&x, pool)?.permute((0, 3, 1, 2))?.flatten_from(1)?,
        };
        let logits = self.linear.forward(&features)?;
        Ok((features, logits))
    }

    fn macs(&self) -> u64 {
        let side = self.config.image_size;
        let stages = macs_of_stages(side, &self.stages, BasicBlock::macs);
        self.conv1.macs(side * side) + stages + self.linear.macs(1)
    }
}

/// All parameters of a block are one vector: see [`kernels::basic_block`].
struct BasicBlock {
    theta: Tensor,
    shape: kernels::BasicBlock,
    /// One for each norm.
    running: Vec<RunningStatistics>,
    packed: [Packed; 3],
}

impl BasicBlock {
    fn new(c_in: usize, c_out: usize, stride: usize, b: &Builder) -> Result<Self> {
        let shape = kernels::BasicBlock { c_in, c_out, stride, epsilon: BatchNorm::EPSILON };
        let theta = fused(shape.parameters(), b)?;
        let norms = ["bn1", "bn2", "shortcut.1"].into_iter().take(shape.norms());
        let running = norms.map(|name| RunningStatistics::new(c_out, &b.pp(name))).collect::<Result<_>>()?;
        let packed = ["conv1", "conv2", "shortcut.0"].map(|name| b.packed(name));
        Ok(Self { theta, shape, running, packed })
    }

    /// `x`: `(b, h, w, c_in)`. Returns `(b, h / stride, w / stride, c_out)`, rounded up.
    fn forward(&self, x: &Tensor, mode: BatchNormMode) -> Result<Tensor> {
        let packed = self.packed.each_ref().map(Packed::get);
        let running = match mode {
            BatchNormMode::Train => None,
            BatchNormMode::Eval => Some(self.running.iter().map(RunningStatistics::get).collect::<Vec<_>>()),
        };
        let (out, batch) = kernels::basic_block(x, &self.theta, running.as_deref(), &self.shape, &packed)?;
        for (running, batch) in self.running.iter().zip(&batch) {
            running.track(batch)?;
        }
        Ok(out)
    }

    /// Multiply-adds for an output of `positions` pixels.
    fn macs(&self, positions: usize) -> u64 {
        fused_macs(self.shape.parameters(), positions)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::{super::golden::Golden, *};
    use crate::nn::params::{self, Params};

    /// tests/golden/resnet.py: an odd image, a stage of two blocks, widths that differ.
    fn config() -> ResNetConfig {
        ResNetConfig { widths: vec![4, 6, 10], blocks: vec![1, 2, 1], ..ResNetConfig::resnet18(3, 9, 5) }
    }

    fn build(b: &Builder) -> Result<ResNet> {
        ResNet::new(&config(), b)
    }

    #[test]
    fn names_are_those_of_robustbench() {
        Golden::read("resnet", build).names_are_theirs(build);
    }

    #[test]
    fn logits_by_running_statistics_are_those_of_pytorch_and_move_nothing() {
        Golden::read("resnet", build).evaluates_alike(build);
    }

    #[test]
    fn logits_gradients_and_running_statistics_of_a_training_step_are_those_of_pytorch() {
        Golden::read("resnet", build).trains_alike(build);
    }

    #[test]
    fn an_image_sees_its_batch_only_in_training() {
        let golden = Golden::read("resnet", build);
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
    }

    #[test]
    fn widths_and_blocks_are_by_default_those_of_resnet18() {
        let json = r#"{"in_channels": 3, "image_size": 32, "num_classes": 10}"#;
        let config: ResNetConfig = serde_json::from_str(json).unwrap();
        assert_eq!(config, ResNetConfig::resnet18(3, 32, 10));
    }
}
