//! Which images a network gets right, clean or under attack.

use std::ops::Range as Span;

use candle_core::{D, Device, Tensor};

use crate::{
    Result,
    attack::{Apgd, Loss, Pgd, Victim, search::LogitsOf},
    data::{Dataset, Range, Shape, to_floats, to_tensor},
    device::side_by_side,
    fs::Parts,
    progress::{Progress, check_stop},
};

/// Images that go through the network together. Results do not depend on it.
const CHUNK: usize = 64;
/// Chunks whose result is kept together: what a kill can lose.
const PART: usize = 16 * CHUNK;

/// What an adversary, or noise, makes of images in [0, 1]: `(x, labels, ids)` to images of the same shape.
pub(crate) type Perturb<'a> = &'a (dyn Fn(&Tensor, &Tensor, &[u64]) -> Result<Tensor> + Sync);

/// For each image of `data` whether the network answers it by its label wherever `attack` comes by; see
/// [`Pgd::withstood`]. For the rest see [`correct_after`].
pub(crate) fn correct_throughout(
    logits_of: LogitsOf,
    data: &Dataset,
    attack: &Pgd,
    device: &Device,
    parts: Option<(&Parts, &str)>,
    bar: &Progress,
) -> Result<Vec<bool>> {
    in_parts(data.len(), device, parts, bar, |rows| {
        let (x, ids) = (images(data, rows.clone(), device)?, ids(rows.clone()));
        attack.withstood(logits_of, &x, &data.labels[rows], &ids)
    })
}

/// For each image of `data` whether the first choice of the network is its label; as `perturb` leaves it, if given.
///
/// The ids are the images' indices. With `parts`, finished parts are kept under `key` and found
/// again.
pub(crate) fn correct_after(
    logits_of: LogitsOf,
    data: &Dataset,
    perturb: Option<Perturb>,
    device: &Device,
    parts: Option<(&Parts, &str)>,
    bar: &Progress,
) -> Result<Vec<bool>> {
    in_parts(data.len(), device, parts, bar, |rows| correct_chunk(logits_of, data, rows, perturb, device))
}

/// For each image of `data` whether a stronger attack, too, leaves the network right about it: `right` says where there is
/// something to attack. The ids are the images' indices. For the rest see [`correct_after`].
pub(crate) fn correct_after_apgd(
    logits_of: LogitsOf,
    data: &Dataset,
    right: &[bool],
    attack: &Apgd,
    device: &Device,
    parts: Option<(&Parts, &str)>,
    bar: &Progress,
) -> Result<Vec<bool>> {
    let Shape { height, width, channels } = data.shape;
    let victim = Victim { logits_of, shape: (height, width, channels), device };
    in_parts(data.len(), device, parts, bar, |rows| {
        let standing: Vec<usize> = rows.clone().filter(|&row| right[row]).collect();
        let images: Vec<Vec<f32>> =
            standing.iter().map(|&row| to_floats(data.image(row), Range::Unit)).collect();
        let images: Vec<&[f32]> = images.iter().map(Vec::as_slice).collect();
        let labels: Vec<usize> = standing.iter().map(|&row| data.labels[row] as usize).collect();
        let ids: Vec<u64> = standing.iter().map(|&row| row as u64).collect();
        let found = attack.run(&victim, Loss::CrossEntropy, &images, &labels, &ids)?;
        let mut still = right[rows.clone()].to_vec();
        for (row, found) in standing.iter().zip(found) {
            still[row - rows.start] = found.is_none();
        }
        Ok(still)
    })
}

/// `one(rows)` for all rows below `len`, chunk by chunk, with finished parts kept and found again.
fn in_parts(
    len: usize,
    device: &Device,
    parts: Option<(&Parts, &str)>,
    bar: &Progress,
    one: impl Fn(Span<usize>) -> Result<Vec<bool>> + Sync,
) -> Result<Vec<bool>> {
    let mut all = Vec::with_capacity(len);
    for start in (0..len).step_by(PART) {
        let end = (start + PART).min(len);
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
        let chunk = |&from: &usize| -> Result<Vec<bool>> {
            check_stop()?;
            let to = (from + CHUNK).min(end);
            let right = one(from..to)?;
            bar.add((to - from) as u64);
            Ok(right)
        };
        let done = side_by_side(device, &chunks, chunk)?.concat();
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
    rows: Span<usize>,
    perturb: Option<Perturb>,
    device: &Device,
) -> Result<Vec<bool>> {
    let x = images(data, rows.clone(), device)?;
    let labels = &data.labels[rows.clone()];
    let x = match perturb {
        None => x,
        Some(perturb) => perturb(&x, &Tensor::new(labels, device)?, &ids(rows))?,
    };
    let chosen = logits_of(&x)?.argmax(D::Minus1)?.to_vec1::<u32>()?;
    Ok(chosen.iter().zip(labels).map(|(a, b)| a == b).collect())
}

/// The images of some rows, in [0, 1].
pub(crate) fn images(data: &Dataset, rows: Span<usize>, device: &Device) -> Result<Tensor> {
    let size = data.shape.size();
    to_tensor(&data.pixels[rows.start * size..rows.end * size], data.shape, Range::Unit, device)
}

fn ids(rows: Span<usize>) -> Vec<u64> {
    rows.map(|row| row as u64).collect()
}
