//! The inner loop of every product, and the switch between instruction sets: the only place with `unsafe`.

use crate::device::CpuLevel;

/// Rows of a tile.
pub(super) const MR: usize = 6;
/// Columns of a tile, the width of a panel.
pub(super) const NR: usize = 16;

/// A block of the result that stays in registers: 6 × 16 leaves 4 of AVX2's 16 for the operands.
pub(super) type Tile = [[f32; NR]; MR];

/// The order in which a row of the left operand is read: `count` segments that begin `stride` elements apart,
/// of `len` elements that are `step` apart.
///
/// A pixel of a `kh × kw` convolution over `c` channels is `kh` segments of `kw · c` neighbours, so that
/// no patch is ever copied; a row of a matrix is one segment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segments {
    pub count: usize,
    pub len: usize,
    pub stride: usize,
    pub step: usize,
}

impl Segments {
    /// The terms of the sum.
    pub fn terms(&self) -> usize {
        self.count * self.len
    }

    /// The offset of the last element from the row's start.
    fn reach(&self) -> usize {
        (self.count - 1) * self.stride + (self.len - 1) * self.step
    }
}

/// Adds the product of six rows and a panel to a tile: `tile[r][j] += Σ_k a[rows[r] + offset(k)] · panel[k][j]`,
/// `k` in the order of `segments`, one sum per element. So an element's bits depend on its row and column
/// only, not on its place in the tile.
///
/// `panel` holds [`Segments::terms`] rows of [`NR`].
///
/// # Panics
/// If a row or the panel is out of bounds.
pub(super) fn multiply_add(
    level: CpuLevel,
    a: &[f32],
    rows: &[usize; MR],
    segments: Segments,
    panel: &[f32],
    tile: &mut Tile,
) {
    if segments.terms() == 0 {
        return;
    }
    let last = rows.iter().max().map_or(0, |row| row + segments.reach());
    assert!(last < a.len(), "element {last} of {}", a.len());
    assert!(panel.len() >= segments.terms() * NR, "a panel of {} for {segments:?}", panel.len());
    #[cfg(target_arch = "x86_64")]
    if level == CpuLevel::Avx2 && has_avx2() {
        // SAFETY: the features are there; every row's last element is inside `a` and the offsets do not exceed
        // it; the panel has a row of NR for each term: all asserted above.
        return unsafe { multiply_add_avx2(a, rows, segments, panel, tile) };
    }
    let _ = level;
    multiply_add_portable(a, rows, segments, panel, tile);
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// # Safety
/// `rows[r] + s · stride + k · step < a.len()` for every row, `s < count`, `k < len`, and
/// `panel.len() >= count · len · NR`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply_add_avx2(
    a: &[f32],
    rows: &[usize; MR],
    segments: Segments,
    panel: &[f32],
    tile: &mut Tile,
) {
    use std::arch::x86_64::{_mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_storeu_ps};
    // SAFETY: each pointer is inside its slice by the contract above; a tile row has two vectors of 8.
    unsafe {
        let mut sums = [[std::arch::x86_64::_mm256_setzero_ps(); 2]; MR];
        for (sums, row) in sums.iter_mut().zip(&*tile) {
            *sums = [_mm256_loadu_ps(row.as_ptr()), _mm256_loadu_ps(row.as_ptr().add(8))];
        }
        let mut b = panel.as_ptr();
        for segment in 0..segments.count {
            let starts = rows.map(|row| a.as_ptr().add(row + segment * segments.stride));
            let mut offset = 0;
            for _ in 0..segments.len {
                let (b0, b1) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
                for (sums, start) in sums.iter_mut().zip(starts) {
                    let value = _mm256_broadcast_ss(&*start.add(offset));
                    sums[0] = _mm256_fmadd_ps(value, b0, sums[0]);
                    sums[1] = _mm256_fmadd_ps(value, b1, sums[1]);
                }
                b = b.add(NR);
                offset += segments.step;
            }
        }
        for (sums, row) in sums.iter().zip(tile) {
            _mm256_storeu_ps(row.as_mut_ptr(), sums[0]);
            _mm256_storeu_ps(row.as_mut_ptr().add(8), sums[1]);
        }
    }
}

fn multiply_add_portable(a: &[f32], rows: &[usize; MR], segments: Segments, panel: &[f32], tile: &mut Tile) {
    let mut panel = panel.chunks_exact(NR);
    for segment in 0..segments.count {
        for (k, b) in (0..segments.len).zip(&mut panel) {
            let offset = segment * segments.stride + k * segments.step;
            for (sums, row) in tile.iter_mut().zip(rows) {
                let value = a[row + offset];
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum += value * b;
                }
            }
        }
    }
}

/// How a level multiplies and adds.
pub(super) trait Arithmetic {
    /// `a · b + c`.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;
}

/// Rounded once: FMA.
pub(super) struct Fused;
/// Rounded twice.
pub(super) struct Apart;

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

/// A plain loop that [`run`] compiles once for each level.
///
/// `run` must be `#[inline(always)]`, else it is not compiled with the features of the caller.
pub(super) trait Loop {
    /// What the loop returns.
    type Output;
    /// The loop.
    fn run<A: Arithmetic>(self) -> Self::Output;
}

/// Runs a loop at a level.
pub(super) fn run<L: Loop>(level: CpuLevel, body: L) -> L::Output {
    #[cfg(target_arch = "x86_64")]
    if level == CpuLevel::Avx2 && has_avx2() {
        // SAFETY: the features, the only requirement, are there.
        return unsafe { run_avx2(body) };
    }
    let _ = level;
    body.run::<Apart>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2<L: Loop>(body: L) -> L::Output {
    body.run::<Fused>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_is_the_sum_of_products_over_its_segments() {
        let a: Vec<f32> = (0..200).map(|i| (i % 13) as f32 - 6.0).collect();
        let segments = Segments { count: 3, len: 5, stride: 20, step: 2 };
        let panel: Vec<f32> = (0..segments.terms() * NR).map(|i| (i % 7) as f32 - 3.0).collect();
        let rows = [0, 7, 7, 30, 11, 100];
        for level in [CpuLevel::Portable, CpuLevel::Avx2] {
            let mut tile = [[1.0; NR]; MR];
            multiply_add(level, &a, &rows, segments, &panel, &mut tile);
            for (r, row) in rows.iter().enumerate() {
                for j in 0..NR {
                    let term = |s: usize, k: usize| a[row + s * 20 + k * 2] * panel[(s * 5 + k) * NR + j];
                    let sum: f32 = (0..3).map(|s| (0..5).map(|k| term(s, k)).sum::<f32>()).sum();
                    assert_eq!(tile[r][j], 1.0 + sum); // small integers: exact
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "element 15 of 15")]
    fn a_row_out_of_bounds_panics() {
        let segments = Segments { count: 1, len: 15, stride: 0, step: 1 };
        let mut tile = [[0.0; NR]; MR];
        multiply_add(CpuLevel::get(), &[0.0; 15], &[0, 0, 0, 0, 0, 1], segments, &[0.0; 240], &mut tile);
    }
}
