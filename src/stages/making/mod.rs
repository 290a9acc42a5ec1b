//! Making images: dividing the real data, training a diffusion model, sampling a pool from it or importing one.

mod fit_generator;
mod generate;
mod import;
mod split;

register_stages!(split::Split, fit_generator::FitGenerator, generate::Generate, import::Import);
