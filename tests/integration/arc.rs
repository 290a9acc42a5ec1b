//! Sample sets from elsewhere, imported as pools and ranked by ARC.

use std::path::Path;

use proxyset::data::{ImageReader, Shape, encode_png};
use serde_json::Value;

use crate::run::{fails, files, made, ok, shards};

/// The images of a pool's shards, PNG files, in order.
fn images(pool: &Path) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (name, _) in shards(&pool.display().to_string()) {
        for batch in ImageReader::open(&pool.join("pool").join(name), &["image"], 100).unwrap() {
            all.extend(batch.unwrap().images().unwrap().into_iter().map(<[u8]>::to_vec));
        }
    }
    all
}

#[test]
fn a_folder_of_images_becomes_a_pool_and_sets_are_ranked_with_curves() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let pool = made().path("pool");
    let generated = images(Path::new(&pool));
    for (i, image) in generated.iter().enumerate() {
        let class = dir.path().join("folder").join((i % 10).to_string());
        std::fs::create_dir_all(&class).unwrap();
        std::fs::write(class.join(format!("{:03}.png", i / 10)), image).unwrap();
    }
    ok(&format!("import --source {} --shard-rows 40 --out {}", path("folder"), path("imported")));
    let imported = images(Path::new(&path("imported")));
    let in_order = (0..10).flat_map(|class| generated.iter().skip(class).step_by(10));
    assert!(imported.iter().eq(in_order));
    ok(&format!("check {}", path("imported")));

    let rank = |out: &str| -> Value {
        let sets = format!(
            "--synthetic {pool} --synthetic {} --labeller {}",
            path("folder"),
            made().path("classifier")
        );
        let small = "--set fit-discriminator.steps=4 --set fit-discriminator.conditioned=true \
                     --set fit-discriminator.architecture.channels=[8,8] --attack-steps 2 --apgd-steps 3 --max-images 16";
        let text = ok(&format!("arc --real builtin:digits {sets} {small} --json --out {}", path(out)));
        serde_json::from_str(&text).unwrap()
    };
    let found = rank("rank");
    let generators = found["generators"].as_array().unwrap();
    assert_eq!(generators.len(), 2);
    let arc = |i: usize| generators[i]["signed_arc"].as_f64().unwrap();
    assert!(arc(0) <= arc(1));
    assert_eq!(generators[1]["behind_the_last"].as_f64().unwrap(), arc(1) - arc(0));
    for generator in generators {
        let number = |key: &str| generator[key].as_f64().unwrap();
        assert!(number("signed_arc") <= number("signed_after_pgd"), "a stronger attack leaves less");
        assert!((0.0..=1.0).contains(&number("label_agreement")));
    }
    let names: Vec<&str> = generators.iter().map(|g| g["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"pool") && names.contains(&"folder"), "{names:?}");
    let points = &found["curves"]["folder"];
    assert_eq!(points.as_array().map(Vec::len), Some(4), "{points}");
    assert!(points[0]["accuracy"].is_f64() && points[3]["epsilon"].is_f64(), "{points}");
    let made = files(Path::new(&path("rank")));
    let curves = made.iter().filter(|(name, _)| name.ends_with("rank.svg") || name.ends_with("arc.svg"));
    assert_eq!(curves.count(), 3);
    assert!(made.iter().all(|(name, _)| !name.display().to_string().contains("judge")), "ARC needs none");
    assert_eq!(rank("rank"), found, "done already");
    assert!(made == files(Path::new(&path("rank"))));
}

#[test]
fn a_ranking_that_cannot_be_says_so_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out").display().to_string();
    let pool = made().path("pool");
    let cases = [
        ("arc --real builtin:digits", "--synthetic"),
        (&*format!("arc --real builtin:digits --synthetic {pool} --pool {pool}"), "cannot be used with"),
        ("arc --real builtin:digits --synthetic /nowhere", "'/nowhere' does not exist"),
        (&*format!("arc --real /nowhere --synthetic {pool}"), "'/nowhere' does not exist"),
        (&*format!("arc --real builtin:digits --synthetic {pool} --set fit-discriminator.stpes=3"), "stpes"),
        (
            &*format!("arc --real builtin:digits --synthetic {pool} --apgd-steps 1000000"),
            "apgd_steps is 1000000",
        ),
        ("import --source /nowhere", "'/nowhere' does not exist"),
        (
            &*format!("score --split {} --pool {}", made().path("split"), made().path("labels")),
            "generate or import",
        ),
    ];
    for (args, said) in cases {
        fails(&format!("{args} --out {out}"), 2, &[said]);
        assert!(!Path::new(&out).exists(), "{args}");
    }
}

#[test]
fn a_set_of_another_shape_is_found_before_networks_are_trained_for_those_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let shape = Shape { height: 9, width: 9, channels: 1 };
    std::fs::create_dir(path("nine")).unwrap();
    std::fs::write(path("nine/0.png"), encode_png(&[7; 81], shape)).unwrap();
    ok(&format!("import --source {} --out {}", path("nine"), path("pool-of-nine")));
    for (nine, stages) in [("nine", vec!["split", "import"]), ("pool-of-nine", vec!["split"])] {
        let sets = format!("--synthetic {} --synthetic {}", made().path("pool"), path(nine));
        let out = path(&format!("out-{nine}"));
        fails(&format!("arc --real builtin:digits {sets} --out {out}"), 65, &["9x9", "8x8"]);
        let mut made: Vec<String> =
            files(Path::new(&out)).iter().map(|(name, _)| name.display().to_string()).collect();
        made.retain(|name| !stages.iter().any(|stage| name.starts_with(&format!("{stage}-"))));
        assert!(made.is_empty(), "{made:?}");
    }
}
