//! Softmax and attention.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Shape, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{
    Elements, elements, for_each_chunk,
    math::{exp, max, sum},
    matmul::matmul_at,
    microkernel::{Arithmetic, Loop, run, zeros},
    on_cpu, reference, tensor,
};
use crate::{Result, device::CpuLevel};

/// Softmax over the last dimension.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::on_cuda(x, &[]) {
        return cuda::softmax(x, 1.0);
    }
    if on_cpu(&[x]) { softmax_at(CpuLevel::get(), 1.0, x) } else { reference::softmax(x) }
}

/// Scaled dot-product attention, `softmax(q kᵀ / √d) v` (Vaswani et al. 2017, Eq. 1).
/// `q`, `k`, `v`: `(b, n, d)`, heads folded into `b`. Returns `(b, n, d)`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::on_cuda(q, &[]) {
        let scores = reference::matmul(q, &k.transpose(1, 2)?)?;
        return reference::matmul(&cuda::softmax(&scores, attention_scale(q)? as f32)?, v);
    }
    if on_cpu(&[q, k, v]) { attention_at(CpuLevel::get(), q, k, v) } else { reference::attention(q, k, v) }
}

fn attention_at(level: CpuLevel, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let scores = matmul_at(level, q, &k.transpose(1, 2)?)?;
    matmul_at(level, &softmax_at(level, attention_scale(q)? as f32, &scores)?, v)
}

/// 1 / √d.
fn attention_scale(q: &Tensor) -> Result<f64> {
    Ok(1.0 / (q.dim(D::Minus1)? as f64).sqrt())
}

/// `softmax(scale · x)`, `scale` positive.
fn softmax_at(level: CpuLevel, scale: f32, x: &Tensor) -> Result<Tensor> {
    x.dim(D::Minus1)?;
    Ok(x.contiguous()?.apply_op1(Softmax { level, scale })?)
}

struct Softmax {
    level: CpuLevel,
    scale: f32,
}

/// Rows of a task.
const ROWS: usize = 64;

struct Rows<'a> {
    scale: f32,
    columns: usize,
    x: &'a [f32],
    out: &'a mut [f32],
}

impl Loop for Rows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { scale, columns, x, out } = self;
        for (out, x) in out.chunks_exact_mut(columns).zip(x.chunks_exact(columns)) {
            softmax_row::<A>(scale, x, out);
        }
    }
}

/// Writes `softmax(scale · x)`; returns the largest element and the sum of `exp(scale · (x - largest))`.
#[inline(always)]
pub(super) fn softmax_row<A: Arithmetic>(scale: f32, x: &[f32], out: &mut [f32]) -> (f32, f32) {
    let largest = max(x);
    out.iter_mut().zip(x).for_each(|(out, x)| *out = exp::<A>(scale * (x - largest)));
    let total = sum(out, |_, v| v);
    let inverse = 1.0 / total;
    out.iter_mut().for_each(|out| *out *= inverse);
    (largest, total)
}

struct RowGradients<'a> {
    scale: f32,
    columns: usize,
    p: &'a [f32],
    dp: &'a [f32],
    dx: &'a mut [f32],
}

impl Loop for RowGradients<'_> {
    type Output = ();
    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { scale, columns, p, dp, dx } = self;
        let rows = p.chunks_exact(columns).zip(dp.chunks_exact(columns));
        for (dx, (p, dp)) in dx.chunks_exact_mut(columns).zip(rows) {
            let mean = sum(p, |i, p| p * dp[i]);
            dx.iter_mut().zip(p).zip(dp).for_each(|((dx, p), dp)| *dx = scale * p * (dp - mean));
        }
    }
}

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let columns = layout.shape().dim(D::Minus1)?.max(1);
        let x = elements(x, layout)?;
        let mut out = zeros(x.len());
        for_each_chunk(&mut out, ROWS * columns, x.len(), |i, out| {
            let x = &x[i * ROWS * columns..][..out.len()];
            run(self.level, Rows { scale: self.scale, columns, x, out });
        });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, p: &Tensor, dp: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let columns = x.dim(D::Minus1)?.max(1);
        let dp = dp.contiguous()?;
        let (p, dp) = (Elements::of(p)?, Elements::of(&dp)?);
        let mut dx = zeros(p.len());
        for_each_chunk(&mut dx, ROWS * columns, p.len(), |i, dx| {
            let range = i * ROWS * columns..i * ROWS * columns + dx.len();
            let (p, dp) = (&p[range.clone()], &dp[range]);
            run(self.level, RowGradients { scale: self.scale, columns, p, dp, dx });
        });
        Ok(Some(tensor(dx, x)?))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::*, *};

    #[test]
    fn softmax_matches_the_reference_in_double_precision() {
        for shape in [(2, 3, 5), (7, 9, 33), (2, 1, 1), (3, 70, 400)] {
            let x = [(random(1, shape) * 3.0).unwrap()];
            check(&x, |level, t| softmax_at(level, 1.0, &t[0]), |t| reference::softmax(&t[0]));
        }
    }

    #[test]
    fn attention_matches_the_reference_in_double_precision() {
        for shape in [(2, 5, 3), (3, 33, 16)] {
            let operands = [random(1, shape), random(2, shape), random(3, shape)];
            check(
                &operands,
                |level, t| attention_at(level, &t[0], &t[1], &t[2]),
                |t| reference::attention(&t[0], &t[1], &t[2]),
            );
        }
    }

    #[test]
    fn a_sample_does_not_see_its_batch_nor_the_threads() {
        let operands = [random(1, (7, 33, 16)), random(2, (7, 33, 16)), random(3, (7, 33, 16))];
        check_invariance(&operands, 3, |t| attention(&t[0], &t[1], &t[2]));
    }

    #[test]
    fn attention_gradients_are_finite_differences() {
        let operands = [random(1, (2, 4, 3)), random(2, (2, 4, 3)), random(3, (2, 4, 3))];
        check_finite_differences(&operands, |t| attention(&t[0], &t[1], &t[2]));
    }

    #[test]
    fn softmax_is_stable_and_shows_nan() {
        let x =
            Tensor::new(&[[1e30f32, 1e30], [0.0, f32::NAN], [f32::NEG_INFINITY, 0.0]], x_device()).unwrap();
        let p = values(&softmax(&x).unwrap());
        assert_eq!(p[..2], [0.5, 0.5]);
        assert!(p[2].is_nan() && p[3].is_nan());
        assert!(p[4] < 1e-37 && p[5] == 1.0);
    }

    fn x_device() -> &'static candle_core::Device {
        &candle_core::Device::Cpu
    }
}
