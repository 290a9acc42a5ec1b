//! Generate: a pool of images from a diffusion model, in shards that several machines can share.

use std::{
    io::Write,
    num::NonZeroUsize,
    ops::Range as Span,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    Error, Result, ResultExt,
    data::{Range, Shape, from_chw, gaussian_noise, to_u8},
    device::all_of_class,
    diffusion::{
        ClassConditioning, DiffusionModel,
        sampler::{Plan, SamplerConfig, SamplerKind, Start, Trajectory, sample},
    },
    error::expect_within as expect,
    fs::{self, Parts, Record, bytes_of, floats_of},
    kernels,
    progress::{Progress, check_stop, checkpoint_interval},
    rng::stream,
    settings::SamplerSettings,
    stage::{Input, Job, Outcome, Stage, note},
    tables::{
        pool::PoolInfo,
        records::GeneratorInfo,
        shards::{ShardRecord, pool_hash, read_record, record_file, shard_file, shard_number},
    },
};

/// Shards `A..B`: from A up to, but not including, B.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "crate::text::Written", into = "String")]
pub struct ShardRange(Span<usize>);

impl FromStr for ShardRange {
    type Err = String;
    fn from_str(s: &str) -> std::result::Result<Self, String> {
        let parsed = s.split_once("..").and_then(|(a, b)| Some(a.parse().ok()?..b.parse().ok()?));
        let range = parsed.filter(|range: &Span<usize>| !range.is_empty()).map(Self);
        range.ok_or_else(|| format!("shards is '{s}', expected A..B with A less than B, such as 0..4"))
    }
}

impl std::fmt::Display for ShardRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}..{}", self.0.start, self.0.end)
    }
}

serde_as_text!(ShardRange);

/// How many shards are made at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "crate::text::Written", into = "String")]
pub enum Workers {
    /// One on each GPU of the device's class; one on the CPU.
    Auto,
    /// This many, each on a GPU of its own.
    Count(NonZeroUsize),
}

impl FromStr for Workers {
    type Err = String;
    fn from_str(s: &str) -> std::result::Result<Self, String> {
        let unknown = |_| format!("workers is '{s}', expected auto or a number from 1");
        if s == "auto" { Ok(Self::Auto) } else { s.parse().map(Self::Count).map_err(unknown) }
    }
}

impl std::fmt::Display for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Count(n) => n.fmt(f),
        }
    }
}

serde_as_text!(Workers);

impl Workers {
    /// The devices to work on, no more than there are shards. Fails with [`Error::Usage`] if there are too few GPUs like
    /// `device`.
    fn devices(self, device: &Device, shards: usize) -> Result<Vec<Device>> {
        let wanted = match self {
            Self::Count(n) => n.get().min(shards),
            Self::Auto if device.is_cpu() => 1,
            Self::Auto => shards,
        };
        if device.is_cpu() {
            return Ok(vec![device.clone(); wanted]);
        }
        let devices = all_of_class(device, wanted)?;
        if devices.len() < wanted && self != Self::Auto {
            bail!(Usage, "workers is {wanted}, expected at most {}: the GPUs of one class", devices.len());
        }
        Ok(devices)
    }
}

const MODEL: Input = Input::of("model", &["fit-generator"]);

/// Pixels in flight on a GPU, unless `batch` gives the number of images.
const PIXELS_IN_FLIGHT: usize = 1 << 18;

/// The most bytes of pixels that a shard may have: 21,845 images of 256x256 RGB. While a shard is being written,
/// its file, which is at most about as large, and the pixels of the next shard are in memory too.
const SHARD_BYTES: u64 = 4 << 30;

