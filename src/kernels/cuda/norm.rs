//! Group and batch normalisation, with the activation in the same pass. Batch norm is group norm of one segment, the whole
//! batch, with a group for each channel.

use candle_core::{
    CudaDevice, CudaStorage, D, Layout, Tensor,
    cuda_backend::cudarc::driver::{CudaSlice, LaunchConfig},
};

use super::{
    super::shell::{CudaBackward, CudaGradients, CudaNode, CudaOutput, apply_cuda},
    Element, config, count32, kernel, kernel_of, launch, per_segment, rows_of_grid, tensor, uninitialized,
    view, with_element, with_views,
};
use crate::Result;

/// Channels and rows of a block of the sums.
const LANES: usize = 32;
const ROWS: usize = 8;

/// The activation after a norm, numbered as in kernels.cu.
#[derive(Clone, Copy)]
enum After {
    Nothing = 0,
    Silu = 1,
    Relu = 2,
}

/// Group normalisation: see [`fn@super::super::group_norm::group_norm`], which has checked the shapes.
pub(in crate::kernels) fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    epsilon: f64,
    silu: bool,
) -> Result<Tensor> {
    let (b, c) = (x.dim(0)?, x.dim(D::Minus1)?);
    let sizes = Sizes { segments: b, rows: x.elem_count() / (b * c).max(1), c, groups };
    // One set per sample or one for all, by the same rule.
    let own = weight.rank() == 2 || bias.rank() == 2;
    let spread = |t: &Tensor| if own { t.broadcast_as((b, c))?.contiguous() } else { t.contiguous() };
    let after = if silu { After::Silu } else { After::Nothing };
    normalize(x, &spread(weight)?, &spread(bias)?, sizes, None, epsilon, after).map(|(out, _)| out)
}

/// Batch normalisation, by `given` means and variances or by those of `x`, and these, the variance biased: see
/// [`fn@super::super::batch_norm::batch_norm_train`], which has checked the shapes.
pub(in crate::kernels) fn batch_norm(
    x: &Tensor,
    given: Option<[&Tensor; 2]>,
    weight: &Tensor,
    bias: &Tensor,
    epsilon: f64,
    relu: bool,
) -> Result<(Tensor, [Tensor; 2])> {
    let c = x.dim(D::Minus1)?;
    let sizes = Sizes { segments: 1, rows: x.elem_count() / c, c, groups: c };
    let after = if relu { After::Relu } else { After::Nothing };
    let (out, moments) = normalize(x, weight, bias, sizes, given, epsilon, after)?;
    Ok((out, [moments.mean.flatten_all()?, moments.variance.flatten_all()?]))
}

/// `segments` of `rows` rows of `c` channels, each segment normalised in `groups`.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Sizes {
    pub segments: usize,
    pub rows: usize,
    pub c: usize,
    pub groups: usize,
}

impl Sizes {
    /// How the rows are divided for the sums: enough blocks for a large GPU, each a multiple of [`ROWS`] rows.
    fn chunks(&self) -> (usize, usize) {
        const BLOCKS: usize = 1024;
        let tiles = self.segments * self.c.div_ceil(LANES);
        let wanted = (BLOCKS / tiles.max(1)).clamp(1, self.rows.div_ceil(4 * ROWS).max(1));
        let rows = self.rows.div_ceil(wanted).next_multiple_of(ROWS).max(ROWS);
        (self.rows.div_ceil(rows).max(1), rows)
    }

    fn sums_config(&self) -> LaunchConfig {
        config((self.chunks().0, rows_of_grid(self.segments), self.c.div_ceil(LANES)), (LANES, ROWS, 1))
    }

    /// A warp for each segment and group.
    fn moments_config(&self) -> LaunchConfig {
        const WARPS: usize = 4;
        config(((self.segments * self.groups).div_ceil(WARPS).max(1), 1, 1), (32, WARPS, 1))
    }
}

/// The moments of each segment and group, f32, `(segments, groups)`.
#[derive(Clone)]
pub(in crate::kernels) struct Moments {
    pub mean: Tensor,
    /// 1 / √(variance + ε).
    inverse: Tensor,
    variance: Tensor,
}

