//! FAB, the fast adaptive boundary attack: the nearest image across the boundary to another class (Croce & Hein 2020,
//! "Minimally distorted adversarial examples with a fast adaptive boundary attack", Alg. 1).

use super::{
    Example, Loss, Method, Norm, Search, Threat, method,
    search::{Targeted, distance, length, random_point},
};
use crate::Result;

/// FAB, at each step towards the class whose boundary is nearest. It takes the gradient towards every class.
pub const FAB: Method = Method::new("fab", 5, |threat, seed, start, example| {
    let point = from(&threat, seed, start, &example);
    Box::new(Approach::new(threat, example, point, Vec::new()))
})
.with_starts(method::STARTS);

/// FAB, in turn towards each of the classes ranked after the best one in the prediction for the image.
pub const FAB_T: Method = Method::new("fab-t", 3, |threat, seed, start, example| {
    let point = from(&threat, seed, start, &example);
    Box::new(Targeted::new(example.image.clone(), method::TARGETS, move |_, target| {
        Approach::new(threat, example.clone(), point.clone(), vec![target])
    }))
});

/// Where FAB starts: first at the image itself, where nothing is drawn, then at random half way to the surface of the
/// ball, as in the authors' code.
fn from(threat: &Threat, seed: u64, start: usize, example: &Example) -> Vec<f32> {
    if start == 0 { example.image.clone() } else { random_point(threat, example, seed, 0.5) }
}

/// The largest pull towards the original image, α_max.
const ALPHA_MAX: f32 = 0.1;
/// How far beyond the boundary a step goes, η.
const ETA: f32 = 1.05;
/// The share of the perturbation that is kept when an adversarial image has been found, β.
const BETA: f32 = 0.9;

/// FAB on one image.
struct Approach {
    /// The ball: an adversarial image counts if it lies within.
    threat: Threat,
    example: Example,
    /// The classes whose boundaries may be approached; empty for all wrong ones, before their number is known.
    targets: Vec<usize>,
    point: Vec<f32>,
    /// Whether `point` is the end of a step and so may be adversarial.
    checked: bool,
    steps: usize,
    /// The margin of the target that was asked for last, `z_target - z_label` at the point.
    margin: f32,
    /// How many targets have been asked for at the point.
    asked: usize,
    /// The nearest of their boundaries.
    nearest: Option<Boundary>,
    found: Option<Vec<f32>>,
}

/// A boundary, linearised at the point.
struct Boundary {
    /// Its distance from the point, without regard to the box.
    distance: f32,
    margin: f32,
    /// The gradient of the margin.
    gradient: Vec<f32>,
}

impl Approach {
    fn new(threat: Threat, example: Example, point: Vec<f32>, targets: Vec<usize>) -> Self {
        Self {
            threat,
            example,
            targets,
            point,
            checked: false,
            steps: 0,
            margin: 0.0,
            asked: 0,
            nearest: None,
            found: None,
        }
    }

    /// Takes the gradient of the margin of the target that was asked for; the boundary to step to, if it was the last.
    fn consider(&mut self, gradient: &[f32]) -> Option<Boundary> {
        let slope: f32 = match self.threat.norm() {
            Norm::Linf => gradient.iter().map(|g| g.abs()).sum(),
            Norm::L2 => length(Norm::L2, gradient.iter().copied()),
        };
        let (margin, distance) = (self.margin, self.margin.abs() / (slope + 1e-12));
        if self.nearest.as_ref().is_none_or(|nearest| distance < nearest.distance) {
            self.nearest = Some(Boundary { distance, margin, gradient: gradient.to_vec() });
        }
        self.asked = (self.asked + 1) % self.targets.len();
        if self.asked == 0 { self.nearest.take() } else { None }
    }

    /// A step to the boundary: a mixture of the projections of the point and the image.
    fn step(&mut self, Boundary { margin, gradient, .. }: &Boundary) {
        let norm = self.threat.norm();
        let dot =
            |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let offset = f64::from(*margin) - dot(gradient, &self.point);
        let to_border = |from: &[f32]| project_to_plane(norm, from, gradient, offset + dot(gradient, from));
        let (d1, d2) = (to_border(&self.point), to_border(&self.example.image));
        let size = |d: &[f32]| length(norm, d.iter().copied()).max(1e-8);
        let alpha = (size(&d1) / (size(&d1) + size(&d2))).min(ALPHA_MAX);
        for (((point, x), d1), d2) in self.point.iter_mut().zip(&self.example.image).zip(&d1).zip(&d2) {
            *point = ((*point + ETA * d1) * (1.0 - alpha) + (x + ETA * d2) * alpha).clamp(0.0, 1.0);
        }
        self.checked = true;
        self.steps += 1;
    }
}

