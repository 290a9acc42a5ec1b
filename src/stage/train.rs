//! Train: a classifier on real and synthetic data, plainly, adversarially, or to be smoothed.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    Job, Outcome, Split, Stage,
    accuracy::{Perturb, correct_after},
    expect, expect_channels, finished_input,
    mix::Mix,
    note, one_or_many,
    split::Real,
    trainer::{Part, Trainer},
};
use crate::{
    Error, Result,
    attack::{Epsilon, Norm, Pgd},
    data::{self, Augment, Dataset, Range, Source, augmented},
    fs,
    nn::{
        Activation, Architecture, BatchNormMode, Classifier, ClassifierConfig, LrDecay, LrSchedule,
        ResNetConfig, SmallCnnConfig, Standardization, WideResNetConfig, WideResNetLayout,
        optim::{Sgd, SgdConfig},
    },
    objective::{GammaMix, augment_gaussian, pgd_at, plain, stable, trades_perturb},
    plot,
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
    /// Cross-entropy on one step of 1.25 epsilon from a random start (Wong et al. 2020).
    FgsmRs,
    /// Cross-entropy, and the divergence of the answers that an attack can reach (Zhang et al. 2019).
    Trades,
    /// Cross-entropy, and the divergence of the answers under Gaussian noise (Zheng et al. 2016; Carmon et al. 2019).
    Stability,
    /// Cross-entropy under Gaussian noise (Cohen et al. 2019).
    Gaussian,
}

impl Objective {
    fn is_attacked(self) -> bool {
        matches!(self, Self::PgdAt | Self::FgsmRs | Self::Trades)
    }

    fn is_noisy(self) -> bool {
        matches!(self, Self::Stability | Self::Gaussian)
    }
}

/// Which network is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ArchitectureKind {
    /// Convolutions with group norm and SiLU: small, and no image sees its batch.
    SmallCnn,
    /// ResNet in its form for small images; with the defaults ResNet-18.
    Resnet,
    /// WRN-depth-width; with the defaults WRN-28-10.
    WideResnet,
}

/// By which statistics batch norms go while the training attack runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum AttackBatchNorm {
    /// The running ones, as at evaluation: the attack changes nothing in the network.
    Eval,
    /// Those of the batch; the steps of the attack move the running ones too, as in the paper's released code.
    Train,
}

impl From<AttackBatchNorm> for BatchNormMode {
    fn from(mode: AttackBatchNorm) -> Self {
        match mode {
            AttackBatchNorm::Eval => Self::Eval,
            AttackBatchNorm::Train => Self::Train,
        }
    }
}

/// How the learning rate goes on after its warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Half a cosine down to 1 % of the peak.
    Cosine,
    /// PyTorch's OneCycleLR: up by half a cosine while it warms up, down by another to nearly 0.
    OneCycle,
    /// It stays.
    Constant,
}

