//! What the U-Nets have in common.

use std::{cell::Cell, fmt::Debug};

use candle_core::{D, Device, Shape, Tensor};

use crate::{
    Result, kernels,
    nn::{
        layers::{GroupNorm, fused_macs},
        params::{Builder, Init, Packed},
    },
    rng,
};

/// What is wrong with a configuration.
#[derive(Default)]
pub(super) struct Faults(pub(super) Vec<String>);

impl Faults {
    pub(super) fn one_of(&mut self, key: &str, value: &str, expected: &[&str]) {
        self.expect(key, value, expected.contains(&value), &expected.join(" or "));
    }

    pub(super) fn expect(&mut self, key: &str, value: impl Debug, ok: bool, expected: &str) {
        if !ok {
            self.0.push(format!("{key} is {value:?}, expected {expected}"));
        }
    }

    pub(super) fn expect_positive(&mut self, values: &[(&str, usize)]) {
        values.iter().for_each(|&(key, value)| self.expect(key, value, value > 0, "at least 1"));
    }
}

/// The shape of the images of a network. Fails with [`Error::Data`](crate::Error::Data) if its output has other channels,
/// and not twice as many.
pub(super) fn image_shape(
    (height, width): (usize, usize),
    in_channels: usize,
    out_channels: usize,
) -> Result<(usize, usize, usize)> {
    if out_channels != in_channels && out_channels != 2 * in_channels {
        bail!(
            Data,
            "out_channels is {out_channels}, expected {in_channels}, that of in_channels, or twice as many if the \
             variance is learned"
        );
    }
    Ok((height, width, in_channels))
}

/// Fails with [`Error::Usage`](crate::Error::Usage) unless images have these channels and can be halved as often as
/// the network does it.
pub(super) fn expect_images(x: &Tensor, channels: usize, multiple: usize) -> Result<()> {
    let (_, height, width, found) = x.dims4()?;
    if found != channels || !height.is_multiple_of(multiple) || !width.is_multiple_of(multiple) {
        bail!(
            Usage,
            "images are {height} x {width} x {found}, the model expects {channels} channels and sides that are \
             multiples of {multiple}"
        );
    }
    Ok(())
}

/// The embedding of the classes with the classes, if there are any. Fails with
/// [`Error::Usage`](crate::Error::Usage) if there is only one of them.
pub(super) fn with_classes<'a, E>(
    embedding: Option<&'a E>,
    classes: Option<&'a Tensor>,
) -> Result<Option<(&'a E, &'a Tensor)>> {
    match (embedding, classes) {
        (Some(embedding), Some(classes)) => Ok(Some((embedding, classes))),
        (None, None) => Ok(None),
        (Some(_), None) => bail!(Usage, "the model is conditioned on classes, but none were given"),
        (None, Some(_)) => bail!(Usage, "classes were given, but the model is not conditioned on them"),
    }
}

/// Sines and cosines of noise levels at these frequencies (Vaswani et al. 2017, §3.5): `t`: `(b,)`;
/// `frequencies`: `(half,)`. Returns `(b, 2 · half)`.
pub(super) fn sinusoids(t: &Tensor, frequencies: &Tensor, sines_first: bool) -> Result<Tensor> {
    let angles = t.unsqueeze(1)?.broadcast_mul(&frequencies.unsqueeze(0)?)?;
    let (sin, cos) = (angles.sin()?, angles.cos()?);
    let parts = if sines_first { [sin, cos] } else { [cos, sin] };
    Ok(Tensor::cat(&parts, D::Minus1)?)
}

/// Dropout in residual blocks in training, before the second convolution.
pub(super) struct Dropout<'a> {
    pub(super) rate: f64,
    pub(super) seed: u64,
    pub(super) ids: &'a [u64],
    /// The next block.
    pub(super) block: Cell<u32>,
}

impl<'a> Dropout<'a> {
    /// For these samples; `None` at the rate 0.
    pub(super) fn new(rate: f64, (seed, ids): (u64, &'a [u64])) -> Option<Self> {
        (rate > 0.0).then_some(Self { rate, seed, ids, block: Cell::new(0) })
    }

    /// Zeros, and 1 / (1 - rate) for what is kept, in this shape, `(b, h, w, channels)`.
    pub(super) fn mask(&self, shape: [usize; 4], device: &Device) -> Result<Tensor> {
        let [b, h, w, channels] = shape;
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
        Ok(Tensor::from_vec(mask, (b, h, w, channels), device)?)
    }
}

/// A filter that is applied to rows and columns when the resolution changes by two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Filter {
    /// 1, 1: the mean over adjacent pixels, and each pixel repeated.
    Box,
    /// 1, 3, 3, 1.
    Binomial,
}