impl Search for Approach {
    fn point(&self) -> Option<&[f32]> {
        let over = self.found.is_some() || (self.steps >= method::STEPS && !self.checked);
        (!over).then_some(self.point.as_slice())
    }

    fn wants_gradient(&self) -> bool {
        self.steps < method::STEPS
    }

    fn weights(&mut self, logits: &[f32]) -> Result<Vec<f32>> {
        if self.targets.is_empty() {
            self.targets = (0..logits.len()).filter(|&class| class != self.example.label).collect();
        }
        let target = self.targets[self.asked];
        let (margin, gradient) = Loss::TargetedMargin(target).of(logits, self.example.label);
        self.margin = margin;
        Ok(gradient)
    }

    fn advance(&mut self, logits: &[f32], gradient: &[f32]) -> Result<()> {
        if self.checked {
            self.checked = false;
            if !self.example.is_right(logits) {
                let x = &self.example.image;
                if distance(self.threat.norm(), &self.point, x) <= self.threat.epsilon() as f32 {
                    self.found = Some(self.point.clone());
                    return Ok(());
                }
                // Back towards the image, where the gradient differs, so the network is queried again.
                self.point.iter_mut().zip(x).for_each(|(p, x)| *p = x + BETA * (*p - x));
                return Ok(());
            }
        }
        if self.steps < method::STEPS
            && let Some(boundary) = self.consider(gradient)
        {
            self.step(&boundary);
        }
        Ok(())
    }

    fn found(&self) -> Option<&[f32]> {
        self.found.as_deref()
    }
}

/// The shortest move in this norm from `t`, a point in the box, to the plane `w · x = b`, or as near to it as the
/// box allows. `distance` is `w · t - b`.
///
/// Both norms pose the same problem: pixel `i` can move only as far as the box allows, its room; the plane is
/// reached when `Σ weight_i · min(level, room_i) = |distance|`, and the lowest such level is the answer.
fn project_to_plane(norm: Norm, t: &[f32], w: &[f32], distance: f64) -> Vec<f32> {
    // Down the gradient if above the plane, up if below.
    let side = if distance >= 0.0 { -1.0 } else { 1.0 };
    // The pixel's slope, its move at level 1, and the level at which its room is used up.
    let pixel = |(&t, &w): (&f32, &f32)| {
        let slope = f64::from(w.abs());
        let unit = if norm == Norm::Linf { 1.0 } else { slope };
        let room = if (w > 0.0) == (side > 0.0) { 1.0 - t } else { t };
        (slope, unit, f64::from(room) / unit)
    };
    let pixels = t.iter().zip(w).map(pixel).filter(|(slope, ..)| *slope > 0.0);
    let mut pixels: Vec<(f64, f64)> = pixels.map(|(slope, unit, room)| (room, slope * unit)).collect();
    let level = fill(&mut pixels, distance.abs());
    let reach = |(t, w): (&f32, &f32)| {
        let (slope, unit, room) = pixel((t, w));
        let size = if slope == 0.0 { 0.0 } else { room.min(level) * unit };
        (side * size) as f32 * w.signum()
    };
    t.iter().zip(w).map(reach).collect()
}

