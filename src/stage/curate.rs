//! Curate: a selection from a pool by its score table. Seconds, no GPU; the pool stays as it is.

use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow_array::{BooleanArray, Float32Array, Int32Array, Int64Array, StringArray, UInt64Array};
use arrow_schema::DataType;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Counts, Job, Outcome, Score, Stage, expect, finished_input, label, note, score, shards};
use crate::{
    Error, Result,
    curate::{Arm, Candidate, Gates, Quota, Reason, Selector},
    data::table,
    fs,
    rng::{Stream, stream},
};

/// Selects from a pool: gates that remove, an arm that ranks, a quota per class.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Curate {
    /// The folder of a finished score.
    #[arg(long)]
    pub scores: Option<PathBuf>,
    /// What ranks.
    #[arg(long, value_enum, default_value_t = Arm::Arc)]
    pub arm: Arm,
    /// How many of each class are kept; 0 to use keep_fraction.
    #[arg(long, default_value_t = 0)]
    pub keep_per_class: usize,
    /// The share kept of those of each class that pass the gates, when keep_per_class is 0. The paper keeps 2/3.
    #[arg(long, default_value_t = 0.67)]
    pub keep_fraction: f64,
    /// A class with fewer than keep_per_class images behind the gates is an error (exit 1) unless this is set.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub allow_short: bool,
    /// Refuse images that are this near to being a copy of a real image, mirrored or not, up to a shift by a pixel: the
    /// root mean square of the differences of pixels in [0, 1].
    #[arg(long, default_value_t = 0.02)]
    pub copy_tolerance: f64,
    /// Refuse images whose distance to the nearest training image is a smaller part of the mean distance to the nearest
    /// ones. Carlini et al. 2023 take 0.5; 0 refuses none.
    #[arg(long, default_value_t = 0.0)]
    pub min_memorization_ratio: f64,
    /// Refuse images whose label the classifier does not share.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub require_agreement: bool,
    /// Refuse images with less confidence in their label.
    #[arg(long, default_value_t = 0.0)]
    pub min_confidence: f64,
    /// Refuse images with a higher synthetic_score.
    #[arg(long, default_value_t = 1.0)]
    pub max_score: f64,
    /// Seed of the random arm.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// `select.json`: the rule and what it did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SelectRecord {
    /// `proxyset.select/1`.
    pub schema: String,
    /// What ranked.
    pub arm: Arm,
    /// All settings.
    pub rule: Value,
    /// Rows of the score table.
    pub total: u64,
    /// Rows kept.
    pub kept: u64,
    /// Rows rejected, by reason. `total = kept + Σ rejected`.
    pub rejected: Counts,
    /// Rows kept, by class.
    pub kept_by_class: Vec<u64>,
    /// Quantiles of `synthetic_score` over the pool.
    pub score_before: Value,
    /// Quantiles of `synthetic_score` over the kept.
    pub score_after: Value,
    /// Whether judges find the kept closer to real than an equally large random part.
    pub judged: Option<Judged>,
}

/// The kept against an equally large random part behind the same gates, class by class, judged by
/// discriminators that share no training image and no seed with those that ranked. Lower is closer to real.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Judged {
    /// Mean judge score of the kept.
    pub kept: f64,
    /// Mean judge score of the random part.
    pub random: f64,
    /// Kept minus random.
    pub difference: f64,
    /// 95 % bootstrap interval of the difference, over images.
    pub interval: [f64; 2],
    /// Judged images: kept, random. Those of the judges' own fold are left out.
    pub images: [usize; 2],
}

/// One row of the score table.
struct Row {
    uid: String,
    label: u32,
    score: f32,
    judge: Option<f32>,
    confidence: f32,
    agrees: bool,
    hash: u64,
    train_copy: f32,
    test_copy: Option<f32>,
    memorization_ratio: f32,
}

impl Row {
    fn candidate(&self, duplicate: bool) -> Candidate<'_> {
        Candidate {
            uid: &self.uid,
            label: self.label,
            synthetic_score: self.score,
            confidence: self.confidence,
            agrees: self.agrees,
            train_copy: self.train_copy,
            test_copy: self.test_copy,
            memorization_ratio: self.memorization_ratio,
            duplicate,
        }
    }
}

/// The score tables of a pool, read shard by shard as often as need be.
struct ScoreTables {
    dir: PathBuf,
    shards: usize,
    classes: usize,
}

impl ScoreTables {
    fn open(folder: &Path) -> Result<Self> {
        let count = |key: &str| -> Result<usize> {
            let found = super::read_done(folder)?.and_then(|d| d.summary[key].as_u64());
            let missing =
                || Error::Data(format!("{}: done.json does not say the number of {key}", folder.display()));
            found.map(|n| n as usize).ok_or_else(missing)
        };
        Ok(Self { dir: folder.join("scores"), shards: count("shards")?, classes: count("classes")? })
    }

