//! Fit-discriminator: robust binary networks that tell real from synthetic, one per radius and fold.

use std::{
    ops::Range as Span,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    Error, Result,
    attack::{Counted, Epsilon, Norm, Pgd, PgdSearch},
    data::{Dataset, Range, Shape, augmented},
    device::side_by_side,
    error::expect_within as expect,
    evaluation::{Evaluation, share},
    fs::{self, Record},
    nn::{Architecture, Classifier, ClassifierConfig},
    objective::{Targets, pgd_at},
    progress::Progress,
    proxy::{
        REAL, SYNTHETIC,
        calibration::Calibration,
        discriminator::{self, Discriminator},
        fold::{HeldOut, fold_of, held_out},
    },
    rng::{Permutation, some_of, spread},
    settings::{
        self, ArchitectureSettings, AugmentationSettings, OptimizerSettings, ScheduleSettings, StepSettings,
    },
    stage::{Input, Job, Outcome, Stage, note, read_done},
    tables::{
        discriminators::{NetRecord, SetsRecord, condition, margins, relabel},
        division::{Real, SPLIT},
        pool::{POOL, Pool},
    },
    training::{Part, Trainer},
};

/// PGD from one random start at each radius of a grid.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
pub struct GridAttackSettings {
    /// The norm of the attack.
    #[arg(long, value_parser = settings::named::<Norm>(), default_value_t = Norm::Linf)]
    pub norm: Norm,
    /// The grid of radii for pixels in [0, 1]: at least four, ascending, the first 0.
    #[arg(long, value_delimiter = ',', default_values = ["0", "4/255", "8/255", "16/255"])]
    pub epsilons: Vec<Epsilon>,
    /// The steps.
    #[command(flatten)]
    #[serde(flatten)]
    pub steps: StepSettings,
}

/// Trains discriminators under attack: `folds` sets for ranking, and one set of judges.
///
/// Ranking set `f` learns from the real `fit` images and the pool images of fold `f`; it is stopped and calibrated
/// on proxy fold `f` and on held-out pool images. The judges learn from the proxy images and a pool fold of their
/// own, so they share no training image with the ranking sets. Each set has one network per radius or, if
/// conditioned, a single network that is told the radius.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[command(mut_args(settings::defaults(&[
    ("attack_steps", "7", &[]),
    ("architecture", "small-cnn", &[("channels", "16,32,32")]),
    ("optimizer", "adam", &[("weight_decay", "1e-4")]),
    ("final_fraction", "0.05", &[]),
])))]
pub struct FitDiscriminator {
    /// The folder of a finished split stage: the real data.
    #[arg(long)]
    pub split: Option<PathBuf>,
    /// The folder of a finished generate or import stage: the synthetic data.
    #[arg(long)]
    pub pool: Option<PathBuf>,
    /// Number of pool folds for ranking, at least 2. An image is scored by the sets that were not trained on its
    /// fold.
    #[arg(long, default_value_t = 2)]
    pub folds: usize,
    /// The attack for training and stopping.
    #[command(flatten)]
    pub attack: GridAttackSettings,
    /// Train one network per set, which sees the radius as an extra channel, instead of one per radius. Its steps
    /// are shared among the radii.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub conditioned: bool,
    /// Also train the judges, which score needs and arc does not.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub judges: bool,
    /// The share of the steps over which the radius grows to its full size. Networks for large radii learn nothing
    /// if they meet the full attack from the first step.
    #[arg(long, default_value_t = 0.5)]
    pub epsilon_warmup: f64,
    /// The networks.
    #[command(flatten)]
    pub architecture: ArchitectureSettings,
    /// Optimiser steps of each network.
    #[arg(long, default_value_t = 400)]
    pub steps: usize,
    /// Images per step, half of them real.
    #[arg(long, default_value_t = 64)]
    pub batch: usize,
    /// The optimiser.
    #[command(flatten)]
    pub optimizer: OptimizerSettings,
    /// The learning rate over the steps.
    #[command(flatten)]
    pub schedule: ScheduleSettings,
    /// Decay of the moving average of the weights.
    #[arg(long, default_value_t = 0.99)]
    pub ema_decay: f64,
    /// Random augmentation of the images of both sides.
    #[command(flatten)]
    pub augmentation: AugmentationSettings,
    /// Steps between evaluations on the stopping images.
    #[arg(long, default_value_t = 50)]
    pub eval_every: usize,
    /// The largest number of synthetic images that a set learns from.
    #[arg(long, default_value_t = 50_000)]
    pub max_synthetic: usize,
    /// The largest number of images from each source that are used to stop and calibrate a network.
    #[arg(long, default_value_t = 1000)]
    pub max_stop: usize,
    /// Seed of the initial weights, the order of the images, the augmentation and the attack.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// What one set learns from and is stopped on, labelled [`REAL`] and [`SYNTHETIC`].
struct SetData {
    real: Dataset,
    synthetic: Dataset,
    stop: Dataset,
}

impl FitDiscriminator {
    /// The data of each set.
    fn data(&self, real: &Real, pool: &Pool) -> Result<Vec<SetData>> {
        let sets = self.sets();
        let wanted = [vec![self.max_synthetic; sets], vec![self.max_stop; sets]].concat();
        let mut learn = pool.draw(&wanted, |uid| {
            // The judges' fold stays reserved even if there are no judges.
            let fold = fold_of(uid, self.folds + 1);
            let stops = (0..sets).filter(|&set| set != fold && held_out(uid) == HeldOut::Stop);
            (fold..=fold).filter(|&set| set < sets).chain(stops.map(|set| sets + set)).collect()
        })?;
        let stop = learn.split_off(sets);
        let of_set = |(set, (learn, stop))| self.set_data(real, learn, stop, set);
        Ok(learn.into_iter().zip(&stop).enumerate().map(of_set).collect())
    }

