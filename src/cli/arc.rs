//! `proxyset arc --real SRC --synthetic SRC …`: ranks sample sets by ARC.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::{global::Global, table};
use crate::{
    Result,
    data::Source,
    pipeline::{self, PipelineFile},
    progress::note,
    stage::{AnyStage, read_done},
};

/// Flags of the verb arc in addition to the stage's.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct Ranking {
    /// Rank sample sets against these real data: they are split, and discriminators are trained for each set and
    /// then measured. Use images that no generator has seen; otherwise a generator that memorises looks perfect.
    #[arg(long, requires = "synthetic", conflicts_with_all = ["split", "pool", "discriminators"])]
    pub(super) real: Option<Source>,
    /// A sample set to rank: the folder of a finished generate or import stage, or images in Parquet, .npz or a
    /// folder. May be repeated.
    #[arg(long, requires = "real")]
    synthetic: Vec<String>,
    /// A classifier's folder. Next to ARC, the ranking then shows how often the classifier sees the class that an
    /// image was made for.
    #[arg(long, requires = "real")]
    labeller: Option<PathBuf>,
    /// Change a setting of one of the stages involved, as in `--set fit-discriminator.steps=1000`. May be repeated.
    #[arg(long, value_name = "TABLE.KEY=VALUE", requires = "real")]
    set: Vec<String>,
}

impl Ranking {
    /// The verb that has these flags.
    pub(super) const VERB: &'static str = "arc";

    /// Ranks into `out`, with the attack of the stage `arc`.
    pub(super) fn main(&self, arc: &dyn AnyStage, out: Option<&Path>, global: &Global) -> Result<()> {
        let Some(out) = out else { bail!(Usage, "--out is not set, expected the folder for the ranking") };
        let given = [("split", json!({ "source": self.real })), (arc.name(), arc.settings())];
        let file = PipelineFile::of("arc", &given, &self.set)?;
        let nodes = pipeline::ranking_nodes(&file, out, &self.synthetic, self.labeller.as_deref())?;
        pipeline::run_nodes(&nodes, out, global.device)?;
        let Some(rank) = nodes.iter().find(|node| node.stage.name() == "rank") else {
            bail!(Alarm, "a ranking has no stage that ranks")
        };
        let summary = read_done(&rank.folder)?.map(|done| done.summary).unwrap_or_default();
        global.show(|| &summary, || table::summary(&summary))?;
        if !global.json {
            note(&format!("curves: {}", rank.folder.join("rank.svg").display()));
        }
        Ok(())
    }
}
