//! Whether the parts of a model that a plan places on GPUs can run there.
//!
//! A part runs where its weights are: a layer's mixer (with its KV cache), its router, its shared
//! expert or dense block, the head, and the embedding. The hidden state is copied to where the next
//! part runs.

use super::factors;
use crate::error::LoadError;
use crate::layers::places::Places;
use tier_plan_cuda::ops::{MAX_DELTA_HEAD, MAX_EXPERTS, MAX_GROUPS, MAX_KEY};
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::spec::{
    Activation, DeltaGate, Ffn, GateUp, GatedFfn, Gating, GqaSpec, HeadOptions, KvUp, LayerSpec,
    Linear, Mixer, MlaSpec, ModelSpec, OutputGate, Reach, WindowKind,
};
use tier_plan_formats::placement::{Placement, PlanTier, TierIdx};

/// What no part of a model on a GPU can read or write.
const SEVERAL_STREAMS: &str = "several streams of the residual (hyper-connections)";

/// Name of the KV cache in [`LoadError::OnGpu`], which is not a tensor group.
const KV_CACHE: &str = "kv_cache";

/// Rejects a plan that places a part on a GPU which can't run it.
///
/// # Errors
/// Names the part, the tier, and the reason.
pub(crate) fn check(gguf: &Gguf, spec: &ModelSpec, plan: &Placement) -> Result<(), LoadError> {
    let places = Places::new(plan, spec.layers.len());
    factors::check(gguf, spec, plan, &places)?;
    let rejected =
        |tier: TierIdx, layer: usize, group: &'static str, why: String| LoadError::OnGpu {
            plan: plan.name.clone(),
            tier: plan
                .tiers
                .get(tier)
                .map(|t| t.tier.name.clone())
                .unwrap_or_default(),
            group,
            layer,
            why,
        };
    let cache = plan
        .tiers
        .get(plan.kv_tier)
        .filter(|t| t.tier.is_gpu())
        .map(|_| plan.kv_tier);
    for (place, group, why) in [
        (places.embedding, "embedding", embedding(spec)),
        (places.head, "head", head(spec)),
    ] {
        if let (Some(tier), Some(why)) = (place, why) {
            // They follow the last layer, or precede the first.
            let layer = if group == "head" {
                spec.layers.len()
            } else {
                0
            };
            return Err(rejected(tier, layer, group, why));
        }
    }
    if let Some((tier, index, why)) = experts(spec, plan).next() {
        return Err(rejected(tier, index, "experts", why));
    }
    for (index, (layer, at)) in spec.layers.iter().zip(&places.layers).enumerate() {
        if let (None, Some(tier)) = (at.mixer, cache.filter(|_| layer.has_mixer())) {
            return Err(rejected(
                tier,
                index,
                KV_CACHE,
                "the CPU computes the layer's attention".into(),
            ));
        }
        let ffn_group = if layer.moe().is_some() {
            "router"
        } else {
            "dense_ffn"
        };
        let rejections = [
            (
                at.mixer,
                "attention",
                at.mixer.and_then(|_| mixer(gguf, layer)),
            ),
            (at.ffn, ffn_group, at.ffn.and_then(|_| router(gguf, layer))),
            (
                at.shared,
                "shared_expert",
                at.shared.and_then(|_| blocks(layer)),
            ),
        ];
        for (place, group, why) in rejections {
            if let (Some(tier), Some(why)) = (place, why) {
                return Err(rejected(tier, index, group, why));
            }
        }
    }
    Ok(())
}

/// Returns why a layer's mixer can't run on a GPU, if so.
fn mixer(gguf: &Gguf, layer: &LayerSpec) -> Option<String> {
    let key = |width: usize| {
        let unsupported = !width.is_multiple_of(4) || width > MAX_KEY;
        unsupported.then(|| {
            format!(
                "rows of {width} values in the KV cache, expected a multiple of 4 up to {MAX_KEY}"
            )
        })
    };
    if !layer.residual.mixer_is_plain() {
        return Some("a norm of or a factor on the result of attention".into());
    }
    if layer.residual.connections.is_some() {
        return Some(SEVERAL_STREAMS.into());
    }
    if layer.residual.ngram.is_some() {
        return Some("n-grams before the mixer".into());
    }
    match &layer.mixer {
        Mixer::Mamba(_) => Some("Mamba-2".into()),
        Mixer::Compressed(_) => Some("compressed attention".into()),
        Mixer::None => None,
        Mixer::Delta(d) if d.gate != DeltaGate::Silu => Some("sigmoid gates of a delta net".into()),
        Mixer::Gqa(a) if attention(a).is_some() => attention(a).map(String::from),
        Mixer::ShortConv(_) => Some("a short convolution".into()),
        Mixer::Kda(_) => Some("Kimi delta attention".into()),
        Mixer::Mla(a) if latent_attention(a).is_some() => latent_attention(a).map(String::from),
        Mixer::Gqa(a) => {
            let linears = [&a.q, &a.k, &a.v, &a.o]
                .into_iter()
                .find_map(|l| misplaced(gguf, l));
            linears.or(key(a.key_dim)).or(key(a.value_dim))
        }
        Mixer::Mla(a) => {
            let linears = [&a.q, &a.kv_down, &a.o]
                .into_iter()
                .chain(a.q_down.as_ref().map(|low| &low.down));
            let linears = linears.into_iter().find_map(|l| misplaced(gguf, l));
            linears
                .or(key(a.kv_rank + a.shared_dim))
                .or_else(|| misplaced_heads(gguf, a))
        }
        Mixer::Delta(d) => {
            let linears = d.linears().into_iter().find_map(|l| misplaced(gguf, l));
            let dim = d.head_dim;
            let unsupported = !dim.is_multiple_of(4) || dim > MAX_DELTA_HEAD;
            let why = || {
                format!(
                    "heads of {dim} values in its state, expected a multiple of 4 up to {MAX_DELTA_HEAD}"
                )
            };
            linears.or_else(|| unsupported.then(why))
        }
    }
}

