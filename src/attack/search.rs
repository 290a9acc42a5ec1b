//! Searches for adversarial images, one for each image: each search is a state machine that queries the network at
//! one point after another. The network answers many of them at once, and a finished search makes room for the
//! next.

use candle_core::{Device, Tensor, Var};

use super::{Norm, Threat};
use crate::{Result, progress::check_stop, rng};

/// A classifier as attacks see it: images `(b, h, w, c)` f32 in [0, 1] to logits `(b, classes)`. The logits of an
/// image must not depend on the other images in the batch; the parameters are best frozen.
pub type LogitsOf<'a> = &'a (dyn Fn(&Tensor) -> Result<Tensor> + Sync);

/// The network under attack.
#[derive(Clone, Copy)]
pub struct Victim<'a> {
    /// The network.
    pub logits_of: LogitsOf<'a>,
    /// Height, width and channels of its images.
    pub shape: (usize, usize, usize),
    /// The device that it is on.
    pub device: &'a Device,
}

impl Victim<'_> {
    fn images(&self, points: &[&[f32]]) -> Result<Tensor> {
        let (h, w, c) = self.shape;
        Ok(Tensor::from_vec(points.concat(), (points.len(), h, w, c), self.device)?)
    }

    /// The logits of each image; its elements are in HWC order.
    pub fn logits(&self, points: &[&[f32]]) -> Result<Vec<Vec<f32>>> {
        Ok((self.logits_of)(&self.images(points)?)?.detach().to_vec2()?)
    }

    /// Evaluates the network at the point of each search and passes the answers on: the logits and, with
    /// `gradients`, the gradient with respect to the pixels of the logits times the search's
    /// [weights](Search::weights), which by the chain rule gives the gradient of any loss.
    ///
    /// Fails with [`Error::Alarm`](crate::Error::Alarm) if the logits do not depend on the images.
    fn answer(&self, searches: &mut [&mut Box<dyn Search>], gradients: bool) -> Result<()> {
        let points: Vec<&[f32]> = searches.iter().filter_map(|search| search.point()).collect();
        let images = self.images(&points)?;
        let tracked = if gradients { Some(Var::from_tensor(&images)?) } else { None };
        let answers = (self.logits_of)(tracked.as_deref().unwrap_or(&images))?;
        let logits = answers.detach().to_vec2::<f32>()?;
        if logits.len() != searches.len() {
            bail!(Alarm, "{} images have logits for {}", searches.len(), logits.len());
        }
        let mut by_pixels: Vec<Vec<f32>> = vec![Vec::new(); searches.len()];
        if let Some(x) = tracked {
            let mut weights = Vec::with_capacity(logits.len() * logits[0].len());
            for (search, logits) in searches.iter_mut().zip(&logits) {
                weights.extend(search.weights(logits)?);
            }
            let weights = Tensor::from_vec(weights, answers.shape(), self.device)?;
            let grads = (answers * weights)?.sum_all()?.backward()?;
            let Some(gradient) = grads.get(x.as_tensor()) else {
                bail!(Alarm, "the logits do not depend on the images: there is no gradient to follow");
            };
            by_pixels = gradient.flatten_from(1)?.to_vec2()?;
            // Stay, rather than go to a point that is not finite.
            by_pixels.iter_mut().flatten().filter(|g| !g.is_finite()).for_each(|g| *g = 0.0);
        }
        for ((search, logits), gradient) in searches.iter_mut().zip(&logits).zip(&by_pixels) {
            search.advance(logits, gradient)?;
        }
        Ok(())
    }
}

/// An image under attack.
#[derive(Clone, Debug)]
pub struct Example {
    /// Its pixels in [0, 1], in HWC order.
    pub image: Vec<f32>,
    /// Height, width and channels.
    pub shape: (usize, usize, usize),
    /// Its class.
    pub label: usize,
    /// The key of all random draws for it.
    pub id: u64,
}

