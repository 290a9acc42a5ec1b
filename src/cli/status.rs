//! `proxyset status DIR`.

use std::path::PathBuf;

use serde_json::json;

use super::{global::Global, table};
use crate::{Result, pipeline};

#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    /// A run folder, or one stage's folder.
    dir: PathBuf,
}

pub(super) fn main(args: &Args, global: &Global) -> Result<()> {
    let steps = pipeline::status(&args.dir)?;
    let json = || json!({ "schema": "proxyset.status/1", "run": args.dir, "steps": steps });
    global.show(json, || table::steps(&steps))
}
