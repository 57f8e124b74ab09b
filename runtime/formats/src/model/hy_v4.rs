//! `hy_v4` (Hy4): several residual streams around latent attention with sinks, elementwise gates
//! and, in most models, a lightning indexer that later layers share; leading dense layers, then
//! routed experts with a limit beside shared ones without.

use super::ModelError;
use super::blocks::{Common, heads, moe};
use super::ffn_layers::{FfnLayers, LEAST_LIMIT, require_gating};
use super::mla::{IndexerOptions, MlaSizes, Queries, indexer, mla_spec, reused, sigmoid_gate};
use super::source::Source;
use super::spec::{
    Activation, Ffn, Gating, LayerSpec, Mixer, MlaSpec, ModelSpec, Reach, Residual, RopeKind,
};
use super::streams::Gated;

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let (n_layer, hidden) = (common.n_layer, common.hidden);
    let own = own_indexers(s, n_layer)?;
    let heads = heads(s, n_layer)?;
    let streams = Gated::plain(s, hidden)?;
    let limits = s.opt_f32_per_layer("swiglu_clamp_exp", n_layer)?;
    let limits = limits.unwrap_or_else(|| vec![0.0; n_layer]);
    let blocks = FfnLayers::read(s, n_layer)?;
    require_gating(s)?;
    let layers = (0..n_layer)
        .map(|i| {
            let ffn = if blocks.is_dense(i) {
                blocks.dense(s, i, hidden, Activation::Silu)?
            } else {
                let mut options = blocks.options(s, i, Gating::Sigmoid)?;
                if limits[i] > LEAST_LIMIT {
                    options.activation = Activation::ClampedSilu { limit: limits[i] };
                }
                Ffn::Moe(moe(s, i, hidden, &options)?)
            };
            let n_head = heads[i].n_head;
            let attention = attention(s, i, hidden, n_head, common.norm_eps, &own)?;
            Ok(LayerSpec {
                mixer_norm: s.vector(&format!("blk.{i}.attn_norm.weight"), hidden)?,
                mixer: Mixer::Mla(attention),
                ffn_norm: s.vector(&format!("blk.{i}.ffn_norm.weight"), hidden)?,
                ffn,
                residual: Residual {
                    connections: Some(streams.layer(s, i)?),
                    ..Residual::default()
                },
            })
        })
        .collect::<Result<_, ModelError>>()?;
    let mut model = common.model(s, layers)?;
    model.streams = Some(streams.ending_in_sum(s)?);
    Ok(model)
}

/// Reads by layer whether it has an indexer of its own; nothing where attention is to all
/// positions.
fn own_indexers(s: &Source<'_>, n_layer: usize) -> Result<Vec<bool>, ModelError> {
    if s.opt_count("attention.indexer.top_k")? == 0 {
        return Ok(Vec::new());
    }
    let name = "attention.indexer.types";
    match s.opt_flags(name, n_layer)? {
        Some(own) => Ok(own),
        None => Err(s.bad(name, "is missing; expected a flag for each layer")),
    }
}

fn attention(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    n_head: usize,
    norm_eps: f32,
    own: &[bool],
) -> Result<MlaSpec, ModelError> {
    let sizes = MlaSizes::read(s, n_head, "")?;
    let rope = sizes.rope(s, RopeKind::Adjacent)?;
    let queries = Queries::LowRank(s.dim("attention.q_lora_rank")?);
    let mut mla = mla_spec(s, layer, hidden, sizes, rope, queries)?;
    mla.sinks = Some(s.vector(&format!("blk.{layer}.attn_sinks.weight"), n_head)?);
    mla.gate = Some(sigmoid_gate(s, layer, hidden, n_head * sizes.value_dim)?);
    mla.reach = match own.get(layer) {
        None => Reach::All,
        Some(true) => {
            let options = IndexerOptions {
                rope_kind: RopeKind::Adjacent,
                rotates_end: true,
                norm_eps,
            };
            indexer(s, layer, hidden, &mla, options)?
        }
        Some(false) => reused(s, layer, own)?,
    };
    Ok(mla)
}
