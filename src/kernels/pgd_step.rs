//! The step of projected gradient ascent.

use candle_core::{D, Tensor};

use super::{
    parallel::{CHUNK, in_chunks},
    shell::{self, Node, Op, Operand, Output},
};
use crate::Result;

/// `start` moved up the gradient by a step of length `step` in the norm, projected onto the ball of radius `epsilon` around
/// `x`, then into [0, 1]. All are f32 images `(b, …)`; the norm is ℓ2 if `l2`, else ℓ∞. The result is in no graph.
pub fn pgd_step(
    x: &Tensor,
    start: &Tensor,
    gradient: &Tensor,
    (step, epsilon): (f64, f64),
    l2: bool,
) -> Result<Tensor> {
    let [images, from, along] = [x, start, gradient].map(Tensor::dims);
    if images != from || images != along {
        bail!(Alarm, "images {images:?} got a start {from:?} and a gradient {along:?}");
    }
    shell::run(PgdStep { step, epsilon, l2 }, [&x.detach(), &start.detach(), &gradient.detach()])
}

/// The steepest direction of length 1 in the norm: the signs of the gradient for ℓ∞, the gradient divided by its
/// length if `l2`. `gradient`: `(b, …)`. A gradient of 0 stays 0.
pub fn steepest(gradient: &Tensor, l2: bool) -> Result<Tensor> {
    if !l2 {
        return Ok(gradient.sign()?);
    }
    // Scaled by the largest element first: the square of a small gradient is 0 in f32.
    let largest = gradient.abs()?.flatten_from(1)?.max_keepdim(D::Minus1)?;
    let largest = per_image(&largest.maximum(f32::MIN_POSITIVE)?, gradient)?;
    let scaled = gradient.broadcast_div(&largest)?;
    Ok(scaled.broadcast_div(&norms(&scaled)?)?)
}

/// The point nearest to `x_adv` in the ball of radius `epsilon` around `x`, ℓ2 or else ℓ∞, then in [0, 1]. `x`,
/// `x_adv`: `(b, …)`.
pub fn project(x: &Tensor, x_adv: &Tensor, epsilon: f64, l2: bool) -> Result<Tensor> {
    let in_ball = if l2 {
        let delta = (x_adv - x)?;
        let shrink = (epsilon / norms(&delta)?)?.minimum(1f32)?;
        (x + delta.broadcast_mul(&shrink)?)?
    } else {
        x_adv.maximum(&(x - epsilon)?)?.minimum(&(x + epsilon)?)?
    };
    Ok(in_ball.clamp(0f32, 1f32)?)
}

/// The ℓ2 norm of each image, at least the smallest normal number, shaped to divide the images by.
fn norms(x: &Tensor) -> Result<Tensor> {
    let norms = x.flatten_from(1)?.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    per_image(&norms.maximum(f32::MIN_POSITIVE)?, x)
}

/// `(b, 1)` as `(b, 1, …)`, of the rank of `x`.
fn per_image(values: &Tensor, x: &Tensor) -> Result<Tensor> {
    let mut shape = vec![1; x.rank()];
    shape[0] = x.dim(0)?;
    Ok(values.reshape(shape)?)
}

struct PgdStep {
    step: f64,
    epsilon: f64,
    l2: bool,
}

fn at_least(v: f32, low: f32) -> f32 {
    if v < low { low } else { v }
}

fn at_most(v: f32, high: f32) -> f32 {
    if v > high { high } else { v }
}

/// The ℓ2 norm, at least the smallest normal number: a sum in 32 interleaved parts, added pairwise.
fn length(values: &[f32]) -> f32 {
    let (rows, rest) = values.as_chunks::<32>();
    let mut lanes = [0f32; 32];
    for row in rows {
        lanes.iter_mut().zip(row).for_each(|(lane, v)| *lane += v * v);
    }
    let [a, b, c, d]: [f32; 4] = std::array::from_fn(|i| {
        let of = |i: usize| (lanes[i] + lanes[i + 8]) + (lanes[i + 16] + lanes[i + 24]);
        of(i) + of(i + 4)
    });
    let sum = rest.iter().fold((a + b) + (c + d), |sum, v| sum + v * v);
    at_least(sum.sqrt(), f32::MIN_POSITIVE)
}

impl PgdStep {
    fn linf(&self, [x, start, gradient]: [&[f32]; 3], out: &mut [f32]) {
        let (step, epsilon) = (self.step as f32, self.epsilon as f32);
        for (out, ((&x, &start), &gradient)) in out.iter_mut().zip(x.iter().zip(start).zip(gradient)) {
            let sign = f32::from(gradient > 0.0) - f32::from(gradient < 0.0);
            let moved = start + sign * step;
            *out = at_most(at_least(at_most(at_least(moved, x - epsilon), x + epsilon), 0.0), 1.0);
        }
    }

    /// The step for one image.
    fn l2(&self, [x, start, gradient]: [&[f32]; 3], out: &mut [f32]) {
        let (step, epsilon) = (self.step as f32, self.epsilon as f32);
        let largest = gradient.iter().map(|g| g.abs()).reduce(at_least).unwrap_or(0.0);
        let largest = at_least(largest, f32::MIN_POSITIVE);
        out.iter_mut().zip(gradient).for_each(|(out, g)| *out = g / largest);
        let norm = length(out);
        for (out, (x, start)) in out.iter_mut().zip(x.iter().zip(start)) {
            *out = (start + *out / norm * step) - x;
        }
        let shrink = at_most(1.0 / length(out) * epsilon, 1.0);
        out.iter_mut().zip(x).for_each(|(out, x)| *out = at_most(at_least(x + *out * shrink, 0.0), 1.0));
    }
}

