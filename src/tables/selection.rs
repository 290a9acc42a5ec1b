//! What curate writes and other stages read: `selection.parquet`, `rejected.parquet` and `select.json`.
//!
//! | column of `selection.parquet` | |
//! |---|---|
//! | `uid`, `label`, `synthetic_score`, `label_confidence` | as in the score table |
//! | `shard`, `row` | where the image is in the pool |
//!
//! `rejected.parquet` has `uid` and `reason`.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use arrow_array::{ArrayRef, BooleanArray, Float32Array, Int32Array, Int64Array, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use arrow_select::filter::{filter, filter_record_batch};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    features::Coverage,
    labels::{CONFIDENCE, LABEL},
    pool::UID,
    scores::{SCORE, ScoreTables},
    shards,
};
use crate::{
    Error, Result,
    curate::{self, PASSED},
    data::table,
    fs::Record,
    stage::Input,
};

/// The input of stages that read a selection.
pub const SELECTION: Input = Input::of("selection", &["curate"]);

/// Counts by name, in alphabetical order.
pub type Counts = BTreeMap<String, u64>;

/// `select.json`: the rule and its effect.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SelectRecord {
    /// `proxyset.select/1`.
    pub schema: String,
    /// The arm that ranked the rows.
    pub arm: curate::Arm,
    /// All settings.
    pub rule: Value,
    /// The fingerprint of the split whose real images the pool was scored against.
    #[serde(default)]
    pub split: Option<String>,
    /// Whether the pool was compared with test images; if the source has none, no leak could be found.
    #[serde(default)]
    pub looked_for_leaks: Option<bool>,
    /// Rows of the score table.
    pub total: u64,
    /// Rows kept.
    pub kept: u64,
    /// Rows rejected, by reason. `total = kept + Σ rejected`.
    pub rejected: Counts,
    /// The same for each class.
    pub classes: Vec<ClassCounts>,
    /// Quantiles of `synthetic_score` over the pool.
    pub score_before: Value,
    /// Quantiles of `synthetic_score` over the kept rows.
    pub score_after: Value,
    /// The effect of the selection on precision and recall, if score kept features.
    pub coverage: Option<Coverage>,
    /// Whether the judges find the kept images closer to real than an equally large random selection.
    pub judged: Option<Judged>,
}

impl Record for SelectRecord {
    const FILE: &'static str = "select.json";
}

impl SelectRecord {
    /// `6000 in = 3000 kept + 209 label-disagrees + 2791 over-quota`.
    pub(crate) fn balance(&self) -> String {
        let reasons: String = self.rejected.iter().map(|(reason, n)| format!(" + {n} {reason}")).collect();
        format!("{} in = {} kept{reasons}", self.total, self.kept)
    }

    /// Rows kept, by class.
    pub(crate) fn kept_by_class(&self) -> Vec<u64> {
        self.classes.iter().map(|class| class.kept).collect()
    }
}

/// What happened to the rows of one class.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ClassCounts {
    /// The class.
    pub class: String,
    /// The number of its rows.
    pub total: u64,
    /// Those kept.
    pub kept: u64,
    /// Those rejected, by reason.
    pub rejected: Counts,
}

/// The kept images compared with an equally large random selection behind the same gates, class by class, by
/// discriminators that share no training image and no seed with the ranking ones. Lower is closer to real.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Judged {
    /// Mean judge score of the kept images.
    pub kept: f64,
    /// Mean judge score of the random selection.
    pub random: f64,
    /// Kept minus random.
    pub difference: f64,
    /// Welch's 95 % interval of the difference, over images. Images in both selections make it wider than it need
    /// be.
    pub interval: [f64; 2],
    /// The numbers of judged images: kept, random. Images of the judges' own fold are left out.
    pub images: [usize; 2],
}

/// Writes the kept rows, whose verdict is [`PASSED`], and the others with their reasons, the first of which belongs
/// to verdict 1. Uses two threads.
pub(crate) fn write(out: &Path, tables: &ScoreTables, verdicts: &[u8], reasons: &[String]) -> Result<()> {
    let (selected, rejected) = rayon::join(
        || write_selected(&out.join(KEPT), tables, verdicts),
        || write_rejected(&out.join(REJECTED), tables, verdicts, reasons),
    );
    selected.and(rejected)
}

const KEPT: &str = "selection.parquet";
const REJECTED: &str = "rejected.parquet";
const SHARD: &str = "shard";
const ROW: &str = "row";
const REASON: &str = "reason";

fn write_selected(path: &Path, tables: &ScoreTables, verdicts: &[u8]) -> Result<()> {
    let schema = schema(&[
        (UID, DataType::Utf8),
        (LABEL, DataType::Int64),
        (SCORE, DataType::Float32),
        (CONFIDENCE, DataType::Float32),
        (SHARD, DataType::Int32),
        (ROW, DataType::Int32),
    ]);
    let wanted = [UID, LABEL, SCORE, CONFIDENCE];
    let kept = |row: usize| verdicts[row] == PASSED;
    let batches = masked(tables, &wanted, kept, |batch, mask, shard, first| {
        let rows = first..first + batch.num_rows() as i32;
        let mut all: Vec<ArrayRef> = Vec::new();
        for name in wanted {
            all.push(batch.column_by_name(name).cloned().ok_or_else(|| {
                Error::Data(format!("the score table of shard {shard} has no column '{name}'"))
            })?);
        }
        all.push(Arc::new(Int32Array::from(vec![shard as i32; batch.num_rows()])));
        all.push(Arc::new(Int32Array::from_iter_values(rows)));
        filter_record_batch(&batch_of(&schema, all)?, mask).map_err(unfiltered)
    });
    table::write(path, &schema, batches, table::ROW_GROUP_ROWS, &[]).map(drop)
}

