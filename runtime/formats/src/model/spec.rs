//! A network as data: its layers, the tensors each reads, and the options that change the arithmetic.
//!
//! Dimensions are checked against the tensors when a spec is made, so that the engine can rely on them.

mod delta;

pub use delta::{DeltaInput, DeltaRates, DeltaSpec, KeySharing};

use super::shape::DenseKind;
use std::collections::HashSet;

/// Index of a tensor in the file's tensor list.
pub type TensorId = usize;

/// A whole network.
#[derive(Debug, Clone)]
pub struct ModelSpec {
    /// Architecture name in the file.
    pub arch: String,
    /// Width of the hidden state.
    pub hidden: usize,
    /// Vocabulary size: rows of the embedding.
    pub n_vocab: usize,
    /// Context length the model was trained for.
    pub context: usize,
    /// Epsilon of every RMS norm.
    pub norm_eps: f32,
    /// `[n_vocab, hidden]`.
    pub embedding: TensorId,
    /// `[hidden]`.
    pub output_norm: TensorId,
    /// `[n_vocab, hidden]`; the embedding itself when tied.
    pub output: TensorId,
    /// First to last.
    pub layers: Vec<LayerSpec>,
}

/// One layer: `x += mixer(norm(x)); x += ffn(norm(x))`.
#[derive(Debug, Clone)]
pub struct LayerSpec {
    /// Norm before the mixer, `[hidden]`.
    pub mixer_norm: TensorId,
    /// What mixes tokens.
    pub mixer: Mixer,
    /// Norm before the feed-forward block, `[hidden]`.
    pub ffn_norm: TensorId,
    /// Feed-forward block.
    pub ffn: Ffn,
}

/// A layer's way of mixing tokens.
#[derive(Debug, Clone)]
pub enum Mixer {
    /// Attention with grouped key and value heads.
    Gqa(GqaSpec),
    /// Attention whose keys and values are kept compressed.
    Mla(MlaSpec),
    /// A recurrence with a state of fixed size: the gated delta net.
    Delta(DeltaSpec),
}

/// A matrix and its optional bias.
#[derive(Debug, Clone, Copy)]
pub struct Linear {
    /// `[out, in]`, or a taller tensor that has these rows from `first_row` on.
    pub weight: TensorId,
    /// `[out]`, or a longer vector that has these values from `first_row` on.
    pub bias: Option<TensorId>,
    /// Rows.
    pub n_out: usize,
    /// Columns.
    pub n_in: usize,
    /// Where the rows begin in a tensor that several matrices share; otherwise 0.
    pub first_row: usize,
}

/// What a query or key norm spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormSpan {
    /// Each head by itself; the weight has `head_dim` values.
    Head,
    /// All heads together.
    Full,
}

/// Norms of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QkNorm {
    /// Weights for queries, `[key_dim]` or `[n_head * key_dim]`.
    pub q: TensorId,
    /// Weights for keys, `[key_dim]` or `[n_head_kv * key_dim]`.
    pub k: TensorId,
    /// What each norm spans.
    pub span: NormSpan,
}

/// Grouped-query attention.
#[derive(Debug, Clone)]
pub struct GqaSpec {
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads; divides `n_head`.
    pub n_head_kv: usize,
    /// Width of a query or key head.
    pub key_dim: usize,
    /// Width of a value head.
    pub value_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Rotary position embedding of queries and keys.
    pub rope: RopeSpec,
    /// Norms of queries and keys before rotation.
    pub qk_norm: Option<QkNorm>,
    /// Each query head is followed by a gate of the same width in the rows of `q`: the head's result is multiplied by
    /// the sigmoid of it. `value_dim` is then `key_dim`.
    pub gated: bool,
    /// `[n_head * key_dim, hidden]`, twice as many rows when gated.
    pub q: Linear,
    /// `[n_head_kv * key_dim, hidden]`.
    pub k: Linear,
    /// `[n_head_kv * value_dim, hidden]`.
    pub v: Linear,
    /// `[hidden, n_head * value_dim]`.
    pub o: Linear,
    /// A score of each head that takes part in the softmax and has no value, `[n_head]`.
    pub sinks: Option<TensorId>,
    /// Positions that a query sees, its own included; all before it when `None`.
    pub window: Option<usize>,
}

