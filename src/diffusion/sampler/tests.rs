//! Samplers against closed forms and `diffusers`' constants.

use candle_core::{Device, Tensor};

use super::{step::Step, *};
use crate::{
    Result,
    diffusion::{Denoised, Level, NoiseSchedule, Prediction, Process, SigmaRange},
};

fn with(kind: SamplerKind, steps: usize, change: impl FnOnce(&mut SamplerConfig)) -> SamplerConfig {
    let mut config = SamplerConfig {
        kind,
        steps,
        spacing: Spacing::Leading,
        steps_offset: 0,
        final_alpha_bar_is_one: true,
        karras_sigmas: false,
        step: StepConfig {
            eta: 0.0,
            clip: None,
            variance: Variance::FixedSmall,
            churn: Churn::NONE,
            skip_prk_steps: true,
            solver_order: 2,
            unipc: UniPcVariant::Bh2,
            prediction: Prediction::Epsilon,
        },
    };
    change(&mut config);
    config
}

fn of_kind(kind: SamplerKind, steps: usize) -> SamplerConfig {
    with(kind, steps, |_| {})
}

fn ddpm(steps: usize, variance: Variance) -> SamplerConfig {
    with(SamplerKind::Ddpm, steps, |config| config.step.variance = variance)
}

fn ddim(steps: usize, eta: f64) -> SamplerConfig {
    with(SamplerKind::Ddim, steps, |config| config.step.eta = eta)
}

const SOLVERS: [SamplerKind; 5] =
    [SamplerKind::DpmSolver, SamplerKind::UniPc, SamplerKind::Ipndm, SamplerKind::Heun, SamplerKind::Euler];

fn schedule() -> NoiseSchedule {
    NoiseSchedule::linear(1000, 1e-4, 0.02).unwrap()
}

fn discrete() -> Process {
    Process::Discrete(schedule())
}