    fn read(&self, shard: usize) -> Result<Vec<Row>> {
        use {label::columns as l, score::columns as s};
        let columns = [
            l::UID,
            l::LABEL,
            s::SCORE,
            s::JUDGE,
            l::CONFIDENCE,
            s::AGREES,
            s::HASH,
            s::TRAIN_COPY,
            s::TEST_COPY,
            s::RATIO,
        ];
        let table = shards::read_table(&self.dir, shard, &columns)?;
        let text = |name| table.column(name, |a: &StringArray, i| a.value(i).to_owned());
        let truth = |name| table.column(name, |a: &BooleanArray, i| a.value(i));
        let number = |name| table.column(name, |a: &Float32Array, i| a.value(i));
        let labels = table.column(l::LABEL, |a: &Int64Array, i| a.value(i))?;
        let judges = table.optional(s::JUDGE, |a: &Float32Array, i| a.value(i))?;
        let uids = text(l::UID)?;
        let hashes = table.column(s::HASH, |a: &UInt64Array, i| a.value(i))?;
        let (scores, confidences) = (number(s::SCORE)?, number(l::CONFIDENCE)?);
        let agrees = truth(s::AGREES)?;
        let (train_copies, ratios) = (number(s::TRAIN_COPY)?, number(s::RATIO)?);
        let test_copies = table.optional(s::TEST_COPY, |a: &Float32Array, i| a.value(i))?;
        let mut rows = Vec::with_capacity(uids.len());
        for (i, (uid, hash)) in uids.into_iter().zip(hashes).enumerate() {
            let label = u32::try_from(labels[i]).ok().filter(|&l| (l as usize) < self.classes);
            let label = label.ok_or_else(|| {
                Error::Data(format!(
                    "score table of shard {shard}, {uid}: label is {}, expected a class",
                    labels[i]
                ))
            })?;
            rows.push(Row {
                uid,
                label,
                score: scores[i],
                judge: judges[i],
                confidence: confidences[i],
                agrees: agrees[i],
                hash,
                train_copy: train_copies[i],
                test_copy: test_copies[i],
                memorization_ratio: ratios[i],
            });
        }
        Ok(rows)
    }

    /// Streams all rows; `visit` is told shard, row, and whether the pixels came before.
    fn for_each(&self, mut visit: impl FnMut(usize, usize, &Row, bool) -> Result<()>) -> Result<()> {
        // The pixels' hashes are what a duplicate is told by: 8 bytes a pool image.
        let mut seen = HashSet::new();
        for shard in 0..self.shards {
            for (index, row) in self.read(shard)?.iter().enumerate() {
                visit(shard, index, row, !seen.insert(row.hash))?;
            }
        }
        Ok(())
    }
}

