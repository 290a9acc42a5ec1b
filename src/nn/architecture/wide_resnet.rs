//! The wide residual networks of the robustness benchmarks, in both forms found in RobustBench.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::{
    Result, kernels,
    nn::{
        layers::{BatchNorm, BatchNormMode, Conv2d, Linear, Standardization, to_compute},
        network::{
            ClassifierArchitecture, ClassifierNetwork, expect_images, expect_positive, expect_sizes,
            macs_of_stages,
        },
        params::Builder,
    },
};

named! {
    /// The activation function.
    pub enum Activation default Relu {
        /// max(x, 0).
        Relu = "relu",
        /// x · sigmoid(x), also called Swish: smoother, and the more robust of the two (Gowal et al. 2020, §4.4).
        Silu = "silu",
    }
}

/// Names of the parameters, and padding of the convolutions that halve the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WideResNetLayout {
    /// Zhang et al. 2019 (TRADES): `block1.layer.0.conv1`; one pixel of padding on each side.
    #[default]
    Trades,
    /// Gowal et al. 2020: `layer.0.block.0.conv_0`; TensorFlow's padding, one pixel below and to the right.
    Deepmind,
}

/// WRN-depth-width (Zagoruyko & Komodakis 2016): a 3 × 3 stem, three groups of pre-activation blocks, the mean over
/// the remaining positions, and a linear layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WideResNetConfig {
    /// Channels of the images, usually 1 or 3.
    pub in_channels: usize,
    /// Height and width of the images.
    pub image_size: usize,
    /// The number of logits.
    pub num_classes: usize,
    /// Number of layers: 4 plus a multiple of 6.
    pub depth: usize,
    /// The factor that widens the 16, 32 and 64 channels of the three groups.
    pub width: usize,
    /// The activation function.
    #[serde(default)]
    pub activation: Activation,
    /// Names and padding.
    #[serde(default)]
    pub layout: WideResNetLayout,
    /// The standardisation applied to the images first, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standardize: Option<Standardization>,
}

impl WideResNetConfig {
    /// Fails with [`Error::Data`](crate::Error::Data) at the first unsupported value.
    fn validate(&self) -> Result<()> {
        let Self { in_channels, image_size, num_classes, depth, width, layout, .. } = self;
        expect_sizes(*in_channels, *image_size, *num_classes)?;
        expect_positive(&[("width", *width)])?;
        if *depth < 10 || !(*depth - 4).is_multiple_of(6) {
            bail!(Data, "depth is {depth}, expected 10, 16, 22, 28, 34, … (4 and a multiple of 6)");
        }
        if *layout == WideResNetLayout::Deepmind && !image_size.is_multiple_of(4) {
            bail!(Data, "image_size is {image_size}, expected a multiple of 4 for the layout deepmind");
        }
        self.standardize.as_ref().map_or(Ok(()), |s| s.validate(*in_channels))
    }
}

impl ClassifierArchitecture for WideResNetConfig {
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
        Ok(Box::new(WideResNet::new(self, b)?))
    }
}

struct WideResNet {
    stem: Conv2d,
    groups: Vec<Vec<Block>>,
    norm: Norm,
    linear: Linear,
    config: WideResNetConfig,
}

