//! A network as data: its layers, the tensors each reads, and the options that change the
//! arithmetic.
//!
//! Dimensions are checked against the tensors when a spec is made, so that the engine can rely on
//! them.

mod attention;
mod delta;
mod tensors;

pub use attention::{
    CacheRows, GqaSpec, KvUp, LowRank, MlaSpec, NormSpan, QkNorm, RopeKind, RopeScaling, RopeSpec,
    Temperature,
};
pub use delta::{DeltaInput, DeltaRates, DeltaSpec, KeySharing};
pub use tensors::{DenseGroup, Tensors};

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
    /// `[hidden]`.
    pub output_norm: TensorId,
    /// `[n_vocab, hidden]`; the embedding itself when tied.
    pub output: TensorId,
    /// The layers, first to last.
    pub layers: Vec<LayerSpec>,
    /// Factors on products with matrices.
    pub scales: Scales,
}

/// One layer: `x += mixer(norm(x)); x += ffn(norm(x))`.
#[derive(Debug, Clone)]
pub struct LayerSpec {
    /// Norm before the mixer, `[hidden]`.
    pub mixer_norm: TensorId,
    /// The block that mixes tokens.
    pub mixer: Mixer,
    /// Norm before the feed-forward block, `[hidden]`.
    pub ffn_norm: TensorId,
    /// The feed-forward block.
    pub ffn: Ffn,
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
    /// Two tensors, one per matrix.
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
    /// Its feed-forward block.
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

impl LayerSpec {
    /// Returns the routed experts, if the layer has any.
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

    /// Returns the layers with routed experts, ascending, each with its number.
    pub fn moe_layers(&self) -> impl Iterator<Item = (usize, &MoeSpec)> {
        self.layers
            .iter()
            .enumerate()
            .filter_map(|(i, l)| l.moe().map(|m| (i, m)))
    }
}
