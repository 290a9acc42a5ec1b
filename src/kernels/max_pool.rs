//! Maxima over windows.

use std::ops::Range;

use candle_core::{Shape, Tensor};

use super::{
    microkernel::zeros,
    parallel::for_each_chunk,
    shell::{self, Backward, Gradients, Node, Op, Operand, Output},
};
use crate::Result;

/// The maximum over windows of `k` × `k` pixels that are `stride` apart: `torch.nn.MaxPool2d`. The image is padded by
/// `padding` pixels on each side, which are never the maximum. `x`: `(b, h, w, c)`. Returns `(b, h', w', c)` with
/// `h' = (h + 2 padding - k) / stride + 1`. The gradient of a maximum goes to the first pixel that has it. Fails if
/// the stride is 0, the padding larger than half a window, or if there is no window.
pub fn max_pool2d(x: &Tensor, k: usize, stride: usize, padding: usize) -> Result<Tensor> {
    let (_, h, w, _) = x.dims4()?;
    if stride == 0 || 2 * padding > k || h.min(w) + 2 * padding < k.max(1) {
        bail!(Alarm, "windows of {k} x {k}, stride {stride} and padding {padding} in images of {h} x {w}");
    }
    shell::run(MaxPool { k, stride, padding }, [x])
}

struct MaxPool {
    k: usize,
    stride: usize,
    padding: usize,
}

impl MaxPool {
    /// How many windows there are along a side.
    fn windows(&self, side: usize) -> usize {
        (side + 2 * self.padding - self.k) / self.stride + 1
    }

    /// The pixels of window `i` along a side.
    fn window(&self, i: usize, side: usize) -> Range<usize> {
        let start = i * self.stride;
        start.saturating_sub(self.padding)..(start + self.k - self.padding).min(side)
    }
}

impl Node<1> for MaxPool {
    const NAME: &'static str = "max-pool2d";

    fn forward(&self, [x]: [Operand; 1]) -> Output {
        let (b, h, w, c) = x.shape().dims4()?;
        let (out_h, out_w) = (self.windows(h), self.windows(w));
        let mut out = vec![f32::NEG_INFINITY; b * out_h * out_w * c];
        for_each_chunk(&mut out, out_w * c, x.len(), |row, out| {
            for y in self.window(row % out_h, h) {
                let line = &x[(row / out_h * h + y) * w * c..][..w * c];
                for (i, out) in out.chunks_exact_mut(c).enumerate() {
                    for x in self.window(i, w) {
                        for (out, &x) in out.iter_mut().zip(&line[x * c..]) {
                            // Not `max`: a NaN stays NaN.
                            *out = if x > *out || x.is_nan() { x } else { *out };
                        }
                    }
                }
            }
        });
        Ok((out, Shape::from((b, out_h, out_w, c))))
    }

    fn backward(&self, [x]: [Operand; 1], Backward { out, dy, .. }: Backward<1>) -> Gradients<1> {
        let (_, h, w, c) = x.shape().dims4()?;
        let (out_h, out_w) = (self.windows(h), self.windows(w));
        let mut dx = zeros(x.len());
        for_each_chunk(&mut dx, h * w * c, x.len(), |image, dx| {
            let x = &x[image * h * w * c..][..h * w * c];
            let mut left = vec![0.0; c];
            for window in 0..out_h * out_w {
                let at = (image * out_h * out_w + window) * c;
                left.copy_from_slice(&dy[at..][..c]);
                for y in self.window(window / out_w, h) {
                    for from in self.window(window % out_w, w).map(|x| (y * w + x) * c) {
                        let pixels = dx[from..].iter_mut().zip(&x[from..]);
                        for ((left, out), (dx, x)) in left.iter_mut().zip(&out[at..]).zip(pixels) {
                            if x == out {
                                *dx += std::mem::take(left);
                            }
                        }
                    }
                }
            }
        });
        Ok([Some(dx)])
    }
}

