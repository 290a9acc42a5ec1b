//! A model's noise: which levels there are, and how an image gets to them.

use candle_core::Tensor;

use super::{Level, NoiseSchedule, Prediction};
use crate::Result;

/// The noise levels of a model.
#[derive(Clone, Debug, PartialEq)]
pub enum Process {
    /// The T steps of a variance-preserving process (Ho et al. 2020).
    Discrete(NoiseSchedule),
    /// Any σ in a range (Karras et al. 2022).
    Continuous(SigmaRange),
}

/// The levels of EDM: when sampling, from `max` to `min` in equal steps of σ^(1/ρ) (Karras et al. 2022, Eq. 5).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SigmaRange {
    /// σ_min, above 0.
    pub min: f64,
    /// σ_max.
    pub max: f64,
    /// ρ: the larger it is, the more steps are at low noise.
    pub rho: f64,
}

impl SigmaRange {
    /// σ of each of `steps` steps, in descending order.
    pub fn sigmas(&self, steps: usize) -> impl Iterator<Item = f64> {
        let (max, min) = (self.max.powf(1.0 / self.rho), self.min.powf(1.0 / self.rho));
        let last = steps.saturating_sub(1).max(1) as f64;
        let rho = self.rho;
        (0..steps).map(move |i| (max + i as f64 / last * (min - max)).powf(rho))
    }
}

/// What an EDM network is told about σ (Karras et al. 2022, Table 1: c_noise).
pub(super) fn continuous_level(sigma: f64) -> Level {
    Level { sigma, t: sigma.ln() / 4.0 }
}

/// The distribution of training images on the log scale of EDM's noise (Karras et al. 2022, Table 1): P_mean and
/// P_std.
const LOG_NORMAL: (f64, f64) = (-1.2, 1.2);

impl Process {
    /// The level at which an image is trained on. `uniform`: 64 random bits; `normal`: a number from N(0, 1). A
    /// discrete process uses the former to take all its steps equally often; EDM uses the latter to draw ln σ.
    pub fn training_level(&self, uniform: u64, normal: f32) -> Level {
        match self {
            Self::Discrete(schedule) => schedule.level((uniform % schedule.len() as u64) as usize),
            Self::Continuous(_) => continuous_level((LOG_NORMAL.0 + LOG_NORMAL.1 * f64::from(normal)).exp()),
        }
    }

    /// A number in [0, 1] that grows with the level's noise, for logging by noise level.
    pub fn rank(&self, level: Level) -> f64 {
        match self {
            Self::Discrete(schedule) => level.t / schedule.len() as f64,
            Self::Continuous(_) => {
                let z = (level.sigma.ln() - LOG_NORMAL.0) / LOG_NORMAL.1;
                statrs::function::erf::erfc(-z / std::f64::consts::SQRT_2) / 2.0
            }
        }
    }
}

/// A network's input and target, with a noise level for each image.
#[derive(Clone, Debug)]
pub struct TrainingPair {
    /// The noisy image as the network sees it, c_in (x_0 + σ ε).
    pub input: Tensor,
    /// What the network is told about the noise: `(b,)` f32.
    pub t: Tensor,
    /// The target of its prediction.
    pub target: Tensor,
}

