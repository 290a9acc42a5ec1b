//! Loops on all threads.

use rayon::prelude::*;

/// The work in multiply-adds or elements under which waking threads costs more than they save.
pub(super) const PARALLEL_WORK: usize = 1 << 16;

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
    const CHUNK: usize = 1 << 14;
    let len = out.len();
    for_each_chunk(out, CHUNK, len, |i, out| {
        out.iter_mut().zip(&other[i * CHUNK..]).for_each(|(out, other)| *out += other);
    });
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