impl Example {
    /// Pixels in its layout as `(1, h, w, c)`, on the CPU.
    pub fn tensor(&self, pixels: &[f32]) -> Result<Tensor> {
        let (h, w, c) = self.shape;
        Ok(Tensor::from_slice(pixels, (1, h, w, c), &Device::Cpu)?)
    }

    /// Whether these logits predict its class.
    pub(super) fn is_right(&self, logits: &[f32]) -> bool {
        choice(logits) == Some(self.label)
    }
}

/// An attack: how to search for an adversarial image near a given one.
pub trait Attack: Sync {
    /// The search for one image. Its result depends only on the example and the network.
    fn search(&self, example: Example) -> Result<Box<dyn Search>>;
}

impl<F: Fn(Example) -> Result<Box<dyn Search>> + Sync> Attack for F {
    fn search(&self, example: Example) -> Result<Box<dyn Search>> {
        self(example)
    }
}

/// A search for one adversarial image.
pub trait Search {
    /// The point to evaluate next; `None` if the search is over.
    fn point(&self) -> Option<&[f32]>;

    /// Whether the search needs the gradient at that point; a search that uses only the logits never does.
    fn wants_gradient(&self) -> bool {
        false
    }

    /// The gradient of what the search climbs, with respect to the logits at that point. Called only if it [wants a
    /// gradient](Search::wants_gradient).
    fn weights(&mut self, _logits: &[f32]) -> Result<Vec<f32>> {
        Ok(Vec::new())
    }

    /// Takes the answer: the logits at the point and, if wanted, the gradient with respect to the pixels.
    fn advance(&mut self, logits: &[f32], gradient: &[f32]) -> Result<()>;

    /// The adversarial image, if one was found.
    fn found(&self) -> Option<&[f32]>;
}

/// Runs the searches, each with a number of its own, at most `size` at a time: a finished search makes room for the
/// next. `over` receives the number of each search and what it found.
pub fn run(
    victim: &Victim,
    size: usize,
    searches: impl IntoIterator<Item = Result<(usize, Box<dyn Search>)>>,
    mut over: impl FnMut(usize, Option<&[f32]>) -> Result<()>,
) -> Result<()> {
    let (mut searches, mut window) = (searches.into_iter(), Vec::new());
    loop {
        while window.len() < size.max(1)
            && let Some(search) = searches.next()
        {
            window.push(search?);
        }
        if window.is_empty() {
            return Ok(());
        }
        check_stop()?;
        for gradients in [true, false] {
            let asking = window.iter_mut().map(|(_, search)| search);
            let mut asking: Vec<&mut Box<dyn Search>> =
                asking.filter(|s| s.point().is_some() && s.wants_gradient() == gradients).collect();
            if !asking.is_empty() {
                victim.answer(&mut asking, gradients)?;
            }
        }
        for (number, search) in window.extract_if(.., |(_, search)| search.point().is_none()) {
            over(number, search.found())?;
        }
    }
}

/// Searches from one start after another, until one of these searches finds something.
pub(super) struct Restarted<F> {
    starts: usize,
    begin: F,
    /// The number of the present start, and the search from there.
    start: usize,
    search: Box<dyn Search>,
}

impl<F: Fn(usize) -> Box<dyn Search>> Restarted<F> {
    /// `begin(start)`: the search from that start, counted from 0.
    pub(super) fn new(starts: usize, begin: F) -> Self {
        Self { starts, search: begin(0), begin, start: 0 }
    }
}

impl<F: Fn(usize) -> Box<dyn Search>> Search for Restarted<F> {
    fn point(&self) -> Option<&[f32]> {
        self.search.point()
    }

    fn wants_gradient(&self) -> bool {
        self.search.wants_gradient()
    }

    fn weights(&mut self, logits: &[f32]) -> Result<Vec<f32>> {
        self.search.weights(logits)
    }

    fn advance(&mut self, logits: &[f32], gradient: &[f32]) -> Result<()> {
        self.search.advance(logits, gradient)?;
        let over = self.search.point().is_none() && self.search.found().is_none();
        if over && self.start + 1 < self.starts {
            self.start += 1;
            self.search = (self.begin)(self.start);
        }
        Ok(())
    }