/// Multi-head latent attention (arXiv 2405.04434): a token's keys and values of all heads are two projections of one
/// short vector, its latent, and only that and one rotated key part, shared by all heads, are remembered.
#[derive(Debug, Clone)]
pub struct MlaSpec {
    /// Query heads.
    pub n_head: usize,
    /// Values of a query or key head that do not rotate, the first ones; `rope.dims` rotated ones follow.
    pub nope_dim: usize,
    /// Width of a value head.
    pub value_dim: usize,
    /// Width of the latent.
    pub kv_rank: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Growth of the scores with the position.
    pub temperature: Option<Temperature>,
    /// Rotary position embedding of the last part of every query head and of the shared key part.
    pub rope: RopeSpec,
    /// The first half of a low-rank query projection, where queries are compressed.
    pub q_down: Option<LowRank>,
    /// `[n_head * (nope_dim + rope.dims), q_rank or hidden]`.
    pub q: Linear,
    /// To the latent and the shared key part, `[kv_rank + rope.dims, hidden]`.
    pub kv_down: Linear,
    /// Norm of the latent, `[kv_rank]`.
    pub kv_norm: TensorId,
    /// From the latent to each head's keys and values.
    pub kv_up: KvUp,
    /// `[hidden, n_head * value_dim]`.
    pub o: Linear,
}

/// The projection of hidden states to compressed queries.
#[derive(Debug, Clone, Copy)]
pub struct LowRank {
    /// `[q_rank, hidden]`.
    pub down: Linear,
    /// Norm of the compressed queries, `[q_rank]`.
    pub norm: TensorId,
}

/// How a file holds the projections from the latent to keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvUp {
    /// Apart, the keys' turned so that it takes queries to the latent.
    Split {
        /// `[n_head, kv_rank, nope_dim]`.
        k: TensorId,
        /// `[n_head, value_dim, kv_rank]`.
        v: TensorId,
    },
    /// Together, as older files have it: `[n_head, nope_dim + value_dim, kv_rank]`, keys before values in each head.
    Fused(TensorId),
}

/// Scores at position `p` are multiplied by `1 + scale · ln(1 + floor(p / length))`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Temperature {
    /// How much.
    pub scale: f32,
    /// Positions to a step.
    pub length: usize,
}

impl Temperature {
    /// The factor at a position.
    pub fn at(&self, position: usize) -> f32 {
        1.0 + self.scale * ((position / self.length + 1) as f32).ln()
    }
}

/// Which values rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeKind {
    /// Neighbours: (0, 1), (2, 3), …
    Adjacent,
    /// Halves: (0, n/2), (1, n/2 + 1), …
    Halves,
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Pairing.
    pub kind: RopeKind,
    /// Values of a head that rotate, the first ones; even.
    pub dims: usize,
    /// Base of the geometric row of frequencies.
    pub base: f32,
    /// How positions beyond the trained context are squeezed in.
    pub scaling: RopeScaling,
    /// Factor on the rotated values.
    pub magnitude: f32,
    /// Divisors of the frequencies, `[dims / 2]`.
    pub freq_factors: Option<TensorId>,
    /// Pairs of each axis where positions have time, height, width and one axis more. Text is at the same place on
    /// the first three and at 0 on the fourth, so that pairs of the fourth don't rotate.
    pub sections: Option<[u32; 4]>,
}

/// Extension of the context by rotary scaling.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// All positions divided by this factor.
    Linear(f32),
    /// YaRN (arXiv 2309.00071): high frequencies kept, low ones divided, a ramp between.
    Yarn {
        /// Extension factor.
        factor: f32,
        /// Context before extension.
        original_context: f32,
        /// Rotations above which a frequency is kept.
        beta_fast: f32,
        /// Rotations below which a frequency is divided by the whole factor.
        beta_slow: f32,
    },
}

