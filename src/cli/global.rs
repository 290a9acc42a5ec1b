//! What all verbs share: their common flags, and how results are printed.

use std::io::Write;

use crate::{
    Error, Result,
    device::{DeviceChoice, Precision},
    settings,
};

/// Flags of every verb.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct Global {
    /// Print results as one JSON object on stdout.
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// Print no progress and no notes on stderr.
    #[arg(long, global = true)]
    pub(super) quiet: bool,
    /// The device for tensors: auto, cpu or cuda:N.
    #[arg(long, global = true, default_value_t = DeviceChoice::Auto)]
    pub(super) device: DeviceChoice,
    /// The precision in which a GPU computes. It has no effect on the CPU.
    #[arg(long, global = true, value_parser = settings::named::<Precision>(), default_value_t = Precision::F32)]
    pub(super) precision: Precision,
    /// Number of CPU threads; 0 for all cores. Results do not depend on it.
    #[arg(long, global = true, default_value_t = 0)]
    pub(super) threads: usize,
}

impl Global {
    /// Prints a result: as JSON if that is asked for, otherwise as text.
    pub(super) fn show<J: serde::Serialize>(
        &self,
        json: impl FnOnce() -> J,
        text: impl FnOnce() -> String,
    ) -> Result<()> {
        if !self.json {
            return print(&text());
        }
        let json = serde_json::to_string_pretty(&json())
            .map_err(|e| Error::Alarm(format!("result cannot be written as JSON: {e}")))?;
        print(&json)
    }
}

/// Prints results. A reader that has gone away (`| head`) is not an error.
pub(super) fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match writeln!(stdout, "{}", text.trim_end()).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::io("stdout")(e)),
        _ => Ok(()),
    }
}
