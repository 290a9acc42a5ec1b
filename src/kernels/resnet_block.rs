//! The residual block of the diffusion U-Net as one node of the tape.
//!
//! Only one of the block's intermediate images is kept for the backward pass; the others are recomputed from it,
//! which is cheaper than the memory. The first convolution adds the step's embedding; the second one adds the input
//! if it uses Winograd's filtering.

use std::{ops::Range, sync::OnceLock};

use candle_core::{Shape, Tensor};

use super::{
    add_channels::add_channels,
    block::{BlockWeights, ranges, split},
    conv2d::{Bias, Convolution, conv2d_packed},
    group_norm::{ChannelSums, Moments, Norm, group_norm},
    matmul::{linear, linear_input_gradient, linear_rows, linear_weight_gradient},
    microkernel::zeros,
    parallel::{CHUNK, add, for_each_chunk, for_each_pair},
    reduce::{bias_gradient, column_sums},
    shell::{self, Backward, Elements, Gradients, Node, Op, Operand, Output},
};
use crate::{
    Result,
    device::{ConvAlgorithm, CpuLevel},
};

/// The sizes of a residual block: norm, SiLU, convolution, the step, norm, SiLU, convolution, and the input added
/// (`diffusers`' `ResnetBlock2D`; Ho et al. 2020, App. B).
#[derive(Clone, Copy, Debug)]
pub struct ResnetBlock {
    /// Channels of the input.
    pub c_in: usize,
    /// Channels of the output.
    pub c_out: usize,
    /// Features of the step's embedding.
    pub time_dim: usize,
    /// Groups of the two norms.
    pub groups: [usize; 2],
    /// Added to the variances of the norms.
    pub epsilon: f64,
    /// Whether the step scales and shifts the second norm's output, instead of being added before it.
    pub scale_shift: bool,
    /// Whether the input goes through a 1 × 1 convolution before it is added, as it must if the number of channels
    /// changes.
    pub shortcut: bool,
    /// The divisor of the sum of the block and its input.
    pub output_scale: f64,
}

/// Where each parameter of a block is in its vector.
struct Parts {
    norm1: [Range<usize>; 2],
    conv1: [Range<usize>; 2],
    time: [Range<usize>; 2],
    norm2: [Range<usize>; 2],
    conv2: [Range<usize>; 2],
    shortcut: [Range<usize>; 2],
}

impl ResnetBlock {
    /// The shapes of the parameters, in their order in the block's vector: weight and bias of `norm1`, `conv1`,
    /// `time_emb_proj`, `norm2`, `conv2` and, if there is a `shortcut`, `conv_shortcut`.
    pub fn parameters(&self) -> Vec<(&'static str, Shape)> {
        let Self { c_in, c_out, time_dim, .. } = *self;
        let mut parameters: Vec<(&str, Shape)> = vec![
            ("norm1.weight", c_in.into()),
            ("norm1.bias", c_in.into()),
            ("conv1.weight", (c_out, c_in, 3, 3).into()),
            ("conv1.bias", c_out.into()),
            ("time_emb_proj.weight", (self.time_out(), time_dim).into()),
            ("time_emb_proj.bias", self.time_out().into()),
            ("norm2.weight", c_out.into()),
            ("norm2.bias", c_out.into()),
            ("conv2.weight", (c_out, c_out, 3, 3).into()),
            ("conv2.bias", c_out.into()),
        ];
        if self.shortcut {
            parameters.push(("conv_shortcut.weight", (c_out, c_in, 1, 1).into()));
            parameters.push(("conv_shortcut.bias", c_out.into()));
        }
        parameters
    }

    /// Fails if operands do not fit.
    fn check(&self, x: &Tensor, temb: &Tensor, theta: &Tensor) -> Result<()> {
        let ResnetBlock { c_in, c_out, time_dim, groups: [first, second], shortcut, .. } = *self;
        let (b, _, _, c) = x.dims4()?;
        let count = ranges(&self.parameters()).last().map_or(0, |last| last.end);
        let [images, temb, theta] = [x, temb, theta].map(Tensor::dims);
        if c != c_in || temb != [b, time_dim] || theta != [count] {
            bail!(
                Alarm,
                "a residual block of {c_in} channels, {time_dim} features of the step and {count} parameters got \
                 {images:?}, {temb:?} and {theta:?}"
            );
        }
        if [first, second, c_in, c_out, time_dim].contains(&0) || c_in % first != 0 || c_out % second != 0 {
            bail!(
                Alarm,
                "{c_in} and {c_out} channels in {first} and {second} groups, {time_dim} features of the step: expected at \
                 least 1 of each, and groups that divide the channels"
            );
        }
        if c_in != c_out && !shortcut {
            bail!(Alarm, "a residual block from {c_in} to {c_out} channels has no shortcut");
        }
        Ok(())
    }

