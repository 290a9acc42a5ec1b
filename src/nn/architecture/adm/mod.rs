//! The U-Net of improved-diffusion and guided-diffusion (Dhariwal & Nichol 2021): OpenAI's `UNetModel`.

mod config;

use candle_core::{D, Device, Tensor};
pub use config::AdmConfig;
use config::GROUPS;

use super::parts::{
    Dropout, Filter, QkvAttention, QkvOrder, Resampling, ResnetBlock, expect_images, image_shape, sinusoids,
    with_classes,
};
use crate::{
    Result, kernels,
    nn::{
        layers::{Conv2d, Embedding, GroupNorm, Linear, to_compute},
        network::{DenoiserArchitecture, DenoiserNetwork, expect_none},
        params::{Builder, Init},
    },
};

/// Added to the variance in all norms.
const EPSILON: f64 = 1e-5;

/// A layer of a block.
enum Layer {
    Residual(ResnetBlock),
    Attention(QkvAttention),
    Convolution(Conv2d),
    /// A convolution that halves the image.
    Strided(Conv2d),
    Resampling(Resampling),
}

impl Layer {
    fn residual(
        c_in: usize,
        c_out: usize,
        resampling: Option<Resampling>,
        config: &AdmConfig,
        b: &Builder,
    ) -> Result<Self> {
        let shape = kernels::ResnetBlock {
            c_in,
            c_out,
            time_dim: config.time_dim(),
            groups: [GROUPS; 2],
            epsilon: EPSILON,
            scale_shift: config.use_scale_shift_norm,
            shortcut: c_in != c_out,
            output_scale: 1.0,
        };
        let names =
            ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection"];
        let init = |name: &str, fan_in, _| match name {
            "out_layers.3" => [Init::Zeros; 2],
            _ => [Init::FanIn(fan_in); 2],
        };
        ResnetBlock::new(shape, resampling, names, &init, b).map(Self::Residual)
    }

    fn attention(c: usize, up: bool, config: &AdmConfig, b: &Builder) -> Result<Self> {
        let layer = |name: &str, n_out: usize, init: Init| -> Result<[Tensor; 2]> {
            let b = b.pp(name);
            Ok([b.get("weight", (n_out, c, 1), init)?, b.get("bias", n_out, init)?])
        };
        Ok(Self::Attention(QkvAttention {
            norm: GroupNorm::new(GROUPS, c, EPSILON, &b.pp("norm"))?,
            qkv: layer("qkv", 3 * c, Init::FanIn(c))?,
            proj: layer("proj_out", c, Init::Zeros)?,
            heads: config.heads(c, up),
            order: if config.use_new_attention_order { QkvOrder::HeadsSecond } else { QkvOrder::HeadsFirst },
            output_scale: 1.0,
        }))
    }

    /// The layer that halves images of `c` channels.
    fn halving(c: usize, config: &AdmConfig, b: &Builder) -> Result<Self> {
        let down = Resampling::Down(Filter::Box);
        match (config.resblock_updown, config.conv_resample) {
            (true, _) => Self::residual(c, c, Some(down), config, b),
            (false, true) => Ok(Self::Strided(Conv2d::new(c, c, 3, &b.pp("op"))?.with_stride(2, (1, 1)))),
            (false, false) => Ok(Self::Resampling(down)),
        }
    }

    /// The layers that double images of `c` channels.
    fn doubling(c: usize, config: &AdmConfig, b: &Builder) -> Result<Vec<Self>> {
        let up = Resampling::Up(Filter::Box);
        if config.resblock_updown {
            return Ok(vec![Self::residual(c, c, Some(up), config, b)?]);
        }
        let mut layers = vec![Self::Resampling(up)];
        if config.conv_resample {
            layers.push(Self::Convolution(Conv2d::new(c, c, 3, &b.pp("conv"))?));
        }
        Ok(layers)
    }

