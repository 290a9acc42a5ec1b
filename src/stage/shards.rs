//! Shards of a pool and the tables that run beside them: `shard-00007.parquet` with its record
//! `shard-00007.json`. A shard is there if, and only if, its record is.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray, UInt64Array};
use arrow_schema::SchemaRef;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{Generate, Import, Job, Stage, finished_one_of};
use crate::{
    Error, Result,
    data::{
        Dtype, Feature, Features, ImageReader, ImageWriter, SYNTHETIC_SOURCE_TYPE, Shape, encode_png,
        image_column,
        table::{self, Table},
    },
    fs::{self, Parts},
    progress::Progress,
};

/// The key in [`PoolInfo::sampler`] of the hash of what was imported.
pub(super) const IMPORTED: &str = "imported_blake3";

/// The record of a shard, written last.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ShardRecord {
    /// `proxyset.shard/1`.
    pub schema: String,
    /// The shard's number.
    pub shard: usize,
    /// Its rows.
    pub rows: u64,
    /// The size of its file.
    pub bytes: u64,
    /// The hash of its file.
    pub blake3: String,
    /// The fingerprint of the run that it belongs to.
    pub fingerprint: String,
    /// The class of the machine that made it.
    pub device_class: String,
    /// The program's version.
    pub version: String,
}

impl ShardRecord {
    /// Whether the shard's file is in `dir`, in its size.
    pub(super) fn has_file(&self, dir: &Path) -> bool {
        std::fs::metadata(shard_file(dir, self.shard)).is_ok_and(|m| m.len() == self.bytes)
    }

