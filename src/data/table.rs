//! Small Parquet tables: scores, labels, selections. The same rows give the same bytes.
//!
//! Everything that could differ between two runs is fixed: the writer's name, the compression, the size of row
//! groups, and where pages end, which does not depend on how the rows were cut into batches. Reading trusts
//! nothing: a damaged file is [`Error::Data`].

use std::{
    any::Any,
    fs::File,
    io::Write,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use arrow_array::{
    Array, BooleanArray, GenericByteArray, PrimitiveArray, RecordBatch,
    types::{ArrowPrimitiveType, ByteArrayType},
};
use arrow_schema::{DataType, Schema, SchemaRef};
use arrow_select::coalesce::BatchCoalescer;
use parquet::{
    arrow::{
        ArrowWriter, ProjectionMask,
        arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder},
    },
    basic::{Compression, ZstdLevel},
    errors::ParquetError,
    file::{
        metadata::KeyValue,
        properties::{WriterProperties, WriterPropertiesBuilder},
        reader::ChunkReader,
    },
    schema::types::ColumnPath,
};

use crate::{Error, Result, fs};

/// The usual number of rows in a row group: about 35 MB of 32x32 images.
pub const ROW_GROUP_ROWS: usize = 16_384;

/// Writes a table: all of it or nothing, see [`fs::publish_with`]. Returns the number of rows.
///
/// Row groups have `row_group_rows` rows, at least 1; the last may have fewer. `key_values` become the file's
/// key-value metadata; metadata of `schema` itself is not written. Fails with the first error of `batches`, with
/// [`Error::Alarm`] if a batch has another schema, and with [`Error::Io`].
pub fn write(
    path: &Path,
    schema: &Schema,
    batches: impl IntoIterator<Item = Result<RecordBatch>>,
    row_group_rows: usize,
    key_values: &[(&str, &str)],
) -> Result<u64> {
    let schema = SchemaRef::new(Schema::new(schema.fields.clone()));
    let mut rows = 0;
    // Zstandard hardly shrinks numbers and names, and setting it up for each column chunk takes longer.
    let properties = properties(key_values).set_compression(Compression::SNAPPY);
    fs::publish_with(path, |file| {
        let mut writer = RowGroupWriter::new(path, file, schema, properties, row_group_rows)?;
        for batch in batches {
            writer.push(batch?)?;
        }
        (_, rows) = writer.finish()?;
        Ok(())
    })?;
    Ok(rows)
}

/// What all of this crate's Parquet files have in common.
pub(super) fn properties(key_values: &[(&str, &str)]) -> WriterPropertiesBuilder {
    let key_values = key_values.iter().map(|(key, value)| KeyValue::new(key.to_string(), value.to_string()));
    WriterProperties::builder()
        .set_created_by("proxyset".into())
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        // Names that never repeat do not benefit from a dictionary.
        .set_column_dictionary_enabled(ColumnPath::from("uid"), false)
        .set_key_value_metadata(Some(key_values.collect()))
}

/// Writes row groups of an exact size. The encoder gets one batch per row group, so that the bytes depend on the
/// rows and not on the batches in which they came.
pub(super) struct RowGroupWriter<W: Write + Send> {
    path: PathBuf,
    writer: ArrowWriter<W>,
    groups: BatchCoalescer,
    rows: u64,
}

impl<W: Write + Send> RowGroupWriter<W> {
    /// A writer to `sink`; `path` names it in errors.
    pub(super) fn new(
        path: &Path,
        sink: W,
        schema: SchemaRef,
        properties: WriterPropertiesBuilder,
        row_group_rows: usize,
    ) -> Result<Self> {
        let properties = properties.set_max_row_group_row_count(Some(row_group_rows)).build();
        let writer =
            ArrowWriter::try_new(sink, schema.clone(), Some(properties)).map_err(|e| write_error(path, e))?;
        let groups = BatchCoalescer::new(schema, row_group_rows);
        Ok(Self { path: path.into(), writer, groups, rows: 0 })
    }

