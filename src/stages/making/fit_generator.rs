//! Fit-generator: a diffusion model of the real images.

use std::path::PathBuf;

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    Result,
    data::{Dataset, Range, Shape, augmented, encode_png, gaussian_noise, grid, to_tensor, to_u8},
    diffusion::{
        ClassConditioning, DiffusionModel, Level, Process, TrainingPair, denoising_loss,
        sampler::{Plan, SamplerConfig, SamplerKind, Start, sample},
    },
    error::expect_within as expect,
    fs::{self, Record},
    nn::DenoiserConfig,
    progress::Progress,
    rng::{self, Permutation, stream},
    settings::{
        self, AugmentationSettings, DenoiserSettings, OptimizerSettings, ProcessSettings, ScheduleSettings,
    },
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
#[command(mut_args(settings::defaults(&[
    ("optimizer", "adam", &[("learning_rate", "2e-4")]), // Ho et al. 2020, Appendix B
    ("grad_clip", "1", &[]),
    ("schedule", "constant", &[]),
    ("warmup_steps", "500", &[]), // Ho et al.'s code: 5000
])))]
pub struct FitGenerator {
    /// The folder of a finished split stage: the real data.
    #[arg(long)]
    pub split: Option<PathBuf>,
    /// Condition on the class by an embedding.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub conditional: bool,
    /// The share of the training images that the network sees without their class, which classifier-free guidance
    /// needs (Ho & Salimans 2022 use 0.1 to 0.2).
    #[arg(long, default_value_t = 0.0)]
    pub null_class_probability: f64,
    /// The network.
    #[command(flatten)]
    pub architecture: DenoiserSettings,
    /// The noise that the network learns to remove.
    #[command(flatten)]
    pub process: ProcessSettings,
    /// Optimiser steps. Ho et al. (Appendix B) train for 800,000 on CIFAR-10.
    #[arg(long, default_value_t = 10_000)]
    pub steps: usize,
    /// Images per step.
    #[arg(long, default_value_t = 128)]
    pub batch: usize,
    /// Number of parts in which the gradients of a step are computed; more parts need less memory.
    #[arg(long, default_value_t = 1)]
    pub accumulate: usize,
    /// The optimiser.
    #[command(flatten)]
    pub optimizer: OptimizerSettings,
    /// The learning rate over the steps. Short trainings gain from a cosine; Ho et al. keep it constant.
    #[command(flatten)]
    pub schedule: ScheduleSettings,
    /// Decay of the moving average of the weights.
    #[arg(long, default_value_t = 0.999)]
    pub ema_decay: f64,
    /// Random augmentation of the images.
    #[command(flatten)]
    pub augmentation: AugmentationSettings,
    /// Steps between validations, which measure the loss of the moving average on images that are not trained on; 0
    /// for none.
    #[arg(long, default_value_t = 1000)]
    pub validate_every: usize,
    /// Steps between sheets of samples from the moving average, written to `samples/`; 0 for none.
    #[arg(long, default_value_t = 1000)]
    pub sample_every: usize,
    /// Seed of the initial weights, the order of the images, the timesteps and the noise.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl FitGenerator {
    /// The classes as the network is told them; some draws have none, which is `null`.
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

