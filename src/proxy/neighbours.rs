//! Nearest real images, which reveal memorised training images and leaked test images.
//!
//! Two searches over all real images, both by matrix products in tiles. By pixels: the nearest image, and how much
//! nearer it is than the `k` nearest are on average (Carlini et al. 2023, §5.1, for CIFAR-10). As a copy: the
//! smallest difference from a real image over mirroring and shifts by up to a pixel in each direction.

use std::collections::BinaryHeap;

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{
    Result,
    data::{Dataset, Range, Shape, to_floats},
    kernels,
};

/// How many images are searched for together, and with how many real images they are compared at a time. Both only
/// bound memory.
const QUERIES: usize = 256;
const BLOCK: usize = 2048;
/// The most cells on a side of the coarse image. Its distances are lower bounds of those between pixels.
const GRID: usize = 6;
/// The least number of real images whose distance is computed in integers: those nearest by rounded products, and
/// those with the lowest bounds on the copy distance.
const NEAREST: usize = 16;
const CANDIDATES: usize = 8;

/// What was found for one image. Distances are root mean square differences of pixels in [0, 1].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Nearest {
    /// The nearest real image, the first one in a tie. Exact unless the products, in single precision, rank 16
    /// others before it, or `k` if that is more.
    pub index: u32,
    /// The distance to it; 0 only if all pixels are equal.
    pub distance: f32,
    /// That distance divided by the mean of the distances to the `k` nearest, itself included: near 0 if the image
    /// is much closer to one real image than to the others around it. 1 if all are equal to it.
    pub ratio: f32,
    /// The real image of which it is most nearly a copy.
    pub copy: u32,
    /// The distance to it at the best of nine shifts, mirrored or not, leaving out the outermost pixels.
    ///
    /// Exact up to the bound of the last candidate; otherwise the best of the candidates.
    pub copy_distance: f32,
}

/// The real images to search.
pub struct Neighbours {
    images: Dataset,
    windows: Windows,
    /// `(n, cells)`: the middle window of each image, coarsened.
    coarse: Vec<f32>,
    device: Device,
}

impl Neighbours {
    /// Prepares the search. Fails with [`Error::Data`](crate::Error::Data) if there are no images.
    pub fn new(images: Dataset, device: &Device) -> Result<Self> {
        if images.is_empty() {
            bail!(Data, "there are no real images to find neighbours among, expected at least one");
        }
        let windows = Windows::of(images.shape);
        let size = images.shape.size();
        let coarse = images
            .pixels
            .par_chunks_exact(size)
            .flat_map_iter(|image| windows.coarse(&windows.cut(image, windows.middle())));
        let coarse = coarse.collect();
        Ok(Self { images, windows, coarse, device: device.clone() })
    }

    /// The number of real images.
    #[expect(clippy::len_without_is_empty, reason = "there is at least one")]
    pub fn len(&self) -> usize {
        self.images.len()
    }

    /// The nearest real images to each of the images in `pixels`, stored one after another in the real images'
    /// shape. `k` is at least 1.
    ///
    /// The result for an image does not depend on the others.
    pub fn find(&self, pixels: &[u8], k: usize) -> Result<Vec<Nearest>> {
        let size = self.images.shape.size();
        let tiles = pixels.chunks(QUERIES * size).map(|tile| self.tile(tile, k.clamp(1, self.len())));
        Ok(tiles.collect::<Result<Vec<_>>>()?.concat())
    }

    fn tile(&self, pixels: &[u8], k: usize) -> Result<Vec<Nearest>> {
        let size = self.images.shape.size();
        let queries: Vec<&[u8]> = pixels.chunks_exact(size).collect();
        let near = self.lowest(&centred(pixels), size, k.max(NEAREST), 1, |block| {
            centred(&self.images.pixels[block.start * size..block.end * size])
        })?;
        let all = &self.windows.all;
        let coarse = |image: &&[u8]| -> Vec<f32> {
            all.iter().flat_map(|&window| self.windows.coarse(&self.windows.cut(image, window))).collect()
        };
        let coarse: Vec<f32> = queries.par_iter().flat_map_iter(coarse).collect();
        let cells = self.windows.cells();
        let copies = self.lowest(&coarse, cells, CANDIDATES, all.len(), |block| {
            self.coarse[block.start * cells..block.end * cells].to_vec()
        })?;
        let found = (0..queries.len()).into_par_iter().map(|i| {
            let (index, distance, ratio) = self.by_pixels(queries[i], &near[i], k);
            let (copy, copy_distance) = self.by_windows(queries[i], &copies[i], index);
            Nearest { index, distance, ratio, copy, copy_distance }
        });
        Ok(found.collect())
    }

