//! Errors of loading a model, and of forward passes.
//!
//! Messages hold facts only. A program that offers options adds what to do about them.

use crate::tiers::arena::ArenaError;
use crate::tiers::file::ReadError;
use crate::tiers::numa::NumaError;
use thiserror::Error;
use tier_plan_cuda::CudaError;
use tier_plan_formats::model::ModelError;
use tier_plan_formats::placement::Violation;
use tier_plan_kernels::IsaError;

/// An error of loading a model.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The file holds no model that runs.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The system has too little memory for a tier.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// The file could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The environment asks for kernels that cannot run.
    #[error(transparent)]
    Isa(#[from] IsaError),
    /// The system has too little memory for the context.
    #[error(
        "no memory for the KV cache: {bytes} bytes for a context of {context} tokens: {source}"
    )]
    Context {
        /// Tokens of context.
        context: u32,
        /// Bytes of their keys and values, and of recurrent states.
        bytes: u64,
        /// What the system said; part of the message, so no source of its own.
        r#source: std::io::Error,
    },
    /// The folder of kept texts can't be used.
    #[error("{}: kept texts can't be here: {source}", folder.display())]
    Kept {
        /// The folder.
        folder: std::path::PathBuf,
        /// What the system said; part of the message, so no source of its own.
        r#source: std::io::Error,
    },
    /// The GPU that the plan wants is not there, or failed.
    #[error("plan '{plan}' uses a GPU's memory: {source}")]
    Gpu {
        /// Name of the plan.
        plan: String,
        /// What is wrong; part of the message, so no source of its own.
        r#source: CudaError,
    },
    /// A NUMA node of the plan is missing, or full.
    #[error("plan '{plan}' can't have the memory that it was made for: {source}")]
    Node {
        /// Name of the plan.
        plan: String,
        /// What is wrong; part of the message, so no source of its own.
        r#source: NumaError,
    },
    /// A part of the model is placed on a GPU that can't run it.
    #[error(
        "plan '{plan}' puts {group} of layer {layer} on tier '{tier}', a GPU that can't run it: {why}"
    )]
    OnGpu {
        /// Name of the plan.
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
    /// A matrix has a factor in a tensor beside it, for which GPUs have no kernels.
    #[error(
        "plan '{plan}' uses tier '{tier}', a GPU that can't apply the factor beside tensor '{tensor}'"
    )]
    FactorOnGpu {
        /// Name of the plan.
        plan: String,
        /// Name of the tier.
        tier: String,
        /// A matrix that has a factor.
        tensor: String,
    },
    /// A GPU has too little memory for what the plan puts there and what computes with it.
    #[error(
        "plan '{plan}' needs {needed} bytes of tier '{tier}', and {device} has {free} free: {weights} of weights, {cache} of \
         KV cache, {work} of buffers and {reserve} for the driver"
    )]
    GpuFull {
        /// Name of the plan.
        plan: String,
        /// Name of the tier.
        tier: String,
        /// Name of the GPU.
        device: String,
        /// Bytes of the GPU that are free.
        free: u64,
        /// Bytes of all below.
        needed: u64,
        /// Bytes of dense groups, pinned experts and slots.
        weights: u64,
        /// Bytes of keys, values and recurrent states.
        cache: u64,
        /// Bytes of buffers.
        work: u64,
        /// Bytes left for the driver and the kernels.
        reserve: u64,
    },
    /// The plan contradicts the model or itself.
    #[error("plan '{plan}' does not fit model '{model}': {violation}")]
    Plan {
        /// Name of the plan.
        plan: String,
        /// Name of the model.
        model: String,
        /// The first rule that it breaks; part of the message, so no source of its own.
        violation: Box<Violation>,
    },
}

/// An error of a forward pass.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RunError {
    /// The slow tier could not deliver.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The GPU failed.
    #[error(transparent)]
    Gpu(#[from] CudaError),
    /// The context has no room for the tokens.
    #[error("context full: {wanted} tokens requested, {context} available")]
    ContextFull {
        /// Tokens in the context after the call.
        wanted: usize,
        /// Tokens that the context can hold.
        context: usize,
    },
    /// Too few pages of the KV cache are free for the tokens.
    #[error("KV cache full: {wanted} pages wanted, {free} free")]
    NoPages {
        /// Pages that the tokens take.
        wanted: usize,
        /// Pages that no text uses.
        free: usize,
    },
    /// All recurrent states, or pages of windows, are in use.
    #[error("the plan is for {texts} texts at once, and as many are in the engine")]
    TooManyTexts {
        /// Texts that the plan is for.
        texts: usize,
    },
    /// The text was removed.
    #[error("the text is not in the engine: it was removed")]
    NoText,
    /// A step has two entries of one text.
    #[error("a step has two entries of one text; join their tokens")]
    TwiceInStep,
    /// The grammar of a text does not let it go on.
    #[error("the grammar of the text: {0}")]
    Grammar(String),
    /// A token id is outside the vocabulary.
    #[error("token {token} is not in the vocabulary: ids go from 0 to {}", n_vocab.saturating_sub(1))]
    Token {
        /// The id.
        token: u32,
        /// Size of the vocabulary.
        n_vocab: usize,
    },
    /// A recurrent state, or a window that has gone on, cannot go back to fewer tokens.
    #[error(
        "the context of {n_past} tokens cannot be cut to {wanted}: this model has layers that keep one recurrent state, \
         or the last tokens only; start again from 0"
    )]
    CannotRewind {
        /// Tokens in the context.
        n_past: usize,
        /// Tokens that should be left.
        wanted: usize,
    },
    /// The caller requested that the pass stops.
    #[error("canceled")]
    Canceled,
    /// The model computed a value that is no number.
    #[error(
        "the logits of the token at position {position} are not numbers (NaN or infinite): weights of the model file are \
         damaged or beyond its number format, or a kernel is wrong"
    )]
    NotANumber {
        /// Position in the text, from 0.
        position: usize,
    },
    /// An earlier pass failed halfway, and the text can't go back.
    #[error(
        "an earlier error left the context of this model unusable, as it can't go back; start again from 0"
    )]
    Broken,
}
