//! What curation holds of a pool's score tables: some bytes an image, read shard by shard on all threads.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use arrow_array::{Array, Float32Array, Int64Array, RecordBatch, StringArray, UInt64Array};
use rayon::prelude::*;

use super::{
    Score, finished_input, input_of, label,
    score::{LOOKED_FOR_LEAKS, columns},
    shards,
};
use crate::{
    Error, Result,
    curate::{Arm, Gate, PASSED, verdicts},
    data::table::{self, Table},
    proxy::fold::uid_order,
};

/// Rows that are decoded together.
const BATCH: usize = 16_384;

/// The score tables of a pool.
pub(super) struct ScoreTables {
    /// The stage's folder.
    pub(super) folder: PathBuf,
    dir: PathBuf,
    /// The number of the first row of each shard, then that of all rows.
    first: Vec<usize>,
    /// The classes' names.
    pub(super) classes: Vec<String>,
    /// The fingerprint of the split that the pool was scored against.
    pub(super) split: Option<String>,
    /// Whether it was held against test images.
    pub(super) looked_for_leaks: Option<bool>,
}

/// Columns of the score tables of a whole pool, in the pool's order: 15 bytes an image.
pub(super) struct ScoreRows {
    /// The first gate that refuses it: see [`verdicts`].
    pub(super) verdicts: Vec<u8>,
    pub(super) labels: Vec<u16>,
    pub(super) scores: Vec<f32>,
    /// Its place in the arm's order.
    pub(super) ranks: Vec<u32>,
    /// Not a number on the judges' own fold.
    pub(super) judges: Vec<f32>,
}

impl ScoreRows {
    /// The rows that no gate refused.
    pub(super) fn passed(&self) -> Vec<u32> {
        (0..).zip(&self.verdicts).filter(|(_, verdict)| **verdict == PASSED).map(|(row, _)| row).collect()
    }
}

impl ScoreTables {
    /// Opens the tables of the finished score that `key` names.
    pub(super) fn open(key: &str, folder: Option<&Path>) -> Result<Self> {
        let folder = finished_input::<Score>(key, folder)?;
        let summary = super::read_done(&folder)?.map(|done| done.summary).unwrap_or_default();
        let missing =
            |key: &str| Error::Data(format!("{}: done.json does not say the {key}", folder.display()));
        let classes: Vec<String> =
            serde_json::from_value(summary["classes"].clone()).map_err(|_| missing("classes"))?;
        let shards = summary["shards"].as_u64().ok_or_else(|| missing("number of shards"))? as usize;
        let dir = folder.join("scores");
        let mut first = vec![0];
        for shard in 0..shards {
            let record = shards::read_record(&dir, shard)?
                .ok_or_else(|| Error::Data(format!("{}: no record of shard {shard}", dir.display())))?;
            first.push(first[shard] + record.rows as usize);
        }
        if u32::try_from(first[shards]).is_err() || classes.len() > usize::from(u16::MAX) {
            bail!(
                Data,
                "{}: {} images of {} classes, expected fewer than 2^32 and 2^16",
                folder.display(),
                first[shards],
                classes.len()
            );
        }
        let split = input_of(&folder, "split")?;
        let looked_for_leaks = summary[LOOKED_FOR_LEAKS].as_bool();
        Ok(Self { folder, dir, first, classes, split, looked_for_leaks })
    }

    /// Images of the pool.
    pub(super) fn len(&self) -> usize {
        self.first[self.shards()]
    }

    /// Shards of the pool.
    pub(super) fn shards(&self) -> usize {
        self.first.len() - 1
    }

    /// The rows of a shard.
    pub(super) fn rows_of(&self, shard: usize) -> Range<usize> {
        self.first[shard]..self.first[shard + 1]
    }

    /// The number of a row of a shard; that of none if there is no such row.
    pub(super) fn row(&self, shard: usize, row: usize) -> usize {
        self.first.get(shard).map_or(usize::MAX, |first| first + row)
    }

    /// The shard of a row, and its place there.
    pub(super) fn place(&self, row: usize) -> (usize, usize) {
        let shard = self.first.partition_point(|&first| first <= row) - 1;
        (shard, row - self.first[shard])
    }

    /// The columns of all tables.
    pub(super) fn schema(&self) -> Result<arrow_schema::SchemaRef> {
        Ok(Table::open(&shards::shard_file(&self.dir, 0))?.schema().clone())
    }

    /// Some columns of one shard, batch by batch. Fails if they have not as many rows as the shard's record says.
    pub(super) fn batches(&self, shard: usize, columns: &[&str]) -> Result<Vec<RecordBatch>> {
        let path = shards::shard_file(&self.dir, shard);
        let batches: Vec<RecordBatch> = Table::open(&path)?.read(columns, BATCH)?.collect::<Result<_>>()?;
        let found: usize = batches.iter().map(RecordBatch::num_rows).sum();
        if found != self.rows_of(shard).len() {
            bail!(
                Data,
                "{}: {found} rows, but its record says {}",
                path.display(),
                self.rows_of(shard).len()
            );
        }
        Ok(batches)
    }

