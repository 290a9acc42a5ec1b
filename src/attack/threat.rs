//! What an attack may do: an ℓ∞ or ℓ2 ball around the image, within the box [0, 1] of pixels.

use std::{fmt, str::FromStr};

use candle_core::Tensor;
use serde::{Deserialize, Serialize, Serializer};

use crate::{Error, Result, data::from_chw, kernels, rng, text::Written};

/// The radius of an attack's ball: a number, or a fraction such as `8/255`.
///
/// Fractions of 255 are written as such, so that `8/255` is written as it was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd, Deserialize)]
#[serde(try_from = "Written")]
pub struct Epsilon(f64);

impl Epsilon {
    /// The radius as a number.
    pub fn get(self) -> f64 {
        self.0
    }

    /// The radius at `step`, counted from 0, if it grows evenly to its full size over this many steps.
    pub fn grown(self, step: usize, over: usize) -> Self {
        Self(self.0 * ((step + 1) as f64 / over.max(1) as f64).min(1.0))
    }
}

impl TryFrom<f64> for Epsilon {
    type Error = String;
    fn try_from(value: f64) -> std::result::Result<Self, String> {
        if value >= 0.0 && value.is_finite() { Ok(Self(value)) } else { Err(expected_epsilon(value)) }
    }
}

impl FromStr for Epsilon {
    type Err = String;
    fn from_str(s: &str) -> std::result::Result<Self, String> {
        let number = |part: &str| part.trim().parse::<f64>().map_err(|_| expected_epsilon(s));
        let value = match s.split_once('/') {
            Some((numerator, denominator)) => number(numerator)? / number(denominator)?,
            None => number(s)?,
        };
        Self::try_from(value).map_err(|_| expected_epsilon(s))
    }
}

fn expected_epsilon(found: impl fmt::Display) -> String {
    format!(
        "epsilon is {found}, expected a number from 0 to 1 (for l2 also more), or a fraction such as 8/255"
    )
}

impl fmt::Display for Epsilon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = self.0.to_string();
        let numerator = (self.0 * 255.0).round();
        let fraction = format!("{numerator}/255");
        let exact = numerator / 255.0 == self.0;
        f.write_str(if exact && fraction.len() < number.len() { &fraction } else { &number })
    }
}

impl Serialize for Epsilon {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let text = self.to_string();
        if text.contains('/') { serializer.serialize_str(&text) } else { serializer.serialize_f64(self.0) }
    }
}

impl TryFrom<Written> for Epsilon {
    type Error = String;
    fn try_from(written: Written) -> std::result::Result<Self, String> {
        match written {
            Written::Number(value) => Self::try_from(value),
            other => other.into_text()?.parse(),
        }
    }
}

named! {
    /// How the size of a perturbation is measured.
    pub enum Norm {
        /// ℓ∞: the largest change of any pixel.
        Linf = "linf",
        /// ℓ2: the Euclidean norm of the change.
        L2 = "l2",
    }
}

/// The ball that a perturbed image must stay in. Pixels stay in [0, 1].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Threat {
    norm: Norm,
    epsilon: f64,
}

impl Threat {
    /// The ball of this radius. Fails with [`Error::Usage`] for an ℓ∞ radius above 1, the width of the box.
    pub fn new(norm: Norm, epsilon: Epsilon) -> Result<Self> {
        let epsilon = epsilon.get();
        if norm == Norm::Linf && epsilon > 1.0 {
            return Err(Error::Usage(expected_epsilon(epsilon)));
        }
        Ok(Self { norm, epsilon })
    }

    /// The norm.
    pub fn norm(&self) -> Norm {
        self.norm
    }

    /// The radius.
    pub fn epsilon(&self) -> f64 {
        self.epsilon
    }

    /// The point nearest to `x_adv` in the ball around `x`, then in the box. `x`, `x_adv`: `(b, …)` f32, `x` in [0,
    /// 1].
    pub fn project(&self, x: &Tensor, x_adv: &Tensor) -> Result<Tensor> {
        kernels::project(x, x_adv, self.epsilon, self.norm == Norm::L2)
    }

