//! The operations that dominate the running time, one op per file, with its loops for the CPU, its form for a GPU
//! and its reference in candle ops.
//!
//! Layout is NHWC on every device; weights are in PyTorch's order. The functions re-exported here take the fast
//! path of the device that holds the tensors: f32 tensors on the CPU go to the loops, tensors on a GPU to CUDA,
//! everything else to the reference, which is specification and oracle and runs on any device. `shell` makes that
//! choice, and makes candle ops of them. Blocks have loops of their own on the CPU; elsewhere they are composed of
//! the ops.
//!
//! What the fast paths guarantee, in addition to speed:
//! - The output and the input gradient of a sample have the same bits whatever the batch around it and the number
//!   of threads; gradients of weights have the same bits for any number of threads. (The exception is
//!   [`batch_norm_train`], which depends on the batch: there everything has the same bits for any number of
//!   threads.)
//! - The backward pass computes gradients of tracked operands only: an attack on frozen weights does not pay for
//!   weight gradients.
//!
//! A module uses those on its own line or below and nothing above, and none of them uses this one:
//!
//! ```text
//! basic_block | resnet_block
//! block
//! conv2d | group_norm | batch_norm | attention | loss
//! activation | add_channels | matmul | max_pool | resample | optimizer | pgd_step | images
//! cuda
//! shell | reduce | math | algorithms
//! microkernel | parallel
//! ```

mod activation;
mod add_channels;
#[cfg(any(feature = "cuda", test))]
mod algorithms;
mod attention;
mod basic_block;
mod batch_norm;
mod block;
mod conv2d;
#[cfg(feature = "cuda")]
mod cuda;
mod group_norm;
mod images;
mod loss;
mod math;
mod matmul;
mod max_pool;
mod microkernel;
mod optimizer;
mod parallel;
mod pgd_step;
mod reduce;
mod resample;
mod resnet_block;
mod shell;
#[cfg(test)]
mod testing;

pub use activation::{relu, silu};
pub use add_channels::add_channels;
pub use attention::{attention, softmax};
pub use basic_block::{BasicBlock, basic_block};
pub use batch_norm::{BatchStatistics, batch_norm_eval, batch_norm_train};
pub use block::BlockWeights;
pub use conv2d::{PackedWeights, conv2d, conv2d_packed, with_algorithms_of};
pub use group_norm::group_norm;
pub use images::{crop_images, crop_pixels, normal_images};
pub use loss::{cross_entropy, kl_divergence, smoothed_cross_entropy};
pub use matmul::{linear, linear_in_full, matmul};
pub use max_pool::max_pool2d;
pub use optimizer::{AdamStep, SgdStep, average_step};
pub use pgd_step::{pgd_step, project, steepest};
pub use resample::{avg_pool2d, global_avg_pool, upsample_nearest2x};
pub use resnet_block::{ResnetBlock, resampling_resnet_block, resnet_block};
pub(crate) use shell::Elements;
