//! Train: trains a classifier on real and synthetic data, plainly, adversarially, or for randomised smoothing.

use std::path::PathBuf;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    Error, Result,
    attack::{Counted, Example, PgdSearch},
    data::{self, Dataset, Range, Source, augmented, cut_mix},
    error::expect_within as expect,
    evaluation::{Evaluation, share, unchanged},
    fs::{self, Record},
    nn::{Architecture, BatchNormMode, Classifier, ClassifierConfig, Standardization},
    objective::{GammaMix, Targets, augment_gaussian, pgd_at, plain, smooth_adv, stable, trades_perturb},
    plot,
    progress::Progress,
    rng::{Permutation, stream},
    settings::{
        self, ArchitectureSettings, AugmentationSettings, NoiseSettings, ObjectiveSettings,
        OptimizerSettings, ScheduleSettings,
    },
    stage::{Input, Job, Outcome, Stage, note},
    tables::{
        dataset::{DATA, arm_of, dataset_folder},
        division::{Real, SPLIT},
        records::TrainRecord,
    },
    text::one_or_many,
    training::{Draw, Mix, Part, Trainer},
};

/// Keys of the log: accuracies on the held-out images, under what the objective guards against, as they are, and after
/// the single step of FGSM.
const GUARDED: &str = "held_out_accuracy";
const CLEAN: &str = "held_out_clean_accuracy";
const FGSM: &str = "held_out_fgsm_accuracy";

/// Trains a classifier on the real `fit` images and, if given, synthetic data sets:
/// `γ · L(real) + (1 − γ) · L(synthetic)` (PORT, Sehwag et al. 2022, §2.1).
///
/// The checkpoint that is kept is the one whose moving average of weights and statistics does best on a held-out
/// part of the real training images; the test split is not touched.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[command(mut_args(settings::defaults(&[("warmup_steps", "100", &[]), ("final_fraction", "0.01", &[])])))]
pub struct Train {
    /// The folder of a finished split stage: the real data.
    #[arg(long)]
    pub split: Option<PathBuf>,
    /// Synthetic data: the folder of a finished materialize stage, or Hugging Face Parquet; several of them make a
    /// mixture. If left out, only real data are used.
    #[arg(long)]
    #[serde(deserialize_with = "one_or_many")]
    pub data: Vec<PathBuf>,
    /// The share of the synthetic part of a batch that each of several sources gets; equal shares if left out.
    #[arg(long, value_delimiter = ',')]
    pub data_weights: Vec<f64>,
    /// What is minimised.
    #[command(flatten)]
    pub objective: ObjectiveSettings,
    /// γ, the weight of the loss on real images if there are synthetic data. The paper uses 0.4 (Fig. 7).
    #[arg(long, default_value_t = 0.4)]
    pub gamma: f64,
    /// The share of a batch that is synthetic, if there are synthetic data.
    #[arg(long, default_value_t = 0.5)]
    pub synthetic_fraction: f64,
    /// The share of the target probability that is spread evenly over all classes.
    #[arg(long, default_value_t = 0.0)]
    pub label_smoothing: f64,
    /// The network.
    #[command(flatten)]
    pub architecture: ArchitectureSettings,
    /// Optimiser steps.
    #[arg(long, default_value_t = 2000)]
    pub steps: usize,
    /// Train for this many epochs instead of steps. An epoch is as many draws, real and synthetic together, as
    /// there are real images to learn from.
    #[arg(long)]
    pub epochs: Option<f64>,
    /// Images per step, real and synthetic together.
    #[arg(long, default_value_t = 128)]
    pub batch: usize,
    /// The optimiser.
    #[command(flatten)]
    pub optimizer: OptimizerSettings,
    /// The learning rate over the steps.
    #[command(flatten)]
    pub schedule: ScheduleSettings,
    /// Decay of the moving average of weights and batch statistics; in step n it is at most (1 + n) / (10 + n).
    #[arg(long, default_value_t = 0.995)]
    pub ema_decay: f64,
    /// Random augmentation of the images.
    #[command(flatten)]
    pub augmentation: AugmentationSettings,
    /// The probability with which a training image shows a window of another one of its batch, in image and target
    /// (CutMix).
    #[arg(long)]
    pub cutmix: Option<f64>,
    /// Use only this many of the real training images, drawn by the seed; 0 for all.
    #[arg(long, default_value_t = 0)]
    pub real_images: usize,
    /// The share of the real training images that is held out to choose the checkpoint.
    #[arg(long, default_value_t = 0.15)]
    pub held_out: f64,
    /// Steps between evaluations on the held-out images.
    #[arg(long, default_value_t = 200)]
    pub eval_every: usize,
    /// Seed of the initial weights, the order of the images, the augmentation and the attack.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// A network as it is trained, and as attacks see it: without gradients to its parameters.
struct Views<'a> {
    tracked: &'a (dyn Fn(&Tensor) -> Result<Tensor> + Sync),
    frozen: &'a (dyn Fn(&Tensor) -> Result<Tensor> + Sync),
}

