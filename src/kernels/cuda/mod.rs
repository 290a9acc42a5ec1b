//! What the ops need on a GPU: convolutions by cuDNN ([`conv`]), and launching the kernels in `kernels.cu` and
//! `typed.cu`, which the build compiles to PTX. Images are f32 or bf16, statistics and parameters f32.
//!
//! Everything runs on the device's single stream, in the order in which it is launched.

pub(super) mod conv;
pub(super) mod norm;
pub(super) mod product;

use std::sync::Arc;

use candle_core::{
    CudaDevice, CudaStorage, Device, Layout, Shape, Storage, Tensor,
    cuda_backend::{
        CudaDType,
        cudarc::{
            cudnn::CudnnDataType,
            driver::{
                CudaFunction, CudaSlice, CudaStream, CudaView, DeviceRepr, LaunchConfig, ValidAsZeroBits,
            },
        },
    },
    op::BackpropOp,
};
use half::bf16;

/// The kernels, compiled by build.rs.
const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));

/// The element types of images.
pub(super) trait Element:
    CudaDType + DeviceRepr + CudnnDataType + ValidAsZeroBits + candle_core::WithDType
{
    /// The end of the kernels' names.
    const SUFFIX: &'static str;
}

impl Element for f32 {
    const SUFFIX: &'static str = "f32";
}

impl Element for bf16 {
    const SUFFIX: &'static str = "bf16";
}

/// Calls a function that is generic over [`Element`] with that of a storage.
macro_rules! with_element {
    ($storage:expr, $T:ident => $body:expr) => {{
        #[allow(
            unused_imports,
            reason = "a storage's type is asked for by the trait, a tensor's is not"
        )]
        use candle_core::backend::BackendStorage as _;
        match $storage.dtype() {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            other => candle_core::bail!("a CUDA kernel got {other:?}, expected f32 or bf16"),
        }
    }};
}
pub(super) use with_element;

/// Launches a kernel with these arguments, all of them references.
macro_rules! launch {
    ($function:expr, $config:expr, $($argument:expr),+ $(,)?) => {{
        use candle_core::cuda_backend::{WrapErr, cudarc::driver::PushKernelArg};
        let kernel = $function;
        let mut builder = kernel.stream.launch_builder(&kernel.function);
        $(builder.arg($argument);)+
        // SAFETY: the arguments have the types and sizes of the kernel's, which stands in kernels.cu or typed.cu.
        unsafe { builder.launch($config) }.w()?;
    }};
}
pub(super) use launch;

/// A kernel, and the stream that it runs on.
pub(super) struct Kernel {
    pub(super) function: CudaFunction,
    pub(super) stream: Arc<CudaStream>,
}

/// The kernel of this name.
pub(super) fn kernel(device: &CudaDevice, name: &str) -> candle_core::Result<Kernel> {
    let function = device.get_or_load_custom_func(name, "proxyset", PTX)?.into_cuda_function();
    Ok(Kernel { function, stream: device.cuda_stream() })
}

/// The kernel of this name for elements of this type.
pub(super) fn kernel_of<T: Element>(device: &CudaDevice, name: &str) -> candle_core::Result<Kernel> {
    kernel(device, &format!("{name}_{}", T::SUFFIX))
}

/// Threads for `n` elements, in loops: several blocks for each multiprocessor of a large GPU.
pub(super) fn elementwise(n: usize) -> LaunchConfig {
    per_segment(n, 1)
}

/// Threads for `n` elements of each of `segments`, the second dimension of the grid.
pub(super) fn per_segment(n: usize, segments: usize) -> LaunchConfig {
    const THREADS: usize = 256;
    const BLOCKS: usize = 132 * 16;
    let blocks = n.div_ceil(THREADS).clamp(1, (BLOCKS / segments.max(1)).max(1));
    config((blocks, rows_of_grid(segments), 1), (THREADS, 1, 1))
}

/// The second dimension of a grid for this many segments, over which kernels loop: CUDA's largest is 65,535.
fn rows_of_grid(segments: usize) -> usize {
    segments.clamp(1, 65_535)
}

/// A number of elements that a kernel counts in 32 bits.
pub(super) fn count32(n: usize) -> candle_core::Result<u32> {
    match u32::try_from(n) {
        Ok(count) if count <= i32::MAX as u32 => Ok(count),
        _ => candle_core::bail!(
            "a tensor has {n} elements, expected fewer than 2^31 on a GPU: take a smaller batch"
        ),
    }
}

pub(super) fn config(grid: (usize, usize, usize), block: (usize, usize, usize)) -> LaunchConfig {
    let dims = |(x, y, z): (usize, usize, usize)| (x as u32, y as u32, z as u32);
    LaunchConfig { grid_dim: dims(grid), block_dim: dims(block), shared_mem_bytes: 0 }
}

/// The elements of a contiguous operand.
pub(super) fn view<'a, T: Element>(
    storage: &'a CudaStorage,
    layout: &Layout,
) -> candle_core::Result<CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice::<T>()?.slice(start..end)),
        None => {
            candle_core::bail!("a kernel got strides {:?}, expected contiguous elements", layout.stride())
        }
    }
}

/// Memory that is not cleared: a kernel writes all of it.
pub(super) fn uninitialized<T: Element>(device: &CudaDevice, n: usize) -> candle_core::Result<CudaSlice<T>> {
    // SAFETY: every kernel writes the whole of its outputs.
    unsafe { device.alloc::<T>(n) }
}

/// A tensor outside any graph.
pub(super) fn tensor<T: Element>(
    device: &CudaDevice,
    slice: CudaSlice<T>,
    shape: impl Into<Shape>,
) -> Tensor {
    let storage = CudaStorage::wrap_cuda_slice(slice, device.clone());
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// Calls `f` with the device and the elements of contiguous tensors of one type.
pub(super) fn with_views<T: Element, const N: usize, R>(
    tensors: [&Tensor; N],
    f: impl FnOnce(&CudaDevice, [CudaView<'_, T>; N]) -> candle_core::Result<R>,
) -> candle_core::Result<R> {
    let Device::Cuda(device) = tensors[0].device() else {
        candle_core::bail!("a CUDA kernel got a tensor on {:?}", tensors[0].device())
    };
    let guards = tensors.map(Tensor::storage_and_layout);
    let mut views = Vec::with_capacity(N);
    for (storage, layout) in &guards {
        let Storage::Cuda(storage) = &**storage else {
            candle_core::bail!("a CUDA kernel got a tensor of another device")
        };
        views.push(view::<T>(storage, layout)?);
    }
    match views.try_into() {
        Ok(views) => f(device, views),
        Err(_) => candle_core::bail!("a CUDA kernel lost an operand"),
    }
}
