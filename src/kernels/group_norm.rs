//! Group normalisation, with SiLU in the same pass.
//!
//! The work is done by [`Norm`], with functions on slices; the custom op is a shell around it.

use std::sync::OnceLock;

use candle_core::{D, Tensor};
use rayon::prelude::*;

use super::{
    activation::{silu, silu_slope},
    add_channels::per_channel,
    math,
    microkernel::{Arithmetic, Loop, run, zeros},
    parallel::{PARALLEL_WORK, for_each_chunk},
    reduce::sums_and_squares,
    shell::{self, Backward, Gradients, Node, Op, Operand, Output},
};
use crate::{Result, device::CpuLevel};

/// Group normalisation over `(b, …, c)` (Wu & He 2018), then SiLU if `silu`.
///
/// The statistics of a sample and group are over all positions and the group's `c / groups` channels; the variance
/// is the biased one. `weight`, `bias`: `(c,)`, or `(b, c)` with one vector per sample, so that conditioning by
/// `norm(x) · (1 + scale) + shift` takes one pass. Fails if `groups` does not divide `c`.
pub fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    epsilon: f64,
    silu: bool,
) -> Result<Tensor> {
    expect_fits(x, groups, weight, bias)?;
    shell::run(GroupNorm::new(CpuLevel::get(), x, groups, epsilon, silu)?, [x, weight, bias])
}

/// Fails if the groups do not divide the channels, or if a vector has the wrong shape.
fn expect_fits(x: &Tensor, groups: usize, weight: &Tensor, bias: &Tensor) -> Result<()> {
    let c = x.dim(D::Minus1)?;
    if groups == 0 || c == 0 || c % groups != 0 {
        bail!(Alarm, "{c} channels cannot be normalised in {groups} groups");
    }
    let b = x.dim(0)?;
    let fits = |t: &Tensor| t.dims() == [c] || t.dims() == [b, c];
    if !fits(weight) || !fits(bias) {
        let (weight, bias) = (weight.dims(), bias.dims());
        bail!(Alarm, "{b} samples of {c} channels with weight {weight:?} and bias {bias:?}");
    }
    Ok(())
}

/// How contiguous samples are normalised.
#[derive(Clone, Copy)]
pub(super) struct Norm {
    pub level: CpuLevel,
    pub groups: usize,
    /// Channels.
    pub c: usize,
    /// Elements of a sample.
    pub sample: usize,
    pub epsilon: f64,
    pub silu: bool,
}

/// Mean and 1 / √(variance + ε) of a sample's group.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moments {
    mean: f32,
    inverse: f32,
}

/// The gradients of one sample's biases and weights, `[Σ dz, Σ dz · x̂]` for each channel: `z = x̂ · weight + bias`
/// is what SiLU gets, `x̂` the normalised input.
pub(super) type ChannelSums = [Vec<f64>; 2];

impl Norm {
    /// Writes the output; returns the moments of each sample and group, which [`Norm::backward`] needs again.
    ///
    /// `affine`: weight and bias, `c` numbers each, or `c` for each sample.
    pub fn forward(&self, x: &[f32], affine: [&[f32]; 2], out: &mut [f32]) -> Vec<Moments> {
        let Self { level, groups, c, epsilon, silu, .. } = *self;
        let normalize = |(i, (x, out)): (usize, (&[f32], &mut [f32]))| {
            let moments = run(level, Statistics { x, c, groups, epsilon });
            let channels = self.channels(i, &moments, affine);
            run(level, Normalize { x, channels, silu, out });
            moments
        };
        let sample = self.sample.max(1);
        let moments: Vec<Vec<Moments>> = if x.len() < PARALLEL_WORK {
            x.chunks_exact(sample).zip(out.chunks_exact_mut(sample)).enumerate().map(normalize).collect()
        } else {
            let samples = x.par_chunks_exact(sample).zip(out.par_chunks_exact_mut(sample));
            samples.enumerate().map(normalize).collect()
        };
        moments.concat()
    }

    /// Writes the output again, with the moments that [`Norm::forward`] returned.
    pub fn normalize(&self, x: &[f32], moments: &[Moments], affine: [&[f32]; 2], out: &mut [f32]) {
        let sample = self.sample.max(1);
        for_each_chunk(out, sample, x.len(), |i, out| {
            let (x, moments) = (&x[i * sample..][..sample], &moments[i * self.groups..][..self.groups]);
            let channels = self.channels(i, moments, affine);
            run(self.level, Normalize { x, channels, silu: self.silu, out });
        });
    }

