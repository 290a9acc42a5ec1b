//! Samplers, predictions and conditioning through the program.

use std::{collections::HashMap, path::Path};

use arrow_array::Int64Array;
use candle_core::{DType, Device, Tensor};
use proxyset::data::table::{self, Table};
use serde_json::Value;

use crate::{
    pipeline::SMALL,
    run::{TINY_UNET, fails, files, kill_after, made, ok, shards},
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
        for sampler in ["ddpm", "ddim", "dpm-solver++", "ipndm", "heun", "euler"] {
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
    let said = "guidance is 3, expected 1: ";
    fails(
        &generate(&made().path("generator"), 3.0, &path("none")),
        2,
        &[said, "was not trained with a null class"],
    );
    assert!(!Path::new(&path("none")).exists());
}

/// The predictions of earlier steps are part of the saved state.
#[test]
fn samplers_that_remember_survive_kills() {
    let dir = tempfile::tempdir().unwrap();
    for sampler in ["dpm-solver++", "ipndm"] {
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