impl Filter {
    /// The weights of a row, up to a factor.
    pub(super) fn weights(self) -> &'static [f64] {
        match self {
            Self::Box => &[1.0, 1.0],
            Self::Binomial => &[1.0, 3.0, 3.0, 1.0],
        }
    }

    /// The weights of a square, row by row; their sum is 1.
    pub(super) fn squared(self) -> &'static [f32] {
        const TAIL: [f32; 4] = [1.0 / 64.0, 3.0 / 64.0, 3.0 / 64.0, 1.0 / 64.0];
        const MIDDLE: [f32; 4] = [3.0 / 64.0, 9.0 / 64.0, 9.0 / 64.0, 3.0 / 64.0];
        match self {
            Self::Box => &[1.0 / 4.0; 4],
            Self::Binomial => [TAIL, MIDDLE, MIDDLE, TAIL].as_flattened(),
        }
    }

    /// The zeros on each side of an image that is halved.
    pub(super) fn padding(self) -> usize {
        self.weights().len() / 2 - 1
    }

    /// Half the resolution of images with even sides, `(b, h, w, c)`, with `padding` zeros on each side.
    pub(super) fn halve(self, x: &Tensor, padding: usize) -> Result<Tensor> {
        match self {
            Self::Box => kernels::avg_pool2d(x, 2),
            Self::Binomial => {
                let (_, h, w, _) = x.dims4()?;
                along_axes(x, &self.halving(h, padding, x)?, &self.halving(w, padding, x)?)
            }
        }
    }

    /// Twice the resolution: the transpose of halving, times 4.
    pub(super) fn double(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Box => kernels::upsample_nearest2x(x),
            Self::Binomial => {
                let (_, h, w, _) = x.dims4()?;
                let doubling =
                    |n: usize| -> Result<_> { Ok((self.halving(2 * n, self.padding(), x)?.t()? * 2.0)?) };
                along_axes(x, &doubling(h)?, &doubling(w)?)
            }
        }
    }

    /// The matrix that halves `n` pixels, of the type and on the device of `x`.
    fn halving(self, n: usize, padding: usize, x: &Tensor) -> Result<Tensor> {
        let weights = self.weights();
        let (sum, halved) = (weights.iter().sum::<f64>(), (n + 2 * padding - weights.len()) / 2 + 1);
        let mut matrix = vec![0f32; halved * n];
        for (i, row) in matrix.chunks_exact_mut(n).enumerate() {
            for (k, weight) in weights.iter().enumerate() {
                if let Some(pixel) = (2 * i + k).checked_sub(padding).filter(|pixel| *pixel < n) {
                    row[pixel] = (weight / sum) as f32;
                }
            }
        }
        Ok(Tensor::from_vec(matrix, (halved, n), x.device())?.to_dtype(x.dtype())?)
    }
}

/// Multiplies columns and rows of images by matrices. `x`: `(b, h, w, c)`; `down`: `(h', h)`; `across`: `(w', w)`.
/// Returns `(b, h', w', c)`.
fn along_axes(x: &Tensor, down: &Tensor, across: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let (new_h, new_w) = (down.dim(0)?, across.dim(0)?);
    let x = kernels::matmul(&down.broadcast_as((b, new_h, h))?, &x.reshape((b, h, w * c))?)?;
    let x = kernels::matmul(&across.broadcast_as((b * new_h, new_w, w))?, &x.reshape((b * new_h, w, c))?)?;
    Ok(x.reshape((b, new_h, new_w, c))?)
}

/// A change of resolution by two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Resampling {
    Down(Filter),
    Up(Filter),
}

impl Resampling {
    pub(super) fn apply(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Down(filter) => filter.halve(x, filter.padding()),
            Self::Up(filter) => filter.double(x),
        }
    }

    /// How many positions there are afterwards.
    pub(super) fn positions(self, before: usize) -> usize {
        match self {
            Self::Down(_) => before / 4,
            Self::Up(_) => 4 * before,
        }
    }
}

/// A residual block, all its parameters one vector: see [`kernels::resnet_block`].
pub(super) struct ResnetBlock {
    theta: Tensor,
    shape: kernels::ResnetBlock,
    packed: [Packed; 3],
    resampling: Option<Resampling>,
}

impl ResnetBlock {
    /// `names` are those of norm, convolution, step, norm, convolution and shortcut. `init` gives the initial weight and
    /// bias of a layer other than a norm by its name, fan-in and fan-out.
    pub(super) fn new(
        shape: kernels::ResnetBlock,
        resampling: Option<Resampling>,
        names: [&str; 6],
        init: &dyn Fn(&str, usize, usize) -> [Init; 2],
        b: &Builder,
    ) -> Result<Self> {
        let parameters = shape.parameters();
        let layer = |(layer, name): (&[(&str, Shape)], &str)| {
            let init = match *layer[0].1.dims() {
                [n_out, n_in, ref kernel @ ..] => {
                    let area: usize = kernel.iter().product();
                    init(name, n_in * area, n_out * area)
                }
                _ => [Init::Ones, Init::Zeros],
            };
            let [weight, bias] = [layer[0].1.clone(), layer[1].1.clone()];
            [(format!("{name}.weight"), weight, init[0]), (format!("{name}.bias"), bias, init[1])]
        };
        let theta = b.flat(parameters.chunks_exact(2).zip(names).flat_map(layer))?;
        let packed = [1, 4, 5].map(|convolution| b.packed(names[convolution]));
        Ok(Self { theta, shape, packed, resampling })
    }

