//! Searches for adversarial images, image by image: each is a state machine that asks the network about one point
//! after the other. The networks' work is done for many of them at once, and who has found leaves.

use candle_core::{Device, Tensor, Var};

use super::{Norm, Threat};
use crate::Result;

/// A classifier as attacks see it: images `(b, h, w, c)` f32 in [0, 1] to logits `(b, classes)`. Those of an image must
/// not depend on the images beside it; its parameters are best frozen.
pub type LogitsOf<'a> = &'a (dyn Fn(&Tensor) -> Result<Tensor> + Sync);

/// The network under attack.
#[derive(Clone, Copy)]
pub struct Victim<'a> {
    /// The network.
    pub logits_of: LogitsOf<'a>,
    /// Height, width and channels of its images.
    pub shape: (usize, usize, usize),
    /// Where it is.
    pub device: &'a Device,
}

impl Victim<'_> {
    fn images(&self, points: &[&[f32]]) -> Result<Tensor> {
        let (h, w, c) = self.shape;
        Ok(Tensor::from_vec(points.concat(), (points.len(), h, w, c), self.device)?)
    }

    /// The logits of each image, its elements in HWC order.
    pub fn logits(&self, points: &[&[f32]]) -> Result<Vec<Vec<f32>>> {
        Ok((self.logits_of)(&self.images(points)?)?.detach().to_vec2()?)
    }

    /// The logits of each image, and the gradient with respect to it of the sum of its logits times the weights that
    /// `weights(image, logits)` returns: the chain rule for any loss whose gradient by the logits is known.
    ///
    /// Fails with [`Error::Alarm`](crate::Error::Alarm) if the logits do not depend on the images.
    pub fn logits_and_gradients(
        &self,
        points: &[&[f32]],
        mut weights: impl FnMut(usize, &[f32]) -> Vec<f32>,
    ) -> Result<Vec<(Vec<f32>, Vec<f32>)>> {
        let x = Var::from_tensor(&self.images(points)?)?;
        let out = (self.logits_of)(x.as_tensor())?;
        let logits = out.detach().to_vec2::<f32>()?;
        let weights: Vec<f32> = logits.iter().enumerate().flat_map(|(i, row)| weights(i, row)).collect();
        let weights = Tensor::from_vec(weights, out.shape(), self.device)?;
        let grads = (out * weights)?.sum_all()?.backward()?;
        let Some(gradient) = grads.get(x.as_tensor()) else {
            bail!(Alarm, "the logits do not depend on the images: there is no gradient to follow");
        };
        let gradient = gradient.flatten_from(1)?.to_vec2::<f32>()?;
        Ok(logits.into_iter().zip(gradient).collect())
    }
}

/// A search for one adversarial image.
pub(super) trait Search {
    /// Whether the search needs gradients.
    const GRADIENTS: bool;

    /// The point to ask about next; none if the search is over.
    fn point(&self) -> Option<&[f32]>;

    /// The gradient, by the logits at that point, of what the search climbs. Not asked without [`Search::GRADIENTS`].
    fn weights(&mut self, logits: &[f32]) -> Vec<f32>;

    /// Takes the answer: the logits at the point and, if there are such, the gradient by the pixels.
    fn advance(&mut self, logits: &[f32], gradient: &[f32]);

    /// The adversarial image, if one is found.
    fn found(self) -> Option<Vec<f32>>;
}

/// Runs the searches side by side until all are over. Returns what each has found.
pub(super) fn run<S: Search>(victim: &Victim, mut searches: Vec<S>) -> Result<Vec<Option<Vec<f32>>>> {
    loop {
        let mut active: Vec<&mut S> = searches.iter_mut().filter(|s| s.point().is_some()).collect();
        if active.is_empty() {
            return Ok(searches.into_iter().map(S::found).collect());
        }
        crate::progress::check_stop()?;
        let points: Vec<Vec<f32>> = active.iter().filter_map(|s| s.point().map(<[f32]>::to_vec)).collect();
        let points: Vec<&[f32]> = points.iter().map(Vec::as_slice).collect();
        if S::GRADIENTS {
            let answers = victim.logits_and_gradients(&points, |i, logits| active[i].weights(logits))?;
            for (search, (logits, mut gradient)) in active.iter_mut().zip(answers) {
                // Nowhere to go, rather than to a point that is none.
                gradient.iter_mut().filter(|g| !g.is_finite()).for_each(|g| *g = 0.0);
                search.advance(&logits, &gradient);
            }
        } else {
            for (search, logits) in active.iter_mut().zip(victim.logits(&points)?) {
                search.advance(&logits, &[]);
            }
        }
    }
}

/// The class that a network chooses: the largest logit, the first of equals. No class if one of them is not a number.
pub fn choice(logits: &[f32]) -> Option<usize> {
    if logits.iter().any(|z| z.is_nan()) {
        return None;
    }
    (0..logits.len()).reduce(|best, i| if logits[i] > logits[best] { i } else { best })
}

/// The classes in falling order of their logits; equals stay in order.
pub(super) fn ranking(logits: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    order
}

/// The length of a vector in this norm.
pub fn length(norm: Norm, v: impl IntoIterator<Item = f32>) -> f32 {
    match norm {
        // Not `max`, which loses what is not a number.
        Norm::Linf => {
            let larger = |a: f32, d: f32| if d.is_nan() || d.abs() > a { d.abs() } else { a };
            v.into_iter().fold(0.0, larger)
        }
        Norm::L2 => v.into_iter().map(|d| f64::from(d).powi(2)).sum::<f64>().sqrt() as f32,
    }
}

/// The length of `a - b` in this norm.
pub fn distance(norm: Norm, a: &[f32], b: &[f32]) -> f32 {
    length(norm, a.iter().zip(b).map(|(a, b)| a - b))
}

impl Threat {
    /// Moves `x_adv` to the nearest point of the ball around `x`, then into the box: [`Threat::project`] for one image.
    pub(super) fn project_image(&self, x: &[f32], x_adv: &mut [f32]) {
        let epsilon = self.epsilon() as f32;
        match self.norm() {
            Norm::Linf => {
                for (v, &x) in x_adv.iter_mut().zip(x) {
                    *v = v.max(x - epsilon).min(x + epsilon).clamp(0.0, 1.0);
                }
            }
            Norm::L2 => {
                let shrink = (epsilon / distance(Norm::L2, x_adv, x).max(f32::MIN_POSITIVE)).min(1.0);
                for (v, &x) in x_adv.iter_mut().zip(x) {
                    *v = (x + (*v - x) * shrink).clamp(0.0, 1.0);
                }
            }
        }
    }
}
