//! Curation of a random score table, compared with a plain search through all its rows.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use arrow_array::{ArrayRef, BooleanArray, Float32Array, Int64Array, RecordBatch, StringArray, UInt64Array};
use proxyset::{
    data::table::{self, Table},
    rng::Stream,
};
use serde_json::{Value, json};

use crate::run::{fails, files, ok, proxyset};

const CLASSES: [&str; 3] = ["cat", "dog", "1"];
const SHARDS: [usize; 3] = [700, 1, 300];

#[derive(Clone)]
struct Row {
    uid: String,
    label: usize,
    score: f32,
    judge: Option<f32>,
    confidence: f32,
    agrees: bool,
    pixels: u64,
    looks: u64,
    /// There is no column for them if all are 0.
    features: u64,
    train_copy: f32,
    ratio: f32,
    test_copy: Option<f32>,
}

/// Few distinct scores, so that ties matter; some equal pixels, near looks, copies, and one score that is NaN.
fn drawn() -> Vec<Row> {
    let mut stream = Stream::new(7, 0, 0);
    let mut rows: Vec<Row> = (0..SHARDS.iter().sum::<usize>())
        .map(|i| Row {
            uid: format!("0123456789ab-{i:09}"),
            label: stream.below(8) / 3,
            score: stream.below(30) as f32 / 30.0,
            judge: (stream.below(3) > 0).then(|| stream.uniform() as f32),
            confidence: stream.below(50) as f32 / 50.0,
            agrees: stream.below(10) > 0,
            pixels: stream.next_u64(),
            looks: stream.next_u64(),
            features: stream.next_u64(),
            train_copy: stream.below(40) as f32 / 100.0,
            ratio: stream.uniform() as f32,
            test_copy: Some(stream.below(40) as f32 / 100.0),
        })
        .collect();
    for _ in 0..60 {
        let (a, b) = (stream.below(rows.len()), stream.below(rows.len()));
        rows[a].pixels = rows[b].pixels;
        let (a, b) = (stream.below(rows.len()), stream.below(rows.len()));
        rows[a].looks = rows[b].looks ^ 1 << stream.below(64);
        let (a, b) = (stream.below(rows.len()), stream.below(rows.len()));
        rows[a].features = rows[b].features ^ 3 << stream.below(63);
    }
    rows[5].score = f32::NAN;
    rows
}

/// The folder of a finished score stage with these rows.
fn write(folder: &Path, rows: &[Row]) {
    let mut first = 0;
    for (shard, n) in SHARDS.into_iter().enumerate() {
        let rows = &rows[first..first + n];
        first += n;
        fn floats(values: impl Iterator<Item = Option<f32>>) -> ArrayRef {
            Arc::new(Float32Array::from_iter(values))
        }
        let hashes =
            |get: fn(&Row) -> u64| Arc::new(UInt64Array::from_iter_values(rows.iter().map(get))) as ArrayRef;
        let mut columns = vec![
            ("uid", Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.uid))) as ArrayRef, false),
            (
                "label",
                Arc::new(Int64Array::from_iter_values(rows.iter().map(|r| r.label as i64))) as _,
                false,
            ),
            ("synthetic_score", floats(rows.iter().map(|r| Some(r.score))), false),
            ("judge_score", floats(rows.iter().map(|r| r.judge)), true),
            ("label_confidence", floats(rows.iter().map(|r| Some(r.confidence))), false),
            (
                "label_agrees",
                Arc::new(BooleanArray::from_iter(rows.iter().map(|r| Some(r.agrees)))) as _,
                false,
            ),
            ("pixel_hash", hashes(|r| r.pixels), false),
            ("perceptual_hash", hashes(|r| r.looks), false),
            ("train_copy_distance", floats(rows.iter().map(|r| Some(r.train_copy))), false),
            ("memorization_ratio", floats(rows.iter().map(|r| Some(r.ratio))), false),
            ("test_copy_distance", floats(rows.iter().map(|r| r.test_copy)), true),
        ];
        if rows.iter().any(|r| r.features != 0) {
            columns.push(("feature_hash", hashes(|r| r.features), false));
        }
        let batch = RecordBatch::try_from_iter_with_nullable(columns).unwrap();
        let path = folder.join(format!("scores/shard-{shard:05}.parquet"));
        table::write(&path, &batch.schema(), [Ok(batch)], 128, &[]).unwrap();
        let record = json!({
            "schema": "proxyset.shard/1", "shard": shard, "rows": n, "bytes": std::fs::metadata(&path).unwrap().len(),
            "blake3": "", "fingerprint": "f", "device_class": "none", "version": "0",
        });
        std::fs::write(path.with_extension("json"), record.to_string()).unwrap();
    }
    let config = "schema = 'proxyset.config/1'\nstage = 'score'\nfingerprint = 'f0f0f0f0f0'\ninputs = []\n[settings]\n";
    std::fs::write(folder.join("config.toml"), config).unwrap();
    let done = json!({
        "schema": "proxyset.done/1", "stage": "score", "fingerprint": "f0f0f0f0f0", "device_class": "none",
        "version": "0", "seconds": 0, "summary": { "classes": CLASSES, "shards": SHARDS.len() }, "files": [],
    });
    std::fs::write(folder.join("done.json"), done.to_string()).unwrap();
}

