//! The work on proxyset's own networks and kernels.

use std::{hint::black_box, ops::Range, path::Path};

use candle_core::{Device, Tensor, Var, backprop::GradStore};
use proxyset::{
    attack::{Epsilon, Norm, Pgd, PgdConfig, PgdLoss, Threat},
    diffusion::{
        ClassConditioning, DiffusionModel,
        sampler::{Plan, SamplerConfig, SamplerKind, Start, sample},
    },
    kernels,
    nn::{
        BatchNormMode, Classifier, ClassifierNetwork, DenoiserNetwork, Params,
        optim::{Optimizer, Sgd, SgdConfig},
    },
    objective::{Targets, pgd_at},
};
use rayon::prelude::*;

use super::{Attack, Case, Descent, Named, Result, Work, inputs, take};

pub fn prepare(dir: &Path, work: Work, device: &Device) -> Result<Box<dyn Case>> {
    let mut inputs = inputs(dir, device)?;
    let x = nhwc(&take(&mut inputs, "x")?)?;
    Ok(match work {
        Work::Conv2d { stride, padding, backward } => {
            let grad = nhwc(&take(&mut inputs, "grad")?)?;
            let operand = |t: Tensor| -> Result<Tensor> {
                Ok(if backward { Var::from_tensor(&t)?.as_tensor().clone() } else { t })
            };
            let [weight, bias] = [take(&mut inputs, "weight")?, take(&mut inputs, "bias")?];
            let (x, weight, bias) = (operand(x)?, operand(weight)?, operand(bias)?);
            Box::new(Conv2d { x, weight, bias, grad, stride, padding: (padding, padding), backward })
        }
        Work::Denoise { t } => {
            let model = DiffusionModel::load(dir, None, device)?;
            Box::new(Denoise { model, x, t, labels: inputs.remove("labels") })
        }
        Work::Sample { steps } => {
            let model = DiffusionModel::load(dir, None, device)?;
            let sampler = SamplerConfig { kind: SamplerKind::Ddim, steps, ..model.scheduler().sampler() };
            let plan = Plan::new(&sampler, &model.scheduler().process()?)?;
            let conditioning =
                inputs.remove("labels").map_or(ClassConditioning::None, ClassConditioning::Classes);
            Box::new(Sample { model, sampler, plan, conditioning, x })
        }
        Work::DenoiseGradients { t, parts } => {
            let model = DiffusionModel::load(dir, None, device)?;
            Box::new(DenoiseGradients {
                network: model.tracked()?,
                params: model.params().clone(),
                t: Tensor::full(t as f32, x.dim(0)?, device)?,
                noise: nhwc(&take(&mut inputs, "noise")?)?,
                labels: inputs.remove("labels"),
                x,
                parts,
            })
        }
        Work::Logits => Box::new(Logits { classifier: Classifier::load(dir, device)?, x }),
        Work::PgdStep { attack, sgd, parts } => {
            let classifier = Classifier::load(dir, device)?;
            let Attack { epsilon, step_size, steps } = attack;
            let Descent { learning_rate, momentum, weight_decay } = sgd;
            Box::new(PgdStep {
                tracked: classifier.tracked()?,
                frozen: classifier.params().frozen(|b| classifier.config().architecture.build(b))?,
                params: classifier.params().clone(),
                labels: take(&mut inputs, "labels")?,
                attack: Pgd {
                    threat: Threat::new(Norm::Linf, Epsilon::try_from(epsilon)?)?,
                    config: PgdConfig { steps, step_size, random_start: false, loss: PgdLoss::Ce },
                    seed: 0,
                },
                optimizer: Sgd::new(SgdConfig { momentum, nesterov: false, weight_decay }),
                learning_rate,
                x,
                parts,
            })
        }
    })
}

fn nhwc(images: &Tensor) -> candle_core::Result<Tensor> {
    images.permute((0, 2, 3, 1))?.contiguous()
}

fn nchw(images: &Tensor) -> candle_core::Result<Tensor> {
    images.permute((0, 3, 1, 2))?.contiguous()
}

