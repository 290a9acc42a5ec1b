//! Registers of f32 lanes, with which the micro-kernels are written once for all levels.

use std::marker::PhantomData;

use super::arithmetic::Arithmetic;

/// A register of `LANES` floats.
///
/// # Safety
/// For every method: the CPU has the instructions of the type, which is the level's affair, and it is called
/// from a function that is compiled with them. `load` and `store`: `LANES` floats from the pointer on are
/// valid to read or write.
pub(super) trait Vector: Copy {
    /// Floats in a register.
    const LANES: usize;
    /// Reads a register.
    unsafe fn load(from: *const f32) -> Self;
    /// Writes a register.
    unsafe fn store(self, to: *mut f32);
    /// The same value in all lanes.
    unsafe fn splat(value: f32) -> Self;
    /// `self + other`.
    unsafe fn add(self, other: Self) -> Self;
    /// `self - other`.
    unsafe fn sub(self, other: Self) -> Self;
    /// `self · other`.
    unsafe fn mul(self, other: Self) -> Self;
    /// `self · factor + addend`, rounded as the level rounds.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
}

/// `N` lanes of plain Rust with the arithmetic of a level.
#[derive(Clone, Copy)]
pub(super) struct Plain<const N: usize, A>([f32; N], PhantomData<A>);

/// One lane, for the ends of rows that are not a multiple of a register.
pub(super) type Lane<A> = Plain<1, A>;

impl<const N: usize, A: Arithmetic> Plain<N, A> {
    #[inline(always)]
    fn lanes(lane: impl Fn(usize) -> f32) -> Self {
        Self(std::array::from_fn(lane), PhantomData)
    }
}

impl<const N: usize, A: Arithmetic> Vector for Plain<N, A> {
    const LANES: usize = N;
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: `N` floats are valid by the contract; an array of them needs no other alignment.
        Self(unsafe { *from.cast() }, PhantomData)
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as in `load`.
        unsafe { *to.cast() = self.0 };
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; N], PhantomData)
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self::lanes(|i| self.0[i] + other.0[i])
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Self::lanes(|i| self.0[i] - other.0[i])
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Self::lanes(|i| self.0[i] * other.0[i])
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self::lanes(|i| A::mul_add(self.0[i], factor.0[i], addend.0[i]))
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Ymm, Zmm};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use crate::kernels::microkernel::vector::Vector;

    macro_rules! register {
        (
            $level:literal: $name:ident of $lanes:literal in $register:ty;
            load: $load:ident, store: $store:ident, splat: $splat:ident, mul_add: $mul_add:ident,
            $($of_two:ident: $instruction:ident),*
        ) => {
            #[doc = concat!("A register of ", $level, ".")]
            #[derive(Clone, Copy)]
            pub(in super::super) struct $name($register);

            // SAFETY of the bodies: the instructions are there and the pointers valid by the trait's contract.
            impl Vector for $name {
                const LANES: usize = $lanes;
                #[inline(always)]
                unsafe fn load(from: *const f32) -> Self {
                    Self(unsafe { $load(from) })
                }
                #[inline(always)]
                unsafe fn store(self, to: *mut f32) {
                    unsafe { $store(to, self.0) };
                }
                #[inline(always)]
                unsafe fn splat(value: f32) -> Self {
                    Self(unsafe { $splat(value) })
                }
                #[inline(always)]
                unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
                    Self(unsafe { $mul_add(self.0, factor.0, addend.0) })
                }
                $(
                    #[inline(always)]
                    unsafe fn $of_two(self, other: Self) -> Self {
                        Self(unsafe { $instruction(self.0, other.0) })
                    }
                )*
            }
        };
    }

    register! {
        "AVX2": Ymm of 8 in __m256;
        load: _mm256_loadu_ps, store: _mm256_storeu_ps, splat: _mm256_set1_ps, mul_add: _mm256_fmadd_ps,
        add: _mm256_add_ps, sub: _mm256_sub_ps, mul: _mm256_mul_ps
    }
    register! {
        "AVX-512": Zmm of 16 in __m512;
        load: _mm512_loadu_ps, store: _mm512_storeu_ps, splat: _mm512_set1_ps, mul_add: _mm512_fmadd_ps,
        add: _mm512_add_ps, sub: _mm512_sub_ps, mul: _mm512_mul_ps
    }
}
