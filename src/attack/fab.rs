//! FAB, the fast adaptive boundary attack, targeted: the nearest image across the boundary to another class (Croce
//! & Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack", Alg. 1).

use super::{
    Example, Loss, Method, Norm, Search, Threat, method,
    search::{Targeted, distance, length},
};
use crate::Result;

/// FAB, in turn towards each of the classes ranked after the best one in the prediction for the image. It starts at the
/// image itself: nothing is drawn.
pub const FAB_T: Method = Method::new("fab-t", 3, |threat, _, example| {
    Box::new(Targeted::new(example.image.clone(), method::TARGETS, move |_, target| Approach {
        threat,
        point: example.image.clone(),
        example: example.clone(),
        target,
        checked: false,
        steps: 0,
        margin: 0.0,
        found: None,
    }))
});

/// The largest pull towards the original image, α_max.
const ALPHA_MAX: f32 = 0.1;
/// How far beyond the boundary a step goes, η.
const ETA: f32 = 1.05;
/// The share of the perturbation that is kept when an adversarial image has been found, β.
const BETA: f32 = 0.9;

/// FAB on one image, towards one class.
struct Approach {
    /// The ball: an adversarial image counts if it lies within.
    threat: Threat,
    example: Example,
    target: usize,
    point: Vec<f32>,
    /// Whether `point` is the end of a step and so may be adversarial.
    checked: bool,
    steps: usize,
    /// `z_target - z_label` at the point.
    margin: f32,
    found: Option<Vec<f32>>,
}

impl Approach {
    /// A step to the boundary, linearised at the point: a mixture of the projections of the point and the image.
    fn step(&mut self, gradient: &[f32]) {
        let norm = self.threat.norm();
        let dot =
            |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let offset = f64::from(self.margin) - dot(gradient, &self.point);
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
        let (margin, gradient) = Loss::TargetedMargin(self.target).of(logits, self.example.label);
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
        if self.steps < method::STEPS {
            self.step(gradient);
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
