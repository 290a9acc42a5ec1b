//! What a classifier gets right, as images are and under attack; what is found is kept as it is found.

mod accuracy;
mod attacks;
mod examined;

pub(crate) use self::{
    accuracy::{Perturb, correct_after, correct_after_apgd, correct_throughout, images},
    attacks::{Battle, Single, unit_pixels},
    examined::{Examined, expect_images},
};
