//! Whole runs: what is redone and what is not, and what `check` and `publish` do with the result.

use std::{collections::BTreeMap, path::Path, time::SystemTime};

use arrow_array::BooleanArray;
use proxyset::data::table::{self, Table};

use crate::run::{fails, files, ok};

/// The digits pipeline in seconds.
pub const SMALL: &str = "--set fit-generator.steps=20 --set fit-generator.architecture.block_out_channels=[8,8] \
    --set fit-generator.architecture.norm_num_groups=4 --set fit-generator.architecture.attention_head_dim=4 \
    --set generate.count=512 --set generate.sampler.steps=3 --set generate.shard_rows=256 \
    --set labeller.steps=20 --set labeller.architecture.channels=[8,8] --set labeller.eval_every=10 \
    --set fit-discriminator.steps=6 --set fit-discriminator.architecture.channels=[8,8] --set fit-discriminator.attack.steps=2 \
    --set fit-discriminator.eval_every=3 --set arc.attack.steps=2 --set arc.bootstrap=50 \
    --set curate.keep_per_class=5 --set curate.require_agreement=false \
    --set train.steps=6 --set train.architecture.channels=[8,8] --set train.objective.attack.steps=2 --set train.eval_every=3 \
    --set evaluate.attack.steps=2 --set evaluate.limit=60 --set experiment.seeds=[0,1]";

fn pipeline(name: &str) -> String {
    format!("{}/pipelines/{name}.toml", env!("CARGO_MANIFEST_DIR"))
}

/// When each stage's record was last written, by folder name.
fn done_at(run: &Path) -> BTreeMap<String, SystemTime> {
    let folders = std::fs::read_dir(run).unwrap().map(|e| e.unwrap().path());
    let done = folders.filter_map(|f| {
        let at = std::fs::metadata(f.join("done.json")).ok()?.modified().unwrap();
        Some((f.file_name().unwrap().to_string_lossy().into_owned(), at))
    });
    done.collect()
}

/// The folder of a stage that the second run made.
fn new_folder(
    run: &Path,
    first: &BTreeMap<String, SystemTime>,
    second: &BTreeMap<String, SystemTime>,
    stage: &str,
) -> std::path::PathBuf {
    run.join(second.keys().find(|k| !first.contains_key(*k) && k.starts_with(stage)).unwrap())
}

#[test]
fn a_run_is_done_once_checked_changed_in_part_and_published() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let command =
        |more: &str| format!("run {} --quiet --out {} {SMALL} {more}", pipeline("digits"), run.display());
    let printed = ok(&command("--json"));
    let printed: serde_json::Value = serde_json::from_str(&printed).unwrap();
    let steps = printed["steps"].as_array().unwrap();
    assert!(steps.iter().all(|s| s["state"] == "done"));
    let count = |stage: &str| steps.iter().filter(|s| s["stage"] == stage).count();
    assert_eq!(
        (count("train"), count("evaluate"), count("curate")),
        (7, 6, 3),
        "labeller, three arms, two seeds"
    );

    // Counts in = kept + rejected by reason.
    let select = &steps.iter().find(|s| s["stage"] == "curate").unwrap()["summary"];
    let rejected: u64 = select["rejected"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(select["total"].as_u64().unwrap(), select["kept"].as_u64().unwrap() + rejected);
    let classes = select["classes"].as_array().unwrap();
    assert!(classes.len() == 10 && classes.iter().all(|class| class["kept"] == 5), "{classes:?}");

    let first = done_at(&run);
    ok(&command("--threads 1"));
    assert_eq!(done_at(&run), first, "finished work was done again");

    let coverage = &select["coverage"];
    assert_eq!(coverage["images"][1], select["kept"], "the sample is the pool, which is small");
    for side in ["before", "after"] {
        let [precision, recall] = [0, 1].map(|i| coverage[side][i].as_f64().unwrap());
        assert!((0.0..=1.0).contains(&precision) && (0.0..=1.0).contains(&recall), "{coverage}");
    }

    ok(&command("--until materialize --set curate.keep_per_class=4 --set materialize.with_pool=true"));
    let second = done_at(&run);
    let new: Vec<&str> =
        second.keys().filter(|k| !first.contains_key(*k)).map(|k| k.split_once('-').unwrap().0).collect();
    assert_eq!(new, ["curate", "materialize", "report"]);
    assert!(first.iter().all(|(folder, at)| second[folder] == *at), "what did not change was done again");

    ok(&format!("check {}", run.display()));
    let status: serde_json::Value =
        serde_json::from_str(&ok(&format!("status {} --json", run.display()))).unwrap();
    assert_eq!(status["steps"].as_array().unwrap().len(), second.len());

    let with_pool = new_folder(&run, &first, &second, "materialize").join("dataset");
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(with_pool.join("manifest.json")).unwrap()).unwrap();
    let rows = |folder: &str| -> u64 {
        let files = manifest["files"].as_array().unwrap().iter();
        files
            .filter(|f| f["path"].as_str().unwrap().starts_with(folder))
            .map(|f| f["rows"].as_u64().unwrap())
            .sum()
    };
    assert_eq!((rows("data/"), rows("pool/")), (40, 512));
    let path = with_pool.join("pool/train-00000-of-00001.parquet");
    let mut selected = 0;
    for batch in Table::open(&path).unwrap().read(&["selected", "synthetic_score"], 100).unwrap() {
        let batch = batch.unwrap();
        selected += table::required::<BooleanArray>(&path, &batch, "selected").unwrap().true_count();
    }
    assert_eq!(selected, 40);

    let dataset = run.join(first.keys().find(|k| k.starts_with("materialize")).unwrap());
    published(&dataset, dir.path());
    let to = dir.path().join("published-by-each-run");
    for _ in 0..2 {
        ok(&command(&format!("--set publish.to={}", to.display())));
        assert!(files(&to) == files(&dataset.join("dataset")));
        std::fs::remove_dir_all(&to).unwrap();
    }
    a_flipped_byte_is_found(&run, &dataset);
}

