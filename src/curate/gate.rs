//! Gates: conditions on the columns of a score table, each with its reason for refusing a sample.

use std::{fmt, str::FromStr};

use arrow_array::{
    Array, RecordBatch,
    cast::AsArray,
    types::{ArrowPrimitiveType, Float32Type, Int32Type, Int64Type, UInt64Type},
};
use arrow_schema::{DataType, Schema};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How a value is compared with a constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    /// `<`
    Less,
    /// `<=`
    AtMost,
    /// `>`
    More,
    /// `>=`
    AtLeast,
    /// `==`
    Equal,
    /// `!=`
    Unequal,
}

impl Operator {
    /// Longer signs first, because text is searched in this order.
    const ALL: [(&'static str, Self); 6] = [
        ("<=", Self::AtMost),
        (">=", Self::AtLeast),
        ("==", Self::Equal),
        ("!=", Self::Unequal),
        ("<", Self::Less),
        (">", Self::More),
    ];

    fn sign(self) -> &'static str {
        Self::ALL.into_iter().find(|(_, c)| *c == self).map_or("", |(sign, _)| sign)
    }

    /// IEEE 754: for NaN only `!=` holds.
    fn holds<T: PartialOrd>(self, a: T, b: T) -> bool {
        match self {
            Self::Less => a < b,
            Self::AtMost => a <= b,
            Self::More => a > b,
            Self::AtLeast => a >= b,
            Self::Equal => a == b,
            Self::Unequal => a != b,
        }
    }
}

/// The constant in a condition.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Constant {
    Integer(i128),
    Float(f64),
    Truth(bool),
}

impl Constant {
    fn parse(text: &str) -> Option<Self> {
        let integer = || text.parse().ok().map(Self::Integer);
        let float = || text.parse().ok().filter(|v: &f64| !v.is_nan()).map(Self::Float);
        text.parse().ok().map(Self::Truth).or_else(integer).or_else(float)
    }

    fn float(self) -> Option<f64> {
        match self {
            Self::Integer(v) => Some(v as f64),
            Self::Float(v) => Some(v),
            Self::Truth(_) => None,
        }
    }
}

impl fmt::Display for Constant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Integer(v) => v.fmt(f),
            Self::Float(v) => v.fmt(f),
            Self::Truth(v) => v.fmt(f),
        }
    }
}

/// A condition on one column: `label_confidence >= 0.9`, `label_agrees == true`.
///
/// The constant takes the type of the column: `x <= 0.1` holds for the 32-bit float nearest to 0.1. A null meets no
/// condition, as in SQL.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "crate::text::Written", into = "String")]
pub struct Condition {
    /// The column of the score table.
    pub column: String,
    comparison: Operator,
    constant: Constant,
}

impl Condition {
    /// `column comparison value`.
    pub fn new(column: &str, comparison: Operator, value: f64) -> Self {
        Self { column: column.into(), comparison, constant: Constant::Float(value) }
    }

    /// `column == truth`.
    pub fn is(column: &str, truth: bool) -> Self {
        Self { column: column.into(), comparison: Operator::Equal, constant: Constant::Truth(truth) }
    }

    /// Checks that the column can be compared with the constant. Fails with [`Error::Usage`], naming what there is.
    pub fn expect_in(&self, schema: &Schema) -> Result<()> {
        let Ok(field) = schema.field_with_name(&self.column) else {
            let names: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
            let names = names.join(", ");
            bail!(Usage, "filter '{self}': no column '{}', expected one of {names}", self.column);
        };
        let (column, kind) = (&self.column, field.data_type());
        let (fits, expected) = match kind {
            DataType::Float32 | DataType::Int32 | DataType::Int64 | DataType::UInt64 => {
                (self.constant.float().is_some(), "a number")
            }
            DataType::Boolean => (matches!(self.constant, Constant::Truth(_)), "== or != true or false"),
            _ => (false, "a column of numbers or truths"),
        };
        if !fits {
            bail!(Usage, "filter '{self}': column '{column}' is {kind}, expected {expected}");
        }
        Ok(())
    }

