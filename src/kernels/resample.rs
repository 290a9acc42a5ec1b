//! Changes of resolution.

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{
    Elements, elements, for_each_chunk, microkernel::zeros, on_cpu, reduce::column_sums, reference, tensor,
};
use crate::{Result, device::CpuLevel};

/// Nearest-neighbour upsampling by two. `x`: `(b, h, w, c)`. Returns `(b, 2h, 2w, c)`.
pub fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::on_cuda(x, &[]) {
        return cuda::upsample_nearest2x(x);
    }
    if !on_cpu(&[x]) {
        return reference::upsample_nearest2x(x);
    }
    x.dims4()?;
    Ok(x.contiguous()?.apply_op1(Upsample)?)
}

/// Mean over the positions. `x`: `(b, h, w, c)`. Returns `(b, c)`, f32 of bf16. Fails if there are no positions.
pub fn global_avg_pool(x: &Tensor) -> Result<Tensor> {
    if on_cpu(&[x]) { global_avg_pool_at(CpuLevel::get(), x) } else { reference::global_avg_pool(x) }
}

fn global_avg_pool_at(level: CpuLevel, x: &Tensor) -> Result<Tensor> {
    let (_, h, w, _) = x.dims4()?;
    if h * w == 0 {
        bail!(Alarm, "the mean over the positions of an image of shape {:?}", x.dims());
    }
    Ok(x.contiguous()?.apply_op1(AvgPool { level })?)
}

/// Mean over windows of `k` × `k` pixels side by side; rows and columns past the last whole window are left out.
/// `x`: `(b, h, w, c)`. Returns `(b, h / k, w / k, c)`, f32 of bf16. Fails if there is no window.
pub fn avg_pool2d(x: &Tensor, k: usize) -> Result<Tensor> {
    let (_, h, w, _) = x.dims4()?;
    if k == 0 || h < k || w < k {
        bail!(Alarm, "images of {h} x {w} have no windows of {k} x {k}");
    }
    if !on_cpu(&[x]) {
        return reference::avg_pool2d(x, k);
    }
    Ok(x.contiguous()?.apply_op1(WindowPool { k })?)
}

struct Upsample;

impl CustomOp1 for Upsample {
    fn name(&self) -> &'static str {
        "upsample-nearest2x"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (b, h, w, c) = layout.shape().dims4()?;
        let x = elements(x, layout)?;
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
        Ok((CpuStorage::F32(out), Shape::from((b, 2 * h, 2 * w, c))))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let (_, _, w, c) = x.dims4()?;
        let dy = dy.contiguous()?;
        let dy = Elements::of(&dy)?;
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
        Ok(Some(tensor(dx, x)?))
    }
}

struct AvgPool {
    level: CpuLevel,
}

impl CustomOp1 for AvgPool {
    fn name(&self) -> &'static str {
        "global-avg-pool"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (b, h, w, c) = layout.shape().dims4()?;
        let x = elements(x, layout)?;
        let mut out = vec![0f32; b * c];
        for_each_chunk(&mut out, c, x.len(), |i, out| {
            let sums = column_sums(self.level, &x[i * h * w * c..][..h * w * c], c);
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out = (sum / (h * w) as f64) as f32);
        });
        Ok((CpuStorage::F32(out), Shape::from((b, c))))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let (_, h, w, c) = x.dims4()?;
        let dy = (dy.contiguous()? * (1.0 / (h * w) as f64))?;
        let dy = Elements::of(&dy)?;
        let mut dx = zeros(x.elem_count());
        for_each_chunk(&mut dx, h * w * c, x.elem_count(), |i, dx| {
            dx.chunks_exact_mut(c).for_each(|dx| dx.copy_from_slice(&dy[i * c..][..c]));
        });
        Ok(Some(tensor(dx, x)?))
    }
}

struct WindowPool {
    k: usize,
}

impl CustomOp1 for WindowPool {
    fn name(&self) -> &'static str {
        "avg-pool2d"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (b, h, w, c) = layout.shape().dims4()?;
        let (k, x) = (self.k, elements(x, layout)?);
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
        Ok((CpuStorage::F32(out), Shape::from((b, out_h, out_w, c))))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let (_, h, w, c) = x.dims4()?;
        let k = self.k;
        let (out_h, out_w) = (h / k, w / k);
        let dy = (dy.contiguous()? * (1.0 / (k * k) as f64))?;
        let dy = Elements::of(&dy)?;
        let mut dx = zeros(x.elem_count());
        for_each_chunk(&mut dx, w * c, x.elem_count(), |row, dx| {
            let (sample, y) = (row / h, row % h / k);
            if y == out_h {
                return;
            }
            let dy = &dy[(sample * out_h + y) * out_w * c..][..out_w * c];
            for (dx, dy) in dx.chunks_exact_mut(k * c).zip(dy.chunks_exact(c)) {
                dx.chunks_exact_mut(c).for_each(|dx| dx.copy_from_slice(dy));
            }
        });
        Ok(Some(tensor(dx, x)?))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::*, *};

    #[test]
    fn resampling_matches_the_reference_in_double_precision() {
        for shape in [(2, 3, 5, 1), (3, 4, 4, 33), (2, 40, 40, 48)] {
            let x = [random(1, shape)];
            check(&x, |_, t| upsample_nearest2x(&t[0]), |t| reference::upsample_nearest2x(&t[0]));
            check(&x, |level, t| global_avg_pool_at(level, &t[0]), |t| reference::global_avg_pool(&t[0]));
        }
    }

    #[test]
    fn pooling_by_windows_matches_the_reference_in_double_precision() {
        for (shape, k) in [((2, 3, 5, 1), 2), ((3, 8, 8, 33), 4), ((2, 7, 10, 3), 3), ((2, 40, 40, 48), 2)] {
            let x = [random(1, shape)];
            check(&x, |_, t| avg_pool2d(&t[0], k), |t| reference::avg_pool2d(&t[0], k));
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
