//! Why a model could not be loaded, and why a forward pass failed.

use crate::tiers::arena::ArenaError;
use crate::tiers::file::ReadError;
use crate::tiers::numa::NumaError;
use thiserror::Error;
use tier_plan_cuda::CudaError;
use tier_plan_formats::model::ModelError;
use tier_plan_kernels::IsaError;

/// Why a model could not be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The file is no model that runs.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Memory.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// The file could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The environment asks for kernels that cannot run.
    #[error(transparent)]
    Isa(#[from] IsaError),
    /// The system has not got the memory for the context.
    #[error(
        "no memory for the {bytes} bytes of keys and values of {context} tokens: {source}; give a smaller --ctx, or solve with a smaller --context"
    )]
    Context {
        /// Tokens of context.
        context: u32,
        /// Bytes that their keys and values take.
        bytes: u64,
        /// What the system said; part of the message, so no source of its own.
        r#source: std::io::Error,
    },
    /// The GPU that the plan wants is not there, or failed.
    #[error("plan '{plan}' uses a GPU's memory: {source}")]
    Gpu {
        /// The plan's name.
        plan: String,
        /// What is wrong; part of the message, so no source of its own.
        r#source: CudaError,
    },
    /// A memory node that the plan wants is not there, or full.
    #[error("plan '{plan}' can't have the memory that it was made for: {source}")]
    Node {
        /// The plan's name.
        plan: String,
        /// What is wrong; part of the message, so no source of its own.
        r#source: NumaError,
    },
    /// A part of the model is placed on a GPU that can't run it.
    #[error("plan '{plan}' puts {group} of layer {layer} on tier '{tier}', a GPU that can't run it: {why}")]
    OnGpu {
        /// The plan's name.
        plan: String,
        /// Name of the tier.
        tier: String,
        /// Tensor group of the part as in plans, `attention`; or `kv_cache`.
        group: &'static str,
        /// Layer of the part, from 0.
        layer: usize,
        /// What the GPU does not support.
        why: String,
    },
    /// A GPU whose memory is too small for what the plan puts there and what computes with it.
    #[error(
        "plan '{plan}' needs {needed} bytes of tier '{tier}', and {device} has {free} free: {weights} of weights, {cache} of \
         KV cache, {work} of buffers and {reserve} for the driver"
    )]
    GpuFull {
        /// The plan's name.
        plan: String,
        /// The tier.
        tier: String,
        /// The GPU.
        device: String,
        /// Bytes of it that are free.
        free: u64,
        /// Bytes of all below.
        needed: u64,
        /// Bytes of dense groups and pinned experts.
        weights: u64,
        /// Bytes of keys and values.
        cache: u64,
        /// Bytes of buffers.
        work: u64,
        /// Bytes left for the driver and the kernels.
        reserve: u64,
    },
    /// The plan and the model don't belong together, or the plan contradicts itself.
    #[error("plan '{plan}' does not fit model '{model}': {what}; make a new one with `tier-plan solve`")]
    Plan {
        /// The plan's name.
        plan: String,
        /// The model's name.
        model: String,
        /// What does not fit.
        what: String,
    },
    /// A tier that this program can't drive.
    #[error("plan '{plan}' puts bytes on tier '{tier}', which is {kind} and not emulated; {mend}")]
    Tier {
        /// The plan's name.
        plan: String,
        /// The tier.
        tier: String,
        /// Its kind.
        kind: &'static str,
        /// What to do.
        mend: &'static str,
    },
}

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
