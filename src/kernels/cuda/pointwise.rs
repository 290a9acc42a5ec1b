//! Activations, softmax, upsampling, the step of an attack, optimisers, images and noise.

use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp1, D, Layout, Shape, Tensor,
    cuda_backend::cudarc::driver::{CudaSlice, LaunchConfig},
};

use super::{
    Element, config, count32, elementwise, kernel, kernel_of, launch, not_here, per_segment, tensor,
    uninitialized, view, with_element, with_views,
};
use crate::Result;

/// An activation, numbered as in kernels.cu.
#[derive(Clone, Copy)]
pub(in crate::kernels) enum Function {
    Silu = 1,
    Relu = 2,
}

/// What the ops of one operand do.
#[derive(Clone, Copy)]
enum Kind {
    Activation(Function),
    /// Softmax of the product with a scale.
    Softmax(f32),
    Upsample,
}

pub(in crate::kernels) fn activation(x: &Tensor, function: Function) -> Result<Tensor> {
    Ok(x.contiguous()?.apply_op1(Pointwise(Kind::Activation(function)))?)
}

/// `softmax(scale · x)` over the last dimension, `scale` positive.
pub(in crate::kernels) fn softmax(x: &Tensor, scale: f32) -> Result<Tensor> {
    x.dim(D::Minus1)?;
    Ok(x.contiguous()?.apply_op1(Pointwise(Kind::Softmax(scale)))?)
}

pub(in crate::kernels) fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    x.dims4()?;
    Ok(x.contiguous()?.apply_op1(Pointwise(Kind::Upsample))?)
}

struct Pointwise(Kind);

/// The rows and columns of softmax, and a warp for each row.
fn warps(shape: &Shape) -> candle_core::Result<(i32, i32, LaunchConfig)> {
    const WARPS: usize = 4;
    let columns = shape.dim(D::Minus1)?.max(1);
    let rows = shape.elem_count() / columns;
    Ok((rows as i32, columns as i32, config((rows.div_ceil(WARPS).max(1), 1, 1), (32, WARPS, 1))))
}

impl Pointwise {
    fn forward<T: Element>(
        &self,
        x: &CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let device = &x.device;
        let x = view::<T>(x, layout)?;
        let n = x.len();
        let (out, shape) = match self.0 {
            Kind::Activation(function) => {
                let (out, function) = (uninitialized::<T>(device, n)?, function as i32);
                launch!(
                    kernel_of::<T>(device, "activation_forward")?,
                    elementwise(n),
                    &x,
                    &function,
                    &n,
                    &out
                );
                (out, layout.shape().clone())
            }
            Kind::Softmax(scale) => {
                let out = uninitialized::<T>(device, n)?;
                let (rows, columns, config) = warps(layout.shape())?;
                launch!(
                    kernel_of::<T>(device, "softmax_forward")?,
                    config,
                    &x,
                    &scale,
                    &rows,
                    &columns,
                    &out
                );
                (out, layout.shape().clone())
            }
            Kind::Upsample => {
                let (b, h, w, c) = layout.shape().dims4()?;
                let (count, out) = (count32(4 * n)?, uninitialized::<T>(device, 4 * n)?);
                let [h32, w32, c32] = [h, w, c].map(|v| v as i32);
                let forward = kernel_of::<T>(device, "upsample_forward")?;
                launch!(forward, elementwise(4 * n), &x, &h32, &w32, &c32, &count, &out);
                (out, Shape::from((b, 2 * h, 2 * w, c)))
            }
        };
        Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), shape))
    }

    fn backward<T: Element>(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> candle_core::Result<Tensor> {
        let n = x.elem_count();
        // Softmax goes by its output, activations by their input.
        let operand = if matches!(self.0, Kind::Softmax(_)) { y } else { x };
        with_views::<T, 2, _>([operand, dy], |device, [operand, dy]| {
            let dx = uninitialized::<T>(device, n)?;
            match self.0 {
                Kind::Activation(function) => {
                    let function = function as i32;
                    let backward = kernel_of::<T>(device, "activation_backward")?;
                    launch!(backward, elementwise(n), &operand, &dy, &function, &n, &dx);
                }
                Kind::Softmax(scale) => {
                    let (rows, columns, config) = warps(x.shape())?;
                    let backward = kernel_of::<T>(device, "softmax_backward")?;
                    launch!(backward, config, &operand, &dy, &scale, &rows, &columns, &dx);
                }
                Kind::Upsample => {
                    let (_, h, w, c) = x.dims4()?;
                    let ([h32, w32, c32], count) = ([h, w, c].map(|v| v as i32), count32(n)?);
                    let backward = kernel_of::<T>(device, "upsample_backward")?;
                    launch!(backward, elementwise(n), &dy, &h32, &w32, &c32, &count, &dx);
                }
            }
            Ok(tensor(device, dx, x.shape()))
        })
    }
}

impl CustomOp1 for Pointwise {
    fn name(&self) -> &'static str {
        "pointwise"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        not_here()
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        with_element!(x, T => self.forward::<T>(x, layout))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let dy = dy.contiguous()?;
        with_element!(x, T => self.backward::<T>(x, y, &dy)).map(Some)
    }
}

