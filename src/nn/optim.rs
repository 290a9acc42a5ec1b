//! Optimisers, gradient clipping and weight averaging, with PyTorch's formulas.
//!
//! All of them work through the same list of named variables, in order. States are named tensors, so that a
//! checkpoint can hold them next to the weights, and a resumed run computes the same bits as an uninterrupted one.

use candle_core::{DType, Device, Tensor, Var, backprop::GradStore};
use rayon::prelude::*;

use super::params::Params;
use crate::{
    Result,
    kernels::{self, AdamStep, Elements, SgdStep},
};

fn gradient<'a>(grads: &'a GradStore, name: &str, var: &Var) -> Result<&'a Tensor> {
    let Some(grad) = grads.get(var) else { bail!(Alarm, "variable '{name}' has no gradient") };
    if grad.shape() != var.shape() {
        bail!(Alarm, "the gradient of '{name}' has shape {:?}, expected {:?}", grad.dims(), var.dims());
    }
    Ok(grad)
}

fn named<'a>(state: &'a [(String, Tensor)], name: &str) -> Result<&'a Tensor> {
    match state.iter().find(|(n, _)| n == name) {
        Some((_, tensor)) => Ok(tensor),
        None => bail!(Data, "the state has no tensor '{name}'"),
    }
}

/// A copy of the tensor `name` of a state, made like `var`: its shape is checked, and it gets the variable's device and
/// type.
fn find(state: &[(String, Tensor)], name: &str, var: &Var) -> Result<Tensor> {
    let tensor = named(state, name)?;
    if tensor.dims() != var.dims() {
        bail!(Data, "'{name}' of the state has shape {:?}, expected {:?}", tensor.dims(), var.dims());
    }
    Ok(tensor.to_dtype(var.dtype())?.to_device(var.device())?.copy()?)
}

fn load_count(state: &[(String, Tensor)], name: &str) -> Result<u64> {
    match named(state, name)?.to_dtype(DType::I64)?.flatten_all()?.to_vec1::<i64>()?[..] {
        [count] if count >= 0 => Ok(count as u64),
        ref other => bail!(Data, "'{name}' of the state is {other:?}, expected one count"),
    }
}

/// An optimiser, which turns gradients into updates.
pub trait Optimizer {
    /// Updates every parameter from its gradient times `scale`, see [`clip_scale`]. Fails, naming it, if one has
    /// none.
    fn step_scaled(&mut self, params: &Params, grads: &GradStore, scale: f64, lr: f64) -> Result<()>;
    /// Updates every parameter from its gradient. Fails, naming it, if one has none.
    fn step(&mut self, params: &Params, grads: &GradStore, lr: f64) -> Result<()> {
        self.step_scaled(params, grads, 1.0, lr)
    }
    /// What [`Optimizer::load_state`] needs to continue bit for bit: the moments and the number of steps.
    fn state(&self) -> Result<Vec<(String, Tensor)>>;
    /// Continues from a state that was saved for the same variables.
    fn load_state(&mut self, vars: &[(String, Var)], state: &[(String, Tensor)]) -> Result<()>;
}

