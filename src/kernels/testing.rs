//! Helpers shared by the tests of all ops.

use candle_core::{DType, Device, Shape, Tensor, Var};

use super::shell::{Apply, Op, Shell, apply};
use crate::{Result, device::CpuLevel, rng};

/// All levels; one that the machine lacks runs as the next narrower one.
pub const LEVELS: [CpuLevel; 3] = [CpuLevel::Portable, CpuLevel::Avx2, CpuLevel::Avx512];

/// Standard normals, the same for the same key.
pub fn random(key: u64, shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    let mut data = vec![0f32; shape.elem_count()];
    rng::normals(42, key, 0, &mut data);
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

pub fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn f64s(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The output and the gradients of `Σ out · r` with a fixed random `r`.
fn output_and_gradients(
    operands: &[Tensor],
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> (Tensor, Vec<Tensor>) {
    let vars: Vec<Var> = operands.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let out = f(&tensors).unwrap();
    let cotangent = random(1000, out.shape()).to_dtype(out.dtype()).unwrap();
    let grads = (&out * cotangent).unwrap().sum_all().unwrap().backward().unwrap();
    let gradients = vars.iter().map(|v| grads.get(v).expect("a gradient for each operand").clone()).collect();
    (out.detach(), gradients)
}

/// Asserts that an op's loops agree with its reference in double precision up to rounding, in output and gradients,
/// at each level, and that no gradient is tracked.
#[track_caller]
pub fn check<const N: usize, O: Op<N>>(operands: &[Tensor; N], op: impl Fn(CpuLevel) -> O)
where
    Shell<O>: Apply<N>,
{
    let all = |t: &[Tensor]| -> [Tensor; N] { t.to_vec().try_into().expect("all operands") };
    check_against(
        operands,
        |level, t| apply(op(level), all(t).each_ref()),
        |t| op(CpuLevel::Portable).reference(all(t).each_ref()),
    );
}

/// Asserts that a function of operands in single precision agrees with itself in double precision, which uses
/// references.
#[track_caller]
pub fn check_function(operands: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    check_against(operands, |_, t| f(t), &f);
}

/// As [`check`] of two functions.
#[track_caller]
pub fn check_against(
    operands: &[Tensor],
    fast: impl Fn(CpuLevel, &[Tensor]) -> Result<Tensor>,
    oracle: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let doubles: Vec<Tensor> = operands.iter().map(|t| t.to_dtype(DType::F64).unwrap()).collect();
    let (expected, expected_gradients) = output_and_gradients(&doubles, oracle);
    for level in LEVELS {
        let (out, gradients) = output_and_gradients(operands, |t| fast(level, t));
        assert_close(&out, &expected, &format!("{level:?} output"));
        for (i, (gradient, expected)) in gradients.iter().zip(&expected_gradients).enumerate() {
            assert!(!gradient.track_op(), "gradient {i} is tracked");
            assert_close(gradient, expected, &format!("{level:?} gradient {i} of {:?}", operands[i].dims()));
        }
    }
}

#[track_caller]
fn assert_close(actual: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!(actual.dims(), expected.dims(), "{what}");
    let (actual, expected) = (f64s(actual), f64s(expected));
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let error = norm(&mut actual.iter().zip(&expected).map(|(a, e)| a - e));
    let size = norm(&mut expected.iter().copied());
    // Softmax over one element has a zero gradient: values that small get an absolute bound.
    assert!(error <= 2e-6 * size + 1e-7, "{what}: off by {error:e} of {size:e}");
}

fn with_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
}

fn bits(t: &Tensor) -> Vec<u32> {
    values(t).into_iter().map(f32::to_bits).collect()
}

/// Asserts that output and gradients have the same bits as on one thread; returns both.
#[track_caller]
pub fn check_threads(
    operands: &[Tensor],
    f: impl Fn(&[Tensor]) -> Result<Tensor> + Sync,
) -> (Tensor, Vec<Tensor>) {
    let (out, gradients) = with_threads(1, || output_and_gradients(operands, &f));
    let (out_2, gradients_2) = with_threads(2, || output_and_gradients(operands, &f));
    assert_eq!(bits(&out), bits(&out_2), "output with two threads");
    for (i, (one, two)) in gradients.iter().zip(&gradients_2).enumerate() {
        assert_eq!(bits(one), bits(two), "gradient {i} with two threads");
    }
    (out, gradients)
}

/// Asserts that sample 3 alone gives the same bits as in its batch, in output and gradient, and that all bits are
/// those of one thread. The first `batched` operands have the batch as their first dimension.
#[track_caller]
pub fn check_invariance(operands: &[Tensor], batched: usize, f: impl Fn(&[Tensor]) -> Result<Tensor> + Sync) {
    let (out, gradients) = check_threads(operands, &f);
    let sample = |t: &Tensor| t.narrow(0, 3, 1).unwrap();
    let alone: Vec<Tensor> =
        operands.iter().enumerate().map(|(i, t)| if i < batched { sample(t) } else { t.clone() }).collect();
    // The cotangent of the sample in its batch.
    let cotangent = sample(&random(1000, out.shape()));
    let vars: Vec<Var> = alone.iter().map(|t| Var::from_tensor(&t.contiguous().unwrap()).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let out_alone = f(&tensors).unwrap();
    let grads = (&out_alone * cotangent).unwrap().sum_all().unwrap().backward().unwrap();
    assert_eq!(bits(&out_alone), bits(&sample(&out)), "output of a sample alone");
    for i in 0..batched {
        assert_eq!(bits(grads.get(&vars[i]).unwrap()), bits(&sample(&gradients[i])), "gradient {i} alone");
    }
}

/// Asserts that each gradient is the slope of the loss, by central differences.
#[track_caller]
pub fn check_finite_differences(operands: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let (out, gradients) = output_and_gradients(operands, &f);
    let cotangent = f64s(&random(1000, out.shape()));
    let loss = |operands: &[Tensor]| -> f64 {
        f64s(&f(operands).unwrap()).iter().zip(&cotangent).map(|(o, c)| o * c).sum()
    };
    let step = 1e-2;
    for (i, operand) in operands.iter().enumerate() {
        for (j, slope) in f64s(&gradients[i]).into_iter().enumerate() {
            let moved = |by: f32| {
                let mut data = values(operand);
                data[j] += by;
                let mut operands = operands.to_vec();
                operands[i] = Tensor::from_vec(data, operand.shape(), &Device::Cpu).unwrap();
                loss(&operands)
            };
            let difference = (moved(step) - moved(-step)) / f64::from(2.0 * step);
            let error = (difference - slope).abs();
            assert!(error < 1e-2 * slope.abs().max(1.0), "operand {i}[{j}]: {slope} against {difference}");
        }
    }
}

/// Asserts for each operand that, if it is the only one tracked, only it gets a gradient, and the same one as if
/// all were tracked.
#[track_caller]
pub fn check_untracked(operands: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let (out, gradients) = output_and_gradients(operands, &f);
    let cotangent = random(1000, out.shape());
    for (i, expected) in gradients.iter().enumerate() {
        let var = Var::from_tensor(&operands[i]).unwrap();
        let mut tensors = operands.to_vec();
        tensors[i] = var.as_tensor().clone();
        let loss = (f(&tensors).unwrap() * &cotangent).unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();
        assert_eq!(bits(grads.get(&var).unwrap()), bits(expected), "gradient {i} alone");
        for (j, operand) in operands.iter().enumerate() {
            assert!(j == i || grads.get(operand).is_none(), "frozen operand {j} got a gradient");
        }
    }
}
