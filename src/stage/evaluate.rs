//! Evaluate: a classifier's accuracy, clean and under attack.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use arrow_array::{
    BooleanArray, Int64Array, StringArray,
    builder::{Float32Builder, ListBuilder},
};
use arrow_schema::{DataType, Field};
use candle_core::{Device, Tensor};
use clap::ValueEnum;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Job, Outcome, Stage, expect_images, note, shards, train::TrainRecord};
use crate::{
    Error, Result,
    attack::{
        AutoAttack, Epsilon, Loss, Norm, Pgd, PgdConfig, PgdLoss, Threat, Victim,
        search::{choice, distance},
    },
    data::{self, Dataset, Source, table},
    fs,
    nn::Classifier,
    progress::{Progress, check_stop},
    stats::clopper_pearson,
};

/// How the classifier is attacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum AttackKind {
    /// Not at all: clean accuracy only.
    None,
    /// Projected gradient descent (Madry et al. 2018).
    Pgd,
    /// AutoAttack's version `standard` (Croce & Hein 2020): apgd-ce, apgd-t, fab-t and square, each on the images that
    /// still stand.
    #[value(name = "autoattack")]
    #[serde(rename = "autoattack")]
    AutoAttack,
    /// APGD on the cross-entropy, 100 steps.
    ApgdCe,
    /// APGD on the difference of logits ratio, 100 steps.
    ApgdDlr,
    /// APGD towards each of nine classes, 100 steps each.
    ApgdT,
    /// FAB towards each of nine classes, 100 steps each.
    FabT,
    /// Square, 5,000 queries.
    Square,
}

/// Measures a classifier on real images: counts, not only percentages, with Clopper-Pearson intervals.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Evaluate {
    /// The classifier's folder (`config.json`, `model.safetensors`), such as that of a finished train.
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// The real data: `builtin:digits`, or a folder or file of Hugging Face Parquet.
    #[arg(long, default_value = "builtin:digits")]
    pub data: Source,
    /// The official split to measure on. Test is for measuring, never to choose anything.
    #[arg(long, value_enum, default_value_t = data::Split::Test)]
    pub split: data::Split,
    /// Use only the first N images; 0 for all.
    #[arg(long, default_value_t = 0)]
    pub limit: usize,
    /// The norm of the attack.
    #[arg(long, value_enum, default_value_t = Norm::Linf)]
    pub norm: Norm,
    /// The radius of the attack, for pixels in [0, 1].
    #[arg(long, default_value = "8/255")]
    pub epsilon: Epsilon,
    /// The attack.
    #[arg(long, value_enum, default_value_t = AttackKind::Pgd)]
    pub attack: AttackKind,
    /// Steps of pgd.
    #[arg(long, default_value_t = 20)]
    pub attack_steps: usize,
    /// The step of pgd as a multiple of epsilon / steps.
    #[arg(long, default_value_t = 2.5)]
    pub attack_step_ratio: f64,
    /// What pgd makes large.
    #[arg(long, value_enum, default_value_t = PgdLoss::Ce)]
    pub attack_loss: PgdLoss,
    /// Random starts of pgd. (APGD has one in AutoAttack, and here.)
    #[arg(long, default_value_t = 2)]
    pub restarts: usize,
    /// Keep the adversarial images that were found: `adversarial.safetensors`, tensor `images` (n×c×h×w, in [0, 1]; the
    /// image itself where none was found).
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub save_adversarial: bool,
    /// Unreadable rows of the source that are tolerated, skipped and counted.
    #[arg(long, default_value_t = 0)]
    pub max_bad: usize,
    /// Seed of the attack's random starts.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// `metrics.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Metrics {
    /// `proxyset.metrics/1`.
    pub schema: String,
    /// What the classifier was trained on, if it was trained here.
    pub train: Option<TrainRecord>,
    /// Images measured.
    pub images: u64,
    /// Images right as they are.
    pub clean_correct: u64,
    /// `clean_correct / images`.
    pub clean_accuracy: f64,
    /// 95 % Clopper-Pearson interval.
    pub clean_interval: [f64; 2],
    /// Images right under attack *and* as they are; none without an attack.
    pub robust_correct: Option<u64>,
    /// `robust_correct / images`.
    pub robust_accuracy: Option<f64>,
    /// 95 % Clopper-Pearson interval.
    pub robust_interval: Option<[f64; 2]>,
    /// The attack's settings.
    pub attack: serde_json::Value,
    /// Each attack in its turn: what it was given and what it left.
    #[serde(default)]
    pub survivors: Vec<Survivors>,
    /// What the adversarial images are like; none without one.
    #[serde(default)]
    pub perturbation: Option<Perturbation>,
    /// What throws doubt on the figures.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Seconds that this evaluation took, in the process that finished it.
    #[serde(default)]
    pub seconds: f64,
    /// The data, its split, and the BLAKE3 of its files.
    pub data: serde_json::Value,
    /// The BLAKE3 of the weights.
    pub model_blake3: String,
}

