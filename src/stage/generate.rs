//! Generate: a pool of images from a diffusion model, in shards that several machines can share.

use std::{
    ops::Range as Span,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::Instant,
};

use arrow_array::{ArrayRef, Int64Array, StringArray, UInt64Array};
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    Job, Outcome, Stage, checkpoint_interval, expect,
    fit_generator::GeneratorInfo,
    label::{bytes_of, floats},
    shards::{PoolInfo, ShardRecord, read_record, record_file, shard_file, shard_number},
};
use crate::{
    Error, Result,
    data::{
        Dtype, Feature, Features, ImageWriter, Range, SYNTHETIC_SOURCE_TYPE, Shape, encode_png, image_column,
        to_u8,
    },
    diffusion::{
        DiffusionModel,
        sampler::{SamplerConfig, SamplerKind, sample},
    },
    fs::{self, Parts},
    progress::{Progress, check_stop},
    rng::{self, stream},
};

/// Shards `A..B`: from A up to, but not including, B.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ShardRange(Span<usize>);

impl FromStr for ShardRange {
    type Err = String;
    fn from_str(s: &str) -> std::result::Result<Self, String> {
        let parsed = s.split_once("..").and_then(|(a, b)| Some(a.parse().ok()?..b.parse().ok()?));
        match parsed {
            Some(range) if range.start < range.end => Ok(Self(range)),
            _ => Err(format!("shards is '{s}', expected A..B with A less than B, such as 0..4")),
        }
    }
}

impl TryFrom<String> for ShardRange {
    type Error = String;
    fn try_from(s: String) -> std::result::Result<Self, String> {
        s.parse()
    }
}

impl From<ShardRange> for String {
    fn from(range: ShardRange) -> Self {
        format!("{}..{}", range.0.start, range.0.end)
    }
}

/// Samples a pool of images.
///
/// Image `i` is a function of model, sampler and (seed, i) alone: no batch, thread, kill or machine of the same
/// device class changes a bit. A conditional model is asked for class `i mod classes`. Without sampler flags the
/// model folder's scheduler rules.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Generate {
    /// The model's folder, in the layout of `diffusers`.
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Images in the pool.
    #[arg(long, default_value_t = 10_000)]
    pub count: u64,
    /// Make only shards A..B of the pool (B excluded); other processes make the rest, into the same folder.
    #[arg(long)]
    pub shards: Option<ShardRange>,
    /// The sampler; the model folder's if not given.
    #[arg(long, value_enum)]
    pub sampler: Option<SamplerKind>,
    /// Sampling steps; the model folder's if not given.
    #[arg(long)]
    pub steps: Option<usize>,
    /// DDIM's share of noise: 0 is deterministic, 1 is ancestral sampling.
    #[arg(long, default_value_t = 0.0)]
    pub eta: f64,
    /// Images in a shard: a multiple of micro_batch.
    #[arg(long, default_value_t = 16_384)]
    pub shard_rows: usize,
    /// Images that go through the network together. Part of what is made: on some devices it changes last bits.
    #[arg(long, default_value_t = 64)]
    pub micro_batch: usize,
    /// Images in flight, for memory and speed only; 0 for one micro-batch per thread.
    #[arg(long, default_value_t = 0)]
    pub batch: usize,
    /// Seed of the noise.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Standard normal noise, `(samples, h, w, c)`: sample `i`'s is a function of (`seed`, `i`, `step`) alone,
/// drawn in (c, h, w) order, and bit-identical on every device.
pub(super) fn noise_tensor(
    seed: u64,
    samples: &[u64],
    step: u32,
    shape: Shape,
    device: &Device,
) -> Result<Tensor> {
    let Shape { height, width, channels } = shape;
    let mut chw = vec![0.0; shape.size()];
    let mut noise = Vec::with_capacity(samples.len() * shape.size());
    for &sample in samples {
        rng::normals(seed, sample, step, &mut chw);
        for position in 0..height * width {
            noise.extend((0..channels).map(|c| chw[c * height * width + position]));
        }
    }
    Ok(Tensor::from_vec(noise, (samples.len(), height, width, channels), device)?)
}

/// What all shards of one run share.
struct Run<'a> {
    config: &'a Generate,
    job: &'a Job,
    model: DiffusionModel,
    sampler: SamplerConfig,
    info: PoolInfo,
    dir: PathBuf,
}

