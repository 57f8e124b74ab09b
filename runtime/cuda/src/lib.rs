//! What a GPU computes: our own kernels in CUDA C++, compiled on the user's machine when they are first needed, and the
//! typed operations over them.
//!
//! A [`Device`] is memory and launches, nothing more. [`gpu`] is a real one; tests have another, which compiles the same
//! kernels as plain C++ and runs a block's threads one after the other, so that every kernel and everything that calls
//! them is checked without a GPU. [`check`] compares each kernel with the plain ones of the processor on whatever device
//! it is given; [`measure`] times a device.
//!
//! Nothing here was ever run on a real GPU by its authors, and no speed of it was measured. What talks to the driver is run
//! on a stand-in for it, written from its documentation (`tests/driver`).

pub mod device;
pub mod experts;
pub mod gpu;
mod kept;
pub mod lane;
pub mod nvml;
mod nvrtc;
pub mod ops;
mod outbox;
#[cfg(any(test, feature = "emulator"))]
pub mod shim;
pub mod source;
pub mod stream;

pub use device::{Buffer, Device, View};
pub use gpu::Gpu;
pub use nvrtc::{Compiled, Compiler, NVRTC_VARIABLE};
pub use ops::Ops;

use thiserror::Error;

/// Why a GPU can't be used, or failed.
#[derive(Debug, Error)]
pub enum CudaError {
    /// No driver library on this system.
    #[error(
        "no NVIDIA driver: neither libcuda.so nor libcuda.so.1 can be loaded; install the driver, and in a container \
         start it with the GPU passed through"
    )]
    NoDriver,
    /// The toolkit's library for linking is found where the driver's should be.
    #[error(
        "no NVIDIA driver: the libcuda.so that is found is the CUDA toolkit's stub, which is only for linking; install the \
         driver, and take the toolkit's folder `stubs` out of LD_LIBRARY_PATH"
    )]
    StubDriver,
    /// A driver whose interface lacks what is used.
    #[error("the NVIDIA driver has the interface of CUDA {major}.{minor}, 12.0 or newer is needed: update the driver")]
    OldDriver {
        /// Version.
        major: i32,
        /// Its second part.
        minor: i32,
    },
    /// A driver that finds no GPU.
    #[error("the NVIDIA driver finds no GPU number {ordinal}, it has {found}; CUDA_VISIBLE_DEVICES may hide some")]
    NoDevice {
        /// The number asked for, from 0.
        ordinal: usize,
        /// GPUs there are.
        found: usize,
    },
    /// A GPU that is older than the kernels.
    #[error("{name} has compute capability {major}.{minor}; the kernels need 7.5 (Turing) or newer")]
    TooOld {
        /// The GPU.
        name: String,
        /// Capability.
        major: i32,
        /// Its second part.
        minor: i32,
    },
    /// No compiler for kernels.
    #[error(
        "the kernels can't be compiled: NVRTC was not found ({looked}); install the CUDA toolkit, or the Python package \
         nvidia-cuda-nvrtc, and set {NVRTC_VARIABLE} to the path of its libnvrtc.so"
    )]
    NoCompiler {
        /// Where it was looked for, or what is wrong with what was found.
        looked: String,
    },
    /// A kernel that does not compile.
    #[error("the kernels of {module} do not compile for {arch}: {log}")]
    Compile {
        /// The module.
        module: &'static str,
        /// The architecture, `sm_86`.
        arch: String,
        /// What the compiler said.
        log: String,
    },
    /// A kernel that is in no module.
    #[error("there is no kernel '{0}'")]
    NoKernel(String),
    /// Not enough memory.
    #[error("{device} has no room for {wanted} bytes: {free} are free; solve with a smaller --vram")]
    OutOfMemory {
        /// The device.
        device: String,
        /// Bytes asked for.
        wanted: usize,
        /// Bytes free at that moment.
        free: usize,
    },
    /// Anything else that the device refused.
    #[error("{device}: {what} failed: {why}")]
    Call {
        /// The device.
        device: String,
        /// What was tried.
        what: String,
        /// What the driver said.
        why: String,
    },
}
