//! [`SongUNetConfig`](crate::nn::SongUNetConfig) and [`DhariwalUNetConfig`](crate::nn::DhariwalUNetConfig), which show
//! all but the dropout rates.

use super::recognized::{Recognized, dim, keys};
use crate::nn::StateDict;

pub fn recognize(weights: &StateDict) -> Option<Recognized> {
    let has = |name: &str| weights.shape(name).is_some();
    let stem = weights.names().find(|name| name.starts_with("enc.") && name.ends_with("_conv.weight"))?;
    let side = stem.strip_prefix("enc.")?.strip_suffix("_conv.weight")?.split_once('x')?.0;
    let img_resolution: usize = side.parse().ok()?;
    let part = |way: &str, level: usize, part: &str| {
        let side = img_resolution >> level;
        format!("{way}.{side}x{side}_{part}")
    };
    let noise = dim(weights, "map_layer0.weight", 1)?;
    let out = dim(weights, "out_conv.weight", 0);
    let model_channels = if out.is_some() { noise } else { dim(weights, stem, 0)? };
    let multiple =
        |channels: usize| channels.checked_div(model_channels).filter(|n| n * model_channels == channels);
    let channels = |level| dim(weights, &part("enc", level, "block0.conv1.weight"), 0);
    let channel_mult: Vec<usize> =
        (0..usize::BITS as usize).map_while(channels).map(multiple).collect::<Option<_>>()?;
    let levels = 0..channel_mult.len();
    let attended = levels.filter(|level| has(&part("enc", *level, "block0.qkv.weight")));
    let num_blocks = (0..).take_while(|i| has(&part("enc", 0, &format!("block{i}.conv1.weight")))).count();
    let mut config = keys([
        ("img_resolution", img_resolution.into()),
        ("in_channels", dim(weights, stem, 1)?.into()),
        ("out_channels", out.or_else(|| dim(weights, &part("dec", 0, "aux_conv.weight"), 0))?.into()),
        ("label_dim", dim(weights, "map_label.weight", 1).unwrap_or(0).into()),
        ("augment_dim", dim(weights, "map_augment.weight", 1).unwrap_or(0).into()),
        ("model_channels", model_channels.into()),
        ("channel_mult_emb", multiple(dim(weights, "map_layer0.weight", 0)?)?.into()),
        ("num_blocks", num_blocks.into()),
        ("attn_resolutions", attended.map(|level| img_resolution >> level).collect::<Vec<_>>().into()),
        ("channel_mult", channel_mult.into()),
    ]);
    if out.is_some() {
        return Some(Recognized { tag: "DhariwalUNet", config, open: &[], unused: &[] });
    }
    let encoder_type =
        match (has(&part("enc", 1, "aux_skip.weight")), has(&part("enc", 1, "aux_residual.weight"))) {
            (true, _) => "skip",
            (_, true) => "residual",
            _ => "standard",
        };
    let resample_filter = match dim(weights, &part("enc", 1, "down.conv0.resample_filter"), 2) {
        Some(4) => vec![1.0, 3.0, 3.0, 1.0],
        Some(2) | None => vec![1.0, 1.0],
        Some(_) => return None,
    };
    let sums = has(&part("dec", 1, "aux_norm.weight"));
    config.extend(keys([
        ("embedding_type", if has("map_noise.freqs") { "fourier" } else { "positional" }.into()),
        ("channel_mult_noise", multiple(noise)?.into()),
        ("encoder_type", encoder_type.into()),
        ("decoder_type", if sums { "skip" } else { "standard" }.into()),
        ("resample_filter", resample_filter.into()),
    ]));
    Some(Recognized { tag: "SongUNet", config, open: &[], unused: &[] })
}
