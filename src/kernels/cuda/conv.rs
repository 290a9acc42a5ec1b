//! Convolution by cuDNN, NHWC. Descriptors and workspace are made once for each shape and device. The algorithm is
//! chosen by measuring once, among those that give the same bits each time: [`super::super::algorithms`].

use std::{
    any::Any,
    cell::{Cell, RefCell},
    collections::HashMap,
    fmt,
    path::Path,
    rc::Rc,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
};

use candle_core::{
    CudaDevice, CudaStorage, DType, Device, Layout, Shape, Tensor,
    cuda_backend::{
        DeviceId, WrapErr,
        cudarc::{
            cudnn::{
                ConvBackwardData, ConvBackwardFilter, ConvDescriptor, ConvForward, Cudnn, FilterDescriptor,
                TensorDescriptor, sys,
            },
            driver::{CudaSlice, CudaView, sys::CUevent_flags},
        },
    },
};

use super::{
    super::{
        algorithms,
        shell::{CudaBackward, CudaGradients, CudaNode, CudaOutput, apply_cuda},
    },
    Element, tensor, uninitialized, view, with_element, with_views,
};
use crate::{
    Result,
    device::{Precision, device_class},
};

/// Convolution without a bias: see [`fn@super::super::conv2d::conv2d`], which has checked the shapes. `filter`: as
/// [`filter`] makes it of the weights, for the type of `x`.
pub(in crate::kernels) fn conv2d(
    x: &Tensor,
    filter: &Tensor,
    stride: usize,
    (before, after): (usize, usize),
) -> Result<Tensor> {
    // cuDNN pads both ends equally.
    let (x, padding) = match before == after {
        true => (x.contiguous()?, before),
        false => (x.pad_with_zeros(1, before, after)?.pad_with_zeros(2, before, after)?.contiguous()?, 0),
    };
    let x = aligned(x)?;
    let convolution =
        Convolution { image: x.dims4()?, filter: filter.dims4()?, stride, padding, pass: Pass::Forward };
    apply_cuda(convolution, [&x, filter])
}

/// Weights `(c_out, c_in, kh, kw)`, f32, in cuDNN's order, `(c_out, kh, kw, c_in)`, and the images' type.
pub(in crate::kernels) fn filter(weight: &Tensor, images: DType) -> Result<Tensor> {
    aligned(weight.permute((0, 2, 3, 1))?.contiguous()?.to_dtype(images)?)
}

/// A copy if the elements do not begin at a multiple of 16 bytes, which cuDNN's fastest kernels require.
fn aligned(t: Tensor) -> Result<Tensor> {
    let start = t.layout().start_offset() * t.dtype().size_in_bytes();
    Ok(if start.is_multiple_of(16) { t } else { t.copy()? })
}

/// Algorithms that need a larger workspace, in bytes, are not used.
const LARGEST_WORKSPACE: usize = 1 << 30;

/// Which part of a convolution is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Pass {
    /// The output, from image and filter.
    Forward,
    /// The image's gradient, from filter and the output's gradient.
    Image,
    /// The filter's gradient, from image and the output's gradient.
    Filter,
}

/// A convolution of known sizes, or one of its gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Convolution {
    /// (images, height, width, channels).
    image: (usize, usize, usize, usize),
    /// (channels of the output, height, width, channels of the image).
    filter: (usize, usize, usize, usize),
    stride: usize,
    padding: usize,
    pass: Pass,
}

impl fmt::Display for Convolution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the number of images: the result for an image must not depend on the others.
        let ((_, h, w, c), (c_out, kh, kw, _)) = (self.image, self.filter);
        let Self { stride, padding, pass, .. } = self;
        write!(f, "{pass:?} {h}x{w}x{c} {c_out}x{kh}x{kw} stride {stride} padding {padding}")
    }
}

impl Convolution {
    fn out(&self) -> (usize, usize, usize, usize) {
        let ((b, h, w, _), (c_out, kh, kw, _)) = (self.image, self.filter);
        let side = |n: usize, k: usize| (n + 2 * self.padding - k) / self.stride + 1;
        (b, side(h, kh), side(w, kw), c_out)
    }

    /// What this pass computes.
    fn result(&self) -> (usize, usize, usize, usize) {
        match self.pass {
            Pass::Forward => self.out(),
            Pass::Image => self.image,
            Pass::Filter => self.filter,
        }
    }