/// Trains a classifier on the real `fit` images and, if given, synthetic data sets:
/// `γ · L(real) + (1 − γ) · L(synthetic)` (PORT, Sehwag et al. 2022, §2.1).
///
/// The checkpoint that is kept is the best, in the moving average of its weights and statistics, on a part of the real
/// training images that is held out from training; the test split is not touched.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// The folder of a finished split: the real data.
    #[arg(long)]
    pub split: Option<PathBuf>,
    /// Synthetic data: the folder of a finished materialize, or Hugging Face Parquet; several for a mixture. Without
    /// it, real data alone.
    #[arg(long)]
    #[serde(deserialize_with = "one_or_many")]
    pub data: Vec<PathBuf>,
    /// How much of the synthetic part of a batch each of several sources gets; equal shares if left out.
    #[arg(long, value_delimiter = ',')]
    pub data_weights: Vec<f64>,
    /// What is minimised.
    #[arg(long, value_enum, default_value_t = Objective::PgdAt)]
    pub objective: Objective,
    /// γ, the weight of the real loss, when there is synthetic data. 0.4 as in the paper (Fig. 7).
    #[arg(long, default_value_t = 0.4)]
    pub gamma: f64,
    /// The share of a batch that is synthetic, when there is synthetic data.
    #[arg(long, default_value_t = 0.5)]
    pub synthetic_fraction: f64,
    /// The weight of the divergence in trades and stability; 6 is that of both papers.
    #[arg(long, default_value_t = 6.0)]
    pub beta: f64,
    /// The share of the target that all classes get.
    #[arg(long, default_value_t = 0.0)]
    pub label_smoothing: f64,
    /// The norm of the attack.
    #[arg(long, value_parser = settings::named::<Norm>(), default_value_t = Norm::Linf)]
    pub norm: Norm,
    /// The radius of the attack, for pixels in [0, 1].
    #[arg(long, default_value = "8/255")]
    pub epsilon: Epsilon,
    /// Steps over which the radius grows from 0 to epsilon.
    #[arg(long, default_value_t = 0)]
    pub epsilon_warmup_steps: usize,
    /// Steps of the attack. (fgsm-rs takes one in training, these when it looks at the held-out images.)
    #[arg(long, default_value_t = 10)]
    pub attack_steps: usize,
    /// The step of the attack as a multiple of epsilon / steps; 2.5 is Madry et al.'s.
    #[arg(long, default_value_t = 2.5)]
    pub attack_step_ratio: f64,
    /// By which statistics batch norms go while the attack runs.
    #[arg(long, value_enum, default_value_t = AttackBatchNorm::Eval)]
    pub attack_batch_norm: AttackBatchNorm,
    /// The standard deviation of the noise of stability and gaussian, for pixels in [0, 1].
    #[arg(long, default_value_t = 0.25)]
    pub sigma: f64,
    /// The network.
    #[arg(long, value_enum, default_value_t = ArchitectureKind::SmallCnn)]
    pub architecture: ArchitectureKind,
    /// Channels of each stage of small-cnn and resnet; from the second on a stage halves the image. If left out,
    /// 32,64,64 and 64,128,256,512.
    #[arg(long, value_delimiter = ',')]
    pub channels: Vec<usize>,
    /// Groups of the norms of small-cnn.
    #[arg(long, default_value_t = 8)]
    pub groups: usize,
    /// Blocks of each stage of resnet; if left out, two.
    #[arg(long, value_delimiter = ',')]
    pub blocks: Vec<usize>,
    /// Layers of wide-resnet: 4 and a multiple of 6.
    #[arg(long, default_value_t = 28)]
    pub depth: usize,
    /// Width of wide-resnet.
    #[arg(long, default_value_t = 10)]
    pub width: usize,
    /// The function between the layers of wide-resnet; with silu the parameters have the names of RobustBench's
    /// DMWideResNet, with relu those of its WideResNet.
    #[arg(long, value_parser = settings::named::<Activation>(), default_value_t = Activation::Relu)]
    pub activation: Activation,
    /// Have resnet and wide-resnet standardise their images by mean and deviation of the real training images.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub standardize: bool,
    /// Optimiser steps.
    #[arg(long, default_value_t = 2000)]
    pub steps: usize,
    /// Instead of steps: an epoch is as many draws, real and synthetic together, as there are real images to learn
    /// from.
    #[arg(long)]
    pub epochs: Option<f64>,
    /// Images per step, real and synthetic together.
    #[arg(long, default_value_t = 128)]
    pub batch: usize,
    /// Peak learning rate of SGD.
    #[arg(long, default_value_t = 0.1)]
    pub learning_rate: f64,
    /// How the learning rate goes on after its warm-up.
    #[arg(long, value_enum, default_value_t = Schedule::Cosine)]
    pub schedule: Schedule,
    /// Steps of the learning rate's warm-up, at most half of all.
    #[arg(long, default_value_t = 100)]
    pub warmup_steps: usize,
    /// Momentum of SGD, Nesterov's.
    #[arg(long, default_value_t = 0.9)]
    pub momentum: f64,
    /// Weight decay of SGD.
    #[arg(long, default_value_t = 5e-4)]
    pub weight_decay: f64,
    /// Decay of the moving average of weights and batch statistics, at most (1 + n) / (10 + n) in step n.
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
    /// Use only this many of the real training images, drawn by the seed; 0 for all.
    #[arg(long, default_value_t = 0)]
    pub real_images: usize,
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
    /// `real`, or the arm that the synthetic data is of; several arms joined by `+`.
    pub arm: String,
    /// [`Train::seed`].
    pub seed: u64,
    /// Real images learned from.
    pub real: usize,
    /// Synthetic images learned from.
    pub synthetic: usize,
    /// Accuracy of the kept checkpoint on the held-out real images, under attack or noise if trained so.
    pub held_out_accuracy: f64,
}