    /// For each image, the `n` real ones with the lowest squared distance, lowest first and ties by index. An image
    /// has `versions` rows in `rows`, of which the nearest counts.
    fn lowest(
        &self,
        rows: &[f32],
        dim: usize,
        n: usize,
        versions: usize,
        block_of: impl Fn(std::ops::Range<usize>) -> Vec<f32>,
    ) -> Result<Vec<Vec<u32>>> {
        let squares = |rows: &[f32]| -> Vec<f32> {
            rows.chunks_exact(dim).map(|row| row.iter().map(|v| v * v).sum()).collect()
        };
        let of_rows = squares(rows);
        let left = Tensor::from_slice(rows, (of_rows.len(), dim), &self.device)?;
        let mut lowest: Vec<Lowest> = (0..of_rows.len() / versions).map(|_| Lowest::new(n)).collect();
        for start in (0..self.len()).step_by(BLOCK) {
            let block = block_of(start..(start + BLOCK).min(self.len()));
            let of_block = squares(&block);
            let count = of_block.len();
            let right = Tensor::from_vec(block, (count, dim), &self.device)?;
            let products = kernels::linear_in_full(&left, &right)?;
            let products = products.flatten_all()?.to_vec1::<f32>()?;
            lowest.par_iter_mut().enumerate().for_each(|(i, lowest)| {
                let mut nearest = vec![f32::INFINITY; count];
                for row in i * versions..(i + 1) * versions {
                    let products = &products[row * count..(row + 1) * count];
                    for ((nearest, product), square) in nearest.iter_mut().zip(products).zip(&of_block) {
                        *nearest = nearest.min(of_rows[row] + square - 2.0 * product);
                    }
                }
                for (j, &distance) in nearest.iter().enumerate() {
                    lowest.offer(distance, (start + j) as u32);
                }
            });
        }
        Ok(lowest.into_iter().map(Lowest::into_sorted).collect())
    }

    /// Index, distance and ratio from the `k` nearest of `near`, computed in integers, so that rounding does not
    /// affect ties.
    fn by_pixels(&self, query: &[u8], near: &[u32], k: usize) -> (u32, f32, f32) {
        let mut exact: Vec<(u64, u32)> =
            near.iter().map(|&i| (squared(query, self.images.image(i as usize)), i)).collect();
        exact.sort_unstable();
        exact.truncate(k);
        let distance = |squared: u64| root_mean(squared, query.len());
        let mean = exact.iter().map(|&(d, _)| distance(d)).sum::<f64>() / exact.len() as f64;
        let (first, index) = exact[0];
        let ratio = if mean == 0.0 { 1.0 } else { distance(first) / mean };
        (index, distance(first) as f32, ratio as f32)
    }

    /// The best copy among the candidates and the nearest by pixels, which may be an exact copy.
    fn by_windows(&self, query: &[u8], candidates: &[u32], nearest: u32) -> (u32, f32) {
        let versions: Vec<Vec<u8>> = self.windows.all.iter().map(|&w| self.windows.cut(query, w)).collect();
        let exact = candidates.iter().chain([&nearest]).map(|&real| {
            let middle = self.windows.cut(self.images.image(real as usize), self.windows.middle());
            (versions.iter().map(|version| squared(version, &middle)).min().unwrap_or(u64::MAX), real)
        });
        let (least, index) = exact.min().unwrap_or((u64::MAX, nearest));
        (index, root_mean(least, self.windows.size()) as f32)
    }
}

/// The `n` lowest of the distances offered; in a tie, those with the lowest index.
struct Lowest {
    n: usize,
    heap: BinaryHeap<(u32, u32)>,
    /// Distances from here on are not kept.
    limit: f32,
}

