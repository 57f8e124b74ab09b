//! GPU backend: CUDA C++ kernels, compiled by NVRTC on the user's machine when they are first
//! launched, and typed operations over them.
//!
//! - [`Device`] is memory and kernel launches, nothing more. [`Gpu`] is a real one. The GPU emulator
//!   (`shim`, feature `emulator`) compiles the same kernels as C++ and runs them on the CPU. So
//!   every kernel and every caller is tested without a GPU.
//! - [`Ops`] checks sizes and launches kernels. [`source::MODULES`] lists the kernels.
//! - [`experts`] computes routed experts that are held in a device's memory.
//! - [`stream`] copies experts to a device while it computes.
//!
//! # Errors and panics
//!
//! Every function that returns a [`CudaError`] fails when the device fails, now or at work that was
//! enqueued before. Every operation panics when a buffer is smaller than the sizes that it is
//! given. The functions document only what goes beyond that.
//!
//! # State of testing
//!
//! The authors never ran this crate on a real GPU. Calls to the driver are tested on a fake CUDA
//! driver, written from the documentation (`tests/driver`).
//!
//! # Example
//!
//! The kernels are listed without a GPU:
//!
//! ```
//! use tier_plan_cuda::source::{MODULES, matvec_kernel, module_of};
//! use tier_plan_kernels::quant::TensorType;
//!
//! let kernel = matvec_kernel(TensorType::Q4_K);
//! assert_eq!(kernel, "matvec_Q4_K");
//! assert_eq!(module_of(kernel).unwrap().name, "k.cu");
//! assert!(MODULES.iter().all(|module| !module.kernels.is_empty()));
//! ```

pub mod copy_stream;
pub mod device;
pub mod experts;
pub mod gpu;
mod graph;
pub mod kernel_cache;
mod kernel_images;
pub mod nvml;
mod nvrtc;
pub mod ops;
mod pinned;
#[cfg(any(test, feature = "emulator"))]
pub mod shim;
mod side_stream;
pub mod source;
pub mod stream;
pub mod transfers;
mod upload_ring;

pub use device::{Buffer, Device, View};
pub use gpu::Gpu;
pub use nvrtc::{Compiled, Compiler, NVRTC_VARIABLE};
pub use ops::Ops;

use std::fmt;
use thiserror::Error;

/// A version of CUDA, or a compute capability: `12.4`, `8.6`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub struct Version {
    pub major: i32,
    pub minor: i32,
}

impl Version {
    /// Returns the version that the driver numbers so: 12040 is 12.4.
    pub fn of_driver(number: i32) -> Self {
        Self {
            major: number / 1000,
            minor: number % 1000 / 10,
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Why a GPU can't be used, or failed.
#[derive(Debug, Error)]
pub enum CudaError {
    /// No driver library can be loaded.
    #[error(
        "no NVIDIA driver: neither libcuda.so nor libcuda.so.1 can be loaded; install the driver, and in a container \
         start it with the GPU passed through"
    )]
    NoDriver,
    /// The library that was loaded as the driver is the CUDA toolkit's stub for linking.
    #[error(
        "no NVIDIA driver: the libcuda.so that is found is the CUDA toolkit's stub, which is only for linking; install the \
         driver, and take the toolkit's folder `stubs` out of LD_LIBRARY_PATH"
    )]
    StubDriver,
    /// The driver's interface is older than the oldest supported version.
    #[error(
        "the NVIDIA driver has the interface of CUDA {found}, expected 12.0 or newer: update the driver"
    )]
    OldDriver {
        /// Version of the driver's interface.
        found: Version,
    },
    /// The driver shows no GPU with this ordinal.
    #[error(
        "the NVIDIA driver finds no GPU number {ordinal}, it has {found}; CUDA_VISIBLE_DEVICES may hide some"
    )]
    NoDevice {
        /// Requested ordinal, from 0.
        ordinal: usize,
        /// GPUs that the driver shows.
        found: usize,
    },
    /// The GPU is older than the kernels support.
    #[error("{name} has compute capability {capability}; the kernels need 7.5 (Turing) or newer")]
    TooOld {
        /// Name of the GPU.
        name: String,
        /// Compute capability of the GPU.
        capability: Version,
    },
    /// NVRTC was not found, or can't be used.
    #[error(
        "the kernels can't be compiled: NVRTC was not found ({looked}); install the CUDA toolkit, or the Python package \
         nvidia-cuda-nvrtc, and set {NVRTC_VARIABLE} to the path of its libnvrtc.so"
    )]
    NoCompiler {
        /// Paths that were tried, or what is wrong with the library that was found.
        looked: String,
    },
    /// NVRTC rejected a module.
    #[error("the kernels of {module} do not compile for {arch}: {log}")]
    Compile {
        /// File name of the module.
        module: &'static str,
        /// Target architecture, `sm_86`.
        arch: String,
        /// Output of the compiler.
        log: String,
    },
    /// No module has a kernel of this name.
    #[error("there is no kernel '{0}'")]
    NoKernel(String),
    /// The device has too little memory for an allocation.
    #[error("{device} is out of memory: {wanted} bytes requested, {free} free")]
    OutOfMemory {
        /// Name of the device.
        device: String,
        /// Bytes of the failed allocation.
        wanted: usize,
        /// Free bytes at that moment.
        free: usize,
    },
    /// A part of a model is not on the device.
    #[error("{device} does not have {part}")]
    NotThere {
        /// Name of the device.
        device: String,
        /// The part, in words.
        part: String,
    },
    /// Another call to the driver failed.
    #[error("{device}: {what} failed: {why}")]
    Call {
        /// Name of the device.
        device: String,
        /// The operation that failed.
        what: String,
        /// Error message of the driver.
        why: String,
    },
}
