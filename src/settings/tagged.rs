//! Groups of settings of which there are several kinds.

use std::ffi::OsString;

use clap::{
    Arg, ArgMatches, Command, Error, Id,
    builder::{PossibleValue, PossibleValuesParser, Resettable},
    error::ErrorKind,
    parser::ValueSource,
};

/// A variant of a tagged group: its name, what it is, and its flags.
pub(crate) struct Kind {
    name: &'static str,
    about: &'static str,
    flags: Command,
}

impl Kind {
    pub(crate) fn of<T: clap::Args>(name: &'static str, about: &'static str) -> Self {
        Self { name, about: about.trim(), flags: T::augment_args(Command::new(name).no_binary_name(true)) }
    }

    fn flag(&self, id: &Id) -> Option<&Arg> {
        self.flags.get_arguments().find(|arg| arg.get_id() == id)
    }
}

/// The flags of all kinds, each once.
fn flags(kinds: &[Kind]) -> Vec<&Arg> {
    let mut all: Vec<&Arg> = Vec::new();
    for arg in kinds.iter().flat_map(|kind| kind.flags.get_arguments()) {
        if all.iter().all(|known| known.get_id() != arg.get_id()) {
            all.push(arg);
        }
    }
    all
}

/// The kinds that have a flag.
fn owners<'a>(kinds: &'a [Kind], flag: &Id) -> Vec<&'a Kind> {
    kinds.iter().filter(|kind| kind.flag(flag).is_some()).collect()
}

fn long(arg: &Arg) -> &str {
    arg.get_long().unwrap_or(arg.get_id().as_str())
}

fn default_of(arg: &Arg) -> String {
    let values: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    values.join(",")
}

/// Adds the flag of the kind, and the flags of all kinds. Their help names the kinds that have them; defaults stay where
/// they are the same for all of these, and stand in the help where they are not.
pub(crate) fn augment(command: Command, flag: &'static str, about: &'static str, default: &'static str, kinds: &[Kind]) -> Command {
    let values = kinds.iter().map(|kind| PossibleValue::new(kind.name).help(kind.about));
    let choice = Arg::new(flag)
        .long(flag)
        .value_name("KIND")
        .help(about.trim().trim_end_matches('.').to_owned())
        .value_parser(PossibleValuesParser::new(values))
        .default_value(default);
    flags(kinds).into_iter().fold(command.arg(choice), |command, arg| {
        let owners = owners(kinds, arg.get_id());
        let defaults: Vec<String> =
            owners.iter().filter_map(|kind| kind.flag(arg.get_id())).map(default_of).collect();
        let mut arg = arg.clone();
        let alike = defaults.iter().all(|default| *default == defaults[0]);
        let named: Vec<String> = owners
            .iter()
            .zip(&defaults)
            .map(|(kind, default)| if alike || default.is_empty() { kind.name.into() } else { format!("{}: {default}", kind.name) })
            .collect();
        if !alike {
            arg = arg.default_value(Resettable::Reset);
        }
        if !(alike && owners.len() == kinds.len()) {
            let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
            arg = arg.help(format!("{} ({})", help.trim_end_matches('.'), named.join("; ")));
        }
        command.arg(arg)
    })
}

/// The flag with another default of one kind in its help.
pub(crate) fn with_default_of(arg: Arg, kind: &str, default: &str) -> Arg {
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let mark = format!("{kind}: ");
    match help.rfind('(').and_then(|list| Some(list + help[list..].find(&mark)? + mark.len())) {
        Some(from) => {
            let to = from + help[from..].find([';', ')']).unwrap_or(0);
            arg.help(format!("{}{default}{}", &help[..from], &help[to..])).hide_default_value(true)
        }
        None => arg,
    }
}

/// The kind that was chosen, and the values of its flags: those given, then the stage's defaults, then its own.
///
/// Fails if a flag was given that this kind has not.
pub(crate) fn chosen(flag: &str, kinds: &[Kind], matches: &ArgMatches) -> Result<(&'static str, ArgMatches), Error> {
    let named = matches.get_one::<String>(flag);
    let Some(kind) = kinds.iter().find(|kind| named.is_some_and(|name| name == kind.name)) else {
        return Err(Error::raw(ErrorKind::MissingRequiredArgument, format!("--{flag} is not given\n")));
    };
    let mut given: Vec<OsString> = Vec::new();
    for arg in flags(kinds) {
        let id = arg.get_id().as_str();
        if kind.flag(arg.get_id()).is_none() {
            if matches.value_source(id) == Some(ValueSource::CommandLine) {
                let owners: Vec<_> = owners(kinds, arg.get_id()).iter().map(|kind| kind.name).collect();
                let problem = format!(
                    "--{} has no effect with --{flag} {}; it belongs to {}\n",
                    long(arg),
                    kind.name,
                    owners.join(", ")
                );
                return Err(Error::raw(ErrorKind::ArgumentConflict, problem));
            }
            continue;
        }
        for value in matches.get_raw(id).into_iter().flatten() {
            let mut text = OsString::from(format!("--{}=", long(arg)));
            text.push(value);
            given.push(text);
        }
    }
    Ok((kind.name, kind.flags.clone().try_get_matches_from(given)?))
}

/// Declares a group of settings with several kinds: an enum whose variants hold the settings of a kind each.
///
/// `pub enum Colour("colour", default "red") { Red(RedSettings) = "red", … }`: `--colour red` and, in a table,
/// `kind = "red"` choose the variant. A variant may be `#[cfg(…)]`.
macro_rules! tagged {
    (
        $(#[doc = $about:literal])+
        pub enum $name:ident($flag:literal, default $default:literal) {
            $($(#[doc = $doc:literal])+ $(#[cfg($cfg:meta)])? $variant:ident($settings:ty) = $kind:literal),+ $(,)?
        }
    ) => {
        $(#[doc = $about])+
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(tag = "kind")]
        pub enum $name {
            $(
                $(#[doc = $doc])+
                $(#[cfg($cfg)])?
                #[serde(rename = $kind)]
                $variant($settings),
            )+
        }

        impl $name {
            fn kinds() -> Vec<$crate::settings::tagged::Kind> {
                Vec::from([$($(#[cfg($cfg)])? $crate::settings::tagged::Kind::of::<$settings>($kind, concat!($($doc),+))),+])
            }
        }

        impl clap::Args for $name {
            fn augment_args(command: clap::Command) -> clap::Command {
                let about = concat!($($about),+);
                $crate::settings::tagged::augment(command, $flag, about, $default, &Self::kinds())
            }

            fn augment_args_for_update(command: clap::Command) -> clap::Command {
                Self::augment_args(command)
            }
        }

        impl clap::FromArgMatches for $name {
            fn from_arg_matches(matches: &clap::ArgMatches) -> Result<Self, clap::Error> {
                let (kind, matches) = $crate::settings::tagged::chosen($flag, &Self::kinds(), matches)?;
                match kind {
                    $(
                        $(#[cfg($cfg)])?
                        $kind => <$settings as clap::FromArgMatches>::from_arg_matches(&matches).map(Self::$variant),
                    )+
                    _ => Err(clap::Error::new(clap::error::ErrorKind::InvalidValue)),
                }
            }

            fn update_from_arg_matches(&mut self, matches: &clap::ArgMatches) -> Result<(), clap::Error> {
                *self = Self::from_arg_matches(matches)?;
                Ok(())
            }
        }
    };
}