/// A feed-forward block.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant, reason = "there is one a layer")]
pub enum Ffn {
    /// `down(silu(gate x) · up x)`.
    Dense(GatedFfn),
    /// Routed experts, and possibly shared ones.
    Moe(MoeSpec),
}

/// A gated feed-forward block.
#[derive(Debug, Clone, Copy)]
pub struct GatedFfn {
    /// `[ffn, hidden]`.
    pub gate: Linear,
    /// `[ffn, hidden]`.
    pub up: Linear,
    /// `[hidden, ffn]`.
    pub down: Linear,
}

/// How router logits become probabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gating {
    /// Softmax over all experts, then choose.
    Softmax,
    /// Sigmoid of each, then choose.
    Sigmoid,
    /// Choose by logit, then softmax over the chosen.
    SoftmaxChosen,
    /// Square root of the softplus of each, then choose.
    SqrtSoftplus,
}

/// What stands between an expert's first two products and its last.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `silu(gate) · up`.
    Silu,
    /// `g · sigmoid(alpha · g) · (u + 1)` with `g = min(gate, limit)` and `u` = up within ±`limit`.
    ClampedSwiglu {
        /// Steepness of the sigmoid.
        alpha: f32,
        /// Bound on both inputs.
        limit: f32,
    },
}

/// One matrix of every routed expert, stacked: expert `e` has the `e`-th slice of the tensor.
#[derive(Debug, Clone, Copy)]
pub struct ExpertLinear {
    /// `[n_expert, n_out, n_in]`.
    pub weight: TensorId,
    /// `[n_expert, n_out]`; belongs to the expert as its weights do, and lives where they live.
    pub bias: Option<TensorId>,
    /// Rows of one expert's matrix.
    pub n_out: usize,
    /// Columns of one expert's matrix.
    pub n_in: usize,
}

/// The first two matrices of every routed expert.
#[derive(Debug, Clone, Copy)]
pub enum GateUp {
    /// Two tensors.
    Split {
        /// `[n_expert, expert_ffn, hidden]`.
        gate: ExpertLinear,
        /// `[n_expert, expert_ffn, hidden]`.
        up: ExpertLinear,
    },
    /// One tensor `[n_expert, 2 * expert_ffn, hidden]`, the gate's rows first.
    Fused(ExpertLinear),
}

/// An expert that every token uses.
#[derive(Debug, Clone, Copy)]
pub struct SharedSpec {
    /// Its block.
    pub ffn: GatedFfn,
    /// The sigmoid of this vector's product with the input is a factor on the result, `[hidden]`.
    pub gate: Option<TensorId>,
}

/// Equal groups of a layer's experts, of which a token's router keeps the best.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// Number of groups; divides the number of experts.
    pub n: usize,
    /// Groups that a token may choose experts from.
    pub kept: usize,
}

/// Routed experts of a layer.
#[derive(Debug, Clone)]
pub struct MoeSpec {
    /// `[n_expert, hidden]`.
    pub router: Linear,
    /// Added to the probabilities for the choice only, `[n_expert]`.
    pub selection_bias: Option<TensorId>,
    /// Logits to probabilities.
    pub gating: Gating,
    /// Experts.
    pub n_expert: usize,
    /// Experts a token uses.
    pub n_used: usize,
    /// Groups that the choice is narrowed to first, where the router works in groups.
    pub groups: Option<Groups>,
    /// Divide the chosen weights by their sum.
    pub normalize: bool,
    /// Factor on the weights.
    pub scale: f32,
    /// Width inside a routed expert.
    pub expert_ffn: usize,
    /// Between the products.
    pub activation: Activation,
    /// Gate and up.
    pub gate_up: GateUp,
    /// `[n_expert, hidden, expert_ffn]`.
    pub down: ExpertLinear,
    /// The expert beside the routed ones.
    pub shared: Option<SharedSpec>,
}