impl Stage for Curate {
    const NAME: &'static str = "curate";
    const INPUTS: &'static [&'static str] = &["scores"];

    fn validate(&self) -> Result<()> {
        if self.keep_per_class == 0 {
            expect("keep_fraction", self.keep_fraction, 1e-9, 1.0)?;
        }
        expect("copy_tolerance", self.copy_tolerance, 0.0, 1.0)?;
        expect("min_memorization_ratio", self.min_memorization_ratio, 0.0, 1.0)?;
        expect("min_confidence", self.min_confidence, 0.0, 1.0)?;
        expect("max_score", self.max_score, 0.0, 1.0)
    }

    fn amount(&self) -> String {
        match self.quota() {
            _ if self.arm == Arm::All => "all that pass the gates".into(),
            Quota::PerClass(k) => format!("{k} of each class, arm {}", self.arm),
            Quota::Fraction(f) => format!("{:.0} % of each class, arm {}", 100.0 * f, self.arm),
        }
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let folder = finished_input::<Score>("scores", self.scores.as_deref())?;
        let tables = ScoreTables::open(&folder)?;
        let gates = Gates {
            copy_tolerance: self.copy_tolerance,
            min_memorization_ratio: self.min_memorization_ratio,
            agreement: self.require_agreement,
            min_confidence: self.min_confidence,
            max_score: self.max_score,
        };

        // Pass 1: how many of each class pass the gates. Pass 2: the selector. Pass 3: the tables.
        let mut passing = vec![0u64; tables.classes];
        tables.for_each(|_, _, row, duplicate| {
            passing[row.label as usize] += u64::from(gates.refuse(&row.candidate(duplicate)).is_none());
            Ok(())
        })?;
        if passing.iter().all(|&n| n == 0) {
            bail!(Gate, "none of the pool's images passes the gates: {gates:?}");
        }
        if self.keep_per_class > 0 && self.arm != Arm::All && !self.allow_short {
            let short: Vec<String> = passing
                .iter()
                .enumerate()
                .filter(|&(_, &n)| n < self.keep_per_class as u64)
                .map(|(class, n)| format!("class {class} has {n}"))
                .collect();
            if !short.is_empty() {
                bail!(
                    Gate,
                    "keep_per_class is {}, but behind the gates {}; generate more, keep fewer, or set allow_short",
                    self.keep_per_class,
                    short.join(", ")
                );
            }
        }
        let mut selector = Selector::new(self.arm, self.seed, self.quota(), &passing);
        // The random part that the kept are judged against: as many of each class, behind the same gates.
        let mut control = Selector::with_limits(Arm::Random, !self.seed, selector.limits().to_vec());
        tables.for_each(|_, _, row, duplicate| {
            let candidate = row.candidate(duplicate);
            if gates.refuse(&candidate).is_none() {
                selector.offer(&candidate);
                control.offer(&candidate);
            }
            Ok(())
        })?;

        let (out, _lock) = job.open("run")?;
        let mut kept = KeptRows::default();
        let mut rejected_rows: (Vec<String>, Vec<&str>) = Default::default();
        let mut rejected = Counts::new();
        let mut kept_by_class = vec![0u64; passing.len()];
        let (mut before, mut after, mut total) = (Vec::new(), Vec::new(), 0u64);
        let mut judged: [Vec<f32>; 2] = Default::default();
        tables.for_each(|shard, index, row, duplicate| {
            let candidate = row.candidate(duplicate);
            total += 1;
            before.push(row.score);
            let mut refused = gates.refuse(&candidate);
            if refused.is_none() {
                if control.keeps(&candidate) {
                    judged[1].extend(row.judge);
                }
                if !selector.keeps(&candidate) {
                    refused = Some(Reason::OverQuota);
                }
            }
            match refused {
                Some(reason) => {
                    *rejected.entry(reason.name().into()).or_default() += 1;
                    rejected_rows.0.push(row.uid.clone());
                    rejected_rows.1.push(reason.name());
                }
                None => {
                    kept_by_class[row.label as usize] += 1;
                    after.push(row.score);
                    judged[0].extend(row.judge);
                    kept.push(shard, index, row);
                }
            }
            Ok(())
        })?;
        let kept_total = kept.uid.len() as u64;
        if total != kept_total + rejected.values().sum::<u64>() {
            bail!(Alarm, "{total} rows in, but {kept_total} kept and {rejected:?} rejected");
        }
        kept.write(&out.join("selection.parquet"))?;
        write_rejected(&out.join("rejected.parquet"), rejected_rows)?;
        let record = SelectRecord {
            schema: "proxyset.select/1".into(),
            arm: self.arm,
            rule: super::AnyStage::identity(self),
            total,
            kept: kept_total,
            rejected,
            kept_by_class,
            score_before: sorted_quantiles(before),
            score_after: sorted_quantiles(after),
            judged: (self.arm != Arm::All).then(|| judge(&judged, self.seed)).flatten(),
        };
        fs::publish_json(&out.join("select.json"), &record)?;
        let reasons: Vec<String> = record.rejected.iter().map(|(r, n)| format!("{n} {r}")).collect();
        note(self, &format!("{total} in = {kept_total} kept + {}", reasons.join(" + ")));
        Ok(Outcome::Done(json!(record)))
    }
}

impl Curate {
    fn quota(&self) -> Quota {
        if self.keep_per_class > 0 {
            Quota::PerClass(self.keep_per_class)
        } else {
            Quota::Fraction(self.keep_fraction)
        }
    }
}

fn sorted_quantiles(mut scores: Vec<f32>) -> Value {
    scores.sort_by(f32::total_cmp);
    score::quantiles(&scores)
}

/// Compares mean judge scores; none if the judges saw no image of a part.
fn judge([kept, random]: &[Vec<f32>; 2], seed: u64) -> Option<Judged> {
    const DRAWS: u64 = 1000;
    if kept.is_empty() || random.is_empty() {
        return None;
    }
    let mean = |v: &[f32]| v.iter().map(|&x| f64::from(x)).sum::<f64>() / v.len() as f64;
    let mut differences: Vec<f64> = (0..DRAWS)
        .map(|draw| {
            let mut stream = Stream::new(seed, draw, stream::BOOTSTRAP);
            let mut resampled = |v: &[f32]| {
                (0..v.len()).map(|_| f64::from(v[stream.below(v.len())])).sum::<f64>() / v.len() as f64
            };
            resampled(kept) - resampled(random)
        })
        .collect();
    differences.sort_by(f64::total_cmp);
    Some(Judged {
        kept: mean(kept),
        random: mean(random),
        difference: mean(kept) - mean(random),
        interval: [differences[25], differences[974]],
        images: [kept.len(), random.len()],
    })
}

