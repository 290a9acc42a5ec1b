//! `unet/config.json`: the keys of `diffusers`' `UNet2DModel`, and which of their values are supported here.

use serde::{Deserialize, Serialize};

use super::super::parts::Faults;

/// The U-Net of denoising diffusion models (Ho et al. 2020, App. B): `config.json` of `diffusers`' `UNet2DModel`, key by
/// key.
///
/// Defaults are `diffusers`' own, since its files only leave out keys that were added later. Options that are not
/// supported here are kept as written and reported as faults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct UNetConfig {
    /// Height and width of the images.
    pub sample_size: Option<SampleSize>,
    /// Channels of the noisy image.
    pub in_channels: usize,
    /// Channels of the predicted noise.
    pub out_channels: usize,
    /// Whether the input is in [0, 1] and has to be brought to [-1, 1].
    pub center_input_sample: bool,
    /// Only `positional`: sines and cosines of the step.
    pub time_embedding_type: String,
    /// Features of the time embedding after its two linear layers; by default 4 · `block_out_channels[0]`.
    pub time_embedding_dim: Option<usize>,
    /// Subtracted from the number of frequencies in their exponent: 1 in Ho et al.'s code, else 0.
    pub freq_shift: f64,
    /// Whether the cosines come first.
    pub flip_sin_to_cos: bool,
    /// `DownBlock2D` or `AttnDownBlock2D` for each resolution, from fine to coarse.
    pub down_block_types: Vec<String>,
    /// Only `UNetMidBlock2D`.
    pub mid_block_type: Option<String>,
    /// `UpBlock2D` or `AttnUpBlock2D` for each resolution, from coarse to fine.
    pub up_block_types: Vec<String>,
    /// Channels at each resolution, from fine to coarse.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks at each resolution on the way down; on the way up there is one more.
    pub layers_per_block: usize,
    /// The divisor of the residual sums in the middle.
    pub mid_block_scale_factor: f64,
    /// 1: the convolutions that halve the image pad all sides; 0: the lower and right ones only.
    pub downsample_padding: usize,
    /// Only `conv`.
    pub downsample_type: String,
    /// Only `conv`.
    pub upsample_type: String,
    /// Dropout rate before the second convolution of residual blocks, in training.
    pub dropout: f64,
    /// Only `silu`, or `swish`, its other name.
    pub act_fn: String,
    /// Channels of an attention head; one head over all channels if absent.
    pub attention_head_dim: Option<usize>,
    /// Groups of all norms.
    pub norm_num_groups: usize,
    /// Groups of the norm before the attention in the middle, if different.
    pub attn_norm_num_groups: Option<usize>,
    /// Added to the variance in all norms.
    pub norm_eps: f64,
    /// How the step enters a residual block: added (`default`), or as scale and shift after the second norm
    /// (`scale_shift`, Dhariwal & Nichol 2021, §3).
    pub resnet_time_scale_shift: String,
    /// Whether the middle has attention.
    pub add_attention: bool,
    /// Only absent: with `num_class_embeds`, a learned embedding of the class is added to the step's.
    pub class_embed_type: Option<String>,
    /// How many classes the network is conditioned on; absent if it is not.
    pub num_class_embeds: Option<usize>,
    /// No effect with positional embeddings.
    pub num_train_timesteps: Option<usize>,
}

impl Default for UNetConfig {
    fn default() -> Self {
        let names = |names: [&str; 4]| names.map(String::from).to_vec();
        Self {
            sample_size: None,
            in_channels: 3,
            out_channels: 3,
            center_input_sample: false,
            time_embedding_type: "positional".into(),
            time_embedding_dim: None,
            freq_shift: 0.0,
            flip_sin_to_cos: true,
            down_block_types: names(["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"]),
            mid_block_type: Some("UNetMidBlock2D".into()),
            up_block_types: names(["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"]),
            block_out_channels: vec![224, 448, 672, 896],
            layers_per_block: 2,
            mid_block_scale_factor: 1.0,
            downsample_padding: 1,
            downsample_type: "conv".into(),
            upsample_type: "conv".into(),
            dropout: 0.0,
            act_fn: "silu".into(),
            attention_head_dim: Some(8),
            norm_num_groups: 32,
            attn_norm_num_groups: None,
            norm_eps: 1e-5,
            resnet_time_scale_shift: "default".into(),
            add_attention: true,
            class_embed_type: None,
            num_class_embeds: None,
            num_train_timesteps: None,
        }
    }
}

/// `sample_size`: one number for square images, or height and width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum SampleSize {
    /// Height and width alike.
    Square(usize),
    /// Height, then width.
    Rectangle([usize; 2]),
}

impl SampleSize {
    /// (height, width)
    pub fn height_width(self) -> (usize, usize) {
        match self {
            Self::Square(side) => (side, side),
            Self::Rectangle([height, width]) => (height, width),
        }
    }
}

