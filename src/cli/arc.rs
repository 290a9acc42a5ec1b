//! `proxyset arc`: of one pool, or of several sample sets that are ranked.

use std::path::PathBuf;

use serde_json::json;

use super::{Global, StageArgs, print, print_json, stage, table};
use crate::{
    Result,
    data::Source,
    pipeline::{self, PipelineFile},
    progress::note,
    stage::{AnyStage, Arc, Rank, Split, Stage, read_done},
};

#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    #[command(flatten)]
    one: StageArgs<Arc>,
    /// Rank sample sets against this real data: it is split, discriminators are trained for each set, then measured.
    /// Name images that no generator has seen, else one that memorises looks perfect.
    #[arg(long, requires = "synthetic", conflicts_with_all = ["split", "pool", "discriminators"])]
    real: Option<Source>,
    /// A sample set to rank: the folder of a finished generate or import, or images in Parquet, .npz or a folder. May be
    /// repeated.
    #[arg(long, requires = "real")]
    synthetic: Vec<String>,
    /// A classifier's folder: how often it sees the class that an image was made for stands beside ARC.
    #[arg(long, requires = "real")]
    labeller: Option<PathBuf>,
    /// A setting of the stages below: `--set fit-discriminator.steps=1000`. May be repeated.
    #[arg(long, value_name = "TABLE.KEY=VALUE", requires = "real")]
    set: Vec<String>,
}

pub(super) fn main(args: &Args, global: &Global) -> Result<()> {
    let Some(real) = &args.real else { return stage::main(&args.one, global) };
    let Some(out) = &args.one.out else {
        bail!(Usage, "--out is not set, expected the folder for the ranking")
    };
    Stage::validate(&args.one.stage)?;
    let given = [(Split::NAME, json!({ "source": real })), (Arc::NAME, AnyStage::settings(&args.one.stage))];
    let file = PipelineFile::of("arc", &given, &args.set)?;
    let nodes = pipeline::ranking_nodes(&file, out, &args.synthetic, args.labeller.as_deref())?;
    pipeline::run_nodes(&nodes, out, global.device)?;
    let Some(rank) = nodes.iter().find(|node| node.stage.name() == Rank::NAME) else {
        bail!(Alarm, "a ranking has no stage that ranks")
    };
    let summary = read_done(&rank.folder)?.map(|done| done.summary).unwrap_or_default();
    if global.json {
        return print_json(&summary);
    }
    print(&table::summary(&summary))?;
    note(&format!("curves: {}", rank.folder.join("rank.svg").display()));
    Ok(())
}
