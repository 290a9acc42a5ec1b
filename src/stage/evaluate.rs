//! Evaluate: a classifier's accuracy, clean and under attack.

use std::{path::PathBuf, sync::Arc};

use arrow_array::{BooleanArray, Int64Array};
use arrow_schema::DataType;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Job, Outcome, Stage, accuracy::correct, shards, train::TrainRecord};
use crate::{
    Result,
    attack::{Epsilon, Norm, Pgd},
    data::{self, Source, table},
    fs,
    nn::Classifier,
    progress::Progress,
    stats::clopper_pearson,
};

/// How the classifier is attacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum AttackKind {
    /// Not at all: clean accuracy only.
    None,
    /// Projected gradient descent on the cross-entropy (Madry et al. 2018).
    Pgd,
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
    /// Steps of the attack.
    #[arg(long, default_value_t = 20)]
    pub attack_steps: usize,
    /// The step of the attack as a multiple of epsilon / steps.
    #[arg(long, default_value_t = 2.5)]
    pub attack_step_ratio: f64,
    /// Random restarts of the attack; the strongest counts.
    #[arg(long, default_value_t = 2)]
    pub restarts: usize,
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
    /// The data, its split, and the BLAKE3 of its files.
    pub data: serde_json::Value,
    /// The BLAKE3 of the weights.
    pub model_blake3: String,
}

impl Evaluate {
    fn attack(&self) -> Result<Pgd> {
        let (steps, ratio) = (self.attack_steps, self.attack_step_ratio);
        Pgd::new(self.norm, self.epsilon, steps, ratio, self.restarts, self.seed)
    }
}

impl Stage for Evaluate {
    const NAME: &'static str = "evaluate";
    const INPUTS: &'static [&'static str] = &["model", "data"];

    fn validate(&self) -> Result<()> {
        self.attack().map(drop)
    }

    fn amount(&self) -> String {
        let images = if self.limit > 0 { format!("{} images", self.limit) } else { "all images".into() };
        match self.attack {
            AttackKind::None => format!("{images}, clean"),
            AttackKind::Pgd => format!(
                "{images}, PGD-{} with {} restarts at {} {}",
                self.attack_steps, self.restarts, self.norm, self.epsilon
            ),
        }
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let Some(dir) = &self.model else {
            bail!(Usage, "model is not set, expected the folder of a classifier")
        };
        let classifier = Classifier::load(dir, &job.device)?;
        let data = self.data.load(self.split, (self.limit > 0).then_some(self.limit), self.max_bad)?;
        let taken = classifier.config().architecture.image_shape();
        if taken != (data.shape.height, data.shape.width, data.shape.channels) {
            bail!(
                Data,
                "classifier {} takes {taken:?} images (height, width, channels), but {} has {}",
                dir.display(),
                self.data,
                data.shape
            );
        }
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
        let logits_of = |x: &candle_core::Tensor| classifier.logits(x);
        let attacked = self.attack == AttackKind::Pgd;
        let bar = Progress::new(Self::NAME, data.len() as u64 * (1 + u64::from(attacked)), "images");
        let clean = correct(&logits_of, &data, None, &job.device, Some((&parts, "clean")), &bar)?;
        let robust = if attacked {
            let attack = self.attack()?;
            let under = correct(&logits_of, &data, Some(&attack), &job.device, Some((&parts, "pgd")), &bar)?;
            // The adversary may also leave the image alone.
            Some(under.iter().zip(&clean).map(|(a, b)| *a && *b).collect::<Vec<bool>>())
        } else {
            None
        };
        let count = |v: &[bool]| v.iter().filter(|&&b| b).count() as u64;
        let n = data.len() as u64;
        let share = |x: u64| x as f64 / n as f64;
        let robust_correct = robust.as_deref().map(count);
        let metrics = Metrics {
            schema: "proxyset.metrics/1".into(),
            train,
            images: n,
            clean_correct: count(&clean),
            clean_accuracy: share(count(&clean)),
            clean_interval: clopper_pearson(count(&clean), n, 0.05),
            robust_correct,
            robust_accuracy: robust_correct.map(share),
            robust_interval: robust_correct.map(|x| clopper_pearson(x, n, 0.05)),
            attack: json!({
                "kind": self.attack,
                "norm": self.norm,
                "epsilon": self.epsilon,
                "steps": self.attack_steps,
                "step_size_times_steps_over_epsilon": self.attack_step_ratio,
                "restarts": self.restarts,
                "seed": self.seed,
            }),
            data: json!({
                "source": self.data,
                "split": self.split,
                "blake3": self.data.fingerprint(self.split)?,
                "bad_rows": data.bad_rows,
            }),
            model_blake3: fs::hash_file(&dir.join("model.safetensors"))?.0,
        };
        let schema = shards::schema(&[
            ("index", DataType::Int64, false),
            ("label", DataType::Int64, false),
            ("clean_correct", DataType::Boolean, false),
            ("robust_correct", DataType::Boolean, true),
        ]);
        let robust_column = match &robust {
            Some(robust) => BooleanArray::from(robust.clone()),
            None => BooleanArray::new_null(data.len()),
        };
        let batch = shards::batch(
            &schema,
            vec![
                Arc::new(Int64Array::from_iter_values(0..n as i64)),
                Arc::new(Int64Array::from_iter_values(data.labels.iter().map(|&l| i64::from(l)))),
                Arc::new(BooleanArray::from(clean)),
                Arc::new(robust_column),
            ],
        )?;
        table::write(&out.join("images.parquet"), &schema, [Ok(batch)], table::ROW_GROUP_ROWS, &[])?;
        fs::publish_json(&out.join("metrics.json"), &metrics)?;
        Ok(Outcome::Done(json!(metrics)))
    }
}