fn edm() -> Process {
    Process::Continuous(SigmaRange { min: 0.002, max: 80.0, rho: 7.0 })
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

fn run(config: &SamplerConfig, process: &Process, noise: Tensor, denoise: Denoise, fresh: Noise) -> Vec<f32> {
    let plan = Plan::new(config, process).unwrap();
    values(&sample(config, &plan, Start::Noise(noise), denoise, fresh, &mut |_, _| Ok(())).unwrap())
}

/// The denoiser of a network that predicts noise, given as a function of the image at variance 1 and the step.
fn of_noise(network: impl Fn(&Tensor, f64) -> Tensor) -> impl FnMut(&Tensor, Level) -> Result<Denoised> {
    move |x, level| crate::diffusion::Prediction::Epsilon.denoise(x, level, &|x, t| Ok(network(x, t)))
}

/// tests/schedulers/test_scheduler_ddim.py of `diffusers`, `test_full_loop_no_noise`.
#[test]
fn the_ddim_loop_gives_the_constants_of_diffusers() {
    let noise = tensor((0..768).map(|i| i as f32 / 768.0).collect());
    let config = with(SamplerKind::Ddim, 10, |config| config.step.clip = Some(1.0));
    let mut denoise = of_noise(|x, t| (x * (t / (t + 1.0))).unwrap());
    let x = run(&config, &discrete(), noise, &mut denoise, &mut |_| unreachable!());
    let sum: f64 = x.iter().map(|v| f64::from(v.abs())).sum();
    assert!((sum - 172.0067).abs() < 1e-2, "{sum}");
    assert!((sum / 768.0 - 0.223967).abs() < 1e-5, "{sum}");
}

/// What a step of DDPM from `t` to `to` multiplies the predicted image by, what x_t, and the variance it adds, for
/// images at variance 1.
fn posterior(t: usize, to: usize, variance: Variance) -> [f64; 3] {
    let schedule = schedule();
    let stride = Stride::new(schedule.level(t), schedule.level(to));
    let config = ddpm(1000, variance);
    let x = tensor(vec![0.0, 1.0, 0.0]);
    let step = Step { config: &config.step, strides: &[stride], i: 0, x: &x, history: &[] };
    let mut denoise = |_: &Tensor, _| Ok(Denoised { image: tensor(vec![1.0, 0.0, 0.0]), variance: None });
    let found = ddpm::step(&step, &mut denoise, &mut |_| Ok(tensor(vec![0.0, 0.0, 1.0]))).unwrap();
    let [image, x, sigma] = values(&found.x)[..] else { panic!("three elements") };
    let [root, root_to] = [t, to].map(|t| schedule.alphas_cumprod[t].sqrt());
    [f64::from(image) * root_to, f64::from(x) * root_to / root, (f64::from(sigma) * root_to).powi(2)]
}

/// Own float64 computation in numpy of Ho et al. 2020, Eq. 6 and 7.
#[test]
fn ancestral_steps_have_the_known_coefficients() {
    let table = [
        (1, 5.4531877e-5, 0.5452915, 0.4547085),
        (99, 2.0345963e-3, 0.019076345, 0.98089602),
        (499, 1.0031355e-2, 3.0700711e-3, 0.99410667),
        (999, 1.9999984e-2, 1.2835149e-4, 0.98994868),
    ];
    for (t, variance, of_image, of_x) in table {
        let found = posterior(t, t - 1, Variance::FixedSmall);
        for (found, expected) in found.into_iter().zip([of_image, of_x, variance]) {
            assert!((found / expected - 1.0).abs() < 5e-6, "step {t}: {found}, expected {expected}");
        }
        let large = posterior(t, t - 1, Variance::FixedLarge)[2];
        assert!((large / schedule().betas()[t] - 1.0).abs() < 1e-5, "step {t}: {large}");
    }
}

/// `diffusers`' own constants: tests/schedulers/test_scheduler_ddpm.py and test_scheduler_ddim.py.
#[test]
fn variances_are_those_of_diffusers() {
    let variance = |t, to| posterior(t, to, Variance::FixedSmall)[2];
    assert!((variance(487, 486) - 0.00979).abs() < 1e-5);
    assert!((variance(999, 998) - 0.02).abs() < 1e-5);
    assert!((variance(420, 400) - 0.14771).abs() < 1e-5);
    assert!((variance(980, 960) - 0.32460).abs() < 1e-5);
}

/// The denoiser of data N(mu, s2), without error.
fn oracle(mu: f64, s2: f64) -> impl FnMut(&Tensor, Level) -> Result<Denoised> {
    move |x, level| {
        let gain = s2 / (s2 + level.sigma * level.sigma);
        Ok(Denoised { image: x.affine(gain, mu * (1.0 - gain))?, variance: None })
    }
}

/// Mean and variance of what comes out of N(0, 1), for data N(mu, s2) and their exact denoiser.
///
/// The sampler is affine in the noise that it begins with and in the noise of each step, so each has an element of
/// the batch to itself: its square is its share of the variance.
fn pushed_through(config: &SamplerConfig, process: &Process, mu: f64, s2: f64) -> (f64, f64) {
    let n = config.steps + 2;
    let one_hot = |hot: usize| tensor((0..n).map(|i| f32::from(u8::from(i == hot))).collect());
    let mut noise = |step: u32| Ok(one_hot(step as usize + 2));
    let x = run(config, process, one_hot(1), &mut oracle(mu, s2), &mut noise);
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
        let (found_mean, found_variance) = pushed_through(&config, &discrete(), mu, s2);
        assert!((found_mean - mean).abs() < 5e-6, "{config:?}: mean {found_mean}, expected {mean}");
        let error = (found_variance - variance).abs();
        assert!(error < 2e-5, "{config:?}: variance {found_variance}, expected {variance}");
    }
}

/// The solution of the ODE is x(σ) = mu + (x - mu) √((s2 + σ²) / (s2 + σ_max²)).
#[test]
fn every_solver_brings_gaussian_data_to_their_mean_and_variance_as_fast_as_its_order_says() {
    let (mu, s2) = (0.3, 0.25);
    let error = |kind: SamplerKind, steps: usize, process: &Process| {
        let config =
            SamplerConfig { spacing: Spacing::Linspace, karras_sigmas: true, ..of_kind(kind, steps) };
        let (mean, variance) = pushed_through(&config, process, mu, s2);
        assert!((mean - mu).abs() < 0.01, "{kind:?}: mean {mean}");
        (variance / s2 - 1.0).abs()
    };
    for process in [edm(), discrete()] {
        for (kind, at_50) in SOLVERS.into_iter().zip([0.02, 0.02, 0.02, 0.02, 0.15]) {
            let found = error(kind, 50, &process);
            assert!(found < at_50, "{kind:?}: variance off by {found}");
        }
    }
    for (kind, order) in [
        (SamplerKind::Euler, 1.0),
        (SamplerKind::Heun, 2.0),
        (SamplerKind::DpmSolver, 2.0),
        (SamplerKind::UniPc, 2.5),
    ] {
        let found = (error(kind, 20, &edm()) / error(kind, 40, &edm())).log2();
        assert!(found > order - 0.25, "{kind:?}: order {found}");
    }
}