/// What one attack left standing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Survivors {
    /// The attack.
    pub attack: String,
    /// Images that stood before it.
    pub before: u64,
    /// Images that stood after it.
    pub after: u64,
    /// `after` over all images: the robust accuracy so far.
    pub accuracy: f64,
    /// 95 % Clopper-Pearson interval.
    pub interval: [f64; 2],
}

/// Extremes over the adversarial images that were found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Perturbation {
    /// The largest distance from the image, in the norm of the attack.
    pub largest: f64,
    /// Pixels that are not numbers.
    pub nan: u64,
    /// The smallest pixel.
    pub min: f64,
    /// The largest pixel.
    pub max: f64,
}

/// One attack of a sequence.
#[derive(Clone, Copy)]
enum Single {
    Pgd(Pgd),
    Of(AutoAttack),
}

impl Single {
    fn name(&self) -> String {
        match self {
            Self::Pgd(_) => "pgd".into(),
            Self::Of(attack) => attack.to_string(),
        }
    }
}

impl Evaluate {
    fn pgd(&self) -> Result<Pgd> {
        let (steps, ratio) = (self.attack_steps, self.attack_step_ratio);
        let pgd = Pgd::new(self.norm, self.epsilon, steps, ratio, self.restarts, self.seed)?;
        Ok(Pgd { config: PgdConfig { loss: self.attack_loss, ..pgd.config }, ..pgd })
    }

    /// The attacks, in their order.
    fn sequence(&self) -> Result<Vec<Single>> {
        let one = |attack| vec![Single::Of(attack)];
        Ok(match self.attack {
            AttackKind::None => Vec::new(),
            AttackKind::Pgd => vec![Single::Pgd(self.pgd()?)],
            AttackKind::AutoAttack => AutoAttack::STANDARD.into_iter().map(Single::Of).collect(),
            AttackKind::ApgdCe => one(AutoAttack::ApgdCe),
            AttackKind::ApgdDlr => one(AutoAttack::ApgdDlr),
            AttackKind::ApgdT => one(AutoAttack::ApgdT),
            AttackKind::FabT => one(AutoAttack::FabT),
            AttackKind::Square => one(AutoAttack::Square),
        })
    }

    /// What the attacks are, for the record.
    fn attack_settings(&self) -> serde_json::Value {
        let mut settings = json!({
            "kind": self.attack,
            "norm": self.norm,
            "epsilon": self.epsilon,
            "seed": self.seed,
        });
        if self.attack == AttackKind::Pgd {
            settings["steps"] = self.attack_steps.into();
            settings["step_size_times_steps_over_epsilon"] = self.attack_step_ratio.into();
            settings["loss"] = json!(self.attack_loss);
            settings["restarts"] = self.restarts.into();
        }
        settings
    }
}

/// Images that are attacked together. Results do not depend on it.
const CHUNK: usize = 64;
/// By how much Square may lower the robust accuracy before the gradient attacks are in doubt; AutoAttack's figure.
const SQUARE_TOLERANCE: f64 = 0.002;

/// The attacks on a data set.
struct Battle<'a> {
    victim: Victim<'a>,
    data: &'a Dataset,
    threat: Threat,
    seed: u64,
    parts: &'a fs::Parts,
}

