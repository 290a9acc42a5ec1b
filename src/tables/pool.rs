//! The pool: a generator's images, made here or imported, in shards; and the tables that other stages write next to
//! the shards, row by row.
//!
//! | column | |
//! |---|---|
//! | `image` | PNG |
//! | `label` | the class that it was made for; null if it was made for none |
//! | `uid` | names the image everywhere |
//! | `index`, `seed` | its place in the pool, the seed of its noise |

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray, UInt64Array};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::shards::{ShardRecord, read_record, read_table, record_file, shard_file};
use crate::{
    Error, Result,
    data::{
        Dataset, Dtype, Feature, Features, ImageReader, ImageWriter, Shape, encode_png, image_column, table,
    },
    fs::{self, Parts, Record},
    progress::Progress,
    proxy::fold::uid_order,
    stage::{Input, Job},
};

/// The input of stages that read a pool.
pub const POOL: Input = Input::of("pool", &["generate", "import"]);

/// The key in [`PoolInfo::sampler`] for the hash of what was imported.
pub const IMPORTED: &str = "imported_blake3";

/// The column that names an image, here and in all tables that belong to a pool.
pub const UID: &str = "uid";

/// A finished pool.
pub struct Pool {
    /// The stage's folder.
    pub dir: PathBuf,
    /// What the pool consists of.
    pub info: PoolInfo,
}

/// `pool.json`: what all rows of a pool have in common.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PoolInfo {
    /// `proxyset.pool/1`.
    pub schema: String,
    /// Number of images.
    pub count: u64,
    /// Number of shards.
    pub shards: usize,
    /// Size and channels of the images.
    pub shape: Shape,
    /// The class names; numbers if the model's folder does not name its classes.
    pub class_names: Vec<String>,
    /// Whether the model's folder names its classes.
    pub named: bool,
    /// Whether the images were made for classes; if not, `label` is null.
    pub conditional: bool,
    /// The fingerprint of the stage that made it.
    pub generator: String,
    /// The sampler and its settings, or what was imported.
    pub sampler: serde_json::Value,
    /// The seed.
    pub seed: u64,
}

impl Record for PoolInfo {
    const FILE: &'static str = "pool.json";
}

impl PoolInfo {
    /// Whether the images were made elsewhere.
    pub(crate) fn imported(&self) -> bool {
        self.sampler[IMPORTED].is_string()
    }

    /// A writer with the rows of a shard: images in HWC order, one after another, with their classes, if they have
    /// any.
    pub(crate) fn shard(
        &self,
        rows: std::ops::Range<u64>,
        pixels: &[u8],
        label: impl Fn(u64) -> Option<i64>,
    ) -> Result<ImageWriter> {
        let uid = |i: u64| format!("{}-{i:09}", &self.generator[..12]);
        let features = Features::image_and_label(&self.class_names)
            .with(UID, Feature::Value(Dtype::String))
            .with("index", Feature::Value(Dtype::Uint64))
            .with("seed", Feature::Value(Dtype::Uint64));
        let mut writer = ImageWriter::new(features, &self.generator)?;
        let (size, step) = (self.shape.size(), self.shape.batch_rows());
        for (pixels, first) in pixels.chunks(step * size).zip(rows.step_by(step)) {
            let images: Vec<Vec<u8>> =
                pixels.par_chunks(size).map(|image| encode_png(image, self.shape)).collect();
            let rows = first..first + images.len() as u64;
            let columns: Vec<ArrayRef> = vec![
                image_column(&images)?,
                Arc::new(Int64Array::from_iter(rows.clone().map(&label))),
                Arc::new(StringArray::from_iter_values(rows.clone().map(uid))),
                Arc::new(UInt64Array::from_iter_values(rows.clone())),
                Arc::new(UInt64Array::from_iter_values(rows.map(|_| self.seed))),
            ];
            writer.push(columns)?;
        }
        Ok(writer)
    }
}

impl Pool {
    /// Opens a finished pool, generated or imported.
    pub(crate) fn open(dir: Option<&Path>) -> Result<Self> {
        let dir = POOL.finished(dir)?;
        let info = PoolInfo::read(&dir)?;
        Ok(Self { dir, info })
    }

    /// Fails unless the pool's images have the shape of the real ones.
    pub(crate) fn expect_shape(&self, real: Shape) -> Result<()> {
        if self.info.shape != real {
            bail!(Data, "pool has {} images, expected {real} like the real ones", self.info.shape);
        }
        Ok(())
    }

    /// Where the shards are.
    pub(crate) fn shards_dir(&self) -> PathBuf {
        self.dir.join("pool")
    }

    /// The size of all shards.
    pub(crate) fn bytes(&self) -> Result<u64> {
        let of_shard = |shard| -> Result<u64> {
            let path = shard_file(&self.shards_dir(), shard);
            Ok(std::fs::metadata(&path).map_err(Error::io(&path))?.len())
        };
        (0..self.info.shards).map(of_shard).sum()
    }

