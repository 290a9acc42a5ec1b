//! [`AdmConfig`](crate::nn::AdmConfig), whose attention looks the same for any number of heads.

use std::collections::BTreeSet;

use super::recognized::{Recognized, dim, keys};
use crate::nn::StateDict;

pub fn recognize(weights: &StateDict) -> Option<Recognized> {
    let has = |name: String| weights.shape(&name).is_some();
    let model_channels = dim(weights, "time_embed.0.weight", 1).filter(|c| *c > 0)?;
    let inputs = blocks(weights, "input_blocks.");
    let outputs = blocks(weights, "output_blocks.").len();
    // The last block of a resolution on the way up has the layer that doubles the image; on the way down there may be
    // blocks without parameters.
    let doubling =
        |n: usize, layer: &str| (1..3).any(|i| has(format!("output_blocks.{n}.{i}.{layer}.weight")));
    let resblock_updown = (0..outputs).any(|n| doubling(n, "in_layers.0"));
    let last_of_first =
        (0..outputs).find(|&n| doubling(n, "in_layers.0") || doubling(n, "conv")).map(|n| n + 1);
    let gap = (0..outputs).find(|n| !inputs.contains(n));
    let per_level = last_of_first.or(gap).unwrap_or(outputs);
    let num_res_blocks = per_level.checked_sub(1).filter(|n| *n > 0)?;
    // More are a faulty file.
    let levels = Some(outputs / per_level).filter(|levels| *levels <= 16)?;
    let first = |level: usize| format!("input_blocks.{}", 1 + level * per_level);
    let channels = (0..levels)
        .map(|level| dim(weights, &format!("{}.0.out_layers.3.weight", first(level)), 0))
        .collect::<Option<Vec<_>>>()?;
    let multiples: Vec<_> = channels.iter().map(|c| *c as f64 / model_channels as f64).collect();
    let attended = (0..levels).filter(|level| has(format!("{}.1.qkv.weight", first(*level))));
    let step = dim(weights, "input_blocks.1.0.emb_layers.1.weight", 0)?;
    let config = keys([
        ("in_channels", dim(weights, "input_blocks.0.0.weight", 1)?.into()),
        ("model_channels", model_channels.into()),
        ("out_channels", dim(weights, "out.2.weight", 0)?.into()),
        ("num_res_blocks", num_res_blocks.into()),
        ("attention_resolutions", attended.map(|level| 1 << level).collect::<Vec<usize>>().into()),
        ("channel_mult", multiples.into()),
        ("conv_resample", gap.is_none().into()),
        ("num_classes", dim(weights, "label_emb.weight", 0).into()),
        ("use_scale_shift_norm", (step == 2 * channels.first()?).into()),
        ("resblock_updown", resblock_updown.into()),
    ]);
    let open = &["image_size", "num_heads", "num_head_channels", "use_new_attention_order"];
    Some(Recognized { tag: "UNetModel", config, open, unused: &[] })
}

/// The numbers of the blocks with parameters.
fn blocks(weights: &StateDict, prefix: &str) -> BTreeSet<usize> {
    let number = |name: &str| name.strip_prefix(prefix)?.split('.').next()?.parse().ok();
    weights.names().filter_map(number).collect()
}
