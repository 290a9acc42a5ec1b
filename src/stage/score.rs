//! Score: how far from real each pool image is, by discriminators that were not trained on it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow_array::{ArrayRef, BooleanArray, Float32Array, Int32Array, Int64Array, StringArray, UInt64Array};
use arrow_schema::{DataType, SchemaRef};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    Job, Label, Outcome, Split, Stage,
    coverage::Sampler,
    expect, finished_input,
    fit_discriminator::{Discriminators, margins},
    label,
    shards::{self, Pool, expect_same_rows, for_each_shard},
    split::{Real, test_fingerprint},
};
use crate::{
    Error, Result,
    attack::Epsilon,
    data::{self, Dataset, Shape},
    proxy::{
        neighbours::{Nearest, Neighbours},
        perceptual_hash::PerceptualHash,
        score::trapezoid_weights,
    },
    stats::order_statistics,
};

/// Images whose scores are kept together: what a kill can lose.
const CHUNK: usize = 2048;

/// Scores every pool image.
///
/// `synthetic_score`, low is close to real: the mean over ε (trapezoid weights) of the calibrated probability of
/// "synthetic" on the clean image, averaged over the ranking sets that were not trained on the image's fold.
/// `judge_score` is the same by the judges, null on their own fold. Beside them: the label's confidence and whether
/// the classifier agrees; hashes of the pixels and of what the image looks like; and the nearest training and test
/// images, by number in their split, with distances: by pixels, and as a copy (up to a shift by a pixel and mirroring, of
/// `train_copy` and `test_copy`).
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Score {
    /// The folder of a finished split: the real data.
    #[arg(long)]
    pub split: Option<PathBuf>,
    /// The folder of a finished generate or import.
    #[arg(long)]
    pub pool: Option<PathBuf>,
    /// The folder of a finished label.
    #[arg(long)]
    pub labels: Option<PathBuf>,
    /// The folder of a finished fit-discriminator.
    #[arg(long)]
    pub discriminators: Option<PathBuf>,
    /// A classifier's folder, or a network's of the Hub, see quality: features of a sample of the images are kept, for the
    /// precision and recall of what is selected.
    #[arg(long)]
    pub classifier: Option<PathBuf>,
    /// How many images of the pool, about, and real ones, at most, are in the sample.
    #[arg(long, default_value_t = 5000)]
    pub sample: usize,
    /// Also keep a hash of each image's features, by which curate finds near-duplicates. All images then go through the
    /// classifier, which it needs.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub hash_features: bool,
    /// Nearest training images whose mean distance memorization_ratio divides that of the nearest by (Carlini et al. 2023: 50).
    #[arg(long, default_value_t = 50)]
    pub neighbours: usize,
}

/// The column names of a score table, beside those of [`label::columns`].
pub(super) mod columns {
    pub(in crate::stage) const FOLD: &str = "fold";
    pub(in crate::stage) const SCORE: &str = "synthetic_score";
    pub(in crate::stage) const JUDGE: &str = "judge_score";
    pub(in crate::stage) const AGREES: &str = "label_agrees";
    pub(in crate::stage) const HASH: &str = "pixel_hash";
    pub(in crate::stage) const LOOKS: &str = "perceptual_hash";
    pub(in crate::stage) const FEATURES: &str = "feature_hash";
    pub(in crate::stage) const NEAREST_TRAIN: &str = "nearest_train";
    pub(in crate::stage) const TRAIN_DISTANCE: &str = "train_distance";
    pub(in crate::stage) const TRAIN_COPY: &str = "train_copy";
    pub(in crate::stage) const TRAIN_COPY_DISTANCE: &str = "train_copy_distance";
    pub(in crate::stage) const RATIO: &str = "memorization_ratio";
    pub(in crate::stage) const NEAREST_TEST: &str = "nearest_test";
    pub(in crate::stage) const TEST_DISTANCE: &str = "test_distance";
    pub(in crate::stage) const TEST_COPY: &str = "test_copy";
    pub(in crate::stage) const TEST_COPY_DISTANCE: &str = "test_copy_distance";
}

