//! Checks that a data set is what it claims to be, down to every image.

use std::{
    collections::{BTreeSet, HashSet},
    path::Path,
};

use arrow_array::{cast::AsArray, types::Int64Type};
use arrow_schema::{DataType, Schema};
use parquet::arrow::{ARROW_SCHEMA_META_KEY, parquet_to_arrow_schema};
use rayon::prelude::*;
use serde::Serialize;

use super::{
    card::{self, ConfigItem, FrontMatter, InfoItem},
    hub::{self, Feature, Features},
    image,
    manifest::{FileEntry, Manifest},
    table::Table,
};
use crate::{Error, Result, fs};

/// How many problems of one kind in one file are reported individually.
const MAX_TOLD: usize = 10;

/// The contents of a data set that has no problems.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// `proxyset.check/1`.
    pub schema: &'static str,
    /// Number of Parquet files.
    pub files: usize,
    /// Their total size in bytes.
    pub bytes: u64,
    /// Their total number of rows.
    pub rows: u64,
    /// The configurations, in the order of the card.
    pub configs: Vec<ConfigReport>,
}

/// The contents of one configuration of a data set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConfigReport {
    /// Its name.
    pub name: String,
    /// Rows of all of its splits.
    pub rows: u64,
    /// Rows of each class.
    pub classes: Vec<ClassCount>,
}

/// How many rows a class has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ClassCount {
    /// The name of the class.
    pub name: String,
    /// Its rows.
    pub rows: u64,
}

/// Checks a data-set folder: card, manifest and each row of each file.
///
/// - Every Parquet file is in the manifest, with its bytes, hash, rows and class counts, and none is missing.
/// - Files have exactly the types that `datasets` needs, and declare their features in both places.
/// - Every image decodes to the size of the manifest, every label is a class, no `uid` occurs twice in a
///   configuration.
/// - The card's configurations have files, and their features and numbers of examples are the files' own.
///
/// Fails with [`Error::Usage`] if there is no folder, and with [`Error::Data`] listing all problems found.
pub fn check_dataset(dir: &Path) -> Result<CheckReport> {
    if !dir.is_dir() {
        bail!(Usage, "data set '{}' does not exist, expected a folder", dir.display());
    }
    let mut problems = Problems::default();
    let report = problems.keep(Manifest::read(dir)).and_then(|manifest| {
        check_listing(dir, &manifest, &mut problems);
        let checks: Vec<_> =
            manifest.files.iter().map(|entry| check_file(dir, entry, &manifest, &mut problems)).collect();
        let front = problems.keep(FrontMatter::read(dir))?;
        let configs = check_card(&front, &manifest, &checks, &mut problems)?;
        Some(CheckReport {
            schema: "proxyset.check/1",
            files: manifest.files.len(),
            bytes: manifest.files.iter().map(|file| file.bytes).sum(),
            rows: manifest.files.iter().map(|file| file.rows).sum(),
            configs,
        })
    });
    match report {
        Some(report) if problems.0.is_empty() => Ok(report),
        _ => bail!(Data, "{}: {} problem(s)\n  {}", dir.display(), problems.0.len(), problems.0.join("\n  ")),
    }
}

/// Everything that is wrong.
#[derive(Default)]
struct Problems(Vec<String>);

impl Problems {
    fn add(&mut self, problem: impl Into<String>) {
        self.0.push(problem.into());
    }

    /// Returns the value, or `None` after adding a problem.
    fn keep<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|e| self.add(e.to_string())).ok()
    }

    /// Adds problems of one kind, the first of them in full.
    fn add_all(&mut self, file: &str, problems: Vec<String>) {
        let more = problems.len().saturating_sub(MAX_TOLD);
        self.0.extend(problems.into_iter().take(MAX_TOLD).map(|problem| format!("{file}: {problem}")));
        if more > 0 {
            self.add(format!("{file}: {more} more like this"));
        }
    }
}

/// Half of a BLAKE3 hash: enough to distinguish any number of uids.
type UidHash = [u8; 16];

fn hash_uid(uid: &str) -> UidHash {
    let mut hash = UidHash::default();
    blake3::Hasher::new().update(uid.as_bytes()).finalize_xof().fill(&mut hash);
    hash
}