/// Samples a pool of images.
///
/// Image `i` is a function of the model, the sampler and (seed, i) alone: batch size, threads, interruptions and
/// the choice of machine within a device class do not change a bit. A conditional model is asked for class `i mod
/// classes`. Without sampler flags, the model folder's scheduler decides.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
pub struct Generate {
    /// The model's folder, in the layout of `diffusers`.
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Number of images in the pool.
    #[arg(long, default_value_t = 10_000)]
    pub count: u64,
    /// Make only shards A..B of the pool (B excluded); other processes make the rest in the same folder.
    #[arg(long)]
    pub shards: Option<ShardRange>,
    /// The sampler.
    #[command(flatten)]
    pub sampler: SamplerSettings,
    /// Strength of classifier-free guidance: 1 is none, larger values follow the class more closely. The model must
    /// have been trained with a null class.
    #[arg(long, default_value_t = 1.0)]
    pub guidance: f64,
    /// The class of the model that stands for none, if its folder does not say so. No images of it are made.
    #[arg(long)]
    pub null_class: Option<u32>,
    /// Start from the noise in this file instead of the seed's: tensor `noise` of shape (count, channels, height,
    /// width).
    #[arg(long)]
    pub initial_noise: Option<PathBuf>,
    /// Also write the images before rounding to this safetensors file: tensor `images` of shape (count, channels,
    /// height, width), about in [-1, 1]. Part of the pool's identity: another file means another pool.
    #[arg(long)]
    pub save_float: Option<PathBuf>,
    /// Images in a shard; a multiple of micro_batch.
    #[arg(long, default_value_t = 16_384)]
    pub shard_rows: usize,
    /// Images that go through the network together. Part of the pool's identity, because on some devices it changes
    /// the last bits.
    #[arg(long, default_value_t = 64)]
    pub micro_batch: usize,
    /// Images in flight; affects memory and speed only. 0 for one micro-batch per thread, on a GPU limited to 2^18
    /// pixels in all, such as 256 images of 32x32.
    #[arg(long, default_value_t = 0)]
    pub batch: usize,
    /// Shards that are made at the same time: `auto` for one on each GPU of the device's kind, or a number of GPUs.
    #[arg(long, default_value_t = Workers::Count(NonZeroUsize::MIN))]
    pub workers: Workers,
    /// Continue a pool that has shards made on another class of devices or in another precision. Its images are
    /// then no longer determined by model, sampler and seed to the last bit.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub mix_device_classes: bool,
    /// Seed of the noise.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// What all shards of a run have in common.
struct Run<'a> {
    config: &'a Generate,
    job: &'a Job,
    sampler: SamplerConfig,
    plan: Plan,
    info: PoolInfo,
    null_class: Option<u32>,
    /// In the order of the file, (c, h, w).
    initial_noise: Option<Vec<f32>>,
    dir: PathBuf,
    /// Micro-batches before rounding.
    floats: Parts,
    /// The shards that no worker has taken yet.
    left: Mutex<Span<usize>>,
    bar: Progress,
}

/// A device, and the model on it.
struct Worker<'a> {
    run: &'a Run<'a>,
    model: Arc<DiffusionModel>,
    device: Device,
}

/// The model in `dir` on each of the devices, read once for each GPU, and once for all workers on the CPU.
fn load(
    dir: &Path,
    sampler: Option<SamplerKind>,
    devices: Vec<Device>,
) -> Result<Vec<(Arc<DiffusionModel>, Device)>> {
    let mut workers: Vec<(Arc<DiffusionModel>, Device)> = Vec::new();
    for device in devices {
        let model = match workers.first() {
            Some((model, _)) if device.is_cpu() => Arc::clone(model),
            _ => Arc::new(DiffusionModel::load(dir, sampler, &device)?),
        };
        workers.push((model, device));
    }
    Ok(workers)
}

/// A micro-batch.
enum Sampled {
    /// The pixels, which an earlier run kept.
    Kept(Vec<u8>),
    /// Images on the device, padding included.
    Images(Tensor),
}

/// A shard's images, and what has to wait until they are written.
struct Made {
    shard: usize,
    pixels: Vec<u8>,
    record: Option<ShardRecord>,
    parts: Parts,
    _lock: fs::Lock,
}

impl Generate {
    /// The given noise. Fails with [`Error::Data`] if the file's noise does not fit this pool.
    fn read_noise(&self, path: &Path, shape: Shape) -> Result<Vec<f32>> {
        let file = path.display();
        let of_file = |e: candle_core::Error| Error::Data(format!("{file}: {e}"));
        let mut tensors = candle_core::safetensors::load(path, &Device::Cpu).map_err(of_file)?;
        let Some(noise) = tensors.remove("noise") else { bail!(Data, "{file}: there is no tensor 'noise'") };
        let (found, expected) =
            (noise.dims(), [self.count as usize, shape.channels, shape.height, shape.width]);
        if found != expected {
            bail!(
                Data,
                "{file}: 'noise' has shape {found:?}, expected {expected:?}: count images of the model's"
            );
        }
        let values: Vec<f32> =
            noise.to_dtype(DType::F32).and_then(|n| n.flatten_all()?.to_vec1()).map_err(of_file)?;
        if let Some(value) = values.iter().find(|v| !v.is_finite()) {
            bail!(Data, "{file}: 'noise' has {value}, expected finite numbers");
        }
        Ok(values)
    }

