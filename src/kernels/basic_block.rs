//! The residual block of ResNets as one node of the tape.

use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

use candle_core::{Shape, Tensor};

use super::{
    activation::relu,
    batch_norm::{BatchStatistics, Moments, Norm, batch_norm_eval, batch_norm_train},
    block::{BlockWeights, ranges, split},
    conv2d::{Bias, Convolution, conv2d_packed},
    microkernel::{Arithmetic, Loop, run, zeros},
    parallel::{CHUNK, add, for_each_chunk, in_chunks},
    shell::{self, Backward, Gradients, Node, Op, Operand, Output},
};
use crate::{
    Result,
    device::{ConvAlgorithm, CpuLevel},
};

/// The sizes of a basic block: two 3 × 3 convolutions with batch norms, ReLU between them, the input added and
/// ReLU again (He et al. 2016, §4.1). Where the shape changes, the input goes through a 1 × 1 convolution and a
/// batch norm.
#[derive(Clone, Copy, Debug)]
pub struct BasicBlock {
    /// Channels of the input.
    pub c_in: usize,
    /// Channels of the output.
    pub c_out: usize,
    /// The stride of the first convolution and the shortcut.
    pub stride: usize,
    /// Added to the variances.
    pub epsilon: f64,
}

impl BasicBlock {
    /// The shapes of the parameters, in their order in the block's vector: `conv1.weight`, weight and bias of
    /// `bn1`, the same of `conv2` and `bn2` and, if the shape changes, of `shortcut.0` and `shortcut.1`.
    pub fn parameters(&self) -> Vec<(&'static str, Shape)> {
        let Self { c_in, c_out, .. } = *self;
        let mut parameters: Vec<(&str, Shape)> = vec![
            ("conv1.weight", (c_out, c_in, 3, 3).into()),
            ("bn1.weight", c_out.into()),
            ("bn1.bias", c_out.into()),
            ("conv2.weight", (c_out, c_out, 3, 3).into()),
            ("bn2.weight", c_out.into()),
            ("bn2.bias", c_out.into()),
        ];
        if self.has_shortcut() {
            parameters.push(("shortcut.0.weight", (c_out, c_in, 1, 1).into()));
            parameters.push(("shortcut.1.weight", c_out.into()));
            parameters.push(("shortcut.1.bias", c_out.into()));
        }
        parameters
    }

    /// Whether the shape changes.
    pub fn has_shortcut(&self) -> bool {
        self.stride != 1 || self.c_in != self.c_out
    }

    /// Fails if operands do not fit.
    fn check(&self, x: &Tensor, theta: &Tensor, running: Option<&[BatchStatistics]>) -> Result<()> {
        let Self { c_in, c_out, stride, .. } = *self;
        let (b, h, w, c) = x.dims4()?;
        let count = ranges(&self.parameters()).last().map_or(0, |last| last.end);
        let (images, theta) = (x.dims(), theta.dims());
        if c != c_in || theta != [count] {
            bail!(
                Alarm,
                "a basic block of {c_in} channels and {count} parameters got {images:?} and {theta:?}"
            );
        }
        if [c_in, c_out, stride].contains(&0) {
            bail!(Alarm, "{c_in} to {c_out} channels at stride {stride}, expected at least 1 of each");
        }
        let Some(running) = running else {
            if b * h.div_ceil(stride) * w.div_ceil(stride) < 2 {
                bail!(Alarm, "images {images:?} have one value a channel, expected two for a variance");
            }
            return Ok(());
        };
        if running.len() != self.norms() {
            bail!(Alarm, "a block of {} norms got statistics for {}", self.norms(), running.len());
        }
        let mut vectors = running.iter().flat_map(|s| [&s.mean, &s.variance]);
        if let Some(vector) = vectors.find(|vector| vector.dims() != [c_out]) {
            bail!(Alarm, "{c_out} channels are normalised with a vector of shape {:?}", vector.dims());
        }
        Ok(())
    }

    /// How many batch norms there are: 2, or 3 with that of the shortcut.
    pub fn norms(&self) -> usize {
        if self.has_shortcut() { 3 } else { 2 }
    }
}

