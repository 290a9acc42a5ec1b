//! Fit-generator: a diffusion model of the real images.

use std::path::PathBuf;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    Job, Outcome, Split, Stage, expect, finished_input, generate::noise_tensor, note, split::Real,
    trainer::Trainer,
};
use crate::{
    Result,
    data::{Augment, Range, Shape, augment, to_tensor},
    diffusion::{BetaSchedule, DiffusionModel, SchedulerConfig, eps_mse},
    fs,
    nn::{
        LrDecay, LrSchedule, SampleSize, UNetConfig,
        optim::{Adam, AdamConfig},
    },
    progress::Progress,
    rng::{self, Permutation, stream},
};

/// Trains a denoising diffusion model (Ho et al. 2020, Alg. 1) on the `fit` images.
///
/// The output folder is a `diffusers` model folder with the moving average of the weights.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FitGenerator {
    /// The folder of a finished split: the real data.
    #[arg(long)]
    pub split: Option<PathBuf>,
    /// Condition on the class by an embedding.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub conditional: bool,
    /// Channels of each level of the U-Net; each level after the first halves the image.
    #[arg(long, value_delimiter = ',', default_values_t = [32, 64])]
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of each level on the way down; one more on the way up.
    #[arg(long, default_value_t = 1)]
    pub layers_per_block: usize,
    /// The levels, from 0, that have attention; the middle always has.
    #[arg(long, value_delimiter = ',')]
    pub attention_levels: Vec<usize>,
    /// Channels of an attention head.
    #[arg(long, default_value_t = 32)]
    pub attention_head_dim: usize,
    /// Groups of the norms.
    #[arg(long, default_value_t = 8)]
    pub norm_num_groups: usize,
    /// Diffusion steps T.
    #[arg(long, default_value_t = 1000)]
    pub num_train_timesteps: usize,
    /// The noise schedule.
    #[arg(long, value_enum, default_value_t = BetaSchedule::Linear)]
    pub beta_schedule: BetaSchedule,
    /// Optimiser steps. Ho et al. (Appendix B) train 800,000 for CIFAR-10.
    #[arg(long, default_value_t = 10_000)]
    pub steps: usize,
    /// Images per step.
    #[arg(long, default_value_t = 128)]
    pub batch: usize,
    /// Learning rate of Adam (Ho et al. 2020, Appendix B).
    #[arg(long, default_value_t = 2e-4)]
    pub learning_rate: f64,
    /// Steps of linear warm-up (Ho et al.'s code: 5000).
    #[arg(long, default_value_t = 500)]
    pub warmup_steps: usize,
    /// Largest norm of the gradient; larger ones are scaled down.
    #[arg(long, default_value_t = 1.0)]
    pub grad_clip: f64,
    /// Decay of the moving average of the weights.
    #[arg(long, default_value_t = 0.999)]
    pub ema_decay: f64,
    /// Let the learning rate fall to zero along a cosine; short trainings gain by it. Ho et al. keep it constant.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub cosine: bool,
    /// Mirror half of the images. Wrong for digits.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub flip: bool,
    /// Seed of initial weights, order, timesteps and noise.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// `proxyset.json` of a generator's folder: what `diffusers`' files do not say.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GeneratorInfo {
    /// `proxyset.generator/1`.
    pub schema: String,
    /// The names of the classes that the model is, or is not, conditioned on.
    pub class_names: Vec<String>,
    /// The size of its images.
    pub shape: Shape,
    /// What it was trained on.
    pub trained_on: String,
    /// BLAKE3 of those files.
    pub trained_on_fingerprint: String,
    /// Optimiser steps and images per step.
    pub steps: usize,
    /// Images per step.
    pub batch: usize,
}

impl GeneratorInfo {
    /// The file's name.
    pub(super) const FILE: &'static str = "proxyset.json";
}

