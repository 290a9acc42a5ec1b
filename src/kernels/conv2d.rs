//! Convolution as a product of matrices that are never built: the micro-kernel reads the pixels of a window
//! where they are, since in NHWC each row of a window is one run of neighbours.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape, Tensor};
use rayon::prelude::*;

use super::{
    Elements, PARALLEL_WORK, elements,
    microkernel::{MR, NR, Segments, Tile, multiply_add},
    on_cpu,
    reduce::bias_gradient,
    reference, tensor,
};
use crate::{Result, device::CpuLevel};

/// 2-D convolution. `x`: `(b, h, w, c_in)`; `weight`: `(c_out, c_in, kh, kw)`; `bias`: `(c_out,)`.
///
/// `padding` is `(before, after)`, zeros, the same in both directions of the image. Returns
/// `(b, h', w', c_out)` with `h' = (h + before + after - kh) / stride + 1`. Fails if the channels differ, the
/// stride is 0 or the kernel is larger than the padded image.
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: (usize, usize),
) -> Result<Tensor> {
    if on_cpu(&[x, weight, bias.unwrap_or(weight)]) {
        conv2d_at(CpuLevel::get(), x, weight, bias, stride, padding)
    } else {
        reference::conv2d(x, weight, bias, stride, padding)
    }
}

pub(super) fn conv2d_at(
    level: CpuLevel,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    (before, after): (usize, usize),
) -> Result<Tensor> {
    let (images, h, w, c_in) = x.dims4()?;
    let (c_out, weight_c_in, kh, kw) = weight.dims4()?;
    if c_in != weight_c_in {
        bail!(Alarm, "a convolution of {weight_c_in} channels got an image of {c_in}");
    }
    if let Some(bias) = bias
        && bias.dims() != [c_out]
    {
        bail!(Alarm, "the bias of a convolution to {c_out} channels has shape {:?}", bias.dims());
    }
    let (padded_h, padded_w) = (h + before + after, w + before + after);
    if stride == 0 || kh == 0 || kw == 0 || kh > padded_h || kw > padded_w {
        bail!(
            Alarm,
            "a {kh}x{kw} kernel at stride {stride} does not fit a padded image of {padded_h}x{padded_w}"
        );
    }
    let op = Conv2d {
        level,
        geometry: Geometry {
            images,
            h,
            w,
            c_in,
            kh,
            kw,
            stride,
            before: (before as isize, before as isize),
            out_h: (padded_h - kh) / stride + 1,
            out_w: (padded_w - kw) / stride + 1,
            c_out,
        },
    };
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    Ok(match bias {
        Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, op)?,
        None => x.apply_op2(&weight, op)?,
    })
}

/// The sizes of a convolution. The padding after the image is what `out_h` and `out_w` imply; a negative one
/// before it crops.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    images: usize,
    h: usize,
    w: usize,
    c_in: usize,
    kh: usize,
    kw: usize,
    stride: usize,
    before: (isize, isize),
    out_h: usize,
    out_w: usize,
    c_out: usize,
}

impl Geometry {
    fn out_pixels(&self) -> usize {
        self.images * self.out_h * self.out_w
    }

    /// The products that make one element of the output.
    fn terms(&self) -> usize {
        self.kh * self.kw * self.c_in
    }

    fn work(&self) -> usize {
        self.out_pixels() * self.terms() * self.c_out
    }

    /// Cuts the output into blocks of at most about `pixels` pixels: rows of an image, or whole small images.
    /// In order, each block is a contiguous piece of the output.
    fn blocks(&self, pixels: usize) -> Vec<Block> {
        let image = self.out_h * self.out_w;
        if image <= pixels {
            let step = (pixels / image.max(1)).max(1);
            let starts = (0..self.images).step_by(step);
            starts.map(|i| Block { images: i..(i + step).min(self.images), rows: 0..self.out_h }).collect()
        } else {
            let step = (pixels / self.out_w).max(1);
            let rows = || (0..self.out_h).step_by(step).map(|y| y..(y + step).min(self.out_h));
            (0..self.images).flat_map(|i| rows().map(move |rows| Block { images: i..i + 1, rows })).collect()
        }
    }
}

/// Output rows of consecutive images.
#[derive(Clone, Debug)]
struct Block {
    images: Range<usize>,
    rows: Range<usize>,
}

impl Block {
    fn pixels(&self, g: &Geometry) -> usize {
        self.images.len() * self.rows.len() * g.out_w
    }