impl Battle<'_> {
    /// Images `rows` as pixels in [0, 1], HWC.
    fn images(&self, rows: &[usize]) -> Vec<Vec<f32>> {
        rows.iter().map(|&row| unit_pixels(self.data, row)).collect()
    }

    /// Does `work` on chunks of `rows`, side by side on the CPU.
    fn by_chunks<T: Send>(
        &self,
        rows: &[usize],
        work: impl Fn(&[usize]) -> Result<Vec<T>> + Sync,
    ) -> Result<Vec<T>> {
        let done: Vec<Vec<T>> = if self.victim.device.is_cpu() {
            rows.par_chunks(CHUNK).with_max_len(1).map(&work).collect::<Result<_>>()?
        } else {
            rows.chunks(CHUNK).map(&work).collect::<Result<_>>()?
        };
        Ok(done.into_iter().flatten().collect())
    }

    /// The logits of every image.
    fn logits(&self) -> Result<Vec<Vec<f32>>> {
        let all: Vec<usize> = (0..self.data.len()).collect();
        self.by_chunks(&all, |rows| {
            check_stop()?;
            let images = self.images(rows);
            self.victim.logits(&images.iter().map(Vec::as_slice).collect::<Vec<_>>())
        })
    }

    /// What `attack` finds for the images that stand. Finished chunks are kept and found again.
    fn fight(&self, attack: Single, standing: &[usize], bar: &Progress) -> Result<Vec<Option<Vec<f32>>>> {
        self.by_chunks(standing, |rows| {
            check_stop()?;
            let images = self.images(rows);
            let images: Vec<&[f32]> = images.iter().map(Vec::as_slice).collect();
            let key = format!("{}-{:08}-{:08}", attack.name(), rows[0], rows[rows.len() - 1]);
            let found =
                match self.parts.get(&key)?.and_then(|bytes| unpack(&bytes, rows.len(), images[0].len())) {
                    Some(found) => found,
                    None => {
                        let found = self.search(attack, rows, &images)?;
                        self.parts.put(&key, &pack(&found))?;
                        found
                    }
                };
            bar.add(rows.len() as u64);
            Ok(found)
        })
    }

    /// The attack on some images, and the proof: what it returns is in the ball and not answered by its label.
    fn search(&self, attack: Single, rows: &[usize], images: &[&[f32]]) -> Result<Vec<Option<Vec<f32>>>> {
        let labels: Vec<usize> = rows.iter().map(|&row| self.data.labels[row] as usize).collect();
        let ids: Vec<u64> = rows.iter().map(|&row| row as u64).collect();
        let mut found = match attack {
            Single::Of(attack) => {
                attack.run(&self.victim, self.threat, 1, self.seed, (images, &labels, &ids))?
            }
            Single::Pgd(pgd) => {
                let (h, w, c) = self.victim.shape;
                let x = Tensor::from_vec(images.concat(), (rows.len(), h, w, c), self.victim.device)?;
                let y: Vec<u32> = labels.iter().map(|&label| label as u32).collect();
                let y = Tensor::new(y, self.victim.device)?;
                let x_adv = pgd.perturb(&self.victim.logits_of, &x, &y, &ids)?;
                x_adv.flatten_from(1)?.to_vec2::<f32>()?.into_iter().map(Some).collect()
            }
        };
        let claimed: Vec<usize> = (0..found.len()).filter(|&i| found[i].is_some()).collect();
        if claimed.is_empty() {
            return Ok(found);
        }
        let points: Vec<&[f32]> = claimed.iter().filter_map(|&i| found[i].as_deref()).collect();
        let answers = self.victim.logits(&points)?;
        let epsilon = self.threat.epsilon();
        for (point, &i) in points.iter().zip(&claimed) {
            let moved = f64::from(distance(self.threat.norm(), point, images[i]));
            // Rounding of pixels, and of sums of their squares.
            if moved > epsilon + 1e-6 * epsilon.max(1.0) {
                bail!(
                    Alarm,
                    "{} moved image {} by {moved}, expected at most {epsilon}",
                    attack.name(),
                    rows[i]
                );
            }
        }
        for (&i, logits) in claimed.iter().zip(answers) {
            if choice(&logits) == Some(labels[i]) {
                found[i] = None;
            }
        }
        Ok(found)
    }

    /// The doubts that AutoAttack's authors check for before it runs (their `checks.py`): a network that answers
    /// differently each time, probabilities instead of logits, images without a gradient.
    fn doubts(&self, logits: &[Vec<f32>], correct: &[usize]) -> Result<Vec<String>> {
        let mut doubts = Vec::new();
        let first: Vec<usize> = (0..self.data.len().min(CHUNK)).collect();
        let images = self.images(&first);
        let again = self.victim.logits(&images.iter().map(Vec::as_slice).collect::<Vec<_>>())?;
        if again.iter().zip(logits).any(|(a, b)| a != b) {
            doubts.push(
                "the network answers the same image differently: a randomised defence needs attacks that \
                         average over its draws"
                    .to_owned(),
            );
        }
        let is_distribution = |row: &Vec<f32>| {
            let sum: f32 = row.iter().sum();
            row.iter().all(|v| (-1e-5..=1.0 + 1e-5).contains(v)) && (sum - 1.0).abs() < 1e-5
        };
        if logits.iter().all(is_distribution) {
            doubts
                .push("the network returns probabilities, expected logits: gradients may vanish".to_owned());
        }
        let silent = self.by_chunks(correct, |rows| {
            check_stop()?;
            let images = self.images(rows);
            let points: Vec<&[f32]> = images.iter().map(Vec::as_slice).collect();
            let weights =
                |i: usize, logits: &[f32]| Loss::Margin.of(logits, self.data.labels[rows[i]] as usize).1;
            let answers = self.victim.logits_and_gradients(&points, weights)?;
            Ok(answers.into_iter().map(|(_, gradient)| gradient.iter().all(|&g| g == 0.0)).collect())
        })?;
        let silent = silent.into_iter().filter(|&s| s).count();
        if silent > 0 {
            doubts.push(format!(
                "{silent} images have no gradient: what gradient attacks leave standing there says little"
            ));
        }
        Ok(doubts)
    }
}

