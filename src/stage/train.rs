//! Train: a classifier on real and synthetic data, plainly or adversarially.

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    Job, Outcome, Split, Stage,
    accuracy::correct,
    expect, expect_channels, finished_input, note,
    split::Real,
    trainer::{Part, Trainer},
};
use crate::{
    Error, Result,
    attack::{Epsilon, Norm, Pgd},
    data::{self, Augment, Dataset, Range, Source, augment, to_tensor},
    fs,
    nn::{
        Architecture, Classifier, ClassifierConfig, LrDecay, LrSchedule, SmallCnnConfig,
        optim::{Sgd, SgdConfig},
    },
    objective::{GammaMix, pgd_at, plain},
    progress::Progress,
    rng::{Permutation, stream},
};

/// What is minimised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// Cross-entropy on the images as they are.
    Plain,
    /// Cross-entropy on PGD adversarial examples (Madry et al. 2018).
    PgdAt,
}

/// Trains a classifier on the real `fit` images and, if given, a synthetic data set:
/// `γ · L(real) + (1 − γ) · L(synthetic)` (PORT, Sehwag et al. 2022, §2.1).
///
/// The checkpoint that is kept is the best, in the moving average of its weights, on a part of the real training
/// images that is held out from training; the test split is not touched.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// The folder of a finished split: the real data.
    #[arg(long)]
    pub split: Option<PathBuf>,
    /// Synthetic data: the folder of a finished materialize, or Hugging Face Parquet. Without it, real data alone.
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// What is minimised.
    #[arg(long, value_enum, default_value_t = Objective::PgdAt)]
    pub objective: Objective,
    /// γ, the weight of the real loss, when there is synthetic data. 0.4 as in the paper (Fig. 7).
    #[arg(long, default_value_t = 0.4)]
    pub gamma: f64,
    /// The share of a batch that is synthetic, when there is synthetic data.
    #[arg(long, default_value_t = 0.5)]
    pub synthetic_fraction: f64,
    /// The norm of the attack.
    #[arg(long, value_enum, default_value_t = Norm::Linf)]
    pub norm: Norm,
    /// The radius of the attack, for pixels in [0, 1].
    #[arg(long, default_value = "8/255")]
    pub epsilon: Epsilon,
    /// Steps of the attack.
    #[arg(long, default_value_t = 10)]
    pub attack_steps: usize,
    /// The step of the attack as a multiple of epsilon / steps; 2.5 is Madry et al.'s.
    #[arg(long, default_value_t = 2.5)]
    pub attack_step_ratio: f64,
    /// Channels of each stage of the network; from the second on a stage halves the image.
    #[arg(long, value_delimiter = ',', default_values_t = [32, 64, 64])]
    pub channels: Vec<usize>,
    /// Groups of the network's norms.
    #[arg(long, default_value_t = 8)]
    pub groups: usize,
    /// Optimiser steps.
    #[arg(long, default_value_t = 2000)]
    pub steps: usize,
    /// Images per step, real and synthetic together.
    #[arg(long, default_value_t = 128)]
    pub batch: usize,
    /// Peak learning rate of SGD.
    #[arg(long, default_value_t = 0.1)]
    pub learning_rate: f64,
    /// Steps of linear warm-up; a cosine down to 1 % of the peak follows.
    #[arg(long, default_value_t = 100)]
    pub warmup_steps: usize,
    /// Momentum of SGD, Nesterov's.
    #[arg(long, default_value_t = 0.9)]
    pub momentum: f64,
    /// Weight decay of SGD.
    #[arg(long, default_value_t = 5e-4)]
    pub weight_decay: f64,
    /// Decay of the moving average of the weights.
    #[arg(long, default_value_t = 0.995)]
    pub ema_decay: f64,
    /// Largest norm of the gradient; larger ones are scaled down.
    #[arg(long, default_value_t = 5.0)]
    pub grad_clip: f64,
    /// Pixels of padding before a random crop.
    #[arg(long, default_value_t = 0)]
    pub crop_pad: usize,
    /// Mirror half of the images. Wrong for digits.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub flip: bool,
    /// The share of the real training images held out to choose the checkpoint.
    #[arg(long, default_value_t = 0.15)]
    pub held_out: f64,
    /// Steps between looks at the held-out images.
    #[arg(long, default_value_t = 200)]
    pub eval_every: usize,
    /// Seed of initial weights, order, augmentation and attack.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// `train.json`: what a classifier was trained on, for those who compare classifiers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TrainRecord {
    /// `proxyset.train/1`.
    pub schema: String,
    /// `real`, or the arm that the synthetic data is of.
    pub arm: String,
    /// [`Train::seed`].
    pub seed: u64,
    /// Real images learned from.
    pub real: usize,
    /// Synthetic images learned from.
    pub synthetic: usize,
    /// Accuracy of the kept checkpoint on the held-out real images, under attack if trained so.
    pub held_out_accuracy: f64,
}