/// A network as it is trained, and without gradients to its parameters, as attacks see it.
struct Views<'a> {
    tracked: &'a (dyn Fn(&Tensor) -> Result<Tensor> + Sync),
    frozen: &'a (dyn Fn(&Tensor) -> Result<Tensor> + Sync),
}

impl Train {
    /// The attack that the checkpoint is chosen under.
    fn attack(&self) -> Result<Pgd> {
        Pgd::new(self.norm, self.epsilon, self.attack_steps, self.attack_step_ratio, 1, self.seed)
    }

    /// The attack of training step `step`, whose radius may still grow.
    fn attack_at(&self, step: usize) -> Result<Pgd> {
        let epsilon = self.epsilon.grown(step, self.epsilon_warmup_steps);
        let (steps, ratio) = match self.objective {
            Objective::FgsmRs => (1, 1.25),
            _ => (self.attack_steps, self.attack_step_ratio),
        };
        Pgd::new(self.norm, epsilon, steps, ratio, 1, self.seed)
    }

    /// The loss of each image of a batch.
    fn losses(&self, views: &Views, x: &Tensor, labels: &Tensor, ids: &[u64], step: usize) -> Result<Tensor> {
        let Views { tracked, frozen } = *views;
        let (beta, smoothing) = (self.beta, self.label_smoothing);
        let noisy = || augment_gaussian(x, self.sigma, self.seed, ids);
        match self.objective {
            Objective::Plain => plain(&tracked, x, labels, smoothing),
            Objective::PgdAt | Objective::FgsmRs => {
                pgd_at(&tracked, &frozen, x, labels, &self.attack_at(step)?, smoothing, ids)
            }
            Objective::Trades => {
                let near = trades_perturb(&frozen, x, &self.attack_at(step)?, ids)?;
                stable(&tracked, x, &near, labels, beta, smoothing)
            }
            Objective::Stability => stable(&tracked, x, &noisy()?, labels, beta, smoothing),
            Objective::Gaussian => plain(&tracked, &noisy()?, labels, smoothing),
        }
    }

    /// The accuracy on held-out images under what the objective guards against, and, if that is something, the
    /// accuracy on the images as they are.
    fn held_out_accuracies(
        &self,
        classifier: &Classifier,
        held_out: &Dataset,
        device: &Device,
    ) -> Result<(f64, Option<f64>)> {
        let logits_of = |x: &Tensor| classifier.logits(x);
        let attack = self.attack()?;
        let attacked = |x: &Tensor, y: &Tensor, ids: &[u64]| attack.perturb(&logits_of, x, y, ids);
        let noisy = |x: &Tensor, _: &Tensor, ids: &[u64]| augment_gaussian(x, self.sigma, self.seed, ids);
        let accuracy = |perturb: Option<Perturb>| -> Result<f64> {
            let right = correct_after(&logits_of, held_out, perturb, device, None, &Progress::hidden())?;
            Ok(right.iter().filter(|&&r| r).count() as f64 / right.len().max(1) as f64)
        };
        let clean = accuracy(None)?;
        let perturb: Perturb = match self.objective {
            objective if objective.is_attacked() => &attacked,
            objective if objective.is_noisy() => &noisy,
            _ => return Ok((clean, None)),
        };
        Ok((accuracy(Some(perturb))?, Some(clean)))
    }

