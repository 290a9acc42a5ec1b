//! Makes synthetic image data sets that make classifiers more robust to adversarial examples, and measures whether
//! they do.
//!
//! # The paper in short
//!
//! Sehwag et al., "Robust Learning Meets Generative Models: Can Proxy Distributions Improve Adversarial
//! Robustness?", ICLR 2022, arXiv 2104.09425. Images of a generative model, the *proxy distribution*, are mixed
//! into robust training. The gap between a classifier's robustness on the proxy and on the real distribution is
//! bounded by the (conditional) Wasserstein distance between the two, so a good proxy is a close one.
//!
//! - **Generator.** A denoising diffusion model (Ho et al. 2020, arXiv 2006.11239; DDIM: Song et al. 2021, arXiv
//!   2010.02502): `x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) noise`, trained on `‖noise − eps_θ(x_t, t)‖²`. See [`diffusion`].
//! - **Robust discrimination.** For each radius ε of a grid, a binary network learns to tell real from synthetic
//!   images under a PGD attack of radius ε (Madry et al. 2018, arXiv 1706.06083). `acc(ε)` is its accuracy under
//!   attack on images that it has not seen. See [`attack`], [`stages::judging::FitDiscriminator`].
//! - **ARC**, the area under that curve: `ARC = ∫ (acc(ε) − ½) dε`. Low means hard to tell apart: a good proxy.
//!   `4 · ARC` estimates a lower bound on the Wasserstein distance. See [`proxy::arc`].
//! - **Score** of a synthetic image, where low means close to real: `s(x) = Σ_j w_j p_j(synthetic | x)`, with
//!   trapezoid weights `w_j` over the radii, and networks `j` that were not trained on `x`. See [`proxy::score`].
//! - **Curation.** In each class, the images with the lowest scores that pass the gates are kept; the paper keeps
//!   10 of 15 million. See [`curate`].
//! - **PORT**, training on both: `γ · L(real) + (1 − γ) · L(synthetic)`, γ = 0.4 by default, each `L` the mean
//!   over its own images of a robust loss: `max_{‖δ‖ ≤ ε} CE(f(x + δ), y)`, the maximum found by PGD, or TRADES, or
//!   stability under noise for a classifier that is to be certified. See [`objective`], [`certify`].
//!
//! What the paper leaves open (networks, grid, calibration, folds) is decided in `ARCHITECTURE.md`.
//!
//! # Map of the modules
//!
//! The first lines of each module say what it holds; `ARCHITECTURE.md` lists which module uses which. Attacks,
//! losses and samplers take networks as closures; networks know nothing about shards. Everything that depends on
//! the feature `cuda` is in [`device`] and [`kernels`].

#[macro_use]
mod error;
#[macro_use]
mod text;

pub mod attack;
pub mod certify;
pub mod cli;
pub mod convert;
pub mod curate;
pub mod data;
pub mod device;
pub mod diffusion;
pub mod evaluation;
pub mod fs;
pub mod kernels;
pub mod nn;
pub mod objective;
pub mod pipeline;
pub mod plot;
pub mod process;
pub mod progress;
pub mod proxy;
pub mod rng;
#[macro_use]
pub mod settings;
#[macro_use]
pub mod stage;
pub mod stages;
pub mod stats;
pub mod tables;
mod training;

pub use error::{Error, Result, ResultExt};
