//! Square: random search with squares that uses only the logits (Andriushchenko et al. 2020, Alg. 1 to 3).

use super::{Example, Method, Norm, Search, Threat, loss::best_wrong, method, search::length};
use crate::{
    Result,
    rng::{self, Stream},
};

/// Square.
pub const SQUARE: Method =
    Method::new("square", 4, |threat, seed, _, example| Box::new(Walk::new(threat, seed, example)));

/// The initial share of pixels that a square covers.
const P_INIT: f64 = 0.8;

/// The divisor of the share of pixels at query `i`, counted from 0: the schedule for 10,000 queries, which
/// AutoAttack uses whatever their number.
fn divisor(i: usize) -> f64 {
    let halvings = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000].iter().filter(|&&at| i > at).count();
    f64::from(1u32 << halvings)
}

/// A window of an image.
#[derive(Clone, Copy)]
struct Window {
    top: usize,
    left: usize,
    side: usize,
}

impl Window {
    fn contains(&self, y: usize, x: usize) -> bool {
        (self.top..self.top + self.side).contains(&y) && (self.left..self.left + self.side).contains(&x)
    }
}

/// Square on one image.
struct Walk {
    threat: Threat,
    example: Example,
    draws: Stream,
    best: Vec<f32>,
    /// `z_label - z_best wrong` there, which should fall below 0.
    margin: f32,
    candidate: Vec<f32>,
    /// Queries so far, without the one for the start.
    queries: usize,
    done: bool,
}

impl Walk {
    fn new(threat: Threat, seed: u64, example: Example) -> Self {
        let mut walk = Self {
            threat,
            draws: Stream::new(seed, example.id, rng::stream::ATTACK),
            example,
            best: Vec::new(),
            margin: f32::INFINITY,
            candidate: Vec::new(),
            queries: 0,
            done: false,
        };
        walk.candidate = match threat.norm() {
            Norm::Linf => walk.stripes(),
            Norm::L2 => walk.tiles(),
        };
        walk
    }

    /// An answer that is not a number counts as wrong.
    fn is_fooled(&self) -> bool {
        self.margin.is_nan() || self.margin <= 0.0
    }

    fn epsilon(&self) -> f32 {
        self.threat.epsilon() as f32
    }

    fn sign(&mut self) -> f32 {
        if self.draws.uniform() < 0.5 { -1.0 } else { 1.0 }
    }

    /// ±ε for each column and channel.
    fn stripes(&mut self) -> Vec<f32> {
        let (_, w, c) = self.example.shape;
        let signs: Vec<f32> = (0..w * c).map(|_| self.sign()).collect();
        let epsilon = self.epsilon();
        let pixels = self.example.image.iter().enumerate();
        pixels.map(|(i, x)| (x + epsilon * signs[i % (w * c)]).clamp(0.0, 1.0)).collect()
    }

    /// Five by five bumps of random signs, scaled to length ε.
    fn tiles(&mut self) -> Vec<f32> {
        let (h, w, c) = self.example.shape;
        let side = (h / 5).max(1);
        let first = (h - (5 * side).min(h)) / 2;
        let mut delta = vec![0f32; self.example.image.len()];
        for top in (first..).step_by(side).take(h / side).filter(|top| top + side <= h) {
            for left in (first..).step_by(side).take(w / side).filter(|left| left + side <= w) {
                let bump = self.bump(side);
                for channel in 0..c {
                    let sign = self.sign();
                    for (i, v) in bump.iter().enumerate() {
                        delta[((top + i / side) * w + left + i % side) * c + channel] += sign * v;
                    }
                }
            }
        }
        self.scaled(&delta)
    }

    /// The image with `delta` scaled to length ε.
    fn scaled(&self, delta: &[f32]) -> Vec<f32> {
        let scale = self.epsilon() / (length(Norm::L2, delta.iter().copied()) + 1e-12);
        self.example.image.iter().zip(delta).map(|(x, d)| (x + scale * d).clamp(0.0, 1.0)).collect()
    }

    /// The pattern η of a square, row-major, of length 1: a positive half and a negative one, each highest in its
    /// middle; horizontal or vertical.
    fn bump(&mut self, side: usize) -> Vec<f32> {
        let half = side / 2;
        let mut bump = mound(half, side);
        bump.extend(mound(side - half, side).iter().map(|v| -v));
        let norm = length(Norm::L2, bump.iter().copied()).max(f32::MIN_POSITIVE);
        bump.iter_mut().for_each(|v| *v /= norm);
        if self.draws.uniform() > 0.5 {
            bump = (0..side * side).map(|i| bump[(i % side) * side + i / side]).collect();
        }
        bump
    }

    fn window(&mut self, side: usize) -> Window {
        let (h, w, _) = self.example.shape;
        let mut at = |free: usize| if free == 0 { 0 } else { self.draws.below(free) };
        Window { top: at(h - side), left: at(w - side), side }
    }

