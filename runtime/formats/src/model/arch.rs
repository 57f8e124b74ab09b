//! The architectures by name.

use super::source::Source;
use super::spec::ModelSpec;
use super::{
    ModelError, NotAModel, deepseek2, deepseek4, glm4moe, gpt_oss, llama, minimax_m2, minimax_m3, nemotron_h, olmoe, qwen2moe, qwen3,
    qwen3next, qwen4exp,
};
use crate::gguf::Gguf;

type Describe = fn(&Source<'_>) -> Result<ModelSpec, ModelError>;

const ARCHITECTURES: [(&str, Describe); 15] = [
    ("deepseek2", deepseek2::describe),
    ("deepseek4", deepseek4::describe),
    ("glm4moe", glm4moe::describe),
    ("gpt-oss", gpt_oss::describe),
    ("llama", llama::describe),
    ("minimax-m2", minimax_m2::describe),
    ("minimax-m3", minimax_m3::describe),
    ("nemotron_h_moe", nemotron_h::describe),
    ("olmoe", olmoe::describe),
    ("qwen2moe", qwen2moe::describe),
    ("qwen3", qwen3::describe),
    ("qwen35moe", qwen3next::describe),
    ("qwen3moe", qwen3::describe),
    ("qwen3next", qwen3next::describe),
    ("qwen4exp", qwen4exp::describe),
];

/// Names of the architectures that can run.
pub const SUPPORTED: [&str; ARCHITECTURES.len()] = {
    let mut names = [""; ARCHITECTURES.len()];
    let mut i = 0;
    while i < names.len() {
        names[i] = ARCHITECTURES[i].0;
        i += 1;
    }
    names
};

/// Describes the network in a file.
pub fn describe(gguf: &Gguf) -> Result<ModelSpec, ModelError> {
    if let Some(other) = NotAModel::of(gguf) {
        return Err(ModelError::NotAModel(other));
    }
    let arch = gguf.str("general.architecture")?;
    match ARCHITECTURES.iter().find(|(name, _)| *name == arch) {
        Some((_, describe)) => describe(&Source::new(gguf, arch)),
        None => Err(ModelError::Architecture {
            found: arch.to_string(),
        }),
    }
}
