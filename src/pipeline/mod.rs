//! A run: the TOML file, the graph of stages that it describes, what of it is done, and doing the rest.

mod file;
mod graph;

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

pub use file::{Experiment, PipelineFile, PublishTable};
pub use graph::{Node, nodes, ranking_nodes};

use crate::{
    Error, Result, ResultExt,
    data::publish::{expect_dataset, publish},
    device::DeviceChoice,
    fs, progress,
    stage::{self, State},
    stages,
    tables::dataset::dataset_folder,
};

/// One stage of a run, resolved: its folder and its state.
#[derive(Debug, Default, Serialize)]
pub struct Step {
    /// The node's name, such as `train arc seed 0`.
    pub name: String,
    /// The stage.
    pub stage: &'static str,
    /// Its folder in the run.
    pub folder: PathBuf,
    /// Fingerprint of the work; `None` if an input does not exist yet and cannot be hashed.
    pub fingerprint: Option<String>,
    /// `done`, `partial` or `missing`; for publishing, which is checked in each run, `each run`.
    pub state: &'static str,
    /// How much work it is.
    pub amount: String,
    /// Seconds that it took, once done.
    pub seconds: Option<f64>,
    /// Its results, once done.
    pub summary: Option<Value>,
    /// What prevents it from being planned in full, such as missing data.
    pub problem: Option<String>,
}

/// What would be done, how much work it is, and what is already done. Reads, but writes nothing.
pub fn plan(file: &PipelineFile, run: &Path, until: Option<&str>) -> Result<Vec<Step>> {
    steps(file, nodes(file, run, until)?, until, "each run")
}

/// Does what is not done yet, in order, and publishes the data set if the file says where, unless `until` ends the
/// run before that. Returns the state of every step at the end.
///
/// Two processes may not drive one run folder: the second fails with [`Error::Stopped`].
pub fn run(file: &PipelineFile, run: &Path, until: Option<&str>, device: DeviceChoice) -> Result<Vec<Step>> {
    let nodes = nodes(file, run, until)?;
    if let Some(problem) = publishing_problem(file).filter(|_| until.is_none()) {
        return Err(file.error("publish", &problem));
    }
    run_nodes(&nodes, run, device)?;
    if let Some(table) = file.publish.as_ref().filter(|_| until.is_none()) {
        let made = nodes.iter().find(|node| node.name == "materialize").map(|node| &node.folder);
        let Some(dataset) = table.dataset.as_ref().or(made) else {
            return Err(file.error("publish", &"there is no data set, expected dataset"));
        };
        let published = publish(&dataset_folder(dataset), &table.to).context(|| "in publish")?;
        progress::note(&format!("publish: {} files are in {}", published.files, table.to.display()));
    }
    steps(file, nodes, until, "done")
}

/// What is wrong with the data set that the file names to be published, if it names one.
fn publishing_problem(file: &PipelineFile) -> Option<String> {
    let dataset = file.publish.as_ref()?.dataset.as_ref()?;
    expect_dataset(&dataset_folder(dataset)).err().map(|e| e.to_string())
}

/// The state of each stage, and of publishing, which has no state of its own: `publishing` stands for it.
fn steps(
    file: &PipelineFile,
    nodes: Vec<Node>,
    until: Option<&str>,
    publishing: &'static str,
) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    for node in nodes {
        let (state, done) = match &node.fingerprint {
            None => (State::Missing, None),
            Some(fingerprint) => (stage::state(&node.folder, fingerprint)?, stage::read_done(&node.folder)?),
        };
        steps.push(Step {
            name: node.name,
            stage: node.stage.name(),
            amount: node.stage.amount(),
            folder: node.folder,
            fingerprint: node.fingerprint,
            state: match state {
                State::Missing => "missing",
                State::Partial => "partial",
                State::Done => "done",
            },
            seconds: done.as_ref().map(|d| d.seconds),
            summary: done.map(|d| d.summary),
            problem: node.problem,
        });
    }
    if let Some(table) = file.publish.as_ref().filter(|_| until.is_none()) {
        steps.push(Step {
            name: "publish".into(),
            stage: "publish",
            folder: table.to.clone(),
            state: publishing,
            amount: format!("a checked copy in {}", table.to.display()),
            problem: publishing_problem(file),
            ..Step::default()
        });
    }
    Ok(steps)
}

/// Does what is not done yet of some stages of a run folder, in order; see [`run`].
pub fn run_nodes(nodes: &[Node], run: &Path, device: DeviceChoice) -> Result<()> {
    if let Some(problem) = nodes.iter().find_map(|n| n.problem.as_ref()) {
        bail!(Usage, "{problem}");
    }
    fs::create_dir_all(run)?;
    let _lock = fs::Lock::acquire(run, "run")?;
    let total = nodes.len();
    for (i, node) in nodes.iter().enumerate() {
        progress::check_stop()?;
        let fingerprint = node.fingerprint.as_deref().unwrap_or_default();
        if stage::state(&node.folder, fingerprint)? == State::Done {
            progress::note(&format!("[{}/{total}] {}: done already", i + 1, node.name));
            continue;
        }
        for later in &nodes[i..] {
            later.stage.check_inputs().context(|| format!("in {}", later.name))?;
        }
        progress::note(&format!("[{}/{total}] {}: {}", i + 1, node.name, node.stage.amount()));
        let started = std::time::Instant::now();
        stage::execute(node.stage.as_ref(), &node.inputs, &node.folder, device)
            .context(|| format!("in {}", node.name))?;
        let took = progress::human_seconds(started.elapsed().as_secs_f64());
        progress::note(&format!("[{}/{total}] {}: done in {took}", i + 1, node.name));
    }
    Ok(())
}

/// Every stage folder of a run folder with its state, whatever pipeline made it.
pub fn status(run: &Path) -> Result<Vec<Step>> {
    let mut folders: Vec<PathBuf> = std::fs::read_dir(run)
        .map_err(|e| Error::Usage(format!("run folder '{}' cannot be read: {e}", run.display())))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join("config.toml").is_file())
        .collect();
    if run.join("config.toml").is_file() {
        folders.push(run.to_path_buf());
    }
    folders.sort();
    let mut steps = Vec::new();
    for folder in folders {
        let config = stage::read_config(&folder)?;
        let done = stage::read_done(&folder)?;
        steps.push(Step {
            name: config.stage.clone(),
            stage: stages::find(&config.stage).map_or("unknown", |(_, kind)| kind.name),
            amount: partial_amount(&folder)?,
            fingerprint: Some(config.fingerprint),
            state: if done.is_some() { "done" } else { "partial" },
            seconds: done.as_ref().map(|d| d.seconds),
            summary: done.map(|d| d.summary),
            problem: None,
            folder,
        });
    }
    Ok(steps)
}

/// The finished shards in an unfinished folder.
fn partial_amount(folder: &Path) -> Result<String> {
    let shards = fs::files_below(folder)?
        .iter()
        .filter(|f| f.file_name().is_some_and(|n| n.to_string_lossy().starts_with("shard-")))
        .filter(|f| f.extension().is_some_and(|e| e == "json"))
        .count();
    Ok(if shards > 0 { format!("{shards} shards") } else { String::new() })
}