/// The tensors of one dense placement group.
#[derive(Debug, Clone)]
pub struct DenseGroup {
    /// Which.
    pub kind: DenseKind,
    /// The layer, or `None` for embedding and head.
    pub layer: Option<u32>,
    /// Its tensors.
    pub tensors: Vec<TensorId>,
}

/// The tensors that a part of the network reads, apart by how they are held.
#[derive(Debug, Clone, Default)]
pub struct Tensors {
    /// Multiplied as matrices, in the file's own format.
    pub matrices: Vec<TensorId>,
    /// Vectors of parameters, decoded to `f32`.
    pub vectors: Vec<TensorId>,
}

impl Tensors {
    fn linears<'a>(&mut self, linears: impl IntoIterator<Item = &'a Linear>) {
        for linear in linears {
            // Matrices that share a tensor name it once.
            if !self.matrices.contains(&linear.weight) {
                self.matrices.push(linear.weight);
            }
            self.vectors.extend(linear.bias.filter(|bias| !self.vectors.contains(bias)));
        }
    }

    fn all(self) -> Vec<TensorId> {
        let mut all = self.matrices;
        all.extend(self.vectors);
        all
    }
}

/// Rows of one width that a token adds to a layer's KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheRows {
    /// Number of rows.
    pub n: usize,
    /// Values per row.
    pub width: usize,
}

impl Mixer {
    /// What it reads.
    pub fn tensors(&self) -> Tensors {
        let mut tensors = Tensors::default();
        match self {
            Mixer::Gqa(a) => {
                tensors.linears([&a.q, &a.k, &a.v, &a.o]);
                if let Some(QkNorm { q, k, .. }) = a.qk_norm {
                    tensors.vectors.extend([q, k]);
                }
                tensors.vectors.extend(a.sinks);
            }
            Mixer::Mla(a) => {
                if let Some(LowRank { down, norm }) = &a.q_down {
                    tensors.linears([down]);
                    tensors.vectors.push(*norm);
                }
                tensors.linears([&a.q, &a.kv_down, &a.o]);
                match a.kv_up {
                    KvUp::Split { k, v } => tensors.matrices.extend([k, v]),
                    KvUp::Fused(kv) => tensors.matrices.push(kv),
                }
                tensors.vectors.push(a.kv_norm);
            }
            Mixer::Delta(d) => {
                tensors.linears(d.linears());
                tensors.vectors.extend([d.conv, d.dt_bias, d.decay, d.norm]);
            }
        }
        tensors
    }

    /// How it rotates positions, if it does.
    pub fn rope(&self) -> Option<&RopeSpec> {
        match self {
            Mixer::Gqa(a) => Some(&a.rope),
            Mixer::Mla(a) => Some(&a.rope),
            Mixer::Delta(_) => None,
        }
    }

    /// Rows that one token adds to the layer's cache, and their widths in values: keys and values of each head, or one
    /// latent with its rotated key part.
    pub fn cache_rows(&self) -> Vec<CacheRows> {
        match self {
            Mixer::Gqa(a) => [a.key_dim, a.value_dim].map(|width| CacheRows { n: a.n_head_kv, width }).to_vec(),
            Mixer::Mla(a) => vec![CacheRows { n: 1, width: a.kv_rank + a.rope.dims }],
            Mixer::Delta(_) => Vec::new(),
        }
    }

    /// Bytes that the layer remembers besides, whatever the length of the context.
    pub fn state_bytes(&self) -> u64 {
        match self {
            Mixer::Gqa(_) | Mixer::Mla(_) => 0,
            Mixer::Delta(d) => d.state_values() as u64 * size_of::<f32>() as u64,
        }
    }
}

impl GatedFfn {
    fn tensors(&self) -> Tensors {
        let mut tensors = Tensors::default();
        tensors.linears([&self.gate, &self.up, &self.down]);
        tensors
    }
}

