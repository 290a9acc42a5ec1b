//! `make bench`: the kernels one by one, with criterion. Rates are in multiply-adds for products,
//! convolutions, blocks and attention, in elements for everything else.

use std::{hint::black_box, time::Duration};

use candle_core::{Device, Shape, Tensor, Var, backprop::GradStore};
use criterion::{BenchmarkId, Criterion, Throughput};
use proxyset::{
    Result,
    kernels::{self, BasicBlock, BatchStatistics, BlockWeights, ResnetBlock},
    nn::{
        Params,
        optim::{Adam, AdamConfig, Ema, Optimizer, Sgd, SgdConfig, grad_norm},
    },
    rng,
};

/// As in the program.
#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

const BATCH: usize = 16;

/// Normals that depend only on the shape.
fn random(shape: &[usize]) -> Tensor {
    let mut values = vec![0.0; shape.iter().product()];
    rng::normals(0, 0, 0, &mut values);
    Tensor::from_vec(values, shape, &Device::Cpu).expect("as many values as the shape has")
}

fn variable(shape: &[usize]) -> Tensor {
    Var::from_tensor(&random(shape)).expect("a copy on the CPU").as_tensor().clone()
}

/// Measures `op` on plain operands, then on tracked ones together with the gradients to all of them.
/// The rate counts `work` for the first and three times as much for the second.
fn forward_and_backward(
    c: &mut Criterion,
    group: &str,
    case: &str,
    work: usize,
    shapes: &[&[usize]],
    op: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let mut group = c.benchmark_group(group);
    let operands: Vec<_> = shapes.iter().map(|shape| random(shape)).collect();
    group.throughput(Throughput::Elements(work as u64));
    group.bench_function(BenchmarkId::new("forward", case), |b| {
        b.iter(|| black_box(op(&operands).expect("the operands fit")));
    });
    let operands: Vec<_> = shapes.iter().map(|shape| variable(shape)).collect();
    group.throughput(Throughput::Elements(3 * work as u64));
    group.bench_function(BenchmarkId::new("forward and backward", case), |b| {
        b.iter(|| black_box(op(&operands).and_then(|y| Ok(y.backward()?)).expect("the operands fit")));
    });
    group.finish();
}

/// Kernel, channels in and out, side of the image, stride.
const CONVOLUTIONS: [(usize, usize, usize, usize, usize); 8] = [
    (3, 32, 32, 32, 1),
    (3, 64, 64, 32, 1),
    (3, 128, 128, 32, 1),
    (3, 256, 256, 16, 1),
    (3, 512, 512, 8, 1),
    (3, 3, 128, 32, 1),
    (3, 128, 256, 32, 2),
    (1, 256, 256, 16, 1),
];

fn convolutions(c: &mut Criterion) {
    for (k, c_in, c_out, side, stride) in CONVOLUTIONS {
        let positions = BATCH * (side / stride) * (side / stride);
        forward_and_backward(
            c,
            "conv2d",
            &format!("{k}x{k} {c_in} to {c_out}, {side}x{side}, stride {stride}"),
            positions * k * k * c_in * c_out,
            &[&[BATCH, side, side, c_in], &[c_out, c_in, k, k], &[c_out]],
            |t| kernels::conv2d(&t[0], &t[1], Some(&t[2]), stride, (k / 2, k / 2)),
        );
    }
}

fn others(c: &mut Criterion) {
    let rows = BATCH * 16 * 16;
    forward_and_backward(
        c,
        "linear",
        "4096 rows, 256 to 256",
        rows * 256 * 256,
        &[&[rows, 256], &[256, 256], &[256]],
        |t| kernels::linear(&t[0], &t[1], Some(&t[2])),
    );
    forward_and_backward(
        c,
        "group_norm + silu",
        "32 groups of 128, 32x32",
        BATCH * 32 * 32 * 128,
        &[&[BATCH, 32, 32, 128], &[128], &[128]],
        |t| kernels::group_norm(&t[0], 32, &t[1], &t[2], 1e-6, true),
    );
    for side in [8, 16] {
        let positions = side * side;
        let shape: &[usize] = &[BATCH, positions, 256];
        forward_and_backward(
            c,
            "attention",
            &format!("one head of 256, {side}x{side}"),
            2 * BATCH * positions * positions * 256,
            &[shape; 3],
            |t| kernels::attention(&t[0], &t[1], &t[2]),
        );
    }
    let image: &[usize] = &[BATCH, 16, 16, 256];
    forward_and_backward(c, "upsample", "256, 16x16", 4 * BATCH * 16 * 16 * 256, &[image], |t| {
        kernels::upsample_nearest2x(&t[0])
    });
    forward_and_backward(c, "avg_pool2d", "2x2 of 256, 16x16", BATCH * 16 * 16 * 256, &[image], |t| {
        kernels::avg_pool2d(&t[0], 2)
    });
    forward_and_backward(c, "global_avg_pool", "256, 16x16", BATCH * 16 * 16 * 256, &[image], |t| {
        kernels::global_avg_pool(&t[0])
    });
    for (name, op) in [("silu", kernels::silu as fn(&Tensor) -> Result<Tensor>), ("relu", kernels::relu)] {
        forward_and_backward(c, name, "256, 16x16", BATCH * 16 * 16 * 256, &[image], |t| op(&t[0]));
    }
    forward_and_backward(
        c,
        "matmul",
        "16 products of 256x256 and 256x256",
        BATCH * 256 * 256 * 256,
        &[[BATCH, 256, 256].as_slice(); 2],
        |t| kernels::matmul(&t[0], &t[1]),
    );
    forward_and_backward(c, "softmax", "4096 rows of 256", rows * 256, &[&[rows, 256]], |t| {
        kernels::softmax(&t[0])
    });
    forward_and_backward(
        c,
        "kl_divergence",
        "512 images, 10 classes",
        512 * 10,
        &[[512, 10].as_slice(); 2],
        |t| kernels::kl_divergence(&t[0], &t[1]),
    );
    let labels = Tensor::from_vec((0..512u32).map(|i| i % 10).collect(), 512, &Device::Cpu)
        .expect("as many labels as the shape has");
    forward_and_backward(c, "cross_entropy", "512 images, 10 classes", 512 * 10, &[&[512, 10]], |t| {
        kernels::cross_entropy(&t[0], &labels)
    });
}