    /// Writes the gradient of the input for `dy`, that of the output; returns those of each sample's weights.
    pub fn backward(
        &self,
        x: &[f32],
        dy: &[f32],
        moments: &[Moments],
        affine: [&[f32]; 2],
        dx: &mut [f32],
    ) -> Vec<ChannelSums> {
        let Self { level, groups, silu, .. } = *self;
        let gradients = |(i, dx): (usize, &mut [f32])| {
            let moments = &moments[i * groups..][..groups];
            let channels = self.channels(i, moments, affine);
            let range = i * dx.len()..(i + 1) * dx.len();
            run(level, SampleGradients { x: &x[range.clone()], dy: &dy[range], channels, groups, silu, dx })
        };
        let sample = self.sample.max(1);
        if dy.len() < PARALLEL_WORK {
            dx.chunks_exact_mut(sample).enumerate().map(gradients).collect()
        } else {
            dx.par_chunks_exact_mut(sample).enumerate().map(gradients).collect()
        }
    }

    /// The factors for sample `i`, which has these moments.
    fn channels<'a>(&self, i: usize, moments: &[Moments], affine: [&'a [f32]; 2]) -> Channels<'a> {
        let c = self.c;
        // One row may serve all samples.
        let of_sample = |row: &'a [f32]| if row.len() == c { row } else { &row[i * c..][..c] };
        let spread =
            |f: fn(&Moments) -> f32| moments.iter().flat_map(|m| [f(m)].repeat(c / self.groups)).collect();
        let (mean, inverse) = (spread(|m| m.mean), spread(|m| m.inverse));
        let [weight, bias] = affine.map(of_sample);
        Channels { mean, inverse, weight, bias }
    }
}

/// The factors that normalise one sample's channels.
struct Channels<'a> {
    mean: Vec<f32>,
    inverse: Vec<f32>,
    weight: &'a [f32],
    bias: &'a [f32],
}

/// The moments of each group of one sample.
struct Statistics<'a> {
    x: &'a [f32],
    c: usize,
    groups: usize,
    epsilon: f64,
}

impl Loop for Statistics<'_> {
    type Output = Vec<Moments>;
    #[inline(always)]
    fn run<A: Arithmetic>(self) -> Vec<Moments> {
        let Self { x, c, groups, epsilon } = self;
        let sums = sums_and_squares(x, c);
        let count = (x.len() / groups) as f64;
        let moments = |group: usize| {
            let [sum, squares] = sums.each_ref().map(|s| s[group..group + c / groups].iter().sum::<f64>());
            let mean = sum / count;
            // In double precision, cancellation costs at most half of the 16 digits for mean / σ up to 1e4.
            let variance = (squares / count - mean * mean).max(0.0);
            Moments { mean: mean as f32, inverse: (1.0 / (variance + epsilon).sqrt()) as f32 }
        };
        (0..c).step_by(c / groups).map(moments).collect()
    }
}

/// The output of one sample.
struct Normalize<'a> {
    x: &'a [f32],
    channels: Channels<'a>,
    silu: bool,
    out: &'a mut [f32],
}

impl Loop for Normalize<'_> {
    type Output = ();
    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { x, channels: Channels { mean, inverse, weight, bias }, silu, out } = self;
        let c = weight.len();
        let scale: Vec<f32> = inverse.iter().zip(weight).map(|(i, w)| i * w).collect();
        let (mean, scale, bias) = (&mean[..c], &scale[..c], &bias[..c]);
        for (out, x) in out.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
            for i in 0..c {
                out[i] = A::mul_add(x[i] - mean[i], scale[i], bias[i]);
            }
            if silu {
                out.iter_mut().for_each(|z| *z *= math::sigmoid::<A>(*z));
            }
        }
    }
}

/// The gradients of one sample.
struct SampleGradients<'a> {
    x: &'a [f32],
    dy: &'a [f32],
    channels: Channels<'a>,
    groups: usize,
    silu: bool,
    dx: &'a mut [f32],
}

