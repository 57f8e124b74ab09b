//! Any parts of a model on an emulated GPU and the others on the processor: what a layer's blocks
//! leave for each other must reach the one that needs it.

use super::gpu_tests::{Experts, keep_kv_on_host, load, open, plan};
use super::rewritten_gqa_tests::fixture;
use super::rewritten_tests;
use crate::engine::{Engine, LogitsMode};
use crate::plans::in_memory::all_in_memory;
use std::sync::Arc;
use tier_plan_formats::gguf::testing::Writer;
use tier_plan_formats::gguf::{Gguf, Value};
use tier_plan_formats::model::describe;
use tier_plan_formats::model::gpu::Part;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::{DenseKind, ModelShape, shape_of};
use tier_plan_kernels::random::Random;
use tier_plan_testing::{is_nightly, nmse};

const TOKENS: [u32; 14] = [3, 1, 4, 15, 9, 26, 5, 35, 8, 90, 7, 9, 32, 38];
const CONTEXT: u32 = 20;

/// Sums on a GPU have another order.
const BOUND: f64 = 1e-9;

const KINDS: [DenseKind; 6] = [
    DenseKind::Embedding,
    DenseKind::Attention,
    DenseKind::Router,
    DenseKind::SharedExpert,
    DenseKind::DenseFfn,
    DenseKind::Head,
];

/// Gemma 4 without inputs of tokens for every layer, and all layers with keys and values of their
/// own, as its larger models are.
fn gemma4() -> Writer {
    let mut writer = fixture("gemma4");
    for key in [
        "attention.shared_kv_layers",
        "embedding_length_per_layer_input",
    ] {
        writer.set(&format!("gemma4.{key}"), Value::U32(0));
    }
    let unused = ["inp_gate", "proj", "post_norm", "per_layer"];
    let is_unused = |name: &str| {
        let part = name
            .strip_prefix("blk.")
            .and_then(|name| name.split('.').nth(1));
        unused
            .iter()
            .any(|unused| part.unwrap_or(name).starts_with(unused))
    };
    writer.tensors.retain(|tensor| !is_unused(&tensor.name));
    // Of a windowed layer, and of one that attends to everything, whose values are its keys.
    for (from, to) in [(0, 3), (1, 4), (2, 5)] {
        for part in ["attn_k", "attn_v", "attn_k_norm"] {
            let named = |layer: u32| format!("blk.{layer}.{part}.weight");
            let mut tensors = writer.tensors.iter();
            let Some(tensor) = tensors.find(|t| t.name == named(from)) else {
                continue;
            };
            let mut copy = tensor.clone();
            copy.name = named(to);
            writer.tensors.push(copy);
        }
    }
    writer
}

/// Logits of a prompt in parts, and of tokens one by one.
fn logits(engine: &mut Engine) -> Vec<f32> {
    let (prompt, decoded) = TOKENS.split_at(9);
    let mut all = engine.forward(prompt, LogitsMode::All).unwrap().to_vec();
    for token in decoded {
        all.extend_from_slice(engine.forward(&[*token], LogitsMode::Last).unwrap());
    }
    all
}

fn compare(name: &str, gguf: &Arc<Gguf>, shape: &ModelShape) {
    let table = Part::Dense(DenseKind::TokenTable);
    let mut cpu_only = shape.cpu_only.iter();
    assert!(
        cpu_only.all(|only| only.part == table),
        "{name}: {:?}",
        shape.cpu_only
    );
    let kv = KvType::F32;
    let expected = logits(&mut load(gguf, &all_in_memory(shape, CONTEXT, kv), 5));
    let mut random = Random::new("places");
    // Everything on the GPU first, where tokens don't come back between their layers.
    let masks = std::iter::once(u64::MAX)
        .chain((0..if is_nightly() { 40 } else { 5 }).map(|_| random.next_u64()));
    for mask in masks {
        let on_gpu = |kind: DenseKind, layer: Option<u32>| {
            let kind = KINDS.iter().position(|k| *k == kind).unwrap_or_default();
            let bit = kind as u32 + 6 * (layer.unwrap_or_default() % 5);
            mask >> bit & 1 == 1
        };
        let experts = match mask >> 40 & 3 {
            0 => Experts::Memory,
            1 => Experts::File,
            _ => Experts::Gpu,
        };
        let mut plan = plan(shape, (CONTEXT, kv), on_gpu, mask == u64::MAX, experts);
        if mask != u64::MAX {
            keep_kv_on_host(&mut plan, shape, |layer| mask >> (42 + layer % 16) & 1 == 1);
        }
        let got = logits(&mut load(gguf, &plan, 5));
        let error = nmse(&got, &expected);
        assert!(error < BOUND, "{name}, parts {mask:x}: {error:e}");
        assert!(
            error > 0.0 || mask & 0x3fff_ffff == 0,
            "{name}: nothing ran on the GPU"
        );
    }
}

#[test]
fn a_layers_parts_may_be_apart() {
    let (_file, gguf) = rewritten_tests::open(&gemma4());
    let shape = shape_of(&gguf, &describe(&gguf).unwrap());
    compare("gemma4", &gguf, &shape);
    // Blocks of few positions, so that the tokens at hand leave some out.
    for (name, sizes) in [
        ("minimax-m3", [("top_k", 3), ("block_size", 2)]),
        ("glm5-next", [("top_k", 6), ("kpool", 4)]),
        ("qwen4exp", [("top_k", 4), ("head_count", 6)]),
    ] {
        let mut writer = fixture(name);
        for (key, n) in sizes {
            let key = format!("{name}.attention.indexer.{key}");
            writer.set(&key, Value::U32(n));
        }
        let (_file, gguf) = rewritten_tests::open(&writer);
        let shape = shape_of(&gguf, &describe(&gguf).unwrap());
        compare(name, &gguf, &shape);
    }
    // The convolution of n-grams may see the token at hand only.
    let mut writer = fixture("qwen4exp");
    writer.set("qwen4exp.ple.conv_kernel", Value::U32(1));
    let mut tensors = writer.tensors.iter_mut();
    let conv = tensors.find(|t| t.name.ends_with("ple_conv1d.weight"));
    let conv = conv.unwrap();
    let taps = conv.dims[0] as usize;
    let last = conv.data.chunks_exact(4).skip(taps - 1).step_by(taps);
    conv.data = last.flatten().copied().collect();
    conv.dims[0] = 1;
    let (_file, gguf) = rewritten_tests::open(&writer);
    let shape = shape_of(&gguf, &describe(&gguf).unwrap());
    compare("qwen4exp, one tap", &gguf, &shape);
    for name in [
        "grok",
        "granitemoe",
        "llama4",
        "nemotron_h_moe",
        "glm-dsa",
        "deepseek4",
    ] {
        let (gguf, shape) = open(&format!("arch2/{name}.gguf"));
        compare(name, &gguf, &shape);
    }
}
