//! Models: the network that a GGUF file describes, and the tensors that it reads.
//!
//! One file per architecture turns metadata and tensor names into a [`spec::ModelSpec`]. The engine
//! runs specs and knows no architecture by name.

mod afmoe;
mod arch;
mod bailingmoe2;
mod bailingmoe3;
mod blocks;
mod deepseek2;
mod deepseek32;
mod deepseek4;
mod dots1;
mod dots3note;
mod ernie4_5;
mod exaone_moe;
mod ffn_layers;
mod gemma3;
mod gemma4;
mod glm4moe;
mod glm5_next;
mod gpt_oss;
pub mod gpu;
mod granitemoe;
mod grok;
mod hunyuan_moe;
mod hy_v3;
mod hy_v4;
mod kda;
mod kimi;
mod kimi_k3;
pub mod kv;
mod laguna;
mod lfm2moe;
mod llama;
mod llama4;
mod mimo2;
mod minimax_m2;
mod minimax_m3;
mod mistral3;
mod mla;
mod nemotron_h;
mod not_a_model;
mod olmoe;
mod opened;
mod options;
mod phi3;
mod qwen2;
mod qwen2moe;
mod qwen3;
mod qwen3next;
mod qwen3vl;
mod qwen4exp;
mod scales;
pub mod shape;
mod smollm3;
mod source;
pub mod spec;
mod step35;
mod streams;

pub use arch::{SUPPORTED, describe};
pub use not_a_model::NotAModel;
pub use opened::Model;
pub use scales::Scales;
pub use shape::shape_of_file;

use crate::gguf::GgufError;
use thiserror::Error;

/// Why the network in a file cannot be described.
#[derive(Debug, Error)]
pub enum ModelError {
    /// The container is damaged or lacks a key.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The file is GGUF, but holds something else than a model that writes text.
    #[error("not a model that can be run: it is {}", .0.what())]
    NotAModel(NotAModel),
    /// No code for this network.
    #[error("architecture '{found}' is not supported; supported: {}", SUPPORTED.join(", "))]
    Architecture {
        /// `general.architecture` of the file.
        found: String,
    },
    /// A tensor the architecture needs is not in the file.
    #[error(
        "tensor '{name}' is missing; architecture '{arch}' needs it (is this file complete, or a part of another kind of model?)"
    )]
    MissingTensor {
        /// Name of the tensor.
        name: String,
        /// Name of the architecture.
        arch: String,
    },
    /// A tensor has another shape than the metadata says.
    #[error(
        "tensor '{name}' has shape {found:?}, but the metadata of this file imply {expected:?}"
    )]
    Shape {
        /// Name of the tensor.
        name: String,
        /// Shape in the file, fastest axis first.
        found: Vec<u64>,
        /// Shape that the metadata imply.
        expected: Vec<u64>,
    },
    /// A metadata value that makes no sense, or that this engine has no code for.
    #[error("{key}: {what}")]
    Metadata {
        /// The metadata key.
        key: String,
        /// What is wrong with it.
        what: String,
    },
}
