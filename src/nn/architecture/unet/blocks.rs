//! The parts of the U-Net, under `diffusers`' names.

use candle_core::{D, Tensor};

use super::{
    super::parts::{Dropout, ResnetBlock, multi_head, scaled},
    config::UNetConfig,
};
use crate::{
    Result, kernels,
    nn::{
        layers::{Conv2d, GroupNorm, Linear},
        params::{Builder, Init},
    },
};

/// `ResnetBlock2D`.
fn resnet_block(
    c_in: usize,
    c_out: usize,
    output_scale: f64,
    config: &UNetConfig,
    b: &Builder,
) -> Result<ResnetBlock> {
    let shape = kernels::ResnetBlock {
        c_in,
        c_out,
        time_dim: config.time_dim(),
        groups: [config.norm_num_groups; 2],
        epsilon: config.norm_eps,
        scale_shift: config.scale_shift(),
        shortcut: c_in != c_out,
        output_scale,
    };
    let names = ["norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut"];
    ResnetBlock::new(shape, None, names, &|_, fan_in, _| [Init::FanIn(fan_in); 2], b)
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
        let (q, k, v) =
            (self.to_q.forward(&normed)?, self.to_k.forward(&normed)?, self.to_v.forward(&normed)?);
        let mixed = multi_head(&q, &k, &v, c / self.head_dim)?;
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
        let resnet = resnet_block(c_in, c_out, 1.0, config, &b.pp("resnets").pp(i))?;
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
        self.resnet.macs(positions).0 + self.attention.as_ref().map_or(0, |a| a.macs(positions))
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
        let resnet = |i: usize| resnet_block(channels, channels, scale, config, &b.pp("resnets").pp(i));
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
