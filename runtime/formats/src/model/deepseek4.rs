//! `deepseek4`: attention to a window and to compressed blocks, between several residual streams;
//! the first layers' experts are chosen by the token itself.

use super::ModelError;
use super::blocks::{Common, MoeOptions, Setting, Shared, moe, shared_by_count};
use super::source::Source;
use super::spec::{
    Activation, CompressedIndex, CompressedSpec, Compressor, FarKeys, Ffn, Gating, LayerSpec,
    LowRank, Mixer, ModelSpec, MoeSpec, Residual, RopeKind, RopeScaling, RopeSpec,
};
use super::streams::Gated;

/// Blocks that overlap, and whose vectors an index chooses.
const SHORT_BLOCK: usize = 4;

/// Blocks all of whose vectors are seen.
const LONG_BLOCK: usize = 128;

/// Bound on the tokens of a window, far above any real one's: nothing in the file is as large as
/// their vectors.
const MAX_WINDOW: usize = 1 << 16;

/// Clamps up to this stand for none.
const NO_CLAMP: f32 = 1e-6;

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let (hidden, n_layer) = (common.hidden, common.n_layer);
    s.require(&[
        "attention.compress_ratios",
        "attention.key_length",
        "rope.dimension_count",
        "hash_layer_count",
        "expert_gating_func",
        "expert_weights_norm",
        "expert_weights_scale",
        "swiglu_clamp_exp",
    ])?;
    let ratios = s.counts_per_layer("attention.compress_ratios", n_layer)?;
    let streams = Gated::mixing(s, hidden)?;
    let clamps = Clamps::read(s, n_layer)?;
    let n_hashed = s.opt_count("hash_layer_count")? as usize;
    let layers = (0..n_layer)
        .map(|i| {
            let mixer = attention(s, i, hidden, ratios[i] as usize)?;
            let mut moe = experts(s, i, hidden, &clamps)?;
            if i < n_hashed {
                let (_, n_vocab) = s.embedding(hidden)?;
                let name = format!("blk.{i}.ffn_gate_tid2eid.weight");
                moe.by_token = Some(s.numbers(&name, &[moe.n_used, n_vocab])?);
                moe.selection_bias = None;
            }
            Ok(LayerSpec {
                residual: Residual {
                    connections: Some(streams.layer(s, i)?),
                    ..Residual::default()
                },
                mixer_norm: s.vector(&format!("blk.{i}.attn_norm.weight"), hidden)?,
                mixer: Mixer::Compressed(Box::new(mixer)),
                ffn_norm: s.vector(&format!("blk.{i}.ffn_norm.weight"), hidden)?,
                ffn: Ffn::Moe(moe),
            })
        })
        .collect::<Result<_, ModelError>>()?;
    let mut model = common.model(s, layers)?;
    model.streams = Some(streams.ending_in_sum(s)?);
    Ok(model)
}

fn attention(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    ratio: usize,
) -> Result<CompressedSpec, ModelError> {
    let (n_head, key_dim) = (
        s.dim("attention.head_count")?,
        s.dim("attention.key_length")?,
    );
    if s.opt_dim("attention.value_length")?
        .is_some_and(|dim| dim != key_dim)
    {
        let what = format!("keys are values, so expected attention.key_length {key_dim}");
        return Err(s.bad("attention.value_length", what));
    }
    let n_group = s.dim("attention.output_group_count")?;
    if !n_head.is_multiple_of(n_group) {
        let what = format!("{n_group} does not divide the {n_head} heads");
        return Err(s.bad("attention.output_group_count", what));
    }
    let rank = s.dim("attention.q_lora_rank")?;
    let o_width = n_group * s.dim("attention.output_lora_rank")?;
    let p = format!("blk.{layer}");
    let linear = |name: &str, n_in, n_out| s.linear(&format!("{p}.{name}"), n_in, n_out);
    let vector = |name: &str, len| s.vector(&format!("{p}.{name}"), len);
    let rope = rope(s, key_dim, ratio)?;
    let window = "attention.sliding_window";
    Ok(CompressedSpec {
        n_head,
        key_dim,
        scale: 1.0 / (key_dim as f32).sqrt(),
        q_down: LowRank {
            down: linear("attn_q_a", hidden, rank)?,
            norm: vector("attn_q_a_norm.weight", rank)?,
        },
        q: linear("attn_q_b", rank, n_head * key_dim)?,
        kv: linear("attn_kv", hidden, key_dim)?,
        kv_norm: vector("attn_kv_a_norm.weight", key_dim)?,
        sinks: vector("attn_sinks.weight", n_head)?,
        window: s.in_bounds(window, s.dim(window)?, MAX_WINDOW)?,
        far: far(s, &p, (hidden, key_dim, rank), ratio, rope.dims)?,
        n_group,
        o_down: linear("attn_output_a", n_head / n_group * key_dim, o_width)?,
        o: linear("attn_output_b", o_width, hidden)?,
        rope,
    })
}