    /// Micro-batches that are sampled side by side. On a GPU, kernels on small images end before the next one is
    /// launched, so several threads launch them; large images fill the GPU and its memory.
    fn in_flight(&self, on_cpu: bool, shape: Shape) -> usize {
        let threads = rayon::current_num_threads();
        match self.batch {
            0 if on_cpu => threads,
            0 => (PIXELS_IN_FLIGHT / (self.micro_batch * shape.height * shape.width)).clamp(1, threads),
            batch => (batch / self.micro_batch).max(1),
        }
    }

    /// Refuses images so large that those of a shard do not fit in memory.
    fn expect_shards_of(&self, shape: Shape) -> Result<()> {
        let (shard_rows, size) = (self.shard_rows as u64, shape.size() as u64);
        if self.count.min(shard_rows) * size > SHARD_BYTES {
            bail!(
                Usage,
                "shard_rows is {shard_rows}, expected at most {}: the {shape} images of a shard are held in memory, 4 GiB of \
                 pixels at most",
                SHARD_BYTES / size
            );
        }
        Ok(())
    }

    fn shard_count(&self) -> usize {
        self.count.div_ceil(self.shard_rows as u64) as usize
    }
}

impl Stage for Generate {
    const NAME: &'static str = "generate";
    const ABOUT: &'static str = "Sample a pool of images from a diffusion model";
    const INPUTS: &'static [Input] = &[MODEL, Input::given("initial_noise")];
    const RUNTIME: &'static [&'static str] = &["shards", "batch", "workers", "mix_device_classes"];

    fn validate(&self) -> Result<()> {
        let Self { count, shard_rows, micro_batch, .. } = *self;
        expect("count", count, 1, 1 << 40)?;
        self.sampler.validate()?;
        expect("guidance", self.guidance, 0.0, 1e3)?;
        if self.save_float.is_some() && self.shards.is_some() {
            bail!(Usage, "save_float is set with shards, expected the whole pool in one process");
        }
        expect("micro_batch", micro_batch, 1, 1 << 16)?;
        if shard_rows == 0 || !shard_rows.is_multiple_of(micro_batch) {
            bail!(Usage, "shard_rows is {shard_rows}, expected a multiple of micro_batch = {micro_batch}");
        }
        expect("shard_rows", shard_rows, 1, 1 << 24)?;
        let all = self.shard_count();
        match &self.shards {
            Some(shards) if shards.0.end > all => bail!(
                Usage,
                "shards is {shards}, expected at most 0..{all}: {count} images in shards of {shard_rows}"
            ),
            _ => Ok(()),
        }
    }

    fn amount(&self) -> String {
        let steps = self.sampler.steps().steps.map_or("the model's".into(), |s| s.to_string());
        format!("{} images in {} shards, {steps} steps", self.count, self.shard_count())
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let dir = MODEL.set(self.model.as_deref(), "a model's folder in the layout of diffusers")?;
        let all = self.shard_count();
        let share = self.shards.as_ref().map_or(0..all, |s| s.0.clone());
        let devices = self.workers.devices(&job.device, share.len())?;
        let models = load(dir, self.sampler.sampler_kind(), devices)?;
        let (model, _) = &models[0];
        model.notes().iter().for_each(|said| note(self, said));
        let sampler = self.sampler.sampler(model.scheduler());
        let plan = Plan::new(&sampler, &model.scheduler().process()?)?;
        let (info, null_class) = self.info(job, dir, model, &sampler)?;
        self.expect_shards_of(info.shape)?;
        let initial_noise =
            self.initial_noise.as_deref().map(|path| self.read_noise(path, info.shape)).transpose()?;
        // Machines with different shares work side by side, so only the share is locked.
        let out = job.open_share(&format!("shards-{}-{}", share.start, share.end))?;
        let dir = out.join("pool");
        (0..all).try_for_each(|shard| self.record(job, &dir, shard).map(drop))?;
        info.write(out)?;
        fs::create_dir_all(&dir)?;
        let ours = |name: &str| shard_number(name).is_some_and(|shard| share.contains(&shard));
        fs::remove_leftovers(&dir, &ours)?;
        let rows = |shard: usize| self.rows(shard).end - self.rows(shard).start;
        let bar = Progress::new(Self::NAME, share.clone().map(rows).sum(), "images");
        // Removed when the stage is done, and not before.
        let floats = Parts::new(job.hidden(out, "floats"));
        let left = Mutex::new(share);
        let run =
            Run { config: self, job, sampler, plan, info, null_class, initial_noise, dir, floats, left, bar };
        kernels::with_algorithms_of(out, || run.make(models))?;
        let mut missing = Vec::new();
        for shard in 0..all {
            // Other processes may have made some at the same time.
            if self.record(job, &run.dir, shard)?.is_none() {
                missing.push(shard);
            }
        }
        if !missing.is_empty() {
            return Ok(Outcome::Partial(json!({ "shards": all, "missing": missing })));
        }
        if let Some(path) = &self.save_float {
            run.write_floats(path)?;
        }
        Ok(Outcome::Done(json!({
            "images": self.count,
            "shards": all,
            "sampler": run.info.sampler,
            "pool_blake3": pool_hash(&run.dir, all)?,
        })))
    }
}

