//! The same work with only the ops of candle-core and candle-nn, in NCHW, as one would write it with them.
//!
//! Networks are functions of named weights. The U-Net has only what the measured configurations need.

use std::{hint::black_box, path::Path};

use candle_core::{D, Device, Result as CandleResult, Tensor, Var};
use candle_nn::{BatchNorm, GroupNorm, Module, ModuleT, ops};
use proxyset::{
    diffusion::DiffusionModel,
    nn::{Architecture, Classifier, DenoiserConfig, Params, UNetConfig},
};

use super::{Attack, Case, Descent, Named, Result, Work, inputs, take};

pub fn prepare(dir: &Path, work: Work, device: &Device) -> Result<Box<dyn Case>> {
    let mut inputs = inputs(dir, device)?;
    let x = take(&mut inputs, "x")?;
    Ok(match work {
        Work::Conv2d { stride, padding, backward } => {
            let operand = |t: Tensor| -> CandleResult<Tensor> {
                Ok(if backward { Var::from_tensor(&t)?.as_tensor().clone() } else { t })
            };
            let (weight, bias) = (take(&mut inputs, "weight")?, take(&mut inputs, "bias")?);
            let weights = Named::from([("weight".into(), operand(weight)?), ("bias".into(), operand(bias)?)]);
            let x = operand(x)?;
            Box::new(Forward {
                output: "y",
                forward: move || conv(&Weights::new(&weights), &x, stride, (padding, padding)),
                loss: backward.then(|| -> Loss { Box::new(|y| Ok(y.clone())) }),
            })
        }
        Work::Denoise { t } => {
            let model = DiffusionModel::load(dir, None, device)?;
            let config = unet_config(&model)?;
            let weights = frozen(&variables(model.params())?);
            let (t, labels) = (steps(t, &x)?, inputs.remove("labels"));
            Box::new(Forward {
                output: "eps",
                forward: move || unet(&Weights::new(&weights), &config, &x, &t, labels.as_ref()),
                loss: None,
            })
        }
        Work::Sample { .. } => return Err("sampling is not written in stock candle".into()),
        Work::DenoiseGradients { t, .. } => {
            let model = DiffusionModel::load(dir, None, device)?;
            let config = unet_config(&model)?;
            let weights = tracked(&variables(model.params())?);
            let (t, labels, noise) = (steps(t, &x)?, inputs.remove("labels"), take(&mut inputs, "noise")?);
            Box::new(Forward {
                output: "eps",
                forward: move || unet(&Weights::new(&weights), &config, &x, &t, labels.as_ref()),
                loss: Some(Box::new(move |eps| (eps - &noise)?.sqr()?.mean_all())),
            })
        }
        Work::Logits => {
            let classifier = Classifier::load(dir, device)?;
            let weights = frozen(&variables(classifier.params())?);
            let architecture = classifier.config().architecture.clone();
            Box::new(Forward {
                output: "logits",
                forward: move || logits(&architecture, &Weights::new(&weights), &x),
                loss: None,
            })
        }
        Work::PgdStep { attack, sgd, .. } => {
            let classifier = Classifier::load(dir, device)?;
            let named = variables(classifier.params())?;
            let vars: Vec<_> = named.iter().map(|(_, var)| var.clone()).collect();
            let momenta = vars.iter().map(|var| var.zeros_like()).collect::<CandleResult<_>>()?;
            Box::new(PgdStep {
                architecture: classifier.config().architecture.clone(),
                tracked: tracked(&named),
                frozen: frozen(&named),
                labels: take(&mut inputs, "labels")?,
                vars,
                momenta,
                x,
                attack,
                sgd,
            })
        }
    })
}

type Loss = Box<dyn Fn(&Tensor) -> CandleResult<Tensor>>;

/// A network's output and, if there is a loss, the gradients of its sum. Only the output is compared.
struct Forward<F> {
    output: &'static str,
    forward: F,
    loss: Option<Loss>,
}

impl<F: Fn() -> CandleResult<Tensor>> Case for Forward<F> {
    fn run(&mut self) -> Result<()> {
        let output = (self.forward)()?;
        if let Some(loss) = &self.loss {
            black_box(loss(&output)?.backward()?);
        }
        black_box(output);
        Ok(())
    }

    fn outputs(&mut self) -> Result<Named> {
        Ok(Named::from([(self.output.into(), (self.forward)()?)]))
    }
}

