//! The command line, with one file for each verb. Arguments become one library call, and its result is printed.

mod arc;
mod check;
mod convert;
mod global;
mod plan;
mod publish;
mod run;
mod stage;
mod status;
mod table;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use self::global::Global;
use crate::{Error, Result, device::CpuLevel, progress};

/// Makes synthetic image data sets that make classifiers more robust, and measures whether they do.
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

#[derive(Subcommand)]
enum Verb {
    /// Run a pipeline file: do what is not done yet, in order.
    Run(plan::Args),
    /// Show what `run` would do, how much work it is, and what is already done. Writes nothing.
    Plan(plan::Args),
    /// Show the state of a run folder or of one stage's folder.
    Status(status::Args),
    /// Verify every byte of a run folder, a stage's folder or a data set.
    Check(check::Args),
    #[command(flatten)]
    Stage(stage::Verb),
    /// Make a model folder of a checkpoint of PyTorch or of safetensors.
    Convert(convert::Args),
    /// Verify a data set and copy it to where it is published from.
    Publish(publish::Args),
}

/// Parses the command line, does what it says, prints the result, and returns the exit code.
pub fn main() -> ExitCode {
    match expect_text().and_then(|()| dispatch(&Cli::parse())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Paths are recorded, and records are text.
fn expect_text() -> Result<()> {
    match std::env::args_os().find(|arg| arg.to_str().is_none()) {
        Some(arg) => bail!(Usage, "an argument is {}, expected text in UTF-8", arg.display()),
        None => Ok(()),
    }
}

/// The command line, from which `docs/commands.md` is made.
pub fn command() -> clap::Command {
    Cli::command()
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
    // Runs inside the thread pool, whose threads would otherwise have to be woken for every operation.
    rayon::scope(|_| perform(&cli.verb, global))
}

fn perform(verb: &Verb, global: &Global) -> Result<()> {
    match verb {
        Verb::Run(args) => run::main(args, global),
        Verb::Plan(args) => plan::main(args, global),
        Verb::Status(args) => status::main(args, global),
        Verb::Check(args) => check::main(args, global),
        Verb::Stage(verb) => verb.main(global),
        Verb::Convert(args) => convert::main(args, global),
        Verb::Publish(args) => publish::main(args, global),
    }
}
