//! The tile transforms of Winograd's minimal filtering F(4×4, 3×3) (Lavin & Gray 2016, §4.3), over channels.
//!
//! With `Bᵀ`, `G` and `Aᵀ` of the Toom-Cook construction, the 4 × 4 outputs of a 3 × 3 kernel `g` over a 6 × 6
//! tile `d` are `Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A`, and `∂/∂g = Gᵀ [(A ∂Y Aᵀ) ⊙ (Bᵀ d B)] G`. The points are 0,
//! ±5/8, ±3/2 and ∞ instead of the customary 0, ±1, ±2 and ∞: that halves the rounding error, and all
//! coefficients but those of `G` stay exact.

use std::ops::Range;

use super::{
    arithmetic::Arithmetic,
    level::dispatch,
    product::NR,
    vector::{Lane, Vector},
};
use crate::device::CpuLevel;

/// Elements of a transformed tile: 6 × 6.
pub(in super::super) const INPUT: usize = 36;
/// Outputs of a tile in each direction.
pub(in super::super) const OUTPUT: usize = 4;
/// Taps of a kernel: 3 × 3.
pub(in super::super) const TAPS: usize = 9;

/// The points and what the transforms make of them.
const P: f32 = 0.625;
const Q: f32 = 1.5;
const P2: f32 = P * P;
const Q2: f32 = Q * Q;
/// `1 / ∏ (p - q)` over the other points `q`: at 0, at ±5/8 and at ±3/2.
const F0: f32 = 1.0 / (P2 * Q2);
const FP: f32 = 1.0 / (2.0 * P2 * (P2 - Q2));
const FQ: f32 = 1.0 / (2.0 * Q2 * (Q2 - P2));

/// Pixels surrounded by zeros: those with rows and columns in these ranges of a tile are in `data`, the first one
/// at `start`, pixels `channels` apart and rows `pitch` apart.
#[derive(Clone, Debug)]
pub(in super::super) struct Window {
    pub start: usize,
    pub pitch: usize,
    pub channels: usize,
    pub rows: Range<usize>,
    pub cols: Range<usize>,
}

impl Window {
    /// Where the pixel of row `i` and column `j` is.
    #[inline(always)]
    fn offset(&self, i: usize, j: usize) -> usize {
        self.start + (i - self.rows.start) * self.pitch + (j - self.cols.start) * self.channels
    }

    fn is_empty(&self) -> bool {
        self.rows.is_empty() || self.cols.is_empty()
    }

    /// Asserts that the first `channels` of all pixels are inside.
    fn check(&self, side: usize, channels: usize, len: usize) {
        assert!(self.rows.end <= side && self.cols.end <= side, "{self:?} of a tile of {side}");
        if !self.is_empty() {
            let end = self.offset(self.rows.end - 1, self.cols.end - 1) + channels;
            assert!(channels <= self.channels && end <= len, "{end} elements of {len}");
        }
    }
}

/// Where the elements of a transformed tile go: element `p` of channel `c` to
/// `p · element + c / 16 · panel + c % 16`.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Place {
    pub element: usize,
    pub panel: usize,
}

impl Place {
    #[inline(always)]
    fn offset(&self, p: usize, c: usize) -> usize {
        p * self.element + c / NR * self.panel + c % NR
    }

    fn check(&self, channels: usize, len: usize) {
        assert!(self.panel >= NR || channels <= NR, "{self:?} of {channels} channels: panels overlap");
        let end = self.offset(INPUT - 1, channels.saturating_sub(1)) + 1;
        assert!(end <= len, "{end} elements of {len}");
    }
}

/// Calls a function at a level for each register of channels, and for single channels at the end: with the arguments
/// and the first of the channels.
macro_rules! each_channel {
    ($level:expr, $channels:expr, $function:ident($($arg:ident: $type:ty),*)) => {{
        #[inline(always)]
        unsafe fn all<V: Vector, R: Arithmetic>($($arg: $type),*) {
            let mut c = 0;
            // SAFETY: the caller's.
            unsafe {
                while c + V::LANES <= $channels {
                    $function::<V>($($arg,)* c);
                    c += V::LANES;
                }
                while c < $channels {
                    $function::<Lane<R>>($($arg,)* c);
                    c += 1;
                }
            }
        }
        dispatch!($level, all, ($($arg: $type),*))
    }};
}