/// The gradients of the sum of the contributions of all parts of a batch, computed in parallel and added in order,
/// as the training stages do.
fn gradients(
    params: &Params,
    items: usize,
    parts: usize,
    contribution: impl Fn(Range<usize>) -> proxyset::Result<Tensor> + Sync,
) -> proxyset::Result<GradStore> {
    let one = |part: usize| -> proxyset::Result<GradStore> {
        Ok(contribution(items * part / parts..items * (part + 1) / parts)?.backward()?)
    };
    let mut parts = (0..parts).into_par_iter().map(one).collect::<proxyset::Result<Vec<_>>>()?.into_iter();
    let mut sum = parts.next().expect("a batch has a part");
    for grads in parts {
        for (_, var) in params.vars() {
            let total = match (sum.get(var), grads.get(var)) {
                (Some(a), Some(b)) => (a + b)?,
                (None, Some(b)) => b.clone(),
                _ => continue,
            };
            sum.insert(var, total);
        }
    }
    Ok(sum)
}

/// The gradient of each parameter, as `gradient.NAME`.
fn named_gradients(params: &Params, grads: &GradStore) -> proxyset::Result<Named> {
    let gradient = |var: &Var| match grads.get(var) {
        Some(grad) => Ok(grad.clone()),
        None => Ok(var.zeros_like()?),
    };
    Ok(params.named(gradient)?.into_iter().map(|(name, grad)| (format!("gradient.{name}"), grad)).collect())
}

/// The samples of one part.
fn part(tensor: &Tensor, range: &Range<usize>) -> candle_core::Result<Tensor> {
    tensor.narrow(0, range.start, range.len())
}

struct Conv2d {
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    grad: Tensor,
    stride: usize,
    padding: (usize, usize),
    backward: bool,
}

impl Conv2d {
    fn forward(&self) -> proxyset::Result<Tensor> {
        kernels::conv2d(&self.x, &self.weight, Some(&self.bias), self.stride, self.padding)
    }
}

impl Case for Conv2d {
    fn run(&mut self) -> Result<()> {
        let y = self.forward()?;
        if self.backward {
            black_box(y.backward()?);
        }
        black_box(y);
        Ok(())
    }

    fn outputs(&mut self) -> Result<Named> {
        let y = self.forward()?;
        let mut outputs = Named::from([("y".into(), nchw(&y)?)]);
        if self.backward {
            let grads = (y * &self.grad)?.sum_all()?.backward()?;
            let operands = [("x", &self.x), ("weight", &self.weight), ("bias", &self.bias)];
            for (name, operand) in operands {
                let grad = grads.get(operand).ok_or_else(|| format!("'{name}' has no gradient"))?;
                let grad = if name == "x" { nchw(grad)? } else { grad.clone() };
                outputs.insert(format!("grad_{name}"), grad);
            }
        }
        Ok(outputs)
    }
}

struct Denoise {
    model: DiffusionModel,
    x: Tensor,
    t: usize,
    labels: Option<Tensor>,
}

impl Case for Denoise {
    fn run(&mut self) -> Result<()> {
        black_box(self.model.predict(&self.x, self.t as f64, self.labels.as_ref())?);
        Ok(())
    }

    fn outputs(&mut self) -> Result<Named> {
        let eps = self.model.predict(&self.x, self.t as f64, self.labels.as_ref())?;
        Ok(Named::from([("eps".into(), nchw(&eps)?)]))
    }
}

struct Sample {
    model: DiffusionModel,
    sampler: SamplerConfig,
    plan: Plan,
    conditioning: ClassConditioning,
    x: Tensor,
}

impl Sample {
    fn images(&self) -> Result<Tensor> {
        let denoise = &mut |x: &Tensor, level| self.model.denoise(x, level, &self.conditioning);
        // DDIM without a share of noise.
        let none = &mut |_| Ok(self.x.zeros_like()?);
        Ok(sample(
            &self.sampler,
            &self.plan,
            Start::Noise(self.x.clone()),
            denoise,
            none,
            &mut |_, _| Ok(()),
        )?)
    }
}

impl Case for Sample {
    fn run(&mut self) -> Result<()> {
        black_box(self.images()?);
        Ok(())
    }