    /// The place of the first pixel among all output pixels.
    fn first_pixel(&self, g: &Geometry) -> usize {
        (self.images.start * g.out_h + self.rows.start) * g.out_w
    }
}

/// Buffers that a thread keeps from block to block.
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
    /// Copies the input of a block with its padding into `scratch`; without padding it stays where it is.
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

/// The six entries from `start`, the last one repeated past the end.
fn six(offsets: &[usize], start: usize) -> [usize; MR] {
    std::array::from_fn(|r| offsets[(start + r).min(offsets.len() - 1)])
}

/// Weights as the micro-kernel reads them: panels of [`NR`] columns, in each a row for every tap and channel,
/// columns past the last filled with zeros.
///
/// `taps`: their places in a kernel, in the order of the window.
fn pack_weights(
    weight: &[f32],
    taps: &[usize],
    (channels, channel_stride): (usize, usize),
    (columns, column_stride): (usize, usize),
) -> Vec<f32> {
    let panel_len = taps.len() * channels * NR;
    let mut panels = vec![0f32; columns.div_ceil(NR) * panel_len];
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
    if panels.len() < PARALLEL_WORK {
        panels.chunks_exact_mut(panel_len).enumerate().for_each(pack);
    } else {
        panels.par_chunks_exact_mut(panel_len).enumerate().for_each(pack);
    }
    panels
}

/// The convolution with packed weights.
fn forward(level: CpuLevel, g: &Geometry, x: &[f32], panels: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let mut out = vec![0f32; g.out_pixels() * g.c_out];
    if out.is_empty() {
        return out;
    }
    // Large enough to use a panel of weights often while it is in the cache, small enough for all threads.
    let pixels = (g.out_pixels() / (4 * rayon::current_num_threads())).clamp(8 * MR, 40 * MR);
    let mut tasks = Vec::new();
    let mut rest = &mut out[..];
    for block in g.blocks(pixels) {
        let (piece, tail) = rest.split_at_mut(block.pixels(g) * g.c_out);
        tasks.push((block, piece));
        rest = tail;
    }
    let run = |scratch: &mut Scratch, (block, out): (Block, &mut [f32])| {
        forward_block(level, g, &View::new(g, x, &block, scratch), panels, bias, out);
    };
    if g.work() < PARALLEL_WORK {
        let mut scratch = Scratch::default();
        tasks.into_iter().for_each(|task| run(&mut scratch, task));
    } else {
        tasks.into_par_iter().for_each_init(Scratch::default, run);
    }
    out
}

fn forward_block(
    level: CpuLevel,
    g: &Geometry,
    view: &View,
    panels: &[f32],
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let segments = Segments { count: g.kh, len: g.kw * g.c_in, stride: view.pitch, step: 1 };
    for (p, panel) in panels.chunks_exact(g.terms() * NR).enumerate() {
        let columns = p * NR..((p + 1) * NR).min(g.c_out);
        let mut start = [0f32; NR];
        if let Some(bias) = bias {
            start[..columns.len()].copy_from_slice(&bias[columns.clone()]);
        }
        for (t, out) in out.chunks_mut(MR * g.c_out).enumerate() {
            let mut tile = [start; MR];
            multiply_add(level, view.data, &six(view.pixels, t * MR), segments, panel, &mut tile);
            for (row, out) in tile.iter().zip(out.chunks_exact_mut(g.c_out)) {
                let out = &mut out[columns.clone()];
                match out.first_chunk_mut() {
                    Some(out) => *out = *row,
                    None => out.copy_from_slice(&row[..columns.len()]),
                }
            }
        }
    }
}

