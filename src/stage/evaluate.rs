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
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    AnyStage, Examined, Job, Outcome, Stage,
    attacks::{Battle, Single, unit_pixels},
    note, shards,
    train::TrainRecord,
};
use crate::{
    Error, Result,
    attack::{
        AutoAttack, Epsilon, Norm, Pgd, PgdConfig, PgdLoss, Threat, Victim, autoattack,
        search::{choice, distance},
    },
    data::{self, Dataset, Source, table},
    fs,
    progress::Progress,
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
    #[arg(long, value_parser = settings::named::<data::Split>(), default_value_t = data::Split::Test)]
    pub split: data::Split,
    /// Use only the first N images; 0 for all.
    #[arg(long, default_value_t = 0)]
    pub limit: usize,
    /// The norm of the attack.
    #[arg(long, value_parser = settings::named::<Norm>(), default_value_t = Norm::Linf)]
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
    #[arg(long, value_parser = settings::named::<PgdLoss>(), default_value_t = PgdLoss::Ce)]
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
        } else if self.attack != AttackKind::None {
            settings["settings"] = json!({
                "steps": autoattack::STEPS,
                "restarts": autoattack::RESTARTS,
                "targets": autoattack::TARGETS,
                "queries": autoattack::QUERIES,
            });
        }
        settings
    }
}

impl Stage for Evaluate {
    const NAME: &'static str = "evaluate";
    const INPUTS: &'static [&'static str] = &["model", "data"];

    fn validate(&self) -> Result<()> {
        if self.attack == AttackKind::Pgd {
            return self.pgd().map(drop);
        }
        let (mine, default) = (AnyStage::settings(self), AnyStage::settings(&Self::default()));
        for key in ["attack_steps", "attack_step_ratio", "attack_loss", "restarts"] {
            if mine[key] != default[key] {
                bail!(Usage, "{key} is {}, which only the attack pgd has; expected it left out", mine[key]);
            }
        }
        if self.attack == AttackKind::None && self.save_adversarial {
            bail!(Usage, "save_adversarial is true without an attack, expected false");
        }
        Threat::new(self.norm, self.epsilon).map(drop)
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
        let started = Instant::now();
        let limit = (self.limit > 0).then_some(self.limit);
        let model = self.model.as_deref();
        let examined = Examined::load(model, &self.data, self.split, limit, self.max_bad, &job.device)?;
        let Examined { dir, classifier, data } = &examined;
        let trained = dir.join("train.json");
        let train = if trained.is_file() { Some(fs::read_json(&trained)?) } else { None };

        let (out, _lock) = job.open("run")?;
        let parts = fs::Parts::new(job.hidden(out, "parts"));
        let logits_of = |x: &Tensor| classifier.logits(x);
        let shape = (data.shape.height, data.shape.width, data.shape.channels);
        let battle = Battle {
            victim: Victim { logits_of: &logits_of, shape, device: &job.device },
            data,
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
            bar.skip(clean_correct - before);
            let (accuracy, interval) = (share(after), clopper_pearson(after, n, 0.05));
            note(
                self,
                &format!(
                    "{}: {after} of {before} stand, robust accuracy {:.2} %",
                    attack.name(),
                    100.0 * accuracy
                ),
            );
            // AutoAttack's figure, in images: more than 0.2 % of them.
            if matches!(attack, Single::Of(AutoAttack::Square))
                && sequence.len() > 1
                && (before - after) * 500 > n
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
        let perturbation = (!sequence.is_empty()).then(|| extremes(self.norm, data, &adversarial));
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
            data: examined.data_record(&self.data, self.split)?,
            model_blake3: examined.model_blake3()?,
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
            save_images(&out.join("adversarial.safetensors"), data, &adversarial)?;
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
