//! Which tensors each part of a network reads, and the groups in which they are placed.

use super::{
    Connection, ExpertLinear, Ffn, GateUp, GatedFfn, KvUp, Latent, LayerSpec, Linear, LowRank,
    Mixer, ModelSpec, MoeSpec, QkNorm, RouterInput, SharedSpec, TensorId,
};
use crate::model::shape::DenseKind;
use std::collections::HashSet;
use std::ops::Range;

/// The tensors of one dense placement group.
#[derive(Debug, Clone)]
pub struct DenseGroup {
    /// Its kind of tensors.
    pub kind: DenseKind,
    /// The layer, or `None` for embedding, tables, and head.
    pub layer: Option<u32>,
    /// Tensors of the group, the norm first.
    pub tensors: Vec<TensorId>,
}

/// The tensors that a part of the network reads, apart by how they are held.
#[derive(Debug, Clone, Default)]
pub struct Tensors {
    /// Multiplied as matrices, in the file's own format.
    pub matrices: Vec<TensorId>,
    /// Vectors of parameters, decoded to `f32`.
    pub vectors: Vec<TensorId>,
    /// Rows that are multiplied on their own, of matrices that are read no other way.
    pub parts: Vec<MatrixPart>,
}

/// Rows of a matrix that are multiplied on their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MatrixPart {
    /// The matrix.
    pub tensor: TensorId,
    /// Its rows.
    pub rows: Range<usize>,
}

impl Tensors {
    pub(super) fn linears<'a>(&mut self, linears: impl IntoIterator<Item = &'a Linear>) {
        for linear in linears {
            // Matrices that share a tensor name it once.
            if !self.matrices.contains(&linear.weight) {
                self.matrices.push(linear.weight);
            }
            self.vectors
                .extend(linear.bias.filter(|bias| !self.vectors.contains(bias)));
            self.parts.push(MatrixPart {
                tensor: linear.weight,
                rows: linear.first_row..linear.first_row + linear.n_out,
            });
        }
    }

    pub(super) fn and(mut self, other: Self) -> Self {
        self.matrices.extend(other.matrices);
        self.vectors.extend(other.vectors);
        self.parts.extend(other.parts);
        self
    }

    fn all(self) -> Vec<TensorId> {
        let mut all = self.matrices;
        all.extend(self.vectors);
        all
    }
}

impl Mixer {
    /// Returns the tensors that it reads.
    pub fn tensors(&self) -> Tensors {
        let mut tensors = Tensors::default();
        match self {
            Mixer::Gqa(a) => {
                tensors.linears(a.linears());
                if let Some(QkNorm { q, k, .. }) = a.qk_norm {
                    tensors.vectors.extend(q);
                    tensors.vectors.extend(k.filter(|_| a.shared_kv.is_none()));
                }
                tensors.vectors.extend(a.sinks);
                tensors = tensors.and(a.index.map(|index| index.tensors()).unwrap_or_default());
            }
            Mixer::Mla(a) => {
                tensors.linears(a.linears());
                match a.kv_up {
                    KvUp::Split { k, v } => tensors.matrices.extend([k, v]),
                    KvUp::Fused(kv) => tensors.matrices.push(kv),
                }
                tensors
                    .vectors
                    .extend(a.q_down.map(|LowRank { norm, .. }| norm));
                tensors.vectors.push(a.kv_norm);
                tensors.vectors.extend(a.shared_norm);
                tensors.vectors.extend(a.sinks);
                if let Some(indexer) = a.reach.indexer() {
                    tensors.vectors.extend(indexer.vectors());
                }
            }
            Mixer::Delta(d) => {
                tensors.linears(d.linears());
                tensors.vectors.extend([d.conv, d.dt_bias, d.decay, d.norm]);
            }
            Mixer::Kda(k) => {
                tensors.linears(k.linears());
                tensors.vectors.extend(k.vectors());
            }
            Mixer::ShortConv(c) => {
                tensors.linears([&c.input, &c.out]);
                tensors.vectors.push(c.conv);
            }
            Mixer::Mamba(m) => {
                tensors.linears([&m.input, &m.out]);
                let vectors = [m.conv, m.dt_bias, m.decay, m.skip, m.norm];
                tensors
                    .vectors
                    .extend(vectors.into_iter().chain(m.conv_bias));
            }
            Mixer::Compressed(a) => tensors = a.tensors(),
            Mixer::None => {}
        }
        tensors
    }
}

