//! Choosing images: a selection by scores and gates, written as a data set. The gates themselves are in `curate`.

mod curate;
mod materialize;

register_stages!(curate::Curate, materialize::Materialize);
