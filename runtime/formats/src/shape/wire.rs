//! The text of versions 1 and 2 of a model shape, as it is read.

use super::{Architecture, Attention, Experts, Norms};
use crate::kind::toml_words;
use crate::source_id::SourceId;
use serde::Deserialize;

/// Reads the shape that a text says, whose sizes are still to be checked. `bytes` are the file's,
/// for its identity.
pub(super) fn decode(text: &str, bytes: &[u8]) -> Result<Architecture, String> {
    let wire: WireShape = toml::from_str(text).map_err(|e| toml_words(text, &e))?;
    if wire.version < 2
        && matches!(
            wire.attention,
            WireAttention::Gqa {
                window: Some(_),
                ..
            }
        )
    {
        return Err(
            "attention.window is a key of version 2; write `version = 2`, or leave it out".into(),
        );
    }
    Ok(wire.into_architecture(bytes))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireShape {
    #[serde(rename = "format")]
    _format: String,
    version: u64,
    name: String,
    #[serde(default)]
    description: String,
    arch: String,
    layers: u32,
    hidden: u32,
    vocab: u32,
    context: u32,
    #[serde(default)]
    tied: bool,
    #[serde(default)]
    leading_dense: u32,
    #[serde(default)]
    dense_ffn: u32,
    source: String,
    attention: WireAttention,
    experts: Option<WireExperts>,
}

#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
enum WireAttention {
    Gqa {
        heads: u32,
        kv_heads: u32,
        head: u32,
        #[serde(default)]
        bias: bool,
        #[serde(default)]
        output_bias: bool,
        #[serde(default)]
        norms: Norms,
        #[serde(default)]
        sinks: bool,
        window: Option<u32>,
        #[serde(default)]
        full_every: u32,
    },
    Mla {
        heads: u32,
        #[serde(default)]
        q_rank: u32,
        kv_rank: u32,
        nope: u32,
        rope: u32,
        value: u32,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireExperts {
    count: u32,
    used: u32,
    ffn: u32,
    #[serde(default)]
    shared: u32,
    #[serde(default)]
    bias: bool,
    #[serde(default)]
    router_bias: bool,
    #[serde(default)]
    selection_bias: bool,
}

impl WireShape {
    fn into_architecture(self, bytes: &[u8]) -> Architecture {
        Architecture {
            id: SourceId::of_bytes(&self.name, bytes),
            name: self.name,
            description: self.description,
            arch: self.arch,
            layers: self.layers,
            hidden: self.hidden,
            vocab: self.vocab,
            context: self.context,
            tied: self.tied,
            leading_dense: self.leading_dense,
            dense_ffn: self.dense_ffn,
            attention: match self.attention {
                WireAttention::Gqa {
                    heads,
                    kv_heads,
                    head,
                    bias,
                    output_bias,
                    norms,
                    sinks,
                    window,
                    full_every,
                } => Attention::Gqa {
                    heads,
                    kv_heads,
                    head,
                    bias,
                    output_bias,
                    norms,
                    sinks,
                    window,
                    full_every,
                },
                WireAttention::Mla {
                    heads,
                    q_rank,
                    kv_rank,
                    nope,
                    rope,
                    value,
                } => Attention::Mla {
                    heads,
                    q_rank,
                    kv_rank,
                    nope,
                    rope,
                    value,
                },
            },
            experts: self.experts.map(|e| Experts {
                count: e.count,
                used: e.used,
                ffn: e.ffn,
                shared: e.shared,
                bias: e.bias,
                router_bias: e.router_bias,
                selection_bias: e.selection_bias,
            }),
            source: self.source,
        }
    }
}
