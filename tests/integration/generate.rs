//! Samplers, predictions and conditioning through the program.

use std::{cell::Cell, collections::HashMap, path::Path};

use arrow_array::Int64Array;
use candle_core::{DType, Device, Tensor};
use proxyset::data::table::{self, Table};
use serde_json::{Value, json};

use crate::{
    pipeline::SMALL,
    run::{TINY_UNET, fails, files, kill_after, made, ok, shards, succeeds},
};

const COUNT: usize = 20;

fn save_noise(path: &Path, count: usize) {
    let noise = Tensor::randn(0f32, 1.0, (count, 1, 8, 8), &Device::Cpu).unwrap();
    candle_core::safetensors::save(&HashMap::from([("noise", noise)]), path).unwrap();
}

fn floats(path: &Path) -> Tensor {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap().remove("images").unwrap()
}

fn pixels(images: &Tensor) -> Vec<f32> {
    images.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_sampler_makes_images_of_given_noise_with_every_prediction() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    save_noise(&path("noise.safetensors"), COUNT);
    for prediction in ["epsilon", "sample", "v-prediction", "edm"] {
        let prediction = prediction.replace('-', "_");
        let process = match &*prediction {
            "edm" => "--process edm".to_owned(),
            _ => format!("--prediction {prediction}"),
        };
        let model = path(&prediction).display().to_string();
        let settings = "--conditional false --steps 5 --dropout 0.1 --accumulate 2 --scale-shift true";
        ok(&format!(
            "fit-generator --split {} {TINY_UNET} {settings} {process} --out {model} --quiet",
            made().path("split")
        ));
        for sampler in [
            "ddpm",
            "ddim",
            "dpm-solver++",
            "sde-dpm-solver++",
            "unipc",
            "pndm",
            "ipndm",
            "heun",
            "euler",
            "euler-ancestral",
        ] {
            if (&*prediction, sampler) == ("edm", "pndm") {
                continue;
            }
            let out = path(&format!("{prediction}-{sampler}"));
            let float = out.join("images.safetensors");
            ok(&format!(
                "generate --model {model} --count {COUNT} --shard-rows 16 --micro-batch 8 --sampler {sampler} --steps 6 --quiet \
                 --initial-noise {} --save-float {} --out {}",
                path("noise.safetensors").display(),
                float.display(),
                out.display()
            ));
            let images = floats(&float);
            assert_eq!(images.dims(), [COUNT, 1, 8, 8], "{prediction} {sampler}");
            assert!(pixels(&images).iter().all(|v| v.is_finite()), "{prediction} {sampler}");
            let hidden = std::fs::read_dir(&out).unwrap();
            let left =
                hidden.filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with(".floats"));
            assert_eq!(left.count(), 0, "floats were left over");
        }
    }
}

/// `tests/golden/diffusers_model` is as `DDPMPipeline.save_pretrained` wrote it (loops.py): it has no classes.
#[test]
fn an_unconditional_folder_of_diffusers_gives_images_that_the_classifier_labels() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let model = format!("{}/tests/golden/diffusers_model", env!("CARGO_MANIFEST_DIR"));
    let pool = path("pool");
    ok(&format!(
        "generate --model {model} --count 40 --shard-rows 16 --micro-batch 8 --steps 3 --quiet --out {pool}"
    ));
    let labels = |file: &Path, column: &str| -> Vec<Option<i64>> {
        let batches = Table::open(file).unwrap().read(&[column], 64).unwrap();
        let of = |batch: &arrow_array::RecordBatch| {
            let array: &Int64Array = table::column(file, batch, column).unwrap();
            array.iter().collect::<Vec<_>>()
        };
        batches.flat_map(|batch| of(&batch.unwrap())).collect()
    };
    let first = dir.path().join("pool/pool/shard-00000.parquet");
    assert_eq!(labels(&first, "label"), vec![None; 16]);
    let label =
        format!("label --pool {pool} --classifier {} --out {}", made().path("classifier"), path("labels"));
    ok(&format!("{label} --quiet"));
    let first = dir.path().join("labels/labels/shard-00000.parquet");
    assert!(labels(&first, "label").iter().all(|label| label.is_some_and(|l| (0..10).contains(&l))));
    assert_eq!(labels(&first, "label"), labels(&first, "pseudo_label"));
}

