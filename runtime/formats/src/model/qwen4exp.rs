//! `qwen4exp`: gated delta nets and block-sparse attention as in `qwen3next`'s line, between several
//! residual streams, with a table of n-grams before one of the layers.

use super::ModelError;
use super::blocks::{Common, MoeOptions, Shared, expert_widths, moe};
use super::qwen2moe::shared_widths;
use super::qwen3next::{Heads, delta, gated_attention, recurrent_layers};
use super::source::Source;
use super::spec::{
    BlockIndex, BlockScore, Connection, Connections, DeltaGate, Ffn, GqaSpec, LayerSpec, Mixer,
    ModelSpec, NgramBlock, NgramHead, NgramTable, Residual, StreamsEnd, StreamsSpec,
};
use super::streams::LowRankStreams;
use tier_plan_kernels::MAX_CONV_TAPS;

/// Bound on the length of n-grams, far above any real table's.
const MAX_NGRAM: usize = 16;

/// Bound on the heads per length of n-grams.
const MAX_NGRAM_HEADS: usize = 1024;

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let (hidden, n_layer) = (common.hidden, common.n_layer);
    let streams = LowRankStreams::read(s, hidden)?;
    let recurrent = recurrent_layers(s, n_layer)?;
    let heads = Heads::read(s, n_layer)?;
    let ratios = block_lengths(s, n_layer)?;
    let widths = expert_widths(s, n_layer)?;
    let shared = shared_widths(s, n_layer)?;
    let ngrams = ngrams(s, hidden, &recurrent)?;
    let layers = (0..n_layer)
        .map(|i| {
            let shared = Some(Shared {
                ffn: shared[i],
                gated: true,
            });
            let options = MoeOptions {
                shared,
                ..MoeOptions::softmax(widths[i], true)
            };
            let around = |block: &str| streams.tensors(s, &format!("blk.{i}.hc_{block}"), true);
            let (mixer, ffn) = (around("attn")?, around("ffn")?);
            let connections = Connections {
                mixer: Connection::LowRank(mixer),
                ffn: Connection::LowRank(ffn),
            };
            let has_ngrams = ngrams.as_ref().is_some_and(|(layer, _)| *layer == i);
            let ngram = has_ngrams.then(|| ngram_block(s, i, hidden, streams.n));
            Ok(LayerSpec {
                residual: Residual {
                    connections: Some(connections),
                    ngram: ngram.transpose()?,
                    ..Residual::default()
                },
                mixer_norm: mixer.norm,
                mixer: if recurrent[i] {
                    let mut delta = delta(s, i, hidden)?;
                    delta.gate = DeltaGate::Sigmoid;
                    Mixer::Delta(delta)
                } else {
                    Mixer::Gqa(attention(s, i, hidden, &heads, ratios[i])?)
                },
                ffn_norm: ffn.norm,
                ffn: Ffn::Moe(moe(s, i, hidden, &options)?),
            })
        })
        .collect::<Result<_, ModelError>>()?;
    let end = streams.tensors(s, "output_hc", false)?;
    let mut model = common.model_ending_in(s, end.norm, layers)?;
    model.streams = Some(StreamsSpec {
        n: streams.n,
        end: StreamsEnd::LowRank(end),
    });
    model.ngrams = ngrams.map(|(_, table)| table);
    Ok(model)
}

/// Reads by layer how many tokens share a key of its index; 0 in layers that attend to everything.
fn block_lengths(s: &Source<'_>, n_layer: usize) -> Result<Vec<usize>, ModelError> {
    let name = "attention.compress_ratios";
    if !s.has(name) {
        return Ok(vec![0; n_layer]);
    }
    let ratios = s.counts_per_layer(name, n_layer)?;
    let mut sparse = ratios.iter().filter(|ratio| **ratio > 0);
    if let Some(first) = sparse.next() {
        let top_k = s.dim("attention.indexer.top_k")?;
        let fits = *first > 1 && top_k.is_multiple_of(*first as usize);
        if !fits || sparse.any(|ratio| ratio != first) {
            let what = format!(
                "{ratios:?}; expected 0 or one number above 1 that divides \
                 attention.indexer.top_k {top_k}"
            );
            return Err(s.bad(name, what));
        }
    }
    Ok(ratios.into_iter().map(|ratio| ratio as usize).collect())
}

fn attention(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    heads: &Heads,
    block: usize,
) -> Result<GqaSpec, ModelError> {
    let mut spec = gated_attention(s, layer, hidden, heads)?;
    if let Some(rope) = &mut spec.rope {
        // All axes of a text are at the same place.
        rope.sections = None;
    }
    if block > 0 {
        let top_k = s.dim("attention.indexer.top_k")?;
        let choice = Choice {
            n_head: s.dim("attention.indexer.head_count")?,
            block,
            kept: top_k / block,
            score: BlockScore::Mean,
        };
        spec.index = Some(block_index(s, layer, hidden, choice, &spec)?);
    }
    Ok(spec)
}

