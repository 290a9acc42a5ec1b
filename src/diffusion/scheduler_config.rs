//! What a scheduler of `diffusers` says: the noise of a model, and the sampler that it asks for.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    NoiseSchedule, Prediction, PredictionType, Process, SigmaRange,
    sampler::{Churn, SamplerConfig, SamplerKind, Spacing, StepConfig, UniPcVariant, Variance},
};
use crate::Result;

/// The noise of a model and the sampler that it asks for. The keys and the defaults of each class are `diffusers`'.
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
    /// Whether β is rescaled so that nothing of the image is left at the last step (Lin et al. 2024).
    pub rescale_betas_zero_snr: bool,
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
    /// Whether DDIM and PNDM end at ᾱ = 1, instead of the ᾱ of step 0.
    pub set_alpha_to_one: bool,
    /// Whether PNDM begins without Runge-Kutta steps.
    pub skip_prk_steps: bool,
    /// Which of the multistep solvers of DPMSolverMultistepScheduler.
    pub algorithm_type: AlgorithmType,
    /// The order of UniPC.
    pub solver_order: usize,
    /// The function B(h) of UniPC.
    pub solver_type: UniPcVariant,
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
    PNDMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
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
        /// β grows like the logistic function from -6 to 6 (Xu et al. 2022).
        Sigmoid = "sigmoid",
    }
}

named! {
    /// The multistep solvers of one class of `diffusers`, under its names.
    pub enum AlgorithmType {
        /// DPM-Solver++ (Lu et al. 2022).
        DpmSolver = "dpmsolver++",
        /// Its form with fresh noise.
        SdeDpmSolver = "sde-dpmsolver++",
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
            rescale_betas_zero_snr: false,
            variance_type: Variance::FixedSmall,
            clip_sample: true,
            clip_sample_range: 1.0,
            prediction_type: PredictionType::Epsilon,
            timestep_spacing: Spacing::Leading,
            steps_offset: 0,
            set_alpha_to_one: true,
            skip_prk_steps: false,
            algorithm_type: AlgorithmType::DpmSolver,
            solver_order: 2,
            solver_type: UniPcVariant::Bh2,
            use_karras_sigmas: false,
            sigma_min: 0.002,
            sigma_max: 80.0,
            sigma_data: 0.5,
            rho: 7.0,
        }
    }
}

impl SchedulerClass {
    /// The sampler of this name.
    pub fn kind(self) -> SamplerKind {
        match self {
            Self::DDPMScheduler => SamplerKind::Ddpm,
            Self::DDIMScheduler => SamplerKind::Ddim,
            Self::PNDMScheduler => SamplerKind::Pndm,
            Self::DPMSolverMultistepScheduler => SamplerKind::DpmSolver,
            Self::UniPCMultistepScheduler => SamplerKind::UniPc,
            Self::EulerDiscreteScheduler | Self::EDMEulerScheduler => SamplerKind::Euler,
            Self::EulerAncestralDiscreteScheduler => SamplerKind::EulerAncestral,
            Self::HeunDiscreteScheduler => SamplerKind::Heun,
        }
    }

    /// The class of a sampler; that of DDIM for one that `diffusers` has not.
    pub fn of(kind: SamplerKind) -> Self {
        match kind {
            SamplerKind::Ddpm => Self::DDPMScheduler,
            SamplerKind::Ddim | SamplerKind::Ipndm => Self::DDIMScheduler,
            SamplerKind::Pndm => Self::PNDMScheduler,
            SamplerKind::DpmSolver | SamplerKind::SdeDpmSolver => Self::DPMSolverMultistepScheduler,
            SamplerKind::UniPc => Self::UniPCMultistepScheduler,
            SamplerKind::Euler => Self::EulerDiscreteScheduler,
            SamplerKind::EulerAncestral => Self::EulerAncestralDiscreteScheduler,
            SamplerKind::Heun => Self::HeunDiscreteScheduler,
        }
    }

    /// The values of the keys that a file leaves out.
    pub fn defaults(self) -> SchedulerConfig {
        let base = SchedulerConfig { class: self, ..SchedulerConfig::default() };
        let solver =
            SchedulerConfig { clip_sample: false, timestep_spacing: Spacing::Linspace, ..base.clone() };
        match self {
            Self::DDPMScheduler | Self::DDIMScheduler => base,
            Self::PNDMScheduler => SchedulerConfig { clip_sample: false, set_alpha_to_one: false, ..base },
            Self::HeunDiscreteScheduler => SchedulerConfig { beta_start: 0.00085, beta_end: 0.012, ..solver },
            _ => solver,
        }
    }
}