impl SharedSpec {
    fn tensors(&self) -> Tensors {
        let mut tensors = self.ffn.tensors();
        tensors.vectors.extend(self.gate);
        tensors
    }
}

impl MoeSpec {
    /// The stacked matrices, in the order in which an expert's slices lie in a buffer.
    pub fn expert_linears(&self) -> impl Iterator<Item = &ExpertLinear> {
        let (first, second) = match &self.gate_up {
            GateUp::Split { gate, up } => (gate, Some(up)),
            GateUp::Fused(both) => (both, None),
        };
        std::iter::once(first).chain(second).chain(std::iter::once(&self.down))
    }

    /// Every tensor of the routed experts: each expert has a slice of each.
    pub fn expert_tensors(&self) -> impl Iterator<Item = TensorId> {
        self.expert_linears().flat_map(|l| std::iter::once(l.weight).chain(l.bias))
    }

    fn router_tensors(&self) -> Tensors {
        let mut tensors = Tensors::default();
        tensors.linears([&self.router]);
        tensors.vectors.extend(self.selection_bias);
        tensors
    }
}

impl LayerSpec {
    /// The routed experts, if the layer has any.
    pub fn moe(&self) -> Option<&MoeSpec> {
        match &self.ffn {
            Ffn::Moe(moe) => Some(moe),
            Ffn::Dense(_) => None,
        }
    }
}

impl ModelSpec {
    /// Whether the head is the embedding.
    pub fn tied(&self) -> bool {
        self.output == self.embedding
    }

    /// Layers with routed experts, ascending, each with its number.
    pub fn moe_layers(&self) -> impl Iterator<Item = (usize, &MoeSpec)> {
        self.layers.iter().enumerate().filter_map(|(i, l)| l.moe().map(|m| (i, m)))
    }

    /// Every tensor that is not a routed expert's, in its placement group. Each tensor is in one group.
    pub fn dense_groups(&self) -> Vec<DenseGroup> {
        let mut groups = Vec::new();
        if !self.tied() {
            groups.push(DenseGroup { kind: DenseKind::Embedding, layer: None, tensors: vec![self.embedding] });
        }
        let mut shared_factors = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            let mut add = |kind, norm: Option<TensorId>, tensors: Tensors| {
                let tensors = norm.into_iter().chain(tensors.all()).collect();
                groups.push(DenseGroup { kind, layer: u32::try_from(i).ok(), tensors });
            };
            add(DenseKind::Attention, Some(layer.mixer_norm), layer.mixer.tensors());
            match &layer.ffn {
                Ffn::Dense(ffn) => add(DenseKind::DenseFfn, Some(layer.ffn_norm), ffn.tensors()),
                Ffn::Moe(moe) => {
                    add(DenseKind::Router, Some(layer.ffn_norm), moe.router_tensors());
                    if let Some(shared) = &moe.shared {
                        add(DenseKind::SharedExpert, None, shared.tensors());
                    }
                }
            }
            shared_factors.extend(layer.mixer.rope().and_then(|r| r.freq_factors));
        }
        shared_factors.sort_unstable();
        shared_factors.dedup();
        let mut head = vec![self.output_norm, self.output];
        head.extend(shared_factors);
        groups.push(DenseGroup { kind: DenseKind::Head, layer: None, tensors: head });
        groups
    }

    /// The dense tensors that are multiplied as matrices; all other dense ones are vectors of parameters.
    pub fn matrices(&self) -> HashSet<TensorId> {
        let mut ids = HashSet::from([self.embedding, self.output]);
        for layer in &self.layers {
            ids.extend(layer.mixer.tensors().matrices);
            match &layer.ffn {
                Ffn::Dense(ffn) => ids.extend(ffn.tensors().matrices),
                Ffn::Moe(moe) => {
                    ids.extend(moe.router_tensors().matrices);
                    ids.extend(moe.shared.iter().flat_map(|shared| shared.tensors().matrices));
                }
            }
        }
        ids
    }
}
