//! Groups of settings that come in several kinds.

use std::ffi::OsString;

use clap::{
    Arg, ArgMatches, Command, Error, Id,
    builder::{PossibleValue, PossibleValuesParser, Resettable},
    error::ErrorKind,
    parser::ValueSource,
};

/// Makes a variant of `T` from the values of its flags.
type Make<T> = Box<dyn Fn(&ArgMatches) -> Result<T, Error>>;

/// A variant of a tagged group `T`: its name, its description, its flags, and how it is made.
pub(crate) struct Kind<T> {
    name: &'static str,
    about: &'static str,
    flags: Command,
    make: Make<T>,
}

impl<T> Kind<T> {
    /// `variant` is the variant of settings `S`.
    pub(crate) fn of<S: clap::Args>(
        name: &'static str,
        about: &'static str,
        variant: impl Fn(S) -> T + 'static,
    ) -> Self {
        let flags = S::augment_args(Command::new(name).no_binary_name(true));
        let make = Box::new(move |matches: &ArgMatches| S::from_arg_matches(matches).map(&variant));
        Self { name, about: about.trim(), flags, make }
    }

    fn flag(&self, id: &Id) -> Option<&Arg> {
        self.flags.get_arguments().find(|arg| arg.get_id() == id)
    }
}

/// The flags of all kinds, each once.
fn flags<T>(kinds: &[Kind<T>]) -> Vec<&Arg> {
    let mut all: Vec<&Arg> = Vec::new();
    for arg in kinds.iter().flat_map(|kind| kind.flags.get_arguments()) {
        if all.iter().all(|known| known.get_id() != arg.get_id()) {
            all.push(arg);
        }
    }
    all
}

/// The kinds that have a flag, each with the flag as it is there.
fn owners<'a, T>(kinds: &'a [Kind<T>], flag: &Arg) -> Vec<(&'static str, &'a Arg)> {
    kinds.iter().filter_map(|kind| Some((kind.name, kind.flag(flag.get_id())?))).collect()
}

fn long(arg: &Arg) -> &str {
    arg.get_long().unwrap_or(arg.get_id().as_str())
}

fn default_of(arg: &Arg) -> String {
    let values: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    values.join(",")
}

fn help_of(arg: &Arg) -> String {
    arg.get_help().map(ToString::to_string).unwrap_or_default()
}

/// Adds the flag of the kind, and the flags of all kinds. Their help names the kinds that have them. A default that
/// all of these share stays a default; otherwise the defaults are given in the help.
pub(crate) fn augment<T>(
    command: Command,
    flag: &'static str,
    about: &'static str,
    default: &'static str,
    kinds: &[Kind<T>],
) -> Command {
    let values = kinds.iter().map(|kind| PossibleValue::new(kind.name).help(kind.about));
    let choice = Arg::new(flag)
        .long(flag)
        .value_name("KIND")
        .help(about.trim().trim_end_matches('.').to_owned())
        .value_parser(PossibleValuesParser::new(values))
        .default_value(default);
    flags(kinds).into_iter().fold(command.arg(choice), |command, arg| {
        let owners = owners(kinds, arg);
        let alike = owners.iter().all(|(_, own)| default_of(own) == default_of(arg));
        let named = |(kind, own): &(&str, &Arg)| match default_of(own) {
            default if alike || default.is_empty() => (*kind).to_owned(),
            default => format!("{kind}: {default}"),
        };
        let mut arg = arg.clone().display_order(Resettable::Reset);
        if !alike {
            arg = arg.default_value(Resettable::Reset);
        }
        if !alike || owners.len() < kinds.len() {
            let (help, named) = (help_of(&arg), owners.iter().map(named).collect::<Vec<_>>());
            arg = arg.help(format!("{} ({})", help.trim_end_matches('.'), named.join("; ")));
        }
        command.arg(arg)
    })
}

