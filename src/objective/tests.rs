//! Training steps compared with PyTorch's, from the file that tests/golden/robust_training.py writes.

use std::{collections::BTreeMap, path::PathBuf};

use candle_core::{DType, Device, Tensor};

use super::{GammaMix, Targets, plain, stable};
use crate::{
    Result,
    attack::{Epsilon, Norm, PgdConfig, PgdLoss, Threat, ascend},
    kernels,
    nn::{
        BatchNormMode, Builder, ClassifierArchitecture, ClassifierNetwork, Params, ResNetConfig,
        optim::{Optimizer, Sgd, SgdConfig},
    },
};

const REAL: usize = 6;
const SYNTHETIC: usize = 10;

fn build(b: &Builder) -> Result<Box<dyn ClassifierNetwork>> {
    let config = ResNetConfig { widths: vec![4, 8], blocks: vec![1, 1], ..ResNetConfig::resnet18(1, 8, 4) };
    config.build(b)
}

fn norm(t: &Tensor) -> f64 {
    t.to_dtype(DType::F64).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
}

fn golden() -> BTreeMap<String, Tensor> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/robust_training.safetensors");
    candle_core::safetensors::load(path, &Device::Cpu).unwrap().into_iter().collect()
}

fn parameters(tensors: &BTreeMap<String, Tensor>, prefix: &str) -> Params {
    let params = Params::init(0, &Device::Cpu, build).unwrap();
    params.copy_from(tensors.iter().filter_map(|(k, v)| Some((k.strip_prefix(prefix)?, v)))).unwrap();
    params
}

fn nhwc(nchw: &Tensor) -> Tensor {
    nchw.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap()
}

/// Twenty steps on recorded adversarial images; the losses and the path of the weights are PyTorch's.
fn twenty_steps(objective: &str) {
    let tensors = golden();
    let get = |key: &str| &tensors[&format!("{objective}.{key}")];
    let params = parameters(&tensors, &format!("{objective}.before."));
    let network = params.tracked(build).unwrap();
    let forward = |x: &Tensor| network.logits_by(x, BatchNormMode::Train);
    let mix = GammaMix::new(0.4, REAL, SYNTHETIC).unwrap();
    let weights: Vec<f32> =
        (0..REAL + SYNTHETIC).map(|i| if i < REAL { mix.real } else { mix.synthetic } as f32).collect();
    let weights = Tensor::new(weights, &Device::Cpu).unwrap();
    let config = SgdConfig { momentum: 0.9, nesterov: true, weight_decay: 5e-4 };
    let mut sgd = Sgd::new(config);
    let losses = get("losses").to_vec1::<f32>().unwrap();
    for (step, expected) in losses.iter().enumerate() {
        let image = |name: &str| nhwc(get(&format!("{step}.{name}")));
        let labels = get(&format!("{step}.labels")).to_dtype(DType::U32).unwrap();
        let targets = Targets::new(&labels, 0.0);
        let each = match objective {
            "pgd_at" => plain(&forward, &image("x_adv"), &targets),
            _ => stable(&forward, &image("x"), &image("x_adv"), &targets, 6.0),
        };
        let loss = (each.unwrap() * &weights).unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();
        let found = loss.to_scalar::<f32>().unwrap();
        assert!((found - expected).abs() < 1e-4, "{objective} step {step}: {found}, expected {expected}");
        sgd.step(&params, &grads, 0.05).unwrap();
    }
    let named = params.named(|var| Ok(var.as_detached_tensor())).unwrap();
    let (mut off, mut way) = (0.0, 0.0);
    for (name, found) in &named {
        let (before, after) = (get(&format!("before.{name}")), get(&format!("after.{name}")));
        off += norm(&(found - after).unwrap()).powi(2);
        way += norm(&(after - before).unwrap()).powi(2);
    }
    let share = (off / way).sqrt();
    assert!(share < 1e-2, "{objective}: weights are off by {share:e} of their way");
    for (name, buffer) in params.buffers() {
        let expected = get(&format!("after.{name}"));
        let off = norm(&(buffer.get() - expected).unwrap()) / norm(expected).max(1e-9);
        assert!(off < 1e-3, "{objective}: {name} is off by {off:e}");
    }
    println!("{objective}: weights are off by {share:.2e} of their way");
}

/// From the same start the first step agrees pixel by pixel (except where rounding decides the sign of a gradient),
/// and so do the losses after ten steps.
#[test]
fn pgd_from_a_given_start_goes_where_pytorchs_goes() {
    let tensors = golden();
    let params = parameters(&tensors, "trades.after.");
    let network = params.frozen(build).unwrap();
    let logits_of = |x: &Tensor| network.logits_by(x, BatchNormMode::Eval);
    let labels = tensors["pgd.labels"].to_dtype(DType::U32).unwrap();
    let loss_of = |logits: &Tensor| kernels::cross_entropy(logits, &labels);
    let x = nhwc(&tensors["pgd.x"]);
    for (norm, epsilon, step_size) in [(Norm::Linf, 0.1, 0.025), (Norm::L2, 0.5, 0.125)] {
        let threat = Threat::new(norm, Epsilon::try_from(epsilon).unwrap()).unwrap();
        let after = |steps: usize| {
            let config = PgdConfig { steps, step_size, random_start: false, loss: PgdLoss::Ce };
            let start = nhwc(&tensors[&format!("pgd.{norm}.start")]);
            ascend(&logits_of, &loss_of, &x, start, &threat, &config).unwrap()
        };
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (found, expected) = (values(&after(1)), values(&nhwc(&tensors[&format!("pgd.{norm}.first")])));
        let same = found.iter().zip(&expected).filter(|(a, b)| (*a - *b).abs() < 1e-5).count();
        assert!(same as f64 >= 0.999 * found.len() as f64, "{norm}: {same} of {} pixels", found.len());
        let losses = values(&loss_of(&logits_of(&after(10)).unwrap()).unwrap());
        let expected = values(&tensors[&format!("pgd.{norm}.losses")]);
        let mean = |v: &[f32]| v.iter().map(|&l| f64::from(l)).sum::<f64>() / v.len() as f64;
        let off = (mean(&losses) - mean(&expected)).abs();
        assert!(off < 1e-3, "{norm}: the loss after ten steps is off by {off:e}");
    }
}

#[test]
fn twenty_steps_of_pgd_at_go_where_pytorchs_go() {
    twenty_steps("pgd_at");
}

#[test]
fn twenty_steps_of_trades_go_where_pytorchs_go() {
    twenty_steps("trades");
}