/// BLAKE3 of an image's pixels, its first 8 bytes.
fn pixel_hash(pixels: &[u8]) -> u64 {
    blake3::hash(pixels).as_bytes()[..8].iter().fold(0, |hash, &byte| hash << 8 | u64::from(byte))
}

/// The real images that the pool's are held against.
struct RealImages {
    train: Neighbours,
    /// If the source has a test split.
    test: Option<Neighbours>,
    looks: PerceptualHash,
    neighbours: usize,
}

/// What is nearest to an image.
type Found = (Nearest, Option<Nearest>);

impl RealImages {
    fn load(real: Real, neighbours: usize, device: &candle_core::Device) -> Result<Self> {
        let source = &real.division.source;
        if test_fingerprint(source)? != real.division.test_fingerprint {
            bail!(Data, "the test split of {source} has changed since it was split; split it again");
        }
        let test = if source.has(data::Split::Test) {
            let test = source.load(data::Split::Test, None, real.division.max_bad)?;
            if test.shape != real.train.shape {
                bail!(
                    Data,
                    "the test split of {source} has {} images, expected {} as in its train split",
                    test.shape,
                    real.train.shape
                );
            }
            Some(Neighbours::new(test, device)?)
        } else {
            None
        };
        let looks = PerceptualHash::new(&real.train);
        Ok(Self { train: Neighbours::new(real.train, device)?, test, looks, neighbours })
    }

    fn find(&self, pixels: &[u8]) -> Result<Vec<Found>> {
        let train = self.train.find(pixels, self.neighbours)?;
        let test = self.test.as_ref().map(|test| test.find(pixels, 1)).transpose()?;
        Ok(train.into_iter().enumerate().map(|(i, train)| (train, test.as_ref().map(|t| t[i]))).collect())
    }
}

/// The column with the mean probability at one radius: `p_synthetic_0`, `p_synthetic_8_255`.
fn radius_column(epsilon: &Epsilon) -> String {
    format!("p_synthetic_{}", epsilon.to_string().replace(['/', '.'], "_"))
}

struct Scorer<'a> {
    job: &'a Job,
    discriminators: &'a Discriminators,
    weights: Vec<f64>,
    shape: Shape,
}

impl Scorer<'_> {
    /// For each image: per set its mean probability, and per radius the mean over the sets that may speak.
    ///
    /// The layout of one image: `sets` scores, then `radii` probabilities.
    fn chunk(&self, uids: &[String], pixels: &[u8]) -> Result<Vec<f32>> {
        let (sets, radii) = (self.discriminators.nets.len(), self.weights.len());
        let mut images = Dataset::empty(self.shape, vec!["synthetic".into()]);
        images.pixels = pixels.to_vec();
        images.labels = vec![0; uids.len()];
        let mut probabilities = vec![vec![Vec::new(); radii]; sets];
        for (set, nets) in self.discriminators.nets.iter().enumerate() {
            for (radius, net) in nets.iter().enumerate() {
                let calibration = self.discriminators.record.sets[set][radius].calibration;
                let margins = margins(net, &images, &self.job.device)?;
                probabilities[set][radius] =
                    margins.iter().map(|&m| calibration.probability(f64::from(m))).collect::<Vec<f64>>();
            }
        }
        let mut out = Vec::with_capacity(uids.len() * (sets + radii));
        for (i, uid) in uids.iter().enumerate() {
            let fold = self.discriminators.fold_of(uid);
            for set in &probabilities {
                out.push(set.iter().zip(&self.weights).map(|(p, w)| w * p[i]).sum::<f64>() as f32);
            }
            let speak: Vec<usize> =
                (0..self.discriminators.record.folds).filter(|&set| set != fold).collect();
            out.extend((0..radii).map(|radius| {
                let sum: f64 = speak.iter().map(|&set| probabilities[set][radius][i]).sum();
                (sum / speak.len() as f64) as f32
            }));
        }
        Ok(out)
    }
}