    /// Calls `visit(row, holds)` for every row of `array`; `holds` is `None` for a null.
    fn each(&self, array: &dyn Array, visit: impl FnMut(usize, Option<bool>)) -> Result<()> {
        fn all<T>(
            values: impl Iterator<Item = Option<T>>,
            holds: impl Fn(T) -> bool,
            mut visit: impl FnMut(usize, Option<bool>),
        ) {
            values.enumerate().for_each(|(row, value)| visit(row, value.map(&holds)));
        }
        fn integers<T: ArrowPrimitiveType<Native: Into<i128>>>(
            array: &dyn Array,
            condition: &Condition,
            to: f64,
            visit: impl FnMut(usize, Option<bool>),
        ) {
            let values = array.as_primitive::<T>().iter().map(|v| v.map(Into::<i128>::into));
            let comparison = condition.comparison;
            match condition.constant {
                Constant::Integer(to) => all(values, |v| comparison.holds(v, to), visit),
                _ => all(values, |v| comparison.holds(v as f64, to), visit),
            }
        }
        let comparison = self.comparison;
        match (array.data_type(), self.constant, self.constant.float()) {
            (DataType::Float32, _, Some(to)) => {
                let values = array.as_primitive::<Float32Type>().iter();
                all(values, |v| comparison.holds(v, to as f32), visit);
            }
            (DataType::Int32, _, Some(to)) => integers::<Int32Type>(array, self, to, visit),
            (DataType::Int64, _, Some(to)) => integers::<Int64Type>(array, self, to, visit),
            (DataType::UInt64, _, Some(to)) => integers::<UInt64Type>(array, self, to, visit),
            (DataType::Boolean, Constant::Truth(to), _) => {
                all(array.as_boolean().iter(), |v| comparison.holds(v, to), visit);
            }
            (other, ..) => bail!(Data, "column '{}' is {other}, unlike in other shards", self.column),
        }
        Ok(())
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.column, self.comparison.sign(), self.constant)
    }
}

impl FromStr for Condition {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = Operator::ALL.into_iter().find_map(|(sign, comparison)| {
            let (column, constant) = text.split_once(sign)?;
            let column = column.trim();
            let constant = Constant::parse(constant.trim())?;
            let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
            let orders = !matches!(comparison, Operator::Equal | Operator::Unequal);
            if column.is_empty() || !column.chars().all(word) || orders && constant.float().is_none() {
                return None;
            }
            Some(Self { column: column.into(), comparison, constant })
        });
        parsed.ok_or_else(|| {
            format!(
                "filter '{text}' is not a condition, expected a column, one of < <= > >= == !=, and a constant, as \
                 in 'label_confidence >= 0.9'"
            )
        })
    }
}

serde_as_text!(Condition);

/// A condition that a sample must meet to be kept at all.
#[derive(Clone, Debug)]
pub struct Gate {
    /// The reason for refusing a sample that does not meet it, as named in `rejected.parquet` and `select.json`.
    pub reason: String,
    /// What must hold.
    pub condition: Condition,
    /// Lets nulls pass, where there is nothing to compare the sample with.
    pub null_passes: bool,
}

/// The verdict on a sample that passes every gate; other verdicts are one more than the number of the refusing
/// gate.
pub const PASSED: u8 = 0;