impl TrainingPair {
    /// `x_start`, `noise`: `(b, h, w, c)` f32, pixels in [-1, 1]. Fails with
    /// [`Error::Usage`](crate::Error::Usage) if there is not one level for each image, or one without noise.
    pub fn new(prediction: Prediction, x_start: &Tensor, levels: &[Level], noise: &Tensor) -> Result<Self> {
        let images = x_start.dim(0)?;
        if levels.len() != images {
            bail!(Usage, "there are {} noise levels, expected one for each of {images} images", levels.len());
        }
        if let Some(level) = levels.iter().find(|level| !(level.sigma > 0.0 && level.sigma.is_finite())) {
            bail!(Usage, "the noise level is {}, expected above 0", level.sigma);
        }
        let mut per_image = vec![1; x_start.rank()];
        per_image[0] = images;
        let mixed = |coefficients: &dyn Fn(f64) -> (f64, f64)| -> Result<Tensor> {
            let pairs = levels.iter().map(|level| coefficients(level.sigma));
            let (image, of_noise): (Vec<f32>, Vec<f32>) = pairs.map(|(a, b)| (a as f32, b as f32)).unzip();
            let column = |values| Tensor::from_vec(values, per_image.as_slice(), x_start.device());
            Ok((x_start.broadcast_mul(&column(image)?)? + noise.broadcast_mul(&column(of_noise)?)?)?)
        };
        let input = mixed(&|sigma| {
            let c_in = prediction.at(sigma).c_in;
            (c_in, c_in * sigma)
        })?;
        let t: Vec<f32> = levels.iter().map(|level| level.t as f32).collect();
        Ok(Self {
            input,
            t: Tensor::from_vec(t, images, x_start.device())?,
            target: mixed(&|sigma| prediction.target(sigma))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    /// Own float64 computation of Karras et al. 2022, Eq. 5.
    #[test]
    fn the_levels_of_edm_are_those_of_the_paper() {
        let known = [
            80.0, 57.585985, 40.785574, 28.374585, 19.352453, 12.910082, 8.400935, 5.315195, 3.256822,
            1.923340, 1.088171, 0.585348, 0.296442, 0.139516, 0.059947, 0.022935, 0.007528, 0.002,
        ];
        let range = SigmaRange { min: 0.002, max: 80.0, rho: 7.0 };
        for (found, expected) in range.sigmas(18).zip(known) {
            assert!((found - expected).abs() < 1e-6, "{found}, expected {expected}");
        }
        assert_eq!(range.sigmas(1).count(), 1);
    }

    #[test]
    fn signal_and_noise_have_the_variances_of_their_step() {
        let schedule = NoiseSchedule::linear(1000, 1e-4, 0.02).unwrap();
        let levels = [schedule.level(99), schedule.level(999)];
        let ones = Tensor::ones((2, 1, 1, 1), DType::F32, &Device::Cpu).unwrap();
        let zeros = ones.zeros_like().unwrap();
        let at = |x: &Tensor, noise: &Tensor| {
            let pair = TrainingPair::new(Prediction::Epsilon, x, &levels, noise).unwrap();
            pair.input.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        for (i, alpha_bar) in [0.8970181457, 4.035829765e-5f64].into_iter().enumerate() {
            assert!((f64::from(at(&ones, &zeros)[i]) - alpha_bar.sqrt()).abs() < 1e-7);
            assert!((f64::from(at(&zeros, &ones)[i]) - (1.0 - alpha_bar).sqrt()).abs() < 1e-7);
        }
    }

    #[test]
    fn the_noise_itself_is_the_target_of_its_prediction() {
        let schedule = NoiseSchedule::linear(10, 1e-4, 0.02).unwrap();
        let x = Tensor::full(0.3f32, (2, 2, 2, 1), &Device::Cpu).unwrap();
        let noise = Tensor::full(-1.7f32, (2, 2, 2, 1), &Device::Cpu).unwrap();
        let levels = [schedule.level(0), schedule.level(9)];
        let pair = TrainingPair::new(Prediction::Epsilon, &x, &levels, &noise).unwrap();
        let all = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(all(&pair.target), all(&noise));
        assert_eq!(pair.t.to_vec1::<f32>().unwrap(), [0.0, 9.0]);
    }

    #[test]
    fn levels_must_fit_the_images_and_have_noise() {
        let x = Tensor::zeros((2, 1, 1, 1), DType::F32, &Device::Cpu).unwrap();
        let pair = |levels: &[Level]| TrainingPair::new(Prediction::Epsilon, &x, levels, &x);
        let level = Level { sigma: 1.0, t: 3.0 };
        assert!(pair(&[level]).unwrap_err().to_string().contains("there are 1 noise levels, expected one"));
        let none = Level { sigma: 0.0, t: 0.0 };
        assert_eq!(pair(&[level, none]).unwrap_err().to_string(), "the noise level is 0, expected above 0");
    }

    #[test]
    fn training_levels_cover_the_process() {
        let schedule = NoiseSchedule::linear(10, 1e-4, 0.02).unwrap();
        let discrete = Process::Discrete(schedule.clone());
        assert_eq!(discrete.training_level(27, 0.0), schedule.level(7));
        let edm = Process::Continuous(SigmaRange { min: 0.002, max: 80.0, rho: 7.0 });
        let level = edm.training_level(0, 1.0);
        assert!((level.sigma - 1.0).abs() < 1e-12 && level.t.abs() < 1e-12);
        assert!((edm.rank(level) - 0.841_344_746).abs() < 1e-8);
        assert_eq!(discrete.rank(schedule.level(5)), 0.5);
    }
}
