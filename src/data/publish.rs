//! Publishing: making a verified copy of a data set where others can get it.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{check::check_dataset, manifest};
use crate::{
    Error, Result, fs,
    progress::{Progress, check_stop},
};

/// What was published.
#[derive(Clone, Debug, Serialize)]
pub struct Published {
    /// The target folder.
    pub to: PathBuf,
    /// Number of files, whether copied now or earlier.
    pub files: usize,
    /// Their total size.
    pub bytes: u64,
    /// Rows of the data set.
    pub rows: u64,
}

/// Fails with [`Error::Usage`] unless there is a data set in this folder.
pub fn expect_dataset(dataset: &Path) -> Result<()> {
    if !dataset.join(manifest::FILE_NAME).is_file() {
        bail!(Usage, "dataset is '{}', expected a folder with {}", dataset.display(), manifest::FILE_NAME);
    }
    Ok(())
}

/// The files of a data set, the manifest last.
fn files(dataset: &Path) -> Result<Vec<PathBuf>> {
    expect_dataset(dataset)?;
    let mut files = fs::files_below(dataset)?;
    files.sort_by_key(|f| (f == Path::new(manifest::FILE_NAME), f.clone()));
    Ok(files)
}

/// What would be published: the file tree with sizes. Checks the data set and writes nothing.
pub fn tree(dataset: &Path, to: Option<&Path>) -> Result<String> {
    let files = files(dataset)?;
    let report = check_dataset(dataset)?;
    let to = to.map_or_else(|| "(--to is not set)".into(), |t| t.display().to_string());
    let mut text = format!("{to}\n");
    let mut total = 0;
    for file in &files {
        let path = dataset.join(file);
        let bytes = std::fs::metadata(&path).map_err(Error::io(&path))?.len();
        total += bytes;
        text += &format!("  {:<48} {bytes:>12}\n", file.display());
    }
    text += &format!("{} files, {total} bytes, {} rows; nothing was written\n", files.len(), report.rows);
    Ok(text)
}

/// Copies a data set to a folder, byte for byte, after checking it. Its manifest, which names every file's hash,
/// comes last, so a folder with `manifest.json` is complete.
///
/// Fails with [`Error::Usage`] unless `to` is new or holds an unfinished copy of the same data set.
pub fn publish(dataset: &Path, to: &Path) -> Result<Published> {
    let files = files(dataset)?;
    let report = check_dataset(dataset)?;
    let present = if to.is_dir() { fs::files_below(to)? } else { Vec::new() };
    for file in &present {
        let same =
            files.contains(file) && fs::hash_file(&to.join(file))? == fs::hash_file(&dataset.join(file))?;
        if !same {
            bail!(
                Usage,
                "{} holds {}, which is not of this data set; choose another folder",
                to.display(),
                file.display()
            );
        }
    }
    let bar = Progress::new("publish", files.len() as u64, "files");
    let mut bytes = 0;
    for file in &files {
        check_stop()?;
        let from = dataset.join(file);
        if present.contains(file) {
            bar.skip(1);
        } else {
            fs::publish_with(&to.join(file), |target| {
                let mut source = std::fs::File::open(&from).map_err(Error::io(&from))?;
                std::io::copy(&mut source, target).map(drop).map_err(Error::io(to.join(file)))
            })?;
            bar.add(1);
        }
        let (hash, size) = fs::hash_file(&to.join(file))?;
        if hash != fs::hash_file(&from)?.0 {
            bail!(Alarm, "{} is not what was copied from {}", to.join(file).display(), from.display());
        }
        bytes += size;
    }
    check_dataset(to)?;
    Ok(Published { to: to.to_path_buf(), files: files.len(), bytes, rows: report.rows })
}