/// A basic block. `x`: `(b, h, w, c_in)`; `theta`: the parameters, one vector in the order of
/// [`BasicBlock::parameters`]. Returns `(b, h / stride, w / stride, c_out)`, rounded up, and, if the block
/// normalised by them, the statistics of the batch for each norm.
///
/// `running`: the statistics to normalise by, one for each norm; without them, the block normalises by those of the
/// batch, through which gradients then flow as well. `packed` belongs to these parameters only. Fails if a shape
/// does not fit.
pub fn basic_block(
    x: &Tensor,
    theta: &Tensor,
    running: Option<&[BatchStatistics]>,
    block: &BasicBlock,
    packed: &BlockWeights,
) -> Result<(Tensor, Vec<BatchStatistics>)> {
    block.check(x, theta, running)?;
    let how = (CpuLevel::get(), ConvAlgorithm::get());
    let op = FusedBlock::new(how, [x, theta], running, block, packed)?;
    let seen = Arc::clone(&op.seen);
    let out = shell::run(op, [x, theta])?;
    // There are no batch statistics if statistics were given.
    Ok((out, seen.get().cloned().unwrap_or_default()))
}

struct FusedBlock {
    level: CpuLevel,
    block: BasicBlock,
    /// Where the parameters are in the vector.
    parts: Vec<Range<usize>>,
    conv1: Convolution,
    conv2: Convolution,
    shortcut: Option<Convolution>,
    packed: BlockWeights,
    /// The statistics to normalise by, unless they are those of the batch.
    running: Option<Vec<BatchStatistics>>,
    /// The statistics of the batch, the variances unbiased.
    seen: Arc<OnceLock<Vec<BatchStatistics>>>,
    /// Whether there will be a backward pass.
    keep: bool,
    kept: OnceLock<Kept>,
}

/// What the backward pass needs from the forward pass: each norm's input, and the moments that normalise it.
struct Kept {
    inputs: Vec<Vec<f32>>,
    moments: Vec<Moments>,
}

/// `max(z + residual, 0)` over `z`.
struct AddRelu<'a> {
    z: &'a mut [f32],
    residual: &'a [f32],
}

impl Loop for AddRelu<'_> {
    type Output = ();
    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        for (z, residual) in self.z.iter_mut().zip(self.residual) {
            let sum = *z + residual;
            // Not `max`: a NaN stays NaN.
            *z = if sum < 0.0 { 0.0 } else { sum };
        }
    }
}

impl FusedBlock {
    fn new(
        (level, algorithm): (CpuLevel, ConvAlgorithm),
        [x, theta]: [&Tensor; 2],
        running: Option<&[BatchStatistics]>,
        block: &BasicBlock,
        packed: &BlockWeights,
    ) -> Result<Self> {
        let BasicBlock { c_in, c_out, stride, .. } = *block;
        let (b, h, w, _) = x.dims4()?;
        let convolution = |(h, w, c_in): (usize, usize, usize), k: usize, stride: usize| {
            Convolution::new(level, algorithm, (b, h, w, c_in), (c_out, c_in, k, k), stride, (k / 2, k / 2))
        };
        Ok(Self {
            level,
            block: *block,
            parts: ranges(&block.parameters()),
            conv1: convolution((h, w, c_in), 3, stride)?,
            conv2: convolution((h.div_ceil(stride), w.div_ceil(stride), c_out), 3, 1)?,
            shortcut: block.has_shortcut().then(|| convolution((h, w, c_in), 1, stride)).transpose()?,
            packed: packed.clone(),
            running: running.map(<[_]>::to_vec),
            seen: Arc::default(),
            keep: x.track_op() || theta.track_op(),
            kept: OnceLock::new(),
        })
    }

