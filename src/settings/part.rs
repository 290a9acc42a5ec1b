//! Settings of which images of a split are used.

use serde::{Deserialize, Serialize};

use crate::{Result, data::Part, error::expect_within};

/// Which of the images are used.
#[derive(clap::Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PartSettings {
    /// Use only N images, drawn evenly over the classes, the same for every seed; 0 for all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub limit: usize,
    /// Use only the first N images; not together with limit.
    #[arg(long, value_name = "N")]
    pub first: Option<usize>,
}

impl PartSettings {
    /// The part that they name. If both are set, which [`Self::validate`] refuses, `first` counts.
    pub fn part(&self) -> Part {
        match *self {
            Self { first: Some(n), .. } => Part::First(n),
            Self { limit: 0, .. } => Part::All,
            Self { limit: n, .. } => Part::Drawn(n),
        }
    }

    /// Fails with [`Error::Usage`](crate::Error::Usage) if both are set, or if there would be no images.
    pub fn validate(&self) -> Result<()> {
        let Some(first) = self.first else { return Ok(()) };
        if self.limit > 0 {
            bail!(Usage, "limit is {} and first {first}, expected one of them", self.limit);
        }
        expect_within("first", first, 1, usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_at_once_or_no_images_are_refused() {
        let settings = |limit, first| PartSettings { limit, first };
        for (settings, part) in [
            (settings(0, None), Part::All),
            (settings(5, None), Part::Drawn(5)),
            (settings(0, Some(5)), Part::First(5)),
        ] {
            settings.validate().unwrap();
            assert_eq!(settings.part(), part);
        }
        for (settings, said) in [
            (settings(5, Some(3)), "limit is 5 and first 3, expected one of them"),
            (settings(0, Some(0)), "first is 0, expected 1 to"),
        ] {
            let error = settings.validate().unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().starts_with(said), "{error}");
        }
    }
}