impl Generate {
    fn sampler(&self, model: &DiffusionModel) -> Result<SamplerConfig> {
        let mut sampler = model.scheduler().sampler();
        sampler.kind = self.sampler.unwrap_or(sampler.kind);
        sampler.steps = self.steps.unwrap_or(sampler.steps);
        sampler.eta = self.eta;
        sampler.timesteps(&model.scheduler().schedule()?)?;
        Ok(sampler)
    }

    fn shard_count(&self) -> usize {
        self.count.div_ceil(self.shard_rows as u64) as usize
    }
}

impl Stage for Generate {
    const NAME: &'static str = "generate";
    const INPUTS: &'static [&'static str] = &["model"];
    const RUNTIME: &'static [&'static str] = &["shards", "batch"];

    fn validate(&self) -> Result<()> {
        expect("count", self.count, 1, 1 << 40)?;
        expect("eta", self.eta, 0.0, 1.0)?;
        expect("micro_batch", self.micro_batch, 1, 1 << 16)?;
        if self.shard_rows == 0 || !self.shard_rows.is_multiple_of(self.micro_batch) {
            bail!(
                Usage,
                "shard_rows is {}, expected a multiple of micro_batch = {}",
                self.shard_rows,
                self.micro_batch
            );
        }
        if let Some(steps) = self.steps {
            expect("steps", steps, 1, 100_000)?;
        }
        match &self.shards {
            Some(ShardRange(range)) if range.end > self.shard_count() => bail!(
                Usage,
                "shards is {}..{}, expected at most 0..{}: {} images in shards of {}",
                range.start,
                range.end,
                self.shard_count(),
                self.count,
                self.shard_rows
            ),
            _ => Ok(()),
        }
    }

    fn amount(&self) -> String {
        let steps = self.steps.map_or("the model's".into(), |s| s.to_string());
        format!("{} images in {} shards, {steps} steps", self.count, self.shard_count())
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let Some(dir) = &self.model else {
            bail!(Usage, "model is not set, expected a model's folder in the layout of diffusers")
        };
        let model = DiffusionModel::load(dir, &job.device)?;
        let sampler = self.sampler(&model)?;
        let info = self.info(job, dir, &model, &sampler)?;
        let all = self.shard_count();
        let share = self.shards.as_ref().map_or(0..all, |s| s.0.clone());
        // Machines with different shares work side by side, so the lock is the share's.
        let (out, _lock) = job.open(&format!("shards-{}-{}", share.start, share.end))?;
        fs::publish_json(&out.join("pool.json"), &info)?;
        let run = Run { config: self, job, model, sampler, info, dir: out.join("pool") };
        fs::create_dir_all(&run.dir)?;
        let ours = |name: &str| shard_number(name).is_some_and(|shard| share.contains(&shard));
        fs::remove_leftovers(&run.dir, &ours)?;
        let rows = |shard: usize| self.rows(shard).end - self.rows(shard).start;
        let bar = Progress::new(Self::NAME, share.clone().map(rows).sum(), "images");
        for shard in share {
            check_stop()?;
            run.shard(shard, &bar)?;
        }
        let missing: Vec<usize> = (0..all).filter(|&shard| !record_file(&run.dir, shard).is_file()).collect();
        if !missing.is_empty() {
            return Ok(Outcome::Partial(json!({ "shards": all, "missing": missing })));
        }
        let mut hasher = blake3::Hasher::new();
        for shard in 0..all {
            let record = read_record(&run.dir, shard)?
                .ok_or_else(|| Error::Alarm(format!("record {shard} vanished")))?;
            hasher.update(record.blake3.as_bytes());
        }
        Ok(Outcome::Done(json!({
            "images": self.count,
            "shards": all,
            "sampler": run.info.sampler,
            "pool_blake3": hasher.finalize().to_hex().to_string(),
        })))
    }
}

impl Generate {
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
    ) -> Result<PoolInfo> {
        let unet = model.config();
        let path = dir.join(GeneratorInfo::FILE);
        let known: Option<GeneratorInfo> = if path.is_file() { Some(fs::read_json(&path)?) } else { None };
        let Some((height, width)) = unet.sample_size.map(crate::nn::SampleSize::height_width) else {
            bail!(
                Data,
                "{}: the U-Net's sample_size is not set, expected the side of its images",
                dir.display()
            )
        };
        let shape = Shape { height, width, channels: unet.in_channels };
        if let Some(known) = known.as_ref().filter(|k| k.shape != shape) {
            bail!(Data, "{}: images are {}, expected the U-Net's {shape}", path.display(), known.shape);
        }
        let class_names = match (&known, unet.num_class_embeds) {
            (Some(known), None) => known.class_names.clone(),
            (Some(known), Some(n)) if known.class_names.len() == n => known.class_names.clone(),
            (Some(known), Some(n)) => {
                bail!(Data, "{}: {} class names, expected {n}", path.display(), known.class_names.len())
            }
            (None, n) => (0..n.unwrap_or(0)).map(|c| c.to_string()).collect(),
        };
        Ok(PoolInfo {
            named: known.is_some(),
            schema: "proxyset.pool/1".into(),
            count: self.count,
            shards: self.shard_count(),
            shape,
            class_names,
            conditional: unet.num_class_embeds.is_some(),
            generator: job.fingerprint.clone(),
            sampler: json!({
                "kind": sampler.kind, "steps": sampler.steps, "eta": sampler.eta, "clip": sampler.clip,
            }),
            seed: self.seed,
        })
    }
}

