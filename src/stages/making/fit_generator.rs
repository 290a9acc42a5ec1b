//! Fit-generator: a diffusion model of the real images.

use std::path::PathBuf;

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    Result,
    data::{Augment, Dataset, Range, Shape, augmented, encode_png, gaussian_noise, grid, to_tensor, to_u8},
    diffusion::{
        BetaSchedule, Conditioning, DiffusionModel, Level, PredictionType, Process, SchedulerClass,
        SchedulerConfig, TrainingPair, VarianceType, denoising_loss,
        sampler::{Plan, SamplerConfig, SamplerKind, Start, sample},
    },
    error::expect_within as expect,
    fs,
    nn::{
        DenoiserConfig, LrDecay, LrSchedule, SampleSize, UNetConfig,
        optim::{Adam, AdamConfig},
    },
    progress::Progress,
    rng::{self, Permutation, stream},
    stage::{Input, Job, Outcome, Stage, note},
    tables::{
        division::{Real, SPLIT},
        records::GeneratorInfo,
    },
    training::{Part, Trainer},
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
    /// The part of the training images that is shown without its class, for guidance when sampling (Ho & Salimans
    /// 2022 take 0.1 to 0.2).
    #[arg(long, default_value_t = 0.0)]
    pub null_class_probability: f64,
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
    /// Let step and class scale and shift the features, instead of adding to them (Dhariwal & Nichol 2021, §3).
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub scale_shift: bool,
    /// The part of the features that residual blocks leave out while training (Ho et al. 2020: 0.1 for CIFAR-10).
    #[arg(long, default_value_t = 0.0)]
    pub dropout: f64,
    /// What the network predicts.
    #[arg(long, value_enum, default_value_t = Parametrization::Epsilon)]
    pub prediction: Parametrization,
    /// Diffusion steps T; of no effect with edm.
    #[arg(long, default_value_t = 1000)]
    pub num_train_timesteps: usize,
    /// The noise schedule; of no effect with edm.
    #[arg(long, value_enum, default_value_t = BetaSchedule::Linear)]
    pub beta_schedule: BetaSchedule,
    /// The noise that ancestral sampling is to add (Ho et al. 2020, §3.2); of no effect with edm.
    #[arg(long, value_enum, default_value_t = VarianceType::FixedSmall)]
    pub variance: VarianceType,
    /// Optimiser steps. Ho et al. (Appendix B) train 800,000 for CIFAR-10.
    #[arg(long, default_value_t = 10_000)]
    pub steps: usize,
    /// Images per step.
    #[arg(long, default_value_t = 128)]
    pub batch: usize,
    /// Rounds in which the gradients of a step are computed: more of them need less memory.
    #[arg(long, default_value_t = 1)]
    pub accumulate: usize,
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
    /// Steps between validations: the loss of the moving average on images that are not learned from. 0 for none.
    #[arg(long, default_value_t = 1000)]
    pub validate_every: usize,
    /// Steps between sheets of samples of the moving average, in `samples/`. 0 for none.
    #[arg(long, default_value_t = 1000)]
    pub sample_every: usize,
    /// Seed of initial weights, order, timesteps and noise.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// What the network predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Parametrization {
    /// The noise (Ho et al. 2020).
    Epsilon,
    /// The image.
    Sample,
    /// A mixture of both (Salimans & Ho 2022).
    VPrediction,
    /// EDM's mixture, for any σ from 0.002 to 80 (Karras et al. 2022), with data of standard deviation 0.5.
    Edm,
}

impl FitGenerator {
    /// The network for images of this shape and number of classes.
    fn denoiser(&self, shape: Shape, classes: usize) -> Result<DenoiserConfig> {
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
        Ok(DenoiserConfig::UNet(UNetConfig {
            sample_size: Some(SampleSize::Square(shape.height)),
            in_channels: shape.channels,
            out_channels: shape.channels,
            down_block_types: (0..levels).map(|level| block(level, "Down")).collect(),
            up_block_types: (0..levels).rev().map(|level| block(level, "Up")).collect(),
            block_out_channels: self.block_out_channels.clone(),
            layers_per_block: self.layers_per_block,
            attention_head_dim: Some(self.attention_head_dim),
            norm_num_groups: self.norm_num_groups,
            num_class_embeds: self
                .conditional
                .then_some(classes + usize::from(self.null_class_probability > 0.0)),
            num_train_timesteps: Some(self.num_train_timesteps),
            dropout: self.dropout,
            resnet_time_scale_shift: if self.scale_shift { "scale_shift" } else { "default" }.into(),
            ..UNetConfig::default()
        }))
    }
}