impl Loop for SampleGradients<'_> {
    type Output = ChannelSums;

    /// `dx = inverse · (dx̂ - mean(dx̂) - x̂ · mean(dx̂ · x̂))`, `dx̂ = weight · dz`, means over the group.
    #[inline(always)]
    fn run<A: Arithmetic>(self) -> ChannelSums {
        let Self { x, dy, channels, groups, silu, dx } = self;
        let Channels { mean, inverse, weight, .. } = &channels;
        let c = weight.len();
        let mut sums = [vec![0f64; c], vec![0f64; c]];
        let mut product = vec![0f32; c];
        let rows = x.chunks_exact(c).zip(dy.chunks_exact(c));
        for (dz, (x, dy)) in dx.chunks_exact_mut(c).zip(rows) {
            inner_gradients::<A>(x, dy, &channels, silu, dz, &mut product);
            let [sum, products] = &mut sums;
            sum.iter_mut().zip(dz).for_each(|(sum, &mut v)| *sum += f64::from(v));
            products.iter_mut().zip(&product).for_each(|(sum, &v)| *sum += f64::from(v));
        }
        let count = (x.len() / groups) as f64;
        let (mut scale, mut offset, mut slope) = (vec![0f32; c], vec![0f32; c], vec![0f32; c]);
        for group in (0..c).step_by(c / groups) {
            let range = group..group + c / groups;
            let weighted =
                |k: usize| range.clone().map(|i| f64::from(weight[i]) * sums[k][i]).sum::<f64>() / count;
            let (mean_gradient, mean_product) = (weighted(0) as f32, weighted(1) as f32);
            for i in range.clone() {
                scale[i] = inverse[i] * weight[i];
                offset[i] = -inverse[i] * mean_gradient;
                slope[i] = -inverse[i] * inverse[i] * mean_product;
            }
        }
        let (mean, scale, offset, slope) = (&mean[..c], &scale[..c], &offset[..c], &slope[..c]);
        for (dx, x) in dx.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
            for i in 0..c {
                dx[i] = A::mul_add(dx[i], scale[i], A::mul_add(x[i] - mean[i], slope[i], offset[i]));
            }
        }
        sums
    }
}

/// Writes `dz` of one position, and `dz · x̂`.
#[inline(always)]
fn inner_gradients<A: Arithmetic>(
    x: &[f32],
    dy: &[f32],
    channels: &Channels,
    silu: bool,
    dz: &mut [f32],
    product: &mut [f32],
) {
    let c = dz.len();
    let (mean, inverse) = (&channels.mean[..c], &channels.inverse[..c]);
    let (weight, bias) = (&channels.weight[..c], &channels.bias[..c]);
    let (x, dy, product) = (&x[..c], &dy[..c], &mut product[..c]);
    for i in 0..c {
        let normalized = (x[i] - mean[i]) * inverse[i];
        let slope = if silu { silu_slope::<A>(A::mul_add(normalized, weight[i], bias[i])) } else { 1.0 };
        dz[i] = dy[i] * slope;
        product[i] = dz[i] * normalized;
    }
}

struct GroupNorm {
    norm: Norm,
    moments: OnceLock<Vec<Moments>>,
}

impl GroupNorm {
    fn new(level: CpuLevel, x: &Tensor, groups: usize, epsilon: f64, silu: bool) -> Result<Self> {
        let (b, c) = (x.dim(0)?, x.dim(D::Minus1)?);
        let norm = Norm { level, groups, c, sample: x.elem_count() / b.max(1), epsilon, silu };
        Ok(Self { norm, moments: OnceLock::new() })
    }
}

impl Node<3> for GroupNorm {
    const NAME: &'static str = "group-norm";

    fn forward(&self, [x, weight, bias]: [Operand; 3]) -> Output {
        let mut out = zeros(x.len());
        let moments = self.norm.forward(&x, [&weight, &bias], &mut out);
        self.moments.get_or_init(|| moments);
        Ok((out, x.shape().clone()))
    }

    fn backward(&self, [x, weight, bias]: [Operand; 3], back: Backward<3>) -> Gradients<3> {
        let Backward { dy, wanted, .. } = back;
        let moments = self.moments.get().map_or(&[][..], Vec::as_slice);
        let mut dx = zeros(dy.len());
        let sums = self.norm.backward(&x, dy, moments, [&weight, &bias], &mut dx);
        let gradient = |of: Operand, k: usize| match of.shape().rank() {
            2 => sums.iter().flat_map(|sums| &sums[k]).map(|&v| v as f32).collect(),
            _ => (0..self.norm.c).map(|i| sums.iter().map(|s| s[k][i]).sum::<f64>() as f32).collect(),
        };
        Ok([Some(dx), wanted[1].then(|| gradient(weight, 1)), wanted[2].then(|| gradient(bias, 0))])
    }
}

impl Op<3> for GroupNorm {
    fn reference(&self, [x, weight, bias]: [&Tensor; 3]) -> Result<Tensor> {
        let Norm { groups, c, epsilon, .. } = self.norm;
        let g = x.reshape((x.dim(0)?, (), groups, c / groups))?;
        let g = g.broadcast_sub(&g.mean_keepdim((1, 3))?)?;
        let variance = g.sqr()?.mean_keepdim((1, 3))?;
        let g = g.broadcast_div(&(variance + epsilon)?.sqrt()?)?.reshape(x.dims())?;
        let out = g.broadcast_mul(&per_channel(x, weight)?)?.broadcast_add(&per_channel(x, bias)?)?;
        if self.norm.silu { silu(&out) } else { Ok(out) }
    }

