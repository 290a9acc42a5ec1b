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

/// `publish` writes to `--to`; its record goes beside the data set's run unless `--out` says otherwise.
pub(super) fn publish(args: &StageArgs<Publish>, global: &Global) -> Result<()> {
    if args.stage.dry_run {
        Stage::validate(&args.stage)?;
        return print(&args.stage.tree()?);
    }
    let mut args = args.clone();
    if args.out.is_none() {
        let inputs = AnyStage::inputs(&args.stage);
        let dataset =
            inputs.first().map(|(_, d)| stage::input_fingerprint(d)).transpose()?.unwrap_or_default();
        args.out = Some(scratch(&blake3::hash(format!("{dataset}{:?}", args.stage.to).as_bytes()).to_hex()));
    }
    main(&args, global)
}

/// Results that nobody asked to keep: a folder that the system may clear.
fn scratch(fingerprint: &str) -> PathBuf {
    std::env::temp_dir().join(format!("proxyset-{}", &fingerprint[..16]))
}
