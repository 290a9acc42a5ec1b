//! Convolution: by Winograd's minimal filtering where that is less work, else directly.

mod direct;
mod geometry;
mod winograd;

use std::{
    convert::Infallible,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{Shape, Tensor};
use direct::Phase;
pub(super) use geometry::Bias;
use geometry::Geometry;

use super::{
    parallel::{PARALLEL_WORK, add},
    reduce::bias_gradient,
    shell::{self, Backward, Gradients, Node, Op, Operand, Output},
};
use crate::{
    Result,
    device::{ConvAlgorithm, CpuLevel},
};

/// 2-D convolution. `x`: `(b, h, w, c_in)`; `weight`: `(c_out, c_in, kh, kw)`; `bias`: `(c_out,)`.
///
/// `padding` is `(before, after)`, zeros, the same in both directions of the image. Returns
/// `(b, h', w', c_out)` with `h' = (h + before + after - kh) / stride + 1`. Fails if the channels differ, the
/// stride is 0 or the kernel is larger than the padded image.
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: (usize, usize),
) -> Result<Tensor> {
    conv2d_packed(x, weight, bias, stride, padding, None)
}

/// [`conv2d`] with weights that, if there is a `packed`, stay the same from call to call: the form that the inner loops
/// read is made once and kept in `packed`, which belongs to these weights only.
pub fn conv2d_packed(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: (usize, usize),
    packed: Option<&Arc<PackedWeights>>,
) -> Result<Tensor> {
    let how = (CpuLevel::get(), ConvAlgorithm::get());
    let op = Conv2d::new(how, x, weight, stride, padding, packed)?;
    match bias {
        Some(bias) if bias.dims() != [op.convolution.g.c_out] => bail!(
            Alarm,
            "the bias of a convolution to {} channels has shape {:?}",
            op.convolution.g.c_out,
            bias.dims()
        ),
        Some(bias) => shell::run(op, [x, weight, bias]),
        None => shell::run(op, [x, weight]),
    }
}

/// Constant weights in the form that the inner loops read, made at first use. For Winograd's filtering it is four
/// times as large as the weights for each direction, and larger where there are few output channels, which are
/// padded to 16.
#[derive(Debug, Default)]
pub struct PackedWeights {
    kernels: Slots<Key, Arc<Kernels>>,
    /// As cuDNN takes them, in each type.
    #[cfg(feature = "cuda")]
    filters: Slots<candle_core::DType, Tensor>,
}

impl PackedWeights {
    /// The weights packed for the forward pass.
    pub(super) fn forward(&self, convolution: &Convolution, weight: &[f32]) -> Arc<Kernels> {
        self.get(convolution, weight, false)
    }

    /// The weights packed for the input's gradient.
    pub(super) fn backward(&self, convolution: &Convolution, weight: &[f32]) -> Arc<Kernels> {
        self.get(convolution, weight, true)
    }

    fn get(&self, convolution: &Convolution, weight: &[f32], backward: bool) -> Arc<Kernels> {
        let made = || Ok::<_, Infallible>(Arc::new(convolution.pack(weight, backward, false)));
        let Ok(kernels) = self.kernels.get(convolution.key(backward), made);
        kernels
    }
}

/// What was made of weights for each kind of use.
#[derive(Debug)]
struct Slots<K, T>(Mutex<Vec<(K, T)>>);

impl<K, T> Default for Slots<K, T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: PartialEq, T: Clone> Slots<K, T> {
    /// `make` must not wait for other tasks, since one of these could need the same weights and wait for the lock.
    fn get<E>(&self, key: K, make: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, made)) = slots.iter().find(|(of, _)| *of == key) {
            return Ok(made.clone());
        }
        let made = make()?;
        slots.push((key, made.clone()));
        Ok(made)
    }
}

/// Everything that packing depends on, apart from the weights.
#[derive(Debug, PartialEq)]
struct Key {
    backward: bool,
    winograd: bool,
    /// Of each phase.
    taps: Vec<Vec<usize>>,
}

/// A convolution of known sizes over slices.
#[derive(Clone, Copy, Debug)]
pub(super) struct Convolution {
    level: CpuLevel,
    algorithm: ConvAlgorithm,
    g: Geometry,
}

