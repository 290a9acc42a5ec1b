//! Changes of resolution.

use candle_core::{DType, Shape, Tensor};

use super::{
    microkernel::zeros,
    parallel::for_each_chunk,
    reduce::column_sums,
    shell::{self, Backward, Gradients, Node, Op, Operand, Output},
};
use crate::{Result, device::CpuLevel};

/// Nearest-neighbour upsampling by two. `x`: `(b, h, w, c)`. Returns `(b, 2h, 2w, c)`.
pub fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    x.dims4()?;
    shell::run(Upsample, [x])
}

/// Mean over the positions. `x`: `(b, h, w, c)`. Returns `(b, c)`, f32 of bf16. Fails if there are no positions.
pub fn global_avg_pool(x: &Tensor) -> Result<Tensor> {
    let (_, h, w, _) = x.dims4()?;
    if h * w == 0 {
        bail!(Alarm, "the mean over the positions of an image of shape {:?}", x.dims());
    }
    shell::run(AvgPool { level: CpuLevel::get() }, [x])
}

/// Mean over adjacent windows of `k` × `k` pixels; rows and columns beyond the last whole window are left out. `x`:
/// `(b, h, w, c)`. Returns `(b, h / k, w / k, c)`, f32 of bf16. Fails if there is no window.
pub fn avg_pool2d(x: &Tensor, k: usize) -> Result<Tensor> {
    let (_, h, w, _) = x.dims4()?;
    if k == 0 || h < k || w < k {
        bail!(Alarm, "images of {h} x {w} have no windows of {k} x {k}");
    }
    shell::run(WindowPool { k }, [x])
}

/// bf16 numbers as f32, which is needed for their sums.
fn to_sum(x: &Tensor) -> candle_core::Result<Tensor> {
    x.to_dtype(if x.dtype() == DType::BF16 { DType::F32 } else { x.dtype() })
}

struct Upsample;

impl Node<1> for Upsample {
    const NAME: &'static str = "upsample-nearest2x";

    fn forward(&self, [x]: [Operand; 1]) -> Output {
        let (b, h, w, c) = x.shape().dims4()?;
        let mut out = zeros(4 * x.len());
        for_each_chunk(&mut out, 4 * w * c, x.len(), |row, out| {
            let x = &x[row * w * c..][..w * c];
            let (upper, lower) = out.split_at_mut(2 * w * c);
            for (out, x) in upper.chunks_exact_mut(2 * c).zip(x.chunks_exact(c)) {
                let (left, right) = out.split_at_mut(c);
                left.copy_from_slice(x);
                right.copy_from_slice(x);
            }
            lower.copy_from_slice(upper);
        });
        Ok((out, Shape::from((b, 2 * h, 2 * w, c))))
    }

    fn backward(&self, [x]: [Operand; 1], Backward { dy, .. }: Backward<1>) -> Gradients<1> {
        let (_, _, w, c) = x.shape().dims4()?;
        let mut dx = zeros(dy.len() / 4);
        for_each_chunk(&mut dx, w * c, dy.len(), |row, dx| {
            let (upper, lower) = dy[row * 4 * w * c..][..4 * w * c].split_at(2 * w * c);
            let fours = upper.chunks_exact(2 * c).zip(lower.chunks_exact(2 * c));
            for (dx, (upper, lower)) in dx.chunks_exact_mut(c).zip(fours) {
                for (i, dx) in dx.iter_mut().enumerate() {
                    *dx = (upper[i] + upper[c + i]) + (lower[i] + lower[c + i]);
                }
            }
        });
        Ok([Some(dx)])
    }
}

impl Op<1> for Upsample {
    fn reference(&self, [x]: [&Tensor; 1]) -> Result<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        Ok(x.reshape((b, h, 1, w, 1, c))?.broadcast_as((b, h, 2, w, 2, c))?.reshape((b, 2 * h, 2 * w, c))?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(self, operands: [&Tensor; 1]) -> Result<Tensor> {
        shell::apply_cuda(self, operands)
    }
}

struct AvgPool {
    level: CpuLevel,
}

impl Node<1> for AvgPool {
    const NAME: &'static str = "global-avg-pool";