/// Of an image, for near-duplicates.
type Hash = fn(&Row) -> u64;

/// What a rule is compared with: the gates' reasons in order, the rank, and how many of each class are kept.
struct Rule<'a> {
    flags: &'a str,
    refuse: fn(&Row) -> Option<&'static str>,
    near: Option<(u32, Hash)>,
    rank: fn(&Row) -> f32,
    limit: fn(class: usize, passing: usize) -> usize,
}

fn gates(row: &Row) -> Option<&'static str> {
    if row.score.is_nan() {
        Some("not-finite")
    } else if row.test_copy.is_some_and(|d| d <= 0.02) {
        Some("test-copy")
    } else if row.train_copy <= 0.02 {
        Some("train-copy")
    } else if !row.agrees {
        Some("label-disagrees")
    } else {
        None
    }
}

/// The reason by uid; kept rows have none.
fn expected(rows: &[Row], rule: &Rule) -> BTreeMap<String, Option<&'static str>> {
    let mut found = BTreeMap::new();
    let mut passing: Vec<&Row> = Vec::new();
    for row in rows {
        let reason = (rule.refuse)(row)
            .or_else(|| passing.iter().any(|other| other.pixels == row.pixels).then_some("duplicate"));
        if reason.is_none() {
            passing.push(row);
        }
        found.insert(row.uid.clone(), reason);
    }
    if let Some((bits, hash)) = rule.near {
        let mut far: Vec<&Row> = Vec::new();
        for row in passing {
            if far.iter().any(|other| (hash(other) ^ hash(row)).count_ones() <= bits) {
                found.insert(row.uid.clone(), Some("near-duplicate"));
            } else {
                far.push(row);
            }
        }
        passing = far;
    }
    for class in 0..CLASSES.len() {
        let mut members: Vec<&Row> = passing.iter().filter(|row| row.label == class).copied().collect();
        members.sort_by(|a, b| {
            let order = |row: &Row| blake3::hash(row.uid.as_bytes()).as_bytes()[..16].to_vec();
            (rule.rank)(a).total_cmp(&(rule.rank)(b)).then(order(a).cmp(&order(b)))
        });
        for row in members.iter().skip((rule.limit)(class, members.len())) {
            found.insert(row.uid.clone(), Some("over-quota"));
        }
    }
    found
}

fn strings(path: &Path, column: &str) -> Vec<String> {
    let mut all = Vec::new();
    for batch in Table::open(path).unwrap().read(&[column], 100).unwrap() {
        let batch = batch.unwrap();
        let array: &StringArray = table::column(path, &batch, column).unwrap();
        all.extend(array.iter().map(|v| v.unwrap().to_owned()));
    }
    all
}

