//! Plain tables on stdout, and summaries as `key: value` lines.

use serde_json::Value;

use crate::{pipeline::Step, progress::human_seconds};

/// Left-aligned columns, two spaces apart; the header is the first row.
fn render(rows: &[Vec<String>]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let line = |cells: &Vec<String>| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(c, w)| format!("{c:w$}")).collect();
        padded.join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// The steps of a run, one per line.
pub(super) fn steps(steps: &[Step]) -> String {
    let mut rows = vec![["stage", "fingerprint", "state", "took", "work"].map(String::from).to_vec()];
    rows.extend(steps.iter().map(|s| {
        vec![
            s.name.clone(),
            s.fingerprint.as_deref().map_or_else(|| "-".into(), |f| crate::fs::short(f, 8)),
            s.state.to_owned(),
            s.seconds.map(human_seconds).unwrap_or_default(),
            s.amount.clone(),
        ]
    }));
    let mut text = render(&rows);
    let mut problems: Vec<&String> = steps.iter().filter_map(|s| s.problem.as_ref()).collect();
    problems.dedup();
    for problem in problems {
        text += &format!("note: {problem}\n");
    }
    text
}

/// Objects with the same keys as an indented table, names first; numbers have four decimal places.
fn records(rows: &[Value]) -> String {
    let mut keys: Vec<String> = rows[0].as_object().into_iter().flat_map(|row| row.keys().cloned()).collect();
    keys.sort_by_key(|key| !rows[0][key].is_string());
    fn cell(value: &Value) -> String {
        match value {
            Value::String(s) => s.clone(),
            Value::Number(n) if n.is_f64() => format!("{:.4}", n.as_f64().unwrap_or(f64::NAN)),
            Value::Array(all) => format!("[{}]", all.iter().map(cell).collect::<Vec<_>>().join(", ")),
            other => other.to_string(),
        }
    }
    let cells = rows.iter().map(|row| keys.iter().map(|key| cell(&row[key])).collect());
    let all: Vec<_> = std::iter::once(keys.clone()).chain(cells).collect();
    render(&all).lines().map(|line| format!("  {line}\n")).collect()
}

/// A summary, one line per key. Keys of nested objects are given as paths, lists of objects as tables; what is not
/// set is left out.
pub(super) fn summary(value: &Value) -> String {
    fn write(prefix: &str, value: &Value, text: &mut String) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                    write(&path, value, text);
                }
            }
            Value::Array(rows) if !rows.is_empty() && rows.iter().all(Value::is_object) => {
                *text += &format!("{prefix}:\n{}", records(rows));
            }
            Value::Null => {}
            Value::String(s) => *text += &format!("{prefix}: {s}\n"),
            other => *text += &format!("{prefix}: {other}\n"),
        }
    }
    let mut text = String::new();
    write("", value, &mut text);
    text
}
