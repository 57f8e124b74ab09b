//! Layers with their matrices on a GPU, which is emulated on the processor, and their KV cache in main
//! memory, to which the CPU attends.

use super::gpu_tests::{ALL, Experts, compare, keep_kv_on_host, load, open, plan, refused};
use crate::engine::{LogitsMode, RearrangeError};
use crate::error::LoadError;
use tier_plan_formats::model::describe;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::{Mixer, ModelSpec};
use tier_plan_formats::placement::{TierIdx, Violation};
use tier_plan_testing::{Golden, is_nightly, models, nmse};

/// A model with thousands of tokens, for chunks of attention.
const LONG: &str = "llama4-long";

/// The largest error of logits, as where all of a model is on a GPU.
const BOUND: f64 = 1e-10;

/// Whether a layer's attention is to plain keys and values of its own.
fn is_plain(spec: &ModelSpec, layer: usize) -> bool {
    let is_read = spec.layers.iter().any(|l| l.kv_owner() == Some(layer));
    let layer = &spec.layers[layer];
    match &layer.mixer {
        Mixer::Gqa(a) => {
            a.index.is_none() && a.shared_kv.is_none() && layer.residual.ngram.is_none() && !is_read
        }
        _ => false,
    }
}

#[test]
fn models_give_their_golden_values_with_the_cache_in_main_memory() {
    let folders = ["arch", "arch2"].map(|folder| (folder, models(folder)));
    let names = folders.iter();
    let names = names.flat_map(|(folder, names)| names.iter().map(move |name| (*folder, name)));
    let mut n_models = 0;
    for (folder, name) in names.filter(|(_, name)| *name != LONG) {
        let golden = Golden::read(&format!("{folder}/{name}"));
        let (gguf, shape) = open(&format!("{folder}/{name}.gguf"));
        let spec = describe(&gguf).unwrap();
        for (layer, cache) in shape.caches.iter().enumerate() {
            let plain = is_plain(&spec, layer);
            assert_eq!(cache.can_be_apart(), plain, "{name}, layer {layer}");
        }
        let context = golden.tokens.len() + golden.greedy.len();
        let runs = |kind, layer| {
            let part = tier_plan_formats::model::gpu::Part::Dense(kind);
            let mut cpu_only = shape.cpu_only.iter();
            ALL(kind, layer) && !cpu_only.any(|only| only.is(part, layer) || only.is_together())
        };
        let of = (context as u32, KvType::F32);
        let mut plan = plan(&shape, of, runs, false, Experts::Gpu);
        if keep_kv_on_host(&mut plan, &shape, |_| true) == 0 {
            continue;
        }
        n_models += 1;
        let mut engine = load(&gguf, &plan, 13);
        // A prompt in parts, then tokens; all of the tokens at night.
        let n = golden.tokens.len() / if is_nightly() { 1 } else { 3 };
        let (prompt, decoded) = golden.tokens[..n].split_at(n - 3);
        let mut logits = engine.forward(prompt, LogitsMode::All).unwrap().to_vec();
        for token in decoded {
            logits.extend_from_slice(engine.forward(&[*token], LogitsMode::Last).unwrap());
        }
        let error = nmse(&logits, &golden.logits[..logits.len()]);
        assert!(error > 0.0 && error <= BOUND, "{name}: {error:e}");
    }
    assert!(n_models >= 25, "{n_models}");
}

/// Matrices take rows in 8 bits, and rows of keys are rounded. A prompt comes in several batches, is
/// taken back, and goes on.
#[test]
fn quantized_models_give_the_same_text_with_the_cache_in_main_memory() {
    for (name, kv_type) in [
        ("Q4_K_M", KvType::F16),
        ("Q5_0", KvType::Q8_0),
        ("BF16", KvType::F16),
    ] {
        let of = (64, kv_type);
        for part in 1..=2 {
            compare(&format!("quant/{name}.gguf"), of, |shape| {
                let mut plan = plan(shape, of, ALL, true, Experts::Gpu);
                assert!(keep_kv_on_host(&mut plan, shape, |layer| layer % part == 0) > 0);
                plan
            });
        }
    }
}

#[test]
fn caches_that_cannot_be_apart_are_refused() {
    let of = (64, KvType::F16);
    let violation = |name: &str, kv_on_gpu: bool, layers: &[u32]| {
        let (gguf, shape) = open(name);
        let mut plan = plan(&shape, of, ALL, kv_on_gpu, Experts::Gpu);
        plan.host_kv = layers.to_vec();
        plan.fill_sums(&shape);
        match refused(&gguf, &plan, usize::MAX) {
            LoadError::Plan { violation, .. } => *violation,
            other => panic!("{other}"),
        }
    };
    let found = violation("arch/deepseek-v3.gguf", false, &[1]);
    assert!(
        matches!(found, Violation::HostKvOfOther { layer: 1 }),
        "{found}"
    );
    let found = violation("arch2/minimax-m3.gguf", false, &[0, 1, 2]);
    assert!(matches!(found, Violation::HostKvOfOther { .. }), "{found}");
    let found = violation("arch/qwen3moe.gguf", false, &[700]);
    assert!(
        matches!(found, Violation::HostKvWithoutGpu { layer: 700 }),
        "{found}"
    );
    let found = violation("arch/qwen3moe.gguf", true, &[0]);
    assert!(
        matches!(found, Violation::HostKvOnGpu { layer: 0, .. }),
        "{found}"
    );
    let found = violation("arch/qwen3moe.gguf", false, &[1, 0]);
    assert!(matches!(found, Violation::HostKvOrder { .. }), "{found}");
}

#[test]
fn a_model_with_its_cache_in_main_memory_is_not_fully_on_the_gpu() {
    let (_, shape) = open("arch/qwen3moe.gguf");
    let of = (64, KvType::F16);
    let mut plan = plan(&shape, of, ALL, true, Experts::Gpu);
    let fully = |plan: &_| crate::gpu::fully_on_gpu(plan, &shape);
    assert_eq!(fully(&plan), Some(TierIdx::FIRST));
    let on_gpu = plan.tiers[TierIdx::FIRST].bytes.kv;
    assert_eq!(keep_kv_on_host(&mut plan, &shape, |layer| layer == 1), 1);
    assert_eq!(fully(&plan), None);
    let bytes = plan.tiers.iter().map(|t| t.bytes.kv);
    let bytes: Vec<u64> = bytes.collect();
    assert!(
        bytes[0] < on_gpu && bytes.iter().sum::<u64>() == on_gpu,
        "{bytes:?}"
    );
}

#[test]
fn a_loaded_model_keeps_its_caches_where_they_are() {
    let (gguf, shape) = open("arch/qwen3moe.gguf");
    let mut plan = plan(&shape, (64, KvType::F16), ALL, true, Experts::File);
    assert_eq!(keep_kv_on_host(&mut plan, &shape, |layer| layer != 1), 2);
    let mut engine = load(&gguf, &plan, 13);
    let mut other = plan.clone();
    assert_eq!(keep_kv_on_host(&mut other, &shape, |layer| layer != 2), 2);
    match engine.rearrange(other) {
        Err(RearrangeError::Other { what, .. }) => assert_eq!(what, "KV cache"),
        found => panic!("{found:?}"),
    }
    engine.rearrange(plan).unwrap();
}