    fn set_data(&self, real: &Real, synthetic: Dataset, synthetic_stop: &Dataset, set: usize) -> SetData {
        let judges = set == self.folds;
        let (learn, stop) =
            if judges { (real.proxy(), real.fit()) } else { (real.fit(), real.proxy_stop(set)) };
        let n_stop = stop.len().min(self.max_stop).min(synthetic_stop.len());
        let stop = stop.subset(&spread(stop.len(), n_stop, self.seed));
        let synthetic_stop = synthetic_stop.subset(&some_of(synthetic_stop.len(), n_stop, self.seed));
        SetData {
            real: relabel(learn, REAL),
            synthetic: relabel(synthetic, SYNTHETIC),
            stop: relabel(stop, REAL).concat(&relabel(synthetic_stop, SYNTHETIC)),
        }
    }

    /// Sets of networks.
    fn sets(&self) -> usize {
        self.folds + usize::from(self.judges)
    }

    /// The radii of each network of a set.
    fn spans(&self) -> Vec<Span<usize>> {
        let all = 0..self.attack.epsilons.len();
        if self.conditioned { vec![all] } else { all.map(|radius| radius..radius + 1).collect() }
    }

    /// The network for images of this shape.
    fn architecture(&self, shape: Shape) -> Architecture {
        let told = condition(self.conditioned, &self.attack.epsilons, 0).channels();
        self.architecture.network(Shape { channels: shape.channels + told, ..shape }, 2, None)
    }

    /// The attack at one radius.
    fn attack(&self, epsilon: Epsilon, seed: u64) -> Result<Pgd> {
        self.attack.steps.pgd(self.attack.norm, epsilon, seed)
    }