struct PgdStep {
    architecture: Architecture,
    tracked: Named,
    frozen: Named,
    vars: Vec<Var>,
    momenta: Vec<Tensor>,
    x: Tensor,
    labels: Tensor,
    attack: Attack,
    sgd: Descent,
}

impl Case for PgdStep {
    fn run(&mut self) -> Result<()> {
        let Attack { epsilon, step_size, steps } = self.attack;
        let mut x_adv = self.x.clone();
        for _ in 0..steps {
            let var = Var::from_tensor(&x_adv)?;
            let logits = logits(&self.architecture, &Weights::new(&self.frozen), var.as_tensor())?;
            let grads = candle_nn::loss::cross_entropy(&logits, &self.labels)?.backward()?;
            let gradient = grads.get(&var).ok_or("the images have no gradient")?;
            let moved = (x_adv + (gradient.sign()? * step_size)?)?;
            let in_ball = moved.maximum(&(&self.x - epsilon)?)?.minimum(&(&self.x + epsilon)?)?;
            x_adv = in_ball.clamp(0f32, 1f32)?;
        }
        let logits = logits(&self.architecture, &Weights::new(&self.tracked), &x_adv)?;
        let grads = candle_nn::loss::cross_entropy(&logits, &self.labels)?.backward()?;
        for (var, momentum) in self.vars.iter().zip(&mut self.momenta) {
            let Some(gradient) = grads.get(var) else { continue };
            let weight = var.as_detached_tensor();
            let gradient = (gradient + (&weight * self.sgd.weight_decay)?)?;
            *momentum = ((&*momentum * self.sgd.momentum)? + gradient)?.detach();
            var.set(&(weight - (&*momentum * self.sgd.learning_rate)?)?)?;
        }
        Ok(())
    }

    fn outputs(&mut self) -> Result<Named> {
        Ok(Named::from([(
            "logits".into(),
            logits(&self.architecture, &Weights::new(&self.frozen), &self.x)?,
        )]))
    }
}

/// A variable for each tensor that the network has in files.
fn variables(params: &Params) -> Result<Vec<(String, Var)>> {
    let named = params.named(|var| Ok(var.as_detached_tensor()))?;
    Ok(named.iter().map(|(name, t)| Ok((name.clone(), Var::from_tensor(t)?))).collect::<CandleResult<_>>()?)
}

fn tracked(vars: &[(String, Var)]) -> Named {
    vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect()
}

fn frozen(vars: &[(String, Var)]) -> Named {
    vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect()
}

fn steps(t: usize, x: &Tensor) -> CandleResult<Tensor> {
    Tensor::full(t as f32, x.dim(0)?, x.device())
}

/// The weights of a part of a network.
#[derive(Clone)]
struct Weights<'a> {
    named: &'a Named,
    prefix: String,
}

impl<'a> Weights<'a> {
    fn new(named: &'a Named) -> Self {
        Self { named, prefix: String::new() }
    }

    fn pp(&self, name: &str) -> Self {
        Self { named: self.named, prefix: format!("{}{name}.", self.prefix) }
    }

    fn find(&self, name: &str) -> Option<&'a Tensor> {
        self.named.get(&format!("{}{name}", self.prefix))
    }

    fn get(&self, name: &str) -> CandleResult<&'a Tensor> {
        self.find(name)
            .ok_or_else(|| candle_core::Error::Msg(format!("there is no weight '{}{name}'", self.prefix)))
    }

    fn has(&self, part: &str) -> bool {
        self.find(&format!("{part}.weight")).is_some()
    }
}

fn conv(w: &Weights, x: &Tensor, stride: usize, (before, after): (usize, usize)) -> CandleResult<Tensor> {
    let weight = w.get("weight")?;
    let y = if before == after {
        x.conv2d(weight, before, stride, 1, 1)?
    } else {
        let x = x.pad_with_zeros(2, before, after)?.pad_with_zeros(3, before, after)?;
        x.conv2d(weight, 0, stride, 1, 1)?
    };
    match w.find("bias") {
        Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?),
        None => Ok(y),
    }
}

/// `x`: `(…, n_in)`.
fn linear(w: &Weights, x: &Tensor) -> CandleResult<Tensor> {
    let weight = w.get("weight")?;
    let mut dims = x.dims().to_vec();
    dims.pop();
    dims.push(weight.dim(0)?);
    let y = x.reshape(((), x.dim(D::Minus1)?))?.matmul(&weight.t()?)?;
    y.broadcast_add(w.get("bias")?)?.reshape(dims)
}

/// Groups and epsilon.
#[derive(Clone, Copy)]
struct Groups(usize, f64);

