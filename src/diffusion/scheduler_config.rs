//! `scheduler/scheduler_config.json`: the keys of `diffusers`' `DDPMScheduler` and `DDIMScheduler`.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    Schedule,
    sampler::{SamplerConfig, SamplerKind, Spacing, Variance},
};
use crate::{Error, Result, ResultExt, fs};

/// The noise schedule of a model and the sampler that it asks for.
///
/// The keys are `diffusers`', and so are the defaults. Options that are not built here are kept as they are
/// written and refused by [`SchedulerConfig::validate`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SchedulerConfig {
    /// Which sampler.
    #[serde(rename = "_class_name")]
    pub class: SchedulerClass,
    /// The number of diffusion steps that the model was trained on, T.
    pub num_train_timesteps: usize,
    /// The first β.
    pub beta_start: f64,
    /// The last β.
    pub beta_end: f64,
    /// How β goes from the one to the other.
    pub beta_schedule: BetaSchedule,
    /// Each β, instead of the three above.
    pub trained_betas: Option<Vec<f64>>,
    /// The variance of the ancestral sampler's noise.
    pub variance_type: VarianceType,
    /// Whether the predicted image is clipped at every step.
    pub clip_sample: bool,
    /// To which absolute value it is clipped.
    pub clip_sample_range: f64,
    /// What the network predicts: only `epsilon`.
    pub prediction_type: PredictionType,
    /// Dynamic thresholding: not built.
    pub thresholding: bool,
    /// Of no effect without `thresholding`.
    pub dynamic_thresholding_ratio: f64,
    /// Of no effect without `thresholding`.
    pub sample_max_value: f64,
    /// Which steps are visited when sampling with fewer than T.
    pub timestep_spacing: Spacing,
    /// Added to the steps of leading spacing.
    pub steps_offset: usize,
    /// Whether DDIM ends at ᾱ = 1, instead of the ᾱ of step 0.
    pub set_alpha_to_one: bool,
    /// Rescaling to no signal at the last step: not built.
    pub rescale_betas_zero_snr: bool,
}

/// The sampler that a model folder asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of diffusers' classes")]
pub enum SchedulerClass {
    DDPMScheduler,
    DDIMScheduler,
}

/// How β grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum BetaSchedule {
    /// [`Schedule::linear`].
    Linear,
    /// [`Schedule::scaled_linear`].
    ScaledLinear,
    /// [`Schedule::squared_cosine`].
    #[serde(rename = "squaredcos_cap_v2")]
    #[value(name = "squaredcos_cap_v2")]
    SquaredCosine,
}

/// The variance of the ancestral sampler's noise, under `diffusers`' names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VarianceType {
    /// [`Variance::FixedSmall`].
    FixedSmall,
    /// [`Variance::FixedSmall`], which `diffusers` computes by way of its logarithm.
    FixedSmallLog,
    /// [`Variance::FixedLarge`].
    FixedLarge,
}

/// What the network predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictionType {
    /// The noise.
    Epsilon,
    /// The image: not built.
    Sample,
    /// A mixture of both (Salimans & Ho 2022): not built.
    VPrediction,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            class: SchedulerClass::DDPMScheduler,
            num_train_timesteps: 1000,
            beta_start: 1e-4,
            beta_end: 0.02,
            beta_schedule: BetaSchedule::Linear,
            trained_betas: None,
            variance_type: VarianceType::FixedSmall,
            clip_sample: true,
            clip_sample_range: 1.0,
            prediction_type: PredictionType::Epsilon,
            thresholding: false,
            dynamic_thresholding_ratio: 0.995,
            sample_max_value: 1.0,
            timestep_spacing: Spacing::Leading,
            steps_offset: 0,
            set_alpha_to_one: true,
            rescale_betas_zero_snr: false,
        }
    }
}

impl SchedulerConfig {
    /// Reads `scheduler_config.json`.
    ///
    /// Fails with [`Error::Data`], naming the file, the key and what was expected.
    pub fn load(path: &Path) -> Result<Self> {
        Self::from_json(fs::read_json(path)?).context(|| path.display().to_string())
    }

    /// What `scheduler_config.json` says; see [`SchedulerConfig::load`].
    pub fn from_json(mut json: Map<String, Value>) -> Result<Self> {
        // The last two said which array library to use, and repeated the steps, before `diffusers` 0.5.
        json.retain(|key, _| match key.as_str() {
            "_class_name" => true,
            "tensor_format" | "timestep_values" => false,
            _ => !key.starts_with('_'),
        });
        let config: Self = serde_json::from_value(Value::Object(json))
            .map_err(|e| Error::Data(format!("not a DDPMScheduler or DDIMScheduler: {e}")))?;
        config.validate()?;
        Ok(config)
    }

    /// The contents of `scheduler_config.json`, as `diffusers` reads it: each class with its own keys.
    pub fn to_json(&self) -> Result<Map<String, Value>> {
        let Ok(Value::Object(mut json)) = serde_json::to_value(self) else {
            bail!(Alarm, "the configuration of the scheduler does not make a JSON object: {self:?}");
        };
        json.remove(match self.class {
            SchedulerClass::DDPMScheduler => "set_alpha_to_one",
            SchedulerClass::DDIMScheduler => "variance_type",
        });
        json.insert("_diffusers_version".into(), crate::nn::DIFFUSERS_VERSION.into());
        Ok(json)
    }

