//! Random resized crops (Szegedy et al. 2015, §6): torchvision's `RandomResizedCrop`.

use rayon::prelude::*;

use super::image::Shape;
use crate::rng::Stream;

/// The proportions, width to height, that a window may have, and how often one is drawn before it is taken from the
/// middle; torchvision's defaults.
const PROPORTIONS: (f64, f64) = (3.0 / 4.0, 4.0 / 3.0);
const TRIES: usize = 10;

/// A part of an image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Window {
    top: usize,
    left: usize,
    height: usize,
    width: usize,
}

impl Window {
    /// Anywhere in the image, with a share of `smallest` to 1 of its area. If none fits, the largest in the middle that
    /// has allowed proportions.
    pub(super) fn draw(shape: Shape, smallest: f64, random: &mut Stream) -> Self {
        let Shape { height, width, .. } = shape;
        let (narrow, wide) = PROPORTIONS;
        for _ in 0..TRIES {
            let area = (height * width) as f64 * (smallest + (1.0 - smallest) * random.uniform());
            let proportion = (narrow.ln() + (wide / narrow).ln() * random.uniform()).exp();
            let [w, h] = [area * proportion, area / proportion].map(|square| square.sqrt().round() as usize);
            if (1..=width).contains(&w) && (1..=height).contains(&h) {
                let (top, left) = (random.below(height - h + 1), random.below(width - w + 1));
                return Self { top, left, height: h, width: w };
            }
        }
        let (w, h) =
            (width.min((height as f64 * wide).round() as usize), (width as f64 / narrow).round() as usize);
        let h = height.min(h);
        Self { top: (height - h) / 2, left: (width - w) / 2, height: h, width: w }
    }
}

/// The windows of images, stretched bilinearly to the images' size with half-pixel centres, then mirrored if asked for.
/// `pixels`: an image of `shape` for each window; `table` has the float for each byte.
///
/// # Panics
/// If the size of `pixels` does not match.
pub(super) fn stretched(
    pixels: &[u8],
    shape: Shape,
    windows: &[(Window, bool)],
    table: &[f32; 256],
) -> Vec<f32> {
    let (size, channels) = (shape.size(), shape.channels);
    assert_eq!(pixels.len(), windows.len() * size, "pixels of {} images", windows.len());
    let mut out = vec![0.0; pixels.len()];
    out.par_chunks_mut(size).zip(pixels.par_chunks(size)).zip(windows).for_each(
        |((out, image), &(window, flip))| {
            let rows = neighbours(window.top, window.height, shape.height);
            let mut columns = neighbours(window.left, window.width, shape.width);
            if flip {
                columns.reverse();
            }
            let at = |row: usize, column: usize, c: usize| {
                table[usize::from(image[(row * shape.width + column) * channels + c])]
            };
            let positions = rows.iter().flat_map(|row| columns.iter().map(move |column| (row, column)));
            for (out, (row, column)) in out.chunks_exact_mut(channels).zip(positions) {
                for (c, out) in out.iter_mut().enumerate() {
                    let [upper, lower] = row.pair.map(|y| {
                        let [left, right] = column.pair.map(|x| at(y, x, c));
                        left + (right - left) * column.share
                    });
                    *out = upper + (lower - upper) * row.share;
                }
            }
        },
    );
    out
}

/// Two neighbours in a row or column, and the share of the second in what is between them.
struct Between {
    pair: [usize; 2],
    share: f32,
}

/// Where each of `out` places lies among the `len` pixels from `start`.
fn neighbours(start: usize, len: usize, out: usize) -> Vec<Between> {
    let place = |i: usize| {
        let at = ((i as f64 + 0.5) * len as f64 / out as f64 - 0.5).max(0.0);
        let first = at as usize;
        Between { pair: [first, (first + 1).min(len - 1)].map(|i| start + i), share: at.fract() as f32 }
    };
    (0..out).map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::stream;

    fn windows(shape: Shape, smallest: f64, n: u64) -> Vec<Window> {
        (0..n).map(|id| Window::draw(shape, smallest, &mut Stream::new(1, id, stream::CROP))).collect()
    }

    /// torchvision 0.29: `resized_crop` of two channels `7 y + 20 x` and `200 - 10 y x` of 5 × 4 pixels, from row 1
    /// and column 1, 3 × 2 pixels, in float.
    #[test]
    fn a_window_is_stretched_as_torchvision_does_and_mirrored_afterwards() {
        let shape = Shape { height: 5, width: 4, channels: 2 };
        let pixels: Vec<u8> = (0..20)
            .flat_map(|i| [7 * (i / 4) + 20 * (i % 4), 200 - 10 * (i / 4) * (i % 4)])
            .map(|v: i32| v as u8)
            .collect();
        let window = Window { top: 1, left: 1, height: 3, width: 2 };
        let table = std::array::from_fn(|pixel| pixel as f32);
        let found =
            stretched(&[&pixels[..], &pixels].concat(), shape, &[(window, false), (window, true)], &table);
        let rows = found[..40].chunks(8).zip(found[40..].chunks(8));
        for (row, mirrored) in rows {
            let back: Vec<f32> = row.chunks(2).rev().flatten().copied().collect();
            assert_eq!(back, mirrored);
        }
        for (found, expected) in found.iter().zip([
            27., 190., 32., 187.5, 42., 182.5, 47., 180., 29.8, 186., 34.8, 182.5, 44.8, 175.5, 49.8, 172.,
            34., 180., 39., 175., 49., 165., 54., 160., 38.2, 174., 43.2, 167.5, 53.2, 154.5, 58.2, 148.,
            41., 170., 46., 162.5, 56., 147.5, 61., 140.,
        ]) {
            assert!((found - expected).abs() < 1e-4, "{found}, expected {expected}");
        }
        let whole = Window { top: 0, left: 0, height: 5, width: 4 };
        let same: Vec<f32> = pixels.iter().map(|&pixel| f32::from(pixel)).collect();
        assert_eq!(stretched(&pixels, shape, &[(whole, false)], &table), same);
    }

    /// torchvision 0.29: 200,000 draws of `RandomResizedCrop.get_params` for 32 × 32 pixels, scale from 0.08.
    #[test]
    fn windows_are_as_large_and_as_wide_as_torchvisions() {
        let shape = Shape { height: 32, width: 32, channels: 3 };
        let windows = windows(shape, 0.08, 20_000);
        let mean = |of: fn(&Window) -> f64| windows.iter().map(of).sum::<f64>() / windows.len() as f64;
        // Each to five standard errors.
        for (found, expected, off) in [
            (mean(|w| (w.height * w.width) as f64 / 1024.0), 0.4904, 0.0089),
            (mean(|w| (w.width as f64 / w.height as f64).ln()), 0.0, 0.0060),
            (mean(|w| w.top as f64), 5.152, 0.179),
            (mean(|w| w.left as f64), 5.152, 0.179),
        ] {
            assert!((found - expected).abs() < off, "{found}, expected {expected}");
        }
    }

    #[test]
    fn if_no_window_fits_it_is_the_middle() {
        let shape = Shape { height: 10, width: 90, channels: 1 };
        let expected = Window { top: 0, left: 38, height: 10, width: 13 };
        assert!(windows(shape, 1.0, 20).iter().all(|window| *window == expected));
    }
}
