//! Evaluate: a classifier's accuracy, clean and under attack.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    time::Instant,
};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    Error, Result,
    attack::{
        Attack, Counted, Epsilon, METHODS, Method, Norm, Pgd, PgdConfig, PgdLoss, PgdSearch, SQUARE,
        STANDARD, Threat, method,
        search::{choice, distance},
    },
    data::{self, Source},
    error::expect_within as expect,
    evaluation::{Evaluation, Examined, unchanged},
    fs,
    progress::{Progress, checkpoint_interval},
    stage::{AnyStage, Input, Job, Outcome, Stage, note},
    stats::clopper_pearson,
    tables::{
        images::Evaluated,
        records::{MODEL, Metrics, Perturbation, Survivors, TrainRecord},
    },
};

/// How the classifier is attacked: nothing, `pgd`, `autoattack`, or one [`Method`] by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "crate::text::Written", into = "String")]
pub enum AttackKind {
    /// Not at all: clean accuracy only.
    None,
    /// Projected gradient descent (Madry et al. 2018).
    Pgd,
    /// AutoAttack's version `standard` (Croce & Hein 2020): apgd-ce, apgd-t, fab-t and square, each on the images that
    /// still stand.
    AutoAttack,
    /// One attack, with the settings that it has in AutoAttack.
    Method(Method),
}

impl AttackKind {
    fn all() -> impl Iterator<Item = Self> {
        [Self::None, Self::Pgd, Self::AutoAttack].into_iter().chain(METHODS.map(Self::Method))
    }

    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Pgd => "pgd",
            Self::AutoAttack => "autoattack",
            Self::Method(method) => method.name(),
        }
    }
}

impl FromStr for AttackKind {
    type Err = String;
    fn from_str(s: &str) -> std::result::Result<Self, String> {
        Self::all().find(|kind| kind.name() == s).ok_or_else(|| {
            let names: Vec<&str> = Self::all().map(Self::name).collect();
            format!("attack is '{s}', expected {}", names.join(", "))
        })
    }
}

impl fmt::Display for AttackKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

serde_as_text!(AttackKind);

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
    /// The attack: none, pgd, autoattack (its version standard: apgd-ce, apgd-t, fab-t and square, each on the images that still
    /// stand), or one of those and apgd-dlr by itself.
    #[arg(long, default_value = "pgd")]
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
    /// Images that are attacked together, on each thread of a CPU or on a GPU; 0 for as many as suit the device. No result
    /// depends on it.
    #[arg(long, default_value_t = 0)]
    pub batch: usize,
    /// Unreadable rows of the source that are tolerated, skipped and counted.
    #[arg(long, default_value_t = 0)]
    pub max_bad: usize,
    /// Seed of the attack's random starts.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl Evaluate {
    fn pgd(&self) -> Result<PgdSearch> {
        let (steps, ratio) = (self.attack_steps, self.attack_step_ratio);
        let pgd = Pgd::new(self.norm, self.epsilon, steps, ratio, self.seed)?;
        let config = PgdConfig { loss: self.attack_loss, ..pgd.config };
        PgdSearch::new(Pgd { config, ..pgd }, self.restarts, Counted::Last)
    }

    /// The attacks with their names, in their order.
    fn sequence(&self) -> Result<Vec<(&'static str, Box<dyn Attack>)>> {
        let threat = Threat::new(self.norm, self.epsilon)?;
        let named = |method: Method| (method.name(), method.attack(threat, self.seed));
        Ok(match self.attack {
            AttackKind::None => Vec::new(),
            AttackKind::Pgd => vec![(self.attack.name(), Box::new(self.pgd()?))],
            AttackKind::AutoAttack => STANDARD.map(named).into(),
            AttackKind::Method(method) => vec![named(method)],
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
                "steps": method::STEPS,
                "restarts": method::RESTARTS,
                "targets": method::TARGETS,
                "queries": method::QUERIES,
            });
        }
        settings
    }
}

