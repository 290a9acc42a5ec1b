//! Vectors that are not cleared twice.

use std::mem::MaybeUninit;

use rayon::prelude::*;

/// `vec![0.0; len]`, cleared by all threads if it is long: on a single thread, clearing would slow down every
/// operation.
pub(in super::super) fn zeros(len: usize) -> Vec<f32> {
    const CHUNK: usize = 1 << 16;
    if len < 4 * CHUNK {
        return vec![0.0; len];
    }
    let mut zeros = Vec::with_capacity(len);
    let elements: &mut [MaybeUninit<f32>] = &mut zeros.spare_capacity_mut()[..len];
    elements.par_chunks_mut(CHUNK).for_each(|chunk| chunk.fill(MaybeUninit::new(0.0)));
    // SAFETY: the capacity is at least `len`, and the first `len` elements have just been written.
    unsafe { zeros.set_len(len) };
    zeros
}

/// A vector made of pieces of given lengths, which `write` fills, with a scratch of type `S` for each thread: it is
/// not cleared first, which would double the cost where a result has few terms.
///
/// # Panics
/// If the pieces do not add up to `len` elements, or if `write` returns a slice other than the one it got.
pub(in super::super) fn filled<T: Send, S: Default>(
    len: usize,
    pieces: impl Iterator<Item = (usize, T)>,
    parallel: bool,
    write: impl for<'a> Fn(&mut S, T, &'a mut [MaybeUninit<f32>]) -> &'a mut [f32] + Sync + Send,
) -> Vec<f32> {
    let mut data = Vec::with_capacity(len);
    let mut rest: &mut [MaybeUninit<f32>] = &mut data.spare_capacity_mut()[..len];
    let mut tasks = Vec::new();
    for (len, piece) in pieces {
        let (out, tail) = rest.split_at_mut(len);
        tasks.push((piece, out));
        rest = tail;
    }
    assert!(rest.is_empty(), "{} of {len} elements belong to no piece", rest.len());
    let run = |scratch: &mut S, (piece, out): (T, &mut [MaybeUninit<f32>])| {
        let given = (out.as_ptr().cast::<f32>(), out.len());
        let written = write(scratch, piece, out);
        assert_eq!((written.as_ptr(), written.len()), given, "the piece that was to be written");
    };
    if parallel {
        tasks.into_par_iter().for_each_init(S::default, run);
    } else {
        let mut scratch = S::default();
        tasks.into_iter().for_each(|task| run(&mut scratch, task));
    }
    // SAFETY: the pieces are all of the first `len` elements, and each has come back as floats.
    unsafe { data.set_len(len) };
    data
}