/// A byte an image, whether something was found; then what was found.
fn pack(found: &[Option<Vec<f32>>]) -> Vec<u8> {
    let mut bytes: Vec<u8> = found.iter().map(|f| u8::from(f.is_some())).collect();
    bytes.extend(found.iter().flatten().flatten().flat_map(|v| v.to_le_bytes()));
    bytes
}

/// The inverse of [`pack`] for `n` images of `size` pixels; none if the bytes are not that.
fn unpack(bytes: &[u8], n: usize, size: usize) -> Option<Vec<Option<Vec<f32>>>> {
    let (flags, pixels) = bytes.split_at_checked(n)?;
    let hits = flags.iter().filter(|&&f| f == 1).count();
    if flags.iter().any(|&f| f > 1) || pixels.len() != hits * size * 4 {
        return None;
    }
    let mut images = pixels
        .chunks_exact(size * 4)
        .map(|image| image.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect());
    flags.iter().map(|&f| if f == 1 { images.next().map(Some) } else { Some(None) }).collect()
}

impl Stage for Evaluate {
    const NAME: &'static str = "evaluate";
    const INPUTS: &'static [&'static str] = &["model", "data"];

    fn validate(&self) -> Result<()> {
        self.pgd().map(drop)
    }

    fn amount(&self) -> String {
        let images = if self.limit > 0 { format!("{} images", self.limit) } else { "all images".into() };
        match self.attack {
            AttackKind::None => format!("{images}, clean"),
            AttackKind::Pgd => format!(
                "{images}, PGD-{} with {} restarts at {} {}",
                self.attack_steps, self.restarts, self.norm, self.epsilon
            ),
            kind => {
                let name = kind.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned());
                format!("{images}, {name} at {} {}", self.norm, self.epsilon)
            }
        }
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let Some(dir) = &self.model else {
            bail!(Usage, "model is not set, expected the folder of a classifier")
        };
        let started = Instant::now();
        let classifier = Classifier::load(dir, &job.device)?;
        let data = self.data.load(self.split, (self.limit > 0).then_some(self.limit), self.max_bad)?;
        expect_images(&classifier, dir, &self.data, data.shape)?;
        let classes = classifier.config().class_names.len();
        if classes != data.class_names.len() {
            bail!(
                Data,
                "classifier {} knows {classes} classes, but {} has {}",
                dir.display(),
                self.data,
                data.class_names.len()
            );
        }
        let trained = dir.join("train.json");
        let train = if trained.is_file() { Some(fs::read_json(&trained)?) } else { None };

        let (out, _lock) = job.open("run")?;
        let parts = fs::Parts::new(job.hidden(out, "parts"));
        let logits_of = |x: &Tensor| classifier.logits(x);
        let shape = (data.shape.height, data.shape.width, data.shape.channels);
        let battle = Battle {
            victim: Victim { logits_of: &logits_of, shape, device: &job.device },
            data: &data,
            threat: Threat::new(self.norm, self.epsilon)?,
            seed: self.seed,
            parts: &parts,
        };
        let n = data.len() as u64;
        let share = |x: u64| x as f64 / n as f64;
        let logits = battle.logits()?;
        let right = |row: usize| choice(&logits[row]) == Some(data.labels[row] as usize);
        let clean: Vec<bool> = (0..data.len()).map(right).collect();
        let mut standing: Vec<usize> = (0..data.len()).filter(|&row| clean[row]).collect();
        let clean_correct = standing.len() as u64;
        let sequence = self.sequence()?;
        let mut warnings =
            if sequence.is_empty() { Vec::new() } else { battle.doubts(&logits, &standing)? };
        warnings.iter().for_each(|doubt| note(self, &format!("warning: {doubt}")));

        let mut broken_by: Vec<Option<String>> = vec![None; data.len()];
        let mut adversarial: Vec<Option<Vec<f32>>> = vec![None; data.len()];
        let mut survivors = Vec::new();
        let bar = Progress::new(Self::NAME, clean_correct * sequence.len() as u64, "images");
        for &attack in &sequence {
            let before = standing.len() as u64;
            let found = battle.fight(attack, &standing, &bar)?;
            for (&row, found) in standing.iter().zip(found) {
                if found.is_some() {
                    broken_by[row] = Some(attack.name());
                    adversarial[row] = found;
                }
            }
            standing.retain(|&row| broken_by[row].is_none());
            let after = standing.len() as u64;
            bar.skip((clean_correct - before) * u64::from(before > 0));
            let (accuracy, interval) = (share(after), clopper_pearson(after, n, 0.05));
            note(
                self,
                &format!(
                    "{}: {after} of {before} stand, robust accuracy {:.2} %",
                    attack.name(),
                    100.0 * accuracy
                ),
            );
            if matches!(attack, Single::Of(AutoAttack::Square))
                && sequence.len() > 1
                && share(before) - accuracy > SQUARE_TOLERANCE
            {
                let doubt = format!(
                    "Square lowered the robust accuracy by {:.2} points, which gradient attacks should have done: \
                     the network may hide its gradients",
                    100.0 * (share(before) - accuracy)
                );
                note(self, &format!("warning: {doubt}"));
                warnings.push(doubt);
            }
            survivors.push(Survivors { attack: attack.name(), before, after, accuracy, interval });
        }
        let perturbation = (!sequence.is_empty()).then(|| extremes(self.norm, &data, &adversarial));
        let robust_correct = (!sequence.is_empty()).then_some(standing.len() as u64);
        let metrics = Metrics {
            schema: "proxyset.metrics/1".into(),
            train,
            images: n,
            clean_correct,
            clean_accuracy: share(clean_correct),
            clean_interval: clopper_pearson(clean_correct, n, 0.05),
            robust_correct,
            robust_accuracy: robust_correct.map(share),
            robust_interval: robust_correct.map(|x| clopper_pearson(x, n, 0.05)),
            attack: self.attack_settings(),
            survivors,
            perturbation,
            warnings,
            seconds: started.elapsed().as_secs_f64(),
            data: json!({
                "source": self.data,
                "split": self.split,
                "blake3": self.data.fingerprint(self.split)?,
                "bad_rows": data.bad_rows,
            }),
            model_blake3: fs::hash_file(&dir.join("model.safetensors"))?.0,
        };
        let list = DataType::List(Arc::new(Field::new_list_field(DataType::Float32, false)));
        let schema = shards::schema(&[
            ("index", DataType::Int64, false),
            ("label", DataType::Int64, false),
            ("clean_logits", list, false),
            ("clean_correct", DataType::Boolean, false),
            ("robust_correct", DataType::Boolean, true),
            ("broken_by", DataType::Utf8, true),
        ]);
        let mut clean_logits = ListBuilder::new(Float32Builder::new())
            .with_field(Field::new_list_field(DataType::Float32, false));
        for row in &logits {
            clean_logits.values().append_slice(row);
            clean_logits.append(true);
        }
        let robust_column = if sequence.is_empty() {
            BooleanArray::new_null(data.len())
        } else {
            BooleanArray::from(
                (0..data.len()).map(|row| clean[row] && broken_by[row].is_none()).collect::<Vec<_>>(),
            )
        };
        let batch = shards::batch(
            &schema,
            vec![
                Arc::new(Int64Array::from_iter_values(0..n as i64)),
                Arc::new(Int64Array::from_iter_values(data.labels.iter().map(|&l| i64::from(l)))),
                Arc::new(clean_logits.finish()),
                Arc::new(BooleanArray::from(clean)),
                Arc::new(robust_column),
                Arc::new(StringArray::from(broken_by)),
            ],
        )?;
        table::write(&out.join("images.parquet"), &schema, [Ok(batch)], table::ROW_GROUP_ROWS, &[])?;
        if self.save_adversarial {
            save_images(&out.join("adversarial.safetensors"), &data, &adversarial)?;
        }
        fs::publish_json(&out.join("metrics.json"), &metrics)?;
        if let Some(Perturbation { largest, nan, min, max }) = &metrics.perturbation {
            note(
                self,
                &format!(
                    "largest {} perturbation {largest:.5}, not a number {nan}, pixels {min:.5} to {max:.5}; robust \
                     accuracy {:.2} %",
                    self.norm,
                    100.0 * metrics.robust_accuracy.unwrap_or(f64::NAN)
                ),
            );
        }
        Ok(Outcome::Done(json!(metrics)))
    }
}

