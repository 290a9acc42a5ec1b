//! Pixels to tensors and back, and augmentation.

use candle_core::{DType, Device, Tensor};

use super::{
    image::Shape,
    resized_crop::{Window, stretched},
};
use crate::{Error, Result, kernels, rng};

/// The range of values of a pixel tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Range {
    /// [0, 1], for classifiers and discriminators: u8 / 255.
    Unit,
    /// [-1, 1], for diffusion: u8 / 127.5 - 1.
    Signed,
}

impl Range {
    fn value_of(self, pixel: u8) -> f32 {
        match self {
            Self::Unit => f32::from(pixel) / 255.0,
            Self::Signed => f32::from(pixel) / 127.5 - 1.0,
        }
    }

    /// The values of all pixels.
    fn table(self) -> [f32; 256] {
        std::array::from_fn(|pixel| self.value_of(pixel as u8))
    }

    /// Out-of-range values are clamped; ties round to even. `None` if `x` is not finite.
    fn pixel_of(self, x: f32) -> Option<u8> {
        let scaled = match self {
            Self::Unit => x * 255.0,
            Self::Signed => (x + 1.0) * 127.5,
        };
        x.is_finite().then(|| scaled.round_ties_even().clamp(0.0, 255.0) as u8)
    }
}

/// Pixels in `range`, in their order.
pub fn to_floats(pixels: &[u8], range: Range) -> Vec<f32> {
    let values = range.table();
    pixels.iter().map(|&pixel| values[usize::from(pixel)]).collect()
}

/// Images as `(n, height, width, channels)` f32 in `range`. `pixels`: n images of `shape`, one after another.
///
/// Fails with [`Error::Alarm`] if `pixels` is not a whole number of images.
pub fn to_tensor(pixels: &[u8], shape: Shape, range: Range, device: &Device) -> Result<Tensor> {
    let n = pixels.len() / shape.size();
    if n * shape.size() != pixels.len() {
        bail!(Alarm, "{} pixels are no whole number of {shape} images", pixels.len());
    }
    Ok(Tensor::from_vec(to_floats(pixels, range), (n, shape.height, shape.width, shape.channels), device)?)
}

/// Pixels of images in `range`, of any shape, in the tensor's order: u8 of round(255 x) for
/// [`Range::Unit`], of round(127.5 (x + 1)) for [`Range::Signed`], ties to even, clamped to 0..=255.
///
/// The inverse of [`to_tensor`] for every u8. Fails with [`Error::Alarm`] on NaN and infinities.
pub fn to_u8(images: &Tensor, range: Range) -> Result<Vec<u8>> {
    let floats = images.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let pixel = |(position, x): (usize, &f32)| {
        range
            .pixel_of(*x)
            .ok_or_else(|| Error::Alarm(format!("pixel value {position} is {x}, expected a finite one")))
    };
    floats.iter().enumerate().map(pixel).collect()
}

/// Standard normal noise, `(samples, h, w, c)`: a sample's noise depends only on (`seed`, `sample`, `step`), is
/// drawn in CHW order, and is bit-identical on every device. `step`: a sampler's step, or one of [`rng::stream`].
pub fn gaussian_noise(
    seed: u64,
    samples: &[u64],
    step: u32,
    shape: Shape,
    device: &Device,
) -> Result<Tensor> {
    let Shape { height, width, channels } = shape;
    kernels::normal_images(seed, samples, step, (height, width, channels), device)
}

/// Numbers in CHW order as a tensor of images of shape (n, h, w, c); for other ranks the order is unchanged.
pub fn from_chw(values: Vec<f32>, dims: &[usize], device: &Device) -> Result<Tensor> {
    Ok(match *dims {
        [n, h, w, c] => {
            let chw = Tensor::from_vec(values, (n, c, h, w), device)?;
            chw.permute((0, 2, 3, 1))?.contiguous()?
        }
        _ => Tensor::from_vec(values, dims, device)?,
    })
}

/// Which part of a training image is shown.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Crop {
    /// A crop of the original size after this many black pixels were added on each side; 4 is usual for 32x32.
    Padded(usize),
    /// A part of this share of the area or more, stretched to the original size; 0.08 is usual for 224x224.
    Resized(f64),
}

/// Random crops and flips for training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Augment {
    /// Which part is shown.
    pub crop: Crop,
    /// Whether to mirror images left to right with probability 1/2. Unsuitable for digits and other writing.
    pub flip: bool,
}