    /// The steepest direction of length 1 in this norm: the signs of the gradient for ℓ∞, the gradient divided by
    /// its length for ℓ2. `gradient`: `(b, …)`. A gradient of 0 stays 0.
    pub fn direction(&self, gradient: &Tensor) -> Result<Tensor> {
        kernels::steepest(gradient, self.norm == Norm::L2)
    }

    /// The point `step_size` up the gradient from `x_adv`, projected: see [`Threat::direction`], [`Threat::project`].
    pub fn step(&self, x: &Tensor, x_adv: &Tensor, gradient: &Tensor, step_size: f64) -> Result<Tensor> {
        kernels::pgd_step(x, x_adv, gradient, (step_size, self.epsilon), self.norm == Norm::L2)
    }

    /// A point drawn uniformly from the ball around each image, then clipped to the box.
    ///
    /// `x`: `(b, h, w, c)`, or any `(b, …)`. An image's draw depends only on `seed` and its entry in `sample_ids`;
    /// elements are drawn in CHW order.
    pub fn random_start(&self, x: &Tensor, seed: u64, sample_ids: &[u64]) -> Result<Tensor> {
        let (n, len) = (x.dim(0)?, x.elem_count() / x.dim(0)?.max(1));
        if sample_ids.len() != n {
            bail!(Usage, "there are {} sample ids, expected one for each of {n} images", sample_ids.len());
        }
        let mut deltas = Vec::with_capacity(n * len);
        for id in sample_ids {
            match self.norm {
                Norm::Linf => {
                    let mut draws = vec![0.0; len];
                    rng::uniforms(seed, *id, rng::stream::ATTACK, &mut draws);
                    deltas.extend(draws.iter().map(|u| (2.0 * u - 1.0) * self.epsilon as f32));
                }
                // The first n coordinates of a uniform point on the sphere of n + 2 dimensions are uniform
                // in the ball of n (Voelker et al. 2017).
                Norm::L2 => {
                    let mut draws = vec![0.0; len + 2];
                    rng::normals(seed, *id, rng::stream::ATTACK, &mut draws);
                    let length = draws.iter().map(|z| f64::from(*z).powi(2)).sum::<f64>().sqrt();
                    let scale = (self.epsilon / length) as f32;
                    deltas.extend(draws[..len].iter().map(|z| z * scale));
                }
            }
        }
        Ok((x + from_chw(deltas, x.dims(), x.device())?)?.clamp(0f32, 1f32)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;

    fn threat(norm: Norm, epsilon: f64) -> Threat {
        Threat::new(norm, Epsilon::try_from(epsilon).unwrap()).unwrap()
    }

    fn l2(x: &[f32]) -> f64 {
        x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
    }

    #[test]
    fn epsilon_reads_numbers_and_fractions_and_writes_them_back() {
        for text in ["8/255", "0.03", "0", "1", "0.5", "17/255", "2.5"] {
            assert_eq!(text.parse::<Epsilon>().unwrap().to_string(), text);
        }
        assert_eq!("8/255".parse::<Epsilon>().unwrap().get(), 8.0 / 255.0);
        let json = |text: &str| serde_json::from_str::<Epsilon>(text).unwrap();
        assert_eq!(json("\"8/255\""), json("0.03137254901960784"));
        assert_eq!(serde_json::to_string(&json("\"8/255\"")).unwrap(), "\"8/255\"");
        assert_eq!(serde_json::to_string(&json("0")).unwrap(), "0.0");
        assert_eq!(json("0").get(), 0.0);
    }

    #[test]
    fn what_is_no_radius_is_refused_by_value() {
        let error = "-0.1".parse::<Epsilon>().unwrap_err();
        let expected = "expected a number from 0 to 1 (for l2 also more), or a fraction such as 8/255";
        assert_eq!(error, format!("epsilon is -0.1, {expected}"));
        for text in ["NaN", "inf", "8/0", "0/0", "", "8/255/2", "eight"] {
            let error = text.parse::<Epsilon>().unwrap_err();
            assert_eq!(error, format!("epsilon is {text}, {expected}"));
        }
        assert!(serde_json::from_str::<Epsilon>("-1").unwrap_err().to_string().contains("epsilon is -1"));
        let two = Epsilon::try_from(2.0).unwrap();
        assert_eq!(
            Threat::new(Norm::Linf, two).unwrap_err().to_string(),
            format!("epsilon is 2, {expected}")
        );
        assert!(Threat::new(Norm::L2, two).is_ok());
    }

    #[test]
    fn directions_have_length_1_in_their_norm_however_small_the_gradient() {
        let gradient = Tensor::new(&[[3f32, -4.0], [0.0, 0.0], [3e-30, -4e-30]], &Device::Cpu).unwrap();
        let direction = |norm| threat(norm, 0.1).direction(&gradient).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(direction(Norm::Linf), [[1.0, -1.0], [0.0, 0.0], [1.0, -1.0]]);
        let l2 = direction(Norm::L2);
        for (found, expected) in l2.iter().flatten().zip([0.6, -0.8, 0.0, 0.0, 0.6, -0.8]) {
            assert!((found - expected).abs() < 1e-6, "{l2:?}");
        }
    }

    #[test]
    fn random_starts_fill_the_ball_uniformly() {
        let x = Tensor::full(0.5f32, (4000, 2), &Device::Cpu).unwrap();
        let ids: Vec<_> = (0..4000).collect();
        for norm in [Norm::Linf, Norm::L2] {
            let start = threat(norm, 0.4).random_start(&x, 3, &ids).unwrap();
            let deltas = (start - 0.5).unwrap().to_vec2::<f32>().unwrap();
            let size = |d: &Vec<f32>| match norm {
                Norm::Linf => f64::from(d[0].abs().max(d[1].abs())),
                Norm::L2 => l2(d),
            };
            assert!(deltas.iter().all(|d| size(d) <= 0.4 + 1e-6));
            // Half of the radius holds a quarter of the area.
            let half = deltas.iter().filter(|d| size(d) < 0.2).count() as f64 / 4000.0;
            assert!((half - 0.25).abs() < 0.03, "{norm:?}: {half}");
        }
    }

    #[test]
    fn a_random_start_depends_on_seed_and_id_alone_and_is_drawn_in_chw_order() {
        let ball = threat(Norm::Linf, 0.25);
        let x = Tensor::full(0.5f32, (2, 3, 3, 2), &Device::Cpu).unwrap();
        let start = |n: usize, seed, ids: &[u64]| {
            let start = ball.random_start(&x.narrow(0, 0, n).unwrap(), seed, ids).unwrap();
            start.flatten_from(1).unwrap().to_vec2::<f32>().unwrap()
        };
        let both = start(2, 1, &[7, 9]);
        assert_eq!(both[1], start(1, 1, &[9])[0]);
        assert_ne!(both[0], both[1]);
        assert_ne!(both[0], start(1, 2, &[7])[0]);
        let mut draws = [0.0; 18];
        rng::uniforms(1, 7, rng::stream::ATTACK, &mut draws);
        // The second pixel's first channel is element 1 in CHW, 2 in HWC.
        assert_eq!(both[0][2], 0.5 + (2.0 * draws[1] - 1.0) * 0.25);
        assert!(ball.random_start(&x, 1, &[7]).is_err());
    }

    proptest! {
        #[test]
        fn projections_stay_in_ball_and_box_and_keep_what_is_inside(
            pixels in prop::collection::vec((0f32..=1.0, -2f32..3.0), 12),
            epsilon in 0f64..1.0,
            linf: bool,
        ) {
            let (x, x_adv): (Vec<_>, Vec<_>) = pixels.into_iter().unzip();
            let tensor = |v: &[f32]| Tensor::from_slice(v, (1, v.len()), &Device::Cpu).unwrap();
            let ball = threat(if linf { Norm::Linf } else { Norm::L2 }, epsilon);
            let once = ball.project(&tensor(&x), &tensor(&x_adv)).unwrap();
            let found = once.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            prop_assert!(found.iter().all(|v| (0.0..=1.0).contains(v)));
            let delta: Vec<_> = found.iter().zip(&x).map(|(a, b)| a - b).collect();
            let size = if linf {
                delta.iter().fold(0f64, |m, d| m.max(f64::from(d.abs())))
            } else {
                l2(&delta)
            };
            prop_assert!(size <= epsilon + 1e-6, "{size} > {epsilon}");
            let twice = ball.project(&tensor(&x), &once).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (a, b) in twice.iter().zip(&found) {
                prop_assert!((a - b).abs() < 1e-6);
            }
        }
    }
}
