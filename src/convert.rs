//! Model folders of what other programs saved.

use std::path::{Path, PathBuf};

use candle_core::Device;
use serde_json::{Map, Value, json};

use crate::{
    Error, Result, ResultExt,
    diffusion::{DiffusionModel, SchedulerClass, SchedulerConfig},
    fs,
    nn::{
        Architecture, Classifier, ClassifierConfig, DenoiserConfig, Params, Recognized, StateDict, recognize,
    },
    progress::note,
};

/// The scheduler that may be stated by name: DDPM of Ho et al. 2020, 1000 steps, β from 1e-4 to 0.02 in equal steps,
/// noise predicted.
pub const DDPM_LINEAR_1000: &str = "ddpm-linear-1000";

/// Another: the preconditioning of Karras et al. 2022, with σ from 0.002 to 80 and data of standard deviation 0.5.
pub const EDM: &str = "edm";

/// What a model folder from here says of the classes.
const CLASSES: &str = "proxyset.json";

/// What is said of a checkpoint beside what it says itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stated {
    /// Where in a checkpoint of several state dicts it is, keys joined by dots.
    pub key: Option<String>,
    /// The network: `arch` of a classifier, `_class_name` of a denoiser.
    pub network: Option<String>,
    /// A `config.json`.
    pub config: Option<PathBuf>,
    /// Keys of the configuration.
    pub settings: Map<String, Value>,
    /// For a classifier: its classes.
    pub class_names: Vec<String>,
    /// For a denoiser: a `scheduler_config.json`, [`DDPM_LINEAR_1000`] or [`EDM`].
    pub scheduler: Option<String>,
}

/// Makes the model folder `out` of a checkpoint, of a folder with one and its `config.json`, or of a model folder of
/// diffusers. Returns what was made.
///
/// Fails with [`Error::Data`] as [`StateDict::open_at`] and [`Params::from_state_dict`] do, if the network is not known
/// and not stated, and if what is stated contradicts the weights; with [`Error::Usage`] if something has to be stated,
/// or if `out` is not empty. Nothing is written then.
pub fn convert(source: &Path, stated: &Stated, out: &Path) -> Result<Value> {
    if std::fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) {
        bail!(Usage, "{} is not empty, expected a new folder", out.display());
    }
    if source.join("model_index.json").is_file() {
        if *stated != Stated::default() {
            bail!(Usage, "{} is a model folder, which says all that may be stated", source.display());
        }
        let model = DiffusionModel::load(source, None, &Device::Cpu)?;
        model.notes().iter().for_each(|said| note(said));
        let classes = source.join(CLASSES);
        if classes.is_file() {
            fs::publish(&out.join(CLASSES), fs::read_text(&classes)?.as_bytes())?;
        }
        model.save(out)?;
        return Ok(
            json!({ "out": out, "network": model.config().tag(), "parameters": model.params().count() }),
        );
    }
    let mut stated = stated.clone();
    let file = if source.is_dir() { the_weights(source)? } else { source.to_owned() };
    if source.is_dir() && stated.config.is_none() {
        stated.config = Some(source.join("config.json")).filter(|path| path.is_file());
    }
    let mut weights = StateDict::open_at(&file, stated.key.as_deref())?;
    let standardize = unwrap(&mut weights)?;
    let recognized = recognize(&weights);
    let (network, mut config) = stated.network(recognized.as_ref(), &weights)?;
    drop_unused(&mut weights, recognized.as_ref());
    if let Some(standardize) = standardize
        && config.insert("standardize".into(), standardize).is_some()
    {
        bail!(Usage, "standardize is stated, but the weights have it");
    }
    if Architecture::TAGS.contains(&network.as_str()) {
        stated.save_classifier(&network, config, weights, out)
    } else {
        stated.save_denoiser(&network, config, weights, out)
    }
}

