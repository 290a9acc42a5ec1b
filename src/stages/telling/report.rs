//! Report: a run's results for people to read, as tables, comparisons of arms and contact sheets.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    Result,
    curate::Arm,
    data::{decode_as, encode_png, grid},
    error::expect_within as expect,
    fs::{self, Record},
    stage::{Input, Job, Outcome, Stage, read_done},
    stats::{Comparison, compare},
    tables::{
        images,
        labels::LABELS,
        pool::{POOL, Pool},
        records::{ARC, ArcRecord, METRICS, Metrics},
        scores::{SCORES, ScoreTables},
        selection::{SELECTION, SelectRecord},
    },
};

/// Bootstrap draws of the comparison of arms.
const DRAWS: usize = 2000;

/// Writes `report.md`, `report.json`, and `contact.png`: one row for each class, with its lowest-scored samples
/// (closest to real) on the left and its highest-scored on the right.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The folder of a finished generate stage.
    #[arg(long)]
    pub pool: Option<PathBuf>,
    /// The folder of a finished label stage.
    #[arg(long)]
    pub labels: Option<PathBuf>,
    /// The folder of a finished score stage.
    #[arg(long)]
    pub scores: Option<PathBuf>,
    /// The folder of a finished arc stage.
    #[arg(long)]
    pub arc: Option<PathBuf>,
    /// The folder of a finished curate stage.
    #[arg(long)]
    pub selection: Option<PathBuf>,
    /// The folders of finished evaluate stages.
    #[arg(long)]
    pub metrics: Vec<PathBuf>,
    /// Number of samples of each class at either end of the contact sheet.
    #[arg(long, default_value_t = 8)]
    pub samples: usize,
    /// Pixels of the contact sheet per pixel of an image; 0 makes images about 64 pixels wide.
    #[arg(long, default_value_t = 0)]
    pub scale: usize,
}

impl Stage for Report {
    const NAME: &'static str = "report";
    const ABOUT: &'static str = "Write tables, comparisons and contact sheets of the results";
    const INPUTS: &'static [Input] = &[POOL, LABELS, SCORES, ARC, SELECTION, METRICS];

    fn validate(&self) -> Result<()> {
        expect("samples", self.samples, 1, 1000)?;
        expect("scale", self.scale, 0, 64)
    }

    fn amount(&self) -> String {
        match self.metrics.len() {
            0 => "tables and a contact sheet".into(),
            n => format!("tables, a contact sheet, and the comparison of {n} evaluations"),
        }
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let pool = Pool::open(self.pool.as_deref())?;
        let scores = SCORES.finished(self.scores.as_deref())?;
        let labels = finished(&LABELS, self.labels.as_deref())?.map(|dir| read_done(&dir)).transpose()?;
        let labels = labels.flatten().map(|done| done.summary);
        let arc = finished(&ARC, self.arc.as_deref())?.map(|dir| ArcRecord::read(&dir)).transpose()?;
        let selection = finished(&SELECTION, self.selection.as_deref())?;
        let selection = selection.map(|dir| SelectRecord::read(&dir)).transpose()?;
        let evaluations = self.evaluations()?;
        let sheet = self.contact_sheet(&pool, &scores)?;
        let comparison = compare_arms(&evaluations)?;

        let out = job.open()?;
        fs::publish(&out.join("contact.png"), &sheet)?;
        let markdown =
            markdown(&pool, labels.as_ref(), arc.as_ref(), selection.as_ref(), &evaluations, &comparison);
        fs::publish(&out.join("report.md"), markdown.as_bytes())?;
        let summary = json!({
            "pool": pool.info,
            "labels": labels,
            "arc": arc,
            "selection": selection,
            "evaluations": evaluations.iter().map(|e| &e.metrics).collect::<Vec<_>>(),
            "comparison": comparison,
        });
        let record = json!({ "schema": "proxyset.report/1", "report": summary });
        fs::publish_json(&out.join("report.json"), &record)?;
        Ok(Outcome::Done(summary))
    }
}

/// One evaluation, with what became of each image.
struct Evaluation {
    metrics: Metrics,
    clean: Vec<bool>,
    robust: Option<Vec<bool>>,
}

/// A comparison of two arms.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct ArmComparison {
    arm: String,
    baseline: String,
    seeds: Vec<u64>,
    clean: Comparison,
    robust: Option<Comparison>,
}

impl Report {
    fn evaluations(&self) -> Result<Vec<Evaluation>> {
        let mut all = Vec::new();
        for dir in &self.metrics {
            let dir = METRICS.finished(Some(dir))?;
            let metrics = Metrics::read(&dir)?;
            let (clean, robust) = images::read_correct(&dir)?;
            all.push(Evaluation { metrics, clean, robust });
        }
        Ok(all)
    }