#[test]
fn given_noise_belongs_to_its_image_and_must_fit() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let whole = dir.path().join("whole.safetensors");
    save_noise(&whole, COUNT);
    let noise = candle_core::safetensors::load(&whole, &Device::Cpu).unwrap().remove("noise").unwrap();
    // There are ten classes in turn, so image 10 is of the first class again. DDIM draws no noise of its own.
    let part = noise.narrow(0, 10, 10).unwrap().contiguous().unwrap();
    candle_core::safetensors::save(&HashMap::from([("noise", part)]), path("part.safetensors")).unwrap();
    let run = |count: usize, noise: &str, more: &str| {
        format!(
            "generate --model {} --count {count} --shard-rows 16 --micro-batch 8 --sampler ddim --steps 4 --quiet --initial-noise {noise} {more}",
            made().path("generator")
        )
    };
    let saved = |name: &str, count: usize, noise: &str| {
        let float = path(&format!("{name}.floats"));
        ok(&run(count, noise, &format!("--save-float {float} --out {}", path(name))));
        floats(Path::new(&float))
    };
    let (all, second) =
        (saved("all", COUNT, &whole.display().to_string()), saved("second", 10, &path("part.safetensors")));
    assert!(pixels(&all.narrow(0, 10, 10).unwrap()) == pixels(&second), "noise does not stay with its image");

    let out = format!("--out {}", path("none"));
    let shape = "'noise' has shape [10, 1, 8, 8], expected [20, 1, 8, 8]";
    fails(&run(COUNT, &path("part.safetensors"), &out), 65, &[shape]);
    let zeros = Tensor::zeros((1, 1), DType::F32, &Device::Cpu).unwrap();
    candle_core::safetensors::save(&HashMap::from([("x", zeros)]), path("other.safetensors")).unwrap();
    fails(&run(COUNT, &path("other.safetensors"), &out), 65, &["there is no tensor 'noise'"]);
    let both = format!("--save-float {} --shards 0..1 {out}", path("f"));
    fails(&run(COUNT, &whole.display().to_string(), &both), 2, &["save_float is set with shards"]);
    assert!(!Path::new(&path("none")).exists());
}

#[test]
fn guidance_needs_a_null_class_and_changes_the_images() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let model = path("model");
    ok(&format!(
        "fit-generator --split {} {TINY_UNET} --steps 20 --null-class-probability 0.3 --out {model} --quiet",
        made().path("split")
    ));
    let config: Value =
        serde_json::from_slice(&std::fs::read(format!("{model}/unet/config.json")).unwrap()).unwrap();
    assert_eq!(config["num_class_embeds"], 11);
    let generate = |model: &str, guidance: f64, out: &str| {
        format!(
            "generate --model {model} --count 16 --shard-rows 16 --micro-batch 8 --steps 4 --guidance {guidance} --save-float {out}.floats --quiet --out {out}"
        )
    };
    for guidance in [0.0, 1.0, 3.0] {
        ok(&generate(&model, guidance, &path(&format!("pool-{guidance}"))));
    }
    let images = |guidance: &str| pixels(&floats(Path::new(&path(&format!("pool-{guidance}.floats")))));
    assert!(images("1") != images("3") && images("0") != images("1"));
    // The same folder without class names: the flag tells what its proxyset.json told.
    std::fs::remove_file(format!("{model}/proxyset.json")).unwrap();
    ok(&format!("{} --null-class 10", generate(&model, 3.0, &path("told"))));
    assert!(pixels(&floats(Path::new(&path("told.floats")))) == images("3"));
    let wrong = format!("{} --null-class 11", generate(&model, 3.0, &path("none")));
    fails(&wrong, 2, &["null_class is 11, expected below 11"]);
    let said = "guidance is 3, expected 1: ";
    fails(
        &generate(&made().path("generator"), 3.0, &path("none")),
        2,
        &[said, "was not trained with a null class"],
    );
    assert!(!Path::new(&path("none")).exists());
}