impl UNetConfig {
    /// Every key with an unsupported value.
    pub(super) fn find_faults(&self) -> Vec<String> {
        let mut faults = Faults::default();
        faults.one_of("time_embedding_type", &self.time_embedding_type, &["positional"]);
        faults.one_of(
            "mid_block_type",
            self.mid_block_type.as_deref().unwrap_or("null"),
            &["UNetMidBlock2D"],
        );
        faults.one_of("downsample_type", &self.downsample_type, &["conv"]);
        faults.one_of("upsample_type", &self.upsample_type, &["conv"]);
        faults.one_of("act_fn", &self.act_fn, &["silu", "swish"]);
        faults.one_of("resnet_time_scale_shift", &self.resnet_time_scale_shift, &["default", "scale_shift"]);
        faults.one_of("class_embed_type", self.class_embed_type.as_deref().unwrap_or("null"), &["null"]);
        for block in &self.down_block_types {
            faults.one_of("down_block_types", block, &["DownBlock2D", "AttnDownBlock2D"]);
        }
        for block in &self.up_block_types {
            faults.one_of("up_block_types", block, &["UpBlock2D", "AttnUpBlock2D"]);
        }

        let channels = &self.block_out_channels;
        let per_block = format!("one entry for each of the {} block_out_channels", channels.len());
        let (down, up) = (&self.down_block_types, &self.up_block_types);
        faults.expect("block_out_channels", channels, !channels.is_empty(), "at least one block");
        faults.expect("down_block_types", down, down.len() == channels.len(), &per_block);
        faults.expect("up_block_types", up, up.len() == channels.len(), &per_block);
        if channels.is_empty() {
            return faults.0;
        }

        faults.expect("in_channels", self.in_channels, self.in_channels > 0, "at least 1");
        faults.expect("out_channels", self.out_channels, self.out_channels > 0, "at least 1");
        faults.expect("layers_per_block", self.layers_per_block, self.layers_per_block > 0, "at least 1");
        faults.expect("downsample_padding", self.downsample_padding, self.downsample_padding <= 1, "0 or 1");
        let dim = self.time_embedding_dim;
        faults.expect("time_embedding_dim", dim, dim != Some(0), "at least 1, or null");
        let classes = self.num_class_embeds;
        faults.expect("num_class_embeds", classes, classes != Some(0), "at least 1, or null");
        let scale = self.mid_block_scale_factor;
        faults.expect(
            "mid_block_scale_factor",
            scale,
            scale.is_finite() && scale != 0.0,
            "a number other than 0",
        );
        faults.expect("norm_eps", self.norm_eps, self.norm_eps.is_finite() && self.norm_eps > 0.0, "above 0");
        let in_range = (0.0..1.0).contains(&self.dropout);
        faults.expect("dropout", self.dropout, in_range, "from 0 to below 1");

        let (groups, middle, heads) =
            (self.norm_num_groups, self.attn_norm_num_groups, self.attention_head_dim);
        let divides =
            |n: usize, channels: &[usize]| n > 0 && channels.iter().all(|c| *c > 0 && c.is_multiple_of(n));
        let of_all = format!("a divisor of all block_out_channels {channels:?}");
        faults.expect("norm_num_groups", groups, divides(groups, channels), &of_all);
        let last = &channels[channels.len() - 1..];
        let of_last = format!("a divisor of the last block_out_channels {channels:?}");
        faults.expect("attn_norm_num_groups", middle, middle.is_none_or(|n| divides(n, last)), &of_last);
        let attended = self.attended_channels();
        let of_attended = format!("a divisor of the channels with attention {attended:?}");
        faults.expect("attention_head_dim", heads, heads.is_none_or(|n| divides(n, &attended)), &of_attended);
        let even = channels[0].is_multiple_of(2);
        faults.expect("block_out_channels", channels, even, "an even first entry, for sines and cosines");
        let below = format!("less than half of block_out_channels[0] = {}", channels[0]);
        faults.expect("freq_shift", self.freq_shift, self.freq_shift < (channels[0] / 2) as f64, &below);
        if let Some(size) = self.sample_size {
            let (height, width) = size.height_width();
            let fits = |n: usize| n > 0 && n.is_multiple_of(self.size_multiple());
            let what = format!("multiples of {}, as the image is halved that often", self.size_multiple());
            faults.expect("sample_size", size, fits(height) && fits(width), &what);
        }
        faults.0
    }

    /// The number of which an image's height and width must be multiples.
    pub fn size_multiple(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    /// The channels of each attention.
    fn attended_channels(&self) -> Vec<usize> {
        let channels = &self.block_out_channels;
        let down = channels.iter().zip(&self.down_block_types).filter(|(_, t)| *t == "AttnDownBlock2D");
        let up = channels.iter().rev().zip(&self.up_block_types).filter(|(_, t)| *t == "AttnUpBlock2D");
        let middle = self.add_attention.then(|| channels[channels.len() - 1]);
        down.chain(up).map(|(c, _)| *c).chain(middle).collect()
    }

    /// Features of the time embedding.
    pub(super) fn time_dim(&self) -> usize {
        self.time_embedding_dim.unwrap_or(4 * self.block_out_channels[0])
    }

    pub(super) fn scale_shift(&self) -> bool {
        self.resnet_time_scale_shift == "scale_shift"
    }

    /// Groups of the norm before the attention in the middle, or `None` if there is no norm.
    pub(super) fn mid_attention_groups(&self) -> Option<usize> {
        self.attn_norm_num_groups.or((!self.scale_shift()).then_some(self.norm_num_groups))
    }
}
