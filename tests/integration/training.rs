//! What training says of itself.

use serde_json::Value;

use crate::run::{made, ok, succeeds};

/// At the radius 0.4 the network learns to withstand a step of four radii from a random start, and nothing else.
#[test]
fn fgsm_with_too_large_a_step_is_warned_of_in_the_record() {
    let dir = tempfile::tempdir().unwrap();
    let train = |name: &str, flags: &str| {
        format!(
            "train --split {} --objective fgsm-rs --architecture resnet --channels 16,32 --blocks 1,1 --batch 64 \
             --eval-every 50 --warmup-steps 10 {flags} --out {}",
            made().path("split"),
            dir.path().join(name).display()
        )
    };
    let record = |name: &str| -> Value {
        let bytes = std::fs::read(dir.path().join(name).join("train.json")).unwrap();
        serde_json::from_slice(&bytes).unwrap()
    };
    ok(&train("small", "--epsilon 0.05 --steps 100"));
    assert!(record("small").get("warnings").is_none_or(|warnings| warnings.as_array().unwrap().is_empty()));
    let collapsed = "--epsilon 0.4 --fgsm-step-ratio 4 --steps 500 --learning-rate 0.2";
    succeeds(&train("large", collapsed), &["catastrophic overfitting"]);
    assert!(record("large")["warnings"][0].as_str().unwrap().contains("catastrophic overfitting"));
    let log = std::fs::read_to_string(dir.path().join("large/metrics.jsonl")).unwrap();
    assert!(log.lines().all(|line| line.contains("held_out_fgsm_accuracy")), "{log}");
}