/// Folders as people have them, made of the one that `DDPMPipeline.save_pretrained` wrote.
#[test]
fn folders_of_diffusers_are_read_as_diffusers_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/diffusers_model");
    let folder = |name: &str| {
        let copy = dir.path().join(name);
        for file in [
            "model_index.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "scheduler/scheduler_config.json",
        ] {
            std::fs::create_dir_all(copy.join(file).parent().unwrap()).unwrap();
            std::fs::copy(golden.join(file), copy.join(file)).unwrap();
        }
        copy
    };
    let edit = |folder: &Path, file: &str, values: Value| {
        let path = folder.join(file);
        let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        json.as_object_mut().unwrap().extend(values.as_object().unwrap().clone());
        std::fs::write(path, json.to_string()).unwrap();
    };
    let runs = Cell::new(0);
    let generate = |model: &Path, more: &str| {
        runs.set(runs.get() + 1);
        let out = dir.path().join(format!("pool-{}", runs.get()));
        let model = model.display();
        let command = format!(
            "generate --model {model} --count 4 --shard-rows 4 --micro-batch 4 --save-float {0}.floats --out {0} {more}",
            out.display()
        );
        (command, out)
    };
    let made_by = |model: &Path, more: &str, said: &[&str]| {
        let (command, out) = generate(model, more);
        succeeds(&command, said);
        pixels(&floats(&out.with_extension("floats")))
    };
    let refused = |model: &Path, more: &str, said: &[&str]| {
        let (command, out) = generate(model, more);
        fails(&command, 65, said);
        assert!(!out.exists(), "{command}: something was made");
    };
    let close = |a: &[f32], b: &[f32], tolerance: f32| {
        let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= tolerance, "off by {worst}");
    };
    let steps = "--steps 5";
    let plain = made_by(&folder("plain"), steps, &[]);

    // What `--use_ema` of train_unconditional.py, and another scheduler class, leave in the files.
    let ema = folder("ema");
    edit(&ema, "unet/config.json", json!({"decay": 0.9999, "power": 0.75, "use_ema_warmup": true}));
    let said = ["decay, power, use_ema_warmup belong to a moving average: ignored"];
    assert!(made_by(&ema, steps, &said) == plain);
    let swapped = folder("swapped");
    let scheduler = "scheduler/scheduler_config.json";
    edit(&swapped, scheduler, json!({"skip_prk_steps": true, "solver_order": 3, "_use_default_values": []}));
    let said = ["a DDPMScheduler has no skip_prk_steps, solver_order: ignored"];
    assert!(made_by(&swapped, steps, &said) == plain);
    edit(&swapped, scheduler, json!({"beta_shape": 2}));
    refused(&swapped, steps, &["beta_shape is 2, expected no such key"]);

    // A class that is not built has a noise schedule nevertheless; the index decides.
    let lms = folder("lms");
    edit(&lms, scheduler, json!({"_class_name": "LMSDiscreteScheduler"}));
    edit(&lms, "model_index.json", json!({"scheduler": ["diffusers", "LMSDiscreteScheduler"]}));
    refused(&lms, steps, &["LMSDiscreteScheduler", "--sampler chooses one for its noise"]);
    let ddim = folder("ddim");
    edit(&ddim, "model_index.json", json!({"scheduler": ["diffusers", "DDIMScheduler"]}));
    let said = ["the scheduler is a DDIMScheduler, as model_index.json says, not a \"DDPMScheduler\""];
    let of_index = made_by(&ddim, "--steps 4", &said);
    assert!(made_by(&lms, "--sampler ddim --steps 4", &[]) == of_index);
    // The last of all steps cannot be visited with an offset.
    edit(&ddim, scheduler, json!({"steps_offset": 1}));
    made_by(&ddim, "", &[]);

    // Weights of a variant, in parts, and both.
    let weights = "unet/diffusion_pytorch_model.safetensors";
    let tensors = candle_core::safetensors::load(golden.join(weights), &Device::Cpu).unwrap();
    let half = |names: &[&String], path: &Path| {
        let of = |name: &&String| ((**name).clone(), tensors[*name].to_dtype(DType::F16).unwrap());
        candle_core::safetensors::save(&names.iter().map(of).collect::<HashMap<_, _>>(), path).unwrap();
    };
    let mut names: Vec<&String> = tensors.keys().collect();
    names.sort();
    let variant = folder("variant");
    std::fs::remove_file(variant.join(weights)).unwrap();
    refused(
        &variant,
        steps,
        &["no weights: expected diffusion_pytorch_model.safetensors, found config.json"],
    );
    half(&names, &variant.join("unet/diffusion_pytorch_model.fp16.safetensors"));
    let rounded = made_by(&variant, steps, &["the weights are those of the variant fp16"]);
    close(&rounded, &plain, 0.05);
    let parts = folder("parts");
    std::fs::remove_file(parts.join(weights)).unwrap();
    let (first, second) = names.split_at(names.len() / 2);
    let mut map = serde_json::Map::new();
    for (i, part) in [first, second].into_iter().enumerate() {
        let file = format!("diffusion_pytorch_model-{:05}-of-00002.safetensors", i + 1);
        half(part, &parts.join("unet").join(&file));
        map.extend(part.iter().map(|name| ((*name).clone(), file.clone().into())));
    }
    let index = json!({"metadata": {}, "weight_map": map}).to_string();
    std::fs::write(parts.join("unet/diffusion_pytorch_model.safetensors.index.json"), index).unwrap();
    assert!(made_by(&parts, steps, &[]) == rounded);

    // Channels that do not fit.
    let wide = folder("wide");
    edit(&wide, "unet/config.json", json!({"out_channels": 2}));
    refused(&wide, steps, &["conv_out.weight has shape [1, 16, 3, 3], expected [2, 16, 3, 3]"]);
    let learned = folder("learned");
    edit(&learned, "unet/config.json", json!({"out_channels": 2}));
    let network = tensors.iter().map(|(name, tensor)| match &**name {
        "conv_out.weight" | "conv_out.bias" => (name.clone(), Tensor::cat(&[tensor, tensor], 0).unwrap()),
        _ => (name.clone(), tensor.clone()),
    });
    candle_core::safetensors::save(&network.collect::<HashMap<_, _>>(), learned.join(weights)).unwrap();
    refused(&learned, steps, &["the network predicts a variance (out_channels is twice in_channels)"]);
    edit(&learned, scheduler, json!({"variance_type": "learned_range"}));
    made_by(&learned, steps, &[]);
    let alone = folder("alone");
    edit(&alone, scheduler, json!({"variance_type": "learned"}));
    refused(&alone, steps, &["the network predicts none"]);
}

