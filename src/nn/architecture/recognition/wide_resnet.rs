//! [`WideResNetConfig`](crate::nn::WideResNetConfig), in both layouts.

use super::recognized::{Recognized, dim, dims, keys};
use crate::nn::StateDict;

pub fn recognize(weights: &StateDict) -> Option<Recognized> {
    let (layout, stem, linear) = if weights.shape("init_conv.weight").is_some() {
        ("deepmind", "init_conv.weight", "logits.weight")
    } else {
        ("trades", "conv1.weight", "fc.weight")
    };
    let widths = dims(weights, |i| match layout {
        "deepmind" => format!("layer.0.block.{i}.conv_0.weight"),
        _ => format!("block1.layer.{i}.conv1.weight"),
    });
    let config = keys([
        ("in_channels", dim(weights, stem, 1)?.into()),
        ("num_classes", dim(weights, linear, 0)?.into()),
        ("depth", (4 + 6 * widths.len()).into()),
        ("width", (widths.first()? / 16).into()),
        ("layout", layout.into()),
    ]);
    // The code of TRADES makes a second first group, and its forward pass leaves it out.
    let unused = &["sub_block1."];
    Some(Recognized { tag: "wide_resnet", config, open: &["image_size", "activation"], unused })
}
