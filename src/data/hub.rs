//! Images in Parquet as the Hugging Face Hub and `datasets` expect them, with our columns next to theirs.
//!
//! `image` is exactly `struct<bytes: binary, path: string>` and a class label exactly `int64`: with any other type,
//! `datasets` silently forgets that they are images and classes. The meaning of the columns is given as JSON under
//! the key `huggingface`, in the Arrow schema (for `datasets`) and as a Parquet key-value (for everybody else).
//! Image bytes are already PNG or JPEG and are stored uncompressed.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow_array::{
    Array, ArrayRef, BinaryArray, Int64Array, RecordBatch, StringArray, StructArray, cast::AsArray,
    types::Int64Type,
};
use arrow_schema::{DataType, Field, Fields, Schema, SchemaRef};
use parquet::{
    basic::{Compression, Encoding},
    file::properties::EnabledStatistics,
    schema::types::ColumnPath,
};
use serde::Deserialize;
use serde_json::Value as Json;

use super::{
    manifest::FileEntry,
    table::{self, Batches, ROW_GROUP_ROWS, RowGroupWriter, Table},
};
use crate::{Error, Result, fs};

/// The metadata key under which the features of a file are declared.
pub const METADATA_KEY: &str = "huggingface";

/// The value of the key `digital_source_type` for images that a model made (IPTC).
const SYNTHETIC_SOURCE_TYPE: &str = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia";

named! {
    /// The type of a plain column, by its name in `datasets`.
    pub enum Dtype {
        /// `bool`.
        Bool = "bool",
        /// `int32`.
        Int32 = "int32",
        /// `int64`.
        Int64 = "int64",
        /// `uint32`.
        Uint32 = "uint32",
        /// `uint64`.
        Uint64 = "uint64",
        /// `float32`.
        Float32 = "float32",
        /// `float64`.
        Float64 = "float64",
        /// `string`.
        String = "string",
    }
}

impl Dtype {
    fn arrow(self) -> DataType {
        match self {
            Self::Bool => DataType::Boolean,
            Self::Int32 => DataType::Int32,
            Self::Int64 => DataType::Int64,
            Self::Uint32 => DataType::UInt32,
            Self::Uint64 => DataType::UInt64,
            Self::Float32 => DataType::Float32,
            Self::Float64 => DataType::Float64,
            Self::String => DataType::Utf8,
        }
    }
}

/// What a column means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Feature {
    /// An encoded image with an optional path.
    Image,
    /// An index into these names. Null in a pool whose generator has no classes.
    ClassLabel(Vec<String>),
    /// A plain value.
    Value(Dtype),
}

impl Feature {
    /// The Arrow type that `datasets` expects for this feature.
    fn arrow(&self) -> DataType {
        match self {
            Self::Image => DataType::Struct(image_fields()),
            Self::ClassLabel(_) => DataType::Int64,
            Self::Value(dtype) => dtype.arrow(),
        }
    }

    fn json(&self) -> Json {
        match self {
            Self::Image => serde_json::json!({"_type": "Image"}),
            Self::ClassLabel(names) => serde_json::json!({"names": names, "_type": "ClassLabel"}),
            Self::Value(dtype) => serde_json::json!({"dtype": dtype, "_type": "Value"}),
        }
    }

    fn from_json(json: &Json) -> Option<Self> {
        match json["_type"].as_str()? {
            "Image" => Some(Self::Image),
            "ClassLabel" => Vec::deserialize(&json["names"]).ok().map(Self::ClassLabel),
            "Value" => json["dtype"].as_str()?.parse().ok().map(Self::Value),
            _ => None,
        }
    }
}

/// The columns of a file of images, in order, and what they mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Features(Vec<(String, Feature)>);

impl Features {
    /// `image` and `label`, the columns that every consumer looks for.
    pub fn image_and_label(class_names: &[String]) -> Self {
        Self(vec![
            ("image".into(), Feature::Image),
            ("label".into(), Feature::ClassLabel(class_names.to_vec())),
        ])
    }

