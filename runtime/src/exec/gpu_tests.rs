//! Engines whose experts are partly on a GPU, which is emulated on the processor: the kernels are those of a real one.

use super::plan::obvious;
use super::{Engine, KvType, LoadError, LoadOptions, Wanted};
use crate::cuda::{Device, shim};
use crate::formats::machine::TierKind;
use crate::formats::placement::Placement;
use crate::gguf::Gguf;
use crate::model::shape::ModelShape;
use crate::model::{describe, shape::shape_of};
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(name)
}

/// Everything in main memory but for every second expert, which a GPU has.
fn half_on_gpu(shape: &ModelShape, context: u32) -> Placement {
    let mut plan = obvious(shape, context, KvType::F32);
    let mut vram = plan.tiers[0].clone();
    vram.tier.name = "vram".into();
    vram.tier.kind = TierKind::Vram;
    (vram.dense_bytes, vram.kv_bytes, vram.home_bytes) = (0, 0, 0);
    for (layer, experts) in plan.layers.iter_mut().zip(&shape.experts) {
        let pinned: Vec<u32> = (0..experts.n_expert).filter(|e| e % 2 == 1).collect();
        let bytes = pinned.len() as u64 * experts.expert_bytes;
        vram.pinned_bytes += bytes;
        plan.tiers[0].home_bytes -= bytes;
        layer.pinned.push((0, pinned));
    }
    plan.tiers.insert(0, vram);
    plan.kv_tier = 1;
    plan.staging_tier = 1;
    plan.dense.iter_mut().for_each(|d| d.tier = 1);
    plan.layers.iter_mut().for_each(|l| l.slot_tier = 1);
    plan
}

fn open(name: &str) -> (Arc<Gguf>, ModelShape) {
    let gguf = Arc::new(Gguf::open(&data(name)).unwrap());
    let shape = shape_of(&gguf, &describe(&gguf).unwrap());
    (gguf, shape)
}

/// Logits of a prompt, and of three tokens after it.
fn logits(engine: &mut Engine, n_vocab: u32) -> Vec<f32> {
    let tokens: Vec<u32> = (0..40).map(|i| (i * 37 + 5) % n_vocab).collect();
    let mut all = engine.forward(&tokens, Wanted::All).unwrap().to_vec();
    for i in 0..3 {
        all.extend_from_slice(engine.forward(&[(i * 11 + 3) % n_vocab], Wanted::Last).unwrap());
    }
    all
}

#[test]
fn experts_on_a_gpu_give_the_same_text() {
    // Float and quantised experts, fused and split, with biases and without, shared experts beside them.
    for name in
        ["arch/qwen3moe.gguf", "arch/gpt-oss.gguf", "arch/qwen2moe.gguf", "quant/Q4_K_M.gguf", "quant/Q5_0.gguf"]
    {
        let (gguf, shape) = open(name);
        let options = LoadOptions { threads: Some(2), batch: Some(23), ..LoadOptions::default() };
        let plan = half_on_gpu(&shape, 64);
        let device: Arc<dyn Device> = shim::shared();
        let load = |plan: &Placement| {
            let give = |_: usize| Ok(Arc::clone(&device));
            Engine::load_on(Arc::clone(&gguf), plan, &options, Some(&give), &mut |_, _| {}).unwrap()
        };
        let mut engine = load(&plan);
        let planned: Vec<u64> = plan.tiers.iter().map(|t| t.used_bytes()).collect();
        assert_eq!(engine.resident_bytes(), planned, "{name}");
        let n_vocab = engine.spec().n_vocab as u32;
        let got = logits(&mut engine, n_vocab);
        let expected = logits(&mut load(&obvious(&shape, 64, KvType::F32)), n_vocab);
        // Their order of sums is another, so the same bits would mean that the processor computed everything.
        assert_ne!(got, expected, "{name}");
        let square = |v: f32| f64::from(v) * f64::from(v);
        let off: f64 = got.iter().zip(&expected).map(|(a, b)| square(a - b)).sum();
        let nmse = off / expected.iter().map(|v| square(*v)).sum::<f64>();
        // Codes of 8-bit activations may round to the other side where sums differ in their last bits.
        assert!(nmse < 1e-5, "{name}: {nmse:e}");
    }
}

#[test]
fn what_a_gpu_cannot_hold_yet_is_refused() {
    let (gguf, shape) = open("arch/qwen3moe.gguf");
    let refused = |plan: &Placement| {
        let give = |_: usize| Ok(shim::shared() as Arc<dyn Device>);
        let loaded = Engine::load_on(Arc::clone(&gguf), plan, &LoadOptions::default(), Some(&give), &mut |_, _| {});
        match loaded.map(|_| ()) {
            Err(error @ LoadError::Tier { .. }) => error.to_string(),
            other => panic!("{other:?}"),
        }
    };
    let mut plan = half_on_gpu(&shape, 64);
    let group = &shape.dense[1];
    plan.dense[1].tier = 0;
    plan.tiers[0].dense_bytes += group.bytes;
    plan.tiers[1].dense_bytes -= group.bytes;
    plan.tiers[0].budget_bytes = u64::MAX;
    assert!(refused(&plan).contains("only experts can be there yet: solve with --vram 0"));
}
