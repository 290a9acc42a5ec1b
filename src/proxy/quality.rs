//! How far a pool is from real images in the features of a network: Fréchet distance, precision and recall.
//!
//! All of them depend on the number of images: compare figures only at equal numbers.

use candle_core::{Device, Tensor};
use nalgebra::{DMatrix, DVector, SymmetricEigen};
use rayon::prelude::*;

use crate::{Result, kernels};

/// Features of images: rows of `dim` numbers.
#[derive(Clone, Debug)]
pub struct FeatureMatrix {
    dim: usize,
    values: Vec<f32>,
}

impl FeatureMatrix {
    /// Fails with [`Error::Data`](crate::Error::Data) unless `values` holds at least two rows of `dim` finite
    /// numbers.
    pub fn new(dim: usize, values: Vec<f32>) -> Result<Self> {
        if dim == 0 || !values.len().is_multiple_of(dim) || values.len() < 2 * dim {
            bail!(Data, "{} features in rows of {dim}, expected at least two whole rows", values.len());
        }
        if let Some(i) = values.iter().position(|v| !v.is_finite()) {
            bail!(Data, "a feature of image {} is {}, expected a finite number", i / dim, values[i]);
        }
        Ok(Self { dim, values })
    }

    /// The number of images.
    #[expect(clippy::len_without_is_empty, reason = "there are at least two")]
    pub fn len(&self) -> usize {
        self.values.len() / self.dim
    }

    /// The number of features of an image.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// The features of each image.
    pub fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.values.chunks_exact(self.dim)
    }

    /// The features of some images, given by number.
    pub fn subset(&self, images: &[usize]) -> Result<Self> {
        let row = |&i: &usize| self.values[i * self.dim..][..self.dim].iter().copied();
        Self::new(self.dim, images.iter().flat_map(row).collect())
    }

    /// The unbiased estimates of mean and covariance.
    fn moments(&self) -> (DVector<f64>, DMatrix<f64>) {
        let (n, dim) = (self.len() as f64, self.dim);
        let mut mean = DVector::zeros(dim);
        for row in self.rows() {
            mean.iter_mut().zip(row).for_each(|(mean, &v)| *mean += f64::from(v) / n);
        }
        let mut centred = DMatrix::zeros(self.len(), dim);
        for (i, row) in self.rows().enumerate() {
            for (j, &v) in row.iter().enumerate() {
                centred[(i, j)] = f64::from(v) - mean[j];
            }
        }
        let covariance = centred.tr_mul(&centred) / (n - 1.0);
        (mean, covariance)
    }

    fn tensor(&self) -> Result<Tensor> {
        Ok(Tensor::from_slice(&self.values, (self.len(), self.dim), &Device::Cpu)?)
    }
}

/// The squared Fréchet distance between the normal distributions with the features' means and covariances (Heusel
/// et al. 2017, Eq. 6): |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½).
///
/// # Panics
/// If the features have different numbers of columns.
pub fn frechet_distance(a: &FeatureMatrix, b: &FeatureMatrix) -> f64 {
    assert_eq!(a.dim, b.dim, "columns of features");
    let ((mean_a, cov_a), (mean_b, cov_b)) = (a.moments(), b.moments());
    // The trace of (Σ₁ Σ₂)^½ equals that of (Σ₁^½ Σ₂ Σ₁^½)^½, the root of a symmetric matrix.
    let eigen = SymmetricEigen::new(cov_a.clone());
    let roots = eigen.eigenvalues.map(|v| v.max(0.0).sqrt());
    let root = &eigen.eigenvectors * DMatrix::from_diagonal(&roots) * eigen.eigenvectors.transpose();
    let product = &root * &cov_b * &root;
    let product = (&product + product.transpose()) / 2.0;
    let cross: f64 = SymmetricEigen::new(product).eigenvalues.iter().map(|v| v.max(0.0).sqrt()).sum();
    ((mean_a - mean_b).norm_squared() + cov_a.trace() + cov_b.trace() - 2.0 * cross).max(0.0)
}

/// Rows whose distances to all others are computed together.
const TILE: usize = 256;

