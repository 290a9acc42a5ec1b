//! 3 × 3 convolution at stride 1 by Winograd's minimal filtering F(4×4, 3×3) (Lavin & Gray 2016): 36 products
//! for 16 outputs instead of 144.
//!
//! Tiles of 6 × 6 pixels, 4 apart, are transformed; then each of the 36 elements is a matrix product of tiles and
//! channels; then 4 × 4 outputs are transformed back. The three steps work on few tiles at a time, so that
//! intermediate results stay in the cache.

use std::{cell::Cell, ops::Range};

use super::geometry::{Bias, Geometry};
use crate::{
    device::CpuLevel,
    kernels::{
        microkernel::{
            INPUT, NR, OUTPUT, Place, Product, Segments, Start, TAPS, Transformed, Window, gradient_tile,
            input_tile, kernel_gradient, output_tile, product, transform_kernel, zeros,
        },
        parallel::{PARALLEL_WORK, for_each},
    },
};

/// A gap between the 36 elements, which otherwise would be powers of two apart and fall into one set of the cache.
const GAP: usize = NR;

/// Whether the tiles fit the image and there are enough input channels to make the transforms worthwhile.
/// Independent of the number of images, on which an image's bits must not depend.
pub(super) fn suits(g: &Geometry) -> bool {
    let tiles = g.out_h.div_ceil(OUTPUT) * g.out_w.div_ceil(OUTPUT);
    (g.kh, g.kw, g.stride) == (3, 3, 1) && g.c_in >= 8 && 2 * INPUT * tiles <= TAPS * g.out_h * g.out_w
}

thread_local! {
    /// Buffers that a thread keeps between calls: megabytes that would otherwise be cleared and faulted in each
    /// time.
    static BUFFERS: Cell<[Vec<f32>; 2]> = const { Cell::new([Vec::new(), Vec::new()]) };
}

/// Runs `body` with buffers of at least these lengths and arbitrary contents.
fn with_buffers<T>(lengths: [usize; 2], body: impl FnOnce(&mut [f32], &mut [f32]) -> T) -> T {
    let mut buffers = BUFFERS.take();
    for (buffer, length) in buffers.iter_mut().zip(lengths) {
        if buffer.len() < length {
            buffer.resize(length, 0.0);
        }
    }
    let [first, second] = &mut buffers;
    let result = body(&mut first[..lengths[0]], &mut second[..lengths[1]]);
    BUFFERS.set(buffers);
    result
}

/// The tiles of a convolution, in rows that follow the image.
#[derive(Clone, Copy)]
struct Tiles {
    g: Geometry,
    /// Tiles of a row.
    columns: usize,
    /// Rows of an image.
    rows: usize,
}

impl Tiles {
    fn new(g: &Geometry) -> Self {
        Self { g: *g, columns: g.out_w.div_ceil(OUTPUT), rows: g.out_h.div_ceil(OUTPUT) }
    }

    /// Rows of all images.
    fn all_rows(&self) -> usize {
        self.g.images * self.rows
    }

    /// What a tile reads of the input.
    fn input(&self, row: usize, column: usize) -> Window {
        let g = &self.g;
        let (image, y, x) = (row / self.rows, row % self.rows * OUTPUT, column * OUTPUT);
        let inside = |origin: usize, before: isize, size: usize| {
            let first = origin as isize - before;
            let end = (size as isize - first).clamp(0, 6) as usize;
            (((-first).clamp(0, end as isize) as usize)..end, first)
        };
        let ((rows, top), (cols, left)) = (inside(y, g.before.0, g.h), inside(x, g.before.1, g.w));
        let start = if rows.is_empty() || cols.is_empty() {
            0
        } else {
            let (y, x) = (top + rows.start as isize, left + cols.start as isize);
            ((image * g.h + y as usize) * g.w + x as usize) * g.c_in
        };
        Window { start, pitch: g.w * g.c_in, channels: g.c_in, rows, cols }
    }

    /// The outputs of a tile; `first_row` is the row of tiles that the slice begins with.
    fn output(&self, row: usize, column: usize, first_row: usize) -> Window {
        let g = &self.g;
        let (image, y, x) = (row / self.rows, row % self.rows * OUTPUT, column * OUTPUT);
        let start = (image * g.out_h + y) * g.out_w + x - self.first_pixel(first_row);
        Window {
            start: start * g.c_out,
            pitch: g.out_w * g.c_out,
            channels: g.c_out,
            rows: 0..(g.out_h - y).min(OUTPUT),
            cols: 0..(g.out_w - x).min(OUTPUT),
        }
    }

