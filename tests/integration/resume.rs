//! Killed at any point, split over processes, with other numbers of threads and batch sizes: the same bytes.

use std::{path::Path, time::Duration};

use crate::run::{TINY_UNET, files, kill_after, made, ok, proxyset, shards, start};

/// Ancestral sampling draws noise at every step, so every step has to be reproduced.
const POOL: &str = "--count 192 --shard-rows 64 --micro-batch 16 --sampler ddpm --steps 60 --seed 5";

fn generate(out: &str, more: &str) -> String {
    format!("generate --model {} {POOL} --out {out} --quiet {more}", made().path("generator"))
}

#[test]
fn a_pool_does_not_depend_on_threads_batch_or_machine_share() {
    let dir = tempfile::tempdir().unwrap();
    let out = |name: &str| dir.path().join(name).display().to_string();
    ok(&generate(&out("one"), "--threads 1"));
    let expected = shards(&out("one"));
    assert_eq!(expected.len(), 3);
    ok(&generate(&out("two"), "--threads 2 --batch 64"));
    assert!(shards(&out("two")) == expected, "2 threads and batch 64 changed the pool");
    ok(&generate(&out("batch"), "--threads 2 --batch 16"));
    assert!(shards(&out("batch")) == expected, "batch 16 changed the pool");
    ok(&generate(&out("workers"), "--threads 2 --workers 2"));
    assert!(shards(&out("workers")) == expected, "two workers changed the pool");

    let share = ok(&generate(&out("split"), "--shards 1..3 --json"));
    assert!(share.contains("\"missing\""), "{share}");
    assert!(!Path::new(&out("split")).join("done.json").exists());
    ok(&generate(&out("split"), "--shards 0..1"));
    assert!(Path::new(&out("split")).join("done.json").exists());
    assert!(shards(&out("split")) == expected, "two processes' shares are another pool");
}

#[test]
fn a_pool_keeps_to_one_device_class_unless_it_is_told_to_mix() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("pool").display().to_string();
    ok(&generate(&out, "--shards 0..1"));
    let before = files(Path::new(&out));
    let folder = Path::new(&out).join("pool");
    let record = std::fs::read_to_string(folder.join("shard-00000.json")).unwrap();
    let record: serde_json::Value = serde_json::from_str(&record).unwrap();
    let class = record["device_class"].as_str().unwrap();
    let elsewhere =
        |more: &str| proxyset(&generate(&out, more)).env("PROXYSET_CONV", "direct").output().unwrap();
    for share in ["", "--shards 1..2"] {
        let refused = elsewhere(share);
        assert_eq!(refused.status.code(), Some(2));
        let said = String::from_utf8(refused.stderr).unwrap();
        let said_of = format!("shard 0 was made on device class {class}, expected {class}-direct");
        assert!(said.contains(&said_of) && said.contains(&folder.display().to_string()), "{said}");
        assert!(files(Path::new(&out)) == before, "a refusal left something behind");
    }
    assert!(elsewhere("--mix-device-classes true").status.success());
    assert_eq!(shards(&out).len(), 3);
    assert!(Path::new(&out).join("done.json").exists());
}

#[test]
fn a_pool_survives_three_kills() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, killed) = (dir.path().join("whole"), dir.path().join("killed"));
    let (whole, killed) = (whole.display().to_string(), killed.display().to_string());
    let started = std::time::Instant::now();
    ok(&generate(&whole, "--threads 1"));
    let took = started.elapsed();
    // Moments that differ from run to run; whatever they are, the result must not.
    let mut jitter = std::process::id() % 97;
    for workers in 1..=3 {
        let mut child = start(&generate(&killed, &format!("--threads 1 --workers {workers}")));
        jitter = (jitter * 31 + 17) % 97;
        std::thread::sleep(took.mul_f64(0.1 + 0.3 * f64::from(jitter) / 97.0));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    ok(&generate(&killed, "--threads 2"));
    assert!(shards(&killed) == shards(&whole));
    assert_eq!(files(Path::new(&killed)).len(), files(Path::new(&whole)).len(), "something was left over");
}

