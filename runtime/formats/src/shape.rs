//! `profiles/models/*.toml`: the shape of a network without its weights, and its sizes in the usual quantisations.
//!
//! A shape says how large every matrix is. A [`Mix`] says which tensor type each of them has; the two together are a
//! [`ModelShape`], all that a planner needs. The mixes follow llama.cpp's rules closely enough for planning: a file that
//! somebody published differs by what was overridden for it.

mod mix;
#[cfg(test)]
mod tests;

pub use mix::Mix;
use mix::{Place, Role};

use super::kind::{SHAPE, toml_words};
use crate::FormatError;
use crate::model::kv::KvRows;
use crate::model::shape::{CacheShape, DenseKind, DenseShape, ExpertShape, ModelShape};
use crate::source_id::SourceId;
use serde::Deserialize;
use std::path::Path;
use xxhash_rust::xxh3::xxh3_128;

/// The largest of any dimension, far above any real model.
const MAX_DIM: u32 = 1 << 20;
/// The most parameters of a model: with them every sum of bytes stays in range.
const MAX_PARAMETERS: u128 = 1 << 46;

/// A network's shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Architecture {
    /// Its name, `kimi-k2`.
    pub name: String,
    /// What it is, in a sentence.
    pub description: String,
    /// Architecture name as in GGUF files, `deepseek2`.
    pub arch: String,
    /// Layers, without trailing multi-token-prediction blocks.
    pub layers: u32,
    /// Width of the hidden state.
    pub hidden: u32,
    /// Vocabulary: rows of the embedding.
    pub vocab: u32,
    /// Longest context the model was trained for, in tokens.
    pub context: u32,
    /// The head is the embedding.
    pub tied: bool,
    /// The first layers, which have one feed-forward block of [`Architecture::dense_ffn`] and no routed experts.
    pub leading_dense: u32,
    /// Width inside those blocks; 0 where there are none.
    pub dense_ffn: u32,
    /// Attention, the same in every layer.
    pub attention: Attention,
    /// Routed experts of the other layers.
    pub experts: Option<Experts>,
    /// Where the figures come from, in words.
    pub source: String,
    /// Hash of the file it was read from; the name repeated.
    pub id: SourceId,
}

/// How a layer attends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// Grouped key and value heads.
    Gqa {
        /// Query heads.
        heads: u32,
        /// Key and value heads.
        kv_heads: u32,
        /// Width of a head.
        head: u32,
        /// Queries, keys and values have biases.
        bias: bool,
        /// The output has a bias.
        output_bias: bool,
        /// Norms of queries and keys.
        norms: Norms,
        /// Each head has a score that takes part in the softmax and has no value.
        sinks: bool,
        /// Positions that a token looks back at, its own included; all of them when `None`.
        window: Option<u32>,
        /// With a window: every so-manieth layer looks at all positions all the same; none does when 0.
        full_every: u32,
    },
    /// Keys and values kept compressed.
    Mla {
        /// Heads.
        heads: u32,
        /// Width of the compressed queries; 0 where they are not compressed.
        q_rank: u32,
        /// Width of the compressed keys and values.
        kv_rank: u32,
        /// Values of a query or key head that do not rotate.
        nope: u32,
        /// Those that do.
        rope: u32,
        /// Width of a value head.
        value: u32,
    },
}

/// What norms of queries and keys span.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Norms {
    /// There are none.
    #[default]
    None,
    /// Each head by itself.
    Head,
    /// All heads together.
    Full,
}

/// Routed experts of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Experts {
    /// Experts.
    pub count: u32,
    /// Experts a token uses.
    pub used: u32,
    /// Width inside one.
    pub ffn: u32,
    /// Experts of the same width that every token uses besides.
    pub shared: u32,
    /// The experts' matrices have biases.
    pub bias: bool,
    /// The router has a bias.
    pub router_bias: bool,
    /// A value of each expert is added to its score for the choice only.
    pub selection_bias: bool,
}

/// Parameters of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameters {
    /// All.
    pub total: u64,
    /// Those of a token: all but the routed experts that it does not use. The whole embedding counts.
    pub active: u64,
}

/// A tensor: `copies` matrices of `n_out` rows of `n_in` values.
#[derive(Debug, Clone, Copy)]
struct Weight {
    role: Role,
    n_in: u64,
    n_out: u64,
    copies: u64,
}

impl Weight {
    fn matrix(role: Role, n_in: u32, n_out: u32) -> Self {
        Weight { role, n_in: n_in.into(), n_out: n_out.into(), copies: 1 }
    }

    fn vector(len: u32) -> Self {
        Weight::matrix(Role::Parameters, len, 1)
    }

    fn parameters(&self) -> u64 {
        self.n_in * self.n_out * self.copies
    }

