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
use tier_plan_formats::model::spec::{Ffn, KvUp, LayerSpec, Linear, Mixer, MlaSpec, ModelSpec};
use tier_plan_formats::placement::{Placement, TierIdx};

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
    for (index, (layer, at)) in spec.layers.iter().zip(&places.layers).enumerate() {
        if let (None, Some(tier)) = (at.mixer, cache) {
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
    match &layer.mixer {
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
                .or(key(a.kv_rank + a.rope.dims))
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

/// Returns why a layer's router or dense block can't run on a GPU, if so.
fn router(gguf: &Gguf, layer: &LayerSpec) -> Option<String> {
    match &layer.ffn {
        Ffn::Dense(ffn) => [&ffn.gate, &ffn.up, &ffn.down]
            .into_iter()
            .find_map(|l| misplaced(gguf, l)),
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
