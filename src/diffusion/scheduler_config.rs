//! `scheduler/scheduler_config.json`: the schedulers of `diffusers` that are supported here, and their keys.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    NoiseSchedule, Prediction, PredictionType, Process, SigmaRange,
    sampler::{SamplerConfig, SamplerKind, Spacing, Variance},
};
use crate::{Error, Result, ResultExt, fs};

/// The noise of a model and the sampler that it asks for.
///
/// The keys and the defaults of each class are `diffusers`'. A file has only the keys of its class; keys that are
/// not supported here must have the value at which they do nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// How β goes from the first to the last.
    pub beta_schedule: BetaSchedule,
    /// Every β, instead of the three settings above.
    pub trained_betas: Option<Vec<f64>>,
    /// The variance of the ancestral sampler's noise.
    pub variance_type: Variance,
    /// Whether the predicted image is clipped at every step.
    pub clip_sample: bool,
    /// The absolute value to which it is clipped.
    pub clip_sample_range: f64,
    /// What the network predicts.
    pub prediction_type: PredictionType,
    /// Which steps are visited when sampling with fewer than T steps.
    pub timestep_spacing: Spacing,
    /// An offset added to the steps with leading spacing.
    pub steps_offset: usize,
    /// Whether DDIM ends at ᾱ = 1, instead of the ᾱ of step 0.
    pub set_alpha_to_one: bool,
    /// Whether σ falls as in Karras et al. 2022, Eq. 5.
    pub use_karras_sigmas: bool,
    /// EDM's σ_min.
    pub sigma_min: f64,
    /// EDM's σ_max.
    pub sigma_max: f64,
    /// EDM's standard deviation of the data.
    pub sigma_data: f64,
    /// EDM's ρ.
    pub rho: f64,
}

/// The sampler that a model folder asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of diffusers' classes")]
pub enum SchedulerClass {
    DDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    EDMEulerScheduler,
}

named! {
    /// How β grows.
    pub enum BetaSchedule {
        /// β grows in equal steps (Ho et al. 2020).
        Linear = "linear",
        /// √β grows in equal steps (Rombach et al. 2022).
        ScaledLinear = "scaled_linear",
        /// ᾱ falls like a squared cosine (Nichol & Dhariwal 2021).
        SquaredCosine = "squaredcos_cap_v2",
    }
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
            variance_type: Variance::FixedSmall,
            clip_sample: true,
            clip_sample_range: 1.0,
            prediction_type: PredictionType::Epsilon,
            timestep_spacing: Spacing::Leading,
            steps_offset: 0,
            set_alpha_to_one: true,
            use_karras_sigmas: false,
            sigma_min: 0.002,
            sigma_max: 80.0,
            sigma_data: 0.5,
            rho: 7.0,
        }
    }
}

/// The keys of all classes but EDM's.
const DISCRETE: [&str; 8] = [
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
];

/// The keys of EDM's class.
const EDM: [&str; 6] =
    ["num_train_timesteps", "prediction_type", "sigma_min", "sigma_max", "sigma_data", "rho"];

/// The keys that are not supported, with the value at which they do nothing; `None` if any value will do.
const NEUTRAL: [(&str, Option<&str>); 21] = [
    ("thresholding", Some("false")),
    ("dynamic_thresholding_ratio", None),
    ("sample_max_value", None),
    ("rescale_betas_zero_snr", Some("false")),
    ("solver_order", Some("2")),
    ("algorithm_type", Some("\"dpmsolver++\"")),
    ("solver_type", Some("\"midpoint\"")),
    // The last step goes to σ = 0 and is of order 1, whatever these two say.
    ("lower_order_final", None),
    ("euler_at_final", None),
    ("use_exponential_sigmas", Some("false")),
    ("use_beta_sigmas", Some("false")),
    ("use_lu_lambdas", Some("false")),
    ("use_flow_sigmas", Some("false")),
    ("flow_shift", None),
    ("final_sigmas_type", Some("\"zero\"")),
    ("lambda_min_clipped", Some("\"-Infinity\"")),
    ("use_dynamic_shifting", Some("false")),
    ("time_shift_type", None),
    ("interpolation_type", Some("\"linear\"")),
    ("timestep_type", Some("\"discrete\"")),
    ("sigma_schedule", Some("\"karras\"")),
];

