//! The parts of the U-Net, under `diffusers`' names.

use std::cell::Cell;

use candle_core::{D, Shape, Tensor};

use super::config::UNetConfig;
use crate::{
    Result, kernels,
    nn::{
        layers::{Conv2d, GroupNorm, Linear},
        params::{Builder, Init, Packed},
    },
    rng,
};

/// Dropout in residual blocks in training, before the second convolution as in `diffusers`.
pub(super) struct Dropout<'a> {
    pub(super) rate: f64,
    pub(super) seed: u64,
    pub(super) ids: &'a [u64],
    /// The next block.
    pub(super) block: Cell<u32>,
}

impl Dropout<'_> {
    /// Zeros, and 1 / (1 - rate) for what is kept, for `channels` at the positions of `x`.
    pub(super) fn mask(&self, x: &Tensor, channels: usize) -> Result<Tensor> {
        let (b, h, w, _) = x.dims4()?;
        if b != self.ids.len() {
            bail!(Alarm, "dropout for {} samples, but there are {b}", self.ids.len());
        }
        let stream = rng::stream::DROPOUT + self.block.replace(self.block.get() + 1);
        let (rate, kept) = (self.rate as f32, (1.0 / (1.0 - self.rate)) as f32);
        let mut mask = vec![0f32; b * h * w * channels];
        for (sample, &id) in mask.chunks_exact_mut(h * w * channels).zip(self.ids) {
            rng::uniforms(self.seed, id, stream, sample);
            sample.iter_mut().for_each(|v| *v = if *v < rate { 0.0 } else { kept });
        }
        Ok(Tensor::from_vec(mask, (b, h, w, channels), x.device())?)
    }
}

/// `ResnetBlock2D`, all its parameters one vector: see [`kernels::resnet_block`].
pub(super) struct ResnetBlock {
    theta: Tensor,
    shape: kernels::ResnetBlock,
    packed: [Packed; 3],
}

impl ResnetBlock {
    pub(super) fn new(
        c_in: usize,
        c_out: usize,
        output_scale: f64,
        config: &UNetConfig,
        b: &Builder,
    ) -> Result<Self> {
        let shape = kernels::ResnetBlock {
            c_in,
            c_out,
            time_dim: config.time_dim(),
            groups: config.norm_num_groups,
            epsilon: config.norm_eps,
            scale_shift: config.scale_shift(),
            output_scale,
        };
        let parts = shape.parameters().into_iter().map(|(name, part)| {
            let init = match name {
                "norm1.weight" | "norm2.weight" => Init::Ones,
                "norm1.bias" | "norm2.bias" => Init::Zeros,
                "conv1.weight" | "conv1.bias" => Init::FanIn(9 * c_in),
                "conv2.weight" | "conv2.bias" => Init::FanIn(9 * c_out),
                "time_emb_proj.weight" | "time_emb_proj.bias" => Init::FanIn(shape.time_dim),
                _ => Init::FanIn(c_in),
            };
            (name, part, init)
        });
        let theta = b.flat(parts)?;
        let packed = ["conv1", "conv2", "conv_shortcut"].map(|name| b.packed(name));
        Ok(Self { theta, shape, packed })
    }

    /// `x`: `(b, h, w, c_in)`; `temb`: `(b, time)`, after its SiLU. Returns `(b, h, w, c_out)`.
    pub(super) fn forward(&self, x: &Tensor, temb: &Tensor, dropout: Option<&Dropout>) -> Result<Tensor> {
        let packed = self.packed.each_ref().map(Packed::get);
        let mask = dropout.map(|dropout| dropout.mask(x, self.shape.c_out)).transpose()?;
        kernels::resnet_block(x, temb, &self.theta, &self.shape, &packed, mask.as_ref())
    }

    pub(super) fn macs(&self, positions: usize) -> u64 {
        let macs = |(name, shape): (&str, Shape)| match (shape.rank(), name) {
            (1, _) => 0,
            (_, "time_emb_proj.weight") => shape.elem_count(),
            _ => shape.elem_count() * positions,
        };
        self.shape.parameters().into_iter().map(macs).sum::<usize>() as u64
    }
}

/// `Attention` from all positions to all others, plus the input.
pub(super) struct Attention {
    group_norm: Option<GroupNorm>,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    channels: usize,
    head_dim: usize,
    output_scale: f64,
}

