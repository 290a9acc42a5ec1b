//! The data set that materialize makes from a selection; files that already exist are not written again.
//!
//! | column of `curated` | |
//! |---|---|
//! | `image`, `label`, `uid` | as in the pool; the label as selected |
//! | `synthetic_score`, `label_source`, `label_confidence` | as in score and label tables |
//!
//! The configuration `pool` has every image of the pool, the columns of the score table, and `selected`.

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow_array::{ArrayRef, BooleanArray, Float32Array, Int64Array, RecordBatch, StringArray};
use arrow_schema::{DataType, SchemaRef};
use arrow_select::concat::concat_batches;

use super::{
    labels::{self, CONFIDENCE, LABEL},
    pool::{Pool, UID},
    scores::{SCORE, ScoreTables},
    selection::Selected,
};
use crate::{
    Error, Result,
    data::{
        CardConfig, Dtype, Feature, Features, FileEntry, ImageWriter, Manifest, image_column, manifest, table,
    },
    fs::Parts,
    progress::{Progress, check_stop},
    stage::Input,
};

/// The input of stages that read data sets.
pub const DATA: Input = Input::given("data");

/// The folder of the data set in its stage's folder.
pub(crate) const FOLDER: &str = "dataset";

/// The data set's folder: `dataset` in a materialize stage's folder; any other folder is the data set itself.
pub fn dataset_folder(dir: &Path) -> PathBuf {
    let inner = dir.join(FOLDER);
    if inner.is_dir() { inner } else { dir.to_path_buf() }
}

/// The name of the arm of the data set in `folder`, as its manifest says; `synthetic` if it has no manifest, or one
/// without an arm.
pub(crate) fn arm_of(folder: &Path) -> Result<String> {
    if !folder.join(manifest::FILE_NAME).is_file() {
        return Ok("synthetic".into());
    }
    match Manifest::read(folder)?.provenance.get("arm") {
        None => Ok("synthetic".into()),
        Some(serde_json::Value::String(arm)) => Ok(arm.clone()),
        Some(other) => bail!(Data, "{}: the manifest's arm is {other}, expected a name", folder.display()),
    }
}

/// The features of the curated images.
pub(crate) fn features(class_names: &[String]) -> Features {
    Features::image_and_label(class_names)
        .with(UID, Feature::Value(Dtype::String))
        .with(SCORE, Feature::Value(Dtype::Float32))
        .with(labels::SOURCE, Feature::Value(Dtype::String))
        .with(CONFIDENCE, Feature::Value(Dtype::Float32))
}

/// The columns of curated images, PNG files, in the order of [`features`].
pub(crate) fn columns(images: &[Vec<u8>], rows: &[&Selected], intended: bool) -> Result<Vec<ArrayRef>> {
    Ok(vec![
        image_column(images)?,
        Arc::new(Int64Array::from_iter_values(rows.iter().map(|r| i64::from(r.label)))),
        Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.uid))),
        Arc::new(Float32Array::from_iter_values(rows.iter().map(|r| r.score))),
        Arc::new(StringArray::from(vec![labels::source(intended); rows.len()])),
        Arc::new(Float32Array::from_iter_values(rows.iter().map(|r| r.confidence))),
    ])
}

/// The record of a file, if the file has been written.
pub(crate) fn written_file(dataset: &Path, name: &str, work: &Parts) -> Result<Option<FileEntry>> {
    let kept = work.get(&record_key(name))?;
    let entry: Option<FileEntry> = kept.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    Ok(entry.filter(|e| std::fs::metadata(dataset.join(&e.path)).is_ok_and(|m| m.len() == e.bytes)))
}

/// Writes the file that `make` fills, with a record in `work`, unless it has already been written.
pub(crate) fn recorded_file(
    dataset: &Path,
    name: &str,
    work: &Parts,
    bar: &Progress,
    make: impl FnOnce() -> Result<ImageWriter>,
) -> Result<FileEntry> {
    if let Some(entry) = written_file(dataset, name, work)? {
        bar.skip(entry.rows);
        return Ok(entry);
    }
    let entry = make()?.finish(dataset, name)?;
    let record = serde_json::to_vec(&entry).map_err(|e| Error::Alarm(format!("a file's record: {e}")))?;
    work.put(&record_key(name), &record)?;
    bar.add(entry.rows);
    Ok(entry)
}

fn record_key(name: &str) -> String {
    name.replace('/', "-") + ".json"
}

const SELECTED: &str = "selected";