/// Returns what of an attention no kernel of a GPU computes.
fn attention(a: &GqaSpec) -> Option<&'static str> {
    let norm = a.qk_norm;
    let options = [
        (a.softcap.is_some(), "a soft cap on attention scores"),
        (
            a.temperature.is_some(),
            "scores that grow with the position",
        ),
        (a.value_norm, "a norm of values"),
        (a.index.is_some(), "block-sparse attention"),
        (a.shared_kv.is_some(), "keys and values of another layer"),
        (
            a.window.is_some() && a.window_kind != WindowKind::Sliding,
            "a chunked window",
        ),
        (
            norm.is_some_and(|norm| norm.after_rope || norm.q.is_none() || norm.k.is_none()),
            "a norm after rotation or without weights",
        ),
        (
            matches!(a.gate, Some(OutputGate::Separate { .. })),
            "gates with a matrix of their own",
        ),
    ];
    options
        .into_iter()
        .find(|(has, _)| *has)
        .map(|(_, what)| what)
}

/// Returns what of a latent attention no kernel of a GPU computes.
fn latent_attention(a: &MlaSpec) -> Option<&'static str> {
    let reach = match &a.reach {
        Reach::All => None,
        Reach::Window(_) => Some("a window of latent attention"),
        Reach::Indexed(_) => Some("a lightning indexer"),
        Reach::Reused { .. } => Some("positions that another layer's indexer chose"),
    };
    let options = [
        (a.rope.is_none(), "latent attention without rotation"),
        (a.shared_norm.is_some(), "a norm of the shared key part"),
        (a.sinks.is_some(), "sinks of latent attention"),
        (a.gate.is_some(), "gates with a matrix of their own"),
    ];
    let option = options.into_iter().find(|(has, _)| *has);
    reach.or(option.map(|(_, what)| what))
}

/// Returns what of the embedding no kernel of a GPU computes.
fn embedding(spec: &ModelSpec) -> Option<String> {
    if spec.token_inputs.is_some() {
        return Some("inputs of tokens for every layer".into());
    }
    if spec.ngrams.is_some() {
        return Some("a table of n-grams".into());
    }
    if spec.streams.is_some() {
        return Some(SEVERAL_STREAMS.into());
    }
    (spec.embedding_scale != 1.0).then(|| "a factor on embeddings".into())
}

/// Returns what of the head no kernel of a GPU computes.
fn head(spec: &ModelSpec) -> Option<String> {
    if spec.streams.is_some() {
        return Some(SEVERAL_STREAMS.into());
    }
    let plain = spec.head == HeadOptions::default();
    (!plain).then(|| "a bias, a factor or a soft cap on logits".into())
}

/// Returns the tiers whose GPUs have experts of a kind that none of their kernels computes, with
/// layer and reason.
fn experts<'a>(
    spec: &'a ModelSpec,
    plan: &'a Placement,
) -> impl Iterator<Item = (TierIdx, usize, String)> + 'a {
    spec.moe_layers()
        .zip(&plan.layers)
        .filter_map(|((index, moe), placed)| {
            let options = [
                (moe.weigh_input, "weights on what experts read"),
                (moe.latent.is_some(), "latent experts"),
                (
                    matches!(moe.gate_up, GateUp::Up(_)),
                    "experts without a gate",
                ),
            ];
            let option = options.into_iter().find(|(has, _)| *has);
            let why = activation(moe.activation).or(option.map(|(_, what)| what.into()))?;
            let pinned = placed.pinned.iter().filter(|pins| !pins.experts.is_empty());
            let tiers = pinned
                .map(|pins| pins.tier)
                .chain((placed.slots > 0).then_some(placed.slot_tier));
            let on_gpu = |tier: &TierIdx| plan.tiers.get(*tier).is_some_and(PlanTier::uses_gpu);
            Some((tiers.into_iter().find(on_gpu)?, index, why))
        })
}