    /// Appends rows. Fails with [`Error::Alarm`] if the columns are not those of the schema.
    pub(super) fn push(&mut self, batch: RecordBatch) -> Result<()> {
        let (found, expected) = (&batch.schema_ref().fields, &self.groups.schema().fields);
        if found != expected {
            let file = self.path.display();
            bail!(Alarm, "{file}: rows to write have columns {found:?}, expected {expected:?}");
        }
        self.rows += batch.num_rows() as u64;
        self.groups.push_batch(batch).map_err(|e| write_error(&self.path, e.into()))?;
        self.write_completed()
    }

    /// Ends the row group early; the next row begins another one.
    pub(super) fn end_group(&mut self) -> Result<()> {
        self.groups.finish_buffered_batch().map_err(|e| write_error(&self.path, e.into()))?;
        self.write_completed()?;
        self.writer.flush().map_err(|e| write_error(&self.path, e))
    }

    /// Writes the remaining rows and the footer. Returns the sink and the number of rows.
    pub(super) fn finish(mut self) -> Result<(W, u64)> {
        self.end_group()?;
        let sink = self.writer.into_inner().map_err(|e| write_error(&self.path, e))?;
        Ok((sink, self.rows))
    }

    /// The number of bytes written so far and waiting to be written.
    pub(super) fn bytes(&self) -> usize {
        self.writer.bytes_written() + self.groups.size()
    }

    fn write_completed(&mut self) -> Result<()> {
        while let Some(group) = self.groups.next_completed_batch() {
            self.writer.write(&group).map_err(|e| write_error(&self.path, e))?;
        }
        Ok(())
    }
}

fn write_error(path: &Path, error: ParquetError) -> Error {
    match error {
        ParquetError::External(source) => match source.downcast::<std::io::Error>() {
            Ok(source) => Error::io(path)(*source),
            Err(source) => Error::Alarm(format!("{}: cannot be written: {source}", path.display())),
        },
        other => Error::Alarm(format!("{}: cannot be written: {other}", path.display())),
    }
}

/// A Parquet file whose footer has been read, but none of its rows.
pub struct Table<R: ChunkReader + 'static = File> {
    file: PathBuf,
    builder: ParquetRecordBatchReaderBuilder<R>,
}

impl Table {
    /// Opens a local file. Fails with [`Error::Io`] if it cannot be opened, with [`Error::Data`] if it is not
    /// a Parquet file or its footer is damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        Self::new(path, file)
    }
}

impl<R: ChunkReader + 'static> Table<R> {
    /// Opens any source of bytes; `name` stands for it in errors.
    pub fn new(name: impl Into<PathBuf>, input: R) -> Result<Self> {
        let file = name.into();
        let builder = guarded(&file, || ParquetRecordBatchReaderBuilder::try_new(input))?;
        Ok(Self { file, builder })
    }

    /// The name of the file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The columns.
    pub fn schema(&self) -> &SchemaRef {
        self.builder.schema()
    }

    /// The number of rows according to the footer.
    pub fn rows(&self) -> u64 {
        self.builder.metadata().file_metadata().num_rows().try_into().unwrap_or(0)
    }

    /// A value of the file's key-value metadata.
    pub fn key_value(&self, key: &str) -> Option<&str> {
        let pairs = self.builder.metadata().file_metadata().key_value_metadata()?;
        pairs.iter().find(|pair| pair.key == key)?.value.as_deref()
    }

    /// Parquet's own metadata.
    pub(super) fn metadata(&self) -> &parquet::file::metadata::ParquetMetaData {
        self.builder.metadata()
    }

    /// Streams the rows of some columns in batches of at most `batch_rows`.
    ///
    /// The batches have the columns in the file's order, which need not be that of `columns`. Fails with
    /// [`Error::Data`] if one is missing, listing those that exist.
    pub fn read(self, columns: &[&str], batch_rows: usize) -> Result<Batches> {
        let schema = self.builder.schema();
        let roots = columns
            .iter()
            .map(|name| schema.index_of(name).map_err(|_| missing(&self.file, name, schema)))
            .collect::<Result<Vec<_>>>()?;
        let mask = ProjectionMask::roots(self.builder.parquet_schema(), roots);
        let builder = self.builder.with_projection(mask).with_batch_size(batch_rows);
        let reader = guarded(&self.file, || builder.build())?;
        Ok(Batches { file: self.file, reader: Some(reader) })
    }
}

