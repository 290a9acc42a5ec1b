//! The pipeline's TOML file: one table per stage, a name, a seed, and an experiment.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::{Table, Value};

use crate::{Error, Result, curate::Arm, stages};

/// The table of the classifier that labels the pool: a second table of train.
pub(super) const LABELLER: &str = "labeller";

/// Keys of a pipeline file that are not stages.
const OTHER_KEYS: [&str; 5] = ["name", "seed", LABELLER, "experiment", "publish"];

/// A pipeline file, read and checked for unknown tables. The stages' own keys are checked when the graph is made.
#[derive(Debug)]
pub struct PipelineFile {
    /// The name of the run folder.
    pub name: String,
    /// The seed of every stage that does not set its own.
    pub seed: u64,
    /// What is compared, if anything.
    pub experiment: Option<Experiment>,
    /// Where the data set is copied to at the end of each run, if anywhere.
    pub publish: Option<PublishTable>,
    path: PathBuf,
    tables: Table,
}

/// `[experiment]`: every arm is trained and evaluated with every seed, and the report compares them.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experiment {
    /// Arms of curation to train on, each mixed with the real data.
    pub arms: Vec<Arm>,
    /// Also train on real data alone: the baseline.
    #[serde(default = "yes")]
    pub real_only: bool,
    /// Training seeds: initial weights, order, attack, and the subset of the arms that draw.
    pub seeds: Vec<u64>,
}

/// `[publish]`: at the end of each run, the data set is copied to a folder, unless it is already there.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PublishTable {
    /// The folder to publish to.
    #[serde(default)]
    pub to: PathBuf,
    /// A data set, or the folder of a finished materialize stage; that of the run if not given.
    pub dataset: Option<PathBuf>,
}

fn yes() -> bool {
    true
}

impl PipelineFile {
    /// Reads a pipeline file and applies `--set table.key=value` (values are TOML, bare words are strings).
    ///
    /// Anything wrong is [`Error::Usage`], with the line number if it is in the file.
    pub fn read(path: &Path, set: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Error::Usage(format!("pipeline file '{}' cannot be read: {e}", path.display())))?;
        Self::parse(path, &text, set)
    }

    /// A pipeline without a file: these tables of stages and what `set` says, with defaults for everything else.
    pub fn of(name: &str, given: &[(&str, serde_json::Value)], set: &[String]) -> Result<Self> {
        let mut tables = Table::from_iter([("name".to_owned(), Value::from(name))]);
        for (stage, table) in given {
            let table = Value::try_from(table).map_err(|e| Error::Usage(format!("{stage}: {e}")))?;
            tables.insert((*stage).into(), table);
        }
        Self::parse(Path::new(name), &tables.to_string(), set)
    }

    fn parse(path: &Path, text: &str, set: &[String]) -> Result<Self> {
        let usage = |e: &dyn std::fmt::Display| Error::Usage(format!("{}: {e}", path.display()));
        let mut tables: Table = toml::from_str(text).map_err(|e| usage(&e))?;
        for assignment in set {
            apply(&mut tables, assignment)?;
        }
        let stages = stages::names();
        for (key, value) in &tables {
            if !stages.contains(&key.as_str()) && !OTHER_KEYS.contains(&key.as_str()) {
                let expected = [&OTHER_KEYS[..], &stages].concat().join(", ");
                return Err(usage(&format!("unknown key '{key}', expected one of: {expected}")));
            }
            let is_table = !["name", "seed"].contains(&key.as_str());
            if is_table && !value.is_table() {
                return Err(usage(&format!("'{key}' is a {}, expected a table [{key}]", value.type_str())));
            }
        }
        let name = match tables.get("name") {
            Some(Value::String(name)) if is_plain(name) => name.clone(),
            Some(other) => return Err(usage(&format!("name is {other}, expected letters, digits, - and _"))),
            None => return Err(usage(&"name is missing, expected name = \"…\"")),
        };
        let seed = match tables.get("seed") {
            None => 0,
            Some(Value::Integer(seed)) if *seed >= 0 => *seed as u64,
            Some(other) => return Err(usage(&format!("seed is {other}, expected an integer from 0"))),
        };
        let experiment: Option<Experiment> = of_table(&tables, "experiment").map_err(|e| usage(&e))?;
        let publish: Option<PublishTable> = of_table(&tables, "publish").map_err(|e| usage(&e))?;
        if publish.as_ref().is_some_and(|publish| publish.to.as_os_str().is_empty()) {
            return Err(usage(&"[publish]: to is not set, expected a folder to publish to"));
        }
        if let Some(experiment) = &experiment
            && (experiment.seeds.is_empty() || (experiment.arms.is_empty() && !experiment.real_only))
        {
            return Err(usage(&"[experiment]: nothing to train, expected at least one seed and one arm"));
        }
        Ok(Self { name, seed, experiment, publish, path: path.to_path_buf(), tables })
    }

    /// The table of stage or labeller `name`; empty if there is none.
    pub(super) fn table(&self, name: &str) -> Table {
        self.tables.get(name).and_then(Value::as_table).cloned().unwrap_or_default()
    }

    /// Whether the file has a table of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.tables.contains_key(name)
    }

    /// An error about one table of this file.
    pub(super) fn error(&self, table: &str, problem: &dyn std::fmt::Display) -> Error {
        self.problem(&format!("[{table}]: {problem}"))
    }

    /// An error of this file.
    pub(super) fn problem(&self, problem: &str) -> Error {
        Error::Usage(format!("{}: {problem}", self.path.display()))
    }
}