/// The lowest level at which `Σ weight · min(level, room)` over `(room, weight)` is `amount`; infinite if there is
/// none.
fn fill(pixels: &mut [(f64, f64)], amount: f64) -> f64 {
    pixels.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    let mut weight: f64 = pixels.iter().map(|(_, weight)| weight).sum();
    let mut full = 0.0;
    for (room, w) in pixels {
        if full + weight * *room >= amount {
            return (amount - full) / weight;
        }
        full += *w * *room;
        weight -= *w;
    }
    f64::INFINITY
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A linear network of three classes whose nearest boundary is not that of the best wrong class: one step of FAB
    /// goes there, and beyond it by 5 %.
    #[test]
    fn the_step_goes_to_the_nearest_boundary_not_to_the_best_wrong_class() {
        let weights = [[0.0f32, 0.0], [1.0, 0.0], [0.0, 10.0]];
        let (image, bias) = (vec![0.5f32, 0.5], [1.0f32, 0.3, -4.5]);
        let logits = |x: &[f32]| -> Vec<f32> {
            weights.iter().zip(bias).map(|(w, b)| w[0] * x[0] + w[1] * x[1] + b).collect()
        };
        // Margins -0.2 at slope 1 and -0.5 at slope 10: 0.2 and 0.05 away.
        let threat = Threat::new(Norm::L2, crate::attack::Epsilon::try_from(0.06).unwrap()).unwrap();
        let example = Example { image: image.clone(), shape: (1, 2, 1), label: 0, id: 0 };
        let mut search = Approach::new(threat, example, image.clone(), Vec::new());
        let mut queries = 0;
        while let Some(point) = search.point().map(<[f32]>::to_vec) {
            let z = logits(&point);
            let weighted = search.weights(&z).unwrap();
            let gradient =
                [0, 1].map(|i| (0..3).map(|class| weighted[class] * weights[class][i]).sum::<f32>());
            search.advance(&z, &gradient).unwrap();
            queries += 1;
        }
        let found = search.found().unwrap();
        assert!((found[0] - 0.5).abs() < 1e-6 && (found[1] - 0.5525).abs() < 1e-5, "{found:?}");
        assert_eq!(queries, 3, "two gradients and a look");
    }

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }

    #[test]
    fn without_the_box_in_the_way_the_projection_is_the_closed_form() {
        let (t, w) = ([0.5f32, 0.4, 0.6], [1.0f32, -2.0, 0.5]);
        let b = 0.35;
        let distance = dot(&w, &t) - b;
        let l2 = project_to_plane(Norm::L2, &t, &w, distance);
        let linf = project_to_plane(Norm::Linf, &t, &w, distance);
        for i in 0..3 {
            let square = dot(&w, &w);
            assert!((f64::from(l2[i]) + distance * f64::from(w[i]) / square).abs() < 1e-6);
            assert!((f64::from(linf[i]) + distance * f64::from(w[i].signum()) / 3.5).abs() < 1e-6);
        }
    }

    proptest! {
        /// In the box; on the plane if the box reaches it; and no other such move that was tried is shorter.
        #[test]
        fn projections_stay_in_the_box_reach_the_plane_and_are_the_shortest(
            pixels in prop::collection::vec((0f32..=1.0, -1f32..1.0, 0f32..=1.0), 2..9),
            b in -2.0f64..2.0,
            linf: bool,
        ) {
            let norm = if linf { Norm::Linf } else { Norm::L2 };
            let t: Vec<f32> = pixels.iter().map(|p| p.0).collect();
            let w: Vec<f32> = pixels.iter().map(|p| p.1).collect();
            let distance = dot(&w, &t) - b;
            let d = project_to_plane(norm, &t, &w, distance);
            let x: Vec<f32> = t.iter().zip(&d).map(|(t, d)| t + d).collect();
            prop_assert!(x.iter().all(|x| (-1e-6..=1.0 + 1e-6).contains(x)), "{x:?}");
            let reachable = |side: f64| -> f64 {
                w.iter().map(|&w| (f64::from(w) * side).max(0.0) * side).sum()
            };
            let (low, high) = (reachable(-1.0), reachable(1.0));
            let nearest = b.clamp(low, high);
            prop_assert!((dot(&w, &x) - nearest).abs() < 1e-4, "{} of {nearest}", dot(&w, &x));
            // Another point in the box, moved along a line to the plane, does not reach it any nearer.
            let other: Vec<f32> = pixels.iter().map(|p| p.2).collect();
            let at = |v: &[f32]| dot(&w, v) - nearest;
            if (at(&other) > 0.0) != (at(&t) > 0.0) && (at(&other) - at(&t)).abs() > 1e-3 {
                let s = (at(&t) / (at(&t) - at(&other))) as f32;
                let meets: Vec<f32> = t.iter().zip(&other).map(|(t, o)| t + s * (o - t)).collect();
                let size = length(norm, d.iter().copied());
                prop_assert!(size <= super::distance(norm, &meets, &t) + 1e-4);
            }
        }
    }
}