/// The gradient of the input: one convolution of `dy` at stride 1 for each residue of `(y, x)` modulo the
/// stride, with the taps of the kernel that meet it, so that no zero is multiplied.
fn input_gradient(level: CpuLevel, g: &Geometry, weight: &[f32], dy: &[f32]) -> Vec<f32> {
    let mut dx = vec![0f32; if g.stride == 1 { 0 } else { g.images * g.h * g.w * g.c_in }];
    for residue_y in 0..g.stride.min(g.h) {
        let (taps_y, before_y) = meeting_taps(g.kh, g.stride, g.before.0, residue_y);
        for residue_x in 0..g.stride.min(g.w) {
            let (taps_x, before_x) = meeting_taps(g.kw, g.stride, g.before.1, residue_x);
            if taps_y.is_empty() || taps_x.is_empty() {
                continue;
            }
            let taps: Vec<usize> =
                taps_y.iter().flat_map(|ky| taps_x.iter().map(move |kx| ky * g.kw + kx)).collect();
            let kernel = g.kh * g.kw;
            let panels = pack_weights(weight, &taps, (g.c_out, g.c_in * kernel), (g.c_in, kernel));
            let phase = Geometry {
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
            };
            let part = forward(level, &phase, dy, &panels, None);
            if g.stride == 1 {
                return part;
            }
            let mut part = part.chunks_exact(g.c_in);
            for image in dx.chunks_exact_mut(g.h * g.w * g.c_in) {
                for row in image.chunks_exact_mut(g.w * g.c_in).skip(residue_y).step_by(g.stride) {
                    let pixels = row.chunks_exact_mut(g.c_in).skip(residue_x).step_by(g.stride);
                    pixels.zip(&mut part).for_each(|(pixel, part)| pixel.copy_from_slice(part));
                }
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

/// The gradient of the weights, in the weights' order. Each element adds the sums of blocks of pixels whose
/// cut depends on the sizes only, in order.
fn weight_gradient(level: CpuLevel, g: &Geometry, x: &[f32], dy: &[f32]) -> Vec<f32> {
    let (tiles, n_panels) = (g.terms().div_ceil(MR), g.c_out.div_ceil(NR));
    let threads = if g.work() < PARALLEL_WORK { 1 } else { rayon::current_num_threads() };
    let group = tiles.div_ceil(threads).max(1);
    let mut sums: Vec<Tile> = vec![[[0.0; NR]; MR]; tiles * n_panels];
    if g.out_pixels() > 0 && n_panels > 0 {
        let blocks = g.blocks(128);
        let run = |(i, sums): (usize, &mut [Tile])| {
            add_weight_tiles(level, g, x, dy, &blocks, i * group, sums);
        };
        if threads == 1 {
            sums.chunks_mut(group * n_panels).enumerate().for_each(run);
        } else {
            sums.par_chunks_mut(group * n_panels).enumerate().for_each(run);
        }
    }
    let kernel = g.kh * g.kw;
    let mut dw = vec![0f32; g.c_out * g.c_in * kernel];
    for (o, dw) in dw.chunks_exact_mut((g.c_in * kernel).max(1)).enumerate() {
        for (i, dw) in dw.iter_mut().enumerate() {
            let k = i % kernel * g.c_in + i / kernel;
            *dw = sums[k / MR * n_panels + o / NR][k % MR][o % NR];
        }
    }
    dw
}

/// Adds the products of some tiles of taps and channels, from `first_tile`, over all blocks.
fn add_weight_tiles(
    level: CpuLevel,
    g: &Geometry,
    x: &[f32],
    dy: &[f32],
    blocks: &[Block],
    first_tile: usize,
    sums: &mut [Tile],
) {
    let n_panels = g.c_out.div_ceil(NR);
    let (mut scratch, mut panels, mut inputs) = (Scratch::default(), Vec::new(), Vec::new());
    for block in blocks {
        let view = View::new(g, x, block, &mut scratch);
        let n_pixels = view.pixels.len();
        panels.clear();
        panels.resize(n_panels * n_pixels * NR, 0f32);
        let dy = &dy[block.first_pixel(g) * g.c_out..][..n_pixels * g.c_out];
        for (p, panel) in panels.chunks_exact_mut(n_pixels * NR).enumerate() {
            let columns = p * NR..((p + 1) * NR).min(g.c_out);
            for (row, dy) in panel.chunks_exact_mut(NR).zip(dy.chunks_exact(g.c_out)) {
                match dy[columns.clone()].first_chunk::<NR>() {
                    Some(dy) => row.copy_from_slice(dy),
                    None => row[..columns.len()].copy_from_slice(&dy[columns.clone()]),
                }
            }
        }
        let taps: Vec<usize> = (0..g.kh)
            .flat_map(|ky| (0..g.kw * g.c_in).map(move |k| ky * view.pitch + k))
            .skip(first_tile * MR)
            .take(sums.len() / n_panels * MR)
            .collect();
        for (t, sums) in sums.chunks_exact_mut(n_panels).enumerate() {
            let rows = six(&taps, t * MR);
            inputs.clear();
            if rows[MR - 1] == rows[0] + MR - 1 {
                for pixel in view.pixels {
                    inputs.extend_from_slice(&view.data[pixel + rows[0]..][..MR]);
                }
            } else {
                for pixel in view.pixels {
                    inputs.extend(rows.map(|row| view.data[pixel + row]));
                }
            }
            let segments = Segments { count: 1, len: n_pixels, stride: 0, step: MR };
            for (panel, sum) in panels.chunks_exact(n_pixels * NR).zip(sums) {
                let mut tile = [[0f32; NR]; MR];
                multiply_add(level, &inputs, &[0, 1, 2, 3, 4, 5], segments, panel, &mut tile);
                for (sum, row) in sum.iter_mut().zip(&tile) {
                    sum.iter_mut().zip(row).for_each(|(sum, v)| *sum += v);
                }
            }
        }
    }
}

struct Conv2d {
    level: CpuLevel,
    geometry: Geometry,
}

impl Conv2d {
    fn forward(&self, x: &[f32], weight: &[f32], bias: Option<&[f32]>) -> (CpuStorage, Shape) {
        let g = &self.geometry;
        let kernel = g.kh * g.kw;
        let taps: Vec<usize> = (0..kernel).collect();
        let panels = pack_weights(weight, &taps, (g.c_in, kernel), (g.c_out, g.c_in * kernel));
        let out = forward(self.level, g, x, &panels, bias);
        (CpuStorage::F32(out), Shape::from((g.images, g.out_h, g.out_w, g.c_out)))
    }

    /// The gradients of `x` and `weight`, each if it is tracked.
    fn backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        dy: &[f32],
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let g = &self.geometry;
        let dx = match x.track_op() {
            true => Some(tensor(input_gradient(self.level, g, &Elements::of(weight)?, dy), x)?),
            false => None,
        };
        let dw = match weight.track_op() {
            true => Some(tensor(weight_gradient(self.level, g, &Elements::of(x)?, dy), weight)?),
            false => None,
        };
        Ok((dx, dw))
    }
}

impl CustomOp2 for Conv2d {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok(self.forward(elements(x, x_layout)?, elements(weight, weight_layout)?, None))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        self.backward(x, weight, &Elements::of(&dy)?)
    }
}

impl CustomOp3 for Conv2d {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let bias = elements(bias, bias_layout)?;
        Ok(self.forward(elements(x, x_layout)?, elements(weight, weight_layout)?, Some(bias)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let dy = Elements::of(&dy)?;
        let (dx, dw) = self.backward(x, weight, &dy)?;
        let db = match bias.track_op() {
            true => Some(tensor(bias_gradient(self.level, &dy, self.geometry.c_out), bias)?),
            false => None,
        };
        Ok((dx, dw, db))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::*, *};

    type Case = ([usize; 4], [usize; 3], usize, (usize, usize));

    /// `(b, h, w, c_in)`, `(c_out, kh, kw)`, stride, padding.
    const CASES: [Case; 14] = [
        ([2, 5, 7, 1], [16, 3, 3], 1, (1, 1)),
        ([3, 8, 8, 3], [5, 3, 3], 1, (1, 1)),
        ([2, 7, 5, 5], [33, 3, 3], 2, (1, 1)),
        ([2, 8, 8, 16], [16, 3, 3], 2, (0, 1)),
        ([2, 6, 5, 33], [7, 5, 5], 1, (1, 1)),
        ([2, 9, 9, 3], [17, 5, 5], 2, (1, 1)),
        ([3, 4, 4, 33], [40, 1, 1], 1, (0, 0)),
        ([2, 5, 5, 16], [3, 1, 1], 2, (0, 0)),
        ([2, 6, 6, 5], [6, 3, 3], 1, (0, 0)),
        ([2, 8, 7, 3], [4, 3, 3], 2, (0, 0)),
        ([1, 20, 19, 16], [32, 3, 3], 1, (1, 1)),
        ([2, 4, 4, 3], [4, 1, 1], 1, (1, 1)),
        ([2, 11, 10, 3], [4, 2, 2], 3, (1, 0)),
        ([2, 3, 4, 3], [4, 3, 2], 1, (1, 1)),
    ];

    fn operands(i: u64, ([b, h, w, c_in], [c_out, kh, kw], ..): Case) -> [Tensor; 3] {
        let key = 3 * i;
        [random(key, (b, h, w, c_in)), random(key + 1, (c_out, c_in, kh, kw)), random(key + 2, c_out)]
    }

    #[test]
    fn output_and_gradients_match_the_reference_in_double_precision() {
        for (i, case) in CASES.into_iter().enumerate() {
            let (.., stride, padding) = case;
            let operands = operands(i as u64, case);
            check(
                &operands,
                |level, t| conv2d_at(level, &t[0], &t[1], Some(&t[2]), stride, padding),
                |t| reference::conv2d(&t[0], &t[1], Some(&t[2]), stride, padding),
            );
            check(
                &operands[..2],
                |level, t| conv2d_at(level, &t[0], &t[1], None, stride, padding),
                |t| reference::conv2d(&t[0], &t[1], None, stride, padding),
            );
        }
    }

    #[test]
    fn output_is_the_sum_over_the_window() {
        let (b, h, w, c_in, c_out, k, stride) = (2, 6, 7, 3, 4, 3, 2);
        let (x, weight) = (random(1, (b, h, w, c_in)), random(2, (c_out, c_in, k, k)));
        let out = conv2d(&x, &weight, None, stride, (1, 0)).unwrap();
        let (_, out_h, out_w, _) = out.dims4().unwrap();
        assert_eq!((out_h, out_w), ((h + 1 - k) / stride + 1, (w + 1 - k) / stride + 1));
        let at = |t: &Tensor, i: [usize; 4]| {
            let strides = t.stride();
            values(t)[(0..4).map(|d| i[d] * strides[d]).sum::<usize>()]
        };
        for (n, y, x_, o) in [(0, 0, 0, 0), (1, 1, 2, 3), (0, 2, 1, 1), (1, 0, 2, 2)] {
            let mut sum = 0f64;
            for (ky, kx, c) in (0..k * k * c_in).map(|i| (i / (k * c_in), i / c_in % k, i % c_in)) {
                let (py, px) = (y * stride + ky, x_ * stride + kx);
                if py >= 1 && px >= 1 {
                    sum += f64::from(at(&x, [n, py - 1, px - 1, c])) * f64::from(at(&weight, [o, c, ky, kx]));
                }
            }
            assert!((f64::from(at(&out, [n, y, x_, o])) - sum).abs() < 1e-5);
        }
    }

    #[test]
    fn a_sample_does_not_see_its_batch_nor_the_threads() {
        for case in [([7, 9, 8, 16], [20, 3, 3], 1, (1, 1)), ([7, 4, 4, 33], [40, 3, 3], 2, (1, 1))] {
            let (.., stride, padding) = case;
            let operands = operands(50, case);
            check_invariance(&operands, 1, |t| conv2d(&t[0], &t[1], Some(&t[2]), stride, padding));
        }
    }

    #[test]
    fn gradients_are_finite_differences() {
        let operands = [random(1, (2, 3, 3, 2)), random(2, (2, 2, 3, 3)), random(3, 2)];
        check_finite_differences(&operands, |t| conv2d(&t[0], &t[1], Some(&t[2]), 1, (1, 1)));
    }

    #[test]
    fn frozen_weights_get_no_gradient() {
        let operands = operands(60, CASES[1]);
        check_untracked(&operands, |t| conv2d(&t[0], &t[1], Some(&t[2]), 1, (1, 1)));
    }

    #[test]
    fn other_layouts_are_read_as_they_are_meant() {
        let x = random(1, (2, 3, 6, 5));
        let weight = random(2, (3, 3, 4, 3));
        let strided = (x.permute((0, 2, 3, 1)).unwrap(), weight.transpose(0, 2).unwrap());
        let packed = (strided.0.contiguous().unwrap(), strided.1.contiguous().unwrap());
        let out = |(x, w): &(Tensor, Tensor)| values(&conv2d(x, w, None, 1, (1, 1)).unwrap());
        assert_eq!(out(&strided), out(&packed));
    }

    #[test]
    fn impossible_shapes_are_named() {
        let x = random(1, (1, 4, 4, 3));
        let error = |w: Tensor, stride| conv2d(&x, &w, None, stride, (0, 0)).unwrap_err().to_string();
        assert_eq!(error(random(2, (2, 5, 3, 3)), 1), "a convolution of 5 channels got an image of 3");
        let expected = "a 5x5 kernel at stride 1 does not fit a padded image of 4x4";
        assert_eq!(error(random(2, (2, 3, 5, 5)), 1), expected);
    }
}