    #[cfg(feature = "cuda")]
    fn cuda(self, [x, weight, bias]: [&Tensor; 3]) -> Result<Tensor> {
        let Norm { groups, epsilon, silu, .. } = self.norm;
        super::cuda::norm::group_norm(x, groups, weight, bias, epsilon, silu)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::*, *};

    fn operands(shape: (usize, usize, usize, usize)) -> [Tensor; 3] {
        let x = (random(1, shape) * 2.0).unwrap();
        [(x + 0.7).unwrap(), (random(2, shape.3) + 1.0).unwrap(), random(3, shape.3)]
    }

    #[test]
    fn output_and_gradients_match_the_reference_in_double_precision() {
        for (shape, groups) in
            [((2, 3, 5, 6), 3), ((3, 4, 4, 16), 4), ((2, 7, 5, 33), 11), ((3, 32, 32, 32), 8)]
        {
            for silu in [false, true] {
                let operands = operands(shape);
                check(&operands, |level| GroupNorm::new(level, &operands[0], groups, 1e-5, silu).unwrap());
            }
        }
    }

    /// As [`operands`], with weight and bias for each sample.
    fn conditioned(shape: (usize, usize, usize, usize)) -> [Tensor; 3] {
        let [x, ..] = operands(shape);
        let per_sample = (shape.0, shape.3);
        [x, (random(2, per_sample) + 1.0).unwrap(), random(3, per_sample)]
    }

    #[test]
    fn weights_for_each_sample_match_the_reference_in_double_precision() {
        for (shape, groups) in [((2, 3, 5, 6), 3), ((1, 4, 4, 16), 4), ((3, 32, 32, 32), 8)] {
            let [x, weight, bias] = conditioned(shape);
            for operands in [[x.clone(), weight.clone(), bias], [x, weight, random(3, shape.3)]] {
                check(&operands, |level| GroupNorm::new(level, &operands[0], groups, 1e-5, true).unwrap());
            }
        }
    }

    #[test]
    fn a_large_mean_does_not_drown_the_variance() {
        let x = (random(1, (2, 8, 8, 4)) + 1000.0).unwrap();
        let ones = Tensor::ones(4, candle_core::DType::F32, x.device()).unwrap();
        let zeros = ones.zeros_like().unwrap();
        let out = values(&group_norm(&x, 2, &ones, &zeros, 1e-6, false).unwrap());
        for group in out.chunks_exact(4).map(|p| &p[..2]).collect::<Vec<_>>().chunks_exact(64) {
            let squares: f32 = group.iter().flat_map(|p| p.iter()).map(|v| v * v).sum();
            assert!((squares / 128.0 - 1.0).abs() < 1e-4, "variance {}", squares / 128.0);
        }
    }

    #[test]
    fn a_sample_does_not_see_its_batch_nor_the_threads() {
        check_invariance(&operands((7, 24, 24, 24)), 1, |t| group_norm(&t[0], 4, &t[1], &t[2], 1e-5, true));
        check_invariance(&conditioned((7, 24, 24, 24)), 3, |t| {
            group_norm(&t[0], 4, &t[1], &t[2], 1e-5, true)
        });
    }

    #[test]
    fn gradients_are_finite_differences() {
        for operands in [operands((2, 2, 3, 4)), conditioned((2, 2, 3, 4))] {
            check_finite_differences(&operands, |t| group_norm(&t[0], 2, &t[1], &t[2], 1e-5, true));
        }
    }

    #[test]
    fn frozen_weights_get_no_gradient() {
        for operands in [operands((2, 2, 3, 4)), conditioned((2, 2, 3, 4))] {
            check_untracked(&operands, |t| group_norm(&t[0], 2, &t[1], &t[2], 1e-5, true));
        }
    }

    #[test]
    fn groups_that_do_not_divide_and_weights_that_do_not_fit_are_named() {
        let [x, weight, bias] = operands((2, 2, 2, 6));
        let error = group_norm(&x, 4, &weight, &bias, 1e-5, false).unwrap_err().to_string();
        assert_eq!(error, "6 channels cannot be normalised in 4 groups");
        let error = group_norm(&x, 3, &random(2, (3, 6)), &bias, 1e-5, false).unwrap_err().to_string();
        assert_eq!(error, "2 samples of 6 channels with weight [3, 6] and bias [6]");
    }
}