/// The named files are the same from a run that is killed twice, on two threads, as from an uninterrupted one on
/// one thread. Returns the killed run's folder, inside the temporary folder that keeps it.
fn survives_kills(verb: &str, files: &[&str]) -> (String, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let out = |name: &str| dir.path().join(name).display().to_string();
    let command = |out: &str| format!("{verb} --quiet --out {out}");
    let started = std::time::Instant::now();
    ok(&format!("{} --threads 1", command(&out("whole"))));
    let took = started.elapsed();
    let killed = format!("{} --threads 2", command(&out("killed")));
    for share in [0.2, 0.35] {
        kill_after(&killed, took.mul_f64(share));
    }
    ok(&killed);
    for file in files {
        let read = |name: &str| std::fs::read(Path::new(&out(name)).join(file)).unwrap();
        assert!(read("killed") == read("whole"), "{file} of {verb} differs");
    }
    (out("killed"), dir)
}

#[test]
fn a_generator_survives_kills_bit_for_bit() {
    let verb = format!("fit-generator --split {} {TINY_UNET} --steps 150", made().path("split"));
    survives_kills(&verb, &["unet/diffusion_pytorch_model.safetensors"]);
}

#[test]
fn a_robust_classifier_survives_kills_bit_for_bit() {
    let settings = "--steps 60 --batch 32 --channels 8,8 --groups 4 --attack-steps 3 --eval-every 20";
    let verb = format!("train --split {} {settings}", made().path("split"));
    survives_kills(&verb, &["model.safetensors"]);
}

/// Batch statistics are part of the state, and of the moving average.
#[test]
fn a_classifier_with_batch_norm_survives_kills_bit_for_bit() {
    let settings = "--objective trades --architecture resnet --channels 8,8 --blocks 1,1 --standardize true \
        --steps 40 --batch 32 --attack-steps 3 --attack-batch-norm train --eval-every 20";
    let verb = format!("train --split {} {settings}", made().path("split"));
    survives_kills(&verb, &["model.safetensors"]);
}

#[test]
fn a_classifier_of_mixed_and_stretched_images_for_smoothing_survives_kills_bit_for_bit() {
    let settings = "--objective smooth-adv --attack-steps 2 --cutmix 0.5 --crop-area 0.3 --nesterov false \
        --architecture resnet --block preactivation --channels 8,8 --blocks 1,1 --steps 40 --batch 32 --eval-every 20";
    let verb = format!("train --split {} {settings}", made().path("split"));
    survives_kills(&verb, &["model.safetensors"]);
}

#[test]
fn an_evaluation_survives_kills_verdict_for_verdict() {
    let settings = "--limit 80 --epsilon 0.05 --attack autoattack --save-adversarial true";
    let verb = format!("evaluate --model {} {settings}", made().path("classifier"));
    survives_kills(&verb, &["adversarial.safetensors", "images.parquet"]);
}

#[test]
fn an_evaluation_has_the_same_verdicts_in_windows_of_all_sizes_and_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let out = |name: &str| dir.path().join(name).display().to_string();
    let command = |attack: &str, batch: usize, out: &str| {
        let settings = "--limit 70 --epsilon 0.05 --save-adversarial true --quiet";
        let model = made().path("classifier");
        format!("evaluate --model {model} {settings} --attack {attack} --batch {batch} --out {out}")
    };
    for attack in ["pgd", "apgd-t"] {
        let name = |of: &str| out(&format!("{attack}-{of}"));
        let started = std::time::Instant::now();
        ok(&command(attack, 64, &name("64")));
        let took = started.elapsed();
        ok(&command(attack, 1, &name("1")));
        let killed = name("killed");
        kill_after(&command(attack, 7, &killed), took.mul_f64(0.5));
        ok(&command(attack, 7, &killed));
        for file in ["images.parquet", "adversarial.safetensors"] {
            let read = |of: &str| std::fs::read(Path::new(&name(of)).join(file)).unwrap();
            assert!(read("1") == read("64"), "{file} of {attack} in windows of 1");
            assert!(read("killed") == read("64"), "{file} of {attack} in windows of 7 after a kill");
        }
    }
}