    /// Adds a column at the end.
    pub fn with(mut self, name: &str, feature: Feature) -> Self {
        self.0.push((name.into(), feature));
        self
    }

    /// The columns in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Feature)> {
        self.0.iter().map(|(name, feature)| (name.as_str(), feature))
    }

    /// The class names of the column `label`; empty if it is not a class label.
    pub fn class_names(&self) -> &[String] {
        match self.iter().find(|(name, _)| *name == "label") {
            Some((_, Feature::ClassLabel(names))) => names,
            _ => &[],
        }
    }

    /// The Arrow schema, with the features declared in its metadata. All columns may be null, as `datasets`
    /// writes them.
    pub fn schema(&self) -> SchemaRef {
        let fields: Fields =
            self.iter().map(|(name, feature)| Field::new(name, feature.arrow(), true)).collect();
        Arc::new(Schema::new_with_metadata(fields, [(METADATA_KEY.to_owned(), self.to_json())].into()))
    }

    /// The declaration as `datasets` writes it: `{"info": {"features": {…}}}`, in the order of the columns.
    pub fn to_json(&self) -> String {
        let features = self.iter().map(|(name, feature)| format!("{}: {}", Json::from(name), feature.json()));
        format!(r#"{{"info": {{"features": {{{}}}}}}}"#, features.collect::<Vec<_>>().join(", "))
    }

    /// The features of a file with the columns of `schema` that are declared in `json`.
    ///
    /// Fails with [`Error::Data`] if a column is not declared, or is declared as something that this crate does not
    /// write.
    pub fn from_json(json: &str, schema: &Schema) -> Result<Self> {
        let declared = declared_features(json)
            .ok_or_else(|| Error::Data(format!("'{METADATA_KEY}' metadata is {json}, expected features")))?;
        let feature = |field: &Arc<Field>| {
            let json = declared.get(field.name());
            let feature = json.and_then(Feature::from_json).ok_or_else(|| {
                let found = json.map_or_else(|| "nothing".to_owned(), Json::to_string);
                Error::Data(format!("column '{}' is declared as {found}, expected a feature", field.name()))
            })?;
            Ok((field.name().clone(), feature))
        };
        schema.fields.iter().map(feature).collect::<Result<_>>().map(Self)
    }
}

fn declared_features(json: &str) -> Option<serde_json::Map<String, Json>> {
    let mut json: Json = serde_json::from_str(json).ok()?;
    match json["info"]["features"].take() {
        Json::Object(features) => Some(features),
        _ => None,
    }
}

/// The class names that a file declares for a column, wherever it does.
pub(super) fn declared_class_names(json: &str, column: &str) -> Option<Vec<String>> {
    match Feature::from_json(declared_features(json)?.get(column)?)? {
        Feature::ClassLabel(names) => Some(names),
        _ => None,
    }
}

fn image_fields() -> Fields {
    Fields::from(vec![Field::new("bytes", DataType::Binary, true), Field::new("path", DataType::Utf8, true)])
}

/// An `image` column: encoded images, all without a path.
///
/// Fails with [`Error::Alarm`] if together they exceed 2 GiB: write fewer rows at a time.
pub fn image_column<B: AsRef<[u8]>>(images: &[B]) -> Result<ArrayRef> {
    let total: usize = images.iter().map(|image| image.as_ref().len()).sum();
    if i32::try_from(total).is_err() {
        bail!(Alarm, "{} images have {total} bytes, expected less than 2 GiB in one batch", images.len());
    }
    let bytes: ArrayRef = Arc::new(BinaryArray::from_iter_values(images));
    let path = Arc::new(StringArray::new_null(images.len()));
    Ok(Arc::new(StructArray::new(image_fields(), vec![bytes, path], None)))
}

