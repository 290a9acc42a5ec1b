//! `scheduler/scheduler_config.json`: which keys the classes of `diffusers` have, and which are built here.

use std::path::Path;

use serde_json::{Map, Value};

use super::{
    AlgorithmType, SchedulerClass,
    SchedulerClass::{
        DDIMScheduler as Ddim, DDPMScheduler as Ddpm, DPMSolverMultistepScheduler as Dpm,
        EDMEulerScheduler as Edm, EulerAncestralDiscreteScheduler as EulerAncestral,
        EulerDiscreteScheduler as Euler, HeunDiscreteScheduler as Heun, PNDMScheduler as Pndm,
        UniPCMultistepScheduler as UniPc,
    },
    SchedulerConfig,
    sampler::SamplerKind,
};
use crate::{Error, Result, ResultExt, fs};

/// What is built of a key.
enum Built {
    /// Every value that [`SchedulerConfig`] has.
    All,
    /// This JSON alone, or null.
    Only(&'static str),
    /// It makes no difference to what is built.
    Any,
}

use Built::{All, Any, Only};

const DISCRETE: &[SchedulerClass] = &[Ddpm, Ddim, Pndm, Dpm, UniPc, Euler, EulerAncestral, Heun];
const SOLVERS: &[SchedulerClass] = &[Dpm, UniPc, Euler, Heun];
const THRESHOLDED: &[SchedulerClass] = &[Ddpm, Ddim, Dpm, UniPc];

/// The keys of the classes that are built, and the classes that have them.
const KEYS: &[(&str, &[SchedulerClass], Built)] = &[
    ("num_train_timesteps", &[Ddpm, Ddim, Pndm, Dpm, UniPc, Euler, EulerAncestral, Heun, Edm], All),
    ("prediction_type", &[Ddpm, Ddim, Pndm, Dpm, UniPc, Euler, EulerAncestral, Heun, Edm], All),
    ("beta_start", DISCRETE, All),
    ("beta_end", DISCRETE, All),
    ("beta_schedule", DISCRETE, All),
    ("trained_betas", DISCRETE, All),
    ("timestep_spacing", DISCRETE, All),
    ("steps_offset", DISCRETE, All),
    ("rescale_betas_zero_snr", &[Ddpm, Ddim, Dpm, UniPc, Euler, EulerAncestral], All),
    ("variance_type", &[Ddpm, Dpm], All),
    ("clip_sample", &[Ddpm, Ddim, Heun], All),
    ("clip_sample_range", &[Ddpm, Ddim, Heun], All),
    ("set_alpha_to_one", &[Ddim, Pndm], All),
    ("skip_prk_steps", &[Pndm], All),
    ("use_karras_sigmas", SOLVERS, All),
    ("algorithm_type", &[Dpm], All),
    ("solver_order", &[UniPc], All),
    ("solver_order", &[Dpm], Only("2")),
    ("solver_type", &[UniPc], All),
    ("solver_type", &[Dpm], Only("\"midpoint\"")),
    ("sigma_min", &[Edm], All),
    ("sigma_max", &[Edm], All),
    ("sigma_data", &[Edm], All),
    ("rho", &[Edm], All),
    ("sigma_schedule", &[Edm], Only("\"karras\"")),
    ("sigma_min", &[UniPc, Euler], Only("null")),
    ("sigma_max", &[UniPc, Euler], Only("null")),
    ("thresholding", THRESHOLDED, Only("false")),
    ("dynamic_thresholding_ratio", THRESHOLDED, Any),
    ("sample_max_value", THRESHOLDED, Any),
    // The last step of DPM-Solver++ goes to σ = 0 and is of order 1, whatever these two say.
    ("lower_order_final", &[Dpm], Any),
    ("euler_at_final", &[Dpm], Any),
    ("lower_order_final", &[UniPc], Only("true")),
    ("predict_x0", &[UniPc], Only("true")),
    ("disable_corrector", &[UniPc], Only("[]")),
    ("solver_p", &[UniPc], Only("null")),
    ("shift_terminal", &[UniPc], Only("null")),
    ("use_exponential_sigmas", SOLVERS, Only("false")),
    ("use_beta_sigmas", SOLVERS, Only("false")),
    ("use_lu_lambdas", &[Dpm], Only("false")),
    ("use_flow_sigmas", &[Dpm, UniPc], Only("false")),
    ("flow_shift", &[Dpm, UniPc], Any),
    ("use_dynamic_shifting", &[Dpm, UniPc], Only("false")),
    ("time_shift_type", &[Dpm, UniPc], Any),
    ("final_sigmas_type", &[Dpm, UniPc, Euler, Edm], Only("\"zero\"")),
    ("lambda_min_clipped", &[Dpm], Only("\"-Infinity\"")),
    ("interpolation_type", &[Euler], Only("\"linear\"")),
    ("timestep_type", &[Euler], Only("\"discrete\"")),
];

/// Keys of classes that are not built, and of `diffusers` before 0.5.
const FOREIGN: [&str; 10] = [
    "corrector_order",
    "eta",
    "original_inference_steps",
    "predictor_order",
    "s_churn",
    "snr_shift_scale",
    "tau_func",
    "tensor_format",
    "timestep_scaling",
    "timestep_values",
];

/// The classes that are not built, but whose noise is that of the others.
const OTHERS: [&str; 15] = [
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSinglestepScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "RePaintScheduler",
    "SASolverScheduler",
    "TCDScheduler",
];

fn of_class(key: &str, class: SchedulerClass) -> Option<&'static Built> {
    let mut keys = KEYS.iter().filter(|(known, classes, _)| *known == key && classes.contains(&class));
    keys.next().map(|(_, _, built)| built)
}