    /// The record of a file just written for `job`.
    pub(super) fn of(job: &Job, shard: usize, rows: u64, blake3: String, bytes: u64) -> Self {
        Self {
            schema: "proxyset.shard/1".into(),
            shard,
            rows,
            bytes,
            blake3,
            fingerprint: job.fingerprint.clone(),
            device_class: job.device_class.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }
}

/// `shard-00007.parquet` in `dir`.
pub(super) fn shard_file(dir: &Path, shard: usize) -> PathBuf {
    dir.join(format!("shard-{shard:05}.parquet"))
}

/// `shard-00007.json` in `dir`.
pub(super) fn record_file(dir: &Path, shard: usize) -> PathBuf {
    dir.join(format!("shard-{shard:05}.json"))
}

/// The shard that a file with this name is of.
pub(super) fn shard_number(file: &str) -> Option<usize> {
    file.strip_prefix("shard-")?.split_once('.')?.0.parse().ok()
}

/// The record of a shard, if the shard is there.
pub(super) fn read_record(dir: &Path, shard: usize) -> Result<Option<ShardRecord>> {
    let path = record_file(dir, shard);
    if path.is_file() { fs::read_json(&path).map(Some) } else { Ok(None) }
}

/// The BLAKE3 of the hashes of a finished pool's shards, in hexadecimal.
pub(super) fn pool_hash(dir: &Path, shards: usize) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for shard in 0..shards {
        let record =
            read_record(dir, shard)?.ok_or_else(|| Error::Alarm(format!("record {shard} vanished")))?;
        hasher.update(record.blake3.as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// A finished pool.
pub struct Pool {
    /// The stage's folder.
    pub dir: PathBuf,
    /// What was generated.
    pub info: PoolInfo,
}

/// `pool.json`: what all rows of a pool have in common.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PoolInfo {
    /// `proxyset.pool/1`.
    pub schema: String,
    /// Images.
    pub count: u64,
    /// Shards.
    pub shards: usize,
    /// Their size and channels.
    pub shape: Shape,
    /// The class names; numbers if the model's folder does not name its classes.
    pub class_names: Vec<String>,
    /// Whether the model's folder names its classes.
    pub named: bool,
    /// Whether images were made for a class; if not, `label` is null.
    pub conditional: bool,
    /// The fingerprint of the stage that made it.
    pub generator: String,
    /// The sampler and its settings, or what was imported.
    pub sampler: serde_json::Value,
    /// The seed.
    pub seed: u64,
}

impl PoolInfo {
    /// Whether the images were made elsewhere.
    pub(super) fn imported(&self) -> bool {
        self.sampler[IMPORTED].is_string()
    }

    /// A writer that holds the rows of a shard: images in HWC order, one after another, with their classes, if they have
    /// any.
    pub(super) fn shard(
        &self,
        rows: std::ops::Range<u64>,
        pixels: &[u8],
        label: impl Fn(u64) -> Option<i64>,
    ) -> Result<ImageWriter> {
        let images: Vec<Vec<u8>> =
            pixels.par_chunks(self.shape.size()).map(|image| encode_png(image, self.shape)).collect();
        let uid = |i: u64| format!("{}-{i:09}", &self.generator[..12]);
        let features = Features::image_and_label(&self.class_names)
            .with("uid", Feature::Value(Dtype::String))
            .with("index", Feature::Value(Dtype::Uint64))
            .with("seed", Feature::Value(Dtype::Uint64));
        let key_values = [("digital_source_type", SYNTHETIC_SOURCE_TYPE), ("generator", &*self.generator)];
        let mut writer = ImageWriter::new(features, &key_values)?;
        let columns: Vec<ArrayRef> = vec![
            image_column(&images)?,
            Arc::new(Int64Array::from_iter(rows.clone().map(label))),
            Arc::new(StringArray::from_iter_values(rows.clone().map(uid))),
            Arc::new(UInt64Array::from_iter_values(rows.clone())),
            Arc::new(UInt64Array::from_iter_values(rows.map(|_| self.seed))),
        ];
        writer.push(columns)?;
        Ok(writer)
    }
}

impl Pool {
    /// Opens the finished pool that `key` names: generated, or imported.
    pub(super) fn open(key: &str, dir: Option<&Path>) -> Result<Self> {
        let dir = finished_one_of(key, dir, &[Generate::NAME, Import::NAME])?;
        let info: PoolInfo = fs::read_json(&dir.join("pool.json"))?;
        Ok(Self { dir, info })
    }

    /// Fails unless the images have the shape of the real ones.
    pub(super) fn expect_shape(&self, real: Shape) -> Result<()> {
        if self.info.shape != real {
            bail!(Data, "pool has {} images, expected {real} like the real ones", self.info.shape);
        }
        Ok(())
    }

    /// Where the shards are.
    pub(super) fn shards_dir(&self) -> PathBuf {
        self.dir.join("pool")
    }

    /// Reads one shard whole.
    pub(super) fn read(&self, shard: usize) -> Result<PoolShard> {
        let path = shard_file(&self.shards_dir(), shard);
        let mut rows = PoolShard { uids: Vec::new(), labels: Vec::new(), images: Vec::new() };
        let classes = self.info.class_names.len();
        for batch in ImageReader::open(&path, &["image", "label", "uid"], 4096)? {
            let batch = batch?;
            rows.uids.extend(batch.uids()?.iter().flatten().map(ToOwned::to_owned));
            rows.images.extend(batch.images()?.into_iter().map(<[u8]>::to_vec));
            for label in batch.labels()? {
                let class = label.map(|l| u32::try_from(l).ok().filter(|&c| (c as usize) < classes));
                if class == Some(None) {
                    bail!(Data, "{}: label is {label:?}, expected 0 to {}", path.display(), classes - 1);
                }
                rows.labels.push(class.flatten());
            }
        }
        Ok(rows)
    }
}

/// The rows of one pool shard.
pub(super) struct PoolShard {
    pub(super) uids: Vec<String>,
    pub(super) labels: Vec<Option<u32>>,
    /// PNG files.
    pub(super) images: Vec<Vec<u8>>,
}

impl PoolShard {
    pub(super) fn len(&self) -> usize {
        self.uids.len()
    }

    /// The pixels of some rows, one image after another.
    pub(super) fn pixels(&self, rows: std::ops::Range<usize>, shape: Shape) -> Result<Vec<u8>> {
        let decoded: Vec<Vec<u8>> = self.images[rows]
            .par_iter()
            .map(|png| crate::data::decode_as(png, shape))
            .collect::<Result<_>>()?;
        Ok(decoded.concat())
    }
}

/// Makes a table beside each shard of a pool: `work(shard number, its rows, parts)` gives the shard's table.
///
/// Finished shards are skipped; the work may keep parts of long shards in `parts`.
pub(super) fn for_each_shard(
    job: &Job,
    dir: &Path,
    pool: &Pool,
    what: &str,
    schema: &SchemaRef,
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
        let n = table::write(
            &path,
            schema,
            [Ok(batch)],
            table::ROW_GROUP_ROWS,
            &[("fingerprint", &job.fingerprint)],
        )?;
        let (hash, bytes) = fs::hash_file(&path)?;
        fs::publish_json(&record_file(dir, shard), &ShardRecord::of(job, shard, n, hash, bytes))?;
        parts.clear()?;
        crate::progress::check_stop()?;
    }
    Ok(())
}

/// Reads some columns of the table beside shard `shard` in `dir`, whole.
pub(super) fn read_table(dir: &Path, shard: usize, columns: &[&str]) -> Result<TableRows> {
    read_whole(&shard_file(dir, shard), columns)
}

/// Reads some columns of a table, whole.
pub(super) fn read_whole(path: &Path, columns: &[&str]) -> Result<TableRows> {
    let batches: Vec<RecordBatch> = Table::open(path)?.read(columns, 65_536)?.collect::<Result<_>>()?;
    Ok(TableRows { path: path.to_path_buf(), batches })
}

/// A table that was read whole.
pub(super) struct TableRows {
    path: PathBuf,
    batches: Vec<RecordBatch>,
}

impl TableRows {
    /// All values of a column without nulls, through `get(array, row)`.
    pub(super) fn column<A: table::TypedArray, T>(
        &self,
        name: &str,
        get: impl Fn(&A, usize) -> T,
    ) -> Result<Vec<T>> {
        let mut values = Vec::new();
        for batch in &self.batches {
            let array: &A = table::required(&self.path, batch, name)?;
            values.extend((0..array.len()).map(|i| get(array, i)));
        }
        Ok(values)
    }

