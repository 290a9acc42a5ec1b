//! A diffusion model and its folder, which is `diffusers`'.

use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::{Map, Value, json};

use super::{SchedulerClass, SchedulerConfig};
use crate::{
    Result, ResultExt, fs,
    nn::{DIFFUSERS_VERSION, Params, UNet, UNetConfig},
};

const INDEX: &str = "model_index.json";
const UNET_CONFIG: &str = "unet/config.json";
const UNET_WEIGHTS: &str = "unet/diffusion_pytorch_model.safetensors";
const SCHEDULER_CONFIG: &str = "scheduler/scheduler_config.json";

/// A U-Net with its parameters, and the schedule it was trained on.
///
/// Its folder is `diffusers`': `model_index.json`, `unet/` and `scheduler/`. A folder from the Hub loads as it
/// is; one that was saved here opens there.
pub struct DiffusionModel {
    config: UNetConfig,
    scheduler: SchedulerConfig,
    params: Params,
    frozen: UNet,
}

impl DiffusionModel {
    /// A model with fresh parameters; the same for the same seed.
    pub fn init(config: UNetConfig, scheduler: SchedulerConfig, seed: u64, device: &Device) -> Result<Self> {
        scheduler.validate()?;
        let params = Params::init(seed, device, |b| UNet::new(&config, b))?;
        Self::over(config, scheduler, params)
    }