    fn time_out(&self) -> usize {
        if self.scale_shift { 2 * self.c_out } else { self.c_out }
    }

    fn parts(&self) -> Parts {
        let mut ranges = ranges(&self.parameters()).into_iter();
        let mut next = || std::array::from_fn(|_| ranges.next().unwrap_or(0..0));
        Parts { norm1: next(), conv1: next(), time: next(), norm2: next(), conv2: next(), shortcut: next() }
    }
}

/// A residual block of the U-Net. `x`: `(b, h, w, c_in)`; `temb`: `(b, time_dim)`, after its SiLU; `theta`: the
/// parameters, one vector in the order of [`ResnetBlock::parameters`]. Returns `(b, h, w, c_out)`.
///
/// `packed` belongs to these parameters only. `mask`: `(b, h, w, c_out)`, multiplies the input of the second
/// convolution, for dropout; it gets no gradient. Fails if a shape does not fit.
pub fn resnet_block(
    x: &Tensor,
    temb: &Tensor,
    theta: &Tensor,
    block: &ResnetBlock,
    packed: &BlockWeights,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    block.check(x, temb, theta)?;
    let ((b, h, w, _), c_out) = (x.dims4()?, block.c_out);
    if let Some(mask) = mask.map(Tensor::dims).filter(|mask| *mask != [b, h, w, c_out]) {
        bail!(Alarm, "images {:?} of a block to {c_out} channels got a mask {mask:?}", x.dims());
    }
    let (how, operands) = ((CpuLevel::get(), ConvAlgorithm::get()), [x, temb, theta]);
    shell::run(FusedBlock::new(how, operands, block, packed, mask)?, operands)
}

/// [`resnet_block`] with a change of resolution, `resample`: of the input, and between the first norm and
/// convolution. `mask` has the size of the output.
pub fn resampling_resnet_block(
    x: &Tensor,
    temb: &Tensor,
    theta: &Tensor,
    block: &ResnetBlock,
    packed: &BlockWeights,
    mask: Option<&Tensor>,
    resample: &dyn Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    block.check(x, temb, theta)?;
    composed([x, temb, theta], block, packed, mask, resample)
}

/// The block composed of the device's ops.
fn composed(
    [x, temb, theta]: [&Tensor; 3],
    block: &ResnetBlock,
    packed: &BlockWeights,
    mask: Option<&Tensor>,
    resample: &dyn Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let parts = split(theta, &block.parameters())?;
    let ResnetBlock { c_out, groups, epsilon, .. } = *block;
    let pair = |name: &str| (&parts[&*format!("{name}.weight")], &parts[&*format!("{name}.bias")]);
    let (weight, bias) = pair("norm1");
    let h = resample(&group_norm(x, groups[0], weight, bias, epsilon, true)?)?;
    let (weight, bias) = pair("time_emb_proj");
    let step = linear(temb, weight, Some(bias))?;
    let (weight, conv_bias) = pair("conv1");
    let conv1 = |bias: Option<&Tensor>| conv2d_packed(&h, weight, bias, 1, (1, 1), Some(&packed[0]));
    let (weight, bias) = pair("norm2");
    let h = if block.scale_shift {
        let h = conv1(Some(conv_bias))?;
        let factor = (step.narrow(1, 0, c_out)? + 1.0)?;
        let bias = (factor.broadcast_mul(bias)? + step.narrow(1, c_out, c_out)?)?;
        group_norm(&h, groups[1], &factor.broadcast_mul(weight)?, &bias, epsilon, true)?
    } else {
        let h = add_channels(&conv1(None)?, &add_channels(&step, conv_bias)?)?;
        group_norm(&h, groups[1], weight, bias, epsilon, true)?
    };
    let h = match mask {
        Some(mask) => (&h * mask.detach().to_dtype(h.dtype())?)?,
        None => h,
    };
    let (weight, bias) = pair("conv2");
    let h = conv2d_packed(&h, weight, Some(bias), 1, (1, 1), Some(&packed[1]))?;
    let mut x = resample(x)?;
    if block.shortcut {
        let (weight, bias) = pair("conv_shortcut");
        x = conv2d_packed(&x, weight, Some(bias), 1, (0, 0), Some(&packed[2]))?;
    }
    let out = (x + h)?;
    Ok(if block.output_scale == 1.0 { out } else { (out / block.output_scale)? })
}