fn group_norm(w: &Weights, x: &Tensor, Groups(groups, epsilon): Groups) -> CandleResult<Tensor> {
    let (weight, bias) = (w.get("weight")?.clone(), w.get("bias")?.clone());
    GroupNorm::new(weight, bias, x.dim(1)?, groups, epsilon)?.forward(x)
}

fn residual_block(w: &Weights, x: &Tensor, temb: &Tensor, groups: Groups) -> CandleResult<Tensor> {
    let h = ops::silu(&group_norm(&w.pp("norm1"), x, groups)?)?;
    let h = conv(&w.pp("conv1"), &h, 1, (1, 1))?;
    let temb = linear(&w.pp("time_emb_proj"), temb)?.unsqueeze(2)?.unsqueeze(3)?;
    let h = ops::silu(&group_norm(&w.pp("norm2"), &h.broadcast_add(&temb)?, groups)?)?;
    let h = conv(&w.pp("conv2"), &h, 1, (1, 1))?;
    if w.has("conv_shortcut") { conv(&w.pp("conv_shortcut"), x, 1, (0, 0))? + h } else { x + h }
}

fn attention(w: &Weights, x: &Tensor, head_dim: Option<usize>, groups: Groups) -> CandleResult<Tensor> {
    let (b, c, height, width) = x.dims4()?;
    let positions = height * width;
    let normed = group_norm(&w.pp("group_norm"), x, groups)?;
    let normed = normed.reshape((b, c, positions))?.transpose(1, 2)?.contiguous()?;
    let head_dim = head_dim.unwrap_or(c);
    let heads = |name: &str| -> CandleResult<Tensor> {
        let x = linear(&w.pp(name), &normed)?.reshape((b, positions, c / head_dim, head_dim))?;
        x.transpose(1, 2)?.contiguous()
    };
    let scores = (heads("to_q")?.matmul(&heads("to_k")?.t()?)? / (head_dim as f64).sqrt())?;
    let mixed = ops::softmax(&scores, D::Minus1)?.matmul(&heads("to_v")?)?;
    let mixed = mixed.transpose(1, 2)?.reshape((b, positions, c))?;
    let out = linear(&w.pp("to_out.0"), &mixed)?.transpose(1, 2)?.reshape((b, c, height, width))?;
    x + out
}

/// A residual block and, if there is one, its attention.
fn unet_layer(
    w: &Weights,
    layer: usize,
    config: &UNetConfig,
    x: &Tensor,
    temb: &Tensor,
) -> CandleResult<Tensor> {
    let groups = Groups(config.norm_num_groups, config.norm_eps);
    let x = residual_block(&w.pp(&format!("resnets.{layer}")), x, temb, groups)?;
    let w = w.pp(&format!("attentions.{layer}"));
    if w.has("group_norm") { attention(&w, &x, config.attention_head_dim, groups) } else { Ok(x) }
}

fn unet_config(model: &DiffusionModel) -> Result<UNetConfig> {
    match model.config() {
        DenoiserConfig::UNet(config) => Ok(config.clone()),
        other => Err(format!("no case has a {}", other.tag()).into()),
    }
}

/// `diffusers`' UNet2DModel.
fn unet(
    w: &Weights,
    config: &UNetConfig,
    x: &Tensor,
    t: &Tensor,
    labels: Option<&Tensor>,
) -> CandleResult<Tensor> {
    let time = w.pp("time_embedding");
    let temb = sinusoids(t, config)?;
    let mut temb = linear(&time.pp("linear_2"), &ops::silu(&linear(&time.pp("linear_1"), &temb)?)?)?;
    if let Some(labels) = labels {
        temb = (temb + w.get("class_embedding.weight")?.index_select(labels, 0)?)?;
    }
    let temb = ops::silu(&temb)?;

    let mut x = conv(&w.pp("conv_in"), x, 1, (1, 1))?;
    let mut skips = vec![x.clone()];
    for block in 0..config.block_out_channels.len() {
        let w = w.pp(&format!("down_blocks.{block}"));
        for layer in 0..config.layers_per_block {
            x = unet_layer(&w, layer, config, &x, &temb)?;
            skips.push(x.clone());
        }
        if w.has("downsamplers.0.conv") {
            x = conv(&w.pp("downsamplers.0.conv"), &x, 2, (config.downsample_padding, 1))?;
            skips.push(x.clone());
        }
    }
    let mid = w.pp("mid_block");
    for layer in 0..2 {
        x = unet_layer(&mid, layer, config, &x, &temb)?;
    }
    for block in 0..config.block_out_channels.len() {
        let w = w.pp(&format!("up_blocks.{block}"));
        for (layer, skip) in (0..=config.layers_per_block).map_while(|layer| Some((layer, skips.pop()?))) {
            x = unet_layer(&w, layer, config, &Tensor::cat(&[&x, &skip], 1)?, &temb)?;
        }
        if w.has("upsamplers.0.conv") {
            let (.., height, width) = x.dims4()?;
            x = x.upsample_nearest2d(2 * height, 2 * width)?;
            x = conv(&w.pp("upsamplers.0.conv"), &x, 1, (1, 1))?;
        }
    }
    let groups = Groups(config.norm_num_groups, config.norm_eps);
    let x = ops::silu(&group_norm(&w.pp("conv_norm_out"), &x, groups)?)?;
    conv(&w.pp("conv_out"), &x, 1, (1, 1))
}

