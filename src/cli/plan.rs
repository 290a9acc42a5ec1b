//! `proxyset plan FILE`, and the arguments that it shares with `run`.

use std::path::PathBuf;

use serde_json::json;

use super::{global::Global, table};
use crate::{
    Result,
    pipeline::{self, PipelineFile},
};

#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    /// The pipeline file.
    file: PathBuf,
    /// Stop after this stage. The report then covers what there is by then.
    #[arg(long)]
    pub(super) until: Option<String>,
    /// Override a setting, as in `--set generate.count=500`. May be repeated.
    #[arg(long, value_name = "TABLE.KEY=VALUE")]
    set: Vec<String>,
    /// The run folder; `runs/NAME` if not given.
    #[arg(long)]
    out: Option<PathBuf>,
}

impl Args {
    /// The pipeline with its overrides applied, and its run folder.
    pub(super) fn read(&self) -> Result<(PipelineFile, PathBuf)> {
        let file = PipelineFile::read(&self.file, &self.set)?;
        let run = self.out.clone().unwrap_or_else(|| PathBuf::from("runs").join(&file.name));
        Ok((file, run))
    }
}

pub(super) fn main(args: &Args, global: &Global) -> Result<()> {
    let (file, run) = args.read()?;
    let steps = pipeline::plan(&file, &run, args.until.as_deref())?;
    let json = || json!({ "schema": "proxyset.plan/1", "run": run, "steps": steps });
    global.show(json, || table::steps(&steps))
}