impl Generate {
    /// The record of a shard, if the shard exists. Refuses one that another class of devices made, unless the pool
    /// may mix them.
    fn record(&self, job: &Job, dir: &Path, shard: usize) -> Result<Option<ShardRecord>> {
        let record = read_record(dir, shard)?;
        match &record {
            Some(found) if !self.mix_device_classes && found.device_class != job.device_class => bail!(
                Usage,
                "{}: shard {} was made on device class {}, expected {}, the class here: go on there, by device and \
                 precision, choose another folder, or allow both by mix_device_classes = true",
                dir.display(),
                found.shard,
                found.device_class,
                job.device_class
            ),
            _ => Ok(record),
        }
    }

    /// The first samples of the micro-batches of a shard.
    fn micro_batches(&self, shard: usize) -> impl Iterator<Item = u64> + use<> {
        self.rows(shard).step_by(self.micro_batch)
    }

    /// The samples of a shard.
    fn rows(&self, shard: usize) -> Span<u64> {
        let first = (shard * self.shard_rows) as u64;
        first..(first + self.shard_rows as u64).min(self.count)
    }

    fn info(
        &self,
        job: &Job,
        dir: &Path,
        model: &DiffusionModel,
        sampler: &SamplerConfig,
    ) -> Result<(PoolInfo, Option<u32>)> {
        let network = model.config();
        let path = dir.join(GeneratorInfo::FILE);
        let file = path.display();
        let known = GeneratorInfo::read_if_there(dir)?;
        let (height, width, channels) = network.image_shape().context(|| dir.display().to_string())?;
        let (shape, classes) = (Shape { height, width, channels }, network.num_classes());
        if let Some(known) = known.as_ref().filter(|k| k.shape != shape) {
            bail!(Data, "{file}: images are {}, expected the network's {shape}", known.shape);
        }
        let recorded = known.as_ref().and_then(|k| k.null_class);
        let named = known.as_ref().map_or(0, |k| k.class_names.len());
        if let Some(null) = recorded.filter(|&null| null as usize != named || classes.is_none()) {
            bail!(
                Data,
                "{file}: null_class is {null}, expected {named} behind the class names of a conditional model"
            );
        }
        let null_class = recorded.or(self.null_class);
        if let Some(given) = self.null_class
            && (null_class != Some(given) || classes.is_none_or(|n| given as usize >= n))
        {
            let expected = match (recorded, classes) {
                (Some(recorded), _) => format!("{recorded}, as {file} says"),
                (None, Some(n)) => format!("below {n}, the classes of the model"),
                (None, None) => "none: the model has no classes".into(),
            };
            bail!(Usage, "null_class is {given}, expected {expected}");
        }
        let class_names = match (&known, classes) {
            (Some(_), Some(n)) if named + usize::from(null_class.is_some()) != n => {
                bail!(Data, "{file}: {named} class names, expected {n}")
            }
            (Some(known), _) => known.class_names.clone(),
            (None, n) => {
                let classes = 0..n.unwrap_or(0) as u32;
                classes.filter(|c| null_class != Some(*c)).map(|c| c.to_string()).collect()
            }
        };
        if self.guidance != 1.0 && null_class.is_none() {
            bail!(
                Usage,
                "guidance is {}, expected 1: {} was not trained with a null class, as its {} or --null-class would say",
                self.guidance,
                dir.display(),
                GeneratorInfo::FILE
            );
        }
        let noise_hash = self.initial_noise.as_deref().map(fs::hash_file).transpose()?.map(|(hash, _)| hash);
        let info = PoolInfo {
            named: known.is_some(),
            schema: "proxyset.pool/1".into(),
            count: self.count,
            shards: self.shard_count(),
            shape,
            class_names,
            conditional: classes.is_some(),
            generator: job.fingerprint.clone(),
            sampler: json!({
                "kind": sampler.kind, "steps": sampler.steps, "eta": sampler.step.eta, "clip": sampler.step.clip,
                "spacing": sampler.spacing, "karras_sigmas": sampler.karras_sigmas, "guidance": self.guidance,
                "initial_noise_blake3": noise_hash,
            }),
            seed: self.seed,
        };
        Ok((info, null_class))
    }
}

