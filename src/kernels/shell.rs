//! The shell around every op: what candle's tape requires of an op is written here, once.
//!
//! An op consists of its arithmetic. [`Node`] has it for the CPU, as functions of slices; [`Op`] adds the reference
//! in candle's ops and the form for a GPU; [`Update`] is a step that overwrites tensors. The shell chooses the form
//! by the device and type of the operands, brings them into row-major order, and requests gradients only for
//! tracked operands; these gradients are in no graph.

use std::{
    cell::Cell,
    ops::{Deref, Range},
};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, InplaceOp1, Layout, Shape, Storage,
    StorageRef, Tensor,
};
use rayon::prelude::*;

use super::parallel::CHUNK;
use crate::Result;

/// An operand of a [`Node`].
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    values: &'a [f32],
    layout: &'a Layout,
}

impl<'a> Operand<'a> {
    fn new(storage: &'a CpuStorage, layout: &'a Layout, strided: bool) -> candle_core::Result<Self> {
        let values = storage.as_slice::<f32>()?;
        let range = match strided {
            true => layout.start_offset()..values.len(),
            false => contiguous(layout)?,
        };
        Ok(Self { values: &values[range], layout })
    }

    /// The elements in row-major order; for a [`Node::STRIDED`] they are placed in the slice by
    /// [`Operand::stride`].
    pub fn values(self) -> &'a [f32] {
        self.values
    }

    pub fn shape(self) -> &'a Shape {
        self.layout.shape()
    }

    pub fn stride(self) -> &'a [usize] {
        self.layout.stride()
    }
}

impl Deref for Operand<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        self.values
    }
}

fn contiguous(layout: &Layout) -> candle_core::Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => {
            candle_core::bail!("a kernel got strides {:?}, expected contiguous elements", layout.stride())
        }
    }
}

/// A function of `N` f32 tensors on the CPU, and its gradients: a node of the tape.
pub(super) trait Node<const N: usize>: Send + Sync + 'static {
    /// Its name in errors.
    const NAME: &'static str;
    /// Whether operands are accepted in any layout.
    const STRIDED: bool = false;

    /// The elements of the output in row-major order, and its shape.
    fn forward(&self, operands: [Operand; N]) -> Output;

    /// The gradients of the operands, in row-major order: at least those that are wanted, of which there is at
    /// least one.
    fn backward(&self, _: [Operand; N], _: Backward<N>) -> Gradients<N> {
        candle_core::bail!("{} has no gradient", Self::NAME)
    }
}

/// The elements of an output, and its shape.
pub(super) type Output = candle_core::Result<(Vec<f32>, Shape)>;

/// The gradients of operands.
pub(super) type Gradients<const N: usize> = candle_core::Result<[Option<Vec<f32>>; N]>;

/// What a backward pass gets in addition to the operands.
pub(super) struct Backward<'a, const N: usize> {
    /// The output.
    pub out: &'a [f32],
    /// Its gradient.
    pub dy: &'a [f32],
    /// Which operands need a gradient.
    pub wanted: [bool; N],
}

/// An op: a node with its reference and its form for a GPU.
pub(super) trait Op<const N: usize>: Node<N> + Sized {
    /// The op in candle's ops: the specification, the oracle for the other forms, and the form that runs where
    /// there is no other. Parameters are converted to the type of the first operand.
    fn reference(&self, operands: [&Tensor; N]) -> Result<Tensor>;

    /// The op on a GPU. The first operand is f32 or bf16, the others are f32.
    #[cfg(feature = "cuda")]
    fn cuda(self, operands: [&Tensor; N]) -> Result<Tensor> {
        self.reference(operands)
    }
}

/// Runs an op in the form for the device and type of its operands.
pub(super) fn run<const N: usize, O: Op<N>>(op: O, operands: [&Tensor; N]) -> Result<Tensor>
where
    Shell<O>: Apply<N>,
{
    if on_cpu(&operands) {
        return apply(op, operands);
    }
    #[cfg(feature = "cuda")]
    if on_cuda(&operands) {
        return op.cuda(operands);
    }
    op.reference(operands)
}