impl Train {
    /// The loss of each image of a batch.
    fn losses(
        &self,
        views: &Views,
        x: &Tensor,
        targets: &Targets,
        ids: &[u64],
        step: usize,
    ) -> Result<Tensor> {
        let Views { tracked, frozen } = *views;
        let attack = || {
            let attack = self.objective.attack_at(step, self.seed)?;
            attack.ok_or_else(|| Error::Alarm("an objective under attack has none".into()))
        };
        let noisy = |noise: &NoiseSettings| augment_gaussian(x, noise.sigma, self.seed, ids);
        match &self.objective {
            ObjectiveSettings::Plain(_) => plain(&tracked, x, targets),
            ObjectiveSettings::PgdAt(_) | ObjectiveSettings::FgsmRs(_) => {
                pgd_at(&tracked, &frozen, x, targets, &attack()?, ids)
            }
            ObjectiveSettings::Trades(trades) => {
                let near = trades_perturb(&frozen, x, &attack()?, ids)?;
                stable(&tracked, x, &near, targets, trades.beta)
            }
            ObjectiveSettings::Stability(stability) => {
                stable(&tracked, x, &noisy(&stability.noise)?, targets, stability.beta)
            }
            ObjectiveSettings::Gaussian(noise) => plain(&tracked, &noisy(noise)?, targets),
            ObjectiveSettings::SmoothAdv(smooth) => {
                let noise = (smooth.noise.sigma, smooth.noise_samples);
                smooth_adv(&tracked, &frozen, x, targets, &attack()?, noise, ids)
            }
        }
    }

