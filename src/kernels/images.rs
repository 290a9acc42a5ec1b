//! Images made on the device where they are used, from bytes or as noise.

use candle_core::{Device, Tensor};

use crate::{Result, rng};

/// Bytes of images `(b, h, w, c)`, cropped from a black border of `pad` and mirrored: `windows` gives top, left and whether to
/// mirror for each image.
///
/// # Panics
/// If the size of `pixels` does not match `dims`.
pub fn crop_pixels(
    pixels: &[u8],
    windows: impl Iterator<Item = (usize, usize, bool)>,
    (images, height, width, channels): (usize, usize, usize, usize),
    pad: usize,
) -> Vec<u8> {
    let size = height * width * channels;
    assert_eq!(pixels.len(), images * size, "pixels of {images} images");
    let mut out = vec![0; pixels.len()];
    let images = pixels.chunks_exact(size.max(1)).zip(out.chunks_exact_mut(size.max(1)));
    for ((image, out), (top, left, flip)) in images.zip(windows) {
        for y in 0..height {
            let Some(from_y) = (y + top).checked_sub(pad).filter(|&from| from < height) else { continue };
            for x in 0..width {
                let Some(from_x) = (x + left).checked_sub(pad).filter(|&from| from < width) else { continue };
                let to_x = if flip { width - 1 - x } else { x };
                let (from, to) = ((from_y * width + from_x) * channels, (y * width + to_x) * channels);
                out[to..to + channels].copy_from_slice(&image[from..from + channels]);
            }
        }
    }
    out
}

/// [`crop_pixels`] as a tensor `(b, h, w, c)` on the device; `table` has the float for each byte.
///
/// # Panics
/// As [`crop_pixels`].
pub fn crop_images(
    pixels: &[u8],
    windows: impl Iterator<Item = (usize, usize, bool)>,
    table: &[f32; 256],
    dims: (usize, usize, usize, usize),
    pad: usize,
    device: &Device,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return Ok(gpu::crop_images(pixels, windows, table, dims, pad, device)?);
    }
    let pixels = crop_pixels(pixels, windows, dims, pad);
    let floats: Vec<f32> = pixels.into_iter().map(|pixel| table[usize::from(pixel)]).collect();
    Ok(Tensor::from_vec(floats, dims, device)?)
}

/// Standard normals, `(samples, h, w, c)`: bit for bit the same as [`rng::normals`], drawn in CHW order.
pub fn normal_images(
    seed: u64,
    samples: &[u64],
    step: u32,
    (height, width, channels): (usize, usize, usize),
    device: &Device,
) -> Result<Tensor> {
    let dims = (samples.len(), height, width, channels);
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return Ok(gpu::normal_images(seed, samples, step, dims, device)?);
    }
    let mut chw = vec![0.0; height * width * channels];
    let mut noise = Vec::with_capacity(samples.len() * chw.len());
    for &sample in samples {
        rng::normals(seed, sample, step, &mut chw);
        for position in 0..height * width {
            noise.extend((0..channels).map(|c| chw[c * height * width + position]));
        }
    }
    Ok(Tensor::from_vec(noise, dims, device)?)
}

#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::{CudaDevice, Result, Tensor};

    use crate::kernels::cuda::{count32, elementwise, kernel, launch, per_segment, tensor, uninitialized};

    type Dims = (usize, usize, usize, usize);

    pub(super) fn crop_images(
        pixels: &[u8],
        windows: impl Iterator<Item = (usize, usize, bool)>,
        table: &[f32; 256],
        dims: Dims,
        pad: usize,
        device: &CudaDevice,
    ) -> Result<Tensor> {
        let (images, height, width, channels) = dims;
        let windows: Vec<i32> =
            windows.flat_map(|(top, left, flip)| [top as i32, left as i32, i32::from(flip)]).collect();
        assert_eq!(pixels.len(), images * height * width * channels, "pixels of {images} images");
        assert_eq!(windows.len(), 3 * images, "windows of {images} images");
        let (n, count) = (pixels.len(), count32(pixels.len())?);
        let (pixels, windows) = (device.clone_htod(pixels)?, device.clone_htod(&windows)?);
        let (table, out) = (device.clone_htod(&table[..])?, uninitialized::<f32>(device, n)?);
        let [height, width, channels, pad] = [height, width, channels, pad].map(|v| v as i32);
        let (crop, config) = (kernel(device, "crop_images")?, elementwise(n));
        launch!(crop, config, &pixels, &windows, &table, &height, &width, &channels, &pad, &count, &out);
        Ok(tensor(device, out, dims))
    }

    pub(super) fn normal_images(
        seed: u64,
        samples: &[u64],
        step: u32,
        dims: Dims,
        device: &CudaDevice,
    ) -> Result<Tensor> {
        let (count, height, width, channels) = dims;
        let per_image = height * width * channels;
        let out = uninitialized::<f32>(device, count * per_image)?;
        if count > 0 {
            let (low, high) = (seed as u32, (seed >> 32) as u32);
            let (positions, channels, images) = ((height * width) as u32, channels as u32, count as i32);
            let samples = device.clone_htod(samples)?;
            let (normals, config) =
                (kernel(device, "normal_images")?, per_segment(per_image.div_ceil(4), count));
            launch!(normals, config, &low, &high, &samples, &step, &images, &positions, &channels, &out);
        }
        Ok(tensor(device, out, dims))
    }
}
