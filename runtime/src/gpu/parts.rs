//! Which parts of a model's dense stages run on a GPU, and whether they can.
//!
//! A part runs where its weights are: a layer's mixer (with its keys and values), its router, its shared expert or its
//! dense block, the head, and the embedding. The hidden state goes to where the next part is.

use crate::error::LoadError;
use crate::layers::places::Places;
use tier_plan_cuda::ops::{MAX_DELTA_HEAD, MAX_EXPERTS, MAX_GROUPS, MAX_KEY};
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::spec::{Ffn, KvUp, LayerSpec, Linear, Mixer, MlaSpec, ModelSpec};
use tier_plan_formats::placement::{Placement, TierIdx};

/// Refuses what a plan puts on a GPU that can't run there.
///
/// # Errors
/// Names the part, the tier and why.
pub(crate) fn check(gguf: &Gguf, spec: &ModelSpec, plan: &Placement) -> Result<(), LoadError> {
    let places = Places::new(plan, spec.layers.len());
    let refused = |tier: TierIdx, what: String, group: Option<&'static str>| LoadError::OnGpu {
        plan: plan.name.clone(),
        tier: plan.tiers.get(tier).map(|t| t.tier.name.clone()).unwrap_or_default(),
        group,
        what,
    };
    let cache = plan.tiers.get(plan.kv_tier).filter(|t| t.tier.is_gpu()).map(|_| plan.kv_tier);
    for (index, (layer, at)) in spec.layers.iter().zip(&places.layers).enumerate() {
        if let (None, Some(tier)) = (at.mixer, cache) {
            let what = "keys and values of attention that the processor computes";
            return Err(refused(tier, format!("layer {index}: {what}"), None));
        }
        let places = [(at.mixer, "attention"), (at.ffn, "router"), (at.shared, "shared_expert")];
        for (tier, group) in places.into_iter().filter_map(|(place, group)| Some((place?, group))) {
            let why = match group {
                "attention" => mixer(gguf, layer),
                "router" => router(gguf, layer),
                _ => None,
            };
            let group = if group == "router" && layer.moe().is_none() { "dense_ffn" } else { group };
            if let Some(why) = why {
                return Err(refused(tier, format!("{group} of layer {index}: {why}"), Some(group)));
            }
        }
    }
    Ok(())
}

/// Why a layer's mixer can't run on a GPU.
fn mixer(gguf: &Gguf, layer: &LayerSpec) -> Option<String> {
    let key = |width: usize| {
        let odd = !width.is_multiple_of(4) || width > MAX_KEY;
        odd.then(|| format!("rows of {width} values in the cache; a GPU takes multiples of 4 up to {MAX_KEY}"))
    };
    match &layer.mixer {
        Mixer::Gqa(a) => {
            let linears = [&a.q, &a.k, &a.v, &a.o].into_iter().find_map(|l| misplaced(gguf, l));
            linears.or(key(a.key_dim)).or(key(a.value_dim))
        }
        Mixer::Mla(a) => {
            let linears = [&a.q, &a.kv_down, &a.o].into_iter().chain(a.q_down.as_ref().map(|low| &low.down));
            let linears = linears.into_iter().find_map(|l| misplaced(gguf, l));
            linears.or(key(a.kv_rank + a.rope.dims)).or_else(|| misplaced_heads(gguf, a))
        }
        Mixer::Delta(d) => {
            let linears = d.linears().into_iter().find_map(|l| misplaced(gguf, l));
            let odd = !d.head_dim.is_multiple_of(4) || d.head_dim > MAX_DELTA_HEAD;
            let why = || {
                format!(
                    "heads of {} values in its state; a GPU takes multiples of 4 up to {MAX_DELTA_HEAD}",
                    d.head_dim
                )
            };
            linears.or_else(|| odd.then(why))
        }
    }
}

/// Why a layer's router or dense block can't run on a GPU.
fn router(gguf: &Gguf, layer: &LayerSpec) -> Option<String> {
    match &layer.ffn {
        Ffn::Dense(ffn) => [&ffn.gate, &ffn.up, &ffn.down].into_iter().find_map(|l| misplaced(gguf, l)),
        Ffn::Moe(moe) => {
            let groups = moe.groups.map_or(0, |groups| groups.n);
            let many = moe.n_expert > MAX_EXPERTS || groups > MAX_GROUPS;
            let why = format!(
                "{} experts in {groups} groups; a GPU chooses among {MAX_EXPERTS} in {MAX_GROUPS}",
                moe.n_expert
            );
            many.then_some(why).or(misplaced(gguf, &moe.router))
        }
    }
}

/// Kernels read 16 bytes at once: a matrix that begins inside a tensor must begin at a multiple of that.
fn misplaced(gguf: &Gguf, linear: &Linear) -> Option<String> {
    let tensor = gguf.tensors().get(linear.weight)?;
    let row = tensor.ty.row_bytes(linear.n_in as u64)?;
    let at = (linear.first_row as u64).checked_mul(row)?;
    (!at.is_multiple_of(16))
        .then(|| format!("a matrix begins at byte {at} of tensor '{}', not at one of 16", tensor.name))
}

/// The same for the matrices of heads.
fn misplaced_heads(gguf: &Gguf, a: &MlaSpec) -> Option<String> {
    let (rank, nope, value) = (a.kv_rank, a.nope_dim, a.value_dim);
    let of = match a.kv_up {
        KvUp::Split { k, v } => [(k, rank, nope), (v, value, rank)],
        KvUp::Fused(kv) => [(kv, nope + value, rank), (kv, nope, rank)],
    };
    of.into_iter().find_map(|(id, rows, n_in)| {
        let tensor = gguf.tensors().get(id)?;
        let bytes = (rows as u64).checked_mul(tensor.ty.row_bytes(n_in as u64)?)?;
        let name = &tensor.name;
        (!bytes.is_multiple_of(16))
            .then(|| format!("heads are {bytes} bytes apart in tensor '{name}', no multiple of 16"))
    })
}
