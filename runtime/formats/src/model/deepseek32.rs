//! `deepseek32` and `glm-dsa`: DeepSeek V3.2 and GLM-5. The latent attention of DeepSeek V3 with a
//! lightning indexer, leading dense layers, then routed and shared experts.
//!
//! In GLM-5 pairs rotate in the order of the attention in the indexer too, and layers may reuse what
//! an earlier one chose.

use super::ModelError;
use super::blocks::{Common, heads};
use super::ffn_layers::{FfnLayers, require_gating};
use super::mla::{IndexerOptions, MlaSizes, Queries, indexer, mla_spec, reused};
use super::source::Source;
use super::spec::{
    Gating, LayerSpec, Mixer, MlaSpec, ModelSpec, Residual, RopeKind, RopeScaling, RopeSpec,
};

/// Epsilon of the layer norm of the indexer's keys; the same in every file.
const INDEXER_NORM_EPS: f32 = 1e-6;

/// Contexts from which on files without a list of indexers are GLM-5.2, most of whose layers have
/// none.
const SHARED_INDEXER_CONTEXT: usize = 1 << 20;

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let (n_layer, hidden) = (common.n_layer, common.hidden);
    let is_glm = s.arch() == "glm-dsa";
    let own = if is_glm {
        own_indexers(s, n_layer, common.context)?
    } else {
        require_gating(s)?;
        vec![true; n_layer]
    };
    let heads = heads(s, n_layer)?;
    let ffn = FfnLayers::read(s, n_layer)?;
    let q_rank = s.dim("attention.q_lora_rank")?;
    let options = IndexerOptions {
        rope_kind: if is_glm {
            RopeKind::Adjacent
        } else {
            RopeKind::Halves
        },
        rotates_end: false,
        norm_eps: INDEXER_NORM_EPS,
    };
    let layers = (0..n_layer)
        .map(|i| {
            let sizes = MlaSizes::read(s, heads[i].n_head, "")?;
            let rope = sizes.rope(s, RopeKind::Adjacent)?;
            let mut mla = mla_spec(s, i, hidden, sizes, rope, Queries::LowRank(q_rank))?;
            sharpen(s, &mut mla, is_glm)?;
            mla.reach = if own[i] {
                indexer(s, i, hidden, &mla, options)?
            } else {
                reused(s, i, &own)?
            };
            Ok(LayerSpec {
                mixer_norm: s.vector(&format!("blk.{i}.attn_norm.weight"), hidden)?,
                mixer: Mixer::Mla(mla),
                ffn_norm: s.vector(&format!("blk.{i}.ffn_norm.weight"), hidden)?,
                ffn: ffn.ffn(s, i, hidden, Gating::Sigmoid)?,
                residual: Residual::default(),
            })
        })
        .collect::<Result<_, ModelError>>()?;
    common.model(s, layers)
}

/// Reads by layer of GLM-5 whether it has an indexer of its own.
fn own_indexers(s: &Source<'_>, n_layer: usize, context: usize) -> Result<Vec<bool>, ModelError> {
    if let Some(flags) = s.opt_flags("attention.indexer.types", n_layer)? {
        return Ok(flags);
    }
    let has_own = |layer: usize| layer < 3 || layer % 4 == 2;
    Ok((0..n_layer)
        .map(|layer| context < SHARED_INDEXER_CONTEXT || has_own(layer))
        .collect())
}

/// Sharpens attention for a context that YaRN has extended by `f`.
///
/// With `ms(m) = 1 + 0.1 m ln f` and `L` ten times the file's multiplier, what rotates has a
/// magnitude of `ms(1) / ms(L)`, and scores a factor of `ms(1)²` (reference code of DeepSeek V3).
fn sharpen(s: &Source<'_>, mla: &mut MlaSpec, is_glm: bool) -> Result<(), ModelError> {
    let name = "rope.scaling.yarn_log_multiplier";
    let multiplier = if is_glm { 0.0 } else { s.f32_or(name, 0.0)? };
    let Some(rope) = &mut mla.rope else {
        return Ok(());
    };
    fix_betas(rope);
    let (factor, magnitude) = match rope.scaling {
        RopeScaling::None => (1.0, rope.magnitude),
        // Written for YaRN, but the reference engine has no such condition.
        RopeScaling::Linear(factor) => {
            let both = (1.0 + 0.1 * factor.ln()) * (1.0 + multiplier * factor.ln());
            (1.0, rope.magnitude * both)
        }
        RopeScaling::Yarn { factor, .. } => (factor, rope.magnitude),
    };
    rope.magnitude /= 1.0 + multiplier * factor.ln();
    mla.scale *= magnitude * magnitude;
    if mla.scale.is_finite() && rope.magnitude.is_finite() {
        return Ok(());
    }
    let what = format!(
        "{multiplier} makes the factor on attention scores {}",
        mla.scale
    );
    Err(s.bad(name, what))
}

/// Sets the bounds of YaRN's ramp, which files of this family don't.
fn fix_betas(rope: &mut RopeSpec) {
    if let RopeScaling::Yarn {
        beta_fast,
        beta_slow,
        ..
    } = &mut rope.scaling
    {
        (*beta_fast, *beta_slow) = (32.0, 1.0);
    }
}
