//! The architectures by name.

use super::source::Source;
use super::spec::ModelSpec;
use super::{
    ModelError, NotAModel, bailingmoe3, deepseek2, deepseek32, dots3note, glm4moe, gpt_oss, kimi,
    llama, minimax_m2, olmoe, qwen2moe, qwen3, qwen3next,
};
use crate::gguf::Gguf;

type Describe = fn(&Source<'_>) -> Result<ModelSpec, ModelError>;

const ARCHITECTURES: [(&str, Describe); 16] = [
    ("bailingmoe3", bailingmoe3::describe),
    ("deepseek2", deepseek2::describe),
    ("deepseek32", deepseek32::describe),
    ("dots3note", dots3note::describe),
    ("glm-dsa", deepseek32::describe),
    ("glm4moe", glm4moe::describe),
    ("gpt-oss", gpt_oss::describe),
    ("kimi-linear", kimi::describe),
    ("llama", llama::describe),
    ("minimax-m2", minimax_m2::describe),
    ("olmoe", olmoe::describe),
    ("qwen2moe", qwen2moe::describe),
    ("qwen3", qwen3::describe),
    ("qwen35moe", qwen3next::describe),
    ("qwen3moe", qwen3::describe),
    ("qwen3next", qwen3next::describe),
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
