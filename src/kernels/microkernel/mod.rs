//! The innermost loops, and the switch between instruction sets: the only place in the kernels with `unsafe`.
//!
//! A micro-kernel is written once over [`Vector`](vector::Vector) and compiled for each level. AVX-512 and AVX2
//! do the same operations in the same order on each element, so that their bits are the same.

mod arithmetic;
mod level;
mod memory;
mod product;
mod transform;
mod vector;

pub(super) use arithmetic::Arithmetic;
#[cfg(test)]
pub(super) use arithmetic::{Apart, Fused};
pub(super) use level::{Loop, run};
pub(super) use memory::{filled, zeros};
pub(super) use product::{NR, Product, Segments, Start, first_product, pad_columns, product};
pub(super) use transform::{
    INPUT, OUTPUT, Place, TAPS, Transformed, Window, gradient_tile, input_tile, kernel_gradient, output_tile,
    transform_kernel,
};