fn selected(dir: &Path) -> BTreeMap<String, Option<String>> {
    let kept = strings(&dir.join("selection.parquet"), "uid").into_iter().map(|uid| (uid, None));
    let rejected = dir.join("rejected.parquet");
    let reasons = strings(&rejected, "reason").into_iter().map(Some);
    kept.chain(strings(&rejected, "uid").into_iter().zip(reasons)).collect()
}

#[test]
fn every_rule_keeps_what_a_plain_search_keeps_and_says_why_not_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let rows = drawn();
    write(&dir.path().join("scores"), &rows);
    let two_thirds = |_, n: usize| (0.67 * n as f64).ceil() as usize;
    let rules = [
        Rule { flags: "", refuse: gates, near: None, rank: |r| r.score, limit: two_thirds },
        Rule {
            flags: "--arm confidence --keep-per-class 50 --near-duplicate-bits 2",
            refuse: gates,
            near: Some((2, |r| r.looks)),
            rank: |r| -r.confidence,
            limit: |_, _| 50,
        },
        Rule {
            flags: "--within class --near-duplicate-bits 3 --near-duplicate-by features",
            refuse: gates,
            near: Some((3, |r| r.features)),
            rank: |r| r.score,
            limit: two_thirds,
        },
        Rule {
            flags: "--quota 1=7,dog=0 --near-duplicate-bits 0",
            refuse: gates,
            near: Some((0, |r| r.looks)),
            rank: |r| r.score,
            limit: |class, n| [(0.67 * n as f64).ceil() as usize, 0, 7][class],
        },
        Rule {
            flags: "--keep-per-class 200 --allow-short true --filter judge_score>0.3 --require-agreement false \
                    --min-memorization-ratio 0.2 --filter label!=1 --max-score 0.5",
            refuse: |row| {
                gates(&Row { agrees: true, ..row.clone() }).or(if row.ratio < 0.2 {
                    Some("memorized")
                } else if row.score > 0.5 {
                    Some("high-score")
                } else if row.judge.is_none_or(|j| j <= 0.3) {
                    Some("not judge_score > 0.3")
                } else if row.label == 1 {
                    Some("not label != 1")
                } else {
                    None
                })
            },
            near: None,
            rank: |r| r.score,
            limit: |_, _| 200,
        },
        Rule {
            flags: "--arm all --keep-per-class 3 --min-confidence 0.5",
            refuse: |row| gates(row).or((row.confidence < 0.5).then_some("low-confidence")),
            near: None,
            rank: |_| 0.0,
            limit: |_, n| n,
        },
    ];
    for (i, rule) in rules.iter().enumerate() {
        let out = dir.path().join(format!("out-{i}"));
        let scores = dir.path().join("scores");
        ok(&format!("curate --scores {} {} --out {}", scores.display(), rule.flags, out.display()));
        let expected = expected(&rows, rule);
        let found = selected(&out);
        let expected_text: BTreeMap<String, Option<String>> =
            expected.iter().map(|(uid, reason)| (uid.clone(), reason.map(str::to_owned))).collect();
        assert_eq!(found, expected_text, "{}", rule.flags);
        let select: Value = serde_json::from_slice(&std::fs::read(out.join("select.json")).unwrap()).unwrap();
        let kept = expected.values().filter(|reason| reason.is_none()).count();
        assert_eq!((&select["total"], &select["kept"]), (&json!(rows.len()), &json!(kept)));
        for (class, name) in CLASSES.into_iter().enumerate() {
            let counts = &select["classes"][class];
            let members: Vec<&Row> = rows.iter().filter(|row| row.label == class).collect();
            let kept = members.iter().filter(|row| expected[&row.uid].is_none()).count();
            assert_eq!((&counts["class"], &counts["total"]), (&json!(name), &json!(members.len())));
            assert_eq!(counts["kept"], kept);
            let rejected = counts["rejected"].as_object().unwrap().values();
            assert_eq!(rejected.map(|n| n.as_u64().unwrap() as usize).sum::<usize>(), members.len() - kept);
        }
    }
}

