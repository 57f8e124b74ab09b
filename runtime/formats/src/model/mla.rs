//! Latent attention and its lightning indexer, in the keys and tensors that newer models share.

use super::ModelError;
use super::source::Source;
use super::spec::{
    GateFunction, IndexerSpec, KeyPool, KvUp, LowRank, MlaSpec, OutputGate, Reach, RopeKind,
    RopeSpec, Selection,
};

/// Sizes of one layer's latent attention.
#[derive(Debug, Clone, Copy)]
pub(super) struct MlaSizes {
    pub n_head: usize,
    /// Width of a whole query or key head.
    pub key_dim: usize,
    pub value_dim: usize,
    pub kv_rank: usize,
    /// Width of the key part that all heads share.
    pub shared_dim: usize,
}

impl MlaSizes {
    /// Reads the sizes from keys whose names end in `suffix`.
    pub(super) fn read(s: &Source<'_>, n_head: usize, suffix: &str) -> Result<Self, ModelError> {
        let dim = |name: &str| s.dim(&format!("attention.{name}{suffix}"));
        let key_dim = dim("key_length_mla")?;
        let name = "rope.dimension_count";
        let shared_dim = s.count(name)? as usize;
        if shared_dim >= key_dim {
            let what = format!("{shared_dim} of a head's {key_dim} values; expected fewer");
            return Err(s.bad(name, what));
        }
        Ok(Self {
            n_head,
            key_dim,
            value_dim: dim("value_length_mla")?,
            kv_rank: dim("kv_lora_rank")?,
            shared_dim,
        })
    }

    fn nope_dim(&self) -> usize {
        self.key_dim - self.shared_dim
    }

    /// Returns the rotary embedding of the shared part, if there is one to rotate.
    pub(super) fn rope(
        &self,
        s: &Source<'_>,
        kind: RopeKind,
    ) -> Result<Option<RopeSpec>, ModelError> {
        match self.shared_dim {
            0 => Ok(None),
            _ => s.rope(kind, self.key_dim).map(Some),
        }
    }
}

/// Where a layer's queries come from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Queries {
    /// One matrix.
    Plain,
    /// Two of this rank between.
    LowRank(usize),
}

/// Describes latent attention to all positions, with scores divided by the root of a head's width.
pub(super) fn mla_spec(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    sizes: MlaSizes,
    rope: Option<RopeSpec>,
    queries: Queries,
) -> Result<MlaSpec, ModelError> {
    let p = format!("blk.{layer}");
    let q_out = sizes.n_head * sizes.key_dim;
    let (q_down, q) = match queries {
        Queries::Plain => (None, s.linear(&format!("{p}.attn_q"), hidden, q_out)?),
        Queries::LowRank(rank) => {
            let down = s.linear(&format!("{p}.attn_q_a"), hidden, rank)?;
            let norm = s.vector(&format!("{p}.attn_q_a_norm.weight"), rank)?;
            (
                Some(LowRank { down, norm }),
                s.linear(&format!("{p}.attn_q_b"), rank, q_out)?,
            )
        }
    };
    let MlaSizes {
        n_head,
        value_dim,
        kv_rank,
        shared_dim,
        ..
    } = sizes;
    Ok(MlaSpec {
        n_head,
        nope_dim: sizes.nope_dim(),
        shared_dim,
        value_dim,
        kv_rank,
        scale: 1.0 / (sizes.key_dim as f32).sqrt(),
        temperature: None,
        rope,
        q_down,
        q,
        kv_down: s.linear(&format!("{p}.attn_kv_a_mqa"), hidden, kv_rank + shared_dim)?,
        kv_norm: s.vector(&format!("{p}.attn_kv_a_norm.weight"), kv_rank)?,
        shared_norm: None,
        kv_up: kv_up(s, &p, sizes, true)?,
        reach: Reach::All,
        sinks: None,
        gate: None,
        o: s.linear(&format!("{p}.attn_output"), n_head * value_dim, hidden)?,
    })
}

/// Finds the projections from the latent, which some files have both apart and together.
pub(super) fn kv_up(
    s: &Source<'_>,
    p: &str,
    sizes: MlaSizes,
    prefers_split: bool,
) -> Result<KvUp, ModelError> {
    let (k, v, fused) = (
        format!("{p}.attn_k_b.weight"),
        format!("{p}.attn_v_b.weight"),
        format!("{p}.attn_kv_b.weight"),
    );
    let (nope_dim, rank, n_head) = (sizes.nope_dim(), sizes.kv_rank, sizes.n_head);
    if !s.has_tensor(&fused) || prefers_split && s.has_tensor(&k) {
        Ok(KvUp::Split {
            k: s.tensor(&k, &[nope_dim, rank, n_head])?,
            v: s.tensor(&v, &[rank, sizes.value_dim, n_head])?,
        })
    } else {
        Ok(KvUp::Fused(s.tensor(
            &fused,
            &[rank, n_head * (nope_dim + sizes.value_dim)],
        )?))
    }
}