    /// Fails with [`Error::Data`] at the first key whose value cannot be built.
    pub fn validate(&self) -> Result<()> {
        if self.prediction_type != PredictionType::Epsilon {
            bail!(Data, "prediction_type is {:?}, expected epsilon", self.prediction_type);
        }
        for (key, value) in
            [("thresholding", self.thresholding), ("rescale_betas_zero_snr", self.rescale_betas_zero_snr)]
        {
            if value {
                bail!(Data, "{key} is true, expected false: it is not built");
            }
        }
        let range = self.clip_sample_range;
        if self.clip_sample && !(range > 0.0 && range.is_finite()) {
            bail!(Data, "clip_sample_range is {range}, expected above 0");
        }
        self.schedule().map(drop)
    }

    /// The noise schedule. Fails with [`Error::Data`] if a β is not above 0 and below 1.
    pub fn schedule(&self) -> Result<Schedule> {
        let Self { num_train_timesteps: steps, beta_start: start, beta_end: end, .. } = *self;
        if let Some(betas) = &self.trained_betas {
            if betas.len() != steps {
                bail!(
                    Data,
                    "trained_betas has {} numbers, expected num_train_timesteps = {steps}",
                    betas.len()
                );
            }
            return Schedule::new(betas.clone());
        }
        match self.beta_schedule {
            BetaSchedule::Linear => Schedule::linear(steps, start, end),
            BetaSchedule::ScaledLinear => Schedule::scaled_linear(steps, start, end),
            BetaSchedule::SquaredCosine => Schedule::squared_cosine(steps),
        }
    }

    /// The sampler that the model folder asks for, with as many steps as the model was trained on.
    pub fn sampler(&self) -> SamplerConfig {
        SamplerConfig {
            kind: match self.class {
                SchedulerClass::DDPMScheduler => SamplerKind::Ddpm,
                SchedulerClass::DDIMScheduler => SamplerKind::Ddim,
            },
            steps: self.num_train_timesteps,
            eta: 0.0,
            clip: self.clip_sample.then_some(self.clip_sample_range),
            variance: match self.variance_type {
                VarianceType::FixedSmall | VarianceType::FixedSmallLog => Variance::FixedSmall,
                VarianceType::FixedLarge => Variance::FixedLarge,
            },
            spacing: self.timestep_spacing,
            steps_offset: self.steps_offset,
            final_alpha_bar_is_one: self.set_alpha_to_one,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(json: Value) -> Result<SchedulerConfig> {
        let Value::Object(json) = json else { panic!("the test gives an object") };
        SchedulerConfig::from_json(json)
    }

    /// The file of google/ddpm-cifar10-32, which an early version of `diffusers` wrote.
    #[test]
    fn a_scheduler_from_the_hub_is_honoured() {
        let config = parse(json!({
            "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02,
            "beta_schedule": "linear", "beta_start": 0.0001, "clip_sample": true,
            "num_train_timesteps": 1000, "trained_betas": null, "variance_type": "fixed_large",
            "tensor_format": "pt", "timestep_values": null
        }))
        .unwrap();
        let sampler = config.sampler();
        assert_eq!((sampler.kind, sampler.steps, sampler.clip), (SamplerKind::Ddpm, 1000, Some(1.0)));
        assert_eq!(sampler.variance, Variance::FixedLarge);
        assert_eq!(config.schedule().unwrap(), Schedule::linear(1000, 1e-4, 0.02).unwrap());
    }

    #[test]
    fn what_is_written_is_read_back_and_each_class_has_its_own_keys() {
        for (class, other) in [
            (SchedulerClass::DDPMScheduler, "set_alpha_to_one"),
            (SchedulerClass::DDIMScheduler, "variance_type"),
        ] {
            let config = SchedulerConfig { class, steps_offset: 1, ..SchedulerConfig::default() };
            let json = config.to_json().unwrap();
            assert!(!json.contains_key(other));
            assert_eq!(SchedulerConfig::from_json(json).unwrap(), config);
        }
    }

    #[test]
    fn options_that_are_not_built_are_refused_by_key_and_value() {
        for (json, expected) in [
            (json!({"prediction_type": "v_prediction"}), "prediction_type is VPrediction, expected epsilon"),
            (json!({"thresholding": true}), "thresholding is true"),
            (json!({"rescale_betas_zero_snr": true}), "rescale_betas_zero_snr is true"),
            (json!({"beta_schedule": "sigmoid"}), "unknown variant `sigmoid`"),
            (json!({"variance_type": "learned_range"}), "unknown variant `learned_range`"),
            (json!({"_class_name": "PNDMScheduler"}), "unknown variant `PNDMScheduler`"),
            (json!({"beta_end": 2.0}), "beta of step"),
            (
                json!({"trained_betas": [0.1]}),
                "trained_betas has 1 numbers, expected num_train_timesteps = 1000",
            ),
            (json!({"clip_sample_range": 0.0}), "clip_sample_range is 0, expected above 0"),
        ] {
            let error = parse(json).unwrap_err();
            assert_eq!(error.exit_code(), 65);
            assert!(error.to_string().contains(expected), "{error}\ndoes not say: {expected}");
        }
    }
}