fn published(dataset: &Path, dir: &Path) {
    let to = dir.join("published");
    let publish = format!("publish --dataset {} --to {}", dataset.display(), to.display());
    let tree = ok(&format!("{publish} --dry-run"));
    assert!(
        tree.contains("data/train-00000-of-00001.parquet") && tree.contains("nothing was written"),
        "{tree}"
    );
    assert!(!to.exists());
    for _ in 0..2 {
        ok(&publish);
        assert!(files(&to) == files(&dataset.join("dataset")));
        ok(&format!("check {}", to.display()));
        std::fs::remove_dir_all(&to).unwrap();
    }
    std::fs::create_dir(&to).unwrap();
    std::fs::write(to.join("notes.txt"), "mine").unwrap();
    fails(&publish, 2, &["notes.txt", "choose another folder"]);
    assert_eq!(std::fs::read_dir(&to).unwrap().count(), 1);
}

fn a_flipped_byte_is_found(run: &Path, dataset: &Path) {
    let file = dataset.join("dataset/data/train-00000-of-00001.parquet");
    let whole = std::fs::read(&file).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 4;
    std::fs::write(&file, &flipped).unwrap();
    fails(&format!("check {}", run.display()), 65, &["train-00000-of-00001.parquet", "BLAKE3"]);
    fails(&format!("check {}", dataset.join("dataset").display()), 65, &["train-00000-of-00001.parquet"]);
    // What cannot be read is not missing.
    std::fs::remove_file(&file).unwrap();
    fails(&format!("check {}", run.display()), 65, &["train-00000-of-00001.parquet: missing"]);
    std::fs::create_dir(&file).unwrap();
    fails(&format!("check {}", run.display()), 65, &["cannot be read: "]);
    std::fs::remove_dir(&file).unwrap();
    std::fs::write(&file, &whole).unwrap();
}

#[test]
fn every_pipeline_passes_plan_without_its_data_and_writes_nothing() {
    for file in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/pipelines")).unwrap() {
        let file = file.unwrap().path();
        let name = file.file_stem().unwrap().to_str().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let missing =
            if name == "digits" { String::new() } else { "--set split.source=/nowhere/at-all".into() };
        let text = ok(&format!("plan {} --out {} {missing}", pipeline(name), run.display()));
        assert!(text.contains("fit-generator") && text.contains("report"), "{name}: {text}");
        assert!(!run.exists());
        if name != "digits" {
            assert!(text.contains("/nowhere/at-all"), "{text}");
            fails(
                &format!("run {} --out {} {missing}", pipeline(name), run.display()),
                2,
                &["/nowhere/at-all"],
            );
            assert!(!run.exists());
        }
    }
}

/// The stages that `plan` shows for a file with these lines.
fn planned(lines: &str, more: &str) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("p.toml");
    std::fs::write(&file, format!("name = 'p'\n{lines}")).unwrap();
    let printed = ok(&format!("plan {} --json --out {}/run {more}", file.display(), dir.path().display()));
    let printed: serde_json::Value = serde_json::from_str(&printed).unwrap();
    printed["steps"].as_array().unwrap().iter().map(|s| s["stage"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_run_has_the_stages_that_are_wanted_and_those_that_only_look_if_they_are_asked_for() {
    let model = format!("--set generate.model={}/models/digits-ddpm", env!("CARGO_MANIFEST_DIR"));
    let way = ["label", "fit-discriminator", "score", "arc", "curate", "materialize", "report"];
    let has = |planned: &[String], stage: &str| planned.iter().any(|name| name == stage);
    for lines in ["", "[fit-generator]\nsteps = 5"] {
        let found = planned(lines, &model);
        assert!(way.iter().all(|stage| has(&found, stage)), "{found:?}");
        assert!(!has(&found, "fit-generator"), "a generator that nobody samples is trained: {found:?}");
    }
    let found = planned("[quality]\n[train]\n[certify]", &model);
    for stage in ["quality", "train", "evaluate", "certify"] {
        assert!(has(&found, stage), "{stage}: {found:?}");
    }
}

#[test]
fn data_that_the_table_names_are_what_is_trained_on() {
    let dir = tempfile::tempdir().unwrap();
    for data in ["'builtin:digits'", "['builtin:digits']"] {
        let file = dir.path().join("p.toml");
        let lines = format!("name = 'p'\n[train]\ndata = {data}\ndata_weights = [1.0]\n");
        std::fs::write(&file, lines).unwrap();
        ok(&format!("plan {} --out {}/run", file.display(), dir.path().display()));
    }
}