    fn forward(&self, x: &Tensor, temb: &Tensor, dropout: Option<&Dropout>) -> Result<Tensor> {
        match self {
            Self::Residual(block) => block.forward(x, temb, dropout),
            Self::Attention(attention) => attention.forward(x),
            Self::Convolution(conv) | Self::Strided(conv) => conv.forward(x),
            Self::Resampling(resampling) => resampling.apply(x),
        }
    }

    /// The multiply-adds, and the resulting positions.
    fn macs(&self, positions: usize) -> (u64, usize) {
        match self {
            Self::Residual(block) => block.macs(positions),
            Self::Attention(attention) => (attention.macs(positions), positions),
            Self::Convolution(conv) => (conv.macs(positions), positions),
            Self::Strided(conv) => (conv.macs(positions / 4), positions / 4),
            Self::Resampling(resampling) => (0, resampling.positions(positions)),
        }
    }
}

/// Names and layouts of the parameters are those of OpenAI's `UNetModel`.
struct Adm {
    time_embed: [Linear; 2],
    label_emb: Option<Embedding>,
    input_blocks: Vec<Vec<Layer>>,
    middle_block: Vec<Layer>,
    output_blocks: Vec<Vec<Layer>>,
    norm: GroupNorm,
    conv: Conv2d,
    config: AdmConfig,
}

impl Adm {
    fn new(config: &AdmConfig, b: &Builder) -> Result<Self> {
        expect_none(&config.faults())?;
        let (levels, time_dim) = (config.channel_mult.len(), config.time_dim());
        let time = b.pp("time_embed");
        let time_embed = [
            Linear::new(config.model_channels, time_dim, &time.pp(0))?,
            Linear::new(time_dim, time_dim, &time.pp(2))?,
        ];
        let label_emb = config
            .num_classes
            .map(|classes| Embedding::new(classes, time_dim, &b.pp("label_emb")))
            .transpose()?;

        let inputs = b.pp("input_blocks");
        let first = config.channels(0);
        let stem = Conv2d::new(config.in_channels, first, 3, &inputs.pp(0).pp(0))?;
        let mut input_blocks = vec![vec![Layer::Convolution(stem)]];
        let (mut c, mut skips) = (first, vec![first]);
        for level in 0..levels {
            for _ in 0..config.num_res_blocks {
                let (b, c_out) = (inputs.pp(input_blocks.len()), config.channels(level));
                let mut block = vec![Layer::residual(c, c_out, None, config, &b.pp(0))?];
                if config.attends(level) {
                    block.push(Layer::attention(c_out, false, config, &b.pp(1))?);
                }
                c = c_out;
                skips.push(c);
                input_blocks.push(block);
            }
            if level + 1 < levels {
                let b = inputs.pp(input_blocks.len()).pp(0);
                input_blocks.push(vec![Layer::halving(c, config, &b)?]);
                skips.push(c);
            }
        }

        let middle = b.pp("middle_block");
        let middle_block = vec![
            Layer::residual(c, c, None, config, &middle.pp(0))?,
            Layer::attention(c, false, config, &middle.pp(1))?,
            Layer::residual(c, c, None, config, &middle.pp(2))?,
        ];

        let (outputs, mut output_blocks) = (b.pp("output_blocks"), Vec::new());
        for level in (0..levels).rev() {
            for i in 0..=config.num_res_blocks {
                let (b, c_out) = (outputs.pp(output_blocks.len()), config.channels(level));
                let c_in = c + skips.pop().unwrap_or(0);
                let mut block = vec![Layer::residual(c_in, c_out, None, config, &b.pp(0))?];
                if config.attends(level) {
                    block.push(Layer::attention(c_out, true, config, &b.pp(1))?);
                }
                if level > 0 && i == config.num_res_blocks {
                    let b = b.pp(block.len());
                    block.extend(Layer::doubling(c_out, config, &b)?);
                }
                c = c_out;
                output_blocks.push(block);
            }
        }
        let out = b.pp("out");
        Ok(Self {
            time_embed,
            label_emb,
            input_blocks,
            middle_block,
            output_blocks,
            norm: GroupNorm::new(GROUPS, c, EPSILON, &out.pp(0))?,
            conv: Conv2d::with_init(first, config.out_channels, 3, [Init::Zeros; 2], &out.pp(2))?,
            config: config.clone(),
        })
    }