    fn found(&self) -> Option<&[f32]> {
        self.search.found()
    }
}

/// A random point at this share of the radius around the image, then clipped to the box; elements are drawn in CHW order.
pub(super) fn random_point(threat: &Threat, example: &Example, seed: u64, share: f32) -> Vec<f32> {
    let (h, w, c) = example.shape;
    let mut draws = vec![0f32; example.image.len()];
    match threat.norm() {
        Norm::Linf => {
            rng::uniforms(seed, example.id, rng::stream::ATTACK, &mut draws);
            draws.iter_mut().for_each(|u| *u = 2.0 * *u - 1.0);
        }
        Norm::L2 => rng::normals(seed, example.id, rng::stream::ATTACK, &mut draws),
    }
    let radius = share * threat.epsilon() as f32;
    let scale = radius / length(threat.norm(), draws.iter().copied()).max(f32::MIN_POSITIVE);
    let chw = |position: usize, channel: usize| draws[channel * h * w + position];
    let pixels = example.image.iter().enumerate();
    pixels.map(|(i, x)| (x + scale * chw(i / c, i % c)).clamp(0.0, 1.0)).collect()
}

/// Searches in turn towards the classes ranked after the best one in the prediction for the image itself, until one
/// of these searches finds something.
pub(super) struct Targeted<S, F> {
    image: Vec<f32>,
    targets: usize,
    towards: F,
    /// The best class, then the targets; `None` before the prediction for the image is known.
    order: Vec<usize>,
    rank: usize,
    search: Option<S>,
}

impl<S: Search, F: Fn(usize, usize) -> S> Targeted<S, F> {
    /// `targets`: how many classes are tried; `towards(rank, class)`: the search towards the class of that rank, from 1.
    pub(super) fn new(image: Vec<f32>, targets: usize, towards: F) -> Self {
        Self { image, targets, towards, order: Vec::new(), rank: 0, search: None }
    }
}

impl<S: Search, F: Fn(usize, usize) -> S> Search for Targeted<S, F> {
    fn point(&self) -> Option<&[f32]> {
        match &self.search {
            Some(search) => search.point(),
            None => self.order.is_empty().then_some(self.image.as_slice()),
        }
    }

    fn wants_gradient(&self) -> bool {
        self.search.as_ref().is_some_and(S::wants_gradient)
    }

    fn weights(&mut self, logits: &[f32]) -> Result<Vec<f32>> {
        self.search.as_mut().map_or_else(|| Ok(Vec::new()), |search| search.weights(logits))
    }

    fn advance(&mut self, logits: &[f32], gradient: &[f32]) -> Result<()> {
        match &mut self.search {
            Some(search) => search.advance(logits, gradient)?,
            None => self.order = ranking(logits).into_iter().take(1 + self.targets).collect(),
        }
        if self.search.as_ref().is_none_or(|search| search.point().is_none() && search.found().is_none()) {
            self.rank += 1;
            self.search = self.order.get(self.rank).map(|&class| (self.towards)(self.rank, class));
        }
        Ok(())
    }

    fn found(&self) -> Option<&[f32]> {
        self.search.as_ref().and_then(S::found)
    }
}

/// The class that a network predicts: the one with the largest logit, the first of them in a tie. `None` if any
/// logit is not a number.
pub fn choice(logits: &[f32]) -> Option<usize> {
    if logits.iter().any(|z| z.is_nan()) {
        return None;
    }
    (0..logits.len()).reduce(|best, i| if logits[i] > logits[best] { i } else { best })
}

/// The classes in descending order of their logits; ties keep their order.
pub(super) fn ranking(logits: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    order
}

/// The length of a vector in this norm.
pub fn length(norm: Norm, v: impl IntoIterator<Item = f32>) -> f32 {
    match norm {
        // Not `max`, which drops NaN.
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