impl SchedulerConfig {
    /// Reads `scheduler_config.json` for a sampler; without one, for that of the file. As with `from_config` of
    /// `diffusers`, keys that the file leaves out have the defaults of the sampler's class. `class`: the class
    /// that `model_index.json` names, which decides.
    ///
    /// Returns what should be said about the file, too. Fails with [`Error::Data`], naming the file, every
    /// unsupported key and what was expected.
    pub fn load(
        path: &Path,
        class: Option<&str>,
        sampler: Option<SamplerKind>,
    ) -> Result<(Self, Vec<String>)> {
        let of_file = || path.display().to_string();
        let text = fs::read_text(path)?;
        // Python writes a number that JSON cannot express.
        let text = text.replace(": -Infinity", ": \"-Infinity\"");
        let mut json: Map<String, Value> = serde_json::from_str(&text)
            .map_err(|e| Error::Data(format!("no JSON object: {e}")))
            .context(of_file)?;
        let mut notes = Vec::new();
        if let Some(class) = class
            && let Some(found) = json.insert("_class_name".into(), class.into())
            && found != class
        {
            notes.push(format!("the scheduler is a {class}, as model_index.json says, not a {found}"));
        }
        let config = Self::from_json(json, sampler, &mut notes).context(of_file)?;
        Ok((config, notes.into_iter().map(|note| format!("{}: {note}", of_file())).collect()))
    }

