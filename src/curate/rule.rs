//! Gates and orders. A gate says whether a sample may be kept at all, and why not; an arm says which of those
//! that may come first.

use serde::{Deserialize, Serialize};

/// What ranks the samples that pass the gates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Arm {
    /// Lowest `synthetic_score` first: closest to the real data (Sehwag et al. 2022, §2.3).
    Arc,
    /// Highest label confidence first (Wang et al. 2023).
    Confidence,
    /// A fresh random order for each seed.
    Random,
    /// All that pass the gates, whatever the quota.
    All,
}

impl std::fmt::Display for Arm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Arc => "arc",
            Self::Confidence => "confidence",
            Self::Random => "random",
            Self::All => "all",
        })
    }
}

/// One row of the score table, as the rules see it.
#[derive(Clone, Debug)]
pub struct Candidate<'a> {
    /// The sample's name.
    pub uid: &'a str,
    /// Its class.
    pub label: u32,
    /// Low is close to real; in [0, 1].
    pub synthetic_score: f32,
    /// The labelling classifier's probability of `label`.
    pub confidence: f32,
    /// The labelling classifier's first choice is `label`.
    pub agrees: bool,
    /// How far it is from being a copy of a training image: see [`Nearest::copy_distance`].
    ///
    /// [`Nearest::copy_distance`]: crate::proxy::neighbours::Nearest::copy_distance
    pub train_copy: f32,
    /// The same of a test image; none if there are none.
    pub test_copy: Option<f32>,
    /// See [`Nearest::ratio`](crate::proxy::neighbours::Nearest::ratio).
    pub memorization_ratio: f32,
    /// The pixels equal those of a sample that came earlier in the pool.
    pub duplicate: bool,
}

/// Why a sample is not kept. The first that applies, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// Score or confidence is not a number.
    NotFinite,
    /// A copy of a test image: a leak.
    TestCopy,
    /// A copy of a training image: memorised.
    TrainCopy,
    /// Much nearer to one training image than to others.
    Memorized,
    /// The same pixels came earlier in the pool.
    Duplicate,
    /// The labelling classifier sees another class.
    LabelDisagrees,
    /// The confidence in the label is under `min_confidence`.
    LowConfidence,
    /// The score is over `max_score`.
    HighScore,
    /// Passed every gate; others of its class came first.
    OverQuota,
}

impl Reason {
    /// The name in `rejected.parquet` and `select.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotFinite => "not-finite",
            Self::TestCopy => "test-copy",
            Self::TrainCopy => "train-copy",
            Self::Memorized => "memorized",
            Self::Duplicate => "duplicate",
            Self::LabelDisagrees => "label-disagrees",
            Self::LowConfidence => "low-confidence",
            Self::HighScore => "high-score",
            Self::OverQuota => "over-quota",
        }
    }
}

/// What a sample must meet to be kept at all: the same in every arm that is compared.
#[derive(Clone, Copy, Debug)]
pub struct Gates {
    /// Largest distance to a real image at which a sample is a copy of it.
    pub copy_tolerance: f64,
    /// Least `memorization_ratio`.
    pub min_memorization_ratio: f64,
    /// Refuse samples whose label the classifier does not share.
    pub agreement: bool,
    /// Least confidence in the label, [0, 1].
    pub min_confidence: f64,
    /// Largest `synthetic_score`, [0, 1].
    pub max_score: f64,
}

impl Gates {
    /// Why `row` may not be kept, if it may not. Copies of real images and duplicates are always refused.
    pub fn refuse(&self, row: &Candidate) -> Option<Reason> {
        let copy = |distance: f32| f64::from(distance) <= self.copy_tolerance;
        let checks = [
            (!row.synthetic_score.is_finite() || !row.confidence.is_finite(), Reason::NotFinite),
            (row.test_copy.is_some_and(copy), Reason::TestCopy),
            (copy(row.train_copy), Reason::TrainCopy),
            (f64::from(row.memorization_ratio) < self.min_memorization_ratio, Reason::Memorized),
            (row.duplicate, Reason::Duplicate),
            (self.agreement && !row.agrees, Reason::LabelDisagrees),
            (f64::from(row.confidence) < self.min_confidence, Reason::LowConfidence),
            (f64::from(row.synthetic_score) > self.max_score, Reason::HighScore),
        ];
        checks.into_iter().find_map(|(applies, reason)| applies.then_some(reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_gate_gives_its_reason_and_leaks_come_first() {
        let gates = Gates {
            copy_tolerance: 0.02,
            min_memorization_ratio: 0.3,
            agreement: true,
            min_confidence: 0.5,
            max_score: 0.9,
        };
        let good = Candidate {
            uid: "a",
            label: 1,
            synthetic_score: 0.4,
            confidence: 0.8,
            agrees: true,
            train_copy: 0.1,
            test_copy: None,
            memorization_ratio: 0.8,
            duplicate: false,
        };
        assert_eq!(gates.refuse(&good), None);
        let cases = [
            (Candidate { synthetic_score: f32::NAN, ..good.clone() }, Reason::NotFinite),
            (Candidate { test_copy: Some(0.0), duplicate: true, ..good.clone() }, Reason::TestCopy),
            (Candidate { train_copy: 0.015, agrees: false, ..good.clone() }, Reason::TrainCopy),
            (Candidate { memorization_ratio: 0.2, ..good.clone() }, Reason::Memorized),
            (Candidate { duplicate: true, ..good.clone() }, Reason::Duplicate),
            (Candidate { agrees: false, ..good.clone() }, Reason::LabelDisagrees),
            (Candidate { confidence: 0.4, ..good.clone() }, Reason::LowConfidence),
            (Candidate { synthetic_score: 0.95, ..good.clone() }, Reason::HighScore),
        ];
        for (row, reason) in cases {
            assert_eq!(gates.refuse(&row), Some(reason));
        }
    }
}