/// `Bᵀ d B` of the 6 × 6 pixels of a window, for all its channels.
///
/// # Panics
/// If the window or the place is out of bounds.
pub(in super::super) fn input_tile(
    level: CpuLevel,
    x: &[f32],
    window: &Window,
    out: &mut [f32],
    place: Place,
) {
    window.check(6, window.channels, x.len());
    place.check(window.channels, out.len());
    // SAFETY: window and place are inside, as checked.
    unsafe {
        each_channel!(level, window.channels, input(x: &[f32], window: &Window, out: &mut [f32], place: Place));
    }
}

/// `A ∂Y Aᵀ` of the 4 × 4 pixels of a window, for all its channels.
///
/// # Panics
/// If the window or the place is out of bounds.
pub(in super::super) fn gradient_tile(
    level: CpuLevel,
    dy: &[f32],
    window: &Window,
    out: &mut [f32],
    place: Place,
) {
    window.check(OUTPUT, window.channels, dy.len());
    place.check(window.channels, out.len());
    // SAFETY: window and place are inside, as checked.
    unsafe {
        each_channel!(level, window.channels, gradient(dy: &[f32], window: &Window, out: &mut [f32], place: Place));
    }
}

/// What [`output_tile`] transforms back.
#[derive(Clone, Copy)]
pub(in super::super) struct Transformed<'a> {
    /// Element `p` of channel `c` is `m[p · element + c]`.
    pub m: &'a [f32],
    pub element: usize,
    /// The number of channels: the first this many of an output pixel.
    pub channels: usize,
    /// The value added to each channel.
    pub bias: Option<&'a [f32]>,
    /// Whether the result is added to the output.
    pub add: bool,
}

/// `Aᵀ m A + bias`, to the pixels of a window of `out`.
///
/// # Panics
/// If the window or `m` is out of bounds, or `bias` too short.
pub(in super::super) fn output_tile(level: CpuLevel, from: Transformed, out: &mut [f32], window: &Window) {
    let Transformed { m, element, channels, bias, .. } = from;
    window.check(OUTPUT, channels, out.len());
    Place { element, panel: NR }.check(channels, m.len());
    assert!(bias.is_none_or(|bias| bias.len() >= channels), "a bias shorter than {channels}");
    // SAFETY: window, elements and bias are inside, as checked.
    unsafe {
        each_channel!(level, from.channels, output(from: Transformed, out: &mut [f32], window: &Window));
    }
}

/// `G g Gᵀ` of 16 kernels side by side, to `out[p · element ..][.. 16]`.
///
/// # Panics
/// If an element is out of bounds.
pub(in super::super) fn transform_kernel(
    level: CpuLevel,
    g: &[[f32; NR]; TAPS],
    out: &mut [f32],
    element: usize,
) {
    Place { element, panel: NR }.check(NR, out.len());
    // SAFETY: the elements are inside, as checked.
    unsafe { each_channel!(level, NR, kernel(g: &[[f32; NR]; TAPS], out: &mut [f32], element: usize)) }
}

/// `Gᵀ u G` of 16 kernels side by side, from `u[p · element ..][.. 16]`.
///
/// # Panics
/// If an element is out of bounds.
pub(in super::super) fn kernel_gradient(
    level: CpuLevel,
    u: &[f32],
    element: usize,
    out: &mut [[f32; NR]; TAPS],
) {
    Place { element, panel: NR }.check(NR, u.len());
    // SAFETY: the elements are inside, as checked.
    unsafe { each_channel!(level, NR, taps(u: &[f32], element: usize, out: &mut [[f32; NR]; TAPS])) }
}

/// # Safety
/// As [`Vector`].
#[inline(always)]
unsafe fn scaled<V: Vector>(v: V, by: f32, plus: V) -> V {
    // SAFETY: by the contract.
    unsafe { v.mul_add(V::splat(by), plus) }
}

