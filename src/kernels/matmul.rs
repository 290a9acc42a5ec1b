//! Products of matrices whose bits do not depend on how many rows there are.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape, Tensor};
use rayon::prelude::*;

use super::{
    Elements, PARALLEL_WORK, elements, for_each_chunk,
    microkernel::{NR, Product, Segments, Start, product, zeros},
    on_cpu,
    reduce::bias_gradient,
    reference, tensor,
};
use crate::{Result, device::CpuLevel};

/// `x · weightᵀ + bias`. `x`: `(…, k)`; `weight`: `(n, k)`, PyTorch's order; `bias`: `(n,)`. Returns `(…, n)`.
/// Fails if the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if on_cpu(&[x, weight, bias.unwrap_or(weight)]) {
        return linear_at(CpuLevel::get(), x, weight, bias);
    }
    #[cfg(feature = "cuda")]
    if let Some(bias) = bias
        && super::cuda::on_cuda(x, &[weight, bias])
    {
        return super::add_channels(&reference::linear(x, weight, None)?, bias);
    }
    reference::linear(x, weight, bias)
}

/// `x · weightᵀ` as f32, whatever precision a GPU computes with. `x`: `(m, k)`; `weight`: `(n, k)`. Returns `(m, n)`.
pub fn linear_in_full(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if super::cuda::on_cuda(x, &[x, weight]) {
        return super::cuda::linear_in_full(x, weight);
    }
    linear(x, weight, None)
}

pub(super) fn linear_at(
    level: CpuLevel,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let (n, k) = weight.dims2()?;
    if x.dims().last() != Some(&k) {
        bail!(Alarm, "a linear layer of {k} inputs got a tensor of shape {:?}", x.dims());
    }
    if let Some(bias) = bias
        && bias.dims() != [n]
    {
        bail!(Alarm, "the bias of a linear layer of {n} outputs has shape {:?}", bias.dims());
    }
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let op = Linear { level, n, k };
    Ok(match bias {
        Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, op)?,
        None => x.apply_op2(&weight, op)?,
    })
}

/// Batched matrix product: `(b, m, k) · (b, k, n)`, either operand in any layout. Returns `(b, m, n)`. Fails
/// if the shapes do not fit.
pub fn matmul(lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
    if on_cpu(&[lhs, rhs]) { matmul_at(CpuLevel::get(), lhs, rhs) } else { reference::matmul(lhs, rhs) }
}

pub(super) fn matmul_at(level: CpuLevel, lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
    let ((b, _, k), (rhs_b, rhs_k, _)) = (lhs.dims3()?, rhs.dims3()?);
    if (b, k) != (rhs_b, rhs_k) {
        bail!(Alarm, "a product of matrices of shapes {:?} and {:?}", lhs.dims(), rhs.dims());
    }
    Ok(lhs.apply_op2(rhs, MatMul { level })?)
}

/// The sizes of `batch` products `(m, k) · (k, n)`.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    m: usize,
    k: usize,
    n: usize,
}

/// Matrices with any distance between their elements.
#[derive(Clone, Copy)]
struct View<'a> {
    data: &'a [f32],
    batch: usize,
    row: usize,
    col: usize,
}

impl<'a> View<'a> {
    /// One matrix in row-major order.
    fn rows(data: &'a [f32], columns: usize) -> Self {
        Self { data, batch: 0, row: columns, col: 1 }
    }

    fn transposed(self) -> Self {
        Self { row: self.col, col: self.row, ..self }
    }