    /// The accuracy on held-out images under what the objective guards against and, if there is such a thing, the
    /// accuracies on the clean images and after the single step of the training, by their keys in the log.
    fn held_out_accuracies(
        &self,
        classifier: &Classifier,
        held_out: &Dataset,
        device: &Device,
    ) -> Result<(f64, Vec<(&'static str, f64)>)> {
        let logits_of = |x: &Tensor| classifier.logits(x);
        let evaluation = Evaluation::new(&logits_of, held_out, device);
        let clean = share(&evaluation.right("clean", &unchanged)?);
        let mut others = vec![(CLEAN, clean)];
        if let ObjectiveSettings::FgsmRs(fgsm) = &self.objective {
            let step = fgsm.pgd(fgsm.attacked.epsilon_warmup_steps, self.seed)?;
            let attack = PgdSearch::new(step, 1, Counted::Last)?;
            others.push((FGSM, share(&evaluation.stands("fgsm", &vec![true; held_out.len()], &attack)?)));
        }
        let guarded = if let Some(noise) = self.objective.noise() {
            let noisy = |image: &Example| {
                let x = augment_gaussian(&image.tensor(&image.image)?, noise.sigma, self.seed, &[image.id])?;
                Ok(x.flatten_all()?.to_vec1()?)
            };
            evaluation.right("noise", &noisy)?
        } else if let Some(attacked) = self.objective.attacked() {
            let attack = PgdSearch::new(attacked.attack.pgd(self.seed)?, 1, Counted::Last)?;
            evaluation.stands("pgd", &vec![true; held_out.len()], &attack)?
        } else {
            return Ok((clean, Vec::new()));
        };
        Ok((share(&guarded), others))
    }

    /// Synthetic images in a batch, if there are synthetic data.
    fn synthetic_in_batch(&self) -> usize {
        (self.batch as f64 * self.synthetic_fraction).round() as usize
    }

    /// The synthetic data sets, each with the name of its arm. They must look like the real data.
    fn synthetic(&self, real: &Dataset) -> Result<Vec<(Dataset, String)>> {
        let one = |dir: &PathBuf| {
            let folder = dataset_folder(dir);
            let arm = arm_of(&folder)?;
            let source: Source = folder.to_string_lossy().parse().map_err(Error::Usage)?;
            let synthetic = source.load(data::OfficialSplit::Train, None, 0)?;
            if synthetic.shape != real.shape || synthetic.class_names != real.class_names {
                let of =
                    |data: &Dataset| format!("{} images of {} classes", data.shape, data.class_names.len());
                let (folder, found, expected) = (folder.display(), of(&synthetic), of(real));
                bail!(Data, "{folder}: {found}, expected {expected} named like the real ones");
            }
            Ok((synthetic, arm))
        };
        self.data.iter().map(one).collect()
    }

    /// The weight of each synthetic source.
    fn weights(&self) -> Vec<f64> {
        if self.data_weights.is_empty() { vec![1.0; self.data.len()] } else { self.data_weights.clone() }
    }

    /// The network for images like the real ones.
    fn architecture(&self, real: &Dataset) -> Architecture {
        let standardize = self.architecture.standardizes().then(|| standardization(real));
        self.architecture.network(real.shape, real.class_names.len(), standardize)
    }

    /// Optimiser steps for this many real images.
    fn steps_for(&self, real: usize) -> usize {
        match self.epochs {
            None => self.steps,
            Some(epochs) => ((epochs * real as f64 / self.batch as f64).ceil() as usize).max(1),
        }
    }
}

/// The mean and standard deviation of each channel over all pixels, in [0, 1]. A constant channel is not scaled.
fn standardization(data: &Dataset) -> Standardization {
    let channels = data.shape.channels;
    let (mut sums, mut squares) = (vec![0u64; channels], vec![0u64; channels]);
    for pixel in data.pixels.chunks_exact(channels) {
        for ((sum, square), &value) in sums.iter_mut().zip(&mut squares).zip(pixel) {
            *sum += u64::from(value);
            *square += u64::from(value).pow(2);
        }
    }
    let n = (data.pixels.len() / channels) as f64;
    let mean: Vec<f64> = sums.iter().map(|&sum| sum as f64 / n).collect();
    let deviation = |(&square, mean): (&u64, &f64)| (square as f64 / n - mean * mean).max(0.0).sqrt() / 255.0;
    let std = squares.iter().zip(&mean).map(deviation).map(|d| if d > 0.0 { d as f32 } else { 1.0 });
    Standardization { std: std.collect(), mean: mean.iter().map(|m| (m / 255.0) as f32).collect() }
}

impl Stage for Train {
    const NAME: &'static str = "train";
    const ABOUT: &'static str = "Train a classifier, plainly or adversarially, on real and synthetic data";
    const INPUTS: &'static [Input] = &[SPLIT, DATA];

    fn unused(&self) -> Vec<&'static str> {
        let mut unused = Vec::new();
        if self.data.is_empty() {
            unused.extend(["data_weights", "gamma", "synthetic_fraction"]);
        }
        if self.epochs.is_some() {
            unused.push("steps");
        }
        unused
    }

