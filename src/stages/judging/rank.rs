//! Rank: several generators by ARC.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::arc::discrimination_svg;
use crate::{
    Result,
    fs::{self, Record},
    proxy::arc::{Estimate, Point, difference_interval},
    stage::{Input, Job, Outcome, Stage, read_done},
    tables::{division::SPLIT, pool::POOL, records::ArcRecord},
};

const ARCS: Input = Input::several("arcs", &["arc"]);
const LABELLED: Input = Input::several("labelled", &["label"]);

/// Ranks generators by their signed ARC, lowest first: `rank.json`, and the curves in `rank.svg`.
///
/// All estimates must come from the same division of the real images and use the same radii and attack. The
/// intervals of the differences treat the estimates as independent; since they share real images, the intervals are
/// wider than they need be.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
pub struct Rank {
    /// The folders of finished arc stages, one for each generator.
    #[arg(long, value_delimiter = ',')]
    pub arcs: Vec<PathBuf>,
    /// The folders of finished label stages for the same pools, in the same order; they add the label agreement,
    /// which ARC does not see.
    #[arg(long, value_delimiter = ',')]
    pub labelled: Vec<PathBuf>,
    /// The generators' names, in the order of the arc folders.
    #[arg(long, value_delimiter = ',')]
    pub names: Vec<String>,
}

impl Stage for Rank {
    const NAME: &'static str = "rank";
    const ABOUT: &'static str = "Rank generators by their estimated ARC";
    const INPUTS: &'static [Input] = &[ARCS, LABELLED];
    const REVISION: u32 = 1;

    fn validate(&self) -> Result<()> {
        let (arcs, labelled, names) = (self.arcs.len(), self.labelled.len(), self.names.len());
        if names != arcs || (labelled != 0 && labelled != arcs) {
            bail!(
                Usage,
                "there are {arcs} arcs, {names} names and {labelled} labelled, expected as many names, and as many labelled \
                 or none"
            );
        }
        Ok(())
    }

    fn amount(&self) -> String {
        format!("{} generators", self.arcs.len())
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        if self.arcs.is_empty() {
            bail!(Usage, "arcs is empty, expected the folder of a finished arc for each generator");
        }
        let first_arc = self.arcs[0].display();
        let mut found: Vec<(String, ArcRecord, Option<f64>)> = Vec::new();
        for (i, (dir, name)) in self.arcs.iter().zip(&self.names).enumerate() {
            let dir = ARCS.finished(Some(dir))?;
            let (record, arc) = (ArcRecord::read(&dir)?, dir.display());
            if let Some((_, first, _)) = found.first()
                && (first.epsilons != record.epsilons || first.attack != record.attack)
            {
                bail!(Data, "{arc}: radii or attack are not those of {first_arc}, expected the same for all");
            }
            if SPLIT.fingerprint_in(&dir)? != SPLIT.fingerprint_in(&self.arcs[0])? {
                bail!(
                    Data,
                    "{arc}: measured on other real images than {first_arc}, expected one split for all"
                );
            }
            let agreement = match self.labelled.get(i) {
                Some(labels) => {
                    let labels = LABELLED.finished(Some(labels))?;
                    if POOL.fingerprint_in(&dir)? != POOL.fingerprint_in(&labels)? {
                        bail!(Data, "{}: not labels of the pool of {arc}", labels.display());
                    }
                    read_done(&labels)?.and_then(|done| done.summary["agreement"].as_f64())
                }
                None => None,
            };
            found.push((name.clone(), record, agreement));
        }
        found.sort_by(|a, b| a.1.estimate.signed.total_cmp(&b.1.estimate.signed));
        let mut before: Option<&Estimate> = None;
        let mut ranked = Vec::new();
        for (name, ArcRecord { estimate: e, signed_after_pgd, .. }, agreement) in &found {
            let measured = |side: usize| e.images.iter().map(|images| images[side]).sum::<usize>();
            ranked.push(json!({
                "name": name,
                // The signed area, by which generators are ranked.
                "signed_arc": e.signed,
                "interval": e.interval,
                // The same after PGD alone.
                "signed_after_pgd": signed_after_pgd,
                "truncated": e.truncated,
                "largest_rise_se": e.largest_rise_se,
                // Images measured in all sets: real, synthetic.
                "images": [measured(0), measured(1)],
                // How often a classifier sees the class that an image was made for; null without labels.
                "label_agreement": agreement,
                // The signed area minus that of the one before, and its 95 % interval.
                "behind_the_last": before.map(|last| e.signed - last.signed),
                "behind_interval": before.map(|last| difference_interval(e, last)),
            }));
            before = Some(e);
        }
        let curves: BTreeMap<&str, &[Point]> =
            found.iter().map(|(name, record, _)| (&**name, &*record.estimate.curve)).collect();
        let line = |points: &[Point]| points.iter().map(|p| (p.epsilon, p.accuracy)).collect();
        let series: Vec<(String, Vec<(f64, f64)>)> =
            found.iter().map(|(name, record, _)| (name.clone(), line(&record.estimate.curve))).collect();
        let out = job.open()?;
        fs::publish(&out.join("rank.svg"), discrimination_svg(&series)?.as_bytes())?;
        let summary = json!({
            "schema": "proxyset.rank/1",
            "attack": found[0].1.attack,
            "generators": ranked,
            "curves": curves,
        });
        fs::publish_json(&out.join("rank.json"), &summary)?;
        Ok(Outcome::Done(summary))
    }
}