/// Runs a node whose operands are f32 on the CPU.
pub(super) fn apply<const N: usize, O: Node<N>>(node: O, operands: [&Tensor; N]) -> Result<Tensor>
where
    Shell<O>: Apply<N>,
{
    Ok(Shell(node).apply(operands)?)
}

/// Whether the CPU's loops accept these operands.
pub(super) fn on_cpu(operands: &[&Tensor]) -> bool {
    operands.iter().all(|t| t.device().is_cpu() && t.dtype() == DType::F32)
}

/// Whether CUDA kernels accept these operands; the first may be bf16.
#[cfg(feature = "cuda")]
pub(super) fn on_cuda(operands: &[&Tensor]) -> bool {
    let (images, device) = (operands[0], operands[0].device());
    device.is_cuda()
        && matches!(images.dtype(), DType::F32 | DType::BF16)
        && operands[1..].iter().all(|t| t.device().same_device(device) && t.dtype() == DType::F32)
}

/// A [`Node`] as candle takes it.
pub(super) struct Shell<O>(O);

/// Puts an op with this many operands on the tape.
pub(super) trait Apply<const N: usize> {
    fn apply(self, operands: [&Tensor; N]) -> candle_core::Result<Tensor>;
}

/// The gradients of the tracked operands.
fn gradients<const N: usize, O: Node<N>>(
    node: &O,
    operands: [&Tensor; N],
    out: &Tensor,
    dy: &Tensor,
) -> candle_core::Result<[Option<Tensor>; N]> {
    let (tracked, dy) = (operands.map(Tensor::track_op), dy.contiguous()?);
    let mut tensors = [const { None }; N];
    if tracked == [false; N] {
        return Ok(tensors);
    }
    let guards = operands.map(Tensor::storage_and_layout);
    let mut views = Vec::with_capacity(N);
    for (storage, layout) in &guards {
        let Storage::Cpu(storage) = &**storage else {
            candle_core::bail!("{} got a tensor that is not on the CPU", O::NAME)
        };
        views.push(Operand::new(storage, layout, O::STRIDED)?);
    }
    let Ok(views) = <[Operand; N]>::try_from(views) else { unreachable!("as many views as operands") };
    let (out, dy) = (&*Elements::of(out)?, &*Elements::of(&dy)?);
    let found = node.backward(views, Backward { out, dy, wanted: tracked })?;
    for (i, gradient) in found.into_iter().enumerate().filter(|(i, _)| tracked[*i]) {
        let Some(values) = gradient else { candle_core::bail!("{} has no gradient of operand {i}", O::NAME) };
        tensors[i] = Some(Tensor::from_vec(values, operands[i].shape(), &Device::Cpu)?);
    }
    Ok(tensors)
}

/// A function of `N` tensors on a GPU, and its gradients: a node of the tape.
#[cfg(feature = "cuda")]
pub(super) trait CudaNode<const N: usize>: Send + Sync + 'static {
    /// Its name in errors.
    const NAME: &'static str;

    /// The output of contiguous operands.
    fn forward(&self, operands: [(&CudaStorage, &Layout); N]) -> CudaOutput;

    /// The gradients of the operands, which are contiguous and in no graph: at least those that are wanted, of
    /// which there is at least one.
    fn backward(&self, operands: [&Tensor; N], back: CudaBackward<N>) -> CudaGradients<N>;
}

/// The elements of an output, and its shape.
#[cfg(feature = "cuda")]
pub(super) type CudaOutput = candle_core::Result<(CudaStorage, Shape)>;

/// The gradients of operands.
#[cfg(feature = "cuda")]
pub(super) type CudaGradients<const N: usize> = candle_core::Result<[Option<Tensor>; N]>;

/// What a backward pass gets in addition to the operands: contiguous tensors in no graph.
#[cfg(feature = "cuda")]
pub(super) struct CudaBackward<'a, const N: usize> {
    /// The output.
    pub out: &'a Tensor,
    /// Its gradient.
    pub dy: &'a Tensor,
    /// Which operands need a gradient.
    pub wanted: [bool; N],
}