    /// Synthetic images in a batch, when there is synthetic data.
    fn synthetic_in_batch(&self) -> usize {
        (self.batch as f64 * self.synthetic_fraction).round() as usize
    }

    /// The synthetic data sets, each with the name of its arm. They must look like the real data.
    fn synthetic(&self, real: &Dataset) -> Result<Vec<(Dataset, String)>> {
        let one = |dir: &PathBuf| {
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
        let (in_channels, image_size) = (real.shape.channels, real.shape.height);
        let num_classes = real.class_names.len();
        let standardize = self.standardize.then(|| standardization(real));
        let channels = |default: &[usize]| {
            if self.channels.is_empty() { default.to_vec() } else { self.channels.clone() }
        };
        match self.architecture {
            ArchitectureKind::SmallCnn => Architecture::SmallCnn(SmallCnnConfig {
                in_channels,
                image_size,
                channels: channels(&SMALL_CNN_CHANNELS),
                num_classes,
                groups: self.groups,
            }),
            ArchitectureKind::Resnet => {
                let resnet18 = ResNetConfig::resnet18(in_channels, image_size, num_classes);
                let widths = channels(&resnet18.widths);
                let blocks = if self.blocks.is_empty() { vec![2; widths.len()] } else { self.blocks.clone() };
                Architecture::Resnet(ResNetConfig { widths, blocks, standardize, ..resnet18 })
            }
            ArchitectureKind::WideResnet => Architecture::WideResnet(WideResNetConfig {
                in_channels,
                image_size,
                num_classes,
                depth: self.depth,
                width: self.width,
                activation: self.activation,
                layout: match self.activation {
                    Activation::Relu => WideResNetLayout::Trades,
                    Activation::Silu => WideResNetLayout::Deepmind,
                },
                standardize,
            }),
        }
    }

    /// Optimiser steps for so many real images.
    fn steps_for(&self, real: usize) -> usize {
        match self.epochs {
            None => self.steps,
            Some(epochs) => ((epochs * real as f64 / self.batch as f64).ceil() as usize).max(1),
        }
    }
}

const SMALL_CNN_CHANNELS: [usize; 3] = [32, 64, 64];

/// Mean and standard deviation of each channel of all pixels, in [0, 1]. A channel that is the same everywhere is not
/// scaled.
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

/// A materialize stage's folder holds its data set in `dataset`; others are the data set.
pub(super) fn dataset_folder(dir: &Path) -> PathBuf {
    let inner = dir.join("dataset");
    if inner.is_dir() { inner } else { dir.to_path_buf() }
}

impl Stage for Train {
    const NAME: &'static str = "train";
    const INPUTS: &'static [&'static str] = &["split", "data"];