impl Stage for Score {
    const NAME: &'static str = "score";
    const INPUTS: &'static [&'static str] = &["split", "pool", "labels", "discriminators", "classifier"];
    const REVISION: u32 = 1;

    fn validate(&self) -> Result<()> {
        if self.hash_features && self.classifier.is_none() {
            bail!(Usage, "hash_features is true, which needs a classifier; expected one");
        }
        expect("sample", self.sample, 1, 100_000)?;
        expect("neighbours", self.neighbours, 1, 10_000)
    }

    fn amount(&self) -> String {
        "one forward pass of every discriminator per pool image, and its nearest real images".into()
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let split = finished_input::<Split>("split", self.split.as_deref())?;
        let real = Real::load(&split)?;
        let pool = Pool::open("pool", self.pool.as_deref())?;
        let labels = finished_input::<Label>("labels", self.labels.as_deref())?.join("labels");
        let discriminators =
            Discriminators::load(self.discriminators.as_deref(), &split, &pool, &job.device)?;
        discriminators.expect_judges()?;
        pool.expect_shape(real.train.shape)?;
        let classes = real.train.class_names.clone();
        let unseen = self.classifier.as_ref().map(|_| real.proxy());
        let real = RealImages::load(real, self.neighbours, &job.device)?;
        let epsilons = &discriminators.record.epsilons;
        let weights = trapezoid_weights(&epsilons.iter().map(|e| e.get()).collect::<Vec<_>>());
        let scorer = Scorer { job, discriminators: &discriminators, weights, shape: pool.info.shape };
        let schema = schema(epsilons, self.hash_features);
        let of_pool = (pool.info.count, pool.info.shape);
        let sampler = |dir: &PathBuf| Sampler::new(dir, of_pool, self.sample, &job.device);
        let sampler = self.classifier.as_ref().map(sampler).transpose()?;
        let (out, _lock) = job.open("run")?;
        if let (Some(sampler), Some(unseen)) = (&sampler, unseen) {
            sampler.real(out, &unseen, self.sample, &job.device)?;
        }
        let hash = sampler.as_ref().filter(|_| self.hash_features).map(|s| s.hash(out)).transpose()?;
        let dir = out.join("scores");
        for_each_shard(job, &dir, &pool, Self::NAME, &schema, |shard, rows, parts, bar| {
            let label_columns = [
                label::columns::UID,
                label::columns::LABEL,
                label::columns::PSEUDO,
                label::columns::CONFIDENCE,
            ];
            let table = shards::read_table(&labels, shard, &label_columns)?;
            let uids = table.column(label::columns::UID, |a: &StringArray, i| a.value(i).to_owned())?;
            expect_same_rows("label table", shard, &uids, rows)?;
            let class = table.column(label::columns::LABEL, |a: &Int64Array, i| a.value(i))?;
            let pseudo = table.column(label::columns::PSEUDO, |a: &Int64Array, i| a.value(i))?;
            let confidence = table.column(label::columns::CONFIDENCE, |a: &Float32Array, i| a.value(i))?;

            let size = pool.info.shape.size();
            let pixels = rows.pixels(0..rows.len(), pool.info.shape)?;
            if let Some(sampler) = &sampler {
                sampler.shard(out, shard, rows, &pixels, pool.info.shape, &job.device)?;
            }
            let (mut values, mut found, mut feature_hashes) = (Vec::new(), Vec::new(), Vec::new());
            for from in (0..rows.len()).step_by(CHUNK) {
                crate::progress::check_stop()?;
                let to = (from + CHUNK).min(rows.len());
                let key = format!("{from:08}");
                let pixels = &pixels[from * size..to * size];
                let keep = rows.len() > CHUNK;
                values.extend(label::floats(&parts.get_or_make(&key, keep, || {
                    Ok(label::bytes_of(&scorer.chunk(&rows.uids[from..to], pixels)?))
                })?));
                let key = format!("{from:08}-nearest");
                let unreadable = |e: serde_json::Error| Error::Alarm(format!("part {key}: {e}"));
                let nearest = parts.get_or_make(&key, keep, || {
                    serde_json::to_vec(&real.find(pixels)?).map_err(unreadable)
                })?;
                found.extend(serde_json::from_slice::<Vec<Found>>(&nearest).map_err(unreadable)?);
                if let (Some(sampler), Some(hash)) = (&sampler, &hash) {
                    let part = parts.get_or_make(&format!("{from:08}-features"), keep, || {
                        let hashes = sampler.hashes(hash, pixels, pool.info.shape, &job.device)?;
                        Ok(hashes.iter().flat_map(|hash| hash.to_le_bytes()).collect())
                    })?;
                    feature_hashes.extend(part.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes)));
                }
                bar.add((to - from) as u64);
            }
            let (hash, looks): (Vec<u64>, Vec<u64>) =
                pixels.par_chunks_exact(size).map(|image| (pixel_hash(image), real.looks.of(image))).unzip();
            let train = |get: fn(&Nearest) -> f32| -> ArrayRef {
                Arc::new(Float32Array::from_iter_values(found.iter().map(|(train, _)| get(train))))
            };
            let train_image = |get: fn(&Nearest) -> u32| -> ArrayRef {
                Arc::new(Int32Array::from_iter_values(found.iter().map(|(train, _)| get(train) as i32)))
            };
            let test = |get: fn(&Nearest) -> f32| -> ArrayRef {
                Arc::new(Float32Array::from_iter(found.iter().map(|(_, test)| test.as_ref().map(get))))
            };
            let test_image = |get: fn(&Nearest) -> u32| -> ArrayRef {
                let images = found.iter().map(|(_, test)| test.as_ref().map(|test| get(test) as i32));
                Arc::new(Int32Array::from_iter(images))
            };
            let (folds, radii) = (discriminators.record.folds, epsilons.len());
            let fold: Vec<usize> = rows.uids.iter().map(|uid| discriminators.fold_of(uid)).collect();
            let row = |i: usize| &values[i * (folds + 1 + radii)..(i + 1) * (folds + 1 + radii)];
            let score = (0..rows.len()).map(|i| {
                let speak: Vec<f32> =
                    (0..folds).filter(|&set| set != fold[i]).map(|set| row(i)[set]).collect();
                speak.iter().sum::<f32>() / speak.len() as f32
            });
            let judge = (0..rows.len()).map(|i| (fold[i] != folds).then(|| row(i)[folds]));
            let mut columns: Vec<ArrayRef> = vec![
                Arc::new(StringArray::from_iter_values(&rows.uids)),
                Arc::new(Int64Array::from(class.clone())),
                Arc::new(Float32Array::from_iter_values(score)),
                Arc::new(Float32Array::from_iter(judge)),
                Arc::new(Float32Array::from(confidence)),
                Arc::new(BooleanArray::from_iter(class.iter().zip(&pseudo).map(|(a, b)| Some(a == b)))),
                Arc::new(Int32Array::from_iter_values(fold.iter().map(|&f| f as i32))),
                Arc::new(UInt64Array::from(hash)),
                Arc::new(UInt64Array::from(looks)),
                train_image(|n| n.index),
                train(|n| n.distance),
                train_image(|n| n.copy),
                train(|n| n.copy_distance),
                train(|n| n.ratio),
                test_image(|n| n.index),
                test(|n| n.distance),
                test_image(|n| n.copy),
                test(|n| n.copy_distance),
            ];
            if self.hash_features {
                columns.push(Arc::new(UInt64Array::from(feature_hashes)));
            }
            for radius in 0..radii {
                let p = (0..rows.len()).map(|i| row(i)[folds + 1 + radius]);
                columns.push(Arc::new(Float32Array::from_iter_values(p)));
            }
            shards::batch(&schema, columns)
        })?;
        let mut summary = summary(&pool, &dir, real.test.is_some())?;
        summary["classes"] = json!(classes);
        summary["shards"] = pool.info.shards.into();
        Ok(Outcome::Done(summary))
    }
}