    /// Reads a model's folder.
    ///
    /// Fails with [`Error::Data`](crate::Error::Data), naming the file, what was found in it and what was
    /// expected.
    pub fn load(dir: &Path, device: &Device) -> Result<Self> {
        let file = |name: &str| {
            let nested = dir.join(name);
            // Old folders on the Hub have all files at the top, as `diffusers` still allows.
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
        match index.get("unet").and_then(|unet| unet.get(1)) {
            Some(class) if class == "UNet2DModel" => {}
            found => {
                let found = found.map_or("absent".into(), Value::to_string);
                bail!(Data, "{}: the class of unet is {found}, expected \"UNet2DModel\"", path.display())
            }
        }
        let config = UNetConfig::load(&file(UNET_CONFIG)?)?;
        let scheduler = SchedulerConfig::load(&file(SCHEDULER_CONFIG)?)?;
        let params = Params::load(&file(UNET_WEIGHTS)?, device, |b| UNet::new(&config, b))?;
        Self::over(config, scheduler, params)
    }

    fn over(config: UNetConfig, scheduler: SchedulerConfig, params: Params) -> Result<Self> {
        let frozen = params.frozen(|b| UNet::new(&config, b))?;
        Ok(Self { config, scheduler, params, frozen })
    }

    /// Writes the model's folder, `model_index.json` last: a folder that has it is complete.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let scheduler = match self.scheduler.class {
            SchedulerClass::DDPMScheduler => "DDPMScheduler",
            SchedulerClass::DDIMScheduler => "DDIMScheduler",
        };
        let pipeline = scheduler.replace("Scheduler", "Pipeline");
        let index = json!({
            "_class_name": pipeline,
            "_diffusers_version": DIFFUSERS_VERSION,
            "scheduler": ["diffusers", scheduler],
            "unet": ["diffusers", "UNet2DModel"],
        });
        fs::publish(&dir.join(UNET_WEIGHTS), &self.params.to_safetensors(&[])?)?;
        fs::publish_json(&dir.join(UNET_CONFIG), &self.config.to_json()?)?;
        fs::publish_json(&dir.join(SCHEDULER_CONFIG), &self.scheduler.to_json()?)?;
        fs::publish_json(&dir.join(INDEX), &index)
    }

    /// The noise in `x` at training step `t`, without gradients to the parameters; see [`UNet::forward`].
    pub fn eps(&self, x: &Tensor, t: usize, class_labels: Option<&Tensor>) -> Result<Tensor> {
        let t = Tensor::full(t as f32, x.dim(0)?, x.device())?;
        self.frozen.forward(x, &t, class_labels)
    }

    /// The network with gradients to the parameters. Fails with [`Error::Data`](crate::Error::Data) if it is
    /// one that cannot be trained here.
    pub fn tracked(&self) -> Result<UNet> {
        self.config.validate_for_training().context(|| "the U-Net cannot be trained")?;
        self.params.tracked(|b| UNet::new(&self.config, b))
    }

    /// The parameters. Updates in place are seen by [`DiffusionModel::eps`].
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The shape of the network.
    pub fn config(&self) -> &UNetConfig {
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
    use crate::nn::SampleSize;

    fn config() -> UNetConfig {
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

    fn eps(model: &DiffusionModel) -> Vec<f32> {
        let x = Tensor::full(0.3f32, (2, 8, 8, 1), &Device::Cpu).unwrap();
        let labels = Tensor::new(&[2u32, 0], &Device::Cpu).unwrap();
        model.eps(&x, 17, Some(&labels)).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn a_saved_model_loads_with_the_same_output() {
        let dir = tempfile::tempdir().unwrap();
        let saved = DiffusionModel::init(config(), SchedulerConfig::default(), 4, &Device::Cpu).unwrap();
        saved.save(dir.path()).unwrap();
        let loaded = DiffusionModel::load(dir.path(), &Device::Cpu).unwrap();
        assert_eq!((loaded.config(), loaded.scheduler()), (saved.config(), saved.scheduler()));
        assert_eq!(eps(&loaded), eps(&saved));
        assert!(eps(&saved).iter().any(|v| *v != 0.0));
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
        assert_eq!(eps(&DiffusionModel::load(dir.path(), &Device::Cpu).unwrap()), eps(&saved));
    }

    #[test]
    fn bad_folders_are_data_errors_that_name_the_file_and_what_was_expected() {
        let dir = tempfile::tempdir().unwrap();
        let load = || DiffusionModel::load(dir.path(), &Device::Cpu).err().expect("a bad folder is refused");
        let said = |part: &str| {
            let error = load();
            assert_eq!(error.exit_code(), 65, "{error}");
            assert!(error.to_string().contains(part), "{error}\ndoes not say: {part}");
        };
        said("model_index.json: no such file, but a model folder holds");
        let model = DiffusionModel::init(config(), SchedulerConfig::default(), 4, &Device::Cpu).unwrap();
        model.save(dir.path()).unwrap();

        let mut wider = config();
        wider.block_out_channels = vec![8, 8];
        fs::publish_json(&dir.path().join(UNET_CONFIG), &wider.to_json().unwrap()).unwrap();
        said("conv_in.weight has shape [4, 1, 3, 3], expected [8, 1, 3, 3]");
        model.save(dir.path()).unwrap();

        fs::publish(&dir.path().join(SCHEDULER_CONFIG), br#"{"prediction_type": "sample"}"#).unwrap();
        said("scheduler_config.json: prediction_type is Sample, expected epsilon");
        fs::publish(&dir.path().join(INDEX), br#"{"unet": ["diffusers", "UNet2DConditionModel"]}"#).unwrap();
        said("the class of unet is \"UNet2DConditionModel\", expected \"UNet2DModel\"");
        std::fs::remove_file(dir.path().join(UNET_WEIGHTS)).unwrap();
        model.save(dir.path()).unwrap();
        std::fs::remove_file(dir.path().join(UNET_WEIGHTS)).unwrap();
        said("diffusion_pytorch_model.safetensors: no such file");
    }

    #[test]
    fn a_model_with_dropout_samples_but_does_not_train() {
        let dropout = UNetConfig { dropout: 0.1, ..config() };
        let model = DiffusionModel::init(dropout, SchedulerConfig::default(), 4, &Device::Cpu).unwrap();
        assert!(!eps(&model).is_empty());
        let error = model.tracked().err().expect("dropout is refused");
        assert!(error.to_string().contains("dropout is 0.1"), "{error}");
    }
}