impl Attention {
    pub(super) fn new(
        channels: usize,
        groups: Option<usize>,
        output_scale: f64,
        config: &UNetConfig,
        b: &Builder,
    ) -> Result<Self> {
        let linear = |b: &Builder| Linear::new(channels, channels, b);
        Ok(Self {
            group_norm: groups
                .map(|groups| GroupNorm::new(groups, channels, config.norm_eps, &b.pp("group_norm")))
                .transpose()?,
            // The second names are those of `diffusers` before 0.17, still found on the Hub.
            to_q: linear(&b.pp_or("to_q", "query"))?,
            to_k: linear(&b.pp_or("to_k", "key"))?,
            to_v: linear(&b.pp_or("to_v", "value"))?,
            to_out: linear(&b.pp_or("to_out.0", "proj_attn"))?,
            channels,
            head_dim: config.attention_head_dim.unwrap_or(channels),
            output_scale,
        })
    }

    /// `x`: `(b, h, w, channels)`. Returns its shape.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let positions = x.reshape((b, h * w, c))?;
        let normed = match &self.group_norm {
            Some(norm) => norm.forward(&positions)?,
            None => positions,
        };
        let heads = c / self.head_dim;
        let split = |x: Tensor| -> Result<Tensor> {
            if heads == 1 {
                return Ok(x);
            }
            let x = x.reshape((b, h * w, heads, self.head_dim))?.transpose(1, 2)?;
            Ok(x.contiguous()?.reshape((b * heads, h * w, self.head_dim))?)
        };
        let (q, k, v) =
            (self.to_q.forward(&normed)?, self.to_k.forward(&normed)?, self.to_v.forward(&normed)?);
        let mixed = kernels::attention(&split(q)?, &split(k)?, &split(v)?)?;
        let mixed = if heads == 1 {
            mixed
        } else {
            let mixed = mixed.reshape((b, heads, h * w, self.head_dim))?.transpose(1, 2)?;
            mixed.contiguous()?.reshape((b, h * w, c))?
        };
        let out = self.to_out.forward(&mixed)?.reshape((b, h, w, c))?;
        scaled(x + out, self.output_scale)
    }

    pub(super) fn macs(&self, positions: usize) -> u64 {
        4 * self.to_q.macs(positions) + (2 * positions * positions * self.channels) as u64
    }
}

/// A residual block, optionally followed by attention.
struct Layer {
    resnet: ResnetBlock,
    attention: Option<Attention>,
}

impl Layer {
    fn new(
        c_in: usize,
        c_out: usize,
        attention: bool,
        i: usize,
        config: &UNetConfig,
        b: &Builder,
    ) -> Result<Self> {
        let groups = Some(config.norm_num_groups);
        Ok(Self {
            resnet: ResnetBlock::new(c_in, c_out, 1.0, config, &b.pp("resnets").pp(i))?,
            attention: attention
                .then(|| Attention::new(c_out, groups, 1.0, config, &b.pp("attentions").pp(i)))
                .transpose()?,
        })
    }

    fn forward(&self, x: &Tensor, temb: &Tensor, dropout: Option<&Dropout>) -> Result<Tensor> {
        let x = self.resnet.forward(x, temb, dropout)?;
        match &self.attention {
            Some(attention) => attention.forward(&x),
            None => Ok(x),
        }
    }

    fn macs(&self, positions: usize) -> u64 {
        self.resnet.macs(positions) + self.attention.as_ref().map_or(0, |a| a.macs(positions))
    }
}

/// `DownBlock2D` and `AttnDownBlock2D`: layers of one resolution, then a convolution that halves the image.
pub(super) struct DownBlock {
    layers: Vec<Layer>,
    downsampler: Option<Conv2d>,
}

impl DownBlock {
    /// Resolution `i` of `config`.
    pub(super) fn new(i: usize, config: &UNetConfig, b: &Builder) -> Result<Self> {
        let channels = &config.block_out_channels;
        let (c_in, c_out) = (channels[i.saturating_sub(1)], channels[i]);
        let attention = config.down_block_types[i] == "AttnDownBlock2D";
        let layers = (0..config.layers_per_block)
            .map(|l| Layer::new(if l == 0 { c_in } else { c_out }, c_out, attention, l, config, b));
        let padding = (config.downsample_padding, 1);
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            downsampler: (i + 1 < channels.len())
                .then(|| Conv2d::new(c_out, c_out, 3, &b.pp("downsamplers.0.conv")))
                .transpose()?
                .map(|conv| conv.with_stride(2, padding)),
        })
    }

    /// Returns the smaller image; every intermediate image is pushed onto `skips`.
    pub(super) fn forward(
        &self,
        x: Tensor,
        temb: &Tensor,
        skips: &mut Vec<Tensor>,
        dropout: Option<&Dropout>,
    ) -> Result<Tensor> {
        let mut x = x;
        for layer in &self.layers {
            x = layer.forward(&x, temb, dropout)?;
            skips.push(x.clone());
        }
        if let Some(conv) = &self.downsampler {
            x = conv.forward(&x)?;
            skips.push(x.clone());
        }
        Ok(x)
    }

    /// The multiply-adds, and the remaining positions.
    pub(super) fn macs(&self, positions: usize) -> (u64, usize) {
        let layers: u64 = self.layers.iter().map(|layer| layer.macs(positions)).sum();
        match &self.downsampler {
            Some(conv) => (layers + conv.macs(positions / 4), positions / 4),
            None => (layers, positions),
        }
    }
}

