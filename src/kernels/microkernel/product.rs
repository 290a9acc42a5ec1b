//! The product of rows at arbitrary positions and panels of columns.

use std::mem::MaybeUninit;

use super::{arithmetic::Arithmetic, level::dispatch, vector::Vector};
use crate::device::CpuLevel;

/// Columns of a panel: two registers of AVX2, one of AVX-512.
pub(in super::super) const NR: usize = 16;

/// The order in which a row of the left operand is read: `count` segments that begin `stride` elements apart,
/// of `len` elements that are `step` apart.
///
/// A pixel of a `kh × kw` convolution over `c` channels is `kh` segments of `kw · c` contiguous elements, so no
/// patch is ever copied; a row of a matrix is one segment.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Segments {
    pub count: usize,
    pub len: usize,
    pub stride: usize,
    pub step: usize,
    /// From the rows of a panel that belong to one segment to those of the next; [`Segments::new`] sets it to
    /// that of panels without gaps.
    pub panel_stride: usize,
}

impl Segments {
    /// Segments over panels that hold a row for each term, one after another.
    pub fn new(count: usize, len: usize, stride: usize, step: usize) -> Self {
        Self { count, len, stride, step, panel_stride: len * NR }
    }

    /// `len` neighbours.
    pub fn one(len: usize) -> Self {
        Self::new(1, len, 0, 1)
    }

    /// The terms of the sum.
    pub fn terms(&self) -> usize {
        self.count * self.len
    }

    /// The offset of the last element from the row's start.
    fn reach(&self) -> usize {
        (self.count - 1) * self.stride + (self.len - 1) * self.step
    }

    /// The floats of a panel from its first to its last term.
    fn panel_reach(&self) -> usize {
        (self.count - 1) * self.panel_stride + self.len * NR
    }
}

/// The initial values of the sums.
#[derive(Clone, Copy, Debug)]
pub(in super::super) enum Start<'a> {
    /// Zero.
    Zero,
    /// A value for each column, as long as all panels are wide: see [`pad_columns`].
    Bias(&'a [f32]),
    /// Zero, with the finished sums added to the output: one more rounding, so that long sums can be divided into
    /// blocks.
    Add,
}

/// A value for each column, with zeros up to the end of the last panel.
pub(in super::super) fn pad_columns(values: &[f32]) -> Vec<f32> {
    let mut padded = values.to_vec();
    padded.resize(values.len().next_multiple_of(NR), 0.0);
    padded
}

/// The operands of [`product`].
#[derive(Clone, Copy)]
pub(in super::super) struct Product<'a> {
    /// What the rows are read from.
    pub a: &'a [f32],
    /// Where each row begins.
    pub rows: &'a [usize],
    /// How a row continues.
    pub segments: Segments,
    /// Panels of [`NR`] columns; columns past the last hold anything.
    pub panels: &'a [f32],
    /// From one panel to the next.
    pub panel_len: usize,
    /// Columns of the result.
    pub columns: usize,
}

/// `out[r · pitch + j] = Σ_k a[rows[r] + offset(k)] · panels[j][k]` for every row `r` and column `j`, `k` in the
/// order of the segments, one sum per element: so an element's bits depend only on its row and its column.
///
/// # Panics
/// If a row, a panel or an element of the output is out of bounds, or there are no terms.
pub(in super::super) fn product(
    level: CpuLevel,
    operands: &Product,
    start: Start,
    out: &mut [f32],
    pitch: usize,
) {
    // SAFETY: floats that may be written are floats that need not be there.
    let out = unsafe { &mut *(std::ptr::from_mut(out) as *mut [MaybeUninit<f32>]) };
    checked(level, operands, start, out, pitch);
}

/// [`product`] from zero or a bias into contiguous rows, which need not be initialised.
///
/// # Panics
/// As [`product`], or if the output has not exactly the result's size.
pub(in super::super) fn first_product<'a>(
    level: CpuLevel,
    operands: &Product,
    bias: Option<&[f32]>,
    out: &'a mut [MaybeUninit<f32>],
) -> &'a mut [f32] {
    let columns = operands.columns;
    assert_eq!(out.len(), operands.rows.len() * columns, "the elements of a product");
    checked(level, operands, bias.map_or(Start::Zero, Start::Bias), out, columns);
    // SAFETY: the rows that have been written have no gaps.
    unsafe { out.assume_init_mut() }
}

