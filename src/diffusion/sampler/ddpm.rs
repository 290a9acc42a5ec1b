//! Ancestral sampling (Ho et al. 2020, Alg. 2), also with fewer steps than in training.

use super::{SamplerConfig, Schedule, Update, Variance};

/// A draw from q(x_prev | x_t, x_0) with the predicted x_0. Step 0, the last one as a rule, gets no noise.
pub(super) fn update(config: &SamplerConfig, schedule: &Schedule, timesteps: &[usize], i: usize) -> Update {
    let t = timesteps[i];
    let posterior = schedule.posterior(t, timesteps.get(i + 1).copied());
    let variance = match config.variance {
        Variance::FixedSmall => posterior.variance,
        Variance::FixedLarge => posterior.beta,
    };
    Update {
        x_start: posterior.x_start_coef,
        x_t: posterior.x_t_coef,
        eps: 0.0,
        noise: if t == 0 { 0.0 } else { variance.sqrt() },
    }
}
