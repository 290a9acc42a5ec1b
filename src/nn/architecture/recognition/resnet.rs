//! [`ResNetConfig`](crate::nn::ResNetConfig).

use super::recognized::{Recognized, dims, keys};
use crate::nn::StateDict;

pub fn recognize(weights: &StateDict) -> Option<Recognized> {
    let stem = weights.shape("conv1.weight").filter(|shape| shape.ends_with(&[3, 3]))?;
    weights.shape("bn1.weight")?;
    let bottleneck = weights.shape("layer1.0.conv3.weight").is_some();
    let widths = dims(weights, |i| format!("layer{}.0.conv1.weight", i + 1));
    let blocks = (1..=widths.len()).map(|i| dims(weights, |j| format!("layer{i}.{j}.conv1.weight")).len());
    let &[num_classes, features] = weights.shape("linear.weight")? else { return None };
    // Only a whole image has as many features as channels.
    let open: &[_] = if features == *widths.last()? { &["image_size"] } else { &["image_size", "pool"] };
    let config = keys([
        ("in_channels", stem[1].into()),
        ("num_classes", num_classes.into()),
        ("blocks", blocks.collect::<Vec<_>>().into()),
        ("widths", widths.into()),
    ]);
    (!bottleneck).then_some(Recognized { tag: "resnet", config, open, unused: &[] })
}