/// The formula of an optimiser with `N` running averages for each variable.
pub trait Rule<const N: usize> {
    /// The names of the averages in states.
    const MOMENTS: [&'static str; N];

    /// What a step, counted from 1, does to a variable: overwrites it and its averages, by its gradient.
    fn at(&self, step: f64, scale: f64, lr: f64) -> impl Fn(&Var, &Tensor, [&Tensor; N]) -> Result<()>;
}

/// An optimiser that goes by `N` running averages for each variable.
pub struct Moving<R, const N: usize> {
    rule: R,
    step: u64,
    slots: Vec<Slot<N>>,
}

struct Slot<const N: usize> {
    name: String,
    /// Each has memory of its own, because steps overwrite them.
    moments: [Tensor; N],
}

impl<R: Rule<N>, const N: usize> Moving<R, N> {
    /// An optimiser that has made no steps yet.
    pub fn new(rule: R) -> Self {
        Self { rule, step: 0, slots: Vec::new() }
    }
}

/// The averages of each variable, each made by `make` of the variable, its name and its own.
fn slots<const N: usize>(
    names: [&'static str; N],
    vars: &[(String, Var)],
    make: impl Fn(&Var, &str, &str) -> Result<Tensor>,
) -> Result<Vec<Slot<N>>> {
    let slot = |(name, var): &(String, Var)| {
        let moments = names.iter().map(|moment| make(var, name, moment)).collect::<Result<Vec<_>>>()?;
        let moments = moments.try_into().expect("as many tensors as names");
        Ok(Slot { name: name.clone(), moments })
    };
    vars.iter().map(slot).collect()
}

impl<R: Rule<N>, const N: usize> Optimizer for Moving<R, N> {
    fn step_scaled(&mut self, params: &Params, grads: &GradStore, scale: f64, lr: f64) -> Result<()> {
        let vars = params.vars();
        let gradients: Vec<_> =
            vars.iter().map(|(name, var)| gradient(grads, name, var)).collect::<Result<_>>()?;
        if self.step == 0 {
            self.slots = slots(R::MOMENTS, vars, |var, _, _| Ok(var.zeros_like()?))?;
        }
        if !vars.iter().map(|(name, _)| name).eq(self.slots.iter().map(|slot| &slot.name)) {
            bail!(Alarm, "an optimiser of {} variables got {} others", self.slots.len(), vars.len());
        }
        self.step += 1;
        let _overwriting = params.overwriting();
        let apply = self.rule.at(self.step as f64, scale, lr);
        for (((_, var), gradient), slot) in vars.iter().zip(gradients).zip(&self.slots) {
            apply(var, gradient, slot.moments.each_ref())?;
        }
        Ok(())
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut state = vec![("step".to_string(), Tensor::new(&[self.step as i64], &Device::Cpu)?)];
        for slot in &self.slots {
            for (name, moment) in R::MOMENTS.iter().zip(&slot.moments) {
                state.push((format!("{}.{name}", slot.name), moment.copy()?));
            }
        }
        Ok(state)
    }

    fn load_state(&mut self, vars: &[(String, Var)], state: &[(String, Tensor)]) -> Result<()> {
        let step = load_count(state, "step")?;
        // Before the first step there are no moments.
        let known = if step == 0 { &[] } else { vars };
        let found = |var: &Var, name: &str, moment: &str| find(state, &format!("{name}.{moment}"), var);
        (self.slots, self.step) = (slots(R::MOMENTS, known, found)?, step);
        Ok(())
    }
}

/// The settings of [`Adam`]; the default is PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamConfig {
    /// Decay of the mean of the gradients, in [0, 1).
    pub beta1: f64,
    /// Decay of the mean of their squares, in [0, 1).
    pub beta2: f64,
    /// Added to the denominator.
    pub epsilon: f64,
    /// Decoupled weight decay: each step multiplies weights by `1 - lr · weight_decay`.
    pub weight_decay: f64,
}

impl Default for AdamConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 }
    }
}

/// Adam (Kingma & Ba 2015, Algorithm 1) with decoupled weight decay (AdamW, Loshchilov & Hutter 2019).
pub type Adam = Moving<AdamConfig, 2>;

impl Rule<2> for AdamConfig {
    const MOMENTS: [&'static str; 2] = ["exp_avg", "exp_avg_sq"];

    fn at(&self, step: f64, scale: f64, lr: f64) -> impl Fn(&Var, &Tensor, [&Tensor; 2]) -> Result<()> {
        let Self { beta1, beta2, epsilon, weight_decay } = *self;
        let keep = 1.0 - lr * weight_decay;
        let step_size = lr / (1.0 - beta1.powf(step));
        let correction = (1.0 - beta2.powf(step)).sqrt();
        let adam = AdamStep { scale, keep, step_size, correction, beta1, beta2, epsilon };
        move |var, gradient, moments| adam.apply(var, gradient, moments)
    }
}

/// The settings of [`Sgd`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SgdConfig {
    /// Decay of the sum of the gradients, in [0, 1); 0 is plain gradient descent.
    pub momentum: f64,
    /// Whether to look ahead by one step of momentum (Nesterov).
    pub nesterov: bool,
    /// Coupled weight decay as in PyTorch: `weight_decay · weight` is added to the gradient.
    pub weight_decay: f64,
}