struct FusedBlock {
    level: CpuLevel,
    block: ResnetBlock,
    parts: Parts,
    conv1: Convolution,
    conv2: Convolution,
    shortcut: Convolution,
    norm1: Norm,
    norm2: Norm,
    packed: BlockWeights,
    /// Contiguous, of the type of the images.
    mask: Option<Tensor>,
    /// Whether there will be a backward pass.
    keep: bool,
    kept: OnceLock<Kept>,
}

/// What the backward pass needs from the forward pass.
struct Kept {
    moments1: Vec<Moments>,
    /// The second norm's input.
    middle: Vec<f32>,
    moments2: Vec<Moments>,
    /// Weight and bias of the second norm; one pair per sample if the step scales and shifts it.
    affine: [Vec<f32>; 2],
}

impl FusedBlock {
    fn new(
        (level, algorithm): (CpuLevel, ConvAlgorithm),
        operands: [&Tensor; 3],
        block: &ResnetBlock,
        packed: &BlockWeights,
        mask: Option<&Tensor>,
    ) -> Result<Self> {
        let ResnetBlock { c_in, c_out, groups, epsilon, .. } = *block;
        let (x, (b, h, w, _)) = (operands[0], operands[0].dims4()?);
        let convolution = |c_in: usize, k: usize| {
            Convolution::new(level, algorithm, (b, h, w, c_in), (c_out, c_in, k, k), 1, (k / 2, k / 2))
        };
        let norm = |groups, c| Norm { level, groups, c, sample: h * w * c, epsilon, silu: true };
        Ok(Self {
            level,
            block: *block,
            parts: block.parts(),
            conv1: convolution(c_in, 3)?,
            conv2: convolution(c_out, 3)?,
            shortcut: convolution(c_in, 1)?,
            norm1: norm(groups[0], c_in),
            norm2: norm(groups[1], c_out),
            packed: packed.clone(),
            mask: mask.map(|mask| mask.detach().to_dtype(x.dtype())?.contiguous()).transpose()?,
            keep: operands.iter().any(|operand| operand.track_op()),
            kept: OnceLock::new(),
        })
    }

    /// What the step adds for each sample, or its scale and shift.
    fn step(&self, temb: &[f32], theta: &[f32]) -> Vec<f32> {
        let [weight, bias] = self.parts.time.each_ref().map(|range| &theta[range.clone()]);
        linear_rows(self.level, temb, self.block.time_dim, weight, bias)
    }

    /// Weight and bias of the second norm.
    fn affine(&self, step: &[f32], theta: &[f32]) -> [Vec<f32>; 2] {
        let [weight, bias] = self.parts.norm2.each_ref().map(|range| &theta[range.clone()]);
        if !self.block.scale_shift {
            return [weight.to_vec(), bias.to_vec()];
        }
        let c = self.block.c_out;
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for (scale, shift) in step.chunks_exact(2 * c).map(|step| step.split_at(c)) {
            weights.extend(weight.iter().zip(scale).map(|(w, scale)| w * (1.0 + scale)));
            biases.extend(
                bias.iter().zip(scale).zip(shift).map(|((b, scale), shift)| b * (1.0 + scale) + shift),
            );
        }
        [weights, biases]
    }

    /// Multiplies by the mask, if there is one.
    fn drop_out(&self, values: &mut [f32]) -> candle_core::Result<()> {
        if let Some(mask) = &self.mask {
            for_each_pair(values, &Elements::of(mask)?, |value, mask| *value *= mask);
        }
        Ok(())
    }