impl Train {
    fn attack(&self) -> Result<Pgd> {
        Pgd::new(self.norm, self.epsilon, self.attack_steps, self.attack_step_ratio, 1, self.seed)
    }

    /// Synthetic images in a batch, when there is synthetic data.
    fn synthetic_in_batch(&self) -> usize {
        (self.batch as f64 * self.synthetic_fraction).round() as usize
    }

    /// The synthetic data, with the name of its arm. It must look like the real data.
    fn synthetic(&self, real: &Dataset) -> Result<Option<(Dataset, String)>> {
        let Some(dir) = &self.data else { return Ok(None) };
        let folder = dataset_folder(dir);
        let source: Source = folder.to_string_lossy().parse().map_err(Error::Usage)?;
        let synthetic = source.load(data::Split::Train, None, 0)?;
        if synthetic.shape != real.shape || synthetic.class_names != real.class_names {
            bail!(
                Data,
                "{}: {} images of {} classes, expected {} images of {} classes named like the real ones",
                folder.display(),
                synthetic.shape,
                synthetic.class_names.len(),
                real.shape,
                real.class_names.len()
            );
        }
        let arm = data::Manifest::read(&folder)
            .ok()
            .and_then(|m| Some(m.provenance.get("arm")?.as_str()?.to_owned()))
            .unwrap_or_else(|| "synthetic".into());
        Ok(Some((synthetic, arm)))
    }
}

/// A materialize stage's folder holds its data set in `dataset`; others are the data set.
pub(super) fn dataset_folder(dir: &Path) -> PathBuf {
    let inner = dir.join("dataset");
    if inner.is_dir() { inner } else { dir.to_path_buf() }
}

/// Draws from one source: an endless sequence of epochs, each in its own keyed order.
struct Draws<'a> {
    data: &'a Dataset,
    seed: u64,
    /// Keeps the keys of two sources apart.
    tag: u64,
}

impl Draws<'_> {
    /// The image at `position` of the sequence, and the key of all that is random about this draw.
    fn at(&self, position: usize) -> (usize, u64) {
        let n = self.data.len();
        let epoch = (position / n) as u64;
        let order = Permutation::new(self.seed, (self.tag << 48) | epoch, n as u64);
        (order.at((position % n) as u64) as usize, (self.tag << 48) | position as u64)
    }
}

