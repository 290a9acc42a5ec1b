//! The U-Nets of EDM (Karras et al. 2022): `SongUNet` and `DhariwalUNet`.

mod config;

use std::f64::consts::{PI, SQRT_2};

use candle_core::{D, Device, Tensor};
pub use config::{DhariwalUNetConfig, SongUNetConfig};

use super::parts::{
    Dropout, Filter, QkvAttention, QkvOrder, Resampling, ResnetBlock, expect_images, image_shape, sinusoids,
    with_classes,
};
use crate::{
    Result, kernels,
    nn::{
        layers::{Conv2d, GroupNorm, Linear, to_compute},
        network::{DenoiserArchitecture, DenoiserNetwork, expect_none},
        params::{Buffer, Builder, Init},
    },
};

/// In what the two networks differ beyond the keys of [`SongUNetConfig`].
#[derive(Clone, Copy, PartialEq)]
enum Family {
    Song,
    Dhariwal,
}

impl Family {
    /// Added to the variance in all norms.
    fn epsilon(self) -> f64 {
        match self {
            Self::Song => 1e-6,
            Self::Dhariwal => 1e-5,
        }
    }

    /// The divisor of residual sums.
    fn output_scale(self) -> f64 {
        match self {
            Self::Song => SQRT_2,
            Self::Dhariwal => 1.0,
        }
    }

    /// The initial weight and bias of a layer, its weight as `gain` of the usual size.
    fn init(self, fan_in: usize, fan_out: usize, gain: f64) -> [Init; 2] {
        match self {
            // Glorot & Bengio 2010, Eq. 16.
            Self::Song => {
                [Init::Uniform((gain * (6.0 / (fan_in + fan_out) as f64).sqrt()) as f32), Init::Zeros]
            }
            Self::Dhariwal => [Init::FanIn(fan_in); 2],
        }
    }

    /// That of layers that say nothing at first.
    fn init_silent(self, fan_in: usize, fan_out: usize) -> [Init; 2] {
        match self {
            Self::Song => self.init(fan_in, fan_out, 1e-5),
            Self::Dhariwal => [Init::Zeros; 2],
        }
    }

    /// `kernel` × `kernel`, padded so that the image keeps its size.
    fn convolution(self, c_in: usize, c_out: usize, kernel: usize, b: &Builder) -> Result<Conv2d> {
        let area = kernel * kernel;
        Conv2d::with_init(c_in, c_out, kernel, self.init(c_in * area, c_out * area, 1.0), b)
    }

    fn linear(self, n_in: usize, n_out: usize, b: &Builder) -> Result<Linear> {
        Linear::with_init(n_in, n_out, self.init(n_in, n_out, 1.0), b)
    }

    fn norm(self, c: usize, b: &Builder) -> Result<GroupNorm> {
        GroupNorm::new(groups(c)?, c, self.epsilon(), b)
    }
}

/// The groups of a norm: 32, or such that each has 4 channels.
fn groups(c: usize) -> Result<usize> {
    let groups = (c / 4).min(32);
    if groups == 0 || !c.is_multiple_of(groups) {
        bail!(Data, "{c} channels cannot be normalised in {groups} groups, expected other model_channels");
    }
    Ok(groups)
}

/// Checks the filter that files hold beside the weights. Fails with [`Error::Data`](crate::Error::Data) if it is another
/// one than that of the configuration.
fn expect_filter(filter: Filter, b: &Builder) -> Result<()> {
    let side = filter.weights().len();
    let expected = filter.squared();
    let buffer = b.buffer("resample_filter", (1, 1, side, side), Init::Constant(expected))?;
    let found: Vec<f32> = buffer.get().flatten_all()?.to_vec1()?;
    if found.iter().zip(expected).any(|(found, expected)| (found - expected).abs() > 1e-3) {
        bail!(Data, "a resample_filter is {found:?}, expected {expected:?}, that of the configuration");
    }
    Ok(())
}

/// `UNetBlock`: a residual block, perhaps with a change of resolution, or followed by attention.
struct Block {
    resnet: ResnetBlock,
    attention: Option<QkvAttention>,
}

