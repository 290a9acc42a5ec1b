//! How a network's output is turned into an image, given what it was trained to predict.

use candle_core::{D, Tensor};

use crate::Result;

/// A noise level: an image there is x = x_0 + σ ε with ε from N(0, 1).
///
/// A variance-preserving process, x_t = √ᾱ x_0 + √(1 - ᾱ) ε, is viewed in the same way: x is x_t / √ᾱ, and σ is
/// √((1 - ᾱ) / ᾱ). Then DDIM is Euler's method, and every sampler works with every network.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    /// σ, at least 0.
    pub sigma: f64,
    /// What the network is told about it: the training step, counted from 0 and possibly fractional, or ln σ / 4.
    pub t: f64,
}

/// What a network predicts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Prediction {
    /// The noise ε (Ho et al. 2020), of an image at variance 1.
    Epsilon,
    /// The image x_0, of an image at variance 1.
    Sample,
    /// √ᾱ ε - √(1 - ᾱ) x_0 (Salimans & Ho 2022, §4), of an image at variance 1.
    Velocity,
    /// A mixture that has variance 1 at every σ, if the data have the variance `sigma_data`² (Karras et al. 2022).
    Edm {
        /// The standard deviation of the data.
        sigma_data: f64,
    },
}

/// The coefficients of the denoiser D(x; σ) = c_skip x + c_out F(c_in x; t) of a network F (Karras et al. 2022, Eq. 7).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Preconditioning {
    /// The factor of the image in the sum.
    pub c_skip: f64,
    /// The factor of the network's output.
    pub c_out: f64,
    /// The factor of the network's input.
    pub c_in: f64,
}

impl Prediction {
    /// The coefficients at σ.
    pub fn at(self, sigma: f64) -> Preconditioning {
        let unit = 1.0 / (1.0 + sigma * sigma).sqrt();
        let of = |c_skip, c_out, c_in| Preconditioning { c_skip, c_out, c_in };
        match self {
            Self::Epsilon => of(1.0, -sigma, unit),
            Self::Sample => of(0.0, 1.0, unit),
            Self::Velocity => of(unit * unit, -sigma * unit, unit),
            Self::Edm { sigma_data: data } => {
                let inverse = 1.0 / (sigma * sigma + data * data).sqrt();
                of((data * inverse).powi(2), sigma * data * inverse, inverse)
            }
        }
    }

    /// The network's training target as multiples of the image and of the noise, for σ above 0: the F for which D
    /// is x_0.
    pub fn target(self, sigma: f64) -> (f64, f64) {
        let Preconditioning { c_skip, c_out, .. } = self.at(sigma);
        ((1.0 - c_skip) / c_out, -c_skip * sigma / c_out)
    }

    /// The image predicted from `x`, D(x; σ). `network` is F, called with its input and the level's t. It may return
    /// twice the channels: then the latter half is its prediction of the variance.
    ///
    /// `x`: `(b, h, w, c)` f32, an image in [-1, 1] and `level.sigma` times its noise. Returns its shape.
    pub fn denoise(
        self,
        x: &Tensor,
        level: Level,
        network: &dyn Fn(&Tensor, f64) -> Result<Tensor>,
    ) -> Result<Denoised> {
        let output = network(&(x * self.at(level.sigma).c_in)?, level.t)?;
        let (channels, found) = (x.dim(D::Minus1)?, output.dim(D::Minus1)?);
        let (output, variance) = match found == 2 * channels {
            true => (
                output.narrow(D::Minus1, 0, channels)?.contiguous()?,
                Some(output.narrow(D::Minus1, channels, channels)?.contiguous()?),
            ),
            false => (output, None),
        };
        Ok(Denoised { image: self.image(x, &output, level.sigma)?, variance })
    }

    /// The image that an output of the network for `x` stands for: c_skip x + c_out F.
    pub(super) fn image(self, x: &Tensor, output: &Tensor, sigma: f64) -> Result<Tensor> {
        let Preconditioning { c_skip, c_out, .. } = self.at(sigma);
        let predicted = (output * c_out)?;
        if c_skip == 0.0 { Ok(predicted) } else { Ok((predicted + (x * c_skip)?)?) }
    }