/// A writer for one file of images. The file gets its name only in [`ImageWriter::finish`].
///
/// The file is made in memory, so that its hash is that of the intended bytes and an interrupted run leaves nothing
/// behind: keep files to a few hundred megabytes ([`ImageWriter::bytes`]). Its bytes are a function of the
/// features, the key-values and the rows, not of how they were pushed. A row group has 16,384 rows, or fewer if
/// their images have more than a GiB.
pub struct ImageWriter {
    features: Features,
    schema: SchemaRef,
    writer: RowGroupWriter<Vec<u8>>,
    class_counts: Vec<u64>,
    /// The most bytes of images in a row group, unless a single image has more.
    largest_group: usize,
    /// Rows of the current row group, and the bytes of their images.
    group: (usize, usize),
}

/// [`ImageWriter::largest_group`]: a column of a row group is read as one array, whose offsets end at 2 GiB.
const ROW_GROUP_BYTES: usize = 1 << 30;

impl ImageWriter {
    /// A writer of rows with these features, of images that `generator` made: the file's metadata name it under the
    /// key `generator`, and under `digital_source_type` say that the images are synthetic (IPTC).
    pub fn new(features: Features, generator: &str) -> Result<Self> {
        let schema = features.schema();
        let json = features.to_json();
        let source_type = ("digital_source_type", SYNTHETIC_SOURCE_TYPE);
        let mut properties =
            table::properties(&[(METADATA_KEY, &json), source_type, ("generator", generator)]);
        for (name, _) in features.iter().filter(|(_, feature)| **feature == Feature::Image) {
            for child in ["bytes", "path"] {
                let column = || ColumnPath::from(vec![name.to_owned(), child.to_owned()]);
                properties = properties
                    .set_column_compression(column(), Compression::UNCOMPRESSED)
                    .set_column_dictionary_enabled(column(), false)
                    .set_column_encoding(column(), Encoding::PLAIN)
                    .set_column_statistics_enabled(column(), EnabledStatistics::None);
            }
        }
        let writer =
            RowGroupWriter::new(Path::new("images"), Vec::new(), schema.clone(), properties, ROW_GROUP_ROWS)?;
        let class_counts = vec![0; features.class_names().len()];
        let (largest_group, group) = (ROW_GROUP_BYTES, (0, 0));
        Ok(Self { features, schema, writer, class_counts, largest_group, group })
    }

    /// Appends rows: a column for each feature, in their order; [`image_column`] makes the images.
    ///
    /// Fails with [`Error::Alarm`] if the columns are different, or if a label is not the index of a class.
    pub fn push(&mut self, columns: Vec<ArrayRef>) -> Result<()> {
        let batch = RecordBatch::try_new(self.schema.clone(), columns)
            .map_err(|e| Error::Alarm(format!("columns do not fit the declared features: {e}")))?;
        let labels = batch.column_by_name("label").and_then(|l| l.as_primitive_opt::<Int64Type>());
        for label in labels.into_iter().flatten().flatten() {
            let classes = self.class_counts.len();
            match usize::try_from(label).ok().and_then(|label| self.class_counts.get_mut(label)) {
                Some(count) => *count += 1,
                None => bail!(Alarm, "label to write is {label}, expected 0 to {}", classes as i64 - 1),
            }
        }
        let mut sizes = vec![0; batch.num_rows()];
        for (name, _) in self.features.iter().filter(|(_, feature)| **feature == Feature::Image) {
            let images = image_bytes(Path::new("images"), &batch, name)?;
            sizes.iter_mut().zip(images).for_each(|(size, image)| *size += image.map_or(0, <[u8]>::len));
        }
        let mut start = 0;
        for (row, size) in sizes.into_iter().enumerate() {
            let (rows, bytes) = self.group;
            if rows == ROW_GROUP_ROWS || (rows > 0 && bytes + size > self.largest_group) {
                self.writer.push(batch.slice(start, row - start))?;
                self.writer.end_group()?;
                (start, self.group) = (row, (0, 0));
            }
            self.group = (self.group.0 + 1, self.group.1 + size);
        }
        self.writer.push(batch.slice(start, batch.num_rows() - start))
    }

    /// The approximate size of the file so far, in bytes.
    pub fn bytes(&self) -> usize {
        self.writer.bytes()
    }

