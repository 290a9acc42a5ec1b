//! Checks before and after attacks that show whether their figures can be trusted.

use std::collections::BTreeMap;

use super::{Evaluation, unchanged};
use crate::{
    Result,
    attack::{
        Loss, Norm, Threat,
        search::{choice, distance, length},
    },
};

/// The share of images from which on a saturated loss is worth a word.
const MANY: f64 = 0.1;
/// The spread of logits below which the probabilities of all classes are within 1 % of each other.
const CLOSE: f32 = 0.01;

/// The number of images that are evaluated twice.
const TWICE: usize = 64;

/// The doubts about logits as such: those that are not finite.
pub fn unusable(logits: &[Vec<f32>]) -> Vec<String> {
    let count = |is: fn(&[f32]) -> bool| logits.iter().filter(|row| is(row)).count();
    let nan = count(|row| row.iter().any(|z| z.is_nan()));
    let infinite = count(|row| row.iter().any(|z| z.is_infinite()) && !row.iter().any(|z| z.is_nan()));
    let mut doubts = Vec::new();
    if nan > 0 {
        doubts.push(format!("{nan} images are answered with what is no number, which counts as wrong"));
    }
    if infinite > 0 {
        doubts.push(format!(
            "{infinite} images are answered with infinite logits, of which no loss has a gradient: the network overflows"
        ));
    }
    doubts
}

/// The doubts about an attack that climbs nothing but the cross-entropy, if on more than a tenth of the images that
/// withstood it this is saturated (as sure as the network is of them, it is 0 up to rounding), or the logits are so
/// close that it weighs all wrong classes alike.
///
/// `rows`: the images that withstood it, as indices of `logits` and `labels`. `rounding`: the largest probability of
/// all wrong classes together that the attack does not tell from 0.
pub fn saturation(logits: &[Vec<f32>], labels: &[u32], rows: &[usize], rounding: f32) -> Vec<String> {
    let wrong =
        |row: usize| -Loss::CrossEntropy.of(&logits[row], labels[row] as usize).1[labels[row] as usize];
    let spread = |row: usize| {
        let largest = logits[row].iter().copied().fold(f32::NEG_INFINITY, f32::max);
        largest - logits[row].iter().copied().fold(f32::INFINITY, f32::min)
    };
    let doubt = |is: &dyn Fn(usize) -> bool, what: &str| {
        let (n, all) = (rows.iter().filter(|&&row| is(row)).count(), rows.len());
        (n as f64 > MANY * all as f64).then(|| {
            format!(
                "on {n} of the {all} images that withstood the attack {what}, and the robust accuracy is too high if they \
                 can be fooled; climb the margin (PGD's loss cw, apgd-dlr) or take autoattack"
            )
        })
    };
    let sure = "the network is so sure that the cross-entropy has no gradient, up to rounding";
    let close = "the logits are so close that the cross-entropy weighs all wrong classes alike";
    let doubts = [doubt(&|row| wrong(row) <= rounding, sure), doubt(&|row| spread(row) < CLOSE, close)];
    doubts.into_iter().flatten().collect()
}