fn sinusoids(t: &Tensor, config: &UNetConfig) -> CandleResult<Tensor> {
    let half = config.block_out_channels[0] / 2;
    let rate = -(10_000f64.ln()) / (half as f64 - config.freq_shift);
    let frequencies: Vec<_> = (0..half).map(|i| (i as f64 * rate).exp() as f32).collect();
    let angles = t.unsqueeze(1)?.matmul(&Tensor::from_vec(frequencies, (1, half), t.device())?)?;
    let (sin, cos) = (angles.sin()?, angles.cos()?);
    if config.flip_sin_to_cos { Tensor::cat(&[cos, sin], 1) } else { Tensor::cat(&[sin, cos], 1) }
}

fn logits(architecture: &Architecture, w: &Weights, x: &Tensor) -> CandleResult<Tensor> {
    match architecture {
        Architecture::Resnet(config) => resnet(w, &config.blocks, x),
        Architecture::SmallCnn(config) => small_cnn(w, config.channels.len(), Groups(config.groups, 1e-5), x),
        other => candle_core::bail!("no case has a {}", other.tag()),
    }
}

fn small_cnn(w: &Weights, stages: usize, groups: Groups, x: &Tensor) -> CandleResult<Tensor> {
    let layer = |w: Weights, x: &Tensor, stride: usize| {
        ops::silu(&group_norm(&w.pp("norm"), &conv(&w.pp("conv"), x, stride, (1, 1))?, groups)?)
    };
    let mut x = layer(w.pp("stem"), &x.affine(2.0, -1.0)?, 1)?;
    for stage in 0..stages {
        let w = w.pp(&format!("stages.{stage}"));
        x = layer(w.pp("0"), &x, if stage == 0 { 1 } else { 2 })?;
        x = layer(w.pp("1"), &x, 1)?;
    }
    linear(&w.pp("fc"), &x.mean((2, 3))?)
}

/// ResNet in the form for 32 × 32 images, under RobustBench's names, with the statistics of the batch.
fn resnet(w: &Weights, blocks: &[usize], x: &Tensor) -> CandleResult<Tensor> {
    let mut x = batch_norm(&w.pp("bn1"), &conv(&w.pp("conv1"), x, 1, (1, 1))?)?.relu()?;
    for (stage, &blocks) in blocks.iter().enumerate() {
        for block in 0..blocks {
            let w = w.pp(&format!("layer{}.{block}", stage + 1));
            let stride = if stage > 0 && block == 0 { 2 } else { 1 };
            let h = batch_norm(&w.pp("bn1"), &conv(&w.pp("conv1"), &x, stride, (1, 1))?)?.relu()?;
            let h = batch_norm(&w.pp("bn2"), &conv(&w.pp("conv2"), &h, 1, (1, 1))?)?;
            let shortcut = w.pp("shortcut");
            if shortcut.has("0") {
                x = batch_norm(&shortcut.pp("1"), &conv(&shortcut.pp("0"), &x, stride, (0, 0))?)?;
            }
            x = (x + h)?.relu()?;
        }
    }
    linear(&w.pp("linear"), &x.mean((2, 3))?)
}

fn batch_norm(w: &Weights, x: &Tensor) -> CandleResult<Tensor> {
    let channels = x.dim(1)?;
    let running = |value: f32| Tensor::full(value, channels, x.device());
    let (weight, bias) = (w.get("weight")?.clone(), w.get("bias")?.clone());
    BatchNorm::new(channels, running(0.0)?, running(1.0)?, weight, bias, 1e-5)?.forward_t(x, true)
}