    fn forward(&self, [x]: [Operand; 1]) -> Output {
        let (b, h, w, c) = x.shape().dims4()?;
        let mut out = vec![0f32; b * c];
        for_each_chunk(&mut out, c, x.len(), |i, out| {
            let sums = column_sums(self.level, &x[i * h * w * c..][..h * w * c], c);
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out = (sum / (h * w) as f64) as f32);
        });
        Ok((out, Shape::from((b, c))))
    }

    fn backward(&self, [x]: [Operand; 1], Backward { dy, .. }: Backward<1>) -> Gradients<1> {
        let (_, h, w, c) = x.shape().dims4()?;
        let share = (1.0 / (h * w) as f64) as f32;
        let mut dx = zeros(x.len());
        for_each_chunk(&mut dx, h * w * c, x.len(), |i, dx| {
            let shares: Vec<f32> = dy[i * c..][..c].iter().map(|dy| dy * share).collect();
            dx.chunks_exact_mut(c).for_each(|dx| dx.copy_from_slice(&shares));
        });
        Ok([Some(dx)])
    }
}

impl Op<1> for AvgPool {
    fn reference(&self, [x]: [&Tensor; 1]) -> Result<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        Ok(to_sum(x)?.reshape((b, h * w, c))?.mean(1)?)
    }
}

struct WindowPool {
    k: usize,
}

impl Node<1> for WindowPool {
    const NAME: &'static str = "avg-pool2d";

    fn forward(&self, [x]: [Operand; 1]) -> Output {
        let (b, h, w, c) = x.shape().dims4()?;
        let k = self.k;
        let (out_h, out_w) = (h / k, w / k);
        let mut out = vec![0f32; b * out_h * out_w * c];
        for_each_chunk(&mut out, out_w * c, x.len(), |row, out| {
            let top = row / out_h * h + row % out_h * k;
            for x in x[top * w * c..].chunks_exact(w * c).take(k) {
                for (out, x) in out.chunks_exact_mut(c).zip(x.chunks_exact(k * c)) {
                    for x in x.chunks_exact(c) {
                        out.iter_mut().zip(x).for_each(|(out, x)| *out += x);
                    }
                }
            }
            out.iter_mut().for_each(|out| *out *= 1.0 / (k * k) as f32);
        });
        Ok((out, Shape::from((b, out_h, out_w, c))))
    }

    fn backward(&self, [x]: [Operand; 1], Backward { dy, .. }: Backward<1>) -> Gradients<1> {
        let (_, h, w, c) = x.shape().dims4()?;
        let k = self.k;
        let (out_h, out_w) = (h / k, w / k);
        let share = (1.0 / (k * k) as f64) as f32;
        let dy: Vec<f32> = dy.iter().map(|dy| dy * share).collect();
        let mut dx = zeros(x.len());
        for_each_chunk(&mut dx, w * c, x.len(), |row, dx| {
            let (sample, y) = (row / h, row % h / k);
            if y == out_h {
                return;
            }
            let dy = &dy[(sample * out_h + y) * out_w * c..][..out_w * c];
            for (dx, dy) in dx.chunks_exact_mut(k * c).zip(dy.chunks_exact(c)) {
                dx.chunks_exact_mut(c).for_each(|dx| dx.copy_from_slice(dy));
            }
        });
        Ok([Some(dx)])
    }
}