/// What was learned from the rows of a file.
struct FileCheck {
    features: Features,
    uids: Vec<UidHash>,
}

fn check_listing(dir: &Path, manifest: &Manifest, problems: &mut Problems) {
    let mut found = BTreeSet::new();
    let listing = fs::each_file(dir, true, &mut |path| {
        if path.extension().is_some_and(|extension| extension == "parquet") {
            let parts = path.strip_prefix(dir).unwrap_or(&path).iter().map(|part| part.to_string_lossy());
            found.insert(parts.collect::<Vec<_>>().join("/"));
        }
        Ok(())
    });
    problems.keep(listing);
    let listed: BTreeSet<_> = manifest.files.iter().map(|file| file.path.clone()).collect();
    if listed.len() < manifest.files.len() {
        problems.add("manifest.json lists a file twice");
    }
    problems.0.extend(found.difference(&listed).map(|file| format!("{file}: not in manifest.json")));
    problems
        .0
        .extend(listed.difference(&found).map(|file| format!("{file}: in manifest.json, but not there")));
}

/// Checks one file against the manifest; `None` if its rows could not be read.
fn check_file(
    dir: &Path,
    entry: &FileEntry,
    manifest: &Manifest,
    problems: &mut Problems,
) -> Option<FileCheck> {
    let path = dir.join(&entry.path);
    if !path.is_file() {
        return None; // The listing says so.
    }
    let name = &entry.path;
    let (hash, bytes) = problems.keep(fs::hash_file(&path))?;
    if (bytes, &hash) != (entry.bytes, &entry.blake3) {
        problems.add(format!(
            "{name}: {bytes} bytes with BLAKE3 {hash}, but manifest.json says {} with {}",
            entry.bytes, entry.blake3
        ));
    }
    let table = problems.keep(Table::open(&path))?;
    if table.rows() != entry.rows {
        problems.add(format!("{name}: {} rows, but manifest.json says {}", table.rows(), entry.rows));
    }
    let features = check_schema(name, &table, manifest, problems)?;
    let rows = check_rows(name, table, entry, manifest, problems);
    let uids = problems.keep(rows)?;
    Some(FileCheck { features, uids })
}

/// Checks types and metadata (the pitfalls of `datasets`); `None` if the rows cannot be interpreted.
fn check_schema(name: &str, table: &Table, manifest: &Manifest, problems: &mut Problems) -> Option<Features> {
    let in_arrow = arrow_schema(table).and_then(|schema| schema.metadata.get(hub::METADATA_KEY).cloned());
    let in_parquet = table.key_value(hub::METADATA_KEY);
    if in_arrow.is_none() {
        problems.add(format!("{name}: no '{}' in the metadata of the Arrow schema", hub::METADATA_KEY));
    }
    if in_parquet.is_none() {
        problems.add(format!("{name}: no '{}' in the key-value metadata", hub::METADATA_KEY));
    }
    if in_arrow.is_some() && in_parquet.is_some() && in_arrow.as_deref() != in_parquet {
        problems.add(format!("{name}: '{}' differs between its two places", hub::METADATA_KEY));
    }
    let declared = in_arrow.as_deref().or(in_parquet)?;
    let features = problems.keep(
        Features::from_json(declared, table.schema()).map_err(|e| Error::Data(format!("{name}: {e}"))),
    )?;
    for (expected, found) in features.schema().fields.iter().zip(&table.schema().fields) {
        let (column, kind, expected) = (found.name(), found.data_type(), expected.data_type());
        if kind != expected {
            problems.add(format!("{name}: column '{column}' is {kind}, expected {expected}"));
        }
    }
    let has_image = features.iter().any(|column| column == ("image", &Feature::Image));
    if !has_image {
        problems.add(format!("{name}: column 'image' is not declared as Image"));
    }
    let (classes, said) = (features.class_names(), &manifest.class_names);
    let has_label = classes == said;
    if !has_label {
        problems
            .add(format!("{name}: column 'label' has classes {classes:?}, but manifest.json says {said:?}"));
    }
    (has_image && has_label).then_some(features)
}

