//! How a level multiplies and adds.

/// How a level multiplies and adds.
pub(in super::super) trait Arithmetic: Copy {
    /// `a · b + c`.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;
}

/// Rounded once: FMA.
#[derive(Clone, Copy)]
pub(in super::super) struct Fused;
/// Rounded twice.
#[derive(Clone, Copy)]
pub(in super::super) struct Apart;

impl Arithmetic for Fused {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

impl Arithmetic for Apart {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}
