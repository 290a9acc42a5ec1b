//! How good a proxy distribution is, and how close each of its samples is to the real data.
//!
//! [`arc`]: the area under the robust discrimination curve. [`score`]: the per-sample score. Both come from
//! discriminators, binary networks trained under attack to tell real (class 0) from synthetic (class 1).
//! [`discriminator`]: such a network at one radius. [`quality`]: the field's usual distances in a classifier's
//! features. [`neighbours`]: the nearest real images, by pixels. [`perceptual_hash`] and [`feature_hash`]: what
//! near-duplicates have in common.

pub mod arc;
pub mod calibration;
pub mod discriminator;
pub mod extractor;
pub mod feature_hash;
pub mod fold;
pub mod neighbours;
pub mod perceptual_hash;
#[cfg(feature = "extractors")]
pub mod pretrained;
pub mod quality;
pub mod score;

/// The class of a real image in a discriminator.
pub const REAL: u32 = 0;
/// The class of a synthetic image in a discriminator.
pub const SYNTHETIC: u32 = 1;
