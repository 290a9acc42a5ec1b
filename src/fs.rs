//! Files that are either complete or do not exist.
//!
//! [`publish`] is the only way in which this crate gives a file its final name: the file is written under another
//! name on the same mount, fsynced and renamed, and the folder is fsynced ([`rename`]). A reader that sees the name
//! sees all of the bytes, even after `kill -9` or a power cut.

use std::{
    fs::{self, File},
    io::{Read, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use crate::{Error, Result};

/// The extension of files being written. If their process dies they are never read, and are removed on resume.
const ASIDE: &str = "partial-write";

/// Writes `path` through `write`: all of it or nothing.
///
/// The file is written next to its final name, fsynced and renamed to `path`, and the folder is fsynced. Missing
/// parent folders are created. Fails with [`Error::Io`], naming the file; `path` is then unchanged.
pub fn publish_with(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    static NONCE: AtomicU64 = AtomicU64::new(0);
    let parent = parent_of(path);
    create_dir_all(parent)?;
    let nonce = NONCE.fetch_add(1, Ordering::Relaxed);
    // Processes on several machines may share a folder, so neither pid nor counter tells writers apart.
    let random =
        getrandom::u64().map_err(|e| Error::Alarm(format!("no random numbers from the system: {e}")))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = parent.join(format!(".{name}.{random:016x}-{nonce}.{ASIDE}"));
    let written = (|| {
        let mut file = File::create_new(&aside).map_err(Error::io(path))?;
        write(&mut file)?;
        file.sync_all().map_err(Error::io(path))?;
        rename(&aside, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&aside);
    }
    written
}

/// Renames a complete file within its folder, replacing any file of that name, and fsyncs the folder.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(Error::io(to))?;
    sync_dir(parent_of(to))
}

/// Writes `bytes` to `path`, all or nothing; see [`publish_with`].
pub fn publish(path: &Path, bytes: &[u8]) -> Result<()> {
    publish_with(path, |file| file.write_all(bytes).map_err(Error::io(path)))
}

/// Writes `value` as indented JSON with a final newline, all or nothing.
pub fn publish_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    publish(path, json_text(path, value)?.as_bytes())
}

/// What [`publish_json`] writes.
pub fn json_text(path: &Path, value: &impl serde::Serialize) -> Result<String> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Error::Alarm(format!("{}: cannot be written as JSON: {e}", path.display())))?;
    Ok(text + "\n")
}

/// Reads JSON. A file that does not parse is [`Error::Data`].
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::Data(format!("{}: not the JSON that was expected: {e}", path.display())))
}

/// A value that is written as JSON to a file with a fixed name.
pub trait Record: serde::Serialize + serde::de::DeserializeOwned {
    /// The file's name.
    const FILE: &'static str;

    /// Reads the file in a folder; see [`read_json`].
    fn read(dir: &Path) -> Result<Self> {
        read_json(&dir.join(Self::FILE))
    }

    /// Reads the file in a folder; `None` if there is none.
    fn read_if_there(dir: &Path) -> Result<Option<Self>> {
        if dir.join(Self::FILE).is_file() { Self::read(dir).map(Some) } else { Ok(None) }
    }

    /// Writes the file to a folder, all or nothing.
    fn write(&self, dir: &Path) -> Result<()> {
        publish_json(&dir.join(Self::FILE), self)
    }
}

/// Reads a whole file of text. Fails with [`Error::Io`], or with [`Error::Data`] if it is not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    String::from_utf8(bytes).map_err(|_| Error::Data(format!("{}: not a text in UTF-8", path.display())))
}

/// Creates a folder and its parents, each of them durably.
pub fn create_dir_all(dir: &Path) -> Result<()> {
    if dir.as_os_str().is_empty() || dir.is_dir() {
        return Ok(());
    }
    create_dir_all(parent_of(dir))?;
    match fs::create_dir(dir) {
        Ok(()) => sync_dir(parent_of(dir)),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        Err(e) => Err(Error::io(dir)(e)),
    }
}

