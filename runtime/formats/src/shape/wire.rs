//! The text of versions 1 to 4 of a model shape, as it is read.

use super::{Architecture, Attention, Experts, GivenRows, Mixers, Norms, Table};
use crate::kind::toml_words;
use crate::ranges::{self, Allowance, MAX_LAYER};
use crate::source_id::SourceId;
use serde::Deserialize;

/// Reads the shape that a text says, whose sizes are still to be checked. `bytes` are the file's,
/// for its identity.
pub(super) fn decode(text: &str, bytes: &[u8]) -> Result<Architecture, String> {
    let wire: WireShape = toml::from_str(text).map_err(|e| toml_words(text, &e))?;
    check_version(&wire)?;
    wire.into_architecture(bytes)
}

/// Refuses keys that are newer than the version that the text says.
fn check_version(wire: &WireShape) -> Result<(), String> {
    let mut newer: Vec<(&str, u64)> = Vec::new();
    let experts = wire.experts.as_ref();
    for (is_there, key, since) in [
        (!wire.mixers.is_empty(), "mixers", 3),
        (wire.table.is_some(), "table", 3),
        (
            experts.is_some_and(|e| e.layers.is_some()),
            "experts.layers",
            3,
        ),
        (
            experts.is_some_and(|e| e.hidden.is_some()),
            "experts.hidden",
            3,
        ),
        (
            experts.is_some_and(|e| e.gated.is_some()),
            "experts.gated",
            3,
        ),
        (
            experts.is_some_and(|e| e.shared_ffn.is_some()),
            "experts.shared_ffn",
            3,
        ),
        (
            experts.is_some_and(|e| e.by_token.is_some()),
            "experts.by_token",
            4,
        ),
    ] {
        if is_there {
            newer.push((key, since));
        }
    }
    match &wire.attention {
        Some(WireAttention::Gqa {
            value,
            keys_are_values,
            window,
            ..
        }) => {
            for (is_there, key, since) in [
                (window.is_some(), "attention.window", 2),
                (value.is_some(), "attention.value", 3),
                (keys_are_values.is_some(), "attention.keys_are_values", 3),
            ] {
                if is_there {
                    newer.push((key, since));
                }
            }
        }
        Some(WireAttention::Given { .. }) => newer.push(("attention.kind = \"given\"", 3)),
        Some(WireAttention::Mla { .. }) | None => {}
    }
    match newer.iter().find(|(_, since)| wire.version < *since) {
        Some((key, since)) => Err(format!(
            "{key} is a key of version {since}; write `version = {since}`, or leave it out"
        )),
        None => Ok(()),
    }
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
    attention: Option<WireAttention>,
    #[serde(default)]
    mixers: Vec<WireMixers>,
    experts: Option<WireExperts>,
    table: Option<WireTable>,
}

/// The mixer of some layers.
#[derive(Deserialize)]
struct WireMixers {
    /// Ranges.
    layers: String,
    #[serde(flatten)]
    attention: WireAttention,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireTable {
    rows: u64,
    width: u32,
    read: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireRows {
    width: u32,
    per_token: u32,
    #[serde(default = "one")]
    every: u32,
    queries: u32,
    window: Option<u32>,
    chosen: Option<u32>,
}

fn one() -> u32 {
    1
}

#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
enum WireAttention {
    Gqa {
        heads: u32,
        kv_heads: u32,
        head: u32,
        value: Option<u32>,
        keys_are_values: Option<bool>,
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
    Given {
        parameters: u64,
        #[serde(default)]
        rows: Vec<WireRows>,
        #[serde(default)]
        state_bytes: u64,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireExperts {
    layers: Option<String>,
    count: u32,
    used: u32,
    ffn: u32,
    hidden: Option<u32>,
    gated: Option<bool>,
    #[serde(default)]
    shared: u32,
    shared_ffn: Option<u32>,
    #[serde(default)]
    bias: bool,
    #[serde(default)]
    router_bias: bool,
    #[serde(default)]
    selection_bias: bool,
    /// Ranges.
    by_token: Option<String>,
}

impl WireShape {
    fn into_architecture(self, bytes: &[u8]) -> Result<Architecture, String> {
        let mut allowance = Allowance::for_a_file();
        let mut layers_of = |text: &str| ranges::parse(text, "layer", MAX_LAYER, &mut allowance);
        let mut mixers = Vec::with_capacity(self.mixers.len() + 1);
        for mixer in self.mixers {
            mixers.push(Mixers {
                layers: layers_of(&mixer.layers).map_err(|e| format!("mixers.layers: {e}"))?,
                attention: mixer.attention.into_attention(),
            });
        }
        if let Some(attention) = self.attention {
            let listed = |layer: &u32| mixers.iter().any(|m| m.layers.binary_search(layer).is_ok());
            // More layers are refused later.
            let layers = (0..self.layers.min(MAX_LAYER + 1))
                .filter(|layer| !listed(layer))
                .collect();
            mixers.push(Mixers {
                layers,
                attention: attention.into_attention(),
            });
        }
        let experts = match self.experts {
            None => None,
            Some(e) => {
                let layers = match &e.layers {
                    Some(text) => layers_of(text).map_err(|e| format!("experts.layers: {e}"))?,
                    None => (self.leading_dense..self.layers.min(MAX_LAYER + 1)).collect(),
                };
                let by_token = match &e.by_token {
                    Some(text) => layers_of(text).map_err(|e| format!("experts.by_token: {e}"))?,
                    None => Vec::new(),
                };
                Some(Experts {
                    by_token,
                    ..e.into_experts(layers, self.hidden)
                })
            }
        };
        Ok(Architecture {
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
            mixers,
            experts,
            table: self.table.map(|t| Table {
                rows: t.rows,
                width: t.width,
                read: t.read,
            }),
            source: self.source,
        })
    }
}

impl WireExperts {
    fn into_experts(self, layers: Vec<u32>, hidden: u32) -> Experts {
        Experts {
            layers,
            count: self.count,
            used: self.used,
            ffn: self.ffn,
            hidden: self.hidden.unwrap_or(hidden),
            gated: self.gated.unwrap_or(true),
            shared: self.shared,
            shared_ffn: self
                .shared_ffn
                .unwrap_or(self.ffn.saturating_mul(self.shared)),
            bias: self.bias,
            router_bias: self.router_bias,
            selection_bias: self.selection_bias,
            by_token: Vec::new(),
        }
    }
}

impl WireAttention {
    fn into_attention(self) -> Attention {
        match self {
            WireAttention::Gqa {
                heads,
                kv_heads,
                head,
                value,
                keys_are_values,
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
                value: value.unwrap_or(head),
                keys_are_values: keys_are_values.unwrap_or(false),
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
            WireAttention::Given {
                parameters,
                rows,
                state_bytes,
            } => Attention::Given {
                parameters,
                rows: rows
                    .into_iter()
                    .map(|r| GivenRows {
                        width: r.width,
                        per_token: r.per_token,
                        every: r.every,
                        queries: r.queries,
                        window: r.window,
                        chosen: r.chosen,
                    })
                    .collect(),
                state_bytes,
            },
        }
    }
}
