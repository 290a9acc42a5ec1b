//! Convolution as a product of matrices that are never built: the micro-kernel reads the pixels of a window in
//! place, since in NHWC each row of a window is contiguous.

use rayon::prelude::*;

use super::geometry::{Bias, Block, Geometry};
use crate::{
    device::CpuLevel,
    kernels::{
        microkernel::{NR, Product, Segments, Start, filled, first_product, pad_columns, product, zeros},
        parallel::{PARALLEL_WORK, for_each},
    },
};

/// Buffers that a thread keeps between blocks.
#[derive(Default)]
struct Scratch {
    padded: Vec<f32>,
    pixels: Vec<usize>,
}

/// What a block sees of the input: where the window of each output pixel begins, and the distance of its rows.
struct View<'a> {
    data: &'a [f32],
    pixels: &'a [usize],
    pitch: usize,
}

impl<'a> View<'a> {
    /// Copies the input of a block with its padding into `scratch`; without padding it is used in place.
    fn new(g: &Geometry, x: &'a [f32], block: &Block, scratch: &'a mut Scratch) -> Self {
        let (in_rows, in_cols) = ((g.out_h - 1) * g.stride + g.kh, (g.out_w - 1) * g.stride + g.kw);
        let (data, pitch, image) = if g.before == (0, 0) && in_rows <= g.h && in_cols <= g.w {
            let start = (block.images.start * g.h + block.rows.start * g.stride) * g.w * g.c_in;
            (&x[start..], g.w * g.c_in, g.h * g.w * g.c_in)
        } else {
            let rows = (block.rows.len() - 1) * g.stride + g.kh;
            let (pitch, image) = (in_cols * g.c_in, rows * in_cols * g.c_in);
            scratch.padded.clear();
            scratch.padded.resize(block.images.len() * image, 0.0);
            let left = g.before.1.max(0);
            let right = (g.w as isize + g.before.1).min(in_cols as isize);
            for (i, padded) in block.images.clone().zip(scratch.padded.chunks_exact_mut(image)) {
                for (r, padded) in padded.chunks_exact_mut(pitch).enumerate() {
                    let y = (block.rows.start * g.stride + r) as isize - g.before.0;
                    if (0..g.h as isize).contains(&y) && left < right {
                        let start = (i * g.h + y as usize) * g.w + (left - g.before.1) as usize;
                        let (left, right) = (left as usize, right as usize);
                        padded[left * g.c_in..right * g.c_in]
                            .copy_from_slice(&x[start * g.c_in..(start + right - left) * g.c_in]);
                    }
                }
            }
            (&scratch.padded[..], pitch, image)
        };
        scratch.pixels.clear();
        for i in 0..block.images.len() {
            for y in 0..block.rows.len() {
                let row = i * image + y * g.stride * pitch;
                scratch.pixels.extend((0..g.out_w).map(|x| row + x * g.stride * g.c_in));
            }
        }
        Self { data, pixels: &scratch.pixels, pitch }
    }
}

/// Weights as the micro-kernel reads them: panels of [`NR`] columns, in each a row for every tap and channel, with
/// columns beyond the last filled with zeros.
///
/// `taps`: their positions in a kernel, in the order of the window.
pub(super) fn pack(
    weight: &[f32],
    taps: &[usize],
    (channels, channel_stride): (usize, usize),
    (columns, column_stride): (usize, usize),
    parallel: bool,
) -> Vec<f32> {
    let panel_len = taps.len() * channels * NR;
    let len = columns.div_ceil(NR) * panel_len;
    let mut panels = if parallel { zeros(len) } else { vec![0.0; len] };
    let pack = |(p, panel): (usize, &mut [f32])| {
        let first = p * NR;
        let used = (columns - first).min(NR);
        let entries = taps.iter().flat_map(|tap| (0..channels).map(move |c| tap + c * channel_stride));
        for (row, entry) in panel.chunks_exact_mut(NR).zip(entries) {
            for (j, value) in row[..used].iter_mut().enumerate() {
                *value = weight[(first + j) * column_stride + entry];
            }
        }
    };
    for_each(parallel && len >= PARALLEL_WORK, panels.chunks_exact_mut(panel_len).enumerate(), pack);
    panels
}

