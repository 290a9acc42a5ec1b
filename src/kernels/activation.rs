//! Activation functions.

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{
    Elements, elements, for_each_chunk, math,
    microkernel::{Arithmetic, Loop, run, zeros},
    on_cpu, reference, tensor,
};
use crate::{Result, device::CpuLevel};

/// `x · sigmoid(x)`, element by element.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::on_cuda(x, &[]) {
        return cuda::activation(x, cuda::Function::Silu);
    }
    if on_cpu(&[x]) { apply(CpuLevel::get(), Function::Silu, x) } else { reference::silu(x) }
}

/// `max(x, 0)`, element by element; NaN stays NaN. Its gradient at 0 is 0, as in PyTorch.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::on_cuda(x, &[]) {
        return cuda::activation(x, cuda::Function::Relu);
    }
    if on_cpu(&[x]) { apply(CpuLevel::get(), Function::Relu, x) } else { reference::relu(x) }
}

fn apply(level: CpuLevel, function: Function, x: &Tensor) -> Result<Tensor> {
    Ok(x.contiguous()?.apply_op1(Activation { level, function })?)
}

#[derive(Clone, Copy)]
enum Function {
    Silu,
    Relu,
}

struct Activation {
    level: CpuLevel,
    function: Function,
}

/// Elements of a task.
const CHUNK: usize = 1 << 14;

struct Values<'a>(Function, &'a [f32], &'a mut [f32]);

impl Loop for Values<'_> {
    type Output = ();
    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self(function, x, out) = self;
        let pairs = out.iter_mut().zip(x);
        match function {
            Function::Silu => pairs.for_each(|(out, &x)| *out = x * math::sigmoid::<A>(x)),
            Function::Relu => pairs.for_each(|(out, &x)| *out = if x < 0.0 { 0.0 } else { x }),
        }
    }
}

struct Gradients<'a>(Function, &'a [f32], &'a [f32], &'a mut [f32]);

impl Loop for Gradients<'_> {
    type Output = ();
    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self(function, x, dy, dx) = self;
        let triples = dx.iter_mut().zip(x).zip(dy);
        match function {
            Function::Silu => triples.for_each(|((dx, &x), dy)| *dx = dy * silu_slope::<A>(x)),
            Function::Relu => triples.for_each(|((dx, &x), &dy)| *dx = if x > 0.0 { dy } else { 0.0 }),
        }
    }
}

/// The derivative of SiLU.
#[inline(always)]
pub(super) fn silu_slope<A: Arithmetic>(x: f32) -> f32 {
    let s = math::sigmoid::<A>(x);
    s * A::mul_add(x, 1.0 - s, 1.0)
}

impl CustomOp1 for Activation {
    fn name(&self) -> &'static str {
        match self.function {
            Function::Silu => "silu",
            Function::Relu => "relu",
        }
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = elements(x, layout)?;
        let mut out = zeros(x.len());
        for_each_chunk(&mut out, CHUNK, x.len(), |i, out| {
            run(self.level, Values(self.function, &x[i * CHUNK..][..out.len()], out));
        });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let dy = dy.contiguous()?;
        let (x_values, dy) = (Elements::of(x)?, Elements::of(&dy)?);
        let mut dx = zeros(dy.len());
        for_each_chunk(&mut dx, CHUNK, dy.len(), |i, dx| {
            let range = i * CHUNK..i * CHUNK + dx.len();
            run(self.level, Gradients(self.function, &x_values[range.clone()], &dy[range], dx));
        });
        Ok(Some(tensor(dx, x)?))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::*, *};

    #[test]
    fn activations_match_the_reference_in_double_precision() {
        for shape in [(2, 3, 5, 7), (3, 33, 33, 40)] {
            let x = [(random(1, shape) * 4.0).unwrap()];
            check(&x, |level, t| apply(level, Function::Silu, &t[0]), |t| reference::silu(&t[0]));
            check(&x, |level, t| apply(level, Function::Relu, &t[0]), |t| reference::relu(&t[0]));
        }
    }

    #[test]
    fn the_slope_of_silu_is_a_finite_difference() {
        check_finite_differences(&[random(1, 33)], |t| silu(&t[0]));
    }

    #[test]
    fn a_sample_does_not_see_its_batch_nor_the_threads() {
        check_invariance(&[random(1, (7, 99, 99, 3))], 1, |t| silu(&t[0]));
    }

    #[test]
    fn the_gradient_of_relu_at_zero_is_zero_and_nan_is_not_hidden() {
        let x = candle_core::Var::new(&[-1f32, 0.0, 2.0], &candle_core::Device::Cpu).unwrap();
        let gradient = relu(&x).unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(values(gradient.get(&x).unwrap()), [0.0, 0.0, 1.0]);
        let nan = Tensor::new(&[f32::NAN, -100.0, -1e30], &candle_core::Device::Cpu).unwrap();
        assert!(values(&relu(&nan).unwrap())[0].is_nan());
        let silu = values(&silu(&nan).unwrap());
        assert!(silu[0].is_nan() && silu[1].abs() < 1e-35 && silu[2].is_finite());
    }
}
