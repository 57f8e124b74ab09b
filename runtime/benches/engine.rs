//! Whole layers: a decoded token and a prompt through the bundled model, by layer, on each
//! instruction set.
//!
//! `cargo bench -p tier-plan-runtime --bench engine`; set `TIER_PLAN_ISA` for one set,
//! `TIER_PLAN_BENCH_MODEL` for another model.
#![allow(missing_docs)]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::path::PathBuf;
use std::sync::Arc;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::shape_of_file;
use tier_plan_runtime::plans::in_memory::all_in_memory;
use tier_plan_runtime::threads::physical_cores;
use tier_plan_runtime::{Engine, KvType, LoadOptions, LogitsMode};

/// Tokens of the prompt, and in the context before a decoded token.
const PROMPT: u32 = 64;

fn layers(c: &mut Criterion) {
    let bundled = || {
        PathBuf::from(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../profiles/demo/demo.gguf"
        ))
    };
    let path = std::env::var_os("TIER_PLAN_BENCH_MODEL").map_or_else(bundled, PathBuf::from);
    let shape = shape_of_file(&path).expect("a model that runs");
    let mut gguf = Gguf::open(&path).expect("a model that opens");
    gguf.copy_to_memory(physical_cores(), &mut |_, _| ())
        .expect("memory for the model");
    let plan = all_in_memory(&shape, 2 * PROMPT, KvType::F16);
    let mut engine = Engine::load(
        Arc::new(gguf),
        &plan,
        &LoadOptions::default(),
        &mut |_, _| (),
    )
    .expect("a model that loads");
    let tokens: Vec<u32> = (0..PROMPT)
        .map(|i| i.wrapping_mul(2_654_435_761) % shape.n_vocab)
        .collect();
    let mut group = c.benchmark_group("layer");
    // Time of all layers and the head together; a layer's share is this divided by their number.
    group.throughput(Throughput::Elements(u64::from(shape.n_layer)));
    group.bench_function("decode", |b| {
        engine.clear();
        engine
            .forward(&tokens, LogitsMode::Last)
            .expect("the context has room");
        b.iter(|| {
            engine
                .truncate(PROMPT as usize)
                .expect("attention goes back");
            engine
                .forward(&tokens[..1], LogitsMode::Last)
                .map(|logits| logits[0])
                .expect("the context has room")
        });
    });
    group.bench_function("prompt64", |b| {
        b.iter(|| {
            engine.clear();
            engine
                .forward(&tokens, LogitsMode::Last)
                .map(|logits| logits[0])
                .expect("the context has room")
        });
    });
    group.finish();
}

criterion_group!(benches, layers);
criterion_main!(benches);