/// Floats of the input that a block reads again for each panel of weights.
const CACHED: usize = 1 << 14;

/// Terms that are summed in registers: fixed, because it affects the bits.
const TERMS: usize = 1024;

/// The convolution with packed weights.
pub(super) fn forward(level: CpuLevel, g: &Geometry, x: &[f32], panels: &[f32], bias: Bias) -> Vec<f32> {
    let per_image = matches!(bias, Bias::Samples(_));
    let g = if per_image { *g } else { g.flat() };
    // Large enough to reuse a panel of weights while it is in the cache, small enough to stay there with it and to
    // give all threads work. Whole tiles at any level.
    let cached = CACHED / (g.c_in * g.stride * g.stride);
    let mut pixels =
        (g.out_pixels() / (4 * rayon::current_num_threads())).min(cached).clamp(48, 240) / 12 * 12;
    if per_image {
        pixels = pixels.min(g.out_h * g.out_w);
    }
    // Long sums are divided at the kernel's rows, which bounds their rounding error.
    let (cuts, rows) = if g.terms() > TERMS { (g.kh, 1) } else { (1, g.kh) };
    let blocks = g.blocks(pixels).into_iter().map(|block| (block.pixels(&g) * g.c_out, block));
    let parallel = g.work() >= PARALLEL_WORK;
    filled(g.out_pixels() * g.c_out, blocks, parallel, |scratch: &mut Scratch, block: Block, out| {
        let view = View::new(&g, x, &block, scratch);
        let operands = |cut: usize| Product {
            a: &view.data[cut * view.pitch..],
            rows: view.pixels,
            segments: Segments::new(rows, g.kw * g.c_in, view.pitch, 1),
            panels: &panels[cut * g.kw * g.c_in * NR..],
            panel_len: g.terms() * NR,
            columns: g.c_out,
        };
        let bias = bias.of(block.images.start, g.c_out).map(pad_columns);
        let out = first_product(level, &operands(0), bias.as_deref(), out);
        for cut in 1..cuts {
            product(level, &operands(cut), Start::Add, out, g.c_out);
        }
        out
    })
}

/// One of the convolutions that make up the output or the gradient of the input.
pub(super) struct Phase {
    residue: (usize, usize),
    pub geometry: Geometry,
    /// Their places in the kernel, in the order of the window.
    pub taps: Vec<usize>,
}

impl Phase {
    /// A convolution itself.
    pub fn whole(g: &Geometry) -> Self {
        Self { residue: (0, 0), geometry: *g, taps: (0..g.kh * g.kw).collect() }
    }

    /// The convolutions that make up the gradient of the input: over `dy`, at stride 1, for each residue of `(y, x)`
    /// modulo the stride, with the taps of the kernel that meet it, so that no zero is multiplied.
    pub fn of_gradient(g: &Geometry) -> Vec<Self> {
        let mut phases = Vec::new();
        for residue_y in 0..g.stride.min(g.h) {
            let (taps_y, before_y) = meeting_taps(g.kh, g.stride, g.before.0, residue_y);
            for residue_x in 0..g.stride.min(g.w) {
                let (taps_x, before_x) = meeting_taps(g.kw, g.stride, g.before.1, residue_x);
                if taps_y.is_empty() || taps_x.is_empty() {
                    continue;
                }
                phases.push(Self {
                    residue: (residue_y, residue_x),
                    geometry: Geometry {
                        images: g.images,
                        h: g.out_h,
                        w: g.out_w,
                        c_in: g.c_out,
                        kh: taps_y.len(),
                        kw: taps_x.len(),
                        stride: 1,
                        before: (before_y, before_x),
                        out_h: (g.h - residue_y).div_ceil(g.stride),
                        out_w: (g.w - residue_x).div_ceil(g.stride),
                        c_out: g.c_in,
                    },
                    taps: taps_y.iter().flat_map(|ky| taps_x.iter().map(move |kx| ky * g.kw + kx)).collect(),
                });
            }
        }
        phases
    }
}

