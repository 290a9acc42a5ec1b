//! Matrix products whose bits do not depend on the number of rows.

use candle_core::{Shape, Tensor};

use super::{
    microkernel::{NR, Product, Segments, Start, product, zeros},
    parallel::{PARALLEL_WORK, for_each, for_each_chunk},
    reduce::bias_gradient,
    shell::{self, Backward, Gradients, Node, Op, Operand, Output},
};
use crate::{Result, device::CpuLevel};

/// `x · weightᵀ + bias`. `x`: `(…, k)`; `weight`: `(n, k)`, PyTorch's order; `bias`: `(n,)`. Returns `(…, n)`.
/// Fails if the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (n, k) = weight.dims2()?;
    if x.dims().last() != Some(&k) {
        bail!(Alarm, "a linear layer of {k} inputs got a tensor of shape {:?}", x.dims());
    }
    let op = Linear { level: CpuLevel::get(), n, k };
    match bias {
        Some(bias) if bias.dims() != [n] => {
            bail!(Alarm, "the bias of a linear layer of {n} outputs has shape {:?}", bias.dims())
        }
        Some(bias) => shell::run(op, [x, weight, bias]),
        None => shell::run(op, [x, weight]),
    }
}

/// `x · weightᵀ` in f32, whatever the precision in which a GPU computes. `x`: `(m, k)`; `weight`: `(n, k)`. Returns
/// `(m, n)`.
pub fn linear_in_full(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if shell::on_cuda(&[x, weight]) {
        return super::cuda::product::linear_in_full(x, weight);
    }
    linear(x, weight, None)
}

/// Batched matrix product: `(b, m, k) · (b, k, n)`, either operand in any layout. Returns `(b, m, n)`. Fails
/// if the shapes do not fit.
pub fn matmul(lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
    let ((b, _, k), (rhs_b, rhs_k, _)) = (lhs.dims3()?, rhs.dims3()?);
    if (b, k) != (rhs_b, rhs_k) {
        bail!(Alarm, "a product of matrices of shapes {:?} and {:?}", lhs.dims(), rhs.dims());
    }
    shell::run(MatMul { level: CpuLevel::get() }, [lhs, rhs])
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

    /// `(batch, rows, columns)` in any layout.
    fn strided(operand: Operand<'a>) -> Self {
        let stride = operand.stride();
        Self { data: operand.values(), batch: stride[0], row: stride[1], col: stride[2] }
    }
}

/// Terms that are summed in registers before they are added to the result. The number is fixed because it affects
/// the bits. It bounds the rounding error of long sums, and a panel of this length stays in the L1 cache.
const TERMS: usize = 512;

/// The rows of a task, which share the panels while these are in the cache.
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
    for_each(work >= PARALLEL_WORK, tasks, |(matrix, row, out)| multiply(matrix, row, out));
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
            // Distant elements are first gathered, because each panel reads them again.
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

/// The gradients of [`linear_rows`], with respect to its input and its weight, for `dy`, rows of `n`.
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

impl Node<2> for MatMul {
    const NAME: &'static str = "matmul";
    const STRIDED: bool = true;

    fn forward(&self, [lhs, rhs]: [Operand; 2]) -> Output {
        let ((batch, m, k), (.., n)) = (lhs.shape().dims3()?, rhs.shape().dims3()?);
        let sizes = Sizes { batch, m, k, n };
        let out = products(self.level, View::strided(lhs), View::strided(rhs), None, sizes);
        Ok((out, Shape::from((batch, m, n))))
    }

    fn backward(&self, [lhs, rhs]: [Operand; 2], Backward { dy, wanted, .. }: Backward<2>) -> Gradients<2> {
        let ((batch, m, k), (.., n)) = (lhs.shape().dims3()?, rhs.shape().dims3()?);
        let dy = View { batch: m * n, ..View::rows(dy, n) };
        let (lhs, rhs) = (View::strided(lhs).transposed(), View::strided(rhs).transposed());
        let of_lhs = || products(self.level, dy, rhs, None, Sizes { batch, m, k: n, n: k });
        let of_rhs = || products(self.level, lhs, dy, None, Sizes { batch, m: k, k: m, n });
        Ok([wanted[0].then(of_lhs), wanted[1].then(of_rhs)])
    }
}

impl Op<2> for MatMul {
    fn reference(&self, [lhs, rhs]: [&Tensor; 2]) -> Result<Tensor> {
        Ok(lhs.contiguous()?.matmul(&rhs.contiguous()?)?)
    }
}

struct Linear {
    level: CpuLevel,
    n: usize,
    k: usize,
}

/// The gradients of input, weight and, possibly, bias.
impl<const N: usize> Node<N> for Linear {
    const NAME: &'static str = "linear";

    fn forward(&self, operands: [Operand; N]) -> Output {
        let (x, weight) = (operands[0], operands[1]);
        let mut dims = x.shape().dims().to_vec();
        dims.pop();
        let sizes = Sizes { batch: 1, m: dims.iter().product(), k: self.k, n: self.n };
        dims.push(self.n);
        let weight = View::rows(weight.values(), self.k).transposed();
        let bias = operands.get(2).map(|bias| bias.values());
        let out = products(self.level, View::rows(x.values(), self.k), weight, bias, sizes);
        Ok((out, Shape::from(dims)))
    }

    fn backward(&self, operands: [Operand; N], Backward { dy, wanted, .. }: Backward<N>) -> Gradients<N> {
        let Self { level, n, k } = *self;
        let (x, weight) = (operands[0], operands[1]);
        let gradient = |operand: usize| match operand {
            0 => linear_input_gradient(level, dy, n, &weight),
            1 => linear_weight_gradient(level, &x, k, dy, n),
            _ => bias_gradient(level, dy, n),
        };
        Ok(std::array::from_fn(|i| wanted[i].then(|| gradient(i))))
    }
}

impl<const N: usize> Op<N> for Linear {
    fn reference(&self, operands: [&Tensor; N]) -> Result<Tensor> {
        let (x, mut dims) = (operands[0], operands[0].dims().to_vec());
        dims.pop();
        dims.push(self.n);
        let out = x.reshape(((), self.k))?.matmul(&operands[1].to_dtype(x.dtype())?.t()?)?.reshape(dims)?;
        Ok(match operands.get(2) {
            Some(bias) => out.broadcast_add(&bias.to_dtype(x.dtype())?)?,
            None => out,
        })
    }

    /// candle's product; with a bias candle would make a strided one, which is slow in both directions.
    #[cfg(feature = "cuda")]
    fn cuda(self, operands: [&Tensor; N]) -> Result<Tensor> {
        let product = Op::<2>::reference(&self, [operands[0], operands[1]])?;
        match operands.get(2) {
            Some(bias) => super::add_channels::add_channels(&product, bias),
            None => Ok(product),
        }
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
            let [x, weight, _] = operands.clone();
            check(&operands, |level| Linear { level, n, k });
            check(&[x, weight], |level| Linear { level, n, k });
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
            check(&operands, |level| MatMul { level });
            let operands = [random(key, (b, k, m)), random(key + 1, (b, n, k))];
            let transpose = |t: &Tensor| t.transpose(1, 2).unwrap();
            check_function(&operands, |t| matmul(&transpose(&t[0]), &transpose(&t[1])));
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