/// A table that does not belong to a stage, if it exists.
fn of_table<T: serde::de::DeserializeOwned>(tables: &Table, name: &str) -> Result<Option<T>, String> {
    let parse = |table: &Value| {
        table.clone().try_into().map_err(|e: toml::de::Error| format!("[{name}]: {}", e.message()))
    };
    tables.get(name).map(parse).transpose()
}

fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
}

/// `key=value`, `table.key=value`, or deeper.
fn apply(tables: &mut Table, assignment: &str) -> Result<()> {
    let wrong = || Error::Usage(format!("--set is '{assignment}', expected TABLE.KEY=VALUE"));
    let (key, text) = assignment.split_once('=').ok_or_else(wrong)?;
    let parsed: Option<Table> = toml::from_str(&format!("value = {text}")).ok();
    let value = parsed.and_then(|mut t| t.remove("value")).unwrap_or_else(|| Value::String(text.into()));
    let mut table = tables;
    let mut path: Vec<&str> = key.trim().split('.').collect();
    let Some(key) = path.pop() else { return Err(wrong()) };
    for name in path {
        let below = table.entry(name).or_insert_with(|| Value::Table(Table::new()));
        let not_a_table = || Error::Usage(format!("--set is '{assignment}', but {name} is not a table"));
        table = below.as_table_mut().ok_or_else(not_a_table)?;
    }
    table.insert(key.to_owned(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, set: &[&str]) -> Result<PipelineFile> {
        PipelineFile::parse(
            Path::new("p.toml"),
            text,
            &set.iter().map(ToString::to_string).collect::<Vec<_>>(),
        )
    }

    #[test]
    fn set_overrides_and_adds() -> Result<()> {
        let file =
            parse("name = 'a'\n[generate]\ncount = 5", &["generate.count=7", "seed=3", "split.source=x/y"])?;
        assert_eq!(file.table("generate")["count"], Value::Integer(7));
        assert_eq!(file.table("split")["source"], Value::String("x/y".into()));
        assert_eq!(file.seed, 3);
        let deep = parse(
            "name = 'a'\n[train.optimizer]\nmomentum = 0.5",
            &["train.optimizer.kind=adam", "train.objective.attack.epsilon=0.1"],
        )?;
        let expected = "optimizer = { momentum = 0.5, kind = 'adam' }\nobjective.attack.epsilon = 0.1";
        assert_eq!(deep.table("train"), toml::from_str(expected).unwrap());
        Ok(())
    }

    #[test]
    fn unknown_tables_bad_names_and_bad_sets_are_usage_errors() {
        let cases = [
            ("name = 'a'\n[genrate]", None, "unknown key 'genrate'"),
            ("[split]", None, "name is missing"),
            ("name = 'a/b'", None, "expected letters"),
            ("name = 'a'\nsplit = 3", None, "expected a table [split]"),
            ("name = 'a'\nseed = -1", None, "expected an integer from 0"),
            ("name = 'a'", Some("nonsense"), "expected TABLE.KEY=VALUE"),
            ("name = 'a'\n[train]\nbatch = 3", Some("train.batch.size=3"), "batch is not a table"),
            ("name = 'a'\n[experiment]\narms = ['best']\nseeds = [1]", None, "best"),
        ];
        for (text, set, expected) in cases {
            let error = parse(text, &set.into_iter().collect::<Vec<_>>()).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
