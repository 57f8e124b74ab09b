//! The parts of a model that no GPU can run, or only all of them together: loading refuses plans that
//! place them on one, or some of them, and solving makes none.
//!
//! What decides is which options the kernels of [`tier_plan_cuda`] have. This module knows of them
//! what a plan needs, so that sizes of a model say it without a GPU.
//!
//! [`tier_plan_cuda`]: https://docs.rs/tier-plan-cuda

mod archs;

pub(crate) use archs::{chooses_keys, cpu_only_of};

use super::shape::DenseKind;
use super::spec::{
    CompressedSpec, Connection, Ffn, GatedFfn, GqaSpec, KvUp, LayerSpec, Linear, MambaSpec, Mixer,
    MlaSpec, ModelSpec, MoeSpec, NormSpan, RouterInput, TensorId,
};
use crate::gguf::Gguf;
use std::collections::BTreeSet;
use std::fmt;

/// Widest key or value that attention on a GPU reads.
pub const MAX_KEY: usize = 640;

/// Most routed experts of a layer whose router runs on a GPU.
pub const MAX_EXPERTS: usize = 1024;

/// Most groups of them.
pub const MAX_GROUPS: usize = 128;

/// Widest head of a delta net on a GPU.
pub const MAX_DELTA_HEAD: usize = 256;

/// Widest `B` and `C` of a Mamba-2 mixer on a GPU.
pub const MAX_MAMBA_STATE: usize = 256;

/// Most groups of heads of a compressed attention on a GPU.
const MAX_HEAD_GROUPS: usize = 1024;

/// Most streams of the residual on a GPU.
pub const MAX_STREAMS: usize = 64;

/// Most of them that are mixed with each other.
pub const MAX_MIXED_STREAMS: usize = 8;

/// What a GPU has of all layers or of none.
const TOKEN_INPUTS: &str = "inputs of tokens for every layer";

/// Keys and values that a GPU has for all layers that read them, or for none.
const SHARED_KV: &str = "keys and values that several layers read";

/// What stays where it is read row by row.
const INPUT_TABLE: &str = "a table of inputs, of which a token reads a row";

/// What would fill a GPU's memory with rows that are hardly read.
const NGRAM_TABLE: &str = "a table of n-grams, of which a token reads a few rows";

/// A part of a model that is placed by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// A dense group.
    Dense(DenseKind),
    /// The routed experts of a layer.
    Experts,
}

impl Part {
    /// Returns the name that options and messages use, `shared_expert`.
    pub fn name(self) -> &'static str {
        match self {
            Part::Dense(DenseKind::Embedding) => "embedding",
            Part::Dense(DenseKind::TokenTable) => "token_table",
            Part::Dense(DenseKind::Attention) => "attention",
            Part::Dense(DenseKind::Router) => "router",
            Part::Dense(DenseKind::SharedExpert) => "shared_expert",
            Part::Dense(DenseKind::DenseFfn) => "dense_ffn",
            Part::Dense(DenseKind::Head) => "head",
            Part::Experts => "experts",
        }
    }
}

/// Why no GPU can run a part, or only with others.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum CpuReason {
    /// All parts of the model with such a reason share something. One GPU can run them together, but
    /// none of them alone.
    Together(String),
    /// It needs what no kernel computes.
    Kernel(String),
    /// This tensor has a factor beside it.
    Factor(String),
}

impl fmt::Display for CpuReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CpuReason::Kernel(what) => f.write_str(what),
            CpuReason::Together(what) => write!(f, "{what}, unless one GPU has all of them"),
            CpuReason::Factor(tensor) => write!(f, "a factor beside tensor '{tensor}'"),
        }
    }
}

/// A part that no GPU can run, or only with others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuOnly {
    /// The part.
    pub part: Part,
    /// Its layer, or `None` for a part of the whole model.
    pub layer: Option<u32>,
    /// Why.
    pub why: CpuReason,
}

impl CpuOnly {
    /// Whether it is this part of this layer.
    pub fn is(&self, part: Part, layer: Option<u32>) -> bool {
        (self.part, self.layer) == (part, layer)
    }

    /// Whether one GPU can run the part together with all others of which this is true.
    pub fn is_together(&self) -> bool {
        matches!(self.why, CpuReason::Together(_))
    }
}