fn normalize(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    sizes: Sizes,
    given: Option<[&Tensor; 2]>,
    epsilon: f64,
    after: After,
) -> Result<(Tensor, Moments)> {
    let x = x.contiguous()?;
    let moments = match given {
        Some([mean, variance]) => {
            let (mean, variance) = (mean.detach().contiguous()?, variance.detach().contiguous()?);
            let inverse = (&variance + epsilon)?.sqrt()?.recip()?;
            Moments { mean, inverse, variance }
        }
        None => moments_of(&x, sizes, epsilon)?,
    };
    let own = if weight.rank() == 2 { sizes.c as i32 } else { 0 };
    let op =
        Normalize { sizes, moments: moments.clone(), given: given.is_some(), own, activation: after as i32 };
    Ok((apply_cuda(op, [&x, weight, bias])?, moments))
}

/// Launches a kernel that adds up the sums of chunks, with its other arguments.
macro_rules! launch_groups {
    ($device:expr, $name:literal, $sizes:expr, $partial:expr, [$($other:expr),+]) => {{
        let Sizes { segments, rows, c, groups } = $sizes;
        let [chunks, segments, c, groups, rows] =
            [$sizes.chunks().0, segments, c, groups, rows].map(|v| v as i32);
        let (function, config) = (kernel($device, $name)?, $sizes.moments_config());
        launch!(function, config, &$partial, &chunks, &segments, &c, &groups, &rows, $(&$other),+);
    }};
}

pub(in crate::kernels) fn moments_of(x: &Tensor, sizes: Sizes, epsilon: f64) -> candle_core::Result<Moments> {
    with_element!(x, T => moments::<T>(x, sizes, epsilon))
}

fn moments<T: Element>(x: &Tensor, sizes: Sizes, epsilon: f64) -> candle_core::Result<Moments> {
    with_views::<T, 1, _>([x], |device, [x]| {
        let Sizes { segments, rows, c, groups } = sizes;
        let (chunks, per_chunk) = sizes.chunks();
        let [c32, rows32, per_chunk32, segments32] = [c, rows, per_chunk, segments].map(|v| v as i32);
        let partial = doubles(device, segments * chunks * 2 * c)?;
        let sums = kernel_of::<T>(device, "norm_sums")?;
        launch!(sums, sizes.sums_config(), &x, &c32, &segments32, &rows32, &per_chunk32, &partial);
        let of_groups = || uninitialized::<f32>(device, segments * groups);
        let (mean, inverse, variance) = (of_groups()?, of_groups()?, of_groups()?);
        launch_groups!(device, "norm_moments", sizes, partial, [epsilon, mean, inverse, variance]);
        let of = |slice| tensor(device, slice, (segments, groups));
        Ok(Moments { mean: of(mean), inverse: of(inverse), variance: of(variance) })
    })
}

/// Sums of the first pass.
fn doubles(device: &CudaDevice, n: usize) -> candle_core::Result<CudaSlice<f64>> {
    // SAFETY: the kernel writes all of them.
    unsafe { device.alloc::<f64>(n) }
}

/// Launches a kernel with its images, what typed.cu calls `NORM`, and its other arguments.
macro_rules! launch_norm {
    ($norm:expr, $function:expr, $config:expr, [$($image:expr),+], [$weight:expr, $bias:expr], [$($other:expr),+]) => {{
        let Normalize { sizes, moments, own, activation, .. } = $norm;
        let [c, groups] = [sizes.c, sizes.groups].map(|v| v as i32);
        with_views::<f32, 2, _>([&moments.mean, &moments.inverse], |_, [mean, inverse]| {
            launch!(
                $function, $config, $(&$image,)+ &mean, &inverse, &$weight, &$bias, own, &c, &groups, activation,
                $(&$other),+
            );
            Ok(())
        })?;
    }};
}

struct Normalize {
    sizes: Sizes,
    moments: Moments,
    /// Whether the statistics are given, so that no gradient goes through them.
    given: bool,
    /// Weights of a segment: `c`, or 0 if all have the same.
    own: i32,
    activation: i32,
}