impl FitGenerator {
    fn unet(&self, shape: Shape, classes: usize) -> Result<UNetConfig> {
        let levels = self.block_out_channels.len();
        if shape.height != shape.width || !shape.height.is_multiple_of(1 << (levels - 1)) {
            bail!(
                Usage,
                "block_out_channels has {levels} levels, expected square images whose side {} divides; found {shape}",
                1 << (levels - 1)
            );
        }
        let block = |level: usize, way: &str| {
            let attention = if self.attention_levels.contains(&level) { "Attn" } else { "" };
            format!("{attention}{way}Block2D")
        };
        Ok(UNetConfig {
            sample_size: Some(SampleSize::Square(shape.height)),
            in_channels: shape.channels,
            out_channels: shape.channels,
            down_block_types: (0..levels).map(|level| block(level, "Down")).collect(),
            up_block_types: (0..levels).rev().map(|level| block(level, "Up")).collect(),
            block_out_channels: self.block_out_channels.clone(),
            layers_per_block: self.layers_per_block,
            attention_head_dim: Some(self.attention_head_dim),
            norm_num_groups: self.norm_num_groups,
            num_class_embeds: self.conditional.then_some(classes),
            num_train_timesteps: Some(self.num_train_timesteps),
            ..UNetConfig::default()
        })
    }
}

impl Stage for FitGenerator {
    const NAME: &'static str = "fit-generator";
    const INPUTS: &'static [&'static str] = &["split"];

    fn validate(&self) -> Result<()> {
        expect("levels of block_out_channels", self.block_out_channels.len(), 1, 6)?;
        expect("layers_per_block", self.layers_per_block, 1, 16)?;
        expect("norm_num_groups", self.norm_num_groups, 1, 1024)?;
        expect("attention_head_dim", self.attention_head_dim, 1, 4096)?;
        if let Some(c) =
            self.block_out_channels.iter().find(|c| **c == 0 || !c.is_multiple_of(self.norm_num_groups))
        {
            bail!(
                Usage,
                "block_out_channels has {c}, expected multiples of norm_num_groups = {}",
                self.norm_num_groups
            );
        }
        if let Some(level) = self.attention_levels.iter().find(|l| **l >= self.block_out_channels.len()) {
            bail!(Usage, "attention_levels has {level}, expected 0 to {}", self.block_out_channels.len() - 1);
        }
        expect("num_train_timesteps", self.num_train_timesteps, 2, 100_000)?;
        expect("steps", self.steps, 1, 100_000_000)?;
        expect("batch", self.batch, 1, 1 << 20)?;
        expect("learning_rate", self.learning_rate, 1e-12, 1e3)?;
        expect("grad_clip", self.grad_clip, 1e-6, 1e9)?;
        expect("ema_decay", self.ema_decay, 0.0, 0.999_999)
    }

    fn amount(&self) -> String {
        format!("{} steps of {} images, U-Net {:?}", self.steps, self.batch, self.block_out_channels)
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let real = Real::load(&finished_input::<Split>("split", self.split.as_deref())?)?;
        let fit = real.fit();
        let shape = fit.shape;
        let config = self.unet(shape, fit.class_names.len())?;
        config.validate()?;
        let scheduler = SchedulerConfig {
            num_train_timesteps: self.num_train_timesteps,
            beta_schedule: self.beta_schedule,
            ..SchedulerConfig::default()
        };
        let schedule = scheduler.schedule()?;
        let model = DiffusionModel::init(config.clone(), scheduler.clone(), self.seed, &job.device)?;
        let averaged = DiffusionModel::init(config, scheduler, self.seed, &job.device)?;
        let network = model.tracked()?;

        let (out, _lock) = job.open("run")?;
        let optimizer = Box::new(Adam::new(AdamConfig::default()));
        let mut trainer =
            Trainer::resume(job.hidden(out, "checkpoint"), model.params(), optimizer, self.ema_decay)?;
        let lr = LrSchedule {
            peak: self.learning_rate,
            warmup_steps: self.warmup_steps,
            total_steps: self.steps,
            decay: if self.cosine { LrDecay::Cosine { min: 0.0 } } else { LrDecay::Constant },
        };
        let log_every = (self.steps / 100).max(1);
        let settings = Augment { pad: 0, flip: self.flip };
        let bar = Progress::new(Self::NAME, self.steps as u64, "steps");
        bar.skip(trainer.step() as u64);
        while trainer.step() < self.steps {
            let step = trainer.step();
            let contribution = |slots: std::ops::Range<usize>| -> Result<Tensor> {
                let n = slots.len();
                let (mut pixels, mut classes, mut t) = (Vec::new(), Vec::new(), Vec::new());
                let draws: Vec<u64> = slots.map(|slot| (step * self.batch + slot) as u64).collect();
                for &draw in &draws {
                    let len = fit.len() as u64;
                    let image = Permutation::new(self.seed, draw / len, len).at(draw % len) as usize;
                    pixels.extend_from_slice(fit.image(image));
                    classes.push(fit.labels[image]);
                    t.push(
                        (rng::uint(self.seed, draw, stream::TIMESTEP) % self.num_train_timesteps as u64)
                            as u32,
                    );
                }
                let pixels = augment(&pixels, shape, &draws, self.seed, stream::AUGMENT, settings);
                let x = to_tensor(&pixels, shape, Range::Signed, &job.device)?;
                let noise = noise_tensor(self.seed, &draws, stream::TRAIN_NOISE, shape, &job.device)?;
                let classes =
                    if self.conditional { Some(Tensor::from_vec(classes, n, &job.device)?) } else { None };
                let loss =
                    eps_mse(&schedule, &x, &t, &noise, &|x, t| network.forward(x, t, classes.as_ref()))?;
                Ok((loss * (n as f64 / self.batch as f64))?)
            };
            trainer.advance(lr.at(step), Some(self.grad_clip), self.batch, &contribution)?;
            if trainer.step().is_multiple_of(log_every) {
                trainer.log(json!({ "learning_rate": lr.at(step) }));
            }
            bar.add(1);
            trainer.end_step()?;
        }
        trainer.load_average(averaged.params())?;
        let info = GeneratorInfo {
            schema: "proxyset.generator/1".into(),
            class_names: fit.class_names.clone(),
            shape,
            trained_on: real.parts.source.to_string(),
            trained_on_fingerprint: real.parts.source_fingerprint.clone(),
            steps: self.steps,
            batch: self.batch,
        };
        let summary = json!({
            "parameters": averaged.params().count(),
            "macs": averaged.config().macs(shape.height, shape.width)?,
            "trained_on": fit.len(),
            "last": trainer.log_lines().last(),
        });
        fs::publish(&out.join("README.md"), self.card(&info, &summary).as_bytes())?;
        fs::publish(&out.join("metrics.jsonl"), trainer.log_text().as_bytes())?;
        fs::publish_json(&out.join(GeneratorInfo::FILE), &info)?;
        averaged.save(out)?;
        note(self, &format!("last loss {}", summary["last"]["loss"]));
        Ok(Outcome::Done(summary))
    }
}