/// The rows of a [`Table`], batch by batch. Ends after the first error.
pub struct Batches {
    file: PathBuf,
    reader: Option<ParquetRecordBatchReader>,
}

impl Batches {
    /// The name of the file.
    pub fn file(&self) -> &Path {
        &self.file
    }
}

impl Iterator for Batches {
    type Item = Result<RecordBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        let reader = self.reader.as_mut()?;
        let batch = guarded(&self.file, || reader.next().transpose().map_err(ParquetError::from)).transpose();
        if !matches!(batch, Some(Ok(_))) {
            self.reader = None;
        }
        batch
    }
}

/// Runs part of the Parquet decoder, which does not withstand all damaged files: its panics become [`Error::Data`],
/// like its errors.
fn guarded<T>(file: &Path, decode: impl FnOnce() -> Result<T, ParquetError>) -> Result<T> {
    let damaged = |why: &dyn std::fmt::Display| {
        Error::Data(format!("{}: not a Parquet file, or a damaged one: {why}", file.display()))
    };
    match catch_unwind(AssertUnwindSafe(decode)) {
        Ok(result) => result.map_err(|e| damaged(&e)),
        Err(panic) => Err(damaged(&panic_message(&*panic))),
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("the decoder gave up")
}

/// An array type that holds exactly one Arrow data type.
pub trait TypedArray: Array + 'static {
    /// That data type.
    const TYPE: DataType;
}

impl<T: ArrowPrimitiveType> TypedArray for PrimitiveArray<T> {
    const TYPE: DataType = T::DATA_TYPE;
}

impl<T: ByteArrayType> TypedArray for GenericByteArray<T> {
    const TYPE: DataType = T::DATA_TYPE;
}

impl TypedArray for BooleanArray {
    const TYPE: DataType = DataType::Boolean;
}

/// A column by name and type. Fails with [`Error::Data`] naming `file`, the column and the types.
pub fn column<'a, A: TypedArray>(file: &Path, batch: &'a RecordBatch, name: &str) -> Result<&'a A> {
    let array = any_column(file, batch, name)?;
    array.as_any().downcast_ref().ok_or_else(|| {
        Error::Data(format!(
            "{}: column '{name}' is {}, expected {}",
            file.display(),
            array.data_type(),
            A::TYPE
        ))
    })
}

/// Like [`column()`], and no value may be null.
pub fn required<'a, A: TypedArray>(file: &Path, batch: &'a RecordBatch, name: &str) -> Result<&'a A> {
    let array: &A = column(file, batch, name)?;
    let (nulls, rows) = (array.null_count(), array.len());
    if nulls > 0 {
        bail!(Data, "{}: column '{name}' has {nulls} nulls in {rows} rows, expected none", file.display());
    }
    Ok(array)
}

/// A column of any type, by name.
pub(super) fn any_column<'a>(file: &Path, batch: &'a RecordBatch, name: &str) -> Result<&'a dyn Array> {
    let array = batch.column_by_name(name).ok_or_else(|| missing(file, name, batch.schema_ref()))?;
    Ok(array.as_ref())
}

