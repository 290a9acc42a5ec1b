//! [`ResNetConfig`](crate::nn::ResNetConfig).

use super::recognized::{Recognized, dims, keys};
use crate::nn::StateDict;

pub fn recognize(weights: &StateDict) -> Option<Recognized> {
    let stem = weights.shape("conv1.weight")?;
    let has = |name: &str| weights.shape(name).is_some();
    let bottleneck = has("layer1.0.conv3.weight");
    let preactivation = !has("bn1.weight") && has("layer1.0.bn1.weight");
    let layout = if has("fc.weight") { "torchvision" } else { "robustbench" };
    let linear = if layout == "torchvision" { "fc.weight" } else { "linear.weight" };
    let widths = dims(weights, |i| format!("layer{}.0.conv1.weight", i + 1));
    let blocks = (1..=widths.len()).map(|i| dims(weights, |j| format!("layer{i}.{j}.conv1.weight")).len());
    let &[num_classes, features] = weights.shape(linear)? else { return None };
    // Only a whole image has as many features as channels.
    let whole = features == widths.last()? * if bottleneck { 4 } else { 1 };
    // Two kinds of blocks with the norms before the convolutions have the same parameters.
    let open: &[_] = match (preactivation, whole) {
        (false, true) => &["image_size"],
        (false, false) => &["image_size", "pool"],
        (true, true) => &["image_size", "block"],
        (true, false) => &["image_size", "pool", "block"],
    };
    let mut config = keys([
        ("in_channels", stem[1].into()),
        ("num_classes", num_classes.into()),
        ("blocks", blocks.collect::<Vec<_>>().into()),
        ("widths", widths.into()),
    ]);
    // What is as in the default is not in files.
    let others = [
        ("stem", stem.ends_with(&[7, 7]), "imagenet".into()),
        ("layout", layout == "torchvision", layout.into()),
        ("block", bottleneck, "bottleneck".into()),
        ("final_norm", has("bn.weight"), true.into()),
    ];
    config.extend(others.into_iter().filter(|other| other.1).map(|(key, _, value)| (key.to_owned(), value)));
    (has("bn1.weight") || preactivation).then_some(Recognized { tag: "resnet", config, open, unused: &[] })
}
