//! A diffusion model and its folder, in the layout of `diffusers`.

use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::{Map, Value, json};

use super::{Denoised, Level, Prediction, SchedulerClass, SchedulerConfig, sampler::SamplerKind, weights};
use crate::{
    Result, ResultExt, fs,
    nn::{DIFFUSERS_VERSION, DenoiserConfig, DenoiserNetwork, Params},
};

const INDEX: &str = "model_index.json";
const UNET_CONFIG: &str = "unet/config.json";
const UNET_WEIGHTS: &str = "unet/diffusion_pytorch_model.safetensors";
const SCHEDULER_CONFIG: &str = "scheduler/scheduler_config.json";

/// What an image should show.
#[derive(Clone, Debug)]
pub enum ClassConditioning {
    /// Anything: the model has no classes.
    None,
    /// A class for each image, `(b,)` u32.
    Classes(Tensor),
    /// A class for each image, guided away from the model's prediction for no class by classifier-free guidance (Ho
    /// & Salimans 2022, Eq. 6, with `scale` for their 1 + w): D(x; no class) + scale · (D(x; class) - D(x; no
    /// class)).
    Guided {
        /// A class for each image, `(b,)` u32.
        classes: Tensor,
        /// The class that stands for none.
        null: u32,
        /// 1 changes nothing; 0 ignores the classes.
        scale: f64,
    },
}

/// A denoiser with its parameters, and the schedule it was trained on.
///
/// Its folder is `diffusers`': `model_index.json`, `unet/` and `scheduler/`. A folder from the Hub loads unchanged,
/// and `diffusers` opens a folder that was saved here if it has the network.
pub struct DiffusionModel {
    config: DenoiserConfig,
    scheduler: SchedulerConfig,
    params: Params,
    frozen: Box<dyn DenoiserNetwork>,
    notes: Vec<String>,
}

impl DiffusionModel {
    /// A model with fresh parameters; the same for the same seed.
    pub fn init(
        config: DenoiserConfig,
        scheduler: SchedulerConfig,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        scheduler.validate()?;
        let params = Params::init(seed, device, |b| config.build(b))?;
        Self::new(config, scheduler, params)
    }

    /// Reads a model's folder; its scheduler's keys are read for a sampler, if one is given, see
    /// [`SchedulerConfig::load`].
    ///
    /// Fails with [`Error::Data`](crate::Error::Data), naming each faulty file, everything that was found wrong in
    /// it and what was expected.
    pub fn load(dir: &Path, sampler: Option<SamplerKind>, device: &Device) -> Result<Self> {
        let file = |name: &str| {
            let nested = dir.join(name);
            // Old folders on the Hub have all files at the top level, which `diffusers` still allows.
            let path = match name.split_once('/') {
                Some((part, flat)) if !dir.join(part).is_dir() => dir.join(flat),
                _ => nested.clone(),
            };
            if !path.is_file() {
                bail!(
                    Data,
                    "{}: no such file, but a model folder holds {INDEX}, {UNET_CONFIG}, {UNET_WEIGHTS} and \
                     {SCHEDULER_CONFIG}",
                    nested.display()
                );
            }
            Ok(path)
        };
        let path = file(INDEX)?;
        let index: Map<String, Value> = fs::read_json(&path)?;
        let class_of = |part: &str| index.get(part).and_then(|part| part.get(1));
        let found = class_of("unet");
        let Some(class) = found.and_then(Value::as_str).filter(|class| DenoiserConfig::TAGS.contains(class))
        else {
            let (path, found) = (path.display(), found.map_or("absent".into(), Value::to_string));
            let expected: Vec<_> = DenoiserConfig::TAGS.iter().map(|class| format!("\"{class}\"")).collect();
            bail!(Data, "{path}: the class of unet is {found}, expected {}", expected.join(" or "))
        };
        let mut notes = Vec::new();
        let config = file(UNET_CONFIG).and_then(|path| {
            let (config, ignored) = DenoiserConfig::from_json(class, fs::read_json(&path)?)
                .context(|| path.display().to_string())?;
            notes.extend(ignored.map(|ignored| format!("{}: {ignored}", path.display())));
            Ok(config)
        });
        let scheduler = file(SCHEDULER_CONFIG).and_then(|path| {
            let class = class_of("scheduler").and_then(Value::as_str);
            let (scheduler, said) = SchedulerConfig::load(&path, class, sampler)?;
            notes.extend(said);
            Ok(scheduler)
        });
        let unet = if dir.join("unet").is_dir() { dir.join("unet") } else { dir.to_owned() };
        let params = match (&config, weights::open(&unet)) {
            (Ok(config), Ok((weights, note))) => {
                notes.extend(note);
                Params::from_state_dict(weights, device, |b| config.build(b)).map(Some)
            }
            (_, weights) => weights.map(|_| None),
        };
        match (config, scheduler, params) {
            (Ok(config), Ok(scheduler), Ok(Some(params))) => {
                let model = Self::new(config, scheduler, params).context(|| dir.display().to_string())?;
                Ok(Self { notes, ..model })
            }
            (config, scheduler, params) => {
                let faults = [config.err(), scheduler.err(), params.err()];
                let mut faults: Vec<_> = faults.into_iter().flatten().collect();
                if faults.len() == 1 {
                    return Err(faults.remove(0));
                }
                let faults: Vec<_> = faults.iter().map(ToString::to_string).collect();
                bail!(Data, "{}", faults.join("\n"))
            }
        }
    }

