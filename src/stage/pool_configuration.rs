//! The whole pool with its scores, as the second configuration of a data set: `pool`.

use std::{ops::Range, path::Path, sync::Arc};

use arrow_array::{ArrayRef, BooleanArray, RecordBatch, StringArray};
use arrow_schema::{DataType, SchemaRef};
use arrow_select::concat::concat_batches;

use super::{label::columns, materialize::recorded_file, score_rows::ScoreTables, shards::Pool};
use crate::{
    Error, Result,
    data::{
        CardConfig, CardSplit, Dtype, Feature, Features, FileEntry, ImageWriter, SYNTHETIC_SOURCE_TYPE,
        image_column, table,
    },
    fs::Parts,
    progress::{Progress, check_stop},
};

const SELECTED: &str = "selected";

/// What the files of the configuration have in common.
pub(super) struct PoolConfiguration<'a> {
    pub(super) pool: &'a Pool,
    pub(super) tables: ScoreTables,
    pub(super) class_names: &'a [String],
    /// By row of the pool, whether it is in the other configuration.
    pub(super) selected: Vec<bool>,
    pub(super) rows_per_file: usize,
}

impl PoolConfiguration<'_> {
    /// Writes the files in the pool's order, or finds them written: image, label, `uid`, the other columns of the score
    /// table, and `selected`.
    pub(super) fn write(&self, dataset: &Path, work: &Parts) -> Result<(Vec<FileEntry>, CardConfig)> {
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
                let generator = self.pool.info.generator.as_str();
                let key_values = [("digital_source_type", SYNTHETIC_SOURCE_TYPE), ("generator", generator)];
                let mut writer = ImageWriter::new(features.clone(), &key_values)?;
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
        let sum = |f: fn(&FileEntry) -> u64| entries.iter().map(f).sum();
        let split = CardSplit {
            name: "train".into(),
            path: "pool/train-*".into(),
            num_bytes: sum(|f| f.bytes),
            num_examples: sum(|f| f.rows),
        };
        Ok((entries, CardConfig { name: "pool".into(), features, splits: vec![split] }))
    }

    fn features(&self, schema: &SchemaRef) -> Result<Features> {
        let mut features = Features::image_and_label(self.class_names);
        for field in schema.fields().iter().filter(|field| field.name() != columns::LABEL) {
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
        let uids: &StringArray = table::required(Path::new(&file), &scores, columns::UID)?;
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

/// A shard of the pool, read whole.
struct Shard {
    number: usize,
    scores: RecordBatch,
    images: Vec<Vec<u8>>,
}