impl Normalize {
    fn forward_of<T: Element>(
        &self,
        x: (&CudaStorage, &Layout),
        weight: (&CudaStorage, &Layout),
        bias: (&CudaStorage, &Layout),
    ) -> candle_core::Result<CudaStorage> {
        let device = &x.0.device;
        let (x, weight, bias) =
            (view::<T>(x.0, x.1)?, view::<f32>(weight.0, weight.1)?, view::<f32>(bias.0, bias.1)?);
        let out = uninitialized::<T>(device, x.len())?;
        let Sizes { segments, rows, c, .. } = self.sizes;
        let (config, segments32, per) =
            (per_segment(rows * c, segments), segments as i32, count32(rows * c)?);
        let forward = kernel_of::<T>(device, "norm_forward")?;
        launch_norm!(self, forward, config, [x], [weight, bias], [segments32, per, out]);
        Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
    }

    /// The gradients of `x`, and of weight and bias, `(segments, c)` each.
    fn backward_of<T: Element>(
        &self,
        x: &Tensor,
        dy: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
    ) -> candle_core::Result<(Tensor, Tensor, Tensor)> {
        let Sizes { segments, rows, c, groups } = self.sizes;
        let (chunks, per_chunk) = self.sizes.chunks();
        let [rows32, per_chunk32, segments32] = [rows, per_chunk, segments].map(|v| v as i32);
        let (fixed, per) = (i32::from(self.given), count32(rows * c)?);
        let shape = x.shape();
        let (dx, gradients) = with_views::<T, 2, _>([x, dy], |device, [x, dy]| {
            with_views::<f32, 2, _>([weight, bias], |_, [weight, bias]| {
                let partial = doubles(device, segments * chunks * 2 * c)?;
                let (sums, config) =
                    (kernel_of::<T>(device, "norm_backward_sums")?, self.sizes.sums_config());
                launch_norm!(
                    self,
                    sums,
                    config,
                    [x, dy],
                    [weight, bias],
                    [segments32, rows32, per_chunk32, partial]
                );
                let means = uninitialized::<f32>(device, segments * groups * 2)?;
                let gradients = uninitialized::<f32>(device, segments * 2 * c)?;
                launch_groups!(
                    device,
                    "norm_gradient_sums",
                    self.sizes,
                    partial,
                    [weight, self.own, fixed, means, gradients]
                );
                let dx = uninitialized::<T>(device, x.len())?;
                let (backward, config) =
                    (kernel_of::<T>(device, "norm_backward")?, per_segment(rows * c, segments));
                launch_norm!(self, backward, config, [x, dy], [weight, bias], [means, segments32, per, dx]);
                Ok((tensor(device, dx, shape), tensor(device, gradients, (segments, 2, c))))
            })
        })?;
        let of = |which: usize| gradients.narrow(1, which, 1)?.squeeze(1);
        Ok((dx, of(1)?, of(0)?))
    }
}

impl CudaNode<3> for Normalize {
    const NAME: &'static str = "normalize";

    fn forward(&self, [x, weight, bias]: [(&CudaStorage, &Layout); 3]) -> CudaOutput {
        let out = with_element!(x.0, T => self.forward_of::<T>(x, weight, bias))?;
        Ok((out, x.1.shape().clone()))
    }

    fn backward(&self, [x, weight, bias]: [&Tensor; 3], back: CudaBackward<3>) -> CudaGradients<3> {
        let CudaBackward { dy, wanted, .. } = back;
        let (dx, dw, db) = with_element!(x, T => self.backward_of::<T>(x, dy, weight, bias))?;
        // One row for all segments is their sum.
        let like = |gradient: Tensor, t: &Tensor| {
            if t.rank() == 2 { gradient.contiguous() } else { gradient.sum(0) }
        };
        let dw = wanted[1].then(|| like(dw, weight)).transpose()?;
        Ok([Some(dx), dw, wanted[2].then(|| like(db, bias)).transpose()?])
    }
}
