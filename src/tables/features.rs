//! The features of images: score keeps those of a keyed sample of the pool and of real images, from which curate
//! measures the precision and recall of what it keeps, and hashes of all images' features, by which curate finds
//! near-duplicates.

use std::{collections::HashMap, path::Path};

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{pool::PoolShard, scores::ScoreTables};
use crate::{
    Error, Result,
    data::{Dataset, Range, Shape, to_tensor},
    device::side_by_side,
    fs,
    proxy::{
        extractor::Extractor,
        feature_hash::FeatureHash,
        fold::in_sample,
        quality::{FeatureMatrix, precision_recall},
    },
    rng::spread,
};

/// Images that go through the classifier together. Results do not depend on it.
const CHUNK: usize = 256;
/// Which nearest neighbour's distance is the radius of a ball (Kynkäänniemi et al. 2019).
const NEIGHBOURS: usize = 3;

const FOLDER: &str = "features";
const REAL: &str = "real";

/// Precision and recall of the kept images and of equally many from the whole pool, against proxy images, which no
/// generator saw. Both depend on the classifier and on the numbers of images.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Coverage {
    /// The numbers of images compared: real ones, and those of each of the other two kinds.
    pub images: [usize; 2],
    /// Which nearest neighbour's distance is the radius of a ball.
    pub neighbours: usize,
    /// Precision and recall of an equally large part of the pool.
    pub before: [f64; 2],
    /// Precision and recall of the kept images.
    pub after: [f64; 2],
}

/// Computes features.
pub(crate) struct Sampler {
    network: Extractor,
    shape: Shape,
    device: Device,
    /// The share of the pool in the sample.
    share: f64,
}

impl Sampler {
    /// Prepares to keep features of about `sample` out of `pool` images of this shape. Fails with [`Error::Data`]
    /// if the classifier does not take them.
    pub(crate) fn new(
        classifier: &Path,
        (pool, shape): (u64, Shape),
        sample: usize,
        device: &Device,
    ) -> Result<Self> {
        let network = Extractor::load(classifier, device)?;
        network.expect_shape(classifier, &"the pool", shape)?;
        Ok(Self { network, shape, device: device.clone(), share: sample as f64 / pool as f64 })
    }

    /// Keeps in `out`, the stage's folder, the features of those of a shard's decoded images that are in the
    /// sample.
    pub(crate) fn shard(&self, out: &Path, shard: usize, rows: &PoolShard, pixels: &[u8]) -> Result<()> {
        let chosen: Vec<u32> =
            (0..).zip(&rows.uids).filter(|(_, uid)| in_sample(uid, self.share)).map(|(row, _)| row).collect();
        let size = self.shape.size();
        let images: Vec<u8> = chosen
            .iter()
            .flat_map(|&row| &pixels[row as usize * size..(row as usize + 1) * size])
            .copied()
            .collect();
        self.keep(out, &file_name(shard), &images, &chosen)
    }

    /// The hash of features whose bits split the kept real images in half.
    pub(crate) fn hash(&self, out: &Path) -> Result<FeatureHash> {
        let (_, dim, real) = read(&out.join(FOLDER).join(REAL))?;
        Ok(FeatureHash::new(&FeatureMatrix::new(dim, real)?))
    }

    /// The hashes of images' features.
    pub(crate) fn hashes(&self, hash: &FeatureHash, pixels: &[u8]) -> Result<Vec<u64>> {
        let features = self.features(pixels)?.to_vec2()?;
        Ok(features.par_iter().map(|features| hash.of(features)).collect())
    }

    /// Keeps the features of at most `sample` real images, which have the pool's shape, unless that is already done.
    pub(crate) fn real(&self, out: &Path, images: &Dataset, sample: usize) -> Result<()> {
        if out.join(FOLDER).join(REAL).is_file() {
            return Ok(());
        }
        let chosen = images.subset(&spread(images.len(), sample.min(images.len()), 0));
        let rows: Vec<u32> = (0..chosen.len() as u32).collect();
        self.keep(out, REAL, &chosen.pixels, &rows)
    }

