//! What settings may be.

use crate::Result;

/// Fails with [`Error::Usage`](crate::Error::Usage) if a number is outside a range, naming key, value and range.
pub fn expect<T: PartialOrd + std::fmt::Display>(key: &str, value: T, min: T, max: T) -> Result<()> {
    if value >= min && value <= max {
        return Ok(());
    }
    bail!(Usage, "{key} is {value}, expected {min} to {max}")
}

/// Fails with [`Error::Usage`](crate::Error::Usage) if norms cannot divide the channels of a network's stages into `groups`.
pub fn expect_channels(channels: &[usize], groups: usize) -> Result<()> {
    expect("groups", groups, 1, 4096)?;
    if channels.is_empty() || channels.iter().any(|c| *c == 0 || !c.is_multiple_of(groups)) {
        bail!(Usage, "channels is {channels:?}, expected multiples of groups = {groups}");
    }
    Ok(())
}
