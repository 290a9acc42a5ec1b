//! Batch normalisation, with ReLU in the same pass.
//!
//! The work is done by functions on slices, those of [`Moments`] and of [`Norm`]; the custom op is a shell around
//! them.

use std::sync::{Arc, OnceLock};

use candle_core::{D, Device, Tensor};

use super::{
    activation::relu,
    microkernel::{Arithmetic, Loop, run},
    parallel::in_chunks,
    reduce::{block_sums, sums_and_squares},
    shell::{self, Backward, Elements, Gradients, Node, Op, Operand, Output},
};
use crate::{Result, device::CpuLevel};

/// Mean and variance of each channel, both `(c,)`, outside any graph.
#[derive(Clone, Debug)]
pub struct BatchStatistics {
    /// The means.
    pub mean: Tensor,
    /// The variances. [`batch_norm_train`] returns the unbiased estimate, which running averages use.
    pub variance: Tensor,
}

/// Batch normalisation over `(…, c)` by the statistics of `x` itself (Ioffe & Szegedy 2015, Alg. 1), then ReLU
/// if `relu`.
///
/// The statistics of a channel are over all positions of all samples. The *biased* variance normalises, and the
/// unbiased one is returned. `weight`, `bias`: `(c,)`. Gradients go through the statistics.
///
/// Fails if `x` has fewer than two positions, or if `weight` or `bias` has the wrong shape.
pub fn batch_norm_train(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    epsilon: f64,
    relu: bool,
) -> Result<(Tensor, BatchStatistics)> {
    let c = channels(x, &[weight, bias])?;
    if x.elem_count() < 2 * c {
        bail!(Alarm, "images {:?} have one value a channel, expected two for a variance", x.dims());
    }
    let op = BatchNorm::new(CpuLevel::get(), None, epsilon, relu);
    let seen = Arc::clone(&op.seen);
    let out = shell::run(op, [x, weight, bias])?;
    match seen.get() {
        Some(statistics) => Ok((out, statistics.clone())),
        None => bail!(Alarm, "a batch norm that went by the batch has not its statistics"),
    }
}

/// Batch normalisation over `(…, c)` by given statistics, then ReLU if `relu`: a sample's result does not depend on
/// its batch.
///
/// `weight`, `bias`: `(c,)`. No gradient flows to the statistics. Fails if a shape is wrong.
pub fn batch_norm_eval(
    x: &Tensor,
    statistics: &BatchStatistics,
    weight: &Tensor,
    bias: &Tensor,
    epsilon: f64,
    relu: bool,
) -> Result<Tensor> {
    let BatchStatistics { mean, variance } = statistics;
    channels(x, &[mean, variance, weight, bias])?;
    shell::run(BatchNorm::new(CpuLevel::get(), Some(statistics.clone()), epsilon, relu), [x, weight, bias])
}

/// The number of channels, which all `vectors` must have.
fn channels(x: &Tensor, vectors: &[&Tensor]) -> Result<usize> {
    let c = x.dim(D::Minus1)?;
    if c == 0 {
        bail!(Alarm, "images {:?} have no channels, expected at least 1", x.dims());
    }
    if let Some(other) = vectors.iter().find(|v| v.dims() != [c]) {
        bail!(Alarm, "{c} channels are normalised with a vector of shape {:?}", other.dims());
    }
    Ok(c)
}

/// Mean and 1 / √(variance + ε) of each channel.
pub(super) struct Moments {
    pub mean: Vec<f32>,
    pub inverse: Vec<f32>,
}

impl Moments {
    /// Those of statistics given by a caller, whose variance is used unchanged, or else of the statistics of `x`, a
    /// matrix of `c` columns. Returns the latter too, with the unbiased estimate of the variance.
    pub fn of(
        level: CpuLevel,
        x: &[f32],
        c: usize,
        given: Option<&BatchStatistics>,
        epsilon: f64,
    ) -> candle_core::Result<(Self, Option<BatchStatistics>)> {
        let doubles = |t: &Tensor| -> candle_core::Result<Vec<f64>> {
            Ok(Elements::of(&t.contiguous()?)?.iter().map(|&v| f64::from(v)).collect())
        };
        let singles = |values: &[f64], factor: f64| -> Vec<f32> {
            values.iter().map(|v| (v * factor) as f32).collect()
        };
        let ([mean, variance], of_batch) = match given {
            Some(given) => ([doubles(&given.mean)?, doubles(&given.variance)?], None),
            None => {
                let ([mean, variance], rows) = (statistics(level, x, c), (x.len() / c) as f64);
                let vector = |values, factor| Tensor::new(singles(values, factor), &Device::Cpu);
                let (as_is, unbiased) = (vector(&mean, 1.0)?, vector(&variance, rows / (rows - 1.0))?);
                ([mean, variance], Some(BatchStatistics { mean: as_is, variance: unbiased }))
            }
        };
        let inverse = variance.iter().map(|v| (1.0 / (v + epsilon).sqrt()) as f32).collect();
        Ok((Self { mean: singles(&mean, 1.0), inverse }, of_batch))
    }
}