/// `UNetMidBlock2D`: residual block, attention, residual block.
pub(super) struct MidBlock {
    first: ResnetBlock,
    attention: Option<Attention>,
    last: ResnetBlock,
}

impl MidBlock {
    pub(super) fn new(config: &UNetConfig, b: &Builder) -> Result<Self> {
        let channels = config.block_out_channels[config.block_out_channels.len() - 1];
        let (scale, groups) = (config.mid_block_scale_factor, config.mid_attention_groups());
        Ok(Self {
            first: ResnetBlock::new(channels, channels, scale, config, &b.pp("resnets.0"))?,
            attention: config
                .add_attention
                .then(|| Attention::new(channels, groups, scale, config, &b.pp("attentions.0")))
                .transpose()?,
            last: ResnetBlock::new(channels, channels, scale, config, &b.pp("resnets.1"))?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor, temb: &Tensor, dropout: Option<&Dropout>) -> Result<Tensor> {
        let mut x = self.first.forward(x, temb, dropout)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        self.last.forward(&x, temb, dropout)
    }

    pub(super) fn macs(&self, positions: usize) -> u64 {
        let attention = self.attention.as_ref().map_or(0, |a| a.macs(positions));
        self.first.macs(positions) + attention + self.last.macs(positions)
    }
}

/// `UpBlock2D` and `AttnUpBlock2D`: layers that each take a skip from the way down, then twice the size.
pub(super) struct UpBlock {
    layers: Vec<Layer>,
    upsampler: Option<Conv2d>,
}

impl UpBlock {
    /// Block `i`, counted from the coarsest.
    pub(super) fn new(i: usize, config: &UNetConfig, b: &Builder) -> Result<Self> {
        let coarse_first: Vec<_> = config.block_out_channels.iter().rev().copied().collect();
        let c_out = coarse_first[i];
        let c_prev = coarse_first[i.saturating_sub(1)];
        let c_next = coarse_first[(i + 1).min(coarse_first.len() - 1)];
        let attention = config.up_block_types[i] == "AttnUpBlock2D";
        let n_layers = config.layers_per_block + 1;
        let layers = (0..n_layers).map(|l| {
            let c_in = if l == 0 { c_prev } else { c_out };
            let c_skip = if l + 1 == n_layers { c_next } else { c_out };
            Layer::new(c_in + c_skip, c_out, attention, l, config, b)
        });
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            upsampler: (i + 1 < coarse_first.len())
                .then(|| Conv2d::new(c_out, c_out, 3, &b.pp("upsamplers.0.conv")))
                .transpose()?,
        })
    }

    /// Takes one image off `skips` for each layer.
    pub(super) fn forward(
        &self,
        x: Tensor,
        temb: &Tensor,
        skips: &mut Vec<Tensor>,
        dropout: Option<&Dropout>,
    ) -> Result<Tensor> {
        let mut x = x;
        for layer in &self.layers {
            let Some(skip) = skips.pop() else { bail!(Alarm, "the U-Net has more layers up than images") };
            x = layer.forward(&Tensor::cat(&[&x, &skip], D::Minus1)?, temb, dropout)?;
        }
        match &self.upsampler {
            Some(conv) => conv.forward(&kernels::upsample_nearest2x(&x)?),
            None => Ok(x),
        }
    }

    /// The multiply-adds, and the resulting positions.
    pub(super) fn macs(&self, positions: usize) -> (u64, usize) {
        let layers: u64 = self.layers.iter().map(|layer| layer.macs(positions)).sum();
        match &self.upsampler {
            Some(conv) => (layers + conv.macs(4 * positions), 4 * positions),
            None => (layers, positions),
        }
    }
}

/// A residual sum divided by its scale, which is nearly always 1.
fn scaled(sum: candle_core::Result<Tensor>, scale: f64) -> Result<Tensor> {
    let sum = sum?;
    if scale == 1.0 { Ok(sum) } else { Ok((sum / scale)?) }
}