    fn bytes(&self, mix: Mix, place: &Place) -> u64 {
        let ty = mix.tensor_type(self.role, place, self.n_in);
        // The type fits the row: that is what the mix sees to.
        ty.row_bytes(self.n_in).unwrap_or(self.n_in * size_of::<f32>() as u64) * self.n_out * self.copies
    }
}

/// Tensors that are placed together: one dense group, or the routed experts of a layer.
struct Group {
    /// `None` for routed experts.
    kind: Option<DenseKind>,
    layer: Option<u32>,
    weights: Vec<Weight>,
}

impl Architecture {
    /// Layers with routed experts.
    pub fn moe_layers(&self) -> u32 {
        if self.experts.is_some() { self.layers - self.leading_dense } else { 0 }
    }

    /// Parameters of the whole model, and of a token.
    pub fn parameters(&self) -> Parameters {
        let mut sum = Parameters { total: 0, active: 0 };
        for group in self.groups() {
            let total: u64 = group.weights.iter().map(Weight::parameters).sum();
            sum.total += total;
            sum.active += match (group.kind, &self.experts) {
                (None, Some(experts)) => total / u64::from(experts.count) * u64::from(experts.used),
                _ => total,
            };
        }
        sum
    }

    /// The sizes in a quantisation.
    pub fn model_shape(&self, mix: Mix) -> ModelShape {
        let (mut dense, mut experts) = (Vec::new(), Vec::new());
        for group in self.groups() {
            let place = Place { layer: group.layer.unwrap_or(0), ..self.place() };
            let bytes: u64 = group.weights.iter().map(|w| w.bytes(mix, &place)).sum();
            match (group.kind, self.experts) {
                (Some(kind), _) => {
                    let rows = if kind == DenseKind::Embedding { u64::from(self.vocab) } else { 1 };
                    let values: u64 = group.weights.iter().map(Weight::parameters).sum();
                    let macs = if kind == DenseKind::Embedding { 0 } else { values };
                    dense.push(DenseShape { kind, layer: group.layer, bytes, token_bytes: bytes / rows, macs });
                }
                (None, Some(of)) => experts.push(ExpertShape {
                    layer: group.layer.unwrap_or(0),
                    n_expert: of.count,
                    n_used: of.used,
                    expert_bytes: bytes / u64::from(of.count),
                    expert_macs: 3 * u64::from(self.hidden) * u64::from(of.ffn),
                }),
                (None, None) => {}
            }
        }
        let hash = xxh3_128(format!("{} {}", self.id.hash, mix.name()).as_bytes());
        ModelShape {
            id: SourceId {
                name: format!("{} at {}, a shape without weights", self.name, mix.name()),
                hash: format!("{hash:032x}"),
            },
            arch: self.arch.clone(),
            n_layer: self.layers,
            hidden: self.hidden,
            n_vocab: self.vocab,
            context: self.context,
            caches: (0..self.layers).map(|layer| self.cache(layer)).collect(),
            dense,
            experts,
        }
    }

    /// A layer's key and value for each head, or its one latent with its rotated key part.
    fn cache(&self, layer: u32) -> CacheShape {
        let rows = match self.attention {
            Attention::Gqa { heads, kv_heads, head, window, full_every, .. } => {
                let full = full_every > 0 && (layer + 1).is_multiple_of(full_every);
                let (per_token, queries) = (2 * u64::from(kv_heads), u64::from(heads / kv_heads));
                KvRows { width: head.into(), per_token, queries, window: window.filter(|_| !full).map(u64::from) }
            }
            Attention::Mla { heads, kv_rank, rope, .. } => {
                let width = u64::from(kv_rank) + u64::from(rope);
                KvRows { width, per_token: 1, queries: 2 * u64::from(heads), window: None }
            }
        };
        CacheShape { rows: vec![rows], state_bytes: 0 }
    }

    /// What the mixes look at, for no layer in particular.
    fn place(&self) -> Place {
        let gqa = match self.attention {
            Attention::Gqa { heads, kv_heads, .. } => heads / kv_heads,
            // In memory all heads share one compressed key.
            Attention::Mla { heads, .. } => heads,
        };
        Place {
            layer: 0,
            n_layer: self.layers,
            n_expert: self.experts.map_or(0, |e| e.count),
            heads_per_kv: gqa,
            tied: self.tied,
        }
    }