    /// Trains one network for some radii, or finds it trained. Returns a record for each of them.
    fn fit(
        &self,
        job: &Job,
        out: &Path,
        set: usize,
        radii: Span<usize>,
        (config, data): (&ClassifierConfig, &SetData),
        bar: &Progress,
    ) -> Result<Vec<NetRecord>> {
        let judges = set == self.folds;
        let mut path = if judges { "judge".into() } else { format!("rank{set}") };
        if !self.conditioned {
            path += &format!("-{}", radii.start);
        }
        let dir = out.join(&path);
        let record_path = dir.join("net.json");
        if record_path.is_file() {
            bar.skip(self.steps as u64);
            return fs::read_json(&record_path);
        }
        // Every network has a seed of its own, so that what they agree on is not an accident of initialisation.
        let seed = self.seed ^ (((set as u64 + 1) << 16 | (radii.start as u64 + 1)) << 32);
        let shape = data.real.shape;
        let net = Classifier::init(config.clone(), seed, &job.device)?;
        let averaged = Arc::new(Classifier::init(config.clone(), seed, &job.device)?);
        let at = |radius: usize| condition(self.conditioned, &self.attack.epsilons, radius);
        let averaged_at = |radius: usize| Discriminator::new(averaged.clone(), at(radius));
        let tracked = net.tracked()?;
        let optimizer = self.optimizer.optimizer();
        let checkpoint = job.hidden(out, &path);
        let mut trainer = Trainer::resume(checkpoint, net.params(), optimizer, self.ema_decay)?;
        bar.skip(trainer.step() as u64);
        let lr = self.schedule.schedule(self.optimizer.learning_rate(), self.steps);
        let attacks =
            radii.clone().map(|r| self.attack(self.attack.epsilons[r], seed)).collect::<Result<Vec<_>>>()?;
        let half = self.batch / 2;
        let settings = self.augmentation.augment();
        let warmup = (self.epsilon_warmup * self.steps as f64).round() as usize;
        while trainer.step() < self.steps {
            let step = trainer.step();
            let grown = radii.clone().map(|r| self.attack(self.attack.epsilons[r].grown(step, warmup), seed));
            let grown = grown.collect::<Result<Vec<_>>>()?;
            // With several radii, each quarter of the batch gets one of them in turn.
            let turn_of = |slot: usize| (step + slot * 4 / (2 * half)) % radii.len();
            let block_loss = |slots: &[usize]| -> Result<Tensor> {
                let turn = turn_of(slots[0]);
                let (mut pixels, mut labels, mut ids) = (Vec::new(), Vec::new(), Vec::new());
                for slot in slots {
                    // Real and synthetic alternate, so that every part of the batch has both.
                    let (source, side) =
                        if slot % 2 == 0 { (&data.real, REAL) } else { (&data.synthetic, SYNTHETIC) };
                    let position = (step * half + slot / 2) as u64;
                    let len = source.len() as u64;
                    let tweak = (u64::from(side) << 48) | (position / len);
                    let image = Permutation::new(seed, tweak, len).at(position % len) as usize;
                    pixels.extend_from_slice(source.image(image));
                    labels.push(side);
                    ids.push((u64::from(side) << 48) | position);
                }
                let x = augmented(&pixels, shape, &ids, seed, settings, Range::Unit, &job.device)?;
                let y = Tensor::new(labels, &job.device)?;
                let told = at(radii.start + turn);
                let tracked = |x: &Tensor| tracked.logits(&told.apply(x)?);
                let frozen = |x: &Tensor| net.logits(&told.apply(x)?);
                let losses = pgd_at(&tracked, &frozen, &x, &Targets::new(&y, 0.0), &grown[turn], &ids)?;
                Ok((losses.sum_all()? / (2 * half) as f64)?)
            };
            let contribution = |slots: Span<usize>| -> Result<Part> {
                let slots = Vec::from_iter(slots);
                let mut blocks = slots.chunk_by(|&a, &b| turn_of(a) == turn_of(b)).map(&block_loss);
                let none = || Error::Alarm("a part of a batch is empty".into());
                let first = blocks.next().ok_or_else(none)??;
                Ok(Part::from(blocks.try_fold(first, |sum, block| Ok::<_, Error>((sum + block?)?))?))
            };
            trainer.advance(lr.at(step), self.optimizer.grad_clip(), 2 * half, &contribution)?;
            // A network that has not met the full radius yet is not a candidate.
            let full = trainer.step() >= warmup;
            if full && trainer.step().is_multiple_of(self.eval_every) || trainer.step() == self.steps {
                let mut by_radius = Vec::new();
                let accuracy = trainer.consider(averaged.params(), || {
                    for (radius, attack) in radii.clone().zip(&attacks) {
                        let net = averaged_at(radius);
                        let logits_of = |x: &Tensor| net.logits(x);
                        let attack = PgdSearch::new(*attack, 1, Counted::Every)?;
                        let stop = Evaluation::new(&logits_of, &data.stop, &job.device);
                        let stands = stop.stands("stop", &vec![true; data.stop.len()], &attack)?;
                        by_radius.push(share(&stands));
                    }
                    Ok(by_radius.iter().sum::<f64>() / by_radius.len() as f64)
                })?;
                trainer.log(json!({ "stop_accuracy": accuracy, "by_radius": by_radius }));
            }
            bar.add(1);
            trainer.end_step()?;
        }
        let stop_accuracy = trainer.load_best(averaged.params())?.unwrap_or(f64::NAN);
        let kept = trainer.log_lines().iter().rfind(|l| l["stop_accuracy"] == json!(stop_accuracy));
        let kept = kept.cloned().unwrap_or_default();
        let mut records = Vec::new();
        for (i, radius) in radii.enumerate() {
            let margins = margins(&averaged_at(radius), &data.stop, &job.device)?;
            let of = |side: u32| -> Vec<f64> {
                let both = margins.iter().zip(&data.stop.labels);
                both.filter(|(_, l)| **l == side).map(|(m, _)| f64::from(*m)).collect()
            };
            records.push(NetRecord {
                path: path.clone(),
                epsilon: self.attack.epsilons[radius],
                stop_accuracy: kept["by_radius"][i].as_f64().unwrap_or(f64::NAN),
                kept_step: kept["step"].as_u64().unwrap_or(0) as usize,
                calibration: Calibration::fit(&of(REAL), &of(SYNTHETIC)),
            });
        }
        averaged.save(&dir)?;
        fs::publish(&dir.join("metrics.jsonl"), trainer.log_text().as_bytes())?;
        fs::publish_json(&record_path, &records)?;
        Ok(records)
    }
}

impl Stage for FitDiscriminator {
    const NAME: &'static str = "fit-discriminator";
    const ABOUT: &'static str = "Train robust real/synthetic discriminators";
    const INPUTS: &'static [Input] = &[SPLIT, POOL];
    const REVISION: u32 = 1;