/// Stochastic gradient descent with momentum (Sutskever et al. 2013), as in PyTorch: the learning rate
/// multiplies the momentum, not the gradients in it.
pub type Sgd = Moving<SgdConfig, 1>;

impl Rule<1> for SgdConfig {
    const MOMENTS: [&'static str; 1] = ["momentum_buffer"];

    fn at(&self, _: f64, scale: f64, lr: f64) -> impl Fn(&Var, &Tensor, [&Tensor; 1]) -> Result<()> {
        let Self { momentum, nesterov, weight_decay } = *self;
        let sgd = SgdStep { scale, lr, momentum, weight_decay, nesterov };
        move |var, gradient, [buffer]| sgd.apply(var, gradient, buffer)
    }
}

/// The joint ℓ2 norm of the gradients of all variables. Fails, naming it, if one has none.
pub fn grad_norm(vars: &[(String, Var)], grads: &GradStore) -> Result<f64> {
    let (mut squares, mut there) = (0.0, Vec::new());
    for (name, var) in vars {
        let gradient = gradient(grads, name, var)?;
        match gradient.device().is_cpu() && gradient.dtype() == DType::F32 {
            true => squares += sum_of_squares(gradient)?,
            false => there.push(gradient.to_dtype(DType::F64)?.sqr()?.sum_all()?),
        }
    }
    // Waits for the device once, not once per variable.
    if !there.is_empty() {
        squares += Tensor::stack(&there, 0)?.sum_all()?.to_scalar::<f64>()?;
    }
    Ok(squares.sqrt())
}

/// The factor that scales gradients of this joint norm to `max_norm` if they exceed it, as in PyTorch: `max_norm /
/// (norm + 1e-6)`. It is 1 if the norm is not finite, in which case the caller should stop.
pub fn clip_scale(norm: f64, max_norm: f64) -> f64 {
    if norm.is_finite() && norm > max_norm { max_norm / (norm + 1e-6) } else { 1.0 }
}

fn sum_of_squares(x: &Tensor) -> Result<f64> {
    const CHUNK: usize = 1 << 14;
    const LANES: usize = 8;
    let x = x.contiguous()?;
    let elements = Elements::of(&x)?;
    // Fixed chunks and lanes, added in order: the number of threads does not matter.
    let chunk_sums: Vec<f64> = elements
        .par_chunks(CHUNK)
        .map(|chunk| {
            let mut lanes = [0f64; LANES];
            for row in chunk.chunks(LANES) {
                lanes.iter_mut().zip(row).for_each(|(lane, &v)| *lane += f64::from(v) * f64::from(v));
            }
            lanes.iter().sum::<f64>()
        })
        .collect();
    Ok(chunk_sums.iter().sum())
}

/// An exponential moving average of the weights with TensorFlow's warm-up: the decay of update `n`, from 0, is
/// `min(decay, (1 + n) / (10 + n))`.
pub struct Ema {
    decay: f64,
    updates: u64,
    shadow: Vec<(String, Tensor)>,
}

impl Ema {
    /// An average that begins at the current weights. `decay` is in [0, 1).
    pub fn new(vars: &[(String, Var)], decay: f64) -> Result<Self> {
        let copy = |(name, var): &(String, Var)| Ok((name.clone(), var.as_detached_tensor().copy()?));
        Ok(Self { decay, updates: 0, shadow: vars.iter().map(copy).collect::<Result<_>>()? })
    }

    /// Adds the current weights to the average. Fails if the names have changed.
    pub fn update(&mut self, vars: &[(String, Var)]) -> Result<()> {
        if !vars.iter().map(|(name, _)| name).eq(self.shadow.iter().map(|(name, _)| name)) {
            bail!(Alarm, "an average of {} variables got {} others", self.shadow.len(), vars.len());
        }
        let rate = 1.0 - self.current_decay();
        for ((_, var), (_, shadow)) in vars.iter().zip(&self.shadow) {
            kernels::average_step(shadow, var, rate)?;
        }
        self.updates += 1;
        Ok(())
    }