    fn part<'a>(&self, theta: &'a [f32], i: usize) -> &'a [f32] {
        self.parts.get(i).map_or(&[], |range| &theta[range.clone()])
    }

    /// Norm `i` of the block, which normalises with `moments`.
    fn norm<'a>(&self, theta: &'a [f32], i: usize, moments: &'a Moments) -> Norm<'a> {
        let (weight, bias) = (self.part(theta, 3 * i + 1), self.part(theta, 3 * i + 2));
        let of_batch = self.running.is_none();
        Norm { level: self.level, moments, weight, bias, relu: i == 0, of_batch }
    }

    fn block_forward(&self, x: &[f32], theta: &[f32]) -> candle_core::Result<Vec<f32>> {
        let c = self.part(theta, 1).len();
        let (mut seen, mut all_moments) = (Vec::new(), Vec::new());
        // The output of norm `i`.
        let mut normalize = |i: usize, input: &[f32]| -> candle_core::Result<Vec<f32>> {
            let given = self.running.as_ref().map(|running| &running[i]);
            let (moments, of_batch) = Moments::of(self.level, input, c, given, self.block.epsilon)?;
            seen.extend(of_batch);
            let out = self.norm(theta, i, &moments).normalize(input);
            all_moments.push(moments);
            Ok(out)
        };
        let convolve = |i: usize, convolution: &Convolution, x: &[f32]| {
            let kernels = self.packed[i].forward(convolution, self.part(theta, 3 * i));
            convolution.forward(x, &kernels, Bias::None)
        };
        let first = convolve(0, &self.conv1, x);
        let hidden = normalize(0, &first)?;
        let second = convolve(1, &self.conv2, &hidden);
        drop(hidden);
        let mut out = normalize(1, &second)?;
        let mut inputs = vec![first, second];
        let through;
        let residual = match &self.shortcut {
            None => x,
            Some(shortcut) => {
                inputs.push(convolve(2, shortcut, x));
                through = normalize(2, &inputs[2])?;
                &through[..]
            }
        };
        let len = out.len();
        for_each_chunk(&mut out, CHUNK, len, |i, z| {
            run(self.level, AddRelu { residual: &residual[i * CHUNK..][..z.len()], z });
        });
        self.seen.get_or_init(|| seen);
        if self.keep {
            self.kept.get_or_init(|| Kept { inputs, moments: all_moments });
        }
        Ok(out)
    }

    /// The wanted ones among the gradients of `x` and `theta`.
    fn block_backward(
        &self,
        x: &[f32],
        theta: &[f32],
        kept: &Kept,
        out: &[f32],
        dy: &[f32],
        [want_x, want_theta]: [bool; 2],
    ) -> [Option<Vec<f32>>; 2] {
        let mut dtheta = zeros(if want_theta { theta.len() } else { 0 });
        let mut set = |i: usize, values: &[f32]| dtheta[self.parts[i].clone()].copy_from_slice(values);
        // The gradient of the last ReLU's input.
        let dsum = in_chunks(dy.len(), CHUNK, |range, d| {
            for ((d, &out), &dy) in d.iter_mut().zip(&out[range.clone()]).zip(&dy[range]) {
                *d = if out > 0.0 { dy } else { 0.0 };
            }
        });
        // The gradient of norm `i`'s input from that of its output.
        let mut through_norm = |i: usize, dz: &[f32]| {
            let norm = self.norm(theta, i, &kept.moments[i]);
            let (d, weights) = norm.backward(&kept.inputs[i], dz, want_theta);
            weights.iter().flatten().enumerate().for_each(|(k, values)| set(3 * i + 1 + k, values));
            d
        };
        let through_convolution = |i: usize, convolution: &Convolution, d: &[f32]| {
            convolution.input_gradient(d, &self.packed[i].backward(convolution, self.part(theta, 3 * i)))
        };
        let dsecond = through_norm(1, &dsum);
        let dhidden = through_convolution(1, &self.conv2, &dsecond);
        let dfirst = through_norm(0, &dhidden);
        drop(dhidden);
        let dshortcut = self.shortcut.as_ref().map(|shortcut| (shortcut, through_norm(2, &dsum)));
        if want_theta {
            let hidden = self.norm(theta, 0, &kept.moments[0]).normalize(&kept.inputs[0]);
            set(3, &self.conv2.weight_gradient(&hidden, &dsecond));
            set(0, &self.conv1.weight_gradient(x, &dfirst));
            if let Some((shortcut, d)) = &dshortcut {
                set(6, &shortcut.weight_gradient(x, d));
            }
        }
        let dx = want_x.then(|| {
            let mut dx = through_convolution(0, &self.conv1, &dfirst);
            let residual = match &dshortcut {
                Some((shortcut, d)) => through_convolution(2, shortcut, d),
                None => dsum,
            };
            add(&mut dx, &residual);
            dx
        });
        [dx, want_theta.then_some(dtheta)]
    }
}

