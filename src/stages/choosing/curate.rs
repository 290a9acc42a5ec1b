//! Curate: a selection from a pool by its score table. It takes seconds and needs no GPU; the pool stays as it is.

use std::{collections::BTreeMap, fmt, path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    Result,
    curate::{Arm, Condition, Gate, Group, NearDuplicates, Operator, PASSED, keep_first, repeated},
    error::expect_within as expect,
    fs::Record,
    settings,
    stage::{AnyStage, Input, Job, Outcome, Stage, note},
    stats::{Moments, mean_difference_interval},
    tables::{
        features,
        labels::CONFIDENCE,
        scores::{
            AGREES, FEATURE_HASH, MEMORIZATION_RATIO, PERCEPTUAL_HASH, PIXEL_HASH, SCORE, SCORES, ScoreRows,
            ScoreTables, TEST_COPY_DISTANCE, TRAIN_COPY_DISTANCE, quantiles,
        },
        selection::{self, ClassCounts, Counts, Judged, SelectRecord},
    },
};

/// Selects images from a pool: gates refuse images, an arm ranks the rest, and quotas say how many are kept.
///
/// An image is refused by the first gate that it does not pass, in this order: scores that are not numbers, copies
/// of test images, copies of training images, memorisation, label, confidence, score, filters, duplicates. Of those
/// that pass, the first in the arm's order are kept.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
pub struct Curate {
    /// The folder of a finished score stage.
    #[arg(long)]
    pub scores: Option<PathBuf>,
    /// How the images that pass the gates are ranked.
    #[arg(long, value_parser = settings::named::<Arm>(), default_value_t = Arm::Score)]
    pub arm: Arm,
    /// How many images of each class to keep; 0 to use keep_total or keep_fraction.
    #[arg(long, default_value_t = 0)]
    pub keep_per_class: usize,
    /// How many images to keep in all, whatever their class; 0 to use keep_per_class or keep_fraction.
    #[arg(long, default_value_t = 0)]
    pub keep_total: usize,
    /// The share to keep of the images that pass the gates, if no number is given. The paper keeps 2/3; with 1, the
    /// gates alone decide.
    #[arg(long, default_value_t = 0.67)]
    pub keep_fraction: f64,
    /// Whether keep_fraction applies to each class or to all images together.
    #[arg(long, value_enum, default_value_t = Within::Class)]
    pub within: Within,
    /// How many images of one class to keep, given by its name or number, whatever the other settings say: cat=500.
    #[arg(long, value_delimiter = ',')]
    pub quota: Vec<Quota>,
    /// Accept a selection with fewer images than asked for. Otherwise it is an error (exit 1) if too few pass the
    /// gates.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub allow_short: bool,
    /// Keep only images that meet this condition on a column of the score table: 'label_confidence >= 0.9'. A null
    /// meets no condition.
    #[arg(long)]
    pub filter: Vec<Condition>,
    /// Refuse images within this distance of a real image, mirrored or not, up to a shift by a pixel: the root mean
    /// square difference of pixels in [0, 1].
    #[arg(long, default_value_t = 0.02)]
    pub copy_tolerance: f64,
    /// Refuse images whose distance to the nearest training image, divided by the mean distance to the nearest
    /// ones, is smaller than this. Carlini et al. 2023 use 0.5; 0 refuses none.
    #[arg(long, default_value_t = 0.0)]
    pub min_memorization_ratio: f64,
    /// Refuse images whose 64-bit hash differs in at most this many bits from that of an earlier image that passed.
    /// Images with equal pixels are always refused.
    #[arg(long)]
    pub near_duplicate_bits: Option<u32>,
    /// Which hashes near_duplicate_bits compares.
    #[arg(long, value_enum, default_value_t = Likeness::Looks)]
    pub near_duplicate_by: Likeness,
    /// Refuse images if the classifier does not agree with their label.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub require_agreement: bool,
    /// Refuse images whose label has less confidence than this.
    #[arg(long, default_value_t = 0.0)]
    pub min_confidence: f64,
    /// Refuse images whose synthetic_score is higher than this.
    #[arg(long, default_value_t = 1.0)]
    pub max_score: f64,
    /// Seed of the random arm and of rejection sampling.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// What near-duplicates have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Likeness {
    /// Their looks: the column perceptual_hash.
    Looks,
    /// Their features: the column feature_hash, which score writes if hash_features is set.
    Features,
}

/// What a fraction refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Within {
    /// Each class by itself.
    Class,
    /// All images together.
    All,
}

/// How many images of one class are kept: `cat=500`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "crate::text::Written", into = "String")]
pub struct Quota {
    /// The class's name or number.
    pub class: String,
    /// How many.
    pub count: usize,
}