    /// Publishes the file as `name`, a relative path with `/`, in `dir`. Returns its entry for a manifest.
    pub fn finish(self, dir: &Path, name: &str) -> Result<FileEntry> {
        let (bytes, rows) = self.writer.finish()?;
        fs::publish(&dir.join(name), &bytes)?;
        Ok(FileEntry {
            path: name.into(),
            rows,
            bytes: bytes.len() as u64,
            blake3: blake3::hash(&bytes).to_hex().to_string(),
            class_counts: self.class_counts,
        })
    }
}

/// The rows of a file that [`ImageWriter`] wrote, batch by batch. Ends after the first error.
pub struct ImageReader {
    batches: Batches,
    next_row: usize,
}

impl ImageReader {
    /// Opens a file to read some of its columns, `image` among them if images are wanted.
    ///
    /// Fails like [`Table::open`] and [`Table::read`].
    pub fn open(path: &Path, columns: &[&str], batch_rows: usize) -> Result<Self> {
        Ok(Self { batches: Table::open(path)?.read(columns, batch_rows)?, next_row: 0 })
    }
}

impl Iterator for ImageReader {
    type Item = Result<ImageBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        Some(self.batches.next()?.map(|rows| {
            let first_row = self.next_row;
            self.next_row += rows.num_rows();
            ImageBatch { file: self.batches.file().into(), first_row, rows }
        }))
    }
}

/// Some rows of a file of images.
pub struct ImageBatch {
    file: PathBuf,
    first_row: usize,
    rows: RecordBatch,
}

impl ImageBatch {
    /// The column `uid`, without nulls.
    pub fn uids(&self) -> Result<&StringArray> {
        table::required(&self.file, &self.rows, "uid")
    }

    /// The column `label`. `None` is an unknown label.
    pub fn labels(&self) -> Result<&Int64Array> {
        table::column(&self.file, &self.rows, "label")
    }

    /// The encoded images. Fails with [`Error::Data`] if one is null.
    pub fn images(&self) -> Result<Vec<&[u8]>> {
        let image = |(row, bytes): (usize, Option<_>)| {
            bytes.ok_or_else(|| Error::Data(format!("{}: row {row}: image is null", self.file.display())))
        };
        (self.first_row..).zip(image_bytes(&self.file, &self.rows, "image")?).map(image).collect()
    }
}

/// The encoded images of a column, whatever its binary type. `None` where there is no image.
pub(super) fn image_bytes<'a>(
    file: &Path,
    batch: &'a RecordBatch,
    column: &str,
) -> Result<Vec<Option<&'a [u8]>>> {
    let array = table::any_column(file, batch, column)?;
    let wrong_type = || {
        Error::Data(format!(
            "{}: column '{column}' is {}, expected struct<bytes: binary, path: string>",
            file.display(),
            array.data_type()
        ))
    };
    let images = array.as_any().downcast_ref::<StructArray>().ok_or_else(wrong_type)?;
    let bytes = images.column_by_name("bytes").ok_or_else(wrong_type)?;
    fn present<'a>(
        bytes: impl Iterator<Item = Option<&'a [u8]>>,
        images: &StructArray,
    ) -> Vec<Option<&'a [u8]>> {
        bytes.enumerate().map(|(row, bytes)| bytes.filter(|_| images.is_valid(row))).collect()
    }
    match bytes.data_type() {
        DataType::Binary => Ok(present(bytes.as_binary::<i32>().iter(), images)),
        DataType::LargeBinary => Ok(present(bytes.as_binary::<i64>().iter(), images)),
        DataType::BinaryView => Ok(present(bytes.as_binary_view().iter(), images)),
        _ => Err(wrong_type()),
    }
}

#[cfg(test)]
mod tests {
    use arrow_array::Float32Array;

    use super::*;
    use crate::data::image::{Shape, decode_as, encode_png};

    const SHAPE: Shape = Shape { height: 2, width: 2, channels: 3 };