impl Op<1> for WindowPool {
    fn reference(&self, [x]: [&Tensor; 1]) -> Result<Tensor> {
        let ((b, h, w, c), k) = (x.dims4()?, self.k);
        let whole = to_sum(x)?.narrow(1, 0, h / k * k)?.narrow(2, 0, w / k * k)?;
        let lines = whole.reshape((b, h / k, k, w / k, k * c))?.mean(2)?;
        Ok(lines.reshape((b, h / k, w / k, k, c))?.mean(3)?)
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::{CudaStorage, Layout, Shape, Tensor};

    use crate::kernels::{
        cuda::{
            count32, elementwise, kernel_of, launch, tensor, uninitialized, view, with_element, with_views,
        },
        resample::Upsample,
        shell::{CudaBackward, CudaGradients, CudaNode, CudaOutput},
    };

    impl CudaNode<1> for Upsample {
        const NAME: &'static str = "upsample-nearest2x";

        fn forward(&self, [(x, layout)]: [(&CudaStorage, &Layout); 1]) -> CudaOutput {
            let ((b, h, w, c), device) = (layout.shape().dims4()?, &x.device);
            let (n, [h32, w32, c32]) = (4 * b * h * w * c, [h, w, c].map(|v| v as i32));
            let count = count32(n)?;
            with_element!(x, T => {
                let (x, out) = (view::<T>(x, layout)?, uninitialized::<T>(device, n)?);
                let forward = kernel_of::<T>(device, "upsample_forward")?;
                launch!(forward, elementwise(n), &x, &h32, &w32, &c32, &count, &out);
                let shape = Shape::from((b, 2 * h, 2 * w, c));
                Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), shape))
            })
        }

        fn backward(&self, [x]: [&Tensor; 1], CudaBackward { dy, .. }: CudaBackward<1>) -> CudaGradients<1> {
            let ((_, h, w, c), n) = (x.dims4()?, x.elem_count());
            let ([h, w, c], count) = ([h, w, c].map(|v| v as i32), count32(n)?);
            with_element!(x, T => with_views::<T, 1, _>([dy], |device, [dy]| {
                let (backward, dx) = (kernel_of::<T>(device, "upsample_backward")?, uninitialized::<T>(device, n)?);
                launch!(backward, elementwise(n), &dy, &h, &w, &c, &count, &dx);
                Ok([Some(tensor(device, dx, x.shape()))])
            }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::*, *};

    #[test]
    fn resampling_matches_the_reference_in_double_precision() {
        for shape in [(2, 3, 5, 1), (3, 4, 4, 33), (2, 40, 40, 48)] {
            let x = [random(1, shape)];
            check(&x, |_| Upsample);
            check(&x, |level| AvgPool { level });
        }
    }

    #[test]
    fn pooling_by_windows_matches_the_reference_in_double_precision() {
        for (shape, k) in [((2, 3, 5, 1), 2), ((3, 8, 8, 33), 4), ((2, 7, 10, 3), 3), ((2, 40, 40, 48), 2)] {
            let x = [random(1, shape)];
            check(&x, |_| WindowPool { k });
        }
    }

    #[test]
    fn windows_lie_side_by_side_and_the_rest_is_left_out() {
        let rows = [[1f32, 2., 3., 4., 99.], [5., 6., 7., 8., 99.], [99.; 5]];
        let x = Tensor::new(&[rows], &candle_core::Device::Cpu).unwrap().unsqueeze(3).unwrap();
        let pooled = avg_pool2d(&x, 2).unwrap();
        assert_eq!((pooled.dims(), values(&pooled)), (&[1, 1, 2, 1][..], vec![3.5, 5.5]));
        let error = avg_pool2d(&x, 4).unwrap_err().to_string();
        assert_eq!(error, "images of 3 x 5 have no windows of 4 x 4");
    }

    #[test]
    fn upsampling_doubles_rows_and_columns() {
        let x = Tensor::new(&[[[[1f32], [2.0]], [[3.0], [4.0]]]], &candle_core::Device::Cpu).unwrap();
        let expected = [1., 1., 2., 2., 1., 1., 2., 2., 3., 3., 4., 4., 3., 3., 4., 4.];
        assert_eq!(values(&upsample_nearest2x(&x).unwrap()), expected);
        assert_eq!(values(&global_avg_pool(&x).unwrap()), [2.5]);
    }

    #[test]
    fn a_sample_does_not_see_its_batch_nor_the_threads() {
        let x = [random(1, (7, 30, 30, 17))];
        check_invariance(&x, 1, |t| upsample_nearest2x(&t[0]));
        check_invariance(&x, 1, |t| global_avg_pool(&t[0]));
        check_invariance(&x, 1, |t| avg_pool2d(&t[0], 4));
    }
}