impl Block {
    fn new(
        (c_in, c_out): (usize, usize),
        resampling: Option<Resampling>,
        attention: bool,
        (family, config): (Family, &SongUNetConfig),
        b: &Builder,
    ) -> Result<Self> {
        let shape = kernels::ResnetBlock {
            c_in,
            c_out,
            time_dim: config.emb_channels(),
            groups: [groups(c_in)?, groups(c_out)?],
            epsilon: family.epsilon(),
            scale_shift: family == Family::Dhariwal,
            shortcut: c_in != c_out || resampling.is_some() && family == Family::Song,
            output_scale: family.output_scale(),
        };
        let init = |name: &str, fan_in, fan_out| match name {
            "conv1" => family.init_silent(fan_in, fan_out),
            _ => family.init(fan_in, fan_out, 1.0),
        };
        let names = ["norm0", "conv0", "affine", "norm1", "conv1", "skip"];
        let resnet = ResnetBlock::new(shape, resampling, names, &init, b)?;
        if let Some(Resampling::Down(filter) | Resampling::Up(filter)) = resampling {
            expect_filter(filter, &b.pp("conv0"))?;
            expect_filter(filter, &b.pp("skip"))?;
        }
        let heads = match family {
            Family::Song => 1,
            Family::Dhariwal => c_out / 64,
        };
        let attention =
            (attention && heads > 0).then(|| attention_of(c_out, heads, family, b)).transpose()?;
        Ok(Self { resnet, attention })
    }

    fn forward(&self, x: &Tensor, emb: &Tensor, dropout: Option<&Dropout>) -> Result<Tensor> {
        let x = self.resnet.forward(x, emb, dropout)?;
        self.attention.as_ref().map_or(Ok(x.clone()), |attention| attention.forward(&x))
    }

    /// The multiply-adds, and the resulting positions.
    fn macs(&self, positions: usize) -> (u64, usize) {
        let (macs, positions) = self.resnet.macs(positions);
        (macs + self.attention.as_ref().map_or(0, |attention| attention.macs(positions)), positions)
    }
}

fn attention_of(c: usize, heads: usize, family: Family, b: &Builder) -> Result<QkvAttention> {
    if !c.is_multiple_of(heads) {
        bail!(Data, "{c} channels cannot be divided among {heads} heads, expected other model_channels");
    }
    let layer = |name: &str, n_out: usize, [weight, bias]: [Init; 2]| -> Result<[Tensor; 2]> {
        let b = b.pp(name);
        Ok([b.get("weight", (n_out, c, 1, 1), weight)?, b.get("bias", n_out, bias)?])
    };
    Ok(QkvAttention {
        norm: family.norm(c, &b.pp("norm2"))?,
        qkv: layer("qkv", 3 * c, family.init(c, 3 * c, 0.2f64.sqrt()))?,
        proj: layer("proj", c, family.init_silent(c, c))?,
        heads,
        order: QkvOrder::ChannelsSecond,
        output_scale: family.output_scale(),
    })
}

/// A part of the way down.
enum Encoder {
    Stem(Conv2d),
    Block(Block),
    /// The image at the next resolution, and the convolution after which it is added.
    Skip(Filter, Conv2d),
    /// What was added last, or the image, at the next resolution after a convolution.
    Residual(Filter, Conv2d),
}

/// A part of the way up.
enum Decoder {
    /// Whether it gets an image of the way down, too.
    Block(Block, bool),
    /// The output at the next resolution.
    Double(Filter),
    /// What is added to the output.
    Output(GroupNorm, Conv2d),
}

/// The sines and cosines of a noise level.
enum Frequencies {
    Positional(Vec<f32>),
    /// Random ones, which files hold.
    Fourier(Buffer),
}

impl Frequencies {
    fn new((family, config): (Family, &SongUNetConfig), b: &Builder) -> Result<Self> {
        let half = config.noise_channels() / 2;
        if config.embedding_type == "fourier" {
            return Ok(Self::Fourier(b.pp("map_noise").buffer("freqs", half, Init::Normal(16.0))?));
        }
        let last = half - usize::from(family == Family::Song);
        Ok(Self::Positional((0..half).map(|i| 1e-4f64.powf(i as f64 / last as f64) as f32).collect()))
    }