/// Returns the parts of a model that no GPU can run, those with factors first. A part may be there
/// for both reasons.
pub(crate) fn cpu_only(gguf: &Gguf, spec: &ModelSpec) -> Vec<CpuOnly> {
    let mut found = with_factors(gguf, spec);
    let mut add = |part, layer: Option<usize>, why: Option<String>| {
        found.extend(why.map(|why| CpuOnly {
            part,
            layer: layer.map(|layer| layer as u32),
            why: CpuReason::Kernel(why),
        }));
    };
    let apart = spec.token_inputs.filter(|_| !spec.tied());
    let of_embedding = apart.map(|_| TOKEN_INPUTS.into());
    add(
        Part::Dense(DenseKind::Embedding),
        None,
        of_embedding.or(many_streams(spec)).filter(|_| !spec.tied()),
    );
    let of_table = spec.ngrams.as_ref().map(|_| NGRAM_TABLE.to_string());
    let of_table = of_table.or(spec.token_inputs.map(|_| INPUT_TABLE.into()));
    add(Part::Dense(DenseKind::TokenTable), None, of_table);
    // The embedding of a tied model is its head, which makes the inputs.
    let of_head = apart.map(|_| TOKEN_INPUTS.into());
    let of_head = of_head.or(many_streams(spec));
    add(Part::Dense(DenseKind::Head), None, of_head);
    for (index, layer) in spec.layers.iter().enumerate() {
        if layer.has_mixer() {
            let why = mixer(gguf, spec, layer);
            add(Part::Dense(DenseKind::Attention), Some(index), why);
        }
        match &layer.ffn {
            Ffn::Moe(moe) => {
                let router = router(gguf, spec, layer);
                add(Part::Dense(DenseKind::Router), Some(index), router);
                let shared = moe.shared.as_ref().and_then(|_| blocks(gguf, spec, layer));
                add(Part::Dense(DenseKind::SharedExpert), Some(index), shared);
            }
            Ffn::Dense(_) => {
                let block = router(gguf, spec, layer);
                add(Part::Dense(DenseKind::DenseFfn), Some(index), block);
            }
            Ffn::None => {}
        }
    }
    let mut together = together(spec);
    let is_never = |only: &CpuOnly| {
        let mut never = found.iter();
        never.any(|other| other.is(only.part, only.layer))
    };
    // Where one of them can never be there, none can.
    if together.iter().any(is_never) {
        for only in &mut together {
            if let CpuReason::Together(why) = &only.why {
                only.why = CpuReason::Kernel(why.clone());
            }
        }
    }
    found.extend(together);
    found
}

/// Returns the parts that one GPU can run together only.
fn together(spec: &ModelSpec) -> Vec<CpuOnly> {
    let mut found = Vec::new();
    let mut add = |part: DenseKind, layer: Option<usize>, why: &str| {
        found.push(CpuOnly {
            part: Part::Dense(part),
            layer: layer.map(|layer| layer as u32),
            why: CpuReason::Together(why.into()),
        });
    };
    if spec.token_inputs.is_some() {
        add(DenseKind::Head, None, TOKEN_INPUTS);
    }
    let owners = owners_of_shared_rows(spec);
    for (index, layer) in spec.layers.iter().enumerate() {
        let at = Some(index);
        if layer.kv_owner().is_some() || owners.contains(&index) {
            add(DenseKind::Attention, at, SHARED_KV);
        }
        let has_input = layer.residual.layer_input.is_some();
        match &layer.ffn {
            _ if !has_input => {}
            Ffn::Moe(moe) => {
                add(DenseKind::Router, at, TOKEN_INPUTS);
                if moe.shared.is_some() {
                    add(DenseKind::SharedExpert, at, TOKEN_INPUTS);
                }
            }
            Ffn::Dense(_) => add(DenseKind::DenseFfn, at, TOKEN_INPUTS),
            Ffn::None => {}
        }
    }
    found
}

/// Returns the layers whose keys and values others read.
fn owners_of_shared_rows(spec: &ModelSpec) -> BTreeSet<usize> {
    let owners = spec.layers.iter().filter_map(LayerSpec::kv_owner);
    owners.collect()
}