/// The only file of weights in a folder.
fn the_weights(dir: &Path) -> Result<PathBuf> {
    let extensions = ["safetensors", "bin", "pt", "pth"];
    let mut found = fs::files_below(dir)?;
    found.retain(|path| path.extension().is_some_and(|e| extensions.iter().any(|known| e == *known)));
    match found.as_slice() {
        [only] => Ok(dir.join(only)),
        found => bail!(
            Data,
            "{} has {} files of weights ({}), expected one",
            dir.display(),
            found.len(),
            extensions.join(", ")
        ),
    }
}

/// Takes off what programs wrap networks in: common prefixes, the count of averaged models, and the buffers by which
/// images are standardised, which are returned.
fn unwrap(weights: &mut StateDict) -> Result<Option<Value>> {
    let origin = weights.origin().to_owned();
    let mut standardize = None;
    loop {
        if weights.remove("n_averaged") {
            note(&format!("{origin}: n_averaged, which averaged models count by, is left out"));
        }
        if let Some([mean, std]) = standardization(weights) {
            let mut values = |name: &str| weights.values(name).context(|| origin.clone());
            let values = json!({ "mean": values(&mean)?, "std": values(&std)? });
            if standardize.replace(values).is_some() {
                bail!(
                    Data,
                    "{origin}: {mean} and {std} are a second standardisation of images, expected one"
                );
            }
            note(&format!("{origin}: {mean} and {std} standardise the images"));
            weights.remove(&mean);
            weights.remove(&std);
        } else if let Some(prefix) = weights.common_prefix() {
            note(&format!("{origin}: the prefix {prefix} of all names is taken off"));
            let len = prefix.len();
            weights.strip(len);
        } else {
            return Ok(standardize);
        }
    }
}

/// The names of a mean and a standard deviation, a number for each channel of an image.
fn standardization(weights: &StateDict) -> Option<[String; 2]> {
    weights.names().find_map(|name| {
        let (parent, last) =
            name.rsplit_once('.').map_or(("", name), |(parent, _)| name.split_at(parent.len() + 1));
        let other = match last {
            "mean" => "std",
            "mu" => "sigma",
            _ => return None,
        };
        let other = format!("{parent}{other}");
        let shape = weights.shape(name)?;
        let channels: usize = shape.iter().product();
        let is_one_each = channels <= 4 && shape.iter().all(|&dim| dim == 1 || dim == channels);
        (is_one_each && weights.shape(&other) == Some(shape)).then(|| [name.to_owned(), other])
    })
}

fn drop_unused(weights: &mut StateDict, recognized: Option<&Recognized>) {
    for prefix in recognized.map_or(&[][..], |recognized| recognized.unused) {
        let unused: Vec<_> =
            weights.names().filter(|name| name.starts_with(prefix)).map(str::to_owned).collect();
        if !unused.is_empty() {
            note(&format!(
                "{}: {} tensors {prefix}* are saved, but not used, and left out",
                weights.origin(),
                unused.len()
            ));
        }
        for name in &unused {
            weights.remove(name);
        }
    }
}

/// Whether two values are the same, however their numbers are written: 1 or 1.0.
fn is_same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| is_same(a, b))
        }
        _ => a == b,
    }
}

/// Fails if a key is stated otherwise than the weights say.
fn agree(key: &str, found: &Value, stated: Option<&Value>) -> Result<()> {
    match stated.filter(|stated| !is_same(stated, found)) {
        Some(stated) => bail!(Data, "{key} is stated as {stated}, but the weights say {found}"),
        None => Ok(()),
    }
}

