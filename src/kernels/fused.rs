//! Whole steps that a GPU does in one kernel each. The functions return nothing, or false, where the tensors are not on a GPU:
//! then the caller does it in its own way.

use candle_core::{Device, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use crate::Result;

/// `start` moved up the gradient by a step of length `step` in the norm, projected onto the ball of radius `epsilon` around
/// `x`, then into [0, 1]. All are f32 images `(b, …)`; the norm is ℓ2 if `l2`, else ℓ∞.
#[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "there is no GPU"))]
pub fn pgd_step(
    x: &Tensor,
    start: &Tensor,
    gradient: &Tensor,
    (step, epsilon): (f64, f64),
    l2: bool,
) -> Result<Option<Tensor>> {
    #[cfg(feature = "cuda")]
    if cuda::on_cuda(x, &[x, start, gradient]) {
        return cuda::pgd_step(x, start, gradient, (step, epsilon), l2).map(Some);
    }
    Ok(None)
}

/// PyTorch's SGD with momentum, in place. `weight` and `buffer` are written; `numbers`: the gradient's scale, learning rate,
/// momentum, weight decay.
#[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "there is no GPU"))]
pub fn sgd_step(
    weight: &Tensor,
    gradient: &Tensor,
    buffer: &Tensor,
    numbers: [f64; 4],
    nesterov: bool,
) -> Result<bool> {
    #[cfg(feature = "cuda")]
    if cuda::on_cuda(weight, &[weight, gradient, buffer]) {
        cuda::sgd_step([weight, &gradient.contiguous()?, buffer], numbers, nesterov)?;
        return Ok(true);
    }
    Ok(false)
}

/// Adam with decoupled weight decay, in place. `weight` and `moments` are written; `numbers`: the gradient's scale, what is
/// kept of the weights, the step's size, the correction of the second moment, β₁, 1 - β₁, β₂, 1 - β₂, ε.
#[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "there is no GPU"))]
pub fn adam_step(
    weight: &Tensor,
    gradient: &Tensor,
    moments: [&Tensor; 2],
    numbers: [f64; 9],
) -> Result<bool> {
    #[cfg(feature = "cuda")]
    if cuda::on_cuda(weight, &[weight, gradient, moments[0], moments[1]]) {
        cuda::adam_step([weight, &gradient.contiguous()?, moments[0], moments[1]], numbers)?;
        return Ok(true);
    }
    Ok(false)
}

/// `average += rate · (weight - average)`, in place.
#[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "there is no GPU"))]
pub fn average_step(average: &Tensor, weight: &Tensor, rate: f64) -> Result<bool> {
    #[cfg(feature = "cuda")]
    if cuda::on_cuda(average, &[average, weight]) {
        cuda::average_step(average, weight, rate)?;
        return Ok(true);
    }
    Ok(false)
}

/// Images `(b, h, w, c)` from bytes, `table` having the float of each, cropped from a black border of `pad` and mirrored:
/// `windows` gives top, left and whether to mirror for each image.
///
/// # Panics
/// If `pixels` or `windows` are not those of `dims`.
#[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "there is no GPU"))]
pub fn crop_images(
    pixels: &[u8],
    windows: impl Iterator<Item = (usize, usize, bool)>,
    table: impl Fn(u8) -> f32,
    dims: (usize, usize, usize, usize),
    pad: usize,
    device: &Device,
) -> Result<Option<Tensor>> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        let (images, height, width, channels) = dims;
        let windows: Vec<i32> =
            windows.flat_map(|(top, left, flip)| [top as i32, left as i32, i32::from(flip)]).collect();
        assert_eq!(pixels.len(), images * height * width * channels, "pixels of {images} images");
        assert_eq!(windows.len(), 3 * images, "windows of {images} images");
        let table = std::array::from_fn(|pixel| table(pixel as u8));
        return cuda::crop_images(pixels, &windows, &table, dims, pad, device).map(Some);
    }
    Ok(None)
}

/// Standard normals, `(samples, h, w, c)`: bit for bit those of [`crate::rng::normals`], drawn in CHW order.
#[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "there is no GPU"))]
pub fn normal_images(
    seed: u64,
    samples: &[u64],
    step: u32,
    image: (usize, usize, usize),
    device: &Device,
) -> Result<Option<Tensor>> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return cuda::normal_images(seed, samples, step, image, device).map(Some);
    }
    Ok(None)
}