/// Whether a key that a class does not have changes nothing.
fn of_no_effect(key: &str, value: &Value) -> bool {
    // Which array library to use, and the steps once more, before `diffusers` 0.5.
    key.starts_with('_')
        || ["tensor_format", "timestep_values"].contains(&key)
        // Of other classes of the same family, and empty there.
        || (value.is_null() && ["variance_type", "sigma_min", "sigma_max"].contains(&key))
}

impl SchedulerClass {
    /// Its supported keys.
    fn keys(self) -> Vec<&'static str> {
        let own: &[&str] = match self {
            Self::DDPMScheduler => &["variance_type", "clip_sample", "clip_sample_range"],
            Self::DDIMScheduler => &["set_alpha_to_one", "clip_sample", "clip_sample_range"],
            Self::HeunDiscreteScheduler => &["use_karras_sigmas", "clip_sample", "clip_sample_range"],
            Self::DPMSolverMultistepScheduler | Self::EulerDiscreteScheduler => &["use_karras_sigmas"],
            Self::EDMEulerScheduler => return EDM.to_vec(),
        };
        DISCRETE.iter().chain(own).copied().collect()
    }

    /// The sampler of this name.
    pub fn kind(self) -> SamplerKind {
        match self {
            Self::DDPMScheduler => SamplerKind::Ddpm,
            Self::DDIMScheduler => SamplerKind::Ddim,
            Self::DPMSolverMultistepScheduler => SamplerKind::DpmSolver,
            Self::EulerDiscreteScheduler | Self::EDMEulerScheduler => SamplerKind::Euler,
            Self::HeunDiscreteScheduler => SamplerKind::Heun,
        }
    }

    /// The values of the keys that a file leaves out.
    pub fn defaults(self) -> SchedulerConfig {
        let base = SchedulerConfig { class: self, ..SchedulerConfig::default() };
        if matches!(self, Self::DDPMScheduler | Self::DDIMScheduler) {
            return base;
        }
        let solver = SchedulerConfig { clip_sample: false, timestep_spacing: Spacing::Linspace, ..base };
        match self {
            Self::HeunDiscreteScheduler => SchedulerConfig { beta_start: 0.00085, beta_end: 0.012, ..solver },
            _ => solver,
        }
    }
}

impl SchedulerConfig {
    /// Reads `scheduler_config.json`.
    ///
    /// Fails with [`Error::Data`], naming the file, every unsupported key and what was expected.
    pub fn load(path: &Path) -> Result<Self> {
        let of_file = || path.display().to_string();
        let text = fs::read_text(path)?;
        // Python writes a number that JSON cannot express.
        let text = text.replace(": -Infinity", ": \"-Infinity\"");
        let json = serde_json::from_str(&text)
            .map_err(|e| Error::Data(format!("no JSON object: {e}")))
            .context(of_file)?;
        Self::from_json(json).context(of_file)
    }

    /// What `scheduler_config.json` says; see [`SchedulerConfig::load`].
    pub fn from_json(mut json: Map<String, Value>) -> Result<Self> {
        let bad = |e| Error::Data(format!("not a scheduler that is built: {e}"));
        let class = json.remove("_class_name").unwrap_or_else(|| "DDPMScheduler".into());
        let class: SchedulerClass = serde_json::from_value(class).map_err(bad)?;
        let keys = class.keys();
        let mut whole = class.defaults().as_map()?;
        let mut faults = Vec::new();
        for (key, value) in json {
            let neutral = NEUTRAL.iter().find(|(name, _)| *name == key);
            if keys.contains(&key.as_str()) {
                whole.insert(key, value);
            } else if let Some((_, allowed)) = neutral {
                let text = value.to_string();
                if !allowed.is_none_or(|allowed| value.is_null() || text == allowed) {
                    let expected = allowed.unwrap_or_default();
                    faults.push(format!("{key} is {value}, expected {expected}: nothing else is built"));
                }
            } else if !of_no_effect(&key, &value) {
                faults.push(format!("{key} is {value}, expected no such key in a {class:?}"));
            }
        }
        let config = serde_json::from_value::<Self>(Value::Object(whole)).map_err(bad);
        match config.and_then(|config| config.validate().map(|()| config)) {
            Ok(config) if faults.is_empty() => return Ok(config),
            Ok(_) => {}
            Err(error) => faults.push(error.to_string()),
        }
        bail!(Data, "{}", faults.join("; "))
    }