impl Node<3> for PgdStep {
    const NAME: &'static str = "pgd-step";

    fn forward(&self, operands: [Operand; 3]) -> Output {
        let x = operands[0];
        let chunk = if self.l2 { x.len() / x.shape().dims()[0].max(1) } else { CHUNK };
        let out = in_chunks(x.len(), chunk, |range, out| {
            let operands = operands.map(|operand| &operand.values()[range.clone()]);
            if self.l2 { self.l2(operands, out) } else { self.linf(operands, out) }
        });
        Ok((out, x.shape().clone()))
    }
}

impl Op<3> for PgdStep {
    fn reference(&self, [x, start, gradient]: [&Tensor; 3]) -> Result<Tensor> {
        let moved = (start + (steepest(gradient, self.l2)? * self.step)?)?;
        project(x, &moved, self.epsilon, self.l2)
    }

    #[cfg(feature = "cuda")]
    fn cuda(self, operands: [&Tensor; 3]) -> Result<Tensor> {
        use super::cuda::{config, elementwise, kernel, launch, tensor, uninitialized, with_views};
        let [x, ..] = operands;
        let (step, epsilon, images, n) = (self.step as f32, self.epsilon as f32, x.dim(0)?, x.elem_count());
        let contiguous = [x.contiguous()?, operands[1].contiguous()?, operands[2].contiguous()?];
        Ok(with_views::<f32, 3, _>(contiguous.each_ref(), |device, [values, start, gradient]| {
            let out = uninitialized::<f32>(device, n)?;
            if self.l2 {
                let (per_image, config) =
                    ((n / images.max(1)) as i32, config((images.max(1), 1, 1), (256, 1, 1)));
                let step_l2 = kernel(device, "pgd_step_l2")?;
                launch!(step_l2, config, &values, &start, &gradient, &step, &epsilon, &per_image, &out);
            } else {
                let step_linf = kernel(device, "pgd_step_linf")?;
                launch!(step_linf, elementwise(n), &values, &start, &gradient, &step, &epsilon, &n, &out);
            }
            Ok(tensor(device, out, x.shape()))
        })?)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::*, *};

    fn bits(t: &Tensor) -> Vec<u32> {
        values(t).into_iter().map(|v| if v.is_nan() { f32::NAN } else { v }.to_bits()).collect()
    }

    /// Numbers of all kinds: those of an attack, small and large gradients, zeros and NaN.
    #[test]
    fn the_loop_has_the_bits_of_the_reference() {
        for shape in [&[5, 8, 9, 3][..], &[4, 7], &[3, 32, 32, 3], &[1, 1]] {
            let x = random(1, shape).abs().unwrap().minimum(1f32).unwrap();
            let start = (&x + (random(2, shape) * 0.01).unwrap()).unwrap();
            let odd = [f32::NAN, f32::INFINITY, -0.0, f32::NEG_INFINITY, 0.0, 1e-38];
            let mut strange = values(&random(3, shape));
            strange.iter_mut().step_by(3).zip(odd).for_each(|(v, odd)| *v = odd);
            let strange = Tensor::from_vec(strange, shape, x.device()).unwrap();
            for (l2, epsilon) in [(false, 0.03), (true, 0.5), (true, 5.0)] {
                for scale in [1.0, 1e-30, 0.0, 1e10] {
                    let gradient = (random(4, shape) * scale).unwrap();
                    for operands in
                        [[&x, &start, &gradient], [&x, &start, &strange], [&x, &strange, &gradient]]
                    {
                        let step = PgdStep { step: 0.3 * epsilon, epsilon, l2 };
                        let expected = step.reference(operands).unwrap();
                        let [x, start, gradient] = operands;
                        let found = pgd_step(x, start, gradient, (step.step, epsilon), l2).unwrap();
                        assert_eq!(bits(&found), bits(&expected), "{shape:?} {l2} {epsilon} {scale}");
                    }
                }
            }
        }
    }

    #[test]
    fn an_image_does_not_see_its_batch_nor_the_threads_and_is_in_no_graph() {
        let operands = [random(1, (7, 99, 33, 3)), random(2, (7, 99, 33, 3)), random(3, (7, 99, 33, 3))];
        for l2 in [false, true] {
            let step = |t: &[Tensor]| pgd_step(&t[0], &t[1], &t[2], (0.1, 0.3), l2).unwrap();
            let all = step(&operands);
            let one = operands.each_ref().map(|t| t.narrow(0, 3, 1).unwrap());
            assert_eq!(bits(&step(&one)), bits(&all.narrow(0, 3, 1).unwrap()));
            let tracked = operands.each_ref().map(|t| candle_core::Var::from_tensor(t).unwrap().into_inner());
            assert!(!step(&tracked).track_op());
        }
    }

    #[test]
    fn shapes_that_differ_are_named() {
        let error = pgd_step(&random(1, (2, 3)), &random(2, (2, 4)), &random(3, (2, 3)), (0.1, 0.1), true);
        assert_eq!(error.unwrap_err().to_string(), "images [2, 3] got a start [2, 4] and a gradient [2, 3]");
    }
}
