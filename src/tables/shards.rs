//! Tables in shards: `shard-00007.parquet` with its record `shard-00007.json`. A shard exists if and only if its
//! record does.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow_array::{Array, ArrayRef, RecordBatch};
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    data::table::{self, Table},
    fs,
    stage::Job,
};

/// The record of a shard, written last.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ShardRecord {
    /// `proxyset.shard/1`.
    pub schema: String,
    /// The shard's number.
    pub shard: usize,
    /// The number of its rows.
    pub rows: u64,
    /// The size of its file.
    pub bytes: u64,
    /// The hash of its file.
    pub blake3: String,
    /// The fingerprint of the run that it belongs to.
    pub fingerprint: String,
    /// The class of machine that made it.
    pub device_class: String,
    /// The program's version.
    pub version: String,
}

impl ShardRecord {
    /// Whether the shard's file is in `dir` and has the right size.
    pub(crate) fn has_file(&self, dir: &Path) -> bool {
        std::fs::metadata(shard_file(dir, self.shard)).is_ok_and(|m| m.len() == self.bytes)
    }

    /// The record of a file just written for `job`.
    pub(crate) fn of(job: &Job, shard: usize, rows: u64, blake3: String, bytes: u64) -> Self {
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
pub(crate) fn shard_file(dir: &Path, shard: usize) -> PathBuf {
    dir.join(format!("shard-{shard:05}.parquet"))
}

/// `shard-00007.json` in `dir`.
pub(crate) fn record_file(dir: &Path, shard: usize) -> PathBuf {
    dir.join(format!("shard-{shard:05}.json"))
}

/// The number of the shard to which a file with this name belongs.
pub(crate) fn shard_number(file: &str) -> Option<usize> {
    file.strip_prefix("shard-")?.split_once('.')?.0.parse().ok()
}

/// The record of a shard, if the shard exists.
pub(crate) fn read_record(dir: &Path, shard: usize) -> Result<Option<ShardRecord>> {
    let path = record_file(dir, shard);
    if path.is_file() { fs::read_json(&path).map(Some) } else { Ok(None) }
}

/// The BLAKE3 hash of the hashes of a finished pool's shards, in hexadecimal.
pub(crate) fn pool_hash(dir: &Path, shards: usize) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for shard in 0..shards {
        let record =
            read_record(dir, shard)?.ok_or_else(|| Error::Alarm(format!("record {shard} vanished")))?;
        hasher.update(record.blake3.as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Reads some columns of the whole table for shard `shard` in `dir`.
pub(crate) fn read_table(dir: &Path, shard: usize, columns: &[&str]) -> Result<TableRows> {
    read_whole(&shard_file(dir, shard), columns)
}

/// Reads some columns of a whole table.
pub(crate) fn read_whole(path: &Path, columns: &[&str]) -> Result<TableRows> {
    let batches: Vec<RecordBatch> = Table::open(path)?.read(columns, 65_536)?.collect::<Result<_>>()?;
    Ok(TableRows { path: path.to_path_buf(), batches })
}

/// A table that was read as a whole.
pub(crate) struct TableRows {
    path: PathBuf,
    batches: Vec<RecordBatch>,
}

impl TableRows {
    /// All values of a column without nulls, through `get(array, row)`.
    pub(crate) fn column<A: table::TypedArray, T>(
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

    /// All values of a column; `None` where null.
    pub(crate) fn optional<A: table::TypedArray, T>(
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

/// A column of a table to write: its name, its values, and whether they may be null.
pub(crate) type Column<'a> = (&'a str, ArrayRef, bool);

/// A column without nulls.
pub(crate) fn required(name: &str, values: impl Array + 'static) -> Column<'_> {
    (name, Arc::new(values), false)
}

/// A column that may have nulls.
pub(crate) fn nullable(name: &str, values: impl Array + 'static) -> Column<'_> {
    (name, Arc::new(values), true)
}

/// A batch of these columns, whose types are those of their values.
pub(crate) fn batch<'a>(columns: impl IntoIterator<Item = Column<'a>>) -> Result<RecordBatch> {
    RecordBatch::try_from_iter_with_nullable(columns)
        .map_err(|e| Error::Alarm(format!("a table does not fit: {e}")))
}
