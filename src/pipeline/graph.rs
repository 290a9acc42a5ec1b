//! From a pipeline file to its stages, in order, each with its inputs, fingerprint and folder.

use std::path::{Path, PathBuf};

use toml::Value;

use super::PipelineFile;
use crate::{
    Error, Result,
    curate::Arm,
    stage::{
        self, AnyStage, Arc, Certify, Curate, Evaluate, FitDiscriminator, FitGenerator, Generate, Import,
        Label, Materialize, NAMES, Publish, Quality, Rank, Report, Score, Split, Stage, Train,
    },
};

/// Inputs that may be several folders.
const SEVERAL: [&str; 3] = ["metrics", "arcs", "labelled"];

/// One stage of a run.
pub struct Node {
    /// What it is called in messages, such as `train arc seed 0`.
    pub name: String,
    /// The stage, with all its settings.
    pub stage: Box<dyn AnyStage>,
    /// The fingerprints of its inputs, in the order of [`AnyStage::inputs`].
    pub inputs: Vec<(&'static str, String)>,
    /// The fingerprint of its work; none if an input is not there to be hashed.
    pub fingerprint: Option<String>,
    /// Where it is done.
    pub folder: PathBuf,
    /// Why it cannot run here and now, if it cannot.
    pub problem: Option<String>,
}

/// The stages of `file` in the run folder `run`, in the order in which they run; with `until`, up to the
/// last of that stage, and then the report of what there is.
///
/// A stage whose table is missing runs with its defaults, except those that have to be asked for: train and
/// evaluate (`[train]`), certify (`[certify]`), quality (`[quality]`), import (`[import]`, in place of generate), and
/// publish (`[publish]`). Settings that cannot be are [`Error::Usage`].
pub fn nodes(file: &PipelineFile, run: &Path, until: Option<&str>) -> Result<Vec<Node>> {
    let last = match until {
        None => usize::MAX,
        Some(name) => NAMES.iter().position(|&n| n == name).ok_or_else(|| {
            Error::Usage(format!("--until is '{name}', expected one of: {}", NAMES.join(", ")))
        })?,
    };
    let mut graph = Graph { file, run, nodes: Vec::new(), last };
    if file.experiment.is_some() && file.table("train").contains_key("data") {
        return Err(file
            .error("train", &"data is set, but [experiment] gives each arm its own; expected one of them"));
    }
    if file.has(Certify::NAME) && !file.has(Train::NAME) && file.experiment.is_none() {
        return Err(
            file.error("certify", &"there is no classifier to certify, expected [train] or [experiment]")
        );
    }
    if file.has(Rank::NAME) {
        return Err(file
            .error(Rank::NAME, &"a pipeline has one pool, expected `proxyset arc --real … --synthetic …`"));
    }
    let split = graph.add::<Split>("split", &[])?;
    let real = [("split", split.clone())];

    if file.table("generate").contains_key("shards") {
        let problem =
            "shards is for one process of several: use `proxyset generate --shards`, then run the pipeline";
        return Err(file.error("generate", &problem));
    }
    let pool = if file.has(Import::NAME) {
        if let Some(other) = [Generate::NAME, FitGenerator::NAME].into_iter().find(|&name| file.has(name)) {
            return Err(
                file.error("import", &format!("there is [{other}] too, expected one source of the pool"))
            );
        }
        graph.add::<Import>("import", &[])?
    } else if file.table("generate").contains_key("model") {
        graph.add::<Generate>("generate", &[])?
    } else {
        let model = graph.add::<FitGenerator>("fit-generator", &real)?;
        graph.add::<Generate>("generate", &[("model", model)])?
    };
    let classifier = match file.table("label").get("classifier") {
        Some(Value::String(other)) => PathBuf::from(other),
        _ => graph.add_as::<Train>("train labeller", "labeller", &real, Label::NAME)?,
    };
    let classifier = ("classifier", classifier);
    let inputs = [("pool", pool.clone()), classifier.clone()];
    if file.has(Quality::NAME) {
        let source = graph.resolve::<Split>("split", &[], &[])?.source.to_string();
        let [pool, classifier] = inputs.clone();
        graph.add::<Quality>("quality", &[pool, classifier, ("data", PathBuf::from(source))])?;
    }
    let labels = graph.add::<Label>("label", &inputs)?;

    let proxy = [("split", split.clone()), ("pool", pool.clone())];
    let discriminators = graph.add::<FitDiscriminator>("fit-discriminator", &proxy)?;
    let discriminators = ("discriminators", discriminators);
    let judged = [
        ("split", split.clone()),
        ("pool", pool.clone()),
        ("labels", labels.clone()),
        discriminators.clone(),
        classifier,
    ];
    let scores = graph.add::<Score>("score", &judged)?;
    let attacked = [("split", split.clone()), ("pool", pool.clone()), discriminators];
    let arc = graph.add::<Arc>("arc", &attacked)?;

    let curated = |graph: &mut Graph, arm: Option<Arm>, seed: Option<u64>| -> Result<(PathBuf, PathBuf)> {
        let suffix = arm.map(|a| format!(" {a}")).unwrap_or_default()
            + &seed.map(|s| format!(" seed {s}")).unwrap_or_default();
        let arm = arm.map(|a| ("arm", Value::String(a.to_string())));
        let seed = seed.map(|s| ("seed", Value::Integer(s as i64)));
        let extra: Vec<_> = arm.into_iter().chain(seed).collect();
        let inputs = [("scores", scores.clone())];
        let selection =
            graph.add_with::<Curate>(&format!("curate{suffix}"), "curate", &inputs, &extra, None)?;
        let mut inputs = vec![("split", split.clone()), ("pool", pool.clone())];
        inputs.push(("selection", selection.clone()));
        // Once is enough: the arms of an experiment go without the pool.
        let mut alone = Vec::new();
        if file.table(Materialize::NAME).get("with_pool") == Some(&Value::Boolean(true)) {
            if extra.is_empty() {
                inputs.push(("scores", scores.clone()));
            } else {
                alone.push(("with_pool", Value::Boolean(false)));
            }
        }
        let dataset = graph.add_with::<Materialize>(
            &format!("materialize{suffix}"),
            "materialize",
            &inputs,
            &alone,
            None,
        )?;
        Ok((selection, dataset))
    };
    let (selection, dataset) = curated(&mut graph, None, None)?;

    let mut metrics = Vec::new();
    if let Some(experiment) = file.experiment.as_ref().filter(|_| graph.wants(Train::NAME)) {
        for &seed in &experiment.seeds {
            let baseline = experiment.real_only.then_some(None);
            for arm in baseline.into_iter().chain(experiment.arms.iter().copied().map(Some)) {
                let data = match arm {
                    None => None,
                    Some(arm) => {
                        // Arms that draw have a fresh subset for each seed.
                        let fresh = matches!(arm, Arm::Random | Arm::Rejection).then_some(seed);
                        Some(curated(&mut graph, Some(arm), fresh)?.1)
                    }
                };
                let name = format!("{} seed {seed}", arm.map_or("real".into(), |a| a.to_string()));
                metrics.extend(graph.train_and_evaluate(&name, &split, data.as_deref(), Some(seed))?);
            }
        }
    } else if file.has(Train::NAME) {
        metrics.extend(graph.train_and_evaluate("", &split, Some(&dataset), None)?);
    }

    let mut inputs = vec![("pool", pool), ("labels", labels), ("scores", scores), ("arc", arc)];
    inputs.push(("selection", selection));
    inputs.extend(metrics.into_iter().map(|m| ("metrics", m)));
    graph.add_report(&inputs)?;
    if file.has(Publish::NAME) {
        graph.add::<Publish>("publish", &[("dataset", dataset)])?;
    }
    let mut seen = std::collections::HashSet::new();
    graph.nodes.retain(|n| seen.insert(n.folder.clone()));
    Ok(graph.nodes)
}

/// The stages that rank sample sets by ARC against the real data of `[split]`, in the order in which they run.
///
/// A set is the folder of a finished pool or a source, which is imported. With a `labeller`, a classifier's folder, the
/// agreement with its labels stands beside ARC. The tables of `file` set what they name for all sets alike.
pub fn ranking_nodes(
    file: &PipelineFile,
    run: &Path,
    sets: &[String],
    labeller: Option<&Path>,
) -> Result<Vec<Node>> {
    let mut graph = Graph { file, run, nodes: Vec::new(), last: usize::MAX };
    let split = graph.add::<Split>("split", &[])?;
    // What is wrong with any of the sets or its labels is found before hours of training for another.
    let (mut ranked, mut pools) = (Vec::new(), Vec::new());
    let mut names: Vec<String> = Vec::new();
    for set in sets {
        let name = Path::new(set).file_name().map_or(set.clone(), |name| name.to_string_lossy().into_owned());
        let name = if names.contains(&name) { set.clone() } else { name };
        if names.contains(&name) {
            bail!(Usage, "--synthetic {name} is given twice, expected every set once");
        }
        let named = |what: &str| format!("{what} {name}");
        let pool = if stage::is_stage_folder(Path::new(set)) {
            PathBuf::from(set)
        } else {
            let source = [("source", PathBuf::from(set))];
            graph.add_with::<Import>(&named("import"), Import::NAME, &source, &[], None)?
        };
        if let Some(labeller) = labeller {
            let inputs = [("pool", pool.clone()), ("classifier", labeller.to_path_buf())];
            let labels = graph.add_with::<Label>(&named("label"), Label::NAME, &inputs, &[], None)?;
            ranked.push(("labelled", labels));
        }
        pools.push(pool);
        names.push(name);
    }
    for (pool, name) in pools.into_iter().zip(&names) {
        let named = |what: &str| format!("{what} {name}");
        let inputs = [("split", split.clone()), ("pool", pool)];
        let table = FitDiscriminator::NAME;
        let settings = [("judges", Value::Boolean(false))];
        let discriminators =
            graph.add_with::<FitDiscriminator>(&named(table), table, &inputs, &settings, None)?;
        let inputs = [inputs[0].clone(), inputs[1].clone(), ("discriminators", discriminators)];
        ranked.push(("arcs", graph.add_with::<Arc>(&named("arc"), Arc::NAME, &inputs, &[], None)?));
    }
    graph.add_with::<Rank>(Rank::NAME, Rank::NAME, &ranked, &[("names", Value::from(names))], None)?;
    Ok(graph.nodes)
}

/// The name of a stage as the program spells it.
pub(super) fn stage_name(name: &str) -> &'static str {
    NAMES.iter().find(|&&n| n == name).copied().unwrap_or("unknown")
}