    fn block_forward(&self, x: &[f32], temb: &[f32], theta: &[f32]) -> candle_core::Result<Vec<f32>> {
        let part = |range: &Range<usize>| &theta[range.clone()];
        let Parts { norm1, conv1, conv2, shortcut, .. } = &self.parts;
        let c = self.block.c_out;
        let step = self.step(temb, theta);
        let mut normed = zeros(x.len());
        let moments1 = self.norm1.forward(x, norm1.each_ref().map(part), &mut normed);
        let bias = part(&conv1[1]);
        let added: Vec<f32> = match self.block.scale_shift {
            true => Vec::new(),
            false => {
                step.chunks_exact(c).flat_map(|step| step.iter().zip(bias).map(|(s, b)| s + b)).collect()
            }
        };
        let bias = if self.block.scale_shift { Bias::Channels(bias) } else { Bias::Samples(&added) };
        let kernels = self.packed[0].forward(&self.conv1, part(&conv1[0]));
        let middle = self.conv1.forward(&normed, &kernels, bias);
        let affine = self.affine(&step, theta);
        normed.resize(middle.len(), 0.0);
        let moments2 = self.norm2.forward(&middle, affine.each_ref().map(Vec::as_slice), &mut normed);
        self.drop_out(&mut normed)?;
        let residual = if self.block.shortcut {
            let kernels = self.packed[2].forward(&self.shortcut, part(&shortcut[0]));
            self.shortcut.forward(x, &kernels, Bias::Channels(part(&shortcut[1])))
        } else {
            x.to_vec()
        };
        let kernels = self.packed[1].forward(&self.conv2, part(&conv2[0]));
        let mut out =
            self.conv2.forward_onto(&normed, &kernels, Bias::Channels(part(&conv2[1])), Some(residual));
        self.divide(&mut out);
        if self.keep {
            self.kept.get_or_init(|| Kept { moments1, middle, moments2, affine });
        }
        Ok(out)
    }

    /// Divides by the scale of the output, which is nearly always 1.
    fn divide(&self, values: &mut [f32]) {
        let scale = self.block.output_scale as f32;
        if scale != 1.0 {
            let len = values.len();
            for_each_chunk(values, CHUNK, len, |_, values| values.iter_mut().for_each(|v| *v /= scale));
        }
    }