    fn run<T: Element>(
        &self,
        device: &CudaDevice,
        first: &CudaView<'_, T>,
        second: &CudaView<'_, T>,
    ) -> candle_core::Result<CudaSlice<T>> {
        let (a, b, c, d) = self.result();
        let mut out = uninitialized::<T>(device, a * b * c * d)?;
        if first.is_empty() || second.is_empty() {
            device.cuda_stream().memset_zeros(&mut out).w()?;
            return Ok(out);
        }
        with_state(device, |state| {
            let plan = state.plan::<T>(self)?;
            let mut launch =
                |algorithm, bytes| plan.launch(state, (algorithm, bytes), first, second, &mut out);
            let (algorithm, bytes) = plan.algorithm(self, state, &mut launch)?;
            launch(algorithm, bytes)
        })?;
        Ok(out)
    }

    /// The gradient that `pass` is of.
    fn gradient(&self, pass: Pass, first: &Tensor, second: &Tensor) -> candle_core::Result<Tensor> {
        let gradient = Self { pass, ..*self };
        with_element!(first, T => with_views::<T, 2, _>([first, second], |device, [first, second]| {
            Ok(tensor(device, gradient.run::<T>(device, &first, &second)?, gradient.result()))
        }))
    }
}

impl CudaNode<2> for Convolution {
    const NAME: &'static str = "conv2d";

    fn forward(
        &self,
        [(image, image_layout), (filter, filter_layout)]: [(&CudaStorage, &Layout); 2],
    ) -> CudaOutput {
        let device = &image.device;
        let out = with_element!(image, T => {
            let operands = (view::<T>(image, image_layout)?, view::<T>(filter, filter_layout)?);
            CudaStorage::wrap_cuda_slice(self.run::<T>(device, &operands.0, &operands.1)?, device.clone())
        });
        Ok((out, Shape::from(self.result())))
    }

    fn backward(&self, [image, filter]: [&Tensor; 2], back: CudaBackward<2>) -> CudaGradients<2> {
        let CudaBackward { dy, wanted, .. } = back;
        let of_image = wanted[0].then(|| self.gradient(Pass::Image, filter, dy)).transpose()?;
        Ok([of_image, wanted[1].then(|| self.gradient(Pass::Filter, image, dy)).transpose()?])
    }
}

/// What cuDNN needs for a device: one handle and one workspace, whatever the number of threads, which launch one
/// after the other on one stream.
struct State {
    device: CudaDevice,
    /// [`device_class`]: algorithms are chosen for all of it.
    class: String,
    cudnn: Arc<Cudnn>,
    plans: RefCell<HashMap<(Convolution, DType), Rc<dyn Any>>>,
    /// As large as the largest needed so far, and never cleared: everything on one stream can share it.
    workspace: RefCell<Option<CudaSlice<u8>>>,
}

// SAFETY: a handle of cuDNN, and what was made with it, may be used by any thread, by one at a time. All of it is in the state
// and never leaves it, and a state is behind a lock.
unsafe impl Send for State {}

/// A device's state, made when it is first asked for.
type OfDevice = Arc<Mutex<Option<State>>>;

static STATES: LazyLock<Mutex<HashMap<DeviceId, OfDevice>>> = LazyLock::new(Mutex::default);

/// See [`algorithms::keep_in`]. Choices made until now are forgotten.
pub(in crate::kernels) fn keep_algorithms_in(folder: Option<&Path>) {
    algorithms::keep_in(folder);
    for state in lock(&STATES).values() {
        if let Some(state) = &*lock(state) {
            state.plans.borrow_mut().clear();
            *state.workspace.borrow_mut() = None;
        }
    }
}

fn with_state<R>(
    device: &CudaDevice,
    f: impl FnOnce(&State) -> candle_core::Result<R>,
) -> candle_core::Result<R> {
    let of_device = lock(&STATES).entry(device.id()).or_default().clone();
    let mut state = lock(&of_device);
    device.cuda_stream().context().bind_to_thread().w()?;
    let state = match &mut *state {
        Some(state) => state,
        none => none.insert(State {
            device: device.clone(),
            class: device_class(&Device::Cuda(device.clone())),
            cudnn: Cudnn::new(device.cuda_stream())?,
            plans: RefCell::default(),
            workspace: RefCell::default(),
        }),
    };
    f(state)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn plan<T: Element>(&self, convolution: &Convolution) -> candle_core::Result<Rc<Plan<T>>> {
        let key = (*convolution, T::DTYPE);
        if let Some(plan) = self.plans.borrow().get(&key)
            && let Ok(plan) = plan.clone().downcast::<Plan<T>>()
        {
            return Ok(plan);
        }
        let plan = Rc::new(Plan::<T>::new(convolution, &self.cudnn)?);
        self.plans.borrow_mut().insert(key, plan.clone());
        Ok(plan)
    }

    /// At least this many bytes.
    fn reserve(&self, bytes: usize) -> candle_core::Result<()> {
        let mut workspace = self.workspace.borrow_mut();
        if workspace.as_ref().is_none_or(|w| w.len() < bytes) {
            // The present workspace is freed first, in the stream's order.
            *workspace = None;
            // SAFETY: cuDNN asks nothing of what is in it.
            *workspace = Some(unsafe { self.device.alloc::<u8>(bytes.max(1)) }?);
        }
        Ok(())
    }
}

