//! Groups of settings that several stages share, each written once.
//!
//! A group is a struct whose fields are both flags (`clap::Args`) and the keys of a table (`serde`). Where there is
//! a choice, the group is an enum made by `tagged!`: a flag, or the key `kind`, chooses the variant, and only that
//! variant's settings can be set. The defaults are those of the flags; a stage may have [defaults of its
//! own](defaults).

#[macro_use]
pub(crate) mod tagged;

mod architecture;
mod attack;
mod augmentation;
mod denoiser;
mod flags;
mod objective;
mod optimizer;
mod part;
mod process;
mod sampler;
mod schedule;
mod table;

pub use self::{
    architecture::{ArchitectureSettings, ResNetSettings, SmallCnnSettings, WideResNetSettings},
    attack::{AttackSettings, BallSettings, EvaluationAttackSettings, PgdSettings, StepSettings},
    augmentation::AugmentationSettings,
    denoiser::{AdmSettings, DenoiserSettings, LevelsSettings, UNetSettings},
    flags::{Settings, StageDefault, defaults, from_flags, named},
    objective::{
        AttackBatchNorm, AttackedSettings, FgsmSettings, NoiseSettings, ObjectiveSettings, SmoothAdvSettings,
        StabilitySettings, TradesSettings,
    },
    optimizer::{AdamSettings, OptimizerSettings, SgdSettings},
    part::PartSettings,
    process::{DiscreteSettings, ProcessSettings},
    sampler::{ChurnSettings, DdimSettings, SamplerSettings, SigmaSettings, StepsSettings},
    schedule::{CosineSettings, ScheduleSettings, WarmupSettings},
    table::from_table,
};

/// The settings of a variant without settings.
#[derive(clap::Args, Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct NoSettings {}