    fn contact_sheet(&self, pool: &Pool, scores: &Path) -> Result<Vec<u8>> {
        let shape = pool.info.shape;
        let extremes = extremes(scores, self.samples)?;
        // Each shard is opened only once, however many of its images are needed.
        let mut wanted: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for [low, high] in &extremes {
            low.iter().chain(high).for_each(|&(shard, row)| wanted.entry(shard).or_default().push(row));
        }
        let mut images: BTreeMap<(usize, usize), Vec<u8>> = BTreeMap::new();
        for (shard, rows) in wanted {
            let read = pool.read(shard)?;
            for row in rows {
                let Some(png) = read.images.get(row) else {
                    bail!(Data, "shard {shard} has {} rows, but the scores speak of row {row}", read.len())
                };
                images.insert((shard, row), decode_as(png, shape)?);
            }
        }
        let mut cells: Vec<Option<&[u8]>> = Vec::new();
        for [low, high] in &extremes {
            let cell = |place: Option<&(usize, usize)>| place.and_then(|p| images.get(p)).map(Vec::as_slice);
            cells.extend((0..self.samples).map(|i| cell(low.get(i))));
            cells.push(None);
            cells.extend((0..self.samples).rev().map(|i| cell(high.get(i))));
        }
        let scale = if self.scale > 0 { self.scale } else { (64 / shape.width).clamp(1, 8) };
        let (sheet, pixels) = grid(&cells, 2 * self.samples + 1, shape, scale, 3);
        Ok(encode_png(&pixels, sheet))
    }
}

/// The folder of an input that may be left out.
fn finished(input: &Input, dir: Option<&Path>) -> Result<Option<PathBuf>> {
    dir.map(|dir| input.finished(Some(dir))).transpose()
}

/// The order of arms: each is compared with every one before it. Arms of other names come last.
const ARMS: [&str; 6] = ["real", "all", "random", "confidence", "rejection", "arc"];

/// All pairs of arms, the later one against the earlier, over the seeds that both have, if they were measured in
/// the same way.
fn compare_arms(evaluations: &[Evaluation]) -> Result<Vec<ArmComparison>> {
    let mut arms: BTreeMap<(usize, &str), BTreeMap<u64, &Evaluation>> = BTreeMap::new();
    for evaluation in evaluations {
        if let Some(train) = &evaluation.metrics.train {
            let rank = ARMS.iter().position(|&a| a == train.arm).unwrap_or(ARMS.len());
            if arms.entry((rank, &train.arm)).or_default().insert(train.seed, evaluation).is_some() {
                bail!(
                    Data,
                    "two evaluations are of arm {} with seed {}, expected one",
                    train.arm,
                    train.seed
                );
            }
        }
    }
    let arms: Vec<(&str, BTreeMap<u64, &Evaluation>)> =
        arms.into_iter().map(|((_, arm), runs)| (arm, runs)).collect();
    let mut found = Vec::new();
    for (i, (baseline, before)) in arms.iter().enumerate() {
        for (arm, runs) in &arms[i + 1..] {
            let seeds: Vec<u64> = runs.keys().filter(|s| before.contains_key(s)).copied().collect();
            let pairs = || seeds.iter().map(|s| (runs[s], before[s]));
            let alike =
                |a: &Metrics, b: &Metrics| a.images == b.images && a.attack == b.attack && a.data == b.data;
            if seeds.is_empty() || pairs().any(|(a, b)| !alike(&a.metrics, &b.metrics)) {
                continue;
            }
            let (clean, base): (Vec<_>, Vec<_>) =
                pairs().map(|(a, b)| (a.clean.clone(), b.clean.clone())).unzip();
            let robust: Option<(Vec<_>, Vec<_>)> =
                pairs().map(|(a, b)| Some((a.robust.clone()?, b.robust.clone()?))).collect();
            found.push(ArmComparison {
                arm: (*arm).into(),
                baseline: (*baseline).into(),
                clean: compare(&clean, &base, DRAWS, 0),
                robust: robust.map(|(arm, base)| compare(&arm, &base, DRAWS, 0)),
                seeds,
            });
        }
    }
    Ok(found)
}

/// Where pool images are: shard and row.
type Places = Vec<(usize, usize)>;

/// Where the lowest- and the highest-scored images are, for each class that has any.
fn extremes(scores: &Path, per_class: usize) -> Result<Vec<[Places; 2]>> {
    let tables = ScoreTables::open(Some(scores))?;
    let scored = tables.load(&[], Arm::Score, 0)?;
    let mut by_class: Vec<Vec<usize>> = vec![Vec::new(); tables.classes.len()];
    for (row, &class) in scored.labels.iter().enumerate().filter(|(row, _)| scored.scores[*row].is_finite()) {
        by_class[usize::from(class)].push(row);
    }
    by_class.retain(|rows| !rows.is_empty());
    Ok(by_class
        .into_iter()
        .map(|mut rows| {
            rows.sort_by(|&a, &b| scored.scores[a].total_cmp(&scored.scores[b]));
            let place = |&row: &usize| tables.place(row);
            let lowest = rows.iter().take(per_class).map(place).collect();
            [lowest, rows.iter().rev().take(per_class).map(place).collect()]
        })
        .collect())
}