/// Writes every element of `rows · columns`, and reads none first unless it adds to them.
fn checked(level: CpuLevel, operands: &Product, start: Start, out: &mut [MaybeUninit<f32>], pitch: usize) {
    let Product { a, rows, segments, panels, panel_len, columns } = *operands;
    let Some(&last_row) = rows.iter().max() else { return };
    if columns == 0 {
        return;
    }
    let n_panels = columns.div_ceil(NR);
    assert!(segments.terms() > 0, "a sum of no terms: {segments:?}");
    let last = last_row + segments.reach();
    assert!(last < a.len(), "element {last} of {}", a.len());
    let end = (n_panels - 1) * panel_len + segments.panel_reach();
    assert!(end <= panels.len(), "panels of {} for {segments:?}, {columns} columns", panels.len());
    if let Start::Bias(bias) = start {
        assert!(bias.len() >= n_panels * NR, "a bias of {} for {columns} columns", bias.len());
    }
    let end = (rows.len() - 1) * pitch + columns;
    assert!(end <= out.len() && columns <= pitch, "{end} elements of {}, rows of {pitch}", out.len());
    let out = out.as_mut_ptr().cast::<f32>();
    // SAFETY: every element that is read or written is inside its slice, as asserted; only `Start::Add` reads
    // the output, which `first_product` never asks for.
    unsafe { dispatch!(level, all_rows, (operands: &Product, start: Start, out: *mut f32, pitch: usize)) }
}

/// # Safety
/// What [`checked`] asserts; the CPU has the instructions of `V`.
#[inline(always)]
unsafe fn all_rows<V: Vector, A: Arithmetic>(operands: &Product, start: Start, out: *mut f32, pitch: usize) {
    let mut column = 0;
    while column < operands.columns {
        // SAFETY: the column is one of the result.
        column += unsafe {
            match V::LANES {
                // 12 × 32 leaves 8 of 32 registers for the operands; a last panel alone goes without a partner.
                16 if operands.columns - column > NR => {
                    panel::<V, 12, 2>(operands, start, column, out, pitch)
                }
                16 => panel::<V, 12, 1>(operands, start, column, out, pitch),
                // 6 × 16 leaves 4 of AVX2's 16.
                _ => panel::<V, 6, 2>(operands, start, column, out, pitch),
            }
        };
    }
}

/// The columns of `C` registers from `column` on, for all rows. Returns how many columns those are.
///
/// # Safety
/// As [`all_rows`]; `column` is a multiple of [`NR`] below `operands.columns`.
#[inline(always)]
unsafe fn panel<V: Vector, const R: usize, const C: usize>(
    operands: &Product,
    start: Start,
    column: usize,
    out: *mut f32,
    pitch: usize,
) -> usize {
    let mut first = 0;
    let n_rows = operands.rows.len();
    // SAFETY: the tiles are cut so that their rows are there.
    unsafe {
        while first + R <= n_rows {
            tile::<V, R, C>(operands, start, first, column, out, pitch);
            first += R;
        }
        macro_rules! rest {
            ($($rows:literal)*) => {
                match n_rows - first {
                    $($rows if $rows < R => tile::<V, $rows, C>(operands, start, first, column, out, pitch),)*
                    _ => {}
                }
            };
        }
        rest!(1 2 3 4 5 6 7 8 9 10 11);
    }
    C * V::LANES
}