/// Runs a node on a GPU.
#[cfg(feature = "cuda")]
pub(super) fn apply_cuda<const N: usize, O: CudaNode<N>>(node: O, operands: [&Tensor; N]) -> Result<Tensor>
where
    CudaShell<O>: Apply<N>,
{
    Ok(CudaShell(node).apply(operands)?)
}

/// A [`CudaNode`] as candle takes it.
#[cfg(feature = "cuda")]
pub(super) struct CudaShell<O>(O);

/// The gradients of the tracked operands.
#[cfg(feature = "cuda")]
fn cuda_gradients<const N: usize, O: CudaNode<N>>(
    node: &O,
    operands: [&Tensor; N],
    out: &Tensor,
    dy: &Tensor,
) -> candle_core::Result<[Option<Tensor>; N]> {
    let (tracked, dy) = (operands.map(Tensor::track_op), dy.detach().contiguous()?);
    if tracked == [false; N] {
        return Ok([const { None }; N]);
    }
    let detached = operands.map(Tensor::detach);
    let back = CudaBackward { out: &out.detach(), dy: &dy, wanted: tracked };
    let mut found = node.backward(detached.each_ref(), back)?;
    for (i, gradient) in found.iter_mut().enumerate() {
        match gradient {
            Some(_) if tracked[i] => {}
            None if tracked[i] => candle_core::bail!("{} has no gradient of operand {i}", O::NAME),
            other => *other = None,
        }
    }
    Ok(found)
}

macro_rules! custom_op {
    ($n:literal, $custom:ident, $apply:ident, $gradients:ty, $tuple:expr, $x:ident $x_layout:ident $(, $y:ident $y_layout:ident)*) => {
        impl<O: Node<$n>> $custom for Shell<O> {
            fn name(&self) -> &'static str {
                O::NAME
            }

            fn cpu_fwd(
                &self,
                $x: &CpuStorage,
                $x_layout: &Layout,
                $($y: &CpuStorage, $y_layout: &Layout,)*
            ) -> candle_core::Result<(CpuStorage, Shape)> {
                let operands = [
                    Operand::new($x, $x_layout, O::STRIDED)?,
                    $(Operand::new($y, $y_layout, O::STRIDED)?,)*
                ];
                let (values, shape) = self.0.forward(operands)?;
                Ok((CpuStorage::F32(values), shape))
            }

            fn bwd(
                &self,
                $x: &Tensor,
                $($y: &Tensor,)*
                out: &Tensor,
                dy: &Tensor,
            ) -> candle_core::Result<$gradients> {
                gradients(&self.0, [$x, $($y),*], out, dy).map($tuple)
            }
        }

        impl<O: Node<$n>> Apply<$n> for Shell<O> {
            fn apply(self, [$x, $($y),*]: [&Tensor; $n]) -> candle_core::Result<Tensor> {
                let ready = |t: &Tensor| if O::STRIDED { Ok(t.clone()) } else { t.contiguous() };
                ready($x)?.$apply($(&ready($y)?,)* self)
            }
        }

        #[cfg(feature = "cuda")]
        impl<O: CudaNode<$n>> $custom for CudaShell<O> {
            fn name(&self) -> &'static str {
                O::NAME
            }

            fn cpu_fwd(
                &self,
                $x: &CpuStorage,
                _: &Layout,
                $($y: &CpuStorage, _: &Layout,)*
            ) -> candle_core::Result<(CpuStorage, Shape)> {
                let _ = ($x $(, $y)*);
                candle_core::bail!("{} got a tensor on the CPU, expected it on a GPU", O::NAME)
            }

            fn cuda_fwd(
                &self,
                $x: &CudaStorage,
                $x_layout: &Layout,
                $($y: &CudaStorage, $y_layout: &Layout,)*
            ) -> candle_core::Result<(CudaStorage, Shape)> {
                self.0.forward([($x, $x_layout), $(($y, $y_layout),)*])
            }

            fn bwd(
                &self,
                $x: &Tensor,
                $($y: &Tensor,)*
                out: &Tensor,
                dy: &Tensor,
            ) -> candle_core::Result<$gradients> {
                cuda_gradients(&self.0, [$x, $($y),*], out, dy).map($tuple)
            }
        }

        #[cfg(feature = "cuda")]
        impl<O: CudaNode<$n>> Apply<$n> for CudaShell<O> {
            fn apply(self, [$x, $($y),*]: [&Tensor; $n]) -> candle_core::Result<Tensor> {
                $x.contiguous()?.$apply($(&$y.contiguous()?,)* self)
            }
        }
    };
}

