//! Which of cuDNN's algorithms a convolution uses: measured once and recorded, because different algorithms give
//! different bits.
//!
//! A machine's choices are in the user's cache folder. Work that several machines may share has its own choices in
//! its folder, and whoever continues it uses those.

#[cfg(feature = "cuda")]
use std::sync::{Mutex, PoisonError};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use crate::{Result, fs};

/// cuDNN's number of the algorithm, by the name of the convolution.
type Choices = BTreeMap<String, u32>;

/// The choices known to this process, by device class.
struct Known {
    machine: BTreeMap<String, Choices>,
    /// The choices of the current work, if it keeps them in its folder.
    work: Option<(PathBuf, BTreeMap<String, Choices>)>,
}

#[cfg(feature = "cuda")]
static KNOWN: Mutex<Known> = Mutex::new(Known { machine: BTreeMap::new(), work: None });

/// From now on, takes choices from `folder`, file `algorithms-CLASS.json`, and records new ones there; with `None`,
/// uses those of the machine.
#[cfg(feature = "cuda")]
pub(super) fn keep_in(folder: Option<&Path>) {
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    known.work = folder.map(|folder| (folder.to_path_buf(), BTreeMap::new()));
}

/// The algorithm of the convolution `name` on devices of this class: the one chosen before, by any process, or the
/// one that `measure` returns now.
///
/// Without a cache folder, the machine's choices last as long as the process. Fails if the work's folder cannot be
/// read or written.
#[cfg(feature = "cuda")]
pub(super) fn choose(
    class: &str,
    name: &str,
    measure: impl FnOnce() -> candle_core::Result<u32>,
) -> candle_core::Result<u32> {
    // Held during the measurement, so that no other thread makes a different choice.
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    known.choose(cache().as_deref(), class, name, measure).map_err(|e| match e {
        crate::Error::Tensor(e) => e,
        e => candle_core::Error::wrap(e),
    })
}

impl Known {
    fn choose(
        &mut self,
        cache: Option<&Path>,
        class: &str,
        name: &str,
        measure: impl FnOnce() -> candle_core::Result<u32>,
    ) -> Result<u32> {
        let Some((folder, choices)) = &mut self.work else {
            return of_machine(&mut self.machine, cache, class, name, measure);
        };
        let choices = choices.entry(class.to_owned()).or_default();
        if let Some(&algorithm) = choices.get(name) {
            return Ok(algorithm);
        }
        // Held during the measurement, so that no other process makes a different choice.
        let _lock = fs::Lock::wait(folder, LOCK)?;
        let file = file_in(folder, class);
        if file.is_file() {
            choices.extend(fs::read_json::<Choices>(&file)?);
        }
        if let Some(&algorithm) = choices.get(name) {
            return Ok(algorithm);
        }
        let algorithm = of_machine(&mut self.machine, cache, class, name, measure)?;
        choices.insert(name.to_owned(), algorithm);
        fs::publish_json(&file, choices)?;
        Ok(algorithm)
    }
}

const LOCK: &str = "algorithms";

fn file_in(folder: &Path, class: &str) -> PathBuf {
    folder.join(format!("algorithms-{class}.json"))
}

/// The algorithm that this machine chose before, or chooses now.
fn of_machine(
    known: &mut BTreeMap<String, Choices>,
    cache: Option<&Path>,
    class: &str,
    name: &str,
    measure: impl FnOnce() -> candle_core::Result<u32>,
) -> Result<u32> {
    let choices = known.entry(class.to_owned()).or_default();
    if let Some(&algorithm) = choices.get(name) {
        return Ok(algorithm);
    }
    let lock = cache.and_then(|folder| {
        fs::create_dir_all(folder).ok()?;
        fs::Lock::wait(folder, LOCK).ok()
    });
    let file = cache.filter(|_| lock.is_some()).map(|folder| file_in(folder, class));
    if let Some(file) = &file {
        // A file that cannot be read is replaced.
        choices.extend(fs::read_json::<Choices>(file).unwrap_or_default());
    }
    if let Some(&algorithm) = choices.get(name) {
        return Ok(algorithm);
    }
    let algorithm = measure()?;
    choices.insert(name.to_owned(), algorithm);
    if let Some(file) = &file {
        // If it cannot be kept, the next process measures again.
        let _ = fs::publish_json(file, choices);
    }
    Ok(algorithm)
}

/// The user's cache folder (XDG Base Directory Specification).
#[cfg(feature = "cuda")]
fn cache() -> Option<PathBuf> {
    let named = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    Some(named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache")))?.join("proxyset"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alone() -> Known {
        Known { machine: BTreeMap::new(), work: None }
    }

    #[test]
    fn a_choice_is_made_once_and_outlives_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let choose = |known: &mut Known, class: &str, measured: u32| {
            known.choose(Some(dir.path()), class, "a", || Ok(measured)).unwrap()
        };
        let mut known = alone();
        assert_eq!((choose(&mut known, "one", 3), choose(&mut known, "one", 4)), (3, 3));
        assert_eq!(choose(&mut known, "two", 5), 5, "another class has its own");
        assert_eq!(choose(&mut alone(), "one", 7), 3, "what another process chose");
        let mut known = alone();
        assert!(known.choose(None, "one", "a", || candle_core::bail!("nothing fits")).is_err());
        assert_eq!(known.choose(None, "one", "a", || Ok(2)).unwrap(), 2);
    }

    #[test]
    fn machines_that_work_in_one_folder_take_its_choices_and_keep_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let folder = |name: &str| {
            let folder = dir.path().join(name);
            fs::create_dir_all(&folder).unwrap();
            folder
        };
        let pool = folder("pool");
        let choose = |known: &mut Known, machine: &str, name: &str, measured: u32| {
            known.choose(Some(&folder(machine)), "class", name, || Ok(measured)).unwrap()
        };
        let at_work = || Known { work: Some((pool.clone(), BTreeMap::new())), ..alone() };
        let (mut first, mut second) = (at_work(), at_work());
        assert_eq!(choose(&mut alone(), "second", "a", 5), 5);
        assert_eq!(choose(&mut first, "first", "a", 3), 3);
        assert_eq!(choose(&mut second, "second", "a", 6), 3, "those of the folder come first");
        assert_eq!(choose(&mut second, "second", "b", 7), 7);
        assert_eq!(choose(&mut first, "first", "b", 8), 7, "whichever machine made them");
        assert_eq!(choose(&mut alone(), "second", "a", 6), 5, "elsewhere the machine has its own");
        assert_eq!(
            fs::read_json::<Choices>(&pool.join("algorithms-class.json")).unwrap(),
            Choices::from([("a".into(), 3), ("b".into(), 7)])
        );
        fs::publish(&pool.join("algorithms-class.json"), b"{").unwrap();
        let damaged = at_work().choose(None, "class", "a", || Ok(1));
        assert_eq!(damaged.unwrap_err().exit_code(), 65, "never measured again");
    }
}
