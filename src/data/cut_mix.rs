//! CutMix (Yun et al. 2019): a window of each image shows another one.

use std::ops::Range;

use candle_core::Tensor;

use crate::{Result, rng};

/// Images of which some show a window of another, and the share of the other in each, `(b,)` f32, which is its
/// share in the target too.
///
/// `x`, `others`: `(b, h, w, c)`. An image is mixed with this `probability`; its draw depends on `seed` and its
/// entry in `sample_ids` alone. The window has the image's proportions, a uniform share of its area (the paper's
/// α = 1), and its centre anywhere; what lies outside of the image is cut off.
pub fn cut_mix(
    x: &Tensor,
    others: &Tensor,
    probability: f64,
    seed: u64,
    sample_ids: &[u64],
) -> Result<(Tensor, Tensor)> {
    let (_, h, w, _) = x.dims4()?;
    let (mut shown, mut shares) = (Vec::new(), Vec::new());
    for &id in sample_ids {
        let (rows, columns) = window(h, w, probability, seed, id);
        shares.push((rows.len() * columns.len()) as f32 / (h * w) as f32);
        shown.extend((0..h * w).map(|i| u8::from(rows.contains(&(i / w)) && columns.contains(&(i % w)))));
    }
    let shown = Tensor::from_vec(shown, (sample_ids.len(), h, w, 1), x.device())?.broadcast_as(x.shape())?;
    Ok((shown.where_cond(others, x)?, Tensor::new(shares, x.device())?))
}

/// The rows and columns that show the other image.
fn window(h: usize, w: usize, probability: f64, seed: u64, id: u64) -> (Range<usize>, Range<usize>) {
    let mut random = rng::Stream::new(seed, id, rng::stream::CUT_MIX);
    if random.uniform() >= probability {
        return (0..0, 0..0);
    }
    let share = random.uniform().sqrt();
    let mut along = |side: usize| {
        let (centre, half) = (random.below(side), (side as f64 * share) as usize / 2);
        centre.saturating_sub(half)..(centre + half).min(side)
    };
    (along(h), along(w))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    fn mixed(ids: &[u64], (h, w): (usize, usize), probability: f64) -> (Tensor, Vec<f32>) {
        let x = Tensor::zeros((ids.len(), h, w, 3), DType::F32, &Device::Cpu).unwrap();
        let (mixed, shares) = cut_mix(&x, &x.ones_like().unwrap(), probability, 5, ids).unwrap();
        (mixed, shares.to_vec1().unwrap())
    }

    #[test]
    fn the_share_is_that_of_the_pixels_and_the_draw_belongs_to_the_image() {
        let ids: Vec<u64> = (0..50).collect();
        let (images, shares) = mixed(&ids, (8, 12), 0.7);
        let means = images.mean((1, 2, 3)).unwrap().to_vec1::<f32>().unwrap();
        for (mean, share) in means.iter().zip(&shares) {
            assert!((mean - share).abs() < 1e-6, "{mean}, expected {share}");
        }
        let (alone, share) = mixed(&[17], (8, 12), 0.7);
        let same = (alone - images.narrow(0, 17, 1).unwrap()).unwrap().abs().unwrap().sum_all().unwrap();
        assert_eq!((same.to_scalar::<f32>().unwrap(), share[0]), (0.0, shares[17]));
        assert!(mixed(&ids, (8, 12), 0.0).1.iter().all(|&share| share == 0.0));
    }

    /// A million draws of the `rand_bbox` of Yun et al. in numpy 2.4: mean share, its deviation, and empty windows.
    #[test]
    fn windows_are_as_large_as_the_authors() {
        let ids: Vec<u64> = (0..20_000).collect();
        for ((h, w), mean, deviation, empty) in
            [((32, 32), 0.2992, 0.1827, 0.0039), ((8, 12), 0.2451, 0.1624, 0.0622)]
        {
            let shares: Vec<f64> = ids
                .iter()
                .map(|&id| window(h, w, 1.0, 5, id))
                .map(|(rows, columns)| (rows.len() * columns.len()) as f64 / (h * w) as f64)
                .collect();
            let n = shares.len() as f64;
            let found = shares.iter().sum::<f64>() / n;
            let variance = shares.iter().map(|share| (share - found).powi(2)).sum::<f64>() / n;
            let none = shares.iter().filter(|&&share| share == 0.0).count() as f64 / n;
            assert!((found - mean).abs() < 5.0 * deviation / n.sqrt(), "{found}, expected {mean}");
            assert!((variance.sqrt() - deviation).abs() < 0.005, "{}, expected {deviation}", variance.sqrt());
            assert!((none - empty).abs() < 5.0 * (empty / n).sqrt(), "{none}, expected {empty}");
        }
    }
}
