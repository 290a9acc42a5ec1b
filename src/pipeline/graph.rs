//! From a pipeline file to its stages, in order, each with its inputs, fingerprint and folder.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use toml::{Table, Value};

use super::file::{LABELLER, PipelineFile};
use crate::{
    Error, Result,
    curate::Arm,
    fs,
    stage::{self, AnyStage, Input, Origin},
    stages,
    tables::records::CLASSIFIER,
};

/// One stage of a run.
pub struct Node {
    /// Its name in messages, such as `train arc seed 0`.
    pub name: String,
    /// The stage, with all its settings.
    pub stage: Box<dyn AnyStage>,
    /// The fingerprints of its inputs, in the order of [`AnyStage::inputs`].
    pub inputs: Vec<(&'static str, String)>,
    /// The fingerprint of its work; `None` if an input does not exist yet and cannot be hashed.
    pub fingerprint: Option<String>,
    /// Its folder.
    pub folder: PathBuf,
    /// Why it cannot run at present, if it cannot.
    pub problem: Option<String>,
}

/// The stages of `file` in the run folder `run`, in the order in which they run; with `until`, up to the last node
/// of that stage, followed by the report on what there is.
///
/// A stage whose table is missing runs with its defaults if the path from data to data set leads through it. Others
/// have to be requested by a table: import (instead of generate), train and evaluate (also by `[experiment]`), and
/// all stages that only observe, such as quality and certify. Impossible settings are [`Error::Usage`].
pub fn nodes(file: &PipelineFile, run: &Path, until: Option<&str>) -> Result<Vec<Node>> {
    let last = match until {
        None => usize::MAX,
        Some(name) => stages::find(name).map(|(place, _)| place).ok_or_else(|| {
            Error::Usage(format!("--until is '{name}', expected one of: {}", stages::names().join(", ")))
        })?,
    };
    refuse_contradictions(file)?;
    let mut graph = Graph::new(file, run, last);
    graph.add("split")?;
    if file.has("import") {
        graph.add("import")?;
    } else {
        if !file.table("generate").contains_key("model") {
            graph.add("fit-generator")?;
        }
        graph.add("generate")?;
    }
    graph.classifier = Some(match file.table("label").get("classifier") {
        Some(Value::String(other)) => PathBuf::from(other),
        _ => graph.add_as(Call {
            name: Some("train labeller".into()),
            table: Some(LABELLER),
            wanted_by: Some("label"),
            ..Call::of("train")
        })?,
    });
    graph.add("label")?;
    graph.add_asked_for("fit-discriminator")?;
    for stage in ["fit-discriminator", "score", "arc"] {
        graph.add(stage)?;
    }
    graph.add_asked_for("curate")?;
    let (selection, dataset) = graph.add_curated(None, None)?;

    let mut metrics = Vec::new();
    if let Some(experiment) = file.experiment.as_ref().filter(|_| graph.wants("train")) {
        for &seed in &experiment.seeds {
            let baseline = experiment.real_only.then_some(None);
            for arm in baseline.into_iter().chain(experiment.arms.iter().copied().map(Some)) {
                let data = match arm {
                    None => None,
                    Some(arm) => {
                        // Arms that draw at random have a different subset for each seed.
                        let fresh = matches!(arm, Arm::Random | Arm::Rejection).then_some(seed);
                        Some(graph.add_curated(Some(arm), fresh)?.1)
                    }
                };
                let name = format!("{} seed {seed}", arm.map_or("real".into(), |a| a.to_string()));
                metrics.extend(graph.train_and_evaluate(&name, data, Some(seed))?);
            }
        }
    } else if file.has("train") {
        metrics.extend(graph.train_and_evaluate("", Some(dataset), None)?);
    }
    graph.add_asked_for("report")?;
    graph.add_report(selection, metrics)?;
    let mut seen = std::collections::HashSet::new();
    graph.nodes.retain(|n| seen.insert(n.folder.clone()));
    Ok(graph.nodes)
}

/// Refuses tables that cannot be combined in one file.
fn refuse_contradictions(file: &PipelineFile) -> Result<()> {
    let makes_classifiers = file.has("train") || file.experiment.is_some();
    if file.experiment.is_some() && file.table("train").contains_key("data") {
        return Err(file
            .error("train", &"data is set, but [experiment] gives each arm its own; expected one of them"));
    }
    for stage in ["evaluate", "certify"] {
        if file.has(stage) && !makes_classifiers {
            let problem = format!("there is no classifier to {stage}, expected [train] or [experiment]");
            return Err(file.error(stage, &problem));
        }
    }
    if file.has("rank") {
        return Err(
            file.error("rank", &"a pipeline has one pool, expected `proxyset arc --real … --synthetic …`")
        );
    }
    if file.table("generate").contains_key("shards") {
        let problem =
            "shards is for one process of several: use `proxyset generate --shards`, then run the pipeline";
        return Err(file.error("generate", &problem));
    }
    match ["generate", "fit-generator"].into_iter().find(|&name| file.has(name)) {
        Some(other) if file.has("import") => {
            Err(file.error("import", &format!("there is [{other}] too, expected one source of the pool")))
        }
        _ => Ok(()),
    }
}

/// The stages that rank sample sets by ARC against the real data of `[split]`, in the order in which they run.
///
/// A set is the folder of a finished pool or a source, which is imported. With a `labeller`, a classifier's folder,
/// the agreement with its labels is given next to ARC. The tables of `file` apply to all sets alike.
pub fn ranking_nodes(
    file: &PipelineFile,
    run: &Path,
    sets: &[String],
    labeller: Option<&Path>,
) -> Result<Vec<Node>> {
    let mut graph = Graph::new(file, run, usize::MAX);
    graph.add("split")?;
    // Problems with any of the sets or its labels are found before hours of training for another.
    let (mut ranked, mut pools) = (Vec::new(), Vec::new());
    let mut names: Vec<String> = Vec::new();
    let call = |stage: &'static str, name: &str, inputs, settings| Call {
        name: Some(format!("{stage} {name}")),
        inputs,
        settings,
        ..Call::of(stage)
    };
    for set in sets {
        let name = Path::new(set).file_name().map_or(set.clone(), |name| name.to_string_lossy().into_owned());
        let name = if names.contains(&name) { set.clone() } else { name };
        if names.contains(&name) {
            bail!(Usage, "--synthetic {name} is given twice, expected every set once");
        }
        let pool = if stage::is_stage_folder(Path::new(set)) {
            PathBuf::from(set)
        } else {
            graph.add_as(call("import", &name, vec![("source", PathBuf::from(set))], Vec::new()))?
        };
        if let Some(labeller) = labeller {
            let inputs = vec![("pool", pool.clone()), ("classifier", labeller.to_path_buf())];
            ranked.push(("labelled", graph.add_as(call("label", &name, inputs, Vec::new()))?));
        }
        pools.push(pool);
        names.push(name);
    }
    for (pool, name) in pools.into_iter().zip(&names) {
        let (pool, no_judges) = (vec![("pool", pool)], vec![("judges", Value::Boolean(false))]);
        graph.add_as(call("fit-discriminator", name, pool.clone(), no_judges))?;
        ranked.push(("arcs", graph.add_as(call("arc", name, pool, Vec::new()))?));
    }
    graph.add_as(Call {
        inputs: ranked,
        settings: vec![("names", Value::from(names))],
        ..Call::of("rank")
    })?;
    Ok(graph.nodes)
}

