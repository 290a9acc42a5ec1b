//! Where images come from: the digits in this program, or the user's own files, each form of which has a variant here. A new
//! form is a file beside this one.

use std::{
    fmt,
    fs::{self, File},
    path::{Path, PathBuf},
    str::FromStr,
};

use arrow_array::RecordBatch;
use candle_core::{DType, Tensor, npy::NpzTensors};
use parquet::{arrow::push_decoder::PushBuffers, file::reader::ChunkReader};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{
    hub,
    image::{self, Shape},
    part::{Part, drawn},
    table::{self, Table},
};
use crate::{Error, Result, ResultExt};

/// The single class given to images without labels.
pub const UNLABELLED: &str = "unlabelled";

/// The extensions of the files that may hold the images of a source: what is hashed of a folder that has other files too.
pub const EXTENSIONS: [&str; 5] = ["parquet", "npz", "png", "jpg", "jpeg"];

const DIGITS: &str = "builtin:digits";
const DIGITS_TRAIN: &[u8] = include_bytes!("digits/train-00000-of-00001.parquet");
const DIGITS_TEST: &[u8] = include_bytes!("digits/test-00000-of-00001.parquet");

/// Rows that are decoded in parallel at a time.
const BATCH_ROWS: usize = 4096;
/// The most classes of a data set that does not name them: with more, the column is taken not to be a label.
const MAX_UNNAMED_CLASSES: usize = 1 << 16;

/// A data set by name.
///
/// - `builtin:digits`: 1,797 real 8×8 digits, part of the program.
/// - A Parquet file. It is the test split if its name is `test.parquet` or starts with `test-`, else the train split.
/// - A folder with `train-*.parquet` and `test-*.parquet`, in itself, in `data/`, or in the only folder of
///   `data/` that has any. Names that end in `-NNNNN-of-NNNNN` must be a complete set.
/// - An `.npz` file with `image`, `(n, h, w, c)` or `(n, h, w)` u8, and `label`, `(n,)` of type i16, i32, i64, u8 or u32,
///   which may be missing; `test.npz` and `test-….npz` are the test split.
/// - A folder of PNG and JPEG files, with one subfolder for each class, or all in one without labels; in `train/`
///   and `test/`, or all of them as the train split. They are taken in the order of their names.
///
/// Images without labels all have the class [`UNLABELLED`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "crate::text::Written", into = "String")]
pub enum Source {
    /// The digits in this program.
    Digits,
    /// A file or a folder.
    Path(PathBuf),
}

named! {
    /// The official parts of a data set.
    pub enum OfficialSplit {
        /// For fitting and choosing.
        Train = "train",
        /// For evaluating, never for choosing.
        Test = "test",
    }
}

impl FromStr for Source {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        match s {
            DIGITS => Ok(Self::Digits),
            _ if s.is_empty() || s.starts_with("builtin:") || s.contains("://") => {
                Err(format!("data set is '{s}', expected {DIGITS} or a local path"))
            }
            _ => Ok(Self::Path(s.into())),
        }
    }
}

serde_as_text!(Source);

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Digits => f.write_str(DIGITS),
            Self::Path(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Labelled images in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    /// The size of every image.
    pub shape: Shape,
    /// `(n, height, width, channels)`.
    pub pixels: Vec<u8>,
    /// `(n,)`, indices into `class_names`.
    pub labels: Vec<u32>,
    /// `(n,)`, the place of each image in its split, or the number of its [`Dataset::push`].
    pub rows: Vec<usize>,
    /// The names of the classes.
    pub class_names: Vec<String>,
    /// How many rows were left out because they were bad.
    pub bad_rows: usize,
}

impl Dataset {
    /// The number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The pixels of image `i`, in (height, width, channel) order.
    ///
    /// # Panics
    /// If there is no image `i`.
    pub fn image(&self, i: usize) -> &[u8] {
        &self.pixels[i * self.shape.size()..][..self.shape.size()]
    }

    /// The images `indices`, in that order; repetitions are allowed.
    ///
    /// # Panics
    /// If an index is not less than [`Dataset::len`].
    pub fn subset(&self, indices: &[usize]) -> Self {
        Self {
            shape: self.shape,
            pixels: indices.iter().flat_map(|&i| self.image(i)).copied().collect(),
            labels: indices.iter().map(|&i| self.labels[i]).collect(),
            rows: indices.iter().map(|&i| self.rows[i]).collect(),
            class_names: self.class_names.clone(),
            bad_rows: 0,
        }
    }

    /// No images yet.
    pub fn empty(shape: Shape, class_names: Vec<String>) -> Self {
        Self { shape, pixels: Vec::new(), labels: Vec::new(), rows: Vec::new(), class_names, bad_rows: 0 }
    }

    /// Appends an image.
    ///
    /// # Panics
    /// If `image` is not `shape.size()` long.
    pub fn push(&mut self, image: &[u8], label: u32) {
        assert_eq!(image.len(), self.shape.size(), "pixels of a {} image", self.shape);
        self.pixels.extend_from_slice(image);
        self.rows.push(self.labels.len());
        self.labels.push(label);
    }

    /// These images followed by those of `other`, which have the same shape and classes.
    pub fn concat(mut self, other: &Self) -> Self {
        self.pixels.extend_from_slice(&other.pixels);
        self.labels.extend_from_slice(&other.labels);
        self.rows.extend_from_slice(&other.rows);
        self.bad_rows += other.bad_rows;
        self
    }

    /// How many images each class has.
    pub fn class_counts(&self) -> Vec<usize> {
        let mut counts = vec![0; self.class_names.len()];
        for &label in &self.labels {
            counts[label as usize] += 1;
        }
        counts
    }

    /// The warning that some classes have no image here, if this is not all of a split but `part` of it.
    pub fn left_out(&self, part: Part) -> Option<String> {
        /// How many classes a message lists.
        const LISTED: usize = 10;
        let counts = self.class_counts().into_iter().zip(&self.class_names);
        let without: Vec<String> =
            counts.filter(|(count, _)| *count == 0).map(|(_, name)| format!("'{name}'")).collect();
        (part != Part::All && !without.is_empty()).then(|| {
            let (n, classes, more) =
                (without.len(), self.class_names.len(), if without.len() > LISTED { ", …" } else { "" });
            format!(
                "{part} have none of {n} of the {classes} classes: {}{more}",
                without[..n.min(LISTED)].join(", ")
            )
        })
    }
}

