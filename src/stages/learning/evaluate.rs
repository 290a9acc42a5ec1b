//! Evaluate: a classifier's accuracy, clean and under attack.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Instant,
};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    Error, Result,
    attack::{
        Norm, SQUARE, method,
        search::{choice, distance},
    },
    data::{self, Source},
    error::expect_within as expect,
    evaluation::{Evaluation, Examined, saturation, unchanged, unusable},
    fs::{self, Record},
    progress::{Progress, checkpoint_interval},
    settings::{self, BallSettings, EvaluationAttackSettings, PartSettings, PgdSettings},
    stage::{Input, Job, Outcome, Stage, note},
    stats::clopper_pearson,
    tables::{
        images::Evaluated,
        records::{MODEL, Metrics, Perturbation, Survivors, TrainRecord},
    },
};

/// Measures a classifier on real images: counts as well as percentages, with Clopper-Pearson intervals.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
pub struct Evaluate {
    /// The classifier's folder (`config.json`, `model.safetensors`), such as that of a finished train stage.
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// The real data: `builtin:digits`, or a folder or file of Hugging Face Parquet.
    #[arg(long, default_value = "builtin:digits")]
    pub data: Source,
    /// The official split to measure on. The test split is for measuring only, never for choosing anything.
    #[arg(long, value_parser = settings::named::<data::OfficialSplit>(), default_value_t = data::OfficialSplit::Test)]
    pub official_split: data::OfficialSplit,
    /// Which of the images are used.
    #[command(flatten)]
    #[serde(flatten)]
    pub part: PartSettings,
    /// How the classifier is attacked.
    #[command(flatten)]
    pub attack: EvaluationAttackSettings,
    /// Keep the adversarial images that were found, in `adversarial.safetensors`: tensor `images` (n×c×h×w, in [0,
    /// 1]), with the image itself where none was found.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub save_adversarial: bool,
    /// How many images are attacked together, on each CPU thread or on the GPU; 0 chooses a number that suits the
    /// device. Results do not depend on it.
    #[arg(long, default_value_t = 0)]
    pub batch: usize,
    /// How many unreadable rows of the source to tolerate; they are skipped and counted.
    #[arg(long, default_value_t = 0)]
    pub max_bad: usize,
    /// Seed of the attack's random starts.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl Evaluate {
    /// What the attacks are, for the record.
    fn attack_settings(&self) -> serde_json::Value {
        let mut settings = json!({ "kind": self.attack.kind() });
        if self.unused().is_empty() {
            settings["seed"] = self.seed.into();
        }
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
            named => {
                let starts: BTreeMap<_, _> = named.methods().iter().map(|m| (m.name(), m.starts())).collect();
                settings["settings"] = json!({
                    "steps": method::STEPS,
                    "starts": starts,
                    "targets": method::TARGETS,
                    "queries": method::QUERIES,
                });
            }
        }
        settings
    }
}

impl Stage for Evaluate {
    const NAME: &'static str = "evaluate";
    const ABOUT: &'static str = "Evaluate a classifier, clean and under attack";
    const INPUTS: &'static [Input] = &[MODEL, Input::real_data("data")];
    const RUNTIME: &'static [&'static str] = &["batch"];
    const REVISION: u32 = 1;

    fn unused(&self) -> Vec<&'static str> {
        // Targeted FAB begins with the image itself, and draws nothing.
        let draws =
            !matches!(self.attack, EvaluationAttackSettings::None(_) | EvaluationAttackSettings::FabT(_));
        if draws { Vec::new() } else { vec!["seed"] }
    }

    fn validate(&self) -> Result<()> {
        expect("batch", self.batch, 0, 1 << 20)?;
        self.part.validate()?;
        if self.attack.ball().is_none() && self.save_adversarial {
            bail!(Usage, "save_adversarial is true without an attack, expected false");
        }
        self.attack.validate()
    }

    fn amount(&self) -> String {
        format!("{}, {}", self.part.part(), self.attack.summary())
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let started = Instant::now();
        let (model, part) = (self.model.as_deref(), self.part.part());
        let examined =
            Examined::load(model, &self.data, self.official_split, part, self.max_bad, &job.device)?;
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
        let sequence = self.attack.sequence(self.seed)?;
        let mut warnings = Vec::from_iter(data.left_out(part));
        warnings.extend(unusable(&logits));
        if !sequence.is_empty() {
            warnings.extend(clean.doubts(&logits, &standing)?);
        }
        warnings.iter().for_each(|doubt| note(self, &format!("warning: {doubt}")));

        let mut broken_by: Vec<Option<&str>> = vec![None; data.len()];
        let mut adversarial: BTreeMap<usize, Vec<f32>> = BTreeMap::new();
        let mut survivors = Vec::new();
        let bar = Progress::new(Self::NAME, clean_correct * sequence.len() as u64, "images");
        let evaluation = Evaluation { bar: Some(&bar), ..clean };
        for &(name, ref attack) in &sequence {
            let before = standing.len() as u64;
            let found = evaluation.find(name, &standing, &**attack)?;
            let found = standing.iter().zip(found).filter_map(|(&row, found)| Some((row, found?)));
            let found = evaluation.proven(name, &self.attack.threat()?, found.collect())?;
            found.keys().for_each(|&row| broken_by[row] = Some(name));
            adversarial.extend(found);
            standing.retain(|&row| broken_by[row].is_none());
            let after = standing.len() as u64;
            bar.skip(clean_correct - before);
            let (accuracy, interval) = (share(after), clopper_pearson(after, n, 0.05));
            let percent = 100.0 * accuracy;
            note(self, &format!("{name}: {after} of {before} stand, robust accuracy {percent:.2} %"));
            // AutoAttack's threshold, counted in images: more than 0.2 % of them.
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
        if let Some(rounding) = self.attack.cross_entropy_rounding() {
            let doubts = saturation(&logits, &data.labels, &standing, rounding);
            doubts.iter().for_each(|doubt| note(self, &format!("warning: {doubt}")));
            warnings.extend(doubts);
        }
        let norm = self.attack.ball().map_or(Norm::Linf, |ball| ball.norm);
        let perturbation = (!sequence.is_empty()).then(|| extremes(norm, &clean, &adversarial));
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
            data: examined.data_record(&self.data, self.official_split)?,
            model_blake3: examined.model_blake3()?,
        };
        let robust = (0..data.len()).map(|row| right[row] && broken_by[row].is_none());
        let evaluated = Evaluated {
            rows: &data.rows,
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
            let percent = 100.0 * metrics.robust_accuracy.unwrap_or(f64::NAN);
            let line = format!(
                "largest {norm} perturbation {largest:.5}, not a number {nan}, pixels {min:.5} to {max:.5}; robust \
                 accuracy {percent:.2} %"
            );
            note(self, &line);
        }
        Ok(Outcome::Done(json!(metrics)))
    }
}

/// Over all images, taking the adversarial one where it was found and the clean one elsewhere, as in AutoAttack's
/// last line.
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
