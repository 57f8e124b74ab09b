//! A network as data: its layers, the tensors each reads, and the options that change the
//! arithmetic.
//!
//! Dimensions are checked against the tensors when a spec is made, so that the engine can rely on
//! them.

mod attention;
mod block_index;
mod compressed;
mod delta;
mod indexer;
mod kda;
mod mamba;
mod ngram;
mod residual;
mod short_conv;
mod streams;
mod tensors;

pub use attention::{
    CacheRows, GateFunction, GqaSpec, KvUp, LongFactors, LowRank, MlaSpec, NormSpan, OutputGate,
    QkNorm, RopeKind, RopeScaling, RopeSpec, Temperature, WindowKind,
};
pub use block_index::{BlockIndex, BlockScore};
pub use compressed::{CompressedIndex, CompressedSpec, Compressor, FarKeys};
pub use delta::{DeltaGate, DeltaInput, DeltaRates, DeltaSpec, KeySharing};
pub use indexer::{IndexerSpec, KeyPool, Reach, Selection};
pub use kda::{DecayGate, KdaSpec, Projection};
pub use mamba::MambaSpec;
pub use ngram::{NgramBlock, NgramHead, NgramTable};
pub use residual::{HeadOptions, LayerInput, Residual, TokenInputs};
pub use short_conv::ShortConvSpec;
pub use streams::{
    BankConnection, Connection, Connections, GatedConnection, LowRankConnection, Sinkhorn,
    StreamsEnd, StreamsSpec,
};
pub use tensors::{DenseGroup, MatrixPart, Tensors};

use super::Scales;

/// Index of a tensor in the file's tensor list.
pub type TensorId = usize;

/// A network: what an engine needs to run it.
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
    /// Factor on embeddings.
    pub embedding_scale: f32,
    /// Inputs that a token has for every layer.
    pub token_inputs: Option<TokenInputs>,
    /// Rows of a table that a token and those before it name.
    pub ngrams: Option<NgramTable>,
    /// The streams of the residual, where there are several.
    pub streams: Option<StreamsSpec>,
    /// `[hidden]`, or that of all streams where low-rank connections end them.
    pub output_norm: TensorId,
    /// `[n_vocab, hidden]`; the embedding itself when tied.
    pub output: TensorId,
    /// What the head does beside the product.
    pub head: HeadOptions,
    /// The layers, first to last.
    pub layers: Vec<LayerSpec>,
    /// Factors on products with matrices.
    pub scales: Scales,
}

/// One layer: `x += mixer(norm(x)); x += ffn(norm(x))`, and what [`Residual`] says.
#[derive(Debug, Clone)]
pub struct LayerSpec {
    /// Norm before the mixer, `[hidden]`; of all streams where a low-rank connection reads them.
    pub mixer_norm: TensorId,
    /// The block that mixes tokens.
    pub mixer: Mixer,
    /// Norm before the feed-forward block; the mixer's where there is none.
    pub ffn_norm: TensorId,
    /// The feed-forward block.
    pub ffn: Ffn,
    /// What becomes of the blocks' results before they are added, and what follows them.
    pub residual: Residual,
}

/// A layer's way of mixing tokens.
#[derive(Debug, Clone)]
pub enum Mixer {
    /// Attention with grouped key and value heads.
    Gqa(GqaSpec),
    /// Attention whose KV cache holds compressed latents.
    Mla(MlaSpec),
    /// A recurrence with a state of fixed size: the gated delta net.
    Delta(DeltaSpec),
    /// A gated convolution over the last tokens.
    ShortConv(ShortConvSpec),
    /// A recurrence with a state of fixed size whose channels decay each by itself.
    Kda(KdaSpec),
    /// A recurrence with a state of fixed size: Mamba-2.
    Mamba(MambaSpec),
    /// Attention to near tokens and to compressed far ones.
    Compressed(Box<CompressedSpec>),
    /// None: the layer has a feed-forward block only, and `mixer_norm` is that of the block.
    None,
}

/// A matrix and its optional bias.
#[derive(Debug, Clone, Copy)]
pub struct Linear {
    /// `[out, in]`, or a taller tensor that has these rows from `first_row` on.
    pub weight: TensorId,
    /// `[out]`, or a longer vector that has these values from `first_row` on.
    pub bias: Option<TensorId>,
    /// Rows of the matrix.
    pub n_out: usize,
    /// Columns of the matrix.
    pub n_in: usize,
    /// Where the rows begin in a tensor that several matrices share; otherwise 0.
    pub first_row: usize,
}

/// The feed-forward block of a layer.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant, reason = "there is one per layer")]
pub enum Ffn {
    /// `down(act(gate x) · up x)`.
    Dense(GatedFfn),
    /// Routed experts, and possibly shared ones.
    Moe(MoeSpec),
    /// None: the layer has a mixer only, and `ffn_norm` is that of the mixer.
    None,
}

