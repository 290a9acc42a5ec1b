//! The sizes of a convolution, how its output is cut into blocks, and what is added to it.

use std::ops::Range;

/// The sizes of a convolution. The padding after the image is what `out_h` and `out_w` imply; a negative one
/// before it crops.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub images: usize,
    pub h: usize,
    pub w: usize,
    pub c_in: usize,
    pub kh: usize,
    pub kw: usize,
    pub stride: usize,
    pub before: (isize, isize),
    pub out_h: usize,
    pub out_w: usize,
    pub c_out: usize,
}

impl Geometry {
    pub fn out_pixels(&self) -> usize {
        self.images * self.out_h * self.out_w
    }

    /// The products that make one element of the output.
    pub fn terms(&self) -> usize {
        self.kh * self.kw * self.c_in
    }

    pub fn work(&self) -> usize {
        self.out_pixels() * self.terms() * self.c_out
    }

    /// The same products without images if the kernel is a single pixel: pixels one below another, which blocks may
    /// cut anywhere.
    pub fn flat(self) -> Self {
        let pixelwise = (self.kh, self.kw, self.stride, self.before) == (1, 1, 1, (0, 0));
        let pixels = self.out_pixels();
        if !pixelwise || (self.out_h, self.out_w) != (self.h, self.w) || pixels == 0 {
            return self;
        }
        Self { images: 1, h: pixels, w: 1, out_h: pixels, out_w: 1, ..self }
    }

    /// Cuts the output into blocks of at most about `pixels` pixels: rows of an image, or whole small images.
    /// In order, each block is a contiguous piece of the output.
    pub fn blocks(&self, pixels: usize) -> Vec<Block> {
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
pub(super) struct Block {
    pub images: Range<usize>,
    pub rows: Range<usize>,
}

impl Block {
    pub fn pixels(&self, g: &Geometry) -> usize {
        self.images.len() * self.rows.len() * g.out_w
    }

    /// The place of the first pixel among all output pixels.
    pub fn first_pixel(&self, g: &Geometry) -> usize {
        (self.images.start * g.out_h + self.rows.start) * g.out_w
    }
}

/// What is added to each output channel.
#[derive(Clone, Copy, Debug)]
pub(in super::super) enum Bias<'a> {
    None,
    Channels(&'a [f32]),
    /// For each image its own.
    Samples(&'a [f32]),
}

impl<'a> Bias<'a> {
    pub(super) fn of(self, image: usize, channels: usize) -> Option<&'a [f32]> {
        match self {
            Self::None => None,
            Self::Channels(bias) => Some(bias),
            Self::Samples(biases) => Some(&biases[image * channels..][..channels]),
        }
    }
}
