//! [`SmallCnnConfig`](crate::nn::SmallCnnConfig).

use super::recognized::{Recognized, dim, dims, keys};
use crate::nn::StateDict;

pub fn recognize(weights: &StateDict) -> Option<Recognized> {
    let channels = dims(weights, |i| format!("stages.{i}.0.conv.weight"));
    let config = keys([
        ("in_channels", dim(weights, "stem.conv.weight", 1)?.into()),
        ("num_classes", dim(weights, "fc.weight", 0)?.into()),
        ("channels", channels.into()),
    ]);
    Some(Recognized { tag: "small_cnn", config, open: &["image_size", "groups"], unused: &[] })
}
