//! The architectures by name.

use super::source::Source;
use super::spec::ModelSpec;
use super::{ModelError, deepseek2, llama, qwen3};
use crate::gguf::Gguf;

type Describe = fn(&Source<'_>) -> Result<ModelSpec, ModelError>;

const ARCHITECTURES: [(&str, Describe); 4] = [
    ("deepseek2", deepseek2::describe),
    ("llama", llama::describe),
    ("qwen3", qwen3::describe),
    ("qwen3moe", qwen3::describe),
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
    let arch = gguf.str("general.architecture")?;
    match ARCHITECTURES.iter().find(|(name, _)| *name == arch) {
        Some((_, describe)) => describe(&Source::new(gguf, arch)),
        None => Err(ModelError::Architecture { found: arch.to_string() }),
    }
}