    fn validate(&self) -> Result<()> {
        let Self { synthetic_fraction, batch, .. } = *self;
        expect("gamma", self.gamma, 0.0, 1.0)?;
        expect("synthetic_fraction", synthetic_fraction, 0.0, 1.0)?;
        expect("label_smoothing", self.label_smoothing, 0.0, 0.999)?;
        self.objective.validate()?;
        self.architecture.validate()?;
        if self.objective.attack_mode() == BatchNormMode::Train && !self.architecture.has_batch_norm() {
            bail!(Usage, "attack_batch_norm is train, expected eval: the network has no batch norm");
        }
        expect("steps", self.steps, 1, 100_000_000)?;
        if let Some(epochs) = self.epochs {
            expect("epochs", epochs, 1e-6, 1e9)?;
        }
        expect("batch", batch, 2, 1 << 20)?;
        self.optimizer.validate()?;
        self.schedule.validate()?;
        self.augmentation.validate()?;
        if let Some(probability) = self.cutmix {
            expect("cutmix", probability, 0.0, 1.0)?;
        }
        expect("ema_decay", self.ema_decay, 0.0, 0.999_999)?;
        expect("held_out", self.held_out, 0.001, 0.9)?;
        expect("eval_every", self.eval_every, 1, usize::MAX)?;
        let weights = &self.data_weights;
        if !weights.is_empty()
            && (weights.len() != self.data.len() || weights.iter().any(|&w| w.is_nan() || w <= 0.0))
        {
            let sources = self.data.len();
            bail!(
                Usage,
                "data_weights is {weights:?}, expected a number above 0 for each of {sources} sources"
            );
        }
        let n_syn = self.synthetic_in_batch();
        if n_syn == 0 && !self.data.is_empty() {
            bail!(
                Usage,
                "synthetic_fraction is {synthetic_fraction}, none of a batch of {batch}; expected at least one place for the \
                 synthetic data"
            );
        }
        GammaMix::new(self.gamma, batch - n_syn, n_syn).map(drop)
    }

