//! On a GPU: `make test-cuda`. Elsewhere these are listed as ignored.

use candle_core::{Device, Tensor};
use proxyset::{device::DeviceChoice, kernels, rng};

use crate::run::ok;

fn gpu() -> Device {
    DeviceChoice::Cuda(0).open().unwrap()
}

fn random(key: u64, shape: &[usize]) -> Tensor {
    let mut values = vec![0.0; shape.iter().product()];
    rng::normals(3, key, 0, &mut values);
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Largest difference, relative to the largest value.
fn difference(cpu: &Tensor, gpu: &Tensor) -> f32 {
    let values =
        |t: &Tensor| t.to_device(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (a, b) = (values(cpu), values(gpu));
    let scale = a.iter().fold(0f32, |m, x| m.max(x.abs()));
    a.iter().zip(&b).fold(0f32, |m, (x, y)| m.max((x - y).abs())) / scale
}

#[test]
#[ignore = "needs a GPU: make test-cuda"]
fn cuda_kernels_agree_with_the_cpu() {
    let gpu = gpu();
    let on = |t: &Tensor| t.to_device(&gpu).unwrap();
    for (stride, padding) in [(1, (1, 1)), (2, (0, 1)), (2, (1, 1))] {
        let (x, w, b) = (random(1, &[3, 9, 8, 5]), random(2, &[7, 5, 3, 3]), random(3, &[7]));
        let cpu = kernels::conv2d(&x, &w, Some(&b), stride, padding).unwrap();
        let cuda = kernels::conv2d(&on(&x), &on(&w), Some(&on(&b)), stride, padding).unwrap();
        assert!(difference(&cpu, &cuda) < 1e-3, "TF32 at the worst");
    }
    let (x, g, b) = (random(4, &[3, 5, 7, 16]), random(5, &[16]), random(6, &[16]));
    let cpu = kernels::group_norm(&x, 4, &g, &b, 1e-5, true).unwrap();
    let cuda = kernels::group_norm(&on(&x), 4, &on(&g), &on(&b), 1e-5, true).unwrap();
    assert!(difference(&cpu, &cuda) < 1e-5);
    let (q, k, v) = (random(7, &[4, 16, 8]), random(8, &[4, 16, 8]), random(9, &[4, 16, 8]));
    let cpu = kernels::attention(&q, &k, &v).unwrap();
    assert!(difference(&cpu, &kernels::attention(&on(&q), &on(&k), &on(&v)).unwrap()) < 1e-3);
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