    fn features() -> Features {
        Features::image_and_label(&["a".into(), "b \"quoted\"".into()])
            .with("uid", Feature::Value(Dtype::String))
            .with("score", Feature::Value(Dtype::Float32))
    }

    fn rows(range: std::ops::Range<i64>) -> Vec<ArrayRef> {
        let images: Vec<_> = range.clone().map(|i| encode_png(&[i as u8; 12], SHAPE)).collect();
        vec![
            image_column(&images).unwrap(),
            Arc::new(Int64Array::from_iter(range.clone().map(|i| (i % 3 != 2).then_some(i % 3)))),
            Arc::new(StringArray::from_iter_values(range.clone().map(|i| format!("u{i}")))),
            Arc::new(Float32Array::from_iter_values(range.map(|i| i as f32))),
        ]
    }

    fn publish(dir: &Path, name: &str, cuts: &[i64]) -> FileEntry {
        let mut writer = ImageWriter::new(features(), "a generator").unwrap();
        for cut in cuts.windows(2) {
            writer.push(rows(cut[0]..cut[1])).unwrap();
        }
        writer.finish(dir, name).unwrap()
    }

    #[test]
    fn the_declaration_is_that_of_datasets() {
        let expected = r#"{"info": {"features": {
            "image": {"_type": "Image"},
            "label": {"names": ["a", "b \"quoted\""], "_type": "ClassLabel"},
            "uid": {"dtype": "string", "_type": "Value"},
            "score": {"dtype": "float32", "_type": "Value"}}}}"#;
        let json = features().to_json();
        assert_eq!(
            serde_json::from_str::<Json>(&json).unwrap(),
            serde_json::from_str::<Json>(expected).unwrap()
        );
        assert_eq!(Features::from_json(&json, &features().schema()).unwrap(), features());
        assert_eq!(declared_class_names(&json, "label").unwrap(), features().class_names());
    }

    #[test]
    fn files_have_the_exact_types_and_the_declaration_in_both_places() {
        let dir = tempfile::tempdir().unwrap();
        let entry = publish(dir.path(), "data/train.parquet", &[0, 7]);
        let table = Table::open(&dir.path().join(&entry.path)).unwrap();
        assert_eq!(table.schema().fields, features().schema().fields);
        assert_eq!(table.schema().field(0).data_type(), &DataType::Struct(image_fields()));
        assert_eq!(table.schema().field(1).data_type(), &DataType::Int64);
        assert_eq!(table.key_value(METADATA_KEY), Some(features().to_json().as_str()));
        assert_eq!(table.key_value("digital_source_type"), Some(SYNTHETIC_SOURCE_TYPE));
        assert_eq!(table.metadata().file_metadata().created_by(), Some("proxyset"));
    }

    #[test]
    fn images_are_stored_plain_and_the_rest_compressed() {
        let dir = tempfile::tempdir().unwrap();
        let entry = publish(dir.path(), "train.parquet", &[0, 7]);
        let table = Table::open(&dir.path().join(entry.path)).unwrap();
        for column in table.metadata().row_group(0).columns() {
            let is_image = column.column_path().string().starts_with("image.");
            assert_eq!(column.compression() == Compression::UNCOMPRESSED, is_image);
            if is_image {
                assert!(column.dictionary_page_offset().is_none());
                assert!(column.encodings().all(|e| matches!(e, Encoding::PLAIN | Encoding::RLE)));
            }
        }
    }

    #[test]
    fn bytes_depend_on_the_rows_and_not_on_how_they_were_pushed() {
        let dir = tempfile::tempdir().unwrap();
        let n = ROW_GROUP_ROWS as i64 + 100;
        let one = publish(dir.path(), "file", &[0, n]);
        let bytes = std::fs::read(dir.path().join("file")).unwrap();
        let many = publish(dir.path(), "file", &[0, 1, 64, 5_000, n - 50, n]);
        assert_eq!(one, many);
        assert!(bytes == std::fs::read(dir.path().join("file")).unwrap());
        assert_eq!((one.rows, one.bytes), (n as u64, bytes.len() as u64));
        assert_eq!(one.blake3, blake3::hash(&bytes).to_hex().to_string());
        let groups = Table::open(&dir.path().join("file")).unwrap();
        let groups: Vec<_> = groups.metadata().row_groups().iter().map(|g| g.num_rows()).collect();
        assert_eq!(groups, [16_384, 100]);
    }

    #[test]
    fn a_row_group_ends_before_its_images_have_too_many_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let shape = Shape { height: 16, width: 16, channels: 3 };
        // Noise, which PNG cannot compress.
        let noise: Vec<u8> = (0..40 * shape.size()).map(|i| crate::rng::uint(1, i as u64, 0) as u8).collect();
        let images: Vec<_> = noise.chunks(shape.size()).map(|image| encode_png(image, shape)).collect();
        let bound = 5 * images[0].len() + 10;
        let publish = |name: &str, cuts: &[usize]| {
            let features = Features::image_and_label(&["a".into()]);
            let mut writer = ImageWriter::new(features, "a generator").unwrap();
            writer.largest_group = bound;
            for cut in cuts.windows(2) {
                let labels = Int64Array::from_iter_values((cut[0]..cut[1]).map(|_| 0));
                let columns = vec![image_column(&images[cut[0]..cut[1]]).unwrap(), Arc::new(labels) as _];
                writer.push(columns).unwrap();
            }
            writer.finish(dir.path(), name).unwrap()
        };
        let one = publish("one", &[0, 40]);
        assert_eq!(publish("many", &[0, 1, 4, 17, 35, 40]).blake3, one.blake3);
        let table = Table::open(&dir.path().join("one")).unwrap();
        let groups: Vec<_> = table.metadata().row_groups().iter().map(|g| g.num_rows()).collect();
        assert_eq!(groups.iter().sum::<i64>(), 40);
        let mut first = 0;
        for &rows in &groups {
            let bytes = |n: i64| -> usize { images[first..].iter().take(n as usize).map(Vec::len).sum() };
            assert!(bytes(rows) <= bound && (bytes(rows + 1) > bound || first + rows as usize == 40));
            first += rows as usize;
        }
        let mut read = Vec::new();
        for batch in ImageReader::open(&dir.path().join("one"), &["image"], 7).unwrap() {
            for image in batch.unwrap().images().unwrap() {
                read.extend(decode_as(image, shape).unwrap());
            }
        }
        assert!(read == noise);
    }

    #[test]
    fn rows_are_read_as_they_were_written_and_classes_counted() {
        let dir = tempfile::tempdir().unwrap();
        let entry = publish(dir.path(), "file", &[0, 8]);
        assert_eq!((entry.rows, entry.class_counts), (8, vec![3, 3]));
        let columns = ["image", "label", "uid"];
        let mut rows = 0;
        for batch in ImageReader::open(&dir.path().join("file"), &columns, 5).unwrap() {
            let batch = batch.unwrap();
            assert_eq!(batch.first_row, rows);
            let images = batch.images().unwrap();
            for (i, image) in images.iter().enumerate() {
                let row = rows + i;
                assert_eq!(decode_as(image, SHAPE).unwrap(), [row as u8; 12]);
                assert_eq!(batch.uids().unwrap().value(i), format!("u{row}"));
                assert_eq!(batch.labels().unwrap().is_null(i), row % 3 == 2);
            }
            rows += images.len();
        }
        assert_eq!(rows, 8);
    }

    #[test]
    fn labels_outside_the_classes_and_other_columns_are_alarms() {
        let mut writer = ImageWriter::new(features(), "a generator").unwrap();
        let mut columns = rows(0..1);
        columns[1] = Arc::new(Int64Array::from(vec![2]));
        assert_eq!(
            writer.push(columns.clone()).unwrap_err().to_string(),
            "label to write is 2, expected 0 to 1"
        );
        columns.pop();
        assert_eq!(writer.push(columns).unwrap_err().exit_code(), 70);
    }
}
