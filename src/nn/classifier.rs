//! A classifier and its folder: `config.json` and `model.safetensors`.

use std::path::Path;

use candle_core::{Device, Tensor};
use serde::Serialize;
use serde_json::{Map, Value};

use super::{architecture::Architecture, layers::BatchNormMode, network::ClassifierNetwork, params::Params};
use crate::{Error, Result, ResultExt, fs};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";

/// What `config.json` says: the network, and the name of each class in the order of the logits.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClassifierConfig {
    /// The network.
    #[serde(flatten)]
    pub architecture: Architecture,
    /// One name for each logit.
    pub class_names: Vec<String>,
}

impl ClassifierConfig {
    /// Fails with [`Error::Data`] unless there is a name for each logit.
    pub fn validate(&self) -> Result<()> {
        let (names, classes) = (self.class_names.len(), self.architecture.num_classes());
        if names != classes {
            bail!(Data, "class_names has {names} names, expected num_classes = {classes}");
        }
        Ok(())
    }

    /// Reads `config.json`. Fails with [`Error::Data`], naming a key that is missing, unknown or impossible.
    pub fn from_json(mut json: Map<String, Value>) -> Result<Self> {
        let data = |e: serde_json::Error| Error::Data(format!("not a classifier: {e}"));
        let class_names = json.remove("class_names").unwrap_or_default();
        let config = Self {
            class_names: serde_json::from_value(class_names)
                .map_err(|e| Error::Data(format!("class_names: {e}, expected a list of names")))?,
            architecture: serde_json::from_value(Value::Object(json)).map_err(data)?,
        };
        config.validate()?;
        Ok(config)
    }
}

/// A network with its parameters. A real/synthetic discriminator is one with two classes.
pub struct Classifier {
    config: ClassifierConfig,
    params: Params,
    frozen: Box<dyn ClassifierNetwork>,
}

impl Classifier {
    /// A classifier with fresh parameters; the same for the same seed.
    pub fn init(config: ClassifierConfig, seed: u64, device: &Device) -> Result<Self> {
        config.validate()?;
        let params = Params::init(seed, device, |b| config.architecture.build(b))?;
        Self::new(config, params)
    }

    /// Reads a classifier's folder.
    ///
    /// Fails with [`Error::Data`], naming the file, what was found in it and what was expected.
    pub fn load(dir: &Path, device: &Device) -> Result<Self> {
        let file = |name: &str| {
            let path = dir.join(name);
            if !path.is_file() {
                bail!(
                    Data,
                    "{}: no such file, but a classifier's folder holds {CONFIG} and {WEIGHTS}",
                    path.display()
                );
            }
            Ok(path)
        };
        let path = file(CONFIG)?;
        let config =
            ClassifierConfig::from_json(fs::read_json(&path)?).context(|| path.display().to_string())?;
        let params = Params::load(&file(WEIGHTS)?, device, |b| config.architecture.build(b))?;
        Self::new(config, params)
    }

    /// A classifier with these parameters. Fails if they are not those of its network.
    pub fn new(config: ClassifierConfig, params: Params) -> Result<Self> {
        let frozen = params.frozen(|b| config.architecture.build(b))?;
        Ok(Self { config, params, frozen })
    }

    /// Writes the classifier's folder, `config.json` last: a folder that has it is complete.
    pub fn save(&self, dir: &Path) -> Result<()> {
        fs::publish(&dir.join(WEIGHTS), &self.params.to_safetensors(&[])?)?;
        fs::publish_json(&dir.join(CONFIG), &self.config)
    }