/// The predictions of earlier steps are part of the saved state.
#[test]
fn samplers_that_remember_survive_kills() {
    let dir = tempfile::tempdir().unwrap();
    for sampler in ["dpm-solver++", "unipc", "pndm"] {
        let path = |name: &str| dir.path().join(format!("{sampler}-{name}")).display().to_string();
        let generate = |out: &str| {
            format!(
                "generate --model {} --count 64 --shard-rows 64 --micro-batch 16 --sampler {sampler} --steps 60 --threads 1 \
                 --quiet --out {out}",
                made().path("generator")
            )
        };
        let started = std::time::Instant::now();
        ok(&generate(&path("whole")));
        let took = started.elapsed();
        let mut states = 0;
        for share in [0.4, 0.8] {
            kill_after(&generate(&path("killed")), took.mul_f64(share));
            states += count_states(Path::new(&path("killed")));
        }
        assert!(states > 0, "no kill came between two steps of {sampler}");
        ok(&generate(&path("killed")));
        assert!(shards(&path("killed")) == shards(&path("whole")), "{sampler} went on otherwise");
    }
}

fn count_states(dir: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let of = |entry: std::fs::DirEntry| {
        let path = entry.path();
        if path.is_dir() {
            count_states(&path)
        } else {
            usize::from(path.extension().is_some_and(|e| e == "state"))
        }
    };
    entries.map(|entry| of(entry.unwrap())).sum()
}

#[test]
fn a_generators_log_has_the_loss_by_noise_and_on_unseen_images_and_its_sheets_are_png() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("generator");
    ok(&format!(
        "fit-generator --split {} {TINY_UNET} --steps 30 --validate-every 15 --sample-every 15 --out {} --quiet",
        made().path("split"),
        out.display()
    ));
    let log = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let validated: Vec<_> = lines.iter().filter(|line| line["validation_loss"].is_f64()).collect();
    assert_eq!(validated.len(), 2);
    assert_eq!(validated[1]["step"], 30);
    assert_eq!(lines.last().unwrap()["loss_by_noise"].as_array().unwrap().len(), 4);
    let sheets = files(&out.join("samples"));
    assert_eq!(sheets.len(), 2);
    assert!(sheets.iter().all(|(_, bytes)| bytes.starts_with(b"\x89PNG")));
}

/// No image has a class when it is made; the labeller gives it one, and later stages see no difference.
#[test]
fn the_pool_of_an_unconditional_model_becomes_a_labelled_data_set() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let digits = format!("{}/pipelines/digits.toml", env!("CARGO_MANIFEST_DIR"));
    let settings = "--until materialize --set fit-generator.conditional=false --set generate.guidance=1.0 \
        --set curate.keep_per_class=2 --set curate.allow_short=true";
    ok(&format!("run {digits} --quiet --out {} {SMALL} {settings}", run.display()));
    ok(&format!("check {}", run.display()));
    let folder = |stage: &str| {
        let folders = std::fs::read_dir(&run).unwrap().map(|e| e.unwrap().path());
        folders.into_iter().find(|f| f.file_name().unwrap().to_string_lossy().starts_with(stage)).unwrap()
    };
    let card = std::fs::read_to_string(folder("materialize").join("dataset/README.md")).unwrap();
    assert!(card.contains("**Labels** are a classifier's"), "{card}");
}

#[test]
fn quality_gives_every_figure_with_its_number_of_images() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("quality").display().to_string();
    let quality = |more: &str| {
        format!(
            "quality --pool {} --classifier {} --out {out} {more}",
            made().path("pool"),
            made().path("classifier")
        )
    };
    fails(&quality("--neighbours 0"), 2, &["neighbours is 0, expected 1 to"]);
    let summary: Value = serde_json::from_str(&ok(&quality("--limit 200 --json --quiet"))).unwrap();
    let summary = summary.get("summary").unwrap_or(&summary);
    assert_eq!((&summary["real_images"], &summary["synthetic_images"]), (&200.into(), &96.into()));
    assert_eq!(summary["images_of_class_accuracy"], 96);
    // Samples of a barely trained model are further from digits than digits are from digits.
    let (pool, halves) = (&summary["frechet_distance"], &summary["frechet_distance_of_real_halves"]);
    assert!(pool.as_f64().unwrap() > halves.as_f64().unwrap(), "{summary}");
}
