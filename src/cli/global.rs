//! What all verbs share: flags, and how results are printed.

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
    /// No progress and no notes on stderr.
    #[arg(long, global = true)]
    pub(super) quiet: bool,
    /// Where tensors live: auto, cpu or cuda:N.
    #[arg(long, global = true, default_value_t = DeviceChoice::Auto)]
    pub(super) device: DeviceChoice,
    /// What a GPU computes with; of no effect on the CPU.
    #[arg(long, global = true, value_parser = settings::named::<Precision>(), default_value_t = Precision::F32)]
    pub(super) precision: Precision,
    /// CPU threads; 0 for all cores. No result depends on it.
    #[arg(long, global = true, default_value_t = 0)]
    pub(super) threads: usize,
}

/// Prints results. A reader that went away (`| head`) is no error.
pub(super) fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match writeln!(stdout, "{}", text.trim_end()).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::io("stdout")(e)),
        _ => Ok(()),
    }
}

pub(super) fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Error::Alarm(format!("result cannot be written as JSON: {e}")))?;
    print(&text)
}
