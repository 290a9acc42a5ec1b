//! The steps of optimisers and averages, in place.

use candle_core::{Result as TensorResult, Tensor};

use super::shell::{self, Update};
use crate::Result;

/// PyTorch's SGD with momentum (Sutskever et al. 2013).
#[derive(Clone, Copy, Debug)]
pub struct SgdStep {
    /// The factor of the gradient.
    pub scale: f64,
    /// The learning rate.
    pub lr: f64,
    /// Decay of the sum of the gradients.
    pub momentum: f64,
    /// Coupled: `weight_decay · weight` is added to the gradient.
    pub weight_decay: f64,
    /// Whether to look ahead by one step of momentum.
    pub nesterov: bool,
}

impl SgdStep {
    /// Overwrites `weight` and `buffer`, the sum of the gradients; both are contiguous. Fails if the shapes differ.
    pub fn apply(&self, weight: &Tensor, gradient: &Tensor, buffer: &Tensor) -> Result<()> {
        shell::update(self, [weight, buffer], gradient)
    }
}

impl Update<2> for SgdStep {
    const NAME: &'static str = "sgd-step";

    fn update(&self, [weight, buffer]: [&mut [f32]; 2], gradient: &[f32]) {
        let [scale, lr, momentum, decay] =
            [self.scale, self.lr, self.momentum, self.weight_decay].map(|v| v as f32);
        for ((w, g), buffer) in weight.iter_mut().zip(gradient).zip(buffer) {
            let g = scale * g + decay * *w;
            *buffer = momentum * *buffer + g;
            *w -= lr * if self.nesterov { g + momentum * *buffer } else { *buffer };
        }
    }

    fn reference(&self, [weight, buffer]: [&Tensor; 2], gradient: &Tensor) -> TensorResult<[Tensor; 2]> {
        let gradient = ((gradient * self.scale)? + (weight * self.weight_decay)?)?;
        let buffer = ((buffer * self.momentum)? + &gradient)?;
        let direction = if self.nesterov { (gradient + (&buffer * self.momentum)?)? } else { buffer.clone() };
        Ok([(weight - (direction * self.lr)?)?, buffer])
    }

    #[cfg(feature = "cuda")]
    fn cuda(&self, [weight, buffer]: [&Tensor; 2], gradient: &Tensor) -> TensorResult<()> {
        use super::cuda::{elementwise, kernel, launch, with_views};
        let [scale, lr, momentum, decay] =
            [self.scale, self.lr, self.momentum, self.weight_decay].map(|v| v as f32);
        let (nesterov, n) = (i32::from(self.nesterov), weight.elem_count());
        with_views::<f32, 3, _>([weight, gradient, buffer], |device, [weight, gradient, buffer]| {
            let (step, config) = (kernel(device, "sgd_step")?, elementwise(n));
            launch!(step, config, &weight, &gradient, &buffer, &scale, &lr, &momentum, &decay, &nesterov, &n);
            Ok(())
        })
    }
}

/// Adam (Kingma & Ba 2015, Algorithm 1) with decoupled weight decay (Loshchilov & Hutter 2019).
#[derive(Clone, Copy, Debug)]
pub struct AdamStep {
    /// The factor of the gradient.
    pub scale: f64,
    /// The factor of the weights, for their decay.
    pub keep: f64,
    /// The learning rate divided by the correction of the first moment.
    pub step_size: f64,
    /// The divisor of the root of the second moment.
    pub correction: f64,
    /// Decay of the mean of the gradients.
    pub beta1: f64,
    /// Decay of the mean of their squares.
    pub beta2: f64,
    /// Added to the denominator.
    pub epsilon: f64,
}

impl AdamStep {
    /// Overwrites `weight` and `moments`, the means of the gradients and of their squares; all are contiguous.
    /// Fails if the shapes differ.
    pub fn apply(&self, weight: &Tensor, gradient: &Tensor, [first, second]: [&Tensor; 2]) -> Result<()> {
        shell::update(self, [weight, first, second], gradient)
    }

    /// What the loops compute with: the factors, the epsilon, and for both moments the decay and the share of the new.
    fn singles(&self) -> [f32; 9] {
        let Self { scale, keep, step_size, correction, beta1, beta2, epsilon } = *self;
        [scale, keep, step_size, correction, epsilon, beta1, 1.0 - beta1, beta2, 1.0 - beta2]
            .map(|v| v as f32)
    }
}

impl Update<3> for AdamStep {
    const NAME: &'static str = "adam-step";

    fn update(&self, [weight, first, second]: [&mut [f32]; 3], gradient: &[f32]) {
        let [scale, keep, step_size, correction, epsilon, b1, c1, b2, c2] = self.singles();
        for (((w, &g), m), v) in weight.iter_mut().zip(gradient).zip(first).zip(second) {
            let g = scale * g;
            *m = b1 * *m + c1 * g;
            *v = b2 * *v + c2 * (g * g);
            *w = *w * keep - step_size * (*m / (v.sqrt() / correction + epsilon));
        }
    }

