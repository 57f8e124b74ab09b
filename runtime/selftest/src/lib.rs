//! What a device gives a whole model, measured: `selftest --gpu` holds it against targets. Here are only measurements and
//! comparisons; what is expected of them is the caller's business.

pub mod all;
pub mod counting;
pub mod cpu_kernels;
pub mod golden;
pub mod gpu_kernels;
pub mod gpu_rates;
pub mod launches;
pub mod outcome;
pub mod speed;
pub mod synth;
pub mod whole;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use thiserror::Error;
use tier_plan_cuda::CudaError;
use tier_plan_formats::gguf::GgufError;
use tier_plan_formats::model::ModelError;
use tier_plan_runtime::error::{LoadError, RunError};
use whole::WholeError;

/// Whether to go on: asked between passes, so that a person can end what takes minutes.
pub type Stop<'a> = &'a dyn Fn() -> bool;

/// Why nothing was found.
#[derive(Debug, Error)]
pub enum TargetError {
    /// A model could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// It did not run.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The device failed.
    #[error(transparent)]
    Gpu(#[from] CudaError),
    /// The file is no GGUF.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// Golden values that are not what they should be.
    #[error("{}: {what}", path.display())]
    Golden {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A model for timing could not be written.
    #[error("writing {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said; part of the message, so no source of its own.
        r#source: std::io::Error,
    },
    /// The caller said so.
    #[error("stopped")]
    Stopped,
}

impl From<ModelError> for TargetError {
    fn from(error: ModelError) -> Self {
        TargetError::Load(error.into())
    }
}

impl From<WholeError> for TargetError {
    fn from(error: WholeError) -> Self {
        match error {
            WholeError::Load(error) => TargetError::Load(error),
            WholeError::Run(error) => TargetError::Run(error),
        }
    }
}

impl TargetError {
    /// Whether a GPU can't run this model at all, or has no room for it: no failure of the GPU.
    pub fn is_not_for_it(&self) -> bool {
        matches!(self, TargetError::Load(LoadError::OnGpu { .. } | LoadError::GpuFull { .. }))
    }
}

/// A file that is removed when this is dropped.
#[derive(Debug)]
pub struct Temporary(PathBuf);

impl Temporary {
    /// A name in a folder that nobody has; there is no file yet.
    pub fn new(folder: &Path, what: &str) -> Self {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        Self(folder.join(format!("tier-plan-{}-{serial}-{what}.gguf", std::process::id())))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // One that was never written, or is gone already, needs no removing.
        let _ = std::fs::remove_file(&self.0);
    }
}
