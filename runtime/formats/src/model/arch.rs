//! The architectures by name.

use super::source::Source;
use super::spec::ModelSpec;
use super::{
    ModelError, NotAModel, Scales, afmoe, bailingmoe2, bailingmoe3, deepseek2, deepseek4,
    deepseek32, dots1, dots3note, ernie4_5, exaone_moe, gemma3, gemma4, glm4moe, glm5_next,
    gpt_oss, granitemoe, grok, hunyuan_moe, hy_v3, hy_v4, kimi, kimi_k3, laguna, lfm2moe, llama,
    llama4, mimo2, minimax_m2, minimax_m3, mistral3, nemotron_h, olmoe, phi3, qwen2, qwen2moe,
    qwen3, qwen3next, qwen3vl, qwen4exp, smollm3, step35,
};
use crate::gguf::Gguf;

type Describe = fn(&Source<'_>) -> Result<ModelSpec, ModelError>;

const ARCHITECTURES: &[(&str, Describe)] = &[
    ("afmoe", afmoe::describe),
    ("bailingmoe2", bailingmoe2::describe),
    ("bailingmoe3", bailingmoe3::describe),
    ("deepseek", dots1::describe),
    ("deepseek2", deepseek2::describe),
    ("deepseek32", deepseek32::describe),
    ("deepseek4", deepseek4::describe),
    ("dots1", dots1::describe),
    ("dots3note", dots3note::describe),
    ("ernie4_5-moe", ernie4_5::describe),
    ("exaone-moe", exaone_moe::describe),
    ("gemma3", gemma3::describe),
    ("gemma4", gemma4::describe),
    ("glm-dsa", deepseek32::describe),
    ("glm4moe", glm4moe::describe),
    ("glm5-next", glm5_next::describe),
    ("gpt-oss", gpt_oss::describe),
    ("granitemoe", granitemoe::describe),
    ("grok", grok::describe),
    ("hunyuan-moe", hunyuan_moe::describe),
    ("hy_v3", hy_v3::describe),
    ("hy_v4", hy_v4::describe),
    ("kimi-k3", kimi_k3::describe),
    ("kimi-linear", kimi::describe),
    ("laguna", laguna::describe),
    ("lfm2moe", lfm2moe::describe),
    ("llama", llama::describe),
    ("llama4", llama4::describe),
    ("mimo2", mimo2::describe),
    ("minimax-m2", minimax_m2::describe),
    ("minimax-m3", minimax_m3::describe),
    ("mistral3", mistral3::describe),
    ("mistral4", deepseek2::describe),
    ("nemotron_h_moe", nemotron_h::describe),
    ("olmoe", olmoe::describe),
    ("phi3", phi3::describe),
    ("qwen2", qwen2::describe),
    ("qwen2moe", qwen2moe::describe),
    ("qwen3", qwen3::describe),
    ("qwen35", qwen3next::describe),
    ("qwen35moe", qwen3next::describe),
    ("qwen3moe", qwen3::describe),
    ("qwen3next", qwen3next::describe),
    ("qwen3vlmoe", qwen3vl::describe),
    ("qwen4exp", qwen4exp::describe),
    ("smollm3", smollm3::describe),
    ("step35", step35::describe),
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
            check_shared(gguf, &spec)?;
            spec.scales = Scales::read(gguf, &spec)?;
            Ok(spec)
        }
        None => Err(ModelError::Architecture {
            found: arch.to_string(),
        }),
    }
}

/// Refuses a file with shared experts that its metadata do not speak of: without them, the network
/// would be another one.
fn check_shared(gguf: &Gguf, spec: &ModelSpec) -> Result<(), ModelError> {
    let without = spec.moe_layers().filter(|(_, moe)| moe.shared.is_none());
    let tensor = |(layer, _)| gguf.tensor(&format!("blk.{layer}.ffn_down_shexp.weight"));
    match without.filter_map(tensor).next() {
        None => Ok(()),
        Some(tensor) => Err(ModelError::Metadata {
            key: tensor.name.clone(),
            what: format!(
                "is a shared expert, but the metadata of architecture '{}' name none; convert the model again",
                spec.arch
            ),
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