/// Reads the rotation of a layer: with a base of its own and YaRN where blocks are compressed.
fn rope(s: &Source<'_>, key_dim: usize, ratio: usize) -> Result<RopeSpec, ModelError> {
    let mut rope = s.rope(RopeKind::Adjacent, key_dim)?;
    rope.magnitude = 1.0;
    if ratio == 0 {
        rope.scaling = RopeScaling::None;
        return Ok(rope);
    }
    let base = "attention.compress_rope_freq_base";
    s.require(&[base])?;
    rope.base = s.rope_base(base, 0.0)?;
    if let RopeScaling::Yarn {
        beta_fast,
        beta_slow,
        ..
    } = &mut rope.scaling
    {
        (*beta_fast, *beta_slow) = (32.0, 1.0);
    }
    Ok(rope)
}

/// Finds what compresses the blocks of a layer, if anything does.
fn far(
    s: &Source<'_>,
    prefix: &str,
    (hidden, key_dim, rank): (usize, usize, usize),
    ratio: usize,
    rotated: usize,
) -> Result<Option<FarKeys>, ModelError> {
    let overlap = match ratio {
        0 => return Ok(None),
        SHORT_BLOCK => true,
        LONG_BLOCK => false,
        _ => {
            let what = format!("{ratio}; supported: 0, {SHORT_BLOCK}, and {LONG_BLOCK}");
            return Err(s.bad("attention.compress_ratios", what));
        }
    };
    let compressor = |name: &str, width: usize| {
        let p = format!("{prefix}.{name}");
        let rows = if overlap { 2 * width } else { width };
        Ok::<_, ModelError>(Compressor {
            ratio,
            overlap,
            kv: s.linear(&format!("{p}_kv"), hidden, rows)?,
            gate: s.linear(&format!("{p}_gate"), hidden, rows)?,
            ape: s.parameters(&format!("{p}_ape.weight"), &[rows, ratio])?,
            norm: s.vector(&format!("{p}_norm.weight"), width)?,
        })
    };
    let index = || {
        let n_head = s.dim("attention.indexer.head_count")?;
        let name = "attention.indexer.key_length";
        let dim = s.dim(name)?;
        if dim < rotated {
            let what = format!("{dim}; expected at least the {rotated} values that rotate");
            return Err(s.bad(name, what));
        }
        Ok(CompressedIndex {
            n_head,
            key_dim: dim,
            kept: s.dim("attention.indexer.top_k")?,
            compressor: compressor("indexer_compressor", dim)?,
            q: s.linear(&format!("{prefix}.indexer.attn_q_b"), rank, n_head * dim)?,
            weights: s.linear(&format!("{prefix}.indexer.proj"), hidden, n_head)?,
        })
    };
    Ok(Some(FarKeys {
        compressor: compressor("attn_compressor", key_dim)?,
        index: overlap.then(index).transpose()?,
    }))
}

/// Bounds on the inputs of SwiGLU, by layer.
struct Clamps {
    routed: Vec<f32>,
    shared: Vec<f32>,
}

impl Clamps {
    fn read(s: &Source<'_>, n_layer: usize) -> Result<Self, ModelError> {
        let of = |name| s.opt_f32_per_layer(name, n_layer);
        let routed = of("swiglu_clamp_exp")?.unwrap_or_else(|| vec![0.0; n_layer]);
        let shared = of("swiglu_clamp_shexp")?.unwrap_or_else(|| routed.clone());
        Ok(Self { routed, shared })
    }
}

fn activation(limit: f32) -> Activation {
    if limit > NO_CLAMP {
        Activation::ClampedSilu { limit }
    } else {
        Activation::Silu
    }
}

fn experts(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    clamps: &Clamps,
) -> Result<MoeSpec, ModelError> {
    let width = s.dim("expert_feed_forward_length")?;
    let shared = shared_by_count(s, width)?;
    let options = MoeOptions {
        expert_ffn: width,
        gating: Setting::Default(Gating::SqrtSoftplus),
        normalize: Setting::Default(false),
        scale: Setting::Default(0.0),
        activation: activation(clamps.routed[layer]),
        shared: shared.map(|ffn| Shared { ffn, gated: false }),
    };
    let mut moe = moe(s, layer, hidden, &options)?;
    if moe.gating != Gating::SqrtSoftplus {
        let what = format!("{:?}; supported: 4, the root of the softplus", moe.gating);
        return Err(s.bad("expert_gating_func", what));
    }
    if let Some(shared) = &mut moe.shared {
        shared.ffn.activation = activation(clamps.shared[layer]);
    }
    Ok(moe)
}