    /// Reads a whole shard.
    pub(crate) fn read(&self, shard: usize) -> Result<PoolShard> {
        let path = shard_file(&self.shards_dir(), shard);
        let mut rows = PoolShard { uids: Vec::new(), labels: Vec::new(), images: Vec::new() };
        let classes = self.info.class_names.len();
        for batch in ImageReader::open(&path, &["image", "label", UID], self.info.shape.batch_rows())? {
            let batch = batch?;
            rows.uids.extend(batch.uids()?.iter().flatten().map(ToOwned::to_owned));
            rows.images.extend(batch.images()?.into_iter().map(<[u8]>::to_vec));
            for label in batch.labels()? {
                let class = label.map(|l| u32::try_from(l).ok().filter(|&c| (c as usize) < classes));
                if class == Some(None) {
                    let found = label.unwrap_or_default();
                    bail!(Data, "{}: label is {found}, expected one of {classes} classes", path.display());
                }
                rows.labels.push(class.flatten());
            }
        }
        Ok(rows)
    }
}

/// The rows of one pool shard.
pub(crate) struct PoolShard {
    pub uids: Vec<String>,
    pub labels: Vec<Option<u32>>,
    /// PNG files.
    pub images: Vec<Vec<u8>>,
}

/// A row that [`Pool::draw`] keeps.
#[derive(Clone)]
struct Drawn {
    place: usize,
    class: u32,
    png: Arc<Vec<u8>>,
}

impl Pool {
    /// The [`uid_order`] of the `n`-th image in that order, by which another pass can recognise the first `n`. `n`
    /// is at least 1.
    pub(crate) fn last_of_first(&self, n: usize) -> Result<u128> {
        if n as u64 >= self.info.count {
            return Ok(u128::MAX);
        }
        let mut orders = Vec::new();
        for shard in 0..self.info.shards {
            let uids = read_table(&self.shards_dir(), shard, &[UID])?;
            orders.extend(uids.column(UID, |a: &StringArray, i| uid_order(a.value(i)))?);
        }
        Ok(*orders.select_nth_unstable(n - 1).1)
    }

    /// For each slot, the first of the images that `slots` sends there by [`uid_order`]: at most `wanted`, in the
    /// order of the pool, with their classes. This draws evenly, however the pool is sorted. An image may go to
    /// several slots. Takes one pass, and memory for the images drawn.
    pub(crate) fn draw(&self, wanted: &[usize], slots: impl Fn(&str) -> Vec<usize>) -> Result<Vec<Dataset>> {
        let mut drawn: Vec<BTreeMap<u128, Drawn>> = vec![BTreeMap::new(); wanted.len()];
        let mut place = 0;
        for shard in 0..self.info.shards {
            let rows = self.read(shard)?;
            for ((uid, label), png) in rows.uids.iter().zip(rows.labels).zip(rows.images) {
                let png = Arc::new(png);
                for slot in slots(uid) {
                    let row = Drawn { place, class: label.unwrap_or(0), png: png.clone() };
                    drawn[slot].insert(uid_order(uid), row);
                    if drawn[slot].len() > wanted[slot] {
                        drawn[slot].pop_last();
                    }
                }
                place += 1;
            }
        }
        let decoded = |drawn: BTreeMap<u128, Drawn>| {
            let mut rows: Vec<_> = drawn.into_values().collect();
            rows.sort_unstable_by_key(|row| row.place);
            let pixels = rows.par_iter().map(|row| crate::data::decode_as(&row.png, self.info.shape));
            let mut images = Dataset::empty(self.info.shape, self.info.class_names.clone());
            for (pixels, row) in pixels.collect::<Result<Vec<_>>>()?.iter().zip(&rows) {
                images.push(pixels, row.class);
            }
            Ok(images)
        };
        drawn.into_iter().map(decoded).collect()
    }
}

impl PoolShard {
    pub(crate) fn len(&self) -> usize {
        self.uids.len()
    }

    /// Keeps only the rows of these images.
    pub(crate) fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        let kept: Vec<bool> = self.uids.iter().map(|uid| keep(uid)).collect();
        fn of<T>(rows: &mut Vec<T>, kept: &[bool]) {
            let mut kept = kept.iter();
            rows.retain(|_| kept.next() == Some(&true));
        }
        of(&mut self.uids, &kept);
        of(&mut self.labels, &kept);
        of(&mut self.images, &kept);
    }

    /// The pixels of some rows, one image after another.
    pub(crate) fn pixels(&self, rows: std::ops::Range<usize>, shape: Shape) -> Result<Vec<u8>> {
        let decoded: Vec<Vec<u8>> = self.images[rows]
            .par_iter()
            .map(|png| crate::data::decode_as(png, shape))
            .collect::<Result<_>>()?;
        Ok(decoded.concat())
    }
}

