//! The command line: one verb a file. Arguments become one library call, its result is printed.

mod arc;
mod check;
mod plan;
mod publish;
mod run;
mod stage;
mod status;
mod table;

use std::{io::Write, process::ExitCode};

use clap::{Parser, Subcommand};

use crate::{
    Error, Result,
    device::{CpuLevel, DeviceChoice, Precision},
    progress, settings,
};

/// Makes synthetic image data sets that make classifiers more robust, and proves that they do.
///
/// Exit codes: 0 done; 1 a stated gate was not met; 2 usage or configuration; 65 bad input data; 70 alarm;
/// 74 input/output; 75 stopped or locked, run again to resume.
#[derive(Parser)]
#[command(name = "proxyset", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    #[command(flatten)]
    global: Global,
}

/// Flags of every verb.
#[derive(clap::Args, Clone, Debug)]
struct Global {
    /// Print results as one JSON object on stdout.
    #[arg(long, global = true)]
    json: bool,
    /// No progress and no notes on stderr.
    #[arg(long, global = true)]
    quiet: bool,
    /// Where tensors live: auto, cpu or cuda:N.
    #[arg(long, global = true, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
    /// What a GPU computes with; of no effect on the CPU.
    #[arg(long, global = true, value_parser = settings::named::<Precision>(), default_value_t = Precision::F32)]
    precision: Precision,
    /// CPU threads; 0 for all cores. No result depends on it.
    #[arg(long, global = true, default_value_t = 0)]
    threads: usize,
}

#[derive(Subcommand)]
enum Verb {
    /// Run a pipeline file: what is not done yet, in order.
    Run(plan::Args),
    /// Show what `run` would do, how much, and what is done already. Writes nothing.
    Plan(plan::Args),
    /// Show the state of a run folder or of one stage's folder.
    Status(status::Args),
    /// Verify a run folder, a stage's folder or a data set down to the last byte.
    Check(check::Args),
    #[command(flatten)]
    Stage(stage::Verb),
    /// Verify a data set and copy it to where it is published from.
    Publish(publish::Args),
}

/// Parses the command line, does what it says, prints, and returns the exit code.
pub fn main() -> ExitCode {
    let done = expect_text().and_then(|()| dispatch(&Cli::parse()));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Paths go into records, which are text.
fn expect_text() -> Result<()> {
    match std::env::args_os().find(|arg| arg.to_str().is_none()) {
        Some(arg) => bail!(Usage, "an argument is {}, expected text in UTF-8", arg.display()),
        None => Ok(()),
    }
}

fn dispatch(cli: &Cli) -> Result<()> {
    let global = &cli.global;
    if global.quiet {
        progress::set_quiet();
    }
    CpuLevel::check_env()?;
    progress::read_checkpoint_interval()?;
    global.precision.set();
    if global.threads > 0 {
        rayon::ThreadPoolBuilder::new()
            .num_threads(global.threads)
            .build_global()
            .map_err(|e| Error::Usage(format!("threads is {}: {e}", global.threads)))?;
    }
    progress::install_signal_handler()?;
    // In the pool, whose threads else would have to be woken for every operation.
    rayon::scope(|_| perform(&cli.verb, global))
}

fn perform(verb: &Verb, global: &Global) -> Result<()> {
    match verb {
        Verb::Run(args) => run::main(args, global),
        Verb::Plan(args) => plan::main(args, global),
        Verb::Status(args) => status::main(args, global),
        Verb::Check(args) => check::main(args, global),
        Verb::Stage(verb) => verb.main(global),
        Verb::Publish(args) => publish::main(args, global),
    }
}

/// Prints results. A reader that went away (`| head`) is no error.
fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match writeln!(stdout, "{}", text.trim_end()).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::io("stdout")(e)),
        _ => Ok(()),
    }
}

fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Error::Alarm(format!("result cannot be written as JSON: {e}")))?;
    print(&text)
}