/// Weights as the forward pass or the input's gradient reads them.
#[derive(Debug)]
pub(super) enum Kernels {
    /// For each phase.
    Direct(Vec<Vec<f32>>),
    Winograd(winograd::Kernels),
}

impl Convolution {
    /// Of an image `(b, h, w, c_in)` with a kernel `(c_out, c_in, kh, kw)`. Fails as [`conv2d`].
    pub(super) fn new(
        level: CpuLevel,
        algorithm: ConvAlgorithm,
        (images, h, w, c_in): (usize, usize, usize, usize),
        (c_out, weight_c_in, kh, kw): (usize, usize, usize, usize),
        stride: usize,
        (before, after): (usize, usize),
    ) -> Result<Self> {
        if c_in != weight_c_in {
            bail!(Alarm, "a convolution of {weight_c_in} channels got an image of {c_in}");
        }
        if c_in == 0 || c_out == 0 {
            bail!(Alarm, "a convolution of {c_in} to {c_out} channels, expected at least 1 of each");
        }
        let (padded_h, padded_w) = (h + before + after, w + before + after);
        if stride == 0 || kh == 0 || kw == 0 || kh > padded_h || kw > padded_w {
            bail!(
                Alarm,
                "a {kh}x{kw} kernel at stride {stride} does not fit a padded image of {padded_h}x{padded_w}"
            );
        }
        let g = Geometry {
            images,
            h,
            w,
            c_in,
            kh,
            kw,
            stride,
            before: (before as isize, before as isize),
            out_h: (padded_h - kh) / stride + 1,
            out_w: (padded_w - kw) / stride + 1,
            c_out,
        };
        Ok(Self { level, algorithm, g })
    }

    /// `(b, h', w', c_out)`.
    pub(super) fn out_shape(&self) -> Shape {
        Shape::from((self.g.images, self.g.out_h, self.g.out_w, self.g.c_out))
    }

    fn by_winograd(&self, g: &Geometry) -> bool {
        self.algorithm == ConvAlgorithm::Winograd && winograd::suits(g)
    }

    /// What the output or, `backward`, the input's gradient is made of.
    fn phases(&self, backward: bool) -> Vec<Phase> {
        if backward { Phase::of_gradient(&self.g) } else { vec![Phase::whole(&self.g)] }
    }

    fn key(&self, backward: bool) -> Key {
        let phases = self.phases(backward);
        let winograd = matches!(&phases[..], [phase] if self.by_winograd(&phase.geometry));
        Key { backward, winograd, taps: phases.into_iter().map(|phase| phase.taps).collect() }
    }

    /// For the forward pass or, `backward`, the input's gradient. `parallel`: whether all threads take part.
    fn pack(&self, weight: &[f32], backward: bool, parallel: bool) -> Kernels {
        let (Geometry { c_in, c_out, kh, kw, .. }, level) = (self.g, self.level);
        let (inputs, outputs) = ((c_in, kh * kw), (c_out, c_in * kh * kw));
        let (channels, columns) = if backward { (outputs, inputs) } else { (inputs, outputs) };
        let Key { winograd, taps, .. } = self.key(backward);
        if winograd {
            return Kernels::Winograd(winograd::Kernels::new(
                level, weight, channels, columns, backward, parallel,
            ));
        }
        let pack = |taps: &Vec<usize>| direct::pack(weight, taps, channels, columns, parallel);
        Kernels::Direct(taps.iter().map(pack).collect())
    }

    pub(super) fn forward(&self, x: &[f32], kernels: &Kernels, bias: Bias) -> Vec<f32> {
        self.forward_onto(x, kernels, bias, None)
    }

    /// The convolution, added to `onto` if given.
    pub(super) fn forward_onto(
        &self,
        x: &[f32],
        kernels: &Kernels,
        bias: Bias,
        onto: Option<Vec<f32>>,
    ) -> Vec<f32> {
        match kernels {
            Kernels::Direct(panels) => {
                let mut out = direct::forward(self.level, &self.g, x, &panels[0], bias);
                if let Some(onto) = onto {
                    add(&mut out, &onto);
                }
                out
            }
            Kernels::Winograd(kernels) => winograd::forward(self.level, &self.g, x, kernels, bias, onto),
        }
    }