/// A stage to add.
struct Call {
    stage: &'static str,
    /// The node's name, if not the stage's.
    name: Option<String>,
    /// The table of its settings, if not the stage's.
    table: Option<&'static str>,
    /// Inputs other than what the run made last.
    inputs: Vec<(&'static str, PathBuf)>,
    /// Settings that override the table.
    settings: Vec<(&'static str, Value)>,
    /// The stage that decides whether it is wanted, if not itself.
    wanted_by: Option<&'static str>,
}

impl Call {
    fn of(stage: &'static str) -> Self {
        Self { stage, name: None, table: None, inputs: Vec::new(), settings: Vec::new(), wanted_by: None }
    }
}

struct Graph<'a> {
    file: &'a PipelineFile,
    run: &'a Path,
    nodes: Vec<Node>,
    /// The place in the order of the last stage that is wanted.
    last: usize,
    /// The folder of the latest node of each stage.
    made: HashMap<&'static str, PathBuf>,
    /// The classifier that labels the pool.
    classifier: Option<PathBuf>,
    /// The fingerprints of external inputs, hashed once however many stages read them.
    outside: HashMap<String, Result<String, String>>,
}

impl<'a> Graph<'a> {
    fn new(file: &'a PipelineFile, run: &'a Path, last: usize) -> Self {
        let (made, outside) = (HashMap::new(), HashMap::new());
        Self { file, run, nodes: Vec::new(), last, made, classifier: None, outside }
    }

