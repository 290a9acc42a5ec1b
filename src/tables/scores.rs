//! The score table of a pool, and the few bytes per image that curation keeps of it, read shard by shard on all
//! threads.
//!
//! | column | |
//! |---|---|
//! | `uid`, `label`, `label_confidence` | as in the pool and the label table |
//! | `synthetic_score` | how far from real, low is close: by networks that were not trained on the image |
//! | `judge_score` | the same by the judges, null on their own fold |
//! | `label_agrees` | whether the classifier shares the label |
//! | `fold` | the image's fold of the pool |
//! | `pixel_hash`, `perceptual_hash`, `feature_hash` | hashes of 64 bits; the last only with `hash_features` |
//! | `nearest_train`, `train_distance`, `nearest_test`, `test_distance` | the nearest real images, by pixels |
//! | `train_copy`, `train_copy_distance`, `test_copy`, `test_copy_distance` | the same up to a shift by a pixel and mirroring |
//! | `memorization_ratio` | the distance to the nearest training image over the mean of those to the nearest |
//! | `p_synthetic_…` | the mean probability of "synthetic" at each radius |

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use arrow_array::{
    Array, BooleanArray, Float32Array, Int32Array, Int64Array, RecordBatch, StringArray, UInt64Array,
};
use arrow_schema::SchemaRef;
use rayon::prelude::*;
use serde_json::json;

use super::{
    division::SPLIT,
    labels::{CONFIDENCE, LABEL},
    pool::{Pool, PoolShard, UID},
    shards::{batch, nullable, read_record, read_table, required, shard_file},
};
use crate::{
    Error, Result,
    attack::Epsilon,
    curate::{Arm, Gate, PASSED, verdicts},
    data::table::{self, Table},
    proxy::{fold::uid_order, neighbours::Nearest},
    stage::{Input, read_done},
    stats::order_statistics,
};

/// The input of stages that read scores.
pub const SCORES: Input = Input::of("scores", &["score"]);

/// The folder of the table in its stage's folder.
pub(crate) const FOLDER: &str = "scores";

/// How far from real the image is, by which the arm arc ranks.
pub(crate) const SCORE: &str = "synthetic_score";
/// The same by the judges; null on their own fold.
const JUDGE: &str = "judge_score";
/// Whether the classifier shares the label.
pub(crate) const AGREES: &str = "label_agrees";
const FOLD: &str = "fold";
/// A hash of the image's pixels.
pub(crate) const PIXEL_HASH: &str = "pixel_hash";
/// A hash of what the image looks like.
pub(crate) const PERCEPTUAL_HASH: &str = "perceptual_hash";
/// A hash of the image's features; only with `hash_features`.
pub(crate) const FEATURE_HASH: &str = "feature_hash";
const NEAREST_TRAIN: &str = "nearest_train";
const TRAIN_DISTANCE: &str = "train_distance";
const TRAIN_COPY: &str = "train_copy";
/// The distance to the training image of which it is most nearly a copy.
pub(crate) const TRAIN_COPY_DISTANCE: &str = "train_copy_distance";
/// Carlini et al.'s ratio of distances.
pub(crate) const MEMORIZATION_RATIO: &str = "memorization_ratio";
const NEAREST_TEST: &str = "nearest_test";
const TEST_DISTANCE: &str = "test_distance";
const TEST_COPY: &str = "test_copy";
/// The distance to the test image of which it is most nearly a copy; null without a test split.
pub(crate) const TEST_COPY_DISTANCE: &str = "test_copy_distance";

/// The nearest training image, and the nearest test image if there are any.
pub(crate) type NearestReal = (Nearest, Option<Nearest>);

/// The columns of a shard, except `uid`.
pub(crate) struct Scores {
    pub(crate) labels: Vec<i64>,
    pub(crate) confidence: Vec<f32>,
    pub(crate) agrees: Vec<bool>,
    pub(crate) scores: Vec<f32>,
    pub(crate) judges: Vec<Option<f32>>,
    pub(crate) folds: Vec<usize>,
    pub(crate) pixel_hashes: Vec<u64>,
    pub(crate) perceptual_hashes: Vec<u64>,
    /// `None` without `hash_features`.
    pub(crate) feature_hashes: Option<Vec<u64>>,
    pub(crate) nearest: Vec<NearestReal>,
    /// By radius.
    pub(crate) probabilities: Vec<Vec<f32>>,
}