    fn reference(&self, [weight, m, v]: [&Tensor; 3], gradient: &Tensor) -> TensorResult<[Tensor; 3]> {
        let Self { scale, keep, step_size, correction, beta1, beta2, epsilon } = *self;
        let gradient = (gradient * scale)?;
        let m = ((m * beta1)? + (&gradient * (1.0 - beta1))?)?;
        let v = ((v * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
        let direction = (&m / ((v.sqrt()? / correction)? + epsilon)?)?;
        Ok([((weight * keep)? - (direction * step_size)?)?, m, v])
    }

    #[cfg(feature = "cuda")]
    fn cuda(&self, [weight, first, second]: [&Tensor; 3], gradient: &Tensor) -> TensorResult<()> {
        use super::cuda::{elementwise, kernel, launch, with_views};
        let [scale, keep, step_size, correction, epsilon, b1, c1, b2, c2] = self.singles();
        let n = weight.elem_count();
        with_views::<f32, 4, _>([weight, gradient, first, second], |device, [weight, gradient, m, v]| {
            let (step, config) = (kernel(device, "adam_step")?, elementwise(n));
            launch!(
                step,
                config,
                &weight,
                &gradient,
                &m,
                &v,
                &scale,
                &keep,
                &step_size,
                &correction,
                &b1,
                &c1,
                &b2,
                &c2,
                &epsilon,
                &n
            );
            Ok(())
        })
    }
}

/// `average += rate · (weight - average)`, in place; both are contiguous. Fails if their shapes differ.
pub fn average_step(average: &Tensor, weight: &Tensor, rate: f64) -> Result<()> {
    shell::update(&AverageStep { rate }, [average], weight)
}

struct AverageStep {
    rate: f64,
}

impl Update<1> for AverageStep {
    const NAME: &'static str = "average-step";

    fn update(&self, [average]: [&mut [f32]; 1], weight: &[f32]) {
        let rate = self.rate as f32;
        average.iter_mut().zip(weight).for_each(|(average, w)| *average += rate * (w - *average));
    }

    fn reference(&self, [average]: [&Tensor; 1], weight: &Tensor) -> TensorResult<[Tensor; 1]> {
        Ok([(average + ((weight - average)? * self.rate)?)?])
    }

    #[cfg(feature = "cuda")]
    fn cuda(&self, [average]: [&Tensor; 1], weight: &Tensor) -> TensorResult<()> {
        use super::cuda::{elementwise, kernel, launch, with_views};
        let (rate, n) = (self.rate as f32, average.elem_count());
        with_views::<f32, 2, _>([average, weight], |device, [average, weight]| {
            launch!(kernel(device, "average_step")?, elementwise(n), &average, &weight, &rate, &n);
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::{super::testing::*, *};

    /// Three steps of each, with the gradient in another layout, in single precision, compared with the reference
    /// in double.
    #[test]
    fn steps_match_the_reference_in_double_precision() {
        let sgd = SgdStep { scale: 0.5, lr: 0.1, momentum: 0.9, weight_decay: 0.05, nesterov: true };
        let adam = AdamStep {
            scale: 0.5,
            keep: 0.999,
            step_size: 0.01,
            correction: 0.2,
            beta1: 0.8,
            beta2: 0.95,
            epsilon: 1e-6,
        };
        type Step<'a> = &'a dyn Fn(&[Tensor], &Tensor) -> Result<()>;
        let steps: [(usize, Step); 4] = [
            (2, &|t, g| sgd.apply(&t[0], g, &t[1])),
            (2, &|t, g| SgdStep { nesterov: false, ..sgd }.apply(&t[0], g, &t[1])),
            (3, &|t, g| adam.apply(&t[0], g, [&t[1], &t[2]])),
            (1, &|t, w| average_step(&t[0], w, 0.3)),
        ];
        for (count, step) in steps {
            let tensors = |dtype| -> Vec<Tensor> {
                (0..count as u64)
                    .map(|i| random(i, (130, 300)).abs().unwrap().to_dtype(dtype).unwrap())
                    .collect()
            };
            let (single, double) = (tensors(DType::F32), tensors(DType::F64));
            for i in 0..3 {
                let read = random(10 + i, (300, 130)).t().unwrap();
                step(&single, &read).unwrap();
                step(&double, &read.to_dtype(DType::F64).unwrap()).unwrap();
            }
            for (single, double) in single.iter().zip(&double) {
                let double = values(&double.to_dtype(DType::F32).unwrap());
                let close = |(a, b): (f32, f32)| (a - b).abs() <= 2e-6 * b.abs().max(1.0);
                assert!(values(single).into_iter().zip(double).all(close));
            }
        }
    }

    #[test]
    fn what_is_read_has_the_shape_of_what_is_written() {
        let zeros = |n: usize| Tensor::zeros(n, DType::F32, &Device::Cpu).unwrap();
        assert!(average_step(&zeros(3), &zeros(4), 0.5).unwrap_err().to_string().contains("got 4"));
    }
}
