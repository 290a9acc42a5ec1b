//! The CUDA versions: convolutions by cuDNN ([`conv`]), the rest by the kernels of `kernels.cu`, which the build turns into
//! PTX. Images are f32 or bf16, statistics and parameters f32.
//!
//! Everything runs on the device's one stream, in the order in which it is asked for.

mod add_channels;
mod conv;
mod norm;
mod pointwise;
mod product;

use std::sync::Arc;

use candle_core::{
    CudaDevice, CudaStorage, DType, Device, Layout, Shape, Storage, Tensor,
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

pub(super) use add_channels::add_channels;
pub(super) use conv::{CudaWeights, conv2d, keep_algorithms_in};
pub(super) use norm::{batch_norm_eval, batch_norm_train, group_norm};
pub(super) use pointwise::{Function, activation, softmax, upsample_nearest2x};
pub(super) use pointwise::{adam_step, average_step, crop_images, normal_images, pgd_step, sgd_step};
pub(super) use product::linear_in_full;

/// The kernels, compiled by build.rs.
const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));

/// Whether the CUDA versions take these operands: the first may be bf16, the others are f32.
pub(super) fn on_cuda(images: &Tensor, parameters: &[&Tensor]) -> bool {
    let here = |t: &Tensor| t.device().same_device(images.device());
    images.device().is_cuda()
        && matches!(images.dtype(), DType::F32 | DType::BF16)
        && parameters.iter().all(|t| here(t) && t.dtype() == DType::F32)
}

/// What the elements of an image can be.
trait Element: CudaDType + DeviceRepr + CudnnDataType + ValidAsZeroBits + candle_core::WithDType {
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
use with_element;

/// Launches a kernel with these arguments, all of them references.
macro_rules! launch {
    ($function:expr, $config:expr, $($argument:expr),+ $(,)?) => {{
        use candle_core::cuda_backend::{WrapErr, cudarc::driver::PushKernelArg};
        let kernel = $function;
        let mut builder = kernel.stream.launch_builder(&kernel.function);
        $(builder.arg($argument);)+
        // SAFETY: the arguments have the types and sizes of the kernel's, which stands in kernels.cu.
        unsafe { builder.launch($config) }.w()?;
    }};
}
use launch;

/// A kernel, and the stream that it runs on.
struct Kernel {
    function: CudaFunction,
    stream: Arc<CudaStream>,
}

/// The kernel of this name.
fn kernel(device: &CudaDevice, name: &str) -> candle_core::Result<Kernel> {
    let function = device.get_or_load_custom_func(name, "proxyset", PTX)?.into_cuda_function();
    Ok(Kernel { function, stream: device.cuda_stream() })
}

/// The kernel of this name for elements of this type.
fn kernel_of<T: Element>(device: &CudaDevice, name: &str) -> candle_core::Result<Kernel> {
    kernel(device, &format!("{name}_{}", T::SUFFIX))
}

/// Threads for `n` elements, in loops: several blocks for each multiprocessor of a large GPU.
fn elementwise(n: usize) -> LaunchConfig {
    per_segment(n, 1)
}

/// Threads for `n` elements of each of `segments`, the second dimension of the grid.
fn per_segment(n: usize, segments: usize) -> LaunchConfig {
    const THREADS: usize = 256;
    const BLOCKS: usize = 132 * 16;
    let blocks = n.div_ceil(THREADS).clamp(1, (BLOCKS / segments.max(1)).max(1));
    config((blocks, rows_of_grid(segments), 1), (THREADS, 1, 1))
}

/// The second dimension of a grid for so many segments, over which kernels loop: CUDA's largest is 65,535.
fn rows_of_grid(segments: usize) -> usize {
    segments.clamp(1, 65_535)
}

/// A number of elements that a kernel counts in 32 bits.
fn count32(n: usize) -> candle_core::Result<u32> {
    match u32::try_from(n) {
        Ok(count) if count <= i32::MAX as u32 => Ok(count),
        _ => candle_core::bail!(
            "a tensor has {n} elements, expected fewer than 2^31 on a GPU: take a smaller batch"
        ),
    }
}

fn config(grid: (usize, usize, usize), block: (usize, usize, usize)) -> LaunchConfig {
    let dims = |(x, y, z): (usize, usize, usize)| (x as u32, y as u32, z as u32);
    LaunchConfig { grid_dim: dims(grid), block_dim: dims(block), shared_mem_bytes: 0 }
}

/// The elements of a contiguous operand.
fn view<'a, T: Element>(storage: &'a CudaStorage, layout: &Layout) -> candle_core::Result<CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice::<T>()?.slice(start..end)),
        None => {
            candle_core::bail!("a kernel got strides {:?}, expected contiguous elements", layout.stride())
        }
    }
}

/// Memory that is not cleared: a kernel writes all of it.
fn uninitialized<T: Element>(device: &CudaDevice, n: usize) -> candle_core::Result<CudaSlice<T>> {
    // SAFETY: every kernel writes the whole of its outputs.
    unsafe { device.alloc::<T>(n) }
}

/// A tensor outside of any graph.
fn tensor<T: Element>(device: &CudaDevice, slice: CudaSlice<T>, shape: impl Into<Shape>) -> Tensor {
    let storage = CudaStorage::wrap_cuda_slice(slice, device.clone());
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// Calls `f` with the device and the elements of contiguous tensors of one type.
fn with_views<T: Element, const N: usize, R>(
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

/// What an op says of a tensor that is not on CUDA: it is only made for those that are.
fn not_here<T>() -> candle_core::Result<T> {
    candle_core::bail!("a CUDA op got a tensor on the CPU")
}
