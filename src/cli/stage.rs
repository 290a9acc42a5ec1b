//! One verb for each stage: `proxyset generate --model DIR --count N --out DIR`.

use std::path::{Path, PathBuf};

use clap::{ArgMatches, Args, Command, FromArgMatches, Subcommand};
use serde_json::json;

use super::{arc::Ranking, global::Global, table};
use crate::{
    Result,
    progress::note,
    stage::{self, AnyStage},
    stages,
};

/// A stage with its settings, and the folder for its output.
pub(super) struct Verb {
    output: Output,
    stage: Box<dyn AnyStage>,
    /// For the verb arc: what is to be ranked, if anything.
    ranking: Option<Ranking>,
}

#[derive(clap::Args)]
struct Output {
    /// The output folder. If it holds the same work, unfinished, the work is continued.
    #[arg(long)]
    out: Option<PathBuf>,
}

impl Subcommand for Verb {
    fn augment_subcommands(command: Command) -> Command {
        stages::all().fold(command, |command, kind| {
            let mut verb = (kind.add_flags)(Output::augment_args(Command::new(kind.name)));
            if kind.name == Ranking::VERB {
                verb = Ranking::augment_args(verb);
            }
            command.subcommand(verb.about(kind.about).long_about(None))
        })
    }

    fn augment_subcommands_for_update(command: Command) -> Command {
        Self::augment_subcommands(command)
    }

    fn has_subcommand(name: &str) -> bool {
        stages::find(name).is_some()
    }
}

impl FromArgMatches for Verb {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let found = matches.subcommand().and_then(|(name, flags)| Some((stages::find(name)?.1, flags)));
        let Some((kind, flags)) = found else {
            return Err(clap::Error::new(clap::error::ErrorKind::MissingSubcommand));
        };
        let ranking = (kind.name == Ranking::VERB).then(|| Ranking::from_arg_matches(flags)).transpose()?;
        Ok(Self {
            output: Output::from_arg_matches(flags)?,
            stage: (kind.of_flags)(flags)?,
            ranking: ranking.filter(|ranking| ranking.real.is_some()),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Verb {
    pub(super) fn main(&self, global: &Global) -> Result<()> {
        let stage = self.stage.as_ref();
        stage.validate()?;
        if let Some(ranking) = &self.ranking {
            return ranking.main(stage, self.output.out.as_deref(), global);
        }
        match &self.output.out {
            Some(out) => perform(stage, out, global),
            // Results that nobody asked to keep go to a folder that nobody else can have filled.
            None if stage.name() == "evaluate" => {
                let scratch = tempfile::tempdir().map_err(crate::Error::io(std::env::temp_dir()))?;
                perform(stage, scratch.path(), global)
            }
            None => bail!(Usage, "--out is not set, expected the folder for what {} makes", stage.name()),
        }
    }
}

fn perform(stage: &dyn AnyStage, out: &Path, global: &Global) -> Result<()> {
    let inputs = stage.inputs().into_iter().map(|(key, input)| Ok((key, stage::input_fingerprint(&input)?)));
    let inputs: Vec<_> = inputs.collect::<Result<_>>()?;
    let fingerprint = stage::fingerprint(stage, &inputs);
    let done_before = stage::state(out, &fingerprint)? == stage::State::Done;
    let summary = stage::execute(stage, &inputs, out, global.device)?;
    if done_before {
        note(&format!("{}: done already in {}", stage.name(), out.display()));
    }
    let schema = format!("proxyset.{}/1", stage.name());
    let json = || json!({ "schema": schema, "out": out, "fingerprint": fingerprint, "summary": summary });
    global.show(json, || table::summary(&summary))
}