    /// The rows' verdicts, and their places in the order of an arm.
    pub(super) fn load(&self, gates: &[Gate], arm: Arm, seed: u64) -> Result<ScoreRows> {
        use label::columns::{CONFIDENCE, LABEL};
        let mut wanted = vec![LABEL, CONFIDENCE, columns::SCORE, columns::JUDGE];
        for gate in gates {
            if !wanted.contains(&&*gate.condition.column) {
                wanted.push(&gate.condition.column);
            }
        }
        let n = self.len();
        let mut rows = ScoreRows {
            verdicts: vec![0; n],
            labels: vec![0; n],
            scores: vec![0.0; n],
            ranks: vec![0; n],
            judges: vec![0.0; n],
        };
        let all = self.by_shard(&mut rows.verdicts).into_par_iter();
        all.zip(self.by_shard(&mut rows.labels))
            .zip(self.by_shard(&mut rows.scores))
            .zip(self.by_shard(&mut rows.ranks))
            .zip(self.by_shard(&mut rows.judges))
            .enumerate()
            .try_for_each(|(shard, ((((verdict, label), score), rank), judge))| -> Result<()> {
                let path = shards::shard_file(&self.dir, shard);
                let mut at = 0;
                for batch in self.batches(shard, &wanted)? {
                    let here = at..at + batch.num_rows();
                    let in_file = |e: Error| Error::Data(format!("{}: {e}", path.display()));
                    verdict[here.clone()].copy_from_slice(&verdicts(gates, &batch).map_err(in_file)?);
                    let labels: &Int64Array = table::required(&path, &batch, LABEL)?;
                    let confidences: &Float32Array = table::required(&path, &batch, CONFIDENCE)?;
                    let scores: &Float32Array = table::required(&path, &batch, columns::SCORE)?;
                    let judges: &Float32Array = table::column(&path, &batch, columns::JUDGE)?;
                    score[here.clone()].copy_from_slice(scores.values());
                    for (i, row) in here.enumerate() {
                        let class = u16::try_from(labels.value(i)).ok();
                        label[row] =
                            class.filter(|&c| usize::from(c) < self.classes.len()).ok_or_else(|| {
                                Error::Data(format!(
                                    "{}: row {row}: label is {}, expected 0 to {}",
                                    path.display(),
                                    labels.value(i),
                                    self.classes.len() as i64 - 1
                                ))
                            })?;
                        judge[row] = if judges.is_valid(i) { judges.value(i) } else { f32::NAN };
                        let place = (self.first[shard] + row) as u64;
                        rank[row] = arm.rank(seed, place, scores.value(i), confidences.value(i));
                    }
                    at += batch.num_rows();
                }
                Ok(())
            })?;
        Ok(rows)
    }

    /// A column of hashes, of all rows.
    pub(super) fn hashes(&self, column: &str) -> Result<Vec<u64>> {
        let mut hashes = vec![0; self.len()];
        self.by_shard(&mut hashes).into_par_iter().enumerate().try_for_each(
            |(shard, hashes)| -> Result<()> {
                let path = shards::shard_file(&self.dir, shard);
                let mut rest = hashes;
                for batch in self.batches(shard, &[column])? {
                    let (here, others) = rest.split_at_mut(batch.num_rows());
                    here.copy_from_slice(table::required::<UInt64Array>(&path, &batch, column)?.values());
                    rest = others;
                }
                Ok(())
            },
        )?;
        Ok(hashes)
    }

    /// The order of equals for some rows: that of [`uid_order`].
    pub(super) fn uid_orders(&self, rows: &[u32]) -> Result<Vec<u128>> {
        let mut by_shard: Vec<Vec<usize>> = vec![Vec::new(); self.shards()];
        for (i, &row) in rows.iter().enumerate() {
            by_shard[self.place(row as usize).0].push(i);
        }
        let found = by_shard.into_par_iter().enumerate().filter(|(_, asked)| !asked.is_empty()).map(
            |(shard, asked)| -> Result<Vec<(usize, u128)>> {
                let table = shards::read_table(&self.dir, shard, &[label::columns::UID])?;
                let uids = table.column(label::columns::UID, |a: &StringArray, i| a.value(i).to_owned())?;
                let order = |i: usize| uids.get(rows[i] as usize - self.first[shard]).map(|u| uid_order(u));
                asked
                    .into_iter()
                    .map(|i| order(i).map(|order| (i, order)))
                    .collect::<Option<_>>()
                    .ok_or_else(|| Error::Data(format!("shard {shard} has too few rows")))
            },
        );
        let mut orders = vec![0; rows.len()];
        for (i, order) in found.collect::<Result<Vec<_>>>()?.into_iter().flatten() {
            orders[i] = order;
        }
        Ok(orders)
    }

    /// A column of all rows, cut into shards.
    fn by_shard<'a, T>(&self, mut all: &'a mut [T]) -> Vec<&'a mut [T]> {
        let mut parts = Vec::new();
        for shard in 0..self.shards() {
            let (part, rest) = all.split_at_mut(self.rows_of(shard).len());
            parts.push(part);
            all = rest;
        }
        parts
    }
}
