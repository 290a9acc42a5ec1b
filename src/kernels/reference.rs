//! Every op in plain candle ops: the specification, the oracle of the fast versions, and what runs on
//! devices without one. Blocks are composed of the ops of the device.
//!
//! Parameters are taken in the type of the images.

use std::{collections::HashMap, ops::Range};

use candle_core::{D, DType, Shape, Tensor};

use super::{BasicBlock, BatchStatistics, BlockWeights, ResnetBlock, ranges};
use crate::Result;

/// 2-D convolution. `x`: `(b, h, w, c_in)` f32; `weight`: `(c_out, c_in, kh, kw)`; `bias`: `(c_out,)`.
///
/// `padding` is `(before, after)`, zeros, the same in both directions of the image. Returns
/// `(b, h', w', c_out)` with `h' = (h + before + after - kh) / stride + 1`.
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: (usize, usize),
) -> Result<Tensor> {
    let x = x.permute((0, 3, 1, 2))?.contiguous()?;
    let (before, after) = padding;
    let (.., h, w) = x.dims4()?;
    let (.., kh, kw) = weight.dims4()?;
    // Rows and columns past the last window.
    let unused = |size: usize, kernel: usize| (size + before + after).saturating_sub(kernel) % stride.max(1);
    let (x, padding) = if before == after && unused(h, kh) == 0 && unused(w, kw) == 0 {
        (x, before)
    } else {
        // Cut off: candle's gradient fails where their numbers differ between the directions.
        let padded = x.pad_with_zeros(2, before, after)?.pad_with_zeros(3, before, after)?;
        let padded = padded.narrow(2, 0, h + before + after - unused(h, kh))?;
        (padded.narrow(3, 0, w + before + after - unused(w, kw))?.contiguous()?, 0)
    };
    let weight = like(&x, weight)?.contiguous()?;
    let out = x.conv2d(&weight, padding, stride, 1, 1)?.permute((0, 2, 3, 1))?.contiguous()?;
    Ok(match bias {
        Some(bias) => out.broadcast_add(&like(&x, bias)?)?,
        None => out,
    })
}

/// `x · weightᵀ + bias`. `x`: `(…, k)`; `weight`: `(n, k)`, PyTorch's order; `bias`: `(n,)`. Returns `(…, n)`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    let k = dims.pop().unwrap_or(1);
    let out = x.reshape(((), k))?.matmul(&like(x, weight)?.t()?)?;
    dims.push(weight.dim(0)?);
    let out = out.reshape(dims)?;
    Ok(match bias {
        Some(bias) => out.broadcast_add(&like(x, bias)?)?,
        None => out,
    })
}

/// Batched matrix product: `(b, m, k) · (b, k, n)`. Returns `(b, m, n)`.
pub fn matmul(lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
    Ok(lhs.contiguous()?.matmul(&rhs.contiguous()?)?)
}

/// Group normalisation over `(b, …, c)` (Wu & He 2018), then SiLU if `silu`.
///
/// The statistics of a sample and group go over all positions and the group's `c / groups` channels.
/// `weight`, `bias`: `(c,)`, or `(b, c)` for each sample its own.
pub fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    epsilon: f64,
    silu: bool,
) -> Result<Tensor> {
    let (b, c) = (x.dim(0)?, x.dim(D::Minus1)?);
    let positions = x.elem_count() / (b * c);
    let g = x.reshape((b, positions, groups, c / groups))?;
    let g = g.broadcast_sub(&g.mean_keepdim((1, 3))?)?;
    let variance = g.sqr()?.mean_keepdim((1, 3))?;
    let g = g.broadcast_div(&(variance + epsilon)?.sqrt()?)?.reshape(x.dims())?;
    let out = g.broadcast_mul(&per_channel(x, weight)?)?.broadcast_add(&per_channel(x, bias)?)?;
    if silu { self::silu(&out) } else { Ok(out) }
}

/// Batch normalisation over `(…, c)` by the statistics of `x` itself (Ioffe & Szegedy 2015, Alg. 1), then ReLU
/// if `relu`. `weight`, `bias`: `(c,)`.
///
/// Normalises with the biased variance, returns the unbiased one.
pub fn batch_norm_train(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    epsilon: f64,
    relu: bool,
) -> Result<(Tensor, BatchStatistics)> {
    let rows = x.reshape(((), x.dim(D::Minus1)?))?;
    let n = rows.dim(0)? as f64;
    let mean = rows.mean(0)?;
    let variance = rows.broadcast_sub(&mean)?.sqr()?.mean(0)?;
    let out = normalize(x, &mean, &variance, weight, bias, epsilon)?;
    let variance = (variance.detach() * (n / (n - 1.0)))?;
    let statistics =
        BatchStatistics { mean: like(weight, &mean.detach())?, variance: like(weight, &variance)? };
    Ok((if relu { self::relu(&out)? } else { out }, statistics))
}