    /// The output pixels before a row of tiles.
    fn first_pixel(&self, row: usize) -> usize {
        let (image, y) = (row / self.rows, row % self.rows * OUTPUT);
        (image * self.g.out_h + y) * self.g.out_w
    }
}

/// `G g Gᵀ` of all kernels: panels of columns, in each a matrix of channels for each of the 36 elements.
#[derive(Debug)]
pub(in super::super) struct Kernels {
    data: Vec<f32>,
    element: usize,
    panel_len: usize,
}

impl Kernels {
    /// From `weight[column · column_stride + channel · channel_stride + tap]`. `rotated` turns the kernels by
    /// half a turn, for the input's gradient.
    pub(super) fn new(
        level: CpuLevel,
        weight: &[f32],
        (channels, channel_stride): (usize, usize),
        (columns, column_stride): (usize, usize),
        rotated: bool,
        parallel: bool,
    ) -> Self {
        let element = channels * NR + GAP;
        let panel_len = INPUT * element;
        let len = columns.div_ceil(NR) * panel_len;
        let mut data = if parallel { zeros(len) } else { vec![0.0; len] };
        let pack = |(panel, data): (usize, &mut [f32])| {
            let mut taps = [[0f32; NR]; TAPS];
            for channel in 0..channels {
                for column in panel * NR..columns.min((panel + 1) * NR) {
                    let start = column * column_stride + channel * channel_stride;
                    for (t, &value) in weight[start..start + TAPS].iter().enumerate() {
                        taps[if rotated { TAPS - 1 - t } else { t }][column % NR] = value;
                    }
                }
                transform_kernel(level, &taps, &mut data[channel * NR..], element);
            }
        };
        for_each(parallel && len >= PARALLEL_WORK, data.chunks_exact_mut(panel_len).enumerate(), pack);
        Self { data, element, panel_len }
    }
}

/// Tiles that are transformed, multiplied and transformed back together.
const TILES: usize = 32;

/// Columns that are multiplied before they are transformed back.
const COLUMNS: usize = 64;

/// The convolution with transformed kernels, added to `onto` if given.
pub(super) fn forward(
    level: CpuLevel,
    g: &Geometry,
    x: &[f32],
    kernels: &Kernels,
    bias: Bias,
    onto: Option<Vec<f32>>,
) -> Vec<f32> {
    let add = onto.is_some();
    let mut out = onto.unwrap_or_else(|| zeros(g.out_pixels() * g.c_out));
    if out.is_empty() {
        return out;
    }
    let tiles = Tiles::new(g);
    let rows = tiles.all_rows();
    // As many tiles as the caches hold, or fewer if threads would be idle. The bits do not depend on it.
    let budget = TILES.min((rows * tiles.columns).div_ceil(rayon::current_num_threads()));
    let step = (budget / tiles.columns).max(1);
    let mut tasks = Vec::new();
    let mut rest = &mut out[..];
    for first in (0..rows).step_by(step) {
        let end = (first + step).min(rows);
        let pixels =
            if end == rows { g.out_pixels() } else { tiles.first_pixel(end) } - tiles.first_pixel(first);
        let (piece, tail) = rest.split_at_mut(pixels * g.c_out);
        tasks.push((first..end, piece));
        rest = tail;
    }
    let run = |(rows, out): (Range<usize>, &mut [f32])| {
        let n = rows.len() * tiles.columns;
        let width = COLUMNS.min(g.c_out.next_multiple_of(NR));
        let (v_element, m_element) = (n * g.c_in + GAP, n * width + GAP);
        with_buffers([INPUT * v_element, INPUT * m_element], |v, m| {
            let places = || rows.clone().flat_map(|row| (0..tiles.columns).map(move |column| (row, column)));
            for (t, (row, column)) in places().enumerate() {
                let place = Place { element: v_element, panel: NR };
                input_tile(level, x, &tiles.input(row, column), &mut v[t * g.c_in..], place);
            }
            let starts: Vec<usize> = (0..n).map(|t| t * g.c_in).collect();
            for first in (0..g.c_out).step_by(width) {
                let columns = width.min(g.c_out - first);
                for p in 0..INPUT {
                    let operands = Product {
                        a: &v[p * v_element..],
                        rows: &starts,
                        segments: Segments::one(g.c_in),
                        panels: &kernels.data[first / NR * kernels.panel_len + p * kernels.element..],
                        panel_len: kernels.panel_len,
                        columns,
                    };
                    product(level, &operands, Start::Zero, &mut m[p * m_element..], width);
                }
                for (t, (row, column)) in places().enumerate() {
                    let window = tiles.output(row, column, rows.start);
                    let from = Transformed {
                        m: &m[t * width..],
                        element: m_element,
                        channels: columns,
                        bias: bias.of(row / tiles.rows, g.c_out).map(|bias| &bias[first..]),
                        add,
                    };
                    output_tile(level, from, &mut out[first..], &window);
                }
            }
        });
    };
    for_each(g.work() >= PARALLEL_WORK, tasks.into_iter(), run);
    out
}