    /// The decay of the next update.
    pub fn current_decay(&self) -> f64 {
        let n = self.updates as f64;
        self.decay.min((1.0 + n) / (10.0 + n))
    }

    /// The averages, in the order of the variables. They share their storage with this object, so they see later
    /// [updates](Self::update).
    pub fn shadow(&self) -> &[(String, Tensor)] {
        &self.shadow
    }

    /// The average of one variable.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.shadow.iter().find(|(n, _)| n == name).map(|(_, tensor)| tensor)
    }

    /// Copies of the averages under their names, and `updates`.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut state = vec![("updates".to_string(), Tensor::new(&[self.updates as i64], &Device::Cpu)?)];
        for (name, tensor) in &self.shadow {
            state.push((name.clone(), tensor.copy()?));
        }
        Ok(state)
    }

    /// Continues from a [`state`](Self::state) of an average of the same variables. Fails if a tensor is missing
    /// or has another shape; nothing is changed then.
    pub fn load_state(&mut self, vars: &[(String, Var)], state: &[(String, Tensor)]) -> Result<()> {
        let updates = load_count(state, "updates")?;
        let load = |(name, var): &(String, Var)| Ok((name.clone(), find(state, name, var)?));
        let shadow = vars.iter().map(load).collect::<Result<_>>()?;
        (self.updates, self.shadow) = (updates, shadow);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{layers::Conv2d, params::Builder};
    use super::*;
    use crate::rng;

    const SIZES: [usize; 2] = [5, 40_000];

    fn params(vars: &[(String, Var)]) -> Params {
        Params::from(vars.to_vec())
    }

    fn variables() -> Vec<(String, Var)> {
        let var = |(i, n): (usize, usize)| {
            let mut data = vec![0f32; n];
            rng::normals(1, i as u64, 0, &mut data);
            (format!("w{i}"), Var::from_vec(data, n, &Device::Cpu).unwrap())
        };
        SIZES.into_iter().enumerate().map(var).collect()
    }

    fn of_type(dtype: DType) -> Vec<(String, Var)> {
        let var = |v: &Var| Var::from_tensor(&v.to_dtype(dtype).unwrap()).unwrap();
        variables().iter().map(|(name, v)| (name.clone(), var(v))).collect()
    }

    /// Gradients of a step: random, the same each time.
    fn gradients(vars: &[(String, Var)], step: u32) -> GradStore {
        let mut grads = vars[0].1.sum_all().unwrap().backward().unwrap();
        for (i, (_, var)) in vars.iter().enumerate() {
            let mut data = vec![0f32; var.elem_count()];
            rng::normals(2, i as u64, step, &mut data);
            grads.insert(var, Tensor::from_vec(data, var.shape(), &Device::Cpu).unwrap());
        }
        grads
    }

    fn values(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Five steps of a formula `(step, weight, gradient, memory)` in double precision, for each element.
    fn expected(formula: impl Fn(i32, &mut f64, f64, &mut [f64; 2])) -> Vec<Vec<f64>> {
        let vars = variables();
        let mut weights: Vec<Vec<f64>> =
            vars.iter().map(|(_, v)| values(v).into_iter().map(f64::from).collect()).collect();
        let mut memory: Vec<Vec<[f64; 2]>> = SIZES.iter().map(|&n| vec![[0.0; 2]; n]).collect();
        for step in 1..=5 {
            let grads = gradients(&vars, step);
            for (i, (_, var)) in vars.iter().enumerate() {
                for (j, g) in values(grads.get(var).unwrap()).into_iter().enumerate() {
                    formula(step as i32, &mut weights[i][j], f64::from(g), &mut memory[i][j]);
                }
            }
        }
        weights
    }

    #[track_caller]
    fn assert_weights(vars: &[(String, Var)], expected: &[Vec<f64>]) {
        for ((name, var), expected) in vars.iter().zip(expected) {
            for (i, (w, e)) in values(var).into_iter().zip(expected).enumerate() {
                let tolerance = 2e-6 * e.abs().max(1.0);
                assert!((f64::from(w) - e).abs() < tolerance, "{name}[{i}]: {w}, expected {e}");
            }
        }
    }

    const ADAM: AdamConfig = AdamConfig { beta1: 0.8, beta2: 0.95, epsilon: 1e-6, weight_decay: 0.1 };
    const SGD: SgdConfig = SgdConfig { momentum: 0.9, nesterov: true, weight_decay: 0.05 };

    #[test]
    fn five_steps_of_adam_are_the_papers() {
        let expected = expected(|step, w, g, [m, v]| {
            *w -= 0.01 * 0.1 * *w;
            *m = 0.8 * *m + 0.2 * g;
            *v = 0.95 * *v + 0.05 * g * g;
            let (m_hat, v_hat) = (*m / (1.0 - 0.8f64.powi(step)), *v / (1.0 - 0.95f64.powi(step)));
            *w -= 0.01 * m_hat / (v_hat.sqrt() + 1e-6);
        });
        let (vars, mut adam) = (variables(), Adam::new(ADAM));
        for step in 1..=5 {
            adam.step(&params(&vars), &gradients(&vars, step), 0.01).unwrap();
        }
        assert_weights(&vars, &expected);
    }

    #[test]
    fn five_steps_of_sgd_are_pytorchs() {
        for nesterov in [false, true] {
            let expected = expected(|step, w, g, [buffer, _]| {
                let g = g + 0.05 * *w;
                *buffer = if step == 1 { g } else { 0.9 * *buffer + g };
                *w -= 0.1 * if nesterov { g + 0.9 * *buffer } else { *buffer };
            });
            let (vars, mut sgd) = (variables(), Sgd::new(SgdConfig { nesterov, ..SGD }));
            for step in 1..=5 {
                sgd.step(&params(&vars), &gradients(&vars, step), 0.1).unwrap();
            }
            assert_weights(&vars, &expected);
        }
    }

    #[test]
    fn other_types_take_the_same_steps_in_candle_ops() {
        let (vars, doubles) = (variables(), of_type(DType::F64));
        let (mut adam, mut adam_double) = (Adam::new(ADAM), Adam::new(ADAM));
        let (mut sgd, mut sgd_double) = (Sgd::new(SGD), Sgd::new(SGD));
        let (mut ema, mut ema_double) = (Ema::new(&vars, 0.9).unwrap(), Ema::new(&doubles, 0.9).unwrap());
        for step in 1..=3 {
            let grads = gradients(&vars, step);
            let mut double_grads = gradients(&vars, step);
            for ((_, var), (_, double)) in vars.iter().zip(&doubles) {
                double_grads.insert(double, grads.get(var).unwrap().to_dtype(DType::F64).unwrap());
            }
            adam.step(&params(&vars), &grads, 0.01).unwrap();
            adam_double.step(&params(&doubles), &double_grads, 0.01).unwrap();
            sgd.step(&params(&vars), &grads, 0.01).unwrap();
            sgd_double.step(&params(&doubles), &double_grads, 0.01).unwrap();
            ema.update(&vars).unwrap();
            ema_double.update(&doubles).unwrap();
        }
        let f64s = |t: &Tensor| t.to_vec1::<f64>().unwrap();
        assert_weights(&vars, &doubles.iter().map(|(_, v)| f64s(v)).collect::<Vec<_>>());
        for ((_, shadow), (_, double)) in ema.shadow().iter().zip(ema_double.shadow()) {
            assert!(values(shadow).iter().zip(f64s(double)).all(|(s, d)| (f64::from(*s) - d).abs() < 2e-6));
        }
    }

    #[test]
    fn a_resumed_run_has_the_bits_of_an_uninterrupted_one() {
        let straight = variables();
        let (mut adam, mut sgd, mut ema) =
            (Adam::new(ADAM), Sgd::new(SGD), Ema::new(&straight, 0.99).unwrap());
        let resumed = variables();
        let (mut adam_2, mut sgd_2, mut ema_2) =
            (Adam::new(ADAM), Sgd::new(SGD), Ema::new(&resumed, 0.99).unwrap());
        for step in 1..=6 {
            if step == 1 || step == 4 {
                let states = [adam_2.state().unwrap(), sgd_2.state().unwrap(), ema_2.state().unwrap()];
                (adam_2, sgd_2) = (Adam::new(ADAM), Sgd::new(SGD));
                ema_2 = Ema::new(&variables(), 0.99).unwrap();
                adam_2.load_state(&resumed, &states[0]).unwrap();
                sgd_2.load_state(&resumed, &states[1]).unwrap();
                ema_2.load_state(&resumed, &states[2]).unwrap();
            }
            let steps =
                [(&straight, &mut adam, &mut sgd, &mut ema), (&resumed, &mut adam_2, &mut sgd_2, &mut ema_2)];
            for (vars, adam, sgd, ema) in steps {
                let grads = gradients(vars, step);
                adam.step(&params(vars), &grads, 0.01).unwrap();
                sgd.step(&params(vars), &grads, 0.01).unwrap();
                ema.update(vars).unwrap();
            }
        }
        for (i, (name, var)) in straight.iter().enumerate() {
            assert_eq!(values(var), values(&resumed[i].1));
            assert_eq!(values(ema.get(name).unwrap()), values(ema_2.get(name).unwrap()));
        }
    }

    /// Frozen views keep what kernels derived from the weights, and must not keep it once the weights have changed.
    #[test]
    fn a_step_is_seen_by_networks_that_packed_their_weights() {
        let build = |b: &Builder| Conv2d::new(8, 8, 3, b);
        let x = Tensor::ones((1, 8, 8, 8), DType::F32, &Device::Cpu).unwrap();
        let optimizers: [Box<dyn Optimizer>; 2] = [Box::new(Adam::new(ADAM)), Box::new(Sgd::new(SGD))];
        for mut optimizer in optimizers {
            let params = Params::init(1, &Device::Cpu, build).unwrap();
            let (tracked, frozen) = (params.tracked(build).unwrap(), params.frozen(build).unwrap());
            let before = values(&frozen.forward(&x).unwrap());
            let grads = tracked.forward(&x).unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap();
            optimizer.step(&params, &grads, 0.1).unwrap();
            let after = values(&frozen.forward(&x).unwrap());
            assert_ne!(after, before);
            let bytes = params.to_safetensors(&[]).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("model.safetensors");
            crate::fs::publish(&path, &bytes).unwrap();
            let fresh = Params::load(&path, &Device::Cpu, build).unwrap();
            assert_eq!(after, values(&fresh.frozen(build).unwrap().forward(&x).unwrap()));
        }
    }

    /// What a view packs while the weights are being written does not count as derived from the new weights.
    #[test]
    fn a_view_that_looks_during_an_update_sees_the_new_weights_after_it() {
        let build = |b: &Builder| Conv2d::new(8, 8, 3, b);
        let x = Tensor::ones((1, 8, 8, 8), DType::F32, &Device::Cpu).unwrap();
        let params = Params::init(1, &Device::Cpu, build).unwrap();
        let frozen = params.frozen(build).unwrap();
        let overwriting = params.overwriting();
        let before = values(&frozen.forward(&x).unwrap());
        for (_, var) in params.vars() {
            var.set(&(var.as_detached_tensor() * 2.0).unwrap()).unwrap();
        }
        drop(overwriting);
        let twice: Vec<f32> = before.into_iter().map(|v| 2.0 * v).collect();
        assert_eq!(values(&frozen.forward(&x).unwrap()), twice);
    }

    #[test]
    fn a_variable_without_gradient_is_named_and_nothing_moves() {
        let vars = variables();
        let mut grads = gradients(&vars, 1);
        grads.remove(&vars[1].1);
        let before = values(&vars[0].1);
        let error = Adam::new(ADAM).step(&params(&vars), &grads, 0.1).unwrap_err().to_string();
        assert_eq!(error, "variable 'w1' has no gradient");
        assert!(Sgd::new(SGD).step(&params(&vars), &grads, 0.1).is_err());
        assert_eq!(values(&vars[0].1), before);
    }

    #[test]
    fn a_state_of_other_variables_is_refused() {
        let vars = variables();
        let mut adam = Adam::new(ADAM);
        adam.step(&params(&vars), &gradients(&vars, 1), 0.1).unwrap();
        let mut state = adam.state().unwrap();
        state.pop();
        let error = Adam::new(ADAM).load_state(&vars, &state).unwrap_err().to_string();
        assert_eq!(error, "the state has no tensor 'w1.exp_avg_sq'");
        state.push(("w1.exp_avg_sq".into(), Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap()));
        let error = Adam::new(ADAM).load_state(&vars, &state).unwrap_err().to_string();
        assert_eq!(error, "'w1.exp_avg_sq' of the state has shape [3], expected [40000]");
        assert!(adam.step(&params(&vars[..1]), &gradients(&vars, 2), 0.1).is_err());
    }

    #[test]
    fn clipping_is_a_step_on_gradients_scaled_to_the_norm() {
        let vars = variables();
        let grads = gradients(&vars, 1);
        let square = |(_, v): &(String, Var)| -> f64 {
            values(grads.get(v).unwrap()).iter().map(|&g| f64::from(g).powi(2)).sum()
        };
        let norm = vars.iter().map(square).sum::<f64>().sqrt();
        assert!((grad_norm(&vars, &grads).unwrap() / norm - 1.0).abs() < 1e-12);
        assert_eq!(clip_scale(norm, 1e6), 1.0);
        let scale = clip_scale(norm, 1.5);
        assert!((scale * norm - 1.5).abs() < 1e-5);

        let optimizers: [fn() -> Box<dyn Optimizer>; 2] =
            [|| Box::new(Adam::new(ADAM)), || Box::new(Sgd::new(SGD))];
        for optimizer in optimizers {
            for dtype in [DType::F32, DType::F64] {
                let (vars, copies) = (of_type(dtype), of_type(dtype));
                let (mut grads, mut scaled) = (gradients(&vars, 1), gradients(&copies, 1));
                for ((_, var), (_, copy)) in vars.iter().zip(&copies) {
                    let grad = grads.get(var).unwrap().to_dtype(dtype).unwrap();
                    scaled.insert(copy, (&grad * scale).unwrap());
                    grads.insert(var, grad);
                }
                optimizer().step_scaled(&params(&vars), &grads, scale, 0.1).unwrap();
                optimizer().step(&params(&copies), &scaled, 0.1).unwrap();
                let floats = |var: &Var| values(&var.to_dtype(DType::F32).unwrap());
                for ((_, var), (_, copy)) in vars.iter().zip(&copies) {
                    assert_eq!(floats(var), floats(copy));
                }
            }
        }
        let mut grads = gradients(&vars, 1);
        grads.insert(&vars[0].1, Tensor::new(&[f32::NAN; 5], &Device::Cpu).unwrap());
        let norm = grad_norm(&vars, &grads).unwrap();
        assert!(norm.is_nan() && clip_scale(norm, 1.0) == 1.0);
    }

    #[test]
    fn the_average_warms_up_and_follows_the_weights() {
        let vars = vec![("w".to_string(), Var::new(&[1f32], &Device::Cpu).unwrap())];
        let mut ema = Ema::new(&vars, 0.995).unwrap();
        let mut expected = 1.0;
        for n in 0..1800 {
            let decay = f64::min(0.995, (1.0 + f64::from(n)) / (10.0 + f64::from(n)));
            assert_eq!(ema.current_decay(), decay);
            match n {
                0 => assert!((decay - 0.1).abs() < 1e-12),
                10 => assert!((decay - 0.55).abs() < 1e-12),
                1789 => assert!(decay < 0.995),
                1790.. => assert_eq!(decay, 0.995),
                _ => {}
            }
            let weight = f64::from(n % 7);
            vars[0].1.set(&Tensor::new(&[weight as f32], &Device::Cpu).unwrap()).unwrap();
            ema.update(&vars).unwrap();
            expected = decay * expected + (1.0 - decay) * weight;
        }
        assert!((f64::from(values(ema.get("w").unwrap())[0]) - expected).abs() < 1e-4);
        assert!(ema.get("v").is_none());
    }
}