/// Makes a table for each shard of a pool: `work(shard number, its rows, parts)` gives the shard's table.
///
/// Finished shards are skipped; for long shards, the work may keep parts in `parts`.
pub(crate) fn for_each_shard(
    job: &Job,
    dir: &Path,
    pool: &Pool,
    what: &str,
    mut work: impl FnMut(usize, &PoolShard, &Parts, &Progress) -> Result<RecordBatch>,
) -> Result<()> {
    fs::create_dir_all(dir)?;
    let bar = Progress::new(what, pool.info.count, "images");
    for shard in 0..pool.info.shards {
        if let Some(record) = read_record(dir, shard)?
            && record.has_file(dir)
        {
            bar.skip(record.rows);
            continue;
        }
        let rows = pool.read(shard)?;
        let parts = Parts::new(job.hidden(dir, &format!("shard-{shard:05}")));
        let batch = work(shard, &rows, &parts, &bar)?;
        let path = shard_file(dir, shard);
        let about = [("fingerprint", job.fingerprint.as_str())];
        let n = table::write(&path, &batch.schema(), [Ok(batch)], table::ROW_GROUP_ROWS, &about)?;
        let (hash, bytes) = fs::hash_file(&path)?;
        fs::publish_json(&record_file(dir, shard), &ShardRecord::of(job, shard, n, hash, bytes))?;
        parts.clear()?;
        crate::progress::check_stop()?;
    }
    Ok(())
}

/// Fails with [`Error::Data`] unless `uids` are those of the pool's shard, in order.
pub(crate) fn expect_same_rows(what: &str, shard: usize, uids: &[String], pool: &PoolShard) -> Result<()> {
    if uids == pool.uids {
        return Ok(());
    }
    Err(Error::Data(format!(
        "{what} of shard {shard} has {} rows that are not the {} of the pool's; it belongs to another pool",
        uids.len(),
        pool.len()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_pool_is_drawn_evenly_however_the_pool_is_sorted() {
        let dir = tempfile::tempdir().unwrap();
        let info = PoolInfo {
            schema: "proxyset.pool/1".into(),
            count: 200,
            shards: 2,
            shape: Shape { height: 2, width: 1, channels: 1 },
            class_names: (0..10).map(|class| class.to_string()).collect(),
            named: false,
            conditional: true,
            generator: "123456789abcdef".into(),
            sampler: serde_json::Value::Null,
            seed: 0,
        };
        let pool = Pool { dir: dir.path().into(), info };
        for shard in 0..2u64 {
            let rows = shard * 100..(shard + 1) * 100;
            let pixels: Vec<u8> = rows.clone().flat_map(|i| [i as u8, 7]).collect();
            // Sorted by class.
            let writer = pool.info.shard(rows, &pixels, |i| Some(i as i64 / 20)).unwrap();
            writer.finish(&pool.shards_dir(), &format!("shard-{shard:05}.parquet")).unwrap();
        }
        let even = |uid: &str| uid.ends_with(['0', '2', '4', '6', '8']);
        let slots = |uid: &str| if even(uid) { vec![0, 1] } else { vec![1] };
        let drawn = pool.draw(&[30, 500], slots).unwrap();
        let ids = |images: &Dataset| (0..images.len()).map(|i| images.image(i)[0]).collect::<Vec<u8>>();
        assert_eq!(ids(&drawn[1]), (0..200).collect::<Vec<u8>>());
        let mut uids: Vec<(u128, u8)> =
            (0..200).step_by(2).map(|i: u8| (uid_order(&format!("123456789abc-{i:09}")), i)).collect();
        uids.sort_unstable();
        let mut first: Vec<u8> = uids[..30].iter().map(|(_, id)| *id).collect();
        first.sort_unstable();
        assert_eq!(ids(&drawn[0]), first);
        assert!(drawn[0].labels.iter().zip(&first).all(|(label, id)| *label == u32::from(id / 20)));
        assert!((0..10).all(|class| drawn[0].labels.contains(&class)), "{:?}", drawn[0].labels);

        let last = pool.last_of_first(30).unwrap();
        let mut found = Vec::new();
        for shard in 0..2 {
            let mut rows = pool.read(shard).unwrap();
            rows.retain(|uid| uid_order(uid) <= last);
            let pixels = rows.pixels(0..rows.len(), pool.info.shape).unwrap();
            found.extend(pixels.chunks(2).zip(&rows.labels).map(|(image, label)| (image[0], label.unwrap())));
        }
        let all = &pool.draw(&[30], |_| vec![0]).unwrap()[0];
        assert!(found.into_iter().eq(ids(all).into_iter().zip(all.labels.iter().copied())));
        assert_eq!(pool.last_of_first(200).unwrap(), u128::MAX);
    }
}