    /// A model with these parameters.
    ///
    /// Fails with [`Error::Data`](crate::Error::Data) if they are not those of its network, or if network and
    /// scheduler do not agree on whether the variance is learned.
    pub fn new(config: DenoiserConfig, scheduler: SchedulerConfig, params: Params) -> Result<Self> {
        let learned = scheduler.variance_type.is_learned();
        // Most classes take no notice of a predicted variance; these two say whether there is one.
        let says = matches!(
            scheduler.class,
            SchedulerClass::DDPMScheduler | SchedulerClass::DPMSolverMultistepScheduler
        );
        match (config.predicts_variance(), learned) {
            (true, false) if says => bail!(
                Data,
                "the network predicts a variance (out_channels is twice in_channels), but the scheduler's variance_type \
                 is not learned or learned_range"
            ),
            (false, true) => bail!(
                Data,
                "the scheduler's variance_type is learned, but the network predicts none (out_channels is in_channels)"
            ),
            _ => {}
        }
        let frozen = params.frozen(|b| config.build(b))?;
        Ok(Self { config, scheduler, params, frozen, notes: Vec::new() })
    }

    /// Writes the model's folder, `model_index.json` last: a folder that has it is complete.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let pipeline = match self.scheduler.class {
            SchedulerClass::DDIMScheduler => "DDIMPipeline",
            SchedulerClass::DDPMScheduler | SchedulerClass::DPMSolverMultistepScheduler => "DDPMPipeline",
            // diffusers has no pipeline for these: network and scheduler are opened one by one.
            _ => "DiffusionPipeline",
        };
        let index = json!({
            "_class_name": pipeline,
            "_diffusers_version": DIFFUSERS_VERSION,
            "scheduler": ["diffusers", self.scheduler.class],
            "unet": [self.config.library(), self.config.tag()],
        });
        fs::publish(&dir.join(UNET_WEIGHTS), &self.params.to_safetensors(&[])?)?;
        fs::publish_json(&dir.join(UNET_CONFIG), &self.config.to_json()?)?;
        fs::publish_json(&dir.join(SCHEDULER_CONFIG), &self.scheduler.to_json()?)?;
        fs::publish_json(&dir.join(INDEX), &index)
    }

    /// The network's output for `x` at `t`, without gradients to the parameters; see
    /// [`DenoiserNetwork::forward`].
    pub fn predict(&self, x: &Tensor, t: f64, classes: Option<&Tensor>) -> Result<Tensor> {
        self.predict_each(x, &Tensor::full(t as f32, x.dim(0)?, x.device())?, classes)
    }

    /// [`DiffusionModel::predict`] at a `t` for each image, `(b,)` f32.
    pub fn predict_each(&self, x: &Tensor, t: &Tensor, classes: Option<&Tensor>) -> Result<Tensor> {
        self.frozen.forward(x, t, classes)
    }

    /// D(x; σ): the image predicted from `x`, `(b, h, w, c)` f32, an image in [-1, 1] and `level.sigma` times its
    /// noise. Without gradients to the parameters.
    pub fn denoise(&self, x: &Tensor, level: Level, conditioning: &ClassConditioning) -> Result<Denoised> {
        let of = |classes: Option<&Tensor>, x: &Tensor| {
            self.prediction().denoise(x, level, &|x, t| self.predict(x, t, classes))
        };
        match conditioning {
            ClassConditioning::None => of(None, x),
            ClassConditioning::Classes(classes) => of(Some(classes), x),
            ClassConditioning::Guided { classes, null, scale } => {
                let nulls = Tensor::full(*null, classes.dims(), classes.device())?;
                // One call with twice the images; the result for an image does not depend on its position.
                let both = of(Some(&Tensor::cat(&[classes, &nulls], 0)?), &Tensor::cat(&[x, x], 0)?)?;
                let n = x.dim(0)?;
                let (with, without) = (both.image.narrow(0, 0, n)?, both.image.narrow(0, n, n)?);
                Ok(Denoised {
                    image: ((with * *scale)? + (without * (1.0 - scale))?)?,
                    variance: both.variance.map(|variance| variance.narrow(0, 0, n)).transpose()?,
                })
            }
        }
    }

    /// What its folder's files say that is not taken as it stands.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What the network predicts.
    pub fn prediction(&self) -> Prediction {
        self.scheduler.prediction()
    }

    /// The network with gradients to the parameters.
    pub fn tracked(&self) -> Result<Box<dyn DenoiserNetwork>> {
        self.params.tracked(|b| self.config.build(b))
    }

    /// The parameters. [`DiffusionModel::predict`] sees updates in place.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The network's configuration.
    pub fn config(&self) -> &DenoiserConfig {
        &self.config
    }

    /// The schedule that it was trained on, and the sampler that it asks for.
    pub fn scheduler(&self) -> &SchedulerConfig {
        &self.scheduler
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{SampleSize, UNetConfig};

    fn unet() -> UNetConfig {
        UNetConfig {
            sample_size: Some(SampleSize::Square(8)),
            in_channels: 1,
            out_channels: 1,
            down_block_types: vec!["DownBlock2D".into(), "AttnDownBlock2D".into()],
            up_block_types: vec!["AttnUpBlock2D".into(), "UpBlock2D".into()],
            block_out_channels: vec![4, 8],
            layers_per_block: 1,
            norm_num_groups: 2,
            attention_head_dim: None,
            num_class_embeds: Some(3),
            ..UNetConfig::default()
        }
    }

    fn config() -> DenoiserConfig {
        DenoiserConfig::UNet(unet())
    }

    fn output(model: &DiffusionModel) -> Vec<f32> {
        let x = Tensor::full(0.3f32, (2, 8, 8, 1), &Device::Cpu).unwrap();
        let labels = Tensor::new(&[2u32, 0], &Device::Cpu).unwrap();
        model.predict(&x, 17.0, Some(&labels)).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn guidance_moves_away_from_no_class() {
        let model = DiffusionModel::init(config(), SchedulerConfig::default(), 4, &Device::Cpu).unwrap();
        let x = Tensor::full(0.3f32, (2, 8, 8, 1), &Device::Cpu).unwrap();
        let classes = |classes: [u32; 2]| Tensor::new(&classes, &Device::Cpu).unwrap();
        let level = Level { sigma: 1.5, t: 400.0 };
        let values = |conditioning: ClassConditioning| -> Vec<f32> {
            model.denoise(&x, level, &conditioning).unwrap().image.flatten_all().unwrap().to_vec1().unwrap()
        };
        let guided = |scale| values(ClassConditioning::Guided { classes: classes([1, 0]), null: 2, scale });
        let with = values(ClassConditioning::Classes(classes([1, 0])));
        let without = values(ClassConditioning::Classes(classes([2, 2])));
        assert_eq!((guided(1.0), guided(0.0)), (with.clone(), without.clone()));
        assert_ne!(with, without);
        for ((guided, with), without) in guided(3.0).iter().zip(with).zip(without) {
            assert!((guided - (without + 3.0 * (with - without))).abs() < 1e-5);
        }
    }

    #[test]
    fn a_saved_model_loads_with_the_same_output() {
        let dir = tempfile::tempdir().unwrap();
        let saved = DiffusionModel::init(config(), SchedulerConfig::default(), 4, &Device::Cpu).unwrap();
        saved.save(dir.path()).unwrap();
        let loaded = DiffusionModel::load(dir.path(), None, &Device::Cpu).unwrap();
        assert_eq!((loaded.config(), loaded.scheduler()), (saved.config(), saved.scheduler()));
        assert_eq!(output(&loaded), output(&saved));
        assert!(output(&saved).iter().any(|v| *v != 0.0));
    }

    #[test]
    fn a_folder_with_all_files_at_the_top_loads() {
        let dir = tempfile::tempdir().unwrap();
        let saved = DiffusionModel::init(config(), SchedulerConfig::default(), 4, &Device::Cpu).unwrap();
        saved.save(dir.path()).unwrap();
        for name in [UNET_CONFIG, UNET_WEIGHTS, SCHEDULER_CONFIG] {
            let (part, flat) = name.split_once('/').unwrap();
            std::fs::rename(dir.path().join(name), dir.path().join(flat)).unwrap();
            let _ = std::fs::remove_dir(dir.path().join(part));
        }
        assert_eq!(output(&DiffusionModel::load(dir.path(), None, &Device::Cpu).unwrap()), output(&saved));
    }

    #[test]
    fn bad_folders_are_data_errors_that_name_the_file_and_what_was_expected() {
        let dir = tempfile::tempdir().unwrap();
        let load =
            || DiffusionModel::load(dir.path(), None, &Device::Cpu).err().expect("a bad folder is refused");
        let said = |part: &str| {
            let error = load();
            assert_eq!(error.exit_code(), 65, "{error}");
            assert!(error.to_string().contains(part), "{error}\ndoes not say: {part}");
        };
        said("model_index.json: no such file, but a model folder holds");
        let model = DiffusionModel::init(config(), SchedulerConfig::default(), 4, &Device::Cpu).unwrap();
        model.save(dir.path()).unwrap();

        let wider = DenoiserConfig::UNet(UNetConfig { block_out_channels: vec![8, 8], ..unet() });
        fs::publish_json(&dir.path().join(UNET_CONFIG), &wider.to_json().unwrap()).unwrap();
        said("conv_in.weight has shape [4, 1, 3, 3], expected [8, 1, 3, 3]");
        model.save(dir.path()).unwrap();

        fs::publish(&dir.path().join(SCHEDULER_CONFIG), br#"{"thresholding": true}"#).unwrap();
        said("scheduler_config.json: thresholding is true, expected false");
        fs::publish(&dir.path().join(UNET_CONFIG), br#"{"act_fn": "gelu", "dropout": 2}"#).unwrap();
        said("scheduler_config.json: thresholding is true, expected false");
        said("config.json: act_fn is \"gelu\", expected silu or swish; dropout is 2.0, expected from 0");
        model.save(dir.path()).unwrap();

        let pointer = b"version https://git-lfs.example/spec/v1\noid sha256:0\nsize 12\n";
        fs::publish(&dir.path().join(UNET_WEIGHTS), pointer).unwrap();
        said("is a pointer of Git LFS, not the file that it stands for");
        let whole = model.params().to_safetensors(&[]).unwrap();
        fs::publish(&dir.path().join(UNET_WEIGHTS), &whole[..whole.len() / 2]).unwrap();
        said("not a safetensors file");
        fs::publish(&dir.path().join(INDEX), br#"{"unet": ["diffusers", "UNet2DConditionModel"]}"#).unwrap();
        said("the class of unet is \"UNet2DConditionModel\", expected \"UNet2DModel\"");
        std::fs::remove_file(dir.path().join(UNET_WEIGHTS)).unwrap();
        model.save(dir.path()).unwrap();
        std::fs::remove_file(dir.path().join(UNET_WEIGHTS)).unwrap();
        said("no weights: expected diffusion_pytorch_model.safetensors, found config.json");
    }
}