    /// `x`: `(b, h, w, c)` f32, pixels in [0, 1]. Returns the logits, `(b, num_classes)`.
    ///
    /// Gradients flow to `x`, not to the parameters: for those see [`Classifier::tracked`]. Batch norms use their
    /// running statistics.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        self.frozen.logits(x)
    }

    /// [`Classifier::logits`] with batch norms, if there are any, in this mode.
    pub fn logits_by(&self, x: &Tensor, mode: BatchNormMode) -> Result<Tensor> {
        self.frozen.logits_by(x, mode)
    }

    /// [`Classifier::logits`], and the features that they are a linear function of, `(b, features)`.
    pub fn features_and_logits(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        self.frozen.features_and_logits(x, BatchNormMode::Eval)
    }

    /// The network with gradients to the parameters.
    pub fn tracked(&self) -> Result<Box<dyn ClassifierNetwork>> {
        self.params.tracked(|b| self.config.architecture.build(b))
    }

    /// The parameters. [`Classifier::logits`] sees updates in place.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The network's configuration and the names of the classes.
    pub fn config(&self) -> &ClassifierConfig {
        &self.config
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Var};

    use super::*;
    use crate::nn::{ResNetConfig, SmallCnnConfig, Standardization};

    fn config() -> ClassifierConfig {
        ClassifierConfig {
            architecture: Architecture::SmallCnn(SmallCnnConfig {
                in_channels: 1,
                image_size: 8,
                channels: vec![4, 8],
                num_classes: 2,
                groups: 2,
            }),
            class_names: vec!["real".into(), "synthetic".into()],
        }
    }

    #[test]
    fn a_saved_classifier_loads_with_the_same_logits() {
        let dir = tempfile::tempdir().unwrap();
        let saved = Classifier::init(config(), 1, &Device::Cpu).unwrap();
        saved.save(dir.path()).unwrap();
        let loaded = Classifier::load(dir.path(), &Device::Cpu).unwrap();
        assert_eq!(loaded.config(), saved.config());
        let x = Tensor::full(0.25f32, (2, 8, 8, 1), &Device::Cpu).unwrap();
        let logits = |c: &Classifier| c.logits(&x).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(logits(&loaded), logits(&saved));
    }

    #[test]
    fn a_resnet_is_saved_with_its_running_statistics_which_its_logits_go_by() {
        let architecture = Architecture::Resnet(ResNetConfig {
            widths: vec![4, 8],
            blocks: vec![1, 1],
            ..ResNetConfig::resnet18(1, 8, 2)
        });
        let config = ClassifierConfig { architecture, ..config() };
        assert_eq!(serde_json::to_value(&config).unwrap()["arch"], "resnet");
        let trained = Classifier::init(config, 1, &Device::Cpu).unwrap();
        let x: Vec<f32> = (0..128).map(|i| (i % 7) as f32 / 7.0).collect();
        let x = Tensor::from_vec(x, (2, 8, 8, 1), &Device::Cpu).unwrap();
        let logits = |c: &Classifier| c.logits(&x).unwrap().to_vec2::<f32>().unwrap();
        let fresh = logits(&trained);
        trained.tracked().unwrap().logits_by(&x, BatchNormMode::Train).unwrap();
        assert_ne!(logits(&trained), fresh);
        let dir = tempfile::tempdir().unwrap();
        trained.save(dir.path()).unwrap();
        let loaded = Classifier::load(dir.path(), &Device::Cpu).unwrap();
        assert_eq!(logits(&loaded), logits(&trained));
    }

    #[test]
    fn images_may_have_another_type_than_parameters() {
        let small = Architecture::SmallCnn(SmallCnnConfig {
            in_channels: 3,
            image_size: 8,
            channels: vec![4, 8],
            num_classes: 2,
            groups: 2,
        });
        let standardize = Some(Standardization { mean: vec![0.5; 3], std: vec![0.2; 3] });
        let resnet = |pool| {
            let small = ResNetConfig::resnet18(3, 8, 2);
            let standardize = standardize.clone();
            Architecture::Resnet(ResNetConfig {
                widths: vec![4, 8],
                blocks: vec![1, 1],
                pool,
                standardize,
                ..small
            })
        };
        let wide = |activation| {
            let config = serde_json::json!({
                "in_channels": 3, "image_size": 8, "num_classes": 2, "depth": 10, "width": 1, "activation": activation,
            });
            Architecture::WideResnet(serde_json::from_value(config).unwrap())
        };
        let x: Vec<f32> = (0..2 * 192).map(|i| (i * i % 17) as f32 / 17.0).collect();
        let x = Tensor::from_vec(x, (2, 8, 8, 3), &Device::Cpu).unwrap();
        for architecture in [small, resnet(None), resnet(Some(4)), wide("relu"), wide("silu")] {
            for mode in [BatchNormMode::Eval, BatchNormMode::Train] {
                let of = |dtype: DType| {
                    let config = ClassifierConfig { architecture: architecture.clone(), ..config() };
                    let net = Classifier::init(config, 3, &Device::Cpu).unwrap();
                    let x = Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap();
                    let logits = net.tracked().unwrap().logits_by(x.as_tensor(), mode).unwrap();
                    assert_eq!(logits.dtype(), dtype);
                    let grads = logits.sqr().unwrap().sum_all().unwrap().backward().unwrap();
                    let image = [(String::from("image"), x)];
                    let vars = net.params().vars().iter().chain(&image);
                    let gradient =
                        |(name, var): &(String, Var)| (name.clone(), grads.get(var).unwrap().clone());
                    let mut all: Vec<(String, Tensor)> = vars.map(gradient).collect();
                    all.push(("logits".into(), logits.detach()));
                    all
                };
                for ((name, single), (_, double)) in of(DType::F32).into_iter().zip(of(DType::F64)) {
                    let double = double.to_dtype(DType::F32).unwrap();
                    let largest =
                        |t: &Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                    let (off, size) = (largest(&(single - &double).unwrap()), largest(&double));
                    assert!(
                        off <= 1e-4 * size + 1e-6,
                        "{architecture:?}, {mode:?}: {name} off by {off} of {size}"
                    );
                }
            }
        }
    }

    #[test]
    fn config_json_is_flat_and_tagged_by_arch() {
        let json = serde_json::to_value(config()).unwrap();
        assert_eq!(json["arch"], "small_cnn");
        assert_eq!(json["class_names"][1], "synthetic");
        assert_eq!(json["channels"][1], 8);
    }

    #[test]
    fn bad_folders_are_data_errors_that_name_the_file_and_what_was_expected() {
        let dir = tempfile::tempdir().unwrap();
        let load = || Classifier::load(dir.path(), &Device::Cpu).err().expect("a bad folder is refused");
        let path = dir.path().join(CONFIG);
        let said = |error: Error, parts: &[&str]| {
            assert_eq!(error.exit_code(), 65, "{error}");
            let text = error.to_string();
            parts.iter().for_each(|part| assert!(text.contains(part), "{text}\ndoes not say: {part}"));
        };
        said(load(), &["config.json: no such file"]);
        let mut json = serde_json::to_value(config()).unwrap();
        fs::publish_json(&path, &json).unwrap();
        said(load(), &["model.safetensors: no such file"]);
        json["arch"] = "vit".into();
        fs::publish_json(&path, &json).unwrap();
        said(load(), &["config.json", "`vit`", "`small_cnn`"]);
        json["arch"] = "small_cnn".into();
        json["num_classes"] = 3.into();
        fs::publish_json(&path, &json).unwrap();
        said(load(), &["class_names has 2 names, expected num_classes = 3"]);
        json["width"] = 3.into();
        fs::publish_json(&path, &json).unwrap();
        said(load(), &["unknown field `width`"]);
        fs::publish(&path, b"{").unwrap();
        said(load(), &["config.json", "not the JSON"]);
    }

    #[test]
    fn logits_see_updates_of_the_parameters() {
        let classifier = Classifier::init(config(), 1, &Device::Cpu).unwrap();
        let x = Tensor::full(0.5f32, (1, 8, 8, 1), &Device::Cpu).unwrap();
        let (_, bias) = classifier.params().vars().last().unwrap();
        let before = classifier.logits(&x).unwrap().to_vec2::<f32>().unwrap();
        bias.set(&(bias.as_tensor() + 1.0).unwrap()).unwrap();
        let after = classifier.logits(&x).unwrap().to_vec2::<f32>().unwrap();
        assert!((after[0][0] - before[0][0] - 1.0).abs() < 1e-5);
    }
}