    fn forward_with(
        &self,
        x: &Tensor,
        t: &Tensor,
        classes: Option<&Tensor>,
        dropout: Option<&Dropout>,
    ) -> Result<Tensor> {
        expect_images(x, self.config.in_channels, self.config.size_multiple())?;
        let temb = self.embed(t, classes)?;
        let (given, mut x) = (x.dtype(), to_compute(x)?);
        let through = |x: Tensor, block: &[Layer]| {
            block.iter().try_fold(x, |x, layer| layer.forward(&x, &temb, dropout))
        };
        let mut skips = Vec::new();
        for block in &self.input_blocks {
            x = through(x, block)?;
            skips.push(x.clone());
        }
        x = through(x, &self.middle_block)?;
        for (block, skip) in self.output_blocks.iter().zip(skips.iter().rev()) {
            x = through(Tensor::cat(&[&x, skip], D::Minus1)?, block)?;
        }
        Ok(self.conv.forward(&self.norm.forward(&x, true)?)?.to_dtype(given)?)
    }

    /// The embedding of step and class after the SiLU with which all residual blocks begin: `(b, time)`.
    fn embed(&self, t: &Tensor, classes: Option<&Tensor>) -> Result<Tensor> {
        let [first, second] = &self.time_embed;
        let steps = sinusoids(t, &frequencies(self.config.model_channels / 2, t.device())?, false)?;
        let mut temb = second.forward(&kernels::silu(&first.forward(&steps)?)?)?;
        if let Some((embedding, classes)) = with_classes(self.label_emb.as_ref(), classes)? {
            temb = (temb + embedding.forward(classes)?)?;
        }
        kernels::silu(&temb)
    }
}

/// Frequencies from 1 down to nearly 1/10000, `(half,)`, rounded as the original rounds them: a step of 1000 makes of
/// a difference of 1e-7 one of 1e-4.
fn frequencies(half: usize, device: &Device) -> Result<Tensor> {
    let exponent = |i: usize| -(10_000f64.ln() as f32) * i as f32 / half as f32;
    let frequencies: Vec<f32> = (0..half).map(|i| f64::from(exponent(i)).exp() as f32).collect();
    Ok(Tensor::from_vec(frequencies, half, device)?)
}

impl DenoiserNetwork for Adm {
    /// Height and width are multiples of [`AdmConfig::size_multiple`].
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
        let embedding: u64 = self.time_embed.iter().map(|linear| linear.macs(1)).sum();
        let blocks = self.input_blocks.iter().chain([&self.middle_block]).chain(&self.output_blocks);
        let (macs, positions) =
            blocks.flatten().fold((embedding, height * width), |(macs, positions), layer| {
                let (layer, positions) = layer.macs(positions);
                (macs + layer, positions)
            });
        macs + self.conv.macs(positions)
    }
}

impl DenoiserArchitecture for AdmConfig {
    fn image_shape(&self) -> Result<(usize, usize, usize)> {
        image_shape((self.image_size, self.image_size), self.in_channels, self.out_channels)
    }

    fn num_classes(&self) -> Option<usize> {
        self.num_classes
    }

    fn predicts_variance(&self) -> bool {
        self.out_channels == 2 * self.in_channels
    }

    fn faults(&self) -> Vec<String> {
        self.find_faults()
    }

    fn build(&self, b: &Builder) -> Result<Box<dyn DenoiserNetwork>> {
        Ok(Box::new(Adm::new(self, b)?))
    }
}