/// Batch normalisation over `(…, c)` by given statistics, then ReLU if `relu`. `weight`, `bias`: `(c,)`.
pub fn batch_norm_eval(
    x: &Tensor,
    statistics: &BatchStatistics,
    weight: &Tensor,
    bias: &Tensor,
    epsilon: f64,
    relu: bool,
) -> Result<Tensor> {
    let (mean, variance) = (like(x, &statistics.mean.detach())?, like(x, &statistics.variance.detach())?);
    let out = normalize(x, &mean, &variance, weight, bias, epsilon)?;
    if relu { self::relu(&out) } else { Ok(out) }
}

fn normalize(
    x: &Tensor,
    mean: &Tensor,
    variance: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    epsilon: f64,
) -> Result<Tensor> {
    let normalized = x.broadcast_sub(mean)?.broadcast_div(&(variance + epsilon)?.sqrt()?)?;
    Ok(normalized.broadcast_mul(&like(x, weight)?)?.broadcast_add(&like(x, bias)?)?)
}

/// `t` in the type of `x`.
fn like(x: &Tensor, t: &Tensor) -> candle_core::Result<Tensor> {
    t.to_dtype(x.dtype())
}

/// bf16 numbers as f32, which their sums need.
fn to_sum(x: &Tensor) -> candle_core::Result<Tensor> {
    x.to_dtype(if x.dtype() == DType::BF16 { DType::F32 } else { x.dtype() })
}

/// `x + shift`. `x`: `(b, …, c)`; `shift`: `(c,)`, or `(b, c)` for each sample its own.
pub fn add_channels(x: &Tensor, shift: &Tensor) -> Result<Tensor> {
    Ok(x.broadcast_add(&per_channel(x, shift)?)?)
}

/// A vector of the channels, or one for each sample, in as many dimensions as `x`, and in its type.
fn per_channel(x: &Tensor, t: &Tensor) -> candle_core::Result<Tensor> {
    let c = x.dim(D::Minus1)?;
    let mut dims = vec![1; x.rank()];
    dims[0] = t.elem_count() / c;
    dims[x.rank() - 1] = c;
    like(x, t)?.reshape(dims)
}

/// `x · sigmoid(x)`, element by element.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    Ok((x / (x.neg()?.exp()? + 1.0)?)?)
}

/// `max(x, 0)`, element by element; its gradient at 0 is 0, as in PyTorch.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    Ok((x * x.gt(0f32)?.to_dtype(x.dtype())?)?)
}

/// Nearest-neighbour upsampling by two. `x`: `(b, h, w, c)`. Returns `(b, 2h, 2w, c)`.
pub fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    Ok(x.reshape((b, h, 1, w, 1, c))?.broadcast_as((b, h, 2, w, 2, c))?.reshape((b, 2 * h, 2 * w, c))?)
}

/// Mean over the positions. `x`: `(b, h, w, c)`. Returns `(b, c)`, f32 of bf16.
pub fn global_avg_pool(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    Ok(to_sum(x)?.reshape((b, h * w, c))?.mean(1)?)
}

/// Mean over windows of `k` × `k` pixels side by side; rows and columns past the last whole window are left out.
/// `x`: `(b, h, w, c)`. Returns `(b, h / k, w / k, c)`, f32 of bf16.
pub fn avg_pool2d(x: &Tensor, k: usize) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let whole = to_sum(x)?.narrow(1, 0, h / k * k)?.narrow(2, 0, w / k * k)?;
    Ok(whole.reshape((b, h / k, k, w / k, k * c))?.mean(2)?.reshape((b, h / k, w / k, k, c))?.mean(3)?)
}

/// Softmax over the last dimension.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    let e = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
    Ok(e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?)
}

/// Scaled dot-product attention, `softmax(q kᵀ / √d) v` (Vaswani et al. 2017, Eq. 1).
/// `q`, `k`, `v`: `(b, n, d)`, heads folded into `b`. Returns `(b, n, d)`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    let scores = (matmul(q, &k.transpose(1, 2)?)? * scale)?;
    matmul(&softmax(&scores)?, v)
}

/// Cross-entropy of each sample, in nats. `logits`: `(b, classes)`; `labels`: `(b,)` u32. Returns `(b,)`.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor, smoothing: f64) -> Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    let log_z = shifted.exp()?.sum(D::Minus1)?.log()?;
    let chosen = shifted.gather(&labels.unsqueeze(1)?, 1)?.squeeze(1)?;
    let expected = ((chosen * (1.0 - smoothing))? + (shifted.mean(D::Minus1)? * smoothing)?)?;
    Ok((log_z - expected)?)
}