    /// The noise level and the noise of each draw.
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
        let noise = gaussian_noise(self.seed, draws, stream::TRAIN_NOISE, shape, device)?;
        Ok((draws.iter().map(level).collect(), noise))
    }

    /// The mean loss of a model on images that it was not trained on, with the same noise each time.
    fn validate_on(
        &self,
        model: &DiffusionModel,
        process: &Process,
        unseen: &Dataset,
        device: &Device,
    ) -> Result<f64> {
        let images: Vec<usize> = (0..unseen.len().min(VALIDATED)).collect();
        let of_chunk = |chunk: &[usize]| -> Result<f64> {
            let part = unseen.subset(chunk);
            let x = to_tensor(&part.pixels, part.shape, Range::Signed, device)?;
            let draws: Vec<u64> = chunk.iter().map(|&image| VALIDATION | image as u64).collect();
            let (levels, noise) = self.noise(process, &draws, unseen.shape, device)?;
            let classes = Tensor::new(part.labels, device)?;
            let pair = TrainingPair::new(model.prediction(), &x, &levels, &noise)?;
            let losses = denoising_loss(&pair, &|x, t| {
                model.predict_each(x, t, self.conditional.then_some(&classes))
            })?;
            Ok(losses.to_vec1::<f32>()?.into_iter().map(f64::from).sum())
        };
        let sums = images.par_chunks(64).map(of_chunk).collect::<Result<Vec<f64>>>()?;
        Ok(sums.into_iter().sum::<f64>() / images.len().max(1) as f64)
    }

    /// A sheet of samples with a column for each of the first 20 classes, from the same noise each time.
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
            steps: SHEET_STEPS.min(model.scheduler().num_train_timesteps),
            ..model.scheduler().sampler()
        };
        let plan = Plan::new(&config, process)?;
        let columns = if self.conditional { classes.clamp(1, 20) as usize } else { 8 };
        let rows = 8;
        let row = |row: usize| -> Result<Vec<u8>> {
            let ids: Vec<u64> = (0..columns).map(|column| (row * columns + column) as u64).collect();
            let noise = gaussian_noise(self.seed, &ids, stream::INITIAL, shape, device)?;
            let conditioning = if self.conditional {
                ClassConditioning::Classes(Tensor::new((0..columns as u32).collect::<Vec<_>>(), device)?)
            } else {
                ClassConditioning::None
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

/// Images in a validation.
const VALIDATED: usize = 512;

/// A bit that no draw in training has set.
const VALIDATION: u64 = 1 << 62;

/// Sampling steps for the samples on a sheet.
const SHEET_STEPS: usize = 20;

/// Into how many ranges, each with equally many draws, the noise levels are divided for the log.
const NOISE_RANGES: usize = 4;

impl Stage for FitGenerator {
    const NAME: &'static str = "fit-generator";
    const ABOUT: &'static str = "Train a diffusion model";
    const INPUTS: &'static [Input] = &[SPLIT];

    fn validate(&self) -> Result<()> {
        self.architecture.validate()?;
        let null = self.null_class_probability;
        expect("null_class_probability", null, 0.0, 0.999)?;
        if null > 0.0 && !self.conditional {
            bail!(Usage, "null_class_probability is {null} for a model without classes, expected 0");
        }
        self.process.validate()?;
        if let (DenoiserSettings::NcsnPlusPlus(_), ProcessSettings::Discrete(_)) =
            (&self.architecture, &self.process)
        {
            bail!(
                Usage,
                "process is discrete, expected edm for the architecture ncsn++: at its random frequencies, neighbouring \
                 steps have nothing in common"
            );
        }
        expect("steps", self.steps, 1, 100_000_000)?;
        expect("batch", self.batch, 1, 1 << 20)?;
        expect("accumulate", self.accumulate, 1, self.batch)?;
        self.augmentation.validate()?;
        self.optimizer.validate()?;
        self.schedule.validate()?;
        expect("ema_decay", self.ema_decay, 0.0, 0.999_999)
    }

    fn amount(&self) -> String {
        format!("{} steps of {} images, {}", self.steps, self.batch, self.architecture.summary())
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let real = Real::load(&SPLIT.finished(self.split.as_deref())?)?;
        let fit = real.fit();
        let null = usize::from(self.null_class_probability > 0.0);
        let told = self.conditional.then_some(fit.class_names.len() + null);
        let steps = self.process.scheduler().num_train_timesteps;
        let config = self.architecture.config(fit.shape, told, steps)?;
        self.train(job, &real, &fit, config)
    }
}

impl FitGenerator {
    fn train(&self, job: &Job, real: &Real, fit: &Dataset, config: DenoiserConfig) -> Result<Outcome> {
        let shape = fit.shape;
        let scheduler = self.process.scheduler();
        let process = scheduler.process()?;
        let classes = fit.class_names.len() as u32;
        let null_class = (self.null_class_probability > 0.0).then_some(classes);
        let unseen = real.proxy();
        let model = DiffusionModel::init(config.clone(), scheduler.clone(), self.seed, &job.device)?;
        let averaged = DiffusionModel::init(config, scheduler, self.seed, &job.device)?;
        let network = model.tracked()?;

        let out = job.open()?;
        let optimizer = self.optimizer.optimizer();
        let mut trainer =
            Trainer::resume(job.hidden(out, "checkpoint"), model.params(), optimizer, self.ema_decay)?
                .accumulating(self.accumulate);
        let lr = self.schedule.schedule(self.optimizer.learning_rate(), self.steps);
        let log_every = (self.steps / 100).max(1);
        let settings = self.augmentation.augment();
        let bar = Progress::new(Self::NAME, self.steps as u64, "steps");
        bar.skip(trainer.step() as u64);
        while trainer.step() < self.steps {
            let step = trainer.step();
            let contribution = |slots: std::ops::Range<usize>| -> Result<Part> {
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
                let classes = self.conditional.then(|| Tensor::new(classes, &job.device)).transpose()?;
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
            trainer.advance(lr.at(step), self.optimizer.grad_clip(), self.batch, &contribution)?;
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
        info.write(out)?;
        averaged.save(out)?;
        note(self, &format!("last loss {}", summary["last"]["loss"]));
        Ok(Outcome::Done(summary))
    }

    /// The model card.
    fn card(&self, info: &GeneratorInfo, network: &DenoiserConfig, summary: &serde_json::Value) -> String {
        let conditional = if self.conditional { "class-conditional " } else { "" };
        format!(
            "---\nlicense: other\nlibrary_name: {library}\ntags: [diffusion, ddpm, proxyset]\n---\n\n\
             # A {conditional}diffusion model of {shape} images\n\n\
             Trained by `proxyset fit-generator` (version {version}) on {n} images of `{source}` \
             (BLAKE3 `{hash}`), {classes} classes: {names}.\n\n\
             | | |\n|---|---|\n\
             | network | `{class}`, {architecture}, {parameters} parameters, {macs} multiply-adds per image and step |\n\
             | process | {process} |\n\
             | training | {steps} steps of {batch} images, {optimizer} {lr}, moving average {ema}, seed {seed} |\n\
             | last loss | {loss} |\n\n\
             {opens}; `proxyset generate --model` samples it. Pixels are in [-1, 1].{null}\n\
             The licence of the training data applies to what is made from it.\n",
            library = network.library(),
            opens = match self.process {
                _ if network.library() != "diffusers" => "The weights have the names of the original network",
                ProcessSettings::Edm(_) => "`unet` and `scheduler` open in `diffusers` one by one",
                ProcessSettings::Discrete(_) => "The folder opens in `diffusers`",
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
            architecture = self.architecture.summary(),
            parameters = summary["parameters"],
            macs = summary["macs"],
            process = self.process.summary(),
            steps = self.steps,
            batch = self.batch,
            optimizer = self.optimizer.name(),
            lr = self.optimizer.learning_rate(),
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
        settings::{PartSettings, from_flags},
        stages::making::{Generate, Split},
    };

    /// Runs `work` on one thread, which is stopped at the given check from now on; 0 for never.
    fn stopped_at(look: u32, work: impl FnOnce() -> Result<Outcome> + Send) -> Result<Outcome> {
        let thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        thread.install(|| {
            STOP_AT_LOOK.set(look);
            work()
        })
    }

    #[test]
    fn ncsn_plus_plus_is_for_a_continuous_process() {
        let validate = |flags: &str| {
            let flags: Vec<_> = flags.split(' ').map(str::to_owned).collect();
            from_flags::<FitGenerator>(&flags).unwrap().validate()
        };
        let error = validate("--architecture ncsn++").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().starts_with("process is discrete, expected edm"), "{error}");
        validate("--architecture ncsn++ --process edm").unwrap();
        validate("--architecture ddpm++").unwrap();
    }

    /// The network of src/nn/architecture/mlp.rs. It goes through the code that a U-Net goes through.
    #[test]
    fn another_denoiser_than_the_u_net_trains_samples_and_resumes() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let split = Split { part: PartSettings { limit: 300, first: None }, ..Split::default() };
        Stage::run(&split, &Job::scratch(path("split"))).unwrap();
        let real = Real::load(&path("split")).unwrap();
        let (fit, settings) =
            (real.fit(), json!({"image_size": 8, "channels": 1, "hidden": 64, "num_classes": 10}));
        let network = DenoiserConfig::from_json("Mlp", settings.as_object().unwrap().clone()).unwrap().0;

        let flags = "--steps=200 --batch=32 --learning-rate=5e-3 --warmup-steps=10 --ema-decay=0.95 --validate-every=50 --sample-every=100";
        let stage: FitGenerator = from_flags(&Vec::from_iter(flags.split(' ').map(str::to_owned))).unwrap();
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

        let model = DiffusionModel::load(&path("model"), None, &Device::Cpu).unwrap();
        assert_eq!(*model.config(), network);
        let flags = "--count=40 --shard-rows=16 --micro-batch=8 --sampler=ddpm --steps=20";
        let stage: Generate = from_flags(&Vec::from_iter(flags.split(' ').map(str::to_owned))).unwrap();
        let stage = Generate { model: Some(path("model")), ..stage };
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