/// The gradient of the input.
pub(super) fn input_gradient(
    level: CpuLevel,
    g: &Geometry,
    dy: &[f32],
    phases: &[Phase],
    panels: &[Vec<f32>],
) -> Vec<f32> {
    if let ([phase], [panels]) = (phases, panels)
        && g.stride == 1
    {
        return forward(level, &phase.geometry, dy, panels, Bias::None);
    }
    let mut dx = zeros(g.images * g.h * g.w * g.c_in);
    for (phase, panels) in phases.iter().zip(panels) {
        let part = forward(level, &phase.geometry, dy, panels, Bias::None);
        let mut part = part.chunks_exact(g.c_in);
        for image in dx.chunks_exact_mut(g.h * g.w * g.c_in) {
            for row in image.chunks_exact_mut(g.w * g.c_in).skip(phase.residue.0).step_by(g.stride) {
                let pixels = row.chunks_exact_mut(g.c_in).skip(phase.residue.1).step_by(g.stride);
                pixels.zip(&mut part).for_each(|(pixel, part)| pixel.copy_from_slice(part));
            }
        }
    }
    dx
}

/// The taps of one direction that join an input at `residue + stride · t` to outputs, last first, and the
/// padding that lines the output `t` up with them.
fn meeting_taps(kernel: usize, stride: usize, before: isize, residue: usize) -> (Vec<usize>, isize) {
    let place = residue as isize + before;
    let first = place.rem_euclid(stride as isize) as usize;
    let taps: Vec<usize> = (first..kernel).step_by(stride).rev().collect();
    let before = taps.len() as isize - 1 - (place - first as isize) / stride as isize;
    (taps, before)
}

/// Pixels whose products are summed in registers: fixed, since it shows in the bits of a weight's gradient.
const PIXELS: usize = 256;

/// Taps and channels whose inputs are gathered for the micro-kernel: whole tiles at any level.
const GROUP: usize = 12;

/// The gathered inputs of a group.
const ROWS: [usize; GROUP] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];

/// Up to this many channels times the stride, a block's inputs stay in the L1 cache in place.
const FEW_CHANNELS: usize = 4;

/// Up to this many weights, parts of the images get sums of their own; with more, threads share the weights.
const FEW_WEIGHTS: usize = 1 << 16;

/// Floats of the output's gradient that are gathered at a time when threads share the weights.
const AT_ONCE: usize = 1 << 21;

/// The gradient of the weights, in the weights' order. Each element adds the sums of blocks of pixels in an order
/// that depends only on the sizes.
pub(super) fn weight_gradient(level: CpuLevel, g: &Geometry, x: &[f32], dy: &[f32]) -> Vec<f32> {
    let g = &g.flat();
    let pitch = g.c_out.next_multiple_of(NR);
    let len = g.terms() * pitch;
    let blocks = g.blocks(PIXELS);
    let mut sums = vec![0f32; len];
    if len > FEW_WEIGHTS {
        let mut buffers = Vec::new();
        buffers.resize_with(blocks.len().min((AT_ONCE / (PIXELS * pitch)).max(1)), Buffers::default);
        let groups = g.terms().div_ceil(GROUP).div_ceil(4 * rayon::current_num_threads());
        for blocks in blocks.chunks(buffers.len().max(1)) {
            let operands = buffers.par_iter_mut().zip(blocks);
            let operands: Vec<_> =
                operands.map(|(buffers, block)| Pixels::new(g, x, dy, block, buffers)).collect();
            sums.par_chunks_mut(groups * GROUP * pitch).enumerate().for_each_init(
                Vec::new,
                |inputs, (i, sums)| {
                    operands.iter().for_each(|pixels| pixels.add(level, g, i * groups * GROUP, inputs, sums));
                },
            );
        }
    } else {
        let of_part = |part: &[Block]| {
            let (mut buffers, mut inputs, mut sums) = (Buffers::default(), Vec::new(), vec![0f32; len]);
            for block in part {
                Pixels::new(g, x, dy, block, &mut buffers).add(level, g, 0, &mut inputs, &mut sums);
            }
            sums
        };
        let parts = blocks.chunks(blocks.len().div_ceil(16).max(1));
        let parts: Vec<Vec<f32>> = match g.work() < PARALLEL_WORK {
            true => parts.map(of_part).collect(),
            false => parts.collect::<Vec<_>>().into_par_iter().map(of_part).collect(),
        };
        for part in parts {
            sums.iter_mut().zip(&part).for_each(|(sum, part)| *sum += part);
        }
    }
    let kernel = g.kh * g.kw;
    let mut dw = vec![0f32; g.c_out * g.c_in * kernel];
    for (o, dw) in dw.chunks_exact_mut((g.c_in * kernel).max(1)).enumerate() {
        for (i, dw) in dw.iter_mut().enumerate() {
            *dw = sums[(i % kernel * g.c_in + i / kernel) * pitch + o];
        }
    }
    dw
}

