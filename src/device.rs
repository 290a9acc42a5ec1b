//! The device for tensors, and the class of machines that compute bit-identical results.

#[cfg(feature = "cuda")]
use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};
use std::{
    fmt,
    str::FromStr,
    sync::{Once, OnceLock},
};

use candle_core::{DType, Device};
use rayon::prelude::*;

use crate::{Error, Result, progress::note};

/// What the user asked for: `auto`, `cpu` or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// CUDA device 0 if this build has CUDA and the device works, else the CPU; a GPU that does not work is
    /// reported on stderr.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device with this ordinal.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;
    fn from_str(s: &str) -> std::result::Result<Self, String> {
        match s {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            _ => s
                .strip_prefix("cuda:")
                .and_then(|n| n.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| format!("device is '{s}', expected auto, cpu or cuda:N")),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

impl DeviceChoice {
    /// Opens the device. Fails with [`Error::Usage`] if it does not exist or this build does not support it.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Auto => Ok(open_cuda(0).unwrap_or_else(|error| {
                static TOLD: Once = Once::new();
                if let Some(reason) = reason_to_tell(&error) {
                    TOLD.call_once(|| note(&format!("computing on the CPU: {reason}")));
                }
                Device::Cpu
            })),
            Self::Cuda(ordinal) => open_cuda(ordinal),
        }
    }
}

/// Why a GPU cannot be opened; `None` if there simply is none, or if this build has no CUDA.
fn reason_to_tell(error: &Error) -> Option<String> {
    let reason = error.to_string();
    let none = ["NO_DEVICE", WITHOUT_CUDA].iter().any(|words| reason.contains(words));
    (!none).then_some(reason)
}

/// What [`open_cuda`] says in a build without CUDA.
const WITHOUT_CUDA: &str = "this program was built without CUDA";

/// The device with this ordinal, the same object every time, so that what is kept for a device is kept once.
///
/// `new_cuda_with_stream`, never `new_cuda`: the latter shares a stream without event tracking, so that a
/// second thread can race.
#[cfg(feature = "cuda")]
fn open_cuda(ordinal: usize) -> Result<Device> {
    static OPEN: Mutex<BTreeMap<usize, Device>> = Mutex::new(BTreeMap::new());
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = open.get(&ordinal) {
        return Ok(device.clone());
    }
    let device = Device::new_cuda_with_stream(ordinal)
        .map_err(|e| Error::Usage(format!("device cuda:{ordinal} cannot be opened: {e}{}", remedy(&e))))?;
    if let Device::Cuda(cuda) = &device {
        // SAFETY: all work of the process on this device goes to this one stream, in the order in which it is asked for.
        unsafe { cuda.disable_event_tracking() };
        keep_freed_memory(cuda);
    }
    open.insert(ordinal, device.clone());
    Ok(device)
}

/// Lets the driver keep freed memory for the next tensor. By default it releases all of it whenever the stream is
/// synchronised, and allocates it again, which takes milliseconds. If the driver has no memory pools, there is
/// nothing to do.
#[cfg(feature = "cuda")]
fn keep_freed_memory(device: &candle_core::CudaDevice) {
    use candle_core::cuda_backend::cudarc::driver::sys;
    let context = device.cuda_stream().context().clone();
    if !context.has_async_alloc() {
        return;
    }
    let mut pool = std::ptr::null_mut();
    let mut threshold = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the device is open, and the attribute's value is 64 bits. A refusal costs time alone.
    unsafe {
        if sys::cuDeviceGetDefaultMemPool(&mut pool, context.cu_device()) == sys::CUresult::CUDA_SUCCESS {
            sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast());
        }
    }
}

/// What can be done about an error of the driver.
#[cfg(feature = "cuda")]
fn remedy(error: &candle_core::Error) -> &'static str {
    const OLD: &str = "; the driver is older than this program's CUDA, expected 580 or later for CUDA 13";
    const REMEDIES: [(&str, &str); 7] = [
        ("INVALID_DEVICE", "; there are fewer GPUs, see nvidia-smi"),
        ("NO_DEVICE", "; the driver finds no GPU"),
        ("INSUFFICIENT_DRIVER", OLD),
        ("SYSTEM_DRIVER_MISMATCH", OLD),
        ("UNSUPPORTED_PTX", OLD),
        ("STUB_LIBRARY", "; libcuda.so.1 is the stub that programs are linked with, expected the driver's"),
        ("OUT_OF_MEMORY", "; other processes use its memory"),
    ];
    let text = error.to_string();
    REMEDIES.into_iter().find(|(name, _)| text.contains(name)).map_or("", |(_, remedy)| remedy)
}

