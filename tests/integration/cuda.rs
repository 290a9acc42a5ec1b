//! On a GPU: `make test-cuda`. Elsewhere these tests are listed as ignored. `PROXYSET_TEST_PRECISION`: the
//! precision in which f32 is computed.
//!
//! Every op on fresh random numbers against its reference in double precision on the CPU, output and gradients.

use std::{
    sync::OnceLock,
    time::{SystemTime, UNIX_EPOCH},
};

use candle_core::{DType, Device, Shape, Tensor, Var};
use proxyset::{
    Result,
    attack::{Epsilon, Norm, Threat},
    data::{Augment, Crop, Range, Shape as ImageShape, augmented, gaussian_noise},
    device::{DeviceChoice, Precision},
    kernels::{self, BasicBlock, BatchStatistics, BlockWeights, ResnetBlock},
    nn::{
        Architecture, BatchNormMode, Classifier, ClassifierConfig, DenoiserArchitecture, Init, Params,
        UNetConfig,
        optim::{Adam, AdamConfig, Ema, Optimizer, Sgd, SgdConfig},
    },
    rng,
};

use crate::run::{made, ok, shards};

fn gpu() -> Device {
    static GPU: OnceLock<Device> = OnceLock::new();
    GPU.get_or_init(|| {
        let named = |name: String| name.parse::<Precision>().expect("a precision");
        std::env::var("PROXYSET_TEST_PRECISION").map_or(Precision::F32, named).set();
        DeviceChoice::Cuda(0).open().unwrap()
    })
    .clone()
}

/// Standard normals, different in each run; the seed is printed and can be set with `PROXYSET_TEST_SEED`.
struct Random {
    seed: u64,
    drawn: u64,
}

impl Random {
    fn new() -> Self {
        let given = std::env::var("PROXYSET_TEST_SEED").map(|seed| seed.parse().expect("a number"));
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos().into();
        let seed = given.unwrap_or_else(|_| now());
        println!("seed {seed}");
        Self { seed, drawn: 0 }
    }

    fn normals(&mut self, shape: impl Into<Shape>) -> Tensor {
        let shape = shape.into();
        let mut values = vec![0.0; shape.elem_count()];
        rng::normals(self.seed, self.drawn, 0, &mut values);
        self.drawn += 1;
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn positive(&mut self, shape: impl Into<Shape>) -> Tensor {
        (self.normals(shape).abs().unwrap() + 0.5).unwrap()
    }
}

type Op<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// The output, and the gradients of its sum with fixed weights, which are uneven.
fn output_and_gradients(operands: Vec<Tensor>, op: Op) -> Vec<Tensor> {
    let vars: Vec<Var> = operands.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let out = op(&tensors).unwrap();
    let mut weights = vec![0.0; out.elem_count()];
    rng::normals(1, 2, 3, &mut weights);
    let weights = Tensor::from_vec(weights, out.shape(), &Device::Cpu).unwrap();
    let weights = weights.to_dtype(out.dtype()).unwrap().to_device(out.device()).unwrap();
    let grads = (&out * weights).unwrap().sum_all().unwrap().backward().unwrap();
    let gradients = vars.iter().map(|v| grads.get(v).expect("a gradient for each operand").clone());
    std::iter::once(out.detach()).chain(gradients).collect()
}

fn doubles(t: &Tensor) -> Vec<f64> {
    t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn assert_close(what: &str, found: &Tensor, expected: &Tensor, bound: f64) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let (found, expected) = (doubles(found), doubles(expected));
    let largest = expected.iter().fold(1e-30, |m: f64, x| m.max(x.abs()));
    let off = found.iter().zip(&expected).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs())) / largest;
    assert!(off <= bound, "{what}: off by {off:e} of the largest value, expected at most {bound:e}");
}

/// What is off at most: in f32 of the largest value, in TF32 of the length of the vector, with images of bf16 of the largest.
#[derive(Clone, Copy)]
struct Bounds {
    f32: f64,
    tf32: f64,
    bf16: Option<f64>,
    /// Whether gradients are compared in less than f32: where ReLU's slopes flip, they differ.
    all_gradients: bool,
}

const OP: Bounds = Bounds { f32: 1e-5, tf32: 1e-3, bf16: Some(1e-2), all_gradients: true };
const F32_OP: Bounds = Bounds { bf16: None, ..OP };
/// Several ops in sequence.
const BLOCK: Bounds = Bounds { tf32: 5e-3, bf16: Some(3e-2), all_gradients: false, ..OP };