/// Song et al. 2021, §4.1.
#[test]
fn ddim_with_eta_1_at_all_steps_is_ancestral_sampling_with_the_small_variance() {
    let run = |config: SamplerConfig| {
        let mut denoise = of_noise(|x, t| (x.sin().unwrap() * (0.5 + t / 2000.0)).unwrap());
        run(&config, &discrete(), wave(u32::MAX, 64), &mut denoise, &mut |step| Ok(wave(step, 64)))
    };
    let (implicit, ancestral) = (run(ddim(1000, 1.0)), run(ddpm(1000, Variance::FixedSmall)));
    let scale = ancestral.iter().fold(0f32, |m, v| m.max(v.abs()));
    for (a, b) in implicit.iter().zip(&ancestral) {
        assert!((a - b).abs() < 1e-3 * scale, "{a} {b}");
    }
}

/// Song et al. 2021, §4.3: DDIM's step is Euler's in σ.
#[test]
fn ddim_without_noise_is_euler() {
    let run = |kind| {
        let mut denoise = of_noise(|x, t| (x.sin().unwrap() * (0.5 + t / 2000.0)).unwrap());
        run(&of_kind(kind, 20), &discrete(), wave(u32::MAX, 64), &mut denoise, &mut |_| unreachable!())
    };
    for (a, b) in run(SamplerKind::Ddim).iter().zip(run(SamplerKind::Euler)) {
        assert!((a - b).abs() < 1e-4 * a.abs().max(1.0), "{a} {b}");
    }
}

#[test]
fn a_run_that_was_saved_and_resumed_gives_the_same_bits() {
    let solvers = SOLVERS.map(|kind| of_kind(kind, 20));
    let ancestral = [SamplerKind::SdeDpmSolver, SamplerKind::EulerAncestral].map(|kind| of_kind(kind, 20));
    let pndm =
        [false, true].map(|skip| with(SamplerKind::Pndm, 20, |config| config.step.skip_prk_steps = skip));
    let churned = with(SamplerKind::Heun, 20, |config| config.step.churn.amount = 5.0);
    let others = [ddpm(20, Variance::FixedLarge), ddim(20, 0.5), churned];
    for config in others.into_iter().chain(solvers).chain(ancestral).chain(pndm) {
        let mut config = config;
        config.step.clip = Some(1.0);
        let plan = Plan::new(&config, &discrete()).unwrap();
        let run = |start: Start, saved: &mut Vec<(usize, Trajectory)>| {
            let mut denoise = of_noise(|x, t| (x.cos().unwrap() * (t / 1000.0)).unwrap());
            let mut noise = |step| Ok(wave(step, 8));
            let mut save = |done, at: &Trajectory| {
                saved.push((done, at.clone()));
                Ok(())
            };
            values(&sample(&config, &plan, start, &mut denoise, &mut noise, &mut save).unwrap())
        };
        let mut saved = Vec::new();
        let straight = run(Start::Noise(wave(u32::MAX, 8)), &mut saved);
        assert_eq!(saved.len(), 20);
        let again = |at: usize| {
            let (done, trajectory) = saved[at].clone();
            assert_eq!(done, at + 1);
            run(Start::Saved(done, trajectory), &mut Vec::new())
        };
        assert_eq!(again(6), straight, "{config:?}");
        assert_eq!(again(19), straight, "{config:?}");
    }
}

#[test]
fn elements_do_not_depend_on_the_batch() {
    let run = |from: usize, n: usize| {
        let mut denoise = of_noise(|x, t| (x.sin().unwrap() * (t / 1000.0)).unwrap());
        let part = |x: Tensor| Ok(x.narrow(0, from, n)?);
        let noise = part(wave(u32::MAX, 300)).unwrap();
        let config = ddpm(10, Variance::FixedSmall);
        run(&config, &discrete(), noise, &mut denoise, &mut |step| part(wave(step, 300)))
    };
    assert_eq!(run(0, 300)[101], run(101, 1)[0]);
    assert_eq!(run(0, 300)[101..120], run(101, 19));
}

/// `set_timesteps(n)` of `diffusers` 0.42.1: DDIMScheduler, then DPMSolverMultistepScheduler and
/// EulerDiscreteScheduler.
#[test]
fn timesteps_are_those_of_diffusers() {
    let at = |kind, spacing, steps, steps_offset| {
        SamplerConfig { spacing, steps_offset, ..of_kind(kind, steps) }.timesteps(&schedule()).unwrap()
    };
    let ddim = SamplerKind::Ddim;
    assert_eq!(at(ddim, Spacing::Leading, 4, 0), [750.0, 500.0, 250.0, 0.0]);
    assert_eq!(at(ddim, Spacing::Leading, 3, 1), [667.0, 334.0, 1.0]);
    assert_eq!(at(ddim, Spacing::Trailing, 3, 0), [999.0, 666.0, 332.0]);
    assert_eq!(at(ddim, Spacing::Linspace, 4, 0), [999.0, 666.0, 333.0, 0.0]);
    assert_eq!(at(ddim, Spacing::Leading, 1000, 0)[..3], [999.0, 998.0, 997.0]);
    let solver = SamplerKind::DpmSolver;
    assert_eq!(at(solver, Spacing::Linspace, 4, 0), [999.0, 749.0, 500.0, 250.0]);
    assert_eq!(at(solver, Spacing::Leading, 4, 1), [801.0, 601.0, 401.0, 201.0]);
    assert_eq!(at(solver, Spacing::Trailing, 4, 0), [999.0, 749.0, 499.0, 249.0]);
    assert_eq!(at(SamplerKind::Euler, Spacing::Linspace, 5, 0), [999.0, 749.25, 499.5, 249.75, 0.0]);
}