fn schema(epsilons: &[Epsilon], hash_features: bool) -> SchemaRef {
    let radii: Vec<String> = epsilons.iter().map(radius_column).collect();
    let mut fields = vec![
        (label::columns::UID, DataType::Utf8, false),
        (label::columns::LABEL, DataType::Int64, false),
        (columns::SCORE, DataType::Float32, false),
        (columns::JUDGE, DataType::Float32, true),
        (label::columns::CONFIDENCE, DataType::Float32, false),
        (columns::AGREES, DataType::Boolean, false),
        (columns::FOLD, DataType::Int32, false),
        (columns::HASH, DataType::UInt64, false),
        (columns::LOOKS, DataType::UInt64, false),
        (columns::NEAREST_TRAIN, DataType::Int32, false),
        (columns::TRAIN_DISTANCE, DataType::Float32, false),
        (columns::TRAIN_COPY, DataType::Int32, false),
        (columns::TRAIN_COPY_DISTANCE, DataType::Float32, false),
        (columns::RATIO, DataType::Float32, false),
        (columns::NEAREST_TEST, DataType::Int32, true),
        (columns::TEST_DISTANCE, DataType::Float32, true),
        (columns::TEST_COPY, DataType::Int32, true),
        (columns::TEST_COPY_DISTANCE, DataType::Float32, true),
    ];
    if hash_features {
        fields.push((columns::FEATURES, DataType::UInt64, false));
    }
    fields.extend(radii.iter().map(|name| (name.as_str(), DataType::Float32, false)));
    shards::schema(&fields)
}