impl Source {
    /// Loads a split, or its first `limit` good rows.
    ///
    /// A row is bad if its image or label is null, the image cannot be decoded or does not have the size of the
    /// first one, or the label is not one of the classes. Up to `max_bad` bad rows are left out and counted; one
    /// more is an error.
    ///
    /// Class names come from the files' metadata; without it they are `0`, `1`, … up to the largest label. Fails
    /// with [`Error::Usage`] if there is no such file or split, and with [`Error::Data`] on bad rows, no rows,
    /// missing columns and damaged files.
    pub fn load(&self, split: OfficialSplit, limit: Option<usize>, max_bad: usize) -> Result<Dataset> {
        self.read(split, Loader { limit: limit.unwrap_or(usize::MAX), max_bad, ..Loader::default() })
    }

    /// Loads a part of a split; see [`Source::load`]. Of a part that is drawn, only the images that were drawn are
    /// decoded and may be bad.
    pub fn load_part(&self, split: OfficialSplit, part: Part, max_bad: usize) -> Result<Dataset> {
        match part {
            Part::All => self.load(split, None, max_bad),
            Part::First(n) => self.load(split, Some(n), max_bad),
            Part::Drawn(n) => {
                let labels = self.labels(split)?;
                let known = labels.iter().filter_map(|&label| check_label(label, None).ok());
                let classes = known.max().map_or(0, |label| label + 1);
                let chosen = Some(drawn(&labels, n));
                self.read(split, Loader { limit: usize::MAX, max_bad, chosen, classes, ..Loader::default() })
            }
        }
    }

    fn read(&self, split: OfficialSplit, mut loader: Loader) -> Result<Dataset> {
        match self {
            Self::Digits => loader.add(Table::new(format!("{DIGITS}/{split}"), in_memory(digits(split)))?)?,
            Self::Path(path) => match find(path, split)? {
                Found::Parquet(files) => {
                    for file in files {
                        loader.add(Table::open(&file)?)?;
                    }
                }
                Found::Npz(file) => loader.add_arrays(&file)?,
                Found::Images(folder) => loader.add_files(folder)?,
            },
        }
        loader.finish(&format!("{self}, split {split}"))
    }

    /// The label of each row of a split as it stands there, whether or not it is a class; no image is decoded.
    fn labels(&self, split: OfficialSplit) -> Result<Vec<Option<i128>>> {
        let Self::Path(path) = self else {
            return table_labels(Table::new(format!("{DIGITS}/{split}"), in_memory(digits(split)))?);
        };
        Ok(match find(path, split)? {
            Found::Parquet(files) => files
                .iter()
                .map(|file| table_labels(Table::open(file)?))
                .collect::<Result<Vec<_>>>()?
                .concat(),
            Found::Npz(file) => Arrays::read(&file)?.labels.into_iter().map(|l| Some(l.into())).collect(),
            Found::Images(folder) => folder.files.iter().map(|&(_, label)| Some(label.into())).collect(),
        })
    }

    /// Whether the data set has this split, even if it is damaged or ambiguous.
    pub fn has(&self, split: OfficialSplit) -> bool {
        match self {
            Self::Digits => true,
            Self::Path(path) => !matches!(search(path, split), Ok(None)),
        }
    }

    /// The fingerprint of all existing splits.
    ///
    /// Fails with [`Error::Usage`] if there is none.
    pub fn fingerprint_all(&self) -> Result<String> {
        let splits: Vec<OfficialSplit> =
            [OfficialSplit::Train, OfficialSplit::Test].into_iter().filter(|&s| self.has(s)).collect();
        if splits.is_empty() {
            self.fingerprint(OfficialSplit::Train)?;
        }
        let all = splits.iter().map(|&s| self.fingerprint(s)).collect::<Result<Vec<_>>>()?;
        Ok(blake3::hash(all.join("/").as_bytes()).to_hex().to_string())
    }

    /// The fingerprint of the split's bytes: the BLAKE3 hash of its files one after another, in hexadecimal; for a
    /// folder of images it includes their names.
    ///
    /// Fails with [`Error::Usage`] if there is no such file or split.
    pub fn fingerprint(&self, split: OfficialSplit) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        match self {
            Self::Digits => {
                hasher.update(digits(split));
            }
            Self::Path(path) => {
                let (files, root) = match find(path, split)? {
                    Found::Parquet(files) => (files, None),
                    Found::Npz(file) => (vec![file], None),
                    Found::Images(folder) => {
                        (folder.files.into_iter().map(|(file, _)| file).collect(), Some(folder.root))
                    }
                };
                for path in files {
                    if let Some(name) = root.as_ref().and_then(|root| path.strip_prefix(root).ok()) {
                        hasher.update(name.as_os_str().as_encoded_bytes());
                    }
                    let file = File::open(&path).map_err(Error::io(&path))?;
                    hasher.update_reader(file).map_err(Error::io(&path))?;
                }
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }
}

fn digits(split: OfficialSplit) -> &'static [u8] {
    match split {
        OfficialSplit::Train => DIGITS_TRAIN,
        OfficialSplit::Test => DIGITS_TEST,
    }
}

fn in_memory(bytes: &'static [u8]) -> PushBuffers {
    let length = bytes.len() as u64;
    let mut buffers = PushBuffers::new(length);
    buffers.push_range(0..length, bytes.into());
    buffers
}

/// The files that make up a split.
enum Found {
    /// At least one, in order.
    Parquet(Vec<PathBuf>),
    Npz(PathBuf),
    Images(ImageFolder),
}

/// Files of images, in the order of their names, with their classes.
struct ImageFolder {
    root: PathBuf,
    files: Vec<(PathBuf, u32)>,
    class_names: Vec<String>,
}

/// Finds the files of a split. Fails with [`Error::Usage`] if there are none.
fn find(path: &Path, split: OfficialSplit) -> Result<Found> {
    match search(path, split)? {
        Some(found) => Ok(found),
        None if path.is_dir() => bail!(
            Usage,
            "{}: no {split}-*.parquet there, in data/ or in a folder of it, and no images of a {split} split",
            path.display()
        ),
        None => {
            let other = if split == OfficialSplit::Test { OfficialSplit::Train } else { OfficialSplit::Test };
            bail!(
                Usage,
                "{}: has the {other} split only, expected {split}; name a folder with both",
                path.display()
            )
        }
    }
}

