//! Inference: loads a model as a plan says, and runs tokens through it.
//!
//! `load` puts bytes where the plan wants them and proves it; `engine` runs the layers; `experts` is the store that
//! pins, caches and fetches routed experts; the rest is arithmetic.

pub mod budget;
pub mod counters;
mod devices;
pub mod engine;
mod experts;
mod foresight;
pub mod generate;
mod gpu;
#[cfg(test)]
mod gpu_delta_tests;
#[cfg(test)]
mod gpu_slot_tests;
#[cfg(test)]
mod gpu_split_tests;
#[cfg(test)]
mod gpu_tests;
mod load;
pub mod measure;
mod mixer;
mod moe;
mod moe_gpu;
#[cfg(test)]
mod node_tests;
pub mod pack;
pub mod plan;
#[cfg(test)]
mod prompt_gpu_tests;
mod resident;
pub(crate) mod rope;
pub(crate) mod router;
mod scratch;
pub mod slots;
mod stages;
mod stream;
pub mod targets;
pub mod verify;
mod warm;
mod weights;
pub mod whole;

pub use crate::model::kv::KvType;
pub use devices::GiveDevice;
pub use engine::{Engine, Wanted};
pub use gpu::stays_on;
pub use load::{LoadError, LoadOptions, StreamRates};
#[doc(hidden)]
pub use mixer::{AttentionProbe, AttentionSizes};

use crate::cuda::CudaError;
use crate::tiers::file::ReadError;
use thiserror::Error;

/// Why a forward pass failed.
#[derive(Debug, Error)]
pub enum RunError {
    /// The slow tier could not deliver.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The GPU failed.
    #[error(transparent)]
    Gpu(#[from] CudaError),
    /// No room in the key and value cache.
    #[error(
        "the context is full: {wanted} tokens wanted, {context} planned; give a larger --ctx, or solve with a larger --context"
    )]
    ContextFull {
        /// Tokens after this call.
        wanted: usize,
        /// Tokens the cache holds.
        context: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token {token} is not in the vocabulary: its ids go from 0 to {}", n_vocab.saturating_sub(1))]
    Token {
        /// The id.
        token: u32,
        /// Vocabulary size.
        n_vocab: usize,
    },
    /// A layer's state cannot go back.
    #[error(
        "the context of {n_past} tokens cannot be cut to {wanted}: this model has layers that remember past tokens in one \
         recurrent state; start again from 0"
    )]
    CannotRewind {
        /// Tokens in the context.
        n_past: usize,
        /// Tokens that should be left.
        wanted: usize,
    },
    /// An earlier read failed in the middle of a pass.
    #[error("an earlier read error left the context of this model unusable, as it can't go back; start again from 0")]
    Broken,
}
