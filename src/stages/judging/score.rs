//! Score: how far from real each pool image is, by discriminators that were not trained on it.

use std::path::PathBuf;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    Error, Result,
    data::{self, Dataset, Shape},
    error::expect_within as expect,
    fs::{bytes_of, floats_of},
    proxy::{neighbours::Neighbours, perceptual_hash::PerceptualHash, score::trapezoid_weights},
    stage::{Input, Job, Outcome, Stage},
    tables::{
        discriminators::{DISCRIMINATORS, Discriminators, margins},
        division::{Real, SPLIT, test_fingerprint},
        features::Sampler,
        labels::{self, LABELS, Labels},
        pool::{POOL, Pool, for_each_shard},
        records::CLASSIFIER,
        scores::{self, NearestReal, Scores},
    },
};

/// Images whose scores are kept together: the most that an interruption can lose.
const CHUNK: usize = 2048;

/// Scores every pool image.
///
/// `synthetic_score`, low is close to real: the mean over ε (trapezoid weights) of the calibrated probability of
/// "synthetic" on the clean image, averaged over the ranking sets that were not trained on the image's fold.
/// `judge_score` is the same quantity from the judges, null on their own fold. Further columns hold the label's
/// confidence and whether the classifier agrees; hashes of the pixels and of what the image looks like; and the
/// nearest training and test images, by number in their split, with distances: by pixels, and as a copy (up to
/// mirroring and a shift by a pixel, for `train_copy` and `test_copy`).
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
pub struct Score {
    /// The folder of a finished split stage: the real data.
    #[arg(long)]
    pub split: Option<PathBuf>,
    /// The folder of a finished generate or import stage.
    #[arg(long)]
    pub pool: Option<PathBuf>,
    /// The folder of a finished label stage.
    #[arg(long)]
    pub labels: Option<PathBuf>,
    /// The folder of a finished fit-discriminator stage.
    #[arg(long)]
    pub discriminators: Option<PathBuf>,
    /// The folder of a classifier, or of a network from the Hub (see quality). The features of a sample of the
    /// images are kept, from which curate measures the precision and recall of its selection.
    #[arg(long)]
    pub classifier: Option<PathBuf>,
    /// The size of that sample: about this many pool images, and at most this many real ones.
    #[arg(long, default_value_t = 5000)]
    pub sample: usize,
    /// Also keep a hash of each image's features, by which curate can find near-duplicates. Needs the classifier,
    /// which then sees all images.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub hash_features: bool,
    /// How many nearest training images memorization_ratio averages over: it is the distance to the nearest one,
    /// divided by the mean distance to these (Carlini et al. 2023: 50).
    #[arg(long, default_value_t = 50)]
    pub neighbours: usize,
}

/// BLAKE3 of an image's pixels, its first 8 bytes.
fn pixel_hash(pixels: &[u8]) -> u64 {
    blake3::hash(pixels).as_bytes()[..8].iter().fold(0, |hash, &byte| hash << 8 | u64::from(byte))
}

/// The real images that the pool's images are compared with.
struct RealImages {
    train: Neighbours,
    /// Present if the source has a test split.
    test: Option<Neighbours>,
    looks: PerceptualHash,
    neighbours: usize,
}

