//! Setting up the process before anything is computed: the memory allocator.

/// `mi_option_purge_delay` of mimalloc 3: milliseconds until freed memory goes back to the system. The
/// bindings do not name it.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Sets the process up for tensors. Call it first in a program whose global allocator is mimalloc.
///
/// - Freed memory is kept for ten seconds, unless the environment says otherwise (`MIMALLOC_PURGE_DELAY`, in
///   milliseconds). Networks allocate and free the same megabytes over and over; a denoising step of the CIFAR-10
///   U-Net used to fault in 6,000 pages, and now none.
/// - candle's pool for elementwise operations gets one thread, which means that it runs on the caller's thread. The
///   pool spins at its barriers and serves one caller at a time, whereas we compute the parts of a batch in
///   parallel.
///
/// # Safety
/// No other thread may run yet: it could be reading the environment.
pub unsafe fn tune() {
    // SAFETY: the index is that of an option, and no other thread reads it now, by the contract.
    unsafe { libmimalloc_sys::mi_option_set_default(PURGE_DELAY, 10_000) };
    // SAFETY: no other thread reads the environment, by the contract.
    unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
}
