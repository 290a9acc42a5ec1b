//! Stages: the units of composition. One stage a file, one configuration struct a stage.
//!
//! The struct is the stage: its fields are the verb's flags *and* the keys of the pipeline's TOML table, its
//! defaults are written once (as flags), unknown keys are refused. A stage reads input folders, computes a pure
//! function of them and of its settings, and writes one output folder:
//!
//! ```text
//! <stage>-<fingerprint8>/  config.toml   what is computed here: settings, inputs, fingerprint; written first
//!                          …             what the stage makes
//!                          done.json     what was made, how long it took, hashes; written last
//! ```
//!
//! A folder with `done.json` is finished; one without goes on where it was.

mod arc;
mod certify;
mod coverage;
mod curate;
mod evaluate;
mod fit_discriminator;
mod fit_generator;
mod generate;
mod import;
mod label;
mod materialize;
mod mix;
mod pool_configuration;
mod publish;
mod quality;
mod rank;
mod report;
mod score;
mod score_rows;
mod selection;
mod shards;
mod split;
mod train;
mod trainer;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Instant,
};

use candle_core::Device;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

pub use self::{
    arc::Arc, certify::Certify, curate::Curate, evaluate::Evaluate, fit_discriminator::FitDiscriminator,
    fit_generator::FitGenerator, generate::Generate, import::Import, label::Label, materialize::Materialize,
    publish::Publish, quality::Quality, rank::Rank, report::Report, score::Score, split::Split, train::Train,
};
use crate::{
    Error, Result, data,
    device::{DeviceChoice, device_class},
    fs,
    nn::Classifier,
    progress,
};

/// Every stage, in the order in which a run meets them.
pub const NAMES: &[&str] = &[
    Split::NAME,
    FitGenerator::NAME,
    Generate::NAME,
    Import::NAME,
    Label::NAME,
    Quality::NAME,
    FitDiscriminator::NAME,
    Score::NAME,
    Arc::NAME,
    Rank::NAME,
    Curate::NAME,
    Materialize::NAME,
    Train::NAME,
    Evaluate::NAME,
    Certify::NAME,
    Report::NAME,
    Publish::NAME,
];

/// The version of what stages write. Part of every fingerprint: a change of format redoes the work.
const FORMAT: u32 = 5;
const CONFIG: &str = "config.toml";
const DONE: &str = "done.json";
/// The lock on all of a stage's folder; see [`Job::open`].
const WHOLE: &str = "run";

/// A stage; see the module.
pub trait Stage: clap::Args + Serialize + DeserializeOwned + Default + Clone + 'static {
    /// The verb, and the name of the pipeline's table.
    const NAME: &'static str;
    /// The keys that name inputs. In the fingerprint each is replaced by the fingerprint of what it names.
    const INPUTS: &'static [&'static str];
    /// The keys that change no byte of the output, and so are no part of the fingerprint.
    const RUNTIME: &'static [&'static str] = &[];
    /// How often this stage alone came to write other bytes: added to the format version, so that its work is redone and
    /// that of the stages before it is not.
    const REVISION: u32 = 0;

    /// Whether the output holds the inputs' names, so that they decide what is made as much as what they name.
    const KEEPS_NAMES: bool = false;

    /// Refuses impossible settings with [`Error::Usage`], before anything is read or written.
    fn validate(&self) -> Result<()>;
    /// Refuses finished inputs that do not belong together, as [`Self::run`] would: so a run finds it before it does long work
    /// for other stages. Cheap; says nothing of inputs that are not finished.
    fn check_inputs(&self) -> Result<()> {
        Ok(())
    }
    /// How much work this is, for `plan`: `5000 steps of 64 images`.
    fn amount(&self) -> String;
    /// Does the work. Everything that can be wrong with the inputs is found before [`Job::open`] is called.
    ///
    /// Returns the summary that goes into `done.json` and, with `--json`, to stdout.
    fn run(&self, job: &Job) -> Result<Outcome>;
}

