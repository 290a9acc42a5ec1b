//! `unet/config.json`: the arguments of `UNetModel`.

use serde::{Deserialize, Serialize};

use super::super::parts::Faults;

/// The U-Net of Nichol & Dhariwal 2021 and of ADM (Dhariwal & Nichol 2021): the arguments of `UNetModel` in OpenAI's
/// improved-diffusion and guided-diffusion, key by key, with their defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdmConfig {
    /// Height and width of the images.
    pub image_size: usize,
    /// Channels of the noisy image.
    pub in_channels: usize,
    /// The channels to which `channel_mult` refers.
    pub model_channels: usize,
    /// Channels of the output: those of the image, or twice as many with a learned variance, the scripts' `learn_sigma`.
    pub out_channels: usize,
    /// Residual blocks at each resolution on the way down; on the way up there is one more.
    pub num_res_blocks: usize,
    /// By which factors the image is smaller where there is attention: not pixels, which the scripts' flag of this
    /// name counts. The middle always has attention.
    pub attention_resolutions: Vec<usize>,
    /// Dropout rate before the second convolution of residual blocks, in training.
    pub dropout: f64,
    /// Channels at each resolution, from fine to coarse, as multiples of `model_channels`, rounded down.
    pub channel_mult: Vec<f64>,
    /// Whether convolutions change the resolution where residual blocks do not.
    pub conv_resample: bool,
    /// Only 2.
    pub dims: usize,
    /// How many classes the network is conditioned on; absent if it is not.
    pub num_classes: Option<usize>,
    /// No effect here: whether the original saves memory in training.
    pub use_checkpoint: bool,
    /// No effect here: whether the original computes in half precision.
    pub use_fp16: bool,
    /// Attention heads, if `num_head_channels` is -1.
    pub num_heads: usize,
    /// Channels of an attention head, or -1.
    pub num_head_channels: i64,
    /// Attention heads on the way up, or -1 for `num_heads`.
    pub num_heads_upsample: i64,
    /// Whether the step and class scale and shift the second norm's output, instead of being added before it
    /// (Dhariwal & Nichol 2021, §3).
    pub use_scale_shift_norm: bool,
    /// Whether residual blocks change the resolution.
    pub resblock_updown: bool,
    /// Whether the layer that makes queries, keys and values has all queries first, instead of all of a head's.
    pub use_new_attention_order: bool,
}

impl Default for AdmConfig {
    fn default() -> Self {
        Self {
            image_size: 0,
            in_channels: 0,
            model_channels: 0,
            out_channels: 0,
            num_res_blocks: 0,
            attention_resolutions: Vec::new(),
            dropout: 0.0,
            channel_mult: vec![1.0, 2.0, 4.0, 8.0],
            conv_resample: true,
            dims: 2,
            num_classes: None,
            use_checkpoint: false,
            use_fp16: false,
            num_heads: 1,
            num_head_channels: -1,
            num_heads_upsample: -1,
            use_scale_shift_norm: false,
            resblock_updown: false,
            use_new_attention_order: false,
        }
    }
}

/// Groups of all norms.
pub(super) const GROUPS: usize = 32;

impl AdmConfig {
    pub(super) fn find_faults(&self) -> Vec<String> {
        let mut faults = Faults::default();
        faults.expect_positive(&[
            ("image_size", self.image_size),
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("num_res_blocks", self.num_res_blocks),
            ("num_classes", self.num_classes.unwrap_or(1)),
        ]);
        faults.expect("dims", self.dims, self.dims == 2, "2");
        let (levels, multiples) = (self.channel_mult.len(), &self.channel_mult);
        faults.expect("channel_mult", multiples, (1..=16).contains(&levels), "1 to 16 entries");
        let even = self.model_channels > 0 && self.model_channels.is_multiple_of(2);
        faults.expect("model_channels", self.model_channels, even, "an even number, for sines and cosines");
        let in_range = (0.0..1.0).contains(&self.dropout);
        faults.expect("dropout", self.dropout, in_range, "from 0 to below 1");
        if !faults.0.is_empty() {
            return faults.0;
        }
        let channels: Vec<usize> = (0..levels).map(|level| self.channels(level)).collect();
        let divided = channels.iter().all(|c| *c > 0 && c.is_multiple_of(GROUPS));
        let what = format!("multiples of {GROUPS} channels, found {channels:?}");
        faults.expect("channel_mult", multiples, divided, &what);
        let fits = self.image_size.is_multiple_of(self.size_multiple());
        let what = format!("a multiple of {}, as the image is halved that often", self.size_multiple());
        faults.expect("image_size", self.image_size, fits, &what);
        let attended = (0..levels).filter(|level| *level + 1 == levels || self.attends(*level));
        let attended: Vec<usize> = attended.map(|level| channels[level]).collect();
        let expected = format!("a divisor of the channels with attention {attended:?}");
        let divides = |n: usize| n > 0 && attended.iter().all(|c| c.is_multiple_of(n));
        match usize::try_from(self.num_head_channels) {
            Ok(n) => faults.expect("num_head_channels", n, divides(n), &expected),
            Err(_) => {
                let n = self.num_head_channels;
                faults.expect("num_head_channels", n, n == -1, "-1 or more");
                faults.expect("num_heads", self.num_heads, divides(self.num_heads), &expected);
                let up = self.num_heads_upsample;
                let fits = up == -1 || usize::try_from(up).is_ok_and(divides);
                faults.expect("num_heads_upsample", up, fits, &format!("-1, or {expected}"));
            }
        }
        faults.0
    }

    /// The number of which an image's height and width must be multiples.
    pub fn size_multiple(&self) -> usize {
        1 << (self.channel_mult.len() - 1)
    }

    /// Channels at a resolution, counted from the finest.
    pub(super) fn channels(&self, level: usize) -> usize {
        (self.channel_mult[level] * self.model_channels as f64) as usize
    }

    /// Whether a resolution has attention.
    pub(super) fn attends(&self, level: usize) -> bool {
        self.attention_resolutions.contains(&(1 << level))
    }

    /// Features of the embedding of step and class.
    pub(super) fn time_dim(&self) -> usize {
        4 * self.model_channels
    }

    /// The heads of an attention, which is on the way up or not.
    pub(super) fn heads(&self, channels: usize, up: bool) -> usize {
        match (usize::try_from(self.num_head_channels), usize::try_from(self.num_heads_upsample)) {
            (Ok(head), _) => channels / head,
            (_, Ok(heads)) if up => heads,
            _ => self.num_heads,
        }
    }
}