impl Scores {
    /// The rows of the table for the images of a pool's shard.
    pub(crate) fn batch(self, epsilons: &[Epsilon], rows: &PoolShard) -> Result<RecordBatch> {
        let train = || self.nearest.iter().map(|(train, _)| train);
        let test = || self.nearest.iter().map(|(_, test)| test.as_ref());
        let mut columns = vec![
            required(UID, StringArray::from_iter_values(&rows.uids)),
            required(LABEL, Int64Array::from(self.labels)),
            required(SCORE, Float32Array::from(self.scores)),
            nullable(JUDGE, Float32Array::from(self.judges)),
            required(CONFIDENCE, Float32Array::from(self.confidence)),
            required(AGREES, BooleanArray::from(self.agrees)),
            required(FOLD, Int32Array::from_iter_values(self.folds.iter().map(|&fold| fold as i32))),
            required(PIXEL_HASH, UInt64Array::from(self.pixel_hashes)),
            required(PERCEPTUAL_HASH, UInt64Array::from(self.perceptual_hashes)),
            required(NEAREST_TRAIN, Int32Array::from_iter_values(train().map(|n| n.index as i32))),
            required(TRAIN_DISTANCE, Float32Array::from_iter_values(train().map(|n| n.distance))),
            required(TRAIN_COPY, Int32Array::from_iter_values(train().map(|n| n.copy as i32))),
            required(TRAIN_COPY_DISTANCE, Float32Array::from_iter_values(train().map(|n| n.copy_distance))),
            required(MEMORIZATION_RATIO, Float32Array::from_iter_values(train().map(|n| n.ratio))),
            nullable(NEAREST_TEST, Int32Array::from_iter(test().map(|n| Some(n?.index as i32)))),
            nullable(TEST_DISTANCE, Float32Array::from_iter(test().map(|n| Some(n?.distance)))),
            nullable(TEST_COPY, Int32Array::from_iter(test().map(|n| Some(n?.copy as i32)))),
            nullable(TEST_COPY_DISTANCE, Float32Array::from_iter(test().map(|n| Some(n?.copy_distance)))),
        ];
        columns.extend(self.feature_hashes.map(|hashes| required(FEATURE_HASH, UInt64Array::from(hashes))));
        let radii: Vec<String> = epsilons.iter().map(radius_column).collect();
        let of_radii = radii.iter().zip(self.probabilities);
        columns.extend(of_radii.map(|(name, p)| required(name, Float32Array::from(p))));
        batch(columns)
    }
}

/// The column with the mean probability at one radius: `p_synthetic_0`, `p_synthetic_8_255`.
fn radius_column(epsilon: &Epsilon) -> String {
    format!("p_synthetic_{}", epsilon.to_string().replace(['/', '.'], "_"))
}

/// What a finished score stage says about its tables in `dir`; with `test`, also whether images were equal to one
/// in the test split.
pub(crate) fn summary(pool: &Pool, dir: &Path, test: bool) -> Result<serde_json::Value> {
    let (mut images, mut in_train, mut in_test) = (0u64, 0u64, 0u64);
    for shard in 0..pool.info.shards {
        let table = read_table(dir, shard, &[TRAIN_DISTANCE, TEST_DISTANCE])?;
        let distances = |name: &str| table.optional(name, |a: &Float32Array, i| a.value(i));
        let zeros = |distances: &[Option<f32>]| distances.iter().filter(|d| **d == Some(0.0)).count() as u64;
        let to_train = distances(TRAIN_DISTANCE)?;
        images += to_train.len() as u64;
        in_train += zeros(&to_train);
        in_test += zeros(&distances(TEST_DISTANCE)?);
    }
    let score_quantiles = quantiles(images, |give| -> Result<()> {
        for shard in 0..pool.info.shards {
            let table = read_table(dir, shard, &[SCORE])?;
            table.column(SCORE, |a: &Float32Array, i| a.value(i))?.into_iter().for_each(&mut *give);
        }
        Ok(())
    })?;
    Ok(json!({
        "images": images,
        "score_quantiles": score_quantiles,
        "equal_to_a_training_image": in_train,
        LOOKED_FOR_LEAKS: test,
        "equal_to_a_test_image": test.then_some(in_test),
    }))
}

