//! A number added to each channel.

use candle_core::{D, Tensor};

use super::{
    microkernel::zeros,
    parallel::for_each_chunk,
    reduce::bias_gradient,
    shell::{self, Backward, Gradients, Node, Op, Operand, Output},
};
use crate::{Result, device::CpuLevel};

/// `x + shift`. `x`: `(b, …, c)`; `shift`: `(c,)`, or `(b, c)` with one vector per sample. Returns the shape of
/// `x`. Fails if the shapes do not fit.
pub fn add_channels(x: &Tensor, shift: &Tensor) -> Result<Tensor> {
    let (b, c) = (x.dims().first(), x.dims().last());
    let fits = match *shift.dims() {
        [of_c] => c == Some(&of_c),
        [of_b, of_c] => (b, c) == (Some(&of_b), Some(&of_c)),
        _ => false,
    };
    if !fits {
        bail!(Alarm, "{:?} is added to the channels of {:?}", shift.dims(), x.dims());
    }
    let images = if shift.rank() == 2 { x.dim(0)? } else { 1 };
    shell::run(AddChannels { level: CpuLevel::get(), segments: images }, [x, shift])
}

/// A vector of the channels, or one for each sample, in as many dimensions as `x`, and in its type.
pub(super) fn per_channel(x: &Tensor, t: &Tensor) -> candle_core::Result<Tensor> {
    let c = x.dim(D::Minus1)?;
    let mut dims = vec![1; x.rank()];
    dims[0] = t.elem_count() / c.max(1);
    dims[x.rank() - 1] = c;
    t.to_dtype(x.dtype())?.reshape(dims)
}

struct AddChannels {
    level: CpuLevel,
    /// The parts of `x` that have a shift of their own.
    segments: usize,
}

impl Node<2> for AddChannels {
    const NAME: &'static str = "add-channels";

    fn forward(&self, [x, shift]: [Operand; 2]) -> Output {
        let (segment, c) =
            ((x.len() / self.segments.max(1)).max(1), (shift.len() / self.segments.max(1)).max(1));
        let mut out = zeros(x.len());
        for_each_chunk(&mut out, segment, x.len(), |i, out| {
            let rows = out.chunks_exact_mut(c).zip(x[i * segment..].chunks_exact(c));
            for (out, x) in rows {
                out.iter_mut().zip(x).zip(&shift[i * c..]).for_each(|((out, x), shift)| *out = x + shift);
            }
        });
        Ok((out, x.shape().clone()))
    }

    fn backward(&self, [_, shift]: [Operand; 2], Backward { dy, wanted, .. }: Backward<2>) -> Gradients<2> {
        let (segment, c) = ((dy.len() / self.segments.max(1)).max(1), shift.len() / self.segments.max(1));
        let sums = || dy.chunks_exact(segment).flat_map(|dy| bias_gradient(self.level, dy, c)).collect();
        Ok([Some(dy.to_vec()), wanted[1].then(sums)])
    }
}

impl Op<2> for AddChannels {
    fn reference(&self, [x, shift]: [&Tensor; 2]) -> Result<Tensor> {
        Ok(x.broadcast_add(&per_channel(x, shift)?)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(self, operands: [&Tensor; 2]) -> Result<Tensor> {
        shell::apply_cuda(self, operands)
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::{CudaStorage, D, Layout, Tensor};

    use crate::kernels::{
        add_channels::AddChannels,
        cuda::{
            count32, kernel_of, launch,
            norm::{Sizes, moments_of},
            per_segment, uninitialized, view, with_element,
        },
        shell::{CudaBackward, CudaGradients, CudaNode, CudaOutput},
    };

    impl CudaNode<2> for AddChannels {
        const NAME: &'static str = "add-channels";

        fn forward(&self, [(x, layout), (shift, shift_layout)]: [(&CudaStorage, &Layout); 2]) -> CudaOutput {
            let (device, (images, c)) =
                (&x.device, (layout.shape().dims()[0], layout.shape().dim(D::Minus1)?));
            // The number of shifts per image: `c`, or 0 if all share the same.
            let own = if shift_layout.shape().rank() == 2 { c } else { 0 };
            with_element!(x, T => {
                let (x, shift) = (view::<T>(x, layout)?, view::<f32>(shift, shift_layout)?);
                let out = uninitialized::<T>(device, x.len())?;
                let per_image = x.len() / images.max(1);
                let ([c, own, images32], per) = ([c, own, images].map(|v| v as i32), count32(per_image)?);
                let (kernel, config) = (kernel_of::<T>(device, "add_channels")?, per_segment(per_image, images));
                launch!(kernel, config, &x, &shift, &own, &c, &images32, &per, &out);
                Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), layout.shape().clone()))
            })
        }

        fn backward(&self, [_, shift]: [&Tensor; 2], back: CudaBackward<2>) -> CudaGradients<2> {
            let CudaBackward { dy, wanted, .. } = back;
            // The sums over the rows are those that norms begin with.
            let sums = || {
                let (segments, c) = (self.segments, dy.dim(D::Minus1)?);
                let rows = dy.elem_count() / (segments * c).max(1);
                let sizes = Sizes { segments, rows, c, groups: c };
                (moments_of(dy, sizes, 0.0)?.mean * rows as f64)?.reshape(shift.shape())
            };
            Ok([Some(dy.clone()), wanted[1].then(sums).transpose()?])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::*, *};

    #[test]
    fn shifts_match_the_reference_in_double_precision() {
        for (shape, own) in [((2, 3, 5, 7), false), ((3, 33, 33, 20), true)] {
            let (b, .., c) = shape;
            let shift = if own { random(2, (b, c)) } else { random(2, c) };
            let segments = if own { b } else { 1 };
            check(&[random(1, shape), shift], |level| AddChannels { level, segments });
        }
    }

    #[test]
    fn channels_are_shifted_by_their_number_or_by_that_of_their_sample() {
        let x =
            Tensor::new(&[[[1f32, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]], &candle_core::Device::Cpu)
                .unwrap();
        let shift = |numbers: &[f32], shape: &[usize]| {
            Tensor::new(numbers, x.device()).unwrap().reshape(shape).unwrap()
        };
        let of = |shift: Tensor| values(&add_channels(&x, &shift).unwrap());
        assert_eq!(of(shift(&[10.0, 20.0], &[2])), [11.0, 22.0, 13.0, 24.0, 15.0, 26.0, 17.0, 28.0]);
        let own = shift(&[10.0, 20.0, 30.0, 40.0], &[2, 2]);
        assert_eq!(of(own), [11.0, 22.0, 13.0, 24.0, 35.0, 46.0, 37.0, 48.0]);
        for shape in [[1, 2], [4, 1]] {
            let error =
                add_channels(&x, &shift(&[0.0; 4][..shape[0] * shape[1]], &shape)).unwrap_err().to_string();
            assert!(error.contains(&format!("{shape:?} is added to the channels of [2, 2, 2]")), "{error}");
        }
    }
}