impl FitGenerator {
    fn scheduler(&self) -> SchedulerConfig {
        let prediction_type = match self.prediction {
            Parametrization::Epsilon | Parametrization::Edm => PredictionType::Epsilon,
            Parametrization::Sample => PredictionType::Sample,
            Parametrization::VPrediction => PredictionType::VPrediction,
        };
        let class = match self.prediction {
            Parametrization::Edm => SchedulerClass::EDMEulerScheduler,
            _ => SchedulerClass::DDPMScheduler,
        };
        SchedulerConfig {
            num_train_timesteps: self.num_train_timesteps,
            beta_schedule: self.beta_schedule,
            variance_type: self.variance,
            prediction_type,
            ..class.defaults()
        }
    }

    /// The classes as the network is told them: of some draws none, `null`.
    fn shown(&self, classes: &mut [u32], draws: &[u64], null: Option<u32>) {
        let Some(null) = null else { return };
        for (class, &draw) in classes.iter_mut().zip(draws) {
            let mut uniform = [0f32];
            rng::uniforms(self.seed, draw, stream::NULL_CLASS, &mut uniform);
            if f64::from(uniform[0]) < self.null_class_probability {
                *class = null;
            }
        }
    }

    /// The noise level and the noise of draws.
    fn noise(
        &self,
        process: &Process,
        draws: &[u64],
        shape: Shape,
        device: &Device,
    ) -> Result<(Vec<Level>, Tensor)> {
        let level = |&draw: &u64| {
            let mut normal = [0f32];
            rng::normals(self.seed, draw, stream::LEVEL, &mut normal);
            process.training_level(rng::uint(self.seed, draw, stream::TIMESTEP), normal[0])
        };
        Ok((
            draws.iter().map(level).collect(),
            gaussian_noise(self.seed, draws, stream::TRAIN_NOISE, shape, device)?,
        ))
    }

    /// The mean loss of a model on images that it did not learn from, at the same noise each time.
    fn validate_on(
        &self,
        model: &DiffusionModel,
        process: &Process,
        unseen: &Dataset,
        device: &Device,
    ) -> Result<f64> {
        let images: Vec<usize> = (0..unseen.len().min(VALIDATED)).collect();
        let of_chunk = |chunk: &[usize]| -> Result<f64> {
            let (mut pixels, mut classes) = (Vec::new(), Vec::new());
            for &image in chunk {
                pixels.extend_from_slice(unseen.image(image));
                classes.push(unseen.labels[image]);
            }
            let x = to_tensor(&pixels, unseen.shape, Range::Signed, device)?;
            let draws: Vec<u64> = chunk.iter().map(|&image| VALIDATION | image as u64).collect();
            let (levels, noise) = self.noise(process, &draws, unseen.shape, device)?;
            let classes = Tensor::from_vec(classes, chunk.len(), device)?;
            let pair = TrainingPair::new(model.prediction(), &x, &levels, &noise)?;
            let losses = denoising_loss(&pair, &|x, t| {
                model.predict_each(x, t, self.conditional.then_some(&classes))
            })?;
            Ok(losses.to_vec1::<f32>()?.into_iter().map(f64::from).sum())
        };
        let sums = images.par_chunks(64).map(of_chunk).collect::<Result<Vec<f64>>>()?;
        Ok(sums.into_iter().sum::<f64>() / images.len().max(1) as f64)
    }

