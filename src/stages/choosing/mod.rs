//! Choosing images: selecting by scores and gates, and writing the selection as a data set. The gates themselves
//! are in `curate`.

mod curate;
mod materialize;

register_stages!(curate::Curate, materialize::Materialize);