/// What a stage reports when it returns.
pub enum Outcome {
    /// All is made; the summary is kept in `done.json`.
    Done(Value),
    /// This process's share is made, others' is not yet (`generate --shards`).
    Partial(Value),
}

/// What a stage is given to work with.
pub struct Job {
    /// Where tensors live.
    pub device: Device,
    /// The class of machines that give the same bits; see [`device_class`].
    pub device_class: String,
    /// The fingerprint of the work: settings, inputs, format version.
    pub fingerprint: String,
    out: PathBuf,
    config: String,
}

impl Job {
    /// Makes the output folder if need be, locks it as `lock`, and returns it. `run` is the lock on all of the
    /// folder: under it what dead writers left is removed. Who locks a share looks after that share.
    ///
    /// The first thing that a stage writes; until then a failure leaves nothing behind. The lock is held
    /// until the guard is dropped.
    pub fn open(&self, lock: &str) -> Result<(&Path, fs::Lock)> {
        fs::create_dir_all(&self.out)?;
        let guard = fs::Lock::acquire(&self.out, lock)?;
        if lock == WHOLE {
            fs::remove_leftovers(&self.out, &|_| true)?;
        }
        // Another process may have been here between our look at the folder and the lock.
        if state(&self.out, &self.fingerprint)? == State::Done {
            bail!(
                Stopped,
                "{}: another process has just finished this; run again to use it",
                self.out.display()
            );
        }
        let path = self.out.join(CONFIG);
        if !path.exists() {
            fs::publish(&path, self.config.as_bytes())?;
        }
        Ok((&self.out, guard))
    }
}

impl Job {
    /// The hidden folder of unfinished work `name` in `dir`. Work of one device class is not gone on with by another.
    fn hidden(&self, dir: &Path, name: &str) -> PathBuf {
        dir.join(format!(".{name}.{}", self.device_class))
    }
}

/// A stage with its type forgotten.
pub trait AnyStage {
    /// [`Stage::NAME`].
    fn name(&self) -> &'static str;
    /// [`Stage::REVISION`].
    fn revision(&self) -> u32;
    /// [`Stage::validate`].
    fn validate(&self) -> Result<()>;
    /// [`Stage::check_inputs`].
    fn check_inputs(&self) -> Result<()>;
    /// [`Stage::amount`].
    fn amount(&self) -> String;
    /// [`Stage::run`].
    fn run(&self, job: &Job) -> Result<Outcome>;
    /// The settings, as JSON with all keys.
    fn settings(&self) -> Value;
    /// The inputs that are set: key and what it names.
    fn inputs(&self) -> Vec<(&'static str, String)>;
    /// The settings that decide what is made: without inputs and run-time keys.
    fn identity(&self) -> Value;
}

impl<S: Stage> AnyStage for S {
    fn name(&self) -> &'static str {
        S::NAME
    }
    fn revision(&self) -> u32 {
        S::REVISION
    }
    fn validate(&self) -> Result<()> {
        Stage::validate(self)
    }
    fn check_inputs(&self) -> Result<()> {
        Stage::check_inputs(self)
    }
    fn amount(&self) -> String {
        Stage::amount(self)
    }
    fn run(&self, job: &Job) -> Result<Outcome> {
        Stage::run(self, job)
    }
    fn settings(&self) -> Value {
        serde_json::to_value(self).unwrap_or(Value::Null)
    }
    fn inputs(&self) -> Vec<(&'static str, String)> {
        let settings = self.settings();
        let mut inputs = Vec::new();
        for &key in S::INPUTS {
            match &settings[key] {
                Value::String(s) => inputs.push((key, s.clone())),
                Value::Array(all) => {
                    inputs.extend(all.iter().filter_map(Value::as_str).map(|s| (key, s.to_owned())));
                }
                _ => {}
            }
        }
        inputs
    }
    fn identity(&self) -> Value {
        let mut settings = self.settings();
        if let Value::Object(map) = &mut settings {
            let input = |key: &str| S::INPUTS.contains(&key) && !S::KEEPS_NAMES;
            map.retain(|k, v| !v.is_null() && !input(k) && !S::RUNTIME.contains(&&**k));
        }
        settings
    }
}