    fn validate(&self) -> Result<()> {
        expect("gamma", self.gamma, 0.0, 1.0)?;
        expect("synthetic_fraction", self.synthetic_fraction, 0.0, 1.0)?;
        expect("beta", self.beta, 0.0, 1e6)?;
        expect("label_smoothing", self.label_smoothing, 0.0, 0.999)?;
        expect("sigma", self.sigma, 0.0, 1e3)?;
        match self.architecture {
            ArchitectureKind::SmallCnn => {
                let channels =
                    if self.channels.is_empty() { &SMALL_CNN_CHANNELS } else { &self.channels[..] };
                expect_channels(channels, self.groups)?;
                if self.standardize {
                    bail!(Usage, "standardize is true, expected false: small-cnn takes images as they are");
                }
            }
            ArchitectureKind::Resnet if self.channels.contains(&0) || self.blocks.contains(&0) => {
                bail!(
                    Usage,
                    "channels is {:?} and blocks {:?}, expected positive numbers",
                    self.channels,
                    self.blocks
                );
            }
            ArchitectureKind::Resnet => {
                let stages = if self.channels.is_empty() { 4 } else { self.channels.len() };
                if !self.blocks.is_empty() && self.blocks.len() != stages {
                    bail!(
                        Usage,
                        "blocks is {:?}, expected a number for each of {stages} stages",
                        self.blocks
                    );
                }
            }
            ArchitectureKind::WideResnet => {
                if self.depth < 10 || !(self.depth - 4).is_multiple_of(6) {
                    bail!(Usage, "depth is {}, expected 10, 16, 22, 28, 34, …", self.depth);
                }
                expect("width", self.width, 1, 1024)?;
            }
        }
        let wide = self.architecture == ArchitectureKind::WideResnet;
        let given = |key: &str, given: bool, of: &str| match given {
            true => bail!(Usage, "{key} is set, which only {of} has; expected it left out"),
            false => Ok(()),
        };
        given("channels", wide && !self.channels.is_empty(), "small-cnn or resnet")?;
        let resnet = self.architecture == ArchitectureKind::Resnet;
        given("blocks", !resnet && !self.blocks.is_empty(), "resnet")?;
        let default = Self::default();
        given("depth", !wide && self.depth != default.depth, "wide-resnet")?;
        given("width", !wide && self.width != default.width, "wide-resnet")?;
        given("activation", !wide && self.activation != default.activation, "wide-resnet")?;
        expect("steps", self.steps, 1, 100_000_000)?;
        if let Some(epochs) = self.epochs {
            expect("epochs", epochs, 1e-6, 1e9)?;
        }
        expect("batch", self.batch, 2, 1 << 20)?;
        expect("learning_rate", self.learning_rate, 1e-12, 1e3)?;
        expect("momentum", self.momentum, 0.0, 1.0)?;
        expect("weight_decay", self.weight_decay, 0.0, 1.0)?;
        expect("ema_decay", self.ema_decay, 0.0, 0.999_999)?;
        expect("grad_clip", self.grad_clip, 1e-6, 1e9)?;
        expect("held_out", self.held_out, 0.001, 0.9)?;
        expect("eval_every", self.eval_every, 1, usize::MAX)?;
        let weights = &self.data_weights;
        if !weights.is_empty()
            && (weights.len() != self.data.len() || weights.iter().any(|&w| w.is_nan() || w <= 0.0))
        {
            bail!(
                Usage,
                "data_weights is {weights:?}, expected a number above 0 for each of {} sources",
                self.data.len()
            );
        }
        let n_syn = self.synthetic_in_batch();
        if n_syn == 0 && !self.data.is_empty() {
            bail!(
                Usage,
                "synthetic_fraction is {}, none of a batch of {}; expected at least one place for the synthetic data",
                self.synthetic_fraction,
                self.batch
            );
        }
        GammaMix::new(self.gamma, self.batch - n_syn, n_syn)?;
        self.attack().map(drop)
    }