/// The key in a finished score stage's summary that says whether there was a test split.
const LOOKED_FOR_LEAKS: &str = "looked_for_leaks";

/// The quantiles that are reported.
const QUANTILES: [(&str, f64); 7] =
    [("0", 0.0), ("0.05", 0.05), ("0.25", 0.25), ("0.5", 0.5), ("0.75", 0.75), ("0.95", 0.95), ("1", 1.0)];

/// The [`QUANTILES`] of the `n` values that `all` gives, see [`order_statistics`]; null if there are none.
pub(crate) fn quantiles<E>(
    n: u64,
    all: impl FnMut(&mut dyn FnMut(f32)) -> std::result::Result<(), E>,
) -> std::result::Result<serde_json::Value, E> {
    let rank = |(_, q): (&str, f64)| ((n - 1) as f64 * q).round() as u64;
    let ranks = if n == 0 { Vec::new() } else { QUANTILES.map(rank).to_vec() };
    let values = order_statistics(&ranks, all)?;
    let named = QUANTILES.iter().enumerate().map(|(i, (name, _))| ((*name).to_owned(), json!(values.get(i))));
    Ok(named.collect::<serde_json::Map<_, _>>().into())
}

/// Rows that are decoded together.
const BATCH: usize = 16_384;

/// The score tables of a pool.
pub(crate) struct ScoreTables {
    /// The stage's folder.
    pub(crate) folder: PathBuf,
    dir: PathBuf,
    /// The number of the first row of each shard, then the total number of rows.
    first: Vec<usize>,
    /// The classes' names.
    pub(crate) classes: Vec<String>,
    /// The fingerprint of the split that the pool was scored against.
    pub(crate) split: Option<String>,
    /// Whether the pool was compared with test images.
    pub(crate) looked_for_leaks: Option<bool>,
}

/// Columns of the score tables of a whole pool, in the pool's order: 15 bytes per image.
pub(crate) struct ScoreRows {
    /// The first gate that refuses the image; see [`verdicts`].
    pub(crate) verdicts: Vec<u8>,
    pub(crate) labels: Vec<u16>,
    pub(crate) scores: Vec<f32>,
    /// Its place in the arm's order.
    pub(crate) ranks: Vec<u32>,
    /// NaN on the judges' own fold.
    pub(crate) judges: Vec<f32>,
}

impl ScoreRows {
    /// The rows that no gate refused.
    pub(crate) fn passed(&self) -> Vec<u32> {
        (0..).zip(&self.verdicts).filter(|(_, verdict)| **verdict == PASSED).map(|(row, _)| row).collect()
    }
}

impl ScoreTables {
    /// Opens the tables of a finished score stage.
    pub(crate) fn open(folder: Option<&Path>) -> Result<Self> {
        let folder = SCORES.finished(folder)?;
        let summary = read_done(&folder)?.map(|done| done.summary).unwrap_or_default();
        let missing =
            |key: &str| Error::Data(format!("{}: done.json does not say the {key}", folder.display()));
        let classes: Vec<String> =
            serde_json::from_value(summary["classes"].clone()).map_err(|_| missing("classes"))?;
        let shards = summary["shards"].as_u64().ok_or_else(|| missing("number of shards"))? as usize;
        let dir = folder.join(FOLDER);
        let mut first = vec![0];
        for shard in 0..shards {
            let record = read_record(&dir, shard)?
                .ok_or_else(|| Error::Data(format!("{}: no record of shard {shard}", dir.display())))?;
            first.push(first[shard] + record.rows as usize);
        }
        let (images, named, place) = (first[shards], classes.len(), folder.display());
        if u32::try_from(images).is_err() || named > usize::from(u16::MAX) {
            bail!(Data, "{place}: {images} images of {named} classes, expected fewer than 2^32 and 2^16");
        }
        let split = SPLIT.fingerprint_in(&folder)?;
        let looked_for_leaks = summary[LOOKED_FOR_LEAKS].as_bool();
        Ok(Self { folder, dir, first, classes, split, looked_for_leaks })
    }

    /// Number of images in the pool.
    pub(crate) fn len(&self) -> usize {
        self.first[self.shards()]
    }