/// One direction of `Bᵀ`.
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
unsafe fn b_transposed<V: Vector>(d: [V; 6]) -> [V; 6] {
    // SAFETY: by the contract.
    unsafe {
        let (even_a, odd_a) = (scaled(d[2], -Q2, d[4]), scaled(d[1], -Q2, d[3]));
        let (even_b, odd_b) = (scaled(d[2], -P2, d[4]), scaled(d[1], -P2, d[3]));
        [
            scaled(d[0], P2 * Q2, scaled(d[2], -(P2 + Q2), d[4])),
            scaled(odd_a, P, even_a),
            scaled(odd_a, -P, even_a),
            scaled(odd_b, Q, even_b),
            scaled(odd_b, -Q, even_b),
            scaled(d[1], P2 * Q2, scaled(d[3], -(P2 + Q2), d[5])),
        ]
    }
}

/// One direction of `Aᵀ`.
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
unsafe fn a_transposed<V: Vector>(m: [V; 6]) -> [V; 4] {
    // SAFETY: by the contract.
    unsafe {
        let (sum_a, sum_b) = (m[1].add(m[2]), m[3].add(m[4]));
        let (difference_a, difference_b) = (m[1].sub(m[2]), m[3].sub(m[4]));
        [
            m[0].add(sum_a).add(sum_b),
            scaled(difference_a, P, difference_b.mul(V::splat(Q))),
            scaled(sum_a, P2, sum_b.mul(V::splat(Q2))),
            scaled(difference_a, P2 * P, scaled(difference_b, Q2 * Q, m[5])),
        ]
    }
}

/// One direction of `A`.
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
unsafe fn a<V: Vector>(y: [V; 4]) -> [V; 6] {
    // SAFETY: by the contract.
    unsafe {
        let (even_a, odd_a) = (scaled(y[2], P2, y[0]), scaled(y[3], P2, y[1]));
        let (even_b, odd_b) = (scaled(y[2], Q2, y[0]), scaled(y[3], Q2, y[1]));
        [
            y[0],
            scaled(odd_a, P, even_a),
            scaled(odd_a, -P, even_a),
            scaled(odd_b, Q, even_b),
            scaled(odd_b, -Q, even_b),
            y[3],
        ]
    }
}

/// One direction of `G`.
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
unsafe fn g<V: Vector>(g: [V; 3]) -> [V; 6] {
    // SAFETY: by the contract.
    unsafe {
        let even_a = scaled(g[2], P2, g[0]).mul(V::splat(FP));
        let even_b = scaled(g[2], Q2, g[0]).mul(V::splat(FQ));
        [
            g[0].mul(V::splat(F0)),
            scaled(g[1], P * FP, even_a),
            scaled(g[1], -P * FP, even_a),
            scaled(g[1], Q * FQ, even_b),
            scaled(g[1], -Q * FQ, even_b),
            g[2],
        ]
    }
}

/// One direction of `Gᵀ`.
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
unsafe fn g_transposed<V: Vector>(u: [V; 6]) -> [V; 3] {
    // SAFETY: by the contract.
    unsafe {
        let (sum_a, sum_b) = (u[1].add(u[2]).mul(V::splat(FP)), u[3].add(u[4]).mul(V::splat(FQ)));
        let difference_b = u[3].sub(u[4]).mul(V::splat(Q * FQ));
        [
            scaled(u[0], F0, sum_a.add(sum_b)),
            scaled(u[1].sub(u[2]), P * FP, difference_b),
            scaled(sum_a, P2, scaled(sum_b, Q2, u[5])),
        ]
    }
}

/// Both directions of a transform of a tile: `$n` × `$n` registers from a load at (i, j) to `$m` × `$m` for a
/// store. Not a function with closures: those would be compiled without the instructions of the level.
macro_rules! both_directions {
    ($n:literal to $m:literal by $transform:ident, |$i:ident, $j:ident| $load:expr, |$k:ident, $l:ident, $value:ident| $store:expr) => {{
        let zero = V::splat(0.0);
        let mut half = [[zero; $n]; $m];
        for $j in 0..$n {
            let mut column = [zero; $n];
            for $i in 0..$n {
                column[$i] = $load;
            }
            let column = $transform(column);
            for i in 0..$m {
                half[i][$j] = column[i];
            }
        }
        for $k in 0..$m {
            let row = $transform(half[$k]);
            for $l in 0..$m {
                let $value = row[$l];
                $store;
            }
        }
    }};
}