/// The flag, with one kind's different default added to its help.
pub(crate) fn with_default_of(arg: Arg, kind: &str, default: &str) -> Arg {
    let (help, mark) = (help_of(&arg), format!("{kind}: "));
    match help.rfind('(').and_then(|list| Some(list + help[list..].find(&mark)? + mark.len())) {
        Some(from) => {
            let to = from + help[from..].find([';', ')']).unwrap_or(0);
            arg.help(format!("{}{default}{}", &help[..from], &help[to..])).hide_default_value(true)
        }
        None => arg,
    }
}

/// The chosen kind, made from the values of its flags: those given, then the stage's defaults, then its own.
///
/// Fails if a flag was given that this kind does not have.
pub(crate) fn chosen<T>(flag: &str, kinds: &[Kind<T>], matches: &ArgMatches) -> Result<T, Error> {
    let named = matches.get_one::<String>(flag);
    let Some(kind) = kinds.iter().find(|kind| named.is_some_and(|name| name == kind.name)) else {
        return Err(Error::raw(ErrorKind::MissingRequiredArgument, format!("--{flag} is not given\n")));
    };
    let mut given: Vec<OsString> = Vec::new();
    for arg in flags(kinds) {
        let (id, name, long) = (arg.get_id(), kind.name, long(arg));
        if kind.flag(id).is_some() {
            for value in matches.get_raw(id.as_str()).into_iter().flatten() {
                let mut text = OsString::from(format!("--{long}="));
                text.push(value);
                given.push(text);
            }
        } else if matches.value_source(id.as_str()) == Some(ValueSource::CommandLine) {
            let owners: Vec<_> = owners(kinds, arg).into_iter().map(|(kind, _)| kind).collect();
            let owners = owners.join(", ");
            let problem = format!("--{long} has no effect with --{flag} {name}; it belongs to {owners}\n");
            return Err(Error::raw(ErrorKind::ArgumentConflict, problem));
        }
    }
    (kind.make)(&kind.flags.clone().try_get_matches_from(given)?)
}

