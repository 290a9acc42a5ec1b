//! One verb per stage: `proxyset generate --model DIR --count N --out DIR`.

use std::path::PathBuf;

use serde_json::json;

use super::{Global, StageArgs, print, print_json, table};
use crate::{
    Result,
    progress::note,
    stage::{self, AnyStage, Publish, Stage},
};

pub(super) fn main<S: Stage>(args: &StageArgs<S>, global: &Global) -> Result<()> {
    let stage = &args.stage;
    Stage::validate(stage)?;
    let mut inputs = Vec::new();
    for (key, input) in AnyStage::inputs(stage) {
        inputs.push((key, stage::input_fingerprint(&input)?));
    }
    let fingerprint = stage::fingerprint(stage, &inputs);
    let out = match &args.out {
        Some(out) => out.clone(),
        None if S::NAME == "evaluate" => scratch(&fingerprint),
        None => bail!(Usage, "--out is not set, expected the folder for what {} makes", S::NAME),
    };
    let done_before = stage::state(&out, &fingerprint)? == stage::State::Done;
    let summary = stage::execute(stage, &inputs, &out, global.device)?;
    if done_before {
        note(&format!("{}: done already in {}", S::NAME, out.display()));
    }
    if global.json {
        return print_json(&json!({
            "schema": format!("proxyset.{}/1", S::NAME),
            "out": out,
            "fingerprint": fingerprint,
            "summary": summary,
        }));
    }
    print(&table::summary(&summary))
}

/// `publish` writes to `--to`; its record is kept only with `--out`.
pub(super) fn publish(args: &StageArgs<Publish>, global: &Global) -> Result<()> {
    if args.stage.dry_run {
        Stage::validate(&args.stage)?;
        let tree = args.stage.tree()?;
        return if global.json {
            print_json(&json!({ "schema": "proxyset.tree/1", "tree": tree }))
        } else {
            print(&tree)
        };
    }
    let mut args = args.clone();
    if args.out.is_some() {
        return main(&args, global);
    }
    // Nobody asked to keep the record, so it must not say later that all is done: what is there is checked anew.
    let record = scratch(&blake3::hash(format!("{:?}", args.stage).as_bytes()).to_hex());
    crate::fs::remove_dir_all(&record)?;
    args.out = Some(record.clone());
    let result = main(&args, global);
    crate::fs::remove_dir_all(&record)?;
    result
}

/// Results that nobody asked to keep: a folder that the system may clear.
fn scratch(fingerprint: &str) -> PathBuf {
    std::env::temp_dir().join(format!("proxyset-{}", &fingerprint[..16]))
}