    fn amount(&self) -> String {
        let objective = self.objective.summary();
        let data = if self.data.is_empty() { "real" } else { "real and synthetic" };
        let length = self.epochs.map_or_else(|| format!("{} steps", self.steps), |e| format!("{e} epochs"));
        format!("{length} of {} {data} images, {objective}", self.batch)
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let real = Real::load(&SPLIT.finished(self.split.as_deref())?)?;
        let fit = real.fit();
        if fit.len() < 2 {
            bail!(Data, "the split has {} images to learn from, expected at least 2", fit.len());
        }
        let n_real = match self.real_images {
            0 => fit.len(),
            n if (2..=fit.len()).contains(&n) => n,
            n => bail!(Usage, "real_images is {n}, expected 2 to {}, the images to learn from", fit.len()),
        };
        let (train, held_out) = hold_out(&fit, n_real, self.held_out, self.seed);
        let synthetic = self.synthetic(&train)?;
        let config = ClassifierConfig {
            architecture: self.architecture(&train),
            class_names: train.class_names.clone(),
        };
        let batch_norm = config.architecture.has_batch_norm();
        let classifier = Classifier::init(config.clone(), self.seed, &job.device)?;
        let averaged = Classifier::init(config, self.seed, &job.device)?;
        let network = classifier.tracked()?;

        let n_syn = if synthetic.is_empty() { 0 } else { self.synthetic_in_batch() };
        let weight = GammaMix::new(self.gamma, self.batch - n_syn, n_syn)?;
        let sources: Vec<_> = synthetic.iter().map(|(data, _)| data).zip(self.weights()).collect();
        let mix = Mix::new(&train, &sources, self.batch, n_syn, self.seed)?;

        let out = job.open()?;
        let (checkpoint, optimizer) = (job.hidden(out, "checkpoint"), self.optimizer.optimizer());
        let mut trainer = Trainer::resume(checkpoint, classifier.params(), optimizer, self.ema_decay)?;
        if batch_norm {
            trainer = trainer.whole();
        }
        let steps = self.steps_for(train.len());
        let lr = self.schedule.schedule(self.optimizer.learning_rate(), steps);
        let settings = self.augmentation.augment();
        let attack_mode = self.objective.attack_mode();
        let tracked = |x: &Tensor| network.logits_by(x, BatchNormMode::Train);
        let frozen = |x: &Tensor| classifier.logits_by(x, attack_mode);
        let views = Views { tracked: &tracked, frozen: &frozen };

        let bar = Progress::new(Self::NAME, steps as u64, "steps");
        bar.skip(trainer.step() as u64);
        while trainer.step() < steps {
            let step = trainer.step();
            let contribution = |slots: std::ops::Range<usize>| -> Result<Part> {
                let shown = |draws: &[Draw]| -> Result<(Tensor, Tensor, Vec<u64>)> {
                    let pixels = draws.iter().flat_map(|draw| draw.pixels).copied().collect::<Vec<_>>();
                    let ids = draws.iter().map(|draw| draw.id).collect::<Vec<_>>();
                    let labels = Tensor::from_iter(draws.iter().map(|draw| draw.label), &job.device)?;
                    let (shape, range) = (train.shape, Range::Unit);
                    let x = augmented(&pixels, shape, &ids, self.seed, settings, range, &job.device)?;
                    Ok((x, labels, ids))
                };
                let draws: Vec<_> = slots.clone().map(|slot| mix.at(step, slot)).collect();
                let (mut x, labels, ids) = shown(&draws)?;
                let mut mixed = None;
                if let Some(probability) = self.cutmix {
                    let partners: Vec<_> = slots.map(|slot| mix.partner(step, slot)).collect();
                    let (others, other_labels, _) = shown(&partners)?;
                    let (images, shares) = cut_mix(&x, &others, probability, self.seed, &ids)?;
                    (x, mixed) = (images, Some((other_labels, shares)));
                }
                let mixed = mixed.as_ref().map(|(labels, shares)| (labels, shares));
                let targets = Targets { labels: &labels, mixed, smoothing: self.label_smoothing };
                let losses = self.losses(&views, &x, &targets, &ids, step)?;
                let weights =
                    draws.iter().map(|draw| if draw.real { weight.real } else { weight.synthetic } as f32);
                Ok(Part::from((losses * Tensor::from_iter(weights, &job.device)?)?.sum_all()?))
            };
            trainer.advance(lr.at(step), self.optimizer.grad_clip(), self.batch, &contribution)?;
            if trainer.step().is_multiple_of(self.eval_every) || trainer.step() == steps {
                let mut others = Vec::new();
                let accuracy = trainer.consider(averaged.params(), || {
                    let (standing, more) = self.held_out_accuracies(&averaged, &held_out, &job.device)?;
                    others = more;
                    Ok(standing)
                })?;
                let mut line = json!({ GUARDED: accuracy, "learning_rate": lr.at(step) });
                others.into_iter().for_each(|(key, accuracy)| line[key] = accuracy.into());
                let known = collapse(trainer.log_lines()).is_some();
                trainer.log(line);
                if let Some(warning) = collapse(trainer.log_lines()).filter(|_| !known) {
                    note(self, &format!("warning: {warning}"));
                }
            }
            bar.add(1);
            trainer.end_step()?;
        }
        let held_out_accuracy = trainer.load_best(averaged.params())?.unwrap_or(f64::NAN);
        // The average has no counts of its own.
        for ((_, count), (_, averaged)) in
            classifier.params().buffers().iter().zip(averaged.params().buffers())
        {
            if !count.get().dtype().is_float() {
                averaged.set(&count.get())?;
            }
        }
        averaged.save(out)?;
        fs::publish(&out.join("metrics.jsonl"), trainer.log_text().as_bytes())?;
        let curve = |name: &str, key: &str| {
            let at = |line: &serde_json::Value| Some((line["step"].as_f64()?, line[key].as_f64()?));
            (name.to_owned(), trainer.log_lines().iter().filter_map(at).collect::<Vec<_>>())
        };
        let curves = [
            curve("held out, as trained against", GUARDED),
            curve("held out, clean", CLEAN),
            curve("training loss", "loss"),
        ];
        let svg = plot::lines("Training", "step", "accuracy, loss in nats", &curves)?;
        fs::publish(&out.join("curves.svg"), svg.as_bytes())?;
        let arms: Vec<&str> = synthetic.iter().map(|(_, arm)| arm.as_str()).collect();
        let record = TrainRecord {
            schema: "proxyset.train/1".into(),
            arm: if arms.is_empty() { "real".into() } else { arms.join("+") },
            seed: self.seed,
            real: train.len(),
            synthetic: synthetic.iter().map(|(data, _)| data.len()).sum(),
            held_out_accuracy,
            sigma: Some(self.objective.noise().map_or(0.0, |noise| noise.sigma)),
            warnings: Vec::from_iter(collapse(trainer.log_lines())),
        };
        record.write(out)?;
        let (right, n) = (100.0 * held_out_accuracy, held_out.len());
        note(self, &format!("{right:.1} % of {n} held-out images right"));
        let summary = json!({
            "train": record,
            "parameters": averaged.params().count(),
            "macs": averaged.config().architecture.macs()?,
            "last": trainer.log_lines().last(),
        });
        Ok(Outcome::Done(summary))
    }
}