impl Node<2> for FusedBlock {
    const NAME: &'static str = "basic-block";

    fn forward(&self, [x, theta]: [Operand; 2]) -> Output {
        Ok((self.block_forward(&x, &theta)?, self.conv2.out_shape()))
    }

    fn backward(&self, [x, theta]: [Operand; 2], Backward { out, dy, wanted }: Backward<2>) -> Gradients<2> {
        let Some(kept) = self.kept.get() else {
            candle_core::bail!("a block that was not tracked has no gradient")
        };
        Ok(self.block_backward(&x, &theta, kept, out, dy, wanted))
    }
}

impl Op<2> for FusedBlock {
    /// The block composed of the device's ops.
    fn reference(&self, [x, theta]: [&Tensor; 2]) -> Result<Tensor> {
        let BasicBlock { stride, epsilon, .. } = self.block;
        let parts = split(theta, &self.block.parameters())?;
        let mut seen = Vec::new();
        let mut norm = |i: usize, name: &str, x: &Tensor, relu: bool| -> Result<Tensor> {
            let (weight, bias) = (&parts[&*format!("{name}.weight")], &parts[&*format!("{name}.bias")]);
            let Some(running) = &self.running else {
                let (out, statistics) = batch_norm_train(x, weight, bias, epsilon, relu)?;
                seen.push(statistics);
                return Ok(out);
            };
            batch_norm_eval(x, &running[i], weight, bias, epsilon, relu)
        };
        let conv = |x: &Tensor, i: usize, name: &str, stride: usize, padding: usize| {
            conv2d_packed(x, &parts[name], None, stride, (padding, padding), Some(&self.packed[i]))
        };
        let h = norm(0, "bn1", &conv(x, 0, "conv1.weight", stride, 1)?, true)?;
        let h = norm(1, "bn2", &conv(&h, 1, "conv2.weight", 1, 1)?, false)?;
        let x = match self.block.has_shortcut() {
            true => {
                let x = conv(x, 2, "shortcut.0.weight", stride, 0)?;
                norm(2, "shortcut.1", &x, false)?
            }
            false => x.clone(),
        };
        self.seen.get_or_init(|| seen);
        relu(&(h + x)?)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::*, *};

    const BLOCKS: [BasicBlock; 3] = [
        BasicBlock { c_in: 8, c_out: 8, stride: 1, epsilon: 1e-5 },
        BasicBlock { c_in: 6, c_out: 9, stride: 1, epsilon: 1e-5 },
        BasicBlock { c_in: 8, c_out: 12, stride: 2, epsilon: 1e-3 },
    ];

    fn operands(block: &BasicBlock, (b, h, w): (usize, usize, usize)) -> [Tensor; 2] {
        let count: usize = block.parameters().iter().map(|(_, shape)| shape.elem_count()).sum();
        [random(1, (b, h, w, block.c_in)), (random(2, count) * 0.4).unwrap()]
    }

    fn by(
        run: impl Fn(FusedBlock, [&Tensor; 2]) -> Result<Tensor>,
        level: CpuLevel,
        block: &BasicBlock,
        running: Option<&[BatchStatistics]>,
        t: &[Tensor],
    ) -> Result<(Tensor, Vec<BatchStatistics>)> {
        let (how, operands) = ((level, ConvAlgorithm::Winograd), [&t[0], &t[1]]);
        let op = FusedBlock::new(how, operands, running, block, &BlockWeights::default())?;
        let seen = Arc::clone(&op.seen);
        Ok((run(op, operands)?, seen.get().cloned().unwrap()))
    }

