//! Activation functions.

use candle_core::Tensor;

use super::{
    math,
    microkernel::{Arithmetic, Loop, run},
    parallel::{CHUNK, in_chunks},
    shell::{self, Backward, Gradients, Node, Op, Operand, Output},
};
use crate::{Result, device::CpuLevel};

/// `x · sigmoid(x)`, element by element.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    shell::run(Activation { level: CpuLevel::get(), function: Function::Silu }, [x])
}

/// `max(x, 0)`, element by element; NaN stays NaN. Its gradient at 0 is 0, as in PyTorch.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    shell::run(Activation { level: CpuLevel::get(), function: Function::Relu }, [x])
}

/// Numbered as in kernels.cu, which has 0 for none.
#[derive(Clone, Copy)]
enum Function {
    Silu = 1,
    Relu = 2,
}

#[derive(Clone, Copy)]
struct Activation {
    level: CpuLevel,
    function: Function,
}

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

struct Slopes<'a>(Function, &'a [f32], &'a [f32], &'a mut [f32]);

impl Loop for Slopes<'_> {
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

impl Node<1> for Activation {
    const NAME: &'static str = "activation";

    fn forward(&self, [x]: [Operand; 1]) -> Output {
        let out =
            in_chunks(x.len(), CHUNK, |range, out| run(self.level, Values(self.function, &x[range], out)));
        Ok((out, x.shape().clone()))
    }

    fn backward(&self, [x]: [Operand; 1], Backward { dy, .. }: Backward<1>) -> Gradients<1> {
        let dx = in_chunks(dy.len(), CHUNK, |range, dx| {
            run(self.level, Slopes(self.function, &x[range.clone()], &dy[range], dx));
        });
        Ok([Some(dx)])
    }
}

impl Op<1> for Activation {
    fn reference(&self, [x]: [&Tensor; 1]) -> Result<Tensor> {
        Ok(match self.function {
            Function::Silu => (x / (x.neg()?.exp()? + 1.0)?)?,
            Function::Relu => (x * x.gt(0f32)?.to_dtype(x.dtype())?)?,
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda(self, operands: [&Tensor; 1]) -> Result<Tensor> {
        shell::apply_cuda(self, operands)
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::{CudaStorage, Layout, Tensor};

    use crate::kernels::{
        activation::Activation,
        cuda::{elementwise, kernel_of, launch, tensor, uninitialized, view, with_element, with_views},
        shell::{CudaBackward, CudaGradients, CudaNode, CudaOutput},
    };

    impl CudaNode<1> for Activation {
        const NAME: &'static str = "activation";

        fn forward(&self, [(x, layout)]: [(&CudaStorage, &Layout); 1]) -> CudaOutput {
            let (function, device) = (self.function as i32, &x.device);
            with_element!(x, T => {
                let x = view::<T>(x, layout)?;
                let (n, out) = (x.len(), uninitialized::<T>(device, x.len())?);
                launch!(kernel_of::<T>(device, "activation_forward")?, elementwise(n), &x, &function, &n, &out);
                Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), layout.shape().clone()))
            })
        }

        fn backward(&self, [x]: [&Tensor; 1], CudaBackward { dy, .. }: CudaBackward<1>) -> CudaGradients<1> {
            let (function, n, shape) = (self.function as i32, x.elem_count(), x.shape());
            with_element!(x, T => with_views::<T, 2, _>([x, dy], |device, [x, dy]| {
                let (backward, dx) = (kernel_of::<T>(device, "activation_backward")?, uninitialized::<T>(device, n)?);
                launch!(backward, elementwise(n), &x, &dy, &function, &n, &dx);
                Ok([Some(tensor(device, dx, shape))])
            }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::*, *};

    #[test]
    fn activations_match_the_reference_in_double_precision() {
        for shape in [(2, 3, 5, 7), (3, 33, 33, 40)] {
            let x = [(random(1, shape) * 4.0).unwrap()];
            for function in [Function::Silu, Function::Relu] {
                check(&x, |level| Activation { level, function });
            }
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