/// `device` and the other GPUs of its class, at most `limit` in all; work on any of them gives the same bits. Fails
/// with [`Error::Usage`] if the driver does not say how many there are.
pub fn all_of_class(device: &Device, limit: usize) -> Result<Vec<Device>> {
    let mut devices = vec![device.clone()];
    add_gpus_of_class(&mut devices, limit)?;
    Ok(devices)
}

/// Adds further devices to the first until there are `limit`.
#[cfg(feature = "cuda")]
fn add_gpus_of_class(devices: &mut Vec<Device>, limit: usize) -> Result<()> {
    use candle_core::cuda_backend::cudarc::driver::CudaContext;
    let device = devices[0].clone();
    let Device::Cuda(cuda) = &device else { return Ok(()) };
    let (own, class) = (cuda.cuda_stream().context().ordinal(), device_class(&device));
    let count =
        CudaContext::device_count().map_err(|e| Error::Usage(format!("the GPUs cannot be counted: {e}")))?;
    for ordinal in (0..count as usize).filter(|&ordinal| ordinal != own) {
        if devices.len() >= limit {
            break;
        }
        // A device that cannot be opened is as useless as one of another class.
        if let Ok(other) = open_cuda(ordinal)
            && device_class(&other) == class
        {
            devices.push(other);
        }
    }
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn add_gpus_of_class(_: &mut Vec<Device>, _: usize) -> Result<()> {
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(ordinal: usize) -> Result<Device> {
    Err(Error::Usage(format!(
        "device is 'cuda:{ordinal}', but {WITHOUT_CUDA}; build it with `--features cuda`"
    )))
}

named! {
    /// The precision in which a GPU computes. Parameters, optimisers and statistics are always f32.
    pub enum Precision default F32 {
        /// Everything is f32.
        F32 = "f32",
        /// Numbers are rounded to TF32, with 10 bits of mantissa, before they are multiplied, and sums are f32:
        /// several times as fast.
        Tf32 = "tf32",
        /// Images inside networks are bf16, with 7 bits of mantissa and half the memory; sums of products are f32.
        Bf16 = "bf16",
    }
}

static PRECISION: OnceLock<Precision> = OnceLock::new();

impl Precision {
    /// The precision that was set, or f32.
    pub fn get() -> Self {
        PRECISION.get().copied().unwrap_or_default()
    }

    /// The type of images inside networks on this device.
    pub fn images(self, device: &Device) -> DType {
        if self == Self::Bf16 && device.is_cuda() { DType::BF16 } else { DType::F32 }
    }

    /// Sets the precision for the whole process, before anything is computed. Only the first call counts; it cannot
    /// be changed later.
    pub fn set(self) {
        PRECISION.get_or_init(|| {
            #[cfg(feature = "cuda")]
            candle_core::cuda_backend::set_gemm_reduced_precision_f32(self == Self::Tf32);
            self
        });
    }
}

/// The instruction set that the CPU kernels use, ordered from plain to wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CpuLevel {
    /// Plain Rust: IEEE single precision, with multiplications and additions rounded separately.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 (F), with the bits of AVX2.
    Avx512,
}

impl CpuLevel {
    /// The widest level of this machine, or the one that `PROXYSET_CPU` (`portable`, `avx2`,
    /// `avx512`) forces.
    ///
    /// A forced level that the machine lacks, or an unknown name, is ignored in favour of detection;
    /// [`CpuLevel::check_env`] reports it beforehand.
    pub fn get() -> Self {
        static LEVEL: OnceLock<CpuLevel> = OnceLock::new();
        *LEVEL.get_or_init(|| Self::from_env().unwrap_or_else(|_| Self::detect()))
    }

    /// Fails with [`Error::Usage`] if `PROXYSET_CPU` names a level that is unknown or not on this machine, or
    /// `PROXYSET_CONV` an unknown algorithm.
    pub fn check_env() -> Result<()> {
        Self::from_env()?;
        ConvAlgorithm::from_env().map(drop)
    }

    fn from_env() -> Result<Self> {
        match std::env::var("PROXYSET_CPU").as_deref() {
            Err(_) | Ok("") => Ok(Self::detect()),
            Ok("portable") => Ok(Self::Portable),
            Ok("avx2") if Self::detect() >= Self::Avx2 => Ok(Self::Avx2),
            Ok("avx2") => bail!(Usage, "PROXYSET_CPU is 'avx2', but this machine has no AVX2 with FMA"),
            Ok("avx512") if Self::detect() >= Self::Avx512 => Ok(Self::Avx512),
            Ok("avx512") => bail!(Usage, "PROXYSET_CPU is 'avx512', but this machine has no AVX-512"),
            Ok(other) => bail!(Usage, "PROXYSET_CPU is '{other}', expected portable, avx2 or avx512"),
        }
    }

    fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return if is_x86_feature_detected!("avx512f") { Self::Avx512 } else { Self::Avx2 };
        }
        Self::Portable
    }
}

