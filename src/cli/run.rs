//! `proxyset run FILE`.

use serde_json::json;

use super::{
    global::{Global, print},
    plan, table,
};
use crate::{Result, pipeline, progress::note};

pub(super) fn main(args: &plan::Args, global: &Global) -> Result<()> {
    let (file, run) = args.read()?;
    let steps = pipeline::run(&file, &run, args.until.as_deref(), global.device)?;
    let json = || json!({ "schema": "proxyset.run/1", "run": run, "steps": steps });
    global.show(json, || table::steps(&steps))?;
    if let Some(report) = steps.iter().rev().find(|s| s.stage == "report").filter(|_| !global.json) {
        print(&std::fs::read_to_string(report.folder.join("report.md")).unwrap_or_default())?;
        note(&format!("report: {}", report.folder.display()));
    }
    Ok(())
}