impl FitGenerator {
    /// The model card.
    fn card(&self, info: &GeneratorInfo, summary: &serde_json::Value) -> String {
        let conditional = if self.conditional { "class-conditional " } else { "" };
        format!(
            "---\nlicense: other\nlibrary_name: diffusers\ntags: [diffusion, ddpm, proxyset]\n---\n\n\
             # A {conditional}DDPM of {shape} images\n\n\
             Trained by `proxyset fit-generator` (version {version}) on {n} images of `{source}` \
             (BLAKE3 `{hash}`), {classes} classes: {names}.\n\n\
             | | |\n|---|---|\n\
             | network | `UNet2DModel`, channels {channels:?}, {parameters} parameters, {macs} multiply-adds per image and step |\n\
             | process | T = {t}, {beta:?} β, ε-prediction |\n\
             | training | {steps} steps of {batch} images, Adam {lr}, moving average {ema}, seed {seed} |\n\
             | last loss | {loss} |\n\n\
             The folder opens in `diffusers`; `proxyset generate --model` samples it. Pixels are in [-1, 1].\n\
             The licence of the training data applies to what is made from it.\n",
            shape = info.shape,
            version = env!("CARGO_PKG_VERSION"),
            n = summary["trained_on"],
            source = info.trained_on,
            hash = &info.trained_on_fingerprint[..16],
            classes = info.class_names.len(),
            names = info.class_names.join(", "),
            channels = self.block_out_channels,
            parameters = summary["parameters"],
            macs = summary["macs"],
            t = self.num_train_timesteps,
            beta = self.beta_schedule,
            steps = self.steps,
            batch = self.batch,
            lr = self.learning_rate,
            ema = self.ema_decay,
            seed = self.seed,
            loss = summary["last"]["loss"],
        )
    }
}