/// The defaults of a stage: those of its flags. Written once, used by flags and TOML alike.
fn flag_defaults<S: Stage>() -> S {
    let command = S::augment_args(clap::Command::new(S::NAME).no_binary_name(true));
    let parsed =
        command.try_get_matches_from(std::iter::empty::<&str>()).and_then(|m| S::from_arg_matches(&m));
    parsed.unwrap_or_else(|e| panic!("every flag of {} has a default: {e}", S::NAME))
}

/// Gives each stage its `Default`: see [`flag_defaults`].
macro_rules! defaults_from_flags {
    ($($stage:ty),+) => {$(
        impl Default for $stage {
            fn default() -> Self {
                $crate::stage::flag_defaults()
            }
        }
    )+};
}
defaults_from_flags!(
    Arc,
    Certify,
    Curate,
    Evaluate,
    FitDiscriminator,
    FitGenerator,
    Generate,
    Import,
    Label,
    Materialize,
    Publish,
    Quality,
    Rank,
    Report,
    Score,
    Split,
    Train
);

/// The fingerprint of work: BLAKE3 over stage, identity, input fingerprints and format version, 64 hex digits.
pub fn fingerprint(stage: &dyn AnyStage, inputs: &[(&'static str, String)]) -> String {
    // serde_json's maps are sorted, so equal settings are equal text.
    let text = serde_json::json!({
        "format": FORMAT + stage.revision(),
        "stage": stage.name(),
        "settings": stage.identity(),
        "inputs": inputs,
    });
    blake3::hash(text.to_string().as_bytes()).to_hex().to_string()
}

/// The fingerprint of something that a stage reads: a stage's folder, another folder or file, a data source.
///
/// Fails with [`Error::Usage`] if it is the folder of a stage that is not finished.
pub fn input_fingerprint(input: &str) -> Result<String> {
    let path = Path::new(input);
    if path.join(CONFIG).is_file() {
        let config = read_config(path)?;
        if !path.join(DONE).is_file() {
            bail!(Usage, "input '{input}' is not finished; run its {} again first", config.stage);
        }
        return Ok(config.fingerprint);
    }
    if path.is_dir()
        && ["config.json", "model_index.json", "manifest.json"].iter().any(|f| path.join(f).is_file())
    {
        let mut hasher = blake3::Hasher::new();
        for file in files_below(path)? {
            let known = ["json", "safetensors", "parquet", "npz", "png", "jpg", "jpeg"];
            let extension = file.extension().map(|e| e.to_string_lossy().to_lowercase());
            if extension.is_some_and(|e| known.contains(&&*e)) {
                hasher.update(file.to_string_lossy().as_bytes());
                hasher.update(fs::hash_file(&path.join(&file))?.0.as_bytes());
            }
        }
        return Ok(hasher.finalize().to_hex().to_string());
    }
    let source: data::Source = input.parse().map_err(Error::Usage)?;
    source.fingerprint_all()
}

/// Whether `dir` is the folder of a stage, finished or not.
pub fn is_stage_folder(dir: &Path) -> bool {
    dir.join(CONFIG).is_file() && read_config(dir).is_ok()
}

/// All files below `dir`, relative to it, sorted; without hidden ones.
pub fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    fn walk(root: &Path, below: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
        let dir = root.join(below);
        for entry in std::fs::read_dir(&dir).map_err(Error::io(&dir))? {
            let entry = entry.map_err(Error::io(&dir))?;
            let relative = below.join(entry.file_name());
            if entry.file_name().to_string_lossy().starts_with('.') {
                continue;
            }
            if entry.file_type().map_err(Error::io(&dir))?.is_dir() {
                walk(root, &relative, files)?;
            } else {
                files.push(relative);
            }
        }
        Ok(())
    }
    let mut files = Vec::new();
    walk(dir, Path::new(""), &mut files)?;
    files.sort();
    Ok(files)
}

/// `config.toml` of a stage's folder: what is computed there.
#[derive(Debug, Serialize, Deserialize)]
pub struct FolderConfig {
    /// `proxyset.config/1`.
    pub schema: String,
    /// [`Stage::NAME`].
    pub stage: String,
    /// See [`fingerprint`].
    pub fingerprint: String,
    /// What the stage reads: key, name and fingerprint.
    #[serde(default)]
    pub inputs: Vec<InputRecord>,
    /// All settings, defaults included.
    pub settings: toml::Table,
}

/// One input of a stage.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InputRecord {
    /// The configuration key.
    pub key: String,
    /// The folder or source.
    pub name: String,
    /// Its fingerprint.
    pub fingerprint: String,
}