/// Returns why no kernel of a GPU computes an activation, if so.
fn activation(activation: Activation) -> Option<String> {
    match activation {
        Activation::Silu | Activation::ClampedSwiglu { .. } => None,
        Activation::Gelu => Some("GELU".into()),
        Activation::SquaredRelu => Some("squared ReLU".into()),
        Activation::ClampedSilu { .. } => Some("SiLU of a clamped gate".into()),
        Activation::LimitedSilu { .. } => Some("SiLU with a limit".into()),
        Activation::Situ { .. } => Some("SiTU".into()),
    }
}

/// Returns what of a layer's feed-forward blocks no kernel of a GPU computes.
fn blocks(layer: &LayerSpec) -> Option<String> {
    let residual = &layer.residual;
    if !residual.ffn_is_plain() || !residual.ends_plain() {
        return Some("a norm of or a factor on the result of the feed-forward block".into());
    }
    if residual.connections.is_some() {
        return Some(SEVERAL_STREAMS.into());
    }
    match &layer.ffn {
        Ffn::None => None,
        Ffn::Dense(ffn) => dense_activation(ffn),
        Ffn::Moe(moe) if !moe.is_plain() => {
            Some("norms of, factors on, or a router apart from the experts".into())
        }
        Ffn::Moe(moe) if moe.by_token.is_some() => Some("experts chosen by tokens".into()),
        Ffn::Moe(moe) => {
            let gating = (moe.gating == Gating::SigmoidChosen)
                .then(|| "sigmoid weights of experts chosen by their logits".into());
            let shared = moe.shared.as_ref();
            gating
                .or(activation(moe.activation))
                .or(shared.and_then(|shared| dense_activation(&shared.ffn)))
        }
    }
}

/// Returns why no kernel of a GPU computes a dense block's activation, if so. They have
/// [`Activation::Silu`] only.
fn dense_activation(ffn: &GatedFfn) -> Option<String> {
    (ffn.activation != Activation::Silu).then(|| format!("{:?} in a dense block", ffn.activation))
}

/// Returns why a layer's router or dense block can't run on a GPU, if so.
fn router(gguf: &Gguf, layer: &LayerSpec) -> Option<String> {
    if let Some(why) = blocks(layer) {
        return Some(why);
    }
    match &layer.ffn {
        Ffn::None => None,
        Ffn::Dense(ffn) => ffn.linears().find_map(|l| misplaced(gguf, l)),
        Ffn::Moe(moe) => {
            let groups = moe.groups.map_or(0, |groups| groups.n);
            let too_many = moe.n_expert > MAX_EXPERTS || groups > MAX_GROUPS;
            let why = format!(
                "{} experts in {groups} groups, expected at most {MAX_EXPERTS} in {MAX_GROUPS}",
                moe.n_expert
            );
            too_many.then_some(why).or(misplaced(gguf, &moe.router))
        }
    }
}

/// Returns where a matrix begins that is not aligned within its tensor. Kernels read 16 bytes at
/// once.
fn misplaced(gguf: &Gguf, linear: &Linear) -> Option<String> {
    let tensor = gguf.tensors().get(linear.weight)?;
    let row = tensor.ty.row_bytes(linear.n_in as u64)?;
    let offset = (linear.first_row as u64).checked_mul(row)?;
    let why = || {
        format!(
            "a matrix begins at byte {offset} of tensor '{}', expected a multiple of 16",
            tensor.name
        )
    };
    (!offset.is_multiple_of(16)).then(why)
}

/// Returns the distance of heads' matrices that are not aligned within their tensor.
fn misplaced_heads(gguf: &Gguf, a: &MlaSpec) -> Option<String> {
    let (rank, nope, value) = (a.kv_rank, a.nope_dim, a.value_dim);
    let matrices = match a.kv_up {
        KvUp::Split { k, v } => [(k, rank, nope), (v, value, rank)],
        KvUp::Fused(kv) => [(kv, nope + value, rank), (kv, nope, rank)],
    };
    matrices.into_iter().find_map(|(id, rows, n_in)| {
        let tensor = gguf.tensors().get(id)?;
        let bytes = (rows as u64).checked_mul(tensor.ty.row_bytes(n_in as u64)?)?;
        let name = &tensor.name;
        let why = || {
            format!("heads are {bytes} bytes apart in tensor '{name}', expected a multiple of 16")
        };
        (!bytes.is_multiple_of(16)).then(why)
    })
}