/// A pixel's channels from `c` on: zeros outside of the window.
///
/// # Safety
/// The window is inside of `x` and `c + V::LANES` at most its channels.
#[inline(always)]
unsafe fn pixel<V: Vector>(x: &[f32], window: &Window, i: usize, j: usize, c: usize) -> V {
    // SAFETY: by the contract.
    unsafe {
        if window.rows.contains(&i) && window.cols.contains(&j) {
            V::load(x.as_ptr().add(window.offset(i, j) + c))
        } else {
            V::splat(0.0)
        }
    }
}

/// # Safety
/// Window and place are inside of `x` and `out`, the channels from `c` on those of both; the CPU has the instructions
/// of `V`.
#[inline(always)]
unsafe fn input<V: Vector>(x: &[f32], window: &Window, out: &mut [f32], place: Place, c: usize) {
    // SAFETY: by the contract.
    unsafe {
        let out = out.as_mut_ptr().add(place.offset(0, c));
        if window.rows == (0..6) && window.cols == (0..6) {
            let x = x.as_ptr().add(window.start + c);
            both_directions!(
                6 to 6 by b_transposed,
                |i, j| V::load(x.add(i * window.pitch + j * window.channels)),
                |i, j, v| v.store(out.add((6 * i + j) * place.element))
            );
        } else {
            both_directions!(
                6 to 6 by b_transposed,
                |i, j| pixel::<V>(x, window, i, j, c),
                |i, j, v| v.store(out.add((6 * i + j) * place.element))
            );
        }
    }
}

/// # Safety
/// As [`input`], of `dy`.
#[inline(always)]
unsafe fn gradient<V: Vector>(dy: &[f32], window: &Window, out: &mut [f32], place: Place, c: usize) {
    // SAFETY: by the contract.
    unsafe {
        let out = out.as_mut_ptr().add(place.offset(0, c));
        both_directions!(
            4 to 6 by a,
            |i, j| pixel::<V>(dy, window, i, j, c),
            |i, j, v| v.store(out.add((6 * i + j) * place.element))
        );
    }
}

/// # Safety
/// Elements, bias and window are inside of their slices, and have the channels from `c` on; the CPU has the
/// instructions of `V`.
#[inline(always)]
unsafe fn output<V: Vector>(from: Transformed, out: &mut [f32], window: &Window, c: usize) {
    // SAFETY: by the contract.
    unsafe {
        let m = from.m.as_ptr().add(c);
        let bias = match from.bias {
            Some(bias) => V::load(bias.as_ptr().add(c)),
            None => V::splat(0.0),
        };
        let out = out.as_mut_ptr();
        both_directions!(
            6 to 4 by a_transposed,
            |i, j| V::load(m.add((6 * i + j) * from.element)),
            |i, j, v| if window.rows.contains(&i) && window.cols.contains(&j) {
                let out = out.add(window.offset(i, j) + c);
                let v = v.add(bias);
                if from.add { v.add(V::load(out)) } else { v }.store(out);
            }
        );
    }
}

/// # Safety
/// The elements are inside of `out`, and `c` is a multiple of the lanes below [`NR`]; the CPU has the instructions of
/// `V`.
#[inline(always)]
unsafe fn kernel<V: Vector>(taps: &[[f32; NR]; TAPS], out: &mut [f32], element: usize, c: usize) {
    // SAFETY: by the contract; NR is a multiple of all lanes.
    unsafe {
        let out = out.as_mut_ptr().add(c);
        both_directions!(
            3 to 6 by g,
            |i, j| V::load(taps[3 * i + j].as_ptr().add(c)),
            |i, j, v| v.store(out.add((6 * i + j) * element))
        );
    }
}