    fn validate(&self) -> Result<()> {
        expect("folds", self.folds, 2, 64)?;
        self.architecture.validate()?;
        if self.architecture.has_batch_norm() {
            bail!(
                Usage,
                "the discriminators' architecture has batch norm, which tells a network what else is in the batch; \
                 expected one without, such as small-cnn"
            );
        }
        expect("epsilon_warmup", self.epsilon_warmup, 0.0, 1.0)?;
        expect("steps", self.steps, 1, 100_000_000)?;
        expect("batch", self.batch, 2, 1 << 20)?;
        self.augmentation.validate()?;
        self.optimizer.validate()?;
        self.schedule.validate()?;
        expect("ema_decay", self.ema_decay, 0.0, 0.999_999)?;
        expect("eval_every", self.eval_every, 1, usize::MAX)?;
        expect("max_synthetic", self.max_synthetic, 2, usize::MAX)?;
        expect("max_stop", self.max_stop, 2, usize::MAX)?;
        let radii: Vec<f64> = self.attack.epsilons.iter().map(|e| e.get()).collect();
        let listed = self.attack.epsilons.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        if radii.len() < 4 || radii[0] != 0.0 || radii.windows(2).any(|w| w[0] >= w[1]) {
            bail!(Usage, "epsilons is [{listed}], expected at least four ascending radii, the first 0");
        }
        self.attack.epsilons.iter().try_for_each(|&epsilon| self.attack(epsilon, self.seed).map(drop))
    }

    fn check_inputs(&self) -> Result<()> {
        let (Some(split), Some(pool)) = (&self.split, &self.pool) else { return Ok(()) };
        let (Some(split), Some(_)) = (read_done(split)?, read_done(pool)?) else { return Ok(()) };
        let real = serde_json::from_value(split.summary["shape"].clone())
            .map_err(|e| Error::Data(format!("split: done.json does not say the shape: {e}")))?;
        Pool::open(Some(pool))?.expect_shape(real)
    }

