//! Denoising diffusion implicit models (Song et al. 2021, Eq. 12 and 16).

use super::{SamplerConfig, Schedule, Update};

/// The predicted image under the noise of the earlier step, of which `eta` says how much is fresh.
///
/// The earlier step is ⌊T / steps⌋ before this one, as in `diffusers`: for spacings that do not divide T it is
/// not the one visited next.
pub(super) fn update(config: &SamplerConfig, schedule: &Schedule, timesteps: &[usize], i: usize) -> Update {
    let t = timesteps[i];
    let alpha_bar = schedule.alpha_bar(Some(t));
    let alpha_bar_prev = match t.checked_sub(schedule.len() / config.steps) {
        Some(prev) => schedule.alpha_bar(Some(prev)),
        None if config.final_alpha_bar_is_one => 1.0,
        None => schedule.alpha_bar(Some(0)),
    };
    let variance = (1.0 - alpha_bar_prev) / (1.0 - alpha_bar) * (1.0 - alpha_bar / alpha_bar_prev);
    let sigma = config.eta * variance.sqrt();
    Update {
        x_start: alpha_bar_prev.sqrt(),
        x_t: 0.0,
        eps: (1.0 - alpha_bar_prev - sigma * sigma).sqrt(),
        noise: sigma,
    }
}