    pub(super) fn input_gradient(&self, dy: &[f32], kernels: &Kernels) -> Vec<f32> {
        let phases = self.phases(true);
        match kernels {
            Kernels::Direct(panels) => direct::input_gradient(self.level, &self.g, dy, &phases, panels),
            Kernels::Winograd(kernels) => {
                winograd::forward(self.level, &phases[0].geometry, dy, kernels, Bias::None, None)
            }
        }
    }

    /// In the weights' order.
    pub(super) fn weight_gradient(&self, x: &[f32], dy: &[f32]) -> Vec<f32> {
        let gradient = || match self.by_winograd(&self.g) {
            true => winograd::weight_gradient(self.level, &self.g, x, dy),
            false => direct::weight_gradient(self.level, &self.g, x, dy),
        };
        // Into the pool once, not for each of many blocks.
        if self.g.work() < PARALLEL_WORK { gradient() } else { rayon::scope(|_| gradient()) }
    }
}

struct Conv2d {
    convolution: Convolution,
    padding: (usize, usize),
    packed: Option<Arc<PackedWeights>>,
}

impl Conv2d {
    fn new(
        (level, algorithm): (CpuLevel, ConvAlgorithm),
        x: &Tensor,
        weight: &Tensor,
        stride: usize,
        padding: (usize, usize),
        packed: Option<&Arc<PackedWeights>>,
    ) -> Result<Self> {
        let convolution = Convolution::new(level, algorithm, x.dims4()?, weight.dims4()?, stride, padding)?;
        Ok(Self { convolution, padding, packed: packed.cloned() })
    }

    fn kernels(&self, weight: &[f32], backward: bool) -> Arc<Kernels> {
        match &self.packed {
            Some(packed) => packed.get(&self.convolution, weight, backward),
            None => Arc::new(self.convolution.pack(weight, backward, true)),
        }
    }
}

/// Of image, weight and, perhaps, bias.
impl<const N: usize> Node<N> for Conv2d {
    const NAME: &'static str = "conv2d";

    fn forward(&self, operands: [Operand; N]) -> Output {
        let bias = operands.get(2).map_or(Bias::None, |bias| Bias::Channels(bias.values()));
        let out = self.convolution.forward(&operands[0], &self.kernels(&operands[1], false), bias);
        Ok((out, self.convolution.out_shape()))
    }

    fn backward(&self, operands: [Operand; N], Backward { dy, wanted, .. }: Backward<N>) -> Gradients<N> {
        let (convolution, x, weight) = (&self.convolution, operands[0], operands[1]);
        let gradient = |operand: usize| match operand {
            0 => convolution.input_gradient(dy, &self.kernels(&weight, true)),
            1 => convolution.weight_gradient(&x, dy),
            _ => bias_gradient(convolution.level, dy, convolution.g.c_out),
        };
        Ok(std::array::from_fn(|i| wanted[i].then(|| gradient(i))))
    }
}

