//! Settings as flags, and their defaults.

use clap::{
    Arg,
    builder::{ArgPredicate, PossibleValue, PossibleValuesParser, TypedValueParser},
};
use serde::{Serialize, de::DeserializeOwned};

use super::tagged::with_default_of;
use crate::text::Named;

/// Settings that are flags on the command line and a table in a pipeline file.
pub trait Settings: clap::Args + Serialize + DeserializeOwned {}

impl<T: clap::Args + Serialize + DeserializeOwned> Settings for T {}

/// Settings with these flags, such as `--steps=5`, and defaults for the rest.
///
/// Fails if there is no such flag, or if a value is impossible.
pub fn from_flags<T: clap::Args>(flags: &[String]) -> Result<T, clap::Error> {
    let command = T::augment_args(clap::Command::new("").no_binary_name(true));
    T::from_arg_matches(&command.try_get_matches_from(flags)?)
}

/// The value of a flag that takes one of a set of names.
pub fn named<T: Named>() -> impl TypedValueParser<Value = T> {
    let value = |&(name, about): &(&'static str, &'static str)| PossibleValue::new(name).help(about.trim());
    PossibleValuesParser::new(T::NAMES.iter().map(value)).try_map(|name| name.parse::<T>())
}

/// A key, its default and, for the flag of a kind, the keys and defaults that apply to this kind only.
pub type StageDefault = (&'static str, &'static str, &'static [(&'static str, &'static str)]);

/// A stage's defaults where they differ from those of its groups, for `#[command(mut_args(…))]`.
///
/// Keys are spelled like the flags, with `_`: `("optimizer", "adam", &[("learning_rate", "2e-4")])`.
pub fn defaults(all: &'static [StageDefault]) -> impl Fn(Arg) -> Arg {
    move |mut arg| {
        for &(flag, value, of_kind) in all {
            if arg.get_id() == flag {
                arg = arg.default_value(value);
            }
            if let Some(&(_, default)) = of_kind.iter().find(|(key, _)| arg.get_id() == *key) {
                let others = (flag, ArgPredicate::IsPresent, None);
                arg = with_default_of(arg, value, default)
                    .default_value(default)
                    .default_value_ifs([(flag, ArgPredicate::Equals(value.into()), Some(default)), others]);
            }
        }
        arg
    }
}