#[track_caller]
fn agree(what: &str, operands: &[Tensor], bounds: Bounds, op: Op) {
    let gpu = gpu();
    let tf32 = Precision::get() == Precision::Tf32;
    for images in [DType::F32, DType::BF16] {
        let in_bf16 = images == DType::BF16;
        if in_bf16 && bounds.bf16.is_none() {
            continue;
        }
        let first = operands[0].to_dtype(images).unwrap();
        let others = &operands[1..];
        let exact = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
        let expected = output_and_gradients(std::iter::once(&first).chain(others).map(exact).collect(), op);
        let there = |t: &Tensor| t.to_device(&gpu).unwrap();
        let found = output_and_gradients(std::iter::once(&first).chain(others).map(there).collect(), op);
        let compared = if bounds.all_gradients || !(in_bf16 || tf32) { found.len() } else { 1 };
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate().take(compared) {
            let part = if i == 0 { "output".into() } else { format!("gradient {i}") };
            let what = format!("{what}, {images:?}: {part}");
            match (in_bf16, tf32) {
                (true, _) => assert_close(&what, found, expected, bounds.bf16.unwrap()),
                (false, true) => assert_near(&what, found, expected, bounds.tf32),
                (false, false) => assert_close(&what, found, expected, bounds.f32),
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU: make test-cuda"]
fn cuda_convolutions_agree_with_the_reference() {
    let mut random = Random::new();
    let cases = [
        ([2, 5, 7, 1], [16, 3, 3], 1, (1, 1)),
        ([3, 9, 8, 5], [7, 3, 3], 2, (0, 1)),
        ([2, 7, 5, 33], [40, 3, 3], 2, (1, 1)),
        ([2, 16, 16, 32], [64, 3, 3], 1, (1, 1)),
        ([3, 4, 4, 33], [9, 1, 1], 1, (0, 0)),
        ([2, 6, 6, 16], [8, 1, 1], 2, (0, 0)),
    ];
    for (i, ([b, h, w, c_in], [c_out, kh, kw], stride, padding)) in cases.into_iter().enumerate() {
        let operands =
            [random.normals((b, h, w, c_in)), random.normals((c_out, c_in, kh, kw)), random.normals(c_out)];
        for operands in [&operands[..], &operands[..2]] {
            agree(&format!("convolution {i}"), operands, OP, &|t| {
                kernels::conv2d(&t[0], &t[1], t.get(2), stride, padding)
            });
        }
    }
    // Other layouts.
    let operands = [random.normals((2, 3, 6, 5)), random.normals((3, 3, 4, 3))];
    agree("strided convolution", &operands, OP, &|t| {
        kernels::conv2d(&t[0].permute((0, 2, 3, 1))?, &t[1].transpose(0, 2)?, None, 1, (1, 1))
    });
}

#[test]
#[ignore = "needs a GPU: make test-cuda"]
fn cuda_norms_agree_with_the_reference() {
    let mut random = Random::new();
    for silu in [false, true] {
        for (shape, groups) in [((3, 5, 7, 16), 4), ((2, 3, 3, 66), 3), ((2, 32, 32, 128), 32)] {
            let c = shape.3;
            let shared = [random.normals(shape), random.normals(c), random.normals(c)];
            let own = [shared[0].clone(), random.normals((shape.0, c)), random.normals((shape.0, c))];
            for operands in [&shared, &own] {
                agree(&format!("group norm {shape:?}, {silu}"), operands, OP, &|t| {
                    kernels::group_norm(&t[0], groups, &t[1], &t[2], 1e-5, silu)
                });
            }
        }
    }
    for relu in [false, true] {
        // Not larger: of many numbers one is so near to 0 that rounding decides its slope.
        for shape in [(3, 5, 7, 5), (2, 3, 3, 40), (4, 11, 9, 33)] {
            let c = shape.3;
            let operands = [random.normals(shape), random.normals(c), random.normals(c)];
            agree(&format!("batch norm {shape:?}, {relu}"), &operands, OP, &|t| {
                Ok(kernels::batch_norm_train(&t[0], &t[1], &t[2], 1e-5, relu)?.0)
            });
            let (mean, variance) = (random.normals(c), random.positive(c));
            agree(&format!("given batch norm {shape:?}, {relu}"), &operands, OP, &|t| {
                let like = |s: &Tensor| s.to_dtype(t[1].dtype())?.to_device(t[1].device());
                let statistics = BatchStatistics { mean: like(&mean)?, variance: like(&variance)? };
                kernels::batch_norm_eval(&t[0], &statistics, &t[1], &t[2], 1e-5, relu)
            });
        }
    }
    let x = random.normals((2, 5, 7, 6));
    let of = |device: &Device| {
        let like = |t: &Tensor| t.to_device(device).unwrap();
        let (ones, zeros) = (x.ones_like().unwrap(), x.zeros_like().unwrap());
        let (ones, zeros) = (ones.get(0).unwrap(), zeros.get(0).unwrap());
        let row = |t: &Tensor| like(&t.get(0).unwrap().get(0).unwrap());
        kernels::batch_norm_train(&like(&x), &row(&ones), &row(&zeros), 1e-5, false).unwrap().1
    };
    let (cpu, cuda) = (of(&Device::Cpu), of(&gpu()));
    assert_close("mean", &cuda.mean, &cpu.mean, 1e-5);
    assert_close("variance", &cuda.variance, &cpu.variance, 1e-5);
}

#[test]
#[ignore = "needs a GPU: make test-cuda"]
fn cuda_pointwise_ops_and_products_agree_with_the_reference() {
    let mut random = Random::new();
    let x = [random.normals((3, 6, 5, 7))];
    agree("silu", &x, OP, &|t| kernels::silu(&t[0]));
    agree("relu", &x, OP, &|t| kernels::relu(&t[0]));
    agree("upsampling", &x, OP, &|t| kernels::upsample_nearest2x(&t[0]));
    agree("upsampling of a transpose", &x, OP, &|t| kernels::upsample_nearest2x(&t[0].transpose(1, 2)?));
    agree("shift", &[x[0].clone(), random.normals(7)], OP, &|t| kernels::add_channels(&t[0], &t[1]));
    agree("shifts", &[x[0].clone(), random.normals((3, 7))], OP, &|t| kernels::add_channels(&t[0], &t[1]));
    agree("mean", &x, F32_OP, &|t| kernels::global_avg_pool(&t[0]));
    agree("pool", &x, F32_OP, &|t| kernels::avg_pool2d(&t[0], 2));
    for columns in [1, 32, 77] {
        agree("softmax", &[random.normals((5, 3, columns))], OP, &|t| kernels::softmax(&t[0]));
    }
    let heads = [random.normals((4, 16, 8)), random.normals((4, 16, 8)), random.normals((4, 16, 8))];
    agree("attention", &heads, BLOCK, &|t| {
        let like = |other: &Tensor| other.to_dtype(t[0].dtype());
        kernels::attention(&t[0], &like(&t[1])?, &like(&t[2])?)
    });
    let linear = [random.normals((5, 9)), random.normals((7, 9)), random.normals(7)];
    agree("linear", &linear, OP, &|t| kernels::linear(&t[0], &t[1], Some(&t[2])));
    let (x, weight) = (random.normals((33, 70)), random.normals((9, 70)));
    let there = |t: &Tensor| t.to_device(&gpu()).unwrap();
    let full = kernels::linear_in_full(&there(&x), &there(&weight)).unwrap();
    let exact = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    assert_close("linear in full", &full, &exact(&x).matmul(&exact(&weight).t().unwrap()).unwrap(), 2e-6);
}

#[test]
#[ignore = "needs a GPU: make test-cuda"]
fn cuda_blocks_agree_with_the_reference() {
    let mut random = Random::new();
    for (c_in, c_out, scale_shift) in [(8, 8, false), (8, 12, true)] {
        let block = ResnetBlock {
            c_in,
            c_out,
            time_dim: 6,
            groups: [4; 2],
            epsilon: 1e-5,
            scale_shift,
            shortcut: c_in != c_out,
            output_scale: 1.0,
        };
        let count: usize = block.parameters().iter().map(|(_, shape)| shape.elem_count()).sum();
        let operands =
            [random.normals((2, 5, 7, c_in)), random.normals((2, 6)), (random.normals(count) * 0.3).unwrap()];
        agree("residual block", &operands, BLOCK, &|t| {
            kernels::resnet_block(&t[0], &t[1], &t[2], &block, &BlockWeights::default(), None)
        });
    }
    for (c_in, c_out, stride) in [(8, 8, 1), (8, 12, 2)] {
        let block = BasicBlock { c_in, c_out, stride, epsilon: 1e-5 };
        let count: usize = block.parameters().iter().map(|(_, shape)| shape.elem_count()).sum();
        let operands = [random.normals((3, 6, 5, c_in)), (random.normals(count) * 0.3).unwrap()];
        agree("basic block", &operands, BLOCK, &|t| {
            Ok(kernels::basic_block(&t[0], &t[1], None, &block, &BlockWeights::default())?.0)
        });
    }
}

/// ‖found - expected‖ / ‖expected‖ is at most that.
#[track_caller]
fn assert_near(what: &str, found: &Tensor, expected: &Tensor, bound: f64) {
    let (found, expected) = (doubles(found), doubles(expected));
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let off =
        norm(&mut found.iter().zip(&expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied());
    assert!(off <= bound, "{what} is off by {off:e}, expected at most {bound:e}");
}

/// In the precision that is set, against double precision on the CPU. Of gradients in f32 alone: in others ReLU's slopes flip.
#[test]
#[ignore = "needs a GPU: make test-cuda"]
fn cuda_networks_agree_with_the_cpu() {
    let (gpu, mut random) = (gpu(), Random::new());
    let bound = match Precision::get() {
        Precision::F32 => 1e-4,
        Precision::Tf32 => 1e-2,
        Precision::Bf16 => 5e-2,
    };
    let in_f32 = Precision::get() == Precision::F32;
    let images = random.positive((4, 16, 16, 3));
    let archs = [
        r#"{"arch": "small_cnn", "in_channels": 3, "image_size": 16, "channels": [8, 16], "num_classes": 5, "groups": 4}"#,
        r#"{"arch": "resnet", "in_channels": 3, "image_size": 16, "num_classes": 5, "widths": [8, 16], "blocks": [1, 1]}"#,
        r#"{"arch": "wide_resnet", "in_channels": 3, "image_size": 16, "num_classes": 5, "depth": 10, "width": 1}"#,
    ];
    for arch in archs {
        let of = |device: &Device, images: &Tensor| {
            let architecture: Architecture = serde_json::from_str(arch).unwrap();
            let class_names = (0..5).map(|i| i.to_string()).collect();
            let net = Classifier::init(ClassifierConfig { architecture, class_names }, 3, device).unwrap();
            let x = Var::from_tensor(&images.to_device(device).unwrap()).unwrap();
            let logits = net.tracked().unwrap().logits_by(x.as_tensor(), BatchNormMode::Train).unwrap();
            let grads = logits.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            let vars = net.params().vars().iter().map(|(_, var)| var).chain([&x]);
            let gradients: Vec<Tensor> =
                vars.map(|var| grads.get(var).unwrap().flatten_all().unwrap()).collect();
            (net.logits(&x).unwrap(), logits.detach(), gradients)
        };
        let (cpu, cuda) = (of(&Device::Cpu, &images.to_dtype(DType::F64).unwrap()), of(&gpu, &images));
        assert_eq!(cuda.0.dtype(), DType::F32);
        assert_near(&format!("logits of {arch}"), &cuda.0, &cpu.0, bound);
        assert_near(&format!("logits of {arch} in training"), &cuda.1, &cpu.1, bound);
        for (i, (found, expected)) in cuda.2.iter().zip(&cpu.2).enumerate().filter(|_| in_f32) {
            assert_near(&format!("gradient {i} of {arch}"), found, expected, 1e-2);
        }
    }
    let config = UNetConfig {
        block_out_channels: vec![32, 64],
        down_block_types: vec!["DownBlock2D".into(), "AttnDownBlock2D".into()],
        up_block_types: vec!["AttnUpBlock2D".into(), "UpBlock2D".into()],
        ..UNetConfig::default()
    };
    let t = Tensor::new(&[3f32, 40.0, 500.0, 999.0], &Device::Cpu).unwrap();
    let of = |device: &Device, images: &Tensor| {
        let params = Params::init(3, device, |b| config.build(b)).unwrap();
        let net = params.frozen(|b| config.build(b)).unwrap();
        net.forward(&images.to_device(device).unwrap(), &t.to_device(device).unwrap(), None).unwrap()
    };
    let (cpu, cuda) = (of(&Device::Cpu, &images.to_dtype(DType::F64).unwrap()), of(&gpu, &images));
    assert_near("a U-Net's noise", &cuda, &cpu, bound);
}

/// The images of a seed are the same on every device, and so are crops and mirrors.
#[test]
#[ignore = "needs a GPU: make test-cuda"]
fn cuda_noise_and_augmentation_have_the_bits_of_the_cpu() {
    let (gpu, shape) = (gpu(), ImageShape { height: 7, width: 5, channels: 3 });
    let bits = |t: Tensor| -> Vec<u32> {
        let values = t.to_device(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    };
    let seed = Random::new().seed;
    let samples: Vec<u64> = (0..1000).map(|i| i * 5_000_000_007).collect();
    let noise = |device: &Device| bits(gaussian_noise(seed, &samples, 9, shape, device).unwrap());
    assert!(noise(&gpu) == noise(&Device::Cpu));
    let pixels: Vec<u8> = (0..samples.len() * shape.size()).map(|i| (i * 31 % 256) as u8).collect();
    for range in [Range::Unit, Range::Signed] {
        let settings = Augment { crop: Crop::Padded(2), flip: true };
        let crops = |device: &Device| {
            bits(augmented(&pixels, shape, &samples, seed, settings, range, device).unwrap())
        };
        assert!(crops(&gpu) == crops(&Device::Cpu));
    }
}

#[test]
#[ignore = "needs a GPU: make test-cuda"]
fn cuda_steps_of_attacks_and_optimisers_are_those_of_the_cpu() {
    let (gpu, mut random) = (gpu(), Random::new());
    let x = random.normals((3, 5, 7, 3)).abs().unwrap().clamp(0f32, 1f32).unwrap();
    let start = (&x + (random.normals(x.shape()) * 0.05).unwrap()).unwrap().clamp(0f32, 1f32).unwrap();
    let gradient = random.normals(x.shape());
    for (norm, epsilon) in [(Norm::Linf, "8/255"), (Norm::L2, "0.5")] {
        let threat = Threat::new(norm, epsilon.parse::<Epsilon>().unwrap()).unwrap();
        let start = threat.project(&x, &start).unwrap();
        let step = |device: &Device| {
            let [x, start, gradient] = [&x, &start, &gradient].map(|t| t.to_device(device).unwrap());
            threat.step(&x, &start, &gradient, 0.02).unwrap()
        };
        assert_close(&format!("step in {norm}"), &step(&gpu), &step(&Device::Cpu), 1e-6);
    }

    let gradients: Vec<Tensor> = (0..3).map(|_| random.normals(1003)).collect();
    let steps = |device: &Device, optimizer: &mut dyn Optimizer| {
        let params = Params::init(1, device, |b| b.get("weight", 1003, Init::Normal(1.0))).unwrap();
        let mut average = Ema::new(params.vars(), 0.9).unwrap();
        for gradient in &gradients {
            let (_, var) = &params.vars()[0];
            let loss = (var.as_tensor() * gradient.to_device(device).unwrap()).unwrap().sum_all().unwrap();
            optimizer.step_scaled(&params, &loss.backward().unwrap(), 0.5, 0.1).unwrap();
            average.update(params.vars()).unwrap();
        }
        let state = optimizer.state().unwrap();
        let (_, weights) = &params.vars()[0];
        let mut all = vec![weights.as_detached_tensor()];
        all.extend(state.into_iter().filter(|(name, _)| name != "step").map(|(_, t)| t));
        all.extend(average.state().unwrap().into_iter().filter(|(_, t)| t.elem_count() > 1).map(|(_, t)| t));
        all
    };
    let sgd = |nesterov| SgdConfig { momentum: 0.9, nesterov, weight_decay: 1e-2 };
    let makers: [&dyn Fn() -> Box<dyn Optimizer>; 3] =
        [&|| Box::new(Sgd::new(sgd(false))), &|| Box::new(Sgd::new(sgd(true))), &|| {
            Box::new(Adam::new(AdamConfig { weight_decay: 1e-2, ..AdamConfig::default() }))
        }];
    for (i, make) in makers.into_iter().enumerate() {
        let (found, expected) = (steps(&gpu, make().as_mut()), steps(&Device::Cpu, make().as_mut()));
        assert_eq!(found.len(), expected.len());
        for (j, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_close(&format!("optimiser {i}, tensor {j}"), found, expected, 1e-5);
        }
    }
}

#[test]
#[ignore = "needs a GPU: make test-cuda"]
fn cuda_pools_do_not_depend_on_batch_or_resume() {
    let dir = tempfile::tempdir().unwrap();
    let out = |name: &str| dir.path().join(name).display().to_string();
    let generate = |name: &str, more: &str| {
        let pool =
            "--count 96 --shard-rows 32 --micro-batch 16 --sampler ddpm --steps 5 --device cuda:0 --quiet";
        ok(&format!("generate --model {} {pool} --out {} {more}", made().path("generator"), out(name)));
    };
    generate("one", "--shards 0..1");
    generate("one", "");
    generate("two", "--batch 48 --workers auto");
    assert_eq!(shards(&out("one")).len(), 3);
    assert!(shards(&out("one")) == shards(&out("two")));
}

#[test]
#[ignore = "needs a GPU: make test-cuda"]
fn cuda_runs_the_whole_digits_pipeline() {
    let dir = tempfile::tempdir().unwrap();
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/pipelines/digits.toml");
    let small = crate::pipeline::SMALL;
    ok(&format!("run {file} --device cuda:0 --quiet --out {} {small}", dir.path().join("run").display()));
    ok(&format!("check {}", dir.path().join("run").display()));
}