/// The descriptors of a convolution, and the algorithm for one of its passes.
struct Plan<T> {
    image: TensorDescriptor<T>,
    filter: FilterDescriptor<T>,
    out: TensorDescriptor<T>,
    /// Sums are f32, whatever the elements are.
    convolution: ConvDescriptor<f32>,
    /// With the size of its workspace in bytes.
    chosen: Cell<Option<(Algorithm, usize)>>,
}

/// One of cuDNN's algorithms for a pass.
#[derive(Clone, Copy)]
enum Algorithm {
    Forward(sys::cudnnConvolutionFwdAlgo_t),
    Image(sys::cudnnConvolutionBwdDataAlgo_t),
    Filter(sys::cudnnConvolutionBwdFilterAlgo_t),
}

impl Algorithm {
    /// Those that give the same bits each time. Of the image's gradient that is all but 0, whose summation order varies,
    /// of the filter's all but 0 and 3.
    fn candidates(pass: Pass) -> Vec<Self> {
        use sys::{
            cudnnConvolutionBwdDataAlgo_t::*, cudnnConvolutionBwdFilterAlgo_t::*,
            cudnnConvolutionFwdAlgo_t::*,
        };
        match pass {
            Pass::Forward => [
                CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM,
                CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM,
                CUDNN_CONVOLUTION_FWD_ALGO_GEMM,
                CUDNN_CONVOLUTION_FWD_ALGO_FFT,
                CUDNN_CONVOLUTION_FWD_ALGO_FFT_TILING,
                CUDNN_CONVOLUTION_FWD_ALGO_WINOGRAD,
                CUDNN_CONVOLUTION_FWD_ALGO_WINOGRAD_NONFUSED,
            ]
            .map(Self::Forward)
            .to_vec(),
            Pass::Image => [
                CUDNN_CONVOLUTION_BWD_DATA_ALGO_1,
                CUDNN_CONVOLUTION_BWD_DATA_ALGO_FFT,
                CUDNN_CONVOLUTION_BWD_DATA_ALGO_FFT_TILING,
                CUDNN_CONVOLUTION_BWD_DATA_ALGO_WINOGRAD,
                CUDNN_CONVOLUTION_BWD_DATA_ALGO_WINOGRAD_NONFUSED,
            ]
            .map(Self::Image)
            .to_vec(),
            Pass::Filter => [
                CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1,
                CUDNN_CONVOLUTION_BWD_FILTER_ALGO_FFT,
                CUDNN_CONVOLUTION_BWD_FILTER_ALGO_WINOGRAD,
                CUDNN_CONVOLUTION_BWD_FILTER_ALGO_WINOGRAD_NONFUSED,
                CUDNN_CONVOLUTION_BWD_FILTER_ALGO_FFT_TILING,
            ]
            .map(Self::Filter)
            .to_vec(),
        }
    }

    /// cuDNN's number.
    fn number(self) -> u32 {
        match self {
            Self::Forward(algorithm) => algorithm as u32,
            Self::Image(algorithm) => algorithm as u32,
            Self::Filter(algorithm) => algorithm as u32,
        }
    }
}

impl<T: Element> Plan<T> {
    fn new(convolution: &Convolution, cudnn: &Arc<Cudnn>) -> candle_core::Result<Self> {
        const NHWC: sys::cudnnTensorFormat_t = sys::cudnnTensorFormat_t::CUDNN_TENSOR_NHWC;
        // cuDNN names sizes in the order NCHW, whatever the layout.
        let nchw = |(n, h, w, c): (usize, usize, usize, usize)| [n, c, h, w].map(|v| v as i32);
        let (padding, stride) = ([convolution.padding as i32; 2], [convolution.stride as i32; 2]);
        let mode = sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION;
        let mut descriptor = cudnn.create_conv2d::<f32>(padding, stride, [1, 1], mode)?;
        descriptor.set_math_type(match (T::DTYPE, Precision::get()) {
            (DType::F32, Precision::F32) => sys::cudnnMathType_t::CUDNN_FMA_MATH,
            _ => sys::cudnnMathType_t::CUDNN_TENSOR_OP_MATH,
        })?;
        Ok(Self {
            image: cudnn.create_4d_tensor(NHWC, nchw(convolution.image))?,
            filter: cudnn.create_4d_filter(NHWC, nchw(convolution.filter))?,
            out: cudnn.create_4d_tensor(NHWC, nchw(convolution.out()))?,
            convolution: descriptor,
            chosen: Cell::new(None),
        })
    }

