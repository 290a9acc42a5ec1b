//! Where features of images come from: one of our classifiers or, with the feature `extractors`, a network as
//! published on the Hub: ResNet, DINOv2 or CLIP's vision tower.

use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::Value;

use crate::{Result, data::Shape, fs, nn::Classifier};

/// A network that turns images into features.
pub enum Extractor {
    /// A classifier, whose features are the inputs of its last linear layer.
    Classifier(Box<Classifier>),
    /// A network from candle-transformers.
    #[cfg(feature = "extractors")]
    Pretrained(super::pretrained::Pretrained),
}

impl Extractor {
    /// Reads a folder with `config.json` and `model.safetensors`: that of a classifier, which has the key `arch`,
    /// or of a network from the Hub, which has `model_type` (transformers) or `architecture` (timm).
    ///
    /// Fails with [`Error::Data`](crate::Error::Data) if it is neither, and with
    /// [`Error::Usage`](crate::Error::Usage) if it is from the Hub and the program was built without `extractors`.
    pub fn load(dir: &Path, device: &Device) -> Result<Self> {
        let config = dir.join("config.json");
        let of_hub = config.is_file() && {
            let config: Value = fs::read_json(&config)?;
            config["arch"].is_null()
                && (config["model_type"].is_string() || config["architecture"].is_string())
        };
        if of_hub {
            return Self::load_pretrained(dir, device);
        }
        Ok(Self::Classifier(Box::new(Classifier::load(dir, device)?)))
    }

    #[cfg(feature = "extractors")]
    fn load_pretrained(dir: &Path, device: &Device) -> Result<Self> {
        super::pretrained::Pretrained::load(dir, device).map(Self::Pretrained)
    }

    #[cfg(not(feature = "extractors"))]
    fn load_pretrained(dir: &Path, _: &Device) -> Result<Self> {
        bail!(
            Usage,
            "{} is a network of the Hub, expected a classifier's folder: this program was built without --features \
             extractors",
            dir.display()
        )
    }

    /// The classifier, if it is one.
    pub fn classifier(&self) -> Option<&Classifier> {
        match self {
            Self::Classifier(classifier) => Some(classifier),
            #[cfg(feature = "extractors")]
            Self::Pretrained(_) => None,
        }
    }

    /// Fails with [`Error::Data`](crate::Error::Data) unless it takes images of this shape; a network from the Hub
    /// takes any image with one or three channels.
    pub fn expect_shape(&self, dir: &Path, what: &dyn std::fmt::Display, shape: Shape) -> Result<()> {
        let fits = match self {
            Self::Classifier(classifier) => {
                classifier.config().architecture.image_shape() == (shape.height, shape.width, shape.channels)
            }
            #[cfg(feature = "extractors")]
            Self::Pretrained(_) => [1, 3].contains(&shape.channels),
        };
        if !fits {
            bail!(Data, "the network {} does not take images of {what}, which are {shape}", dir.display());
        }
        Ok(())
    }

    /// `x`: `(b, h, w, c)` f32, pixels in [0, 1]. Returns the features, `(b, d)`, and a classifier's logits.
    pub fn features(&self, x: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        match self {
            Self::Classifier(classifier) => {
                let (features, logits) = classifier.features_and_logits(x)?;
                Ok((features, Some(logits)))
            }
            #[cfg(feature = "extractors")]
            Self::Pretrained(network) => Ok((network.features(x)?, None)),
        }
    }
}
