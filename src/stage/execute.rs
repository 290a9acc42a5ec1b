//! Doing a stage's work in its folder.

use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Instant,
};

use candle_core::Device;
use serde_json::Value;

use super::{
    AnyStage, Done, FileRecord, FolderConfig, InputRecord, Outcome, State,
    fingerprint::fingerprint,
    folder::{CONFIG, DONE, read_done, seal, state},
};
use crate::{
    Error, Result,
    device::{DeviceChoice, device_class},
    fs,
};

/// The lock on all of a stage's folder; see [`Job::open`].
const WHOLE: &str = "run";

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
    /// The lock, which is held until `done.json` is written, and whether it is on a share alone.
    lock: OnceLock<(fs::Lock, bool)>,
}

impl Job {
    /// Makes the output folder if need be, locks all of it until the work is done, removes what dead writers left in it,
    /// and returns it.
    ///
    /// The first thing that a stage writes; until then a failure leaves nothing behind.
    pub fn open(&self) -> Result<&Path> {
        let out = self.open_share(WHOLE)?;
        fs::remove_leftovers(out, &|_| true)?;
        Ok(out)
    }

    /// [`Job::open`] for one of several processes that share the work: locks the share of this name alone. Who locks a
    /// share looks after what dead writers left of it.
    pub fn open_share(&self, share: &str) -> Result<&Path> {
        fs::create_dir_all(&self.out)?;
        let lock = fs::Lock::acquire(&self.out, share)?;
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
        if self.lock.set((lock, share != WHOLE)).is_err() {
            bail!(Alarm, "{}: opened twice", self.out.display());
        }
        Ok(&self.out)
    }

    /// The hidden folder of unfinished work `name` in `dir`. Work of one device class is not gone on with by another.
    pub fn hidden(&self, dir: &Path, name: &str) -> PathBuf {
        dir.join(format!(".{name}.{}", self.device_class))
    }

    /// Writes `done.json`, and removes what is not needed any more.
    fn finish(&self, stage: &dyn AnyStage, summary: Value, seconds: f64) -> Result<Value> {
        let out = &self.out;
        // Of several processes that share the work one finishes it; the others find it finished.
        let shared = self.lock.get().is_some_and(|(_, shared)| *shared);
        let _whole = shared.then(|| fs::Lock::wait(out, WHOLE)).transpose()?;
        if let Some(done) = read_done(out)? {
            return Ok(done.summary);
        }
        let mut files = Vec::new();
        for file in fs::files_below(out)? {
            let (blake3, bytes) = fs::hash_file(&out.join(&file))?;
            files.push(FileRecord { path: file.to_string_lossy().into_owned(), bytes, blake3 });
        }
        let mut done = Done {
            schema: "proxyset.done/1".into(),
            stage: stage.name().into(),
            fingerprint: self.fingerprint.clone(),
            device_class: self.device_class.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            seconds,
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

/// Runs `stage` into `out`, or finds it done. Returns the summary.
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
        lock: OnceLock::new(),
    };
    let started = Instant::now();
    match stage.run(&job)? {
        Outcome::Partial(summary) => Ok(summary),
        Outcome::Done(summary) => job.finish(stage, summary, started.elapsed().as_secs_f64()),
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
    let settings = toml::Table::try_from(stage.settings())
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