impl FromStr for Quota {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.rsplit_once('=').and_then(|(class, count)| {
            Some(Self { class: class.trim().into(), count: count.trim().parse().ok()? })
        });
        parsed.ok_or_else(|| format!("quota '{text}' is not CLASS=COUNT"))
    }
}

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.class, self.count)
    }
}

serde_as_text!(Quota);

impl Stage for Curate {
    const NAME: &'static str = "curate";
    const ABOUT: &'static str = "Select images from a pool by their scores";
    const INPUTS: &'static [Input] = &[SCORES];
    const REVISION: u32 = 1;

    fn unused(&self) -> Vec<&'static str> {
        let mut unused = match self.arm {
            Arm::All => {
                vec!["keep_per_class", "keep_total", "keep_fraction", "within", "quota", "allow_short"]
            }
            _ if self.keep_per_class > 0 || self.keep_total > 0 => vec!["keep_fraction", "within"],
            _ => Vec::new(),
        };
        if self.near_duplicate_bits.is_none() {
            unused.push("near_duplicate_by");
        }
        unused
    }

    fn validate(&self) -> Result<()> {
        let Self { keep_per_class, keep_total, .. } = *self;
        if keep_per_class > 0 && keep_total > 0 {
            bail!(
                Usage,
                "keep_per_class is {keep_per_class} and keep_total is {keep_total}, expected one of them"
            );
        }
        if let (true, Some(quota)) = (self.counts_over_all(), self.quota.first()) {
            bail!(Usage, "quota is {quota}, but what is kept is counted over all classes");
        }
        if self.filter.len() > 200 {
            bail!(Usage, "there are {} filters, expected at most 200", self.filter.len());
        }
        if let Some(bits) = self.near_duplicate_bits {
            expect("near_duplicate_bits", bits, 0, NearDuplicates::MAX_RADIUS)?;
        } else if self.near_duplicate_by == Likeness::Features {
            bail!(
                Usage,
                "near_duplicate_by is features, but near_duplicate_bits is not set; expected 0 to 3"
            );
        }
        if keep_per_class == 0 && keep_total == 0 {
            expect("keep_fraction", self.keep_fraction, 1e-9, 1.0)?;
        }
        expect("copy_tolerance", self.copy_tolerance, 0.0, 1.0)?;
        expect("min_memorization_ratio", self.min_memorization_ratio, 0.0, 1.0)?;
        expect("min_confidence", self.min_confidence, 0.0, 1.0)?;
        expect("max_score", self.max_score, 0.0, 1.0)
    }

    fn amount(&self) -> String {
        let of = match self.within {
            Within::Class => "each class",
            Within::All => "all",
        };
        match self.arm {
            Arm::All => "all that pass the gates".into(),
            arm if self.keep_per_class > 0 => format!("{} of each class, arm {arm}", self.keep_per_class),
            arm if self.keep_total > 0 => format!("{} in all, arm {arm}", self.keep_total),
            arm => format!("{:.0} % of {of}, arm {arm}", 100.0 * self.keep_fraction),
        }
    }

    fn run(&self, job: &Job) -> Result<Outcome> {
        let tables = ScoreTables::open(self.scores.as_deref())?;
        let schema = tables.schema()?;
        self.filter.iter().try_for_each(|filter| filter.expect_in(&schema))?;
        let likeness = match self.near_duplicate_by {
            Likeness::Looks => PERCEPTUAL_HASH,
            Likeness::Features => FEATURE_HASH,
        };
        if schema.column_with_name(likeness).is_none() {
            bail!(
                Usage,
                "near_duplicate_by is features, but there is no column '{likeness}'; expected scores made with hash_features"
            );
        }
        let gates = self.gates();
        let mut reasons: Vec<String> = gates.iter().map(|gate| gate.reason.clone()).collect();
        let mut verdict_for = |reason: &str| {
            reasons.push(reason.into());
            PASSED + reasons.len() as u8
        };
        let [duplicate, near_duplicate, over_quota] =
            ["duplicate", "near-duplicate", "over-quota"].map(&mut verdict_for);

        let mut rows = tables.load(&gates, self.arm, self.seed)?;
        refuse_repeated(&mut rows, tables.hashes(PIXEL_HASH)?, duplicate, repeated);
        if let Some(bits) = self.near_duplicate_bits {
            let mut near = NearDuplicates::new(bits);
            let hashes = tables.hashes(likeness)?;
            refuse_repeated(&mut rows, hashes, near_duplicate, |hashes| {
                hashes.iter().map(|&hash| near.repeats(hash)).collect()
            });
        }

        let candidates = rows.passed();
        if candidates.is_empty() {
            let (images, reasons) = (tables.len(), reasons.join(", "));
            bail!(Gate, "none of the pool's {images} images passes the gates: {reasons}");
        }
        let groups = self.groups(&candidates, &rows, &tables.classes)?;
        let kept = keep_first(groups, &rows.ranks, |tied| tables.uid_orders(tied))?;
        let control = self.random_part(&candidates, &kept, &rows, &tables)?;
        for &row in &candidates {
            if !kept[row as usize] {
                rows.verdicts[row as usize] = over_quota;
            }
        }

        let out = job.open()?;
        selection::write(out, &tables, &rows.verdicts, &reasons)?;
        let record = self.record(&tables, &rows, &reasons, &control)?;
        record.write(out)?;
        note(self, &record.balance());
        if record.looked_for_leaks == Some(false) {
            note(self, "the real data have no test split: no leak was looked for");
        }
        Ok(Outcome::Done(json!(record)))
    }
}

