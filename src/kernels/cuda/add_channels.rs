//! A number added to each channel.

use candle_core::{CpuStorage, CudaStorage, CustomOp2, D, Layout, Shape, Tensor};

use super::{
    Element, count32, kernel_of, launch,
    norm::{Sizes, moments_of},
    not_here, per_segment, uninitialized, view, with_element,
};
use crate::Result;

/// See [`fn@super::super::add_channels`].
pub(in crate::kernels) fn add_channels(x: &Tensor, shift: &Tensor) -> Result<Tensor> {
    let (b, c) = (x.dim(0)?, x.dim(D::Minus1)?);
    let op = AddChannels { images: b, c, own: shift.rank() == 2 };
    Ok(x.contiguous()?.apply_op2(&shift.contiguous()?, op)?)
}

struct AddChannels {
    images: usize,
    c: usize,
    /// Whether each image has its own numbers.
    own: bool,
}

impl AddChannels {
    fn forward<T: Element>(
        &self,
        (x, x_layout): (&CudaStorage, &Layout),
        (shift, shift_layout): (&CudaStorage, &Layout),
    ) -> candle_core::Result<CudaStorage> {
        let device = &x.device;
        let (x, shift) = (view::<T>(x, x_layout)?, view::<f32>(shift, shift_layout)?);
        let Self { images, c, own } = *self;
        let out = uninitialized::<T>(device, x.len())?;
        let per_image = x.len() / images.max(1);
        let own = if own { c } else { 0 };
        let ([c32, own32, images32], per) = ([c, own, images].map(|v| v as i32), count32(per_image)?);
        let (kernel, config) = (kernel_of::<T>(device, "add_channels")?, per_segment(per_image, images));
        launch!(kernel, config, &x, &shift, &own32, &c32, &images32, &per, &out);
        Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
    }
}

impl CustomOp2 for AddChannels {
    fn name(&self) -> &'static str {
        "add-channels"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        not_here()
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        shift: &CudaStorage,
        shift_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let out = with_element!(x, T => self.forward::<T>((x, x_layout), (shift, shift_layout)))?;
        Ok((out, x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        shift: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        // The sums over the rows are those that norms begin with.
        let sums = || {
            let segments = if self.own { self.images } else { 1 };
            let rows = dy.elem_count() / (segments * self.c).max(1);
            let sizes = Sizes { segments, rows, c: self.c, groups: self.c };
            (moments_of(&dy.contiguous()?, sizes, 0.0)?.mean * rows as f64)?.reshape(shift.shape())
        };
        let of_shift = shift.track_op().then(sums).transpose()?;
        Ok((x.track_op().then(|| dy.clone()), of_shift))
    }
}