    fn amount(&self) -> String {
        format!(
            "{} networks ({} radii{}, {} folds{}), {} steps of {} images, PGD-{}",
            self.spans().len() * self.sets(),
            self.attack.epsilons.len(),
            if self.conditioned { " in each" } else { "" },
            self.folds,
            if self.judges { " and judges" } else { "" },
            self.steps,
            self.batch,
            self.attack.steps.steps
        )
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let real = Real::load(&SPLIT.finished(self.split.as_deref())?)?;
        let pool = Pool::open(self.pool.as_deref())?;
        pool.expect_shape(real.train.shape)?;
        let config = discriminator::config(self.architecture(real.train.shape))?;
        let data = self.data(&real, &pool)?;
        for (set, data) in data.iter().enumerate() {
            let n = data.synthetic.len().min(data.stop.len());
            if n < 2 {
                bail!(
                    Data,
                    "the pool has {n} images for discriminator set {set}, expected at least 2; generate more"
                );
            }
        }
        let out = job.open()?;
        let spans = self.spans();
        let units: Vec<(usize, Span<usize>)> =
            (0..self.sets()).flat_map(|set| spans.iter().map(move |span| (set, span.clone()))).collect();
        let bar = Progress::new(Self::NAME, (units.len() * self.steps) as u64, "steps");
        let fit = |(set, radii): &(usize, Span<usize>)| {
            self.fit(job, out, *set, radii.clone(), (&config, &data[*set]), &bar)
        };
        let nets = side_by_side(&job.device, &units, fit)?.concat();
        let sets: Vec<Vec<NetRecord>> = nets.chunks(self.attack.epsilons.len()).map(<[_]>::to_vec).collect();
        let accuracies: Vec<Vec<f64>> =
            sets.iter().map(|set| set.iter().map(|n| n.stop_accuracy).collect()).collect();
        note(self, &format!("stopping accuracies by set and radius: {accuracies:.3?}"));
        let record = SetsRecord {
            schema: "proxyset.discriminators/1".into(),
            norm: self.attack.norm,
            epsilons: self.attack.epsilons.clone(),
            folds: self.folds,
            conditioned: self.conditioned,
            sets,
        };
        record.write(out)?;
        Ok(Outcome::Done(json!({
            "epsilons": self.attack.epsilons,
            "stop_accuracy": accuracies,
            "learned_from": data.iter().map(|d| [d.real.len(), d.synthetic.len()]).collect::<Vec<_>>(),
            "stopped_on": data.iter().map(|d| d.stop.len()).collect::<Vec<_>>(),
        })))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::{
        data::{OfficialSplit, Source, decode_as, encode_png, to_tensor, to_u8},
        nn::{Architecture, SmallCnnConfig},
        proxy::discriminator::RadiusConditioning,
        rng::Stream,
    };

    fn digits(n: usize) -> Dataset {
        Source::Digits.load(OfficialSplit::Train, Some(n), 0).unwrap()
    }

    fn network(images: &Dataset) -> Discriminator {
        let architecture = Architecture::SmallCnn(SmallCnnConfig {
            in_channels: 1,
            image_size: images.shape.height,
            channels: vec![8, 16],
            num_classes: 2,
            groups: 8,
        });
        let config = discriminator::config(architecture).unwrap();
        Discriminator::new(
            Arc::new(Classifier::init(config, 3, &Device::Cpu).unwrap()),
            RadiusConditioning::None,
        )
    }

    #[test]
    fn rounding_and_png_make_of_a_generators_floats_what_a_real_image_of_those_levels_is() {
        let real = digits(50);
        let levels = to_tensor(&real.pixels, real.shape, Range::Signed, &Device::Cpu).unwrap();
        // A generator's pixels lie anywhere around a grey level.
        let mut stream = Stream::new(1, 0, 0);
        let noise: Vec<f32> =
            real.pixels.iter().map(|_| 0.98 / 127.5 * (stream.uniform() as f32 - 0.5)).collect();
        let noise = Tensor::from_vec(noise, levels.shape(), &Device::Cpu).unwrap();
        let pixels = to_u8(&(levels + noise).unwrap(), Range::Signed).unwrap();
        let files = pixels.chunks(real.shape.size()).map(|image| encode_png(image, real.shape));
        let read: Vec<u8> = files.flat_map(|file| decode_as(&file, real.shape).unwrap()).collect();
        assert!(read == real.pixels);
    }

    #[test]
    fn an_images_margin_does_not_depend_on_its_side_or_on_the_images_beside_it() {
        let real = digits(130);
        let net = network(&real);
        let of = |data: &Dataset| margins(&net, data, &Device::Cpu).unwrap();
        let together = of(&relabel(real.clone(), REAL));
        assert!(together.iter().any(|m| *m != together[0]), "a network that sees nothing proves nothing");
        assert_eq!(of(&relabel(real.clone(), SYNTHETIC)), together);
        for i in [0, 63, 64, 129] {
            assert_eq!(of(&real.subset(&[i])), [together[i]], "image {i} alone");
        }
        // Beside images of one class only, or of all of them: the mean of the batch is another one.
        let ones: Vec<usize> = (0..real.len()).filter(|&i| real.labels[i] == real.labels[0]).collect();
        let alike = of(&real.subset(&ones));
        for (margin, i) in alike.iter().zip(ones) {
            assert_eq!(*margin, together[i], "image {i} among its class");
        }
    }
}