/// KL(softmax(p) ‖ softmax(q)) of each sample, in nats. `p_logits`, `q_logits`: `(b, classes)`. Returns `(b,)`.
pub fn kl_divergence(p_logits: &Tensor, q_logits: &Tensor) -> Result<Tensor> {
    let log_softmax = |logits: &Tensor| -> candle_core::Result<Tensor> {
        let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
        shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)
    };
    let (log_p, log_q) = (log_softmax(p_logits)?, log_softmax(q_logits)?);
    Ok((log_p.exp()? * (log_p - log_q)?)?.sum(D::Minus1)?)
}

/// A residual block of the U-Net, one operation after the other: see [`fn@super::resnet_block`].
pub fn resnet_block(
    x: &Tensor,
    temb: &Tensor,
    theta: &Tensor,
    block: &ResnetBlock,
    packed: &BlockWeights,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    use super::{add_channels, conv2d_packed, group_norm, linear};
    let parts = split(theta, &block.parameters())?;
    let ResnetBlock { groups, epsilon, .. } = *block;
    let part = |name: &str| &parts[name];
    let (weight, bias) = (part("norm1.weight"), part("norm1.bias"));
    let h = group_norm(x, groups, weight, bias, epsilon, true)?;
    let step = linear(temb, part("time_emb_proj.weight"), Some(part("time_emb_proj.bias")))?;
    let conv1 = |bias: Option<&Tensor>| conv2d_packed(&h, part("conv1.weight"), bias, 1, (1, 1), &packed[0]);
    let (weight, bias) = (part("norm2.weight"), part("norm2.bias"));
    let h = if block.scale_shift {
        let h = conv1(Some(part("conv1.bias")))?;
        let factor = (step.narrow(1, 0, block.c_out)? + 1.0)?;
        let shift = step.narrow(1, block.c_out, block.c_out)?;
        let bias = (factor.broadcast_mul(bias)? + shift)?;
        group_norm(&h, groups, &factor.broadcast_mul(weight)?, &bias, epsilon, true)?
    } else {
        let h = add_channels(&conv1(None)?, &add_channels(&step, part("conv1.bias"))?)?;
        group_norm(&h, groups, weight, bias, epsilon, true)?
    };
    let h = match mask {
        Some(mask) => (&h * like(&h, &mask.detach())?)?,
        None => h,
    };
    let h = conv2d_packed(&h, part("conv2.weight"), Some(part("conv2.bias")), 1, (1, 1), &packed[1])?;
    let x = match block.has_shortcut() {
        true => {
            let (weight, bias) = (part("conv_shortcut.weight"), part("conv_shortcut.bias"));
            conv2d_packed(x, weight, Some(bias), 1, (0, 0), &packed[2])?
        }
        false => x.clone(),
    };
    let out = (x + h)?;
    Ok(if block.output_scale == 1.0 { out } else { (out / block.output_scale)? })
}

/// A residual block of a ResNet, one operation after the other: see [`fn@super::basic_block`].
pub fn basic_block(
    x: &Tensor,
    theta: &Tensor,
    running: Option<&[BatchStatistics]>,
    block: &BasicBlock,
    packed: &BlockWeights,
) -> Result<(Tensor, Vec<BatchStatistics>)> {
    use super::{batch_norm_eval, batch_norm_train, conv2d_packed, relu};
    let parts = split(theta, &block.parameters())?;
    let mut seen = Vec::new();
    let mut norm = |i: usize, name: &str, x: &Tensor, relu: bool| -> Result<Tensor> {
        let (weight, bias) = (&parts[&*format!("{name}.weight")], &parts[&*format!("{name}.bias")]);
        let Some(running) = running else {
            let (out, statistics) = batch_norm_train(x, weight, bias, block.epsilon, relu)?;
            seen.push(statistics);
            return Ok(out);
        };
        batch_norm_eval(x, &running[i], weight, bias, block.epsilon, relu)
    };
    let conv = |x: &Tensor, i: usize, name: &str, stride: usize, padding: usize| {
        conv2d_packed(x, &parts[name], None, stride, (padding, padding), &packed[i])
    };
    let h = norm(0, "bn1", &conv(x, 0, "conv1.weight", block.stride, 1)?, true)?;
    let h = norm(1, "bn2", &conv(&h, 1, "conv2.weight", 1, 1)?, false)?;
    let x = match block.has_shortcut() {
        true => {
            let x = conv(x, 2, "shortcut.0.weight", block.stride, 0)?;
            norm(2, "shortcut.1", &x, false)?
        }
        false => x.clone(),
    };
    Ok((relu(&(h + x)?)?, seen))
}

/// The parameters that lie in a vector one behind another.
fn split(theta: &Tensor, parameters: &[(&'static str, Shape)]) -> Result<HashMap<&'static str, Tensor>> {
    let part = |((name, shape), range): (&(&'static str, Shape), Range<usize>)| {
        Ok((*name, theta.narrow(0, range.start, range.len())?.reshape(shape)?))
    };
    parameters.iter().zip(ranges(parameters)).map(part).collect()
}