impl GatedFfn {
    fn tensors(&self) -> Tensors {
        let mut tensors = Tensors::default();
        tensors.linears(self.linears());
        tensors
    }
}

impl SharedSpec {
    fn tensors(&self) -> Tensors {
        let mut tensors = self.ffn.tensors();
        tensors.vectors.extend(self.gate);
        tensors.vectors.extend(self.norm);
        tensors
    }
}

impl MoeSpec {
    /// Returns the stacked matrices, in the order in which an expert's slices lie in a buffer.
    pub fn expert_linears(&self) -> impl Iterator<Item = &ExpertLinear> {
        let (first, second) = match &self.gate_up {
            GateUp::Split { gate, up } => (gate, Some(up)),
            GateUp::Fused(both) => (both, None),
            GateUp::Up(up) => (up, None),
        };
        std::iter::once(first)
            .chain(second)
            .chain(std::iter::once(&self.down))
    }

    /// Returns every tensor of the routed experts: each expert has a slice of each.
    pub fn expert_tensors(&self) -> impl Iterator<Item = TensorId> {
        self.expert_linears()
            .flat_map(|l| std::iter::once(l.weight).chain(l.bias))
    }

    fn router_tensors(&self) -> Tensors {
        let mut tensors = Tensors::default();
        tensors.linears([&self.router]);
        tensors.vectors.extend(self.selection_bias);
        tensors.vectors.extend(self.by_token);
        if let Some(Latent { down, norm, up }) = &self.latent {
            tensors.linears([down, up]);
            tensors.vectors.extend(*norm);
        }
        if let RouterInput::Own(weights) = self.router_input {
            tensors.vectors.push(weights);
        }
        let others = [self.input_norm, self.output_norm, self.expert_scale];
        tensors.vectors.extend(others.into_iter().flatten());
        tensors
    }
}

impl LayerSpec {
    /// Returns what the layer's attention group reads: its mixer and the norm after it.
    fn mixer_tensors(&self) -> Tensors {
        let mut tensors = self.mixer.tensors();
        let residual = &self.residual;
        tensors.vectors.extend(residual.mixer_norm);
        let connection = residual.connections.map(|c| c.mixer.tensors());
        let ngram = residual.ngram.map(|block| block.tensors());
        let others = connection.into_iter().chain(ngram);
        others.fold(tensors, Tensors::and)
    }

    /// Returns what follows the feed-forward block, which belongs to the block's group.
    fn end_tensors(&self) -> Tensors {
        let mut tensors = Tensors::default();
        let residual = &self.residual;
        if let Some(input) = &residual.layer_input {
            tensors.linears([&input.gate, &input.proj]);
            tensors.vectors.push(input.norm);
        }
        tensors.vectors.extend(residual.ffn_norm);
        tensors.vectors.extend(residual.output_scale);
        let connection = residual.connections.map(|c| c.ffn.tensors());
        tensors.and(connection.unwrap_or_default())
    }
}