/// What a block-sparse index chooses.
pub(super) struct Choice {
    pub(super) n_head: usize,
    pub(super) block: usize,
    pub(super) kept: usize,
    pub(super) score: BlockScore,
}

/// Finds the index of an attention layer.
pub(super) fn block_index(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    choice: Choice,
    attention: &GqaSpec,
) -> Result<BlockIndex, ModelError> {
    let name = "attention.indexer.key_length";
    let key_dim = s.dim(name)?;
    let rotated = attention.rope.as_ref().map_or(0, |rope| rope.dims);
    if key_dim < rotated {
        let what = format!("{key_dim}; expected at least the {rotated} values that rotate");
        return Err(s.bad(name, what));
    }
    let p = format!("blk.{layer}.indexer");
    Ok(BlockIndex {
        n_head: choice.n_head,
        key_dim,
        q: s.linear(&format!("{p}.q_proj"), hidden, choice.n_head * key_dim)?,
        k: s.linear(&format!("{p}.k_proj"), hidden, key_dim)?,
        q_norm: s.vector(&format!("{p}.q_norm.weight"), key_dim)?,
        k_norm: s.vector(&format!("{p}.k_norm.weight"), key_dim)?,
        block: choice.block,
        kept: choice.kept,
        score: choice.score,
    })
}

/// Reads the table of n-grams and the layer that it is for, where a file has one.
fn ngrams(
    s: &Source<'_>,
    hidden: usize,
    recurrent: &[bool],
) -> Result<Option<(usize, NgramTable)>, ModelError> {
    let name = "ple.layers";
    let layer = match s.layer_numbers(name)?.as_slice() {
        [] => return Ok(None),
        [layer] => *layer as usize,
        more => {
            let what = format!("{} layers; supported: one", more.len());
            return Err(s.bad(name, what));
        }
    };
    if !recurrent.get(layer).copied().unwrap_or(false) {
        let what = format!("layer {layer}; expected a layer with a delta net");
        return Err(s.bad(name, what));
    }
    let size = |key, max| s.in_bounds(key, s.dim(key)?, max);
    let n = size("ple.ngram_size", MAX_NGRAM)?;
    if n < 2 {
        return Err(s.bad("ple.ngram_size", format!("{n}; expected at least 2")));
    }
    let heads_per_order = size("ple.heads_per_ngram", MAX_NGRAM_HEADS)?;
    let n_heads = (n - 1) * heads_per_order;
    let key = "embedding_length_per_layer_input";
    let width = s.dim(key)?;
    if width.checked_mul(n_heads) != Some(hidden) {
        let what = format!("{width}; expected the {n_heads}th part of {hidden}");
        return Err(s.bad(key, what));
    }
    let (table, n_rows) = s.table("per_layer_token_embd.weight", width)?;
    let first = s.u64_array("ple.head_offsets", n_heads)?;
    let rows = s.u64_array("ple.head_vocab_sizes", n_heads)?;
    let heads: Vec<NgramHead> = first
        .into_iter()
        .zip(rows)
        .map(|(first, n)| NgramHead { first, n })
        .collect();
    let fits = |head: &NgramHead| {
        let end = head.first.checked_add(head.n);
        head.n > 0 && end.is_some_and(|end| end <= n_rows as u64)
    };
    if let Some(head) = heads.iter().find(|head| !fits(head)) {
        let what = format!(
            "{} rows from row {} on; expected at least one of the table's {n_rows}",
            head.n, head.first
        );
        return Err(s.bad("ple.head_vocab_sizes", what));
    }
    let table = NgramTable {
        table,
        n_rows,
        width,
        n,
        heads_per_order,
        multipliers: s.u64_array("ple.layer_multipliers", n)?,
        heads,
        end_token: s.number("ple.eos_token_id")?,
    };
    Ok(Some((layer, table)))
}

fn ngram_block(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    n_streams: usize,
) -> Result<NgramBlock, ModelError> {
    let key = "ple.conv_kernel";
    let taps = s.in_bounds(key, s.dim(key)?, MAX_CONV_TAPS)?;
    let (p, width) = (format!("blk.{layer}.ple"), n_streams * hidden);
    let norm = |of: &str| s.vector(&format!("{p}_norm_{of}.weight"), width);
    Ok(NgramBlock {
        key: s.linear(&format!("{p}_key"), hidden, width)?,
        value: s.linear(&format!("{p}_value"), hidden, hidden)?,
        key_norm: norm("key")?,
        query_norm: norm("query")?,
        conv_norm: norm("conv")?,
        conv: s.parameters(&format!("{p}_conv1d.weight"), &[taps, width])?,
        taps,
        dilation: s.dim("ple.ngram_size")?,
    })
}