    /// The contents of `scheduler_config.json`, as `diffusers` reads it: each class with its own keys.
    pub fn to_json(&self) -> Result<Map<String, Value>> {
        let keys = self.class.keys();
        let mut json = self.as_map()?;
        json.retain(|key, _| key == "_class_name" || keys.contains(&key.as_str()));
        json.insert("_diffusers_version".into(), crate::nn::DIFFUSERS_VERSION.into());
        Ok(json)
    }

    fn as_map(&self) -> Result<Map<String, Value>> {
        match serde_json::to_value(self) {
            Ok(Value::Object(json)) => Ok(json),
            _ => bail!(Alarm, "the configuration of the scheduler does not make a JSON object: {self:?}"),
        }
    }

    /// Fails with [`Error::Data`] at the first key with an unsupported value.
    pub fn validate(&self) -> Result<()> {
        let Self { clip_sample_range: range, sigma_min, sigma_max, sigma_data, rho, .. } = *self;
        if self.clip_sample && !(range > 0.0 && range.is_finite()) {
            bail!(Data, "clip_sample_range is {range}, expected above 0");
        }
        if self.class != SchedulerClass::EDMEulerScheduler {
            return self.schedule().map(drop);
        }
        if self.prediction_type != PredictionType::Epsilon {
            bail!(Data, "prediction_type is {:?}, expected epsilon for EDM", self.prediction_type);
        }
        for (key, value) in [("sigma_min", sigma_min), ("sigma_data", sigma_data), ("rho", rho)] {
            if !(value > 0.0 && value.is_finite()) {
                bail!(Data, "{key} is {value}, expected above 0");
            }
        }
        if !(sigma_max > sigma_min && sigma_max.is_finite()) {
            bail!(Data, "sigma_max is {sigma_max}, expected above sigma_min = {sigma_min}");
        }
        Ok(())
    }

    /// The noise schedule. Fails with [`Error::Data`] if a β is not above 0 and below 1.
    fn schedule(&self) -> Result<NoiseSchedule> {
        let Self { num_train_timesteps: steps, beta_start: start, beta_end: end, .. } = *self;
        if let Some(betas) = &self.trained_betas {
            let found = betas.len();
            if found != steps {
                bail!(Data, "trained_betas has {found} numbers, expected num_train_timesteps = {steps}");
            }
            return NoiseSchedule::new(betas.clone());
        }
        match self.beta_schedule {
            BetaSchedule::Linear => NoiseSchedule::linear(steps, start, end),
            BetaSchedule::ScaledLinear => NoiseSchedule::scaled_linear(steps, start, end),
            BetaSchedule::SquaredCosine => NoiseSchedule::squared_cosine(steps),
        }
    }

    /// The noise levels of the model. Fails with [`Error::Data`] if a β is not above 0 and below 1.
    pub fn process(&self) -> Result<Process> {
        let Self { sigma_min: min, sigma_max: max, rho, .. } = *self;
        Ok(match self.class {
            SchedulerClass::EDMEulerScheduler => Process::Continuous(SigmaRange { min, max, rho }),
            _ => Process::Discrete(self.schedule()?),
        })
    }

    /// What the network predicts.
    pub fn prediction(&self) -> Prediction {
        match self.prediction_type {
            _ if self.class == SchedulerClass::EDMEulerScheduler => {
                Prediction::Edm { sigma_data: self.sigma_data }
            }
            PredictionType::Epsilon => Prediction::Epsilon,
            PredictionType::Sample => Prediction::Sample,
            PredictionType::VPrediction => Prediction::Velocity,
        }
    }

