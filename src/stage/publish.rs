//! Publish: a verified copy of a data set, where others take it from.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Job, Outcome, Stage, files_below, train::dataset_folder};
use crate::{
    Error, Result,
    data::check::check_dataset,
    fs,
    progress::{Progress, check_stop},
};

/// Copies a data set to a folder, byte for byte, after it was checked; its manifest, which names every file's
/// hash, comes last: a folder with `manifest.json` is whole.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Publish {
    /// A data set, or the folder of a finished materialize.
    #[arg(long)]
    pub dataset: Option<PathBuf>,
    /// The folder to publish to. It must be new, or hold an earlier part of this very copy.
    #[arg(long)]
    pub to: Option<PathBuf>,
    /// Check and print what would be published; write nothing.
    #[arg(long, default_value_t = false)]
    pub dry_run: bool,
}

impl Publish {
    /// The data set's folder and its files, the manifest last.
    fn files(&self) -> Result<(PathBuf, Vec<PathBuf>)> {
        let Some(dataset) = &self.dataset else {
            bail!(Usage, "dataset is not set, expected a data set or the folder of a finished materialize")
        };
        let folder = dataset_folder(dataset);
        if !folder.join("manifest.json").is_file() {
            bail!(Usage, "dataset is '{}', expected a folder with manifest.json", dataset.display());
        }
        let mut files = files_below(&folder)?;
        files.sort_by_key(|f| (f == Path::new("manifest.json"), f.clone()));
        Ok((folder, files))
    }

    /// What would be published: the tree with sizes. Checks the data set.
    pub fn tree(&self) -> Result<String> {
        let (folder, files) = self.files()?;
        let report = check_dataset(&folder)?;
        let to = self.to.as_ref().map_or_else(|| "(--to is not set)".into(), |t| t.display().to_string());
        let mut text = format!("{to}\n");
        let mut total = 0;
        for file in &files {
            let path = folder.join(file);
            let bytes = std::fs::metadata(&path).map_err(Error::io(&path))?.len();
            total += bytes;
            text += &format!("  {:<48} {bytes:>12}\n", file.display());
        }
        text += &format!("{} files, {total} bytes, {} rows; nothing was written\n", files.len(), report.rows);
        Ok(text)
    }
}

impl Stage for Publish {
    const NAME: &'static str = "publish";
    const INPUTS: &'static [&'static str] = &["dataset"];

    fn validate(&self) -> Result<()> {
        if self.to.is_none() && !self.dry_run {
            bail!(Usage, "to is not set, expected a folder to publish to");
        }
        Ok(())
    }

    fn amount(&self) -> String {
        let to = self.to.as_ref().map_or_else(String::new, |t| t.display().to_string());
        format!("a checked copy in {to}")
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let Some(to) = self.to.as_ref().filter(|_| !self.dry_run) else {
            bail!(Usage, "dry_run is a flag of the verb `publish`, expected to without dry_run in a run")
        };
        let (folder, files) = self.files()?;
        let report = check_dataset(&folder)?;
        let present = if to.is_dir() { files_below(to)? } else { Vec::new() };
        for file in &present {
            let same =
                files.contains(file) && fs::hash_file(&to.join(file))? == fs::hash_file(&folder.join(file))?;
            if !same {
                bail!(
                    Usage,
                    "{} holds {}, which is not of this data set; choose another folder",
                    to.display(),
                    file.display()
                );
            }
        }
        let (_, _lock) = job.open("run")?;
        let bar = Progress::new(Self::NAME, files.len() as u64, "files");
        let mut bytes = 0;
        for file in &files {
            check_stop()?;
            let from = folder.join(file);
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
        Ok(Outcome::Done(json!({ "to": to, "files": files.len(), "bytes": bytes, "rows": report.rows })))
    }
}
