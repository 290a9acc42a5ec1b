//! Parts of a data set that is sorted by class: drawn evenly, or the first images with a warning.

use std::{fs::File, path::Path};

use arrow_array::{Array, Int64Array};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use proxyset::data::{OfficialSplit, Source, encode_png};
use serde_json::Value;

use crate::run::{made, ok};

/// The test digits as a folder of images, which are read class by class.
fn sorted(root: &Path) {
    let digits = "builtin:digits".parse::<Source>().unwrap().load(OfficialSplit::Test, None, 0).unwrap();
    for (i, label) in digits.labels.iter().enumerate() {
        let class = root.join("test").join(label.to_string());
        std::fs::create_dir_all(&class).unwrap();
        std::fs::write(class.join(format!("{i:04}.png")), encode_png(digits.image(i), digits.shape)).unwrap();
    }
}

/// A column of `images.parquet`.
fn column(folder: &Path, name: &str) -> Vec<i64> {
    let file = File::open(folder.join("images.parquet")).unwrap();
    let rows =
        ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap().next().unwrap().unwrap();
    rows.column_by_name(name).unwrap().as_any().downcast_ref::<Int64Array>().unwrap().values().to_vec()
}

#[test]
fn a_limit_draws_evenly_from_a_sorted_data_set_and_the_first_images_are_warned_of() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    sorted(&data);
    let run = |verb: &str, part: &str, name: &str| {
        let (model, out) = (made().path("classifier"), dir.path().join(name));
        let inputs = format!("--model {model} --data {} --out {}", data.display(), out.display());
        let summary: Value =
            serde_json::from_str(&ok(&format!("{verb} {inputs} {part} --json --quiet"))).unwrap();
        (summary["summary"]["warnings"].to_string(), out)
    };
    for (verb, name) in [("evaluate --attack none", "evaluate"), ("certify --n0 5 --n 20", "certify")] {
        let (said, out) = run(verb, "--limit 30", &format!("{name}-drawn"));
        assert!(!said.contains("have none of"), "{verb}: {said}");
        let labels = column(&out, "label");
        assert!(
            (0..10).all(|class| labels.iter().filter(|&&label| label == class).count() == 3),
            "{labels:?}"
        );
        // In this order, about 36 images of each class stand one after the other.
        let index = column(&out, "index");
        assert!(index.is_sorted() && index[29] > 320 && index[2] < 36, "{index:?}");

        let (said, out) = run(verb, "--first 50", &format!("{name}-first"));
        assert!(
            said.contains("the first 50 images have none of 8 of the 10 classes: '2', '3'"),
            "{verb}: {said}"
        );
        assert_eq!(column(&out, "index"), (0..50).collect::<Vec<_>>());
    }
}
