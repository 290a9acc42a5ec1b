//! The named attacks on a linear model, where the distance to each decision boundary has a closed form.

use candle_core::{Device, Tensor};

use super::*;
use crate::{Result, kernels, rng};

const CLASSES: usize = 5;
const SHAPE: (usize, usize, usize) = (7, 7, 2);
const SIZE: usize = 7 * 7 * 2;

fn weights() -> Vec<f32> {
    let mut weights = vec![0f32; CLASSES * SIZE];
    rng::normals(11, 0, 0, &mut weights);
    weights
}

fn linear(x: &Tensor) -> Result<Tensor> {
    let w = Tensor::from_vec(weights(), (CLASSES, SIZE), x.device())?;
    kernels::linear(&x.flatten_from(1)?, &w, None)
}

fn victim() -> Victim<'static> {
    Victim { logits_of: &linear, shape: SHAPE, device: &Device::Cpu }
}

/// Images in the middle of the box, so that only the ball constrains them.
fn images(n: usize) -> Vec<Vec<f32>> {
    let image = |i: usize| {
        let mut x = vec![0f32; SIZE];
        rng::uniforms(12, i as u64, 0, &mut x);
        x.iter().map(|u| 0.45 + 0.1 * u).collect()
    };
    (0..n).map(image).collect()
}

/// The prediction for an image, and the distance to the nearest other class: `(z_y - z_t) / |w_y - w_t|` in the
/// dual norm.
fn answer_and_radius(x: &[f32], norm: Norm) -> (usize, f64) {
    let w = weights();
    let row = |class: usize| &w[class * SIZE..][..SIZE];
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let z: Vec<f64> = (0..CLASSES).map(|class| dot(row(class), x)).collect();
    let label = (0..CLASSES).max_by(|&a, &b| z[a].total_cmp(&z[b])).unwrap();
    let radius = |class: usize| {
        let slopes = row(label).iter().zip(row(class)).map(|(a, b)| f64::from(a - b));
        let dual: f64 = match norm {
            Norm::Linf => slopes.map(f64::abs).sum(),
            Norm::L2 => slopes.map(|d| d * d).sum::<f64>().sqrt(),
        };
        (z[label] - z[class]) / dual
    };
    (label, (0..CLASSES).filter(|&c| c != label).map(radius).fold(f64::INFINITY, f64::min))
}

/// What an attack finds for the examples, with a window of this size.
pub(super) fn find(
    victim: &Victim,
    size: usize,
    attack: &dyn Attack,
    examples: &[Example],
) -> Vec<Option<Vec<f32>>> {
    let searches = examples.iter().enumerate().map(|(i, example)| Ok((i, attack.search(example.clone())?)));
    let mut all = vec![None; examples.len()];
    let over = |i: usize, found: Option<&[f32]>| {
        all[i] = Some(found.map(<[f32]>::to_vec));
        Ok(())
    };
    search::run(victim, size, searches, over).unwrap();
    all.into_iter().map(|found| found.expect("each search comes to an end")).collect()
}

/// Images whose ids are their positions.
fn examples(images: &[Vec<f32>], labels: &[usize]) -> Vec<Example> {
    let example = |(i, (image, &label)): (usize, (&Vec<f32>, &usize))| Example {
        image: image.clone(),
        shape: SHAPE,
        label,
        id: i as u64,
    };
    images.iter().zip(labels).enumerate().map(example).collect()
}

struct Case {
    images: Vec<Vec<f32>>,
    labels: Vec<usize>,
    radii: Vec<f64>,
    epsilon: f64,
    threat: Threat,
}

/// A radius that about half of the images withstand.
fn case(norm: Norm) -> Case {
    let images = images(40);
    let (labels, radii): (Vec<_>, Vec<_>) = images.iter().map(|x| answer_and_radius(x, norm)).unzip();
    let mut sorted = radii.clone();
    sorted.sort_by(f64::total_cmp);
    let epsilon = sorted[20];
    let threat = Threat::new(norm, Epsilon::try_from(epsilon).unwrap()).unwrap();
    Case { images, labels, radii, epsilon, threat }
}

impl Case {
    fn run(&self, attack: Method, of: &[usize], size: usize) -> Vec<Option<Vec<f32>>> {
        let all = examples(&self.images, &self.labels);
        let of: Vec<Example> = of.iter().map(|&i| all[i].clone()).collect();
        find(&victim(), size, &*attack.attack(self.threat, 3), &of)
    }
}

#[test]
fn no_two_methods_have_a_name_or_draws_in_common() {
    for (i, a) in METHODS.iter().enumerate() {
        assert!(METHODS[..i].iter().all(|b| a.name() != b.name() && a.key != b.key), "{a:?}");
    }
}

#[test]
fn what_is_found_is_adversarial_and_in_ball_and_box_and_what_cannot_be_found_is_not() {
    for norm in [Norm::Linf, Norm::L2] {
        let case = case(norm);
        for attack in METHODS {
            let found = case.run(attack, &(0..40).collect::<Vec<_>>(), 64);
            for (i, found) in found.iter().enumerate() {
                let Some(x) = found else { continue };
                assert!(case.radii[i] < 1.001 * case.epsilon, "{attack:?} {norm} {i}: {}", case.radii[i]);
                assert!(x.iter().all(|v| (0.0..=1.0).contains(v)));
                let moved = f64::from(search::distance(norm, x, &case.images[i]));
                assert!(moved <= case.epsilon * 1.00001, "{attack:?} {norm} {i}: {moved}");
                let logits = victim().logits(&[x]).unwrap();
                assert_ne!(search::choice(&logits[0]), Some(case.labels[i]), "{attack:?} {norm} {i}");
            }
        }
    }
}

