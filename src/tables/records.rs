//! Records that one stage writes and others read: of a generator, a training, an estimate of ARC, and an
//! evaluation.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    attack::{Epsilon, Norm},
    data::Shape,
    fs::Record,
    proxy::arc::Estimate,
    stage::Input,
};

/// The input of stages that read a classifier's folder.
pub const MODEL: Input = Input::of("model", &["train"]);

/// The input of stages that look at images through a classifier, the labeller.
pub const CLASSIFIER: Input = Input::of("classifier", &["train"]);

/// The input of stages that read an estimate of ARC.
pub const ARC: Input = Input::of("arc", &["arc"]);

/// The input of stages that read evaluations.
pub const METRICS: Input = Input::several("metrics", &["evaluate"]);

/// `train.json`: what a classifier was trained on, for comparing classifiers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TrainRecord {
    /// `proxyset.train/1`.
    pub schema: String,
    /// `real`, or the arm of the synthetic data; several arms are joined by `+`.
    pub arm: String,
    /// The seed of the training.
    pub seed: u64,
    /// Number of real images learned from.
    pub real: usize,
    /// Number of synthetic images learned from.
    pub synthetic: usize,
    /// Accuracy of the kept checkpoint on the held-out real images, under attack or noise if it was trained that
    /// way.
    pub held_out_accuracy: f64,
    /// The standard deviation of the noise on the images learned from, for pixels in [0, 1]: 0 if there was none.
    /// `None` in records of before it was kept.
    #[serde(default)]
    pub sigma: Option<f64>,
    /// Reasons to doubt that the classifier is robust.
    #[serde(default)]
    pub warnings: Vec<String>,
}

impl Record for TrainRecord {
    const FILE: &'static str = "train.json";
}

/// `arc.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ArcRecord {
    /// `proxyset.arc/1`.
    pub schema: String,
    /// The estimate, with curve and intervals.
    #[serde(flatten)]
    pub estimate: Estimate,
    /// `4 · ARC`: an estimate, not a certificate, of a lower bound on the Wasserstein distance.
    pub wasserstein_lower_bound_estimate: f64,
    /// The signed area after PGD alone, which shows how much weaker that attack is.
    pub signed_after_pgd: f64,
    /// The radii as they were written.
    pub epsilons: Vec<Epsilon>,
    /// Each network's accuracy under the attack on its stopping images, by set and radius. At 1/2 and below, the
    /// network is replaced; the accuracy is then that after PGD alone, if PGD was enough.
    #[serde(default)]
    pub stop_accuracy: Vec<Vec<f64>>,
    /// The attack.
    pub attack: AttackRecord,
}

impl Record for ArcRecord {
    const FILE: &'static str = "arc.json";
}

/// The attack behind an estimate of ARC.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttackRecord {
    pub(crate) apgd_steps_on_what_stands: usize,
    pub(crate) counts: String,
    pub(crate) norm: Norm,
    pub(crate) restarts: usize,
    pub(crate) step_size_times_steps_over_epsilon: f64,
    pub(crate) steps: usize,
}

impl fmt::Display for AttackRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PGD-{} in {}", self.steps, self.norm)?;
        if self.restarts > 1 {
            write!(f, " from {} random starts", self.restarts)?;
        }
        match self.apgd_steps_on_what_stands {
            0 => Ok(()),
            steps => write!(f, ", then APGD-{steps} on what stands"),
        }
    }
}

/// `metrics.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Metrics {
    /// `proxyset.metrics/1`.
    pub schema: String,
    /// What the classifier was trained on, if it was trained here.
    pub train: Option<TrainRecord>,
    /// Number of images measured.
    pub images: u64,
    /// Images that are right when clean.
    pub clean_correct: u64,
    /// `clean_correct / images`.
    pub clean_accuracy: f64,
    /// 95 % Clopper-Pearson interval.
    pub clean_interval: [f64; 2],
    /// Images that are right under attack *and* when clean; `None` without an attack.
    pub robust_correct: Option<u64>,
    /// `robust_correct / images`.
    pub robust_accuracy: Option<f64>,
    /// 95 % Clopper-Pearson interval.
    pub robust_interval: Option<[f64; 2]>,
    /// The attack's settings.
    pub attack: serde_json::Value,
    /// Each attack in turn: the images it was given and those that withstood it.
    #[serde(default)]
    pub survivors: Vec<Survivors>,
    /// Extremes of the adversarial images; `None` if there are none.
    #[serde(default)]
    pub perturbation: Option<Perturbation>,
    /// Reasons to doubt the figures.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Seconds that this evaluation took, in the process that finished it.
    #[serde(default)]
    pub seconds: f64,
    /// The data, its split, and the BLAKE3 hash of its files.
    pub data: serde_json::Value,
    /// The BLAKE3 hash of the weights.
    pub model_blake3: String,
}

impl Record for Metrics {
    const FILE: &'static str = "metrics.json";
}

/// What remained after one attack.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Survivors {
    /// The attack.
    pub attack: String,
    /// Images still right before it.
    pub before: u64,
    /// Images still right after it.
    pub after: u64,
    /// `after` divided by the number of all images: the robust accuracy so far.
    pub accuracy: f64,
    /// 95 % Clopper-Pearson interval.
    pub interval: [f64; 2],
}

/// Extremes over the adversarial images that were found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Perturbation {
    /// The largest distance from the image, in the norm of the attack.
    pub largest: f64,
    /// The number of pixels that are not numbers.
    pub nan: u64,
    /// The smallest pixel.
    pub min: f64,
    /// The largest pixel.
    pub max: f64,
}

/// `proxyset.json` in a generator's folder: what `diffusers`' files do not say.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GeneratorInfo {
    /// `proxyset.generator/1`.
    pub schema: String,
    /// The names of the classes, whether or not the model is conditioned on them.
    pub class_names: Vec<String>,
    /// The class that stands for none, if the model was trained with one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub null_class: Option<u32>,
    /// The size of its images.
    pub shape: Shape,
    /// What it was trained on.
    pub trained_on: String,
    /// The BLAKE3 hash of those files.
    pub trained_on_fingerprint: String,
    /// Optimiser steps.
    pub steps: usize,
    /// Images per step.
    pub batch: usize,
}

impl Record for GeneratorInfo {
    const FILE: &'static str = "proxyset.json";
}
