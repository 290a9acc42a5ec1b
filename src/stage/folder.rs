//! A stage's folder: what is computed there, what was made, and whether that is unchanged.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, Result, fs};

pub(super) const CONFIG: &str = "config.toml";
pub(super) const DONE: &str = "done.json";

/// Whether `dir` is the folder of a stage, finished or not.
pub fn is_stage_folder(dir: &Path) -> bool {
    dir.join(CONFIG).is_file() && read_config(dir).is_ok()
}

/// `config.toml` in a stage's folder: what is computed there.
#[derive(Debug, Serialize, Deserialize)]
pub struct FolderConfig {
    /// `proxyset.config/1`.
    pub schema: String,
    /// [`Stage::NAME`](super::Stage::NAME).
    pub stage: String,
    /// See [`fingerprint`](fn@super::fingerprint).
    pub fingerprint: String,
    /// The stage's inputs: key, name and fingerprint.
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

/// `done.json` in a stage's folder: what was made there.
#[derive(Debug, Serialize, Deserialize)]
pub struct Done {
    /// `proxyset.done/1`.
    pub schema: String,
    /// [`Stage::NAME`](super::Stage::NAME).
    pub stage: String,
    /// See [`fingerprint`](fn@super::fingerprint).
    pub fingerprint: String,
    /// The class of machine that finished it.
    pub device_class: String,
    /// The program's version.
    pub version: String,
    /// Seconds taken by the run that finished it, without earlier, interrupted runs.
    pub seconds: f64,
    /// The stage's own figures.
    pub summary: Value,
    /// Every file in the folder.
    pub files: Vec<FileRecord>,
    /// The BLAKE3 hash of this file with an empty seal: the file vouches for the others, and the seal for the file.
    #[serde(default)]
    pub seal: String,
}

/// The [`Done::seal`] for a record's `text`, in which `found` stands as the seal.
pub(super) fn seal(text: &str, found: &str) -> String {
    let unsealed = text.replacen(&format!(r#""seal": "{found}""#), r#""seal": """#, 1);
    blake3::hash(unsealed.as_bytes()).to_hex().to_string()
}

/// A file as it was written.
#[derive(Debug, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its path relative to the folder, with `/`.
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

/// The state of a stage's folder.
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
    let folder = dir.display();
    if dir.join(CONFIG).is_file() {
        let config = read_config(dir)?;
        if config.fingerprint != fingerprint {
            let [found, expected] = [&*config.fingerprint, fingerprint].map(|hash| fs::short(hash, 8));
            bail!(
                Usage,
                "{folder} holds another run: {} with fingerprint {found}, expected {expected}; choose another folder",
                config.stage
            );
        }
        return Ok(if dir.join(DONE).is_file() { State::Done } else { State::Partial });
    }
    let foreign = dir.is_dir() && !fs::files_below(dir)?.is_empty();
    if foreign || (dir.exists() && !dir.is_dir()) {
        bail!(Usage, "{folder} holds something that is not a run of this program; choose another folder");
    }
    Ok(State::Missing)
}

/// Verifies every file in a finished stage's folder against `done.json`. Returns the problems found.
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
            Err(e) if e.is_not_found() => problems.push(format!("{}: missing", path.display())),
            Err(e) => problems.push(format!("cannot be read: {e}")),
            Ok((hash, bytes)) if hash != file.blake3 => problems.push(format!(
                "{}: {bytes} bytes with BLAKE3 {}, expected {} bytes with {}",
                path.display(),
                fs::short(&hash, 16),
                file.bytes,
                fs::short(&file.blake3, 16),
            )),
            Ok(_) => {}
        }
    }
    let listed: std::collections::BTreeSet<&str> = done.files.iter().map(|f| &*f.path).collect();
    for file in fs::files_below(dir)? {
        let name = file.to_string_lossy();
        if name != DONE && !listed.contains(&*name) {
            problems.push(format!("{}: not in {DONE}", dir.join(&file).display()));
        }
    }
    Ok(problems)
}
