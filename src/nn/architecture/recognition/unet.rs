//! [`UNetConfig`](crate::nn::UNetConfig), whose `config.json` lies beside its weights and says what they do not.

use super::recognized::{Recognized, dim, keys};
use crate::nn::StateDict;

pub fn recognize(weights: &StateDict) -> Option<Recognized> {
    weights.shape("time_embedding.linear_1.weight")?;
    weights.shape("down_blocks.0.resnets.0.conv1.weight")?;
    let config = keys([
        ("in_channels", dim(weights, "conv_in.weight", 1)?.into()),
        ("out_channels", dim(weights, "conv_out.weight", 0)?.into()),
    ]);
    let open = &[
        "sample_size",
        "block_out_channels",
        "layers_per_block",
        "down_block_types",
        "up_block_types",
        "attention_head_dim",
        "norm_num_groups",
        "norm_eps",
        "flip_sin_to_cos",
        "freq_shift",
        "downsample_padding",
        "resnet_time_scale_shift",
    ];
    Some(Recognized { tag: "UNet2DModel", config, open, unused: &[] })
}