impl WideResNet {
    fn new(config: &WideResNetConfig, b: &Builder) -> Result<Self> {
        config.validate()?;
        let &WideResNetConfig { in_channels, num_classes, depth, width, activation, layout, .. } = config;
        let channels = [16, 16 * width, 32 * width, 64 * width];
        let [stem, norm, linear] = match layout {
            WideResNetLayout::Trades => ["conv1", "bn1", "fc"],
            WideResNetLayout::Deepmind => ["init_conv", "batchnorm", "logits"],
        };
        let group = |i: usize| -> Result<Vec<Block>> {
            let b = match layout {
                WideResNetLayout::Trades => b.pp(format!("block{}", i + 1)).pp("layer"),
                WideResNetLayout::Deepmind => b.pp("layer").pp(i).pp("block"),
            };
            let block = |j: usize| {
                let (c_in, stride) = match j {
                    0 => (channels[i], if i == 0 { 1 } else { 2 }),
                    _ => (channels[i + 1], 1),
                };
                Block::new(c_in, channels[i + 1], stride, activation, layout, &b.pp(j))
            };
            (0..(depth - 4) / 6).map(block).collect()
        };
        Ok(Self {
            stem: Conv2d::without_bias(in_channels, channels[0], 3, 1, &b.pp(stem))?,
            groups: (0..3).map(group).collect::<Result<_>>()?,
            norm: Norm::new(channels[3], activation, &b.pp(norm))?,
            linear: Linear::new(channels[3], num_classes, &b.pp(linear))?,
            config: config.clone(),
        })
    }
}

impl ClassifierNetwork for WideResNet {
    fn features_and_logits(&self, x: &Tensor, mode: BatchNormMode) -> Result<(Tensor, Tensor)> {
        expect_images(x, self.config.image_size, self.config.in_channels)?;
        let x = Standardization::apply(self.config.standardize.as_ref(), x)?;
        let mut x = self.stem.forward(&to_compute(&x)?)?;
        for block in self.groups.iter().flatten() {
            x = block.forward(&x, mode)?;
        }
        let features = kernels::global_avg_pool(&self.norm.forward(&x, mode)?)?;
        let logits = self.linear.forward(&features)?;
        Ok((features, logits))
    }

    fn macs(&self) -> u64 {
        let side = self.config.image_size;
        let groups = macs_of_stages(side, &self.groups, Block::macs);
        self.stem.macs(side * side) + groups + self.linear.macs(1)
    }
}

/// Batch norm, then the activation.
struct Norm {
    norm: BatchNorm,
    activation: Activation,
}

impl Norm {
    fn new(channels: usize, activation: Activation, b: &Builder) -> Result<Self> {
        Ok(Self { norm: BatchNorm::new(channels, b)?, activation })
    }

    fn forward(&self, x: &Tensor, mode: BatchNormMode) -> Result<Tensor> {
        match self.activation {
            Activation::Relu => self.norm.forward(x, mode, true),
            Activation::Silu => kernels::silu(&self.norm.forward(x, mode, false)?),
        }
    }
}

/// Norm, activation and convolution, twice; then the input is added. Where the number of channels changes, the
/// shortcut is a 1 × 1 convolution after the first activation.
struct Block {
    norms: [Norm; 2],
    convs: [Conv2d; 2],
    shortcut: Option<Conv2d>,
}

impl Block {
    fn new(
        c_in: usize,
        c_out: usize,
        stride: usize,
        activation: Activation,
        layout: WideResNetLayout,
        b: &Builder,
    ) -> Result<Self> {
        let (norms, convs, shortcut) = match layout {
            WideResNetLayout::Trades => (["bn1", "bn2"], ["conv1", "conv2"], "convShortcut"),
            WideResNetLayout::Deepmind => (["batchnorm_0", "batchnorm_1"], ["conv_0", "conv_1"], "shortcut"),
        };
        let padding = match layout {
            WideResNetLayout::Deepmind if stride == 2 => (0, 1),
            _ => (1, 1),
        };
        let conv =
            |c_in, kernel, stride, name| Conv2d::without_bias(c_in, c_out, kernel, stride, &b.pp(name));
        let norm = |channels, name| Norm::new(channels, activation, &b.pp(name));
        let first = conv(c_in, 3, stride, convs[0])?.with_stride(stride, padding);
        let shortcut = (c_in != c_out).then(|| conv(c_in, 1, stride, shortcut)).transpose()?;
        let norms = [norm(c_in, norms[0])?, norm(c_out, norms[1])?];
        Ok(Self { norms, convs: [first, conv(c_out, 3, 1, convs[1])?], shortcut })
    }