impl Stage for Train {
    const NAME: &'static str = "train";
    const INPUTS: &'static [&'static str] = &["split", "data"];

    fn validate(&self) -> Result<()> {
        expect("gamma", self.gamma, 0.0, 1.0)?;
        expect("synthetic_fraction", self.synthetic_fraction, 0.0, 1.0)?;
        expect_channels(&self.channels, self.groups)?;
        expect("steps", self.steps, 1, 100_000_000)?;
        expect("batch", self.batch, 2, 1 << 20)?;
        expect("learning_rate", self.learning_rate, 1e-12, 1e3)?;
        expect("momentum", self.momentum, 0.0, 1.0)?;
        expect("weight_decay", self.weight_decay, 0.0, 1.0)?;
        expect("ema_decay", self.ema_decay, 0.0, 0.999_999)?;
        expect("grad_clip", self.grad_clip, 1e-6, 1e9)?;
        expect("held_out", self.held_out, 0.001, 0.9)?;
        expect("eval_every", self.eval_every, 1, usize::MAX)?;
        let n_syn = self.synthetic_in_batch();
        GammaMix::new(self.gamma, self.batch - n_syn, n_syn)?;
        self.attack().map(drop)
    }

    fn amount(&self) -> String {
        let objective = match self.objective {
            Objective::Plain => "plain".into(),
            Objective::PgdAt => format!("PGD-{} at {} {}", self.attack_steps, self.norm, self.epsilon),
        };
        let data = if self.data.is_some() { "real and synthetic" } else { "real" };
        format!("{} steps of {} {data} images, {objective}", self.steps, self.batch)
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let real = Real::load(&finished_input::<Split>("split", self.split.as_deref())?)?;
        let (train, held_out) = hold_out(&real.fit(), self.held_out, self.seed);
        let synthetic = self.synthetic(&train)?;
        let config = ClassifierConfig {
            architecture: Architecture::SmallCnn(SmallCnnConfig {
                in_channels: train.shape.channels,
                image_size: train.shape.height,
                channels: self.channels.clone(),
                num_classes: train.class_names.len(),
                groups: self.groups,
            }),
            class_names: train.class_names.clone(),
        };
        let classifier = Classifier::init(config.clone(), self.seed, &job.device)?;
        let averaged = Classifier::init(config, self.seed, &job.device)?;
        let network = classifier.tracked()?;

        let n_syn = if synthetic.is_some() { self.synthetic_in_batch() } else { 0 };
        let n_real = self.batch - n_syn;
        let mix = GammaMix::new(self.gamma, n_real, n_syn)?;

        let (out, _lock) = job.open("run")?;
        let optimizer =
            Sgd::new(SgdConfig { momentum: self.momentum, nesterov: true, weight_decay: self.weight_decay });
        let mut trainer = Trainer::resume(
            job.hidden(out, "checkpoint"),
            classifier.params(),
            Box::new(optimizer),
            self.ema_decay,
        )?;

        let real_draws = Draws { data: &train, seed: self.seed, tag: 1 };
        let syn_draws = synthetic.as_ref().map(|(data, _)| Draws { data, seed: self.seed, tag: 2 });
        let lr = LrSchedule {
            peak: self.learning_rate,
            warmup_steps: self.warmup_steps,
            total_steps: self.steps,
            decay: LrDecay::Cosine { min: 0.01 * self.learning_rate },
        };
        let attack = match self.objective {
            Objective::Plain => None,
            Objective::PgdAt => Some(self.attack()?),
        };
        let settings = Augment { pad: self.crop_pad, flip: self.flip };

        let bar = Progress::new(Self::NAME, self.steps as u64, "steps");
        bar.skip(trainer.step() as u64);
        while trainer.step() < self.steps {
            let step = trainer.step();
            let contribution = |slots: std::ops::Range<usize>| -> Result<Part> {
                let (mut pixels, mut labels, mut ids, mut weights) =
                    (Vec::new(), Vec::new(), Vec::new(), Vec::new());
                for slot in slots {
                    let (draws, position, weight) = match &syn_draws {
                        Some(draws) if slot >= n_real => (draws, step * n_syn + slot - n_real, mix.synthetic),
                        _ => (&real_draws, step * n_real + slot, mix.real),
                    };
                    let (image, id) = draws.at(position);
                    pixels.extend_from_slice(draws.data.image(image));
                    labels.push(draws.data.labels[image]);
                    ids.push(id);
                    weights.push(weight as f32);
                }
                let pixels = augment(&pixels, train.shape, &ids, self.seed, stream::AUGMENT, settings);
                let x = to_tensor(&pixels, train.shape, Range::Unit, &job.device)?;
                let y = Tensor::new(labels, &job.device)?;
                let (tracked, frozen) = (|x: &Tensor| network.logits(x), |x: &Tensor| classifier.logits(x));
                let losses = match &attack {
                    Some(attack) => pgd_at(&tracked, &frozen, &x, &y, attack, &ids)?,
                    None => plain(&tracked, &x, &y)?,
                };
                Ok(Part::from((losses * Tensor::new(weights, &job.device)?)?.sum_all()?))
            };
            trainer.advance(lr.at(step), Some(self.grad_clip), self.batch, &contribution)?;
            if trainer.step().is_multiple_of(self.eval_every) || trainer.step() == self.steps {
                let quiet = Progress::hidden();
                let accuracy = trainer.consider(averaged.params(), || {
                    let right = correct(
                        &|x| averaged.logits(x),
                        &held_out,
                        attack.as_ref(),
                        &job.device,
                        None,
                        &quiet,
                    )?;
                    Ok(right.iter().filter(|&&r| r).count() as f64 / right.len().max(1) as f64)
                })?;
                trainer.log(json!({ "held_out_accuracy": accuracy }));
            }
            bar.add(1);
            trainer.end_step()?;
        }
        let held_out_accuracy = trainer.load_best(averaged.params())?.unwrap_or(f64::NAN);
        averaged.save(out)?;
        fs::publish(&out.join("metrics.jsonl"), trainer.log_text().as_bytes())?;
        let record = TrainRecord {
            schema: "proxyset.train/1".into(),
            arm: synthetic.as_ref().map_or_else(|| "real".into(), |(_, arm)| arm.clone()),
            seed: self.seed,
            real: train.len(),
            synthetic: synthetic.as_ref().map_or(0, |(data, _)| data.len()),
            held_out_accuracy,
        };
        fs::publish_json(&out.join("train.json"), &record)?;
        note(
            self,
            &format!("{:.1} % of {} held-out images right", 100.0 * held_out_accuracy, held_out.len()),
        );
        let summary = json!({
            "train": record,
            "parameters": averaged.params().count(),
            "macs": averaged.config().architecture.macs()?,
            "last": trainer.log_lines().last(),
        });
        Ok(Outcome::Done(summary))
    }
}

/// Divides training images into those that are learned from and those that choose the checkpoint.
fn hold_out(fit: &Dataset, share: f64, seed: u64) -> (Dataset, Dataset) {
    let order = Permutation::new(seed, u64::from(stream::SUBSET), fit.len() as u64);
    let held = ((fit.len() as f64 * share).round() as usize).clamp(1, fit.len() - 1);
    let mut shuffled: Vec<usize> = (0..fit.len()).map(|i| order.at(i as u64) as usize).collect();
    let mut train = shuffled.split_off(held);
    shuffled.sort_unstable();
    train.sort_unstable();
    (fit.subset(&train), fit.subset(&shuffled))
}
