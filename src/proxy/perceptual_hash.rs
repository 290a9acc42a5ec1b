//! A hash of what an image looks like: near-duplicates differ in few of its 64 bits.

use std::f64::consts::PI;

use crate::data::{Dataset, Shape};

/// The most frequencies per side that are considered.
const SIDE: usize = 9;
const BITS: usize = 64;
/// The number of images from which the medians are computed.
const SAMPLE: usize = 10_000;

/// Whether each of the lowest frequencies of the grey image (of its discrete cosine transform, Zauner 2010, §3.2.1)
/// is above its median over real images.
///
/// The usual hash takes the median of the image's own coefficients. The median over images makes every bit
/// informative: images of one kind, such as digits in the middle of black, have most of the usual bits in common.
pub struct PerceptualHash {
    shape: Shape,
    /// Vertical and horizontal frequency of each bit, lowest first; fewer than 64 for tiny images.
    frequencies: Vec<(usize, usize)>,
    rows: Vec<f64>,
    columns: Vec<f64>,
    medians: Vec<f64>,
}

impl PerceptualHash {
    /// The hash whose bits split these images in half; at most 10,000 of them are used, evenly spaced.
    ///
    /// # Panics
    /// If there are none.
    pub fn new(images: &Dataset) -> Self {
        assert!(!images.is_empty(), "no images to take medians of");
        let shape = images.shape;
        let (height, width) = (shape.height.min(SIDE), shape.width.min(SIDE));
        let mut frequencies: Vec<(usize, usize)> =
            (0..height).flat_map(|u| (0..width).map(move |v| (u, v))).filter(|f| *f != (0, 0)).collect();
        frequencies.sort_by_key(|&(u, v)| (u * u + v * v, u));
        frequencies.truncate(BITS);
        let mut hash = Self {
            shape,
            frequencies,
            rows: waves(height, shape.height),
            columns: waves(width, shape.width),
            medians: Vec::new(),
        };
        let sample = (0..images.len()).step_by(images.len().div_ceil(SAMPLE));
        let coefficients = sample.map(|i| hash.coefficients(images.image(i)));
        hash.medians = medians(hash.frequencies.len(), coefficients);
        hash
    }

    /// The hash of an image: bit `i` is whether frequency `i` is above its median.
    ///
    /// # Panics
    /// If the image does not have the shape of those that the hash was made from.
    pub fn of(&self, image: &[u8]) -> u64 {
        assert_eq!(image.len(), self.shape.size(), "pixels of a {} image", self.shape);
        above(self.coefficients(image), &self.medians)
    }

    /// The coefficients of [`Self::frequencies`], first along the rows, then along the columns.
    fn coefficients(&self, image: &[u8]) -> Vec<f64> {
        let Shape { height, width, channels } = self.shape;
        let waves_along = width.min(SIDE);
        let mut along = vec![0.0; height * waves_along];
        for (y, row) in image.chunks_exact(width * channels).enumerate() {
            for (x, pixel) in row.chunks_exact(channels).enumerate() {
                let grey: u32 = pixel.iter().map(|&p| u32::from(p)).sum();
                for v in 0..waves_along {
                    along[y * waves_along + v] += self.columns[v * width + x] * f64::from(grey);
                }
            }
        }
        let coefficient = |&(u, v): &(usize, usize)| {
            (0..height).map(|y| self.rows[u * height + y] * along[y * waves_along + v]).sum()
        };
        self.frequencies.iter().map(coefficient).collect()
    }
}

/// The median of each column, of which there are `columns`.
pub(super) fn medians(columns: usize, rows: impl Iterator<Item = impl IntoIterator<Item = f64>>) -> Vec<f64> {
    let mut values = vec![Vec::new(); columns];
    for row in rows {
        values.iter_mut().zip(row).for_each(|(column, value)| column.push(value));
    }
    let median = |column: &mut Vec<f64>| {
        let middle = column.len() / 2;
        *column.select_nth_unstable_by(middle, f64::total_cmp).1
    };
    values.iter_mut().map(median).collect()
}

/// The bits that say which of the values are above their medians.
pub(super) fn above(values: impl IntoIterator<Item = f64>, medians: &[f64]) -> u64 {
    let above = values.into_iter().zip(medians).map(|(value, median)| value > *median);
    above.enumerate().fold(0, |hash, (i, above)| hash | u64::from(above) << i)
}

/// `cos(π (2 x + 1) f / 2 n)` for frequency `f` of `count` and position `x` of `n`.
fn waves(count: usize, n: usize) -> Vec<f64> {
    let wave = |f: usize| (0..n).map(move |x| (PI * (2 * x + 1) as f64 * f as f64 / (2 * n) as f64).cos());
    (0..count).flat_map(wave).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{OfficialSplit, Source};

    fn digits() -> Dataset {
        Source::Digits.load(OfficialSplit::Train, None, 0).unwrap()
    }

    #[test]
    fn each_bit_splits_the_images_and_tells_others_apart() {
        let digits = digits();
        let hash = PerceptualHash::new(&digits);
        let hashes: Vec<u64> = (0..digits.len()).map(|i| hash.of(digits.image(i))).collect();
        for bit in 0..63 {
            let set = hashes.iter().filter(|h| *h >> bit & 1 == 1).count() as f64 / hashes.len() as f64;
            assert!((0.45..0.51).contains(&set), "bit {bit}: {set}");
        }
        // Two different digits are far apart, as a rule.
        let near = (1..hashes.len()).filter(|&i| (hashes[i] ^ hashes[i - 1]).count_ones() <= 6).count();
        assert!(near < hashes.len() / 500, "{near}");
    }

    #[test]
    fn a_level_more_or_less_changes_few_bits() {
        let digits = digits();
        let hash = PerceptualHash::new(&digits);
        let changed = |i: usize| {
            let noisy = digits.image(i).iter().enumerate();
            let noisy: Vec<u8> =
                noisy.map(|(j, &p)| p.saturating_add_signed((i + j) as i8 % 3 - 1)).collect();
            (hash.of(&noisy) ^ hash.of(digits.image(i))).count_ones()
        };
        let mean = (0..100).map(changed).sum::<u32>() as f64 / 100.0;
        assert!(mean < 3.0, "{mean}");
    }

    /// scipy's `dctn` (type 2) is four times this sum.
    #[test]
    fn coefficients_are_those_of_the_cosine_transform() {
        let shape = Shape { height: 2, width: 3, channels: 1 };
        let mut images = Dataset::empty(shape, vec!["any".into()]);
        images.push(&[1, 2, 4, 8, 16, 32], 0);
        let hash = PerceptualHash::new(&images);
        assert_eq!(hash.frequencies, [(0, 1), (1, 0), (1, 1), (0, 2), (1, 2)]);
        let expected =
            [-23.382685902179844, -34.648232278140824, 12.859821149611683, 4.5, -2.474873734152916];
        for (found, expected) in hash.coefficients(images.image(0)).iter().zip(expected) {
            assert!((found - expected).abs() < 1e-9, "{found} {expected}");
        }
    }
}