struct Graph<'a> {
    file: &'a PipelineFile,
    run: &'a Path,
    nodes: Vec<Node>,
    /// Index in [`NAMES`] of the last stage that is wanted.
    last: usize,
}

impl Graph<'_> {
    fn wants(&self, stage: &str) -> bool {
        NAMES.iter().position(|&n| n == stage).is_some_and(|i| i <= self.last)
    }

    fn add<S: Stage>(&mut self, table: &str, inputs: &[(&'static str, PathBuf)]) -> Result<PathBuf> {
        self.add_with::<S>(table, table, inputs, &[], None)
    }

    /// A stage under another table than its own, wanted whenever stage `wanted_by` is.
    fn add_as<S: Stage>(
        &mut self,
        name: &str,
        table: &str,
        inputs: &[(&'static str, PathBuf)],
        wanted_by: &str,
    ) -> Result<PathBuf> {
        self.add_with::<S>(name, table, inputs, &[], Some(wanted_by))
    }

    /// The report comes last and tells of what there is, whatever `--until` says, once there are scores.
    fn add_report(&mut self, inputs: &[(&'static str, PathBuf)]) -> Result<PathBuf> {
        let made: Vec<_> = inputs
            .iter()
            .filter(|(_, folder)| self.nodes.iter().any(|n| n.folder == *folder))
            .cloned()
            .collect();
        let enough = made.iter().any(|(key, _)| *key == "selection");
        let wanted_by = if enough { Split::NAME } else { Report::NAME };
        self.add_with::<Report>("report", "report", &made, &[], Some(wanted_by))
    }

    fn train_and_evaluate(
        &mut self,
        suffix: &str,
        split: &Path,
        data: Option<&Path>,
        seed: Option<u64>,
    ) -> Result<Vec<PathBuf>> {
        let mut inputs = vec![("split", split.to_path_buf())];
        inputs.extend(data.map(|d| ("data", d.to_path_buf())));
        let seed: Vec<_> = seed.map(|s| ("seed", Value::Integer(s as i64))).into_iter().collect();
        let name = |verb: &str| format!("{verb} {suffix}").trim_end().to_owned();
        let model = self.add_with::<Train>(&name("train"), "train", &inputs, &seed, None)?;
        let source = self.resolve::<Split>("split", &[], &[])?.source.to_string();
        let inputs = [("model", model), ("data", PathBuf::from(source))];
        let metrics = self.add_with::<Evaluate>(&name("evaluate"), "evaluate", &inputs, &[], None)?;
        if self.file.has(Certify::NAME) {
            self.add_with::<Certify>(&name("certify"), "certify", &inputs, &[], None)?;
        }
        Ok(if self.wants(Evaluate::NAME) { vec![metrics] } else { Vec::new() })
    }

    /// The stage's settings: its table, then the graph's inputs and values for keys that the table leaves open.
    fn resolve<S: Stage>(
        &self,
        table_name: &str,
        inputs: &[(&'static str, PathBuf)],
        extra: &[(&'static str, Value)],
    ) -> Result<S> {
        let mut table = self.file.table(table_name);
        if table_name == "labeller" && !table.contains_key("objective") {
            table.insert("objective".into(), Value::String("plain".into()));
        }
        for (key, value) in extra {
            table.insert((*key).into(), value.clone());
        }
        for (key, folder) in inputs {
            let value = Value::String(folder.to_string_lossy().into_owned());
            match table.get_mut(*key) {
                Some(Value::Array(several)) if SEVERAL.contains(key) => several.push(value),
                // What the table names itself stands.
                Some(_) => {}
                None if SEVERAL.contains(key) => drop(table.insert((*key).into(), Value::Array(vec![value]))),
                None => drop(table.insert((*key).into(), value)),
            }
        }
        let has_seed = S::default().settings().get("seed").is_some();
        if has_seed && !table.contains_key("seed") {
            table.insert("seed".into(), Value::Integer(self.file.seed as i64));
        }
        let config: S = Value::Table(table)
            .try_into()
            .map_err(|e: toml::de::Error| self.file.error(table_name, &e.message()))?;
        Stage::validate(&config).map_err(|e| self.file.error(table_name, &e))?;
        Ok(config)
    }

    fn add_with<S: Stage>(
        &mut self,
        name: &str,
        table: &str,
        inputs: &[(&'static str, PathBuf)],
        extra: &[(&'static str, Value)],
        wanted_by: Option<&str>,
    ) -> Result<PathBuf> {
        let config: S = self.resolve(table, inputs, extra)?;
        let mut fingerprints = Vec::new();
        let mut problem = None;
        for (key, input) in AnyStage::inputs(&config) {
            let folder = Path::new(&input);
            let fingerprint = match self.nodes.iter().find(|n| n.folder == folder) {
                Some(node) => node.fingerprint.clone(),
                None => stage::input_fingerprint(&input)
                    .map_err(|e| problem = Some(format!("[{table}] {key} = '{input}': {e}")))
                    .ok(),
            };
            fingerprints.extend(fingerprint.map(|f| (key, f)));
        }
        let complete = fingerprints.len() == AnyStage::inputs(&config).len();
        let fingerprint = complete.then(|| stage::fingerprint(&config, &fingerprints));
        // Without a fingerprint the folder has no name yet; the node's name keeps its users apart.
        let mark = fingerprint.as_deref().map_or_else(|| name.replace(' ', "-"), |f| f[..8].to_owned());
        let folder = self.run.join(format!("{}-{mark}", S::NAME));
        if self.wants(wanted_by.unwrap_or(S::NAME)) {
            let stage = Box::new(config);
            let inputs = fingerprints;
            self.nodes.push(Node {
                name: name.into(),
                stage,
                inputs,
                fingerprint,
                folder: folder.clone(),
                problem,
            });
        }
        Ok(folder)
    }
}
