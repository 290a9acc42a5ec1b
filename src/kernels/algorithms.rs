//! Which of cuDNN's algorithms a convolution goes by: measured once on a machine, and written down, since another one gives
//! other bits.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Mutex, PoisonError},
};

use crate::fs;

/// By the name of a convolution cuDNN's number of the algorithm.
type Choices = BTreeMap<String, u32>;

/// By the class of the device.
static CHOICES: Mutex<BTreeMap<String, Choices>> = Mutex::new(BTreeMap::new());

/// The algorithm of the convolution `name` on devices of this class: what was chosen before, by whichever process, or what
/// `measure` says now.
///
/// Choices are in `algorithms-CLASS.json` in the user's folder of caches; without such a folder they are the process's.
#[cfg(feature = "cuda")]
pub(super) fn choose(
    class: &str,
    name: &str,
    measure: impl FnOnce() -> candle_core::Result<u32>,
) -> candle_core::Result<u32> {
    choose_in(cache().as_deref(), class, name, measure)
}

fn choose_in(
    folder: Option<&Path>,
    class: &str,
    name: &str,
    measure: impl FnOnce() -> candle_core::Result<u32>,
) -> candle_core::Result<u32> {
    // Held while it is measured: another thread must not come to another choice, nor another process.
    let mut all = CHOICES.lock().unwrap_or_else(PoisonError::into_inner);
    let choices = all.entry(class.to_owned()).or_default();
    if let Some(&algorithm) = choices.get(name) {
        return Ok(algorithm);
    }
    let lock = folder.and_then(|folder| {
        fs::create_dir_all(folder).ok()?;
        fs::Lock::wait(folder, "algorithms").ok()
    });
    let file =
        folder.filter(|_| lock.is_some()).map(|folder| folder.join(format!("algorithms-{class}.json")));
    if let Some(file) = &file {
        // One that cannot be read is made anew.
        choices.extend(fs::read_json::<Choices>(file).unwrap_or_default());
    }
    if let Some(&algorithm) = choices.get(name) {
        return Ok(algorithm);
    }
    let algorithm = measure()?;
    choices.insert(name.to_owned(), algorithm);
    if let Some(file) = &file {
        // What cannot be kept is measured again by the next process.
        let _ = fs::publish_json(file, choices);
    }
    Ok(algorithm)
}

/// The user's folder of caches (XDG Base Directory Specification).
#[cfg(feature = "cuda")]
fn cache() -> Option<std::path::PathBuf> {
    use std::path::PathBuf;
    let named = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    Some(named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache")))?.join("proxyset"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_is_made_once_and_outlives_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let choose =
            |class: &str, measured: u32| choose_in(Some(dir.path()), class, "a", || Ok(measured)).unwrap();
        assert_eq!((choose("test-one", 3), choose("test-one", 4)), (3, 3));
        assert_eq!(choose("test-two", 5), 5, "another class has its own");
        // What another process chose.
        fs::publish_json(&dir.path().join("algorithms-test-three.json"), &Choices::from([("a".into(), 7)]))
            .unwrap();
        assert_eq!(choose("test-three", 1), 7);
        let failed = choose_in(None, "test-four", "a", || candle_core::bail!("nothing fits"));
        assert!(failed.is_err());
        assert_eq!(choose_in(None, "test-four", "a", || Ok(2)).unwrap(), 2);
    }
}
