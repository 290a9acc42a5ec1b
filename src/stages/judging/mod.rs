//! Judging images: labels and confidence, distance from real images, discriminators, scores, ARC.

mod arc;
mod fit_discriminator;
mod label;
mod quality;
mod rank;
mod score;

register_stages!(
    label::Label,
    quality::Quality,
    fit_discriminator::FitDiscriminator,
    score::Score,
    arc::EstimateArc,
    rank::Rank
);