impl RealImages {
    fn load(real: Real, neighbours: usize, device: &candle_core::Device) -> Result<Self> {
        let source = &real.division.source;
        if test_fingerprint(source)? != real.division.test_fingerprint {
            bail!(Data, "the test split of {source} has changed since it was split; split it again");
        }
        let test = if source.has(data::OfficialSplit::Test) {
            let test = source.load(data::OfficialSplit::Test, None, real.division.max_bad)?;
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

    fn find(&self, pixels: &[u8]) -> Result<Vec<NearestReal>> {
        let train = self.train.find(pixels, self.neighbours)?;
        let test = self.test.as_ref().map(|test| test.find(pixels, 1)).transpose()?;
        Ok(train.into_iter().enumerate().map(|(i, train)| (train, test.as_ref().map(|t| t[i]))).collect())
    }
}

struct Scorer<'a> {
    job: &'a Job,
    discriminators: &'a Discriminators,
    weights: Vec<f64>,
    shape: Shape,
}

impl Scorer<'_> {
    /// For each image: its mean probability per set, and per radius the mean over the sets that may score it.
    ///
    /// The layout of one image: `sets` scores, then `radii` probabilities.
    fn chunk(&self, uids: &[String], pixels: &[u8]) -> Result<Vec<f32>> {
        let (sets, radii) = (self.discriminators.nets.len(), self.weights.len());
        let mut images = Dataset::empty(self.shape, vec!["synthetic".into()]);
        images.pixels = pixels.to_vec();
        images.labels = vec![0; uids.len()];
        let mut probabilities: Vec<Vec<Vec<f64>>> = vec![Vec::new(); sets];
        for (set, nets) in self.discriminators.nets.iter().enumerate() {
            for (net, record) in nets.iter().zip(&self.discriminators.record.sets[set]) {
                let margins = margins(net, &images, &self.job.device)?;
                let probability = |&margin: &f32| record.calibration.probability(f64::from(margin));
                probabilities[set].push(margins.iter().map(probability).collect());
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
    const ABOUT: &'static str = "Score how far from real each pool image is";
    const INPUTS: &'static [Input] = &[SPLIT, POOL, LABELS, DISCRIMINATORS, CLASSIFIER];
    const REVISION: u32 = 1;

    fn unused(&self) -> Vec<&'static str> {
        if self.classifier.is_none() { vec!["sample"] } else { Vec::new() }
    }

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
        let split = SPLIT.finished(self.split.as_deref())?;
        let real = Real::load(&split)?;
        let pool = Pool::open(self.pool.as_deref())?;
        let labelled = LABELS.finished(self.labels.as_deref())?.join(labels::FOLDER);
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
        let of_pool = (pool.info.count, pool.info.shape);
        let sampler = |dir: &PathBuf| Sampler::new(dir, of_pool, self.sample, &job.device);
        let sampler = self.classifier.as_ref().map(sampler).transpose()?;
        let out = job.open()?;
        if let (Some(sampler), Some(unseen)) = (&sampler, unseen) {
            sampler.real(out, &unseen, self.sample)?;
        }
        let hash = sampler.as_ref().filter(|_| self.hash_features).map(|s| s.hash(out)).transpose()?;
        let dir = out.join(scores::FOLDER);
        for_each_shard(job, &dir, &pool, Self::NAME, |shard, rows, parts, bar| {
            let Labels { labels, pseudo, confidence, .. } = Labels::read_beside(&labelled, shard, rows)?;
            let size = pool.info.shape.size();
            let pixels = rows.pixels(0..rows.len(), pool.info.shape)?;
            if let Some(sampler) = &sampler {
                sampler.shard(out, shard, rows, &pixels)?;
            }
            let (mut values, mut found, mut feature_hashes) = (Vec::new(), Vec::new(), Vec::new());
            for from in (0..rows.len()).step_by(CHUNK) {
                crate::progress::check_stop()?;
                let to = (from + CHUNK).min(rows.len());
                let key = format!("{from:08}");
                let pixels = &pixels[from * size..to * size];
                let keep = rows.len() > CHUNK;
                values.extend(floats_of(&parts.get_or_make(&key, keep, || {
                    Ok(bytes_of(&scorer.chunk(&rows.uids[from..to], pixels)?))
                })?));
                let key = format!("{from:08}-nearest");
                let unreadable = |e: serde_json::Error| Error::Alarm(format!("part {key}: {e}"));
                let nearest = parts.get_or_make(&key, keep, || {
                    serde_json::to_vec(&real.find(pixels)?).map_err(unreadable)
                })?;
                found.extend(serde_json::from_slice::<Vec<NearestReal>>(&nearest).map_err(unreadable)?);
                if let (Some(sampler), Some(hash)) = (&sampler, &hash) {
                    let part = parts.get_or_make(&format!("{from:08}-features"), keep, || {
                        let hashes = sampler.hashes(hash, pixels)?;
                        Ok(hashes.iter().flat_map(|hash| hash.to_le_bytes()).collect())
                    })?;
                    feature_hashes.extend(part.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes)));
                }
                bar.add((to - from) as u64);
            }
            let (hash, looks): (Vec<u64>, Vec<u64>) =
                pixels.par_chunks_exact(size).map(|image| (pixel_hash(image), real.looks.of(image))).unzip();
            let (folds, radii) = (discriminators.record.folds, epsilons.len());
            let fold: Vec<usize> = rows.uids.iter().map(|uid| discriminators.fold_of(uid)).collect();
            let row = |i: usize| &values[i * (folds + 1 + radii)..(i + 1) * (folds + 1 + radii)];
            let score = (0..rows.len()).map(|i| {
                let speak: Vec<f32> =
                    (0..folds).filter(|&set| set != fold[i]).map(|set| row(i)[set]).collect();
                speak.iter().sum::<f32>() / speak.len() as f32
            });
            let judge = (0..rows.len()).map(|i| (fold[i] != folds).then(|| row(i)[folds]));
            let probability = |radius: usize| (0..rows.len()).map(|i| row(i)[folds + 1 + radius]).collect();
            let scores = Scores {
                agrees: labels.iter().zip(&pseudo).map(|(a, b)| a == b).collect(),
                labels,
                confidence,
                scores: score.collect(),
                judges: judge.collect(),
                pixel_hashes: hash,
                perceptual_hashes: looks,
                feature_hashes: self.hash_features.then_some(feature_hashes),
                nearest: found,
                probabilities: (0..radii).map(probability).collect(),
                folds: fold.clone(),
            };
            scores.batch(epsilons, rows)
        })?;
        let mut summary = scores::summary(&pool, &dir, real.test.is_some())?;
        summary["classes"] = json!(classes);
        summary["shards"] = pool.info.shards.into();
        Ok(Outcome::Done(summary))
    }
}
