//! `glm5-next` (GLM-5.3-Flash): several residual streams around Kimi delta attention, and around
//! latent attention that knows no positions and whose indexer chooses blocks by pooled keys; leading
//! dense layers, then routed and shared experts; limits on activations by layer.

use super::ModelError;
use super::blocks::{Common, moe};
use super::ffn_layers::{FfnLayers, LEAST_LIMIT, require_selection_bias};
use super::kda::{HybridHeads, KdaForm, kda_spec};
use super::mla::{IndexerOptions, MlaSizes, Queries, mla_spec, pooled_indexer, reused_selection};
use super::source::Source;
use super::spec::{
    Activation, Ffn, Gating, LayerSpec, Mixer, MlaSpec, ModelSpec, Residual, RopeKind, Selection,
};
use super::streams::Gated;

/// Epsilon in the length of queries and keys of delta attention; the same in every file.
const LENGTH_EPS: f32 = 1e-6;

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let (n_layer, hidden) = (common.n_layer, common.hidden);
    let heads = HybridHeads::read(s, n_layer)?;
    let latent = Latent::read(s, n_layer, &heads.is_kda)?;
    let streams = Gated::mixing(s, hidden)?;
    let blocks = Blocks::read(s, n_layer)?;
    let layers = (0..n_layer)
        .map(|i| {
            let mixer = if heads.is_kda[i] {
                let n_head = heads.heads[0];
                Mixer::Kda(kda_spec(
                    s,
                    i,
                    hidden,
                    n_head,
                    KdaForm::LowRank,
                    LENGTH_EPS,
                )?)
            } else {
                Mixer::Mla(latent.attention(s, i, hidden, heads.heads[i])?)
            };
            Ok(LayerSpec {
                mixer_norm: s.vector(&format!("blk.{i}.attn_norm.weight"), hidden)?,
                mixer,
                ffn_norm: s.vector(&format!("blk.{i}.ffn_norm.weight"), hidden)?,
                ffn: blocks.ffn(s, i, hidden)?,
                residual: Residual {
                    connections: Some(streams.layer(s, i)?),
                    ..Residual::default()
                },
            })
        })
        .collect::<Result<_, ModelError>>()?;
    let mut model = common.model(s, layers)?;
    model.streams = Some(streams.ending_in_mean());
    Ok(model)
}

/// What the layers of latent attention have in common.
struct Latent {
    /// By layer: whether it has an indexer.
    own: Vec<bool>,
    /// `None` where no layer attends.
    choice: Option<(IndexerOptions, Selection)>,
}

impl Latent {
    fn read(s: &Source<'_>, n_layer: usize, is_kda: &[bool]) -> Result<Self, ModelError> {
        let types = s.opt_flags("attention.indexer.types", n_layer)?;
        let types = types.unwrap_or_else(|| vec![true; n_layer]);
        let own = types.iter().zip(is_kda).map(|(own, kda)| *own && !kda);
        let attends = is_kda.contains(&false);
        let choice = || {
            let options = IndexerOptions {
                rope_kind: RopeKind::Adjacent,
                rotates_end: false,
                norm_eps: key_norm_eps(s)?,
            };
            Ok::<_, ModelError>((options, selection(s)?))
        };
        Ok(Self {
            own: own.collect(),
            choice: attends.then(choice).transpose()?,
        })
    }

    fn attention(
        &self,
        s: &Source<'_>,
        layer: usize,
        hidden: usize,
        n_head: usize,
    ) -> Result<MlaSpec, ModelError> {
        let name = "rope.dimension_count";
        if let rotated @ 1.. = s.opt_count(name)? {
            let what = format!("{rotated}; expected 0, since no part of a head rotates");
            return Err(s.bad(name, what));
        }
        let sizes = MlaSizes {
            n_head,
            key_dim: s.dim("attention.key_length_mla")?,
            value_dim: s.dim("attention.value_length_mla")?,
            kv_rank: s.dim("attention.kv_lora_rank")?,
            shared_dim: 0,
        };
        let queries = Queries::LowRank(s.dim("attention.q_lora_rank")?);
        let mut mla = mla_spec(s, layer, hidden, sizes, None, queries)?;
        if let Some((options, selection)) = self.choice {
            mla.reach = if self.own[layer] {
                pooled_indexer(s, layer, hidden, &mla, (options, selection))?
            } else {
                reused_selection(s, layer, &self.own, selection)?
            };
        }
        Ok(mla)
    }
}

/// Reads the epsilon of the layer norm of keys; 0 where the file has none.
fn key_norm_eps(s: &Source<'_>) -> Result<f32, ModelError> {
    let name = "attention.layer_norm_epsilon";
    if s.has(name) {
        s.epsilon(name)
    } else {
        Ok(0.0)
    }
}

/// Reads how many blocks of how many tokens a token attends to.
fn selection(s: &Source<'_>) -> Result<Selection, ModelError> {
    let name = "attention.indexer.top_k";
    let (top_k, block) = (s.dim(name)?, s.dim("attention.indexer.kpool")?);
    if top_k < block {
        let what = format!("{top_k}; expected at least attention.indexer.kpool {block}");
        return Err(s.bad(name, what));
    }
    Ok(Selection {
        blocks: top_k / block,
        block,
        tail: s.bool_or("attention.indexer.kpool_select_tail", true)?,
    })
}

/// Feed-forward blocks.
struct Blocks {
    layers: FfnLayers,
    /// By layer: limits in routed experts.
    expert_limits: Vec<f32>,
    /// By layer: limits in shared experts and dense blocks.
    other_limits: Vec<f32>,
}

impl Blocks {
    fn read(s: &Source<'_>, n_layer: usize) -> Result<Self, ModelError> {
        let limits = |name| s.opt_f32_per_layer(name, n_layer);
        let expert_limits = limits("swiglu_clamp_exp")?.unwrap_or_else(|| vec![0.0; n_layer]);
        let other_limits = limits("swiglu_clamp_shexp")?.unwrap_or_else(|| expert_limits.clone());
        Ok(Self {
            layers: FfnLayers::read(s, n_layer)?,
            expert_limits,
            other_limits,
        })
    }

    fn ffn(&self, s: &Source<'_>, layer: usize, hidden: usize) -> Result<Ffn, ModelError> {
        let other = activation(self.other_limits[layer]);
        if self.layers.is_dense(layer) {
            return self.layers.dense(s, layer, hidden, other);
        }
        let mut options = self.layers.options(s, layer, Gating::Sigmoid)?;
        options.activation = activation(self.expert_limits[layer]);
        let mut moe = moe(s, layer, hidden, &options)?;
        require_selection_bias(s, layer, &moe)?;
        if let Some(shared) = &mut moe.shared {
            shared.ffn.activation = other;
        }
        Ok(Ffn::Moe(moe))
    }
}

fn activation(limit: f32) -> Activation {
    if limit > LEAST_LIMIT {
        Activation::ClampedSilu { limit }
    } else {
        Activation::Silu
    }
}