    /// Number of shards in the pool.
    pub(crate) fn shards(&self) -> usize {
        self.first.len() - 1
    }

    /// The rows of a shard.
    pub(crate) fn rows_of(&self, shard: usize) -> Range<usize> {
        self.first[shard]..self.first[shard + 1]
    }

    /// The number in the pool of a shard's row; a number that no row has if there is no such row.
    pub(crate) fn row(&self, shard: usize, row: usize) -> usize {
        self.first.get(shard).map_or(usize::MAX, |first| first + row)
    }

    /// The shard of a row, and its place in the shard.
    pub(crate) fn place(&self, row: usize) -> (usize, usize) {
        let shard = self.first.partition_point(|&first| first <= row) - 1;
        (shard, row - self.first[shard])
    }

    /// The columns of all tables.
    pub(crate) fn schema(&self) -> Result<SchemaRef> {
        Ok(Table::open(&shard_file(&self.dir, 0))?.schema().clone())
    }

    /// Some columns of one shard, batch by batch. Fails if they do not have as many rows as the shard's record
    /// says.
    pub(crate) fn batches(&self, shard: usize, columns: &[&str]) -> Result<Vec<RecordBatch>> {
        let path = shard_file(&self.dir, shard);
        let batches: Vec<RecordBatch> = Table::open(&path)?.read(columns, BATCH)?.collect::<Result<_>>()?;
        let found: usize = batches.iter().map(RecordBatch::num_rows).sum();
        let expected = self.rows_of(shard).len();
        if found != expected {
            bail!(Data, "{}: {found} rows, but its record says {expected}", path.display());
        }
        Ok(batches)
    }

    /// The verdicts on the rows, and their places in an arm's order.
    pub(crate) fn load(&self, gates: &[Gate], arm: Arm, seed: u64) -> Result<ScoreRows> {
        let mut wanted = vec![LABEL, CONFIDENCE, SCORE, JUDGE];
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
                let path = shard_file(&self.dir, shard);
                let mut at = 0;
                for batch in self.batches(shard, &wanted)? {
                    let here = at..at + batch.num_rows();
                    let in_file = |e: Error| Error::Data(format!("{}: {e}", path.display()));
                    verdict[here.clone()].copy_from_slice(&verdicts(gates, &batch).map_err(in_file)?);
                    let labels: &Int64Array = table::required(&path, &batch, LABEL)?;
                    let confidences: &Float32Array = table::required(&path, &batch, CONFIDENCE)?;
                    let scores: &Float32Array = table::required(&path, &batch, SCORE)?;
                    let judges: &Float32Array = table::column(&path, &batch, JUDGE)?;
                    score[here.clone()].copy_from_slice(scores.values());
                    for (i, row) in here.enumerate() {
                        let (found, classes) = (labels.value(i), self.classes.len());
                        let class = u16::try_from(found).ok().filter(|&class| usize::from(class) < classes);
                        let Some(class) = class else {
                            let (file, last) = (path.display(), classes as i64 - 1);
                            bail!(Data, "{file}: row {row}: label is {found}, expected 0 to {last}")
                        };
                        label[row] = class;
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

    /// A column of hashes.
    pub(crate) fn hashes(&self, column: &str) -> Result<Vec<u64>> {
        let mut hashes = vec![0; self.len()];
        self.by_shard(&mut hashes).into_par_iter().enumerate().try_for_each(
            |(shard, hashes)| -> Result<()> {
                let path = shard_file(&self.dir, shard);
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

    /// The order that breaks ties among some rows: that of [`uid_order`].
    pub(crate) fn uid_orders(&self, rows: &[u32]) -> Result<Vec<u128>> {
        let mut by_shard: Vec<Vec<usize>> = vec![Vec::new(); self.shards()];
        for (i, &row) in rows.iter().enumerate() {
            by_shard[self.place(row as usize).0].push(i);
        }
        let found = by_shard.into_par_iter().enumerate().filter(|(_, asked)| !asked.is_empty()).map(
            |(shard, asked)| -> Result<Vec<(usize, u128)>> {
                let table = read_table(&self.dir, shard, &[UID])?;
                let uids = table.column(UID, |a: &StringArray, i| a.value(i).to_owned())?;
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

    /// A column of all rows, divided by shard.
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