    fn amount(&self) -> String {
        let objective = match self.objective {
            Objective::Plain => "plain".into(),
            Objective::PgdAt => format!("PGD-{} at {} {}", self.attack_steps, self.norm, self.epsilon),
            Objective::FgsmRs => format!("FGSM from random starts at {} {}", self.norm, self.epsilon),
            Objective::Trades => {
                format!("TRADES-{} at {} {}, beta {}", self.attack_steps, self.norm, self.epsilon, self.beta)
            }
            Objective::Stability => format!("stability at sigma {}, beta {}", self.sigma, self.beta),
            Objective::Gaussian => format!("Gaussian noise of sigma {}", self.sigma),
        };
        let data = if self.data.is_empty() { "real" } else { "real and synthetic" };
        let length = self.epochs.map_or_else(|| format!("{} steps", self.steps), |e| format!("{e} epochs"));
        format!("{length} of {} {data} images, {objective}", self.batch)
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let real = Real::load(&finished_input::<Split>("split", self.split.as_deref())?)?;
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

        let (out, _lock) = job.open("run")?;
        let optimizer =
            Sgd::new(SgdConfig { momentum: self.momentum, nesterov: true, weight_decay: self.weight_decay });
        let checkpoint = job.hidden(out, "checkpoint");
        let mut trainer =
            Trainer::resume(checkpoint, classifier.params(), Box::new(optimizer), self.ema_decay)?;
        if batch_norm {
            trainer = trainer.whole();
        }
        let steps = self.steps_for(train.len());
        let lr = LrSchedule {
            peak: self.learning_rate,
            warmup_steps: self.warmup_steps.min(steps / 2),
            total_steps: steps,
            decay: match self.schedule {
                Schedule::Cosine => LrDecay::Cosine { min: 0.01 * self.learning_rate },
                Schedule::OneCycle => LrDecay::OneCycle,
                Schedule::Constant => LrDecay::Constant,
            },
        };
        let settings = Augment { pad: self.crop_pad, flip: self.flip };
        let attack_mode = self.attack_batch_norm.into();
        let tracked = |x: &Tensor| network.logits_by(x, BatchNormMode::Train);
        let frozen = |x: &Tensor| classifier.logits_by(x, attack_mode);
        let views = Views { tracked: &tracked, frozen: &frozen };

        let bar = Progress::new(Self::NAME, steps as u64, "steps");
        bar.skip(trainer.step() as u64);
        while trainer.step() < steps {
            let step = trainer.step();
            let contribution = |slots: std::ops::Range<usize>| -> Result<Part> {
                let (mut pixels, mut labels, mut ids, mut weights) =
                    (Vec::new(), Vec::new(), Vec::new(), Vec::new());
                for draw in slots.map(|slot| mix.at(step, slot)) {
                    pixels.extend_from_slice(draw.pixels);
                    labels.push(draw.label);
                    ids.push(draw.id);
                    weights.push(if draw.real { weight.real } else { weight.synthetic } as f32);
                }
                let range = Range::Unit;
                let x = augmented(&pixels, train.shape, &ids, self.seed, settings, range, &job.device)?;
                let y = Tensor::new(labels, &job.device)?;
                let losses = self.losses(&views, &x, &y, &ids, step)?;
                Ok(Part::from((losses * Tensor::new(weights, &job.device)?)?.sum_all()?))
            };
            trainer.advance(lr.at(step), Some(self.grad_clip), self.batch, &contribution)?;
            if trainer.step().is_multiple_of(self.eval_every) || trainer.step() == steps {
                let mut clean = None;
                let accuracy = trainer.consider(averaged.params(), || {
                    let (standing, unharmed) = self.held_out_accuracies(&averaged, &held_out, &job.device)?;
                    clean = unharmed;
                    Ok(standing)
                })?;
                let mut line = json!({ "held_out_accuracy": accuracy, "learning_rate": lr.at(step) });
                if let Some(clean) = clean {
                    line["held_out_clean_accuracy"] = clean.into();
                }
                trainer.log(line);
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
            curve("held out, as trained against", "held_out_accuracy"),
            curve("held out, clean", "held_out_clean_accuracy"),
            curve("training loss", "loss"),
        ];
        let svg = plot::lines("Training", "step", "accuracy, loss in nats", &curves)?;
        fs::publish(&out.join("curves.svg"), svg.as_bytes())?;
        let record = TrainRecord {
            schema: "proxyset.train/1".into(),
            arm: if synthetic.is_empty() {
                "real".into()
            } else {
                synthetic.iter().map(|(_, arm)| arm.as_str()).collect::<Vec<_>>().join("+")
            },
            seed: self.seed,
            real: train.len(),
            synthetic: synthetic.iter().map(|(data, _)| data.len()).sum(),
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
