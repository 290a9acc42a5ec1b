//! `proxyset status DIR`.

use std::path::PathBuf;

use super::{
    global::{Global, print, print_json},
    table,
};
use crate::{Result, pipeline};

#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    /// A run folder, or one stage's folder.
    dir: PathBuf,
}

pub(super) fn main(args: &Args, global: &Global) -> Result<()> {
    let steps = pipeline::status(&args.dir)?;
    if global.json {
        return print_json(
            &serde_json::json!({ "schema": "proxyset.status/1", "run": args.dir, "steps": steps }),
        );
    }
    print(&table::steps(&steps))
}
