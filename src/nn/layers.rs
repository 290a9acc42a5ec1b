//! Layers with PyTorch's parameters: names `weight` and `bias`, its shapes, its initial distributions.

use candle_core::Tensor;

use super::{Builder, Init};
use crate::{Result, kernels};

/// 2-D convolution over NHWC images: `torch.nn.Conv2d` with square kernels.
#[derive(Clone, Debug)]
pub struct Conv2d {
    weight: Tensor,
    bias: Option<Tensor>,
    stride: usize,
    padding: (usize, usize),
}

impl Conv2d {
    /// `kernel` × `kernel`, stride 1, padded so that the image keeps its size, with a bias.
    pub fn new(c_in: usize, c_out: usize, kernel: usize, b: &Builder) -> Result<Self> {
        let init = Init::FanIn(c_in * kernel * kernel);
        Ok(Self {
            weight: b.get("weight", (c_out, c_in, kernel, kernel), init)?,
            bias: Some(b.get("bias", c_out, init)?),
            stride: 1,
            padding: (kernel / 2, kernel / 2),
        })
    }

    /// 3 × 3 with this stride, padded by one pixel, without a bias: for a norm behind it.
    pub fn without_bias(c_in: usize, c_out: usize, stride: usize, b: &Builder) -> Result<Self> {
        let weight = b.get("weight", (c_out, c_in, 3, 3), Init::FanIn(c_in * 9))?;
        Ok(Self { weight, bias: None, stride, padding: (1, 1) })
    }

    /// The same parameters, moved by `stride` over an image padded by `padding` = (before, after).
    pub fn with_stride(self, stride: usize, padding: (usize, usize)) -> Self {
        Self { stride, padding, ..self }
    }

    /// `x`: `(b, h, w, c_in)`. Returns `(b, h', w', c_out)`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        kernels::conv2d(x, &self.weight, self.bias.as_ref(), self.stride, self.padding)
    }

    /// Multiply-adds for an output of `positions` pixels.
    pub fn macs(&self, positions: usize) -> u64 {
        (self.weight.elem_count() * positions) as u64
    }
}

/// `x · weightᵀ + bias`: `torch.nn.Linear`.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    /// From `n_in` to `n_out` features.
    pub fn new(n_in: usize, n_out: usize, b: &Builder) -> Result<Self> {
        let init = Init::FanIn(n_in);
        Ok(Self { weight: b.get("weight", (n_out, n_in), init)?, bias: b.get("bias", n_out, init)? })
    }

    /// `x`: `(…, n_in)`. Returns `(…, n_out)`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        kernels::linear(x, &self.weight, Some(&self.bias))
    }

    /// Multiply-adds for `rows` rows.
    pub fn macs(&self, rows: usize) -> u64 {
        (self.weight.elem_count() * rows) as u64
    }
}

/// Group normalisation (Wu & He 2018) with the channels last: `torch.nn.GroupNorm`.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    epsilon: f64,
}

impl GroupNorm {
    /// `groups` must divide `channels`; configurations are checked before networks are built.
    pub fn new(groups: usize, channels: usize, epsilon: f64, b: &Builder) -> Result<Self> {
        Ok(Self {
            weight: b.get("weight", channels, Init::Ones)?,
            bias: b.get("bias", channels, Init::Zeros)?,
            groups,
            epsilon,
        })
    }

    /// `x`: `(b, …, channels)`. Returns its shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        kernels::group_norm(x, self.groups, &self.weight, &self.bias, self.epsilon, false)
    }

    /// The norm, then SiLU, in one pass.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        kernels::group_norm(x, self.groups, &self.weight, &self.bias, self.epsilon, true)
    }
}

/// A learned vector for each of a number of classes: `torch.nn.Embedding`.
#[derive(Clone, Debug)]
pub struct Embedding {
    weight: Tensor,
}

impl Embedding {
    /// `n` vectors of `dim` features.
    pub fn new(n: usize, dim: usize, b: &Builder) -> Result<Self> {
        Ok(Self { weight: b.get("weight", (n, dim), Init::Normal)? })
    }

    /// `indices`: `(b,)` u32, below `n`. Returns `(b, dim)`.
    pub fn forward(&self, indices: &Tensor) -> Result<Tensor> {
        Ok(self.weight.index_select(indices, 0)?)
    }
}
