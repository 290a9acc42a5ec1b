//! Records that one stage writes and others read: of a generator, of a training, of an estimate of
//! ARC, of an evaluation.

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

/// The input of stages that see images with a classifier, the labeller.
pub const CLASSIFIER: Input = Input::of("classifier", &["train"]);

/// The input of stages that read an estimate of ARC.
pub const ARC: Input = Input::of("arc", &["arc"]);

/// The input of stages that read evaluations.
pub const METRICS: Input = Input::several("metrics", &["evaluate"]);

/// `train.json`: what a classifier was trained on, for those who compare classifiers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TrainRecord {
    /// `proxyset.train/1`.
    pub schema: String,
    /// `real`, or the arm that the synthetic data is of; several arms joined by `+`.
    pub arm: String,
    /// The seed of the training.
    pub seed: u64,
    /// Real images learned from.
    pub real: usize,
    /// Synthetic images learned from.
    pub synthetic: usize,
    /// Accuracy of the kept checkpoint on the held-out real images, under attack or noise if trained so.
    pub held_out_accuracy: f64,
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
    /// The signed area after PGD alone: how much weaker the weaker attack is.
    pub signed_after_pgd: f64,
    /// The radii as they were written.
    pub epsilons: Vec<Epsilon>,
    /// Each network's accuracy under the attack on its stopping images, by set and radius. At 1/2 and below it is replaced,
    /// and there it is the accuracy after PGD alone, if that was enough.
    #[serde(default)]
    pub stop_accuracy: Vec<Vec<f64>>,
    /// The attack.
    pub attack: AttackRecord,
}

impl Record for ArcRecord {
    const FILE: &'static str = "arc.json";
}

/// What an estimate of ARC attacked with.
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

impl Record for Metrics {
    const FILE: &'static str = "metrics.json";
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

/// `proxyset.json` of a generator's folder: what `diffusers`' files do not say.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GeneratorInfo {
    /// `proxyset.generator/1`.
    pub schema: String,
    /// The names of the classes that the model is, or is not, conditioned on.
    pub class_names: Vec<String>,
    /// The class that stands for none, if the model was trained with one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub null_class: Option<u32>,
    /// The size of its images.
    pub shape: Shape,
    /// What it was trained on.
    pub trained_on: String,
    /// BLAKE3 of those files.
    pub trained_on_fingerprint: String,
    /// Optimiser steps.
    pub steps: usize,
    /// Images per step.
    pub batch: usize,
}

impl Record for GeneratorInfo {
    const FILE: &'static str = "proxyset.json";
}
