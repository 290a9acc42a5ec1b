//! The tables on disk that stages exchange. Each module owns one of them: its columns, types, reader and writer;
//! stages do not spell out column names. A new column goes here, a new file format for images goes to `data`.
//!
//! | table | made by | |
//! |---|---|---|
//! | [`division`] | split | which real image serves what |
//! | [`pool`] | generate, import | images in shards, named by `uid` |
//! | [`labels`] | label | beside the pool's shards |
//! | [`scores`], [`features`] | score | beside the pool's shards |
//! | [`discriminators`] | fit-discriminator | networks, and the record of their sets |
//! | [`selection`] | curate | which images are kept, and why others are not |
//! | [`dataset`] | materialize | Hugging Face Parquet |
//! | [`images`], [`records`] | train, arc, evaluate, certify | one row an image; one record a stage |

pub mod dataset;
pub mod discriminators;
pub mod division;
pub mod features;
pub mod images;
pub mod labels;
pub mod pool;
pub mod records;
pub mod scores;
pub mod selection;
pub(crate) mod shards;