fn summary(pool: &Pool, dir: &Path, test: bool) -> Result<serde_json::Value> {
    let (mut images, mut in_train, mut in_test) = (0u64, 0u64, 0u64);
    for shard in 0..pool.info.shards {
        let table = shards::read_table(dir, shard, &[columns::TRAIN_DISTANCE, columns::TEST_DISTANCE])?;
        let distances = |name: &str| table.optional(name, |a: &Float32Array, i| a.value(i));
        let zeros = |distances: &[Option<f32>]| distances.iter().filter(|d| **d == Some(0.0)).count() as u64;
        let to_train = distances(columns::TRAIN_DISTANCE)?;
        images += to_train.len() as u64;
        in_train += zeros(&to_train);
        in_test += zeros(&distances(columns::TEST_DISTANCE)?);
    }
    let score_quantiles = quantiles(images, |give| -> Result<()> {
        for shard in 0..pool.info.shards {
            let table = shards::read_table(dir, shard, &[columns::SCORE])?;
            table.column(columns::SCORE, |a: &Float32Array, i| a.value(i))?.into_iter().for_each(&mut *give);
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

/// The key of a finished score's summary that says whether there was a test split.
pub(super) const LOOKED_FOR_LEAKS: &str = "looked_for_leaks";

/// The quantiles that are reported.
const QUANTILES: [(&str, f64); 7] =
    [("0", 0.0), ("0.05", 0.05), ("0.25", 0.25), ("0.5", 0.5), ("0.75", 0.75), ("0.95", 0.95), ("1", 1.0)];

/// The [`QUANTILES`] of the `n` values that `all` gives, see [`order_statistics`]; null if there are none.
pub(super) fn quantiles<E>(
    n: u64,
    all: impl FnMut(&mut dyn FnMut(f32)) -> std::result::Result<(), E>,
) -> std::result::Result<serde_json::Value, E> {
    let rank = |(_, q): (&str, f64)| ((n - 1) as f64 * q).round() as u64;
    let ranks = if n == 0 { Vec::new() } else { QUANTILES.map(rank).to_vec() };
    let values = order_statistics(&ranks, all)?;
    let named = QUANTILES.iter().enumerate().map(|(i, (name, _))| ((*name).to_owned(), json!(values.get(i))));
    Ok(named.collect::<serde_json::Map<_, _>>().into())
}