    fn at(
        level: CpuLevel,
        block: &BasicBlock,
        running: Option<&[BatchStatistics]>,
        t: &[Tensor],
    ) -> Result<(Tensor, Vec<BatchStatistics>)> {
        by(shell::apply, level, block, running, t)
    }

    fn composed(
        block: &BasicBlock,
        running: Option<&[BatchStatistics]>,
        t: &[Tensor],
    ) -> Result<(Tensor, Vec<BatchStatistics>)> {
        by(|op, operands| op.reference(operands), CpuLevel::Portable, block, running, t)
    }

    fn running(block: &BasicBlock) -> Vec<BatchStatistics> {
        let positive = |key| (random(key, block.c_out).sqr().unwrap() + 0.1).unwrap();
        (0..block.norms() as u64)
            .map(|i| BatchStatistics { mean: random(50 + i, block.c_out), variance: positive(60 + i) })
            .collect()
    }

    #[test]
    fn a_block_is_its_operations_one_after_the_other() {
        for block in &BLOCKS {
            for size in [(2, 5, 7), (3, 8, 8)] {
                let operands = operands(block, size);
                check_against(
                    &operands,
                    |level, t| Ok(at(level, block, None, t)?.0),
                    |t| Ok(composed(block, None, t)?.0),
                );
                let running = running(block);
                let doubles: Vec<BatchStatistics> = running
                    .iter()
                    .map(|s| {
                        let double = |t: &Tensor| t.to_dtype(candle_core::DType::F64).unwrap();
                        BatchStatistics { mean: double(&s.mean), variance: double(&s.variance) }
                    })
                    .collect();
                check_against(
                    &operands,
                    |level, t| Ok(at(level, block, Some(&running), t)?.0),
                    |t| Ok(composed(block, Some(&doubles), t)?.0),
                );
            }
        }
    }

    #[test]
    fn the_statistics_of_the_batch_are_those_of_the_operations() {
        for block in &BLOCKS {
            let operands = operands(block, (3, 6, 5));
            let (_, found) = at(CpuLevel::get(), block, None, &operands).unwrap();
            let (_, expected) = composed(block, None, &operands).unwrap();
            assert_eq!((found.len(), expected.len()), (block.norms(), block.norms()));
            for (found, expected) in found.iter().zip(&expected) {
                let pairs = [(&found.mean, &expected.mean), (&found.variance, &expected.variance)];
                for (found, expected) in pairs {
                    for (f, e) in values(found).into_iter().zip(values(expected)) {
                        assert!((f - e).abs() <= 1e-5 * e.abs().max(1.0), "{f}, expected {e}");
                    }
                }
            }
            assert!(at(CpuLevel::get(), block, Some(&running(block)), &operands).unwrap().1.is_empty());
        }
    }

    #[test]
    fn threads_do_not_show_and_by_given_statistics_the_batch_does_not_either() {
        for block in &BLOCKS {
            let operands = operands(block, (7, 12, 8));
            check_threads(&operands, |t| Ok(at(CpuLevel::get(), block, None, t)?.0));
            let running = running(block);
            check_invariance(&operands, 1, |t| Ok(at(CpuLevel::get(), block, Some(&running), t)?.0));
        }
    }

    #[test]
    fn operands_that_do_not_fit_are_named() {
        let block = &BLOCKS[0];
        let [x, theta] = operands(block, (2, 4, 4));
        let said = |theta: &Tensor, running: Option<&[BatchStatistics]>| {
            basic_block(&x, theta, running, block, &BlockWeights::default()).unwrap_err().to_string()
        };
        assert!(said(&random(1, 7), None).contains("1184 parameters got [2, 4, 4, 8] and [7]"));
        assert_eq!(said(&theta, Some(&running(block)[..1])), "a block of 2 norms got statistics for 1");
    }

    #[test]
    fn frozen_parameters_get_no_gradient() {
        for block in &BLOCKS {
            let running = running(block);
            for running in [None, Some(&running[..])] {
                check_untracked(&operands(block, (2, 4, 4)), |t| {
                    Ok(at(CpuLevel::get(), block, running, t)?.0)
                });
            }
        }
    }
}
