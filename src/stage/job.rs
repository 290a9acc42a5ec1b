//! What a stage is given to work with: its folder, locked, and the device.

use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
};

use candle_core::Device;
use serde_json::Value;

use super::folder::{CONFIG, DONE, Done, FileRecord, State, read_done, seal, state};
use crate::{Error, Result, fs};

/// The lock on all of a stage's folder; see [`Job::open`].
const WHOLE: &str = "run";

/// What a stage is given to work with.
pub struct Job {
    /// The device on which tensors live.
    pub device: Device,
    /// The class of machines that compute the same bits; see [`device_class`](crate::device::device_class).
    pub device_class: String,
    /// The fingerprint of the work: settings, inputs and format version.
    pub fingerprint: String,
    pub(super) out: PathBuf,
    pub(super) config: String,
    /// The lock, held until `done.json` is written, and whether it covers only a share of the work.
    pub(super) lock: OnceLock<(fs::Lock, bool)>,
}

impl Job {
    /// Makes the output folder if necessary, locks all of it until the work is done, removes what interrupted
    /// writers left in it, and returns it.
    ///
    /// The first thing that a stage writes; until then a failure leaves nothing behind.
    pub fn open(&self) -> Result<&Path> {
        let out = self.open_share(WHOLE)?;
        fs::remove_leftovers(out, &|_| true)?;
        Ok(out)
    }

    /// [`Job::open`] for one of several processes that share the work: locks only the share of this name. Whoever
    /// locks a share also cleans up what interrupted writers left of it.
    pub fn open_share(&self, share: &str) -> Result<&Path> {
        let folder = self.out.display();
        fs::create_dir_all(&self.out)?;
        let lock = fs::Lock::acquire(&self.out, share)?;
        // Another process may have changed the folder between our check and the lock.
        if state(&self.out, &self.fingerprint)? == State::Done {
            bail!(Stopped, "{folder}: another process has just finished this; run again to use it");
        }
        let path = self.out.join(CONFIG);
        if !path.exists() {
            fs::publish(&path, self.config.as_bytes())?;
        }
        if self.lock.set((lock, share != WHOLE)).is_err() {
            bail!(Alarm, "{folder}: opened twice");
        }
        Ok(&self.out)
    }

    /// The hidden folder in `dir` for the unfinished work `name`. Work begun on one device class is not continued
    /// on another.
    pub fn hidden(&self, dir: &Path, name: &str) -> PathBuf {
        dir.join(format!(".{name}.{}", self.device_class))
    }

    /// Writes `done.json`, and removes what is no longer needed.
    pub(super) fn finish(&self, stage: &str, summary: Value, seconds: f64) -> Result<Value> {
        let out = &self.out;
        // Of several processes that share the work, one finishes it and the others find it finished.
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
            stage: stage.into(),
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

#[cfg(test)]
impl Job {
    /// A job on the CPU for tests of part of a stage; the folder is never finished.
    pub(crate) fn scratch(out: PathBuf) -> Self {
        let fingerprint = "0".repeat(64);
        let config = format!("schema = ''\nstage = ''\nfingerprint = '{fingerprint}'\nsettings = {{}}\n");
        let (device, lock) = (Device::Cpu, OnceLock::new());
        Self { device, device_class: "cpu".into(), fingerprint, out, config, lock }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_stays_locked_until_its_record_is_written_and_the_job_is_over() {
        let dir = tempfile::tempdir().unwrap();
        let job = || Job::scratch(dir.path().join("out"));
        let (first, second) = (job(), job());
        let out = first.open().unwrap();
        fs::publish(&out.join(".parts.cpu/1"), b"unfinished").unwrap();
        fs::publish(&out.join("made"), b"made").unwrap();
        let code = |job: &Job| job.open().unwrap_err().exit_code();
        assert_eq!(code(&second), 75, "the stage has returned, its record is not there");
        first.finish("test", Value::Null, 1.0).unwrap();
        assert_eq!(code(&second), 75, "the first is not over");
        assert!(read_done(out).unwrap().is_some() && !out.join(".parts.cpu").exists());
        drop(first);
        let error = second.open().unwrap_err().to_string();
        assert!(error.contains("has just finished this"), "{error}");
    }

    #[test]
    fn of_processes_that_share_the_work_one_finishes_it_and_the_others_find_it_finished() {
        let dir = tempfile::tempdir().unwrap();
        let job = || Job::scratch(dir.path().join("out"));
        let (first, second) = (job(), job());
        let out = first.open_share("0-1").unwrap().to_path_buf();
        second.open_share("1-2").unwrap();
        first.finish("test", "first".into(), 1.0).unwrap();
        let record = std::fs::read(out.join(DONE)).unwrap();
        assert_eq!(second.finish("test", "second".into(), 1.0).unwrap(), "first");
        assert_eq!(std::fs::read(out.join(DONE)).unwrap(), record);
    }
}
