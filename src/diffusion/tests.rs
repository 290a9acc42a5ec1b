//! Whole sampling loops compared with `diffusers`, from golden files that tests/golden/loops.py writes.

use std::{collections::HashMap, path::PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use serde_json::{Map, Value};

use super::{
    sampler::{Churn, Plan, SamplerKind, Start, Variance, sample},
    *,
};
use crate::{
    Result,
    nn::{
        DenoiserArchitecture, DenoiserNetwork, Params, UNetConfig,
        optim::{Adam, AdamConfig, Optimizer, clip_scale, grad_norm},
        originals::Original,
    },
};

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn nhwc(images: &Tensor) -> Tensor {
    images.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap()
}

/// The images of a case, whose name is JSON.
fn images(model: &DiffusionModel, case: &str, tensors: &HashMap<String, Tensor>) -> Result<Tensor> {
    let mut options: Map<String, Value> = serde_json::from_str(case).unwrap();
    let mut number = |key: &str| options.remove(key).and_then(|value| value.as_f64());
    let steps = number("steps").unwrap() as usize;
    let eta = number("eta").unwrap_or(0.0);
    let churn = Churn {
        amount: number("S_churn").unwrap_or(0.0),
        min: number("S_min").unwrap_or(0.0),
        max: number("S_max").unwrap_or(f64::INFINITY),
        noise: number("S_noise").unwrap_or(1.0),
    };
    let class = match options.remove("kind").unwrap().as_str().unwrap() {
        "ddpm" => "DDPMScheduler",
        "ddim" => "DDIMScheduler",
        "pndm" => "PNDMScheduler",
        "dpm-solver++" | "sde-dpm-solver++" => "DPMSolverMultistepScheduler",
        "unipc" => "UniPCMultistepScheduler",
        "euler" => "EulerDiscreteScheduler",
        "euler-ancestral" => "EulerAncestralDiscreteScheduler",
        "heun" => "HeunDiscreteScheduler",
        _ => "EDMEulerScheduler",
    };
    options.insert("_class_name".into(), class.into());
    let scheduler = SchedulerConfig::from_json(options, None, &mut Vec::new())?;
    let mut config = sampler::SamplerConfig { steps, ..scheduler.sampler() };
    (config.step.eta, config.step.churn) = (eta, churn);
    if case.contains("S_churn") {
        config.kind = SamplerKind::Heun;
    }
    let plan = Plan::new(&config, &scheduler.process()?)?;
    // Where a variance is learned, tests/golden/schedulers.py makes one of the image.
    let network = |x: &Tensor, t: f64| {
        let output = model.predict(x, t, None)?;
        let share = (x * 3.0)?.sin()?;
        Ok(match config.step.variance {
            Variance::LearnedRange => Tensor::cat(&[output, share], 3)?,
            Variance::Learned => Tensor::cat(&[output, share.affine(1e-3, 1.5e-3)?], 3)?,
            _ => output,
        })
    };
    sample(
        &config,
        &plan,
        Start::Noise(nhwc(&tensors["noise"])),
        &mut |x, level| scheduler.prediction().denoise(x, level, &network),
        &mut |step| Ok(nhwc(&tensors[&format!("fresh.{step}")])),
        &mut |_, _| Ok(()),
    )
}

/// The folder is as `save_pretrained` wrote it.
fn expect_images_of(file: &str, count: usize) {
    let model = DiffusionModel::load(&golden("diffusers_model"), None, &Device::Cpu).unwrap();
    let tensors = candle_core::safetensors::load(golden(file), &Device::Cpu).unwrap();
    let mut cases: Vec<_> = tensors.keys().filter(|name| name.starts_with('{')).collect();
    cases.sort();
    assert_eq!(cases.len(), count);
    let max = |t: &Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    let mut failures = Vec::new();
    for case in cases {
        let expected = nhwc(&tensors[case]);
        let found = images(&model, case, &tensors).unwrap();
        let error = max(&(found - &expected).unwrap()) / max(&expected).max(1.0);
        println!("{error:.1e} {case}");
        if error.is_nan() || error > 1e-3 {
            failures.push(format!("{error:.1e} {case}"));
        }
    }
    assert!(failures.is_empty(), "off by more than 1e-3:\n{}", failures.join("\n"));
}

#[test]
fn the_same_noise_gives_the_images_of_diffusers() {
    expect_images_of("loops.safetensors", 48);
}

/// Those of EDM are of its own stochastic sampler.
#[test]
fn the_same_noise_gives_the_images_of_diffusers_with_multistep_ancestral_and_stochastic_samplers() {
    expect_images_of("schedulers.safetensors", 124);
}

/// Data, steps and noise are those that PyTorch recorded: tests/golden/training.py.
#[test]
fn ten_training_steps_are_those_of_pytorch() {
    let bytes = std::fs::read(golden("training.safetensors")).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let config: UNetConfig = serde_json::from_str(&header.metadata().as_ref().unwrap()["config"]).unwrap();
    let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap();
    let Process::Discrete(schedule) = SchedulerConfig::default().process().unwrap() else {
        panic!("the default is DDPM's")
    };
    for (name, prediction) in [("epsilon", Prediction::Epsilon), ("v_prediction", Prediction::Velocity)] {
        let params = Params::init(0, &Device::Cpu, |b| config.build(b)).unwrap();
        let before = tensors.iter().filter_map(|(k, v)| Some((k.strip_prefix("before.")?, v)));
        params.copy_from(before).unwrap();
        let network = params.tracked(|b| config.build(b)).unwrap();
        let mut adam = Adam::new(AdamConfig::default());
        let losses: Vec<f64> = tensors[&format!("{name}.losses")].to_vec1().unwrap();
        for (i, expected) in losses.into_iter().enumerate() {
            let tensor = |name: &str| &tensors[&format!("{name}.{i}")];
            let t: Vec<i64> = tensor("t").to_vec1().unwrap();
            let levels: Vec<Level> = t.into_iter().map(|t| schedule.level(t as usize)).collect();
            let labels = tensor("labels").to_dtype(DType::U32).unwrap();
            let pair =
                TrainingPair::new(prediction, &nhwc(tensor("x")), &levels, &nhwc(tensor("noise"))).unwrap();
            let found = train_step(&params, &*network, &mut adam, &pair, &labels);
            assert!((found - expected).abs() < 1e-4, "{name}, step {i}: loss {found}, expected {expected}");
        }
        let before = |key: &str| tensors[&format!("before.{key}")].clone();
        assert_moved(name, &params, &before, &|key| tensors[&format!("{name}.after.{key}")].clone());
    }
}

/// A step of Adam on the clipped gradients; returns the loss before it.
fn train_step(
    params: &Params,
    network: &dyn DenoiserNetwork,
    adam: &mut Adam,
    pair: &TrainingPair,
    labels: &Tensor,
) -> f64 {
    let losses = denoising_loss(pair, &|x, t| network.forward(x, t, Some(labels))).unwrap();
    let loss = losses.mean_all().unwrap();
    let grads = loss.backward().unwrap();
    let scale = clip_scale(grad_norm(params.vars(), &grads).unwrap(), 1.0);
    adam.step_scaled(params, &grads, scale, 1e-3).unwrap();
    f64::from(loss.to_scalar::<f32>().unwrap())
}

/// Parameters are where they should be, up to 1e-2 of their way.
fn assert_moved(
    what: &str,
    params: &Params,
    before: &dyn Fn(&str) -> Tensor,
    after: &dyn Fn(&str) -> Tensor,
) {
    let square = |t: Tensor| {
        t.to_dtype(DType::F64).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
    };
    let (mut off, mut moved) = (0.0, 0.0);
    for (key, found) in params.named(|var| Ok(var.as_detached_tensor())).unwrap() {
        off += square((&found - after(&key)).unwrap());
        moved += square((after(&key) - before(&key)).unwrap());
    }
    let error = (off / moved).sqrt();
    println!("{what}: weights off by {error:.1e} of their way");
    assert!(error <= 1e-2, "{what}: weights are off by {error:e} of their way");
}

/// The network is a small NCSN++, the preconditioning EDM's: tests/golden/denoisers.py.
#[test]
fn ten_training_steps_of_edms_loss_are_those_of_pytorch() {
    let Original { config, tensors, params, .. } = Original::read("edm_training");
    let before: HashMap<_, _> =
        params.named(|var| Ok(var.as_tensor().copy()?)).unwrap().into_iter().collect();
    let network = params.tracked(|b| config.build(b)).unwrap();
    let mut adam = Adam::new(AdamConfig::default());
    let losses: Vec<f64> = tensors["losses"].to_vec1().unwrap();
    for (i, expected) in losses.into_iter().enumerate() {
        let tensor = |name: &str| &tensors[&format!("{name}.{i}")];
        let sigmas: Vec<f32> = tensor("sigma").to_vec1().unwrap();
        let level = |sigma: f32| Level { sigma: sigma.into(), t: f64::from(sigma).ln() / 4.0 };
        let levels: Vec<Level> = sigmas.into_iter().map(level).collect();
        let prediction = Prediction::Edm { sigma_data: 0.5 };
        let pair =
            TrainingPair::new(prediction, &nhwc(tensor("x")), &levels, &nhwc(tensor("noise"))).unwrap();
        let labels = tensor("labels").to_dtype(DType::U32).unwrap();
        let found = train_step(&params, &*network, &mut adam, &pair, &labels);
        assert!((found - expected).abs() < 1e-4, "step {i}: loss {found}, expected {expected}");
    }
    assert_moved("NCSN++", &params, &|key| before[key].clone(), &|key| {
        tensors[&format!("after.{key}")].clone()
    });
}