#[test]
fn counts_over_all_classes_and_random_orders_keep_as_many_as_they_say() {
    let dir = tempfile::tempdir().unwrap();
    let scores = dir.path().join("scores");
    write(&scores, &drawn());
    let kept = |flags: &str, out: &str| {
        let out = dir.path().join(out);
        ok(&format!("curate --scores {} {flags} --out {}", scores.display(), out.display()));
        strings(&out.join("selection.parquet"), "uid")
    };
    let passing = kept("--arm all", "all").len();
    assert_eq!(kept("--keep-total 100", "total").len(), 100);
    assert_eq!(kept("--keep-fraction 0.5 --within all", "half").len(), passing.div_ceil(2));
    let random = kept("--arm random --keep-per-class 40", "random");
    assert_eq!(random.len(), 120);
    assert_ne!(random, kept("--arm random --keep-per-class 40 --seed 1", "random-1"));
    assert_eq!(kept("--arm rejection --keep-total 99", "rejection").len(), 99);
    let short = ["too few images of a class pass", "of cat, expected 900", "allow_short"];
    let out = dir.path().join("short");
    fails(
        &format!("curate --scores {} --keep-per-class 900 --out {}", scores.display(), out.display()),
        1,
        &short,
    );
    assert!(!out.exists());
}

#[test]
fn one_thread_or_two_give_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("scores"), &drawn());
    let run = |threads: &str| {
        let out = dir.path().join(threads);
        let args = format!(
            "curate --scores {} --near-duplicate-bits 3 --out {}",
            dir.path().join("scores").display(),
            out.display()
        );
        assert!(proxyset(&args).env("RAYON_NUM_THREADS", threads).output().unwrap().status.success());
        let made = files(&out).into_iter();
        made.filter(|(name, _)| *name != Path::new("done.json") && *name != Path::new("config.toml"))
            .collect::<Vec<_>>()
    };
    let (one, two) = (run("1"), run("2"));
    assert_eq!(one.len(), 3);
    assert!(one == two);
}

#[test]
fn a_rule_that_cannot_be_and_a_broken_table_write_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let scores = dir.path().join("scores");
    let mut rows = drawn();
    write(&scores, &rows);
    let fail = |flags: &str, code: i32, said: &[&str]| {
        let out = dir.path().join("out");
        fails(&format!("curate --scores {} {flags} --out {}", scores.display(), out.display()), code, said);
        assert!(!out.exists(), "{flags}");
    };
    fail("--filter socre<1", 2, &["no column 'socre'", "synthetic_score"]);
    fail("--filter uid==3", 2, &["column 'uid' is Utf8"]);
    fail("--filter score", 2, &["'score' is not a condition"]);
    fail("--quota bird=3", 2, &["no class 'bird'", "cat, dog, 1"]);
    fail("--quota cat=3,0=4", 2, &["class 'cat' has another quota already"]);
    fail("--quota cat=3 --keep-total 5", 2, &["quota is cat=3"]);
    fail("--keep-per-class 3 --keep-total 5", 2, &["keep_total is 5"]);
    fail("--near-duplicate-bits 9", 2, &["near_duplicate_bits is 9, expected 0 to 3"]);
    fail("--max-score 0 --filter synthetic_score>0.5", 1, &["none of the pool's 1001 images passes"]);
    fail(
        "--near-duplicate-by features",
        2,
        &["near_duplicate_by is features, but near_duplicate_bits is not set"],
    );
    rows.iter_mut().for_each(|row| row.features = 0);
    write(&scores, &rows);
    fail(
        "--near-duplicate-bits 3 --near-duplicate-by features",
        2,
        &["no column 'feature_hash'", "expected scores made with hash_features"],
    );
    rows[900].label = 4;
    write(&scores, &rows);
    fail("", 65, &["shard-00002.parquet", "label is 4, expected 0 to 2"]);
    std::fs::write(scores.join("scores/shard-00001.parquet"), b"PAR1").unwrap();
    fail("", 65, &["shard-00001.parquet"]);
    std::fs::remove_file(scores.join("scores/shard-00002.json")).unwrap();
    fail("", 65, &["no record of shard 2"]);
}
