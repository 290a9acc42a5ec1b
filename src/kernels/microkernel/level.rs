//! The switch between instruction sets.

#[cfg(target_arch = "x86_64")]
use super::arithmetic::Fused;
use super::arithmetic::{Apart, Arithmetic};
use crate::device::CpuLevel;

#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn has_avx512() -> bool {
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
                unsafe { $name::<$crate::kernels::microkernel::vector::Zmm, $crate::kernels::microkernel::arithmetic::Fused>($($arg),*) }
            }
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2($($arg: $type),*) {
                // SAFETY: the features are enabled here; the rest is the caller's.
                unsafe { $name::<$crate::kernels::microkernel::vector::Ymm, $crate::kernels::microkernel::arithmetic::Fused>($($arg),*) }
            }
            match $level {
                CpuLevel::Avx512 if $crate::kernels::microkernel::level::has_avx512() => avx512($($arg),*),
                CpuLevel::Avx512 | CpuLevel::Avx2 if $crate::kernels::microkernel::level::has_avx2() => avx2($($arg),*),
                _ => $name::<$crate::kernels::microkernel::vector::Plain::<8>, $crate::kernels::microkernel::arithmetic::Apart>($($arg),*),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = $level;
            $name::<$crate::kernels::microkernel::vector::Plain::<8>, $crate::kernels::microkernel::arithmetic::Apart>($($arg),*)
        }
    }};
}
pub(super) use dispatch;

/// A plain loop that [`run`] compiles once for each level.
///
/// `run` must be `#[inline(always)]`; otherwise it is not compiled with the caller's features.
pub(in super::super) trait Loop {
    /// What the loop returns.
    type Output;
    /// The loop.
    fn run<A: Arithmetic>(self) -> Self::Output;
}

/// Runs a loop at a level.
pub(in super::super) fn run<L: Loop>(level: CpuLevel, body: L) -> L::Output {
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