    fn strided(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<Self> {
        let stride = layout.stride();
        let data = &storage.as_slice::<f32>()?[layout.start_offset()..];
        Ok(Self { data, batch: stride[0], row: stride[1], col: stride[2] })
    }
}

/// Terms that are summed in registers before they are added to the result: fixed, since it shows in the bits.
/// It bounds the rounding error of long sums, and a panel of it stays in the L1 cache.
const TERMS: usize = 512;

/// The rows of a task: they share the panels while these are in the cache.
const ROWS: usize = 96;

/// The products, in row-major order, plus `bias` in each row.
fn products(level: CpuLevel, a: View, b: View, bias: Option<&[f32]>, sizes: Sizes) -> Vec<f32> {
    let Sizes { batch, m, k, n } = sizes;
    let mut out = zeros(batch * m * n);
    if out.is_empty() {
        return out;
    }
    if let Some(bias) = bias {
        out.chunks_exact_mut(n).for_each(|row| row.copy_from_slice(bias));
    }
    if k == 0 {
        return out;
    }
    let work = batch * m * n * k;
    let panels_len = n.div_ceil(NR) * k * NR;
    let mut panels = vec![0f32; batch * panels_len];
    for_each_chunk(&mut panels, k * NR, work, |i, panel| {
        let (matrix, first) = (i / n.div_ceil(NR), i % n.div_ceil(NR) * NR);
        let used = (n - first).min(NR);
        for (row, panel) in panel.chunks_exact_mut(NR).enumerate() {
            let start = matrix * b.batch + row * b.row + first * b.col;
            for (j, value) in panel[..used].iter_mut().enumerate() {
                *value = b.data[start + j * b.col];
            }
        }
    });
    let multiply = |matrix: usize, first_row: usize, out: &mut [f32]| {
        let a = View { data: &a.data[matrix * a.batch + first_row * a.row..], ..a };
        multiply_rows(level, a, &panels[matrix * panels_len..][..panels_len], k, n, out);
    };
    let tasks = out.chunks_mut(m * n).enumerate().flat_map(|(matrix, out)| {
        let pieces = out.chunks_mut(ROWS * n).enumerate();
        pieces.map(move |(i, piece)| (matrix, i * ROWS, piece))
    });
    if work < PARALLEL_WORK {
        tasks.for_each(|(matrix, row, out)| multiply(matrix, row, out));
    } else {
        tasks.collect::<Vec<_>>().into_par_iter().for_each(|(matrix, row, out)| multiply(matrix, row, out));
    }
    out
}

/// Adds the products of some rows to `out`.
fn multiply_rows(level: CpuLevel, a: View, panels: &[f32], k: usize, n: usize, out: &mut [f32]) {
    let rows = out.len() / n;
    let (mut packed, mut starts) = (Vec::new(), Vec::new());
    for first in (0..k).step_by(TERMS) {
        let terms = TERMS.min(k - first);
        starts.clear();
        let (data, segments) = if a.col == 1 {
            starts.extend((0..rows).map(|row| row * a.row + first));
            (a.data, Segments::one(terms))
        } else {
            // Far elements are first brought together, because each panel reads them again.
            packed.clear();
            packed.extend(
                (first..first + terms)
                    .flat_map(|term| (0..rows).map(move |row| a.data[row * a.row + term * a.col])),
            );
            starts.extend(0..rows);
            (&packed[..], Segments::new(1, terms, 0, rows))
        };
        let panels = &panels[first * NR..];
        let operands = Product { a: data, rows: &starts, segments, panels, panel_len: k * NR, columns: n };
        product(level, &operands, Start::Add, out, n);
    }
}

/// `x · weightᵀ + bias` over rows of `k`, to rows of `bias.len()`.
pub(super) fn linear_rows(level: CpuLevel, x: &[f32], k: usize, weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let sizes = Sizes { batch: 1, m: x.len() / k.max(1), k, n: bias.len() };
    products(level, View::rows(x, k), View::rows(weight, k).transposed(), Some(bias), sizes)
}

/// The gradients of [`linear_rows`] for `dy`, rows of `n`: of its input, and of its weight.
pub(super) fn linear_input_gradient(level: CpuLevel, dy: &[f32], n: usize, weight: &[f32]) -> Vec<f32> {
    let k = weight.len() / n.max(1);
    let sizes = Sizes { batch: 1, m: dy.len() / n.max(1), k: n, n: k };
    products(level, View::rows(dy, n), View::rows(weight, k), None, sizes)
}

/// See [`linear_input_gradient`].
pub(super) fn linear_weight_gradient(level: CpuLevel, x: &[f32], k: usize, dy: &[f32], n: usize) -> Vec<f32> {
    let sizes = Sizes { batch: 1, m: n, k: dy.len() / n.max(1), n: k };
    products(level, View::rows(dy, n).transposed(), View::rows(x, k), None, sizes)
}

struct MatMul {
    level: CpuLevel,
}

impl CustomOp2 for MatMul {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn cpu_fwd(
        &self,
        lhs: &CpuStorage,
        lhs_layout: &Layout,
        rhs: &CpuStorage,
        rhs_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let ((batch, m, k), (.., n)) = (lhs_layout.shape().dims3()?, rhs_layout.shape().dims3()?);
        let (a, b) = (View::strided(lhs, lhs_layout)?, View::strided(rhs, rhs_layout)?);
        let out = products(self.level, a, b, None, Sizes { batch, m, k, n });
        Ok((CpuStorage::F32(out), Shape::from((batch, m, n))))
    }

    fn bwd(
        &self,
        lhs: &Tensor,
        rhs: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let product = |a: Tensor, b: Tensor| a.apply_op2_no_bwd(&b, self);
        let grad_lhs = match lhs.track_op() {
            true => Some(product(grad.clone(), rhs.detach().transpose(1, 2)?)?),
            false => None,
        };
        let grad_rhs = match rhs.track_op() {
            true => Some(product(lhs.detach().transpose(1, 2)?, grad.clone())?),
            false => None,
        };
        Ok((grad_lhs, grad_rhs))
    }
}

struct Linear {
    level: CpuLevel,
    n: usize,
    k: usize,
}

impl Linear {
    fn forward(&self, x: &[f32], shape: &Shape, weight: &[f32], bias: Option<&[f32]>) -> (CpuStorage, Shape) {
        let mut dims = shape.dims().to_vec();
        dims.pop();
        let sizes = Sizes { batch: 1, m: dims.iter().product(), k: self.k, n: self.n };
        dims.push(self.n);
        let weight = View::rows(weight, self.k).transposed();
        let out = products(self.level, View::rows(x, self.k), weight, bias, sizes);
        (CpuStorage::F32(out), Shape::from(dims))
    }