impl Curate {
    /// Whether the number to keep is counted over all classes.
    fn counts_over_all(&self) -> bool {
        self.keep_total > 0 || self.keep_per_class == 0 && self.within == Within::All
    }

    /// The gates, in the order in which they are tried.
    fn gates(&self) -> Vec<Gate> {
        let gate = |reason: &str, condition| Gate { reason: reason.into(), condition, null_passes: false };
        let number =
            |reason, column: &str, comparison, value| gate(reason, Condition::new(column, comparison, value));
        let (copy, least) = (self.copy_tolerance, self.min_memorization_ratio);
        let mut gates = vec![
            number("not-finite", SCORE, Operator::Less, f64::INFINITY),
            number("not-finite", CONFIDENCE, Operator::Less, f64::INFINITY),
            Gate { null_passes: true, ..number("test-copy", TEST_COPY_DISTANCE, Operator::More, copy) },
            number("train-copy", TRAIN_COPY_DISTANCE, Operator::More, copy),
            number("memorized", MEMORIZATION_RATIO, Operator::AtLeast, least),
        ];
        if self.require_agreement {
            gates.push(gate("label-disagrees", Condition::is(AGREES, true)));
        }
        gates.push(number("low-confidence", CONFIDENCE, Operator::AtLeast, self.min_confidence));
        gates.push(number("high-score", SCORE, Operator::AtMost, self.max_score));
        gates.extend(self.filter.iter().map(|filter| gate(&format!("not {filter}"), filter.clone())));
        gates
    }

    /// Which candidates compete for how many places. Fails if there are fewer candidates than images to keep.
    fn groups(&self, candidates: &[u32], rows: &ScoreRows, classes: &[String]) -> Result<Vec<Group>> {
        let share = |n: usize| (n as f64 * self.keep_fraction - 1e-9).ceil() as usize;
        if self.arm == Arm::All {
            return Ok(vec![Group { rows: candidates.to_vec(), limit: candidates.len() }]);
        }
        const REMEDY: &str = "generate more, keep fewer, or set allow_short";
        if self.counts_over_all() {
            let passed = candidates.len();
            let limit = if self.keep_total > 0 { self.keep_total } else { share(passed) };
            if passed < limit && !self.allow_short {
                bail!(Gate, "{passed} images pass the gates, expected keep_total = {limit}; {REMEDY}");
            }
            return Ok(vec![Group { rows: candidates.to_vec(), limit }]);
        }
        let quotas = self.quotas(classes)?;
        let mut groups = by_class(candidates, rows, classes.len());
        let mut lacking = Vec::new();
        for (class, group) in groups.iter_mut().enumerate() {
            let count =
                quotas.get(&class).copied().or((self.keep_per_class > 0).then_some(self.keep_per_class));
            group.limit = count.unwrap_or_else(|| share(group.rows.len()));
            if group.rows.len() < group.limit {
                lacking.push(format!("{} of {}, expected {}", group.rows.len(), classes[class], group.limit));
            }
        }
        if !lacking.is_empty() && !self.allow_short {
            bail!(Gate, "too few images of a class pass the gates: {}; {REMEDY}", lacking.join("; "));
        }
        Ok(groups)
    }

    /// The quotas of single classes, by class.
    fn quotas(&self, classes: &[String]) -> Result<BTreeMap<usize, usize>> {
        let mut quotas = BTreeMap::new();
        for quota in &self.quota {
            let by_name = classes.iter().position(|name| *name == quota.class);
            let by_number = || quota.class.parse().ok().filter(|&class: &usize| class < classes.len());
            let Some(class) = by_name.or_else(by_number) else {
                let (unknown, expected) = (&quota.class, classes.join(", "));
                bail!(Usage, "quota {quota}: no class '{unknown}', expected one of {expected}");
            };
            if quotas.insert(class, quota.count).is_some() {
                bail!(Usage, "quota {quota}: class '{}' has another quota already", classes[class]);
            }
        }
        Ok(quotas)
    }

