//! What the rest of the program knows about networks: two kinds of networks, and the configurations that build
//! them.

use std::fmt::Debug;

use candle_core::Tensor;

use super::{
    layers::BatchNormMode,
    params::{self, Builder},
};
use crate::Result;

/// A network that tells classes apart.
pub trait ClassifierNetwork: Send + Sync {
    /// `x`: `(b, h, w, c)` f32, pixels in [0, 1]. Returns the input of the last linear layer, `(b, features)`, and
    /// its output, the logits, `(b, num_classes)`. Batch norms, if there are any, are in this mode.
    ///
    /// Fails with [`Error::Usage`](crate::Error::Usage) if the shape of the images is not
    /// [`ClassifierArchitecture::image_shape`].
    fn features_and_logits(&self, x: &Tensor, mode: BatchNormMode) -> Result<(Tensor, Tensor)>;

    /// Multiply-adds of convolutions and linear layers for one image.
    fn macs(&self) -> u64;

    /// Only the logits, with batch norms in this mode.
    fn logits_by(&self, x: &Tensor, mode: BatchNormMode) -> Result<Tensor> {
        Ok(self.features_and_logits(x, mode)?.1)
    }

    /// Only the logits; those of an image do not depend on the rest of the batch.
    fn logits(&self, x: &Tensor) -> Result<Tensor> {
        self.logits_by(x, BatchNormMode::Eval)
    }
}

/// The configuration of a [`ClassifierNetwork`].
pub trait ClassifierArchitecture: Debug + Send + Sync {
    /// The number of logits.
    fn num_classes(&self) -> usize;

    /// (height, width, channels) of the input images.
    fn image_shape(&self) -> (usize, usize, usize);

    /// Whether the network normalises by batch statistics in training.
    fn has_batch_norm(&self) -> bool;

    /// Builds the network. Fails with [`Error::Data`](crate::Error::Data) if it cannot be built.
    fn build(&self, b: &Builder) -> Result<Box<dyn ClassifierNetwork>>;

    /// [`ClassifierNetwork::macs`] without making the parameters. Fails as [`Self::build`] does.
    fn macs(&self) -> Result<u64> {
        Ok(params::skeleton(|b| self.build(b))?.0.macs())
    }
}

/// A network that predicts the noise in an image, the image itself, or a mixture of both, given the noise level.
pub trait DenoiserNetwork: Send + Sync {
    /// `x`: `(b, h, w, c)` f32, pixels in [-1, 1] plus noise. `t`: `(b,)` f32, the noise level as given to the
    /// network: for a discrete process the step, from 0. `classes`: `(b,)` u32, given if and only if the network is
    /// conditional. Returns the shape of `x`, with twice the channels if it [predicts the
    /// variance](DenoiserArchitecture::predicts_variance).
    ///
    /// Fails with [`Error::Usage`](crate::Error::Usage) if images or classes do not fit the network.
    fn forward(&self, x: &Tensor, t: &Tensor, classes: Option<&Tensor>) -> Result<Tensor>;

    /// [`Self::forward`] in training. Anything random, such as dropout, is drawn for each of the samples `ids` from
    /// `(seed, id)` alone.
    fn forward_in_training(
        &self,
        x: &Tensor,
        t: &Tensor,
        classes: Option<&Tensor>,
        _: (u64, &[u64]),
    ) -> Result<Tensor> {
        self.forward(x, t, classes)
    }

    /// Multiply-adds of convolutions, linear layers and attention for one image of `height` × `width`.
    fn macs(&self, height: usize, width: usize) -> u64;
}

/// The configuration of a [`DenoiserNetwork`]: a JSON object with only the keys that it writes itself.
pub trait DenoiserArchitecture: Debug + Send + Sync {
    /// (height, width, channels) of the input and output images. Fails with [`Error::Data`](crate::Error::Data) if
    /// the configuration leaves their size open, or if the output has other channels, and not twice as many.
    fn image_shape(&self) -> Result<(usize, usize, usize)>;

    /// Whether the output has twice the channels of the image: then the latter half is a prediction of the variance
    /// (Nichol & Dhariwal 2021).
    fn predicts_variance(&self) -> bool {
        false
    }

    /// How many classes the network is conditioned on; `None` if it is not.
    fn num_classes(&self) -> Option<usize>;

    /// The values that are not supported, each as `key is value, expected …`.
    fn faults(&self) -> Vec<String>;

    /// Builds the network. Fails with [`Error::Data`](crate::Error::Data), naming all faults, if it cannot be built.
    fn build(&self, b: &Builder) -> Result<Box<dyn DenoiserNetwork>>;

    /// [`DenoiserNetwork::macs`] without making the parameters. Fails as [`Self::build`] and [`Self::image_shape`] do.
    fn macs(&self) -> Result<u64> {
        let (height, width, _) = self.image_shape()?;
        Ok(params::skeleton(|b| self.build(b))?.0.macs(height, width))
    }
}

/// Fails with [`Error::Data`](crate::Error::Data) if there are any faults.
pub(super) fn expect_none(faults: &[String]) -> Result<()> {
    match faults {
        [] => Ok(()),
        faults => bail!(Data, "{}", faults.join("; ")),
    }
}

/// Fails with [`Error::Data`](crate::Error::Data) if any of these settings is 0, naming the first.
pub(super) fn expect_positive(settings: &[(&str, usize)]) -> Result<()> {
    match settings.iter().find(|(_, value)| *value == 0) {
        Some((key, _)) => bail!(Data, "{key} is 0, expected at least 1"),
        None => Ok(()),
    }
}

/// Fails with [`Error::Data`](crate::Error::Data) if a classifier has no images to see or no classes to tell apart.
pub(super) fn expect_sizes(in_channels: usize, image_size: usize, num_classes: usize) -> Result<()> {
    expect_positive(&[("in_channels", in_channels), ("image_size", image_size), ("num_classes", num_classes)])
}

/// Multiply-adds of a network's stages for images of `side`, of which every stage after the first halves it; `of` has
/// those of a block for a number of positions.
pub(super) fn macs_of_stages<B>(
    mut side: usize,
    stages: &[impl AsRef<[B]>],
    of: impl Fn(&B, usize) -> u64,
) -> u64 {
    let mut macs = 0;
    for stage in stages {
        macs += stage.as_ref().iter().map(|block| of(block, side * side)).sum::<u64>();
        side = side.div_ceil(2);
    }
    macs
}

/// Fails with [`Error::Usage`](crate::Error::Usage) unless `x` holds square images of this size and number of
/// channels.
pub(super) fn expect_images(x: &Tensor, side: usize, channels: usize) -> Result<()> {
    let (_, h, w, c) = x.dims4()?;
    if (h, w, c) != (side, side, channels) {
        bail!(Usage, "images are {h} x {w} x {c}, the classifier expects {side} x {side} x {channels}");
    }
    Ok(())
}