fn markdown(
    pool: &Pool,
    labels: Option<&Value>,
    arc: Option<&ArcRecord>,
    selection: Option<&SelectRecord>,
    evaluations: &[Evaluation],
    comparison: &[ArmComparison],
) -> String {
    let info = &pool.info;
    let percent = |x: f64| format!("{:.1} %", 100.0 * x);
    let mut text = format!(
        "# Report\n\n{} images, {}, {} classes, sampler {}\n",
        info.count,
        info.shape,
        info.class_names.len(),
        info.sampler
    );
    if let Some(agreement) = labels.and_then(|l| l["agreement"].as_f64()) {
        text += &format!(
            "\nA classifier trained on real images gives {} of them their label.\n",
            percent(agreement)
        );
    }
    text += "\n![lowest-scored (left) and highest-scored (right) samples of each class](contact.png)\n";
    if let Some(arc) = arc {
        let e = &arc.estimate;
        text += &format!(
            "\n## ARC\n\nARC = **{:.5}** (signed {:.5}, 95 % interval {:.5} to {:.5}; low is a good proxy){}\n\n{}.\n\n\
             | ε | accuracy under attack | ± SE | on real | on synthetic |\n|---|---|---|---|---|\n",
            e.arc,
            e.signed,
            e.interval[0],
            e.interval[1],
            if e.truncated { "; truncated: the grid ends before the curve reaches ½" } else { "" },
            arc.attack,
        );
        for (point, epsilon) in e.curve.iter().zip(&arc.epsilons) {
            text += &format!(
                "| {epsilon} | {} | {} | {} | {} |\n",
                percent(point.accuracy),
                percent(point.se),
                percent(point.accuracy_real),
                percent(point.accuracy_synthetic)
            );
        }
        text += &format!(
            "\nLargest rise of the curve: {:.1} SE (over 2 would say that a network is too weak).\n",
            e.largest_rise_se
        );
    }
    if let Some(s) = selection {
        text += &format!(
            "\n## Curation, arm {}\n\n{}\n\nKept by class: {:?}\n",
            s.arm,
            s.balance(),
            s.kept_by_class()
        );
        if s.looked_for_leaks == Some(false) {
            text += "\nThe real data have no test split: no leak of test images was looked for.\n";
        }
        if let Some(c) = &s.coverage {
            text += &format!(
                "\nPrecision and recall of {} images against {} real ones: {:.3} and {:.3} of the pool, {:.3} and {:.3} of the kept.\n",
                c.images[1], c.images[0], c.before[0], c.before[1], c.after[0], c.after[1]
            );
        }
        if let Some(j) = &s.judged {
            text += &format!(
                "\nJudges (other seeds, other images): kept {:.4}, random {:.4}, difference {:+.4}, 95 % interval {:+.4} to {:+.4}: {}.\n",
                j.kept,
                j.random,
                j.difference,
                j.interval[0],
                j.interval[1],
                if j.interval[1] < 0.0 {
                    "the kept are closer to real"
                } else if j.interval[0] > 0.0 {
                    "the kept are further from real"
                } else {
                    "no difference found"
                }
            );
        }
    }
    if !evaluations.is_empty() {
        text +=
            "\n## Classifiers\n\n| trained on | seed | images | clean | robust |\n|---|---|---|---|---|\n";
        for e in evaluations {
            let m = &e.metrics;
            let (arm, seed) =
                m.train.as_ref().map_or(("?".into(), "?".into()), |t| (t.arm.clone(), t.seed.to_string()));
            let robust = match (m.robust_correct, m.robust_accuracy) {
                (Some(n), Some(share)) => format!("{n} ({})", percent(share)),
                _ => String::new(),
            };
            text += &format!(
                "| {arm} | {seed} | {} | {} ({}) | {robust} |\n",
                m.images,
                m.clean_correct,
                percent(m.clean_accuracy)
            );
        }
    }
    for c in comparison {
        let line = |what: &str, c: &Comparison| {
            format!(
                "- {what}: {:+.1} points, 95 % interval {:+.1} to {:+.1}: {} (this design would find {:.1} points four times in five)\n",
                100.0 * c.difference,
                100.0 * c.interval[0],
                100.0 * c.interval[1],
                if c.resolved { "resolved" } else { "not resolved" },
                100.0 * c.resolvable
            )
        };
        text += &format!("\n{} against {}, {} seeds:\n\n", c.arm, c.baseline, c.seeds.len());
        text += &line("clean", &c.clean);
        if let Some(robust) = &c.robust {
            text += &line("robust", robust);
        }
    }
    text
}
