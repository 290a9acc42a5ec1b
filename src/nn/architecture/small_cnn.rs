//! A small convolutional classifier without batch statistics: the logits of an image never depend on the rest of
//! the batch, which real/synthetic discriminators and attacks require.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::{
    Result, kernels,
    nn::{
        layers::{BatchNormMode, Conv2d, GroupNorm, Linear, to_compute},
        network::{ClassifierArchitecture, ClassifierNetwork, expect_images, expect_sizes, macs_of_stages},
        params::Builder,
    },
};

/// PyTorch's default for norms.
const NORM_EPS: f64 = 1e-5;

/// A 3 × 3 stem and two 3 × 3 convolutions per stage, each with GroupNorm and SiLU, then the mean over the image
/// and a linear layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SmallCnnConfig {
    /// Channels of the images, usually 1 or 3.
    pub in_channels: usize,
    /// Height and width of the images.
    pub image_size: usize,
    /// Channels of each stage; every stage after the first halves the image.
    pub channels: Vec<usize>,
    /// The number of logits.
    pub num_classes: usize,
    /// Groups of the norms: a divisor of all `channels`.
    pub groups: usize,
}

impl SmallCnnConfig {
    /// Fails with [`Error::Data`](crate::Error::Data) at the first unsupported value.
    fn validate(&self) -> Result<()> {
        let Self { in_channels, image_size, channels, num_classes, groups } = self;
        expect_sizes(*in_channels, *image_size, *num_classes)?;
        if channels.is_empty() || channels.contains(&0) {
            bail!(Data, "channels is {channels:?}, expected a positive number for each stage");
        }
        if *groups == 0 || !channels.iter().all(|c| c.is_multiple_of(*groups)) {
            bail!(Data, "groups is {groups}, expected a divisor of all channels {channels:?}");
        }
        Ok(())
    }
}

impl ClassifierArchitecture for SmallCnnConfig {
    fn num_classes(&self) -> usize {
        self.num_classes
    }

    fn image_shape(&self) -> (usize, usize, usize) {
        (self.image_size, self.image_size, self.in_channels)
    }

    fn has_batch_norm(&self) -> bool {
        false
    }

    fn build(&self, b: &Builder) -> Result<Box<dyn ClassifierNetwork>> {
        Ok(Box::new(SmallCnn::new(self, b)?))
    }
}

struct SmallCnn {
    stem: ConvNormSilu,
    stages: Vec<[ConvNormSilu; 2]>,
    fc: Linear,
    config: SmallCnnConfig,
}

impl SmallCnn {
    fn new(config: &SmallCnnConfig, b: &Builder) -> Result<Self> {
        config.validate()?;
        let channels = &config.channels;
        let layer = |c_in, c_out, stride, b: &Builder| {
            Ok::<_, crate::Error>(ConvNormSilu {
                conv: Conv2d::without_bias(c_in, c_out, 3, stride, &b.pp("conv"))?,
                norm: GroupNorm::new(config.groups, c_out, NORM_EPS, &b.pp("norm"))?,
            })
        };
        let stages = (0..channels.len()).map(|i| {
            let (c_in, c_out) = (channels[i.saturating_sub(1)], channels[i]);
            let b = b.pp("stages").pp(i);
            Ok([layer(c_in, c_out, if i == 0 { 1 } else { 2 }, &b.pp(0))?, layer(c_out, c_out, 1, &b.pp(1))?])
        });
        Ok(Self {
            stem: layer(config.in_channels, channels[0], 1, &b.pp("stem"))?,
            stages: stages.collect::<Result<_>>()?,
            fc: Linear::new(channels[channels.len() - 1], config.num_classes, &b.pp("fc"))?,
            config: config.clone(),
        })
    }
}

impl ClassifierNetwork for SmallCnn {
    fn features_and_logits(&self, x: &Tensor, _: BatchNormMode) -> Result<(Tensor, Tensor)> {
        expect_images(x, self.config.image_size, self.config.in_channels)?;
        let mut x = self.stem.forward(&to_compute(&x.affine(2.0, -1.0)?)?)?;
        for layer in self.stages.iter().flatten() {
            x = layer.forward(&x)?;
        }
        let features = kernels::global_avg_pool(&x)?;
        let logits = self.fc.forward(&features)?;
        Ok((features, logits))
    }

    fn macs(&self) -> u64 {
        let side = self.config.image_size;
        let macs = |layer: &ConvNormSilu, positions| layer.conv.macs(positions);
        macs(&self.stem, side * side) + macs_of_stages(side, &self.stages, macs) + self.fc.macs(1)
    }
}

struct ConvNormSilu {
    conv: Conv2d,
    norm: GroupNorm,
}

impl ConvNormSilu {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.norm.forward(&self.conv.forward(x)?, true)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::nn::Params;

    fn config() -> SmallCnnConfig {
        SmallCnnConfig { in_channels: 1, image_size: 7, channels: vec![4, 8], num_classes: 3, groups: 2 }
    }

    #[test]
    fn counts_are_those_of_the_layers() {
        let params = Params::init(0, &Device::Cpu, |b| SmallCnn::new(&config(), b)).unwrap();
        // stem 36 + 8; stage 0: 2 × (144 + 8); stage 1: 288 + 16 + 576 + 16; fc 27
        assert_eq!(params.count(), 36 + 8 + 2 * 152 + 896 + 27);
        // 7 × 7, then 4 × 4 positions
        assert_eq!(config().macs().unwrap(), 49 * (36 + 2 * 144) + 16 * (288 + 576) + 24);
    }

    #[test]
    fn logits_of_an_image_do_not_depend_on_its_batch() {
        let params = Params::init(5, &Device::Cpu, |b| SmallCnn::new(&config(), b)).unwrap();
        let net = params.frozen(|b| SmallCnn::new(&config(), b)).unwrap();
        let x = Tensor::from_vec(
            (0..3 * 49).map(|i| (i % 11) as f32 / 10.0).collect(),
            (3, 7, 7, 1),
            &Device::Cpu,
        );
        let x: Tensor = x.unwrap();
        let together = net.logits(&x).unwrap().to_vec2::<f32>().unwrap();
        let alone = net.logits(&x.narrow(0, 1, 1).unwrap()).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(together[1].len(), 3);
        for (a, b) in together[1].iter().zip(&alone[0]) {
            assert!((a - b).abs() < 1e-5, "{together:?} {alone:?}");
        }
        assert_ne!(together[0], together[1]);
    }

    #[test]
    fn images_of_another_shape_are_refused() {
        let params = Params::init(5, &Device::Cpu, |b| SmallCnn::new(&config(), b)).unwrap();
        let net = params.frozen(|b| SmallCnn::new(&config(), b)).unwrap();
        let x = Tensor::zeros((1, 8, 8, 1), candle_core::DType::F32, &Device::Cpu).unwrap();
        let error = net.logits(&x).err().unwrap();
        assert_eq!(error.to_string(), "images are 8 x 8 x 1, the classifier expects 7 x 7 x 1");
    }

    #[test]
    fn a_configuration_that_cannot_be_built_is_named() {
        let error = SmallCnnConfig { groups: 3, ..config() }.validate().unwrap_err();
        assert_eq!(error.to_string(), "groups is 3, expected a divisor of all channels [4, 8]");
    }
}