impl SchedulerConfig {
    pub(super) fn as_map(&self) -> Result<Map<String, Value>> {
        match serde_json::to_value(self) {
            Ok(Value::Object(json)) => Ok(json),
            _ => bail!(Alarm, "the configuration of the scheduler does not make a JSON object: {self:?}"),
        }
    }

    /// Fails with [`Error::Data`](crate::Error::Data) at the first key with an unsupported value.
    pub fn validate(&self) -> Result<()> {
        let Self { clip_sample_range: range, sigma_min, sigma_max, sigma_data, rho, .. } = *self;
        if self.clip_sample && !(range > 0.0 && range.is_finite()) {
            bail!(Data, "clip_sample_range is {range}, expected above 0");
        }
        if self.class != SchedulerClass::EDMEulerScheduler {
            if !(1..=3).contains(&self.solver_order) {
                bail!(Data, "solver_order is {}, expected from 1 to 3", self.solver_order);
            }
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

    /// ᾱ of the last step with zero terminal SNR: what stands for 0 in the classes that do not divide by it.
    fn last_alpha_bar(&self) -> f64 {
        match self.class {
            SchedulerClass::DDPMScheduler | SchedulerClass::DDIMScheduler => 1e-20,
            _ => LAST_ALPHA_BAR,
        }
    }

    /// The noise schedule. Fails with [`Error::Data`](crate::Error::Data) if a β is not above 0 and below 1.
    fn schedule(&self) -> Result<NoiseSchedule> {
        let Self { num_train_timesteps: steps, beta_start: start, beta_end: end, .. } = *self;
        if let Some(betas) = &self.trained_betas {
            let found = betas.len();
            if found != steps {
                bail!(Data, "trained_betas has {found} numbers, expected num_train_timesteps = {steps}");
            }
            return self.rescaled(NoiseSchedule::new(betas.clone())?);
        }
        let schedule = match self.beta_schedule {
            BetaSchedule::Linear => NoiseSchedule::linear(steps, start, end),
            BetaSchedule::ScaledLinear => NoiseSchedule::scaled_linear(steps, start, end),
            BetaSchedule::SquaredCosine => NoiseSchedule::squared_cosine(steps),
            BetaSchedule::Sigmoid => NoiseSchedule::sigmoid(steps, start, end),
        }?;
        self.rescaled(schedule)
    }

    fn rescaled(&self, schedule: NoiseSchedule) -> Result<NoiseSchedule> {
        match self.rescale_betas_zero_snr {
            true => schedule.with_zero_terminal_snr(self.last_alpha_bar()),
            false => Ok(schedule),
        }
    }

    /// The noise levels of the model. Fails with [`Error::Data`](crate::Error::Data) if a β is not above 0 and below 1.
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

    /// How many steps a sampler makes if nobody says: all steps of training with ddpm and ddim, if the last of them can
    /// be visited, else 50, as with the solvers.
    pub fn default_steps(&self, kind: SamplerKind) -> usize {
        let no_signal = self.rescale_betas_zero_snr && self.prediction_type == PredictionType::Epsilon;
        match kind {
            SamplerKind::Ddpm | SamplerKind::Ddim if self.steps_offset == 0 && !no_signal => {
                self.num_train_timesteps
            }
            _ => self.num_train_timesteps.min(50),
        }
    }

    /// The sampler that it asks for, with [`SchedulerConfig::default_steps`].
    pub fn sampler(&self) -> SamplerConfig {
        let kind = match self.algorithm_type {
            AlgorithmType::SdeDpmSolver => SamplerKind::SdeDpmSolver,
            AlgorithmType::DpmSolver => self.class.kind(),
        };
        SamplerConfig {
            kind,
            steps: self.default_steps(kind),
            spacing: self.timestep_spacing,
            steps_offset: self.steps_offset,
            final_alpha_bar_is_one: self.set_alpha_to_one,
            karras_sigmas: self.use_karras_sigmas,
            step: StepConfig {
                eta: 0.0,
                clip: self.clip_sample.then_some(self.clip_sample_range),
                variance: self.variance_type,
                churn: Churn::NONE,
                skip_prk_steps: self.skip_prk_steps,
                solver_order: self.solver_order,
                unipc: self.solver_type,
                prediction: self.prediction(),
            },
        }
    }
}

/// What `diffusers` takes for ᾱ = 0, where σ would be infinite.
const LAST_ALPHA_BAR: f64 = 1.0 / (1 << 24) as f64;
