//! `manifest.json`: the files of a data set, and where their images came from.

use std::path::{Component, Path};

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::image::Shape;
use crate::{Error, Result, fs};

/// The name of the manifest in its data-set folder.
pub const FILE_NAME: &str = "manifest.json";

/// The value of [`Manifest::schema`]: this layout.
pub const SCHEMA: &str = "proxyset.manifest/1";

/// Everything needed to tell whether a data set is the one that was written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`SCHEMA`].
    pub schema: String,
    /// The size of every image.
    pub shape: Shape,
    /// The names of the classes: a label is an index into them.
    pub class_names: Vec<String>,
    /// The Parquet files.
    pub files: Vec<FileEntry>,
    /// How the images were made: configuration, seeds, hashes of models, versions.
    pub provenance: Json,
}

/// One Parquet file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its path relative to the manifest, with `/`.
    pub path: String,
    /// How many rows it has.
    pub rows: u64,
    /// How many bytes it has.
    pub bytes: u64,
    /// The BLAKE3 hash of its bytes, in hexadecimal.
    pub blake3: String,
    /// How many rows each class has, by label. Rows without a label are in `rows` only.
    pub class_counts: Vec<u64>,
}

impl Manifest {
    /// A manifest of the current version.
    pub fn new(shape: Shape, class_names: Vec<String>, files: Vec<FileEntry>, provenance: Json) -> Self {
        Self { schema: SCHEMA.into(), shape, class_names, files, provenance }
    }

    /// Publishes the manifest in the data-set folder `dir`.
    pub fn write(&self, dir: &Path) -> Result<()> {
        fs::publish_json(&dir.join(FILE_NAME), self)
    }

    /// Reads the manifest of a data-set folder.
    ///
    /// Fails with [`Error::Data`] if it is of another version, has other fields, or names files outside `dir`.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE_NAME);
        let json: Json = fs::read_json(&path)?;
        if json["schema"] != SCHEMA {
            bail!(Data, "{}: schema is {}, expected \"{SCHEMA}\"", path.display(), json["schema"]);
        }
        let manifest: Self = serde_json::from_value(json).map_err(|e| {
            Error::Data(format!("{}: not the fields that were expected: {e}", path.display()))
        })?;
        let outside = |entry: &&FileEntry| {
            let mut parts = Path::new(&entry.path).components();
            entry.path.is_empty() || !parts.all(|part| matches!(part, Component::Normal(_)))
        };
        if let Some(entry) = manifest.files.iter().find(outside) {
            bail!(Data, "{}: file '{}' is not inside the folder", path.display(), entry.path);
        }
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let entry = FileEntry {
            path: "data/train-00000-of-00001.parquet".into(),
            rows: 3,
            bytes: 100,
            blake3: "00".repeat(32),
            class_counts: vec![1, 2],
        };
        let shape = Shape { height: 8, width: 8, channels: 1 };
        Manifest::new(shape, vec!["a".into(), "b".into()], vec![entry], serde_json::json!({"seed": 1}))
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        manifest().write(dir.path()).unwrap();
        assert_eq!(Manifest::read(dir.path()).unwrap(), manifest());
    }

    #[test]
    fn other_versions_fields_and_folders_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |change: fn(&mut Json), expected: &str| {
            let mut json = serde_json::to_value(manifest()).unwrap();
            change(&mut json);
            fs::publish_json(&dir.path().join(FILE_NAME), &json).unwrap();
            let error = Manifest::read(dir.path()).unwrap_err();
            assert_eq!(error.exit_code(), 65);
            assert!(error.to_string().contains(expected), "{error}");
        };
        refused(|json| json["schema"] = "proxyset.manifest/2".into(), "schema is \"proxyset.manifest/2\"");
        refused(|json| json["extra"] = 1.into(), "unknown field `extra`");
        refused(|json| json["files"][0]["path"] = "../x.parquet".into(), "'../x.parquet' is not inside");
        refused(|json| json["files"][0]["path"] = "/x.parquet".into(), "'/x.parquet' is not inside");
    }
}