    /// A sheet of samples, a column for each of the first 20 classes; the same noise each time.
    fn sheet(
        &self,
        model: &DiffusionModel,
        process: &Process,
        shape: Shape,
        classes: u32,
        device: &Device,
    ) -> Result<Vec<u8>> {
        let config = SamplerConfig {
            kind: SamplerKind::Ddim,
            steps: SHEET_STEPS.min(self.num_train_timesteps),
            ..model.scheduler().sampler()
        };
        let plan = Plan::new(&config, process)?;
        let columns = if self.conditional { classes.clamp(1, 20) as usize } else { 8 };
        let rows = 8;
        let row = |row: usize| -> Result<Vec<u8>> {
            let ids: Vec<u64> = (0..columns).map(|column| (row * columns + column) as u64).collect();
            let noise = gaussian_noise(self.seed, &ids, stream::INITIAL, shape, device)?;
            let conditioning = if self.conditional {
                Conditioning::Classes(Tensor::new((0..columns as u32).collect::<Vec<_>>(), device)?)
            } else {
                Conditioning::None
            };
            let images = sample(
                &config,
                &plan,
                Start::Noise(noise),
                &mut |x, level| model.denoise(x, level, &conditioning),
                &mut |_| bail!(Alarm, "a sampler without noise asked for some"),
                &mut |_, _| Ok(()),
            )?;
            to_u8(&images, Range::Signed)
        };
        let pixels = (0..rows).into_par_iter().map(row).collect::<Result<Vec<_>>>()?.concat();
        let images: Vec<Option<&[u8]>> = pixels.chunks_exact(shape.size()).map(Some).collect();
        let scale = (64 / shape.width).max(1);
        let (sheet, pixels) = grid(&images, columns, shape, scale, 2);
        Ok(encode_png(&pixels, sheet))
    }
}

/// Images of a validation.
const VALIDATED: usize = 512;

/// A bit that no draw in training has.
const VALIDATION: u64 = 1 << 62;

/// Steps of the samples on a sheet.
const SHEET_STEPS: usize = 20;

/// Into how many ranges of equally many draws the noise is cut for the log.
const NOISE_RANGES: usize = 4;

impl Stage for FitGenerator {
    const NAME: &'static str = "fit-generator";
    const ABOUT: &'static str = "Train a diffusion model.";
    const INPUTS: &'static [Input] = &[SPLIT];

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
        expect("null_class_probability", self.null_class_probability, 0.0, 0.999)?;
        if self.null_class_probability > 0.0 && !self.conditional {
            bail!(
                Usage,
                "null_class_probability is {} for a model without classes, expected 0",
                self.null_class_probability
            );
        }
        expect("dropout", self.dropout, 0.0, 0.999)?;
        expect("num_train_timesteps", self.num_train_timesteps, 2, 100_000)?;
        expect("steps", self.steps, 1, 100_000_000)?;
        expect("batch", self.batch, 1, 1 << 20)?;
        expect("accumulate", self.accumulate, 1, self.batch)?;
        if let Err(error) = self.scheduler().process() {
            bail!(Usage, "num_train_timesteps is {}: {error}", self.num_train_timesteps);
        }
        expect("learning_rate", self.learning_rate, 1e-12, 1e3)?;
        expect("grad_clip", self.grad_clip, 1e-6, 1e9)?;
        expect("ema_decay", self.ema_decay, 0.0, 0.999_999)
    }

    fn amount(&self) -> String {
        format!("{} steps of {} images, U-Net {:?}", self.steps, self.batch, self.block_out_channels)
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let real = Real::load(&SPLIT.finished(self.split.as_deref())?)?;
        let fit = real.fit();
        let config = self.denoiser(fit.shape, fit.class_names.len())?;
        self.train(job, &real, &fit, config)
    }
}

