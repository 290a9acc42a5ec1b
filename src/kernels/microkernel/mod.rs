//! The innermost loops, and the switch between instruction sets: the only place of the kernels with `unsafe`.
//!
//! A micro-kernel is written once over [`Vector`](vector::Vector) and compiled for each level. AVX-512 and AVX2
//! do the same operations in the same order on each element, so that their bits are the same.

mod product;
mod transform;
mod vector;

pub(super) use product::{NR, Product, Segments, Start, first_product, pad_columns, product};
pub(super) use transform::{
    INPUT, OUTPUT, Place, TAPS, Transformed, Window, gradient_tile, input_tile, kernel_gradient, output_tile,
    transform_kernel,
};

use std::mem::MaybeUninit;

use rayon::prelude::*;

use crate::device::CpuLevel;

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f") && has_avx2()
}

/// Calls a function that is generic over the register with the one of a level: `dispatch!(level, f(a, b))`
/// needs `f::<V, A>`, an `#[inline(always)] unsafe fn`, and the caller's proof that its contract holds.
macro_rules! dispatch {
    ($level:expr, $name:ident, ($($arg:ident: $type:ty),* $(,)?)) => {{
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx2,fma")]
            unsafe fn avx512($($arg: $type),*) {
                // SAFETY: the features are enabled here; the rest is the caller's.
                unsafe { $name::<$crate::kernels::microkernel::vector::Zmm, $crate::kernels::microkernel::Fused>($($arg),*) }
            }
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2($($arg: $type),*) {
                // SAFETY: the features are enabled here; the rest is the caller's.
                unsafe { $name::<$crate::kernels::microkernel::vector::Ymm, $crate::kernels::microkernel::Fused>($($arg),*) }
            }
            match $level {
                CpuLevel::Avx512 if $crate::kernels::microkernel::has_avx512() => avx512($($arg),*),
                CpuLevel::Avx512 | CpuLevel::Avx2 if $crate::kernels::microkernel::has_avx2() => avx2($($arg),*),
                _ => $name::<$crate::kernels::microkernel::vector::Plain::<8>, $crate::kernels::microkernel::Apart>($($arg),*),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = $level;
            $name::<$crate::kernels::microkernel::vector::Plain::<8>, $crate::kernels::microkernel::Apart>($($arg),*)
        }
    }};
}
use dispatch;

/// `vec![0.0; len]`, cleared by all threads if it is long: one thread alone would be seen in every operation.
pub(super) fn zeros(len: usize) -> Vec<f32> {
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

/// A vector made of pieces of given lengths, which `write` fills, with a scratch of type `S` for each thread: not
/// cleared first, which would cost as much again where a result has few terms.
///
/// # Panics
/// If the pieces are not `len` elements together, or `write` returns another slice than the one that it got.
pub(super) fn filled<T: Send, S: Default>(
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

/// How a level multiplies and adds.
pub(super) trait Arithmetic {
    /// `a · b + c`.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;
}

/// Rounded once: FMA.
#[derive(Clone, Copy)]
pub(super) struct Fused;
/// Rounded twice.
#[derive(Clone, Copy)]
pub(super) struct Apart;

impl Arithmetic for Fused {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

impl Arithmetic for Apart {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}

/// A plain loop that [`run`] compiles once for each level.
///
/// `run` must be `#[inline(always)]`, else it is not compiled with the features of the caller.
pub(super) trait Loop {
    /// What the loop returns.
    type Output;
    /// The loop.
    fn run<A: Arithmetic>(self) -> Self::Output;
}

/// Runs a loop at a level.
pub(super) fn run<L: Loop>(level: CpuLevel, body: L) -> L::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if level == CpuLevel::Avx512 && has_avx512() {
            // SAFETY: the features, the only requirement, are there.
            return unsafe { run_avx512(body) };
        }
        if level >= CpuLevel::Avx2 && has_avx2() {
            // SAFETY: as above.
            return unsafe { run_avx2(body) };
        }
    }
    let _ = level;
    body.run::<Apart>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn run_avx512<L: Loop>(body: L) -> L::Output {
    body.run::<Fused>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2<L: Loop>(body: L) -> L::Output {
    body.run::<Fused>()
}