    /// Every group once, in the order of [`crate::model::spec::ModelSpec::dense_groups`].
    fn groups(&self) -> Vec<Group> {
        let hidden = self.hidden;
        let mut groups = Vec::new();
        let mut add = |kind, layer, weights| groups.push(Group { kind, layer, weights });
        if !self.tied {
            let weights = vec![Weight::matrix(Role::Embedding, hidden, self.vocab)];
            add(Some(DenseKind::Embedding), None, weights);
        }
        for layer in 0..self.layers {
            add(Some(DenseKind::Attention), Some(layer), self.attention_weights());
            match &self.experts {
                Some(experts) if layer >= self.leading_dense => {
                    let mut router = vec![Weight::vector(hidden)];
                    // Routers are never quantised.
                    router.push(Weight::matrix(Role::Parameters, hidden, experts.count));
                    let biases = [experts.router_bias, experts.selection_bias];
                    router.extend(biases.iter().filter(|b| **b).map(|_| Weight::vector(experts.count)));
                    add(Some(DenseKind::Router), Some(layer), router);
                    if experts.shared > 0 {
                        let weights = gated(hidden, experts.ffn * experts.shared, 1, false);
                        add(Some(DenseKind::SharedExpert), Some(layer), weights);
                    }
                    let weights = gated(hidden, experts.ffn, experts.count, experts.bias);
                    add(None, Some(layer), weights);
                }
                _ => {
                    let mut weights = gated(hidden, self.dense_ffn, 1, false);
                    weights.push(Weight::vector(hidden));
                    add(Some(DenseKind::DenseFfn), Some(layer), weights);
                }
            }
        }
        let head = vec![Weight::vector(hidden), Weight::matrix(Role::Output, hidden, self.vocab)];
        add(Some(DenseKind::Head), None, head);
        groups
    }

    /// A layer's attention with the norm before it.
    fn attention_weights(&self) -> Vec<Weight> {
        let hidden = self.hidden;
        let mut weights = vec![Weight::vector(hidden)];
        match self.attention {
            Attention::Gqa { heads, kv_heads, head, bias, output_bias, norms, sinks, .. } => {
                let (q, kv) = (heads * head, kv_heads * head);
                weights.push(Weight::matrix(Role::Query, hidden, q));
                weights.push(Weight::matrix(Role::Key, hidden, kv));
                weights.push(Weight::matrix(Role::Value, hidden, kv));
                weights.push(Weight::matrix(Role::AttentionOutput, q, hidden));
                if bias {
                    weights.extend([q, kv, kv].map(Weight::vector));
                }
                if output_bias {
                    weights.push(Weight::vector(hidden));
                }
                match norms {
                    Norms::None => {}
                    Norms::Head => weights.extend([head, head].map(Weight::vector)),
                    Norms::Full => weights.extend([q, kv].map(Weight::vector)),
                }
                if sinks {
                    weights.push(Weight::vector(heads));
                }
            }
            Attention::Mla { heads, q_rank, kv_rank, nope, rope, value } => {
                let q = heads * (nope + rope);
                if q_rank > 0 {
                    weights.push(Weight::matrix(Role::Other, hidden, q_rank));
                    weights.push(Weight::vector(q_rank));
                    weights.push(Weight::matrix(Role::Other, q_rank, q));
                } else {
                    weights.push(Weight::matrix(Role::Query, hidden, q));
                }
                weights.push(Weight::matrix(Role::Other, hidden, kv_rank + rope));
                weights.push(Weight::vector(kv_rank));
                // Keys' and values' projections are stacked by head.
                let stacked =
                    |n_in: u32, n_out: u32| Weight { copies: heads.into(), ..Weight::matrix(Role::Other, n_in, n_out) };
                weights.push(stacked(nope, kv_rank));
                weights.push(stacked(kv_rank, value));
                weights.push(Weight::matrix(Role::AttentionOutput, heads * value, hidden));
            }
        }
        weights
    }

