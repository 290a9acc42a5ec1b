//! Layers with PyTorch's parameters: the names `weight` and `bias`, its shapes and its initial distributions.

use candle_core::{DType, Shape, Tensor};
use serde::{Deserialize, Serialize};

use super::params::{Buffer, Builder, Init, Packed};
use crate::{
    Result,
    device::Precision,
    kernels::{self, BatchStatistics},
};

/// Images in the type in which networks compute: f32 images become [`Precision::images`], others stay as they are.
/// Parameters stay f32, and a network's output has the type of its input.
pub(super) fn to_compute(x: &Tensor) -> Result<Tensor> {
    Ok(match x.dtype() {
        DType::F32 => x.to_dtype(Precision::get().images(x.device()))?,
        _ => x.clone(),
    })
}

/// 2-D convolution over NHWC images: `torch.nn.Conv2d` with square kernels.
#[derive(Clone, Debug)]
pub struct Conv2d {
    weight: Tensor,
    bias: Option<Tensor>,
    stride: usize,
    padding: (usize, usize),
    packed: Packed,
}

impl Conv2d {
    /// `kernel` × `kernel`, stride 1, padded so that the image keeps its size, with a bias.
    pub fn new(c_in: usize, c_out: usize, kernel: usize, b: &Builder) -> Result<Self> {
        Self::with_init(c_in, c_out, kernel, [Init::FanIn(c_in * kernel * kernel); 2], b)
    }

    /// The same, with other initial values of weight and bias.
    pub fn with_init(c_in: usize, c_out: usize, kernel: usize, init: [Init; 2], b: &Builder) -> Result<Self> {
        Ok(Self {
            weight: b.get("weight", (c_out, c_in, kernel, kernel), init[0])?,
            bias: Some(b.get("bias", c_out, init[1])?),
            stride: 1,
            padding: (kernel / 2, kernel / 2),
            packed: b.packed("weight"),
        })
    }

    /// `kernel` × `kernel` with this stride, padded by half the kernel, without a bias, for use before a norm.
    pub fn without_bias(
        c_in: usize,
        c_out: usize,
        kernel: usize,
        stride: usize,
        b: &Builder,
    ) -> Result<Self> {
        let init = Init::FanIn(c_in * kernel * kernel);
        let weight = b.get("weight", (c_out, c_in, kernel, kernel), init)?;
        let packed = b.packed("weight");
        Ok(Self { weight, bias: None, stride, padding: (kernel / 2, kernel / 2), packed })
    }

    /// The same parameters, moved by `stride` over an image padded by `padding` = (before, after).
    pub fn with_stride(self, stride: usize, padding: (usize, usize)) -> Self {
        Self { stride, padding, ..self }
    }

    /// `x`: `(b, h, w, c_in)`. Returns `(b, h', w', c_out)`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let Self { weight, bias, stride, padding, packed } = self;
        kernels::conv2d_packed(x, weight, bias.as_ref(), *stride, *padding, Some(&packed.get()))
    }

    /// Multiply-adds for an output of `positions` pixels.
    pub fn macs(&self, positions: usize) -> u64 {
        (self.weight.elem_count() * positions) as u64
    }
}

/// The parameters of a fused block as one vector, each as its layer begins in PyTorch: a bias as the weight before it,
/// and vectors of a norm, which has no other weight, as 1 and 0.
pub(super) fn fused(parameters: Vec<(impl AsRef<str>, Shape)>, b: &Builder) -> Result<Tensor> {
    let mut of_layer = None;
    b.flat(parameters.into_iter().map(|(name, shape)| {
        let weight = name.as_ref().ends_with("weight");
        if weight {
            of_layer = (shape.rank() > 1).then(|| Init::FanIn(shape.elem_count() / shape.dims()[0]));
        }
        let of_norm = if weight { Init::Ones } else { Init::Zeros };
        (name, shape, of_layer.unwrap_or(of_norm))
    }))
}

/// Multiply-adds of a fused block: convolutions for an output of `positions` pixels, linear layers for one row.
pub(super) fn fused_macs(parameters: Vec<(&'static str, Shape)>, positions: usize) -> u64 {
    let macs = |(_, shape): (&str, Shape)| match shape.rank() {
        4 => shape.elem_count() * positions,
        2 => shape.elem_count(),
        _ => 0,
    };
    parameters.into_iter().map(macs).sum::<usize>() as u64
}

/// The mean and standard deviation by which images are standardised before a network sees them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Standardization {
    /// The mean of each channel, for pixels in [0, 1].
    pub mean: Vec<f32>,
    /// The standard deviation of each channel.
    pub std: Vec<f32>,
}

impl Standardization {
    /// Fails with [`Error::Data`](crate::Error::Data) unless every channel can be divided by its standard
    /// deviation.
    pub fn validate(&self, channels: usize) -> Result<()> {
        let Self { mean, std } = self;
        let lengths = mean.len() == channels && std.len() == channels;
        if !lengths || mean.iter().chain(std).any(|v| !v.is_finite()) || std.iter().any(|&s| s <= 0.0) {
            bail!(
                Data,
                "standardize has mean {mean:?} and std {std:?}, expected {channels} numbers each, std above 0"
            );
        }
        Ok(())
    }