custom_op!(1, CustomOp1, apply_op1, Option<Tensor>, |[x]| x, x x_layout);
custom_op!(2, CustomOp2, apply_op2, (Option<Tensor>, Option<Tensor>), |[x, y]| (x, y), x x_layout, y y_layout);
custom_op!(
    3, CustomOp3, apply_op3, (Option<Tensor>, Option<Tensor>, Option<Tensor>), |[x, y, z]| (x, y, z),
    x x_layout, y y_layout, z z_layout
);

/// A step in place: it overwrites `N` tensors and reads one, all of the same shape, and is in no graph.
pub(super) trait Update<const N: usize>: Sync {
    /// Its name in errors.
    const NAME: &'static str;

    /// The step on one range of elements, which is the same for all tensors.
    fn update(&self, written: [&mut [f32]; N], read: &[f32]);

    /// The new values of the tensors, in candle's ops.
    fn reference(&self, written: [&Tensor; N], read: &Tensor) -> candle_core::Result<[Tensor; N]>;

    /// The step on a GPU, on contiguous tensors.
    #[cfg(feature = "cuda")]
    fn cuda(&self, written: [&Tensor; N], read: &Tensor) -> candle_core::Result<()>;
}

/// Runs a step in the form for the device and type of its tensors. `written`: contiguous, each with memory of its
/// own that `read` does not share.
pub(super) fn update<const N: usize, U: Update<N>>(
    step: &U,
    written: [&Tensor; N],
    read: &Tensor,
) -> Result<()> {
    let read = &read.detach().contiguous()?;
    if on_cpu(&written) && on_cpu(&[read]) {
        let read = Elements::of(read)?;
        return Ok(with_elements(&written, Vec::with_capacity(N), &|written| {
            in_chunks(step, written, &read)
        })?);
    }
    #[cfg(feature = "cuda")]
    if on_cuda(&written) && on_cuda(&[written[0], read]) {
        return Ok(step.cuda(written, read)?);
    }
    let detached = written.map(Tensor::detach);
    for (tensor, new) in detached.iter().zip(step.reference(detached.each_ref(), read)?) {
        tensor.flatten_all()?.slice_set(&new.flatten_all()?, 0, 0)?;
    }
    Ok(())
}

/// Calls `then` with `values` and the elements of all tensors: candle lends the elements of one tensor at a time,
/// so the calls are nested.
fn with_elements(
    tensors: &[&Tensor],
    values: Vec<&mut [f32]>,
    then: &dyn Fn(Vec<&mut [f32]>) -> candle_core::Result<()>,
) -> candle_core::Result<()> {
    let Some((first, others)) = tensors.split_first() else { return then(values) };
    first.inplace_op1(&Lend(Cell::new(Some(|lent: &mut [f32]| {
        let mut values: Vec<&mut [f32]> = values;
        values.push(lent);
        with_elements(others, values, then)
    }))))
}

/// Calls a closure with the elements of a tensor.
struct Lend<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut [f32]) -> candle_core::Result<()>> InplaceOp1 for Lend<F> {
    fn name(&self) -> &'static str {
        "update"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        match (storage, self.0.take()) {
            (CpuStorage::F32(values), Some(then)) => then(&mut values[contiguous(layout)?]),
            _ => candle_core::bail!("an update got another type than f32"),
        }
    }
}

