//! The networks, one per file, and the two lists by which the rest of the program finds them.

mod adm;
mod edm;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod mlp;
#[cfg(test)]
pub(crate) mod originals;
mod parts;
mod recognition;
mod residual;
mod resnet;
mod small_cnn;
mod unet;
mod wide_resnet;

use std::ops::Deref;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use self::{
    adm::AdmConfig,
    edm::{DhariwalUNetConfig, SongUNetConfig},
    recognition::{Recognized, recognize},
    resnet::{ResNetBlock, ResNetConfig, ResNetLayout, ResNetStem},
    small_cnn::SmallCnnConfig,
    unet::{SampleSize, UNetConfig},
    wide_resnet::{Activation, WideResNetConfig, WideResNetLayout},
};
use super::network::{ClassifierArchitecture, DenoiserArchitecture, expect_none};
use crate::{Error, Result};

/// The version of `diffusers` whose file layout is written.
pub(crate) const DIFFUSERS_VERSION: &str = "0.42.1";

/// Declares an enum of configurations, each under its name in files, which behaves like the one it holds.
macro_rules! networks {
    (
        $(#[$meta:meta])*
        $name:ident: $common:ty { $($(#[cfg($cfg:meta)])? $tag:literal => $variant:ident($config:ty),)+ }
    ) => {
        $(#[$meta])*
        #[allow(clippy::large_enum_variant, reason = "a program holds a handful of them")]
        #[non_exhaustive]
        pub enum $name {
            $(
                $(#[cfg($cfg)])?
                #[doc = concat!("`", $tag, "`.")]
                #[serde(rename = $tag)]
                $variant($config),
            )+
        }

        impl $name {
            /// The names in files, of all networks.
            pub const TAGS: &[&str] = &[$($(#[cfg($cfg)])? $tag),+];

            /// The name in files.
            pub fn tag(&self) -> &'static str {
                match self {
                    $($(#[cfg($cfg)])? Self::$variant(_) => $tag,)+
                }
            }
        }

        impl Deref for $name {
            type Target = $common;

            fn deref(&self) -> &Self::Target {
                match self {
                    $($(#[cfg($cfg)])? Self::$variant(config) => config,)+
                }
            }
        }
    };
}

networks! {
    /// The configuration of a classifier, tagged by `arch` in `config.json`.
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    #[serde(tag = "arch")]
    Architecture: dyn ClassifierArchitecture {
        "small_cnn" => SmallCnn(SmallCnnConfig),
        "resnet" => Resnet(ResNetConfig),
        "wide_resnet" => WideResnet(WideResNetConfig),
    }
}

networks! {
    /// The configuration of a denoiser, tagged by `_class_name` in `unet/config.json`.
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    #[serde(tag = "_class_name")]
    DenoiserConfig: dyn DenoiserArchitecture {
        "UNet2DModel" => UNet(UNetConfig),
        "UNetModel" => Adm(AdmConfig),
        "SongUNet" => Song(SongUNetConfig),
        "DhariwalUNet" => Dhariwal(DhariwalUNetConfig),
        #[cfg(test)] "Mlp" => Mlp(mlp::MlpConfig),
    }
}

/// What `EMAModel.save_pretrained` of `diffusers` adds to the configuration of the averaged network.
const EMA_KEYS: [&str; 8] = [
    "decay",
    "inv_gamma",
    "min_decay",
    "min_value",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
];

impl DenoiserConfig {
    /// Reads `unet/config.json` for the network `class`, one of [`DenoiserConfig::TAGS`]. Keys that start with `_`
    /// say who wrote it and are not part of the configuration. Returns what should be said about keys that do not
    /// matter, too.
    ///
    /// Fails with [`Error::Data`], naming everything that is wrong and what was expected.
    pub fn from_json(class: &str, mut json: Map<String, Value>) -> Result<(Self, Option<String>)> {
        match json.remove("_class_name") {
            Some(found) if found != class => bail!(Data, "_class_name is {found}, expected \"{class}\""),
            _ => json.retain(|key, _| !key.starts_with('_')),
        }
        let ignored: Vec<_> = EMA_KEYS.into_iter().filter(|key| json.remove(*key).is_some()).collect();
        let mut tagged = json.clone();
        tagged.insert("_class_name".into(), class.into());
        let config: Self = serde_json::from_value(Value::Object(tagged))
            .map_err(|e| Error::Data(format!("not a {class}: {e}")))?;
        let known = config.to_json()?;
        let unknown = json.iter().filter(|(key, _)| !known.contains_key(*key));
        let mut faults: Vec<_> = unknown
            .map(|(key, value)| format!("{key} is {value}, expected no such key in a {class}"))
            .collect();
        faults.extend(config.faults());
        expect_none(&faults)?;
        let note = format!("{} belong to a moving average: ignored", ignored.join(", "));
        Ok((config, (!ignored.is_empty()).then_some(note)))
    }

    /// The library that has the network, as `model_index.json` names it.
    pub fn library(&self) -> &'static str {
        match self {
            Self::UNet(_) => "diffusers",
            _ => "proxyset",
        }
    }

    /// The contents of `unet/config.json`, complete, as `diffusers` reads it.
    pub fn to_json(&self) -> Result<Map<String, Value>> {
        match serde_json::to_value(self) {
            Ok(Value::Object(mut json)) => {
                json.insert("_diffusers_version".into(), DIFFUSERS_VERSION.into());
                Ok(json)
            }
            other => bail!(Alarm, "the configuration of the network does not make a JSON object: {other:?}"),
        }
    }
}

#[cfg(test)]
mod tests;