#[test]
fn any_number_of_steps_has_a_plan() {
    let process = discrete();
    for kind in [SamplerKind::Ddim, SamplerKind::DpmSolver, SamplerKind::Heun] {
        for spacing in [Spacing::Leading, Spacing::Trailing, Spacing::Linspace] {
            for steps in 1..=499 {
                let plan = Plan::new(&SamplerConfig { spacing, ..of_kind(kind, steps) }, &process).unwrap();
                assert_eq!(plan.strides().len(), steps);
                assert!(plan.strides().iter().all(|stride| stride.from.sigma > stride.to.sigma));
            }
        }
    }
}

#[test]
fn settings_that_do_not_fit_the_schedule_are_refused() {
    let error = |config: SamplerConfig| Plan::new(&config, &discrete()).unwrap_err().to_string();
    assert_eq!(
        error(ddim(1001, 0.0)),
        "the sampler's steps are 1001, expected from 1 to 1000, the steps in training"
    );
    assert_eq!(error(ddim(10, 1.5)), "eta is 1.5, expected from 0 to 1");
    let offset = SamplerConfig { steps_offset: 1, ..ddim(1000, 0.0) };
    assert_eq!(
        error(offset),
        "with 1000 steps and steps_offset 1 the first step is 1000, expected below 1000: lower steps"
    );
    assert_eq!(
        error(of_kind(SamplerKind::DpmSolver, 1000)),
        "1000 steps of this sampler visit step 0 of 1000 twice, expected fewer steps"
    );
}

/// Hashes of the steps of all counts that diffusers places, by tests/golden/schedulers.py.
#[test]
fn all_numbers_of_steps_are_placed_as_numpy_does() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/timesteps.json");
    let golden: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    for (name, kind) in
        [("ddim", SamplerKind::Ddim), ("dpm-solver++", SamplerKind::DpmSolver), ("euler", SamplerKind::Euler)]
    {
        for spacing in [Spacing::Leading, Spacing::Trailing, Spacing::Linspace] {
            let expected = &golden[format!("{name} {spacing}")];
            let surplus = expected["one_too_many"].as_array().unwrap();
            let mut hash = 0xcbf2_9ce4_8422_2325;
            for steps in (1..=1000u64).filter(|steps| surplus.iter().all(|n| n != *steps)) {
                let config = SamplerConfig { spacing, ..of_kind(kind, steps as usize) };
                for t in config.timesteps(&schedule()).unwrap_or_default() {
                    hash = (t as f32).to_le_bytes().into_iter().fold(hash, fnv);
                }
            }
            assert_eq!(expected["fnv"], format!("{hash:016x}"), "{name} {spacing}");
        }
    }
}

#[test]
fn no_signal_is_left_at_the_last_step_of_a_schedule_that_is_rescaled() {
    let plain = schedule();
    let rescaled = schedule().with_zero_terminal_snr(1e-20).unwrap();
    assert!((rescaled.level(0).sigma / plain.level(0).sigma - 1.0).abs() < 1e-9);
    assert!((rescaled.level(999).sigma / 1e10 - 1.0).abs() < 1e-9);
    assert!(rescaled.level(998).sigma > plain.level(998).sigma);
}

#[test]
fn noise_alone_is_not_asked_for_the_noise_in_it() {
    let process = Process::Discrete(schedule().with_zero_terminal_snr(1e-20).unwrap());
    let plan = |spacing, prediction| {
        let config = with(SamplerKind::Ddim, 10, |config| {
            (config.spacing, config.step.prediction) = (spacing, prediction);
        });
        Plan::new(&config, &process)
    };
    assert!(plan(Spacing::Leading, Prediction::Epsilon).is_ok());
    assert!(plan(Spacing::Trailing, Prediction::Velocity).is_ok());
    let error = plan(Spacing::Trailing, Prediction::Epsilon).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("nothing of the image is left"), "{error}");
}
