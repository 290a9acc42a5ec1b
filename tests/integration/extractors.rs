//! Networks from the Hub in place of a classifier: `make test-extractors`.

use proxyset::data::{OfficialSplit, Source, encode_png};
use serde_json::Value;

use crate::run::{made, ok};

/// CLIP's vision tower in small, with random weights.
const CLIP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/clip");

fn summary(args: &str) -> Value {
    let text: Value = serde_json::from_str(&ok(&format!("{args} --json"))).unwrap();
    text["summary"].clone()
}

#[test]
fn quality_in_the_features_of_a_network_of_the_hub() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    ok(&format!(
        "import --source builtin:digits --official-split test --shard-rows 100 --out {}",
        path("digits")
    ));
    let of = |pool: &str, out: &str| {
        summary(&format!("quality --pool {pool} --classifier {CLIP} --max-manifold 150 --out {}", path(out)))
    };
    let (same, made) = (of(&path("digits"), "same"), of(&made().path("pool"), "made"));
    let distance = |found: &Value| found["frechet_distance"].as_f64().unwrap();
    assert!(distance(&same).abs() < 1e-6, "{same:#}");
    assert!(distance(&made) > 100.0 * distance(&same).abs(), "{made:#}");
    // Other 150 of the same 360 on either side.
    let number = |found: &Value, of: &str| found[of].as_f64().unwrap();
    assert!(number(&same, "precision") > 0.8 && number(&same, "recall") > 0.8, "{same:#}");
    assert!(number(&made, "precision") < 0.5, "{made:#}");
    assert!(same["class_accuracy"].is_null(), "{same:#}");
}

#[test]
fn what_a_network_of_the_hub_sees_alike_is_a_near_duplicate() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let digits = "builtin:digits".parse::<Source>().unwrap().load(OfficialSplit::Test, None, 0).unwrap();
    for (i, label) in digits.labels.iter().enumerate().take(40) {
        let class = dir.path().join("twins").join(label.to_string());
        std::fs::create_dir_all(&class).unwrap();
        let mut pixels = digits.image(i).to_vec();
        // Neither is a copy of the original.
        for place in [20, 27] {
            pixels[place] ^= 1;
            let name = format!("{i:02}-{place}.png");
            std::fs::write(class.join(name), encode_png(&pixels, digits.shape)).unwrap();
        }
    }
    let (split, pool) = (made().path("split"), path("pool"));
    let tiny = "--steps 2 --batch 8 --channels 8,8 --attack-steps 1 --eval-every 2";
    let (labels, nets, scores) = (path("labels"), path("nets"), path("scores"));
    ok(&format!("import --source {} --out {pool}", path("twins")));
    ok(&format!("label --pool {pool} --classifier {} --out {labels}", made().path("classifier")));
    ok(&format!("fit-discriminator --split {split} --pool {pool} {tiny} --out {nets}"));
    let inputs = format!("--split {split} --pool {pool} --labels {labels} --discriminators {nets}");
    ok(&format!("score {inputs} --classifier {CLIP} --hash-features true --out {scores}"));
    let rule = "--arm all --require-agreement false --copy-tolerance 0 --near-duplicate-by features";
    let found = summary(&format!(
        "curate --scores {scores} {rule} --near-duplicate-bits 1 --out {}",
        path("selection")
    ));
    let refused = found["rejected"]["near-duplicate"].as_u64().unwrap_or(0);
    assert!((36..=44).contains(&refused), "of 40 twins {refused}");
}