    /// The algorithm chosen before or, the first time, the fastest, and the size of its workspace; `launch` runs one.
    fn algorithm(
        &self,
        convolution: &Convolution,
        state: &State,
        mut launch: impl FnMut(Algorithm, usize) -> candle_core::Result<()>,
    ) -> candle_core::Result<(Algorithm, usize)> {
        if let Some(chosen) = self.chosen.get() {
            return Ok(chosen);
        }
        let candidates = Algorithm::candidates(convolution.pass);
        let name = format!("{convolution} {}", T::SUFFIX);
        let number = algorithms::choose(&state.class, &name, || {
            let (mut best, mut refused) = (None, String::new());
            for &algorithm in &candidates {
                // Algorithms that do not support these sizes, or this memory, are skipped.
                match self.time(state, algorithm, &mut launch) {
                    Ok(time) if best.is_none_or(|(least, _)| time < least) => best = Some((time, algorithm)),
                    Ok(_) => {}
                    Err(error) => refused += &format!("; {}: {error}", algorithm.number()),
                }
            }
            // It may have grown for an algorithm that was not chosen.
            *state.workspace.borrow_mut() = None;
            match best {
                Some((_, algorithm)) => Ok(algorithm.number()),
                None => candle_core::bail!(
                    "cuDNN has no algorithm that gives the same bits each time for {name}{refused}"
                ),
            }
        })?;
        let Some(algorithm) = candidates.into_iter().find(|algorithm| algorithm.number() == number) else {
            candle_core::bail!("cuDNN has no algorithm {number} that gives the same bits each time")
        };
        let chosen = (algorithm, self.workspace(algorithm)?);
        self.chosen.set(Some(chosen));
        Ok(chosen)
    }

    /// The size of an algorithm's workspace in bytes.
    fn workspace(&self, algorithm: Algorithm) -> candle_core::Result<usize> {
        let Self { image: x, filter: w, out: y, convolution: conv, .. } = self;
        Ok(match algorithm {
            Algorithm::Forward(algorithm) => ConvForward { conv, x, w, y }.get_workspace_size(algorithm),
            Algorithm::Image(algorithm) => {
                ConvBackwardData { conv, dx: x, w, dy: y }.get_workspace_size(algorithm)
            }
            Algorithm::Filter(algorithm) => {
                ConvBackwardFilter { conv, x, dw: w, dy: y }.get_workspace_size(algorithm)
            }
        }?)
    }

    /// Milliseconds of three runs, after one to warm up. Fails if it needs more than [`LARGEST_WORKSPACE`].
    fn time(
        &self,
        state: &State,
        algorithm: Algorithm,
        mut launch: impl FnMut(Algorithm, usize) -> candle_core::Result<()>,
    ) -> candle_core::Result<f32> {
        let stream = state.device.cuda_stream();
        let bytes = self.workspace(algorithm)?;
        if bytes > LARGEST_WORKSPACE {
            candle_core::bail!("needs {bytes} bytes of workspace")
        }
        launch(algorithm, bytes)?;
        let event = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).w();
        let start = event()?;
        for _ in 0..3 {
            launch(algorithm, bytes)?;
        }
        let end = event()?;
        end.synchronize().w()?;
        start.elapsed_ms(&end).w()
    }

    /// Runs an algorithm with a workspace of this many bytes.
    fn launch(
        &self,
        state: &State,
        (algorithm, bytes): (Algorithm, usize),
        first: &CudaView<'_, T>,
        second: &CudaView<'_, T>,
        out: &mut CudaSlice<T>,
    ) -> candle_core::Result<()> {
        state.reserve(bytes)?;
        let Self { image: x, filter: w, out: y, convolution: conv, .. } = self;
        let scales = (T::one(), T::zero());
        let mut workspace = state.workspace.borrow_mut();
        let workspace = workspace.as_mut();
        // SAFETY: the operands have the sizes and the type of the descriptors, the workspace has what cuDNN asked for.
        unsafe {
            match algorithm {
                Algorithm::Forward(algorithm) => {
                    ConvForward { conv, x, w, y }.launch(algorithm, workspace, scales, first, second, out)
                }
                Algorithm::Image(algorithm) => ConvBackwardData { conv, dx: x, w, dy: y }
                    .launch(algorithm, workspace, scales, out, first, second),
                Algorithm::Filter(algorithm) => ConvBackwardFilter { conv, x, dw: w, dy: y }
                    .launch(algorithm, workspace, scales, first, out, second),
            }
        }?;
        Ok(())
    }
}