    fn wants(&self, stage: &str) -> bool {
        stages::find(stage).is_some_and(|(place, _)| place <= self.last)
    }

    /// A stage with its own table, on what the run has made.
    fn add(&mut self, stage: &'static str) -> Result<PathBuf> {
        self.add_as(Call::of(stage))
    }

    /// Adds the stages before `stage` that have a table, have not been added yet, and only look: what other stages read is
    /// made where it is wanted.
    fn add_asked_for(&mut self, stage: &str) -> Result<()> {
        for kind in stages::all().take_while(|kind| kind.name != stage) {
            let is_read = stages::all().flat_map(|reader| reader.inputs).any(|input| input.is_of(kind.name));
            if self.file.has(kind.name) && !self.made.contains_key(kind.name) && !is_read {
                self.add(kind.name)?;
            }
        }
        Ok(())
    }

    /// A selection and its data set: those of an arm, or as the tables say. Returns their folders.
    fn add_curated(&mut self, arm: Option<Arm>, seed: Option<u64>) -> Result<(PathBuf, PathBuf)> {
        let suffix = arm.map(|a| format!(" {a}")).unwrap_or_default()
            + &seed.map(|s| format!(" seed {s}")).unwrap_or_default();
        let name = |stage: &str| Some(format!("{stage}{suffix}"));
        let arm_setting = arm.map(|a| ("arm", Value::String(a.to_string())));
        let seed = seed.map(|s| ("seed", Value::Integer(s as i64)));
        let settings: Vec<_> = arm_setting.into_iter().chain(seed).collect();
        let selection = self.add_as(Call { name: name("curate"), settings, ..Call::of("curate") })?;
        let (mut inputs, mut settings) = (Vec::new(), Vec::new());
        // Once is enough: the arms of an experiment do not include the pool.
        if self.file.table("materialize").get("with_pool") == Some(&Value::Boolean(true)) {
            match arm {
                None => inputs.extend(self.made.get("score").map(|scores| ("scores", scores.clone()))),
                Some(_) => settings.push(("with_pool", Value::Boolean(false))),
            }
        }
        let call = Call { name: name("materialize"), inputs, settings, ..Call::of("materialize") };
        Ok((selection, self.add_as(call)?))
    }

    /// A classifier and its measurements. Returns the evaluation, if it is wanted.
    fn train_and_evaluate(
        &mut self,
        suffix: &str,
        data: Option<PathBuf>,
        seed: Option<u64>,
    ) -> Result<Option<PathBuf>> {
        let name = |stage: &str| Some(format!("{stage} {suffix}").trim_end().to_owned());
        self.add_as(Call {
            name: name("train"),
            inputs: data.map(|data| ("data", data)).into_iter().collect(),
            settings: seed.map(|seed| ("seed", Value::Integer(seed as i64))).into_iter().collect(),
            ..Call::of("train")
        })?;
        let metrics = self.add_as(Call { name: name("evaluate"), ..Call::of("evaluate") })?;
        if self.file.has("certify") {
            self.add_as(Call { name: name("certify"), ..Call::of("certify") })?;
        }
        Ok(self.wants("evaluate").then_some(metrics))
    }

    /// The report comes last. Once there is a selection, it covers what there is, whatever `--until` says.
    fn add_report(&mut self, selection: PathBuf, metrics: Vec<PathBuf>) -> Result<()> {
        let is_made = |folder: &Path| self.nodes.iter().any(|n| n.folder == folder);
        self.made.retain(|_, folder| is_made(folder));
        let enough = is_made(&selection);
        self.made.remove("curate");
        let selection = enough.then_some(("selection", selection));
        let inputs = selection.into_iter().chain(metrics.into_iter().map(|m| ("metrics", m))).collect();
        let wanted_by = enough.then_some("split");
        self.add_as(Call { inputs, wanted_by, ..Call::of("report") }).map(drop)
    }