    /// `(x - mean) / std`, or `x` if there is nothing to do. `x`: `(…, channels)`.
    pub(super) fn apply(this: Option<&Self>, x: &Tensor) -> Result<Tensor> {
        let Some(Self { mean, std }) = this else { return Ok(x.clone()) };
        let like_x = |values: &[f32]| Tensor::new(values, x.device())?.to_dtype(x.dtype());
        Ok(x.broadcast_sub(&like_x(mean)?)?.broadcast_div(&like_x(std)?)?)
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
        Self::with_init(n_in, n_out, [Init::FanIn(n_in); 2], b)
    }

    /// The same, with other initial values of weight and bias.
    pub fn with_init(n_in: usize, n_out: usize, init: [Init; 2], b: &Builder) -> Result<Self> {
        Ok(Self { weight: b.get("weight", (n_out, n_in), init[0])?, bias: b.get("bias", n_out, init[1])? })
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

    /// The norm, then SiLU if `silu`. `x`: `(b, …, channels)`. Returns its shape.
    pub fn forward(&self, x: &Tensor, silu: bool) -> Result<Tensor> {
        kernels::group_norm(x, self.groups, &self.weight, &self.bias, self.epsilon, silu)
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
        Ok(Self { weight: b.get("weight", (n, dim), Init::Normal(1.0))? })
    }

    /// `indices`: `(b,)` u32, below `n`. Returns `(b, dim)`.
    pub fn forward(&self, indices: &Tensor) -> Result<Tensor> {
        Ok(self.weight.index_select(indices, 0)?)
    }
}

/// The statistics with which a network's [`BatchNorm`]s normalise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchNormMode {
    /// Those of the batch, which also update the running ones. Two concurrent passes would race for these.
    Train,
    /// The running ones: an image's result does not depend on its batch, and nothing is changed.
    Eval,
}

/// Batch normalisation (Ioffe & Szegedy 2015) with the channels last: `torch.nn.BatchNorm2d`.
#[derive(Clone, Debug)]
pub struct BatchNorm {
    weight: Tensor,
    bias: Tensor,
    running: RunningStatistics,
}

impl BatchNorm {
    /// PyTorch's default.
    pub(super) const EPSILON: f64 = 1e-5;

    /// Running statistics start as mean 0 and variance 1.
    pub fn new(channels: usize, b: &Builder) -> Result<Self> {
        Ok(Self {
            weight: b.get("weight", channels, Init::Ones)?,
            bias: b.get("bias", channels, Init::Zeros)?,
            running: RunningStatistics::new(channels, b)?,
        })
    }

    /// The norm, then ReLU if `relu`. `x`: `(b, …, channels)`. Returns its shape. [`BatchNormMode::Train`] fails if `x` is a single position.
    pub fn forward(&self, x: &Tensor, mode: BatchNormMode, relu: bool) -> Result<Tensor> {
        match mode {
            BatchNormMode::Train => {
                let (out, statistics) =
                    kernels::batch_norm_train(x, &self.weight, &self.bias, Self::EPSILON, relu)?;
                self.running.track(&statistics)?;
                Ok(out)
            }
            BatchNormMode::Eval => {
                let running = self.running.get();
                kernels::batch_norm_eval(x, &running, &self.weight, &self.bias, Self::EPSILON, relu)
            }
        }
    }
}

/// The running statistics of a batch norm, under PyTorch's names.
#[derive(Clone, Debug)]
pub(super) struct RunningStatistics {
    mean: Buffer,
    var: Buffer,
    num_batches_tracked: Buffer,
}

impl RunningStatistics {
    /// The weight of a batch in the running statistics, PyTorch's default.
    const MOMENTUM: f64 = 0.1;

    /// They start as mean 0 and variance 1.
    pub fn new(channels: usize, b: &Builder) -> Result<Self> {
        Ok(Self {
            mean: b.buffer("running_mean", channels, Init::Zeros)?,
            var: b.buffer("running_var", channels, Init::Ones)?,
            num_batches_tracked: b.counter("num_batches_tracked")?,
        })
    }

    /// Their current values.
    pub fn get(&self) -> BatchStatistics {
        BatchStatistics { mean: self.mean.get(), variance: self.var.get() }
    }

    /// `running = (1 - momentum) · running + momentum · batch`.
    pub fn track(&self, batch: &BatchStatistics) -> Result<()> {
        for (running, batch) in [(&self.mean, &batch.mean), (&self.var, &batch.variance)] {
            let kept = (running.get() * (1.0 - Self::MOMENTUM))?;
            running.set(&(kept + (batch * Self::MOMENTUM)?)?)?;
        }
        let batches = self.num_batches_tracked.get();
        self.num_batches_tracked.set(&(&batches + Tensor::ones((), DType::I64, batches.device())?)?)
    }
}