    /// The sampler that the model folder asks for, with [`SamplerKind::default_steps`].
    pub fn sampler(&self) -> SamplerConfig {
        SamplerConfig {
            kind: self.class.kind(),
            steps: self.class.kind().default_steps(self.num_train_timesteps),
            eta: 0.0,
            clip: self.clip_sample.then_some(self.clip_sample_range),
            variance: self.variance_type,
            spacing: self.timestep_spacing,
            steps_offset: self.steps_offset,
            final_alpha_bar_is_one: self.set_alpha_to_one,
            karras_sigmas: self.use_karras_sigmas,
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
        assert_eq!(
            config.process().unwrap(),
            Process::Discrete(NoiseSchedule::linear(1000, 1e-4, 0.02).unwrap())
        );
    }

    const CLASSES: [SchedulerClass; 6] = [
        SchedulerClass::DDPMScheduler,
        SchedulerClass::DDIMScheduler,
        SchedulerClass::DPMSolverMultistepScheduler,
        SchedulerClass::EulerDiscreteScheduler,
        SchedulerClass::HeunDiscreteScheduler,
        SchedulerClass::EDMEulerScheduler,
    ];

    #[test]
    fn what_is_written_is_read_back_and_each_class_has_its_own_keys() {
        for class in CLASSES {
            let config = SchedulerConfig { num_train_timesteps: 300, ..class.defaults() };
            let json = config.to_json().unwrap();
            assert_eq!(SchedulerConfig::from_json(json.clone()).unwrap(), config);
            assert_eq!(json.contains_key("set_alpha_to_one"), class == SchedulerClass::DDIMScheduler);
            assert_eq!(json.contains_key("beta_start"), class != SchedulerClass::EDMEulerScheduler);
        }
        let minimal = parse(json!({"_class_name": "HeunDiscreteScheduler"})).unwrap();
        assert_eq!((minimal.beta_end, minimal.clip_sample), (0.012, false));
    }

    /// What `save_pretrained` of diffusers 0.42.1 writes.
    #[test]
    fn a_solver_with_a_number_that_json_does_not_have_loads() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scheduler_config.json");
        let text = r#"{
            "_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": "0.42.1",
            "algorithm_type": "dpmsolver++", "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001,
            "dynamic_thresholding_ratio": 0.995, "euler_at_final": false, "final_sigmas_type": "zero", "flow_shift": 1.0,
            "lambda_min_clipped": -Infinity, "lower_order_final": true, "num_train_timesteps": 1000,
            "prediction_type": "v_prediction", "rescale_betas_zero_snr": false, "sample_max_value": 1.0,
            "solver_order": 2, "solver_type": "midpoint", "steps_offset": 0, "thresholding": false,
            "time_shift_type": "exponential", "timestep_spacing": "linspace", "trained_betas": null,
            "use_beta_sigmas": false, "use_dynamic_shifting": false, "use_exponential_sigmas": false,
            "use_flow_sigmas": false, "use_karras_sigmas": true, "use_lu_lambdas": false, "variance_type": null
        }"#;
        fs::publish(&path, text.as_bytes()).unwrap();
        let config = SchedulerConfig::load(&path).unwrap();
        assert_eq!((config.sampler().kind, config.sampler().karras_sigmas), (SamplerKind::DpmSolver, true));
        assert_eq!(config.prediction(), Prediction::Velocity);
    }

    #[test]
    fn options_that_are_not_built_are_refused_by_key_and_value() {
        for (json, expected) in [
            (json!({"thresholding": true}), "thresholding is true, expected false"),
            (json!({"rescale_betas_zero_snr": true}), "rescale_betas_zero_snr is true"),
            (json!({"beta_schedule": "sigmoid"}), "found 'sigmoid', expected linear or"),
            (json!({"variance_type": "learned_range"}), "found 'learned_range', expected fixed_small or"),
            (json!({"_class_name": "PNDMScheduler"}), "unknown variant `PNDMScheduler`"),
            (json!({"beta_end": 2.0}), "beta of step"),
            (
                json!({"trained_betas": [0.1]}),
                "trained_betas has 1 numbers, expected num_train_timesteps = 1000",
            ),
            (json!({"clip_sample_range": 0.0}), "clip_sample_range is 0, expected above 0"),
            (
                json!({"set_alpha_to_one": true}),
                "set_alpha_to_one is true, expected no such key in a DDPMScheduler",
            ),
            (
                json!({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}),
                "solver_order is 3, expected 2: nothing else is built",
            ),
            (
                json!({"_class_name": "EulerDiscreteScheduler", "sigma_max": 10.0}),
                "sigma_max is 10.0, expected no such key",
            ),
            (
                json!({"_class_name": "EDMEulerScheduler", "sigma_max": 0.001}),
                "sigma_max is 0.001, expected above",
            ),
            (
                json!({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}),
                "prediction_type is VPrediction, expected epsilon for EDM",
            ),
        ] {
            let error = parse(json).unwrap_err();
            assert_eq!(error.exit_code(), 65);
            assert!(error.to_string().contains(expected), "{error}\ndoes not say: {expected}");
        }
    }
}
