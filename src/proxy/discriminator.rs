//! A robust discriminator at one radius: a binary network of its own, or a network for all radii that is told the
//! radius.

use std::sync::Arc;

use candle_core::Tensor;

use crate::{
    Result,
    nn::{Architecture, Classifier, ClassifierConfig},
};

/// The configuration of a discriminator of this architecture.
///
/// Fails with [`Error::Usage`](crate::Error::Usage) if it normalises by batch statistics, which would reveal the
/// source of a batch, and with [`Error::Data`](crate::Error::Data) unless it has two classes.
pub fn config(architecture: Architecture) -> Result<ClassifierConfig> {
    if architecture.has_batch_norm() {
        bail!(
            Usage,
            "the discriminators' architecture is {}, which normalises by statistics of the batch; expected one that does not, \
             as small_cnn",
            architecture.tag()
        );
    }
    let config = ClassifierConfig { architecture, class_names: vec!["real".into(), "synthetic".into()] };
    config.validate()?;
    Ok(config)
}

/// How a network is told the radius that it has to withstand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RadiusConditioning {
    /// Not at all: it was trained for a single radius.
    None,
    /// By an extra image channel that is constant: the radius divided by the largest radius, in [0, 1] like pixels.
    Plane(f32),
}

impl RadiusConditioning {
    /// The number of channels in addition to those of the image.
    pub fn channels(self) -> usize {
        usize::from(self != Self::None)
    }

    /// `x`: `(b, h, w, c)`, images in [0, 1]. Returns the network's input, `(b, h, w, c + channels)`.
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::None => Ok(x.clone()),
            Self::Plane(level) => {
                let (b, h, w, _) = x.dims4()?;
                let plane = Tensor::full(level, (b, h, w, 1), x.device())?;
                Ok(Tensor::cat(&[x, &plane], 3)?)
            }
        }
    }
}

/// A discriminator, ready to use.
#[derive(Clone)]
pub struct Discriminator {
    network: Arc<Classifier>,
    condition: RadiusConditioning,
}

impl Discriminator {
    /// The network with its radius condition.
    pub fn new(network: Arc<Classifier>, condition: RadiusConditioning) -> Self {
        Self { network, condition }
    }

    /// (height, width, channels) of the images that it takes.
    pub fn image_shape(&self) -> (usize, usize, usize) {
        let (h, w, c) = self.network.config().architecture.image_shape();
        (h, w, c.saturating_sub(self.condition.channels()))
    }

    /// `x`: `(b, h, w, c)` f32, pixels in [0, 1]. Returns the logits of real and synthetic, `(b, 2)`.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        self.network.logits(&self.condition.apply(x)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::nn::{ResNetConfig, SmallCnnConfig};

    #[test]
    fn a_network_that_sees_its_batch_is_no_discriminator() {
        let error = config(Architecture::Resnet(ResNetConfig::resnet18(1, 8, 2))).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("architecture is resnet, which normalises by"), "{error}");
        let small = |num_classes| {
            let channels = vec![4, 8];
            Architecture::SmallCnn(SmallCnnConfig {
                in_channels: 1,
                image_size: 8,
                channels,
                num_classes,
                groups: 2,
            })
        };
        assert_eq!(config(small(2)).unwrap().class_names, ["real", "synthetic"]);
        assert!(config(small(3)).unwrap_err().to_string().contains("expected num_classes = 3"));
    }

    #[test]
    fn the_plane_is_one_more_channel_and_lets_the_images_gradient_through() {
        let x: Vec<f32> = (0..2 * 9).map(|i| i as f32 / 18.0).collect();
        let x = Var::from_vec(x, (2, 3, 3, 1), &Device::Cpu).unwrap();
        let conditioned = RadiusConditioning::Plane(0.25).apply(x.as_tensor()).unwrap();
        assert_eq!(conditioned.dims(), [2, 3, 3, 2]);
        let plane = conditioned.narrow(3, 1, 1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(plane.iter().all(|&v| v == 0.25));
        let grads = conditioned.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let gradient = (grads.get(x.as_tensor()).unwrap() - (x.as_tensor() * 2.0).unwrap()).unwrap();
        let off = gradient.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(off < 1e-6, "{off}");
    }
}