/// Tiles that a task transforms for the gradient of the weights, and how many times that are summed in registers
/// before they are added to the rest: fixed, because it affects the bits.
const CHUNK: usize = 32;
const CHUNKS: usize = 4;

/// The gradient of the weights, in PyTorch's order.
pub(super) fn weight_gradient(level: CpuLevel, g: &Geometry, x: &[f32], dy: &[f32]) -> Vec<f32> {
    let tiles = Tiles::new(g);
    let all = tiles.all_rows() * tiles.columns;
    if all == 0 {
        return vec![0.0; g.c_out * g.c_in * TAPS];
    }
    let (in_panels, out_panels) = (g.c_in.div_ceil(NR), g.c_out.div_ceil(NR));
    let chunk = CHUNK.min(all);
    let (v_element, w_element) = (in_panels * chunk * NR + GAP, out_panels * chunk * NR + GAP);
    let (v_chunk, w_chunk) = (INPUT * v_element, INPUT * w_element);
    let n_chunks = CHUNKS.min(all.div_ceil(chunk));
    let pitch = out_panels * NR;
    let mut sums = zeros(INPUT * g.c_in * pitch);
    let parallel = g.work() >= PARALLEL_WORK;
    let in_place = Place { element: v_element, panel: chunk * NR };
    let out_place = Place { element: w_element, panel: chunk * NR };
    let starts: Vec<usize> = (0..g.c_in).map(|c| c / NR * chunk * NR + c % NR).collect();
    with_buffers([n_chunks * v_chunk, n_chunks * w_chunk], |v, w| {
        for first in (0..all).step_by(n_chunks * chunk) {
            let used = (all - first).div_ceil(chunk).min(n_chunks);
            let transform = |(i, (v, w)): (usize, (&mut [f32], &mut [f32]))| {
                for t in 0..chunk {
                    let tile = first + i * chunk + t;
                    let (mut input, mut output) = (nothing(g.c_in), nothing(g.c_out));
                    if tile < all {
                        let (row, column) = (tile / tiles.columns, tile % tiles.columns);
                        (input, output) = (tiles.input(row, column), tiles.output(row, column, 0));
                    }
                    input_tile(level, x, &input, &mut v[t * NR..], in_place);
                    gradient_tile(level, dy, &output, &mut w[t * NR..], out_place);
                }
            };
            let chunks = v.chunks_exact_mut(v_chunk).zip(w.chunks_exact_mut(w_chunk)).take(used).enumerate();
            for_each(parallel, chunks, transform);
            let (v, w) = (&*v, &*w);
            let multiply = |(p, sums): (usize, &mut [f32])| {
                let operands = Product {
                    a: &v[p * v_element..],
                    rows: &starts,
                    segments: Segments { panel_stride: w_chunk, ..Segments::new(used, chunk, v_chunk, NR) },
                    panels: &w[p * w_element..],
                    panel_len: chunk * NR,
                    columns: g.c_out,
                };
                product(level, &operands, Start::Add, sums, pitch);
            };
            for_each(parallel, sums.chunks_exact_mut(g.c_in * pitch).enumerate(), multiply);
        }
    });
    let mut dw = zeros(g.c_out * g.c_in * TAPS);
    let gradients = |(panel, dw): (usize, &mut [f32])| {
        let mut taps = [[0f32; NR]; TAPS];
        for c in 0..g.c_in {
            kernel_gradient(level, &sums[c * pitch + panel * NR..], g.c_in * pitch, &mut taps);
            for (j, dw) in dw.chunks_exact_mut(g.c_in * TAPS).enumerate() {
                for (dw, taps) in dw[c * TAPS..].iter_mut().zip(&taps) {
                    *dw = taps[j];
                }
            }
        }
    };
    for_each(parallel, dw.chunks_mut(NR * g.c_in * TAPS).enumerate(), gradients);
    dw
}

/// A tile without pixels.
fn nothing(channels: usize) -> Window {
    Window { start: 0, pitch: 0, channels, rows: 0..0, cols: 0..0 }
}
