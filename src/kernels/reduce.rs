//! Sums over rows, column by column.

use rayon::prelude::*;

use super::{
    PARALLEL_WORK,
    microkernel::{Arithmetic, Loop, run},
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

/// [`column_sums`] of a tall matrix: the gradient of a bias. Rows are cut in fixed blocks, whose sums are added
/// in order, so that the threads do not show.
pub(super) fn bias_gradient(level: CpuLevel, dy: &[f32], columns: usize) -> Vec<f32> {
    const ROWS: usize = 1024;
    let block_sums = |block: &[f32]| column_sums(level, block, columns);
    let blocks: Vec<Vec<f64>> = if dy.len() < PARALLEL_WORK {
        dy.chunks(ROWS * columns).map(block_sums).collect()
    } else {
        dy.par_chunks(ROWS * columns).map(block_sums).collect()
    };
    let mut sums = vec![0f64; columns];
    for block in blocks {
        for (sum, block) in sums.iter_mut().zip(block) {
            *sum += block;
        }
    }
    sums.into_iter().map(|sum| sum as f32).collect()
}