/// Rows of a task, and of a partial sum: a function of only the number of channels.
fn block_rows(c: usize) -> usize {
    ((1 << 15) / c.max(1)).max(1)
}

/// Mean and biased variance of the channels of a matrix with `c` columns.
fn statistics(level: CpuLevel, x: &[f32], c: usize) -> [Vec<f64>; 2] {
    struct Sums<'a>(&'a [f32], usize);
    impl Loop for Sums<'_> {
        type Output = [Vec<f64>; 2];
        #[inline(always)]
        fn run<A: Arithmetic>(self) -> [Vec<f64>; 2] {
            sums_and_squares(self.0, self.1)
        }
    }
    let [sums, squares] = block_sums(x.len(), c, block_rows(c), |block| run(level, Sums(&x[block], c)));
    let rows = (x.len() / c.max(1)) as f64;
    let mean: Vec<f64> = sums.iter().map(|sum| sum / rows).collect();
    // In double precision, cancellation costs at most half of the 16 digits for mean / σ up to 1e4.
    let variance = squares.iter().zip(&mean).map(|(s, mean)| (s / rows - mean * mean).max(0.0)).collect();
    [mean, variance]
}

/// The factors that normalise the channels: `z = x̂ · weight + bias`, `x̂ = (x - mean) · inverse`; the output is
/// `max(z, 0)` if `relu`, else `z`.
#[derive(Clone, Copy)]
pub(super) struct Norm<'a> {
    pub level: CpuLevel,
    pub moments: &'a Moments,
    pub weight: &'a [f32],
    pub bias: &'a [f32],
    pub relu: bool,
    /// Whether the moments are those of the images, so that gradients flow through them as well.
    pub of_batch: bool,
}

impl Norm<'_> {
    /// The output.
    pub fn normalize(&self, x: &[f32]) -> Vec<f32> {
        let (c, channels) = (self.weight.len(), &self.channels());
        in_chunks(x.len(), block_rows(c) * c, |range, out| {
            run(self.level, Normalize { x: &x[range], channels, out });
        })
    }

    /// The gradients of the input, and of weight and bias if they are wanted, for `dy`, that of the output.
    ///
    /// If the moments are those of `x`, the gradient flows through them as well, which uses the gradients of weight
    /// and bias: `dx = inverse · weight · (dz - mean(dz) - x̂ · mean(dz · x̂))`, means over the rows.
    pub fn backward(&self, x: &[f32], dy: &[f32], want_weights: bool) -> (Vec<f32>, Option<[Vec<f32>; 2]>) {
        let (c, channels) = (self.weight.len(), &self.channels());
        let rows = (x.len() / c.max(1)) as f64;
        // For each channel `Σ dz · x̂` and `Σ dz`.
        let sums = (want_weights || self.of_batch).then(|| {
            let [bias, mut weight] = block_sums(x.len(), c, block_rows(c), |block| {
                run(self.level, GradientSums { x: &x[block.clone()], dy: &dy[block], channels })
            });
            weight.iter_mut().zip(&self.moments.inverse).for_each(|(w, &inverse)| *w *= f64::from(inverse));
            [weight, bias]
        });
        let (mut offset, mut slope) = (vec![0f32; c], vec![0f32; c]);
        if let (true, Some([weight, bias])) = (self.of_batch, &sums) {
            for i in 0..c {
                let scale = f64::from(channels.scale[i]);
                offset[i] = (-scale * bias[i] / rows) as f32;
                slope[i] = (-scale * f64::from(self.moments.inverse[i]) * weight[i] / rows) as f32;
            }
        }
        let dx = in_chunks(x.len(), block_rows(c) * c, |range, dx| {
            let (x, dy) = (&x[range.clone()], &dy[range]);
            run(self.level, InputGradient { x, dy, channels, offset: &offset, slope: &slope, dx });
        });
        let single = |sums: Vec<f64>| sums.into_iter().map(|v| v as f32).collect();
        (dx, sums.filter(|_| want_weights).map(|sums| sums.map(single)))
    }

    fn channels(&self) -> Channels<'_> {
        Channels {
            mean: &self.moments.mean,
            scale: self.moments.inverse.iter().zip(self.weight).map(|(i, w)| i * w).collect(),
            bias: self.bias,
            floor: if self.relu { 0.0 } else { f32::NEG_INFINITY },
        }
    }
}