/// Crops and flips each image of a batch according to its own draw; as [`to_tensor`] has it. Padded crops are made on
/// the device.
///
/// `pixels`: images of `shape`; `samples`: what identifies each of them, the key of its draw together with `seed`, so
/// that the result for an image does not depend on its batch.
///
/// # Panics
/// If `pixels` is not `samples.len()` images.
pub fn augmented(
    pixels: &[u8],
    shape: Shape,
    samples: &[u64],
    seed: u64,
    settings: Augment,
    range: Range,
    device: &Device,
) -> Result<Tensor> {
    let dims = (samples.len(), shape.height, shape.width, shape.channels);
    let draws = samples.iter().map(|&sample| {
        let mut draws = [0.0; 3];
        rng::uniforms(seed, sample, rng::stream::AUGMENT, &mut draws);
        (sample, draws, settings.flip && draws[2] < 0.5)
    });
    match settings.crop {
        Crop::Padded(pad) => {
            let offsets = 2 * pad + 1;
            let offset = |u: f32| ((u * offsets as f32) as usize).min(offsets - 1);
            let windows = draws.map(|(_, draws, flip)| (offset(draws[0]), offset(draws[1]), flip));
            kernels::crop_images(pixels, windows, &range.table(), dims, pad, device)
        }
        Crop::Resized(smallest) => {
            let window = |sample| {
                Window::draw(shape, smallest, &mut rng::Stream::new(seed, sample, rng::stream::CROP))
            };
            let windows: Vec<_> = draws.map(|(sample, _, flip)| (window(sample), flip)).collect();
            Ok(Tensor::from_vec(stretched(pixels, shape, &windows, &range.table()), dims, device)?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { height: 4, width: 3, channels: 3 };

    fn augment(pixels: &[u8], shape: Shape, samples: &[u64], seed: u64, settings: Augment) -> Vec<u8> {
        let range = Range::Unit;
        to_u8(&augmented(pixels, shape, samples, seed, settings, range, &Device::Cpu).unwrap(), range)
            .unwrap()
    }

    #[test]
    fn every_pixel_value_survives_both_ranges() {
        let pixels: Vec<u8> = (0..=255).collect();
        let shape = Shape { height: 8, width: 8, channels: 1 };
        for range in [Range::Unit, Range::Signed] {
            let tensor = to_tensor(&pixels, shape, range, &Device::Cpu).unwrap();
            assert_eq!(tensor.dims(), [4, 8, 8, 1]);
            assert_eq!(to_u8(&tensor, range).unwrap(), pixels);
        }
        assert_eq!((Range::Unit.value_of(0), Range::Unit.value_of(255)), (0.0, 1.0));
        assert_eq!((Range::Signed.value_of(0), Range::Signed.value_of(255)), (-1.0, 1.0));
    }

    #[test]
    fn rounding_is_half_to_even_and_clamped_and_nan_is_an_alarm() {
        let round = |x| Range::Signed.pixel_of(x).unwrap();
        assert_eq!([round(0.0), round(-7.0), round(7.0)], [128, 0, 255]); // 127.5 is a tie
        assert_eq!((2.5f32 / 255.0) * 255.0, 2.5);
        assert_eq!(Range::Unit.pixel_of(2.5 / 255.0), Some(2)); // and not 3
        assert_eq!([round(-1.0 + 1.6 / 127.5), round(-1.0 + 2.4 / 127.5)], [2, 2]);
        for bad in [f32::NAN, f32::INFINITY] {
            let tensor = Tensor::new(&[0.0, bad], &Device::Cpu).unwrap();
            assert_eq!(to_u8(&tensor, Range::Unit).unwrap_err().exit_code(), 70);
        }
    }

    #[test]
    fn part_of_an_image_is_an_alarm() {
        assert_eq!(to_tensor(&[0; 37], SHAPE, Range::Unit, &Device::Cpu).unwrap_err().exit_code(), 70);
    }

    #[test]
    fn without_padding_and_flip_nothing_changes() {
        let pixels: Vec<u8> = (0..72).collect();
        assert_eq!(
            augment(&pixels, SHAPE, &[5, 6], 1, Augment { crop: Crop::Padded(0), flip: false }),
            pixels
        );
    }

    #[test]
    fn a_window_shifts_what_it_shows_and_pads_with_black() {
        let crop = |(top, left), flip| {
            kernels::crop_pixels(&[1, 2, 3, 4, 5, 6], [(top, left, flip)].into_iter(), (1, 2, 3, 1), 1)
        };
        assert_eq!(crop((1, 1), false), [1, 2, 3, 4, 5, 6]);
        assert_eq!(crop((1, 1), true), [3, 2, 1, 6, 5, 4]);
        assert_eq!(crop((0, 0), false), [0, 0, 0, 0, 1, 2]);
        assert_eq!(crop((2, 2), false), [5, 6, 0, 0, 0, 0]);
        assert_eq!(crop((2, 2), true), [0, 6, 5, 0, 0, 0]);
    }

    #[test]
    fn the_draw_belongs_to_the_image_and_not_to_its_batch() {
        let pixels: Vec<u8> = (0..72).map(|i| i + 1).collect();
        for crop in [Crop::Padded(2), Crop::Resized(0.2)] {
            let settings = Augment { crop, flip: true };
            let both = augment(&pixels, SHAPE, &[5, 6], 1, settings);
            assert_eq!(augment(&pixels[36..], SHAPE, &[6], 1, settings), both[36..]);
        }
    }

    #[test]
    fn all_offsets_occur_about_equally_often() {
        let shape = Shape { height: 1, width: 1, channels: 1 };
        let samples: Vec<u64> = (0..9_000).collect();
        let kept =
            augment(&vec![1; 9_000], shape, &samples, 7, Augment { crop: Crop::Padded(1), flip: false });
        let kept = kept.iter().filter(|&&pixel| pixel == 1).count();
        // One of nine windows shows the only pixel: 1000 ± 30 (one standard deviation).
        assert!((880..1120).contains(&kept), "{kept}");
    }

    #[test]
    fn noise_of_a_sample_does_not_depend_on_its_batch_and_runs_channel_by_channel() -> Result<()> {
        let shape = Shape { height: 3, width: 2, channels: 3 };
        let all = gaussian_noise(7, &[4, 5, 6], 9, shape, &Device::Cpu)?;
        let one = gaussian_noise(7, &[5], 9, shape, &Device::Cpu)?;
        assert_eq!(
            all.narrow(0, 1, 1)?.flatten_all()?.to_vec1::<f32>()?,
            one.flatten_all()?.to_vec1::<f32>()?
        );
        let mut chw = vec![0.0; 18];
        rng::normals(7, 5, 9, &mut chw);
        assert_eq!(one.permute((0, 3, 1, 2))?.flatten_all()?.to_vec1::<f32>()?, chw);
        Ok(())
    }
}