impl Evaluation<'_> {
    /// The findings of the attack `name` that count, by image: adversarial images that the network still
    /// misclassifies when it is queried again.
    ///
    /// Fails with [`crate::Error::Alarm`] if one is not in the ball and the box, or contains NaN.
    pub fn proven(
        &self,
        name: &str,
        threat: &Threat,
        mut found: BTreeMap<usize, Vec<f32>>,
    ) -> Result<BTreeMap<usize, Vec<f32>>> {
        let epsilon = threat.epsilon();
        // Allows for rounding of pixels, and of sums of their squares.
        let limit = epsilon * (1.0 + 1e-5) + 1e-6;
        for (&row, point) in &found {
            let moved = f64::from(distance(threat.norm(), point, &self.pixels(row)));
            let in_box = point.iter().all(|v| (0.0..=1.0).contains(v));
            if !in_box || moved.is_nan() || moved > limit {
                bail!(
                    Alarm,
                    "{name} moved image {row} by {moved}, expected at most {epsilon} and pixels from 0 to 1"
                );
            }
        }
        let rows: Vec<usize> = found.keys().copied().collect();
        let again = Self { kept: None, bar: None, ..*self };
        let answers =
            again.logits_of("again", &rows, &|example| Ok(found[&(example.id as usize)].clone()))?;
        for (row, logits) in rows.iter().zip(answers) {
            if choice(&logits) == Some(self.data.labels[*row] as usize) {
                found.remove(row);
            }
        }
        Ok(found)
    }

    /// The doubts that AutoAttack's authors check for before it runs (their `checks.py`): a network whose answers
    /// vary, probabilities instead of logits, images without a gradient.
    pub fn doubts(&self, logits: &[Vec<f32>], correct: &[usize]) -> Result<Vec<String>> {
        let mut doubts = Vec::new();
        let first: Vec<usize> = (0..self.data.len().min(TWICE)).collect();
        let unseen = Self { kept: None, bar: None, ..*self };
        let again = unseen.logits_of("again", &first, &unchanged)?;
        // Compares directions, as AutoAttack does: the last bits may differ on a GPU.
        let direction = |row: &[f32]| -> Vec<f32> {
            let size = length(Norm::L2, row.iter().copied()) + 1e-10;
            row.iter().map(|z| z / size).collect()
        };
        let differ = |(a, b): (&Vec<f32>, &Vec<f32>)| {
            choice(a) != choice(b) || distance(Norm::L2, &direction(a), &direction(b)) > 1e-4
        };
        if again.iter().zip(logits).any(differ) {
            doubts.push(
                "the network answers the same image differently: a randomised defence needs attacks that average \
                 over its draws"
                    .to_owned(),
            );
        }
        let classes = logits.first().map_or(0, Vec::len);
        if classes < 4 {
            doubts.push(format!(
                "with {classes} classes the targeted DLR loss is not defined{}: the margin is climbed in its place",
                if classes < 3 { ", nor is DLR" } else { "" }
            ));
        }
        let is_distribution = |row: &Vec<f32>| {
            let sum: f32 = row.iter().sum();
            row.iter().all(|v| (-1e-5..=1.0 + 1e-5).contains(v)) && (sum - 1.0).abs() < 1e-5
        };
        if logits.iter().all(is_distribution) {
            doubts
                .push("the network returns probabilities, expected logits: gradients may vanish".to_owned());
        }
        let silent = unseen.silent(correct)?;
        if silent > 0 {
            doubts.push(format!(
                "{silent} images have no gradient: what gradient attacks leave standing there says little"
            ));
        }
        Ok(doubts)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::{
        attack::Epsilon,
        data::{Dataset, Shape},
    };

    fn data() -> Dataset {
        let shape = Shape { height: 2, width: 2, channels: 1 };
        let mut data = Dataset::empty(shape, (0..4).map(|i| i.to_string()).collect());
        for i in 0..6u8 {
            data.push(&[40 * i, 255 - 40 * i, 10, 200], u32::from(i) % 3);
        }
        data
    }

    /// The doubts about a network with four classes.
    fn doubts(logits_of: &(dyn Fn(&Tensor) -> Result<Tensor> + Sync)) -> Vec<String> {
        let data = data();
        let evaluation = Evaluation::new(logits_of, &data, &Device::Cpu);
        let logits = evaluation.logits("clean", &unchanged).unwrap();
        evaluation.doubts(&logits, &[0, 1, 2, 3, 4, 5]).unwrap()
    }

    fn pixels(x: &Tensor) -> Result<Tensor> {
        Ok(x.flatten_from(1)?)
    }

    #[test]
    fn an_honest_network_raises_no_doubt() {
        assert_eq!(doubts(&|x| Ok((pixels(x)? * 3.0)?)), [""; 0]);
    }

    #[test]
    fn what_makes_robust_accuracy_worthless_is_said() {
        let said =
            |doubts: Vec<String>, part: &str| assert!(doubts.iter().any(|d| d.contains(part)), "{doubts:?}");
        let asked = std::sync::atomic::AtomicU32::new(0);
        said(
            doubts(&|x| {
                let time = asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let noise = Tensor::new(&[0f32, 0.0, 0.0, time as f32], x.device())?;
                Ok(pixels(x)?.broadcast_add(&noise)?)
            }),
            "answers the same image differently",
        );
        said(
            doubts(&|x| {
                let odds = pixels(x)?.exp()?;
                Ok(odds.broadcast_div(&odds.sum_keepdim(1)?)?)
            }),
            "returns probabilities",
        );
        said(
            doubts(&|x| Ok((crate::kernels::relu(&(pixels(x)? - 10.0)?)? + pixels(x)?.detach())?)),
            "6 images have no gradient",
        );
        said(
            doubts(&|x| Ok(pixels(x)?.narrow(1, 0, 3)?)),
            "with 3 classes the targeted DLR loss is not defined:",
        );
    }

    #[test]
    fn logits_that_are_not_finite_are_counted() {
        let infinite = vec![f32::INFINITY, 0.0];
        let all = [vec![1.0, 2.0], infinite.clone(), vec![f32::NAN, f32::INFINITY], infinite];
        let said = unusable(&all);
        assert!(said[0].starts_with("1 images are answered with what is no number"), "{said:?}");
        assert!(said[1].starts_with("2 images are answered with infinite logits"), "{said:?}");
        assert_eq!(unusable(&all[..1]), [""; 0]);
    }

    /// 1 - p is e^-z here: 6e-8, which is lost beside 1 in single precision, lies between z = 16 and 17.
    #[test]
    fn a_cross_entropy_that_rounds_to_0_on_many_images_is_doubted() {
        let logits = |z: f32| vec![0.0, z, -1e3];
        let all: Vec<_> = [16.0, 17.0, 1e4, 5.0, f32::INFINITY].map(logits).into();
        let said = |rows: &[usize]| saturation(&all, &[1; 5], rows, f32::EPSILON / 2.0);
        assert!(
            said(&[0, 1, 2, 3])[0]
                .contains("on 2 of the 4 images that withstood the attack the network is so sure")
        );
        assert_eq!(said(&[0, 3, 4]), [""; 0]);
        assert_eq!(said(&[]), [""; 0]);
        let few: Vec<usize> = (0..10).map(|i| if i == 0 { 1 } else { 3 }).collect();
        assert_eq!(said(&few), [""; 0], "one in ten");
        let double = |rows: &[usize]| saturation(&all, &[1; 5], rows, (f64::EPSILON / 2.0) as f32);
        assert!(double(&[0, 1]).is_empty() && double(&[2]).len() == 1);
        let close = saturation(&[vec![0.0, 0.004, -0.004]], &[1], &[0], 0.0);
        assert!(close.len() == 1 && close[0].contains("weighs all wrong classes alike"), "{close:?}");
    }

    #[test]
    fn an_image_outside_of_the_ball_or_the_box_raises_the_alarm() {
        let data = data();
        let evaluation = Evaluation::new(&pixels, &data, &Device::Cpu);
        let threat = Threat::new(Norm::Linf, Epsilon::try_from(0.1).unwrap()).unwrap();
        let image = evaluation.pixels(0);
        let proven = |moved: Vec<f32>| evaluation.proven("square", &threat, BTreeMap::from([(0, moved)]));
        let moved =
            |by: f32| image.iter().enumerate().map(|(i, v)| if i == 2 { v + by } else { *v }).collect();
        assert_eq!(proven(moved(0.1)).unwrap().len(), 1);
        for by in [0.2, -0.06, f32::NAN] {
            assert_eq!(proven(moved(by)).unwrap_err().exit_code(), 70, "{by}");
        }
    }
}