/// The verdict on each row of a batch: the first gate, in order, that refuses it. At most 250 gates.
///
/// Fails with [`Error::Data`] if a column is missing or does not have the type of its condition.
pub fn verdicts(gates: &[Gate], batch: &RecordBatch) -> Result<Vec<u8>> {
    let mut verdicts = vec![PASSED; batch.num_rows()];
    for (number, gate) in (PASSED + 1..).zip(gates) {
        let column = &gate.condition.column;
        let array =
            batch.column_by_name(column).ok_or_else(|| Error::Data(format!("no column '{column}'")))?;
        gate.condition.each(array.as_ref(), |row, holds| {
            if verdicts[row] == PASSED && !holds.unwrap_or(gate.null_passes) {
                verdicts[row] = number;
            }
        })?;
    }
    Ok(verdicts)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{BooleanArray, Float32Array, Int64Array, StringArray, UInt64Array};

    use super::*;

    fn batch() -> RecordBatch {
        RecordBatch::try_from_iter_with_nullable([
            ("uid", Arc::new(StringArray::from(vec!["a", "b", "c", "d"])) as _, false),
            ("score", Arc::new(Float32Array::from(vec![0.1, 0.2, f32::NAN, 0.4])) as _, false),
            ("label", Arc::new(Int64Array::from(vec![0, 1, 2, 3])) as _, false),
            ("agrees", Arc::new(BooleanArray::from(vec![true, true, false, true])) as _, false),
            (
                "hash",
                Arc::new(UInt64Array::from(vec![u64::MAX, u64::MAX - 1, 1 << 53, (1 << 53) + 1])) as _,
                false,
            ),
            (
                "judge",
                Arc::new(Float32Array::from(vec![Some(0.5), None, Some(0.7), Some(f32::INFINITY)])) as _,
                true,
            ),
        ])
        .unwrap()
    }

    fn passed(text: &str) -> Vec<bool> {
        let condition: Condition = text.parse().unwrap();
        condition.expect_in(batch().schema_ref()).unwrap();
        let gate = Gate { reason: text.into(), condition, null_passes: false };
        verdicts(&[gate], &batch()).unwrap().into_iter().map(|v| v == PASSED).collect()
    }

    #[test]
    fn conditions_hold_as_in_ieee_and_sql() {
        assert_eq!(passed("score <= 0.1"), [true, false, false, false]);
        assert_eq!(passed("score<0.2"), [true, false, false, false]);
        assert_eq!(passed("score != 0.2"), [true, false, true, true]);
        assert_eq!(passed("score >= -1e9"), [true, true, false, true]);
        assert_eq!(passed("label >= 2"), [false, false, true, true]);
        assert_eq!(passed("label > 1.5"), [false, false, true, true]);
        assert_eq!(passed("agrees == true"), [true, true, false, true]);
        assert_eq!(passed("agrees != true"), [false, false, true, false]);
        assert_eq!(passed("hash == 18446744073709551615"), [true, false, false, false]);
        assert_eq!(passed("hash == 9007199254740993"), [false, false, false, true]);
        assert_eq!(passed("judge > 0"), [true, false, true, true]);
        assert_eq!(passed("judge < inf"), [true, false, true, false]);
    }

    #[test]
    fn the_first_gate_that_refuses_is_the_reason_and_a_null_may_pass() {
        let gate = |text: &str, null_passes| Gate {
            reason: text.into(),
            condition: text.parse().unwrap(),
            null_passes,
        };
        let gates = [gate("score < 0.3", false), gate("judge < 0.6", true), gate("label == 0", false)];
        assert_eq!(verdicts(&gates, &batch()).unwrap(), [PASSED, 3, 1, 1]);
        assert_eq!(verdicts(&[gate("judge < 0.6", false)], &batch()).unwrap(), [PASSED, 1, 1, 1]);
    }

    #[test]
    fn what_is_no_condition_is_refused_and_says_what_one_is() {
        for text in
            ["", "score", "score ~ 3", "< 3", "score <= high", "agrees < true", "a b < 3", "score <= nan"]
        {
            let error = text.parse::<Condition>().unwrap_err();
            assert!(error.contains("expected a column"), "{text}: {error}");
        }
    }

    #[test]
    fn a_column_that_is_not_there_or_of_another_type_is_a_usage_error() {
        let cases = [
            ("socre < 1", "expected one of uid, score"),
            ("uid == 1", "is Utf8, expected a column of"),
            ("agrees == 1", "expected == or != true or false"),
            ("score == true", "expected a number"),
        ];
        for (text, part) in cases {
            let error = text.parse::<Condition>().unwrap().expect_in(batch().schema_ref()).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn a_condition_is_written_as_it_is_read() {
        for text in ["score <= 0.1", "agrees == true", "hash != 18446744073709551615", "judge < inf"] {
            assert_eq!(text.parse::<Condition>().unwrap().to_string(), text);
        }
    }
}