    /// What to try next.
    fn propose(&mut self) {
        let (h, w, _) = self.example.shape;
        let side = (P_INIT / divisor(self.queries) * (h * w) as f64).sqrt().round() as usize;
        self.candidate = match self.threat.norm() {
            Norm::Linf => self.recolour(side.max(1).min(h.min(w))),
            Norm::L2 => {
                let odd = side.max(3) | 1;
                self.move_mass(odd.min(h.min(w)))
            }
        };
        self.queries += 1;
    }

    /// ±2ε, so after projection ±ε, for each channel of a window (Alg. 2).
    fn recolour(&mut self, side: usize) -> Vec<f32> {
        let (_, w, c) = self.example.shape;
        let window = self.window(side);
        let step = 2.0 * self.epsilon();
        let signs: Vec<f32> = (0..c).map(|_| self.sign()).collect();
        let mut next = self.best.clone();
        for y in window.top..window.top + side {
            for x in window.left..window.left + side {
                let at = (y * w + x) * c;
                next[at..at + c].iter_mut().zip(&signs).for_each(|(v, sign)| *v += step * sign);
            }
        }
        self.threat.project_image(&self.example.image, &mut next);
        next
    }

    /// Removes the perturbation of one window and gives its length to another (Alg. 3).
    fn move_mass(&mut self, side: usize) -> Vec<f32> {
        let (h, w, c) = self.example.shape;
        let (target, emptied) = (self.window(side), self.window(side));
        let bump = self.bump(side);
        let signs: Vec<f32> = (0..c).map(|_| self.sign()).collect();
        let mut delta: Vec<f32> = self.best.iter().zip(&self.example.image).map(|(a, b)| a - b).collect();
        let whole = length(Norm::L2, delta.iter().copied());
        let unused = (self.epsilon().powi(2) - whole.powi(2)).max(0.0) / c as f32;
        for (channel, &sign) in signs.iter().enumerate() {
            let at = |y: usize, x: usize| (y * w + x) * c + channel;
            let inside = |holds: &dyn Fn(usize, usize) -> bool| {
                let positions = (0..h).flat_map(|y| (0..w).map(move |x| (y, x)));
                length(Norm::L2, positions.filter(|&(y, x)| holds(y, x)).map(|(y, x)| delta[at(y, x)]))
            };
            let in_target = inside(&|y, x| target.contains(y, x)) + 1e-12;
            let in_both = inside(&|y, x| target.contains(y, x) || emptied.contains(y, x));
            let mut mixed: Vec<f32> = (0..side * side)
                .map(|i| {
                    let old = delta[at(target.top + i / side, target.left + i % side)];
                    sign * bump[i] + old / in_target
                })
                .collect();
            let scale = (unused + in_both.powi(2)).sqrt() / (1e-12 + length(Norm::L2, mixed.iter().copied()));
            mixed.iter_mut().for_each(|v| *v *= scale);
            for y in emptied.top..emptied.top + side {
                (emptied.left..emptied.left + side).for_each(|x| delta[at(y, x)] = 0.0);
            }
            for (i, v) in mixed.into_iter().enumerate() {
                delta[at(target.top + i / side, target.left + i % side)] = v;
            }
        }
        self.scaled(&delta)
    }
}

/// Rings of `1 / k²` around the middle of `rows` × `columns`, summed from the inside, of length 1.
fn mound(rows: usize, columns: usize) -> Vec<f32> {
    let mut mound = vec![0f32; rows * columns];
    let (middle_y, middle_x) = (rows / 2, columns / 2);
    for ring in 0..=middle_y.max(middle_x) {
        let value = 1.0 / ((ring + 1) * (ring + 1)) as f32;
        for y in middle_y.saturating_sub(ring)..(middle_y + ring + 1).min(rows) {
            for x in middle_x.saturating_sub(ring)..(middle_x + ring + 1).min(columns) {
                mound[y * columns + x] += value;
            }
        }
    }
    let norm = length(Norm::L2, mound.iter().copied()).max(f32::MIN_POSITIVE);
    mound.iter_mut().for_each(|v| *v /= norm);
    mound
}

impl Search for Walk {
    fn point(&self) -> Option<&[f32]> {
        (!self.done).then_some(self.candidate.as_slice())
    }

    fn advance(&mut self, logits: &[f32], _: &[f32]) -> Result<()> {
        let label = self.example.label;
        let margin = logits[label] - logits[best_wrong(logits, label)];
        if margin.is_nan() || margin < self.margin || self.best.is_empty() {
            self.margin = margin;
            self.best = std::mem::take(&mut self.candidate);
        }
        self.done = self.is_fooled() || self.queries >= method::QUERIES;
        if !self.done {
            self.propose();
        }
        Ok(())
    }

    fn found(&self) -> Option<&[f32]> {
        self.is_fooled().then_some(&self.best)
    }
}
