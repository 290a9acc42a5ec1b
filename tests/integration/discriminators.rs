//! Discriminators tell real images from synthetic ones by what the images are, not by how they came.

use std::path::Path;

use proxyset::data::{Source, Split, encode_png};
use serde_json::Value;

use crate::run::ok;

/// Images that are real.
const REAL: usize = 718;

/// Real digits after the first 718, each pixel at least `least`, taken for synthetic ones beside those 718: the accuracies at
/// radius 0 on stopping images of the sets that rank.
fn told_apart(dir: &Path, least: u8) -> Vec<f64> {
    let path = |name: &str| dir.join(format!("{name}-{least}")).display().to_string();
    let digits = "builtin:digits".parse::<Source>().unwrap().load(Split::Train, None, 0).unwrap();
    let folder = dir.join(format!("folder-{least}"));
    for (i, label) in digits.labels.iter().enumerate().skip(REAL) {
        let class = folder.join(label.to_string());
        std::fs::create_dir_all(&class).unwrap();
        let pixels: Vec<u8> = digits.image(i).iter().map(|&pixel| pixel.max(least)).collect();
        std::fs::write(class.join(format!("{i:04}.png")), encode_png(&pixels, digits.shape)).unwrap();
    }
    ok(&format!("split --limit {REAL} --out {}", path("split")));
    ok(&format!("import --source {} --shard-rows 500 --out {}", path("folder"), path("pool")));
    let fit = "--epsilons 0,0.001,0.002,0.003 --attack-steps 2 --steps 120 --channels 8,16 --eval-every 40 \
        --learning-rate 5e-3";
    let (split, pool, out) = (path("split"), path("pool"), path("out"));
    let text = ok(&format!("fit-discriminator --split {split} --pool {pool} {fit} --json --out {out}"));
    let summary: Value = serde_json::from_str(&text).unwrap();
    let sets = summary["summary"]["stop_accuracy"].as_array().unwrap();
    sets[..2].iter().map(|set| set[0].as_f64().unwrap()).collect()
}

#[test]
fn real_images_taken_for_synthetic_ones_are_not_told_apart_and_marked_ones_are() {
    let dir = tempfile::tempdir().unwrap();
    // Of about 210 stopping images: chance is 0.5, its standard error 0.035.
    for accuracy in told_apart(dir.path(), 0) {
        assert!((0.37..=0.63).contains(&accuracy), "{accuracy} by the way through folder, pool and PNG");
    }
    for accuracy in told_apart(dir.path(), 32) {
        assert!(accuracy > 0.85, "{accuracy} although the ground is brighter: too short a training to tell");
    }
}