/// Finds the sigmoid gates on a layer's result: one per head, or one per value of each head.
pub(super) fn sigmoid_gate(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    n_gate: usize,
) -> Result<OutputGate, ModelError> {
    Ok(OutputGate::Separate {
        linear: s.linear(&format!("blk.{layer}.attn_gate"), hidden, n_gate)?,
        function: GateFunction::Sigmoid,
    })
}

/// How an architecture's indexer differs from others'.
#[derive(Debug, Clone, Copy)]
pub(super) struct IndexerOptions {
    pub rope_kind: RopeKind,
    /// Whether the last values of a query or key rotate instead of the first.
    pub rotates_end: bool,
    /// Epsilon of the layer norm of keys.
    pub norm_eps: f32,
}

/// Describes a layer's lightning indexer, which rotates as the attention does but for `options`.
pub(super) fn indexer(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    attention: &MlaSpec,
    options: IndexerOptions,
) -> Result<Reach, ModelError> {
    let top_k = s.dim("attention.indexer.top_k")?;
    let selection = Selection::of_positions(top_k);
    indexer_spec(s, layer, hidden, attention, (options, selection))
        .map(|spec| Reach::Indexed(Box::new(spec)))
}

/// Describes a layer's lightning indexer that rates blocks by a key that is made of their tokens'.
pub(super) fn pooled_indexer(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    attention: &MlaSpec,
    options: (IndexerOptions, Selection),
) -> Result<Reach, ModelError> {
    let mut spec = indexer_spec(s, layer, hidden, attention, options)?;
    let (p, dim) = (format!("blk.{layer}.indexer_compressor"), spec.key_dim);
    spec.pool = Some(KeyPool {
        gate: s.linear(&format!("{p}_gate"), hidden, dim)?,
        ape: s.parameters(&format!("{p}_ape.weight"), &[dim, spec.selection.block])?,
    });
    Ok(Reach::Indexed(Box::new(spec)))
}

fn indexer_spec(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    attention: &MlaSpec,
    (options, selection): (IndexerOptions, Selection),
) -> Result<IndexerSpec, ModelError> {
    let n_head = s.dim("attention.indexer.head_count")?;
    let name = "attention.indexer.key_length";
    let key_dim = s.dim(name)?;
    let rope = attention.rope.as_ref().map(|rope| RopeSpec {
        kind: options.rope_kind,
        ..rope.clone()
    });
    let rotating = rope.as_ref().map_or(0, |rope| rope.dims);
    if rotating > key_dim {
        let what = format!("{key_dim}, but {rotating} values of a key rotate");
        return Err(s.bad(name, what));
    }
    let Some(low) = &attention.q_down else {
        let what = "is missing; the indexer reads compressed queries";
        return Err(s.bad("attention.q_lora_rank", what));
    };
    let p = format!("blk.{layer}.indexer");
    Ok(IndexerSpec {
        n_head,
        key_dim,
        selection,
        scale: 1.0 / (n_head as f32 * key_dim as f32).sqrt(),
        rope_first: if options.rotates_end {
            key_dim - rotating
        } else {
            0
        },
        rope,
        norm_eps: options.norm_eps,
        q: s.linear(&format!("{p}.attn_q_b"), low.down.n_out, n_head * key_dim)?,
        k: s.linear(&format!("{p}.attn_k"), hidden, key_dim)?,
        k_norm: s.vector(&format!("{p}.k_norm.weight"), key_dim)?,
        k_norm_bias: s.vector(&format!("{p}.k_norm.bias"), key_dim)?,
        head_weights: s.linear(&format!("{p}.proj"), hidden, n_head)?,
        pool: None,
    })
}

/// Returns what a layer without an indexer attends to: what the last layer before it with one
/// chose. `own` says by layer which have one.
pub(super) fn reused(s: &Source<'_>, layer: usize, own: &[bool]) -> Result<Reach, ModelError> {
    let top_k = s.dim("attention.indexer.top_k")?;
    reused_selection(s, layer, own, Selection::of_positions(top_k))
}

/// Does what [`reused`] does, for a selection of blocks.
pub(super) fn reused_selection(
    s: &Source<'_>,
    layer: usize,
    own: &[bool],
    selection: Selection,
) -> Result<Reach, ModelError> {
    if own[..layer].contains(&true) {
        return Ok(Reach::Reused(selection));
    }
    let what = format!("layer {layer} has no indexer, and no layer before it has one to share");
    Err(s.bad("attention.indexer.types", what))
}
