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
    proxy::arc::Estimate,
    stage::{Input, Job, Outcome, Stage, read_done},
    stats::{Comparison, compare},
    tables::{
        images,
        labels::LABELS,
        pool::{POOL, Pool, PoolInfo},
        records::{ARC, ArcRecord, METRICS, Metrics, TrainRecord},
        scores::{SCORES, ScoreTables},
        selection::{Judged, SELECTION, SelectRecord},
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
        let labels = optional(&LABELS, self.labels.as_deref(), read_done)?.flatten().map(|done| done.summary);
        let arc = optional(&ARC, self.arc.as_deref(), ArcRecord::read)?;
        let selection = optional(&SELECTION, self.selection.as_deref(), SelectRecord::read)?;
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
#[derive(Serialize)]
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

/// What `read` finds in the folder of an input that may be left out.
fn optional<T>(input: &Input, dir: Option<&Path>, read: fn(&Path) -> Result<T>) -> Result<Option<T>> {
    dir.map(|dir| read(&input.finished(Some(dir))?)).transpose()
}

/// The order of arms: each is compared with every one before it. Arms of other names come last.
const ARMS: [&str; 6] = ["real", "all", "random", "confidence", "rejection", "arc"];

/// All pairs of arms, the later one against the earlier, over the seeds that both have, if they were measured in
/// the same way.
fn compare_arms(evaluations: &[Evaluation]) -> Result<Vec<ArmComparison>> {
    let mut arms: BTreeMap<(usize, &str), BTreeMap<u64, &Evaluation>> = BTreeMap::new();
    for evaluation in evaluations {
        if let Some(TrainRecord { arm, seed, .. }) = &evaluation.metrics.train {
            let rank = ARMS.iter().position(|a| a == arm).unwrap_or(ARMS.len());
            if arms.entry((rank, arm)).or_default().insert(*seed, evaluation).is_some() {
                bail!(Data, "two evaluations are of arm {arm} with seed {seed}, expected one");
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
    let place = |&row: &usize| tables.place(row);
    let ends = |mut rows: Vec<usize>| {
        rows.sort_by(|&a, &b| scored.scores[a].total_cmp(&scored.scores[b]));
        let lowest = rows.iter().take(per_class).map(place).collect();
        [lowest, rows.iter().rev().take(per_class).map(place).collect()]
    };
    Ok(by_class.into_iter().map(ends).collect())
}

fn markdown(
    pool: &Pool,
    labels: Option<&Value>,
    arc: Option<&ArcRecord>,
    selection: Option<&SelectRecord>,
    evaluations: &[Evaluation],
    comparison: &[ArmComparison],
) -> String {
    let PoolInfo { count, shape, class_names, sampler, .. } = &pool.info;
    let classes = class_names.len();
    let percent = |x: f64| format!("{:.1} %", 100.0 * x);
    let mut text = format!("# Report\n\n{count} images, {shape}, {classes} classes, sampler {sampler}\n");
    if let Some(agreement) = labels.and_then(|l| l["agreement"].as_f64()).map(percent) {
        text += &format!("\nA classifier trained on real images gives {agreement} of them their label.\n");
    }
    text += "\n![lowest-scored (left) and highest-scored (right) samples of each class](contact.png)\n";
    if let Some(arc) = arc {
        let ArcRecord { estimate, epsilons, attack, .. } = arc;
        let Estimate { arc, signed, interval: [low, high], curve, largest_rise_se, .. } = estimate;
        let truncated =
            if estimate.truncated { "; truncated: the grid ends before the curve reaches ½" } else { "" };
        text += &format!(
            "\n## ARC\n\nARC = **{arc:.5}** (signed {signed:.5}, 95 % interval {low:.5} to {high:.5}; low is a good \
             proxy){truncated}\n\n{attack}.\n\n\
             | ε | accuracy under attack | ± SE | on real | on synthetic |\n|---|---|---|---|---|\n"
        );
        for (p, epsilon) in curve.iter().zip(epsilons) {
            let columns = [p.accuracy, p.se, p.accuracy_real, p.accuracy_synthetic].map(percent).join(" | ");
            text += &format!("| {epsilon} | {columns} |\n");
        }
        text += &format!(
            "\nLargest rise of the curve: {largest_rise_se:.1} SE (over 2 would say that a network is too weak).\n"
        );
    }
    if let Some(s) = selection {
        let (arm, balance, kept) = (s.arm, s.balance(), s.kept_by_class());
        text += &format!("\n## Curation, arm {arm}\n\n{balance}\n\nKept by class: {kept:?}\n");
        if s.looked_for_leaks == Some(false) {
            text += "\nThe real data have no test split: no leak of test images was looked for.\n";
        }
        if let Some(c) = &s.coverage {
            text += &format!(
                "\nPrecision and recall of {} images against {} real ones: {:.3} and {:.3} of the pool, {:.3} and {:.3} of the kept.\n",
                c.images[1], c.images[0], c.before[0], c.before[1], c.after[0], c.after[1]
            );
        }
        if let Some(Judged { kept, random, difference, interval: [low, high], .. }) = &s.judged {
            let verdict = if *high < 0.0 {
                "the kept are closer to real"
            } else if *low > 0.0 {
                "the kept are further from real"
            } else {
                "no difference found"
            };
            text += &format!(
                "\nJudges (other seeds, other images): kept {kept:.4}, random {random:.4}, difference {difference:+.4}, \
                 95 % interval {low:+.4} to {high:+.4}: {verdict}.\n"
            );
        }
    }
    if !evaluations.is_empty() {
        text +=
            "\n## Classifiers\n\n| trained on | seed | images | clean | robust |\n|---|---|---|---|---|\n";
        for e in evaluations {
            let Metrics { train, images, clean_correct, clean_accuracy, .. } = &e.metrics;
            let (arm, seed) =
                train.as_ref().map_or(("?".into(), "?".into()), |t| (t.arm.clone(), t.seed.to_string()));
            let robust = match (e.metrics.robust_correct, e.metrics.robust_accuracy) {
                (Some(n), Some(share)) => format!("{n} ({})", percent(share)),
                _ => String::new(),
            };
            let clean = percent(*clean_accuracy);
            text += &format!("| {arm} | {seed} | {images} | {clean_correct} ({clean}) | {robust} |\n");
        }
    }
    for c in comparison {
        let line = |what: &str, c: &Comparison| {
            let [difference, low, high, resolvable] =
                [c.difference, c.interval[0], c.interval[1], c.resolvable].map(|x| 100.0 * x);
            let resolved = if c.resolved { "resolved" } else { "not resolved" };
            format!(
                "- {what}: {difference:+.1} points, 95 % interval {low:+.1} to {high:+.1}: {resolved} (this design would find \
                 {resolvable:.1} points four times in five)\n"
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