impl Stated {
    /// The network's name and configuration: what is stated, and what the weights say.
    fn network(
        &self,
        recognized: Option<&Recognized>,
        weights: &StateDict,
    ) -> Result<(String, Map<String, Value>)> {
        let mut config: Map<String, Value> =
            self.config.as_deref().map_or_else(|| Ok(Map::new()), fs::read_json)?;
        let named = ["arch", "_class_name"].iter().find_map(|key| config.remove(*key));
        let named = self.network.clone().or(named.and_then(|name| name.as_str().map(str::to_owned)));
        config.extend(self.settings.clone());
        let tags = || [Architecture::TAGS, DenoiserConfig::TAGS].concat();
        let Some(network) = named.or(recognized.map(|r| r.tag.to_owned())) else {
            let names: Vec<_> = weights.names().take(10).collect();
            bail!(
                Data,
                "{}: the {} tensors are of no network that is recognised, expected one of {} (--network states which); \
                 they begin with {}",
                weights.origin(),
                weights.names().count(),
                tags().join(", "),
                names.join(", ")
            )
        };
        if !tags().contains(&network.as_str()) {
            bail!(Data, "the network is {network}, expected one of {}", tags().join(", "));
        }
        let Some(recognized) = recognized.filter(|recognized| recognized.tag == network) else {
            return Ok((network, config));
        };
        let open: Vec<_> =
            recognized.open.iter().filter(|key| !config.contains_key(**key)).copied().collect();
        if self.config.is_none() && !open.is_empty() {
            bail!(
                Usage,
                "the weights of a {network} do not say its {}, expected --set KEY=VALUE for each, or --config",
                open.join(", ")
            );
        }
        for (key, found) in &recognized.config {
            agree(key, found, config.get(key)).context(|| weights.origin().to_owned())?;
            config.insert(key.clone(), found.clone());
        }
        Ok((network, config))
    }

    fn save_classifier(
        &self,
        network: &str,
        mut config: Map<String, Value>,
        weights: StateDict,
        out: &Path,
    ) -> Result<Value> {
        if self.scheduler.is_some() {
            bail!(Usage, "scheduler has no effect with the classifier {network}");
        }
        config.insert("arch".into(), network.into());
        if !self.class_names.is_empty() {
            config.insert("class_names".into(), self.class_names.clone().into());
        }
        if !config.contains_key("class_names") {
            bail!(Usage, "class_names is not set, expected a name for each logit, in their order");
        }
        if !config.contains_key("standardize") {
            note(
                "no mean and standard deviation are among the weights or stated: the network sees pixels in [0, 1]",
            );
        }
        let config = ClassifierConfig::from_json(config)?;
        let params = Params::from_state_dict(weights, &Device::Cpu, |b| config.architecture.build(b))?;
        let made = json!({ "out": out, "network": network, "parameters": params.count(), "config": &config });
        Classifier::new(config, params)?.save(out)?;
        Ok(made)
    }

    fn save_denoiser(
        &self,
        network: &str,
        config: Map<String, Value>,
        weights: StateDict,
        out: &Path,
    ) -> Result<Value> {
        if !self.class_names.is_empty() {
            bail!(Usage, "class_names has no effect with the denoiser {network}");
        }
        let scheduler = match self.scheduler.as_deref() {
            Some(DDPM_LINEAR_1000) => SchedulerConfig::default(),
            Some(EDM) => SchedulerClass::EDMEulerScheduler.defaults(),
            Some(path) => {
                let (scheduler, notes) = SchedulerConfig::load(Path::new(path), None, None)?;
                notes.iter().for_each(|said| note(said));
                scheduler
            }
            None => bail!(
                Usage,
                "scheduler is not set, and the weights do not say with which noise they were trained: expected \
                 {DDPM_LINEAR_1000}, {EDM} or a scheduler_config.json"
            ),
        };
        let (config, ignored) = DenoiserConfig::from_json(network, config)?;
        ignored.iter().for_each(|said| note(said));
        let params = Params::from_state_dict(weights, &Device::Cpu, |b| config.build(b))?;
        let made = json!({
            "out": out, "network": network, "parameters": params.count(), "config": config.to_json()?,
            "scheduler": scheduler.to_json()?,
        });
        DiffusionModel::new(config, scheduler, params)?.save(out)?;
        Ok(made)
    }
}

/// Reads KEY=VALUE, the value as JSON or else as text.
pub fn setting(assignment: &str) -> Result<(String, Value)> {
    let Some((key, value)) = assignment.split_once('=').filter(|(key, _)| !key.is_empty()) else {
        return Err(Error::Usage(format!("--set is '{assignment}', expected KEY=VALUE")));
    };
    Ok((key.to_owned(), serde_json::from_str(value).unwrap_or_else(|_| value.into())))
}
