//! The documents generated from the program are up to date.

use std::{fmt::Write, path::Path};

use clap::{Arg, Command};

#[test]
fn the_command_reference_is_that_of_the_command_line() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/commands.md");
    let made = reference(proxyset::cli::command());
    if std::env::var_os("PROXYSET_WRITE_DOCUMENTS").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(found == made, "docs/commands.md is stale: `make commands` writes it again");
}

/// All verbs of the program with their flags, as Markdown.
fn reference(mut program: Command) -> String {
    program.build();
    let mut text = String::from(
        "# Commands\n\nMade of the program's own help; `make commands` writes it again.\n\n```text\nproxyset <VERB> [FLAGS]\n```\n",
    );
    let about = program.get_long_about().map(ToString::to_string).unwrap_or_default();
    let _ = writeln!(text, "\n{about}\n\n## Flags of every verb\n");
    table(&mut text, program.get_arguments());
    for verb in program.get_subcommands().filter(|verb| verb.get_name() != "help") {
        let about = verb.get_about().map(ToString::to_string).unwrap_or_default();
        let _ = writeln!(text, "\n## {}\n\n{about}.\n\n```text\n{}\n```\n", verb.get_name(), usage(verb));
        table(&mut text, verb.get_arguments().filter(|arg| !arg.is_global_set()));
    }
    text
}

fn usage(verb: &Command) -> String {
    let usage = verb.clone().render_usage().to_string();
    usage.trim_start_matches("Usage: ").lines().next().unwrap_or_default().trim().to_owned()
}

fn table<'a>(text: &mut String, arguments: impl Iterator<Item = &'a Arg>) {
    text.push_str("| flag | | default |\n|---|---|---|\n");
    for arg in arguments.filter(|arg| !["help", "version"].contains(&arg.get_id().as_str())) {
        let value = match arg.get_value_names() {
            Some([name, ..]) if arg.get_action().takes_values() => format!(" {name}"),
            _ => String::new(),
        };
        let name = match arg.get_long() {
            Some(long) => format!("`--{long}{value}`"),
            None => format!("`{}`", value.trim()),
        };
        let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
        let values: Vec<String> = arg
            .get_possible_values()
            .iter()
            .filter(|_| arg.get_action().takes_values())
            .map(|value| match value.get_help() {
                Some(help) => format!("`{}`: {}", value.get_name(), one_line(&help.to_string())),
                None => format!("`{}`", value.get_name()),
            })
            .collect();
        let values = if values.is_empty() { String::new() } else { format!("<br>{}", values.join("<br>")) };
        let defaults: Vec<String> =
            arg.get_default_values().iter().map(|value| format!("`{}`", value.to_string_lossy())).collect();
        let shown = if arg.get_action().takes_values() { defaults.join(", ") } else { String::new() };
        let _ = writeln!(text, "| {name} | {}{values} | {shown} |", one_line(&help));
    }
}

/// Text for a cell of a table.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|").replace('<', "&lt;")
}
