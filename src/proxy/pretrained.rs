//! Networks from candle-transformers, read from folders in the layout of the Hub; their weights are renamed to what
//! candle expects.

use std::{collections::HashMap, path::Path};

use candle_core::{DType, Device, Tensor};
use candle_nn::{Func, Module, VarBuilder};
use candle_transformers::models::{
    clip::{
        text_model::Activation,
        vision_model::{ClipVisionConfig, ClipVisionTransformer},
    },
    dinov2::DinoVisionTransformer,
    resnet,
};
use serde_json::Value;

use crate::{Error, Result, fs};

const IMAGENET: [[f64; 3]; 2] = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]];
const CLIP: [[f64; 3]; 2] =
    [[0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_58, 0.275_777_11]];
/// The only image size that candle's DINOv2 takes, and its number of outputs.
const DINO: (usize, usize) = (518, 1000);

enum Network {
    Clip(ClipVisionTransformer),
    Dino(DinoVisionTransformer, usize),
    ResNet(Func<'static>),
}

/// A network from the Hub, with what it expects of images.
pub struct Pretrained {
    network: Network,
    side: usize,
    mean: Tensor,
    std: Tensor,
}

impl Pretrained {
    /// Reads `config.json`, `model.safetensors`, and, if there is one, `preprocessor_config.json`.
    ///
    /// Fails with [`Error::Data`], naming what is missing or not supported.
    pub fn load(dir: &Path, device: &Device) -> Result<Self> {
        let path = dir.join("config.json");
        let config: Value = fs::read_json(&path)?;
        let weights = dir.join("model.safetensors");
        let unreadable = |e: candle_core::Error| Error::Data(format!("{}: {e}", weights.display()));
        let weights_of_file = candle_core::safetensors::load(&weights, device).map_err(unreadable)?;
        let config_error = |problem: String| Error::Data(format!("{}: {problem}", path.display()));
        let kind = config["model_type"].as_str().or(config["architecture"].as_str()).unwrap_or_default();
        let builder = |tensors| VarBuilder::from_tensors(tensors, DType::F32, device);
        let (network, side, standard) = match kind {
            "clip" | "clip_vision_model" => {
                let vision = if kind == "clip" { &config["vision_config"] } else { &config };
                let config = clip_config(vision).map_err(config_error)?;
                let side = config.image_size;
                let bare = |(name, t): (String, Tensor)| {
                    (name.strip_prefix("vision_model.").unwrap_or(&name).to_owned(), t)
                };
                let vb = builder(weights_of_file.into_iter().map(bare).collect());
                (Network::Clip(ClipVisionTransformer::new(vb, &config).map_err(unreadable)?), side, CLIP)
            }
            "dinov2" => {
                let [depth, dim, heads] = dino_config(&config).map_err(config_error)?;
                let tensors = dino_weights(weights_of_file, depth, dim, device).map_err(unreadable)?;
                let network =
                    DinoVisionTransformer::new(builder(tensors), depth, dim, heads).map_err(unreadable)?;
                (Network::Dino(network, dim), DINO.0, IMAGENET)
            }
            _ => {
                let make = resnet_of(&config, kind).map_err(config_error)?;
                let tensors = weights_of_file.into_iter().map(|(name, t)| (resnet_name(&name), t)).collect();
                (Network::ResNet(make(builder(tensors)).map_err(unreadable)?), 224, IMAGENET)
            }
        };
        let is_resnet = matches!(network, Network::ResNet(_));
        let processor = dir.join("preprocessor_config.json");
        let processor: Value = if processor.is_file() { fs::read_json(&processor)? } else { Value::Null };
        let of_timm = &config["pretrained_cfg"];
        let numbers = |values: &Value| -> Option<[f64; 3]> {
            let all: Vec<f64> = values.as_array()?.iter().filter_map(Value::as_f64).collect();
            all.try_into().ok()
        };
        let channel = |of_hub: &str, of_timm_key: &str, default| {
            let found = numbers(&processor[of_hub]).or_else(|| numbers(&of_timm[of_timm_key]));
            let values = found.unwrap_or(default).map(|v| v as f32);
            Tensor::new(&values, device)?.reshape((1, 3, 1, 1))
        };
        let sides = [
            &processor["crop_size"]["height"],
            &processor["size"]["shortest_edge"],
            &of_timm["input_size"][1],
        ];
        let given = sides.into_iter().find_map(Value::as_u64).map(|side| side as usize);
        Ok(Self {
            network,
            side: if is_resnet { given.unwrap_or(side) } else { side },
            mean: channel("image_mean", "mean", standard[0])?,
            std: channel("image_std", "std", standard[1])?,
        })
    }

