//! The `proxyset` program; see the library for what it does.

use std::process::ExitCode;

/// Tensor programs constantly allocate and free large buffers; a caching allocator keeps the pages.
#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // SAFETY: no other thread exists yet.
    unsafe { proxyset::process::tune() };
    proxyset::cli::main()
}