#[test]
fn a_certification_survives_kills_certificate_for_certificate() {
    let settings = "--limit 60 --sigma 0.2 --n0 20 --n 200";
    let verb = format!("certify --model {} {settings}", made().path("classifier"));
    survives_kills(&verb, &["images.parquet"]);
}

#[test]
fn discriminators_arc_scores_the_selection_and_its_data_survive_kills_byte_for_byte() {
    let (split, pool, labels) = (made().path("split"), made().path("pool"), made().path("labels"));
    let settings = "--steps 30 --batch 32 --channels 8,8 --attack-steps 2 --eval-every 10";
    let verb = format!("fit-discriminator --split {split} --pool {pool} {settings}");
    let nets = ["rank0-0", "rank0-3", "rank1-2", "judge-1"].map(|net| format!("{net}/model.safetensors"));
    let nets: Vec<&str> = nets.iter().map(String::as_str).collect();
    let (discriminators, _kept) = survives_kills(&verb, &[&nets[..], &["sets.json"]].concat());

    let inputs = format!("--split {split} --pool {pool} --discriminators {discriminators}");
    survives_kills(&format!("arc {inputs} --attack-steps 40 --batch 7"), &["arc.json", "arc.svg"]);

    let inputs = format!("{inputs} --labels {labels}");
    let verb = format!("score {inputs} --classifier {} --hash-features true", made().path("classifier"));
    let shards = [0, 1, 2].map(|shard| format!("scores/shard-{shard:05}.parquet"));
    let (scores, _kept) = survives_kills(&verb, &shards.each_ref().map(String::as_str));

    let rule = "--arm arc --keep-per-class 2 --allow-short true --require-agreement false \
        --near-duplicate-bits 1 --near-duplicate-by features";
    // Finished before it can be killed: here only the threads matter.
    let verb = format!("curate --scores {scores} {rule}");
    let selection = ["selection.parquet", "rejected.parquet", "select.json"];
    let (selection, _kept) = survives_kills(&verb, &selection);

    let verb = format!("materialize --split {split} --pool {pool} --selection {selection} --rows-per-file 3");
    let verb = format!("{verb} --with-pool true --scores {scores}");
    survives_kills(&verb, &["dataset/manifest.json", "dataset/README.md"]);
}

/// Weight decay of 1 at this learning rate multiplies the weights by -999 in each step, until they overflow.
#[test]
fn a_loss_that_is_not_finite_stops_with_70_and_the_last_checkpoint_stays() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("classifier");
    let settings =
        "--objective plain --channels 8,8 --batch 16 --learning-rate 1000 --weight-decay 1 --warmup-steps 1";
    let verb = format!("train --split {} {settings} --out {} --quiet", made().path("split"), out.display());
    let output = proxyset(&verb).env("PROXYSET_CHECKPOINT_SECONDS", "0").output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(70), "{stderr}");
    assert!(stderr.contains("lower learning_rate (the last good checkpoint is kept)"), "{stderr}");
    assert!(!out.join("done.json").exists() && !out.join("model.safetensors").exists());
    let hidden = std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().path());
    let mut checkpoints = hidden.into_iter().filter(|p| p.display().to_string().contains(".checkpoint"));
    assert!(std::fs::read_dir(checkpoints.next().unwrap()).unwrap().count() > 0);
}

#[test]
fn a_termination_signal_stops_within_seconds_with_75_and_the_work_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("generator").display().to_string();
    let verb = |steps: usize| {
        format!(
            "fit-generator --split {} {TINY_UNET} --steps {steps} --quiet --out {out}",
            made().path("split")
        )
    };
    let mut child = start(&verb(100_000));
    std::thread::sleep(Duration::from_secs(2));
    let killed = std::process::Command::new("kill").arg(child.id().to_string()).status().unwrap();
    assert!(killed.success());
    let asked = std::time::Instant::now();
    assert_eq!(child.wait().unwrap().code(), Some(75));
    assert!(asked.elapsed() < Duration::from_secs(10));
    assert!(
        std::fs::read_dir(&out).unwrap().any(|e| e
            .unwrap()
            .file_name()
            .to_string_lossy()
            .starts_with(".checkpoint"))
    );
}
