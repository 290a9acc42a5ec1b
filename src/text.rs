//! Settings that are written as text everywhere: in flags, TOML and JSON.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer};

/// A value as a file may write it: `workers = 2` means `workers = "2"`.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text or a number")]
pub enum Written {
    /// A whole number.
    Integer(i64),
    /// Any other number.
    Number(f64),
    /// Text.
    Text(String),
}

impl Written {
    /// The text. Fails for a number with a fraction, which may have been written differently: `1.10` is read as
    /// 1.1.
    pub fn into_text(self) -> Result<String, String> {
        match self {
            Self::Integer(n) => Ok(n.to_string()),
            Self::Number(n) => Err(format!("found the number {n}, expected a text: put it in quotes")),
            Self::Text(text) => Ok(text),
        }
    }
}

/// A list of paths, or a single path that stands for a list of one, as a TOML key or a flag may give it.
pub fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Given {
        One(PathBuf),
        Many(Vec<PathBuf>),
    }
    Ok(match Given::deserialize(deserializer)? {
        Given::One(one) => vec![one],
        Given::Many(many) => many,
    })
}

/// Makes a type with `FromStr<Err = String>` and `Display` suitable for `#[serde(try_from = "Written", into =
/// "String")]`.
macro_rules! serde_as_text {
    ($type:ty) => {
        impl TryFrom<crate::text::Written> for $type {
            type Error = String;

            fn try_from(written: crate::text::Written) -> std::result::Result<Self, String> {
                written.into_text()?.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }
    };
}

/// One of a few named values; the names stand for them in flags, tables and records.
pub trait Named: std::str::FromStr<Err = String> + std::fmt::Display + Clone + Send + Sync + 'static {
    /// The names, each with its meaning.
    const NAMES: &'static [(&'static str, &'static str)];
}

/// Declares an enum of plain values, each with its name, and makes it [`Named`]: `Display`, `FromStr` and serde use the names.
macro_rules! named {
    (
        $(#[$meta:meta])*
        pub enum $type:ident $(default $default:ident)? {
            $($(#[doc = $about:literal])+ $variant:ident = $name:literal),+ $(,)?
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        #[serde(try_from = "crate::text::Written", into = "String")]
        pub enum $type {
            $($(#[doc = $about])+ $variant),+
        }

        $(impl Default for $type {
            fn default() -> Self {
                Self::$default
            }
        })?

        impl crate::text::Named for $type {
            const NAMES: &'static [(&'static str, &'static str)] = &[$(($name, concat!($($about),+))),+];
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self {
                    $(Self::$variant => $name),+
                })
            }
        }

        impl std::str::FromStr for $type {
            type Err = String;
            fn from_str(name: &str) -> std::result::Result<Self, String> {
                match name {
                    $($name => Ok(Self::$variant),)+
                    _ => Err(format!("found '{name}', expected {}", [$($name),+].join(" or "))),
                }
            }
        }

        serde_as_text!($type);
    };
}