    /// What `scheduler_config.json` says; see [`SchedulerConfig::load`].
    pub fn from_json(
        mut json: Map<String, Value>,
        sampler: Option<SamplerKind>,
        notes: &mut Vec<String>,
    ) -> Result<Self> {
        let bad = |e| Error::Data(format!("not a scheduler that is built: {e}"));
        let named = json.remove("_class_name").unwrap_or_else(|| "DDPMScheduler".into());
        let own = serde_json::from_value::<SchedulerClass>(named.clone());
        let class = match (own, sampler) {
            (Ok(Edm), _) => Edm,
            (Ok(_), Some(kind)) => SchedulerClass::of(kind),
            (Ok(own), None) => own,
            (Err(_), Some(kind)) if OTHERS.iter().any(|other| named == *other) => SchedulerClass::of(kind),
            (Err(e), _) if OTHERS.iter().any(|other| named == *other) => {
                bail!(Data, "not a scheduler that is built: {e}; --sampler chooses one for its noise")
            }
            (Err(e), _) => return Err(bad(e)),
        };
        if let Some(Value::Array(unset)) = json.remove("_use_default_values") {
            json.retain(|key, _| !unset.iter().any(|name| name == key));
        }
        translate(&mut json, class, sampler)?;
        let mut whole = class.defaults().as_map()?;
        let (mut faults, mut ignored) = (Vec::new(), Vec::new());
        for (key, value) in json.into_iter().filter(|(key, _)| !key.starts_with('_')) {
            match of_class(&key, class) {
                Some(All) => drop(whole.insert(key, value)),
                Some(Any) => {}
                Some(Only(expected)) => {
                    let found = value.to_string();
                    if !value.is_null() && found != *expected {
                        faults.push(format!("{key} is {found}, expected {expected}: nothing else is built"));
                    }
                }
                None if KEYS.iter().any(|(known, ..)| *known == key) || FOREIGN.contains(&key.as_str()) => {
                    ignored.push(key);
                }
                None => faults.push(format!("{key} is {value}, expected no such key in a {class:?}")),
            }
        }
        if !ignored.is_empty() {
            notes.push(format!("a {class:?} has no {}: ignored", ignored.join(", ")));
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
        let mut json = self.as_map()?;
        json.retain(|key, _| key == "_class_name" || matches!(of_class(key, self.class), Some(All)));
        json.insert("_diffusers_version".into(), crate::nn::DIFFUSERS_VERSION.into());
        Ok(json)
    }
}

/// Brings keys of other versions and classes into today's form, as `diffusers` does.
fn translate(
    json: &mut Map<String, Value>,
    class: SchedulerClass,
    sampler: Option<SamplerKind>,
) -> Result<()> {
    if let Some(predicts_noise) = json.remove("predict_epsilon") {
        let prediction = match predicts_noise {
            Value::Bool(true) => "epsilon",
            Value::Bool(false) => "sample",
            other => bail!(Data, "predict_epsilon is {other}, expected true or false"),
        };
        let found = json.entry("prediction_type").or_insert_with(|| prediction.into());
        if found != prediction {
            bail!(Data, "prediction_type is {found}, expected \"{prediction}\": predict_epsilon says so");
        }
    }
    match sampler {
        Some(SamplerKind::DpmSolver) => {
            json.insert("algorithm_type".into(), AlgorithmType::DpmSolver.to_string().into());
        }
        Some(SamplerKind::SdeDpmSolver) => {
            json.insert("algorithm_type".into(), AlgorithmType::SdeDpmSolver.to_string().into());
        }
        _ => {}
    }
    if json.get("variance_type").is_some_and(Value::is_null) {
        json.remove("variance_type");
    }
    if json.get("algorithm_type").is_some_and(|algorithm| algorithm == "deis") {
        json.insert("algorithm_type".into(), AlgorithmType::DpmSolver.to_string().into());
    }
    // Each of the two classes takes the names of the other for its own default.
    let (own, foreign) = match class {
        Dpm => ("midpoint", ["logrho", "bh1", "bh2"]),
        _ => ("bh2", ["midpoint", "heun", "logrho"]),
    };
    if let Some(solver) = json.get_mut("solver_type").filter(|s| foreign.iter().any(|name| s == name)) {
        *solver = own.into();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::diffusion::{
        NoiseSchedule, Prediction, Process,
        sampler::{Spacing, Variance},
    };

    fn parse(json: Value) -> Result<SchedulerConfig> {
        let Value::Object(json) = json else { panic!("the test gives an object") };
        SchedulerConfig::from_json(json, None, &mut Vec::new())
    }

    fn parse_for(sampler: SamplerKind, json: &Value) -> Result<(SchedulerConfig, Vec<String>)> {
        let mut notes = Vec::new();
        let json = json.as_object().unwrap().clone();
        Ok((SchedulerConfig::from_json(json, Some(sampler), &mut notes)?, notes))
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
        assert_eq!((sampler.kind, sampler.steps, sampler.step.clip), (SamplerKind::Ddpm, 1000, Some(1.0)));
        assert_eq!(sampler.step.variance, Variance::FixedLarge);
        assert_eq!(
            config.process().unwrap(),
            Process::Discrete(NoiseSchedule::linear(1000, 1e-4, 0.02).unwrap())
        );
    }

    const CLASSES: [SchedulerClass; 9] = [
        SchedulerClass::DDPMScheduler,
        SchedulerClass::DDIMScheduler,
        SchedulerClass::PNDMScheduler,
        SchedulerClass::DPMSolverMultistepScheduler,
        SchedulerClass::UniPCMultistepScheduler,
        SchedulerClass::EulerDiscreteScheduler,
        SchedulerClass::EulerAncestralDiscreteScheduler,
        SchedulerClass::HeunDiscreteScheduler,
        SchedulerClass::EDMEulerScheduler,
    ];

    #[test]
    fn what_is_written_is_read_back_and_each_class_has_its_own_keys() {
        for class in CLASSES {
            let config = SchedulerConfig { num_train_timesteps: 300, ..class.defaults() };
            let json = config.to_json().unwrap();
            assert_eq!(SchedulerConfig::from_json(json.clone(), None, &mut Vec::new()).unwrap(), config);
            assert_eq!(json.contains_key("set_alpha_to_one"), matches!(class, Ddim | Pndm));
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
        let (config, notes) = SchedulerConfig::load(&path, None, None).unwrap();
        assert!(notes.is_empty(), "{notes:?}");
        assert_eq!((config.sampler().kind, config.sampler().karras_sigmas), (SamplerKind::DpmSolver, true));
        assert_eq!(config.prediction(), Prediction::Velocity);
    }

    #[test]
    fn options_that_are_not_built_are_refused_by_key_and_value() {
        for (json, expected) in [
            (json!({"thresholding": true}), "thresholding is true, expected false"),
            (json!({"beta_schedule": "laplace"}), "found 'laplace', expected linear or"),
            (json!({"variance_type": "fixed_large_log"}), "found 'fixed_large_log', expected fixed_small or"),
            (json!({"_class_name": "LMSDiscreteScheduler"}), "--sampler chooses one for its noise"),
            (json!({"_class_name": "FlowMatchEulerDiscreteScheduler"}), "unknown variant `FlowMatchEuler"),
            (json!({"beta_end": 2.0}), "beta of step"),
            (
                json!({"trained_betas": [0.1]}),
                "trained_betas has 1 numbers, expected num_train_timesteps = 1000",
            ),
            (json!({"clip_sample_range": 0.0}), "clip_sample_range is 0, expected above 0"),
            (json!({"beta_shape": 3}), "beta_shape is 3, expected no such key in a DDPMScheduler"),
            (
                json!({"predict_epsilon": false, "prediction_type": "epsilon"}),
                "prediction_type is \"epsilon\", expected \"sample\": predict_epsilon says so",
            ),
            (
                json!({"_class_name": "UniPCMultistepScheduler", "solver_order": 4}),
                "solver_order is 4, expected from",
            ),
            (
                json!({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}),
                "solver_order is 3, expected 2: nothing else is built",
            ),
            (
                json!({"_class_name": "EulerDiscreteScheduler", "sigma_max": 10.0}),
                "sigma_max is 10.0, expected null",
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

    /// As `X.from_config(ddpm.config)` of diffusers.
    #[test]
    fn a_file_is_read_for_another_sampler_with_the_defaults_of_its_class() {
        let old = json!({"_class_name": "DDPMScheduler", "beta_end": 0.01, "clip_sample": true});
        let (euler, notes) = parse_for(SamplerKind::Euler, &old).unwrap();
        assert_eq!((euler.class, euler.timestep_spacing, euler.beta_end), (Euler, Spacing::Linspace, 0.01));
        assert_eq!(
            (euler.clip_sample, notes),
            (false, vec!["a EulerDiscreteScheduler has no clip_sample: ignored".into()])
        );
        let unset = json!({
            "_class_name": "DDPMScheduler", "timestep_spacing": "leading", "_use_default_values": ["timestep_spacing"]
        });
        assert_eq!(parse_for(SamplerKind::UniPc, &unset).unwrap().0.timestep_spacing, Spacing::Linspace);
        let lms = json!({"_class_name": "LMSDiscreteScheduler", "timestep_spacing": "trailing"});
        assert_eq!(parse_for(SamplerKind::Heun, &lms).unwrap().0.timestep_spacing, Spacing::Trailing);
        let (sde, _) = parse_for(SamplerKind::SdeDpmSolver, &old).unwrap();
        assert_eq!(sde.sampler().kind, SamplerKind::SdeDpmSolver);
        let sde = json!({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"});
        assert_eq!(parse(sde.clone()).unwrap().sampler().kind, SamplerKind::SdeDpmSolver);
        assert_eq!(parse_for(SamplerKind::DpmSolver, &sde).unwrap().0.sampler().kind, SamplerKind::DpmSolver);
        let edm = json!({"_class_name": "EDMEulerScheduler"});
        assert_eq!(parse_for(SamplerKind::Heun, &edm).unwrap().0.class, Edm);
        let image = parse(json!({"predict_epsilon": false})).unwrap();
        assert_eq!(image.prediction(), Prediction::Sample);
        let bh2 = json!({"_class_name": "UniPCMultistepScheduler", "solver_type": "midpoint"});
        assert!(parse(bh2.clone()).is_ok() && parse_for(SamplerKind::DpmSolver, &bh2).is_ok());
    }

    #[test]
    fn the_class_of_the_index_decides() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scheduler_config.json");
        fs::publish(&path, br#"{"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}"#).unwrap();
        let (config, notes) = SchedulerConfig::load(&path, Some("DDIMScheduler"), None).unwrap();
        assert_eq!(config.class, Ddim);
        assert!(
            notes[0].contains("is a DDIMScheduler, as model_index.json says, not a \"DDPMScheduler\""),
            "{notes:?}"
        );
        assert!(notes[1].contains("a DDIMScheduler has no variance_type: ignored"), "{notes:?}");
    }
}
