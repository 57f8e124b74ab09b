//! Hyper-connections in files.

use super::ModelError;
use super::source::Source;
use super::spec::{
    Connection, Connections, GatedConnection, LowRankConnection, Sinkhorn, StreamsEnd, StreamsSpec,
};

/// Bound on streams, far above any real model's.
const MAX_STREAMS: usize = 64;

/// Bound on rounds of normalization, far above any real model's.
const MAX_ROUNDS: usize = 1024;

/// Reads the number of streams, at least 2.
pub(super) fn count(s: &Source<'_>) -> Result<usize, ModelError> {
    let name = "hyper_connection.count";
    let n = s.in_bounds(name, s.dim(name)?, MAX_STREAMS)?;
    if n < 2 {
        return Err(s.bad(name, format!("{n}; expected at least 2")));
    }
    Ok(n)
}

/// Weights for whole streams that a model's connections have in common.
#[derive(Clone, Copy)]
pub(super) struct Gated {
    n: usize,
    hidden: usize,
    epsilon: f32,
    post_scale: f32,
    post_offset: f32,
    sinkhorn: Option<Sinkhorn>,
}

impl Gated {
    /// Reads connections whose streams are mixed by a doubly stochastic matrix.
    pub(super) fn mixing(s: &Source<'_>, hidden: usize) -> Result<Self, ModelError> {
        let name = "hyper_connection.sinkhorn_iterations";
        let rounds = s.in_bounds(name, s.dim(name)?, MAX_ROUNDS)?;
        Ok(Self {
            n: count(s)?,
            hidden,
            epsilon: s.epsilon("hyper_connection.epsilon")?,
            post_scale: 2.0,
            post_offset: 0.0,
            sinkhorn: Some(Sinkhorn { rounds }),
        })
    }

    /// Reads connections whose streams are not mixed.
    pub(super) fn plain(s: &Source<'_>, hidden: usize) -> Result<Self, ModelError> {
        let epsilon = s.epsilon("hyper_connection.epsilon")?;
        Ok(Self {
            n: count(s)?,
            hidden,
            epsilon,
            post_scale: s.epsilon("hyper_connection.magnitude")?,
            post_offset: epsilon,
            sinkhorn: None,
        })
    }

    /// Finds the connections of a layer.
    pub(super) fn layer(&self, s: &Source<'_>, layer: usize) -> Result<Connections, ModelError> {
        let kinds = if self.sinkhorn.is_some() { 3 } else { 2 };
        let around = |block: &str| {
            let prefix = format!("blk.{layer}.hc_{block}");
            self.tensors(s, &prefix, kinds).map(Connection::Gated)
        };
        Ok(Connections {
            mixer: around("attn")?,
            ffn: around("ffn")?,
        })
    }

    /// Describes streams that end in a weighted sum.
    pub(super) fn ending_in_sum(&self, s: &Source<'_>) -> Result<StreamsSpec, ModelError> {
        Ok(StreamsSpec {
            n: self.n,
            end: StreamsEnd::Gated(self.tensors(s, "output_hc", 1)?),
        })
    }

    /// Describes streams that end in their mean.
    pub(super) fn ending_in_mean(&self) -> StreamsSpec {
        StreamsSpec {
            n: self.n,
            end: StreamsEnd::Mean,
        }
    }

    /// Finds the tensors of a connection with so many kinds of weights.
    fn tensors(
        &self,
        s: &Source<'_>,
        prefix: &str,
        kinds: usize,
    ) -> Result<GatedConnection, ModelError> {
        let n = self.n;
        let n_gates = [n, 2 * n, (2 + n) * n][kinds - 1];
        Ok(GatedConnection {
            gates: s.linear(&format!("{prefix}_fn"), n * self.hidden, n_gates)?,
            base: s.vector(&format!("{prefix}_base.weight"), n_gates)?,
            scale: s.vector(&format!("{prefix}_scale.weight"), kinds)?,
            epsilon: self.epsilon,
            post_scale: self.post_scale,
            post_offset: self.post_offset,
            sinkhorn: self.sinkhorn,
        })
    }
}

/// Weights for every value of every stream, of low rank, that a model's connections have in common.
#[derive(Clone, Copy)]
pub(super) struct LowRankStreams {
    pub(super) n: usize,
    hidden: usize,
    rank: usize,
}

impl LowRankStreams {
    pub(super) fn read(s: &Source<'_>, hidden: usize) -> Result<Self, ModelError> {
        Ok(Self {
            n: count(s)?,
            hidden,
            rank: s.dim("hyper_connection.low_rank")?,
        })
    }

    /// Finds the tensors of a connection. Only one around a block injects the block's result.
    pub(super) fn tensors(
        &self,
        s: &Source<'_>,
        prefix: &str,
        injects: bool,
    ) -> Result<LowRankConnection, ModelError> {
        let width = self.n * self.hidden;
        let inject = || s.linear(&format!("{prefix}_inject"), width, self.n);
        Ok(LowRankConnection {
            norm: s.vector(&format!("{prefix}_norm.weight"), width)?,
            down: s.linear(&format!("{prefix}_down"), width, self.rank)?,
            up: s.linear(&format!("{prefix}_up"), self.rank, width)?,
            inject: injects.then(inject).transpose()?,
        })
    }
}