/// A feed-forward block, gated in most models.
#[derive(Debug, Clone, Copy)]
pub struct GatedFfn {
    /// `[ffn, hidden]`; none in blocks without gates.
    pub gate: Option<Linear>,
    /// `[ffn, hidden]`.
    pub up: Linear,
    /// `[hidden, ffn]`.
    pub down: Linear,
    /// What stands between the first two products and the last.
    pub activation: Activation,
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
    /// Choose by logit, then sigmoid of each chosen.
    SigmoidChosen,
}

/// What stands between an expert's first two products and its last.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `silu(gate) · up`.
    Silu,
    /// `max(up, 0)²`, without a gate (Primer, arXiv 2109.08668).
    SquaredRelu,
    /// `silu(min(gate, limit)) · u`, where `u` is up within ±`limit`.
    ClampedSilu {
        /// Bound on both inputs.
        limit: f32,
    },
    /// `gelu(gate) · up`, with the tanh form of GELU (arXiv 1606.08415).
    Gelu,
    /// `min(silu(gate), limit) · u`, where `u` is up within ±`limit`.
    LimitedSilu {
        /// Bound on both factors.
        limit: f32,
    },
    /// `beta · tanh(gate / beta) · sigmoid(gate) · u`, where `u` is `linear · tanh(up / linear)`, or
    /// up itself where `linear` is 0 (Kimi K3).
    Situ {
        /// Bound on the gate.
        beta: f32,
        /// Bound on up, or 0.
        linear: f32,
    },
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
    /// Two tensors, one per matrix.
    Split {
        /// `[n_expert, expert_ffn, hidden]`.
        gate: ExpertLinear,
        /// `[n_expert, expert_ffn, hidden]`.
        up: ExpertLinear,
    },
    /// One tensor `[n_expert, 2 * expert_ffn, hidden]`, the gate's rows first.
    Fused(ExpertLinear),
    /// `[n_expert, expert_ffn, hidden]`, without a gate.
    Up(ExpertLinear),
}

/// An expert that every token uses.
#[derive(Debug, Clone, Copy)]
pub struct SharedSpec {
    /// Its feed-forward block.
    pub ffn: GatedFfn,
    /// The sigmoid of this vector's product with the input is a factor on the result, `[hidden]`.
    pub gate: Option<TensorId>,
    /// Norm of the result, `[hidden]`.
    pub norm: Option<TensorId>,
}

/// What a layer's router reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouterInput {
    /// The normed rows that the shared expert reads too.
    Normed,
    /// The hidden state under a norm without weights, divided by `sqrt(hidden)`, times these
    /// weights, `[hidden]`.
    Own(TensorId),
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
    /// What the router reads.
    pub router_input: RouterInput,
    /// Norm of the hidden state that the routed experts read, `[hidden]`: that of the layer unless
    /// they have their own.
    pub input_norm: Option<TensorId>,
    /// Norm of the routed experts' sum, `[hidden]`.
    pub output_norm: Option<TensorId>,
    /// Whether an expert's weight multiplies what it reads instead of what it returns.
    pub weigh_input: bool,
    /// Factor on each expert's result, `[n_expert]`.
    pub expert_scale: Option<TensorId>,
    /// Factor on the sum of the routed experts and the shared one.
    pub sum_scale: f32,
    /// Added to the probabilities for the choice only, `[n_expert]`.
    pub selection_bias: Option<TensorId>,
    /// The experts of every token of the vocabulary, `[n_vocab, n_used]`, where the token chooses
    /// them and not its router. Weights are the router's all the same.
    pub by_token: Option<TensorId>,
    /// The smaller space that routed experts compute in.
    pub latent: Option<Latent>,
    /// How router logits become probabilities.
    pub gating: Gating,
    /// Number of routed experts.
    pub n_expert: usize,
    /// Experts per token.
    pub n_used: usize,
    /// Groups that the choice is narrowed to first, where the router works in groups.
    pub groups: Option<Groups>,
    /// Divide the chosen weights by their sum.
    pub normalize: bool,
    /// Factor on the weights.
    pub scale: f32,
    /// Width inside a routed expert.
    pub expert_ffn: usize,
    /// What stands between the first two products and the last.
    pub activation: Activation,
    /// The gate and up matrices.
    pub gate_up: GateUp,
    /// `[n_expert, hidden, expert_ffn]`.
    pub down: ExpertLinear,
    /// The expert beside the routed ones.
    pub shared: Option<SharedSpec>,
}

