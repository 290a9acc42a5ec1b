//! `proxyset check DIR`.

use std::path::{Path, PathBuf};

use super::global::{Global, print, print_json};
use crate::{Error, Result, data::check::check_dataset, pipeline, progress::note, stage};

#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    /// A run folder, one stage's folder, or a data set (`README.md`, `manifest.json`, `data/`).
    dir: PathBuf,
}

pub(super) fn main(args: &Args, global: &Global) -> Result<()> {
    if is_dataset(&args.dir) {
        let report = check_dataset(&args.dir)?;
        if global.json {
            return print_json(&report);
        }
        return print(&format!(
            "{}: {} rows in {} files are as they should be",
            args.dir.display(),
            report.rows,
            report.files
        ));
    }
    let steps = pipeline::status(&args.dir)?;
    if steps.is_empty() {
        bail!(Usage, "'{}' holds no run and no data set, expected one to check", args.dir.display());
    }
    let mut problems = Vec::new();
    let mut checked = Vec::new();
    for step in &steps {
        let Some(done) = stage::read_done(&step.folder)? else {
            note(&format!("{}: not finished, so not checked", step.folder.display()));
            continue;
        };
        problems.extend(stage::verify_files(&step.folder, &done)?);
        let dataset = step.folder.join("dataset");
        let rows = if is_dataset(&dataset) {
            match check_dataset(&dataset) {
                Ok(report) => Some(report.rows),
                Err(e) => {
                    problems.push(e.to_string());
                    None
                }
            }
        } else {
            None
        };
        checked.push(
            serde_json::json!({ "folder": step.folder, "files": done.files.len(), "dataset_rows": rows }),
        );
    }
    if checked.is_empty() {
        problems.push(format!("{}: no stage is finished, so there is nothing to check", args.dir.display()));
    }
    if !problems.is_empty() {
        return Err(Error::Data(format!("{} problems found:\n  {}", problems.len(), problems.join("\n  "))));
    }
    if global.json {
        return print_json(&serde_json::json!({ "schema": "proxyset.check/1", "checked": checked }));
    }
    let files: u64 = checked.iter().filter_map(|c| c["files"].as_u64()).sum();
    let rows: u64 = checked.iter().filter_map(|c| c["dataset_rows"].as_u64()).sum();
    print(&format!(
        "{}: {} stages with {files} files, {rows} data-set rows: all as they should be",
        args.dir.display(),
        checked.len()
    ))
}

fn is_dataset(dir: &Path) -> bool {
    dir.join("manifest.json").is_file() && dir.join("data").is_dir()
}