/// Returns the parts with a matrix that has a factor beside it.
fn with_factors(gguf: &Gguf, spec: &ModelSpec) -> Vec<CpuOnly> {
    if spec.scales.is_empty() {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut add = |part, layer: Option<usize>, matrices: Vec<TensorId>| {
        let scaled = matrices.into_iter().find(|id| spec.scales.has(*id));
        found.extend(scaled.map(|id| CpuOnly {
            part,
            layer: layer.map(|layer| layer as u32),
            why: CpuReason::Factor(gguf.tensors()[id].name.clone()),
        }));
    };
    let of_ffn = |ffn: &GatedFfn| ffn.linears().map(|l| l.weight).collect::<Vec<_>>();
    for (index, layer) in spec.layers.iter().enumerate() {
        let at = Some(index);
        let mut mixer = layer.mixer.tensors().matrices;
        let mut blocks = Vec::new();
        if let Some(connections) = &layer.residual.connections {
            mixer.extend(connections.mixer.tensors().matrices);
            blocks.extend(connections.ffn.tensors().matrices);
        }
        let input = layer.residual.layer_input.iter();
        blocks.extend(input.flat_map(|input| [input.gate.weight, input.proj.weight]));
        add(Part::Dense(DenseKind::Attention), at, mixer);
        match &layer.ffn {
            Ffn::None => {}
            Ffn::Dense(ffn) => {
                blocks.extend(of_ffn(ffn));
                add(Part::Dense(DenseKind::DenseFfn), at, blocks);
            }
            Ffn::Moe(moe) => {
                let shared = moe.shared.as_ref().map(|shared| of_ffn(&shared.ffn));
                let part = Part::Dense(DenseKind::SharedExpert);
                add(part, at, shared.unwrap_or_default());
                let latent = moe.latent.iter();
                blocks.extend(latent.flat_map(|latent| [latent.down.weight, latent.up.weight]));
                add(Part::Dense(DenseKind::Router), at, blocks);
            }
        }
    }
    let mut head = vec![spec.output];
    let end = spec.streams.map(|streams| streams.end.tensors());
    head.extend(end.unwrap_or_default().matrices);
    head.extend(spec.token_inputs.iter().map(|own| own.proj.weight));
    add(Part::Dense(DenseKind::Head), None, head);
    for (index, moe) in spec.moe_layers() {
        let matrices = moe.expert_linears().map(|l| l.weight).collect();
        add(Part::Experts, Some(index), matrices);
    }
    found
}

/// Returns why a layer's mixer can't run on a GPU, if so.
fn mixer(gguf: &Gguf, spec: &ModelSpec, layer: &LayerSpec) -> Option<String> {
    let key = |width: usize| {
        let unsupported = !width.is_multiple_of(4) || width > MAX_KEY;
        unsupported.then(|| {
            format!(
                "rows of {width} values in the KV cache, expected a multiple of 4 up to {MAX_KEY}"
            )
        })
    };
    let connection = layer.residual.connections.map(|c| c.mixer);
    if let Some(why) = connection.and_then(|c| streams(gguf, spec, &c)) {
        return Some(why);
    }
    let ngram = layer.residual.ngram.as_ref();
    let mut of_ngram = ngram
        .into_iter()
        .flat_map(|block| [&block.key, &block.value]);
    if let Some(why) = of_ngram.find_map(|l| misplaced(gguf, l)) {
        return Some(why);
    }
    match &layer.mixer {
        Mixer::Compressed(a) => {
            let index = a.far.and_then(|far| far.index);
            let groups = a.n_group;
            let many = || format!("{groups} groups of heads, expected at most {MAX_HEAD_GROUPS}");
            let many_groups = (groups > MAX_HEAD_GROUPS).then(many);
            many_groups
                .or_else(|| misplaced_groups(gguf, a))
                .or(key(a.key_dim))
                .or(index.and_then(|index| key(index.key_dim)))
        }
        Mixer::None => None,
        Mixer::Gqa(a) if attention(a).is_some() => attention(a).map(String::from),
        Mixer::ShortConv(c) => [&c.input, &c.out]
            .into_iter()
            .find_map(|l| misplaced(gguf, l)),
        Mixer::Mamba(m) => {
            let linears = [&m.input, &m.out]
                .into_iter()
                .find_map(|l| misplaced(gguf, l));
            linears.or_else(|| wide_state(m))
        }
        Mixer::Gqa(a) => {
            let index = a.index.as_ref();
            let of_index = index.into_iter().flat_map(|index| [&index.q, &index.k]);
            let mut linears = a.linears().into_iter().chain(of_index);
            let linears = linears.find_map(|l| misplaced(gguf, l));
            linears
                .or(key(a.key_dim))
                .or(key(a.value_dim))
                .or(index.and_then(|index| key(index.key_dim)))
        }
        Mixer::Mla(a) => {
            let linears = a.linears().into_iter().find_map(|l| misplaced(gguf, l));
            linears
                .or(key(a.kv_rank + a.shared_dim))
                .or(a.reach.indexer().and_then(|indexer| key(indexer.key_dim)))
                .or_else(|| misplaced_heads(gguf, a))
        }
        Mixer::Delta(d) => {
            let linears = d.linears().into_iter().find_map(|l| misplaced(gguf, l));
            linears.or_else(|| delta_head(d.head_dim))
        }
        Mixer::Kda(k) => {
            let linears = k.linears().into_iter().find_map(|l| misplaced(gguf, l));
            linears.or_else(|| delta_head(k.head_dim))
        }
    }
}

/// Returns why heads of a delta net can't be of this width, if so.
fn delta_head(dim: usize) -> Option<String> {
    let unsupported = !dim.is_multiple_of(4) || dim > MAX_DELTA_HEAD;
    unsupported.then(|| {
        format!(
            "heads of {dim} values in its state, expected a multiple of 4 up to {MAX_DELTA_HEAD}"
        )
    })
}

/// Returns why no kernel of a GPU takes the states of a Mamba-2 mixer, if so.
fn wide_state(m: &MambaSpec) -> Option<String> {
    let dim = m.state_dim;
    let unsupported = !dim.is_multiple_of(4) || dim > MAX_MAMBA_STATE;
    unsupported.then(|| {
        format!("states of {dim} values, expected a multiple of 4 up to {MAX_MAMBA_STATE}")
    })
}

/// Returns what of an attention no kernel of a GPU computes.
fn attention(a: &GqaSpec) -> Option<&'static str> {
    let norm = a.qk_norm;
    let full = norm.is_some_and(|norm| norm.after_rope && norm.span == NormSpan::Full);
    full.then_some("a norm of all heads after rotation")
}