    /// The gradients of `x` and `weight`, each if it is tracked.
    fn backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        dy: &[f32],
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let Self { level, n, k } = *self;
        let dx = match x.track_op() {
            true => Some(tensor(linear_input_gradient(level, dy, n, &Elements::of(weight)?), x)?),
            false => None,
        };
        let dw = match weight.track_op() {
            true => Some(tensor(linear_weight_gradient(level, &Elements::of(x)?, k, dy, n), weight)?),
            false => None,
        };
        Ok((dx, dw))
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok(self.forward(elements(x, x_layout)?, x_layout.shape(), elements(weight, weight_layout)?, None))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        self.backward(x, weight, &Elements::of(&dy)?)
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let bias = elements(bias, bias_layout)?;
        Ok(self.forward(
            elements(x, x_layout)?,
            x_layout.shape(),
            elements(weight, weight_layout)?,
            Some(bias),
        ))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let dy = Elements::of(&dy)?;
        let (dx, dw) = self.backward(x, weight, &dy)?;
        let db = match bias.track_op() {
            true => Some(tensor(bias_gradient(self.level, &dy, self.n), bias)?),
            false => None,
        };
        Ok((dx, dw, db))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::*, *};

    #[test]
    fn linear_matches_the_reference_in_double_precision() {
        for (i, (b, k, n)) in
            [(2, 3, 5), (7, 33, 16), (1, 1, 1), (5, 600, 17), (700, 5, 33)].into_iter().enumerate()
        {
            let key = 10 * i as u64;
            let operands = [random(key, (b, k)), random(key + 1, (n, k)), random(key + 2, n)];
            check(
                &operands,
                |level, t| linear_at(level, &t[0], &t[1], Some(&t[2])),
                |t| reference::linear(&t[0], &t[1], Some(&t[2])),
            );
            check(
                &operands[..2],
                |level, t| linear_at(level, &t[0], &t[1], None),
                |t| reference::linear(&t[0], &t[1], None),
            );
        }
    }

    #[test]
    fn linear_takes_any_number_of_leading_dimensions() {
        let (x, weight) = (random(1, (2, 3, 4, 5)), random(2, (7, 5)));
        let out = linear(&x, &weight, None).unwrap();
        assert_eq!(out.dims(), [2, 3, 4, 7]);
        let flat = linear(&x.reshape((24, 5)).unwrap(), &weight, None).unwrap();
        assert_eq!(values(&out), values(&flat));
    }

    #[test]
    fn matmul_matches_the_reference_in_double_precision() {
        for (i, (b, m, k, n)) in
            [(2, 3, 5, 7), (3, 13, 33, 16), (1, 100, 16, 33), (2, 7, 530, 5)].into_iter().enumerate()
        {
            let key = 10 * i as u64;
            let operands = [random(key, (b, m, k)), random(key + 1, (b, k, n))];
            check(&operands, |level, t| matmul_at(level, &t[0], &t[1]), |t| reference::matmul(&t[0], &t[1]));
            let operands = [random(key, (b, k, m)), random(key + 1, (b, n, k))];
            let transpose = |t: &Tensor| t.transpose(1, 2).unwrap();
            check(
                &operands,
                |level, t| matmul_at(level, &transpose(&t[0]), &transpose(&t[1])),
                |t| reference::matmul(&transpose(&t[0]), &transpose(&t[1])),
            );
        }
    }

    #[test]
    fn a_row_does_not_see_its_batch_nor_the_threads() {
        let operands = [random(1, (7, 520)), random(2, (33, 520)), random(3, 33)];
        check_invariance(&operands, 1, |t| linear(&t[0], &t[1], Some(&t[2])));
        let operands = [random(1, (7, 20, 33)), random(2, (7, 33, 20))];
        check_invariance(&operands, 2, |t| matmul(&t[0], &t[1]));
    }

    #[test]
    fn frozen_operands_get_no_gradient() {
        let operands = [random(1, (7, 5)), random(2, (3, 5)), random(3, 3)];
        check_untracked(&operands, |t| linear(&t[0], &t[1], Some(&t[2])));
        check_untracked(&[random(1, (2, 5, 3)), random(2, (2, 3, 5))], |t| matmul(&t[0], &t[1]));
    }

    #[test]
    fn wrong_shapes_are_named() {
        let error = linear(&random(1, (2, 3)), &random(2, (4, 5)), None).unwrap_err().to_string();
        assert_eq!(error, "a linear layer of 5 inputs got a tensor of shape [2, 3]");
        let error = matmul(&random(1, (2, 3, 4)), &random(2, (2, 5, 6))).unwrap_err().to_string();
        assert_eq!(error, "a product of matrices of shapes [2, 3, 4] and [2, 5, 6]");
    }
}