    fn keep(&self, out: &Path, name: &str, pixels: &[u8], rows: &[u32]) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let features = self.features(pixels)?;
        let tensors = [("rows", Tensor::new(rows, &Device::Cpu)?), ("features", features)];
        let bytes = safetensors::serialize(tensors, None)
            .map_err(|e| Error::Alarm(format!("features cannot be written: {e}")))?;
        fs::publish(&out.join(FOLDER).join(name), &bytes)
    }

    /// The features of images, one row each, on the CPU.
    fn features(&self, pixels: &[u8]) -> Result<Tensor> {
        let chunks: Vec<&[u8]> = pixels.chunks(CHUNK * self.shape.size()).collect();
        let one = |pixels: &&[u8]| -> Result<Tensor> {
            let x = to_tensor(pixels, self.shape, Range::Unit, &self.device)?;
            Ok(self.network.features(&x)?.0.to_device(&Device::Cpu)?)
        };
        Ok(Tensor::cat(&side_by_side(&self.device, &chunks, one)?, 0)?.contiguous()?)
    }
}

fn file_name(shard: usize) -> String {
    format!("shard-{shard:05}.safetensors")
}

fn read(path: &Path) -> Result<(Vec<u32>, usize, Vec<f32>)> {
    let damaged = |e: candle_core::Error| Error::Data(format!("{}: {e}", path.display()));
    let mut tensors: HashMap<String, Tensor> =
        candle_core::safetensors::load(path, &Device::Cpu).map_err(damaged)?;
    let mut take = |name: &str| {
        tensors.remove(name).ok_or_else(|| Error::Data(format!("{}: no tensor '{name}'", path.display())))
    };
    let (rows, features) = (take("rows")?, take("features")?);
    let dim = features.dims().last().copied().unwrap_or(0);
    let values = || Ok::<_, candle_core::Error>((rows.to_vec1()?, features.flatten_all()?.to_vec1()?));
    let (rows, features): (Vec<u32>, Vec<f32>) = values().map_err(damaged)?;
    if features.len() != rows.len() * dim {
        bail!(Data, "{}: {} features of {} images", path.display(), features.len(), rows.len());
    }
    Ok((rows, dim, features))
}

/// Compares the kept images in the sample, and equally many from the whole sample, with the real images. `None` if
/// score kept no features, or if too few images of the sample are kept.
pub(crate) fn measure(
    scores: &Path,
    tables: &ScoreTables,
    kept: impl Fn(usize) -> bool,
) -> Result<Option<Coverage>> {
    let dir = scores.join(FOLDER);
    if !dir.join(REAL).is_file() {
        return Ok(None);
    }
    let (_, dim, real) = read(&dir.join(REAL))?;
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for shard in 0..tables.shards() {
        let path = dir.join(file_name(shard));
        if !path.is_file() {
            continue;
        }
        let (rows, found, features) = read(&path)?;
        if found != dim {
            bail!(Data, "{}: features of {found} numbers, expected {dim}", path.display());
        }
        let range = tables.rows_of(shard);
        for (&row, features) in rows.iter().zip(features.chunks_exact(dim)) {
            let row = range.start + row as usize;
            if row >= range.end {
                bail!(Data, "{}: row {row} is not in the shard", path.display());
            }
            before.push(features.to_vec());
            if kept(row) {
                after.push(features.to_vec());
            }
        }
    }
    if after.len() <= NEIGHBOURS || real.len() / dim <= NEIGHBOURS {
        return Ok(None);
    }
    let chosen = spread(before.len(), after.len(), 0);
    let before: Vec<f32> = chosen.into_iter().flat_map(|i| std::mem::take(&mut before[i])).collect();
    let (images, real) = (after.len(), FeatureMatrix::new(dim, real)?);
    let of = |features: Vec<f32>| -> Result<[f64; 2]> {
        Ok(precision_recall(&real, &FeatureMatrix::new(dim, features)?, NEIGHBOURS)?.into())
    };
    Ok(Some(Coverage {
        images: [real.len(), images],
        neighbours: NEIGHBOURS,
        before: of(before)?,
        after: of(after.concat())?,
    }))
}
