//! Functions of one number, without branches, so that loops over them vectorise.

use super::microkernel::Arithmetic;

/// `eˣ` for `x` in [-87.3, 88.3], else the value at the nearer end; NaN stays NaN. Relative error below 2e-7.
///
/// `x = n ln 2 + r`, a minimax polynomial for `(eʳ - 1 - r) / r²` (error 3e-9), and `2ⁿ` made of its bits.
#[inline(always)]
pub(super) fn exp<A: Arithmetic>(x: f32) -> f32 {
    const LOW: f32 = -87.3;
    const HIGH: f32 = 88.3;
    const LN2_HIGH: f32 = 0.693_145_75;
    const LN2_LOW: f32 = 1.428_606_8e-6;
    /// 1.5 · 2^23: adding it leaves the integer nearest to a small number in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // Not `clamp`: these comparisons keep a NaN and are one instruction each.
    let x = if x < LOW { LOW } else { x };
    let x = if x > HIGH { HIGH } else { x };
    let shifted = A::mul_add(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = A::mul_add(n, -LN2_LOW, A::mul_add(n, -LN2_HIGH, x));
    let mut p = 1.381_46e-3;
    for c in [8.368_717e-3, 0.041_668_39, 0.166_665_21, 0.499_999_94] {
        p = A::mul_add(p, r, c);
    }
    let y = A::mul_add(r * r, p, r) + 1.0;
    y * f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23)
}

/// The logistic function `1 / (1 + e⁻ˣ)`.
#[inline(always)]
pub(super) fn sigmoid<A: Arithmetic>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<A>(-x))
}

/// The lanes of [`sum`] and [`max`].
const LANES: usize = 8;

/// The sum of `f` over a slice, in eight interleaved partial sums that are added pairwise: always the same order.
#[inline(always)]
pub(super) fn sum(x: &[f32], f: impl Fn(usize, f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail = chunks.remainder();
    let start = x.len() - tail.len();
    for (c, chunk) in chunks.enumerate() {
        for l in 0..LANES {
            lanes[l] += f(c * LANES + l, chunk[l]);
        }
    }
    for (l, &v) in tail.iter().enumerate() {
        lanes[l] += f(start + l, v);
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// The largest element, NaN ignored; negative infinity if there is none.
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    let larger = |m: f32, v: f32| if v > m { v } else { m };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    for (lane, &v) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = v;
    }
    for chunk in chunks {
        for l in 0..LANES {
            lanes[l] = larger(lanes[l], chunk[l]);
        }
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, larger)
}

#[cfg(test)]
mod tests {
    use super::{
        super::microkernel::{Apart, Fused},
        *,
    };

    #[test]
    fn exp_is_right_to_2e_7() {
        for i in -873_000..=883_000 {
            let x = i as f32 / 1e4;
            let expected = f64::from(x).exp();
            for y in [exp::<Fused>(x), exp::<Apart>(x)] {
                assert!((f64::from(y) / expected - 1.0).abs() < 2e-7, "exp({x}) is {y}, expected {expected}");
            }
        }
    }

    #[test]
    fn exp_saturates_and_keeps_nan() {
        assert_eq!(exp::<Apart>(f32::NEG_INFINITY), exp::<Apart>(-87.3));
        assert_eq!(exp::<Apart>(f32::INFINITY), exp::<Apart>(88.3));
        assert!(exp::<Apart>(f32::NAN).is_nan());
        assert_eq!(exp::<Apart>(0.0), 1.0);
    }

    #[test]
    fn sums_take_every_element_once() {
        for n in [0, 1, 7, 8, 9, 23] {
            let x: Vec<f32> = (1..=n).map(|v| v as f32).collect();
            let expected: f32 = (1..=n).map(|v| (v * (v - 1)) as f32).sum();
            assert_eq!(sum(&x, |i, v| v * i as f32), expected);
        }
    }
}
