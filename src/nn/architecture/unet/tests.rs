//! The U-Net against `diffusers`: golden files of tests/golden/unet.py.

use std::{cell::Cell, collections::BTreeMap, path::PathBuf};

use candle_core::DType;
use safetensors::SafeTensors;

use super::*;
use crate::nn::params::{self, Params};

struct Golden {
    config: UNetConfig,
    tensors: BTreeMap<String, Tensor>,
    params: Params,
}

impl Golden {
    fn load(name: &str) -> Self {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let path = folder.join(format!("unet_{name}.safetensors"));
        let bytes = std::fs::read(&path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let config = &header.metadata().as_ref().unwrap()["config"];
        let config: UNetConfig = serde_json::from_str(config).unwrap();
        let tensors: BTreeMap<_, _> =
            candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap().into_iter().collect();
        let params = Params::init(0, &Device::Cpu, |b| UNet::new(&config, b)).unwrap();
        params.copy_from(tensors.iter().filter_map(|(k, v)| Some((k.strip_prefix("model.")?, v)))).unwrap();
        Self { config, tensors, params }
    }

    fn nhwc(&self, name: &str) -> Tensor {
        self.tensors[name].permute((0, 2, 3, 1)).unwrap().contiguous().unwrap()
    }

    fn forward(&self, net: &UNet) -> Tensor {
        self.forward_as(DType::F32, net)
    }

    /// With images of this type.
    fn forward_as(&self, images: DType, net: &UNet) -> Tensor {
        let labels = self.tensors.get("labels").map(|labels| labels.to_dtype(DType::U32).unwrap());
        let x = self.nhwc("x").to_dtype(images).unwrap();
        let out = net.forward(&x, &self.tensors["t"], labels.as_ref()).unwrap();
        assert_eq!(out.dtype(), images);
        out.to_dtype(DType::F32).unwrap()
    }
}

/// max |found - expected| ≤ tolerance · max |expected|
fn assert_close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f32) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let max = |t: Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    let error = max((found - expected).unwrap()) / max(expected.clone());
    println!("{what}: {error:.1e}");
    assert!(error <= tolerance, "{what} differs by {error:e} of its scale");
}

#[test]
fn outputs_are_those_of_diffusers() {
    for name in [
        "unconditional",
        "conditional",
        "scale_shift",
        "grey",
        "three_levels",
        "one_level",
        "attention_everywhere",
        "no_attention",
        "six_levels",
    ] {
        let golden = Golden::load(name);
        let net = golden.params.frozen(|b| UNet::new(&golden.config, b)).unwrap();
        assert_close(name, &golden.forward(&net), &golden.nhwc("y"), 1e-4);
        assert_close(name, &golden.forward_as(DType::F64, &net), &golden.nhwc("y"), 1e-4);
    }
}

#[test]
fn gradients_are_those_of_pytorch() {
    let golden = Golden::load("conditional");
    let net = golden.params.tracked(|b| UNet::new(&golden.config, b)).unwrap();
    for images in [DType::F32, DType::F64] {
        gradients_agree(&golden, &golden.forward_as(images, &net));
    }
}

fn gradients_agree(golden: &Golden, out: &Tensor) {
    let loss = (out - golden.nhwc("x")).unwrap().sqr().unwrap().mean_all().unwrap();
    let grads = loss.backward().unwrap();
    let named = golden.params.named(|var| Ok(grads.get(var.as_tensor()).unwrap().clone())).unwrap();
    let found: BTreeMap<_, _> = named.iter().map(|(name, grad)| (name.as_str(), grad)).collect();
    let norms: Vec<_> = found
        .values()
        .map(|g| g.sqr().unwrap().sum_all().unwrap().sqrt().unwrap().to_scalar::<f32>().unwrap())
        .collect();
    let norms = Tensor::new(norms, &Device::Cpu).unwrap();
    assert_close("norms of the gradients", &norms, &golden.tensors["grad_norms"], 1e-4);
    let whole = golden.tensors.iter().filter_map(|(k, v)| Some((k.strip_prefix("grad.")?, v)));
    assert_eq!(whole.clone().count(), 4);
    for (name, expected) in whole {
        assert_close(name, found[name], expected, 1e-4);
    }
}

#[test]
fn every_parameter_has_its_name_in_pytorch() {
    let golden = Golden::load("unconditional");
    let named = golden.params.named(|var| Ok(var.as_detached_tensor())).unwrap();
    let mut ours: Vec<_> = named.iter().map(|(name, _)| name.as_str()).collect();
    ours.sort_unstable();
    let theirs: Vec<_> = golden.tensors.keys().filter_map(|k| k.strip_prefix("model.")).collect();
    assert_eq!(ours, theirs);
}

