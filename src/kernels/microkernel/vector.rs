//! Registers of f32 lanes, with which the micro-kernels are written once for all levels.

use super::arithmetic::{Apart, Arithmetic};

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

/// One lane with the arithmetic of a level, for the ends of rows that are not a multiple of a register.
#[derive(Clone, Copy)]
pub(super) struct Lane<A>(f32, std::marker::PhantomData<A>);

impl<A: Arithmetic + Copy> Vector for Lane<A> {
    const LANES: usize = 1;
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: valid by the contract.
        Self(unsafe { *from }, std::marker::PhantomData)
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: valid by the contract.
        unsafe { *to = self.0 };
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self(value, std::marker::PhantomData)
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(self.0 + other.0, self.1)
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Self(self.0 - other.0, self.1)
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Self(self.0 * other.0, self.1)
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(A::mul_add(self.0, factor.0, addend.0), self.1)
    }
}

/// `N` lanes of plain Rust.
#[derive(Clone, Copy)]
pub(super) struct Plain<const N: usize>([f32; N]);

impl<const N: usize> Vector for Plain<N> {
    const LANES: usize = N;
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: `N` floats are valid by the contract; an array of them needs no other alignment.
        Self(unsafe { *from.cast() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as in `load`.
        unsafe { *to.cast() = self.0 };
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; N])
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] - other.0[i]))
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * other.0[i]))
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(std::array::from_fn(|i| Apart::mul_add(self.0[i], factor.0[i], addend.0[i])))
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Ymm, Zmm};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use crate::kernels::microkernel::vector::Vector;

    macro_rules! register {
        ($name:ident, $register:ty, $lanes:literal, $level:literal, $load:ident, $store:ident, $splat:ident, $add:ident, $sub:ident,
         $mul:ident, $mul_add:ident) => {
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
                unsafe fn add(self, other: Self) -> Self {
                    Self(unsafe { $add(self.0, other.0) })
                }
                #[inline(always)]
                unsafe fn sub(self, other: Self) -> Self {
                    Self(unsafe { $sub(self.0, other.0) })
                }
                #[inline(always)]
                unsafe fn mul(self, other: Self) -> Self {
                    Self(unsafe { $mul(self.0, other.0) })
                }
                #[inline(always)]
                unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
                    Self(unsafe { $mul_add(self.0, factor.0, addend.0) })
                }
            }
        };
    }

    register!(
        Ymm,
        __m256,
        8,
        "AVX2",
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_set1_ps,
        _mm256_add_ps,
        _mm256_sub_ps,
        _mm256_mul_ps,
        _mm256_fmadd_ps
    );
    register!(
        Zmm,
        __m512,
        16,
        "AVX-512",
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_set1_ps,
        _mm512_add_ps,
        _mm512_sub_ps,
        _mm512_mul_ps,
        _mm512_fmadd_ps
    );
}
