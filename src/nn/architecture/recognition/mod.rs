//! Which network a state dict belongs to, and what its names and shapes say of the configuration: one function
//! in each file, listed in [`NETWORKS`].

mod adm;
mod edm;
mod recognized;
mod resnet;
mod small_cnn;
mod unet;
mod wide_resnet;

pub use self::recognized::Recognized;
use crate::nn::StateDict;

/// The networks that are recognised.
const NETWORKS: &[fn(&StateDict) -> Option<Recognized>] = &[
    small_cnn::recognize,
    resnet::recognize,
    wide_resnet::recognize,
    unet::recognize,
    adm::recognize,
    edm::recognize,
];

/// The network of which these are the weights, with names that have no prefix; `None` if it is none of ours.
pub fn recognize(weights: &StateDict) -> Option<Recognized> {
    NETWORKS.iter().find_map(|recognize| recognize(weights))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use serde_json::{Value, json};

    use super::*;
    use crate::nn::{Architecture, Params};

    /// Weights of this network, as a file has them.
    fn recognized(config: &Value) -> Recognized {
        let architecture: Architecture = serde_json::from_value(config.clone()).unwrap();
        let params = Params::init(1, &Device::Cpu, |b| architecture.build(b)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        crate::fs::publish(&path, &params.to_safetensors(&[]).unwrap()).unwrap();
        recognize(&StateDict::open(&path).unwrap()).unwrap()
    }

    #[test]
    fn names_and_shapes_and_what_is_open_are_the_whole_configuration() {
        let images = json!({ "in_channels": 2, "image_size": 16, "num_classes": 3 });
        let networks = [
            json!({ "arch": "small_cnn", "channels": [4, 8, 8], "groups": 4 }),
            json!({ "arch": "resnet", "widths": [4, 6, 6], "blocks": [1, 3, 2] }),
            json!({ "arch": "resnet", "widths": [4, 6], "blocks": [1, 1], "pool": 4 }),
            json!({ "arch": "resnet", "widths": [4, 6], "blocks": [1, 1], "block": "bottleneck" }),
            json!({
                "arch": "resnet", "widths": [4, 6, 6, 8], "blocks": [1, 1, 1, 1], "stem": "imagenet",
                "layout": "torchvision"
            }),
            json!({ "arch": "resnet", "widths": [4, 6], "blocks": [2, 1], "block": "preactivation-raw" }),
            json!({ "arch": "resnet", "widths": [4, 6], "blocks": [1, 1], "block": "preactivation", "final_norm": true }),
            json!({ "arch": "wide_resnet", "depth": 16, "width": 2, "activation": "relu", "layout": "trades" }),
            json!({ "arch": "wide_resnet", "depth": 10, "width": 1, "activation": "silu", "layout": "deepmind" }),
        ];
        for mut config in networks {
            config.as_object_mut().unwrap().extend(images.as_object().unwrap().clone());
            let Recognized { tag, config: mut found, open, .. } = recognized(&config);
            found.insert("arch".into(), tag.into());
            found.extend(open.iter().map(|key| ((*key).to_owned(), config[key].clone())));
            assert_eq!(Value::Object(found), config);
        }
    }
}