impl Stage for Evaluate {
    const NAME: &'static str = "evaluate";
    const ABOUT: &'static str = "Evaluate a classifier, clean and under attack.";
    const INPUTS: &'static [Input] = &[MODEL, Input::real_data("data")];
    const RUNTIME: &'static [&'static str] = &["batch"];

    fn validate(&self) -> Result<()> {
        expect("batch", self.batch, 0, 1 << 20)?;
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
            kind => format!("{images}, {kind} at {} {}", self.norm, self.epsilon),
        }
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let started = Instant::now();
        let limit = (self.limit > 0).then_some(self.limit);
        let model = self.model.as_deref();
        let examined = Examined::load(model, &self.data, self.split, limit, self.max_bad, &job.device)?;
        let Examined { dir, classifier, data } = &examined;
        let train = TrainRecord::read_if_there(dir)?;

        let out = job.open()?;
        let parts = fs::Parts::new(job.hidden(out, "parts"));
        let logits_of = |x: &Tensor| classifier.logits(x);
        let clean = Evaluation {
            batch: self.batch,
            kept: Some((&parts, checkpoint_interval())),
            ..Evaluation::new(&logits_of, data, &job.device)
        };
        let n = data.len() as u64;
        let share = |x: u64| x as f64 / n as f64;
        let logits = clean.logits("clean", &unchanged)?;
        let right = |row: usize| choice(&logits[row]) == Some(data.labels[row] as usize);
        let right: Vec<bool> = (0..data.len()).map(right).collect();
        let mut standing: Vec<usize> = (0..data.len()).filter(|&row| right[row]).collect();
        let clean_correct = standing.len() as u64;
        let sequence = self.sequence()?;
        let mut warnings = if sequence.is_empty() { Vec::new() } else { clean.doubts(&logits, &standing)? };
        warnings.iter().for_each(|doubt| note(self, &format!("warning: {doubt}")));

        let mut broken_by: Vec<Option<&str>> = vec![None; data.len()];
        let mut adversarial: BTreeMap<usize, Vec<f32>> = BTreeMap::new();
        let mut survivors = Vec::new();
        let bar = Progress::new(Self::NAME, clean_correct * sequence.len() as u64, "images");
        let evaluation = Evaluation { bar: Some(&bar), ..clean };
        let threat = Threat::new(self.norm, self.epsilon)?;
        for &(name, ref attack) in &sequence {
            let before = standing.len() as u64;
            let found = evaluation.find(name, &standing, &**attack)?;
            let found = standing.iter().zip(found).filter_map(|(&row, found)| Some((row, found?)));
            let found = evaluation.proven(name, &threat, found.collect())?;
            found.keys().for_each(|&row| broken_by[row] = Some(name));
            adversarial.extend(found);
            standing.retain(|&row| broken_by[row].is_none());
            let after = standing.len() as u64;
            bar.skip(clean_correct - before);
            let (accuracy, interval) = (share(after), clopper_pearson(after, n, 0.05));
            note(
                self,
                &format!("{name}: {after} of {before} stand, robust accuracy {:.2} %", 100.0 * accuracy),
            );
            // AutoAttack's figure, in images: more than 0.2 % of them.
            if name == SQUARE.name() && sequence.len() > 1 && (before - after) * 500 > n {
                let doubt = format!(
                    "Square lowered the robust accuracy by {:.2} points, which gradient attacks should have done: \
                     the network may hide its gradients",
                    100.0 * (share(before) - accuracy)
                );
                note(self, &format!("warning: {doubt}"));
                warnings.push(doubt);
            }
            survivors.push(Survivors { attack: name.to_owned(), before, after, accuracy, interval });
        }
        let perturbation = (!sequence.is_empty()).then(|| extremes(self.norm, &clean, &adversarial));
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
        let robust = (0..data.len()).map(|row| right[row] && broken_by[row].is_none());
        let evaluated = Evaluated {
            labels: &data.labels,
            logits: &logits,
            clean: &right,
            robust: (!sequence.is_empty()).then(|| robust.collect()),
            broken_by,
        };
        evaluated.write(out)?;
        if self.save_adversarial {
            save_images(&out.join("adversarial.safetensors"), &clean, &adversarial)?;
        }
        metrics.write(out)?;
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
fn extremes(norm: Norm, of: &Evaluation, adversarial: &BTreeMap<usize, Vec<f32>>) -> Perturbation {
    let mut found = Perturbation { largest: 0.0, nan: 0, min: f64::INFINITY, max: f64::NEG_INFINITY };
    for row in 0..of.data.len() {
        let clean = of.pixels(row);
        let image = adversarial.get(&row).unwrap_or(&clean);
        found.largest = found.largest.max(f64::from(distance(norm, image, &clean)));
        found.nan += image.iter().filter(|v| v.is_nan()).count() as u64;
        found.min = image.iter().fold(found.min, |min, &v| min.min(f64::from(v)));
        found.max = image.iter().fold(found.max, |max, &v| max.max(f64::from(v)));
    }
    found
}

/// The images as `attack` left them: tensor `images`, n×c×h×w.
fn save_images(path: &Path, of: &Evaluation, adversarial: &BTreeMap<usize, Vec<f32>>) -> Result<()> {
    let (h, w, c) = of.victim.shape;
    let image = |row: usize| adversarial.get(&row).cloned().unwrap_or_else(|| of.pixels(row));
    let pixels: Vec<f32> = (0..of.data.len()).flat_map(image).collect();
    let nhwc = Tensor::from_vec(pixels, (of.data.len(), h, w, c), &Device::Cpu)?;
    let images = nhwc.permute((0, 3, 1, 2))?.contiguous()?;
    let bytes = safetensors::serialize([("images", &images)], None)
        .map_err(|e| Error::Alarm(format!("adversarial images cannot be written: {e}")))?;
    fs::publish(path, &bytes)
}