/// A space of routed experts that is smaller than the hidden state: they read `down x`, and their sum
/// `s` becomes `up s`, or `up norm(s)`.
#[derive(Debug, Clone, Copy)]
pub struct Latent {
    /// `[latent, hidden]`.
    pub down: Linear,
    /// Norm of the experts' sum, `[latent]`.
    pub norm: Option<TensorId>,
    /// `[hidden, latent]`.
    pub up: Linear,
}

impl GatedFfn {
    /// Returns its matrices.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.gate.iter().chain([&self.up, &self.down])
    }
}

impl MoeSpec {
    /// Whether routed experts have gates.
    pub fn has_gate(&self) -> bool {
        !matches!(self.gate_up, GateUp::Up(_))
    }

    /// Returns the width of what a routed expert reads and returns.
    pub fn expert_width(&self) -> usize {
        self.latent
            .map_or(self.router.n_in, |latent| latent.down.n_out)
    }

    /// Returns whether the routed experts and the shared one read the rows that the router reads, or
    /// what a matrix makes of them, and are added as they are.
    pub fn is_plain(&self) -> bool {
        self.router_input == RouterInput::Normed
            && self.input_norm.is_none()
            && self.output_norm.is_none()
            && self.expert_scale.is_none()
            && self.sum_scale == 1.0
            && self.shared.is_none_or(|shared| shared.norm.is_none())
    }
}

impl LayerSpec {
    /// Returns the layer whose keys and values this one reads, if they are not its own.
    pub fn kv_owner(&self) -> Option<usize> {
        match &self.mixer {
            Mixer::Gqa(attention) => attention.shared_kv,
            _ => None,
        }
    }

    /// Returns the routed experts, if the layer has any.
    pub fn moe(&self) -> Option<&MoeSpec> {
        match &self.ffn {
            Ffn::Moe(moe) => Some(moe),
            Ffn::Dense(_) | Ffn::None => None,
        }
    }

    /// Returns whether the layer mixes tokens.
    pub fn has_mixer(&self) -> bool {
        !matches!(self.mixer, Mixer::None)
    }

    /// Returns whether the layer has a feed-forward block.
    pub fn has_ffn(&self) -> bool {
        !matches!(self.ffn, Ffn::None)
    }

    /// Returns the values that the layer remembers of the n-grams of past tokens.
    pub fn ngram_state_values(&self) -> usize {
        let ngram = self.residual.ngram.as_ref();
        ngram.map_or(0, |block| block.past() * block.channels())
    }

    /// Returns the bytes of recurrent state, which don't depend on the length of the context.
    pub fn state_bytes(&self) -> u64 {
        let ngram = self.ngram_state_values() as u64 * size_of::<f32>() as u64;
        self.mixer.state_bytes().saturating_add(ngram)
    }

    /// Returns whether the routed experts and the shared one are added up before they are added to
    /// the hidden state, since something is done to their sum.
    pub fn sums_experts_apart(&self) -> bool {
        let residual = &self.residual;
        let added = residual.ffn_is_plain() && residual.connections.is_none();
        let plain = |moe: &MoeSpec| moe.is_plain() && added;
        self.moe().is_some_and(|moe| !plain(moe))
    }
}

impl ModelSpec {
    /// Returns the values per token of the hidden state between layers: of all streams.
    pub fn residual_width(&self) -> usize {
        self.hidden * self.streams.map_or(1, |streams| streams.n)
    }

    /// Whether the head is the embedding.
    pub fn tied(&self) -> bool {
        self.output == self.embedding
    }

    /// Returns whether any layer rotates otherwise in a context of this many tokens than in a short
    /// one.
    pub fn rotates_for_long_contexts(&self, context: usize) -> bool {
        let ropes = self.layers.iter().filter_map(|layer| layer.mixer.rope());
        let mut long = ropes.filter_map(|rope| rope.long_factors);
        long.any(|long| context > long.original_context)
    }

    /// Returns the layer whose indexer chooses the positions that a layer without one of its own
    /// attends to, if it attends to chosen ones.
    pub fn indexed_before(&self, layer: usize) -> Option<usize> {
        fn reach(layer: &LayerSpec) -> Option<&Reach> {
            match &layer.mixer {
                Mixer::Mla(attention) => Some(&attention.reach),
                _ => None,
            }
        }
        match reach(self.layers.get(layer)?)? {
            Reach::Reused(_) => self.layers[..layer]
                .iter()
                .rposition(|layer| matches!(reach(layer), Some(Reach::Indexed(_)))),
            Reach::All | Reach::Window(_) | Reach::Indexed(_) => None,
        }
    }

    /// Returns the layers with routed experts, ascending, each with its number.
    pub fn moe_layers(&self) -> impl Iterator<Item = (usize, &MoeSpec)> {
        self.layers
            .iter()
            .enumerate()
            .filter_map(|(i, l)| l.moe().map(|m| (i, m)))
    }
}
