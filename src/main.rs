//! The `proxyset` program: see the library for what it does.

use std::process::ExitCode;

/// Tensor programs allocate and free large buffers all the time; a caching allocator keeps the pages.
#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // candle's pool for elementwise operations spins at its barriers and serves one caller at a time, while
    // we compute the parts of a batch side by side: with one thread it runs in the caller's, and all is faster.
    // SAFETY: no other thread exists yet that could read the environment.
    unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    proxyset::cli::main()
}