/// The schema as the writer embedded it, without what the reader adds.
fn arrow_schema(table: &Table) -> Option<Schema> {
    let metadata = table.metadata().file_metadata();
    let embedded: Vec<_> = metadata
        .key_value_metadata()?
        .iter()
        .filter(|pair| pair.key == ARROW_SCHEMA_META_KEY)
        .cloned()
        .collect();
    parquet_to_arrow_schema(metadata.schema_descr(), Some(&embedded)).ok()
}

/// Checks each row. Returns the hashes of the uids, if there are any. Fails if the rows cannot be read.
fn check_rows(
    name: &str,
    table: Table,
    entry: &FileEntry,
    manifest: &Manifest,
    problems: &mut Problems,
) -> Result<Vec<UidHash>> {
    let (mut images, mut labels, mut uids) = (Vec::new(), Vec::new(), Vec::new());
    let mut counts = vec![0; manifest.class_names.len()];
    let last_class = counts.len() as i64 - 1;
    let mut columns = vec!["image", "label"];
    if table.schema().field_with_name("uid").is_ok_and(|uid| *uid.data_type() == DataType::Utf8) {
        columns.push("uid");
    }
    let mut first_row = 0;
    for batch in table.read(&columns, manifest.shape.batch_rows())? {
        let batch = batch?;
        let bytes = hub::image_bytes(Path::new(name), &batch, "image")?;
        images.par_extend(bytes.into_par_iter().enumerate().filter_map(|(i, bytes)| {
            let problem = match bytes {
                Some(bytes) => image::decode_as(bytes, manifest.shape).err()?.to_string(),
                None => "image is null".into(),
            };
            Some(format!("row {}: {problem}", first_row + i))
        }));
        let column = batch.column_by_name("label").and_then(|l| l.as_primitive_opt::<Int64Type>());
        for (row, label) in (first_row..).zip(column.into_iter().flatten()) {
            let class = label.and_then(|label| usize::try_from(label).ok());
            if let Some(count) = class.and_then(|class| counts.get_mut(class)) {
                *count += 1;
                continue;
            }
            let label = label.map_or_else(|| "null".into(), |label| label.to_string());
            labels.push(format!("row {row}: label is {label}, expected 0 to {last_class}"));
        }
        let column = batch.column_by_name("uid").and_then(|u| u.as_string_opt::<i32>());
        uids.extend(column.into_iter().flatten().map(|uid| hash_uid(uid.unwrap_or_default())));
        first_row += batch.num_rows();
    }
    problems.add_all(name, images);
    problems.add_all(name, labels);
    let said = &entry.class_counts;
    if counts != *said {
        problems.add(format!("{name}: {counts:?} rows of each class, but manifest.json says {said:?}"));
    }
    Ok(uids)
}