/// `z = (x - mean) · scale + bias`, not below `floor`.
struct Channels<'a> {
    mean: &'a [f32],
    scale: Vec<f32>,
    bias: &'a [f32],
    floor: f32,
}

struct Normalize<'a> {
    x: &'a [f32],
    channels: &'a Channels<'a>,
    out: &'a mut [f32],
}

impl Loop for Normalize<'_> {
    type Output = ();
    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { x, channels, out } = self;
        let (c, floor) = (channels.bias.len(), channels.floor);
        let (mean, scale, bias) = (&channels.mean[..c], &channels.scale[..c], &channels.bias[..c]);
        for (out, x) in out.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
            for i in 0..c {
                let z = A::mul_add(x[i] - mean[i], scale[i], bias[i]);
                // Not `max`: a NaN stays NaN.
                out[i] = if z < floor { floor } else { z };
            }
        }
    }
}

/// `dz`, the gradient of ReLU's input: 0 where the input is not above 0. The same operations as in [`Normalize`],
/// so that both agree on the sign.
#[inline(always)]
fn inner_gradient<A: Arithmetic>(centered: f32, dy: f32, scale: f32, bias: f32, floor: f32) -> f32 {
    if A::mul_add(centered, scale, bias) <= floor { 0.0 } else { dy }
}

struct GradientSums<'a> {
    x: &'a [f32],
    dy: &'a [f32],
    channels: &'a Channels<'a>,
}

impl Loop for GradientSums<'_> {
    /// For each channel `[Σ dz, Σ dz · (x - mean)]`.
    type Output = [Vec<f64>; 2];

    #[inline(always)]
    fn run<A: Arithmetic>(self) -> [Vec<f64>; 2] {
        let Self { x, dy, channels } = self;
        let (c, floor) = (channels.bias.len(), channels.floor);
        let (mean, scale, bias) = (&channels.mean[..c], &channels.scale[..c], &channels.bias[..c]);
        let (mut sums, mut products) = (vec![0f64; c], vec![0f64; c]);
        for (x, dy) in x.chunks_exact(c).zip(dy.chunks_exact(c)) {
            let (sums, products) = (&mut sums[..c], &mut products[..c]);
            for i in 0..c {
                let centered = x[i] - mean[i];
                let dz = inner_gradient::<A>(centered, dy[i], scale[i], bias[i], floor);
                sums[i] += f64::from(dz);
                products[i] += f64::from(dz * centered);
            }
        }
        [sums, products]
    }
}

struct InputGradient<'a> {
    x: &'a [f32],
    dy: &'a [f32],
    channels: &'a Channels<'a>,
    offset: &'a [f32],
    slope: &'a [f32],
    dx: &'a mut [f32],
}

impl Loop for InputGradient<'_> {
    type Output = ();
    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { x, dy, channels, offset, slope, dx } = self;
        let (c, floor) = (channels.bias.len(), channels.floor);
        let (mean, scale, bias) = (&channels.mean[..c], &channels.scale[..c], &channels.bias[..c]);
        let (offset, slope) = (&offset[..c], &slope[..c]);
        let rows = x.chunks_exact(c).zip(dy.chunks_exact(c));
        for (dx, (x, dy)) in dx.chunks_exact_mut(c).zip(rows) {
            for i in 0..c {
                let centered = x[i] - mean[i];
                let dz = inner_gradient::<A>(centered, dy[i], scale[i], bias[i], floor);
                dx[i] = A::mul_add(dz, scale[i], A::mul_add(centered, slope[i], offset[i]));
            }
        }
    }
}

struct BatchNorm {
    level: CpuLevel,
    /// The statistics to normalise by, unless they are those of the batch, through which gradients flow as well.
    given: Option<BatchStatistics>,
    epsilon: f64,
    relu: bool,
    /// The statistics of the batch, the variance unbiased.
    seen: Arc<OnceLock<BatchStatistics>>,
    moments: OnceLock<Moments>,
}

impl BatchNorm {
    fn new(level: CpuLevel, given: Option<BatchStatistics>, epsilon: f64, relu: bool) -> Self {
        Self { level, given, epsilon, relu, seen: Arc::default(), moments: OnceLock::new() }
    }

