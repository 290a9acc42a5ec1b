//! The operations that dominate: one op a file, each with a plain reference in candle ops.
//!
//! Layout is NHWC on every device; weights are in PyTorch's order. The functions re-exported here take the
//! fast path of the device that holds the tensors; [`mod@reference`] is the specification and the oracle, and
//! runs on any device.

pub mod reference;

pub use reference::*;
