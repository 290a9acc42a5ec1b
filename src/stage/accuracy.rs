//! Which images a network gets right, clean or under attack.

use candle_core::{D, Device, Tensor};

use super::side_by_side;
use crate::{
    Result,
    attack::{Pgd, search::LogitsOf},
    data::{Dataset, Range, to_tensor},
    fs::Parts,
    progress::{Progress, check_stop},
};

/// Images that go through the network together. Results do not depend on it.
const CHUNK: usize = 64;
/// Chunks whose result is kept together: what a kill can lose.
const PART: usize = 16 * CHUNK;

/// What an adversary, or noise, makes of images in [0, 1]: `(x, labels, ids)` to images of the same shape.
pub(super) type Perturb<'a> = &'a (dyn Fn(&Tensor, &Tensor, &[u64]) -> Result<Tensor> + Sync);

/// For each image of `data` whether the first choice of the network is its label; under attack, if one is given.
///
/// For the rest see [`correct_after`].
pub(super) fn correct(
    logits_of: LogitsOf,
    data: &Dataset,
    attack: Option<&Pgd>,
    device: &Device,
    parts: Option<(&Parts, &str)>,
    bar: &Progress,
) -> Result<Vec<bool>> {
    let perturb =
        attack.map(|attack| move |x: &Tensor, y: &Tensor, ids: &[u64]| attack.perturb(logits_of, x, y, ids));
    correct_after(logits_of, data, perturb.as_ref().map(|perturb| perturb as Perturb), device, parts, bar)
}

/// For each image of `data` whether the first choice of the network is its label; as `perturb` leaves it, if given.
///
/// The ids are the images' indices. With `parts`, finished parts are kept under `key` and found
/// again.
pub(super) fn correct_after(
    logits_of: LogitsOf,
    data: &Dataset,
    perturb: Option<Perturb>,
    device: &Device,
    parts: Option<(&Parts, &str)>,
    bar: &Progress,
) -> Result<Vec<bool>> {
    let mut all = Vec::with_capacity(data.len());
    for start in (0..data.len()).step_by(PART) {
        let end = (start + PART).min(data.len());
        let key = parts.map(|(parts, key)| (parts, format!("{key}-{start:08}")));
        if let Some((parts, key)) = &key
            && let Some(bytes) = parts.get(key)?
            && bytes.len() == end - start
        {
            all.extend(bytes.iter().map(|&b| b == 1));
            bar.skip((end - start) as u64);
            continue;
        }
        let chunks: Vec<usize> = (start..end).step_by(CHUNK).collect();
        let one = |&from: &usize| -> Result<Vec<bool>> {
            check_stop()?;
            let to = (from + CHUNK).min(end);
            let right = correct_chunk(logits_of, data, from..to, perturb, device)?;
            bar.add((to - from) as u64);
            Ok(right)
        };
        let done = side_by_side(device, &chunks, one)?.concat();
        if let Some((parts, key)) = &key {
            parts.put(key, &done.iter().map(|&b| u8::from(b)).collect::<Vec<u8>>())?;
        }
        all.extend(done);
    }
    Ok(all)
}

fn correct_chunk(
    logits_of: LogitsOf,
    data: &Dataset,
    rows: std::ops::Range<usize>,
    perturb: Option<Perturb>,
    device: &Device,
) -> Result<Vec<bool>> {
    let size = data.shape.size();
    let x = to_tensor(&data.pixels[rows.start * size..rows.end * size], data.shape, Range::Unit, device)?;
    let labels = &data.labels[rows.clone()];
    let y = Tensor::new(labels, device)?;
    let x = match perturb {
        None => x,
        Some(perturb) => perturb(&x, &y, &rows.map(|i| i as u64).collect::<Vec<_>>())?,
    };
    let chosen = logits_of(&x)?.argmax(D::Minus1)?.to_vec1::<u32>()?;
    Ok(chosen.iter().zip(labels).map(|(a, b)| a == b).collect())
}