    fn norm<'a>(&self, moments: &'a Moments, weight: &'a [f32], bias: &'a [f32]) -> Norm<'a> {
        let (level, relu, of_batch) = (self.level, self.relu, self.given.is_none());
        Norm { level, moments, weight, bias, relu, of_batch }
    }

    /// Keeps the statistics of a batch of `rows` rows with this biased variance.
    fn saw(&self, mean: Tensor, variance: Tensor, rows: usize) -> candle_core::Result<()> {
        let rows = rows as f64;
        let statistics = BatchStatistics { mean, variance: (variance * (rows / (rows - 1.0)))? };
        self.seen.get_or_init(|| statistics);
        Ok(())
    }
}

impl Node<3> for BatchNorm {
    const NAME: &'static str = "batch-norm";

    fn forward(&self, [x, weight, bias]: [Operand; 3]) -> Output {
        let (c, given) = (weight.len(), self.given.as_ref());
        let (moments, of_batch) = Moments::of(self.level, &x, c, given, self.epsilon)?;
        if let Some(seen) = of_batch {
            self.seen.get_or_init(|| seen);
        }
        let moments = self.moments.get_or_init(|| moments);
        Ok((self.norm(moments, &weight, &bias).normalize(&x), x.shape().clone()))
    }

    fn backward(&self, [x, weight, bias]: [Operand; 3], back: Backward<3>) -> Gradients<3> {
        let Backward { dy, wanted, .. } = back;
        let Some(moments) = self.moments.get() else { candle_core::bail!("a batch norm has seen no batch") };
        let norm = self.norm(moments, &weight, &bias);
        let (dx, weights) = norm.backward(&x, dy, wanted[1] || wanted[2]);
        let [weight, bias] = weights.map_or([None, None], |gradients| gradients.map(Some));
        Ok([Some(dx), weight, bias])
    }
}

impl Op<3> for BatchNorm {
    fn reference(&self, [x, weight, bias]: [&Tensor; 3]) -> Result<Tensor> {
        let like = |t: &Tensor| t.to_dtype(x.dtype());
        let (mean, variance) = match &self.given {
            Some(given) => (like(&given.mean.detach())?, like(&given.variance.detach())?),
            None => {
                let rows = x.reshape(((), x.dim(D::Minus1)?))?;
                let mean = rows.mean(0)?;
                let variance = rows.broadcast_sub(&mean)?.sqr()?.mean(0)?;
                let of_weight = |t: &Tensor| t.detach().to_dtype(weight.dtype());
                self.saw(of_weight(&mean)?, of_weight(&variance)?, rows.dim(0)?)?;
                (mean, variance)
            }
        };
        let out = x.broadcast_sub(&mean)?.broadcast_div(&(variance + self.epsilon)?.sqrt()?)?;
        let out = out.broadcast_mul(&like(weight)?)?.broadcast_add(&like(bias)?)?;
        if self.relu { relu(&out) } else { Ok(out) }
    }