    /// All values of a column, none where null.
    pub(super) fn optional<A: table::TypedArray, T>(
        &self,
        name: &str,
        get: impl Fn(&A, usize) -> T,
    ) -> Result<Vec<Option<T>>> {
        let mut values = Vec::new();
        for batch in &self.batches {
            let array: &A = table::column(&self.path, batch, name)?;
            values.extend((0..array.len()).map(|i| array.is_valid(i).then(|| get(array, i))));
        }
        Ok(values)
    }
}

/// Fails with [`Error::Data`] unless `uids` are those of the pool's shard, in order.
pub(super) fn expect_same_rows(what: &str, shard: usize, uids: &[String], pool: &PoolShard) -> Result<()> {
    if uids == pool.uids {
        return Ok(());
    }
    Err(Error::Data(format!(
        "{what} of shard {shard} has {} rows that are not the {} of the pool's; it belongs to another pool",
        uids.len(),
        pool.len()
    )))
}

/// A schema of named, typed columns; `true` allows nulls.
pub(super) fn schema(fields: &[(&str, arrow_schema::DataType, bool)]) -> SchemaRef {
    let fields: Vec<_> = fields
        .iter()
        .map(|(name, kind, null)| arrow_schema::Field::new(*name, kind.clone(), *null))
        .collect();
    Arc::new(arrow_schema::Schema::new(fields))
}

/// A batch of `schema` from its columns.
pub(super) fn batch(schema: &SchemaRef, columns: Vec<arrow_array::ArrayRef>) -> Result<RecordBatch> {
    RecordBatch::try_new(schema.clone(), columns)
        .map_err(|e| Error::Alarm(format!("a table does not fit: {e}")))
}