    fn forward(&self, x: &Tensor, mode: BatchNormMode) -> Result<Tensor> {
        let active = self.norms[0].forward(x, mode)?;
        let inner = self.norms[1].forward(&self.convs[0].forward(&active)?, mode)?;
        let out = self.convs[1].forward(&inner)?;
        Ok(match &self.shortcut {
            Some(shortcut) => (shortcut.forward(&active)? + out)?,
            None => (x + out)?,
        })
    }

    /// Multiply-adds for an output of `positions` pixels.
    fn macs(&self, positions: usize) -> u64 {
        self.convs.iter().chain(&self.shortcut).map(|conv| conv.macs(positions)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::golden::Golden, *};
    use crate::nn::params;

    /// tests/golden/wide_resnet.py.
    fn config(layout: WideResNetLayout) -> WideResNetConfig {
        let deepmind = layout == WideResNetLayout::Deepmind;
        let standardize = Standardization { mean: vec![0.5, 0.4, 0.3], std: vec![0.2, 0.25, 0.3] };
        WideResNetConfig {
            in_channels: 3,
            image_size: 32,
            num_classes: 5,
            depth: 10,
            width: 1,
            activation: if deepmind { Activation::Silu } else { Activation::Relu },
            layout,
            standardize: deepmind.then_some(standardize),
        }
    }

    fn each(check: impl Fn(&Golden, &dyn Fn(&Builder) -> Result<WideResNet>)) {
        let files = [
            ("wide_resnet_trades", WideResNetLayout::Trades),
            ("wide_resnet_deepmind", WideResNetLayout::Deepmind),
        ];
        for (name, layout) in files {
            let build = |b: &Builder| WideResNet::new(&config(layout), b);
            check(&Golden::read(name, build), &build);
        }
    }

    #[test]
    fn names_are_those_of_robustbench() {
        each(|golden, build| golden.names_are_theirs(build));
    }

    #[test]
    fn logits_by_running_statistics_are_those_of_robustbench_and_move_nothing() {
        each(|golden, build| golden.evaluates_alike(build));
    }

    #[test]
    fn logits_gradients_and_running_statistics_of_a_training_step_are_those_of_robustbench() {
        each(|golden, build| golden.trains_alike(build));
    }

    /// The counts of the benchmark's largest networks, which can be counted without allocating them.
    #[test]
    fn the_networks_of_the_benchmark_have_the_known_parameters_and_multiply_adds() {
        for (depth, width, parameters, macs) in
            [(28, 10, 36_479_194, 5.2433e9), (34, 10, 46_160_474, 6.6589e9), (70, 16, 266_796_506, 38.76e9)]
        {
            for layout in [WideResNetLayout::Trades, WideResNetLayout::Deepmind] {
                let config = WideResNetConfig { depth, width, num_classes: 10, ..config(layout) };
                let (net, count) = params::skeleton(|b| WideResNet::new(&config, b)).unwrap();
                assert_eq!(count, parameters);
                assert!((net.macs() as f64 / macs - 1.0).abs() < 1e-3, "{}", net.macs());
            }
        }
    }

    #[test]
    fn what_cannot_be_built_is_named() {
        let error = |config: WideResNetConfig| config.validate().unwrap_err().to_string();
        let trades = || config(WideResNetLayout::Trades);
        assert!(
            error(WideResNetConfig { depth: 12, ..trades() }).starts_with("depth is 12, expected 10, 16")
        );
        assert_eq!(error(WideResNetConfig { width: 0, ..trades() }), "width is 0, expected at least 1");
        let deepmind = WideResNetConfig { image_size: 30, ..config(WideResNetLayout::Deepmind) };
        assert!(error(deepmind).starts_with("image_size is 30, expected a multiple of 4"));
        let standardize = Some(Standardization { mean: vec![0.5], std: vec![0.0] });
        let flat = WideResNetConfig { in_channels: 1, standardize, ..trades() };
        assert!(error(flat).starts_with("standardize has mean [0.5] and std [0.0], expected 1 numbers each"));
    }
}