/// `done.json` of a stage's folder: what was made there.
#[derive(Debug, Serialize, Deserialize)]
pub struct Done {
    /// `proxyset.done/1`.
    pub schema: String,
    /// [`Stage::NAME`].
    pub stage: String,
    /// See [`fingerprint`].
    pub fingerprint: String,
    /// The class of machine that finished it.
    pub device_class: String,
    /// The program's version.
    pub version: String,
    /// Seconds of the run that finished it; earlier, interrupted runs are not in it.
    pub seconds: f64,
    /// The stage's own figures.
    pub summary: Value,
    /// Every file of the folder.
    pub files: Vec<FileRecord>,
    /// The BLAKE3 of this file with an empty seal: it vouches for the others, this vouches for it.
    #[serde(default)]
    pub seal: String,
}

/// [`Done::seal`] of a record's `text`, in which `found` is the seal.
fn seal(text: &str, found: &str) -> String {
    let unsealed = text.replacen(&format!(r#""seal": "{found}""#), r#""seal": """#, 1);
    blake3::hash(unsealed.as_bytes()).to_hex().to_string()
}

/// One file, as it was written.
#[derive(Debug, Serialize, Deserialize)]
pub struct FileRecord {
    /// Relative to the folder, with `/`.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// Its hash.
    pub blake3: String,
}

/// Reads a stage folder's `config.toml`.
pub fn read_config(dir: &Path) -> Result<FolderConfig> {
    let path = dir.join(CONFIG);
    let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
    toml::from_slice(&bytes)
        .map_err(|e| Error::Data(format!("{}: not a stage's configuration: {e}", path.display())))
}

/// A stage folder's `done.json`, if the stage is finished.
pub fn read_done(dir: &Path) -> Result<Option<Done>> {
    let path = dir.join(DONE);
    if path.is_file() { fs::read_json(&path).map(Some) } else { Ok(None) }
}

/// An input folder that must be the finished work of stage `S`.
///
/// Fails with [`Error::Usage`] if it is missing, of another stage, or not finished.
fn finished_input<S: Stage>(key: &str, dir: Option<&Path>) -> Result<PathBuf> {
    finished_one_of(key, dir, &[S::NAME])
}

/// An input folder that must be the finished work of one of some stages; see [`finished_input`].
fn finished_one_of(key: &str, dir: Option<&Path>, stages: &[&str]) -> Result<PathBuf> {
    let expected = stages.join(" or ");
    let Some(dir) = dir else {
        bail!(Usage, "{key} is not set, expected the folder of a finished {expected}")
    };
    if !dir.join(CONFIG).is_file() {
        bail!(Usage, "{key} is '{}', expected the folder of a finished {expected}", dir.display());
    }
    let config = read_config(dir)?;
    if !stages.contains(&&*config.stage) {
        bail!(
            Usage,
            "{key} is '{}', a folder of {}; expected one of {expected}",
            dir.display(),
            config.stage
        );
    }
    if read_done(dir)?.is_none() {
        bail!(
            Usage,
            "{key} is '{}', which is not finished; run its {} again first",
            dir.display(),
            config.stage
        );
    }
    Ok(dir.to_path_buf())
}

/// The fingerprint of what the stage in `dir` was given as `key`.
fn input_of(dir: &Path, key: &str) -> Result<Option<String>> {
    let inputs = read_config(dir)?.inputs;
    Ok(inputs.into_iter().find(|input| input.key == key).map(|input| input.fingerprint))
}

/// Fails with [`Error::Usage`] unless the stage in `dir`, the input `name`, was itself made with `input` as its `key`.
fn expect_made_with(name: &str, dir: &Path, key: &str, input: &Path) -> Result<()> {
    expect_same_input(name, dir, key, input_of(dir, key)?.as_deref(), input)
}

/// Fails with [`Error::Usage`] unless what `dir`, the input `name`, was made with as its `key` is `input`, by fingerprint.
fn expect_same_input(name: &str, dir: &Path, key: &str, found: Option<&str>, input: &Path) -> Result<()> {
    let given = read_config(input)?.fingerprint;
    if found != Some(&given) {
        let short = |fingerprint: &str| fingerprint.chars().take(8).collect::<String>();
        bail!(
            Usage,
            "{name} is '{}', which was made with {key} {}, expected {}, that of '{}': give that one, or make {name} again",
            dir.display(),
            found.map_or_else(|| "unknown".into(), short),
            short(&given),
            input.display()
        );
    }
    Ok(())
}

/// What became of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Nothing is there.
    Missing,
    /// Begun, not finished.
    Partial,
    /// Finished.
    Done,
}

/// The state of the folder `dir` for work with `fingerprint`.
///
/// Fails with [`Error::Usage`] if the folder holds anything else.
pub fn state(dir: &Path, fingerprint: &str) -> Result<State> {
    if dir.join(CONFIG).is_file() {
        let config = read_config(dir)?;
        if config.fingerprint != fingerprint {
            bail!(
                Usage,
                "{} holds another run: {} with fingerprint {}, expected {}; choose another folder",
                dir.display(),
                config.stage,
                &config.fingerprint[..8.min(config.fingerprint.len())],
                &fingerprint[..8]
            );
        }
        return Ok(if dir.join(DONE).is_file() { State::Done } else { State::Partial });
    }
    let foreign = dir.is_dir() && !files_below(dir)?.is_empty();
    if foreign || (dir.exists() && !dir.is_dir()) {
        bail!(
            Usage,
            "{} holds something that is not a run of this program; choose another folder",
            dir.display()
        );
    }
    Ok(State::Missing)
}

/// Runs `stage` into `out`, or finds it done. Returns the summary and the fingerprint.
pub fn execute(
    stage: &dyn AnyStage,
    inputs: &[(&'static str, String)],
    out: &Path,
    device: DeviceChoice,
) -> Result<Value> {
    stage.validate()?;
    // TOML's integers are signed.
    if let Some(seed) = stage.settings()["seed"].as_u64().filter(|&seed| seed > i64::MAX as u64) {
        bail!(Usage, "seed is {seed}, expected at most {}", i64::MAX);
    }
    let fingerprint = fingerprint(stage, inputs);
    if state(out, &fingerprint)? == State::Done
        && let Some(done) = read_done(out)?
    {
        return Ok(done.summary);
    }
    let device = device.open()?;
    let job = Job {
        device_class: device_class(&device),
        device,
        config: config_text(stage, &fingerprint, inputs)?,
        fingerprint,
        out: out.to_path_buf(),
    };
    let started = Instant::now();
    match stage.run(&job)? {
        Outcome::Partial(summary) => Ok(summary),
        Outcome::Done(summary) => {
            let mut files = Vec::new();
            // Another process that made the last shard with us may have written its record of the same work.
            for file in files_below(out)?.into_iter().filter(|file| file != Path::new(DONE)) {
                let (blake3, bytes) = fs::hash_file(&out.join(&file))?;
                files.push(FileRecord { path: file.to_string_lossy().into_owned(), bytes, blake3 });
            }
            let mut done = Done {
                schema: "proxyset.done/1".into(),
                stage: stage.name().into(),
                fingerprint: job.fingerprint,
                device_class: job.device_class,
                version: env!("CARGO_PKG_VERSION").into(),
                seconds: started.elapsed().as_secs_f64(),
                summary,
                files,
                seal: String::new(),
            };
            done.seal = seal(&fs::json_text(&out.join(DONE), &done)?, "");
            fs::publish_json(&out.join(DONE), &done)?;
            remove_hidden(out)?;
            Ok(done.summary)
        }
    }
}

/// Removes the checkpoints and parts of a stage that is done.
fn remove_hidden(out: &Path) -> Result<()> {
    for entry in std::fs::read_dir(out).map_err(Error::io(out))? {
        let path = entry.map_err(Error::io(out))?.path();
        if path.is_dir() && path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.')) {
            fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}

fn config_text(stage: &dyn AnyStage, fingerprint: &str, inputs: &[(&'static str, String)]) -> Result<String> {
    let mut settings = stage.settings();
    if let Value::Object(map) = &mut settings {
        map.retain(|_, value| !value.is_null()); // TOML has no null: what is not set is not written
    }
    let settings = toml::Table::try_from(settings)
        .map_err(|e| Error::Alarm(format!("settings of {} cannot be written as TOML: {e}", stage.name())))?;
    let config = FolderConfig {
        schema: "proxyset.config/1".into(),
        stage: stage.name().into(),
        fingerprint: fingerprint.into(),
        inputs: stage
            .inputs()
            .into_iter()
            .zip(inputs)
            .map(|((key, name), (_, fingerprint))| InputRecord {
                key: key.into(),
                name,
                fingerprint: fingerprint.clone(),
            })
            .collect(),
        settings,
    };
    toml::to_string(&config).map_err(|e| Error::Alarm(format!("configuration cannot be written: {e}")))
}

/// Verifies every file of a finished stage's folder against `done.json`. Returns the problems found.
pub fn verify_files(dir: &Path, done: &Done) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    let record = dir.join(DONE);
    let text = std::fs::read_to_string(&record).map_err(Error::io(&record))?;
    if seal(&text, &done.seal) != done.seal {
        problems.push(format!("{}: its bytes are not those that its seal is of", record.display()));
    }
    for file in &done.files {
        let path = dir.join(&file.path);
        match fs::hash_file(&path) {
            Err(_) => problems.push(format!("{}: missing", path.display())),
            Ok((hash, bytes)) if hash != file.blake3 => problems.push(format!(
                "{}: {bytes} bytes with BLAKE3 {}, expected {} bytes with {}",
                path.display(),
                &hash[..16],
                file.bytes,
                file.blake3.get(..16).unwrap_or_default(),
            )),
            Ok(_) => {}
        }
    }
    let listed: std::collections::BTreeSet<&str> = done.files.iter().map(|f| &*f.path).collect();
    for file in files_below(dir)? {
        let name = file.to_string_lossy();
        if name != DONE && !listed.contains(&*name) {
            problems.push(format!("{}: not in {DONE}", dir.join(&file).display()));
        }
    }
    Ok(problems)
}

/// How old the last saved state of long work may be: what a kill can lose. 20 s, or `PROXYSET_CHECKPOINT_SECONDS`.
fn checkpoint_interval() -> std::time::Duration {
    let set = std::env::var("PROXYSET_CHECKPOINT_SECONDS").ok().and_then(|s| s.parse().ok());
    std::time::Duration::from_secs(set.unwrap_or(20))
}

/// Counts by name, in name order.
type Counts = BTreeMap<String, u64>;

/// A list, or one thing that stands for a list of it: what a TOML key or a flag may give.
fn one_or_many<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Vec<PathBuf>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Given {
        One(PathBuf),
        Many(Vec<PathBuf>),
    }
    Ok(match Given::deserialize(deserializer)? {
        Given::One(one) => vec![one],
        Given::Many(many) => many,
    })
}

/// Refuses a number outside a range, naming key, value and range.
fn expect<T: PartialOrd + std::fmt::Display>(key: &str, value: T, min: T, max: T) -> Result<()> {
    if value >= min && value <= max {
        return Ok(());
    }
    bail!(Usage, "{key} is {value}, expected {min} to {max}")
}

/// Refuses images that the classifier in `dir` does not take. `what`: whose images they are.
fn expect_images(
    classifier: &Classifier,
    dir: &Path,
    what: &dyn std::fmt::Display,
    shape: data::Shape,
) -> Result<()> {
    let taken = classifier.config().architecture.image_shape();
    if taken != (shape.height, shape.width, shape.channels) {
        bail!(
            Data,
            "classifier {} takes {taken:?} images (height, width, channels), but {what} has {shape}",
            dir.display()
        );
    }
    Ok(())
}

/// A classifier, and the data that it is measured on.
struct Examined<'a> {
    dir: &'a Path,
    classifier: Classifier,
    data: data::Dataset,
}

impl<'a> Examined<'a> {
    /// Reads both. They must fit: size of the images, number and names of the classes.
    fn load(
        model: Option<&'a Path>,
        source: &data::Source,
        split: data::Split,
        limit: Option<usize>,
        max_bad: usize,
        device: &Device,
    ) -> Result<Self> {
        let Some(dir) = model else { bail!(Usage, "model is not set, expected the folder of a classifier") };
        let classifier = Classifier::load(dir, device)?;
        let data = source.load(split, limit, max_bad)?;
        expect_images(&classifier, dir, source, data.shape)?;
        let (known, named) = (&classifier.config().class_names, &data.class_names);
        if known.len() < 2 {
            bail!(Data, "classifier {} knows {} classes, expected at least 2", dir.display(), known.len());
        }
        if known.len() != named.len() {
            bail!(
                Data,
                "classifier {} knows {} classes, but {source} has {}",
                dir.display(),
                known.len(),
                named.len()
            );
        }
        if let Some(i) = (0..known.len()).find(|&i| known[i] != named[i]) {
            bail!(
                Data,
                "class {i} is '{}' to classifier {}, but '{}' in {source}; expected the same names in the same order",
                known[i],
                dir.display(),
                named[i]
            );
        }
        Ok(Self { dir, classifier, data })
    }

    /// What was read, for the record: the source, its split, the BLAKE3 of its files and the rows left out.
    fn data_record(&self, source: &data::Source, split: data::Split) -> Result<Value> {
        Ok(serde_json::json!({
            "source": source,
            "split": split,
            "blake3": source.fingerprint(split)?,
            "bad_rows": self.data.bad_rows,
        }))
    }

    /// The BLAKE3 of the classifier's weights.
    fn model_blake3(&self) -> Result<String> {
        Ok(fs::hash_file(&self.dir.join("model.safetensors"))?.0)
    }
}

/// Refuses channels of a network's stages that its norms cannot divide into `groups`.
fn expect_channels(channels: &[usize], groups: usize) -> Result<()> {
    expect("groups", groups, 1, 4096)?;
    if channels.is_empty() || channels.iter().any(|c| *c == 0 || !c.is_multiple_of(groups)) {
        bail!(Usage, "channels is {channels:?}, expected multiples of groups = {groups}");
    }
    Ok(())
}

/// A note on stderr, prefixed with the stage's name.
fn note<S: Stage>(_: &S, line: &str) {
    progress::note(&format!("{}: {line}", S::NAME));
}
