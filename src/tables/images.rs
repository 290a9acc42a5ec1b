//! The result for each image: `images.parquet` of evaluate and of certify.
//!
//! | column of evaluate | |
//! |---|---|
//! | `index`, `label` | the image's place in its split, its class |
//! | `clean_logits`, `clean_correct` | what the network says of it, and whether its first choice is the label |
//! | `robust_correct` | whether it is still so after the attacks; null without one |
//! | `broken_by` | the first attack that found an image in the ball that is answered wrongly |
//!
//! Certify has `prediction`, `radius`, `probability_at_least` and `correct` in addition to `index` and `label`.

use std::path::Path;

use arrow_array::{
    BooleanArray, Float64Array, Int64Array, StringArray,
    builder::{Float32Builder, ListBuilder},
};
use arrow_schema::{DataType, Field};

use super::{
    labels::LABEL,
    shards::{self, Column, nullable, read_whole, required},
};
use crate::{
    Result,
    certify::Certificate,
    data::{Dataset, table},
};

const FILE: &str = "images.parquet";
const INDEX: &str = "index";
const CLEAN_LOGITS: &str = "clean_logits";
const CLEAN_CORRECT: &str = "clean_correct";
const ROBUST_CORRECT: &str = "robust_correct";
const BROKEN_BY: &str = "broken_by";

/// What an evaluation found for each image, in order.
pub(crate) struct Evaluated<'a> {
    /// The images' places in the split.
    pub(crate) rows: &'a [usize],
    pub(crate) labels: &'a [u32],
    pub(crate) logits: &'a [Vec<f32>],
    pub(crate) clean: &'a [bool],
    /// `None` without an attack.
    pub(crate) robust: Option<Vec<bool>>,
    pub(crate) broken_by: Vec<Option<&'a str>>,
}

impl Evaluated<'_> {
    /// Writes the table to the stage's folder.
    pub(crate) fn write(self, dir: &Path) -> Result<()> {
        let mut logits = ListBuilder::new(Float32Builder::new())
            .with_field(Field::new_list_field(DataType::Float32, false));
        for row in self.logits {
            logits.values().append_slice(row);
            logits.append(true);
        }
        let n = self.labels.len();
        let robust = self.robust.map_or_else(|| BooleanArray::new_null(n), BooleanArray::from);
        write(
            dir,
            [
                required(INDEX, Int64Array::from_iter_values(self.rows.iter().map(|&row| row as i64))),
                required(LABEL, Int64Array::from_iter_values(self.labels.iter().map(|&l| i64::from(l)))),
                required(CLEAN_LOGITS, logits.finish()),
                required(CLEAN_CORRECT, BooleanArray::from(self.clean.to_vec())),
                nullable(ROBUST_CORRECT, robust),
                nullable(BROKEN_BY, StringArray::from(self.broken_by)),
            ],
        )
    }
}

fn write<const N: usize>(dir: &Path, columns: [Column; N]) -> Result<()> {
    let batch = shards::batch(columns)?;
    table::write(&dir.join(FILE), &batch.schema(), [Ok(batch)], table::ROW_GROUP_ROWS, &[]).map(drop)
}

/// Whether each image of a finished evaluate stage is right when clean and, if there was an attack, after it.
pub(crate) fn read_correct(dir: &Path) -> Result<(Vec<bool>, Option<Vec<bool>>)> {
    let table = read_whole(&dir.join(FILE), &[CLEAN_CORRECT, ROBUST_CORRECT])?;
    let clean = table.column(CLEAN_CORRECT, |a: &BooleanArray, i| a.value(i))?;
    let robust = table.optional(ROBUST_CORRECT, |a: &BooleanArray, i| a.value(i))?;
    Ok((clean, robust.into_iter().collect()))
}

/// Writes what certify found for the images `rows` of `data`: their places in the split, their labels and their
/// certificates, or only predictions if there are no `radii`.
pub(crate) fn write_certified(
    dir: &Path,
    rows: &[usize],
    data: &Dataset,
    certificates: &[Certificate],
    radii: bool,
) -> Result<()> {
    let label = |&row: &usize| i64::from(data.labels[row]);
    let only = |value: f64| radii.then_some(value);
    let correct = rows.iter().zip(certificates).map(|(&row, c)| c.class == Some(data.labels[row]));
    write(
        dir,
        [
            required(INDEX, Int64Array::from_iter_values(rows.iter().map(|&row| data.rows[row] as i64))),
            required(LABEL, Int64Array::from_iter_values(rows.iter().map(label))),
            nullable(
                "prediction",
                Int64Array::from_iter(certificates.iter().map(|c| c.class.map(i64::from))),
            ),
            nullable("radius", Float64Array::from_iter(certificates.iter().map(|c| only(c.radius)))),
            nullable(
                "probability_at_least",
                Float64Array::from_iter(certificates.iter().map(|c| only(c.lower))),
            ),
            required("correct", BooleanArray::from(correct.collect::<Vec<_>>())),
        ],
    )
}