/// The files of a split, if there are any.
fn search(path: &Path, split: OfficialSplit) -> Result<Option<Found>> {
    let metadata = match fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            bail!(
                Usage,
                "data set '{}' does not exist, expected {DIGITS}, a Parquet or .npz file, or a folder",
                path.display()
            )
        }
        metadata => metadata.map_err(Error::io(path))?,
    };
    if !metadata.is_dir() {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let is_test = ["test.", "test-"].iter().any(|start| name.starts_with(start));
        if is_test != (split == OfficialSplit::Test) {
            return Ok(None);
        }
        let npz = path.extension().is_some_and(|extension| extension == "npz");
        return Ok(Some(if npz { Found::Npz(path.into()) } else { Found::Parquet(vec![path.into()]) }));
    }

    let data = path.join("data");
    let mut folders = vec![path.to_path_buf(), data.clone()];
    if data.is_dir() {
        folders.extend(entries(&data)?.into_iter().filter(|entry| entry.is_dir()));
    }
    let mut found = Vec::new();
    for folder in folders.iter().filter(|folder| folder.is_dir()) {
        let files = files_in(folder, split)?;
        if !files.is_empty() {
            found.push((folder, files));
        }
    }
    // The folder itself takes precedence over data/, and data/ over its subfolders, which must not be ambiguous.
    let choice = match found.as_slice() {
        [] => return Ok(images_below(path, split)?.map(Found::Images)),
        [(first, _), (second, _), ..] if first.parent() == Some(&data) => bail!(
            Usage,
            "{}: {split} files in {} and {}, expected one: name the folder",
            path.display(),
            first.display(),
            second.display()
        ),
        _ => found.swap_remove(0).1,
    };
    check_complete(&choice)?;
    Ok(Some(Found::Parquet(choice)))
}