/// Declares a group of settings with several kinds: an enum in which each variant holds the settings of one kind.
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
            /// The name of the kind.
            pub fn kind(&self) -> &'static str {
                match self {
                    $($(#[cfg($cfg)])? Self::$variant(_) => $kind),+
                }
            }

            fn kinds() -> Vec<$crate::settings::tagged::Kind<Self>> {
                use $crate::settings::tagged::Kind;
                Vec::from([$($(#[cfg($cfg)])? Kind::of($kind, concat!($($doc),+), Self::$variant)),+])
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
                $crate::settings::tagged::chosen($flag, &Self::kinds(), matches)
            }

            fn update_from_arg_matches(&mut self, matches: &clap::ArgMatches) -> Result<(), clap::Error> {
                *self = Self::from_arg_matches(matches)?;
                Ok(())
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::settings::{NoSettings, Settings, defaults, from_flags, from_table};

    #[derive(clap::Args, Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    pub struct Round {
        /// Half of its width.
        #[arg(long, default_value_t = 1.5)]
        pub radius: f64,
        /// How many.
        #[arg(long, default_value_t = 3)]
        pub number: usize,
    }

    #[derive(clap::Args, Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    pub struct Brush {
        /// Its hairs.
        #[arg(id = "brush_hairs", long = "brush-hairs", value_delimiter = ',', default_values_t = [7, 8])]
        pub hairs: Vec<usize>,
    }

    #[derive(clap::Args, Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    pub struct Angular {
        /// Sides.
        #[arg(long, default_value_t = 4)]
        pub sides: usize,
        /// How many.
        #[arg(long, default_value_t = 5)]
        pub number: usize,
        /// How thick the lines are.
        #[arg(long)]
        pub line: Option<f64>,
        /// The brush.
        #[command(flatten)]
        pub brush: Brush,
    }

    tagged! {
        /// What is drawn.
        pub enum Shape("shape", default "round") {
            /// A disc.
            Round(Round) = "round",
            /// A polygon.
            Angular(Angular) = "angular",
            /// Nothing.
            #[cfg(test)]
            Nothing(NoSettings) = "nothing",
        }
    }

    /// A stage whose defaults are those of its groups.
    #[derive(clap::Args, Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    pub struct Drawing {
        /// What is drawn.
        #[command(flatten)]
        shape: Shape,
        /// Its colour.
        #[arg(long, default_value = "red")]
        colour: String,
        /// Its size.
        #[arg(long)]
        size: Option<usize>,
    }

    /// A stage with defaults of its own.
    #[derive(clap::Args, Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    #[command(mut_args(defaults(&[
        ("shape", "angular", &[("number", "9"), ("brush_hairs", "1,2")]),
        ("colour", "blue", &[]),
    ])))]
    pub struct Painting {
        /// What is drawn.
        #[command(flatten)]
        shape: Shape,
        /// Its colour.
        #[arg(long, default_value = "red")]
        colour: String,
    }

    fn flags<S: Settings>(flags: &str) -> serde_json::Value {
        let flags: Vec<String> = flags.split_whitespace().map(str::to_owned).collect();
        serde_json::to_value(from_flags::<S>(&flags).unwrap()).unwrap()
    }

    fn refused<S: Settings>(flags: &str) -> String {
        let flags: Vec<String> = flags.split_whitespace().map(str::to_owned).collect();
        let error = from_flags::<S>(&flags).err().unwrap();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    fn table<S: Settings>(text: &str) -> Result<serde_json::Value, String> {
        let settings = from_table::<S>("drawing", &toml::from_str(text).unwrap())?;
        Ok(serde_json::to_value(settings).unwrap())
    }

    #[test]
    fn a_kind_has_its_own_settings_with_their_own_defaults_and_no_others() {
        let round = json!({"kind": "round", "radius": 1.5, "number": 3});
        let drawing = |shape| json!({"shape": shape, "colour": "red", "size": null});
        assert_eq!(flags::<Drawing>(""), drawing(round.clone()));
        assert_eq!(table::<Drawing>("").unwrap(), drawing(round));
        let angular =
            json!({"kind": "angular", "sides": 4, "number": 5, "line": null, "brush": {"hairs": [7, 8]}});
        assert_eq!(flags::<Drawing>("--shape angular"), drawing(angular.clone()));
        assert_eq!(table::<Drawing>("shape.kind = 'angular'").unwrap(), drawing(angular));
        let drawn: Drawing = from_flags(&["--shape=nothing".to_owned()]).unwrap();
        assert_eq!(drawn.shape.kind(), "nothing");
        assert_eq!(flags::<Drawing>("--shape nothing"), drawing(json!({"kind": "nothing"})));

        let angular =
            json!({"kind": "angular", "sides": 6, "number": 5, "line": -0.5, "brush": {"hairs": [3]}});
        let given = "--shape angular --sides 6 --line=-0.5 --brush-hairs 3";
        assert_eq!(flags::<Drawing>(given), drawing(angular.clone()));
        let given = "[shape]\nkind = 'angular'\nsides = 6\nline = -0.5\nbrush.hairs = [3]";
        assert_eq!(table::<Drawing>(given).unwrap(), drawing(angular));
    }

    #[test]
    fn a_stage_has_its_own_defaults_for_its_own_kind_alone() {
        let painting = |shape| json!({"shape": shape, "colour": "blue"});
        let angular =
            json!({"kind": "angular", "sides": 4, "number": 9, "line": null, "brush": {"hairs": [1, 2]}});
        for (given, text) in [("", ""), ("--shape angular", "shape.kind = 'angular'")] {
            assert_eq!(flags::<Painting>(given), painting(angular.clone()), "{given}");
            assert_eq!(table::<Painting>(text).unwrap(), painting(angular.clone()), "{given}");
        }
        let round = json!({"kind": "round", "radius": 1.5, "number": 3});
        assert_eq!(flags::<Painting>("--shape round"), painting(round.clone()));
        assert_eq!(table::<Painting>("shape.kind = 'round'").unwrap(), painting(round));
        assert_eq!(flags::<Painting>("--number 2")["shape"]["number"], 2);
        assert_eq!(table::<Painting>("shape.number = 2").unwrap()["shape"]["number"], 2);
    }

    #[test]
    fn a_setting_of_another_kind_is_refused() {
        let said = "--sides has no effect with --shape round; it belongs to angular";
        assert!(refused::<Drawing>("--sides 3").contains(said), "{}", refused::<Drawing>("--sides 3"));
        assert!(refused::<Painting>("--shape nothing --radius 2").contains("--radius has no effect"));
        assert!(refused::<Drawing>("--shape square").contains("[possible values: round, angular, nothing]"));
        assert!(
            refused::<Drawing>("--shape angular --sides many").contains("invalid value 'many' for '--sides")
        );

        let cases = [
            (
                "[shape]\nsides = 3\nbrush.hairs = [1]",
                "[drawing.shape] sides has no effect with kind = \"round\"; it belongs to angular",
            ),
            (
                "shape.kind = 'square'",
                "[drawing.shape] kind is \"square\", expected one of round, angular, nothing",
            ),
            ("shape = 'angular'", "[drawing] shape is now a table: [drawing.shape] kind = \"angular\""),
            ("shape.radius = 'wide'", "[drawing.shape] radius: invalid type: string \"wide\""),
            ("colur = 'red'", "[drawing] colur is not known, expected one of colour, shape, size"),
            ("size = -1", "[drawing] size: invalid value: integer `-1`"),
            // Their names before there were groups.
            ("radius = 2", "[drawing] radius is now [drawing.shape] radius, of kind round"),
            ("number = 2", "[drawing] number is now [drawing.shape] number, of kind round or angular"),
            (
                "brush_hairs = [2]",
                "[drawing] brush_hairs is now [drawing.shape.brush] hairs, of kind angular",
            ),
        ];
        for (text, said) in cases {
            let error = table::<Drawing>(text).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
        let all = table::<Drawing>("shape.sides = 3\nshape.line = 0.5\nshape.brush.hairs = [1]").unwrap_err();
        assert!(["sides", "line", "brush"].iter().all(|key| all.contains(&format!("{key} has no"))), "{all}");
    }

    #[test]
    fn help_names_the_kinds_that_have_a_flag_and_their_defaults() {
        let help = |command: clap::Command| command.term_width(300).render_long_help().to_string();
        let help_of = |text: &str, flag: &str| -> String {
            let from = text.find(&format!("--{flag} ")).unwrap_or_else(|| panic!("no {flag} in {text}"));
            text[from..].lines().skip(1).take_while(|line| !line.trim().starts_with("--")).collect()
        };
        let drawing = help(<Drawing as clap::Args>::augment_args(clap::Command::new("draw")));
        let order = ["shape", "radius", "number", "sides", "line", "brush-hairs", "colour", "size"];
        let places = order.map(|flag| drawing.find(&format!("--{flag} ")).unwrap());
        assert!(places.is_sorted(), "{drawing}");
        assert!(help_of(&drawing, "number").contains("How many (round: 3; angular: 5)"), "{drawing}");
        assert!(help_of(&drawing, "sides").contains("Sides (angular)"), "{drawing}");
        assert!(help_of(&drawing, "sides").contains("[default: 4]"), "{drawing}");
        assert!(help_of(&drawing, "shape").contains("angular: A polygon"), "{drawing}");
        let painting = help(<Painting as clap::Args>::augment_args(clap::Command::new("paint")));
        assert!(help_of(&painting, "number").contains("How many (round: 3; angular: 9)"), "{painting}");
        assert!(!help_of(&painting, "number").contains("[default"), "{painting}");
        assert!(help_of(&painting, "shape").contains("[default: angular]"), "{painting}");
    }
}