fn norms_and_blocks(c: &mut Criterion) {
    let image: &[usize] = &[BATCH, 32, 32, 128];
    let operands: &[&[usize]] = &[image, &[128], &[128]];
    let work = image.iter().product();
    forward_and_backward(c, "batch_norm + relu", "128, 32x32, training", work, operands, |t| {
        Ok(kernels::batch_norm_train(&t[0], &t[1], &t[2], 1e-5, true)?.0)
    });
    let running = BatchStatistics { mean: random(&[128]), variance: random(&[128]).sqr().expect("floats") };
    forward_and_backward(c, "batch_norm + relu", "128, 32x32, evaluation", work, operands, |t| {
        kernels::batch_norm_eval(&t[0], &running, &t[1], &t[2], 1e-5, true)
    });
    let basic = BasicBlock { c_in: 128, c_out: 128, stride: 1, epsilon: 1e-5 };
    let (positions, kernel) = (BATCH * 16 * 16, 9 * 128 * 128);
    let image: &[usize] = &[BATCH, 16, 16, 128];
    let packed = BlockWeights::default();
    let count = |shapes: Vec<(&str, Shape)>| shapes.iter().map(|(_, shape)| shape.elem_count()).sum();
    let theta: usize = count(basic.parameters());
    forward_and_backward(c, "basic_block", "128, 16x16", 2 * positions * kernel, &[image, &[theta]], |t| {
        Ok(kernels::basic_block(&t[0], &t[1], None, &basic, &packed)?.0)
    });
    let block = ResnetBlock {
        c_in: 128,
        c_out: 128,
        time_dim: 512,
        groups: [32; 2],
        epsilon: 1e-6,
        scale_shift: false,
        shortcut: false,
        output_scale: 1.0,
    };
    let packed = BlockWeights::default();
    let shapes: &[&[usize]] = &[image, &[BATCH, 512], &[count(block.parameters())]];
    forward_and_backward(c, "resnet_block", "128, 16x16", 2 * positions * kernel, shapes, |t| {
        kernels::resnet_block(&t[0], &t[1], &t[2], &block, &packed, None)
    });
}

/// A convolution network's parameters: 64 large tensors and as many small ones, 9.4 million elements.
fn parameters() -> (Vec<(String, Var)>, GradStore) {
    let shapes: [&[usize]; 2] = [&[128, 128, 3, 3], &[128]];
    let vars: Vec<_> = (0..128)
        .map(|i| (i.to_string(), Var::from_tensor(&random(shapes[i % 2])).expect("a copy on the CPU")))
        .collect();
    let terms = vars.iter().map(|(_, var)| var.sum_all()).collect::<candle_core::Result<Vec<_>>>();
    let loss = terms.and_then(|terms| Tensor::stack(&terms, 0)?.sum_all()).expect("scalars add up");
    let grads = loss.backward().expect("a sum has a gradient");
    (vars, grads)
}

fn steps(c: &mut Criterion) {
    let (vars, grads) = parameters();
    let params = Params::from(vars.clone());
    let elements: usize = vars.iter().map(|(_, var)| var.elem_count()).sum();
    let mut group = c.benchmark_group("step");
    group.throughput(Throughput::Elements(elements as u64));
    let momentum = SgdConfig { momentum: 0.9, nesterov: true, weight_decay: 5e-4 };
    let optimizers: [(&str, Box<dyn Optimizer>); 2] = [
        ("sgd, nesterov, weight decay", Box::new(Sgd::new(momentum))),
        ("adam", Box::new(Adam::new(AdamConfig::default()))),
    ];
    for (name, mut optimizer) in optimizers {
        group.bench_function(name, |b| {
            b.iter(|| optimizer.step(&params, &grads, 1e-6).expect("every variable has a gradient"));
        });
    }
    group.bench_function("norm of the gradients", |b| {
        b.iter(|| black_box(grad_norm(params.vars(), &grads).expect("every variable has a gradient")));
    });
    let mut ema = Ema::new(&vars, 0.999).expect("a copy on the CPU");
    group.bench_function("ema", |b| b.iter(|| ema.update(&vars).expect("the same variables")));
    group.finish();
}

fn main() {
    // SAFETY: no other thread exists yet.
    unsafe { proxyset::process::tune() };
    // In the pool, as the program.
    rayon::scope(|_| {
        let mut c = Criterion::default()
            .sample_size(10)
            .warm_up_time(Duration::from_millis(500))
            .measurement_time(Duration::from_secs(2))
            .configure_from_args();
        convolutions(&mut c);
        others(&mut c);
        norms_and_blocks(&mut c);
        steps(&mut c);
        c.final_summary();
    });
}