/// How 3 × 3 convolutions at stride 1 are computed on the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConvAlgorithm {
    /// By Winograd's minimal filtering wherever that is less work: about twice as fast, with two to three times the
    /// rounding error.
    Winograd,
    /// As sums over the window.
    Direct,
}

impl ConvAlgorithm {
    /// Winograd's, unless `PROXYSET_CONV` is `direct`. An unknown name is ignored; [`CpuLevel::check_env`] reports
    /// it beforehand.
    pub fn get() -> Self {
        static ALGORITHM: OnceLock<ConvAlgorithm> = OnceLock::new();
        *ALGORITHM.get_or_init(|| Self::from_env().unwrap_or(Self::Winograd))
    }

    fn from_env() -> Result<Self> {
        match std::env::var("PROXYSET_CONV").as_deref() {
            Err(_) | Ok("" | "winograd") => Ok(Self::Winograd),
            Ok("direct") => Ok(Self::Direct),
            Ok(other) => bail!(Usage, "PROXYSET_CONV is '{other}', expected winograd or direct"),
        }
    }
}

/// The class of machines on which a run gives the same bits: `cpu-avx2`, `cpu-portable`, `cuda-sm90x132-cudnn91900` (architecture
/// and number of multiprocessors, by which algorithms are chosen); a
/// CPU without Winograd's filtering is `…-direct`, a GPU that computes in TF32 or bf16 `…-tf32`, `…-bf16`.
///
/// Between classes, results agree up to rounding. Every record names the class that made it.
pub fn device_class(device: &Device) -> String {
    match device {
        Device::Cpu => {
            let level = match CpuLevel::get() {
                CpuLevel::Portable => "cpu-portable",
                CpuLevel::Avx2 | CpuLevel::Avx512 => "cpu-avx2",
            };
            match ConvAlgorithm::get() {
                ConvAlgorithm::Winograd => level.into(),
                ConvAlgorithm::Direct => format!("{level}-direct"),
            }
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => gpu_class(cuda),
        _ => "unknown".into(),
    }
}

#[cfg(feature = "cuda")]
fn gpu_class(device: &candle_core::CudaDevice) -> String {
    use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute as Attribute;
    let context = device.cuda_stream().context().clone();
    let attribute = |a| context.attribute(a).unwrap_or(0);
    let precision = match Precision::get() {
        Precision::F32 => String::new(),
        other => format!("-{other}"),
    };
    format!(
        "cuda-sm{}{}x{}-cudnn{}{precision}",
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
        candle_core::cuda_backend::cudarc::cudnn::result::get_version(),
    )
}

/// Does `one` for each item and returns the results in order: in parallel on the CPU, one after the other on a GPU,
/// each with the whole GPU.
pub fn side_by_side<I: Sync, T: Send>(
    device: &Device,
    items: &[I],
    one: impl Fn(&I) -> Result<T> + Sync + Send,
) -> Result<Vec<T>> {
    if device.is_cpu() {
        items.par_iter().with_max_len(1).map(one).collect()
    } else {
        items.iter().map(one).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_round_trip_and_bad_ones_say_what_was_expected() {
        for name in ["auto", "cpu", "cuda:3"] {
            assert_eq!(name.parse::<DeviceChoice>().unwrap().to_string(), name);
        }
        let error = "gpu".parse::<DeviceChoice>().unwrap_err();
        assert_eq!(error, "device is 'gpu', expected auto, cpu or cuda:N");
    }

    #[test]
    fn a_gpu_that_does_not_work_is_told_of_and_one_that_is_not_there_is_not() {
        let reason = |text: &str| reason_to_tell(&Error::Usage(text.into()));
        let broken = "device cuda:0 cannot be opened: DriverError(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, \"…\")";
        assert_eq!(reason(broken).as_deref(), Some(broken));
        assert_eq!(reason("device cuda:0 cannot be opened: DriverError(CUDA_ERROR_NO_DEVICE, \"…\")"), None);
        #[cfg(not(feature = "cuda"))]
        assert_eq!(reason_to_tell(&open_cuda(0).unwrap_err()), None);
    }

    #[test]
    fn the_precision_is_set_once() {
        let before = Precision::get();
        assert_eq!(before, Precision::F32);
        Precision::F32.set();
        Precision::Tf32.set();
        assert_eq!(Precision::get(), before);
    }
}
