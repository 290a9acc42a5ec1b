//! One error type, grouped by what the caller can do about it: each group has its exit code.

use std::path::{Path, PathBuf};

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. Messages name the value and what was expected, in lower case, without a full stop.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A stated gate was not met: the work was done, the answer is no. Exit code 1.
    #[error("{0}")]
    Gate(String),
    /// Wrong usage or configuration, or an output folder of another run. Exit code 2.
    #[error("{0}")]
    Usage(String),
    /// Input data that are not what they claim to be. Exit code 65.
    #[error("{0}")]
    Data(String),
    /// Something that cannot happen unless a program, a disk or a file is faulty. Exit code 70.
    #[error("{0}")]
    Alarm(String),
    /// The system refused to read or write: full, read-only, missing. Exit code 74.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder that was being read or written.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// Stopped by a signal, or locked by another process: run again to resume. Exit code 75.
    #[error("{0}")]
    Stopped(String),
    /// A tensor operation failed: a bug, or out of memory. Exit code 70.
    #[error("tensor operation failed: {0}{remedy}", remedy = remedy(.0))]
    Tensor(#[from] candle_core::Error),
    /// Another error, with what was being done at the time.
    #[error("{context}: {source}")]
    Context {
        /// What was being done.
        context: String,
        /// Why it failed.
        source: Box<Error>,
    },
}

impl Error {
    /// Wraps an I/O error with the path that it concerns.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { path, source }
    }

    /// Whether the system says that a file or folder does not exist.
    pub fn is_not_found(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
            Self::Context { source, .. } => source.is_not_found(),
            _ => false,
        }
    }

    /// The process exit code for this error (1 gate, 2 usage, 65 data, 70 alarm, 74 I/O, 75 stopped).
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Gate(_) => 1,
            Self::Usage(_) => 2,
            Self::Data(_) => 65,
            Self::Alarm(_) => 70,
            Self::Io { .. } => 74,
            Self::Stopped(_) => 75,
            Self::Tensor(e) if is_out_of_memory(e) => 2,
            Self::Tensor(_) => 70,
            Self::Context { source, .. } => source.exit_code(),
        }
    }
}

/// Recognised by the wording of candle's and CUDA's messages.
fn is_out_of_memory(error: &candle_core::Error) -> bool {
    let text = error.to_string().to_lowercase();
    text.contains("out of memory") || text.contains("out_of_memory")
}

fn remedy(error: &candle_core::Error) -> &'static str {
    let smaller =
        "; take a smaller batch or micro_batch, and run the same command again: what is finished is kept";
    if is_out_of_memory(error) { smaller } else { "" }
}

/// Adds what was being done to an error.
pub trait ResultExt<T> {
    /// Prefixes the error with `context()`.
    fn context<C: Into<String>>(self, context: impl FnOnce() -> C) -> Result<T>;
}

impl<T, E: Into<Error>> ResultExt<T> for std::result::Result<T, E> {
    fn context<C: Into<String>>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|e| Error::Context { context: context().into(), source: Box::new(e.into()) })
    }
}

/// Returns early with `Error::$kind(format!(…))`.
#[macro_export]
macro_rules! bail {
    ($kind:ident, $($arg:tt)+) => {
        return Err($crate::Error::$kind(format!($($arg)+)))
    };
}

/// Refuses a setting outside a range with [`Error::Usage`], naming key, value and range.
pub fn expect_within<T: PartialOrd + std::fmt::Display>(key: &str, value: T, min: T, max: T) -> Result<()> {
    if value >= min && value <= max {
        return Ok(());
    }
    bail!(Usage, "{key} is {value}, expected {min} to {max}")
}