impl Lowest {
    fn new(n: usize) -> Self {
        Self { n, heap: BinaryHeap::with_capacity(n + 1), limit: f32::INFINITY }
    }

    fn offer(&mut self, distance: f32, index: u32) {
        // Indices ascend, so in a tie the first is already there.
        if distance >= self.limit {
            return;
        }
        // Rounding can make a distance of 0 negative. The bits of non-negative numbers ascend with them.
        self.heap.push((distance.max(0.0).to_bits(), index));
        if self.heap.len() > self.n {
            self.heap.pop();
        }
        if self.heap.len() == self.n {
            self.limit = self.heap.peek().map_or(self.limit, |worst| f32::from_bits(worst.0));
        }
    }

    fn into_sorted(self) -> Vec<u32> {
        self.heap.into_sorted_vec().into_iter().map(|(_, index)| index).collect()
    }
}

/// Part of an image: all but a margin of a pixel, at some position in it.
#[derive(Clone, Copy)]
struct Window {
    dy: usize,
    dx: usize,
    mirrored: bool,
}

/// The windows of images of one shape.
struct Windows {
    shape: Shape,
    margin: usize,
    grid: (usize, usize),
    /// All positions, each plain and mirrored.
    all: Vec<Window>,
}

impl Windows {
    fn of(shape: Shape) -> Self {
        // In an image of three pixels, a window would be a single pixel.
        let margin = usize::from(shape.height.min(shape.width) >= 4);
        let (height, width) = (shape.height - 2 * margin, shape.width - 2 * margin);
        let places = 0..=2 * margin;
        let at = |dy| places.clone().map(move |dx| (dy, dx));
        let both = |(dy, dx)| [false, true].map(|mirrored| Window { dy, dx, mirrored });
        let all = places.clone().flat_map(at).flat_map(both).collect();
        Self { shape, margin, grid: (height.min(GRID), width.min(GRID)), all }
    }

    fn size(&self) -> usize {
        (self.shape.height - 2 * self.margin) * (self.shape.width - 2 * self.margin) * self.shape.channels
    }

    /// The size of a coarse window, in numbers.
    fn cells(&self) -> usize {
        self.grid.0 * self.grid.1 * self.shape.channels
    }

    /// The window through which real images are compared.
    fn middle(&self) -> Window {
        Window { dy: self.margin, dx: self.margin, mirrored: false }
    }

    fn cut(&self, image: &[u8], window: Window) -> Vec<u8> {
        let Shape { height, width, channels } = self.shape;
        let mut pixels = Vec::with_capacity(self.size());
        for y in window.dy..window.dy + height - 2 * self.margin {
            for x in window.dx..window.dx + width - 2 * self.margin {
                let x = if window.mirrored { width - 1 - x } else { x };
                pixels.extend_from_slice(&image[(y * width + x) * channels..][..channels]);
            }
        }
        pixels
    }

    /// Sums of the centred pixels of each cell, divided by the root of their number: by the Cauchy-Schwarz
    /// inequality, two coarse windows are at most as far apart as the windows themselves.
    fn coarse(&self, window: &[u8]) -> Vec<f32> {
        let channels = self.shape.channels;
        let (height, width) = (self.shape.height - 2 * self.margin, self.shape.width - 2 * self.margin);
        let (rows, columns) = self.grid;
        let mut sums = vec![0f32; self.cells()];
        let mut counts = vec![0f32; rows * columns];
        for y in 0..height {
            for x in 0..width {
                let cell = y * rows / height * columns + x * columns / width;
                counts[cell] += 1.0;
                for c in 0..channels {
                    sums[cell * channels + c] += f32::from(window[(y * width + x) * channels + c]) - 127.5;
                }
            }
        }
        for (sums, count) in sums.chunks_exact_mut(channels).zip(counts) {
            sums.iter_mut().for_each(|sum| *sum /= 255.0 * count.sqrt());
        }
        sums
    }
}

/// Pixels from -½ to ½: with smaller numbers, less is lost where products cancel.
fn centred(pixels: &[u8]) -> Vec<f32> {
    to_floats(pixels, Range::Signed).into_iter().map(|v| 0.5 * v).collect()
}