/// Checks what the card promises about each configuration; `None` if it cannot be read.
fn check_card(
    front: &FrontMatter,
    manifest: &Manifest,
    checks: &[Option<FileCheck>],
    problems: &mut Problems,
) -> Option<Vec<ConfigReport>> {
    let configs = problems.keep(front.get::<Vec<ConfigItem>>("configs"))?;
    let infos = problems.keep(front.get::<Vec<InfoItem>>("dataset_info"))?;
    if configs.iter().filter(|config| config.default).count() != 1 {
        problems.add("README.md: not exactly one of 'configs' is the default");
    }
    let mut reports = Vec::new();
    let mut covered = BTreeSet::new();
    for config in &configs {
        let name = &config.config_name;
        let Some(info) = infos.iter().find(|info| info.config_name == *name) else {
            problems.add(format!("README.md: configuration '{name}' is not in 'dataset_info'"));
            continue;
        };
        let mut uids = HashSet::new();
        let (mut rows, mut counts) = (0, vec![0; manifest.class_names.len()]);
        for split in &config.data_files {
            let prefix = split.path.strip_suffix('*').unwrap_or(&split.path);
            let files = manifest.files.iter().zip(checks).filter(|(file, _)| file.path.starts_with(prefix));
            let (mut split_files, mut split_rows) = (0, 0);
            for (file, check) in files {
                split_files += 1;
                split_rows += file.rows;
                covered.insert(&file.path);
                counts.iter_mut().zip(&file.class_counts).for_each(|(sum, count)| *sum += count);
                let Some(check) = check else { continue };
                let twice = check.uids.iter().filter(|uid| !uids.insert(**uid)).count();
                if twice > 0 {
                    problems.add(format!("{}: {twice} uids that occur earlier in '{name}'", file.path));
                }
                if card::feature_items(&check.features) != info.features {
                    problems.add(format!("{}: features are not those of '{name}' in README.md", file.path));
                }
            }
            if split_files == 0 {
                problems.add(format!("README.md: '{name}' has no files {}", split.path));
            }
            let promised = info.splits.iter().find(|item| item.name == split.split);
            let promised = promised.map_or(0, |item| item.num_examples);
            if promised != split_rows {
                problems.add(format!(
                    "README.md: '{name}' has {promised} examples in {}, but the files have {split_rows}",
                    split.split
                ));
            }
            rows += split_rows;
        }
        let classes = manifest.class_names.iter().zip(counts);
        let classes = classes.map(|(name, rows)| ClassCount { name: name.clone(), rows }).collect();
        reports.push(ConfigReport { name: name.clone(), rows, classes });
    }
    for file in manifest.files.iter().filter(|file| !covered.contains(&file.path)) {
        problems.add(format!("{}: in no configuration of README.md", file.path));
    }
    Some(reports)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{
        Array, ArrayRef, Int32Array, Int64Array, LargeBinaryArray, RecordBatch, StringArray, StructArray,
    };
    use arrow_schema::Field;

    use super::*;
    use crate::data::{
        card::{CardSplit, tests::card},
        hub::{Dtype, ImageWriter, image_column},
        image::{Shape, encode_png},
    };

    const SHAPE: Shape = Shape { height: 2, width: 2, channels: 1 };
    const FILE: &str = "data/train-00000-of-00001.parquet";

    fn features() -> Features {
        Features::image_and_label(&["even".into(), "odd".into()]).with("uid", Feature::Value(Dtype::String))
    }

    fn rows(n: u8) -> Vec<ArrayRef> {
        let images: Vec<_> = (0..n).map(|i| encode_png(&[i; 4], SHAPE)).collect();
        vec![
            image_column(&images).unwrap(),
            Arc::new(Int64Array::from_iter_values((0..n).map(|i| i64::from(i % 2)))),
            Arc::new(StringArray::from_iter_values((0..n).map(|i| format!("u{i}")))),
        ]
    }

    /// A data set of `columns`, with a card and a manifest that `n` good rows would have.
    fn publish(dir: &Path, columns: Vec<ArrayRef>, n: u64) {
        let mut writer = ImageWriter::new(features(), "a generator").unwrap();
        writer.push(columns).unwrap();
        describe(dir, writer.finish(dir, FILE).unwrap(), n);
    }

    fn describe(dir: &Path, entry: FileEntry, n: u64) {
        let split = CardSplit {
            name: "train".into(),
            path: "data/train-*".into(),
            num_bytes: entry.bytes,
            num_examples: n,
        };
        card(features(), vec![split]).write(dir).unwrap();
        let classes = features().class_names().to_vec();
        Manifest::new(SHAPE, classes, vec![entry], serde_json::Value::Null).write(dir).unwrap();
    }

    fn problems(dir: &Path) -> String {
        let error = check_dataset(dir).unwrap_err();
        assert_eq!(error.exit_code(), 65);
        error.to_string()
    }

    #[test]
    fn a_good_data_set_is_reported_with_its_counts() {
        let dir = tempfile::tempdir().unwrap();
        publish(dir.path(), rows(5), 5);
        let report = check_dataset(dir.path()).unwrap();
        assert_eq!((report.files, report.rows), (1, 5));
        let classes: Vec<_> = report.configs[0].classes.iter().map(|c| (c.name.as_str(), c.rows)).collect();
        assert_eq!((report.configs[0].name.as_str(), classes), ("curated", vec![("even", 3), ("odd", 2)]));
    }

    #[test]
    fn all_problems_are_listed_and_not_only_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let mut columns = rows(4);
        let other = Shape { height: 1, width: 4, channels: 1 };
        let images = [encode_png(&[0; 4], SHAPE), b"junk".to_vec(), encode_png(&[0; 4], other)];
        let images: Vec<_> = images.iter().cycle().take(4).collect();
        columns[0] = image_column(&images).unwrap();
        columns[1] = Arc::new(Int64Array::from(vec![Some(0), None, Some(1), Some(1)]));
        columns[2] = Arc::new(StringArray::from(vec!["a", "b", "c", "a"]));
        publish(dir.path(), columns, 5);
        let text = problems(dir.path());
        for expected in [
            "5 problem(s)",
            "row 1: not an image: 4 bytes",
            "row 2: image is 1x4 grey, expected 2x2 grey",
            "row 1: label is null, expected 0 to 1",
            "1 uids that occur earlier in 'curated'",
            "'curated' has 5 examples in train, but the files have 4",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
    }

    #[test]
    fn a_changed_lost_or_added_file_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        publish(dir.path(), rows(3), 3);
        let path = dir.path().join(FILE);
        let bytes = std::fs::read(&path).unwrap();

        let extra = dir.path().join("data/train-00001-of-00002.parquet");
        std::fs::write(&extra, &bytes).unwrap();
        assert!(problems(dir.path()).contains("train-00001-of-00002.parquet: not in manifest.json"));
        std::fs::remove_file(extra).unwrap();

        for position in (0..bytes.len()).step_by(7) {
            let mut flipped = bytes.clone();
            flipped[position] ^= 1;
            std::fs::write(&path, flipped).unwrap();
            assert!(problems(dir.path()).contains("but manifest.json says"), "flipped at {position}");
        }

        std::fs::remove_file(&path).unwrap();
        assert!(problems(dir.path()).contains("in manifest.json, but not there"));
        assert_eq!(check_dataset(&dir.path().join("none")).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn types_and_metadata_that_datasets_would_misread_are_problems() {
        let dir = tempfile::tempdir().unwrap();
        let text = |schema: Schema, columns: Vec<ArrayRef>, key_values: &[(&str, &str)]| {
            let batch = RecordBatch::try_new(Arc::new(Schema::new(schema.fields.clone())), columns).unwrap();
            let path = dir.path().join(FILE);
            crate::data::table::write(&path, &schema, [Ok(batch)], 100, key_values).unwrap();
            let (blake3, bytes) = fs::hash_file(&path).unwrap();
            let entry = FileEntry { path: FILE.into(), rows: 3, bytes, blake3, class_counts: vec![2, 1] };
            describe(dir.path(), entry, 3);
            problems(dir.path())
        };
        let json = features().to_json();
        let declared: &[(&str, &str)] = &[(hub::METADATA_KEY, &json)];

        let good = features().schema();
        let found = text((*good).clone(), rows(3), declared);
        assert!(found.contains("1 problem(s)") && found.contains("metadata of the Arrow schema"), "{found}");
        let found = text((*good).clone(), rows(3), &[]);
        assert!(found.contains("no 'huggingface' in the key-value metadata"), "{found}");

        let mut columns = rows(3);
        let images = columns[0].as_struct();
        let large: ArrayRef =
            Arc::new(LargeBinaryArray::from_iter(images.column(0).as_binary::<i32>().iter()));
        let field = |name, array: &ArrayRef| Arc::new(Field::new(name, array.data_type().clone(), true));
        columns[0] = Arc::new(StructArray::from(vec![(field("bytes", &large), large)]));
        let labels = columns[1].as_primitive::<Int64Type>().iter().map(|label| label.map(|l| l as i32));
        columns[1] = Arc::new(Int32Array::from_iter(labels));
        let names = ["image", "label", "uid"];
        let fields: Vec<_> = names.iter().zip(&columns).map(|(name, array)| field(name, array)).collect();
        let found = text(Schema::new(fields), columns, declared);
        for expected in ["column 'image' is Struct", "column 'label' is Int32, expected Int64"] {
            assert!(found.contains(expected), "{expected}: {found}");
        }
    }
}