    /// `(half,)`
    fn get(&self, device: &Device) -> Result<Tensor> {
        Ok(match self {
            Self::Positional(frequencies) => Tensor::new(&frequencies[..], device)?,
            Self::Fourier(buffer) => (buffer.get() * (2.0 * PI))?,
        })
    }
}

/// `map_label`: a linear layer on classes as one-hot vectors.
struct Labels {
    weight: Tensor,
    bias: Option<Tensor>,
    /// What stands in the vectors instead of 1.
    one: f64,
}

impl Labels {
    fn new((family, config): (Family, &SongUNetConfig), b: &Builder) -> Result<Self> {
        let n = config.label_dim;
        let (n_out, one) = match family {
            Family::Song => (config.noise_channels(), (n as f64).sqrt()),
            Family::Dhariwal => (config.emb_channels(), 1.0),
        };
        let init = match family {
            Family::Song => family.init(n, n_out, 1.0)[0],
            Family::Dhariwal => Init::Normal(1.0),
        };
        let bias = (family == Family::Song).then(|| b.get("bias", n_out, Init::Zeros)).transpose()?;
        Ok(Self { weight: b.get("weight", (n_out, n), init)?, bias, one })
    }

    /// `classes`: `(b,)` u32. The class after the last stands for none.
    fn forward(&self, classes: &Tensor) -> Result<Tensor> {
        let of_classes = (self.weight.t()? * self.one)?.pad_with_zeros(0, 0, 1)?.contiguous()?;
        let embedded = of_classes.index_select(classes, 0)?;
        Ok(match &self.bias {
            Some(bias) => embedded.broadcast_add(bias)?,
            None => embedded,
        })
    }
}

/// Names and layouts of the parameters are those of EDM's networks.
struct EdmUNet {
    map_noise: Frequencies,
    map_label: Option<Labels>,
    map_layers: [Linear; 2],
    encoder: Vec<Encoder>,
    decoder: Vec<Decoder>,
    family: Family,
    config: SongUNetConfig,
}

