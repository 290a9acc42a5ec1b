//! ADM's and EDM's networks beside the originals: golden files of tests/golden/denoisers.py.

use std::{collections::BTreeMap, path::PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use safetensors::SafeTensors;
use serde_json::{Map, Value};

use super::{DenoiserConfig, Recognized, recognize};
use crate::nn::{StateDict, params::Params};

const NAMES: [&str; 8] = [
    "adm_guided",
    "adm_improved",
    "adm_added",
    "adm_pooled",
    "song_ddpmpp",
    "song_ncsnpp",
    "song_skip",
    "dhariwal",
];

/// A golden file, its network and the parameters that the script made for it.
pub struct Original {
    pub config: DenoiserConfig,
    pub shapes: BTreeMap<String, Vec<usize>>,
    pub tensors: BTreeMap<String, Tensor>,
    pub params: Params,
}

pub fn nhwc(t: &Tensor) -> Tensor {
    t.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap()
}

fn values(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

impl Original {
    pub fn read(name: &str) -> Self {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let bytes = std::fs::read(dir.join(format!("{name}.safetensors"))).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let header = header.metadata().clone().unwrap();
        let config: Map<String, Value> = serde_json::from_str(&header["config"]).unwrap();
        let config = DenoiserConfig::from_json(&header["class"], config).unwrap().0;
        let params = Params::init(0, &Device::Cpu, |b| config.build(b)).unwrap();
        let original = Self {
            params,
            shapes: serde_json::from_str(&header["shapes"]).unwrap(),
            tensors: candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)
                .unwrap()
                .into_iter()
                .collect(),
            config,
        };
        original.fill();
        original
    }

    /// The script's pseudo-random parameters.
    fn fill(&self) {
        let mut drawn = 0u64;
        let mut uniform = || {
            drawn += 1;
            let mut z = drawn.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^= z >> 31;
            (z >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        let mut filled = Vec::new();
        for (name, shape) in self.shapes.iter().filter(|(name, _)| !name.ends_with("resample_filter")) {
            let count: usize = shape.iter().product();
            let scale = (12.0 / (count / shape[0]) as f64).sqrt() as f32;
            let values: Vec<f32> = (0..count)
                .map(|_| match (shape.len(), name.ends_with("freqs"), name.ends_with("weight")) {
                    (_, true, _) => uniform() * 4.0,
                    (1, _, weight) => uniform() * 0.5 + f32::from(u8::from(weight)),
                    _ => uniform() * scale,
                })
                .collect();
            filled.push((name, Tensor::from_vec(values, &shape[..], &Device::Cpu).unwrap()));
        }
        self.params.copy_from(filled.iter().map(|(name, tensor)| (name.as_str(), tensor))).unwrap();
    }

    fn labels(&self) -> Option<Tensor> {
        self.tensors.get("labels").map(|labels| labels.to_dtype(DType::U32).unwrap())
    }
}

/// max |found - expected| ≤ tolerance · max |expected|
#[track_caller]
fn assert_close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, |a: f64, v| a.max(v.abs()));
    let error = largest(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    let error = error / largest(&mut expected.iter().copied());
    println!("{what}: {error:.1e}");
    assert!(error <= tolerance, "{what} differs by {error:e} of its scale");
}

#[test]
fn outputs_are_those_of_the_originals() {
    for name in NAMES {
        let original = Original::read(name);
        let net = original.params.frozen(|b| original.config.build(b)).unwrap();
        let expected = nhwc(&original.tensors["y"]);
        for dtype in [DType::F32, DType::F64] {
            let x = nhwc(&original.tensors["x"]).to_dtype(dtype).unwrap();
            let y = net.forward(&x, &original.tensors["t"], original.labels().as_ref()).unwrap();
            assert_eq!((y.dtype(), y.dims()), (dtype, expected.dims()), "{name}");
            assert_close(name, &values(&y), &values(&expected), 1e-5);
        }
        let variance = expected.dim(3).unwrap() != original.config.image_shape().unwrap().2;
        assert_eq!(original.config.predicts_variance(), variance, "{name}");
    }
}

#[test]
fn gradients_are_those_of_the_originals() {
    for name in NAMES {
        let original = Original::read(name);
        let net = original.params.tracked(|b| original.config.build(b)).unwrap();
        let x = Var::from_tensor(&nhwc(&original.tensors["x"])).unwrap();
        let y = net.forward(&x, &original.tensors["t"], original.labels().as_ref()).unwrap();
        let grads = y.sqr().unwrap().mean_all().unwrap().backward().unwrap();
        let of_x = nhwc(&original.tensors["grad_x"]);
        assert_close(name, &values(grads.get(&x).unwrap()), &values(&of_x), 3e-5);
        let gradient = |var: &Var| Ok(grads.get(var).cloned().unwrap_or(var.zeros_like()?));
        let mut gradients = original.params.named(gradient).unwrap();
        gradients.sort_by(|(a, _), (b, _)| a.cmp(b));
        let parameters: BTreeMap<_, _> =
            original.params.named(|var| Ok(var.as_detached_tensor())).unwrap().into_iter().collect();
        let (mut norms, mut dots) = (Vec::new(), Vec::new());
        for (name, gradient) in &gradients {
            let gradient = values(gradient);
            norms.push(gradient.iter().map(|g| g * g).sum::<f64>().sqrt());
            dots.push(gradient.iter().zip(values(&parameters[name])).map(|(g, p)| g * p).sum::<f64>());
        }
        assert_close(name, &norms, &values(&original.tensors["grad_norms"]), 1e-5);
        assert_close(name, &dots, &values(&original.tensors["grad_dots"]), 1e-5);
    }
}

#[test]
fn names_and_shapes_are_the_originals_and_show_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    for name in NAMES {
        let original = Original::read(name);
        let mut ours: BTreeMap<_, _> = original
            .params
            .named(|var| Ok(var.as_detached_tensor()))
            .unwrap()
            .into_iter()
            .map(|(name, tensor)| (name, tensor.dims().to_vec()))
            .collect();
        ours.extend(
            original.params.buffers().iter().map(|(name, b)| (name.clone(), b.get().dims().to_vec())),
        );
        assert_eq!(ours, original.shapes, "{name}");

        let path = dir.path().join(name);
        crate::fs::publish(&path, &original.params.to_safetensors(&[]).unwrap()).unwrap();
        let Recognized { tag, config, open, .. } = recognize(&StateDict::open(&path).unwrap()).unwrap();
        let mut expected = original.config.to_json().unwrap();
        assert_eq!(tag, original.config.tag());
        for (key, value) in config {
            assert_eq!(expected.remove(&key), Some(value), "{name}: {key}");
        }
        assert!(open.iter().all(|key| expected.remove(*key).is_some()), "{name}");
        // Those of training, those that have no effect, and one that no published model sets.
        let others = ["dropout", "label_dropout", "dims", "use_checkpoint", "use_fp16", "num_heads_upsample"];
        expected.retain(|key, _| !key.starts_with('_') && !others.contains(&&**key));
        assert!(expected.is_empty(), "{name} does not show {expected:?}");
    }
}

#[test]
fn options_that_are_not_built_are_refused_by_key_and_value() {
    let cases = [
        (
            "song_skip",
            "encoder_type",
            "\"dense\"",
            "encoder_type is \"dense\", expected standard or skip or residual",
        ),
        (
            "song_skip",
            "resample_filter",
            "[1, 2, 1]",
            "resample_filter is [1.0, 2.0, 1.0], expected [1.0, 1.0] or",
        ),
        ("song_skip", "img_resolution", "10", "img_resolution is 10, expected a multiple of 4"),
        ("song_skip", "out_channels", "0", "out_channels is 0, expected at least 1"),
        ("song_skip", "sigma_data", "0.5", "sigma_data is 0.5, expected no such key in a SongUNet"),
        ("dhariwal", "channel_mult", "[]", "channel_mult is [], expected 1 to 16 entries"),
        ("dhariwal", "embedding_type", "\"fourier\"", "expected no such key in a DhariwalUNet"),
        ("adm_guided", "dims", "3", "dims is 3, expected 2"),
        ("adm_guided", "channel_mult", "[0.3, 1]", "expected multiples of 32 channels, found [9, 32]"),
        (
            "adm_guided",
            "num_head_channels",
            "5",
            "num_head_channels is 5, expected a divisor of the channels with",
        ),
        (
            "adm_improved",
            "num_heads",
            "0",
            "num_heads is 0, expected a divisor of the channels with attention [64, 64]",
        ),
    ];
    for (name, key, value, expected) in cases {
        let config = Original::read(name).config;
        let mut json = config.to_json().unwrap();
        json.insert(key.into(), serde_json::from_str(value).unwrap());
        let error = DenoiserConfig::from_json(config.tag(), json).unwrap_err();
        assert_eq!(error.exit_code(), 65);
        assert!(error.to_string().contains(expected), "{error}\ndoes not say: {expected}");
    }
}

#[test]
fn another_filter_than_the_configured_one_is_refused() {
    let original = Original::read("song_ncsnpp");
    let (_, filter) =
        original.params.buffers().iter().find(|(name, _)| name.ends_with("resample_filter")).unwrap();
    filter.set(&Tensor::full(1f32 / 16.0, (1, 1, 4, 4), &Device::Cpu).unwrap()).unwrap();
    let error = original.params.frozen(|b| original.config.build(b)).err().unwrap();
    assert_eq!(error.exit_code(), 65);
    assert!(error.to_string().contains("expected [0.015625, 0.046875"), "{error}");
}

#[test]
fn the_class_after_the_last_stands_for_none() {
    let original = Original::read("song_skip");
    let with = |rate: f64| {
        let mut json = original.config.to_json().unwrap();
        json.insert("label_dropout".into(), rate.into());
        DenoiserConfig::from_json("SongUNet", json).unwrap().0.num_classes()
    };
    assert_eq!((with(0.0), with(0.1)), (Some(3), Some(4)));
    // Another network with the same parameters, to which classes say nothing but their layer's bias.
    let mute = Original::read("song_skip");
    let zero = Tensor::zeros((8, 3), DType::F32, &Device::Cpu).unwrap();
    let (_, weight) = mute.params.vars().iter().find(|(name, _)| name == "map_label.weight").unwrap();
    weight.set(&zero).unwrap();
    let output = |original: &Original, classes: [u32; 2]| {
        let net = original.params.frozen(|b| original.config.build(b)).unwrap();
        let classes = Tensor::new(&classes, &Device::Cpu).unwrap();
        values(&net.forward(&nhwc(&original.tensors["x"]), &original.tensors["t"], Some(&classes)).unwrap())
    };
    assert_eq!(output(&original, [3, 3]), output(&mute, [0, 2]));
    assert_ne!(output(&original, [3, 3]), output(&original, [0, 2]));
}
