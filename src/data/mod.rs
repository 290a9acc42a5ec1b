//! Images in storage, and reading and writing them: sources, small tables, Hugging Face shards, batches.
//!
//! Pixels are u8 in (height, width, channel) order until [`batch`] makes tensors of them. Nothing read here is
//! trusted: bad input is [`Error::Data`](crate::Error::Data) naming file, row and value, never a panic. Everything
//! written here has the same bytes every time.

pub mod batch;
pub mod card;
pub mod check;
mod cut_mix;
pub mod hub;
pub mod image;
pub mod manifest;
mod part;
pub mod publish;
mod resized_crop;
pub mod source;
pub mod table;

pub use batch::{Augment, Crop, Range, augmented, from_chw, gaussian_noise, to_floats, to_tensor, to_u8};
pub use card::{Card, CardSplit, Config as CardConfig};
pub use cut_mix::cut_mix;
pub use hub::{Dtype, Feature, Features, ImageReader, ImageWriter, image_column};
pub use image::{Shape, decode_as, encode_png, grid};
pub use manifest::{FileEntry, Manifest};
pub use part::Part;
pub use source::{Dataset, OfficialSplit, Source, UNLABELLED};