/// The warning of catastrophic overfitting (Wong et al. 2020; Andriushchenko & Flammarion 2020), by the first line of the
/// log that shows it: the network withstands the single step that it is trained with, but less than half as often PGD,
/// and the two are too far apart for chance.
fn collapse(log: &[Value]) -> Option<String> {
    log.iter().find_map(|line| {
        let [pgd, fgsm] = [line[GUARDED].as_f64()?, line[FGSM].as_f64()?];
        (pgd < fgsm / 2.0 && fgsm - pgd > 0.2).then(|| {
            format!(
                "catastrophic overfitting at step {}: {:.1} % of the held-out images withstand FGSM, but {:.1} % PGD; lower \
                 fgsm_step_ratio or epsilon, or take pgd-at",
                line["step"],
                100.0 * fgsm,
                100.0 * pgd
            )
        })
    })
}

/// Divides `n` of the training images into those that are learned from and those that choose the checkpoint.
fn hold_out(fit: &Dataset, n: usize, share: f64, seed: u64) -> (Dataset, Dataset) {
    let order = Permutation::new(seed, u64::from(stream::SUBSET), fit.len() as u64);
    let held = ((n as f64 * share).round() as usize).clamp(1, n - 1);
    let mut shuffled: Vec<usize> = (0..n).map(|i| order.at(i as u64) as usize).collect();
    let mut train = shuffled.split_off(held);
    shuffled.sort_unstable();
    train.sort_unstable();
    (fit.subset(&train), fit.subset(&shuffled))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{settings::from_flags, stage::AnyStage};

    #[test]
    fn a_network_that_withstands_its_own_step_and_not_pgd_has_collapsed() {
        let line = |step: u64, fgsm: f64, pgd: f64| json!({ "step": step, FGSM: fgsm, GUARDED: pgd });
        let healthy = [line(10, 0.12, 0.05), line(20, 0.7, 0.45), json!({ "step": 25, GUARDED: 0.0 })];
        assert_eq!(collapse(&healthy), None);
        let said = collapse(&[&healthy[..], &[line(30, 0.9, 0.01), line(40, 1.0, 0.0)]].concat()).unwrap();
        assert!(
            said.contains("at step 30: 90.0 % of the held-out images withstand FGSM, but 1.0 % PGD"),
            "{said}"
        );
    }

    /// So that what was trained before they were there is found done.
    #[test]
    fn settings_that_are_left_out_are_not_in_the_fingerprint() {
        let keys = ["block", "crop_area", "cutmix", "nesterov", "stem"];
        let settings = |more: &[&str]| {
            let flags =
                ["--architecture=resnet", "--blocks=1,1,1,1"].iter().chain(more).map(|&flag| flag.into());
            from_flags::<Train>(&flags.collect::<Vec<_>>()).unwrap().identity().to_string()
        };
        let set = ["--block=basic", "--crop-area=0.1", "--cutmix=1", "--nesterov=true", "--stem=cifar"];
        let (without, with) = (settings(&[]), settings(&set));
        for key in keys.map(|key| format!("\"{key}\"")) {
            assert!(!without.contains(&key) && with.contains(&key), "{key} in {without} and {with}");
        }
    }

    #[test]
    fn the_arm_is_that_of_the_manifest_and_a_damaged_one_is_bad_data() {
        let dir = tempfile::tempdir().unwrap();
        let arm = || arm_of(dir.path());
        assert_eq!(arm().unwrap(), "synthetic");
        let written = |provenance| {
            let shape = data::Shape { height: 1, width: 1, channels: 1 };
            data::Manifest::new(shape, Vec::new(), Vec::new(), provenance).write(dir.path()).unwrap();
        };
        written(json!({ "arm": "arc" }));
        assert_eq!(arm().unwrap(), "arc");
        written(json!({}));
        assert_eq!(arm().unwrap(), "synthetic");
        written(json!({ "arm": 7 }));
        assert!(arm().unwrap_err().to_string().ends_with("the manifest's arm is 7, expected a name"));
        fs::publish(&dir.path().join(data::manifest::FILE_NAME), b"{\"schema\": ").unwrap();
        assert_eq!(arm().unwrap_err().exit_code(), 65);
    }
}