    /// The wanted ones among the gradients of `x`, `temb` and `theta`.
    fn block_backward(
        &self,
        [x, temb, theta]: [&[f32]; 3],
        kept: &Kept,
        dy: &[f32],
        [want_x, want_temb, want_theta]: [bool; 3],
    ) -> candle_core::Result<[Option<Vec<f32>>; 3]> {
        let level = self.level;
        let part = |range: &Range<usize>| &theta[range.clone()];
        let Parts { norm1, conv1, time, norm2, conv2, shortcut } = &self.parts;
        let c_out = self.block.c_out;
        let mut scaled = Vec::new();
        let dy = match self.block.output_scale {
            1.0 => dy,
            _ => {
                scaled.extend_from_slice(dy);
                self.divide(&mut scaled);
                &scaled[..]
            }
        };
        let mut dtheta = zeros(if want_theta { theta.len() } else { 0 });
        let mut set = |range: &Range<usize>, values: &[f32]| dtheta[range.clone()].copy_from_slice(values);
        let Kept { moments1, middle, moments2, affine } = kept;
        let affine1 = norm1.each_ref().map(part);
        let affine2 = affine.each_ref().map(Vec::as_slice);

        let mut normed = Vec::new();
        if want_theta {
            normed.resize(middle.len(), 0f32);
            self.norm2.normalize(middle, moments2, affine2, &mut normed);
            self.drop_out(&mut normed)?;
            set(&conv2[0], &self.conv2.weight_gradient(&normed, dy));
            let dbias = bias_gradient(level, dy, c_out);
            set(&conv2[1], &dbias);
            if self.block.shortcut {
                set(&shortcut[0], &self.shortcut.weight_gradient(x, dy));
                set(&shortcut[1], &dbias);
            }
        }
        let mut dnormed =
            self.conv2.input_gradient(dy, &self.packed[1].backward(&self.conv2, part(&conv2[0])));
        self.drop_out(&mut dnormed)?;
        let mut dmiddle = zeros(middle.len());
        let sums = self.norm2.backward(middle, &dnormed, moments2, affine2, &mut dmiddle);
        drop(dnormed);
        let mut dtemb = None;
        if want_temb || want_theta {
            let (dstep, dweight, dbias) = self.step_gradients(temb, theta, &dmiddle, &sums);
            if want_theta {
                set(&norm2[0], &dweight);
                set(&norm2[1], &dbias);
                let n = self.block.time_out();
                set(&time[0], &linear_weight_gradient(level, temb, self.block.time_dim, &dstep, n));
                set(&time[1], &bias_gradient(level, &dstep, n));
            }
            if want_temb {
                dtemb = Some(linear_input_gradient(level, &dstep, self.block.time_out(), part(&time[0])));
            }
        }
        if want_theta {
            normed.clear();
            normed.resize(x.len(), 0f32);
            self.norm1.normalize(x, moments1, affine1, &mut normed);
            set(&conv1[0], &self.conv1.weight_gradient(&normed, &dmiddle));
            set(&conv1[1], &bias_gradient(level, &dmiddle, c_out));
        }
        let mut dx = None;
        if want_x || want_theta {
            let dnormed =
                self.conv1.input_gradient(&dmiddle, &self.packed[0].backward(&self.conv1, part(&conv1[0])));
            let mut through = zeros(x.len());
            let sums = self.norm1.backward(x, &dnormed, moments1, affine1, &mut through);
            if want_theta {
                let total = |k: usize| -> Vec<f32> {
                    (0..self.block.c_in).map(|i| sums.iter().map(|s| s[k][i]).sum::<f64>() as f32).collect()
                };
                set(&norm1[0], &total(1));
                set(&norm1[1], &total(0));
            }
            if want_x {
                let direct;
                let residual = if self.block.shortcut {
                    let kernels = self.packed[2].backward(&self.shortcut, part(&shortcut[0]));
                    direct = self.shortcut.input_gradient(dy, &kernels);
                    &direct[..]
                } else {
                    dy
                };
                add(&mut through, residual);
                dx = Some(through);
            }
        }
        Ok([dx, dtemb, want_theta.then_some(dtheta)])
    }

    /// The gradients of what the step adds, or of its scale and shift, and of the second norm's weight and bias.
    fn step_gradients(
        &self,
        temb: &[f32],
        theta: &[f32],
        dmiddle: &[f32],
        sums: &[ChannelSums],
    ) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let c = self.block.c_out;
        let total = |f: &dyn Fn(usize, usize) -> f64| -> Vec<f32> {
            (0..c).map(|i| (0..sums.len()).map(|sample| f(sample, i)).sum::<f64>() as f32).collect()
        };
        if !self.block.scale_shift {
            let sample = dmiddle.len() / sums.len().max(1);
            let step = dmiddle.chunks_exact(sample.max(1)).flat_map(|d| column_sums(self.level, d, c));
            let step = step.map(|v| v as f32).collect();
            return (step, total(&|s, i| sums[s][1][i]), total(&|s, i| sums[s][0][i]));
        }
        let [weight, bias] = self.parts.norm2.each_ref().map(|range| &theta[range.clone()]);
        let step = self.step(temb, theta);
        let factor = |sample: usize, i: usize| 1.0 + f64::from(step[sample * 2 * c + i]);
        let scale = |[dbias, dweight]: &ChannelSums, i: usize| {
            (dweight[i] * f64::from(weight[i]) + dbias[i] * f64::from(bias[i])) as f32
        };
        let dstep = sums
            .iter()
            .flat_map(|sums| (0..c).map(|i| scale(sums, i)).chain(sums[0].iter().map(|&v| v as f32)))
            .collect();
        (dstep, total(&|s, i| sums[s][1][i] * factor(s, i)), total(&|s, i| sums[s][0][i] * factor(s, i)))
    }
}

impl Node<3> for FusedBlock {
    const NAME: &'static str = "resnet-block";

    fn forward(&self, [x, temb, theta]: [Operand; 3]) -> Output {
        Ok((self.block_forward(&x, &temb, &theta)?, self.conv2.out_shape()))
    }

    fn backward(&self, operands: [Operand; 3], Backward { dy, wanted, .. }: Backward<3>) -> Gradients<3> {
        let Some(kept) = self.kept.get() else {
            candle_core::bail!("a block that was not tracked has no gradient")
        };
        self.block_backward(operands.map(Operand::values), kept, dy, wanted)
    }
}

