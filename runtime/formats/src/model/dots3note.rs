//! `dots3note` (dots3-note): latent attention of two sizes, with a sliding window in some layers and
//! a lightning indexer in the others; gates per head; leading dense layers, then routed and shared
//! experts.

use super::ModelError;
use super::blocks::{Common, heads, moe};
use super::ffn_layers::{FfnLayers, require_gating, require_selection_bias};
use super::mla::{IndexerOptions, MlaSizes, Queries, indexer, mla_spec, sigmoid_gate};
use super::source::Source;
use super::spec::{
    Activation, Ffn, Gating, LayerSpec, Mixer, MlaSpec, ModelSpec, Reach, Residual, RopeKind,
};

/// The indexer: its pairs are halves, where those of the attention are neighbors.
const INDEXER: IndexerOptions = IndexerOptions {
    rope_kind: RopeKind::Halves,
    rotates_end: false,
    norm_eps: 1e-6,
};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let (n_layer, hidden) = (common.n_layer, common.hidden);
    let windowed = windowed(s, n_layer)?;
    let heads = heads(s, n_layer)?;
    s.count("leading_dense_block_count")?;
    require_gating(s)?;
    let blocks = FfnLayers::read(s, n_layer)?;
    let layers = (0..n_layer)
        .map(|i| {
            let ffn = if blocks.is_dense(i) {
                blocks.dense(s, i, hidden, Activation::Silu)?
            } else {
                let moe = moe(s, i, hidden, &blocks.options(s, i, Gating::Sigmoid)?)?;
                require_selection_bias(s, i, &moe)?;
                Ffn::Moe(moe)
            };
            Ok(LayerSpec {
                mixer_norm: s.vector(&format!("blk.{i}.attn_norm.weight"), hidden)?,
                mixer: Mixer::Mla(attention(s, i, hidden, heads[i].n_head, windowed[i])?),
                ffn_norm: s.vector(&format!("blk.{i}.ffn_norm.weight"), hidden)?,
                ffn,
                residual: Residual::default(),
            })
        })
        .collect::<Result<_, ModelError>>()?;
    common.model(s, layers)
}

/// Reads by layer whether it has a window; all others have indexers.
fn windowed(s: &Source<'_>, n_layer: usize) -> Result<Vec<bool>, ModelError> {
    let name = "attention.sliding_window_pattern";
    let Some(windowed) = s.opt_flags(name, n_layer)? else {
        return Err(s.bad(name, "is missing; expected a flag for each layer"));
    };
    let name = "attention.indexer.types";
    let Some(indexed) = s.opt_flags(name, n_layer)? else {
        return Err(s.bad(name, "is missing; expected a flag for each layer"));
    };
    match windowed.iter().zip(indexed).position(|(w, i)| *w == i) {
        None => Ok(windowed),
        Some(layer) => {
            let what = format!("layer {layer}; expected an indexer in each layer without a window");
            Err(s.bad(name, what))
        }
    }
}

fn attention(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    n_head: usize,
    windowed: bool,
) -> Result<MlaSpec, ModelError> {
    let sizes = MlaSizes::read(s, n_head, if windowed { "_swa" } else { "" })?;
    let mut rope = sizes.rope(s, RopeKind::Adjacent)?;
    if let (true, Some(rope)) = (windowed, &mut rope) {
        rope.base = s.rope_base("rope.freq_base_swa", rope.base)?;
    }
    let queries = Queries::LowRank(s.dim("attention.q_lora_rank")?);
    let mut mla = mla_spec(s, layer, hidden, sizes, rope, queries)?;
    if sizes.shared_dim > 0 {
        let name = format!("blk.{layer}.attn_k_norm.weight");
        mla.shared_norm = Some(s.vector(&name, sizes.shared_dim)?);
    }
    mla.gate = Some(sigmoid_gate(s, layer, hidden, n_head)?);
    mla.reach = if windowed {
        Reach::Window(s.dim("attention.sliding_window")?)
    } else {
        indexer(s, layer, hidden, &mla, INDEXER)?
    };
    Ok(mla)
}