/// The columns of `selection.parquet`.
#[derive(Default)]
struct KeptRows {
    uid: Vec<String>,
    label: Vec<i64>,
    score: Vec<f32>,
    confidence: Vec<f32>,
    shard: Vec<i32>,
    row: Vec<i32>,
}

impl KeptRows {
    fn push(&mut self, shard: usize, index: usize, row: &Row) {
        self.uid.push(row.uid.clone());
        self.label.push(i64::from(row.label));
        self.score.push(row.score);
        self.confidence.push(row.confidence);
        self.shard.push(shard as i32);
        self.row.push(index as i32);
    }

    fn write(self, path: &Path) -> Result<()> {
        let schema = shards::schema(&[
            ("uid", DataType::Utf8, false),
            ("label", DataType::Int64, false),
            ("synthetic_score", DataType::Float32, false),
            ("label_confidence", DataType::Float32, false),
            ("shard", DataType::Int32, false),
            ("row", DataType::Int32, false),
        ]);
        let batch = shards::batch(
            &schema,
            vec![
                Arc::new(StringArray::from(self.uid)),
                Arc::new(Int64Array::from(self.label)),
                Arc::new(Float32Array::from(self.score)),
                Arc::new(Float32Array::from(self.confidence)),
                Arc::new(Int32Array::from(self.shard)),
                Arc::new(Int32Array::from(self.row)),
            ],
        )?;
        table::write(path, &schema, [Ok(batch)], table::ROW_GROUP_ROWS, &[]).map(drop)
    }
}

fn write_rejected(path: &Path, (uids, reasons): (Vec<String>, Vec<&str>)) -> Result<()> {
    let schema = shards::schema(&[("uid", DataType::Utf8, false), ("reason", DataType::Utf8, false)]);
    let columns: Vec<arrow_array::ArrayRef> =
        vec![Arc::new(StringArray::from(uids)), Arc::new(StringArray::from(reasons))];
    table::write(path, &schema, [Ok(shards::batch(&schema, columns)?)], table::ROW_GROUP_ROWS, &[]).map(drop)
}

/// One kept row, as materialize reads it.
pub(super) struct Selected {
    pub(super) uid: String,
    pub(super) label: u32,
    pub(super) score: f32,
    pub(super) confidence: f32,
    pub(super) shard: usize,
    pub(super) row: usize,
}

/// Reads `selection.parquet` of a finished curate, with its record.
pub(super) fn read_selection(key: &str, dir: Option<&Path>) -> Result<(Vec<Selected>, SelectRecord)> {
    let dir = finished_input::<Curate>(key, dir)?;
    let record: SelectRecord = fs::read_json(&dir.join("select.json"))?;
    let path = dir.join("selection.parquet");
    let columns = ["uid", "label", "synthetic_score", "label_confidence", "shard", "row"];
    let table = shards::read_whole(&path, &columns)?;
    let uid = table.column("uid", |a: &StringArray, i| a.value(i).to_owned())?;
    let label = table.column("label", |a: &Int64Array, i| a.value(i) as u32)?;
    let score = table.column("synthetic_score", |a: &Float32Array, i| a.value(i))?;
    let confidence = table.column("label_confidence", |a: &Float32Array, i| a.value(i))?;
    let shard = table.column("shard", |a: &Int32Array, i| a.value(i) as usize)?;
    let row = table.column("row", |a: &Int32Array, i| a.value(i) as usize)?;
    let selected = uid.into_iter().enumerate().map(|(i, uid)| Selected {
        uid,
        label: label[i],
        score: score[i],
        confidence: confidence[i],
        shard: shard[i],
        row: row[i],
    });
    Ok((selected.collect(), record))
}

/// Where pool images are: shard and row.
pub(super) type Places = Vec<(usize, usize)>;

/// Where the lowest- and the highest-scored images of each class are, for the contact sheet.
pub(super) fn extremes(scores: &Path, per_class: usize) -> Result<BTreeMap<u32, [Places; 2]>> {
    let folder = finished_input::<Score>("scores", Some(scores))?;
    let tables = ScoreTables::open(&folder)?;
    let mut by_class: BTreeMap<u32, Vec<(f32, u128, usize, usize)>> = BTreeMap::new();
    tables.for_each(|shard, index, row, _| {
        let order = crate::proxy::fold::uid_order(&row.uid);
        by_class.entry(row.label).or_default().push((row.score, order, shard, index));
        Ok(())
    })?;
    Ok(by_class
        .into_iter()
        .map(|(class, mut rows)| {
            rows.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            let place = |r: &(f32, u128, usize, usize)| (r.2, r.3);
            let lowest = rows.iter().take(per_class).map(place).collect();
            let highest = rows.iter().rev().take(per_class).map(place).collect();
            (class, [lowest, highest])
        })
        .collect())
}