impl FitGenerator {
    fn train(&self, job: &Job, real: &Real, fit: &Dataset, config: DenoiserConfig) -> Result<Outcome> {
        let shape = fit.shape;
        let scheduler = self.scheduler();
        let process = scheduler.process()?;
        let classes = fit.class_names.len() as u32;
        let null_class = (self.null_class_probability > 0.0).then_some(classes);
        let unseen = real.proxy();
        let model = DiffusionModel::init(config.clone(), scheduler.clone(), self.seed, &job.device)?;
        let averaged = DiffusionModel::init(config, scheduler, self.seed, &job.device)?;
        let network = model.tracked()?;

        let out = job.open()?;
        let optimizer = Box::new(Adam::new(AdamConfig::default()));
        let mut trainer =
            Trainer::resume(job.hidden(out, "checkpoint"), model.params(), optimizer, self.ema_decay)?
                .accumulating(self.accumulate);
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
            let contribution = |slots: std::ops::Range<usize>| -> Result<Part> {
                let n = slots.len();
                let (mut pixels, mut classes) = (Vec::new(), Vec::new());
                let draws: Vec<u64> = slots.map(|slot| (step * self.batch + slot) as u64).collect();
                for &draw in &draws {
                    let len = fit.len() as u64;
                    let image = Permutation::new(self.seed, draw / len, len).at(draw % len) as usize;
                    pixels.extend_from_slice(fit.image(image));
                    classes.push(fit.labels[image]);
                }
                self.shown(&mut classes, &draws, null_class);
                let range = Range::Signed;
                let x = augmented(&pixels, shape, &draws, self.seed, settings, range, &job.device)?;
                let (levels, noise) = self.noise(&process, &draws, shape, &job.device)?;
                let classes =
                    if self.conditional { Some(Tensor::from_vec(classes, n, &job.device)?) } else { None };
                let pair = TrainingPair::new(model.prediction(), &x, &levels, &noise)?;
                let losses = denoising_loss(&pair, &|x, t| {
                    network.forward_in_training(x, t, classes.as_ref(), (self.seed, &draws))
                })?;
                let mut by_noise = vec![(0.0, 0); NOISE_RANGES];
                for (&level, loss) in levels.iter().zip(losses.to_vec1::<f32>()?) {
                    let range = (process.rank(level) * NOISE_RANGES as f64) as usize;
                    let (sum, n) = &mut by_noise[range.min(NOISE_RANGES - 1)];
                    (*sum, *n) = (*sum + f64::from(loss), *n + 1);
                }
                Ok(Part { loss: (losses.sum_all()? / self.batch as f64)?, by_noise })
            };
            trainer.advance(lr.at(step), Some(self.grad_clip), self.batch, &contribution)?;
            let done = trainer.step();
            let due = |every: usize| every > 0 && (done.is_multiple_of(every) || done == self.steps);
            let (validate, sheet) = (due(self.validate_every), due(self.sample_every));
            if validate || sheet {
                trainer.load_average(averaged.params())?;
            }
            if sheet {
                let png = self.sheet(&averaged, &process, shape, classes, &job.device)?;
                fs::publish(&out.join(format!("samples/step-{done:07}.png")), &png)?;
            }
            if validate || done.is_multiple_of(log_every) {
                let mut line = json!({ "learning_rate": lr.at(step) });
                if validate {
                    line["validation_loss"] =
                        self.validate_on(&averaged, &process, &unseen, &job.device)?.into();
                }
                trainer.log(line);
            }
            bar.add(1);
            trainer.end_step()?;
        }
        trainer.load_average(averaged.params())?;
        let info = GeneratorInfo {
            schema: "proxyset.generator/1".into(),
            class_names: fit.class_names.clone(),
            null_class,
            shape,
            trained_on: real.division.source.to_string(),
            trained_on_fingerprint: real.division.source_fingerprint.clone(),
            steps: self.steps,
            batch: self.batch,
        };
        let summary = json!({
            "parameters": averaged.params().count(),
            "macs": averaged.config().macs()?,
            "trained_on": fit.len(),
            "last": trainer.log_lines().last(),
        });
        fs::publish(&out.join("README.md"), self.card(&info, averaged.config(), &summary).as_bytes())?;
        fs::publish(&out.join("metrics.jsonl"), trainer.log_text().as_bytes())?;
        fs::publish_json(&out.join(GeneratorInfo::FILE), &info)?;
        averaged.save(out)?;
        note(self, &format!("last loss {}", summary["last"]["loss"]));
        Ok(Outcome::Done(summary))
    }

    /// The model card.
    fn card(&self, info: &GeneratorInfo, network: &DenoiserConfig, summary: &serde_json::Value) -> String {
        let conditional = if self.conditional { "class-conditional " } else { "" };
        format!(
            "---\nlicense: other\nlibrary_name: diffusers\ntags: [diffusion, ddpm, proxyset]\n---\n\n\
             # A {conditional}diffusion model of {shape} images\n\n\
             Trained by `proxyset fit-generator` (version {version}) on {n} images of `{source}` \
             (BLAKE3 `{hash}`), {classes} classes: {names}.\n\n\
             | | |\n|---|---|\n\
             | network | `{class}`, channels {channels:?}, {parameters} parameters, {macs} multiply-adds per image and step |\n\
             | process | {process} |\n\
             | training | {steps} steps of {batch} images, Adam {lr}, moving average {ema}, seed {seed} |\n\
             | last loss | {loss} |\n\n\
             {opens}; `proxyset generate --model` samples it. Pixels are in [-1, 1].{null}\n\
             The licence of the training data applies to what is made from it.\n",
            opens = match self.prediction {
                Parametrization::Edm => "`unet` and `scheduler` open in `diffusers` one by one",
                _ => "The folder opens in `diffusers`",
            },
            null = info.null_class.map_or(String::new(), |null| format!(" Class {null} stands for none.")),
            shape = info.shape,
            version = env!("CARGO_PKG_VERSION"),
            n = summary["trained_on"],
            source = info.trained_on,
            hash = fs::short(&info.trained_on_fingerprint, 16),
            classes = info.class_names.len(),
            names = info.class_names.join(", "),
            class = network.tag(),
            channels = self.block_out_channels,
            parameters = summary["parameters"],
            macs = summary["macs"],
            process = match self.prediction {
                Parametrization::Edm => "EDM, any σ from 0.002 to 80".to_string(),
                prediction => {
                    let what = match prediction {
                        Parametrization::Sample => "x₀",
                        Parametrization::VPrediction => "v",
                        _ => "ε",
                    };
                    format!("T = {}, {:?} β, {what}-prediction", self.num_train_timesteps, self.beta_schedule)
                }
            },
            steps = self.steps,
            batch = self.batch,
            lr = self.learning_rate,
            ema = self.ema_decay,
            seed = self.seed,
            loss = summary["last"]["loss"],
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        progress::STOP_AT_LOOK,
        stages::making::{Generate, Split},
    };

    /// Runs `work` on one thread, which is stopped at a look from now, 0 for none.
    fn stopped_at(look: u32, work: impl FnOnce() -> Result<Outcome> + Send) -> Result<Outcome> {
        let thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        thread.install(|| {
            STOP_AT_LOOK.set(look);
            work()
        })
    }

    /// The network of src/nn/architecture/mlp.rs. It goes through the code that a U-Net goes through.
    #[test]
    fn another_denoiser_than_the_u_net_trains_samples_and_resumes() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let split = Split { limit: 300, ..Split::default() };
        Stage::run(&split, &Job::scratch(path("split"))).unwrap();
        let real = Real::load(&path("split")).unwrap();
        let (fit, settings) =
            (real.fit(), json!({"image_size": 8, "channels": 1, "hidden": 64, "num_classes": 10}));
        let network = DenoiserConfig::from_json("Mlp", settings.as_object().unwrap().clone()).unwrap();

        let stage = FitGenerator {
            steps: 200,
            batch: 32,
            learning_rate: 5e-3,
            warmup_steps: 10,
            ema_decay: 0.95,
            validate_every: 50,
            sample_every: 100,
            ..FitGenerator::default()
        };
        let train = |name: &str, look: u32| {
            let job = Job::scratch(path(name));
            stopped_at(look, || stage.train(&job, &real, &fit, network.clone()))
        };
        train("model", 0).unwrap();
        for look in [70, 90] {
            assert_eq!(train("killed", look).err().unwrap().exit_code(), 75);
        }
        train("killed", 0).unwrap();
        let same = |a: PathBuf, b: PathBuf| {
            assert!(std::fs::read(&a).unwrap() == std::fs::read(b).unwrap(), "{a:?}");
        };
        for file in ["unet/diffusion_pytorch_model.safetensors", "metrics.jsonl", "samples/step-0000200.png"]
        {
            same(path("model").join(file), path("killed").join(file));
        }
        let log = std::fs::read_to_string(path("model/metrics.jsonl")).unwrap();
        let validated =
            |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["validation_loss"].as_f64();
        let losses: Vec<f64> = log.lines().filter_map(validated).collect();
        assert_eq!(losses.len(), 4);
        assert!(losses[3] < 0.6, "it has not learned: a network that says 0 has a loss of 1: {losses:?}");

        let model = DiffusionModel::load(&path("model"), &Device::Cpu).unwrap();
        assert_eq!(*model.config(), network);
        let stage = Generate {
            model: Some(path("model")),
            count: 40,
            shard_rows: 16,
            micro_batch: 8,
            sampler: Some(SamplerKind::Ddpm),
            steps: Some(20),
            ..Generate::default()
        };
        let generate = |name: &str, look: u32| {
            let job = Job::scratch(path(name));
            stopped_at(look, || Stage::run(&stage, &job))
        };
        generate("pool", 0).unwrap();
        for look in [30, 45] {
            assert_eq!(generate("killed-pool", look).err().unwrap().exit_code(), 75);
        }
        generate("killed-pool", 0).unwrap();
        for shard in 0..3 {
            let file = format!("pool/shard-{shard:05}.parquet");
            same(path("pool").join(&file), path("killed-pool").join(&file));
        }
    }
}