/// Returns why no GPU has room for a model's streams, if so.
fn many_streams(spec: &ModelSpec) -> Option<String> {
    let n = spec.streams.map_or(1, |streams| streams.n);
    (n > MAX_STREAMS)
        .then(|| format!("{n} streams of the residual, expected at most {MAX_STREAMS}"))
}

/// Returns why no kernel of a GPU reads or writes several streams, if so.
fn streams(gguf: &Gguf, spec: &ModelSpec, connection: &Connection) -> Option<String> {
    let n = spec.streams.map_or(1, |streams| streams.n);
    match connection {
        Connection::LowRank(low) => {
            let mut linears = [&low.down, &low.up].into_iter().chain(&low.inject);
            let misplaced = linears.find_map(|l| misplaced(gguf, l));
            misplaced.or_else(|| many_streams(spec))
        }
        Connection::Gated(gated) if gated.sinkhorn.is_some() && n > MAX_MIXED_STREAMS => {
            Some(format!(
                "{n} streams that are mixed with each other, expected at most {MAX_MIXED_STREAMS}"
            ))
        }
        Connection::Gated(gated) => misplaced(gguf, &gated.gates).or_else(|| many_streams(spec)),
        Connection::Bank(_) => many_streams(spec),
    }
}

/// Returns what of a layer's feed-forward blocks no kernel of a GPU computes.
fn blocks(gguf: &Gguf, spec: &ModelSpec, layer: &LayerSpec) -> Option<String> {
    let residual = &layer.residual;
    if let Some(input) = &residual.layer_input {
        let mut linears = [&input.gate, &input.proj].into_iter();
        let why = linears.find_map(|l| misplaced(gguf, l));
        let many = spec.streams.is_some();
        let many = || many.then(|| "several streams with inputs of tokens".to_string());
        if let Some(why) = why.or_else(many) {
            return Some(why);
        }
    }
    let apart = |moe: &MoeSpec| moe.router_input != RouterInput::Normed || moe.input_norm.is_some();
    if residual.connections.is_some()
        && (residual.output_scale.is_some() || layer.moe().is_some_and(apart))
    {
        return Some("several streams with norms or factors apart".into());
    }
    let narrow = |moe: &MoeSpec| moe.latent.is_some() && moe.output_norm.is_some();
    if layer.moe().is_some_and(narrow) {
        return Some("a norm of the sum of experts in a smaller space".into());
    }
    let connections = residual.connections;
    connections.and_then(|c| streams(gguf, spec, &c.ffn))
}

/// Returns why a layer's router or dense block can't run on a GPU, if so.
fn router(gguf: &Gguf, spec: &ModelSpec, layer: &LayerSpec) -> Option<String> {
    if let Some(why) = blocks(gguf, spec, layer) {
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
            let latent = moe
                .latent
                .iter()
                .flat_map(|latent| [&latent.down, &latent.up]);
            let mut linears = std::iter::once(&moe.router).chain(latent);
            let linear = linears.find_map(|l| misplaced(gguf, l));
            too_many.then_some(why).or(linear)
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

/// Returns where a matrix of a compressed attention begins that is not aligned, or one of a group of
/// its heads.
fn misplaced_groups(gguf: &Gguf, a: &CompressedSpec) -> Option<String> {
    let index = a.far.and_then(|far| far.index);
    let of_index = index.as_ref().into_iter().flat_map(|i| [&i.q, &i.weights]);
    let of_pools = a.compressors().flat_map(|c| [&c.kv, &c.gate]);
    let own = [&a.q_down.down, &a.q, &a.kv, &a.o_down, &a.o];
    let rank = a.o_down.n_out / a.n_group;
    let groups: Vec<Linear> = (0..a.n_group)
        .map(|group| Linear {
            first_row: a.o_down.first_row + group * rank,
            ..a.o_down
        })
        .collect();
    let all = own.into_iter().chain(of_pools).chain(of_index);
    all.chain(&groups).find_map(|l| misplaced(gguf, l))
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
