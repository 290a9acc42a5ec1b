//! The U-Net of denoising diffusion models (Ho et al. 2020, App. B): `diffusers`' `UNet2DModel`.

mod blocks;
mod config;

use blocks::Resolution;
use candle_core::{Device, Tensor};
pub use config::{SampleSize, UNetConfig};

use super::parts::{Dropout, expect_images, image_shape, sinusoids, with_classes};
use crate::{
    Result, kernels,
    nn::{
        layers::{Conv2d, Embedding, GroupNorm, Linear, to_compute},
        network::{DenoiserArchitecture, DenoiserNetwork, expect_none},
        params::Builder,
    },
};

/// Names and layouts of the parameters are those of `diffusers`' `UNet2DModel`.
struct UNet {
    conv_in: Conv2d,
    time_embedding: (Linear, Linear),
    class_embedding: Option<Embedding>,
    down_blocks: Vec<Resolution>,
    mid_block: Resolution,
    up_blocks: Vec<Resolution>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    config: UNetConfig,
}

impl UNet {
    fn new(config: &UNetConfig, b: &Builder) -> Result<Self> {
        expect_none(&config.faults())?;
        let (first, time_dim) = (config.block_out_channels[0], config.time_dim());
        let (groups, epsilon) = (config.norm_num_groups, config.norm_eps);
        let blocks = 0..config.block_out_channels.len();
        let time = b.pp("time_embedding");
        let embedding = |classes| Embedding::new(classes, time_dim, &b.pp("class_embedding"));
        let down = |i| Resolution::down(i, config, &b.pp("down_blocks").pp(i));
        let up = |i| Resolution::up(i, config, &b.pp("up_blocks").pp(i));
        Ok(Self {
            conv_in: Conv2d::new(config.in_channels, first, 3, &b.pp("conv_in"))?,
            time_embedding: (
                Linear::new(first, time_dim, &time.pp("linear_1"))?,
                Linear::new(time_dim, time_dim, &time.pp("linear_2"))?,
            ),
            class_embedding: config.num_class_embeds.map(embedding).transpose()?,
            down_blocks: blocks.clone().map(down).collect::<Result<_>>()?,
            mid_block: Resolution::middle(config, &b.pp("mid_block"))?,
            up_blocks: blocks.map(up).collect::<Result<_>>()?,
            conv_norm_out: GroupNorm::new(groups, first, epsilon, &b.pp("conv_norm_out"))?,
            conv_out: Conv2d::new(first, config.out_channels, 3, &b.pp("conv_out"))?,
            config: config.clone(),
        })
    }

    fn forward_with(
        &self,
        x: &Tensor,
        t: &Tensor,
        class_labels: Option<&Tensor>,
        dropout: Option<&Dropout>,
    ) -> Result<Tensor> {
        expect_images(x, self.config.in_channels, self.config.size_multiple())?;
        let temb = self.embed(t, class_labels)?;
        let x = if self.config.center_input_sample { x.affine(2.0, -1.0)? } else { x.clone() };
        let given = x.dtype();
        let mut x = self.conv_in.forward(&to_compute(&x)?)?;
        let mut skips = vec![x.clone()];
        for block in &self.down_blocks {
            x = block.forward_down(x, &temb, &mut skips, dropout)?;
        }
        x = self.mid_block.forward(x, &temb, dropout)?;
        for block in &self.up_blocks {
            x = block.forward_up(x, &temb, &mut skips, dropout)?;
        }
        Ok(self.conv_out.forward(&self.conv_norm_out.forward(&x, true)?)?.to_dtype(given)?)
    }

    /// The embedding of step and class after the SiLU with which all residual blocks begin: `(b, time)`.
    fn embed(&self, t: &Tensor, class_labels: Option<&Tensor>) -> Result<Tensor> {
        let (first, second) = &self.time_embedding;
        let sinusoids = sinusoids(t, &frequencies(&self.config, t.device())?, !self.config.flip_sin_to_cos)?;
        let mut temb = second.forward(&kernels::silu(&first.forward(&sinusoids)?)?)?;
        if let Some((embedding, classes)) = with_classes(self.class_embedding.as_ref(), class_labels)? {
            temb = (temb + embedding.forward(classes)?)?;
        }
        kernels::silu(&temb)
    }
}

impl DenoiserNetwork for UNet {
    /// Height and width are multiples of [`UNetConfig::size_multiple`].
    fn forward(&self, x: &Tensor, t: &Tensor, classes: Option<&Tensor>) -> Result<Tensor> {
        self.forward_with(x, t, classes, None)
    }

    /// With the configuration's dropout.
    fn forward_in_training(
        &self,
        x: &Tensor,
        t: &Tensor,
        classes: Option<&Tensor>,
        drawn: (u64, &[u64]),
    ) -> Result<Tensor> {
        self.forward_with(x, t, classes, Dropout::new(self.config.dropout, drawn).as_ref())
    }

    fn macs(&self, height: usize, width: usize) -> u64 {
        let mut positions = height * width;
        let (first, second) = &self.time_embedding;
        let mut macs = first.macs(1) + second.macs(1) + self.conv_in.macs(positions);
        for block in &self.down_blocks {
            let (block, left) = block.macs(positions, positions / 4);
            (macs, positions) = (macs + block, left);
        }
        macs += self.mid_block.macs(positions, positions).0;
        for block in &self.up_blocks {
            let (block, grown) = block.macs(positions, 4 * positions);
            (macs, positions) = (macs + block, grown);
        }
        macs + self.conv_out.macs(positions)
    }
}

impl DenoiserArchitecture for UNetConfig {
    fn image_shape(&self) -> Result<(usize, usize, usize)> {
        let Some(size) = self.sample_size else {
            bail!(Data, "the U-Net's sample_size is not set, expected the side of its images")
        };
        image_shape(size.height_width(), self.in_channels, self.out_channels)
    }

    fn predicts_variance(&self) -> bool {
        self.out_channels == 2 * self.in_channels
    }

    fn num_classes(&self) -> Option<usize> {
        self.num_class_embeds
    }

    fn faults(&self) -> Vec<String> {
        self.find_faults()
    }

    fn build(&self, b: &Builder) -> Result<Box<dyn DenoiserNetwork>> {
        Ok(Box::new(UNet::new(self, b)?))
    }
}

/// Frequencies from 1 down to 1/10000, `(block_out_channels[0] / 2,)`.
fn frequencies(config: &UNetConfig, device: &Device) -> Result<Tensor> {
    let half = config.block_out_channels[0] / 2;
    let exponent = |i| -(10_000f64).ln() * i as f64 / (half as f64 - config.freq_shift);
    let frequencies: Vec<_> = (0..half).map(|i| exponent(i).exp() as f32).collect();
    Ok(Tensor::from_vec(frequencies, half, device)?)
}

#[cfg(test)]
mod tests;
