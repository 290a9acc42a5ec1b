//! Making images: the real data divided, a diffusion model trained, a pool sampled from it or imported.

mod fit_generator;
mod generate;
mod import;
mod split;

register_stages!(split::Split, fit_generator::FitGenerator, generate::Generate, import::Import);
