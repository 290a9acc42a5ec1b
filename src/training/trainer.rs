//! What the training stages share: steps whose gradients are computed in parallel, the moving average, the
//! best state so far, a log, and checkpoints often enough to lose at most 20 s.

use std::{ops::Range, path::PathBuf, time::Instant};

use candle_core::{Tensor, Var, backprop::GradStore};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    Result,
    nn::{
        Params,
        checkpoint::Checkpoints,
        optim::{Ema, Optimizer, clip_scale, grad_norm},
    },
    progress::{self, checkpoint_interval},
};

/// Into how many parts a batch is divided on the CPU. Fixed, so that the number of threads does not change any sum.
const CPU_PARTS: usize = 4;

/// The contribution of some samples of a batch to a step.
pub(crate) struct Part {
    /// Their part of the loss.
    pub loss: Tensor,
    /// Sum and number of the losses in each of several ranges of noise, for the log; empty where there is no noise.
    pub by_noise: Vec<(f64, u64)>,
}

impl From<Tensor> for Part {
    fn from(loss: Tensor) -> Self {
        Self { loss, by_noise: Vec::new() }
    }
}

/// A loss, the losses by noise level, and the gradients.
type Done = (f64, Vec<(f64, u64)>, GradStore);

/// Named tensors: a network's weights at one time.
type Weights = Vec<(String, Tensor)>;

/// A training run in progress.
pub(crate) struct Trainer<'a> {
    params: &'a Params,
    optimizer: Box<dyn Optimizer>,
    ema: Ema,
    checkpoints: Checkpoints,
    saved: Instant,
    state: State,
    best: Weights,
    /// What is averaged: everything in the network except its counters.
    followed: Vec<(String, Var)>,
    parts: usize,
    accumulate: usize,
}

#[derive(Serialize, Deserialize, Default)]
struct State {
    step: usize,
    best_score: Option<f64>,
    /// Sum and number of the losses since the last line of the log.
    losses: (f64, usize),
    /// The same by noise level.
    #[serde(default)]
    by_noise: Vec<(f64, u64)>,
    log: Vec<Value>,
}

impl<'a> Trainer<'a> {
    /// Begins a run, or continues from the newest checkpoint in `dir`, which then overwrites `params`.
    pub(crate) fn resume(
        dir: PathBuf,
        params: &'a Params,
        mut optimizer: Box<dyn Optimizer>,
        ema_decay: f64,
    ) -> Result<Self> {
        let checkpoints = Checkpoints::new(dir);
        let followed: Vec<_> = params.all().into_iter().filter(|(_, var)| var.dtype().is_float()).collect();
        let mut ema = Ema::new(&followed, ema_decay)?;
        let mut best = Vec::new();
        let mut state = State::default();
        if let Some(var) = params.vars().first()
            && let Some((found, tensors)) = checkpoints.load::<State>(var.1.device())?
        {
            let part = |prefix: &str| -> Weights {
                let named =
                    tensors.iter().filter_map(|(n, t)| Some((n.strip_prefix(prefix)?.to_owned(), t.clone())));
                named.collect()
            };
            params.copy_from(part("param/").iter().map(|(n, t)| (n.as_str(), t)))?;
            optimizer.load_state(params.vars(), &part("optimizer/"))?;
            ema.load_state(&followed, &part("ema/"))?;
            best = part("best/");
            state = found;
            progress::note(&format!("going on from step {}", state.step));
        }
        let on_cpu = params.vars().iter().all(|(_, v)| v.device().is_cpu());
        let parts = if on_cpu { CPU_PARTS } else { 1 };
        let saved = Instant::now();
        Ok(Self { params, optimizer, ema, checkpoints, saved, state, best, followed, parts, accumulate: 1 })
    }

    /// Keeps the batch whole, for networks that normalise by its statistics.
    pub(crate) fn whole(self) -> Self {
        Self { parts: 1, ..self }
    }

    /// Computes the gradients of a batch in `rounds` rounds, one after the other. This takes less memory; the step
    /// is the same except for the last bits.
    pub(crate) fn accumulating(self, rounds: usize) -> Self {
        Self { accumulate: rounds.max(1), ..self }
    }

    /// The number of steps done.
    pub(crate) fn step(&self) -> usize {
        self.state.step
    }

    /// Does one step on `items` samples.
    ///
    /// `contribution(range)` is the part of the loss that the samples in `range` contribute; the parts are
    /// summed. Parts run in parallel, their gradients are added in order.
    ///
    /// A loss or gradient that is not finite is [`crate::Error::Alarm`]; the last good checkpoint stays.
    pub(crate) fn advance(
        &mut self,
        learning_rate: f64,
        clip: f64,
        items: usize,
        contribution: &(dyn Fn(Range<usize>) -> Result<Part> + Sync),
    ) -> Result<()> {
        let (loss, by_noise, grads) = self.gradients(items, contribution)?;
        let norm = grad_norm(self.params.vars(), &grads)?;
        if !loss.is_finite() || !norm.is_finite() {
            bail!(
                Alarm,
                "step {}: loss is {loss}, gradient norm {norm}; lower learning_rate (the last good checkpoint is kept)",
                self.state.step
            );
        }
        let scale = clip_scale(norm, clip);
        self.optimizer.step_scaled(self.params, &grads, scale, learning_rate)?;
        self.ema.update(&self.followed)?;
        self.state.step += 1;
        self.state.losses.0 += loss;
        self.state.losses.1 += 1;
        self.state.by_noise.resize(by_noise.len(), (0.0, 0));
        for (total, part) in self.state.by_noise.iter_mut().zip(by_noise) {
            *total = (total.0 + part.0, total.1 + part.1);
        }
        Ok(())
    }