#[test]
fn attention_under_its_former_names_loads() {
    let golden = Golden::load("unconditional");
    let renamed = golden.tensors.iter().filter_map(|(k, v)| {
        let name = k.strip_prefix("model.")?.replace("to_out.0", "proj_attn");
        Some((name.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value"), v.clone()))
    });
    let renamed: std::collections::HashMap<_, _> = renamed.collect();
    assert!(renamed.contains_key("mid_block.attentions.0.proj_attn.bias"));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("old.safetensors");
    candle_core::safetensors::save(&renamed, &path).unwrap();
    let params = Params::load(&path, &Device::Cpu, |b| UNet::new(&golden.config, b)).unwrap();
    let net = params.frozen(|b| UNet::new(&golden.config, b)).unwrap();
    assert_close("output", &golden.forward(&net), &golden.nhwc("y"), 1e-4);
}

/// hojonathanho/diffusion, scripts/run_cifar.py: counted by hand, 6.222 G multiply-adds with attention.
#[test]
fn the_cifar10_model_of_ho_et_al_has_the_known_parameters_and_multiply_adds() {
    let block = |attended: &str, plain: &str, at: usize| -> Vec<String> {
        (0..4).map(|i| if i == at { attended.into() } else { plain.into() }).collect()
    };
    let config = UNetConfig {
        sample_size: Some(SampleSize::Square(32)),
        down_block_types: block("AttnDownBlock2D", "DownBlock2D", 1),
        up_block_types: block("AttnUpBlock2D", "UpBlock2D", 2),
        block_out_channels: vec![128, 256, 256, 256],
        layers_per_block: 2,
        attention_head_dim: None,
        downsample_padding: 0,
        flip_sin_to_cos: false,
        freq_shift: 1.0,
        norm_eps: 1e-6,
        ..UNetConfig::default()
    };
    let count = |config: &UNetConfig| params::skeleton(|b| UNet::new(config, b)).unwrap().1;
    assert_eq!(count(&config), 35_746_307);
    assert_eq!(count(&UNetConfig { in_channels: 1, out_channels: 1, ..config.clone() }), 35_741_697);
    assert_eq!(config.macs().unwrap(), 6_221_856_768);
}

#[test]
fn dropout_is_a_function_of_the_sample_and_keeps_the_mean() {
    let golden = Golden::load("unconditional");
    let config = UNetConfig { dropout: 0.3, ..golden.config.clone() };
    let net = golden.params.frozen(|b| UNet::new(&config, b)).unwrap();
    let (x, t) = (golden.nhwc("x"), &golden.tensors["t"]);
    let n = x.dim(0).unwrap();
    let ids: Vec<u64> = (7..7 + n as u64).collect();
    let all = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let trained =
        |x: &Tensor, t: &Tensor, ids: &[u64]| net.forward_in_training(x, t, None, (5, ids)).unwrap();
    let whole = trained(&x, t, &ids);
    assert_eq!(all(whole.clone()), all(trained(&x, t, &ids)));
    assert_ne!(all(whole.clone()), all(golden.forward(&net)));
    let last = trained(&x.narrow(0, n - 1, 1).unwrap(), &t.narrow(0, n - 1, 1).unwrap(), &ids[n - 1..]);
    assert_eq!(all(whole.narrow(0, n - 1, 1).unwrap()), all(last));

    let dropout = Dropout { rate: 0.3, seed: 1, ids: &[3, 4], block: Cell::new(0) };
    let mask = || all(dropout.mask([2, 50, 50, 8], &Device::Cpu).unwrap());
    let (first, second) = (mask(), mask());
    assert_ne!(first, second);
    let dropped = first.iter().filter(|v| **v == 0.0).count() as f64 / first.len() as f64;
    assert!((dropped - 0.3).abs() < 0.01, "{dropped}");
    assert!(first.iter().all(|v| *v == 0.0 || *v == 1.0 / 0.7));
}

#[test]
fn what_does_not_fit_the_model_is_refused() {
    let golden = Golden::load("unconditional");
    let net = golden.params.frozen(|b| UNet::new(&golden.config, b)).unwrap();
    let zeros = |shape: (usize, usize, usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let t = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
    let error = net.forward(&zeros((1, 7, 8, 3)), &t, None).unwrap_err();
    assert!(error.to_string().starts_with("images are 7 x 8 x 3, the model expects 3 channels"), "{error}");
    let labels = Tensor::zeros(1, DType::U32, &Device::Cpu).unwrap();
    let error = net.forward(&zeros((1, 8, 8, 3)), &t, Some(&labels)).unwrap_err();
    assert_eq!(error.to_string(), "classes were given, but the model is not conditioned on them");
}