/// # Safety
/// As [`kernel`], of `u`.
#[inline(always)]
unsafe fn taps<V: Vector>(u: &[f32], element: usize, out: &mut [[f32; NR]; TAPS], c: usize) {
    // SAFETY: by the contract; NR is a multiple of all lanes.
    unsafe {
        let u = u.as_ptr().add(c);
        both_directions!(
            6 to 3 by g_transposed,
            |i, j| V::load(u.add((6 * i + j) * element)),
            |i, j, v| v.store(out[3 * i + j].as_mut_ptr().add(c))
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{LEVELS, random, values};

    /// Lavin & Gray's identity for one channel, with everything else of the tile in place.
    #[test]
    fn a_tile_is_the_correlation_with_the_kernel() {
        let (d, g) = (values(&random(1, 36)), values(&random(2, 9)));
        let window = |side| Window { start: 0, pitch: side, channels: 1, rows: 0..side, cols: 0..side };
        for level in LEVELS {
            let (mut v, mut u) = ([0f32; 36], vec![0f32; 36 * NR]);
            input_tile(level, &d, &window(6), &mut v, Place { element: 1, panel: NR });
            let kernels: [[f32; NR]; 9] = std::array::from_fn(|t| [g[t]; NR]);
            transform_kernel(level, &kernels, &mut u, NR);
            let m: Vec<f32> = (0..36).map(|p| v[p] * u[p * NR + 5]).collect();
            let mut y = [0f32; 16];
            let from = Transformed { m: &m, element: 1, channels: 1, bias: Some(&[0.5]), add: false };
            output_tile(level, from, &mut y, &window(4));
            for (i, y) in y.iter().enumerate() {
                let at = |t: usize| f64::from(d[(i / 4 + t / 3) * 6 + i % 4 + t % 3]);
                let expected = 0.5 + (0..9).map(|t| at(t) * f64::from(g[t])).sum::<f64>();
                assert!((f64::from(*y) - expected).abs() < 1e-5, "{level:?} {i}: {y}, {expected}");
            }
        }
    }

    /// The transforms of the weight gradient are the adjoints of those of the output.
    #[test]
    fn gradient_transforms_are_the_adjoints() {
        let (d, dy) = (values(&random(1, 36)), values(&random(2, 16)));
        let window = |side| Window { start: 0, pitch: side, channels: 1, rows: 0..side, cols: 0..side };
        for level in LEVELS {
            let place = Place { element: 1, panel: NR };
            let (mut v, mut w) = ([0f32; 36], [0f32; 36]);
            input_tile(level, &d, &window(6), &mut v, place);
            gradient_tile(level, &dy, &window(4), &mut w, place);
            let u: Vec<f32> = (0..36).flat_map(|p| [v[p] * w[p]; NR]).collect();
            let mut dg = [[0f32; NR]; 9];
            kernel_gradient(level, &u, NR, &mut dg);
            for (t, dg) in dg.iter().enumerate() {
                let at = |i: usize| f64::from(d[(i / 4 + t / 3) * 6 + i % 4 + t % 3]) * f64::from(dy[i]);
                let expected = (0..16).map(at).sum::<f64>();
                assert!((f64::from(dg[9]) - expected).abs() < 1e-5, "{level:?} {t}: {}, {expected}", dg[9]);
            }
        }
    }

    #[test]
    #[should_panic(expected = "33 elements of 32")]
    fn a_window_out_of_bounds_panics() {
        let window = Window { start: 0, pitch: 9, channels: 1, rows: 0..4, cols: 0..6 };
        input_tile(CpuLevel::get(), &[0.0; 32], &window, &mut [0.0; 36], Place { element: 1, panel: NR });
    }

    #[test]
    fn outside_of_a_window_is_zero_and_stays_untouched() {
        let x = values(&random(1, 6 * 6 * 11));
        let whole = Window { start: 0, pitch: 66, channels: 11, rows: 0..6, cols: 0..6 };
        let part = Window { start: 2 * 66 + 11, rows: 2..5, cols: 1..4, ..whole.clone() };
        let zeroed: Vec<f32> = (0..x.len())
            .map(|i| if (2..5).contains(&(i / 66)) && (1..4).contains(&(i / 11 % 6)) { x[i] } else { 0.0 })
            .collect();
        let place = Place { element: 16, panel: NR };
        for level in LEVELS {
            let (mut a, mut b) = (vec![0f32; 36 * 16], vec![0f32; 36 * 16]);
            input_tile(level, &x, &part, &mut a, place);
            input_tile(level, &zeroed, &whole, &mut b, place);
            assert_eq!(a, b);
            let mut out = vec![7f32; 3 * 11 * 5];
            let small = Window { start: 0, pitch: 55, channels: 11, rows: 0..2, cols: 0..4 };
            let from = Transformed { m: &a, element: 16, channels: 11, bias: None, add: false };
            output_tile(level, from, &mut out, &small);
            let touched = |i: usize| i / 55 < 2 && i % 55 / 11 < 4;
            assert!(out.iter().enumerate().all(|(i, &v)| touched(i) != (v == 7.0)));
        }
    }
}
