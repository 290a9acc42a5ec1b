//! Discriminators tell real images from synthetic ones by their content, not by how they were delivered.

use std::path::Path;

use proxyset::data::{OfficialSplit, Source, encode_png};
use serde_json::Value;

use crate::run::{fails, made, ok};

/// Images that are real.
const REAL: usize = 718;

/// Real digits after the first 718, each pixel at least `least`, taken as synthetic ones next to those 718: the
/// accuracies at each radius on stopping images of the ranking sets. Split, pool and discriminators are in folders
/// of `dir`.
fn told_apart(dir: &Path, least: u8, epsilons: &str) -> Vec<Vec<f64>> {
    let path = |name: &str| dir.join(format!("{name}-{least}")).display().to_string();
    let digits = "builtin:digits".parse::<Source>().unwrap().load(OfficialSplit::Train, None, 0).unwrap();
    let folder = dir.join(format!("folder-{least}"));
    for (i, label) in digits.labels.iter().enumerate().skip(REAL) {
        let class = folder.join(label.to_string());
        std::fs::create_dir_all(&class).unwrap();
        let pixels: Vec<u8> = digits.image(i).iter().map(|&pixel| pixel.max(least)).collect();
        std::fs::write(class.join(format!("{i:04}.png")), encode_png(&pixels, digits.shape)).unwrap();
    }
    ok(&format!("split --first {REAL} --out {}", path("split")));
    ok(&format!("import --source {} --shard-rows 500 --out {}", path("folder"), path("pool")));
    let fit = "--attack-steps 2 --attack-step-ratio 0.01 --steps 120 --channels 8,16 --eval-every 40 --learning-rate 5e-3";
    let (split, pool, out) = (path("split"), path("pool"), path("out"));
    let text = ok(&format!(
        "fit-discriminator --split {split} --pool {pool} --epsilons {epsilons} {fit} --json --out {out}"
    ));
    let summary: Value = serde_json::from_str(&text).unwrap();
    let sets = summary["summary"]["stop_accuracy"].as_array().unwrap();
    let radii = |set: &Value| set.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    sets[..2].iter().map(radii).collect()
}

#[test]
fn real_images_taken_for_synthetic_ones_are_not_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    // Of about 210 stopping images: chance is 0.5, its standard error 0.035.
    for set in told_apart(dir.path(), 0, "0,0.001,0.002,0.003") {
        assert!((0.37..=0.63).contains(&set[0]), "{set:?} by the way through folder, pool and PNG");
    }
}

#[test]
fn marked_images_are_told_apart_and_a_network_that_arc_s_attack_breaks_counts_as_the_constant_answer() {
    let dir = tempfile::tempdir().unwrap();
    // The mark is 0.125: at 0.15 nothing tells the two apart, but the attack in training goes a hundredth of the way.
    for set in told_apart(dir.path(), 32, "0,0.001,0.002,0.15") {
        assert!(set[0] > 0.85, "{set:?} although the ground is brighter: too short a training to tell");
        assert!(set[3] > 0.7, "{set:?}: not the weak attack that this test is about");
    }
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (split, pool, nets, out) = (path("split-32"), path("pool-32"), path("out-32"), path("arc"));
    let measure = "--attack-steps 10 --apgd-steps 5";
    ok(&format!("arc --split {split} --pool {pool} --discriminators {nets} {measure} --out {out}"));
    let arc: Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("arc/arc.json")).unwrap()).unwrap();
    for set in 0..2 {
        assert!(arc["stop_accuracy"][set][0].as_f64().unwrap() > 0.85, "{arc:#}");
        assert!(arc["stop_accuracy"][set][3].as_f64().unwrap() <= 0.5, "{arc:#}");
    }
    assert!(arc["curve"][0]["accuracy"].as_f64().unwrap() > 0.85, "{arc:#}");
    for (of, accuracy) in [("accuracy", 0.5), ("accuracy_real", 0.0), ("accuracy_synthetic", 1.0)] {
        assert_eq!(arc["curve"][3][of], accuracy, "{arc:#}");
    }
}

#[test]
fn networks_speak_of_the_split_and_the_pool_that_they_were_trained_with_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (split, pool, labels) = (made().path("split"), made().path("pool"), made().path("labels"));
    let (nets, out) = (path("nets"), path("out"));
    let tiny = "--steps 2 --batch 8 --channels 8,8 --attack-steps 1 --eval-every 2";
    ok(&format!("fit-discriminator --split {split} --pool {pool} {tiny} --out {nets}"));
    ok(&format!("split --seed 1 --out {}", path("split")));
    let generate = "--count 96 --shard-rows 32 --micro-batch 16 --steps 1 --seed 1";
    ok(&format!("generate --model {} {generate} --out {}", made().path("generator"), path("pool")));
    let others =
        [(path("split"), pool.clone(), "made with split"), (split.clone(), path("pool"), "made with pool")];
    for (split, pool, said) in others {
        let inputs = format!("--split {split} --pool {pool} --discriminators {nets} --out {out}");
        for verb in ["arc", &format!("score --labels {labels}")] {
            fails(&format!("{verb} {inputs}"), 2, &["discriminators is", said]);
            assert!(!Path::new(&out).exists());
        }
    }

    ok(&format!(
        "fit-discriminator --split {split} --pool {pool} {tiny} --judges false --out {}",
        path("unjudged")
    ));
    let inputs =
        format!("--split {split} --pool {pool} --labels {labels} --discriminators {}", path("unjudged"));
    fails(&format!("score {inputs} --out {out}"), 2, &["judges = false"]);
    // The ranking does not depend on whether there are judges.
    for net in ["rank0-0", "rank1-3"].map(|net| format!("{net}/model.safetensors")) {
        let weights = |nets: &str| std::fs::read(Path::new(nets).join(&net)).unwrap();
        assert!(weights(&nets) == weights(&path("unjudged")), "{net}");
    }

    let inputs = format!("--split {split} --pool {pool} --labels {labels} --discriminators {nets}");
    ok(&format!("score {inputs} --out {}", path("scores")));
    let rule = "--arm all --require-agreement false";
    ok(&format!("curate --scores {} {rule} --out {}", path("scores"), path("selection")));
    let data = |split: &str| {
        format!("materialize --split {split} --pool {pool} --selection {} --out {out}", path("selection"))
    };
    fails(&data(&path("split")), 2, &["selection is", "made with split"]);
    assert!(!Path::new(&out).exists());
    ok(&data(&split));
}