impl Run<'_> {
    /// Makes the remaining shards, with one worker for each model.
    fn make(&self, models: Vec<(Arc<DiffusionModel>, Device)>) -> Result<()> {
        let work = |(model, device)| {
            let worker = Worker { run: self, model, device };
            worker.make_all().inspect_err(|_| self.give_up())
        };
        models.into_par_iter().with_max_len(1).map(work).collect()
    }

    fn next(&self) -> Option<usize> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner).next()
    }

    /// Takes all remaining shards, so that the other workers stop.
    fn give_up(&self) {
        *self.left.lock().unwrap_or_else(PoisonError::into_inner) = 0..0;
    }
}

impl Worker<'_> {
    /// Makes shards until none is left. A shard is written while the next one is computed.
    fn make_all(&self) -> Result<()> {
        let mut made = None;
        loop {
            check_stop()?;
            let shard = self.run.next();
            if shard.is_none() && made.is_none() {
                return Ok(());
            }
            let (next, written) = rayon::join(
                || shard.map_or(Ok(None), |shard| self.make(shard)),
                || made.map_or(Ok(()), |made| self.run.write(made)),
            );
            written?;
            made = next?;
        }
    }

    /// The images of a shard; `None` if the shard already exists.
    fn make(&self, shard: usize) -> Result<Option<Made>> {
        let Run { config, dir, job, bar, .. } = self.run;
        // Ranges may overlap: a shard and its record must come from one machine.
        let lock = fs::Lock::acquire(dir, &format!("shard-{shard:05}"))?;
        let rows = config.rows(shard);
        let record = config.record(job, dir, shard)?;
        let parts = Parts::new(job.hidden(dir, &format!("shard-{shard:05}")));
        if let Some(record) = record.as_ref().filter(|record| record.has_file(dir)) {
            bar.skip(record.rows);
            parts.clear()?;
            return Ok(None);
        }
        let micro = config.micro_batch as u64;
        let firsts: Vec<u64> = config.micro_batches(shard).collect();
        let samples = |first: u64| first..(first + micro).min(rows.end);
        let in_flight = config.in_flight(self.device.is_cpu(), self.run.info.shape);
        let bytes = (rows.end - rows.start) as usize * self.run.info.shape.size();
        let (mut pixels, mut before) = (Vec::with_capacity(bytes), Vec::new());
        for group in firsts.chunks(in_flight).chain([&[][..]]) {
            let sample = |&first: &u64| Ok((samples(first), self.sample(samples(first), &parts)?));
            // While a group is computed, the images of the previous group are copied from the device and kept.
            let (sampled, kept) = rayon::join(
                || group.par_iter().map(sample).collect::<Result<Vec<_>>>(),
                || {
                    let keep = |(span, sampled)| self.keep(span, sampled, &parts);
                    before.into_iter().map(keep).collect::<Result<Vec<_>>>()
                },
            );
            pixels.extend(kept?.concat());
            before = sampled?;
        }
        Ok(Some(Made { shard, pixels, record, parts, _lock: lock }))
    }

    /// A micro-batch, read back if it was made before.
    fn sample(&self, span: Span<u64>, parts: &Parts) -> Result<Sampled> {
        let Run { config, sampler, plan, info, initial_noise, bar, .. } = self.run;
        let (shape, first) = (info.shape, span.start);
        let wanted = (span.end - first) as usize * shape.size();
        if let Some(pixels) = parts.get(&key(first, "u8"))?.filter(|pixels| pixels.len() == wanted) {
            bar.skip(span.end - first);
            return Ok(Sampled::Kept(pixels));
        }
        let state_key = key(first, "state");
        // Padded to its full size, so that a sample's slot and its neighbours' number never change.
        let samples: Vec<u64> = (first..first + config.micro_batch as u64).collect();
        let (seed, device) = (config.seed, &self.device);
        let noise_at = |step: u32| gaussian_noise(seed, &samples, step, shape, device);
        let images_shape = (samples.len(), shape.height, shape.width, shape.channels);
        let state = parts.get(&state_key)?;
        let start = match state.and_then(|bytes| read_state(&bytes, samples.len() * shape.size())) {
            Some((done, tensors)) => {
                let tensor = |values| Tensor::from_vec(values, images_shape, device);
                let mut tensors = tensors.into_iter().map(tensor);
                let x = tensors.next().ok_or_else(|| Error::Alarm("a state without an image".into()))??;
                Start::Saved(done, Trajectory { x, history: tensors.collect::<candle_core::Result<_>>()? })
            }
            None => Start::Noise(match initial_noise {
                Some(noise) => given_noise(noise, &samples, shape, device)?,
                None => noise_at(stream::INITIAL)?,
            }),
        };
        let conditioning = if info.conditional {
            let n = info.class_names.len() as u64;
            // The null class may be any of the network's.
            let of_network =
                |class: u32| class + u32::from(self.run.null_class.is_some_and(|null| class >= null));
            let classes: Vec<_> = samples.iter().map(|s| of_network((s % n) as u32)).collect();
            let classes = Tensor::new(classes, device)?;
            match self.run.null_class {
                Some(null) if config.guidance != 1.0 => {
                    ClassConditioning::Guided { classes, null, scale: config.guidance }
                }
                _ => ClassConditioning::Classes(classes),
            }
        } else {
            ClassConditioning::None
        };
        let mut saved = Instant::now();
        let images = sample(
            sampler,
            plan,
            start,
            &mut |x, level| self.model.denoise(x, level, &conditioning),
            &mut |step| noise_at(step),
            &mut |done, at| {
                let stop = check_stop();
                if stop.is_err() || saved.elapsed() >= checkpoint_interval() {
                    parts.put(&state_key, &write_state(done, at)?)?;
                    saved = Instant::now();
                }
                stop
            },
        )?;
        Ok(Sampled::Images(images))
    }

    /// The pixels of a micro-batch, which are written to disk.
    fn keep(&self, span: Span<u64>, sampled: Sampled, parts: &Parts) -> Result<Vec<u8>> {
        let images = match sampled {
            Sampled::Kept(pixels) => return Ok(pixels),
            Sampled::Images(images) => images,
        };
        let Run { config, info, floats, bar, .. } = self.run;
        let wanted = (span.end - span.start) as usize * info.shape.size();
        // Written before the pixels, whose presence means that the micro-batch is complete.
        if config.save_float.is_some() {
            let chw = images.permute((0, 3, 1, 2))?.flatten_all()?.to_vec1::<f32>()?;
            floats.put(&key(span.start, "f32"), &bytes_of(&chw[..wanted]))?;
        }
        let mut pixels = to_u8(&images, Range::Signed)?;
        pixels.truncate(wanted);
        parts.put(&key(span.start, "u8"), &pixels)?;
        bar.add(span.end - span.start);
        Ok(pixels)
    }
}