/// On a linear model, gradient attacks find everything that can be found, up to the last per cent of the radius;
/// random search finds most of what is not near the boundary.
#[test]
fn what_can_be_found_is_found() {
    for norm in [Norm::Linf, Norm::L2] {
        let case = case(norm);
        for attack in METHODS {
            let reach = if attack.name() == SQUARE.name() { 0.7 } else { 0.99 };
            let within: Vec<usize> = (0..40).filter(|&i| case.radii[i] < reach * case.epsilon).collect();
            let found = case.run(attack, &within, 16).iter().flatten().count();
            let all = within.len();
            let least = if attack.name() == SQUARE.name() { all * 9 / 10 } else { all };
            assert!(within.len() > 5 && found >= least, "{attack:?} {norm}: {found} of {}", within.len());
        }
    }
}

#[test]
fn an_image_is_attacked_alike_whatever_is_beside_it() {
    for norm in [Norm::Linf, Norm::L2] {
        let case = case(norm);
        let weak: Vec<usize> = (0..40).filter(|&i| case.radii[i] < 0.4 * case.epsilon).collect();
        for attack in METHODS {
            let together = case.run(attack, &[3, weak[0], 21, weak[1]], 64);
            let alone = case.run(attack, &[weak[1]], 64);
            assert!(alone[0].is_some(), "{attack:?} {norm}");
            assert_eq!(alone[0], together[3], "{attack:?} {norm}");
            for size in [1, 3] {
                assert_eq!(case.run(attack, &[3, weak[0], 21, weak[1]], size), together, "{attack:?} {norm}");
            }
        }
    }
}

/// Where pixels are black or white the box matters: half of the ball is outside it.
#[test]
fn adversarial_images_of_black_and_white_ones_stay_in_the_box() {
    let image = |i: usize| (0..SIZE).map(|j| ((i * 31 + j * 17) % 5 < 2) as u8 as f32).collect::<Vec<f32>>();
    let x: Vec<Vec<f32>> = (0..8).map(image).collect();
    let points: Vec<&[f32]> = x.iter().map(Vec::as_slice).collect();
    let labels: Vec<usize> =
        victim().logits(&points).unwrap().iter().map(|z| search::choice(z).unwrap()).collect();
    for (norm, epsilon) in [(Norm::Linf, 0.5), (Norm::L2, 4.0)] {
        let threat = Threat::new(norm, Epsilon::try_from(epsilon).unwrap()).unwrap();
        for attack in METHODS {
            let found = find(&victim(), 8, &*attack.attack(threat, 0), &examples(&x, &labels));
            assert!(found.iter().any(Option::is_some), "{attack:?} {norm}");
            for (found, x) in found.iter().zip(&x) {
                let Some(found) = found else { continue };
                assert!(found.iter().all(|v| (0.0..=1.0).contains(v)), "{attack:?} {norm}");
                assert!(
                    f64::from(search::distance(norm, found, x)) <= epsilon * 1.00001,
                    "{attack:?} {norm}"
                );
            }
        }
    }
}

#[test]
fn with_two_and_three_classes_the_attacks_have_losses_that_are_defined() {
    for classes in [2, 3] {
        let few = |x: &Tensor| Ok(linear(x)?.narrow(1, 0, classes)?);
        let victim = Victim { logits_of: &few, ..victim() };
        let x = images(6);
        let points: Vec<&[f32]> = x.iter().map(Vec::as_slice).collect();
        let labels: Vec<usize> =
            victim.logits(&points).unwrap().iter().map(|z| search::choice(z).unwrap()).collect();
        let threat = Threat::new(Norm::Linf, Epsilon::try_from(0.4).unwrap()).unwrap();
        for attack in METHODS {
            let found = find(&victim, 8, &*attack.attack(threat, 0), &examples(&x, &labels));
            assert!(found.iter().all(Option::is_some), "{attack:?} with {classes} classes");
        }
    }
}

#[test]
fn a_model_that_sees_nothing_is_not_fooled() {
    let constant = |x: &Tensor| {
        Ok((linear(x)? * 1e-30)?.broadcast_add(&Tensor::new(&[0f32, 1.0, 2.0, 3.0, 9.0], x.device())?)?)
    };
    let victim = Victim { logits_of: &constant, ..victim() };
    let x = images(3);
    let threat = Threat::new(Norm::L2, Epsilon::try_from(2.0).unwrap()).unwrap();
    for attack in METHODS {
        let found = find(&victim, 8, &*attack.attack(threat, 0), &examples(&x, &[4; 3]));
        assert!(found.iter().all(Option::is_none), "{attack:?}");
    }
}

#[test]
fn logits_that_do_not_depend_on_the_images_raise_the_alarm() {
    let cut = |x: &Tensor| linear(&x.detach());
    let victim = Victim { logits_of: &cut, ..victim() };
    let x = images(1);
    let threat = Threat::new(Norm::Linf, Epsilon::try_from(0.1).unwrap()).unwrap();
    let attack = APGD_CE.attack(threat, 0);
    let one = examples(&x, &[0]).into_iter().map(|example| Ok((0, attack.search(example)?)));
    let error = search::run(&victim, 1, one, |_, _| Ok(())).unwrap_err();
    assert_eq!(error.exit_code(), 70);
}
