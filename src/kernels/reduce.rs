//! Sums over rows, column by column.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    microkernel::{Arithmetic, Loop, run},
    parallel::PARALLEL_WORK,
};
use crate::device::CpuLevel;

/// The sums of the columns of a matrix with `columns` columns, in double precision, in the order of the rows.
pub(super) fn column_sums(level: CpuLevel, x: &[f32], columns: usize) -> Vec<f64> {
    struct Sums<'a>(&'a [f32], usize);
    impl Loop for Sums<'_> {
        type Output = Vec<f64>;
        #[inline(always)]
        fn run<A: Arithmetic>(self) -> Vec<f64> {
            let Self(x, columns) = self;
            let mut sums = vec![0f64; columns];
            for row in x.chunks_exact(columns) {
                sums.iter_mut().zip(row).for_each(|(sum, &v)| *sum += f64::from(v));
            }
            sums
        }
    }
    run(level, Sums(x, columns))
}

/// The sums of the columns, and those of their squares, in double precision, in the order of the rows: a part
/// of a [`Loop`].
#[inline(always)]
pub(super) fn sums_and_squares(x: &[f32], columns: usize) -> [Vec<f64>; 2] {
    let (mut sums, mut squares) = (vec![0f64; columns], vec![0f64; columns]);
    for row in x.chunks_exact(columns) {
        for ((sum, squares), &x) in sums.iter_mut().zip(&mut squares).zip(row) {
            let x = f64::from(x);
            *sum += x;
            *squares += x * x;
        }
    }
    [sums, squares]
}

/// `N` sums for each column of a tall matrix: `of_block` gives those of a range of elements, `rows` whole rows;
/// they are added in order. The blocks do not depend on the number of threads, so neither does the result.
pub(super) fn block_sums<const N: usize>(
    elements: usize,
    columns: usize,
    rows: usize,
    of_block: impl Fn(Range<usize>) -> [Vec<f64>; N] + Sync,
) -> [Vec<f64>; N] {
    let block = rows * columns;
    let starts: Vec<usize> = (0..elements).step_by(block).collect();
    let of_block = |&start: &usize| of_block(start..(start + block).min(elements));
    let blocks: Vec<[Vec<f64>; N]> = if elements < PARALLEL_WORK {
        starts.iter().map(of_block).collect()
    } else {
        starts.par_iter().map(of_block).collect()
    };
    let mut totals = [(); N].map(|()| vec![0f64; columns]);
    for block in blocks {
        for (total, sums) in totals.iter_mut().zip(block) {
            total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
        }
    }
    totals
}

/// [`column_sums`] of a tall matrix: the gradient of a bias.
pub(super) fn bias_gradient(level: CpuLevel, dy: &[f32], columns: usize) -> Vec<f32> {
    const ROWS: usize = 1024;
    let [sums] = block_sums(dy.len(), columns, ROWS, |block| [column_sums(level, &dy[block], columns)]);
    sums.into_iter().map(|sum| sum as f32).collect()
}
