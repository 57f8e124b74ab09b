//! The architectures by name.

use super::source::Source;
use super::spec::ModelSpec;
use super::{
    ModelError, NotAModel, Scales, deepseek2, glm4moe, gpt_oss, llama, minimax_m2, olmoe, qwen2moe,
    qwen3, qwen3next,
};
use crate::gguf::Gguf;

type Describe = fn(&Source<'_>) -> Result<ModelSpec, ModelError>;

const ARCHITECTURES: [(&str, Describe); 11] = [
    ("deepseek2", deepseek2::describe),
    ("glm4moe", glm4moe::describe),
    ("gpt-oss", gpt_oss::describe),
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
        Some((_, describe)) => {
            let mut spec = describe(&Source::new(gguf, arch))?;
            check_types(gguf, &spec)?;
            spec.scales = Scales::read(gguf, &spec)?;
            Ok(spec)
        }
        None => Err(ModelError::Architecture {
            found: arch.to_string(),
        }),
    }
}

/// Refuses a network with a matrix of a type that no kernel multiplies with.
fn check_types(gguf: &Gguf, spec: &ModelSpec) -> Result<(), ModelError> {
    let experts = spec.moe_layers().flat_map(|(_, moe)| moe.expert_linears());
    let matrices = experts.map(|l| l.weight).chain(spec.matrices());
    let mut tensors = matrices.map(|id| &gguf.tensors()[id]);
    match tensors.find(|tensor| !tensor.ty.has_kernels()) {
        None => Ok(()),
        Some(tensor) => Err(ModelError::Metadata {
            key: tensor.name.clone(),
            what: format!(
                "is {}, a type of tables, but the architecture multiplies with it; convert the model again",
                tensor.ty
            ),
        }),
    }
}
