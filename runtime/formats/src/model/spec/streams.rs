//! Hyper-connections as data: a residual of several streams, of which every block reads a mixture.

use super::{Linear, TensorId, Tensors};

/// A residual of several streams (hyper-connections, arXiv 2409.19606). All begin as the token's
/// embedding. Every block reads one vector from them and writes its result back to all.
#[derive(Debug, Clone, Copy)]
pub struct StreamsSpec {
    /// Number of streams.
    pub n: usize,
    /// How they become the hidden state that the head reads.
    pub end: StreamsEnd,
}

/// How the streams become one hidden state.
#[derive(Debug, Clone, Copy)]
pub enum StreamsEnd {
    /// Their mean; the output norm follows.
    Mean,
    /// A weighted sum; the output norm follows. Only the gates of what is read are there.
    Gated(GatedConnection),
    /// The mixture that a block reads, without a norm after it.
    LowRank(LowRankConnection),
    /// The mixture that a block reads; the output norm follows.
    Bank(BankConnection),
}

/// How a block reads the streams `R[j]`, and how it writes its result `f` back.
#[derive(Debug, Clone, Copy)]
pub enum Connection {
    /// Weights for whole streams.
    Gated(GatedConnection),
    /// Weights for every value of every stream.
    LowRank(LowRankConnection),
    /// Weights for earlier hidden states.
    Bank(BankConnection),
}

/// Attention over earlier hidden states (Kimi K3). The first stream is the hidden state, and each of
/// the others is one that an earlier layer has put there: a bank of `n_bank` so far.
///
/// - The block reads `Σ_j p_j R[j]` over the bank and the hidden state, where `p` is the softmax of
///   `score · rms(R[j])`, whose norm has no weights.
/// - Its result is added to the hidden state; or, where it `banks`, the hidden state joins the bank
///   and the result takes its place.
#[derive(Debug, Clone, Copy)]
pub struct BankConnection {
    /// `[hidden]`.
    pub score: TensorId,
    /// Hidden states that are in the bank.
    pub n_bank: usize,
    /// Whether the hidden state joins them.
    pub banks: bool,
}

/// Weights for whole streams, from all of them together (manifold-constrained hyper-connections,
/// arXiv 2512.24880). With `m = gates · rms(R)`, where the norm spans all streams and has no
/// weights:
///
/// - The block reads `Σ_j pre_j R[j]` with `pre_j = σ(m_j · scale_0 + base_j) + epsilon`.
/// - `post_j = post_scale · σ(m_(n+j) · scale_1 + base_(n+j)) + post_offset`.
/// - The streams become `R'[j] = post_j f + Σ_i C[i, j] R[i]`, where `C` is the identity or the
///   doubly stochastic matrix of the remaining `m`; see [`Sinkhorn`].
#[derive(Debug, Clone, Copy)]
pub struct GatedConnection {
    /// `[gates, streams * hidden]`: `n` for `pre`, `n` for `post`, `n * n` for `C`.
    pub gates: Linear,
    /// `[gates]`.
    pub base: TensorId,
    /// One value per kind of gate, `[1]` to `[3]`.
    pub scale: TensorId,
    /// Added to `pre`, and in `C` to numerators and denominators.
    pub epsilon: f32,
    /// Factor of `post`.
    pub post_scale: f32,
    /// Added to `post`.
    pub post_offset: f32,
    /// How the streams are mixed with each other; they are not where `None`.
    pub sinkhorn: Option<Sinkhorn>,
}

/// Normalization of the matrix `C[source, destination]` in turns: the softmax of each source's row
/// plus epsilon; then each column divided by its sum plus epsilon; then, for every further round,
/// each row and again each column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sinkhorn {
    /// Rounds, at least 1.
    pub rounds: usize,
}

/// Weights for every value of every stream, of low rank. With `xn[j] = rms(R[j]) · norm[j]` and all
/// `xn` as one vector:
///
/// - `gate = up · silu(down · xn / n)`, as long as `xn`.
/// - The block reads `1/n Σ_j xn[j] · σ(gate[j])`, and has no norm of its own.
/// - The streams become `R'[j] = R[j] + 2 σ((inject · xn)_j / n) f`.
#[derive(Debug, Clone, Copy)]
pub struct LowRankConnection {
    /// `[streams, hidden]`.
    pub norm: TensorId,
    /// `[rank, streams * hidden]`.
    pub down: Linear,
    /// `[streams * hidden, rank]`.
    pub up: Linear,
    /// `[streams, streams * hidden]`; none before the head.
    pub inject: Option<Linear>,
}

/// The connections of a layer's blocks.
#[derive(Debug, Clone, Copy)]
pub struct Connections {
    /// Around the mixer.
    pub mixer: Connection,
    /// Around the feed-forward block.
    pub ffn: Connection,
}

impl GatedConnection {
    fn tensors(&self) -> Tensors {
        let mut tensors = Tensors::default();
        tensors.linears([&self.gates]);
        tensors.vectors.extend([self.base, self.scale]);
        tensors
    }
}

impl LowRankConnection {
    fn tensors(&self) -> Tensors {
        let mut tensors = Tensors::default();
        tensors.linears([&self.down, &self.up]);
        tensors.linears(&self.inject);
        tensors.vectors.push(self.norm);
        tensors
    }
}

impl BankConnection {
    fn tensors(&self) -> Tensors {
        let mut tensors = Tensors::default();
        tensors.vectors.push(self.score);
        tensors
    }
}

impl Connection {
    /// Returns the tensors that it reads.
    pub fn tensors(&self) -> Tensors {
        match self {
            Connection::Gated(gated) => gated.tensors(),
            Connection::LowRank(low) => low.tensors(),
            Connection::Bank(bank) => bank.tensors(),
        }
    }

    /// Returns whether the block has a norm of its own after what it reads.
    pub fn has_block_norm(&self) -> bool {
        !matches!(self, Connection::LowRank(_))
    }
}

impl StreamsEnd {
    /// Returns the tensors that it reads.
    pub fn tensors(&self) -> Tensors {
        match self {
            StreamsEnd::Mean => Tensors::default(),
            StreamsEnd::Gated(gated) => gated.tensors(),
            StreamsEnd::LowRank(low) => low.tensors(),
            StreamsEnd::Bank(bank) => bank.tensors(),
        }
    }

    /// Returns the connection that reads the streams, unless their mean does.
    pub fn connection(&self) -> Option<Connection> {
        match self {
            StreamsEnd::Mean => None,
            StreamsEnd::Gated(gated) => Some(Connection::Gated(*gated)),
            StreamsEnd::LowRank(low) => Some(Connection::LowRank(*low)),
            StreamsEnd::Bank(bank) => Some(Connection::Bank(*bank)),
        }
    }

    /// Returns whether the output norm follows.
    pub fn has_output_norm(&self) -> bool {
        !matches!(self, StreamsEnd::LowRank(_))
    }
}