    /// `x`: `(b, h, w, c)` f32, pixels in [0, 1], one or three channels. Returns `(b, d)`: the mean over the image
    /// for ResNet, the normalised class token for the others.
    ///
    /// Images are resized bilinearly to the network's size, with half-pixel centres and without a crop; grey images
    /// get three equal channels.
    pub fn features(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.permute((0, 3, 1, 2))?.contiguous()?;
        let x = if x.dim(1)? == 1 { Tensor::cat(&[&x, &x, &x], 1)? } else { x };
        let resized = x.upsample_bilinear2d(self.side, self.side, false)?;
        let x = resized.broadcast_sub(&self.mean)?.broadcast_div(&self.std)?;
        Ok(match &self.network {
            Network::Clip(network) => network.forward(&x)?,
            // candle's DINOv2 neither repeats the class token nor broadcasts positions over a batch.
            Network::Dino(network, dim) => {
                let one = |i: usize| network.forward(&x.narrow(0, i, 1)?)?.narrow(1, 0, *dim);
                Tensor::cat(&(0..x.dim(0)?).map(one).collect::<candle_core::Result<Vec<_>>>()?, 0)?
            }
            Network::ResNet(network) => network.forward(&x)?,
        })
    }
}

fn number(config: &Value, key: &str) -> std::result::Result<usize, String> {
    let found = config[key].as_u64().ok_or_else(|| format!("{key} is {}, expected a number", config[key]))?;
    Ok(found as usize)
}

fn expect(config: &Value, key: &str, expected: &Value) -> std::result::Result<(), String> {
    match &config[key] {
        Value::Null => Ok(()),
        found if found == expected => Ok(()),
        found if found.is_number() && found.as_f64() == expected.as_f64() => Ok(()),
        found => Err(format!("{key} is {found}, expected {expected}")),
    }
}

fn clip_config(config: &Value) -> std::result::Result<ClipVisionConfig, String> {
    expect(config, "hidden_act", &"quick_gelu".into())?;
    Ok(ClipVisionConfig {
        embed_dim: number(config, "hidden_size")?,
        activation: Activation::QuickGelu,
        intermediate_size: number(config, "intermediate_size")?,
        num_hidden_layers: number(config, "num_hidden_layers")?,
        num_attention_heads: number(config, "num_attention_heads")?,
        projection_dim: 0,
        num_channels: 3,
        image_size: number(config, "image_size")?,
        patch_size: number(config, "patch_size")?,
    })
}

/// Depth, features, heads.
fn dino_config(config: &Value) -> std::result::Result<[usize; 3], String> {
    expect(config, "image_size", &DINO.0.into())?;
    expect(config, "patch_size", &14.into())?;
    expect(config, "mlp_ratio", &4.into())?;
    expect(config, "use_swiglu_ffn", &false.into())?;
    let dim = number(config, "hidden_size")?;
    if dim > DINO.1 {
        return Err(format!("hidden_size is {dim}, expected at most {}", DINO.1));
    }
    Ok([number(config, "num_hidden_layers")?, dim, number(config, "num_attention_heads")?])
}

/// The weights of transformers' DINOv2 under the original's names, with query, key and value as one matrix.
fn dino_weights(
    mut found: HashMap<String, Tensor>,
    depth: usize,
    dim: usize,
    device: &Device,
) -> candle_core::Result<HashMap<String, Tensor>> {
    let mut take = |name: &str| {
        let tensor = found.remove(name).or_else(|| found.remove(&format!("dinov2.{name}")));
        tensor.ok_or_else(|| candle_core::Error::CannotFindTensor { path: name.into() }.bt())
    };
    let mut weights = HashMap::new();
    weights.insert("cls_token".into(), take("embeddings.cls_token")?);
    weights.insert("pos_embed".into(), take("embeddings.position_embeddings")?);
    // candle's network ends in a linear layer on the class token and the mean of the other tokens; the one made
    // here copies the class token.
    let copy = Tensor::eye(dim, DType::F32, device)?.pad_with_zeros(1, 0, dim)?;
    weights.insert("head.weight".into(), copy.pad_with_zeros(0, 0, DINO.1 - dim)?);
    weights.insert("head.bias".into(), Tensor::zeros(DINO.1, DType::F32, device)?);
    for end in ["weight", "bias"] {
        let mut rename = |from: &str, to: &str| -> candle_core::Result<()> {
            let tensor = take(&format!("{from}.{end}"))?;
            weights.insert(format!("{to}.{end}"), tensor);
            Ok(())
        };
        rename("embeddings.patch_embeddings.projection", "patch_embed.proj")?;
        rename("layernorm", "norm")?;
        for i in 0..depth {
            let (from, to) = (format!("encoder.layer.{i}"), format!("blocks.{i}"));
            for part in ["norm1", "norm2", "mlp.fc1", "mlp.fc2"] {
                rename(&format!("{from}.{part}"), &format!("{to}.{part}"))?;
            }
            rename(&format!("{from}.attention.output.dense"), &format!("{to}.attn.proj"))?;
        }
        for i in 0..depth {
            let part = |name: &str| format!("encoder.layer.{i}.attention.attention.{name}.{end}");
            let qkv = [take(&part("query"))?, take(&part("key"))?, take(&part("value"))?];
            weights.insert(format!("blocks.{i}.attn.qkv.{end}"), Tensor::cat(&qkv, 0)?);
        }
    }
    for i in 0..depth {
        for k in 1..=2 {
            let scale = take(&format!("encoder.layer.{i}.layer_scale{k}.lambda1"))?;
            weights.insert(format!("blocks.{i}.ls{k}.gamma"), scale);
        }
    }
    Ok(weights)
}

type MakeResNet = fn(VarBuilder<'static>) -> candle_core::Result<Func<'static>>;

/// Each ResNet's name, kind of layers, and number of layers in each stage.
const RESNETS: [(&str, &str, [u64; 4], MakeResNet); 5] = [
    ("resnet18", "basic", [2, 2, 2, 2], |vb| resnet::resnet18_no_final_layer(vb)),
    ("resnet34", "basic", [3, 4, 6, 3], |vb| resnet::resnet34_no_final_layer(vb)),
    ("resnet50", "bottleneck", [3, 4, 6, 3], |vb| resnet::resnet50_no_final_layer(vb)),
    ("resnet101", "bottleneck", [3, 4, 23, 3], |vb| resnet::resnet101_no_final_layer(vb)),
    ("resnet152", "bottleneck", [3, 8, 36, 3], |vb| resnet::resnet152_no_final_layer(vb)),
];

fn resnet_of(config: &Value, kind: &str) -> std::result::Result<MakeResNet, String> {
    if kind != "resnet" {
        let found = RESNETS.iter().find(|(name, ..)| *name == kind);
        return found.map(|(.., make)| *make).ok_or_else(|| {
            format!("the network is '{kind}', expected clip, clip_vision_model, dinov2, resnet or resnet18")
        });
    }
    expect(config, "downsample_in_first_stage", &false.into())?;
    expect(config, "downsample_in_bottleneck", &false.into())?;
    expect(config, "embedding_size", &64.into())?;
    let depths: Vec<u64> =
        config["depths"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
    let kind = config["layer_type"].as_str().unwrap_or("bottleneck");
    let found = RESNETS.iter().find(|(_, layers, stages, _)| *layers == kind && *stages == *depths);
    found
        .map(|(.., make)| *make)
        .ok_or_else(|| format!("depths are {depths:?} of {kind} layers, expected ResNet-18 to -152"))
}

/// The torchvision name of a weight of transformers' ResNet; other names are unchanged.
fn resnet_name(name: &str) -> String {
    let name = name.strip_prefix("resnet.").unwrap_or(name);
    if let Some(rest) = name.strip_prefix("embedder.embedder.") {
        return rest.replace("convolution", "conv1").replace("normalization", "bn1");
    }
    let Some(rest) = name.strip_prefix("encoder.stages.") else { return name.into() };
    let parts: Vec<&str> = rest.split('.').collect();
    let number = |text: &str| text.parse::<usize>().map_or_else(|_| text.to_owned(), |n| (n + 1).to_string());
    match *parts.as_slice() {
        [stage, "layers", layer, "layer", k, kind, end] => {
            let kind = if kind == "convolution" { "conv" } else { "bn" };
            format!("layer{}.{layer}.{kind}{}.{end}", number(stage), number(k))
        }
        [stage, "layers", layer, "shortcut", kind, end] => {
            let kind = if kind == "convolution" { 0 } else { 1 };
            format!("layer{}.{layer}.downsample.{kind}.{end}", number(stage))
        }
        _ => name.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// tests/golden/extractors.py: transformers' own networks with random weights.
    fn difference(name: &str) -> f32 {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let network = Pretrained::load(&dir, &Device::Cpu).unwrap();
        let io = candle_core::safetensors::load(dir.join("io.safetensors"), &Device::Cpu).unwrap();
        let found = network.features(&io["images"]).unwrap();
        let scale = io["features"].abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let off = (found - &io["features"]).unwrap().abs().unwrap().max_all().unwrap();
        off.to_scalar::<f32>().unwrap() / scale
    }

    #[test]
    fn clip_gives_the_features_of_transformers() {
        let off = difference("clip");
        assert!(off < 1e-5, "{off}");
    }

    /// candle's DINOv2 has GELU by tanh and another epsilon in its norms.
    #[test]
    fn dinov2_gives_the_features_of_transformers_up_to_its_gelu() {
        let off = difference("dinov2");
        assert!(off < 2e-3, "{off}");
    }

    #[test]
    #[ignore = "needs in PROXYSET_RESNET18 the folder that `tests/golden/extractors.py FOLDER` writes, 45 MB"]
    fn resnet18_gives_the_features_of_transformers() {
        let off = difference(&std::env::var("PROXYSET_RESNET18").unwrap());
        assert!(off < 1e-5, "{off}");
    }

    #[test]
    fn names_of_transformers_resnet_become_torchvisions() {
        let cases = [
            ("resnet.embedder.embedder.convolution.weight", "conv1.weight"),
            ("embedder.embedder.normalization.running_var", "bn1.running_var"),
            ("encoder.stages.0.layers.1.layer.0.convolution.weight", "layer1.1.conv1.weight"),
            ("encoder.stages.3.layers.0.shortcut.normalization.bias", "layer4.0.downsample.1.bias"),
            ("layer1.0.conv1.weight", "layer1.0.conv1.weight"),
        ];
        for (from, to) in cases {
            assert_eq!(resnet_name(from), to);
        }
    }

    #[test]
    fn networks_that_cannot_be_are_named() {
        let cases = [
            (serde_json::json!({"model_type": "vit"}), "the network is 'vit'"),
            (
                serde_json::json!({"model_type": "dinov2", "image_size": 224}),
                "image_size is 224, expected 518",
            ),
            (
                serde_json::json!({"model_type": "clip_vision_model", "hidden_act": "gelu"}),
                "hidden_act is \"gelu\"",
            ),
            (
                serde_json::json!({"model_type": "resnet", "depths": [1, 1], "layer_type": "basic"}),
                "depths are [1, 1]",
            ),
        ];
        let dir = tempfile::tempdir().unwrap();
        let empty: [(&str, Tensor); 0] = [];
        let bytes = safetensors::serialize(empty, None).unwrap();
        fs::publish(&dir.path().join("model.safetensors"), &bytes).unwrap();
        for (config, part) in cases {
            fs::publish_json(&dir.path().join("config.json"), &config).unwrap();
            let error = Pretrained::load(dir.path(), &Device::Cpu).err().unwrap();
            assert_eq!(error.exit_code(), 65);
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
