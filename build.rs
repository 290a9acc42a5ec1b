//! With the feature `cuda`: compiles src/kernels/cuda/kernels.cu to PTX, which the driver finishes for the GPU at hand.

use std::{env, path::PathBuf, process::Command};

const SOURCE: &str = "src/kernels/cuda/kernels.cu";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed={SOURCE}");
    println!("cargo:rerun-if-changed=src/kernels/cuda/typed.cu");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("kernels.ptx");
    let of_toolkit = |root: &str| {
        let nvcc = PathBuf::from(env::var_os(root)?).join("bin/nvcc");
        nvcc.is_file().then_some(nvcc)
    };
    let nvcc = env::var_os("NVCC")
        .map(PathBuf::from)
        .or_else(|| of_toolkit("CUDA_HOME"))
        .or_else(|| of_toolkit("CUDA_PATH"))
        .unwrap_or_else(|| "nvcc".into());
    // Without fused multiply-adds: the normals have the bits of the CPU's.
    let status = Command::new(&nvcc)
        .args(["--ptx", "-arch=compute_80", "--fmad=false", "-O3", "-o"])
        .arg(&out)
        .arg(SOURCE)
        .status()
        .unwrap_or_else(|e| {
            panic!("{} cannot be run ({e}); install a CUDA toolkit or set NVCC", nvcc.display())
        });
    assert!(status.success(), "{} failed on {SOURCE}", nvcc.display());
}