/// Removes what interrupted writers left behind in `dir` and the folders in it: files whose final names are `ours`.
/// Call it only while holding the lock on them.
pub fn remove_leftovers(dir: &Path, ours: &dyn Fn(&str) -> bool) -> Result<()> {
    each_file(dir, true, &mut |path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if final_name(&name).is_some_and(ours) {
            fs::remove_file(&path).map_err(Error::io(&path))?;
        }
        Ok(())
    })
}

/// The final name of a file being written: `a.json` for `.a.json.123-4.partial-write`.
fn final_name(aside: &str) -> Option<&str> {
    let (name, _writer) =
        aside.strip_prefix('.')?.strip_suffix(ASIDE)?.strip_suffix('.')?.rsplit_once('.')?;
    Some(name)
}

/// All files below `dir` except hidden ones, relative to it and sorted.
pub fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    each_file(dir, false, &mut |path| {
        files.push(path.strip_prefix(dir).unwrap_or(&path).to_path_buf());
        Ok(())
    })?;
    files.sort();
    Ok(files)
}

/// Calls `visit` for every file below `dir`; for hidden files, and those in hidden folders, only if `hidden`.
pub fn each_file(dir: &Path, hidden: bool, visit: &mut dyn FnMut(PathBuf) -> Result<()>) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let entry = entry.map_err(Error::io(dir))?;
        let path = entry.path();
        if !hidden && entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        if entry.file_type().map_err(Error::io(&path))?.is_dir() {
            each_file(&path, hidden, visit)?;
        } else {
            visit(path)?;
        }
    }
    Ok(())
}

/// Removes a folder and everything in it; a folder that does not exist is fine.
pub fn remove_dir_all(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(dir)(e)),
        _ => Ok(()),
    }
}

/// The BLAKE3 hash of a file's bytes, in hexadecimal, and their number; large files use all threads.
pub fn hash_file(path: &Path) -> Result<(String, u64)> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let mut hasher = blake3::Hasher::new();
    let size = file.metadata().map_err(Error::io(path))?.len();
    let mut buffer = vec![0; size.clamp(1 << 16, 1 << 24) as usize];
    let mut total = 0;
    loop {
        let n = file.read(&mut buffer).map_err(Error::io(path))?;
        if n == 0 {
            return Ok((hasher.finalize().to_hex().to_string(), total));
        }
        hasher.update_rayon(&buffer[..n]);
        total += n as u64;
    }
}

/// The first `n` characters of a hash, for display. A shorter text is returned whole, because a damaged file may
/// contain anything.
pub fn short(hash: &str, n: usize) -> String {
    hash.chars().take(n).collect()
}

/// The bytes of numbers, little-endian, for [`Parts`].
pub fn bytes_of(floats: &[f32]) -> Vec<u8> {
    floats.iter().flat_map(|f| f.to_le_bytes()).collect()
}

