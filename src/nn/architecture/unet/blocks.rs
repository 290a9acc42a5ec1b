//! The parts of the U-Net, under `diffusers`' names.

use std::cell::Cell;

use candle_core::{D, Tensor};

use super::config::UNetConfig;
use crate::{
    Result, kernels,
    nn::{
        layers::{Conv2d, GroupNorm, Linear, fused, fused_macs},
        params::{Builder, Packed},
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
        let theta = fused(shape.parameters(), b)?;
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
        fused_macs(self.shape.parameters(), positions)
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
        let norm = |groups| GroupNorm::new(groups, channels, config.norm_eps, &b.pp("group_norm"));
        let linear = |name, former| Linear::new(channels, channels, &b.pp_or(name, former));
        Ok(Self {
            group_norm: groups.map(norm).transpose()?,
            // The second names are those of `diffusers` before 0.17, still found on the Hub.
            to_q: linear("to_q", "query")?,
            to_k: linear("to_k", "key")?,
            to_v: linear("to_v", "value")?,
            to_out: linear("to_out.0", "proj_attn")?,
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
            Some(norm) => norm.forward(&positions, false)?,
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
        let sum = (x + self.to_out.forward(&mixed)?.reshape((b, h, w, c))?)?;
        // Nearly always 1.
        Ok(if self.output_scale == 1.0 { sum } else { (sum / self.output_scale)? })
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
        let resnet = ResnetBlock::new(c_in, c_out, 1.0, config, &b.pp("resnets").pp(i))?;
        let of_outputs = || Attention::new(c_out, groups, 1.0, config, &b.pp("attentions").pp(i));
        Ok(Self { resnet, attention: attention.then(of_outputs).transpose()? })
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

/// Layers of one resolution, then a convolution to the next one, if there is one.
pub(super) struct Resolution {
    layers: Vec<Layer>,
    resample: Option<Conv2d>,
}

impl Resolution {
    /// `DownBlock2D` and `AttnDownBlock2D` for resolution `i` of `config`: the convolution halves the image.
    pub(super) fn down(i: usize, config: &UNetConfig, b: &Builder) -> Result<Self> {
        let channels = &config.block_out_channels;
        let (c_in, c_out) = (channels[i.saturating_sub(1)], channels[i]);
        let attention = config.down_block_types[i] == "AttnDownBlock2D";
        let layers = (0..config.layers_per_block)
            .map(|l| Layer::new(if l == 0 { c_in } else { c_out }, c_out, attention, l, config, b));
        let padding = (config.downsample_padding, 1);
        let conv = || Conv2d::new(c_out, c_out, 3, &b.pp("downsamplers.0.conv"));
        let halve = || conv().map(|conv| conv.with_stride(2, padding));
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            resample: (i + 1 < channels.len()).then(halve).transpose()?,
        })
    }

    /// `UNetMidBlock2D`: residual block, attention, residual block.
    pub(super) fn middle(config: &UNetConfig, b: &Builder) -> Result<Self> {
        let channels = config.block_out_channels[config.block_out_channels.len() - 1];
        let (scale, groups) = (config.mid_block_scale_factor, config.mid_attention_groups());
        let resnet = |i: usize| ResnetBlock::new(channels, channels, scale, config, &b.pp("resnets").pp(i));
        let first = resnet(0)?;
        let attention = || Attention::new(channels, groups, scale, config, &b.pp("attentions.0"));
        let first = Layer { resnet: first, attention: config.add_attention.then(attention).transpose()? };
        let last = Layer { resnet: resnet(1)?, attention: None };
        Ok(Self { layers: vec![first, last], resample: None })
    }

    /// `UpBlock2D` and `AttnUpBlock2D` for resolution `i`, counted from the coarsest: each layer takes a skip from the
    /// way down, and the convolution is over twice the size.
    pub(super) fn up(i: usize, config: &UNetConfig, b: &Builder) -> Result<Self> {
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
        let convolution = || Conv2d::new(c_out, c_out, 3, &b.pp("upsamplers.0.conv"));
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            resample: (i + 1 < coarse_first.len()).then(convolution).transpose()?,
        })
    }

    /// On the way down: returns the smaller image; every intermediate image is pushed onto `skips`.
    pub(super) fn forward_down(
        &self,
        mut x: Tensor,
        temb: &Tensor,
        skips: &mut Vec<Tensor>,
        dropout: Option<&Dropout>,
    ) -> Result<Tensor> {
        for layer in &self.layers {
            x = layer.forward(&x, temb, dropout)?;
            skips.push(x.clone());
        }
        if let Some(conv) = &self.resample {
            x = conv.forward(&x)?;
            skips.push(x.clone());
        }
        Ok(x)
    }

    /// In the middle.
    pub(super) fn forward(&self, x: Tensor, temb: &Tensor, dropout: Option<&Dropout>) -> Result<Tensor> {
        self.layers.iter().try_fold(x, |x, layer| layer.forward(&x, temb, dropout))
    }

    /// On the way up: takes one image off `skips` for each layer.
    pub(super) fn forward_up(
        &self,
        mut x: Tensor,
        temb: &Tensor,
        skips: &mut Vec<Tensor>,
        dropout: Option<&Dropout>,
    ) -> Result<Tensor> {
        for layer in &self.layers {
            let Some(skip) = skips.pop() else { bail!(Alarm, "the U-Net has more layers up than images") };
            x = layer.forward(&Tensor::cat(&[&x, &skip], D::Minus1)?, temb, dropout)?;
        }
        match &self.resample {
            Some(conv) => conv.forward(&kernels::upsample_nearest2x(&x)?),
            None => Ok(x),
        }
    }

    /// The multiply-adds for `positions`, and how many positions there are then: `next` if the image is resampled.
    pub(super) fn macs(&self, positions: usize, next: usize) -> (u64, usize) {
        let layers: u64 = self.layers.iter().map(|layer| layer.macs(positions)).sum();
        match &self.resample {
            Some(conv) => (layers + conv.macs(next), next),
            None => (layers, positions),
        }
    }
}
