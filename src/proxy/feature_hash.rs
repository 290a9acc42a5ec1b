//! A hash of an image's features: images that look alike to a network differ in few of its 64 bits.

use super::{
    perceptual_hash::{above, medians},
    quality::FeatureMatrix,
};
use crate::rng::{self, stream};

const BITS: usize = 64;

/// Whether each of 64 random projections (Charikar 2002) is above its median over real images.
///
/// For two images whose features are at an angle θ as seen from the medians, a share θ / π of the bits differs: 3
/// of 64 mean 8°. Comparing with medians, where the usual hash compares with 0, makes every bit informative.
pub struct FeatureHash {
    dim: usize,
    /// 64 rows of `dim`.
    directions: Vec<f32>,
    medians: Vec<f64>,
}

impl FeatureHash {
    /// The hash whose bits split these images in half. Its directions are the same every time.
    pub fn new(real: &FeatureMatrix) -> Self {
        let dim = real.dim();
        let mut directions = vec![0.0; BITS * dim];
        for (bit, direction) in (0..).zip(directions.chunks_exact_mut(dim)) {
            rng::normals(0, bit, stream::DIRECTION, direction);
        }
        let mut hash = Self { dim, directions, medians: Vec::new() };
        hash.medians = medians(BITS, real.rows().map(|row| hash.projections(row)));
        hash
    }

    /// The hash of an image: bit `i` is whether its projection on direction `i` is above the median.
    ///
    /// # Panics
    /// If the number of features is not that of the images that the hash was made from.
    pub fn of(&self, features: &[f32]) -> u64 {
        assert_eq!(features.len(), self.dim, "features of an image");
        above(self.projections(features), &self.medians)
    }

    fn projections(&self, features: &[f32]) -> impl Iterator<Item = f64> {
        self.directions.chunks_exact(self.dim).map(move |direction| {
            direction.iter().zip(features).map(|(&d, &f)| f64::from(d) * f64::from(f)).sum()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::f64::consts::PI;

    use super::*;

    fn normal(sample: u64, dim: usize) -> Vec<f32> {
        let mut features = vec![0.0; dim];
        rng::normals(7, sample, 0, &mut features);
        features
    }

    /// Around a centre far from 0, where the plain signs would all agree.
    fn around(features: &[f32]) -> Vec<f32> {
        features.iter().map(|f| f + 5.0).collect()
    }

    #[test]
    fn each_bit_splits_the_real_images_in_halves() {
        let real: Vec<f32> = (0..501).flat_map(|i| around(&normal(i, 20))).collect();
        let hash = FeatureHash::new(&FeatureMatrix::new(20, real.clone()).unwrap());
        for bit in 0..64 {
            let set = real.chunks_exact(20).filter(|row| hash.of(row) >> bit & 1 == 1).count();
            assert_eq!(set, 250, "bit {bit}");
        }
    }

    #[test]
    fn the_share_of_bits_that_differ_is_the_angle() {
        let dim = 200;
        let real: Vec<f32> = (0..2000).flat_map(|i| around(&normal(i, dim))).collect();
        let hash = FeatureHash::new(&FeatureMatrix::new(dim, real).unwrap());
        for angle in [0.05, 0.3, 1.0, PI / 2.0] {
            let bits = (0..200u64).map(|i| {
                let (a, b) = (normal(10_000 + 2 * i, dim), normal(10_001 + 2 * i, dim));
                let turned: Vec<f32> = a
                    .iter()
                    .zip(&b)
                    .map(|(a, b)| (f64::from(*a) * angle.cos() + f64::from(*b) * angle.sin()) as f32)
                    .collect();
                (hash.of(&around(&a)) ^ hash.of(&around(&turned))).count_ones()
            });
            // The standard error of 12,800 bits is below 0.005.
            let share = f64::from(bits.sum::<u32>()) / (200.0 * 64.0);
            assert!((share - angle / PI).abs() < 0.02, "{angle}: {share}");
        }
    }
}