    /// The loss, the losses by noise level, and the gradients.
    fn gradients(
        &self,
        items: usize,
        contribution: &(dyn Fn(Range<usize>) -> Result<Part> + Sync),
    ) -> Result<Done> {
        let at_once = self.parts;
        let parts = (at_once * self.accumulate).min(items);
        let one = |part: usize| -> Result<Done> {
            let Part { loss, by_noise } = contribution(items * part / parts..items * (part + 1) / parts)?;
            Ok((f64::from(loss.to_scalar::<f32>()?), by_noise, loss.backward()?))
        };
        let mut sum: Option<Done> = None;
        for first in (0..parts).step_by(at_once) {
            let round = (first..parts.min(first + at_once)).into_par_iter().map(one);
            for part in round.collect::<Result<Vec<_>>>()? {
                sum = Some(match sum {
                    None => part,
                    Some(sum) => self.add(sum, part)?,
                });
            }
        }
        sum.ok_or_else(|| crate::Error::Alarm("a batch is empty".into()))
    }

    fn add(
        &self,
        (mut loss, mut by_noise, mut sum): Done,
        (part_loss, part_by_noise, grads): Done,
    ) -> Result<Done> {
        loss += part_loss;
        for (total, part) in by_noise.iter_mut().zip(part_by_noise) {
            *total = (total.0 + part.0, total.1 + part.1);
        }
        for (_, var) in self.params.vars() {
            match (sum.get(var), grads.get(var)) {
                (Some(a), Some(b)) => drop(sum.insert(var, (a + b)?)),
                (None, Some(b)) => drop(sum.insert(var, b.clone())),
                _ => {}
            }
        }
        Ok((loss, by_noise, sum))
    }

    /// Ends a step: saves a checkpoint if one is due or if a stop was requested, and fails with
    /// [`crate::Error::Stopped`] in the latter case. Call it when everything that belongs to the step is done.
    pub(crate) fn end_step(&mut self) -> Result<()> {
        let stopped = progress::check_stop();
        if stopped.is_err() || self.saved.elapsed() >= checkpoint_interval() {
            let mut tensors = Weights::new();
            let mut add = |prefix: &str, part: Weights| {
                tensors.extend(part.into_iter().map(|(name, tensor)| (format!("{prefix}/{name}"), tensor)));
            };
            let params = self.params.all();
            add("param", params.iter().map(|(n, v)| (n.clone(), v.as_detached_tensor())).collect());
            add("optimizer", self.optimizer.state()?);
            add("ema", self.ema.state()?);
            add("best", self.best.clone());
            self.checkpoints.save(&self.state, &tensors)?;
            self.saved = Instant::now();
        }
        stopped
    }

    /// Adds a line to the log: the step, the mean loss since the previous line, and further entries.
    pub(crate) fn log(&mut self, mut line: Value) {
        let (sum, n) = std::mem::take(&mut self.state.losses);
        line["step"] = self.state.step.into();
        line["loss"] = (sum / n.max(1) as f64).into();
        let by_noise = std::mem::take(&mut self.state.by_noise);
        if !by_noise.is_empty() {
            let mean = |(sum, n): (f64, u64)| (n > 0).then(|| sum / n as f64);
            line["loss_by_noise"] = by_noise.into_iter().map(mean).collect();
        }
        self.state.log.push(line);
    }

    /// The log as JSON lines.
    pub(crate) fn log_text(&self) -> String {
        self.state.log.iter().map(|line| format!("{line}\n")).collect()
    }

    /// The log's lines.
    pub(crate) fn log_lines(&self) -> &[Value] {
        &self.state.log
    }

    /// Runs `score` on the moving average of the weights, which become the best if the score is at least the
    /// highest so far.
    ///
    /// `averaged` holds parameters of the same network; it is overwritten with the average.
    pub(crate) fn consider(&mut self, averaged: &Params, score: impl FnOnce() -> Result<f64>) -> Result<f64> {
        self.load_average(averaged)?;
        let score = score()?;
        // In a tie the later one wins: it has learned more, and the learning rate has fallen.
        if self.state.best_score.is_none_or(|best| score >= best) {
            self.state.best_score = Some(score);
            self.best = averaged
                .all()
                .iter()
                .map(|(name, var)| Ok((name.clone(), var.as_tensor().copy()?.detach())))
                .collect::<Result<_>>()?;
        }
        Ok(score)
    }

    /// Overwrites `averaged` with the moving average of the weights.
    pub(crate) fn load_average(&self, averaged: &Params) -> Result<()> {
        averaged.copy_from(self.ema.shadow().iter().map(|(n, t)| (n.as_str(), t)))
    }

    /// Overwrites `averaged` with the best weights considered, and returns their score.
    pub(crate) fn load_best(&self, averaged: &Params) -> Result<Option<f64>> {
        if self.state.best_score.is_some() {
            averaged.copy_from(self.best.iter().map(|(n, t)| (n.as_str(), t)))?;
        }
        Ok(self.state.best_score)
    }
}
