//! Self-test: compares kernels and whole models with reference results, and measures what a GPU
//! delivers.
//!
//! - [`cpu_kernels`] compares the SIMD kernels of this CPU with scalar ones.
//! - [`gpu_kernels`] compares every GPU kernel with the CPU's, on any
//!   [`Device`](tier_plan_cuda::Device).
//! - [`golden`] compares whole models with another engine's logits, [`whole_model`] with the CPU's.
//! - [`gpu_rates`], [`launches`] and [`speed`] measure a GPU and models on it.
//! - [`synth`] writes models to be measured.
//! - [`suite`] runs all of it.
//!
//! This crate measures and compares. The targets are the caller's.
//!
//! # Example
//!
//! ```
//! use tier_plan_selftest::cpu_kernels;
//!
//! // None if this CPU runs only the scalar kernels.
//! if let Some(check) = cpu_kernels::checks().into_iter().next() {
//!     let outcome = check.run();
//!     assert!(outcome.passed(), "{}: {outcome:?}", check.name);
//! }
//! ```

pub mod counting;
pub mod cpu_kernels;
pub mod golden;
pub mod gpu_kernels;
pub mod gpu_rates;
pub mod launches;
pub mod outcome;
pub mod speed;
pub mod suite;
pub mod synth;
pub mod whole_model;

use std::path::PathBuf;
use thiserror::Error;
use tier_plan_cuda::CudaError;
use tier_plan_formats::gguf::GgufError;
use tier_plan_formats::model::ModelError;
use tier_plan_runtime::error::{LoadError, RunError};

/// Whether to stop. It is asked between passes, so that an interrupt can end what takes minutes.
pub type Stop<'a> = &'a dyn Fn() -> bool;

/// Why a step of the self-test has no result.
#[derive(Debug, Error)]
pub enum SelftestError {
    /// A model could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A forward pass failed.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The GPU failed, or a kernel.
    #[error(transparent)]
    Gpu(#[from] CudaError),
    /// The model file is not a GGUF file.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// Golden values can't be read, or don't belong together.
    #[error("{}: {what}", path.display())]
    Golden {
        /// Path of the golden values.
        path: PathBuf,
        /// Description of the mistake.
        what: String,
    },
    /// A synthetic model could not be written.
    #[error("writing {}: {source}", path.display())]
    Write {
        /// Path of the model.
        path: PathBuf,
        /// Error of the system; part of the message, so not the source of this error.
        r#source: std::io::Error,
    },
    /// [`Stop`] returned true.
    #[error("stopped")]
    Stopped,
}

impl From<ModelError> for SelftestError {
    fn from(error: ModelError) -> Self {
        SelftestError::Load(error.into())
    }
}

impl SelftestError {
    /// Whether the GPU does not support the model, or has too little memory for it. That is not a
    /// failure of the GPU.
    pub fn is_unsupported(&self) -> bool {
        matches!(
            self,
            SelftestError::Load(
                LoadError::OnGpu { .. } | LoadError::FactorOnGpu { .. } | LoadError::GpuFull { .. }
            )
        )
    }
}
