//! The operations that dominate: one op a file, each with a plain reference in candle ops.
//!
//! Layout is NHWC on every device; weights are in PyTorch's order. The functions re-exported here take the
//! fast path of the device that holds the tensors: f32 tensors on the CPU go to the loops of this module, tensors on a GPU to
//! those of `cuda`, everything else to [`mod@reference`], the specification and the oracle, which runs on any device.
//!
//! What the fast paths promise, besides speed:
//! - The output and the input gradient of a sample have the same bits whatever the batch around it and the
//!   number of threads; gradients of weights have the same bits for any number of threads. (The exception is
//!   [`batch_norm_train`], which is about the batch: there everything has the same bits for any threads.)
//! - Backward computes gradients of tracked operands only: an attack on frozen weights pays no weight gradient.

mod activation;
mod add_channels;
#[cfg(any(feature = "cuda", test))]
mod algorithms;
mod attention;
mod basic_block;
mod batch_norm;
mod conv2d;
#[cfg(feature = "cuda")]
mod cuda;
mod fused;
mod group_norm;
mod loss;
mod math;
mod matmul;
mod microkernel;
mod reduce;
pub mod reference;
mod resample;
mod resnet_block;
#[cfg(test)]
mod testing;

use std::{
    ops::{Deref, Range},
    path::Path,
};

use candle_core::{CpuStorage, DType, Device, Layout, Shape, Storage, StorageRef, Tensor};
use rayon::prelude::*;

pub use activation::{relu, silu};
pub use add_channels::add_channels;
pub use attention::{attention, softmax};
pub use basic_block::{BasicBlock, basic_block};
pub use batch_norm::{BatchStatistics, batch_norm_eval, batch_norm_train};
pub use conv2d::{PackedWeights, conv2d, conv2d_packed};
pub use fused::{adam_step, average_step, crop_images, normal_images, pgd_step, sgd_step};
pub use group_norm::group_norm;
pub use loss::{cross_entropy, kl_divergence, smoothed_cross_entropy};
pub use matmul::{linear, linear_in_full, matmul};
pub use resample::{avg_pool2d, global_avg_pool, upsample_nearest2x};
pub use resnet_block::{BlockWeights, ResnetBlock, resnet_block};

/// Does `work` by the algorithms that are written down in `folder`, in `algorithms-CLASS.json`, and writes down there those that
/// it is the first to need: so what machines of one class make for a folder has the same bits. For the whole process. On the CPU
/// nothing is chosen.
pub fn with_algorithms_of<T>(folder: &Path, work: impl FnOnce() -> T) -> T {
    #[cfg(feature = "cuda")]
    cuda::keep_algorithms_in(Some(folder));
    let done = work();
    #[cfg(feature = "cuda")]
    cuda::keep_algorithms_in(None);
    let _ = folder;
    done
}

/// Whether the fast paths of the CPU take these operands.
fn on_cpu(operands: &[&Tensor]) -> bool {
    operands.iter().all(|t| t.device().is_cpu() && t.dtype() == DType::F32)
}

/// The elements of a contiguous operand of a custom op.
fn elements<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => {
            candle_core::bail!("a kernel got strides {:?}, expected contiguous elements", layout.stride())
        }
    }
}

/// Read access to the elements of an f32 tensor on the CPU, in row-major order.
pub(crate) struct Elements<'a> {
    storage: StorageRef<'a>,
    range: Range<usize>,
}

impl<'a> Elements<'a> {
    /// Fails if the tensor is not contiguous, not f32 or not on the CPU.
    pub(crate) fn of(tensor: &'a Tensor) -> candle_core::Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("a kernel got strides {:?}, expected contiguous elements", layout.stride())
        };
        match &*storage {
            Storage::Cpu(CpuStorage::F32(_)) => Ok(Self { storage, range: start..end }),
            _ => candle_core::bail!(
                "a kernel got {:?} on {:?}, expected f32 on the CPU",
                tensor.dtype(),
                tensor.device()
            ),
        }
    }
}

impl Deref for Elements<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(data)) => &data[self.range.clone()],
            _ => unreachable!("checked when it was made"),
        }
    }
}

/// A tensor on the CPU, outside of any graph.
fn tensor(data: Vec<f32>, like: &Tensor) -> candle_core::Result<Tensor> {
    Tensor::from_vec(data, like.shape(), &Device::Cpu)
}

/// Where each of the parameters lies in a vector that has them one behind another.
fn ranges(parameters: &[(&str, Shape)]) -> Vec<Range<usize>> {
    let mut end = 0;
    let next = |(_, shape): &(&str, Shape)| {
        end += shape.elem_count();
        end - shape.elem_count()..end
    };
    parameters.iter().map(next).collect()
}

/// The work in multiply-adds or elements under which waking threads costs more than they save.
const PARALLEL_WORK: usize = 1 << 16;

/// Does all tasks, by all threads if that is worth it.
fn for_each<T: Send>(parallel: bool, tasks: impl Iterator<Item = T>, body: impl Fn(T) + Sync + Send) {
    if parallel {
        tasks.collect::<Vec<_>>().into_par_iter().for_each(body);
    } else {
        tasks.for_each(body);
    }
}

/// `out += other`, element by element.
fn add(out: &mut [f32], other: &[f32]) {
    const CHUNK: usize = 1 << 14;
    let len = out.len();
    for_each_chunk(out, CHUNK, len, |i, out| {
        out.iter_mut().zip(&other[i * CHUNK..]).for_each(|(out, other)| *out += other);
    });
}

/// Runs `body` on consecutive chunks of `out` with their number, in parallel if `work` is worth it.
fn for_each_chunk(out: &mut [f32], chunk: usize, work: usize, body: impl Fn(usize, &mut [f32]) + Sync) {
    if work < PARALLEL_WORK {
        out.chunks_mut(chunk.max(1)).enumerate().for_each(|(i, out)| body(i, out));
    } else {
        out.par_chunks_mut(chunk.max(1)).enumerate().for_each(|(i, out)| body(i, out));
    }
}