/// The images of a folder that has no Parquet files. Names that begin with a dot are left out; class folders are
/// ordered by name, or by number if all of them are numbers.
fn images_below(path: &Path, split: OfficialSplit) -> Result<Option<ImageFolder>> {
    let own = path.join(split.to_string());
    let root = if own.is_dir() || split == OfficialSplit::Test { own } else { path.to_path_buf() };
    let mut classes: Vec<(String, Vec<PathBuf>)> = Vec::new();
    let mut flat = Vec::new();
    let is_image = |file: &Path| {
        let extension = file.extension().map(|e| e.to_string_lossy().to_lowercase());
        file.is_file() && extension.is_some_and(|e| ["png", "jpg", "jpeg"].contains(&&*e))
    };
    let visible = |folder: &Path| -> Result<Vec<PathBuf>> {
        let mut all = entries(folder)?;
        all.retain(|e| !e.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')));
        Ok(all)
    };
    for entry in if root.is_dir() { visible(&root)? } else { Vec::new() } {
        let name = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if is_image(&entry) {
            flat.push(entry);
        } else if entry.is_dir() && (root != *path || !["train", "test"].contains(&&*name)) {
            let mut images = visible(&entry)?;
            images.retain(|file| is_image(file));
            if !images.is_empty() {
                classes.push((name, images));
            }
        }
    }
    let numbers: Option<Vec<u64>> = classes.iter().map(|(name, _)| name.parse().ok()).collect();
    if let Some(numbers) = numbers {
        for ((name, _), number) in classes.iter_mut().zip(numbers) {
            *name = number.to_string();
        }
        classes.sort_by_key(|(name, _)| name.parse().unwrap_or(u64::MAX));
    }
    let (class_names, files): (Vec<String>, Vec<Vec<PathBuf>>) = match (flat.is_empty(), classes.is_empty()) {
        (true, true) => return Ok(None),
        (false, true) => (vec![UNLABELLED.into()], vec![flat]),
        (true, false) => classes.into_iter().unzip(),
        (false, false) => {
            let names: Vec<String> = classes.into_iter().map(|(name, _)| name).collect();
            bail!(
                Usage,
                "{}: images beside folders of images ({}), expected either",
                root.display(),
                names.join(", ")
            )
        }
    };
    let files = (0..).zip(files).flat_map(|(class, files)| files.into_iter().map(move |file| (file, class)));
    Ok(Some(ImageFolder { root, files: files.collect(), class_names }))
}

/// The files of a split in one folder, ordered by name.
fn files_in(folder: &Path, split: OfficialSplit) -> Result<Vec<PathBuf>> {
    let prefix = format!("{split}-");
    let mut files = entries(folder)?;
    files.retain(|file| {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(&prefix) && name.ends_with(".parquet") && file.is_file()
    });
    Ok(files)
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(Error::io(folder))?;
    let mut entries = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<std::io::Result<Vec<_>>>()
        .map_err(Error::io(folder))?;
    entries.sort();
    Ok(entries)
}

/// Files named `…-NNNNN-of-NNNNN.parquet` must be a complete set; others may have any names.
fn check_complete(files: &[PathBuf]) -> Result<()> {
    let numbers: Vec<_> = files.iter().map(|file| shard_number(file)).collect();
    let Some(of) = numbers.iter().flatten().map(|(_, of)| *of).max() else { return Ok(()) };
    let expected = (0..of).map(|number| Some((number, of)));
    if !numbers.iter().copied().eq(expected) {
        let names: Vec<_> = files.iter().filter_map(|file| file.file_name()?.to_str()).collect();
        bail!(
            Data,
            "{}: found {}, expected all of 00000-of-{of:05} to {:05}-of-{of:05}",
            files[0].parent().unwrap_or(Path::new(".")).display(),
            names.join(", "),
            of.saturating_sub(1)
        );
    }
    Ok(())
}

fn shard_number(file: &Path) -> Option<(usize, usize)> {
    let mut parts = file.file_stem()?.to_str()?.rsplit('-');
    let (of, word, number) = (parts.next()?, parts.next()?, parts.next()?);
    if word == "of" { Some((number.parse().ok()?, of.parse().ok()?)) } else { None }
}

/// An image with its label, or what is wrong with it.
type Row = std::result::Result<(Shape, Vec<u8>, u32), String>;

/// Collects good rows over the files of a split.
#[derive(Default)]
struct Loader {
    limit: usize,
    /// The rows to load, ascending; `None` for all.
    chosen: Option<Vec<usize>>,
    max_bad: usize,
    /// The number of rows before the next one.
    seen: usize,
    shape: Option<Shape>,
    pixels: Vec<u8>,
    labels: Vec<u32>,
    rows: Vec<usize>,
    /// The least number of classes, if they have no names.
    classes: u32,
    /// What the first file declares; all others must declare the same.
    class_names: Option<Option<Vec<String>>>,
    bad_rows: usize,
}

impl Loader {
    fn add<R: ChunkReader>(&mut self, table: Table<R>) -> Result<()> {
        let (file, first_row) = (table.file().to_path_buf(), self.seen);
        let has = |name: &str| table.schema().index_of(name).is_ok();
        let image = if !has("image") && has("img") { "img" } else { "image" };
        self.add_class_names(&table)?;
        let left = self.limit - self.labels.len();
        let mut batches = table.read(&[image, "label"], left.clamp(1, BATCH_ROWS))?;
        while self.labels.len() < self.limit
            && let Some(batch) = batches.next()
        {
            self.add_batch(&file, first_row, &batch?, image)?;
        }
        Ok(())
    }

    fn add_class_names<R: ChunkReader>(&mut self, table: &Table<R>) -> Result<()> {
        let in_schema = table.schema().metadata().get(hub::METADATA_KEY).map(String::as_str);
        let names = [in_schema, table.key_value(hub::METADATA_KEY)]
            .into_iter()
            .flatten()
            .find_map(|json| hub::declared_class_names(json, "label"));
        match &self.class_names {
            Some(first) if *first != names => bail!(
                Data,
                "{}: has classes {names:?}, but files before it have {first:?}",
                table.file().display()
            ),
            _ => self.class_names = Some(names),
        }
        Ok(())
    }

    /// The next `n` rows, each with whether it is to be loaded.
    fn next(&mut self, n: usize) -> Vec<(usize, bool)> {
        let rows = self.seen..self.seen + n;
        self.seen += n;
        let wanted = |row| self.chosen.as_ref().is_none_or(|chosen| chosen.binary_search(&row).is_ok());
        rows.map(|row| (row, wanted(row))).collect()
    }

    /// Image files; those in a class's folder get its label.
    fn add_files(&mut self, folder: ImageFolder) -> Result<()> {
        let ImageFolder { files: all, class_names, .. } = folder;
        self.class_names = Some(Some(class_names));
        for files in all.chunks(BATCH_ROWS) {
            if self.labels.len() == self.limit {
                break;
            }
            let wanted = self.next(files.len()).into_par_iter().zip(files).filter(|((_, wanted), _)| *wanted);
            let decoded = wanted.map(|((row, _), (file, label))| {
                let bytes = fs::read(file).map_err(Error::io(file))?;
                let image = image::decode(&bytes).map_err(|e| e.to_string());
                Ok((row, image.map(|(shape, pixels)| (shape, pixels, *label))))
            });
            let rows = decoded.collect::<Result<Vec<_>>>()?;
            self.add_rows(rows, &|row| all[row].0.display().to_string())?;
        }
        Ok(())
    }

    /// The arrays of an `.npz` file.
    fn add_arrays(&mut self, file: &Path) -> Result<()> {
        let Arrays { shape, pixels, labels, labelled } = Arrays::read(file)?;
        if !labelled {
            self.class_names = Some(Some(vec![UNLABELLED.into()]));
        }
        let rows = self.next(labels.len()).into_iter().zip(pixels.chunks_exact(shape.size()).zip(labels));
        let wanted = rows.filter(|((_, wanted), _)| *wanted);
        let rows = wanted.map(|((row, _), (image, label))| {
            (row, check_label(Some(label.into()), None).map(|label| (shape, image.to_vec(), label)))
        });
        self.add_rows(rows, &|row| format!("{}: row {row}", file.display()))
    }

    fn add_batch(&mut self, file: &Path, first_row: usize, batch: &RecordBatch, image: &str) -> Result<()> {
        let images = hub::image_bytes(file, batch, image)?;
        let labels = labels(file, batch)?;
        let classes = self.class_names.as_ref().and_then(Option::as_ref).map(Vec::len);
        let decode = |image: Option<&[u8]>, label| -> Row {
            let label = check_label(label, classes)?;
            let image = image.ok_or_else(|| "image is null, expected the bytes of one".to_owned())?;
            let (shape, pixels) = image::decode(image).map_err(|e| e.to_string())?;
            Ok((shape, pixels, label))
        };
        let rows: Vec<_> = self
            .next(batch.num_rows())
            .into_par_iter()
            .zip(images.into_par_iter().zip(labels))
            .filter(|((_, wanted), _)| *wanted)
            .map(|((row, _), (image, label))| (row, decode(image, label)))
            .collect();
        self.add_rows(rows, &|row| format!("{}: row {}", file.display(), row - first_row))
    }

    /// Rows of the split by their places: decoded images with their labels, or what is wrong with them; `place` names
    /// one in errors.
    fn add_rows(
        &mut self,
        rows: impl IntoIterator<Item = (usize, Row)>,
        place: &dyn Fn(usize) -> String,
    ) -> Result<()> {
        for (row, outcome) in rows {
            if self.labels.len() == self.limit {
                break;
            }
            let outcome = outcome.and_then(|(shape, pixels, label)| match *self.shape.get_or_insert(shape) {
                expected if expected == shape => Ok((pixels, label)),
                expected => Err(format!("image is {shape}, expected {expected} as the first one")),
            });
            match outcome {
                Ok((pixels, label)) => {
                    self.pixels.extend_from_slice(&pixels);
                    self.labels.push(label);
                    self.rows.push(row);
                }
                Err(problem) => {
                    self.bad_rows += 1;
                    let (place, bad, allowed) = (place(row), self.bad_rows, self.max_bad);
                    if bad > allowed {
                        bail!(Data, "{place}: {problem} (bad row {bad}, and max_bad allows {allowed})");
                    }
                }
            }
        }
        Ok(())
    }

    fn finish(self, name: &str) -> Result<Dataset> {
        let Some(shape) = self.shape else {
            bail!(Data, "{name}: no images in it ({} bad rows), expected at least one", self.bad_rows)
        };
        let class_names = self.class_names.flatten().unwrap_or_else(|| {
            let classes = self.labels.iter().max().map_or(0, |label| label + 1);
            (0..classes.max(self.classes)).map(|class| class.to_string()).collect()
        });
        let Self { pixels, labels, rows, bad_rows, .. } = self;
        Ok(Dataset { shape, pixels, labels, rows, class_names, bad_rows })
    }
}

/// The arrays of an `.npz` file.
struct Arrays {
    shape: Shape,
    pixels: Vec<u8>,
    labels: Vec<i64>,
    /// Whether the file has labels; if not, they are 0.
    labelled: bool,
}

impl Arrays {
    fn read(file: &Path) -> Result<Self> {
        let unreadable = |e: candle_core::Error| {
            Error::Data(format!("{}: not an .npz file, or a damaged one: {e}", file.display()))
        };
        let arrays = NpzTensors::new(file).map_err(unreadable)?;
        let bytes = fs::metadata(file).map_err(Error::io(file))?.len();
        let read = |name: &str, expected: &str, fits: fn(&[usize], DType) -> bool| {
            if !arrays.names().iter().any(|found| *found == name) {
                return Ok(None);
            }
            let (shape, kind) = arrays.get_shape_and_dtype(name).map_err(unreadable)?;
            let dims = shape.dims();
            if !fits(dims, kind) {
                bail!(Data, "{}: '{name}' is {kind:?} {dims:?}, expected {expected}", file.display());
            }
            // Deflate expands a byte to at most 1,032, so larger claims are false.
            let size = dims.iter().try_fold(kind.size_in_bytes() as u64, |n, &d| n.checked_mul(d as u64));
            if size.is_none_or(|size| size / 1032 > bytes) {
                bail!(Data, "{}: '{name}' is {dims:?}, but the file has {bytes} bytes", file.display());
            }
            arrays.get(name).map_err(unreadable)
        };
        let images = read("image", "u8 (n, h, w, c) with 1 or 3 channels, or (n, h, w)", |dims, kind| {
            kind == DType::U8 && (dims.len() == 3 || dims.len() == 4 && [1, 3].contains(&dims[3]))
        })?;
        let Some(images) = images else {
            bail!(Data, "{}: no array 'image', found {}", file.display(), listed(&arrays))
        };
        let labels = read("label", "integers (n,)", |dims, kind| dims.len() == 1 && !kind.is_float())?;
        let dims = images.dims().to_vec();
        let shape = Shape { height: dims[1], width: dims[2], channels: dims.get(3).copied().unwrap_or(1) };
        let to_i64 = |labels: Tensor| labels.to_dtype(DType::I64)?.to_vec1::<i64>();
        let labelled = labels.is_some();
        let labels = match labels {
            Some(labels) => to_i64(labels).map_err(unreadable)?,
            None => vec![0; dims[0]],
        };
        if labels.len() != dims[0] {
            bail!(Data, "{}: {} images, but {} labels", file.display(), dims[0], labels.len());
        }
        image::check_sides("'image'", shape.height, shape.width).context(|| file.display().to_string())?;
        let pixels = images.flatten_all().and_then(|p| p.to_vec1::<u8>()).map_err(unreadable)?;
        Ok(Self { shape, pixels, labels, labelled })
    }
}

/// The labels of a whole table; see [`Source::labels`].
fn table_labels<R: ChunkReader>(table: Table<R>) -> Result<Vec<Option<i128>>> {
    let file = table.file().to_path_buf();
    let batches = table.read(&["label"], BATCH_ROWS)?;
    Ok(batches.map(|batch| labels(&file, &batch?)).collect::<Result<Vec<_>>>()?.concat())
}

fn listed(arrays: &NpzTensors) -> String {
    let mut names: Vec<&str> = arrays.names().into_iter().map(String::as_str).collect();
    names.sort_unstable();
    names.join(", ")
}

/// The labels of a batch, whatever their integer type.
fn labels(file: &Path, batch: &RecordBatch) -> Result<Vec<Option<i128>>> {
    let array = table::any_column(file, batch, "label")?;
    Ok(arrow_array::downcast_integer_array!(
        array => array.iter().map(|label| label.map(i128::from)).collect(),
        other => bail!(Data, "{}: column 'label' is {other}, expected an integer type", file.display())
    ))
}

fn check_label(label: Option<i128>, classes: Option<usize>) -> std::result::Result<u32, String> {
    let label = label.ok_or("label is null, expected a class")?;
    let end = classes.unwrap_or(MAX_UNNAMED_CLASSES);
    match u32::try_from(label) {
        Ok(index) if (index as usize) < end => Ok(index),
        _ => Err(format!("label is {label}, expected 0 to {}", end as i64 - 1)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{
        ArrayRef, BinaryArray, BinaryViewArray, Int8Array, Int64Array, LargeBinaryArray, StringArray,
        StringViewArray, StructArray, UInt64Array,
    };
    use arrow_schema::{Field, Schema};

    use super::*;
    use crate::data::image::encode_png;

    const SHAPE: Shape = Shape { height: 2, width: 2, channels: 1 };

    fn png(value: u8) -> Vec<u8> {
        encode_png(&[value; 4], SHAPE)
    }

    fn images(bytes: ArrayRef) -> ArrayRef {
        let path: ArrayRef = Arc::new(StringArray::new_null(bytes.len()));
        let field = |name, array: &ArrayRef| Arc::new(Field::new(name, array.data_type().clone(), true));
        Arc::new(StructArray::from(vec![(field("bytes", &bytes), bytes), (field("path", &path), path)]))
    }

    fn write(path: &Path, columns: Vec<(&str, ArrayRef)>, key_values: &[(&str, &str)]) {
        let batch =
            RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(n, a)| (n, a, true))).unwrap();
        table::write(path, &batch.schema(), [Ok(batch)], 1000, key_values).unwrap();
    }

    fn write_rows(path: &Path, rows: Vec<(Option<Vec<u8>>, Option<i64>)>, key_values: &[(&str, &str)]) {
        let (bytes, labels): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
        let bytes = images(Arc::new(BinaryArray::from_iter(bytes)));
        write(path, vec![("img", bytes), ("label", Arc::new(Int64Array::from(labels)))], key_values);
    }

    fn source(path: &Path) -> Source {
        path.to_str().unwrap().parse().unwrap()
    }

    /// The error from loading the train split, which must be a data error.
    fn bad_data(path: &Path) -> String {
        let error = source(path).load(OfficialSplit::Train, None, 0).unwrap_err();
        assert_eq!(error.exit_code(), 65, "{error}");
        error.to_string()
    }

    #[test]
    fn digits_are_the_published_ones() {
        let train = Source::Digits.load(OfficialSplit::Train, None, 0).unwrap();
        assert_eq!(train.shape, Shape { height: 8, width: 8, channels: 1 });
        assert_eq!(train.class_counts(), [142, 145, 142, 146, 145, 146, 145, 143, 139, 144]);
        let mean =
            train.pixels.iter().map(|&p| f64::from(p)).sum::<f64>() / 255.0 / train.pixels.len() as f64;
        assert!((mean - 0.3048).abs() < 5e-5, "{mean}");
        let test = Source::Digits.load(OfficialSplit::Test, None, 0).unwrap();
        assert_eq!((test.len(), test.class_names[9].as_str()), (360, "9"));
        let expected = blake3::hash(DIGITS_TRAIN).to_hex().to_string();
        assert_eq!(Source::Digits.fingerprint(OfficialSplit::Train).unwrap(), expected);
    }

    #[test]
    fn a_limit_takes_the_first_rows_and_a_subset_the_chosen_ones() {
        let all = Source::Digits.load(OfficialSplit::Test, None, 0).unwrap();
        let some = Source::Digits.load(OfficialSplit::Test, Some(7), 0).unwrap();
        assert_eq!(some, all.subset(&[0, 1, 2, 3, 4, 5, 6]));
        let chosen = all.subset(&[300, 2, 2]);
        assert_eq!(chosen.image(0), all.image(300));
        assert_eq!(chosen.labels, [all.labels[300], all.labels[2], all.labels[2]]);
    }

    #[test]
    fn names_round_trip_and_bad_ones_say_what_was_expected() {
        for name in ["builtin:digits", "some/folder"] {
            assert_eq!(name.parse::<Source>().unwrap().to_string(), name);
            let json = serde_json::to_string(&name.parse::<Source>().unwrap()).unwrap();
            assert_eq!(json, format!("{name:?}"));
        }
        for name in ["", "builtin:faces", "hf://datasets/x"] {
            let error = name.parse::<Source>().unwrap_err();
            assert_eq!(error, format!("data set is '{name}', expected builtin:digits or a local path"));
        }
    }

    #[test]
    fn all_kinds_of_binary_and_integers_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.parquet");
        let bytes = [png(1), png(2)];
        let labels: [ArrayRef; 3] = [
            Arc::new(Int8Array::from(vec![1, 0])),
            Arc::new(UInt64Array::from(vec![1, 0])),
            Arc::new(Int64Array::from(vec![1, 0])),
        ];
        let binaries: [ArrayRef; 3] = [
            Arc::new(BinaryArray::from_iter_values(&bytes)),
            Arc::new(LargeBinaryArray::from_iter_values(&bytes)),
            Arc::new(BinaryViewArray::from_iter_values(&bytes)),
        ];
        for (bytes, label) in binaries.into_iter().zip(labels) {
            let view: ArrayRef = Arc::new(StringViewArray::from(vec!["x", "y"]));
            write(&path, vec![("image", images(bytes)), ("label", label), ("extra", view)], &[]);
            let data = source(&path).load(OfficialSplit::Train, None, 0).unwrap();
            assert_eq!((data.shape, data.labels.as_slice()), (SHAPE, &[1, 0][..]));
            assert_eq!(data.pixels, [1, 1, 1, 1, 2, 2, 2, 2]);
            assert_eq!(data.class_names, ["0", "1"]);
        }
    }

    #[test]
    fn class_names_come_from_either_metadata() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.parquet");
        let names = ["cat".to_owned(), "dog".to_owned(), "none".to_owned()];
        let json = hub::Features::image_and_label(&names).to_json();
        write_rows(&path, vec![(Some(png(0)), Some(1))], &[(hub::METADATA_KEY, &json)]);
        assert_eq!(source(&path).load(OfficialSplit::Train, None, 0).unwrap().class_names, names);
        let mut writer =
            hub::ImageWriter::new(hub::Features::image_and_label(&names), "a generator").unwrap();
        let image = hub::image_column(&[png(0)]).unwrap();
        writer.push(vec![image, Arc::new(Int64Array::from(vec![2]))]).unwrap();
        writer.finish(dir.path(), "train.parquet").unwrap();
        assert_eq!(source(&path).load(OfficialSplit::Train, None, 0).unwrap().class_names, names);
    }

    #[test]
    fn each_kind_of_bad_row_is_named_and_max_bad_of_them_are_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.parquet");
        let json = hub::Features::image_and_label(&["a".into(), "b".into()]).to_json();
        let wide = encode_png(&[0; 4], Shape { height: 1, width: 4, channels: 1 });
        let mut truncated = png(0);
        truncated.truncate(50);
        for (image, label, expected) in [
            (Some(png(0)), Some(2), "label is 2, expected 0 to 1"),
            (Some(png(0)), Some(-1), "label is -1, expected 0 to 1"),
            (Some(png(0)), None, "label is null, expected a class"),
            (None, Some(0), "image is null, expected the bytes of one"),
            (Some(b"text".to_vec()), Some(0), "not an image: 4 bytes"),
            (Some(truncated), Some(0), "PNG cannot be decoded"),
            (Some(wide), Some(0), "image is 1x4 grey, expected 2x2 grey as the first one"),
        ] {
            let rows = vec![(Some(png(7)), Some(0)), (image, label), (Some(png(9)), Some(1))];
            write_rows(&path, rows, &[(hub::METADATA_KEY, &json)]);
            let error = bad_data(&path);
            assert!(error.contains(&format!("train.parquet: row 1: {expected}")), "{error}");
            assert!(error.contains("(bad row 1, and max_bad allows 0)"), "{error}");
            let data = source(&path).load(OfficialSplit::Train, None, 1).unwrap();
            assert_eq!((data.len(), data.bad_rows), (2, 1));
            assert_eq!(data.pixels, [7, 7, 7, 7, 9, 9, 9, 9]);
        }
    }

    #[test]
    fn missing_columns_other_types_and_no_rows_are_bad_data() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.parquet");
        let labels = || -> ArrayRef { Arc::new(Int64Array::from(vec![0])) };
        let image = || images(Arc::new(BinaryArray::from_iter_values([png(0)])));
        let text = || -> ArrayRef { Arc::new(StringArray::from(vec!["cat"])) };
        write(&path, vec![("picture", image()), ("label", labels())], &[]);
        assert!(bad_data(&path).ends_with("no column 'image', found picture, label"));
        write(&path, vec![("image", image()), ("class", labels())], &[]);
        assert!(bad_data(&path).ends_with("no column 'label', found image, class"));
        write(&path, vec![("image", image()), ("label", text())], &[]);
        assert!(bad_data(&path).ends_with("column 'label' is Utf8, expected an integer type"));
        write(&path, vec![("image", text()), ("label", labels())], &[]);
        assert!(
            bad_data(&path).ends_with("column 'image' is Utf8, expected struct<bytes: binary, path: string>")
        );
        write_rows(&path, vec![], &[]);
        assert!(bad_data(&path).ends_with("no images in it (0 bad rows), expected at least one"));
        write_rows(&path, vec![(Some(png(0)), Some(1 << 40))], &[]);
        assert!(bad_data(&path).contains("label is 1099511627776, expected 0 to 65535"));
    }

    #[test]
    fn files_and_splits_that_are_not_there_are_wrong_usage() {
        let dir = tempfile::tempdir().unwrap();
        let usage = |source: &Source, split| {
            let error = source.load(split, None, 0).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{error}");
            assert_eq!(source.fingerprint(split).unwrap_err().to_string(), error.to_string());
            error.to_string()
        };
        assert!(usage(&source(&dir.path().join("none")), OfficialSplit::Train).contains("does not exist"));
        assert!(usage(&source(dir.path()), OfficialSplit::Test).contains("no test-*.parquet there"));
        let path = dir.path().join("train.parquet");
        write_rows(&path, vec![(Some(png(0)), Some(0))], &[]);
        assert!(
            usage(&source(&path), OfficialSplit::Test).contains("has the train split only, expected test")
        );
    }

    #[test]
    fn folders_are_read_in_the_order_of_their_numbers_and_must_be_complete() {
        for folder in ["", "data", "data/curated"] {
            let dir = tempfile::tempdir().unwrap();
            let file = |i: u8| dir.path().join(folder).join(format!("train-{i:05}-of-00003.parquet"));
            for i in [2, 0, 1] {
                write_rows(&file(i), vec![(Some(png(i)), Some(0))], &[]);
            }
            let data = source(dir.path()).load(OfficialSplit::Train, None, 0).unwrap();
            assert_eq!([0, 1, 2].map(|i| data.image(i)[0]), [0, 1, 2]);
            let bytes = [0, 1, 2].map(|i| fs::read(file(i)).unwrap()).concat();
            let expected = blake3::hash(&bytes).to_hex().to_string();
            assert_eq!(source(dir.path()).fingerprint(OfficialSplit::Train).unwrap(), expected);

            fs::remove_file(file(1)).unwrap();
            let error = bad_data(dir.path());
            assert!(error.contains("found train-00000-of-00003.parquet, train-00002-of-00003"), "{error}");
            assert!(error.ends_with("expected all of 00000-of-00003 to 00002-of-00003"), "{error}");
        }
    }

    #[test]
    fn two_configurations_are_ambiguous_until_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for config in ["curated", "pool"] {
            let path = dir.path().join("data").join(config).join("train-00000-of-00001.parquet");
            write_rows(&path, vec![(Some(png(0)), Some(0))], &[]);
        }
        let error = source(dir.path()).load(OfficialSplit::Train, None, 0).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().ends_with("name the folder"), "{error}");
        assert_eq!(
            source(&dir.path().join("data/pool")).load(OfficialSplit::Train, None, 0).unwrap().len(),
            1
        );
    }

    #[test]
    fn files_with_other_classes_do_not_mix() {
        let dir = tempfile::tempdir().unwrap();
        for (i, names) in [["a", "b"], ["b", "a"]].iter().enumerate() {
            let json = hub::Features::image_and_label(&names.map(str::to_owned)).to_json();
            let path = dir.path().join(format!("train-{i}.parquet"));
            write_rows(&path, vec![(Some(png(0)), Some(0))], &[(hub::METADATA_KEY, &json)]);
        }
        assert!(bad_data(dir.path()).contains("but files before it have"));
    }

    /// Sorted by class, in two files without names for the classes, with a bad row that no draw takes.
    #[test]
    fn a_part_is_drawn_over_all_files_and_knows_its_rows_and_all_classes() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = |row: u8| Some(if row == 9 { b"bad".to_vec() } else { png(row) });
        let rows =
            |rows: std::ops::Range<u8>| rows.map(|row| (bytes(row), Some(i64::from(row / 4)))).collect();
        write_rows(&dir.path().join("train-0.parquet"), rows(0..7), &[]);
        write_rows(&dir.path().join("train-1.parquet"), rows(7..12), &[]);
        let load = |part| source(dir.path()).load_part(OfficialSplit::Train, part, 0);
        let mut refused = 0;
        for n in 1..=12 {
            match load(Part::Drawn(n)) {
                Ok(data) => {
                    assert_eq!((data.len(), data.class_names.len()), (n, 3));
                    let counts = data.class_counts();
                    assert!(
                        counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1,
                        "{n}: {counts:?}"
                    );
                    for (i, &row) in data.rows.iter().enumerate() {
                        assert_eq!((usize::from(data.image(i)[0]), data.labels[i] as usize), (row, row / 4));
                    }
                }
                Err(error) => {
                    assert!(error.to_string().contains("train-1.parquet: row 2: not an image"), "{error}");
                    refused += 1;
                }
            }
        }
        assert!((1..11).contains(&refused), "{refused}");
        let digits = |part| Source::Digits.load_part(OfficialSplit::Test, part, 0).unwrap();
        assert_eq!(digits(Part::Drawn(360)), digits(Part::All));
        assert_eq!(digits(Part::First(2)).rows, [0, 1]);
        assert_eq!(digits(Part::Drawn(50)).class_counts(), [5; 10]);
    }

    #[test]
    fn damaged_files_are_bad_data_or_read_but_never_panic() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.parquet");
        for length in (0..DIGITS_TEST.len()).step_by(1013) {
            fs::write(&path, &DIGITS_TEST[..length]).unwrap();
            bad_data(&path);
        }
        let mut refused = 0;
        for position in (0..DIGITS_TEST.len()).step_by(101) {
            let mut flipped = DIGITS_TEST.to_vec();
            flipped[position] ^= 1 << (position % 8);
            fs::write(&path, flipped).unwrap();
            if let Err(error) = source(&path).load(OfficialSplit::Train, None, 0) {
                assert_eq!(error.exit_code(), 65, "flipped at {position}: {error}");
                refused += 1;
            }
        }
        assert!(refused > 200, "{refused}");
    }

    #[test]
    fn a_schema_without_columns_is_bad_data() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.parquet");
        table::write(&path, &Schema::empty(), [], 10, &[]).unwrap();
        assert!(bad_data(&path).contains("no column 'image'"));
    }

    fn said(source: &Path, split: OfficialSplit, code: u8, part: &str) {
        let error = Source::Path(source.into()).load(split, None, 0).unwrap_err();
        assert_eq!(error.exit_code(), code, "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }

    #[test]
    fn a_folder_of_images_has_a_class_a_folder_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for (i, file) in
            ["cat/b.png", "cat/a.PNG", "ape/z.png", "ape/notes.txt", "empty/notes.txt"].iter().enumerate()
        {
            fs::create_dir_all(root.join(file).parent().unwrap()).unwrap();
            fs::write(root.join(file), png(i as u8)).unwrap();
        }
        fs::create_dir_all(root.join(".hidden")).unwrap();
        fs::write(root.join(".hidden/0.png"), png(9)).unwrap();
        fs::write(root.join("cat/._a.png"), b"no image").unwrap();
        let source = Source::Path(root.into());
        let data = source.load(OfficialSplit::Train, None, 0).unwrap();
        assert_eq!(data.class_names, ["ape", "cat"]);
        assert_eq!((data.labels.clone(), data.shape), (vec![0, 1, 1], SHAPE));
        assert_eq!([data.image(0)[0], data.image(1)[0], data.image(2)[0]], [2, 1, 0]);
        assert_eq!(source.load(OfficialSplit::Train, Some(2), 0).unwrap().labels, [0, 1]);
        let drawn = source.load_part(OfficialSplit::Train, Part::Drawn(2), 0).unwrap();
        let (row, image) = (drawn.rows[1], drawn.image(1)[0]);
        assert_eq!((drawn.labels, [None, Some(1), Some(0)][row]), (vec![0, 1], Some(image)));
        assert!(!source.has(OfficialSplit::Test));
        said(root, OfficialSplit::Test, 2, "no images of a test split");

        let before = source.fingerprint(OfficialSplit::Train).unwrap();
        fs::rename(root.join("cat/b.png"), root.join("cat/c.png")).unwrap();
        assert_ne!(source.fingerprint(OfficialSplit::Train).unwrap(), before);
        fs::create_dir_all(root.join("test")).unwrap();
        fs::write(root.join("test/0.png"), png(9)).unwrap();
        assert_eq!(source.load(OfficialSplit::Train, None, 0).unwrap().class_names, ["ape", "cat"]);
        assert_eq!(source.load(OfficialSplit::Test, None, 0).unwrap().class_names, [UNLABELLED]);
        fs::write(root.join("0.png"), png(9)).unwrap();
        said(root, OfficialSplit::Train, 2, "images beside folders of images (ape, cat)");
        assert!(source.has(OfficialSplit::Train), "ambiguous, but there");
        fs::write(root.join("test/1.png"), b"not an image").unwrap();
        said(root, OfficialSplit::Test, 65, "1.png");
        assert_eq!(source.load(OfficialSplit::Test, None, 1).unwrap().bad_rows, 1);
    }

    #[test]
    fn numbered_class_folders_go_by_number() {
        let dir = tempfile::tempdir().unwrap();
        for class in [10, 2, 0, 1] {
            let folder = dir.path().join(format!("{class:02}"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("0.png"), png(class)).unwrap();
        }
        let data = Source::Path(dir.path().into()).load(OfficialSplit::Train, None, 0).unwrap();
        assert_eq!(data.class_names, ["0", "1", "2", "10"]);
        assert_eq!((0..4).map(|i| data.image(i)[0]).collect::<Vec<_>>(), [0, 1, 2, 10]);
    }

    fn write_npz(file: &Path, arrays: &[(&str, Tensor)]) {
        Tensor::write_npz(arrays, file).unwrap();
    }

    #[test]
    fn an_npz_file_holds_images_and_perhaps_labels() {
        use candle_core::Device;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("samples.npz");
        let image = |dims: &[usize]| {
            let n = dims.iter().product::<usize>();
            Tensor::from_vec((0..n).map(|i| i as u8).collect::<Vec<_>>(), dims, &Device::Cpu).unwrap()
        };
        let labels = |values: &[i64]| Tensor::new(values, &Device::Cpu).unwrap();
        write_npz(&file, &[("image", image(&[3, 2, 4, 3])), ("label", labels(&[1, 0, 2]))]);
        let data = Source::Path(file.clone()).load(OfficialSplit::Train, None, 0).unwrap();
        assert_eq!(data.shape, Shape { height: 2, width: 4, channels: 3 });
        assert_eq!((data.labels.clone(), data.class_names.len()), (vec![1, 0, 2], 3));
        assert_eq!(data.pixels, (0..72).collect::<Vec<u8>>());
        assert_eq!(Source::Path(file.clone()).load(OfficialSplit::Train, Some(2), 0).unwrap().labels, [1, 0]);
        let drawn = Source::Path(file.clone()).load_part(OfficialSplit::Train, Part::Drawn(2), 0).unwrap();
        assert_eq!((drawn.labels, drawn.rows, drawn.class_names.len()), (vec![1, 0], vec![0, 1], 3));
        said(&file, OfficialSplit::Test, 2, "has the train split only");

        write_npz(&file, &[("image", image(&[3, 2, 2]))]);
        assert_eq!(
            Source::Path(file.clone()).load(OfficialSplit::Train, None, 0).unwrap().class_names,
            [UNLABELLED]
        );
        let cases: [(&[(&str, Tensor)], &str); 5] = [
            (&[("images", image(&[3, 2, 2]))], "no array 'image', found images"),
            (&[("image", image(&[3, 3, 2, 2]))], "expected u8 (n, h, w, c)"),
            (&[("image", labels(&[3, 2]))], "expected u8 (n, h, w, c)"),
            (&[("image", image(&[3, 2, 2])), ("label", labels(&[0, 1]))], "3 images, but 2 labels"),
            (&[("image", image(&[2, 2, 2])), ("label", labels(&[0, -1]))], "label is -1"),
        ];
        for (arrays, part) in cases {
            write_npz(&file, arrays);
            said(&file, OfficialSplit::Train, 65, part);
        }
        fs::write(&file, b"PK").unwrap();
        said(&file, OfficialSplit::Train, 65, "not an .npz file");
    }
}