impl Run<'_> {
    /// Writes the images of the whole pool as they were before rounding.
    fn write_floats(&self, path: &Path) -> Result<()> {
        let Shape { height, width, channels } = self.info.shape;
        let bytes = 4 * self.info.count * self.info.shape.size() as u64;
        let header = json!({"images": {
            "dtype": "F32",
            "shape": [self.info.count, channels as u64, height as u64, width as u64],
            "data_offsets": [0, bytes],
        }});
        // The numbers are aligned, as safetensors requires.
        let mut header = header.to_string();
        header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
        fs::publish_with(path, |file| {
            let mut write = |bytes: &[u8]| file.write_all(bytes).map_err(Error::io(path));
            write(&(header.len() as u64).to_le_bytes())?;
            write(header.as_bytes())?;
            for first in (0..self.config.shard_count()).flat_map(|shard| self.config.micro_batches(shard)) {
                match self.floats.get(&key(first, "f32"))? {
                    Some(part) => write(&part)?,
                    None => bail!(
                        Data,
                        "the images from {first} on were made on another class of machine, and what they were before \
                         rounding is there: remove {} to make them here",
                        self.dir.display()
                    ),
                }
            }
            Ok(())
        })
    }

    /// Publishes the shard, then its record. After that its parts are no longer needed.
    fn write(&self, made: Made) -> Result<()> {
        self.publish(&made)?;
        made.parts.clear()
    }

    fn publish(&self, Made { shard, pixels, record, .. }: &Made) -> Result<()> {
        let shard = *shard;
        let classes = self.info.class_names.len() as u64;
        // Not `then_some`: an unconditional model may have no classes.
        let label = |i: u64| self.info.conditional.then(|| (i % classes) as i64);
        let writer = self.info.shard(self.config.rows(shard), pixels, label)?;
        let name = |suffix: &str| format!("shard-{shard:05}{suffix}.parquet");
        let Some(record) = record.as_ref().filter(|r| r.device_class == self.job.device_class) else {
            let entry = writer.finish(&self.dir, &name(""))?;
            let record = ShardRecord::of(self.job, shard, entry.rows, entry.blake3, entry.bytes);
            return fs::publish_json(&record_file(&self.dir, shard), &record);
        };
        // The record says what these bytes were on this class of machine: the same bytes must come out again.
        let again = writer.finish(&self.dir, &name(".again"))?;
        if again.blake3 != record.blake3 {
            bail!(
                Alarm,
                "shard {shard} came out as {}, but its record says {}: a disk, a program or a file is wrong; the new one is kept \
                 as {}, and is taken if the record is deleted",
                fs::short(&again.blake3, 16),
                fs::short(&record.blake3, 16),
                name(".again")
            );
        }
        fs::rename(&self.dir.join(name(".again")), &shard_file(&self.dir, shard))
    }
}