impl Run<'_> {
    /// Makes a shard, or finds it made.
    fn shard(&self, shard: usize, bar: &Progress) -> Result<()> {
        // Ranges may overlap: a shard and its record must come from one machine.
        let _lock = fs::Lock::acquire(&self.dir, &format!("shard-{shard:05}"))?;
        let rows = self.config.rows(shard);
        let (path, record) = (shard_file(&self.dir, shard), read_record(&self.dir, shard)?);
        if let Some(record) = &record
            && std::fs::metadata(&path).is_ok_and(|m| m.len() == record.bytes)
        {
            bar.skip(record.rows);
            return Ok(());
        }
        let parts = Parts::new(self.job.hidden(&self.dir, &format!("shard-{shard:05}")));
        let micro = self.config.micro_batch as u64;
        let firsts: Vec<u64> = rows.clone().step_by(micro as usize).collect();
        let one = |&first: &u64| self.micro_batch(first, (first + micro).min(rows.end), &parts, bar);
        let in_flight = match self.config.batch {
            0 if self.job.device.is_cpu() => rayon::current_num_threads(),
            batch => (batch / self.config.micro_batch).max(1),
        };
        let mut pixels = Vec::new();
        for group in firsts.chunks(in_flight) {
            pixels.extend(group.par_iter().map(one).collect::<Result<Vec<_>>>()?.concat());
        }
        self.write(shard, rows, &pixels, record.as_ref())?;
        parts.clear()
    }

    /// The pixels of samples `first..end`, which share a micro-batch; found if they were made before.
    fn micro_batch(&self, first: u64, end: u64, parts: &Parts, bar: &Progress) -> Result<Vec<u8>> {
        let shape = self.info.shape;
        let wanted = (end - first) as usize * shape.size();
        let (pixels_key, state_key) = (format!("{first:012}.u8"), format!("{first:012}.state"));
        if let Some(pixels) = parts.get(&pixels_key)?
            && pixels.len() == wanted
        {
            bar.skip(end - first);
            return Ok(pixels);
        }
        // Padded to its full size, so that a sample's slot and its neighbours' number never change.
        let samples: Vec<u64> = (first..first + self.config.micro_batch as u64).collect();
        let (seed, device) = (self.config.seed, &self.job.device);
        let noise_at = |step: u32| noise_tensor(seed, &samples, step, shape, device);
        let (start, x) = match parts
            .get(&state_key)?
            .and_then(|bytes| read_state(&bytes, samples.len() * shape.size()))
        {
            Some((step, values)) => (
                step,
                Tensor::from_vec(values, (samples.len(), shape.height, shape.width, shape.channels), device)?,
            ),
            None => (0, noise_at(stream::INITIAL)?),
        };
        let classes = if self.info.conditional {
            let n = self.info.class_names.len() as u64;
            Some(Tensor::new(samples.iter().map(|s| (s % n) as u32).collect::<Vec<_>>(), device)?)
        } else {
            None
        };
        let mut saved = Instant::now();
        let images = sample(
            &self.model.scheduler().schedule()?,
            &self.sampler,
            x,
            start,
            &mut |x, t| self.model.eps(x, t, classes.as_ref()),
            &mut |step| noise_at(step),
            &mut |done, x| {
                let stop = check_stop();
                if stop.is_err() || saved.elapsed() >= checkpoint_interval() {
                    parts.put(&state_key, &write_state(done, &x.flatten_all()?.to_vec1()?))?;
                    saved = Instant::now();
                }
                stop
            },
        )?;
        let mut pixels = to_u8(&images, Range::Signed)?;
        pixels.truncate(wanted);
        parts.put(&pixels_key, &pixels)?;
        bar.add(end - first);
        Ok(pixels)
    }

    /// Publishes the shard, then its record.
    fn write(
        &self,
        shard: usize,
        rows: Span<u64>,
        pixels: &[u8],
        record: Option<&ShardRecord>,
    ) -> Result<()> {
        let shape = self.info.shape;
        let images: Vec<Vec<u8>> =
            pixels.par_chunks(shape.size()).map(|image| encode_png(image, shape)).collect();
        let uid = |i: u64| format!("{}-{i:09}", &self.job.fingerprint[..12]);
        let classes = self.info.class_names.len() as u64;
        let label = |i: u64| self.info.conditional.then_some((i % classes) as i64);
        let features = Features::image_and_label(&self.info.class_names)
            .with("uid", Feature::Value(Dtype::String))
            .with("index", Feature::Value(Dtype::Uint64))
            .with("seed", Feature::Value(Dtype::Uint64));
        let key_values =
            [("digital_source_type", SYNTHETIC_SOURCE_TYPE), ("generator", &*self.info.generator)];
        let mut writer = ImageWriter::new(features, &key_values)?;
        let columns: Vec<ArrayRef> = vec![
            image_column(&images)?,
            Arc::new(Int64Array::from_iter(rows.clone().map(label))),
            Arc::new(StringArray::from_iter_values(rows.clone().map(uid))),
            Arc::new(UInt64Array::from_iter_values(rows.clone())),
            Arc::new(UInt64Array::from_iter_values(rows.clone().map(|_| self.config.seed))),
        ];
        writer.push(columns)?;
        let name = |suffix: &str| format!("shard-{shard:05}{suffix}.parquet");
        let Some(record) = record.filter(|r| r.device_class == self.job.device_class) else {
            let entry = writer.finish(&self.dir, &name(""))?;
            let record = ShardRecord::of(self.job, shard, entry.rows, entry.blake3, entry.bytes);
            return fs::publish_json(&record_file(&self.dir, shard), &record);
        };
        // The record says what these bytes were on this class of machine: they must come out again.
        let again = writer.finish(&self.dir, &name(".again"))?;
        if again.blake3 != record.blake3 {
            bail!(
                Alarm,
                "shard {shard} came out as {}, but its record says {}: a disk, a program or a file is wrong; the new one is kept \
                 as {}, and is taken if the record is deleted",
                &again.blake3[..16],
                &record.blake3[..16],
                name(".again")
            );
        }
        let (from, to) = (self.dir.join(name(".again")), shard_file(&self.dir, shard));
        std::fs::rename(&from, &to).map_err(Error::io(&to))
    }
}