/// What the files of the configuration have in common.
pub(crate) struct PoolConfiguration<'a> {
    pub(crate) pool: &'a Pool,
    pub(crate) tables: ScoreTables,
    pub(crate) class_names: &'a [String],
    /// For each row of the pool, whether it is in the other configuration.
    pub(crate) selected: Vec<bool>,
    pub(crate) rows_per_file: usize,
}

impl PoolConfiguration<'_> {
    /// Writes the files that do not exist yet, in the pool's order: image, label, `uid`, the other columns of the
    /// score table, and `selected`.
    pub(crate) fn write(&self, dataset: &Path, work: &Parts) -> Result<(Vec<FileEntry>, CardConfig)> {
        let schema = self.tables.schema()?;
        let features = self.features(&schema)?;
        let total = self.tables.len();
        let files = total.div_ceil(self.rows_per_file);
        let bar = Progress::new("pool", total as u64, "images");
        let mut entries = Vec::new();
        let mut open: Option<Shard> = None;
        for file in 0..files {
            check_stop()?;
            let rows = file * self.rows_per_file..((file + 1) * self.rows_per_file).min(total);
            let name = format!("pool/train-{file:05}-of-{files:05}.parquet");
            entries.push(recorded_file(dataset, &name, work, &bar, || {
                let mut writer = ImageWriter::new(features.clone(), &self.pool.info.generator)?;
                for shard in self.tables.place(rows.start).0..=self.tables.place(rows.end - 1).0 {
                    let shard = match open.take() {
                        Some(read) if read.number == shard => read,
                        _ => self.read(shard, &schema)?,
                    };
                    writer.push(self.columns(&shard, &rows, &features)?)?;
                    open = Some(shard);
                }
                Ok(writer)
            })?);
        }
        let config = CardConfig::train("pool", "pool/train-*", features, &entries);
        Ok((entries, config))
    }

    fn features(&self, schema: &SchemaRef) -> Result<Features> {
        let mut features = Features::image_and_label(self.class_names);
        for field in schema.fields().iter().filter(|field| field.name() != LABEL) {
            let dtype = match field.data_type() {
                DataType::Utf8 => Dtype::String,
                DataType::Boolean => Dtype::Bool,
                DataType::Int32 => Dtype::Int32,
                DataType::Int64 => Dtype::Int64,
                DataType::UInt64 => Dtype::Uint64,
                DataType::Float32 => Dtype::Float32,
                other => {
                    bail!(Data, "column '{}' of the score table is {other}, expected none", field.name())
                }
            };
            features = features.with(field.name(), Feature::Value(dtype));
        }
        Ok(features.with(SELECTED, Feature::Value(Dtype::Bool)))
    }

    fn read(&self, number: usize, schema: &SchemaRef) -> Result<Shard> {
        let names: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
        let batches = self.tables.batches(number, &names)?;
        let schema = batches.first().map_or_else(|| schema.clone(), RecordBatch::schema);
        let scores = concat_batches(&schema, &batches)
            .map_err(|e| Error::Data(format!("the score table of shard {number}: {e}")))?;
        let images = self.pool.read(number)?;
        let file = format!("score table of shard {number}");
        let uids: &StringArray = table::required(Path::new(&file), &scores, UID)?;
        if !uids.iter().flatten().eq(images.uids.iter().map(String::as_str)) {
            bail!(Data, "the {file} has rows that are not the pool's; it belongs to another pool");
        }
        Ok(Shard { number, scores, images: images.images })
    }

    /// The rows of a shard that are among `rows`, column by column.
    fn columns(&self, shard: &Shard, rows: &Range<usize>, features: &Features) -> Result<Vec<ArrayRef>> {
        let of_shard = self.tables.rows_of(shard.number);
        let here = rows.start.max(of_shard.start)..rows.end.min(of_shard.end);
        let (from, len) = (here.start - of_shard.start, here.len());
        let scores = shard.scores.slice(from, len);
        let column = |name: &str| match name {
            "image" => image_column(&shard.images[from..from + len]),
            SELECTED => Ok(Arc::new(BooleanArray::from(self.selected[here.clone()].to_vec())) as ArrayRef),
            name => scores.column_by_name(name).cloned().ok_or_else(|| {
                Error::Data(format!("the score table of shard {} has no column '{name}'", shard.number))
            }),
        };
        features.iter().map(|(name, _)| column(name)).collect()
    }
}

/// A whole shard of the pool.
struct Shard {
    number: usize,
    scores: RecordBatch,
    images: Vec<Vec<u8>>,
}