    /// `x`: `(b, h, w, c_in)`; `temb`: `(b, time)`, after its SiLU. Returns `(b, h', w', c_out)`.
    pub(super) fn forward(&self, x: &Tensor, temb: &Tensor, dropout: Option<&Dropout>) -> Result<Tensor> {
        let Self { theta, shape, resampling, .. } = self;
        let (b, h, w, _) = x.dims4()?;
        let (h, w) = match resampling {
            None => (h, w),
            Some(Resampling::Down(_)) => (h / 2, w / 2),
            Some(Resampling::Up(_)) => (2 * h, 2 * w),
        };
        let packed = self.packed.each_ref().map(Packed::get);
        let mask = dropout.map(|dropout| dropout.mask([b, h, w, shape.c_out], x.device())).transpose()?;
        match resampling {
            None => kernels::resnet_block(x, temb, theta, shape, &packed, mask.as_ref()),
            Some(resampling) => {
                let resample = |x: &Tensor| resampling.apply(x);
                kernels::resampling_resnet_block(x, temb, theta, shape, &packed, mask.as_ref(), &resample)
            }
        }
    }

    /// The multiply-adds, and the resulting positions.
    pub(super) fn macs(&self, positions: usize) -> (u64, usize) {
        let positions = self.resampling.map_or(positions, |resampling| resampling.positions(positions));
        (fused_macs(self.shape.parameters(), positions), positions)
    }
}

/// Attention between all positions: `q`, `k`, `v`: `(b, n, c)`, each head with its part of the channels. Returns
/// their shape.
pub(super) fn multi_head(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
    if heads == 1 {
        return kernels::attention(q, k, v);
    }
    let (b, n, c) = q.dims3()?;
    let split = |x: &Tensor| -> Result<Tensor> {
        let x = x.reshape((b, n, heads, c / heads))?.transpose(1, 2)?;
        Ok(x.contiguous()?.reshape((b * heads, n, c / heads))?)
    };
    let mixed = kernels::attention(&split(q)?, &split(k)?, &split(v)?)?;
    let mixed = mixed.reshape((b, heads, n, c / heads))?.transpose(1, 2)?;
    Ok(mixed.contiguous()?.reshape((b, n, c))?)
}

/// A residual sum divided by its scale, which is often 1.
pub(super) fn scaled(sum: candle_core::Result<Tensor>, scale: f64) -> Result<Tensor> {
    let sum = sum?;
    if scale == 1.0 { Ok(sum) } else { Ok((sum / scale)?) }
}

/// How the outputs of the layer that makes queries, keys and values are ordered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum QkvOrder {
    /// By head, then by query, key and value.
    HeadsFirst,
    /// By query, key and value, then by head.
    HeadsSecond,
    /// By head, then by channel.
    ChannelsSecond,
}

/// Attention from all positions to all others, plus the input, with one layer for queries, keys and values.
pub(super) struct QkvAttention {
    pub(super) norm: GroupNorm,
    /// Weight and bias: `3 c · c` numbers in any shape, and `(3 c,)`.
    pub(super) qkv: [Tensor; 2],
    /// Weight and bias: `c · c` numbers in any shape, and `(c,)`.
    pub(super) proj: [Tensor; 2],
    pub(super) heads: usize,
    pub(super) order: QkvOrder,
    pub(super) output_scale: f64,
}

impl QkvAttention {
    /// `x`: `(b, h, w, c)`. Returns its shape.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let normed = self.norm.forward(&x.reshape((b, h * w, c))?, false)?;
        // The rows of the weight are put in order, which is less work than the pixels.
        let [weights, biases] = [self.in_order(0, c)?, self.in_order(1, c)?];
        let of = |i: usize| kernels::linear(&normed, &weights.get(i)?, Some(&biases.get(i)?.flatten_all()?));
        let mixed = multi_head(&of(0)?, &of(1)?, &of(2)?, self.heads)?;
        let out = kernels::linear(&mixed, &self.proj[0].reshape((c, c))?, Some(&self.proj[1]))?;
        scaled(x + out.reshape((b, h, w, c))?, self.output_scale)
    }

    /// The weight or bias of queries, keys and values, by query, key and value, then by head: `(3, c, …)`.
    fn in_order(&self, part: usize, c: usize) -> Result<Tensor> {
        let (heads, dim) = (self.heads, c / self.heads);
        let rows = self.qkv[part].reshape((3 * c, ()))?;
        let columns = rows.dim(1)?;
        let ordered = match self.order {
            QkvOrder::HeadsFirst => rows.reshape((heads, 3, dim, columns))?.permute((1, 0, 2, 3))?,
            QkvOrder::HeadsSecond => rows.reshape((3, heads, dim, columns))?,
            QkvOrder::ChannelsSecond => rows.reshape((heads, dim, 3, columns))?.permute((2, 0, 1, 3))?,
        };
        Ok(ordered.contiguous()?.reshape((3, c, columns))?)
    }

    pub(super) fn macs(&self, positions: usize) -> u64 {
        let c = self.proj[1].elem_count();
        ((4 * c * c + 2 * positions * c) * positions) as u64
    }
}
