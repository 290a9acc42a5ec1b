//! The label table of a pool: what a classifier sees in each image.
//!
//! | column | |
//! |---|---|
//! | `uid` | the image |
//! | `label` | its class, by its source |
//! | `label_source` | `intended`: the image was made for the class; `pseudo`: it is the classifier's first choice |
//! | `pseudo_label` | the classifier's first choice |
//! | `label_confidence` | the classifier's probability of `label` |

use std::path::Path;

use arrow_array::{Float32Array, Int64Array, RecordBatch, StringArray};

use super::{
    pool::{PoolShard, UID, expect_same_rows},
    shards::{batch, read_table, required},
};
use crate::{Result, stage::Input};

/// The input of stages that read labels.
pub const LABELS: Input = Input::of("labels", &["label"]);

/// The folder of the table in its stage's folder.
pub const FOLDER: &str = "labels";

/// The class of an image, here and in the tables that copy it.
pub(super) const LABEL: &str = "label";
/// The classifier's probability of [`LABEL`], here and in the tables that copy it.
pub(crate) const CONFIDENCE: &str = "label_confidence";
/// Where the label comes from, here and in data sets.
pub(super) const SOURCE: &str = "label_source";
const PSEUDO: &str = "pseudo_label";

/// Where an image's label comes from, in the words of the column.
pub(crate) fn source(intended: bool) -> &'static str {
    if intended { "intended" } else { "pseudo" }
}

/// The columns of a shard, except `uid`.
#[derive(Default)]
pub(crate) struct Labels {
    pub(crate) labels: Vec<i64>,
    /// Whether the image was made for its label.
    pub(crate) intended: Vec<bool>,
    pub(crate) pseudo: Vec<i64>,
    pub(crate) confidence: Vec<f32>,
}

impl Labels {
    /// The rows of the table for the images of a pool's shard.
    pub(crate) fn batch(self, rows: &PoolShard) -> Result<RecordBatch> {
        let sources = self.intended.iter().map(|&intended| source(intended));
        batch([
            required(UID, StringArray::from_iter_values(&rows.uids)),
            required(LABEL, Int64Array::from(self.labels)),
            required(SOURCE, StringArray::from_iter_values(sources)),
            required(PSEUDO, Int64Array::from(self.pseudo)),
            required(CONFIDENCE, Float32Array::from(self.confidence)),
        ])
    }

    /// Reads the columns of a shard.
    pub(crate) fn read(dir: &Path, shard: usize) -> Result<Self> {
        let table = read_table(dir, shard, &[LABEL, SOURCE, PSEUDO, CONFIDENCE])?;
        Ok(Self {
            labels: table.column(LABEL, |a: &Int64Array, i| a.value(i))?,
            intended: table.column(SOURCE, |a: &StringArray, i| a.value(i) == source(true))?,
            pseudo: table.column(PSEUDO, |a: &Int64Array, i| a.value(i))?,
            confidence: table.column(CONFIDENCE, |a: &Float32Array, i| a.value(i))?,
        })
    }

    /// Reads the columns of a shard. Fails with [`crate::Error::Data`] unless they belong to the pool's images, in
    /// order.
    pub(crate) fn read_beside(dir: &Path, shard: usize, rows: &PoolShard) -> Result<Self> {
        let uids = read_table(dir, shard, &[UID])?.column(UID, |a: &StringArray, i| a.value(i).to_owned())?;
        expect_same_rows("label table", shard, &uids, rows)?;
        Self::read(dir, shard)
    }
}