/// Image `row` as pixels in [0, 1].
fn unit_pixels(data: &Dataset, row: usize) -> Vec<f32> {
    data.image(row).iter().map(|&p| f32::from(p) / 255.0).collect()
}

/// Over all images, adversarial where one was found, else as they are: as AutoAttack's last line has it.
fn extremes(norm: Norm, data: &Dataset, adversarial: &[Option<Vec<f32>>]) -> Perturbation {
    let mut found = Perturbation { largest: 0.0, nan: 0, min: f64::INFINITY, max: f64::NEG_INFINITY };
    for (row, adversarial) in adversarial.iter().enumerate() {
        let clean = unit_pixels(data, row);
        let image = adversarial.as_ref().unwrap_or(&clean);
        found.largest = found.largest.max(f64::from(distance(norm, image, &clean)));
        found.nan += image.iter().filter(|v| v.is_nan()).count() as u64;
        found.min = image.iter().fold(found.min, |min, &v| min.min(f64::from(v)));
        found.max = image.iter().fold(found.max, |max, &v| max.max(f64::from(v)));
    }
    found
}

/// The images as `attack` left them: tensor `images`, n×c×h×w.
fn save_images(path: &Path, data: &Dataset, adversarial: &[Option<Vec<f32>>]) -> Result<()> {
    let (h, w, c) = (data.shape.height, data.shape.width, data.shape.channels);
    let image = |row: usize| adversarial[row].clone().unwrap_or_else(|| unit_pixels(data, row));
    let pixels: Vec<f32> = (0..data.len()).flat_map(image).collect();
    let nhwc = Tensor::from_vec(pixels, (data.len(), h, w, c), &Device::Cpu)?;
    let images = nhwc.permute((0, 3, 1, 2))?.contiguous()?;
    let bytes = safetensors::serialize([("images", &images)], None)
        .map_err(|e| Error::Alarm(format!("adversarial images cannot be written: {e}")))?;
    fs::publish(path, &bytes)
}
