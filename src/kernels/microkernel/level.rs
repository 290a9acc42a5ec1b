//! The switch between instruction sets.

#[cfg(target_arch = "x86_64")]
use super::arithmetic::Fused;
use super::arithmetic::{Apart, Arithmetic};
use crate::device::CpuLevel;

/// The level, or the highest below it that this CPU has.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn supported(level: CpuLevel) -> CpuLevel {
    let has_avx2 = || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    match level {
        CpuLevel::Avx512 if is_x86_feature_detected!("avx512f") && has_avx2() => CpuLevel::Avx512,
        CpuLevel::Avx512 | CpuLevel::Avx2 if has_avx2() => CpuLevel::Avx2,
        _ => CpuLevel::Portable,
    }
}

/// Calls a function that is generic over the register with the one of a level: `dispatch!(level, f(a, b))`
/// needs `f::<V, A>`, an `#[inline(always)] unsafe fn`, and the caller's proof that its contract holds.
macro_rules! dispatch {
    ($level:expr, $name:ident, ($($arg:ident: $type:ty),* $(,)?)) => {{
        use $crate::kernels::microkernel::{arithmetic::Apart, vector::Plain};
        #[cfg(target_arch = "x86_64")]
        {
            use $crate::kernels::microkernel::{arithmetic::Fused, level::supported, vector::{Ymm, Zmm}};
            #[target_feature(enable = "avx512f,avx2,fma")]
            unsafe fn avx512($($arg: $type),*) {
                // SAFETY: the features are enabled here; the rest is the caller's.
                unsafe { $name::<Zmm, Fused>($($arg),*) }
            }
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2($($arg: $type),*) {
                // SAFETY: the features are enabled here; the rest is the caller's.
                unsafe { $name::<Ymm, Fused>($($arg),*) }
            }
            match supported($level) {
                CpuLevel::Avx512 => avx512($($arg),*),
                CpuLevel::Avx2 => avx2($($arg),*),
                CpuLevel::Portable => $name::<Plain<8, Apart>, Apart>($($arg),*),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = $level;
            $name::<Plain<8, Apart>, Apart>($($arg),*)
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
        #[target_feature(enable = "avx512f,avx2,fma")]
        fn avx512<L: Loop>(body: L) -> L::Output {
            body.run::<Fused>()
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2<L: Loop>(body: L) -> L::Output {
            body.run::<Fused>()
        }
        // SAFETY: the features, the only requirement, are there.
        match supported(level) {
            CpuLevel::Avx512 => unsafe { avx512(body) },
            CpuLevel::Avx2 => unsafe { avx2(body) },
            CpuLevel::Portable => body.run::<Apart>(),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = level;
        body.run::<Apart>()
    }
}