    fn check(&self) -> Result<(), String> {
        let dim = |what: &str, value: u32| match value {
            1..=MAX_DIM => Ok(()),
            _ => Err(format!("{what} is {value}, but must be 1 to {MAX_DIM}")),
        };
        let product = |what: &str, factors: &[u32]| {
            let wide: u128 = factors.iter().map(|f| u128::from(*f)).product();
            let fits = (1..=u128::from(MAX_DIM)).contains(&wide);
            if fits { Ok(()) } else { Err(format!("{what} come to {wide}, but may be at most {MAX_DIM} wide")) }
        };
        if self.name.is_empty() || self.name.len() > 128 || self.name.chars().any(char::is_control) {
            return Err("name must be 1 to 128 characters on one line".into());
        }
        if !(1..=4096).contains(&self.layers) {
            return Err(format!("layers is {}, but must be 1 to 4096", self.layers));
        }
        for (what, value) in [("hidden", self.hidden), ("vocab", self.vocab)] {
            dim(what, value)?;
        }
        if self.context == 0 {
            return Err("context is 0; write the tokens that the model was trained for".into());
        }
        if self.leading_dense > self.layers {
            return Err(format!("leading_dense is {}, but there are {} layers", self.leading_dense, self.layers));
        }
        let all_dense = self.experts.is_none();
        if all_dense || self.leading_dense > 0 {
            dim("dense_ffn", self.dense_ffn)?;
        } else if self.dense_ffn > 0 {
            return Err("dense_ffn is given, but leading_dense is 0: no layer would have it; remove one".into());
        }
        match self.attention {
            Attention::Gqa { heads, kv_heads, head, window, full_every, .. } => {
                if window == Some(0) {
                    return Err("attention.window is 0; leave it out if every layer looks at all positions".into());
                }
                if window.is_none() && full_every > 0 {
                    return Err("attention.full_every is given, but no window; write `window = …` too".into());
                }
                dim("attention.kv_heads", kv_heads)?;
                product("attention.heads × head", &[heads, head])?;
                product("attention.kv_heads × head", &[kv_heads, head])?;
                if !heads.is_multiple_of(kv_heads) {
                    return Err(format!("attention.kv_heads is {kv_heads}, which does not divide heads = {heads}"));
                }
            }
            Attention::Mla { heads, q_rank, kv_rank, nope, rope, value } => {
                if q_rank > MAX_DIM {
                    dim("attention.q_rank", q_rank)?;
                }
                for (what, value) in [("kv_rank", kv_rank), ("nope", nope), ("rope", rope), ("value", value)] {
                    dim(&format!("attention.{what}"), value)?;
                }
                product("attention.heads × (nope + rope)", &[heads, nope + rope])?;
                product("attention.heads × value", &[heads, value])?;
            }
        }
        if let Some(experts) = &self.experts {
            if experts.count == 0 || experts.count > 65_535 {
                return Err(format!("experts.count is {}, but must be 1 to 65535", experts.count));
            }
            if experts.used == 0 || experts.used > experts.count {
                return Err(format!("experts.used is {}, but must be 1 to {}", experts.used, experts.count));
            }
            dim("experts.ffn", experts.ffn)?;
            if experts.shared > 0 {
                product("experts.shared × ffn", &[experts.shared, experts.ffn])?;
            }
            if self.leading_dense == self.layers {
                return Err("leading_dense leaves no layer to the experts; remove the [experts] table".into());
            }
        }
        // The bounds above keep one layer's sums in range; all layers' are checked here.
        let wide = |w: &Weight| u128::from(w.n_in) * u128::from(w.n_out) * u128::from(w.copies);
        let all: u128 = self.groups().iter().flat_map(|g| &g.weights).map(wide).sum();
        if all > MAX_PARAMETERS {
            return Err(format!("the model would have {:.1e} parameters; at most 7e13 are planned for", all as f64));
        }
        Ok(())
    }
}

/// Gate, up and down of a block, or of as many stacked ones.
fn gated(hidden: u32, ffn: u32, copies: u32, bias: bool) -> Vec<Weight> {
    let one = |role, n_in: u32, n_out: u32| Weight { copies: copies.into(), ..Weight::matrix(role, n_in, n_out) };
    let (gate, up, down) = if copies > 1 {
        (Role::ExpertGate, Role::ExpertUp, Role::ExpertDown)
    } else {
        (Role::FfnGate, Role::FfnUp, Role::FfnDown)
    };
    let mut weights = vec![one(gate, hidden, ffn), one(up, hidden, ffn), one(down, ffn, hidden)];
    if bias {
        weights.extend([ffn, ffn, hidden].map(|len| one(Role::Parameters, len, 1)));
    }
    weights
}

/// Reads a shape from the bytes of its file. `path` is only named in errors.
pub fn decode(bytes: &[u8], path: &Path) -> Result<Architecture, FormatError> {
    let text = SHAPE.open_toml(bytes, path)?;
    let wire: WireShape = toml::from_str(text).map_err(|e| FormatError::invalid(path, toml_words(text, &e)))?;
    if wire.version < 2 && matches!(wire.attention, WireAttention::Gqa { window: Some(_), .. }) {
        let what = "attention.window is a key of version 2; write `version = 2`, or leave it out";
        return Err(FormatError::invalid(path, what));
    }
    let shape = wire.into_architecture(bytes);
    shape.check().map_err(|what| FormatError::invalid(path, what))?;
    Ok(shape)
}

/// Reads a shape.
pub fn read(path: &Path) -> Result<Architecture, FormatError> {
    decode(&SHAPE.read(path)?, path)
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
                WireAttention::Gqa { heads, kv_heads, head, bias, output_bias, norms, sinks, window, full_every } => {
                    Attention::Gqa { heads, kv_heads, head, bias, output_bias, norms, sinks, window, full_every }
                }
                WireAttention::Mla { heads, q_rank, kv_rank, nope, rope, value } => {
                    Attention::Mla { heads, q_rank, kv_rank, nope, rope, value }
                }
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