    #[cfg(feature = "cuda")]
    fn cuda(self, [x, weight, bias]: [&Tensor; 3]) -> Result<Tensor> {
        let given = self.given.as_ref().map(|given| [&given.mean, &given.variance]);
        let (out, [mean, variance]) =
            super::cuda::norm::batch_norm(x, given, weight, bias, self.epsilon, self.relu)?;
        if given.is_none() {
            self.saw(mean, variance, x.elem_count() / weight.elem_count())?;
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Var};

    use super::{super::testing::*, *};

    const EPSILON: f64 = 1e-5;

    fn operands(shape: (usize, usize, usize, usize)) -> [Tensor; 3] {
        let x = (random(1, shape) * 2.0).unwrap();
        [(x + 0.7).unwrap(), (random(2, shape.3) + 1.0).unwrap(), random(3, shape.3)]
    }

    fn running(c: usize) -> BatchStatistics {
        BatchStatistics {
            mean: random(4, c),
            variance: (random(5, c).sqr().unwrap() + 0.1).unwrap().to_dtype(candle_core::DType::F32).unwrap(),
        }
    }

    fn train(t: &[Tensor], relu: bool) -> Result<Tensor> {
        Ok(batch_norm_train(&t[0], &t[1], &t[2], EPSILON, relu)?.0)
    }

    fn eval(t: &[Tensor], relu: bool) -> Result<Tensor> {
        batch_norm_eval(&t[0], &running(t[1].elem_count()), &t[1], &t[2], EPSILON, relu)
    }

    #[test]
    fn outputs_and_gradients_match_the_reference_in_double_precision() {
        for shape in [(2, 3, 5, 1), (1, 2, 1, 6), (3, 4, 4, 17), (2, 32, 32, 64), (3, 5, 5, 300)] {
            let statistics = running(shape.3);
            for relu in [false, true] {
                for given in [None, Some(&statistics)] {
                    check(&operands(shape), |level| BatchNorm::new(level, given.cloned(), EPSILON, relu));
                }
            }
        }
    }

    #[test]
    fn the_statistics_are_the_mean_and_the_unbiased_variance() {
        // Channel 0: 1, 3, 5, 7 with squares about the mean 9 + 1 + 1 + 9; channel 1: constant.
        let x = Tensor::new(&[[1f32, 2.0], [3.0, 2.0], [5.0, 2.0], [7.0, 2.0]], &Device::Cpu).unwrap();
        for dtype in [DType::F32, DType::F64] {
            let x = x.to_dtype(dtype).unwrap();
            let (ones, zeros) =
                (x.ones_like().unwrap().get(0).unwrap(), x.zeros_like().unwrap().get(0).unwrap());
            let (out, found) = batch_norm_train(&x, &ones, &zeros, 0.0, false).unwrap();
            let values = |t: &Tensor| values(&t.to_dtype(DType::F32).unwrap());
            assert_eq!(values(&found.mean), [4.0, 2.0]);
            let variance = values(&found.variance);
            assert!((variance[0] - 20.0 / 3.0).abs() < 1e-6 && variance[1] == 0.0, "{variance:?}");
            assert!((values(&out)[6] - 3.0 / 5f32.sqrt()).abs() < 1e-6, "the biased variance is 5");
        }
    }

    #[test]
    fn a_large_mean_does_not_drown_the_variance() {
        let [x, ..] = operands((2, 16, 16, 4));
        let x = (x + 1000.0).unwrap();
        let weights = (Tensor::new(&[1f32; 4], x.device()).unwrap(), Tensor::new(&[0f32; 4], x.device()));
        let out = values(&train(&[x, weights.0, weights.1.unwrap()], false).unwrap());
        for channel in 0..4 {
            let squares: f32 = out.iter().skip(channel).step_by(4).map(|v| v * v).sum();
            assert!((squares / 512.0 - 1.0).abs() < 1e-4, "variance {}", squares / 512.0);
        }
    }

    #[test]
    fn the_bits_do_not_depend_on_the_threads_and_with_given_statistics_not_on_the_batch() {
        let operands = operands((7, 24, 24, 24));
        check_threads(&operands, |t| train(t, true));
        check_invariance(&operands, 1, |t| eval(t, true));
    }

    #[test]
    fn gradients_are_finite_differences() {
        check_finite_differences(&operands((2, 2, 3, 4)), |t| train(t, false));
        check_finite_differences(&operands((2, 2, 3, 4)), |t| eval(t, false));
    }

    #[test]
    fn untracked_operands_get_no_gradient() {
        check_untracked(&operands((2, 2, 3, 4)), |t| train(t, true));
        check_untracked(&operands((2, 2, 3, 4)), |t| eval(t, true));
    }

    #[test]
    fn the_gradient_of_relu_at_zero_is_zero() {
        let x = Var::new(&[[0f32], [2.0], [4.0]], &Device::Cpu).unwrap();
        let one = Tensor::new(&[1f32], x.device()).unwrap();
        let statistics = BatchStatistics { mean: (&one * 2.0).unwrap(), variance: one.clone() };
        let out = batch_norm_eval(&x, &statistics, &one, &one.zeros_like().unwrap(), 0.0, true).unwrap();
        assert_eq!(values(&out), [0.0, 0.0, 2.0]);
        let gradients = out.sum_all().unwrap().backward().unwrap();
        assert_eq!(values(gradients.get(&x).unwrap()), [0.0, 0.0, 1.0]);
    }

    #[test]
    fn what_has_no_variance_or_another_shape_is_refused() {
        let [x, weight, bias] = operands((1, 1, 1, 6));
        let error = batch_norm_train(&x, &weight, &bias, EPSILON, false).unwrap_err().to_string();
        assert_eq!(error, "images [1, 1, 1, 6] have one value a channel, expected two for a variance");
        let error = batch_norm_eval(&x, &running(5), &weight, &bias, EPSILON, false).unwrap_err();
        assert_eq!(error.to_string(), "6 channels are normalised with a vector of shape [5]");
    }
}
