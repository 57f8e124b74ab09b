//! Benchmarks replay, in choices per second, and solving, at the size of the largest models.
#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use tier_plan_planner::profile::replay::{LayerTrace, Positions, ceiling, hits};
use tier_plan_planner::profile::synthetic::{Routing, profile};
use tier_plan_planner::solve::options::Strategy;
use tier_plan_planner::solve::{Options, Problem, solve};
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::machine::{Accelerator, Machine, Tier, TierKind};
use tier_plan_runtime::formats::placement::SlotPolicy;
use tier_plan_runtime::model::kv::KvRows;
use tier_plan_runtime::model::shape::{CacheShape, DenseKind, DenseShape, ExpertShape, ModelShape};

const MB: u64 = 1_000_000;

fn id(name: &str) -> SourceId {
    SourceId {
        name: name.to_string(),
        hash: "0".repeat(32),
    }
}

fn shape(n_layer: u32, n_expert: u32, n_used: u32) -> ModelShape {
    let attention = (0..n_layer).map(|layer| DenseShape {
        kind: DenseKind::Attention,
        layer: Some(layer),
        bytes: 110 * MB,
        token_bytes: 110 * MB,
        macs: 187 * MB,
    });
    ModelShape {
        id: id("synthetic"),
        arch: "synthetic".to_string(),
        n_layer,
        hidden: 7168,
        n_vocab: 163_840,
        context: 131_072,
        caches: vec![
            CacheShape {
                rows: vec![KvRows {
                    width: 576,
                    per_token: 1,
                    every: 1,
                    queries: 128,
                    window: None,
                    chosen: None,
                }],
                state_bytes: 0,
                more_readers: 0
            };
            61
        ],
        dense: attention.collect(),
        experts: (0..n_layer)
            .map(|layer| ExpertShape {
                layer,
                n_expert,
                n_used,
                expert_bytes: 25 * MB,
                expert_macs: 44 * MB,
                by_token: false,
            })
            .collect(),
        cpu_only: Vec::new(),
    }
}

fn machine() -> Machine {
    let tier = |name: &str, kind, capacity_bytes, read_gbps, latency_us| Tier {
        name: name.to_string(),
        kind,
        capacity_bytes,
        read_gbps,
        latency_us,
        emulated: false,
        unit: None,
        accelerator: Accelerator::default(),
        source: "chosen for this benchmark".to_string(),
    };
    Machine {
        name: "bench".to_string(),
        description: String::new(),
        tiers: vec![
            tier("vram", TierKind::Vram, 24_000 * MB, 860.0, 10.0),
            tier("dram", TierKind::Dram, 192_000 * MB, 105.0, 0.0),
            tier("slow", TierKind::Nvme, 2_000_000 * MB, 7.0, 80.0),
        ],
        layer_overhead_us: 50.0,
        token_overhead_us: 500.0,
        extras: Default::default(),
        id: id("bench"),
    }
}

fn routing(prompts: u32) -> Routing {
    Routing {
        skew: 0.8,
        repeat: 0.3,
        prompts,
        prompt_tokens: 192,
        decode_tokens: 128,
        seed: 1,
    }
}

fn replay(c: &mut Criterion) {
    let mut group = c.benchmark_group("replay");
    for n_expert in [32, 128, 384] {
        let profile = profile(&shape(1, n_expert, 8), &routing(64));
        let trace = LayerTrace::new(&profile, 0, |_| true);
        let pinned = vec![false; n_expert as usize];
        group.throughput(Throughput::Elements(
            (trace.tokens() * trace.n_used()) as u64,
        ));
        group.bench_with_input(
            BenchmarkId::new("positions", n_expert),
            &trace,
            |b, trace| {
                b.iter(|| black_box(Positions::new(trace, &pinned).hit_curve(n_expert as usize)));
            },
        );
        group.bench_with_input(BenchmarkId::new("ceiling", n_expert), &trace, |b, trace| {
            b.iter(|| black_box(ceiling(trace, n_expert as usize / 4)));
        });
    }
}

/// Steps the engine's cache with a quarter of the experts as slots, without prompts. The
/// bookkeeping of a decoded token in one layer takes the time of its choices.
fn stepping(c: &mut Criterion) {
    let mut group = c.benchmark_group("stepping");
    for n_expert in [128, 384] {
        let profile = profile(
            &shape(1, n_expert, 8),
            &Routing {
                prompt_tokens: 0,
                ..routing(64)
            },
        );
        let trace = LayerTrace::new(&profile, 0, |_| true);
        let pinned = vec![false; n_expert as usize];
        group.throughput(Throughput::Elements(
            (trace.tokens() * trace.n_used()) as u64,
        ));
        for policy in [
            SlotPolicy::Lru,
            SlotPolicy::Lfu { half_life: 16 },
            SlotPolicy::Adaptive {
                half_life: 64,
                recent_half_life: 2,
                recent_weight: 8,
            },
        ] {
            group.bench_with_input(
                BenchmarkId::new(policy.name(), n_expert),
                &trace,
                |b, trace| {
                    b.iter(|| black_box(hits(trace, &pinned, n_expert / 4, policy)));
                },
            );
        }
    }
}

/// Replays all layers of the largest model in one pass: 61 layers of 384 experts.
fn all_layers(c: &mut Criterion) {
    let profile = profile(
        &shape(61, 384, 8),
        &Routing {
            decode_tokens: 512,
            ..routing(4)
        },
    );
    let traces: Vec<LayerTrace> = (0..61)
        .map(|layer| LayerTrace::new(&profile, layer, |_| true))
        .collect();
    let mut group = c.benchmark_group("replay");
    let accesses: usize = traces
        .iter()
        .map(|trace| trace.tokens() * trace.n_used())
        .sum();
    group.throughput(Throughput::Elements(accesses as u64));
    let pinned = [false; 384];
    group.bench_function("positions/61x384", |b| {
        b.iter(|| {
            traces
                .iter()
                .for_each(|trace| drop(black_box(Positions::new(trace, &pinned).hit_curve(384))))
        });
    });
}

fn solving(c: &mut Criterion) {
    let mut group = c.benchmark_group("solve");
    group.sample_size(10);
    for (n_layer, n_expert, n_used) in [(6, 32, 4), (48, 128, 8), (61, 384, 8)] {
        let (shape, machine) = (shape(n_layer, n_expert, n_used), machine());
        let profile = profile(&shape, &routing(16));
        let all = shape.weight_bytes();
        // A tenth and a third of the weights; at the largest size that is about the machine's own
        // capacity.
        let budgets = vec![
            (all / 10).min(24_000 * MB),
            (all / 3).min(192_000 * MB),
            2_000_000 * MB,
        ];
        let problem = Problem {
            shape: &shape,
            profile: Some(&profile),
            machine: &machine,
            budgets,
            context: 4096,
            sequences: 1,
            kv_type: KvType::F16,
            position: None,
        };
        let options = Options {
            strategy: Strategy::Optimal,
            time_limit_s: 5.0,
            ..Options::default()
        };
        if let Ok(solved) = solve(&problem, &options) {
            eprintln!("{n_layer} x {n_expert}: {:?}", solved.plan.solver);
        }
        group.bench_function(format!("{n_layer}x{n_expert}"), |b| {
            b.iter(|| black_box(solve(&problem, &options)))
        });
    }
}

criterion_group!(benches, replay, stepping, all_layers, solving);
criterion_main!(benches);
