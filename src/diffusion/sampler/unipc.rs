//! UniPC, a unified predictor-corrector (Zhao et al. 2023, arXiv 2302.04867, Alg. 1 and 2; multistep, predicting the
//! image).

use candle_core::Tensor;
use nalgebra::{DMatrix, DVector};

use super::step::{Denoise, Step, Trajectory, UniPcVariant, mix};
use crate::{Error, Result};

/// Corrects the image with the network's output there, and predicts the next one. The order grows from 1 to
/// `solver_order` and falls to 1 at the end.
///
/// The history is the corrected image of the step before, then predicted images, the latest first.
pub(super) fn step(step: &Step, denoise: Denoise) -> Result<Trajectory> {
    let (i, strides) = (step.i, step.strides);
    let stride = step.stride();
    let x_start = denoise(step.x, stride.from)?.image;
    let order = |i: usize| step.config.solver_order.min(strides.len() - i).min(i + 1);
    // The levels of the predicted images that a step beginning at `i` uses, the latest first.
    let before = |i: usize| -> Vec<f64> { (0..order(i)).map(|k| strides[i - k].from.sigma).collect() };
    let (x, images) = match step.history.split_first() {
        Some((last, images)) => {
            let update = Update { x: last, images, levels: before(i - 1), to: stride.from.sigma, step };
            (update.corrected(&x_start)?, images)
        }
        None => (step.x.clone(), [].as_slice()),
    };
    let images: Vec<Tensor> =
        std::iter::once(&x_start).chain(images).take(step.config.solver_order).cloned().collect();
    let next = Update { x: &x, images: &images, levels: before(i), to: stride.to.sigma, step }.predicted()?;
    Ok(Trajectory { x: next, history: std::iter::once(x).chain(images).collect() })
}

/// A step from `levels[0]` to `to`, with λ = -ln σ.
struct Update<'a> {
    x: &'a Tensor,
    images: &'a [Tensor],
    levels: Vec<f64>,
    to: f64,
    step: &'a Step<'a>,
}

impl Update<'_> {
    /// h, the difference in λ.
    fn h(&self) -> f64 {
        (self.levels[0] / self.to).ln()
    }

    fn b_of_h(&self) -> f64 {
        match self.step.config.unipc {
            UniPcVariant::Bh1 => -self.h(),
            UniPcVariant::Bh2 => (-self.h()).exp_m1(),
        }
    }

    /// The places of earlier images relative to this step, and 1 for its end.
    fn places(&self) -> Vec<f64> {
        let earlier = self.levels[1..].iter().map(|sigma| (self.levels[0] / sigma).ln() / self.h());
        earlier.chain([1.0]).collect()
    }

    /// The solution of the first `n` of the order conditions (Eq. 11), for as many places.
    fn weights(&self, n: usize) -> Result<Vec<f64>> {
        let (places, h) = (self.places(), -self.h());
        let conditions = DMatrix::from_fn(n, n, |row, column| places[column].powi(row as i32));
        let (mut phi, mut factorial) = (h.exp_m1() / h - 1.0, 1.0);
        let right = DVector::from_fn(n, |row, _| {
            let value = phi * factorial / self.b_of_h();
            factorial *= (row + 2) as f64;
            phi = phi / h - 1.0 / factorial;
            value
        });
        match conditions.lu().solve(&right) {
            Some(weights) => Ok(weights.iter().copied().collect()),
            None => Err(Error::Alarm(format!("UniPC's levels {:?} do not differ", self.levels))),
        }
    }

    /// x at `to`, with the weighted differences of these images to the latest.
    fn updated(&self, weights: &[f64], last: Option<&Tensor>) -> Result<Tensor> {
        let latest = &self.images[0];
        let kept = self.to / self.levels[0];
        let mut x = mix(1.0 - kept, latest, kept, self.x)?;
        let others = self.images[1..].iter().take(self.levels.len() - 1).chain(last);
        for ((image, place), weight) in others.zip(self.places()).zip(weights) {
            x = mix(1.0, &x, -self.b_of_h() * weight / place, &(image - latest)?)?;
        }
        Ok(x)
    }

    /// UniP. Of order 2 it has the weight of the paper's App. F.
    fn predicted(&self) -> Result<Tensor> {
        let weights = match self.levels.len() {
            1 => Vec::new(),
            2 => vec![0.5],
            order => self.weights(order - 1)?,
        };
        self.updated(&weights, None)
    }

    /// UniC, with the image predicted at the end. Of order 1 it has the weight of the paper's App. F.
    fn corrected(&self, at_end: &Tensor) -> Result<Tensor> {
        let weights = match self.levels.len() {
            1 => vec![0.5],
            order => self.weights(order)?,
        };
        self.updated(&weights, Some(at_end))
    }
}
