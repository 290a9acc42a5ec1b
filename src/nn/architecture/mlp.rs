//! A denoiser of two linear layers for small images. It shows that for another network to train, sample and resume,
//! one file and its lines in `mod.rs` are enough.

use candle_core::{D, Tensor};
use serde::{Deserialize, Serialize};

use crate::{
    Result, kernels,
    nn::{
        layers::{Embedding, Linear},
        network::{DenoiserArchitecture, DenoiserNetwork},
        params::Builder,
    },
};

/// Number of sines and cosines of the noise level that the first layer gets in addition to the pixels.
const FREQUENCIES: usize = 4;

/// The shape of an [`Mlp`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MlpConfig {
    pub image_size: usize,
    pub channels: usize,
    pub hidden: usize,
    pub num_classes: Option<usize>,
}

impl MlpConfig {
    fn pixels(&self) -> usize {
        self.image_size * self.image_size * self.channels
    }
}

impl DenoiserArchitecture for MlpConfig {
    fn image_shape(&self) -> Result<(usize, usize, usize)> {
        Ok((self.image_size, self.image_size, self.channels))
    }

    fn num_classes(&self) -> Option<usize> {
        self.num_classes
    }

    fn faults(&self) -> Vec<String> {
        (self.hidden == 0).then(|| "hidden is 0, expected at least 1".into()).into_iter().collect()
    }

    fn build(&self, b: &Builder) -> Result<Box<dyn DenoiserNetwork>> {
        let embedding = |classes| Embedding::new(classes, self.hidden, &b.pp("class_embedding"));
        Ok(Box::new(Mlp {
            first: Linear::new(self.pixels() + 2 * FREQUENCIES, self.hidden, &b.pp("first"))?,
            class_embedding: self.num_classes.map(embedding).transpose()?,
            last: Linear::new(self.hidden, self.pixels(), &b.pp("last"))?,
        }))
    }
}

struct Mlp {
    first: Linear,
    class_embedding: Option<Embedding>,
    last: Linear,
}

impl DenoiserNetwork for Mlp {
    fn forward(&self, x: &Tensor, t: &Tensor, classes: Option<&Tensor>) -> Result<Tensor> {
        let frequencies: Vec<f32> = (0..FREQUENCIES).map(|i| 0.1f32.powi(i as i32)).collect();
        let frequencies = Tensor::from_vec(frequencies, (1, FREQUENCIES), t.device())?;
        let angles = t.unsqueeze(1)?.broadcast_mul(&frequencies)?;
        let told = Tensor::cat(&[x.flatten_from(1)?, angles.sin()?, angles.cos()?], D::Minus1)?;
        let mut hidden = self.first.forward(&told)?;
        if let (Some(embedding), Some(classes)) = (&self.class_embedding, classes) {
            hidden = (hidden + embedding.forward(classes)?)?;
        }
        Ok(self.last.forward(&kernels::silu(&hidden)?)?.reshape(x.shape())?)
    }

    fn macs(&self, _: usize, _: usize) -> u64 {
        self.first.macs(1) + self.last.macs(1)
    }
}