/// Buffers that are kept between blocks.
#[derive(Default)]
struct Buffers {
    input: Scratch,
    panels: Vec<f32>,
}

/// The contribution of a block of pixels to the gradient of the weights.
struct Pixels<'a> {
    input: View<'a>,
    /// Of an image.
    rows: usize,
    /// The gradient of the output, in panels of its channels with a row for each pixel.
    panels: &'a [f32],
}

impl<'a> Pixels<'a> {
    fn new(g: &Geometry, x: &'a [f32], dy: &[f32], block: &Block, buffers: &'a mut Buffers) -> Self {
        let pixels = block.pixels(g);
        let dy = &dy[block.first_pixel(g) * g.c_out..][..pixels * g.c_out];
        let panels = &mut buffers.panels;
        panels.resize(g.c_out.next_multiple_of(NR) * pixels, 0.0);
        for (p, panel) in panels.chunks_exact_mut(pixels * NR).enumerate() {
            let columns = p * NR..((p + 1) * NR).min(g.c_out);
            for (row, dy) in panel.chunks_exact_mut(NR).zip(dy.chunks_exact(g.c_out)) {
                match dy[columns.clone()].first_chunk::<NR>() {
                    Some(dy) => row.copy_from_slice(dy),
                    None => row[..columns.len()].copy_from_slice(&dy[columns.clone()]),
                }
            }
        }
        Self { input: View::new(g, x, block, &mut buffers.input), rows: block.rows.len(), panels }
    }

    /// Adds the products of the inputs from the term `first` on, a term of a window for each row of `sums`.
    fn add(&self, level: CpuLevel, g: &Geometry, first: usize, inputs: &mut Vec<f32>, sums: &mut [f32]) {
        let pitch = g.c_out.next_multiple_of(NR);
        let View { data, pixels, pitch: input_pitch } = self.input;
        let taps: Vec<usize> = (first..first + sums.len() / pitch)
            .map(|term| term / (g.kw * g.c_in) * input_pitch + term % (g.kw * g.c_in))
            .collect();
        let panel_len = pixels.len() * NR;
        if g.c_in * g.stride <= FEW_CHANNELS {
            let image = self.rows * g.out_w;
            for (first, pixel) in pixels.iter().enumerate().step_by(image) {
                let operands = Product {
                    a: &data[*pixel..],
                    rows: &taps,
                    segments: Segments::new(self.rows, g.out_w, g.stride * input_pitch, g.stride * g.c_in),
                    panels: &self.panels[first * NR..],
                    panel_len,
                    columns: g.c_out,
                };
                product(level, &operands, Start::Add, sums, pitch);
            }
            return;
        }
        for (taps, sums) in taps.chunks(GROUP).zip(sums.chunks_mut(GROUP * pitch)) {
            match taps {
                // Nearly always contiguous in memory.
                [first, .., last] if taps.len() == GROUP && last - first + 1 == GROUP => {
                    inputs.resize(pixels.len() * GROUP, 0.0);
                    for (inputs, pixel) in inputs.as_chunks_mut::<GROUP>().0.iter_mut().zip(pixels) {
                        inputs.copy_from_slice(&data[pixel + first..][..GROUP]);
                    }
                }
                _ => {
                    inputs.clear();
                    pixels.iter().for_each(|pixel| inputs.extend(taps.iter().map(|tap| data[pixel + tap])));
                }
            }
            let operands = Product {
                a: inputs,
                rows: &ROWS[..taps.len()],
                segments: Segments::new(1, pixels.len(), 0, taps.len()),
                panels: self.panels,
                panel_len,
                columns: g.c_out,
            };
            product(level, &operands, Start::Add, sums, pitch);
        }
    }
}