    /// The stage's settings: those of the call, then those of its table, then what the run has made for the
    /// remaining inputs.
    fn resolve(&self, call: &Call) -> Result<Box<dyn AnyStage>> {
        let (_, kind) = stages::find(call.stage)
            .ok_or_else(|| Error::Alarm(format!("there is no stage '{}'", call.stage)))?;
        let name = call.table.unwrap_or(kind.name);
        let mut table = self.file.table(name);
        if name == LABELLER
            && let Value::Table(objective) = table.entry("objective").or_insert_with(|| Table::new().into())
        {
            objective.entry("kind").or_insert_with(|| "plain".into());
        }
        for (key, value) in &call.settings {
            table.insert((*key).into(), value.clone());
        }
        for input in kind.inputs {
            let mut given = call.inputs.iter().filter(|(key, _)| *key == input.key).map(|(_, p)| p.clone());
            let path = |path: PathBuf| Value::String(path.to_string_lossy().into_owned());
            if input.several {
                let folders: Vec<Value> = given.map(path).collect();
                match table.get_mut(input.key) {
                    Some(Value::Array(several)) => several.extend(folders),
                    Some(_) => {}
                    None if folders.is_empty() => {}
                    None => drop(table.insert(input.key.into(), Value::Array(folders))),
                }
            } else if !table.contains_key(input.key)
                && let Some(folder) = given.next().map_or_else(|| self.default_of(input), |p| Ok(Some(p)))?
            {
                table.insert(input.key.into(), path(folder));
            }
        }
        let of_table = |table: &Table| (kind.of_table)(name, table).map_err(|e| self.file.problem(&e));
        let has_seed = of_table(&Table::new())?.settings().get("seed").is_some();
        if has_seed && !table.contains_key("seed") {
            table.insert("seed".into(), Value::Integer(self.file.seed as i64));
        }
        let stage = of_table(&table)?;
        stage.validate().map_err(|e| self.file.error(name, &e))?;
        Ok(stage)
    }

    /// What the run has made that can serve as an input.
    fn default_of(&self, input: &Input) -> Result<Option<PathBuf>> {
        Ok(match input.from {
            Origin::Given => None,
            Origin::RealData => {
                self.resolve(&Call::of("split"))?.settings()["source"].as_str().map(PathBuf::from)
            }
            Origin::Stages(_) if input.key == CLASSIFIER.key => self.classifier.clone(),
            Origin::Stages(stages) => stages.iter().find_map(|stage| self.made.get(stage).cloned()),
        })
    }

    fn add_as(&mut self, call: Call) -> Result<PathBuf> {
        let stage = self.resolve(&call)?;
        let table = call.table.unwrap_or(call.stage);
        let name = call.name.unwrap_or_else(|| call.stage.into());
        let mut fingerprints = Vec::new();
        let mut problem = None;
        for (key, input) in stage.inputs() {
            let fingerprint = match self.nodes.iter().find(|n| n.folder == Path::new(&input)) {
                Some(node) => node.fingerprint.clone(),
                None => self
                    .outside
                    .entry(input.clone())
                    .or_insert_with(|| stage::input_fingerprint(&input).map_err(|e| e.to_string()))
                    .clone()
                    .map_err(|e| problem = Some(format!("[{table}] {key} = '{input}': {e}")))
                    .ok(),
            };
            fingerprints.extend(fingerprint.map(|f| (key, f)));
        }
        let complete = fingerprints.len() == stage.inputs().len();
        let fingerprint = complete.then(|| stage::fingerprint(stage.as_ref(), &fingerprints));
        // Without a fingerprint the folder has no name yet; the node's name keeps its users apart.
        let mark = fingerprint.as_deref().map_or_else(|| name.replace(' ', "-"), |f| fs::short(f, 8));
        let folder = self.run.join(format!("{}-{mark}", call.stage));
        if call.table.is_none() {
            self.made.insert(call.stage, folder.clone());
        }
        if self.wants(call.wanted_by.unwrap_or(call.stage)) {
            let inputs = fingerprints;
            self.nodes.push(Node { name, stage, inputs, fingerprint, folder: folder.clone(), problem });
        }
        Ok(folder)
    }
}