/// The step of an attack, and the projection: `start` up the gradient by `step`, within `epsilon` of `x`, in [0, 1]. All
/// are f32 images; `l2` or else ℓ∞.
pub(in crate::kernels) fn pgd_step(
    x: &Tensor,
    start: &Tensor,
    gradient: &Tensor,
    (step, epsilon): (f64, f64),
    l2: bool,
) -> Result<Tensor> {
    let (step, epsilon) = (step as f32, epsilon as f32);
    let contiguous = [x.contiguous()?, start.contiguous()?, gradient.contiguous()?];
    let (images, n) = (x.dim(0)?, x.elem_count());
    Ok(with_views::<f32, 3, _>(contiguous.each_ref(), |device, [x_values, start, gradient]| {
        let out = uninitialized::<f32>(device, n)?;
        if l2 {
            let (per_image, config) =
                ((n / images.max(1)) as i32, config((images.max(1), 1, 1), (256, 1, 1)));
            let step_l2 = kernel(device, "pgd_step_l2")?;
            launch!(step_l2, config, &x_values, &start, &gradient, &step, &epsilon, &per_image, &out);
        } else {
            let step_linf = kernel(device, "pgd_step_linf")?;
            launch!(step_linf, elementwise(n), &x_values, &start, &gradient, &step, &epsilon, &n, &out);
        }
        Ok(tensor(device, out, x.shape()))
    })?)
}

/// SGD with momentum, in place: see [`fn@super::super::sgd_step`]. All tensors are f32, contiguous, of one shape, and `weight`
/// and `buffer` are written.
pub(in crate::kernels) fn sgd_step(
    [weight, gradient, buffer]: [&Tensor; 3],
    [scale, lr, momentum, decay]: [f64; 4],
    nesterov: bool,
) -> Result<()> {
    let [scale, lr, momentum, decay] = [scale, lr, momentum, decay].map(|v| v as f32);
    let (nesterov, n) = (i32::from(nesterov), weight.elem_count());
    Ok(with_views::<f32, 3, _>([weight, gradient, buffer], |device, [weight, gradient, buffer]| {
        let step = kernel(device, "sgd_step")?;
        let config = elementwise(n);
        launch!(step, config, &weight, &gradient, &buffer, &scale, &lr, &momentum, &decay, &nesterov, &n);
        Ok(())
    })?)
}

/// Adam, in place: see [`fn@super::super::adam_step`]. `numbers`: the gradients' scale, what is kept of the weights, the
/// step's size, the correction of the second moment, beta1, 1 - beta1, beta2, 1 - beta2, epsilon.
pub(in crate::kernels) fn adam_step(
    [weight, gradient, first, second]: [&Tensor; 4],
    numbers: [f64; 9],
) -> Result<()> {
    let [scale, keep, step_size, correction, beta1, rest1, beta2, rest2, epsilon] = numbers.map(|v| v as f32);
    let n = weight.elem_count();
    Ok(with_views::<f32, 4, _>(
        [weight, gradient, first, second],
        |device, [weight, gradient, first, second]| {
            let step = kernel(device, "adam_step")?;
            launch!(
                step,
                elementwise(n),
                &weight,
                &gradient,
                &first,
                &second,
                &scale,
                &keep,
                &step_size,
                &correction,
                &beta1,
                &rest1,
                &beta2,
                &rest2,
                &epsilon,
                &n,
            );
            Ok(())
        },
    )?)
}

/// Moves an average towards the weights, in place: see [`fn@super::super::average_step`].
pub(in crate::kernels) fn average_step(average: &Tensor, weight: &Tensor, rate: f64) -> Result<()> {
    let (rate, n) = (rate as f32, weight.elem_count());
    Ok(with_views::<f32, 2, _>([average, weight], |device, [average, weight]| {
        launch!(kernel(device, "average_step")?, elementwise(n), &average, &weight, &rate, &n);
        Ok(())
    })?)
}

/// Images from bytes, `table` having the float of each, cropped from a black border of `pad` and mirrored: `windows` has top,
/// left and whether to mirror, for each image. `dims`: (images, height, width, channels).
pub(in crate::kernels) fn crop_images(
    pixels: &[u8],
    windows: &[i32],
    table: &[f32; 256],
    dims: (usize, usize, usize, usize),
    pad: usize,
    device: &CudaDevice,
) -> Result<Tensor> {
    let (_, height, width, channels) = dims;
    let n = pixels.len();
    let (pixels, windows, table) =
        (device.clone_htod(pixels)?, device.clone_htod(windows)?, device.clone_htod(&table[..])?);
    let out: CudaSlice<f32> = uninitialized(device, n)?;
    let [height, width, channels, pad] = [height, width, channels, pad].map(|v| v as i32);
    let crop = || -> candle_core::Result<()> {
        let (crop, count) = (kernel(device, "crop_images")?, count32(n)?);
        launch!(
            crop,
            elementwise(n),
            &pixels,
            &windows,
            &table,
            &height,
            &width,
            &channels,
            &pad,
            &count,
            &out
        );
        Ok(())
    };
    crop()?;
    Ok(tensor(device, out, dims))
}

/// Standard normals, (images, height, width, channels): bit for bit those of [`crate::rng::normals`], drawn in CHW order.
pub(in crate::kernels) fn normal_images(
    seed: u64,
    samples: &[u64],
    step: u32,
    (height, width, channels): (usize, usize, usize),
    device: &CudaDevice,
) -> Result<Tensor> {
    let per_image = height * width * channels;
    let out: CudaSlice<f32> = uninitialized(device, samples.len() * per_image)?;
    let (low, high) = (seed as u32, (seed >> 32) as u32);
    let (positions, channels32, images) = ((height * width) as u32, channels as u32, samples.len() as i32);
    let draw = || -> candle_core::Result<()> {
        let samples_there = device.clone_htod(samples)?;
        let normals = kernel(device, "normal_images")?;
        let config = per_segment(per_image.div_ceil(4), samples.len());
        launch!(normals, config, &low, &high, &samples_there, &step, &images, &positions, &channels32, &out);
        Ok(())
    };
    if !samples.is_empty() {
        draw()?;
    }
    Ok(tensor(device, out, (samples.len(), height, width, channels)))
}
