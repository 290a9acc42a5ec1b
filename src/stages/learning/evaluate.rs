//! Evaluate: a classifier's accuracy, clean and under attack.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    Error, Result,
    attack::{
        AutoAttack, Epsilon, Norm, Threat, Victim, autoattack,
        search::{choice, distance},
    },
    data::{self, Dataset, Source},
    evaluation::{Battle, Examined, Single, unit_pixels},
    fs,
    progress::Progress,
    settings::{self, BallSettings, EvaluationAttackSettings, PgdSettings},
    stage::{Input, Job, Outcome, Stage, note},
    stats::clopper_pearson,
    tables::{
        images::Evaluated,
        records::{MODEL, Metrics, Perturbation, Survivors, TrainRecord},
    },
};

/// Measures a classifier on real images: counts, not only percentages, with Clopper-Pearson intervals.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
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
    /// How the classifier is attacked.
    #[command(flatten)]
    pub attack: EvaluationAttackSettings,
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

impl Evaluate {
    /// The attacks, in their order.
    fn sequence(&self) -> Result<Vec<Single>> {
        let one = |attack| vec![Single::Of(attack)];
        Ok(match &self.attack {
            EvaluationAttackSettings::None(_) => Vec::new(),
            EvaluationAttackSettings::Pgd(pgd) => vec![Single::Pgd(pgd.pgd(self.seed)?)],
            EvaluationAttackSettings::AutoAttack(_) => {
                AutoAttack::STANDARD.into_iter().map(Single::Of).collect()
            }
            EvaluationAttackSettings::ApgdCe(_) => one(AutoAttack::ApgdCe),
            EvaluationAttackSettings::ApgdDlr(_) => one(AutoAttack::ApgdDlr),
            EvaluationAttackSettings::ApgdT(_) => one(AutoAttack::ApgdT),
            EvaluationAttackSettings::FabT(_) => one(AutoAttack::FabT),
            EvaluationAttackSettings::Square(_) => one(AutoAttack::Square),
        })
    }

    /// What the attacks are, for the record.
    fn attack_settings(&self) -> serde_json::Value {
        let mut settings = json!({ "kind": self.attack.kind(), "seed": self.seed });
        if let Some(BallSettings { norm, epsilon }) = self.attack.ball() {
            settings["norm"] = json!(norm);
            settings["epsilon"] = json!(epsilon);
        }
        match &self.attack {
            EvaluationAttackSettings::None(_) => {}
            EvaluationAttackSettings::Pgd(PgdSettings { attack, loss, restarts }) => {
                settings["steps"] = attack.steps.steps.into();
                settings["step_size_times_steps_over_epsilon"] = attack.steps.step_ratio.into();
                settings["loss"] = json!(loss);
                settings["restarts"] = json!(restarts);
            }
            _ => {
                settings["settings"] = json!({
                    "steps": autoattack::STEPS,
                    "restarts": autoattack::RESTARTS,
                    "targets": autoattack::TARGETS,
                    "queries": autoattack::QUERIES,
                });
            }
        }
        settings
    }
}

impl Stage for Evaluate {
    const NAME: &'static str = "evaluate";
    const ABOUT: &'static str = "Evaluate a classifier, clean and under attack.";
    const INPUTS: &'static [Input] = &[MODEL, Input::real_data("data")];

    fn validate(&self) -> Result<()> {
        if self.attack.ball().is_none() && self.save_adversarial {
            bail!(Usage, "save_adversarial is true without an attack, expected false");
        }
        self.attack.validate()
    }

    fn amount(&self) -> String {
        let images = if self.limit > 0 { format!("{} images", self.limit) } else { "all images".into() };
        format!("{images}, {}", self.attack.summary())
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
        let shape = (data.shape.height, data.shape.width, data.shape.channels);
        let (norm, threat) = match self.attack.ball() {
            Some(ball) => (ball.norm, ball.threat()?),
            None => (Norm::Linf, Threat::new(Norm::Linf, Epsilon::default())?),
        };
        let battle = Battle {
            victim: Victim { logits_of: &logits_of, shape, device: &job.device },
            data,
            threat,
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
        let perturbation = (!sequence.is_empty()).then(|| extremes(norm, data, &adversarial));
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
        let robust = (0..data.len()).map(|row| clean[row] && broken_by[row].is_none());
        let evaluated = Evaluated {
            labels: &data.labels,
            logits: &logits,
            clean: &clean,
            robust: (!sequence.is_empty()).then(|| robust.collect()),
            broken_by,
        };
        evaluated.write(out)?;
        if self.save_adversarial {
            save_images(&out.join("adversarial.safetensors"), data, &adversarial)?;
        }
        metrics.write(out)?;
        if let Some(Perturbation { largest, nan, min, max }) = &metrics.perturbation {
            note(
                self,
                &format!(
                    "largest {} perturbation {largest:.5}, not a number {nan}, pixels {min:.5} to {max:.5}; robust \
                     accuracy {:.2} %",
                    norm,
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