/// The squared distance between two images, in pixel levels.
fn squared(a: &[u8], b: &[u8]) -> u64 {
    // The sum of a chunk of squared differences fits in 32 bits, which the compiler vectorises.
    let chunk = |(a, b): (&[u8], &[u8])| -> u64 {
        let sum: u32 = a.iter().zip(b).map(|(&a, &b)| u32::from(a.abs_diff(b)).pow(2)).sum();
        u64::from(sum)
    };
    a.chunks(4096).zip(b.chunks(4096)).map(chunk).sum()
}

fn root_mean(squared: u64, pixels: usize) -> f64 {
    (squared as f64 / pixels as f64).sqrt() / 255.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    /// Smooth images, like real ones: sums of a few waves.
    fn images(n: usize, shape: Shape, seed: u64) -> Dataset {
        let mut data = Dataset::empty(shape, vec!["any".into()]);
        for i in 0..n {
            let mut stream = Stream::new(seed, i as u64, 0);
            let waves: Vec<[f64; 4]> =
                (0..4).map(|_| [(); 4].map(|()| 2.0 * stream.uniform() - 1.0)).collect();
            let mut pixels = Vec::new();
            for y in 0..shape.height {
                for x in 0..shape.width {
                    for c in 0..shape.channels {
                        let at = |[a, fy, fx, p]: &[f64; 4]| {
                            a * (fy * y as f64 + fx * x as f64 + 6.0 * p + c as f64).sin()
                        };
                        pixels.push((127.5 + 40.0 * waves.iter().map(at).sum::<f64>()) as u8);
                    }
                }
            }
            data.push(&pixels, 0);
        }
        data
    }

    fn shapes() -> [Shape; 4] {
        [(28, 28, 1), (9, 11, 3), (8, 8, 1), (2, 3, 1)].map(|(height, width, channels)| Shape {
            height,
            width,
            channels,
        })
    }

    /// Every pair of images, in integers.
    fn by_hand(real: &Dataset, query: &[u8], k: usize) -> (u32, f64, f64) {
        let mut all: Vec<(f64, u32)> = (0..real.len())
            .map(|i| {
                let pairs = real.image(i).iter().zip(query);
                let sum: f64 = pairs.map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum();
                ((sum / query.len() as f64).sqrt() / 255.0, i as u32)
            })
            .collect();
        all.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let mean = all[..k].iter().map(|a| a.0).sum::<f64>() / k as f64;
        (all[0].1, all[0].0, all[0].0 / mean)
    }

    #[test]
    fn the_nearest_and_its_ratio_are_those_of_all_pairs() {
        for shape in shapes() {
            let (real, queries) = (images(2500, shape, 1), images(300, shape, 2));
            let found =
                Neighbours::new(real.clone(), &Device::Cpu).unwrap().find(&queries.pixels, 10).unwrap();
            assert_eq!(found.len(), 300);
            for (i, found) in found.iter().enumerate().step_by(7) {
                let (index, distance, ratio) = by_hand(&real, queries.image(i), 10);
                assert_eq!(found.index, index, "{shape}, image {i}");
                assert!((f64::from(found.distance) - distance).abs() < 1e-6, "{shape}, image {i}");
                assert!((f64::from(found.ratio) - ratio).abs() < 1e-5, "{shape}, image {i}");
            }
        }
    }

    #[test]
    fn a_copy_is_known_from_twins_that_are_a_level_off_in_one_pixel() {
        const TWINS: usize = 12;
        let shape = Shape { height: 32, width: 32, channels: 3 };
        let (originals, mut real) = (images(100, shape, 9), Dataset::empty(shape, vec!["any".into()]));
        let mut stream = Stream::new(10, 0, 0);
        for i in 0..originals.len() {
            for _ in 0..TWINS {
                let mut twin = originals.image(i).to_vec();
                let pixel = stream.below(twin.len());
                twin[pixel] = twin[pixel].saturating_sub(1);
                real.push(&twin, 0);
            }
            real.push(originals.image(i), 0);
        }
        let among = Neighbours::new(real, &Device::Cpu).unwrap();
        for (i, found) in among.find(&originals.pixels, 1).unwrap().iter().enumerate() {
            let original = (i * (TWINS + 1) + TWINS) as u32;
            assert_eq!((found.index, found.distance, found.ratio), (original, 0.0, 1.0));
            // A twin that differs only in the margin is an equally good copy.
            assert_eq!(found.copy_distance, 0.0);
        }
    }

    #[test]
    fn what_is_found_does_not_depend_on_the_images_beside_it() {
        let shape = shapes()[1];
        let (real, queries) = (images(700, shape, 3), images(270, shape, 4));
        let among = Neighbours::new(real, &Device::Cpu).unwrap();
        let together = among.find(&queries.pixels, 5).unwrap();
        for i in [0, 255, 256, 269] {
            assert_eq!(among.find(queries.image(i), 5).unwrap(), [together[i]]);
        }
    }

    /// Moves an image by `(dy, dx)`, filling the edges with `fill`.
    fn shifted(image: &[u8], shape: Shape, (dy, dx): (isize, isize), fill: u8) -> Vec<u8> {
        let mut pixels = Vec::new();
        for y in 0..shape.height as isize {
            for x in 0..shape.width as isize {
                for c in 0..shape.channels {
                    let (y, x) = (y - dy, x - dx);
                    let inside =
                        (0..shape.height as isize).contains(&y) && (0..shape.width as isize).contains(&x);
                    let at =
                        |y: isize, x: isize| (y as usize * shape.width + x as usize) * shape.channels + c;
                    pixels.push(if inside { image[at(y, x)] } else { fill });
                }
            }
        }
        pixels
    }

    fn mirrored(image: &[u8], shape: Shape) -> Vec<u8> {
        let pixel = |y: usize, x: usize| &image[(y * shape.width + x) * shape.channels..][..shape.channels];
        let rows = (0..shape.height).flat_map(|y| (0..shape.width).rev().map(move |x| (y, x)));
        rows.flat_map(|(y, x)| pixel(y, x).to_vec()).collect()
    }

    #[test]
    fn copies_are_found_exact_mirrored_shifted_and_a_level_off() {
        for shape in &shapes()[..3] {
            let shape = *shape;
            let real = images(2500, shape, 5);
            let among = Neighbours::new(real.clone(), &Device::Cpu).unwrap();
            let mut stream = Stream::new(6, 0, 0);
            for i in (0..2500).step_by(83) {
                let image = real.image(i);
                let noisy: Vec<u8> =
                    image.iter().map(|&p| p.saturating_add_signed(stream.below(3) as i8 - 1)).collect();
                let by = (stream.below(3) as isize - 1, stream.below(3) as isize - 1);
                let moved = shifted(&mirrored(image, shape), shape, by, 255);
                let found =
                    among.find(&[image, &noisy, &mirrored(image, shape), &moved].concat(), 3).unwrap();
                assert_eq!((found[0].index, found[0].distance, found[0].ratio), (i as u32, 0.0, 0.0));
                assert!((found[1].distance - 0.8165 / 255.0).abs() < 0.12 / 255.0, "{:?}", found[1]);
                for (found, largest) in found.iter().zip([0.0, 1.0 / 255.0, 0.0, 0.0]) {
                    assert_eq!(found.copy, i as u32, "{shape}: moved by {by:?}");
                    assert!(found.copy_distance <= largest, "{shape}: moved by {by:?}: {found:?}");
                }
            }
            let others = among.find(&images(200, shape, 7).pixels, 3).unwrap();
            assert!(others.iter().all(|found| found.copy_distance > 0.01), "{shape}");
        }
    }

    #[test]
    fn a_coarse_window_is_never_further_than_the_window() {
        for shape in shapes() {
            let windows = Windows::of(shape);
            let data = images(60, shape, 8);
            for i in 1..60 {
                let cut = |i: usize| windows.cut(data.image(i), windows.all[i % windows.all.len()]);
                let (a, b) = (cut(i - 1), cut(i));
                let coarse = windows
                    .coarse(&a)
                    .iter()
                    .zip(windows.coarse(&b))
                    .map(|(a, b)| (a - b).powi(2))
                    .sum::<f32>();
                assert!(
                    f64::from(coarse.sqrt()) <= (squared(&a, &b) as f64).sqrt() / 255.0 + 1e-5,
                    "{shape}"
                );
            }
        }
    }
}