/// The state of a trajectory: steps done, then x_t.
fn write_state(done: usize, x: &[f32]) -> Vec<u8> {
    let mut bytes = (done as u64).to_le_bytes().to_vec();
    bytes.extend(bytes_of(x));
    bytes
}

fn read_state(bytes: &[u8], len: usize) -> Option<(usize, Vec<f32>)> {
    let (step, x) = bytes.split_first_chunk::<8>()?;
    let x = floats(x);
    (x.len() == len).then_some((u64::from_le_bytes(*step) as usize, x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_of_a_sample_does_not_depend_on_its_batch_and_runs_channel_by_channel() -> Result<()> {
        let shape = Shape { height: 3, width: 2, channels: 3 };
        let all = noise_tensor(7, &[4, 5, 6], 9, shape, &Device::Cpu)?;
        let one = noise_tensor(7, &[5], 9, shape, &Device::Cpu)?;
        assert_eq!(
            all.narrow(0, 1, 1)?.flatten_all()?.to_vec1::<f32>()?,
            one.flatten_all()?.to_vec1::<f32>()?
        );
        let mut chw = vec![0.0; 18];
        rng::normals(7, 5, 9, &mut chw);
        assert_eq!(one.permute((0, 3, 1, 2))?.flatten_all()?.to_vec1::<f32>()?, chw);
        Ok(())
    }

    #[test]
    fn shard_ranges_say_what_they_expect() {
        assert_eq!("2..5".parse::<ShardRange>().unwrap().0, 2..5);
        for bad in ["5", "5..5", "a..3", "3..1", "..2"] {
            assert!(bad.parse::<ShardRange>().unwrap_err().contains("expected A..B"), "{bad}");
        }
    }

    #[test]
    fn states_round_trip_and_short_ones_are_no_states() {
        let bytes = write_state(17, &[0.5, -2.0]);
        assert_eq!(read_state(&bytes, 2), Some((17, vec![0.5, -2.0])));
        assert_eq!(read_state(&bytes, 3), None);
        assert_eq!(read_state(&bytes[..5], 2), None);
    }
}