    /// The output of the network for `x` that stands for an image, with σ above 0.
    pub(super) fn output(self, x: &Tensor, image: &Tensor, sigma: f64) -> Result<Tensor> {
        let Preconditioning { c_skip, c_out, .. } = self.at(sigma);
        Ok(((image - (x * c_skip)?)? / c_out)?)
    }
}

/// What a network makes of a noisy image.
#[derive(Clone, Debug)]
pub struct Denoised {
    /// The predicted image, D(x; σ).
    pub image: Tensor,
    /// Its prediction of the variance of ancestral sampling, if it makes one, shaped like the image: how it is meant
    /// says [`Variance`](super::sampler::Variance).
    pub variance: Option<Tensor>,
}

named! {
    /// How the output of a network without EDM's preconditioning is interpreted, under `diffusers`' names.
    pub enum PredictionType {
        /// The noise ε (Ho et al. 2020).
        Epsilon = "epsilon",
        /// The image x_0.
        Sample = "sample",
        /// The velocity √ᾱ ε - √(1 - ᾱ) x_0 (Salimans & Ho 2022).
        VPrediction = "v_prediction",
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    const ALL: [Prediction; 4] =
        [Prediction::Epsilon, Prediction::Sample, Prediction::Velocity, Prediction::Edm { sigma_data: 0.5 }];

    #[test]
    fn a_network_that_predicts_its_target_denoises_perfectly() {
        let (image, noise) = (0.7, -1.3);
        for prediction in ALL {
            for sigma in [0.002, 0.3, 1.0, 20.0] {
                let (of_image, of_noise) = prediction.target(sigma);
                let output = of_image * image + of_noise * noise;
                let x = Tensor::new(&[(image + sigma * noise) as f32], &Device::Cpu).unwrap();
                let network = |x: &Tensor, t: f64| {
                    assert_eq!(t, 5.0);
                    Ok(x.zeros_like()?.affine(1.0, output)?)
                };
                let found = prediction.denoise(&x, Level { sigma, t: 5.0 }, &network).unwrap().image;
                let found = f64::from(found.to_vec1::<f32>().unwrap()[0]);
                assert!((found - image).abs() < 1e-5 * (1.0 + sigma), "{prediction:?} at {sigma}: {found}");
            }
        }
    }

    /// Salimans & Ho 2022, §4; Karras et al. 2022, Table 1.
    #[test]
    fn targets_are_those_of_the_papers() {
        let sigma: f64 = 2.0;
        let alpha_bar = 1.0 / (1.0 + sigma * sigma);
        let close = |(a, b): (f64, f64), (c, d): (f64, f64)| (a - c).abs() < 1e-12 && (b - d).abs() < 1e-12;
        assert_eq!(Prediction::Epsilon.target(sigma), (-0.0, 1.0));
        assert_eq!(Prediction::Sample.target(sigma).0, 1.0);
        assert_eq!(Prediction::Sample.target(sigma).1.abs(), 0.0);
        assert!(close(Prediction::Velocity.target(sigma), (-(1.0 - alpha_bar).sqrt(), alpha_bar.sqrt())));
        let Preconditioning { c_skip, c_out, c_in } = Prediction::Edm { sigma_data: 0.5 }.at(sigma);
        assert!(close((c_skip, c_out), (0.25 / 4.25, 1.0 / 4.25f64.sqrt())));
        assert!((c_in - 1.0 / 4.25f64.sqrt()).abs() < 1e-12);
    }

    /// Karras et al. 2022, App. B.6: input and target have variance 1 if the data have the assumed variance.
    #[test]
    fn inputs_and_targets_of_edm_have_variance_1() {
        let prediction = Prediction::Edm { sigma_data: 0.5 };
        for sigma in [0.01, 0.5, 3.0, 80.0] {
            let (image, noise) = prediction.target(sigma);
            assert!((image * image * 0.25 + noise * noise - 1.0).abs() < 1e-9);
            assert!((prediction.at(sigma).c_in.powi(2) * (0.25 + sigma * sigma) - 1.0).abs() < 1e-9);
        }
    }
}
