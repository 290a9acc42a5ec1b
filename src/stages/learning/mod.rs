//! Learning from images: training, attacking and certifying classifiers. The attacks themselves are in `attack`.

mod certify;
mod evaluate;
mod train;

register_stages!(train::Train, evaluate::Evaluate, certify::Certify);