impl<const N: usize> Op<N> for Conv2d {
    fn reference(&self, operands: [&Tensor; N]) -> Result<Tensor> {
        let (Geometry { h, w, kh, kw, stride, .. }, (before, after)) = (self.convolution.g, self.padding);
        let x = operands[0].permute((0, 3, 1, 2))?.contiguous()?;
        // Rows and columns past the last window.
        let unused = |size: usize, kernel: usize| (size + before + after - kernel) % stride;
        let (x, padding) = if before == after && unused(h, kh) == 0 && unused(w, kw) == 0 {
            (x, before)
        } else {
            // Cut off: candle's gradient fails where their numbers differ between the directions.
            let padded = x.pad_with_zeros(2, before, after)?.pad_with_zeros(3, before, after)?;
            let padded = padded.narrow(2, 0, h + before + after - unused(h, kh))?;
            (padded.narrow(3, 0, w + before + after - unused(w, kw))?.contiguous()?, 0)
        };
        let weight = operands[1].to_dtype(x.dtype())?.contiguous()?;
        let out = x.conv2d(&weight, padding, stride, 1, 1)?.permute((0, 2, 3, 1))?.contiguous()?;
        Ok(match operands.get(2) {
            Some(bias) => out.broadcast_add(&bias.to_dtype(x.dtype())?)?,
            None => out,
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda(self, operands: [&Tensor; N]) -> Result<Tensor> {
        let (x, weight) = (operands[0], operands[1]);
        let made = || super::cuda::conv::filter(weight, x.dtype());
        let filter = match &self.packed {
            Some(packed) if !weight.track_op() => {
                packed.filters.get(x.dtype(), || made().map(|filter| filter.detach()))?
            }
            _ => made()?,
        };
        let out = super::cuda::conv::conv2d(x, &filter, self.convolution.g.stride, self.padding)?;
        match operands.get(2) {
            Some(bias) => super::add_channels::add_channels(&out, bias),
            None => Ok(out),
        }
    }
}

/// Does `work` by the algorithms that are written down in `folder`, in `algorithms-CLASS.json`, and writes down there those that
/// it is the first to need: so what machines of one class make for a folder has the same bits. For the whole process. On the CPU
/// nothing is chosen.
pub fn with_algorithms_of<T>(folder: &Path, work: impl FnOnce() -> T) -> T {
    #[cfg(feature = "cuda")]
    super::cuda::conv::keep_algorithms_in(Some(folder));
    let done = work();
    #[cfg(feature = "cuda")]
    super::cuda::conv::keep_algorithms_in(None);
    let _ = folder;
    done
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Var};

    use super::{super::testing::*, *};

    fn at(
        how: (CpuLevel, ConvAlgorithm),
        [x, weight]: [&Tensor; 2],
        stride: usize,
        packed: Option<&Arc<PackedWeights>>,
    ) -> Tensor {
        let op = Conv2d::new(how, x, weight, stride, (1, 1), packed).unwrap();
        shell::apply(op, [x, weight]).unwrap()
    }

    const ALGORITHMS: [ConvAlgorithm; 2] = [ConvAlgorithm::Direct, ConvAlgorithm::Winograd];

    type Case = ([usize; 4], [usize; 3], usize, (usize, usize));

    /// `(b, h, w, c_in)`, `(c_out, kh, kw)`, stride, padding.
    const CASES: [Case; 23] = [
        ([2, 5, 7, 1], [16, 3, 3], 1, (1, 1)),
        ([3, 8, 8, 3], [5, 3, 3], 1, (1, 1)),
        ([2, 7, 5, 5], [33, 3, 3], 2, (1, 1)),
        ([2, 8, 8, 16], [16, 3, 3], 2, (0, 1)),
        ([2, 6, 5, 33], [7, 5, 5], 1, (1, 1)),
        ([2, 9, 9, 3], [17, 5, 5], 2, (1, 1)),
        ([3, 4, 4, 33], [40, 1, 1], 1, (0, 0)),
        ([2, 5, 5, 16], [3, 1, 1], 2, (0, 0)),
        ([2, 6, 6, 5], [6, 3, 3], 1, (0, 0)),
        ([2, 8, 7, 3], [4, 3, 3], 2, (0, 0)),
        ([1, 20, 19, 16], [32, 3, 3], 1, (1, 1)),
        ([2, 4, 4, 3], [4, 1, 1], 1, (1, 1)),
        ([2, 11, 10, 3], [4, 2, 2], 3, (1, 0)),
        ([2, 3, 4, 3], [4, 3, 2], 1, (1, 1)),
        // By Winograd's filtering, if it is allowed.
        ([2, 4, 4, 8], [8, 3, 3], 1, (1, 1)),
        ([3, 8, 8, 16], [20, 3, 3], 1, (1, 1)),
        ([2, 7, 15, 17], [33, 3, 3], 1, (1, 1)),
        ([2, 13, 10, 9], [16, 3, 3], 1, (0, 0)),
        ([2, 11, 12, 8], [24, 3, 3], 1, (2, 1)),
        ([2, 12, 8, 24], [3, 3, 3], 1, (1, 1)),
        // Several small images in a block whose inputs are read where they are.
        ([5, 8, 7, 3], [40, 3, 3], 1, (1, 1)),
        ([7, 6, 5, 2], [20, 3, 3], 2, (1, 1)),
        // More weights than get sums of their own for parts of the image.
        ([2, 6, 5, 60], [70, 3, 3], 2, (1, 1)),
    ];

    fn operands(i: u64, ([b, h, w, c_in], [c_out, kh, kw], ..): Case) -> [Tensor; 3] {
        let key = 3 * i;
        [random(key, (b, h, w, c_in)), random(key + 1, (c_out, c_in, kh, kw)), random(key + 2, c_out)]
    }

    #[test]
    fn output_and_gradients_match_the_reference_in_double_precision() {
        for (i, case) in CASES.into_iter().enumerate() {
            let (.., stride, padding) = case;
            let operands = operands(i as u64, case);
            let [x, weight, _] = operands.clone();
            for algorithm in ALGORITHMS {
                let op = |level| Conv2d::new((level, algorithm), &x, &weight, stride, padding, None).unwrap();
                check(&operands, op);
                check(&[x.clone(), weight.clone()], op);
            }
        }
    }

    /// ‖out - exact‖ / ‖exact‖ stays below 1e-6 directly and 2e-5 by Winograd's filtering, which is measured to be
    /// below 3e-6 at 512 channels; so do the gradients.
    #[test]
    fn rounding_errors_stay_small_up_to_512_channels() {
        let relative = |out: &Tensor, exact: &Tensor| -> f64 {
            let out = out.to_dtype(DType::F64).unwrap();
            let norm = |t: Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
            norm((out - exact).unwrap()) / norm(exact.clone())
        };
        for (i, ([images, h, w, c_in], c_out, stride)) in [
            ([1, 9, 7, 512], 33, 1),
            ([17, 5, 6, 24], 40, 1),
            ([2, 13, 11, 1], 9, 1),
            ([3, 15, 9, 130], 64, 1),
            ([5, 11, 17, 64], 31, 2),
            ([1, 8, 8, 48], 512, 2),
        ]
        .into_iter()
        .enumerate()
        {
            let key = 100 + 4 * i as u64;
            let (x, weight) = (random(key, (images, h, w, c_in)), random(key + 1, (c_out, c_in, 3, 3)));
            let double = |t: &Tensor| Var::from_tensor(&t.to_dtype(DType::F64).unwrap()).unwrap();
            let exact = (double(&x), double(&weight));
            let exact_out = conv2d(&exact.0, &exact.1, None, stride, (1, 1)).unwrap();
            let dy = random(key + 2, exact_out.shape());
            let gradients =
                |out: &Tensor, dy: Tensor| (out * dy).unwrap().sum_all().unwrap().backward().unwrap();
            let exact_gradients = gradients(&exact_out, dy.to_dtype(DType::F64).unwrap());
            for (algorithm, bound) in [(ConvAlgorithm::Direct, 1e-6), (ConvAlgorithm::Winograd, 2e-5)] {
                for level in LEVELS {
                    let vars = (Var::from_tensor(&x).unwrap(), Var::from_tensor(&weight).unwrap());
                    let out = at((level, algorithm), [&vars.0, &vars.1], stride, None);
                    let found = gradients(&out, dy.clone());
                    let errors = [
                        relative(&out.detach(), &exact_out.detach()),
                        relative(found.get(&vars.0).unwrap(), exact_gradients.get(&exact.0).unwrap()),
                        relative(found.get(&vars.1).unwrap(), exact_gradients.get(&exact.1).unwrap()),
                    ];
                    let what =
                        format!("{algorithm:?} {level:?} {images}x{h}x{w}x{c_in} to {c_out}: {errors:?}");
                    assert!(errors.iter().all(|&e| e <= bound), "{what}");
                }
            }
        }
    }

    #[test]
    fn output_is_the_sum_over_the_window() {
        let (b, h, w, c_in, c_out, k, stride) = (2, 6, 7, 3, 4, 3, 2);
        let (x, weight) = (random(1, (b, h, w, c_in)), random(2, (c_out, c_in, k, k)));
        let out = conv2d(&x, &weight, None, stride, (1, 0)).unwrap();
        let (_, out_h, out_w, _) = out.dims4().unwrap();
        assert_eq!((out_h, out_w), ((h + 1 - k) / stride + 1, (w + 1 - k) / stride + 1));
        let at = |t: &Tensor, i: [usize; 4]| {
            let strides = t.stride();
            values(t)[(0..4).map(|d| i[d] * strides[d]).sum::<usize>()]
        };
        for (n, y, x_, o) in [(0, 0, 0, 0), (1, 1, 2, 3), (0, 2, 1, 1), (1, 0, 2, 2)] {
            let mut sum = 0f64;
            for (ky, kx, c) in (0..k * k * c_in).map(|i| (i / (k * c_in), i / c_in % k, i % c_in)) {
                let (py, px) = (y * stride + ky, x_ * stride + kx);
                if py >= 1 && px >= 1 {
                    sum += f64::from(at(&x, [n, py - 1, px - 1, c])) * f64::from(at(&weight, [o, c, ky, kx]));
                }
            }
            assert!((f64::from(at(&out, [n, y, x_, o])) - sum).abs() < 1e-5);
        }
    }

    #[test]
    fn a_sample_does_not_see_its_batch_nor_the_threads() {
        for case in [([7, 9, 8, 16], [20, 3, 3], 1, (1, 1)), ([7, 4, 4, 33], [40, 3, 3], 2, (1, 1))] {
            let (.., stride, padding) = case;
            let operands = operands(50, case);
            check_invariance(&operands, 1, |t| conv2d(&t[0], &t[1], Some(&t[2]), stride, padding));
        }
    }

    #[test]
    fn gradients_are_finite_differences() {
        let operands = [random(1, (2, 3, 3, 2)), random(2, (2, 2, 3, 3)), random(3, 2)];
        check_finite_differences(&operands, |t| conv2d(&t[0], &t[1], Some(&t[2]), 1, (1, 1)));
    }

    #[test]
    fn frozen_weights_get_no_gradient() {
        let operands = operands(60, CASES[1]);
        check_untracked(&operands, |t| conv2d(&t[0], &t[1], Some(&t[2]), 1, (1, 1)));
    }

    #[test]
    fn other_layouts_are_read_as_they_are_meant() {
        let x = random(1, (2, 3, 6, 5));
        let weight = random(2, (3, 3, 4, 3));
        let strided = (x.permute((0, 2, 3, 1)).unwrap(), weight.transpose(0, 2).unwrap());
        let packed = (strided.0.contiguous().unwrap(), strided.1.contiguous().unwrap());
        let out = |(x, w): &(Tensor, Tensor)| values(&conv2d(x, w, None, 1, (1, 1)).unwrap());
        assert_eq!(out(&strided), out(&packed));
    }

    /// Packed weights are those of the weights alone: every image and stride gets what it would get without.
    #[test]
    fn packed_weights_serve_all_sizes_and_strides() {
        let (weight, packed) = (random(1, (9, 8, 3, 3)), Arc::default());
        let uses = [((8, 8), 1), ((5, 4), 1), ((8, 8), 2), ((1, 1), 2), ((12, 9), 1), ((8, 8), 1)];
        for (key, ((h, w), stride)) in uses.into_iter().enumerate() {
            let x = Var::from_tensor(&random(10 + key as u64, (2, h, w, 8))).unwrap();
            let outcome = |packed: Option<&Arc<PackedWeights>>| {
                let how = (CpuLevel::get(), ConvAlgorithm::Winograd);
                let out = at(how, [&x, &weight], stride, packed);
                let grads = out.sqr().unwrap().sum_all().unwrap().backward().unwrap();
                (values(&out), values(grads.get(&x).unwrap()))
            };
            assert_eq!(outcome(Some(&packed)), outcome(None), "{h} x {w} at stride {stride}");
        }
    }

    #[test]
    fn an_empty_batch_has_empty_outputs_and_zero_gradients() {
        for algorithm in ALGORITHMS {
            let x = Var::zeros((0, 8, 8, 8), DType::F32, &candle_core::Device::Cpu).unwrap();
            let weight = Var::from_tensor(&random(1, (8, 8, 3, 3))).unwrap();
            let out = at((CpuLevel::get(), algorithm), [&x, &weight], 1, None);
            assert_eq!(out.dims(), [0, 8, 8, 8]);
            let grads = out.sum_all().unwrap().backward().unwrap();
            assert_eq!(values(grads.get(&weight).unwrap()), [0.0; 9 * 64]);
        }
    }

    #[test]
    fn impossible_shapes_are_named() {
        let x = random(1, (1, 4, 4, 3));
        let error = |w: Tensor, stride| conv2d(&x, &w, None, stride, (0, 0)).unwrap_err().to_string();
        assert_eq!(error(random(2, (2, 5, 3, 3)), 1), "a convolution of 5 channels got an image of 3");
        let expected = "a 5x5 kernel at stride 1 does not fit a padded image of 4x4";
        assert_eq!(error(random(2, (2, 3, 5, 5)), 1), expected);
    }
}
