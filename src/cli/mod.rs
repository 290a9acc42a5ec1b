//! The command line: one verb a file. Arguments become one library call, its result is printed.

mod arc;
mod check;
mod plan;
mod run;
mod stage;
mod status;
mod table;

use std::{io::Write, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

use crate::{
    Error, Result,
    device::{CpuLevel, DeviceChoice, Precision},
    progress, settings,
    stage::{
        Certify, Curate, Evaluate, FitDiscriminator, FitGenerator, Generate, Import, Label, Materialize,
        Publish, Quality, Rank, Report, Score, Split, Train,
    },
};

/// Makes synthetic image data sets that make classifiers more robust, and proves that they do.
///
/// Exit codes: 0 done; 1 a stated gate was not met; 2 usage or configuration; 65 bad input data; 70 alarm;
/// 74 input/output; 75 stopped or locked, run again to resume.
#[derive(Parser, Debug)]
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

/// A stage's flags, and where its output goes.
#[derive(clap::Args, Clone, Debug)]
struct StageArgs<S: clap::Args> {
    /// The output folder. It may hold this very work, unfinished: then the work goes on.
    #[arg(long)]
    out: Option<PathBuf>,
    #[command(flatten)]
    stage: S,
}

#[derive(Subcommand, Debug)]
enum Verb {
    /// Run a pipeline file: what is not done yet, in order.
    Run(plan::Args),
    /// Show what `run` would do, how much, and what is done already. Writes nothing.
    Plan(plan::Args),
    /// Show the state of a run folder or of one stage's folder.
    Status(status::Args),
    /// Verify a run folder, a stage's folder or a data set down to the last byte.
    Check(check::Args),
    /// Divide the real data into what is learned from and what is measured on.
    Split(StageArgs<Split>),
    /// Train a diffusion model.
    FitGenerator(StageArgs<FitGenerator>),
    /// Sample a pool of images from a diffusion model.
    Generate(StageArgs<Generate>),
    /// Make a pool of images made elsewhere.
    Import(StageArgs<Import>),
    /// Give pool images labels, or confidence in the labels they have.
    Label(StageArgs<Label>),
    /// Measure a pool against real images: Fréchet distance, precision, recall, class accuracy.
    Quality(StageArgs<Quality>),
    /// Train robust real/synthetic discriminators.
    FitDiscriminator(StageArgs<FitDiscriminator>),
    /// Score every pool image: how far from real.
    Score(StageArgs<Score>),
    /// Estimate ARC, the area under the robust discrimination curve, or rank sample sets by it.
    Arc(arc::Args),
    /// Rank generators whose ARC is estimated.
    Rank(StageArgs<Rank>),
    /// Select from a pool by its scores.
    Curate(StageArgs<Curate>),
    /// Write a selection as a Hugging Face data set.
    Materialize(StageArgs<Materialize>),
    /// Train a classifier, plainly or adversarially, on real and synthetic data.
    Train(StageArgs<Train>),
    /// Evaluate a classifier, clean and under attack.
    Evaluate(StageArgs<Evaluate>),
    /// Smooth a classifier with noise and certify radii within which its answers stay.
    Certify(StageArgs<Certify>),
    /// Tables, comparisons and contact sheets of what was made.
    Report(StageArgs<Report>),
    /// Verify a data set and copy it to where it is published from.
    Publish(StageArgs<Publish>),
}

/// Parses the command line, does what it says, prints, and returns the exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match dispatch(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn dispatch(cli: &Cli) -> Result<()> {
    let global = &cli.global;
    if global.quiet {
        progress::set_quiet();
    }
    CpuLevel::check_env()?;
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
        Verb::Split(args) => stage::main(args, global),
        Verb::FitGenerator(args) => stage::main(args, global),
        Verb::Generate(args) => stage::main(args, global),
        Verb::Import(args) => stage::main(args, global),
        Verb::Label(args) => stage::main(args, global),
        Verb::Quality(args) => stage::main(args, global),
        Verb::FitDiscriminator(args) => stage::main(args, global),
        Verb::Score(args) => stage::main(args, global),
        Verb::Arc(args) => arc::main(args, global),
        Verb::Rank(args) => stage::main(args, global),
        Verb::Curate(args) => stage::main(args, global),
        Verb::Materialize(args) => stage::main(args, global),
        Verb::Train(args) => stage::main(args, global),
        Verb::Evaluate(args) => stage::main(args, global),
        Verb::Certify(args) => stage::main(args, global),
        Verb::Report(args) => stage::main(args, global),
        Verb::Publish(args) => stage::publish(args, global),
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