/// `R` rows from `first` on by `C` registers of columns: the sums stay in registers.
///
/// # Safety
/// As [`panel`], and `first + R <= operands.rows.len()`.
#[inline(always)]
unsafe fn tile<V: Vector, const R: usize, const C: usize>(
    operands: &Product,
    start: Start,
    first: usize,
    column: usize,
    out: *mut f32,
    pitch: usize,
) {
    let Product { a, rows, segments, panels, panel_len, columns } = *operands;
    // SAFETY: all offsets are below the ends that `checked` asserts; a panel has NR floats for each term, and
    // so has the bias; what would lie behind the last column goes to a buffer.
    unsafe {
        let mut sums = [[V::splat(0.0); C]; R];
        if let Start::Bias(bias) = start {
            for row in &mut sums {
                for (c, sum) in row.iter_mut().enumerate() {
                    *sum = V::load(bias.as_ptr().add(column + c * V::LANES));
                }
            }
        }
        let rows: &[usize; R] = &*rows.as_ptr().add(first).cast();
        let panels = panels.as_ptr().add(column / NR * panel_len);
        for segment in 0..segments.count {
            let starts = rows.map(|row| a.as_ptr().add(row + segment * segments.stride));
            let mut b = panels.add(segment * segments.panel_stride);
            let mut offset = 0;
            for _ in 0..segments.len {
                let mut registers = [V::splat(0.0); C];
                for (c, register) in registers.iter_mut().enumerate() {
                    *register = V::load(b.add(c * V::LANES / NR * panel_len + c * V::LANES % NR));
                }
                for r in 0..R {
                    let value = V::splat(*starts[r].add(offset));
                    for c in 0..C {
                        sums[r][c] = value.mul_add(registers[c], sums[r][c]);
                    }
                }
                b = b.add(NR);
                offset += segments.step;
            }
        }
        let used = (columns - column).min(C * V::LANES);
        let out = out.add(first * pitch + column);
        for (r, sums) in sums.iter().enumerate() {
            let out = out.add(r * pitch);
            if used == C * V::LANES {
                for (c, &sum) in sums.iter().enumerate() {
                    let out = out.add(c * V::LANES);
                    match start {
                        Start::Add => sum.add(V::load(out)).store(out),
                        _ => sum.store(out),
                    }
                }
            } else {
                let mut buffer = [0f32; 2 * NR];
                for (c, &sum) in sums.iter().enumerate() {
                    sum.store(buffer.as_mut_ptr().add(c * V::LANES));
                }
                for (j, sum) in buffer[..used].iter().enumerate() {
                    match start {
                        Start::Add => *out.add(j) += sum,
                        _ => *out.add(j) = *sum,
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{arithmetic::Apart, vector::Plain},
        *,
    };
    use crate::kernels::testing::{LEVELS, random, values};

    #[test]
    fn an_element_is_the_sum_of_products_over_its_segments() {
        let a: Vec<f32> = (0..400).map(|i| (i % 13) as f32 - 6.0).collect();
        let gap = 3;
        let mut segments = Segments::new(3, 5, 20, 2);
        segments.panel_stride += gap;
        let panel_len = 3 * segments.panel_stride + 1;
        let panels: Vec<f32> = (0..4 * panel_len).map(|i| (i % 7) as f32 - 3.0).collect();
        for n_rows in 1..=25 {
            let rows: Vec<usize> = (0..n_rows).map(|r| r * 37 % 300).collect();
            for columns in [1, 15, 16, 17, 33, 48, 50] {
                let bias: Vec<f32> = (0..64).map(|j| j as f32).collect();
                for level in LEVELS {
                    let pitch = columns + 2;
                    let sum = |r: usize, j: usize| -> f32 {
                        let panel = &panels[j / NR * panel_len..];
                        let term = |s: usize, k: usize| {
                            a[rows[r] + s * 20 + k * 2] * panel[s * segments.panel_stride + k * NR + j % NR]
                        };
                        (0..3).map(|s| (0..5).map(|k| term(s, k)).sum::<f32>()).sum()
                    };
                    let operands =
                        Product { a: &a, rows: &rows, segments, panels: &panels, panel_len, columns };
                    for (start, offset) in
                        [(Start::Zero, [0.0; 2]), (Start::Bias(&bias), [0.0, 1.0]), (Start::Add, [7.0, 0.0])]
                    {
                        let mut out = vec![7.0; n_rows * pitch];
                        product(level, &operands, start, &mut out, pitch);
                        for (r, row) in out.chunks_exact(pitch).enumerate() {
                            for (j, &value) in row[..columns].iter().enumerate() {
                                // Small integers: exact.
                                assert_eq!(value, offset[0] + offset[1] * bias[j] + sum(r, j));
                            }
                            assert_eq!(row[columns..], [7.0; 2]);
                        }
                    }
                }
            }
        }
    }

    /// The shape of AVX-512's tiles, on any machine.
    #[test]
    fn wide_registers_give_the_bits_of_narrow_ones() {
        let a = values(&random(1, 40 * 9));
        let rows: Vec<usize> = (0..40).map(|r| r * 9).collect();
        let panels = values(&random(2, 5 * 9 * NR));
        for n_rows in 1..40 {
            for columns in [3, 16, 20, 32, 40, 75] {
                let operands = Product {
                    a: &a,
                    rows: &rows[..n_rows],
                    segments: Segments::one(9),
                    panels: &panels,
                    panel_len: 9 * NR,
                    columns,
                };
                let (mut narrow, mut wide) = (vec![0.5; n_rows * columns], vec![0.5; n_rows * columns]);
                // SAFETY: the operands are those of a product that is checked in the other test.
                unsafe {
                    all_rows::<Plain<8, Apart>, Apart>(&operands, Start::Add, narrow.as_mut_ptr(), columns);
                    all_rows::<Plain<16, Apart>, Apart>(&operands, Start::Add, wide.as_mut_ptr(), columns);
                }
                assert_eq!(narrow, wide);
            }
        }
    }

    #[test]
    #[should_panic(expected = "element 15 of 15")]
    fn a_row_out_of_bounds_panics() {
        let segments = Segments::one(15);
        let operands = Product {
            a: &[0.0; 15],
            rows: &[0, 1],
            segments,
            panels: &[0.0; 240],
            panel_len: 240,
            columns: 16,
        };
        product(CpuLevel::get(), &operands, Start::Zero, &mut [0.0; 32], 16);
    }
}