impl Op<1> for MaxPool {
    fn reference(&self, [x]: [&Tensor; 1]) -> Result<Tensor> {
        let Self { k, stride, padding } = *self;
        let (_, h, w, _) = x.dims4()?;
        let (out_h, out_w) = (self.windows(h), self.windows(w));
        // Padded so that every pixel of a window begins a row of `stride` pixels for each of the windows.
        let padded = |x: &Tensor, dim: usize, windows: usize| -> candle_core::Result<Tensor> {
            let side = x.dim(dim)?;
            let border = |size: usize| {
                let mut dims = x.dims().to_vec();
                dims[dim] = size;
                Tensor::full(f32::NEG_INFINITY, dims, x.device())?.to_dtype(x.dtype())
            };
            let after = (k - 1 + windows * stride).saturating_sub(padding + side);
            Tensor::cat(&[&border(padding)?, x, &border(after)?], dim)
        };
        let every = |x: &Tensor, dim: usize, first: usize, windows: usize| -> candle_core::Result<Tensor> {
            let mut dims = x.dims().to_vec();
            dims.splice(dim..=dim, [windows, stride]);
            x.narrow(dim, first, windows * stride)?
                .contiguous()?
                .reshape(dims)?
                .narrow(dim + 1, 0, 1)?
                .squeeze(dim + 1)
        };
        let x = padded(&padded(x, 1, out_h)?, 2, out_w)?;
        let mut pixels = Vec::new();
        for (y, first) in (0..k * k).map(|i| (i / k, i % k)) {
            pixels.push(every(&every(&x, 1, y, out_h)?, 2, first, out_w)?);
        }
        let pixels = Tensor::stack(&pixels, 4)?.contiguous()?;
        let largest = pixels.detach().argmax_keepdim(4)?;
        Ok(pixels.gather(&largest, 4)?.squeeze(4)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::{super::testing::*, *};

    #[test]
    fn maxima_match_the_reference_in_double_precision() {
        for (k, stride, padding) in [(3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 3, 1), (1, 1, 0)] {
            for shape in [(2, 3, 5, 1), (3, 8, 7, 33), (2, 20, 20, 48)] {
                check(&[random(1, shape)], |_| MaxPool { k, stride, padding });
            }
        }
    }

    /// torch 2.15: `max_pool2d` of 3 × 3 windows, stride 2 and padding 1, over [[1, 2, 2], [3, 0, 2], [-1, -2, -3]],
    /// and the gradient of [[1, 2], [4, 8]] by it.
    #[test]
    fn windows_overlap_padding_is_never_the_maximum_and_the_first_of_equals_has_the_gradient() {
        let x = Tensor::new(&[[1f32, 2., 2.], [3., 0., 2.], [-1., -2., -3.]], &Device::Cpu).unwrap();
        let x = Var::from_tensor(&x.reshape((1, 3, 3, 1)).unwrap()).unwrap();
        let out = max_pool2d(&x, 3, 2, 1).unwrap();
        assert_eq!(values(&out), [3., 2., 3., 2.]);
        let dy = Tensor::new(&[1f32, 2., 4., 8.], &Device::Cpu).unwrap();
        let grads = (out.flatten_all().unwrap() * dy).unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(values(grads.get(&x).unwrap()), [0., 2., 0., 5., 0., 8., 0., 0., 0.]);
        let below = Tensor::full(-7f32, (1, 2, 2, 1), &Device::Cpu).unwrap();
        assert_eq!(values(&max_pool2d(&below, 3, 2, 1).unwrap()), [-7.]);
        let nan = Tensor::new(&[[f32::NAN, 1.], [2., 3.]], &Device::Cpu).unwrap();
        assert!(values(&max_pool2d(&nan.reshape((1, 2, 2, 1)).unwrap(), 2, 2, 0).unwrap())[0].is_nan());
        let error = max_pool2d(&below, 3, 2, 0).unwrap_err().to_string();
        assert_eq!(error, "windows of 3 x 3, stride 2 and padding 0 in images of 2 x 2");
    }

    #[test]
    fn a_sample_does_not_see_its_batch_nor_the_threads() {
        check_invariance(&[random(1, (7, 30, 30, 17))], 1, |t| max_pool2d(&t[0], 3, 2, 1));
    }
}