fn missing(file: &Path, name: &str, schema: &Schema) -> Error {
    let found: Vec<_> = schema.fields.iter().map(|field| field.name().as_str()).collect();
    Error::Data(format!("{}: no column '{name}', found {}", file.display(), found.join(", ")))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{Float32Array, Int64Array, StringArray};
    use arrow_schema::Field;
    use arrow_select::concat::concat_batches;

    use super::*;

    fn scores(rows: std::ops::Range<i64>) -> RecordBatch {
        RecordBatch::try_from_iter([
            ("uid", Arc::new(StringArray::from_iter_values(rows.clone().map(|i| format!("u{i}")))) as _),
            ("score", Arc::new(Float32Array::from_iter_values(rows.map(|i| i as f32 / 7.0))) as _),
        ])
        .unwrap()
    }

    fn write_scores(path: &Path, cuts: &[i64]) -> Vec<u8> {
        let batches = cuts.windows(2).map(|w| Ok(scores(w[0]..w[1])));
        let schema = scores(0..1).schema();
        let rows = write(path, &schema, batches, 100, &[("b", "2"), ("a", "1")]).unwrap();
        assert_eq!(rows, *cuts.last().unwrap() as u64);
        std::fs::read(path).unwrap()
    }

    #[test]
    fn bytes_depend_on_the_rows_and_not_on_how_they_were_cut() {
        let dir = tempfile::tempdir().unwrap();
        let one = write_scores(&dir.path().join("one"), &[0, 1000]);
        let many = write_scores(&dir.path().join("many"), &[0, 1, 99, 100, 350, 1000]);
        assert!(one == many, "{} and {} bytes", one.len(), many.len());
    }

    #[test]
    fn what_was_written_is_read_back_with_its_row_groups_and_key_values() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scores.parquet");
        write_scores(&path, &[0, 250]);
        let table = Table::open(&path).unwrap();
        assert_eq!((table.rows(), table.key_value("a"), table.key_value("c")), (250, Some("1"), None));
        let groups: Vec<_> = table.metadata().row_groups().iter().map(|g| g.num_rows()).collect();
        assert_eq!(groups, [100, 100, 50]);
        let batches: Vec<_> = table.read(&["uid", "score"], 64).unwrap().map(Result::unwrap).collect();
        assert_eq!(concat_batches(&scores(0..1).schema(), &batches).unwrap(), scores(0..250));
    }

    #[test]
    fn a_projection_reads_only_its_columns_and_a_missing_one_lists_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scores.parquet");
        write_scores(&path, &[0, 10]);
        let batch = Table::open(&path).unwrap().read(&["score"], 64).unwrap().next().unwrap().unwrap();
        assert_eq!(batch.num_columns(), 1);
        let error = Table::open(&path).unwrap().read(&["label"], 64).err().unwrap();
        assert_eq!(error.exit_code(), 65);
        assert!(error.to_string().ends_with("no column 'label', found uid, score"), "{error}");
    }

    #[test]
    fn a_column_of_another_type_or_with_nulls_says_so() {
        let file = Path::new("f");
        let batch =
            RecordBatch::try_from_iter([("score", Arc::new(Int64Array::from(vec![Some(1), None])) as _)]);
        let batch = batch.unwrap();
        let error = column::<Float32Array>(file, &batch, "score").unwrap_err();
        assert_eq!(error.to_string(), "f: column 'score' is Int64, expected Float32");
        assert!(column::<Int64Array>(file, &batch, "score").is_ok());
        let error = required::<Int64Array>(file, &batch, "score").unwrap_err();
        assert_eq!(error.to_string(), "f: column 'score' has 1 nulls in 2 rows, expected none");
    }

    #[test]
    fn rows_of_another_schema_are_an_alarm_and_nothing_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scores.parquet");
        let schema = Schema::new(vec![Field::new("other", DataType::Int64, false)]);
        let error = write(&path, &schema, [Ok(scores(0..3))], 10, &[]).unwrap_err();
        assert_eq!(error.exit_code(), 70);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn damaged_files_are_errors_or_rows_but_never_panics() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scores.parquet");
        let whole = write_scores(&path, &[0, 60]);
        let read = |bytes: &[u8]| -> Result<usize> {
            std::fs::write(&path, bytes).unwrap();
            let batches = Table::open(&path)?.read(&["uid", "score"], 64)?;
            batches.map(|batch| Ok(batch?.num_rows())).sum()
        };
        for length in 0..whole.len() {
            assert_eq!(read(&whole[..length]).unwrap_err().exit_code(), 65, "cut at {length}");
        }
        for position in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[position] ^= 1 << (position % 8);
            if let Err(error) = read(&flipped) {
                assert_eq!(error.exit_code(), 65, "flipped at {position}: {error}");
            }
        }
    }
}
