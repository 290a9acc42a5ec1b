//! Samplers against closed forms and `diffusers`' constants.

use candle_core::{Device, Tensor};

use super::*;

fn ddpm(steps: usize, variance: Variance) -> SamplerConfig {
    SamplerConfig {
        kind: SamplerKind::Ddpm,
        steps,
        eta: 0.0,
        clip: None,
        variance,
        spacing: Spacing::Leading,
        steps_offset: 0,
        final_alpha_bar_is_one: true,
    }
}

fn ddim(steps: usize, eta: f64) -> SamplerConfig {
    SamplerConfig { kind: SamplerKind::Ddim, eta, ..ddpm(steps, Variance::FixedSmall) }
}

fn schedule() -> Schedule {
    Schedule::linear(1000, 1e-4, 0.02).unwrap()
}

fn tensor(values: Vec<f32>) -> Tensor {
    let n = values.len();
    Tensor::from_vec(values, n, &Device::Cpu).unwrap()
}

fn values(x: &Tensor) -> Vec<f32> {
    x.to_vec1().unwrap()
}

/// Deterministic numbers in [-1, 1] for the noise of a step.
fn wave(step: u32, n: usize) -> Tensor {
    tensor((0..n).map(|i| (f64::from(step) * 12.9898 + i as f64 * 78.233).sin() as f32).collect())
}

/// tests/schedulers/test_scheduler_ddim.py of `diffusers`, `test_full_loop_no_noise`.
#[test]
fn the_ddim_loop_gives_the_constants_of_diffusers() {
    let x = tensor((0..768).map(|i| i as f32 / 768.0).collect());
    let config = SamplerConfig { clip: Some(1.0), ..ddim(10, 0.0) };
    let mut model = |x: &Tensor, t: usize| Ok((x * (t as f64 / (t as f64 + 1.0)))?);
    let x = sample(&schedule(), &config, x, 0, &mut model, &mut |_| unreachable!(), &mut |_, _| Ok(()));
    let x = values(&x.unwrap());
    let sum: f64 = x.iter().map(|v| f64::from(v.abs())).sum();
    assert!((sum - 172.0067).abs() < 1e-2, "{sum}");
    assert!((sum / 768.0 - 0.223967).abs() < 1e-5, "{sum}");
}

/// Mean and variance of what comes out of N(0, 1), for data N(mu, s2) and their exact denoiser.
///
/// The sampler is affine in x_T and in the noise of each step, so each has an element of the batch to itself:
/// its square is its share of the variance.
fn pushed_through(config: &SamplerConfig, mu: f64, s2: f64) -> (f64, f64) {
    let schedule = schedule();
    let n = config.steps + 2;
    let one_hot = |hot: usize| tensor((0..n).map(|i| f32::from(u8::from(i == hot))).collect());
    let mut oracle = |x: &Tensor, t: usize| {
        let alpha_bar = schedule.alphas_cumprod()[t];
        let gain = alpha_bar.sqrt() * s2 / (alpha_bar * s2 + 1.0 - alpha_bar);
        let x_start = ((x - alpha_bar.sqrt() * mu)? * gain)?.affine(1.0, mu)?;
        Ok(((x - (x_start * alpha_bar.sqrt())?)? / (1.0 - alpha_bar).sqrt())?)
    };
    let mut noise = |step: u32| Ok(one_hot(step as usize + 2));
    let x = sample(&schedule, config, one_hot(1), 0, &mut oracle, &mut noise, &mut |_, _| Ok(())).unwrap();
    let x = values(&x);
    let mean = f64::from(x[0]);
    (mean, x[1..].iter().map(|v| (f64::from(*v) - mean).powi(2)).sum())
}

/// Own float64 recursion of the means and variances.
#[test]
fn gaussian_data_come_out_with_the_mean_and_variance_of_the_closed_form() {
    let cases = [
        (ddpm(1000, Variance::FixedSmall), 0.3, 0.25, 0.29999697, 0.24612521),
        (ddpm(1000, Variance::FixedLarge), 0.3, 0.25, 0.29999697, 0.25075208),
        (ddim(10, 0.0), 0.3, 0.25, 0.29815490, 0.13997213),
        (ddim(50, 0.0), 0.3, 0.25, 0.29891099, 0.22319872),
        (ddim(100, 0.0), 0.3, 0.25, 0.29898602, 0.23617711),
        (ddim(250, 0.0), 0.3, 0.25, 0.29902901, 0.24431845),
        (ddim(1000, 0.0), 0.3, 0.25, 0.29904995, 0.24849755),
        (ddpm(1000, Variance::FixedSmall), 0.0, 1.0, 0.0, 0.99106738),
        (ddpm(1000, Variance::FixedLarge), 0.0, 1.0, 0.0, 0.99990000),
        (ddim(10, 0.0), 0.0, 1.0, 0.0, 0.69171803),
        (ddim(100, 0.0), 0.0, 1.0, 0.0, 0.96403106),
    ];
    for (config, mu, s2, mean, variance) in cases {
        let (found_mean, found_variance) = pushed_through(&config, mu, s2);
        assert!((found_mean - mean).abs() < 5e-6, "{config:?}: mean {found_mean}, expected {mean}");
        let error = (found_variance - variance).abs();
        assert!(error < 2e-5, "{config:?}: variance {found_variance}, expected {variance}");
    }
}