    fn outputs(&mut self) -> Result<Named> {
        Ok(Named::from([("images".into(), nchw(&self.images()?)?)]))
    }
}

struct DenoiseGradients {
    network: Box<dyn DenoiserNetwork>,
    params: Params,
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    labels: Option<Tensor>,
    parts: usize,
}

impl DenoiseGradients {
    fn gradients(&self) -> proxyset::Result<GradStore> {
        let elements = self.noise.elem_count() as f64;
        gradients(&self.params, self.x.dim(0)?, self.parts, |range| {
            let labels = self.labels.as_ref().map(|labels| part(labels, &range)).transpose()?;
            let eps =
                self.network.forward(&part(&self.x, &range)?, &part(&self.t, &range)?, labels.as_ref())?;
            Ok(((eps - part(&self.noise, &range)?)?.sqr()?.sum_all()? / elements)?)
        })
    }
}

impl Case for DenoiseGradients {
    fn run(&mut self) -> Result<()> {
        // As after an optimiser's step: nothing derived from the weights can be reused.
        drop(self.params.overwriting());
        black_box(self.gradients()?);
        Ok(())
    }

    fn outputs(&mut self) -> Result<Named> {
        let mut outputs = named_gradients(&self.params, &self.gradients()?)?;
        let eps = self.network.forward(&self.x, &self.t, self.labels.as_ref())?;
        outputs.insert("eps".into(), nchw(&eps)?);
        Ok(outputs)
    }
}

struct Logits {
    classifier: Classifier,
    x: Tensor,
}

impl Case for Logits {
    fn run(&mut self) -> Result<()> {
        black_box(self.classifier.logits(&self.x)?);
        Ok(())
    }

    fn outputs(&mut self) -> Result<Named> {
        Ok(Named::from([("logits".into(), self.classifier.logits(&self.x)?)]))
    }
}

struct PgdStep {
    params: Params,
    tracked: Box<dyn ClassifierNetwork>,
    frozen: Box<dyn ClassifierNetwork>,
    x: Tensor,
    labels: Tensor,
    attack: Pgd,
    optimizer: Sgd,
    learning_rate: f64,
    parts: usize,
}

impl PgdStep {
    /// The loss of each image of a part, attacked.
    fn losses(&self, range: &Range<usize>) -> proxyset::Result<Tensor> {
        pgd_at(
            &|x| self.tracked.logits_by(x, BatchNormMode::Train),
            &|x| self.frozen.logits_by(x, BatchNormMode::Train),
            &part(&self.x, range)?,
            &Targets::new(&part(&self.labels, range)?, 0.0),
            &self.attack,
            &range.clone().map(|i| i as u64).collect::<Vec<_>>(),
        )
    }
}

impl Case for PgdStep {
    fn run(&mut self) -> Result<()> {
        let items = self.x.dim(0)?;
        let grads = gradients(&self.params, items, self.parts, |range| {
            Ok((self.losses(&range)?.sum_all()? / items as f64)?)
        })?;
        self.optimizer.step(&self.params, &grads, self.learning_rate)?;
        Ok(())
    }

    /// Logits and gradients on the clean images, then the loss under attack and the weights after a step. Not the
    /// attacked images: where a gradient is nearly 0, rounding decides on its sign.
    fn outputs(&mut self) -> Result<Named> {
        let x = Var::from_tensor(&self.x)?;
        let logits = self.tracked.logits_by(x.as_tensor(), BatchNormMode::Train)?;
        let grads = kernels::cross_entropy(&logits, &self.labels)?.mean_all()?.backward()?;
        let mut outputs = named_gradients(&self.params, &grads)?;
        let to_images = grads.get(&x).ok_or("the images have no gradient")?;
        outputs.insert("image_gradient".into(), nchw(to_images)?);
        outputs.insert("logits".into(), logits);
        let attacked = self.losses(&(0..self.x.dim(0)?))?.mean_all()?;
        outputs.insert("attacked_loss".into(), attacked);
        self.run()?;
        let updated = self.params.named(|var| Ok(var.as_detached_tensor()))?;
        outputs.extend(updated.into_iter().map(|(name, weights)| (format!("updated.{name}"), weights)));
        Ok(outputs)
    }
}
