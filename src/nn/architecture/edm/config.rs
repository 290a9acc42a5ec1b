//! `unet/config.json`: the arguments of `SongUNet` and `DhariwalUNet`.

use serde::{Deserialize, Serialize};

use super::super::parts::{Faults, Filter};

/// The U-Net of Song et al. 2021, DDPM++ and NCSN++: the arguments of EDM's `SongUNet` (Karras et al. 2022), key by
/// key, with their defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SongUNetConfig {
    /// Height and width of the images.
    pub img_resolution: usize,
    /// Channels of the noisy image.
    pub in_channels: usize,
    /// Channels of the output: those of the image, or twice as many with a learned variance.
    pub out_channels: usize,
    /// How many classes the network is conditioned on; 0 if it is not.
    pub label_dim: usize,
    /// Numbers that describe how a training image was augmented. Their weights are kept, and not used: when images
    /// are sampled all of them are 0.
    pub augment_dim: usize,
    /// The channels to which the multipliers refer.
    pub model_channels: usize,
    /// Channels at each resolution, from fine to coarse, as multiples of `model_channels`.
    pub channel_mult: Vec<usize>,
    /// Features of the embedding of noise level and class, as a multiple of `model_channels`.
    pub channel_mult_emb: usize,
    /// Residual blocks at each resolution on the way down; on the way up there is one more.
    pub num_blocks: usize,
    /// The sides of images that have attention; the middle always has it.
    pub attn_resolutions: Vec<usize>,
    /// Dropout rate before the second convolution of residual blocks, in training.
    pub dropout: f64,
    /// The share of training images that were shown without their class. Above 0, the class `label_dim` stands for
    /// none.
    pub label_dropout: f64,
    /// `positional`: sines and cosines at frequencies from 1 to 1/10000 (DDPM++); `fourier`: at random ones (NCSN++).
    pub embedding_type: String,
    /// Sines and cosines of the noise level, as a multiple of `model_channels`.
    pub channel_mult_noise: usize,
    /// `standard` (DDPM++); `residual`: the image, made smaller by convolutions, is added at each resolution (NCSN++);
    /// `skip`: the image is made smaller, and added after a convolution.
    pub encoder_type: String,
    /// `standard`; `skip`: the output is a sum over the resolutions.
    pub decoder_type: String,
    /// The filter of changes of resolution: 1, 1 (DDPM++) or 1, 3, 3, 1 (NCSN++).
    pub resample_filter: Vec<f64>,
}

impl Default for SongUNetConfig {
    fn default() -> Self {
        Self {
            img_resolution: 0,
            in_channels: 0,
            out_channels: 0,
            label_dim: 0,
            augment_dim: 0,
            model_channels: 128,
            channel_mult: vec![1, 2, 2, 2],
            channel_mult_emb: 4,
            num_blocks: 4,
            attn_resolutions: vec![16],
            dropout: 0.1,
            label_dropout: 0.0,
            embedding_type: "positional".into(),
            channel_mult_noise: 1,
            encoder_type: "standard".into(),
            decoder_type: "standard".into(),
            resample_filter: Filter::Box.weights().into(),
        }
    }
}

/// The U-Net of ADM (Dhariwal & Nichol 2021) as EDM has it: the arguments of its `DhariwalUNet` (Karras et al. 2022),
/// with their defaults. The keys are among those of [`SongUNetConfig`] and mean the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DhariwalUNetConfig {
    /// Height and width of the images.
    pub img_resolution: usize,
    /// Channels of the noisy image.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// How many classes the network is conditioned on; 0 if it is not.
    pub label_dim: usize,
    /// Numbers that describe how a training image was augmented; not used.
    pub augment_dim: usize,
    /// The channels to which the multipliers refer.
    pub model_channels: usize,
    /// Channels at each resolution.
    pub channel_mult: Vec<usize>,
    /// Features of the embedding.
    pub channel_mult_emb: usize,
    /// Residual blocks at each resolution.
    pub num_blocks: usize,
    /// The sides of images that have attention, in heads of 64 channels: none below that.
    pub attn_resolutions: Vec<usize>,
    /// Dropout rate.
    pub dropout: f64,
    /// The share of training images that were shown without their class.
    pub label_dropout: f64,
}

impl Default for DhariwalUNetConfig {
    fn default() -> Self {
        Self {
            model_channels: 192,
            channel_mult: vec![1, 2, 3, 4],
            num_blocks: 3,
            attn_resolutions: vec![32, 16, 8],
            ..SongUNetConfig::default().into()
        }
    }
}

