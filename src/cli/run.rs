//! `proxyset run FILE`.

use std::path::PathBuf;

use super::{Global, print, print_json, table};
use crate::{
    Result,
    pipeline::{self, PipelineFile},
    progress::note,
};

#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    /// The pipeline file.
    file: PathBuf,
    /// Stop after this stage; the report then tells of what there is.
    #[arg(long)]
    until: Option<String>,
    /// Override a setting: `--set generate.count=500`. May be repeated.
    #[arg(long, value_name = "TABLE.KEY=VALUE")]
    set: Vec<String>,
    /// The run folder; `runs/NAME` if not given.
    #[arg(long)]
    out: Option<PathBuf>,
}

pub(super) fn main(args: &Args, global: &Global) -> Result<()> {
    let file = PipelineFile::read(&args.file, &args.set)?;
    let run = args.out.clone().unwrap_or_else(|| PathBuf::from("runs").join(&file.name));
    let steps = pipeline::run(&file, &run, args.until.as_deref(), global.device)?;
    if global.json {
        return print_json(&serde_json::json!({ "schema": "proxyset.run/1", "run": run, "steps": steps }));
    }
    print(&table::steps(&steps))?;
    if let Some(report) = steps.iter().rev().find(|s| s.stage == "report") {
        print(&std::fs::read_to_string(report.folder.join("report.md")).unwrap_or_default())?;
        note(&format!("report: {}", report.folder.display()));
    }
    Ok(())
}
