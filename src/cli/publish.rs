//! `proxyset publish --dataset DIR --to DIR`.

use std::path::PathBuf;

use serde_json::json;

use super::{global::Global, table};
use crate::{
    Error, Result,
    data::publish::{publish, tree},
    tables::dataset::dataset_folder,
};

#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    /// A data set, or the folder of a finished materialize stage.
    #[arg(long)]
    dataset: PathBuf,
    /// The folder to publish to. It must be new, or hold an unfinished copy of the same data set.
    #[arg(long, required_unless_present = "dry_run")]
    to: Option<PathBuf>,
    /// Check the data set and print what would be published, but write nothing.
    #[arg(long)]
    dry_run: bool,
}

pub(super) fn main(args: &Args, global: &Global) -> Result<()> {
    let dataset = dataset_folder(&args.dataset);
    let Some(to) = args.to.as_ref().filter(|_| !args.dry_run) else {
        let tree = tree(&dataset, args.to.as_deref())?;
        return global.show(|| json!({ "schema": "proxyset.tree/1", "tree": tree }), || tree.clone());
    };
    let published = publish(&dataset, to)?;
    let summary = serde_json::to_value(&published)
        .map_err(|e| Error::Alarm(format!("what was published cannot be written as JSON: {e}")))?;
    let json = || json!({ "schema": "proxyset.publish/1", "summary": summary });
    global.show(json, || table::summary(&summary))
}