impl From<SongUNetConfig> for DhariwalUNetConfig {
    /// Drops the keys that it does not have.
    fn from(song: SongUNetConfig) -> Self {
        Self {
            img_resolution: song.img_resolution,
            in_channels: song.in_channels,
            out_channels: song.out_channels,
            label_dim: song.label_dim,
            augment_dim: song.augment_dim,
            model_channels: song.model_channels,
            channel_mult: song.channel_mult,
            channel_mult_emb: song.channel_mult_emb,
            num_blocks: song.num_blocks,
            attn_resolutions: song.attn_resolutions,
            dropout: song.dropout,
            label_dropout: song.label_dropout,
        }
    }
}

impl From<&DhariwalUNetConfig> for SongUNetConfig {
    /// The other keys as they are in a `DhariwalUNet`, which is their default.
    fn from(dhariwal: &DhariwalUNetConfig) -> Self {
        Self {
            img_resolution: dhariwal.img_resolution,
            in_channels: dhariwal.in_channels,
            out_channels: dhariwal.out_channels,
            label_dim: dhariwal.label_dim,
            augment_dim: dhariwal.augment_dim,
            model_channels: dhariwal.model_channels,
            channel_mult: dhariwal.channel_mult.clone(),
            channel_mult_emb: dhariwal.channel_mult_emb,
            num_blocks: dhariwal.num_blocks,
            attn_resolutions: dhariwal.attn_resolutions.clone(),
            dropout: dhariwal.dropout,
            label_dropout: dhariwal.label_dropout,
            ..Self::default()
        }
    }
}

impl SongUNetConfig {
    pub(super) fn find_faults(&self) -> Vec<String> {
        let mut faults = Faults::default();
        faults.expect_positive(&[
            ("img_resolution", self.img_resolution),
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("model_channels", self.model_channels),
            ("channel_mult_emb", self.channel_mult_emb),
            ("num_blocks", self.num_blocks),
        ]);
        faults.one_of("embedding_type", &self.embedding_type, &["positional", "fourier"]);
        faults.one_of("encoder_type", &self.encoder_type, &["standard", "skip", "residual"]);
        faults.one_of("decoder_type", &self.decoder_type, &["standard", "skip"]);
        let known = self.filter().is_some();
        faults.expect("resample_filter", &self.resample_filter, known, "[1.0, 1.0] or [1.0, 3.0, 3.0, 1.0]");
        for (key, rate) in [("dropout", self.dropout), ("label_dropout", self.label_dropout)] {
            faults.expect(key, rate, (0.0..1.0).contains(&rate), "from 0 to below 1");
        }
        let multiples = &self.channel_mult;
        let some = (1..=16).contains(&multiples.len()) && !multiples.contains(&0);
        faults.expect("channel_mult", multiples, some, "1 to 16 entries above 0");
        // The positional embedding divides by the number of frequencies less 1.
        let noise = self.noise_channels();
        let what = "an even multiple of model_channels, 4 or more: sines and cosines";
        faults.expect(
            "channel_mult_noise",
            self.channel_mult_noise,
            noise >= 4 && noise.is_multiple_of(2),
            what,
        );
        if some {
            let fits = self.img_resolution.is_multiple_of(self.size_multiple());
            let what = format!("a multiple of {}, as the image is halved that often", self.size_multiple());
            faults.expect("img_resolution", self.img_resolution, fits, &what);
        }
        faults.0
    }

    /// The number of which an image's height and width must be multiples.
    pub fn size_multiple(&self) -> usize {
        1 << (self.channel_mult.len() - 1)
    }

    /// Sines and cosines of the noise level.
    pub(super) fn noise_channels(&self) -> usize {
        self.model_channels * self.channel_mult_noise
    }

    /// Features of the embedding of noise level and class.
    pub(super) fn emb_channels(&self) -> usize {
        self.model_channels * self.channel_mult_emb
    }

    pub(super) fn filter(&self) -> Option<Filter> {
        [Filter::Box, Filter::Binomial].into_iter().find(|filter| filter.weights() == self.resample_filter)
    }

    /// The classes, including the one for none if there is one.
    pub(super) fn classes(&self) -> Option<usize> {
        (self.label_dim > 0).then(|| self.label_dim + usize::from(self.label_dropout > 0.0))
    }
}