    /// A random selection to compare the kept images with: equally many of each class, behind the same gates.
    fn random_part(
        &self,
        candidates: &[u32],
        kept: &[bool],
        rows: &ScoreRows,
        tables: &ScoreTables,
    ) -> Result<Vec<bool>> {
        let mut groups = by_class(candidates, rows, tables.classes.len());
        let mut ranks = vec![0; kept.len()];
        for &row in candidates {
            groups[usize::from(rows.labels[row as usize])].limit += usize::from(kept[row as usize]);
            ranks[row as usize] = Arm::Random.rank(!self.seed, u64::from(row), 0.0, 0.0);
        }
        keep_first(groups, &ranks, |tied| tables.uid_orders(tied))
    }

    fn record(
        &self,
        tables: &ScoreTables,
        rows: &ScoreRows,
        reasons: &[String],
        control: &[bool],
    ) -> Result<SelectRecord> {
        let mut counts = vec![vec![0u64; reasons.len() + 1]; tables.classes.len()];
        let [mut kept, mut random] = [Moments::default(); 2];
        let mut after = Vec::new();
        for row in 0..tables.len() {
            let verdict = rows.verdicts[row];
            counts[usize::from(rows.labels[row])][usize::from(verdict)] += 1;
            let judge = f64::from(rows.judges[row]);
            if verdict == PASSED {
                after.push(rows.scores[row]);
            }
            if !judge.is_nan() {
                if verdict == PASSED {
                    kept.add(judge);
                }
                if control[row] {
                    random.add(judge);
                }
            }
        }
        let of_class = |(class, counts): (&String, &Vec<u64>)| ClassCounts {
            class: class.clone(),
            total: counts.iter().sum(),
            kept: counts[0],
            rejected: by_reason(reasons.iter().zip(&counts[1..])),
        };
        let classes: Vec<ClassCounts> = tables.classes.iter().zip(&counts).map(of_class).collect();
        let record = SelectRecord {
            schema: "proxyset.select/1".into(),
            arm: self.arm,
            rule: AnyStage::identity(self),
            split: tables.split.clone(),
            looked_for_leaks: tables.looked_for_leaks,
            total: tables.len() as u64,
            kept: after.len() as u64,
            rejected: by_reason(classes.iter().flat_map(|class| &class.rejected)),
            classes,
            score_before: quantiles_of(&rows.scores),
            score_after: quantiles_of(&after),
            coverage: features::measure(&tables.folder, tables, |row| rows.verdicts[row] == PASSED)?,
            judged: (self.arm != Arm::All && kept.count > 1 && random.count > 1).then(|| Judged {
                kept: kept.mean,
                random: random.mean,
                difference: kept.mean - random.mean,
                interval: mean_difference_interval(&kept, &random),
                images: [kept.count, random.count],
            }),
        };
        if record.total != record.kept + record.rejected.values().sum::<u64>() {
            bail!(Alarm, "counts do not add up: {}", record.balance());
        }
        Ok(record)
    }
}

/// The sum for each reason that there is; two gates may have the same one.
fn by_reason<'a>(counts: impl Iterator<Item = (&'a String, &'a u64)>) -> Counts {
    let mut sums = Counts::new();
    for (reason, n) in counts.filter(|(_, n)| **n > 0) {
        *sums.entry(reason.clone()).or_default() += n;
    }
    sums
}

/// The candidates of each class; none of them is kept yet.
fn by_class(candidates: &[u32], rows: &ScoreRows, classes: usize) -> Vec<Group> {
    let mut groups = vec![Group { rows: Vec::new(), limit: 0 }; classes];
    for &row in candidates {
        groups[usize::from(rows.labels[row as usize])].rows.push(row);
    }
    groups
}

/// Refuses the rows that have passed so far and whose hash repeats that of an earlier one among them.
fn refuse_repeated(
    rows: &mut ScoreRows,
    mut hashes: Vec<u64>,
    verdict: u8,
    repeats: impl FnOnce(&[u64]) -> Vec<bool>,
) {
    let candidates = rows.passed();
    for (i, &row) in candidates.iter().enumerate() {
        hashes[i] = hashes[row as usize];
    }
    hashes.truncate(candidates.len());
    for (&row, repeats) in candidates.iter().zip(repeats(&hashes)) {
        if repeats {
            rows.verdicts[row as usize] = verdict;
        }
    }
}

fn quantiles_of(scores: &[f32]) -> Value {
    let Ok(found) = quantiles(scores.len() as u64, |give| {
        scores.iter().for_each(|&score| give(score));
        Ok::<(), std::convert::Infallible>(())
    });
    found
}
