//! `proxyset check DIR`.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::global::Global;
use crate::{Error, Result, data::check::check_dataset, pipeline, progress::note, stage};

#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    /// A run folder, one stage's folder, or a data set (`README.md`, `manifest.json`, `data/`).
    dir: PathBuf,
}

pub(super) fn main(args: &Args, global: &Global) -> Result<()> {
    let dir = args.dir.display();
    if is_dataset(&args.dir) {
        let report = check_dataset(&args.dir)?;
        let (rows, files) = (report.rows, report.files);
        let text = || format!("{dir}: {rows} rows in {files} files are as they should be");
        return global.show(|| &report, text);
    }
    let steps = pipeline::status(&args.dir)?;
    if steps.is_empty() {
        bail!(Usage, "'{dir}' holds no run and no data set, expected one to check");
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
        let report = is_dataset(&dataset).then(|| check_dataset(&dataset)).transpose();
        let report = report.unwrap_or_else(|e| {
            problems.push(e.to_string());
            None
        });
        let rows = report.map(|report| report.rows);
        checked.push(json!({ "folder": step.folder, "files": done.files.len(), "dataset_rows": rows }));
    }
    if checked.is_empty() {
        problems.push(format!("{dir}: no stage is finished, so there is nothing to check"));
    }
    if !problems.is_empty() {
        return Err(Error::Data(format!("{} problems found:\n  {}", problems.len(), problems.join("\n  "))));
    }
    let sum = |key: &str| checked.iter().filter_map(|c| c[key].as_u64()).sum::<u64>();
    let (stages, files, rows) = (checked.len(), sum("files"), sum("dataset_rows"));
    global.show(
        || json!({ "schema": "proxyset.check/1", "checked": checked }),
        || format!("{dir}: {stages} stages with {files} files, {rows} data-set rows: all as they should be"),
    )
}

fn is_dataset(dir: &Path) -> bool {
    dir.join("manifest.json").is_file() && dir.join("data").is_dir()
}
