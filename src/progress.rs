//! Progress of work that takes longer than two seconds: bars on a terminal, plain lines elsewhere. Everything goes
//! to stderr; stdout is for results.

use std::{
    io::IsTerminal,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use crate::Result;

/// Seconds between plain lines when stderr is not a terminal.
const PLAIN_INTERVAL: Duration = Duration::from_secs(15);

static STOP: AtomicBool = AtomicBool::new(false);
static QUIET: AtomicBool = AtomicBool::new(false);
static CHECKPOINT_INTERVAL: OnceLock<Duration> = OnceLock::new();

#[cfg(test)]
thread_local! {
    /// The check from now at which this thread is stopped; 0 for never. Tests share a process, and each stops its
    /// own work.
    pub(crate) static STOP_AT_LOOK: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
}

/// Turns SIGINT and SIGTERM into a clean stop: the first lets work reach a safe point, the second ends the process
/// at once (which is safe by design: what is not published does not exist).
pub fn install_signal_handler() -> Result<()> {
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(75);
        }
        eprintln!("stopping at the next safe point; once more to stop at once");
    })
    .map_err(|e| crate::Error::Alarm(format!("signal handler cannot be installed: {e}")))
}

/// Fails with [`crate::Error::Stopped`] once a stop has been requested.
pub fn check_stop() -> Result<()> {
    let stop = STOP.load(Ordering::Relaxed);
    #[cfg(test)]
    let stop = stop || STOP_AT_LOOK.with(|look| look.replace(look.get().saturating_sub(1)) == 1);
    if stop {
        bail!(Stopped, "stopped; run the same command again to go on");
    }
    Ok(())
}

/// The greatest age of the last saved state of long work, which is the most that an interruption can lose. 20 s, or
/// `PROXYSET_CHECKPOINT_SECONDS`, see [`read_checkpoint_interval`].
pub fn checkpoint_interval() -> Duration {
    *CHECKPOINT_INTERVAL.get().unwrap_or(&Duration::from_secs(20))
}

/// Reads `PROXYSET_CHECKPOINT_SECONDS`. Fails with [`crate::Error::Usage`] if it is not a number of seconds.
pub fn read_checkpoint_interval() -> Result<()> {
    const NAME: &str = "PROXYSET_CHECKPOINT_SECONDS";
    let Some(set) = std::env::var_os(NAME) else { return Ok(()) };
    let text = set.to_string_lossy();
    let Ok(seconds) = text.parse() else {
        bail!(Usage, "{NAME} is '{text}', expected a whole number of seconds");
    };
    CHECKPOINT_INTERVAL.get_or_init(|| Duration::from_secs(seconds));
    Ok(())
}

/// Silences progress and notes (`--quiet`).
pub fn set_quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// Prints one line on stderr.
pub fn note(line: &str) {
    if !QUIET.load(Ordering::Relaxed) {
        eprintln!("{line}");
    }
}

/// The progress of one piece of work, with rate and remaining time. May be shared between threads.
pub struct Progress {
    name: String,
    unit: &'static str,
    total: u64,
    bar: Option<ProgressBar>,
    plain: Mutex<Plain>,
}

struct Plain {
    started: Instant,
    printed: Instant,
    skipped: u64,
    done: u64,
}

impl Progress {
    /// Starts to show `name`: `total` `unit`s (say `images`) to do.
    pub fn new(name: impl Into<String>, total: u64, unit: &'static str) -> Self {
        let name = name.into();
        let bar = (std::io::stderr().is_terminal() && !QUIET.load(Ordering::Relaxed)).then(|| {
            let style = ProgressStyle::with_template(
                "{prefix} [{bar:30}] {human_pos}/{human_len} {msg} ({per_sec}, {eta} left)",
            )
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ");
            ProgressBar::new(total).with_style(style).with_prefix(name.clone()).with_message(unit)
        });
        let now = Instant::now();
        let plain = Mutex::new(Plain { started: now, printed: now, skipped: 0, done: 0 });
        Self { name, unit, total, bar, plain }
    }

    /// Counts `n` units that an earlier run finished; they do not count towards the rate.
    pub fn skip(&self, n: u64) {
        self.advance(n, true);
    }

    /// Counts `n` finished units.
    pub fn add(&self, n: u64) {
        self.advance(n, false);
    }

    fn advance(&self, n: u64, skipped: bool) {
        let mut plain = self.plain.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        plain.done += n;
        if skipped {
            plain.skipped += n;
        }
        if let Some(bar) = &self.bar {
            bar.set_position(plain.done);
            if skipped {
                bar.reset_eta();
            }
        } else if plain.printed.elapsed() >= PLAIN_INTERVAL {
            plain.printed = Instant::now();
            let rate = (plain.done - plain.skipped) as f64 / plain.started.elapsed().as_secs_f64();
            let left = (self.total.saturating_sub(plain.done)) as f64 / rate.max(1e-9);
            let (Self { name, unit, total, .. }, done, left) = (self, plain.done, human_seconds(left));
            note(&format!("{name}: {done}/{total} {unit} ({rate:.1}/s, {left} left)"));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// `3.2 s`, `4 min 10 s`, `2 h 05 min`.
pub fn human_seconds(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        _ if !seconds.is_finite() || seconds > 1e8 => "unknown".into(),
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        assert_eq!(human_seconds(3.24), "3.2 s");
        assert_eq!(human_seconds(250.0), "4 min 10 s");
        assert_eq!(human_seconds(7500.0), "2 h 05 min");
        assert_eq!(human_seconds(f64::INFINITY), "unknown");
    }
}