/// Squared distances from each row of `a` to all rows of `b`, row by row.
fn distances<T: Send>(
    a: &FeatureMatrix,
    b: &FeatureMatrix,
    body: impl Fn(usize, &[f32]) -> T + Sync,
) -> Result<Vec<T>> {
    let (left, right) = (a.tensor()?, b.tensor()?);
    let squares =
        |f: &FeatureMatrix| -> Vec<f32> { f.rows().map(|row| row.iter().map(|v| v * v).sum()).collect() };
    let (of_a, of_b) = (squares(a), squares(b));
    let tile = |first: usize| -> Result<Vec<T>> {
        let rows = TILE.min(a.len() - first);
        let products = kernels::linear(&left.narrow(0, first, rows)?.contiguous()?, &right, None)?;
        let products = products.flatten_all()?.to_vec1::<f32>()?;
        let row = |(i, products): (usize, &[f32])| {
            let i = first + i;
            let distance = |(product, square): (&f32, &f32)| (of_a[i] + square - 2.0 * product).max(0.0);
            body(i, &products.iter().zip(&of_b).map(distance).collect::<Vec<_>>())
        };
        Ok(products.chunks_exact(b.len()).enumerate().map(row).collect())
    };
    let starts: Vec<usize> = (0..a.len()).step_by(TILE).collect();
    Ok(starts.into_par_iter().map(tile).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

/// The share of the synthetic images that lie among the real ones, and of the real ones that lie among the
/// synthetic: precision and recall as in Kynkäänniemi et al. 2019, Eq. 1 and 2. An image lies among others if, for
/// one of them, it is no farther away than that one's `k`-th nearest neighbour among them (the paper: k = 3).
///
/// Fails with [`Error::Usage`](crate::Error::Usage) if there are not more than `k` images of each kind.
pub fn precision_recall(real: &FeatureMatrix, synthetic: &FeatureMatrix, k: usize) -> Result<(f64, f64)> {
    let (n, m) = (real.len(), synthetic.len());
    if k == 0 || n <= k || m <= k {
        bail!(
            Usage,
            "neighbours is {k} for {n} real and {m} synthetic images, expected at least 1 and fewer than each"
        );
    }
    let radii = |f: &FeatureMatrix| {
        distances(f, f, |i, row| {
            let mut others = row.to_vec();
            others.swap_remove(i);
            *others.select_nth_unstable_by(k - 1, f32::total_cmp).1
        })
    };
    let share = |of: &FeatureMatrix, among: &FeatureMatrix| -> Result<f64> {
        let radii = radii(among)?;
        let inside = distances(of, among, |_, row| row.iter().zip(&radii).any(|(d, radius)| d <= radius))?;
        Ok(inside.iter().filter(|inside| **inside).count() as f64 / of.len() as f64)
    };
    Ok((share(synthetic, real)?, share(real, synthetic)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng;

    fn normals(seed: u64, rows: usize, scales: &[f32], shift: f32) -> FeatureMatrix {
        let mut values = vec![0.0; rows * scales.len()];
        rng::normals(seed, 0, 0, &mut values);
        for row in values.chunks_exact_mut(scales.len()) {
            row.iter_mut().zip(scales).for_each(|(v, scale)| *v = *v * scale + shift);
        }
        FeatureMatrix::new(scales.len(), values).unwrap()
    }

    /// Dowson & Landau 1982: independent columns have Σ (μ₁ - μ₂)² + (σ₁ - σ₂)².
    #[test]
    fn the_distance_of_normals_is_that_of_the_closed_form() {
        let a = normals(1, 60_000, &[1.0, 2.0, 0.5], 0.0);
        let b = normals(2, 60_000, &[2.0, 2.0, 1.5], 1.0);
        let found = frechet_distance(&a, &b);
        assert!((found - 5.0).abs() < 0.1, "{found}");
        assert!(frechet_distance(&a, &a).abs() < 1e-9);
    }

    /// numpy's `cov`, and the roots of `eigvals` of the covariances' product.
    #[test]
    fn correlated_columns_are_not_treated_as_independent() {
        let a = FeatureMatrix::new(2, vec![0., 0., 1., 1., 2., 2.5, 3., 2.5]).unwrap();
        let b = FeatureMatrix::new(2, vec![0., 3., 1., 2., 2., 0.5, 3., 0.5]).unwrap();
        let found = frechet_distance(&a, &b);
        assert!((found - 4.305745823233927).abs() < 1e-6, "{found}");
    }

    #[test]
    fn precision_and_recall_see_what_is_outside_and_what_is_missing() {
        let real = normals(1, 500, &[1.0, 1.0], 0.0);
        let same = normals(2, 500, &[1.0, 1.0], 0.0);
        let (precision, recall) = precision_recall(&real, &same, 3).unwrap();
        assert!(precision > 0.9 && recall > 0.9, "{precision} {recall}");
        // One mode of many: all of its images are realistic, but most of the real ones are missing.
        let (precision, recall) = precision_recall(&real, &normals(3, 500, &[0.1, 0.1], 0.0), 3).unwrap();
        assert!(precision > 0.95 && recall < 0.3, "{precision} {recall}");
        let (precision, recall) = precision_recall(&real, &normals(4, 500, &[1.0, 1.0], 9.0), 3).unwrap();
        assert_eq!((precision, recall), (0.0, 0.0));
        assert!(precision_recall(&real, &real.subset(&[1, 2, 3]).unwrap(), 3).is_err());
    }

    /// By hand: on a line at 0, 1, 3 with k = 1 the radii are 1, 1, 2.
    #[test]
    fn a_ball_reaches_to_the_kth_neighbour() {
        let on_line = |at: &[f32]| FeatureMatrix::new(1, at.to_vec()).unwrap();
        let real = on_line(&[0.0, 1.0, 3.0]);
        let (precision, _) = precision_recall(&real, &on_line(&[-1.5, -1.0, 4.9, 5.5]), 1).unwrap();
        assert_eq!(precision, 0.5);
    }

    #[test]
    fn features_that_are_no_numbers_are_refused() {
        let error = FeatureMatrix::new(2, vec![0.0, 1.0, f32::NAN, 2.0]).unwrap_err().to_string();
        assert_eq!(error, "a feature of image 1 is NaN, expected a finite number");
        assert!(FeatureMatrix::new(2, vec![0.0; 3]).is_err() && FeatureMatrix::new(2, vec![0.0; 2]).is_err());
    }
}