/// Song et al. 2021, §4.1.
#[test]
fn ddim_with_eta_1_at_all_steps_is_ancestral_sampling_with_the_small_variance() {
    let run = |config: SamplerConfig| {
        let mut model = |x: &Tensor, t: usize| Ok((x.sin()? * (0.5 + t as f64 / 2000.0))?);
        let mut noise = |step| Ok(wave(step, 64));
        let x = wave(u32::MAX, 64);
        values(&sample(&schedule(), &config, x, 0, &mut model, &mut noise, &mut |_, _| Ok(())).unwrap())
    };
    let (implicit, ancestral) = (run(ddim(1000, 1.0)), run(ddpm(1000, Variance::FixedSmall)));
    let scale = ancestral.iter().fold(0f32, |m, v| m.max(v.abs()));
    for (a, b) in implicit.iter().zip(&ancestral) {
        assert!((a - b).abs() < 1e-3 * scale, "{a} {b}");
    }
}

#[test]
fn a_run_that_was_saved_and_resumed_gives_the_same_bits() {
    for config in [ddpm(20, Variance::FixedLarge), ddim(20, 0.5)] {
        let config = SamplerConfig { clip: Some(1.0), ..config };
        let run = |x: Tensor, start: usize, saved: &mut Vec<(usize, Tensor)>| {
            let mut model = |x: &Tensor, t: usize| Ok((x.cos()? * (t as f64 / 1000.0))?);
            let mut noise = |step| Ok(wave(step, 8));
            let mut save = |done, x: &Tensor| {
                saved.push((done, x.clone()));
                Ok(())
            };
            sample(&schedule(), &config, x, start, &mut model, &mut noise, &mut save).unwrap()
        };
        let mut saved = Vec::new();
        let straight = run(wave(u32::MAX, 8), 0, &mut saved);
        assert_eq!(saved.len(), 20);
        let (done, x) = saved[6].clone();
        assert_eq!(done, 7);
        assert_eq!(values(&run(x, done, &mut Vec::new())), values(&straight));
        assert_eq!(values(&run(saved[19].1.clone(), 20, &mut Vec::new())), values(&straight));
    }
}

#[test]
fn elements_do_not_depend_on_the_batch() {
    let run = |from: usize, n: usize| {
        let mut model = |x: &Tensor, t: usize| Ok((x.sin()? * (t as f64 / 1000.0))?);
        let part = |x: Tensor| Ok(x.narrow(0, from, n)?);
        let mut noise = |step| part(wave(step, 300));
        let x = part(wave(u32::MAX, 300)).unwrap();
        let config = ddpm(10, Variance::FixedSmall);
        values(&sample(&schedule(), &config, x, 0, &mut model, &mut noise, &mut |_, _| Ok(())).unwrap())
    };
    assert_eq!(run(0, 300)[101], run(101, 1)[0]);
    assert_eq!(run(0, 300)[101..120], run(101, 19));
}

/// `DDIMScheduler(...).set_timesteps(n)` of `diffusers` 0.42.1.
#[test]
fn timesteps_are_those_of_diffusers() {
    let at = |spacing, steps, steps_offset| {
        SamplerConfig { spacing, steps_offset, ..ddim(steps, 0.0) }.timesteps(&schedule()).unwrap()
    };
    assert_eq!(at(Spacing::Leading, 4, 0), [750, 500, 250, 0]);
    assert_eq!(at(Spacing::Leading, 3, 1), [667, 334, 1]);
    assert_eq!(at(Spacing::Trailing, 3, 0), [999, 666, 332]);
    assert_eq!(at(Spacing::Linspace, 4, 0), [999, 666, 333, 0]);
    assert_eq!(at(Spacing::Leading, 1000, 0)[..3], [999, 998, 997]);
}

#[test]
fn settings_that_do_not_fit_the_schedule_are_refused() {
    let error = |config: SamplerConfig| config.timesteps(&schedule()).unwrap_err().to_string();
    assert_eq!(
        error(ddim(1001, 0.0)),
        "the sampler's steps are 1001, expected from 1 to 1000, the steps in training"
    );
    assert_eq!(error(ddim(10, 1.5)), "eta is 1.5, expected from 0 to 1");
    let offset = SamplerConfig { steps_offset: 1, ..ddim(1000, 0.0) };
    assert_eq!(error(offset), "with steps_offset 1 the first step is 1000, expected below 1000");
}