impl EdmUNet {
    fn new(family: Family, config: &SongUNetConfig, b: &Builder) -> Result<Self> {
        expect_none(&config.find_faults())?;
        let Some(filter) = config.filter() else { bail!(Alarm, "a fault was not found") };
        let of = (family, config);
        let (noise, emb) = (config.noise_channels(), config.emb_channels());
        if config.augment_dim > 0 {
            b.pp("map_augment").get("weight", (noise, config.augment_dim), Init::Zeros)?;
        }

        let part = |way: &str, level: usize, name: &str| {
            let side = config.img_resolution >> level;
            b.pp(way).pp(format_args!("{side}x{side}_{name}"))
        };
        let levels = 0..config.channel_mult.len();
        let channels = |level: usize| config.model_channels * config.channel_mult[level];
        let attends = |level: usize| config.attn_resolutions.contains(&(config.img_resolution >> level));

        let first = if family == Family::Song { config.model_channels } else { channels(0) };
        let (mut c, mut c_aux) = (first, config.in_channels);
        let stem = family.convolution(config.in_channels, c, 3, &part("enc", 0, "conv"))?;
        let (mut encoder, mut skips) = (vec![Encoder::Stem(stem)], vec![c]);
        for level in levels.clone() {
            if level > 0 {
                let down = Some(Resampling::Down(filter));
                let b = part("enc", level, "down");
                encoder.push(Encoder::Block(Block::new((c, c), down, false, of, &b)?));
                skips.push(c);
                match &*config.encoder_type {
                    "skip" => {
                        expect_filter(filter, &part("enc", level, "aux_down"))?;
                        let conv = family.convolution(c_aux, c, 1, &part("enc", level, "aux_skip"))?;
                        encoder.push(Encoder::Skip(filter, conv));
                    }
                    "residual" => {
                        let b = part("enc", level, "aux_residual");
                        expect_filter(filter, &b)?;
                        let padding = 1 + filter.padding();
                        let conv = family.convolution(c_aux, c, 3, &b)?.with_stride(1, (padding, padding));
                        encoder.push(Encoder::Residual(filter, conv));
                        c_aux = c;
                    }
                    _ => {}
                }
            }
            for i in 0..config.num_blocks {
                let (b, c_out) = (part("enc", level, &format!("block{i}")), channels(level));
                encoder.push(Encoder::Block(Block::new((c, c_out), None, attends(level), of, &b)?));
                skips.push(c_out);
                c = c_out;
            }
        }

        let mut decoder = Vec::new();
        for level in levels.clone().rev() {
            let coarsest = level + 1 == levels.end;
            if coarsest {
                for (name, attention) in [("in0", true), ("in1", false)] {
                    let block = Block::new((c, c), None, attention, of, &part("dec", level, name))?;
                    decoder.push(Decoder::Block(block, false));
                }
            } else {
                let up = Some(Resampling::Up(filter));
                let block = Block::new((c, c), up, false, of, &part("dec", level, "up"))?;
                decoder.push(Decoder::Block(block, false));
            }
            for i in 0..=config.num_blocks {
                let (b, c_out) = (part("dec", level, &format!("block{i}")), channels(level));
                let c_in = c + skips.pop().unwrap_or(0);
                let attention = attends(level) && (family == Family::Dhariwal || i == config.num_blocks);
                decoder.push(Decoder::Block(Block::new((c_in, c_out), None, attention, of, &b)?, true));
                c = c_out;
            }
            let sums = config.decoder_type == "skip";
            if sums && !coarsest {
                expect_filter(filter, &part("dec", level, "aux_up"))?;
                decoder.push(Decoder::Double(filter));
            }
            if sums || level == 0 {
                let [norm, conv] = match family {
                    Family::Song => ["aux_norm", "aux_conv"].map(|name| part("dec", level, name)),
                    Family::Dhariwal => ["out_norm", "out_conv"].map(|name| b.pp(name)),
                };
                let init = family.init_silent(9 * c, 9 * config.out_channels);
                let conv = Conv2d::with_init(c, config.out_channels, 3, init, &conv)?;
                decoder.push(Decoder::Output(family.norm(c, &norm)?, conv));
            }
        }
        Ok(Self {
            map_noise: Frequencies::new(of, b)?,
            map_label: (config.label_dim > 0).then(|| Labels::new(of, &b.pp("map_label"))).transpose()?,
            map_layers: [
                family.linear(noise, emb, &b.pp("map_layer0"))?,
                family.linear(emb, emb, &b.pp("map_layer1"))?,
            ],
            encoder,
            decoder,
            family,
            config: config.clone(),
        })
    }

    /// The embedding of noise level and class, after the last SiLU: `(b, emb)`.
    fn embed(&self, t: &Tensor, classes: Option<&Tensor>) -> Result<Tensor> {
        let song = self.family == Family::Song;
        let labels = with_classes(self.map_label.as_ref(), classes)?
            .map(|(labels, classes)| labels.forward(classes))
            .transpose()?;
        let with_labels = |x: Tensor, here: bool| match &labels {
            Some(labels) if here => x + labels,
            _ => Ok(x),
        };
        let [first, second] = &self.map_layers;
        let levels = with_labels(sinusoids(t, &self.map_noise.get(t.device())?, song)?, song)?;
        let emb = second.forward(&kernels::silu(&first.forward(&levels)?)?)?;
        kernels::silu(&with_labels(emb, !song)?)
    }