/// The given noise of some samples, `(samples, h, w, c)`; samples beyond the last one get the last one's noise.
fn given_noise(noise: &[f32], samples: &[u64], shape: Shape, device: &Device) -> Result<Tensor> {
    let last = noise.len() / shape.size() - 1;
    let of = |sample: &u64| &noise[(*sample as usize).min(last) * shape.size()..][..shape.size()];
    let chw: Vec<f32> = samples.iter().flat_map(|sample| of(sample).iter().copied()).collect();
    from_chw(chw, &[samples.len(), shape.height, shape.width, shape.channels], device)
}

/// The key of a part: what is kept of the micro-batch that begins with sample `first`.
fn key(first: u64, what: &str) -> String {
    format!("{first:012}.{what}")
}

/// The state of a trajectory: steps done, then the image and what the sampler remembers.
fn write_state(done: usize, at: &Trajectory) -> Result<Vec<u8>> {
    let mut bytes = (done as u64).to_le_bytes().to_vec();
    for tensor in std::iter::once(&at.x).chain(&at.history) {
        bytes.extend(bytes_of(&tensor.flatten_all()?.to_vec1()?));
    }
    Ok(bytes)
}

/// The number of steps done, and tensors of `len` elements each; `None` if the bytes have another form.
fn read_state(bytes: &[u8], len: usize) -> Option<(usize, Vec<Vec<f32>>)> {
    let (done, tensors) = bytes.split_first_chunk::<8>()?;
    let whole = !tensors.is_empty() && tensors.len().is_multiple_of(4 * len);
    whole.then(|| (u64::from_le_bytes(*done) as usize, tensors.chunks(4 * len).map(floats_of).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        diffusion::SchedulerConfig,
        nn::{DenoiserConfig, SampleSize, UNetConfig},
        settings::from_table,
    };

    #[test]
    fn shard_ranges_say_what_they_expect() {
        assert_eq!("2..5".parse::<ShardRange>().unwrap().0, 2..5);
        for bad in ["5", "5..5", "a..3", "3..1", "..2"] {
            assert!(bad.parse::<ShardRange>().unwrap_err().contains("expected A..B"), "{bad}");
        }
    }

    #[test]
    fn workers_are_one_a_gpu_or_a_number() {
        for text in ["auto", "1", "8"] {
            assert_eq!(text.parse::<Workers>().unwrap().to_string(), text);
        }
        for bad in ["0", "-1", "all", ""] {
            let error = bad.parse::<Workers>().unwrap_err();
            assert_eq!(error, format!("workers is '{bad}', expected auto or a number from 1"));
        }
        let on_cpu = |text: &str| text.parse::<Workers>().unwrap().devices(&Device::Cpu, 5).unwrap().len();
        assert_eq!([on_cpu("auto"), on_cpu("3"), on_cpu("18446744073709551615")], [1, 3, 5]);
        let read = |text: &str| from_table::<Generate>("generate", &toml::from_str(text).unwrap());
        let config = read("workers = 2").unwrap();
        assert_eq!(config.workers, "2".parse().unwrap());
        assert_eq!(read(&toml::to_string(&config).unwrap()).unwrap().workers, config.workers);
        assert!(read("workers = 0").unwrap_err().contains("workers is '0'"));
    }

    #[test]
    fn workers_on_the_cpu_share_one_model() {
        let config = UNetConfig {
            sample_size: Some(SampleSize::Square(8)),
            in_channels: 1,
            out_channels: 1,
            down_block_types: vec!["DownBlock2D".into()],
            up_block_types: vec!["UpBlock2D".into()],
            block_out_channels: vec![8],
            norm_num_groups: 2,
            ..UNetConfig::default()
        };
        let dir = tempfile::tempdir().unwrap();
        let model =
            DiffusionModel::init(DenoiserConfig::UNet(config), SchedulerConfig::default(), 0, &Device::Cpu);
        let model = model.unwrap();
        model.save(dir.path()).unwrap();
        let workers = load(dir.path(), None, vec![Device::Cpu; 3]).unwrap();
        assert_eq!(workers.len(), 3);
        assert!(workers.iter().all(|(model, _)| Arc::ptr_eq(model, &workers[0].0)));
    }

    #[test]
    fn small_images_are_many_in_flight_and_large_ones_few() {
        let shape = |side| Shape { height: side, width: side, channels: 3 };
        let config = |batch| Generate { batch, ..Generate::default() };
        let in_flight = |batch, on_cpu, side| config(batch).in_flight(on_cpu, shape(side));
        let threads = rayon::current_num_threads();
        assert_eq!([in_flight(0, true, 8), in_flight(0, true, 256)], [threads; 2]);
        assert_eq!([in_flight(0, false, 32), in_flight(0, false, 256)], [4.min(threads), 1]);
        assert_eq!(
            [in_flight(63, false, 32), in_flight(192, false, 256), in_flight(192, true, 8)],
            [1, 3, 3]
        );
    }

    #[test]
    fn a_shard_s_pixels_fit_into_memory() {
        let of = |count, side| {
            let config = Generate { count, ..Generate::default() };
            config.expect_shards_of(Shape { height: side, width: side, channels: 3 })
        };
        of(1_000_000, 256).unwrap();
        of(5000, 512).unwrap();
        let error = of(1_000_000, 512).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(
            error
                .to_string()
                .starts_with("shard_rows is 16384, expected at most 5461: the 512x512 RGB images")
        );
    }

    #[test]
    fn states_round_trip_and_short_ones_are_no_states() {
        let tensor = |values: [f32; 2]| Tensor::new(&values, &Device::Cpu).unwrap();
        let at = Trajectory { x: tensor([0.5, -2.0]), history: vec![tensor([3.0, 4.0])] };
        let bytes = write_state(17, &at).unwrap();
        assert_eq!(read_state(&bytes, 2), Some((17, vec![vec![0.5, -2.0], vec![3.0, 4.0]])));
        assert_eq!(read_state(&bytes, 3), None);
        assert_eq!(read_state(&bytes[..8], 2), None);
        assert_eq!(read_state(&bytes[..5], 2), None);
    }

    #[test]
    fn given_noise_is_read_channel_by_channel_and_padded() {
        let shape = Shape { height: 1, width: 2, channels: 2 };
        let noise: Vec<f32> = (0..8).map(|i| i as f32).collect();
        let found = given_noise(&noise, &[1, 2], shape, &Device::Cpu).unwrap();
        assert_eq!(found.dims(), [2, 1, 2, 2]);
        assert_eq!(found.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [4., 6., 5., 7., 4., 6., 5., 7.]);
    }
}
