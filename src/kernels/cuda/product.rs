//! Products in full f32 by cuBLAS, in addition to candle's, which follow the precision that was set.

use candle_core::{
    Tensor,
    cuda_backend::{
        WrapErr,
        cudarc::cublas::{Gemm, GemmConfig, sys::cublasOperation_t},
    },
};

use super::{tensor, uninitialized, with_views};
use crate::Result;

/// `x · weightᵀ`: see [`fn@super::super::linear_in_full`]. `x`: `(m, k)`; `weight`: `(n, k)`, both f32.
pub(in crate::kernels) fn linear_in_full(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let ((m, k), (n, inputs)) = (x.dims2()?, weight.dims2()?);
    if inputs != k {
        bail!(Alarm, "a product of rows of {k} numbers got others of {inputs}");
    }
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    Ok(with_views::<f32, 2, _>([&x, &weight], |device, [x, weight]| {
        let mut out = uninitialized::<f32>(device, m * n)?;
        // cuBLAS is column-major, so we ask it for the transpose, weight · xᵀ.
        let config = GemmConfig {
            transa: cublasOperation_t::CUBLAS_OP_T,
            transb: cublasOperation_t::CUBLAS_OP_N,
            m: n as i32,
            n: m as i32,
            k: k as i32,
            alpha: 1.0,
            lda: k as i32,
            ldb: k as i32,
            beta: 0.0,
            ldc: n as i32,
        };
        // SAFETY: the operands have these sizes. The handle's mathematics is cuBLAS's default, in which this is f32 throughout.
        unsafe { device.cublas_handle().gemm(config, &weight, &x, &mut out) }.w()?;
        Ok(tensor(device, out, (m, n)))
    })?)
}