fn write_rejected(path: &Path, tables: &ScoreTables, verdicts: &[u8], reasons: &[String]) -> Result<()> {
    let schema = schema(&[(UID, DataType::Utf8), (REASON, DataType::Utf8)]);
    let refused = |row: usize| verdicts[row] != PASSED;
    let batches = masked(tables, &[UID], refused, |batch, mask, shard, first| {
        let uids = filter(batch.column(0), mask).map_err(unfiltered)?;
        let start = tables.rows_of(shard).start + first as usize;
        let rows = mask.values().set_indices().map(|i| start + i);
        let reasons: Vec<&str> = rows.map(|row| &*reasons[usize::from(verdicts[row] - PASSED) - 1]).collect();
        batch_of(&schema, vec![uids, Arc::new(StringArray::from(reasons))])
    });
    table::write(path, &schema, batches, table::ROW_GROUP_ROWS, &[]).map(drop)
}

/// A schema of columns without nulls.
fn schema(columns: &[(&str, DataType)]) -> SchemaRef {
    let fields = columns.iter().map(|(name, kind)| Field::new(*name, kind.clone(), false));
    Arc::new(Schema::new(fields.collect::<Vec<_>>()))
}

fn batch_of(schema: &SchemaRef, columns: Vec<ArrayRef>) -> Result<RecordBatch> {
    RecordBatch::try_new(schema.clone(), columns)
        .map_err(|e| Error::Alarm(format!("a table does not fit: {e}")))
}

fn unfiltered(error: arrow_schema::ArrowError) -> Error {
    Error::Alarm(format!("rows cannot be picked from a table: {error}"))
}

/// The tables' batches, passed through `make(batch, which of its rows are wanted, shard, first row in the shard)`.
/// Shards without wanted rows are not read.
fn masked<'a>(
    tables: &'a ScoreTables,
    columns: &'a [&'a str],
    wanted: impl Fn(usize) -> bool + Copy + Sync + 'a,
    make: impl Fn(&RecordBatch, &BooleanArray, usize, i32) -> Result<RecordBatch> + Sync + 'a,
) -> impl Iterator<Item = Result<RecordBatch>> + 'a {
    let of_shard = move |&shard: &usize| -> Vec<Result<RecordBatch>> {
        let mut rows = tables.rows_of(shard);
        let mut first = 0;
        let batches = match tables.batches(shard, columns) {
            Ok(batches) => batches,
            Err(error) => return vec![Err(error)],
        };
        let made = batches.into_iter().map(|batch| {
            let here = rows.by_ref().take(batch.num_rows());
            let mask: BooleanArray = here.map(|row| Some(wanted(row))).collect();
            let made = make(&batch, &mask, shard, first);
            first += batch.num_rows() as i32;
            made
        });
        made.collect()
    };
    let shards: Vec<usize> = (0..tables.shards()).filter(|&s| tables.rows_of(s).any(wanted)).collect();
    // Takes as many at a time as keep the threads busy.
    let at_once = 2 * rayon::current_num_threads();
    let windows: Vec<Vec<usize>> = shards.chunks(at_once).map(<[usize]>::to_vec).collect();
    windows.into_iter().flat_map(move |shards| {
        let made: Vec<Vec<Result<RecordBatch>>> = shards.par_iter().map(&of_shard).collect();
        made.into_iter().flatten()
    })
}

/// One kept row, as materialize reads it.
pub(crate) struct Selected {
    pub(crate) uid: String,
    pub(crate) label: u32,
    pub(crate) score: f32,
    pub(crate) confidence: f32,
    pub(crate) shard: usize,
    pub(crate) row: usize,
}

/// Reads `selection.parquet` of a finished curate stage, with its record.
pub(crate) fn read(dir: Option<&Path>) -> Result<(Vec<Selected>, SelectRecord)> {
    let dir = SELECTION.finished(dir)?;
    let record = SelectRecord::read(&dir)?;
    let path = dir.join(KEPT);
    let wanted = [UID, LABEL, SCORE, CONFIDENCE, SHARD, ROW];
    let table = shards::read_whole(&path, &wanted)?;
    let uid = table.column(UID, |a: &StringArray, i| a.value(i).to_owned())?;
    let label = table.column(LABEL, |a: &Int64Array, i| a.value(i) as u32)?;
    let score = table.column(SCORE, |a: &Float32Array, i| a.value(i))?;
    let confidence = table.column(CONFIDENCE, |a: &Float32Array, i| a.value(i))?;
    let shard = table.column(SHARD, |a: &Int32Array, i| a.value(i) as usize)?;
    let row = table.column(ROW, |a: &Int32Array, i| a.value(i) as usize)?;
    let selected = uid.into_iter().enumerate().map(|(i, uid)| Selected {
        uid,
        label: label[i],
        score: score[i],
        confidence: confidence[i],
        shard: shard[i],
        row: row[i],
    });
    Ok((selected.collect(), record))
}