    fn forward_with(
        &self,
        x: &Tensor,
        t: &Tensor,
        classes: Option<&Tensor>,
        dropout: Option<&Dropout>,
    ) -> Result<Tensor> {
        expect_images(x, self.config.in_channels, self.config.size_multiple())?;
        let emb = self.embed(t, classes)?;
        let (given, mut x) = (x.dtype(), to_compute(x)?);
        let (mut aux, mut skips) = (x.clone(), Vec::new());
        for part in &self.encoder {
            x = match part {
                Encoder::Stem(conv) => conv.forward(&x)?,
                Encoder::Block(block) => block.forward(&x, &emb, dropout)?,
                Encoder::Skip(filter, conv) => {
                    skips.pop();
                    aux = filter.halve(&aux, filter.padding())?;
                    (x + conv.forward(&aux)?)?
                }
                Encoder::Residual(filter, conv) => {
                    skips.pop();
                    // The convolution's output has the filter's padding.
                    aux = ((x + filter.halve(&conv.forward(&aux)?, 0)?)? / SQRT_2)?;
                    aux.clone()
                }
            };
            skips.push(x.clone());
        }
        let mut out: Option<Tensor> = None;
        for part in &self.decoder {
            match part {
                Decoder::Block(block, with_skip) => {
                    if *with_skip {
                        let Some(skip) = skips.pop() else { bail!(Alarm, "more blocks up than images") };
                        x = Tensor::cat(&[&x, &skip], D::Minus1)?;
                    }
                    x = block.forward(&x, &emb, dropout)?;
                }
                Decoder::Double(filter) => out = out.map(|out| filter.double(&out)).transpose()?,
                Decoder::Output(norm, conv) => {
                    let added = conv.forward(&norm.forward(&x, true)?)?;
                    out = Some(match out {
                        Some(out) => (out + added)?,
                        None => added,
                    });
                }
            }
        }
        let Some(out) = out else { bail!(Alarm, "a U-Net without output") };
        Ok(out.to_dtype(given)?)
    }
}

impl DenoiserNetwork for EdmUNet {
    /// Height and width are multiples of [`SongUNetConfig::size_multiple`].
    fn forward(&self, x: &Tensor, t: &Tensor, classes: Option<&Tensor>) -> Result<Tensor> {
        self.forward_with(x, t, classes, None)
    }

    /// With the configuration's dropout.
    fn forward_in_training(
        &self,
        x: &Tensor,
        t: &Tensor,
        classes: Option<&Tensor>,
        drawn: (u64, &[u64]),
    ) -> Result<Tensor> {
        self.forward_with(x, t, classes, Dropout::new(self.config.dropout, drawn).as_ref())
    }

    fn macs(&self, height: usize, width: usize) -> u64 {
        let mut positions = height * width;
        let mut total: u64 = self.map_layers.iter().map(|linear| linear.macs(1)).sum();
        if let Some(labels) = &self.map_label {
            total += labels.weight.elem_count() as u64;
        }
        for part in &self.encoder {
            let (macs, left) = match part {
                Encoder::Block(block) => block.macs(positions),
                Encoder::Stem(conv) | Encoder::Skip(_, conv) => (conv.macs(positions), positions),
                // Before it is halved.
                Encoder::Residual(_, conv) => (conv.macs(4 * positions), positions),
            };
            (total, positions) = (total + macs, left);
        }
        for part in &self.decoder {
            let (macs, grown) = match part {
                Decoder::Block(block, _) => block.macs(positions),
                Decoder::Double(_) => (0, positions),
                Decoder::Output(_, conv) => (conv.macs(positions), positions),
            };
            (total, positions) = (total + macs, grown);
        }
        total
    }
}

impl DenoiserArchitecture for SongUNetConfig {
    fn image_shape(&self) -> Result<(usize, usize, usize)> {
        image_shape((self.img_resolution, self.img_resolution), self.in_channels, self.out_channels)
    }

    fn num_classes(&self) -> Option<usize> {
        self.classes()
    }

    fn predicts_variance(&self) -> bool {
        self.out_channels == 2 * self.in_channels
    }

    fn faults(&self) -> Vec<String> {
        self.find_faults()
    }

    fn build(&self, b: &Builder) -> Result<Box<dyn DenoiserNetwork>> {
        Ok(Box::new(EdmUNet::new(Family::Song, self, b)?))
    }
}

impl DenoiserArchitecture for DhariwalUNetConfig {
    fn image_shape(&self) -> Result<(usize, usize, usize)> {
        SongUNetConfig::from(self).image_shape()
    }

    fn num_classes(&self) -> Option<usize> {
        SongUNetConfig::from(self).classes()
    }

    fn predicts_variance(&self) -> bool {
        self.out_channels == 2 * self.in_channels
    }

    fn faults(&self) -> Vec<String> {
        SongUNetConfig::from(self).find_faults()
    }

    fn build(&self, b: &Builder) -> Result<Box<dyn DenoiserNetwork>> {
        Ok(Box::new(EdmUNet::new(Family::Dhariwal, &SongUNetConfig::from(self), b)?))
    }
}