impl ModelSpec {
    /// Returns every tensor that is not a routed expert's, in its placement group. Each tensor is
    /// in one group.
    pub fn dense_groups(&self) -> Vec<DenseGroup> {
        let mut groups = Vec::new();
        let embedding = (!self.tied()).then_some(self.embedding);
        let inputs = self.token_inputs.iter().map(|own| own.table);
        let ngrams = self.ngrams.iter().map(|ngrams| ngrams.table);
        for (kind, tensors) in [
            (DenseKind::Embedding, embedding.into_iter().collect()),
            (
                DenseKind::TokenTable,
                inputs.chain(ngrams).collect::<Vec<TensorId>>(),
            ),
        ] {
            if !tensors.is_empty() {
                groups.push(DenseGroup {
                    kind,
                    layer: None,
                    tensors,
                });
            }
        }
        let mut shared_factors = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            let mut add = |kind, norm: Option<TensorId>, tensors: Tensors| {
                let tensors = norm.into_iter().chain(tensors.all()).collect();
                groups.push(DenseGroup {
                    kind,
                    layer: u32::try_from(i).ok(),
                    tensors,
                });
            };
            // The norm of a low-rank connection is among its tensors.
            let connections = layer.residual.connections;
            let norm =
                |of: Option<Connection>, id| of.is_none_or(|c| c.has_block_norm()).then_some(id);
            let mixer_norm = norm(connections.map(|c| c.mixer), layer.mixer_norm);
            let ffn_norm = norm(connections.map(|c| c.ffn), layer.ffn_norm);
            if layer.has_mixer() {
                add(DenseKind::Attention, mixer_norm, layer.mixer_tensors());
            }
            let end = layer.end_tensors();
            match &layer.ffn {
                Ffn::Dense(ffn) => {
                    let tensors = ffn.tensors().and(end);
                    add(DenseKind::DenseFfn, ffn_norm, tensors);
                }
                Ffn::Moe(moe) => {
                    let tensors = moe.router_tensors().and(end);
                    add(DenseKind::Router, ffn_norm, tensors);
                    if let Some(shared) = &moe.shared {
                        add(DenseKind::SharedExpert, None, shared.tensors());
                    }
                }
                Ffn::None => {}
            }
            if let Some(rope) = layer.mixer.rope() {
                shared_factors.extend(rope.freq_factors);
                shared_factors.extend(rope.long_factors.map(|long| long.factors));
            }
        }
        shared_factors.sort_unstable();
        shared_factors.dedup();
        let end = self.streams.map(|streams| streams.end);
        let has_norm = end.is_none_or(|end| end.has_output_norm());
        let mut head: Vec<TensorId> = has_norm.then_some(self.output_norm).into_iter().collect();
        head.push(self.output);
        head.extend(end.into_iter().flat_map(|end| end.tensors().all()));
        head.extend(shared_factors);
        head.extend(self.head.bias);
        head.extend(self.token_inputs.iter().flat_map(|own| {
            let mut tensors = Tensors::default();
            tensors.linears([&own.proj]);
            tensors.vectors.push(own.norm);
            tensors.all()
        }));
        groups.push(DenseGroup {
            kind: DenseKind::Head,
            layer: None,
            tensors: head,
        });
        groups
    }

    /// Returns the dense tensors that are multiplied as matrices; all other dense ones are vectors
    /// of parameters.
    pub fn matrices(&self) -> HashSet<TensorId> {
        let mut ids = HashSet::from([self.embedding, self.output]);
        ids.extend(self.token_inputs.iter().map(|own| own.table));
        ids.extend(self.ngrams.iter().map(|ngrams| ngrams.table));
        ids.extend(self.dense_tensors().matrices);
        ids
    }

    /// Returns the dense matrices that are only multiplied, and only by `rows` rows or multiples of
    /// as many that begin at a multiple.
    pub fn matrices_in_bands(&self, rows: usize) -> HashSet<TensorId> {
        let mut parts = self.dense_tensors().parts;
        parts.push(MatrixPart {
            tensor: self.output,
            rows: 0..self.n_vocab,
        });
        let is_cut = |part: &&MatrixPart| {
            !part.rows.start.is_multiple_of(rows) || !part.rows.end.is_multiple_of(rows)
        };
        let cut: HashSet<TensorId> = parts.iter().filter(is_cut).map(|p| p.tensor).collect();
        let all = parts.iter().map(|part| part.tensor);
        all.filter(|id| !cut.contains(id)).collect()
    }

    /// Returns what all parts of the network read but for routed experts, tables, and the head.
    fn dense_tensors(&self) -> Tensors {
        let mut tensors = Tensors::default();
        tensors.linears(self.token_inputs.iter().map(|own| &own.proj));
        let mut all: Vec<Tensors> = vec![tensors];
        all.extend(self.streams.iter().map(|s| s.end.tensors()));
        for layer in &self.layers {
            all.extend([layer.mixer_tensors(), layer.end_tensors()]);
            match &layer.ffn {
                Ffn::Dense(ffn) => all.push(ffn.tensors()),
                Ffn::Moe(moe) => {
                    all.push(moe.router_tensors());
                    all.extend(moe.shared.iter().map(|shared| shared.tensors()));
                }
                Ffn::None => {}
            }
        }
        all.into_iter().fold(Tensors::default(), Tensors::and)
    }
}