/// The numbers of [`bytes_of`].
pub fn floats_of(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// An exclusive lock on a folder, freed when the process ends, however it ends.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "the open file is the lock")] File);

impl Lock {
    /// Locks `dir`, which must exist. Fails at once with [`Error::Stopped`] if another process holds it.
    ///
    /// `name` distinguishes locks on one folder: writers of different shards may work side by side.
    pub fn acquire(dir: &Path, name: &str) -> Result<Self> {
        let (path, file) = Self::open(dir, name)?;
        match file.try_lock() {
            Ok(()) => Ok(Self(file)),
            Err(fs::TryLockError::WouldBlock) => {
                bail!(Stopped, "{}: another process is at work here; wait for it, or stop it", dir.display())
            }
            Err(fs::TryLockError::Error(e)) => Err(Error::io(&path)(e)),
        }
    }

    /// Like [`Lock::acquire`], but waits for another process that holds it.
    pub fn wait(dir: &Path, name: &str) -> Result<Self> {
        let (path, file) = Self::open(dir, name)?;
        file.lock().map_err(Error::io(&path))?;
        Ok(Self(file))
    }

    fn open(dir: &Path, name: &str) -> Result<(PathBuf, File)> {
        let path = dir.join(format!(".{name}.lock"));
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        file.map(|file| (path.clone(), file)).map_err(Error::io(&path))
    }
}

/// Parts of a unit of work that takes too long to lose, with one durable file per part.
///
/// A part is keyed by name and is a pure function of what the unit is made from, so a part that exists is done.
/// Call [`Parts::clear`] once the unit itself is published.
#[derive(Debug)]
pub struct Parts {
    dir: PathBuf,
}

impl Parts {
    /// Parts in `dir`, which is created with the first one.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The bytes of part `key`, if it was finished before.
    pub fn get(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let path = self.dir.join(key);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(&path)(e)),
        }
    }

    /// The bytes of part `key`: those kept before, or else those from `make`, which are kept if `keep`.
    pub fn get_or_make(
        &self,
        key: &str,
        keep: bool,
        make: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<Vec<u8>> {
        if let Some(bytes) = self.get(key)? {
            return Ok(bytes);
        }
        let bytes = make()?;
        if keep {
            self.put(key, &bytes)?;
        }
        Ok(bytes)
    }

    /// Keeps part `key`.
    pub fn put(&self, key: &str, bytes: &[u8]) -> Result<()> {
        publish(&self.dir.join(key), bytes)
    }

    /// Removes all parts.
    pub fn clear(&self) -> Result<()> {
        remove_dir_all(&self.dir)
    }
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(Error::io(dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn publish_replaces_whole_files_and_leaves_nothing_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/file");
        publish(&path, b"first").unwrap();
        publish(&path, b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        publish(&path, b"old").unwrap();
        let failed = publish_with(&path, |file| {
            file.write_all(b"half").map_err(Error::io(&path))?;
            bail!(Data, "stop here")
        });
        assert_eq!(failed.unwrap_err().exit_code(), 65);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_renamed_file_takes_the_place_of_another_and_a_missing_one_leaves_it() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("new"), dir.path().join("old"));
        publish(&from, b"new").unwrap();
        publish(&to, b"old").unwrap();
        rename(&from, &to).unwrap();
        assert_eq!((fs::read(&to).unwrap(), from.exists()), (b"new".to_vec(), false));
        assert_eq!(rename(&from, &to).unwrap_err().exit_code(), 74);
        assert_eq!(fs::read(&to).unwrap(), b"new");
    }

    #[test]
    fn leftovers_of_dead_writers_go_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        publish(&dir.path().join("kept.json"), b"x").unwrap();
        publish(&inner.join("kept.json"), b"x").unwrap();
        for name in ["kept.json", "theirs.json"] {
            fs::write(inner.join(format!(".{name}.1-2.{ASIDE}")), b"half").unwrap();
        }
        remove_leftovers(dir.path(), &|name| name == "kept.json").unwrap();
        let count = |dir: &Path| fs::read_dir(dir).unwrap().count();
        assert_eq!((count(dir.path()), count(&inner)), (2, 2));
        remove_leftovers(dir.path(), &|_| true).unwrap();
        assert_eq!((count(dir.path()), count(&inner)), (2, 1));
    }

    #[test]
    fn a_second_lock_is_refused_until_the_first_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let first = Lock::acquire(dir.path(), "run").unwrap();
        assert_eq!(Lock::acquire(dir.path(), "run").unwrap_err().exit_code(), 75);
        drop(first);
        Lock::acquire(dir.path(), "run").unwrap();
    }

    #[test]
    fn floats_survive_as_bytes() {
        assert_eq!(floats_of(&bytes_of(&[1.5, -0.0, f32::MAX])), [1.5, -0.0, f32::MAX]);
    }

    #[test]
    fn short_hashes_of_damaged_files_are_no_panic() {
        assert_eq!(
            ["0123456789", "01", "", "äöü0123456"].map(|hash| short(hash, 8)),
            ["01234567", "01", "", "äöü01234"]
        );
    }

    #[test]
    fn hash_file_is_blake3_of_the_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        publish(&path, b"proxyset").unwrap();
        let expected = (blake3::hash(b"proxyset").to_hex().to_string(), 8);
        assert_eq!(hash_file(&path).unwrap(), expected);
    }
}
