//! Loops on all threads.

use std::ops::Range;

use rayon::prelude::*;

use super::microkernel::zeros;

/// The work in multiply-adds or elements under which waking threads costs more than they save.
pub(super) const PARALLEL_WORK: usize = 1 << 16;

/// The elements of a task, where any number would do.
pub(super) const CHUNK: usize = 1 << 14;

/// Runs all tasks, on all threads if that is worthwhile.
pub(super) fn for_each<T: Send>(
    parallel: bool,
    tasks: impl Iterator<Item = T>,
    body: impl Fn(T) + Sync + Send,
) {
    if parallel {
        tasks.collect::<Vec<_>>().into_par_iter().for_each(body);
    } else {
        tasks.for_each(body);
    }
}

/// `out += other`, element by element.
pub(super) fn add(out: &mut [f32], other: &[f32]) {
    for_each_pair(out, other, |out, other| *out += other);
}

/// Calls `body` with each element of `out` and that of `other`.
pub(super) fn for_each_pair(out: &mut [f32], other: &[f32], body: impl Fn(&mut f32, f32) + Sync) {
    let len = out.len();
    for_each_chunk(out, CHUNK, len, |i, out| {
        out.iter_mut().zip(&other[i * CHUNK..]).for_each(|(out, &other)| body(out, other));
    });
}

/// A vector of `len` elements that `body` writes in chunks, of which it gets the range.
pub(super) fn in_chunks(
    len: usize,
    chunk: usize,
    body: impl Fn(Range<usize>, &mut [f32]) + Sync,
) -> Vec<f32> {
    let mut out = zeros(len);
    for_each_chunk(&mut out, chunk, len, |i, out| body(i * chunk..i * chunk + out.len(), out));
    out
}

/// Runs `body` on consecutive chunks of `out` with their number, in parallel if `work` makes it worthwhile.
pub(super) fn for_each_chunk(
    out: &mut [f32],
    chunk: usize,
    work: usize,
    body: impl Fn(usize, &mut [f32]) + Sync,
) {
    if work < PARALLEL_WORK {
        out.chunks_mut(chunk.max(1)).enumerate().for_each(|(i, out)| body(i, out));
    } else {
        out.par_chunks_mut(chunk.max(1)).enumerate().for_each(|(i, out)| body(i, out));
    }
}