impl Op<3> for FusedBlock {
    fn reference(&self, operands: [&Tensor; 3]) -> Result<Tensor> {
        composed(operands, &self.block, &self.packed, self.mask.as_ref(), &|x| Ok(x.clone()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::{super::testing::*, *};

    const BLOCKS: [ResnetBlock; 4] = [
        ResnetBlock {
            c_in: 8,
            c_out: 8,
            time_dim: 5,
            groups: [4; 2],
            epsilon: 1e-5,
            scale_shift: false,
            shortcut: false,
            output_scale: 1.0,
        },
        ResnetBlock {
            c_in: 6,
            c_out: 9,
            time_dim: 7,
            groups: [2, 3],
            epsilon: 1e-6,
            scale_shift: true,
            shortcut: true,
            output_scale: 1.0,
        },
        ResnetBlock {
            c_in: 16,
            c_out: 8,
            time_dim: 3,
            groups: [4; 2],
            epsilon: 1e-5,
            scale_shift: false,
            shortcut: true,
            output_scale: 1.5,
        },
        ResnetBlock {
            c_in: 12,
            c_out: 12,
            time_dim: 4,
            groups: [2; 2],
            epsilon: 1e-5,
            scale_shift: true,
            shortcut: true,
            output_scale: 2.0,
        },
    ];

    fn operands(block: &ResnetBlock, (b, h, w): (usize, usize, usize)) -> [Tensor; 3] {
        let count: usize = block.parameters().iter().map(|(_, shape)| shape.elem_count()).sum();
        [random(1, (b, h, w, block.c_in)), random(2, (b, block.time_dim)), (random(3, count) * 0.3).unwrap()]
    }

    fn op(level: CpuLevel, block: &ResnetBlock, t: &[Tensor], mask: Option<&Tensor>) -> Result<FusedBlock> {
        let how = (level, ConvAlgorithm::Winograd);
        FusedBlock::new(how, [&t[0], &t[1], &t[2]], block, &BlockWeights::default(), mask)
    }

    fn at(level: CpuLevel, block: &ResnetBlock, t: &[Tensor], mask: Option<&Tensor>) -> Result<Tensor> {
        shell::apply(op(level, block, t, mask)?, [&t[0], &t[1], &t[2]])
    }

    fn composed(block: &ResnetBlock, t: &[Tensor], mask: Option<&Tensor>) -> Result<Tensor> {
        op(CpuLevel::Portable, block, t, mask)?.reference([&t[0], &t[1], &t[2]])
    }

    #[test]
    fn a_block_is_its_operations_one_after_the_other() {
        for block in &BLOCKS {
            for size in [(2, 5, 7), (3, 8, 8), (1, 4, 4)] {
                let (b, h, w) = size;
                let dropped = random(4, (b, h, w, block.c_out)).gt(-0.5).unwrap();
                let dropped = (dropped.to_dtype(DType::F32).unwrap() * 1.25).unwrap();
                // In a single small image the step's gradient is what is left of much larger terms.
                let masks = if b > 1 { vec![None, Some(&dropped)] } else { vec![None] };
                for mask in masks {
                    check_against(
                        &operands(block, size),
                        |level, t| at(level, block, t, mask),
                        |t| composed(block, t, mask),
                    );
                }
            }
        }
    }

    #[test]
    fn a_sample_does_not_see_its_batch_nor_the_threads() {
        for block in &BLOCKS {
            let [x, temb, theta] = operands(block, (7, 12, 8));
            check_invariance(&[x, temb, theta], 2, |t| at(CpuLevel::get(), block, t, None));
        }
    }

    #[test]
    fn frozen_parameters_get_no_gradient() {
        for block in &BLOCKS {
            check_untracked(&operands(block, (2, 4, 4)), |t| at(CpuLevel::get(), block, t, None));
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_named() {
        let [x, _, theta] = operands(&BLOCKS[0], (2, 4, 4));
        let error = resnet_block(&x, &random(2, (2, 6)), &theta, &BLOCKS[0], &BlockWeights::default(), None)
            .unwrap_err();
        assert!(error.to_string().contains("5 features of the step"), "{error}");
    }
}