/// Runs a step on all elements, on all threads.
fn in_chunks<const N: usize, U: Update<N>>(
    step: &U,
    written: Vec<&mut [f32]>,
    read: &[f32],
) -> candle_core::Result<()> {
    let Ok(mut rest) = <[&mut [f32]; N]>::try_from(written) else { unreachable!("as many as tensors") };
    if let Some(other) = rest.iter().find(|values| values.len() != read.len()) {
        candle_core::bail!("{} of {} elements got {}", U::NAME, other.len(), read.len())
    }
    let mut tasks = Vec::with_capacity(read.len().div_ceil(CHUNK));
    for read in read.chunks(CHUNK) {
        let written = rest.each_mut().map(|rest| rest.split_off_mut(..read.len()).unwrap_or_default());
        tasks.push((written, read));
    }
    tasks.into_par_iter().for_each(|(written, read)| step.update(written, read));
    Ok(())
}

/// Read access to the elements of an f32 tensor on the CPU, in row-major order.
pub(crate) struct Elements<'a> {
    storage: StorageRef<'a>,
    range: Range<usize>,
}

impl<'a> Elements<'a> {
    /// Fails if the tensor is not contiguous, not f32 or not on the CPU.
    pub(crate) fn of(tensor: &'a Tensor) -> candle_core::Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        match &*storage {
            Storage::Cpu(CpuStorage::F32(_)) => Ok(Self { storage, range: contiguous(layout)? }),
            _ => candle_core::bail!(
                "a kernel got {:?} on {:?}, expected f32 on the CPU",
                tensor.dtype(),
                tensor.device()
            ),
        }
    }
}

impl Deref for Elements<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(data)) => &data[self.range.clone()],
            _ => unreachable!("checked when it was made"),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    /// `a · b`, element by element, which checks what was wanted.
    struct Product {
        expected: [bool; 2],
        forgets: bool,
    }

    impl Node<2> for Product {
        const NAME: &'static str = "product";

        fn forward(&self, [a, b]: [Operand; 2]) -> Output {
            Ok((a.iter().zip(&*b).map(|(a, b)| a * b).collect(), a.shape().clone()))
        }

        fn backward(&self, [a, b]: [Operand; 2], Backward { dy, wanted, .. }: Backward<2>) -> Gradients<2> {
            assert_eq!(wanted, self.expected);
            let times = |of: &[f32]| Some(of.iter().zip(dy).map(|(of, dy)| of * dy).collect());
            Ok([if self.forgets { None } else { times(&b) }, times(&a)])
        }
    }

    fn tensor(values: &[f32], shape: (usize, usize)) -> Tensor {
        Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn tracked_operands_get_gradients_in_no_graph_and_others_none() {
        // A transpose: operands come in row-major order.
        let a = Var::from_tensor(&tensor(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], (3, 2))).unwrap();
        let b = Var::from_tensor(&tensor(&[1.0, 0.5, 2.0, -1.0, 3.0, 4.0], (2, 3))).unwrap();
        for expected in [[true, false], [false, true], [true, true]] {
            let of = |var: &Var, tracked: bool| if tracked { var.as_tensor().clone() } else { var.detach() };
            let operands = [of(&a, expected[0]).t().unwrap(), of(&b, expected[1])];
            let out = apply(Product { expected, forgets: false }, operands.each_ref()).unwrap();
            assert_eq!(out.to_vec2::<f32>().unwrap(), [[1.0, 1.5, 10.0], [-2.0, 12.0, 24.0]]);
            let grads = out.backward().unwrap();
            assert_eq!([grads.get(&a).is_some(), grads.get(&b).is_some()], expected);
            if let Some(of_b) = grads.get(&b) {
                assert!(!of_b.track_op());
                assert_eq!(of_b.to_vec2::<f32>().unwrap(), [[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]);
            }
        }
    }

    #[test]
    fn a_gradient_that_is_missing_is_an_error() {
        let a = Var::from_tensor(&tensor(&[1.0, 2.0], (1, 2))).unwrap();
        let b = tensor(&[1.0, 2.0], (1, 2));
        let out = apply(Product { expected: [true, false], forgets: true }, [&a, &b]).unwrap();
        let error = out.backward().unwrap_err().to_string();
        assert!(error.contains("product has no gradient of operand 0"), "{error}");
    }
}
