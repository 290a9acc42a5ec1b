//! Settings that are written as text wherever they stand: flags, TOML, JSON.

/// Makes a type with `FromStr<Err = String>` and `Display` fit for `#[serde(try_from = "String", into = "String")]`.
macro_rules! serde_as_text {
    ($type:ty) => {
        impl TryFrom<String> for $type {
            type Error = String;

            fn try_from(text: String) -> std::result::Result<Self, String> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }
    };
}
