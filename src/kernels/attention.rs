//! Softmax and attention.

use candle_core::{D, Tensor};

use super::{
    math::{exp, max, sum},
    matmul::matmul,
    microkernel::{Arithmetic, Loop, run, zeros},
    parallel::for_each_chunk,
    shell::{self, Backward, Gradients, Node, Op, Operand, Output},
};
use crate::{Result, device::CpuLevel};

/// Softmax over the last dimension.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    scaled_softmax(x, 1.0)
}

/// Scaled dot-product attention, `softmax(q kᵀ / √d) v` (Vaswani et al. 2017, Eq. 1).
/// `q`, `k`, `v`: `(b, n, d)`, heads folded into `b`. Returns `(b, n, d)`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    matmul(&scaled_softmax(&matmul(q, &k.transpose(1, 2)?)?, scale)?, v)
}

/// `softmax(scale · x)`, `scale` positive.
fn scaled_softmax(x: &Tensor, scale: f64) -> Result<Tensor> {
    x.dim(D::Minus1)?;
    shell::run(Softmax { level: CpuLevel::get(), scale }, [x])
}

struct Softmax {
    level: CpuLevel,
    scale: f64,
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

impl Node<1> for Softmax {
    const NAME: &'static str = "softmax";

    fn forward(&self, [x]: [Operand; 1]) -> Output {
        let (columns, scale) = (x.shape().dim(D::Minus1)?.max(1), self.scale as f32);
        let mut out = zeros(x.len());
        for_each_chunk(&mut out, ROWS * columns, x.len(), |i, out| {
            let x = &x[i * ROWS * columns..][..out.len()];
            run(self.level, Rows { scale, columns, x, out });
        });
        Ok((out, x.shape().clone()))
    }

    fn backward(&self, [x]: [Operand; 1], Backward { out: p, dy: dp, .. }: Backward<1>) -> Gradients<1> {
        let (columns, scale) = (x.shape().dim(D::Minus1)?.max(1), self.scale as f32);
        let mut dx = zeros(p.len());
        for_each_chunk(&mut dx, ROWS * columns, p.len(), |i, dx| {
            let range = i * ROWS * columns..i * ROWS * columns + dx.len();
            let (p, dp) = (&p[range.clone()], &dp[range]);
            run(self.level, RowGradients { scale, columns, p, dp, dx });
        });
        Ok([Some(dx)])
    }
}

impl Op<1> for Softmax {
    fn reference(&self, [x]: [&Tensor; 1]) -> Result<Tensor> {
        let x = &(x * self.scale)?;
        let e = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
        Ok(e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(self, operands: [&Tensor; 1]) -> Result<Tensor> {
        shell::apply_cuda(self, operands)
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::{
        CudaStorage, D, Layout, Result, Shape, Tensor, cuda_backend::cudarc::driver::LaunchConfig,
    };

    use crate::kernels::{
        attention::Softmax,
        cuda::{config, kernel_of, launch, tensor, uninitialized, view, with_element, with_views},
        shell::{CudaBackward, CudaGradients, CudaNode, CudaOutput},
    };

    /// The rows and columns, and a warp for each row.
    fn warps(shape: &Shape) -> Result<(i32, i32, LaunchConfig)> {
        const WARPS: usize = 4;
        let columns = shape.dim(D::Minus1)?.max(1);
        let rows = shape.elem_count() / columns;
        Ok((rows as i32, columns as i32, config((rows.div_ceil(WARPS).max(1), 1, 1), (32, WARPS, 1))))
    }

    impl CudaNode<1> for Softmax {
        const NAME: &'static str = "softmax";

        fn forward(&self, [(x, layout)]: [(&CudaStorage, &Layout); 1]) -> CudaOutput {
            let (scale, device, (rows, columns, config)) =
                (self.scale as f32, &x.device, warps(layout.shape())?);
            with_element!(x, T => {
                let x = view::<T>(x, layout)?;
                let out = uninitialized::<T>(device, x.len())?;
                launch!(kernel_of::<T>(device, "softmax_forward")?, config, &x, &scale, &rows, &columns, &out);
                Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), layout.shape().clone()))
            })
        }

        fn backward(&self, [x]: [&Tensor; 1], back: CudaBackward<1>) -> CudaGradients<1> {
            let CudaBackward { out: p, dy: dp, .. } = back;
            let (scale, n, (rows, columns, config)) = (self.scale as f32, x.elem_count(), warps(x.shape())?);
            with_element!(x, T => with_views::<T, 2, _>([p, dp], |device, [p, dp]| {
                let (backward, dx) = (kernel_of::<T>(device, "softmax_backward")?, uninitialized::<T>(device, n)?);
                launch!(backward, config, &p, &dp, &scale, &rows, &columns, &dx);
                Ok([Some(tensor(device, dx, x.shape()))])
            }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::*, *};

    #[test]
    fn softmax_matches_the_reference_in_double_precision() {
        for shape in [(2, 3, 5), (7, 9, 33), (2, 1, 1), (3, 70, 400)] {
            let x = [(random(1, shape) * 3.0).unwrap()];
            check(&x, |level| Softmax { level, scale: 1.0 });
            check(&x, |level| Softmax { level, scale: 0.3 });
        }
    }

    #[test]
    fn attention_matches_the_reference_in_double_precision() {
        for shape in [(2, 5, 3), (3, 33, 16)] {
            let operands = [random(1, shape), random(2, shape), random(3, shape)];
            check_function(&operands, |t| attention(&t[0], &t[1], &t[2]));
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
