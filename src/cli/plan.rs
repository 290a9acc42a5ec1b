//! `proxyset plan FILE`.

use std::path::PathBuf;

use super::{Global, print, print_json, table};
use crate::{
    Result,
    pipeline::{self, PipelineFile},
};

#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    /// The pipeline file.
    file: PathBuf,
    /// Plan up to this stage only.
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
    let steps = pipeline::plan(&file, &run, args.until.as_deref())?;
    if global.json {
        return print_json(&serde_json::json!({ "schema": "proxyset.plan/1", "run": run, "steps": steps }));
    }
    print(&table::steps(&steps))
}
