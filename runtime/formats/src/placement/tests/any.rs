//! Any plan reads back, and no damaged one does harm.

use super::*;
use crate::copies::MAX_COPIES;
use crate::machine::tests::{any_text, any_tiers};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;
use std::collections::BTreeSet;

fn any_amount() -> impl Strategy<Value = f64> {
    prop_oneof![0.0f64..10.0, Just(0.0), Just(1e-12), Just(3e15)]
}

fn any_source() -> impl Strategy<Value = SourceId> {
    (any_text(), "[0-9a-f]{32}").prop_map(|(name, hash)| SourceId { name, hash })
}

/// Positions of tiers that are memory.
fn memory(tiers: &[Tier]) -> Vec<TierIdx> {
    TierIdx::first(tiers.len())
        .filter(|&t| tiers[t.get()].kind != TierKind::Nvme)
        .collect()
}

fn any_layers(tiers: Vec<Tier>) -> impl Strategy<Value = Vec<LayerPlacement>> {
    let n = tiers.len();
    let half_life = || 1..=MAX_HALF_LIFE;
    let policy = prop_oneof![
        3 => Just(SlotPolicy::Lru),
        1 => half_life().prop_map(|half_life| SlotPolicy::Lfu { half_life }),
        1 => (half_life(), half_life(), 0..=MAX_RECENT_WEIGHT).prop_map(
            |(half_life, recent_half_life, recent_weight)| {
                SlotPolicy::Adaptive { half_life, recent_half_life, recent_weight }
            }
        ),
    ];
    let body = (
        btree_map(0u32..70, 0..n, 0..70),
        0u32..20,
        any::<prop::sample::Index>(),
        policy,
    );
    // Few numbers in a small range, and few different bodies, so that runs of like layers are
    // common.
    (
        btree_set(0u32..12, 0..10),
        vec(body, 1..3),
        vec(any::<prop::sample::Index>(), 12),
    )
        .prop_map(move |(numbers, bodies, picks)| {
            let memory = memory(&tiers);
            let layer = |(layer, pick): (u32, prop::sample::Index)| {
                let (owner, slots, slot_tier, policy) = &bodies[pick.index(bodies.len())];
                let of = |t| {
                    owner
                        .iter()
                        .filter(|&(_, &o)| TierIdx::new(o) == t)
                        .map(|(&e, _)| e)
                        .collect::<Vec<u32>>()
                };
                LayerPlacement {
                    layer,
                    pinned: TierIdx::first(n)
                        .map(|tier| Pins {
                            tier,
                            experts: of(tier),
                        })
                        .filter(|p| !p.experts.is_empty())
                        .collect(),
                    slots: *slots,
                    slot_tier: memory[slot_tier.index(memory.len())],
                    policy: *policy,
                }
            };
            numbers.into_iter().zip(picks).map(layer).collect()
        })
}

fn any_dense(n: usize) -> impl Strategy<Value = Vec<DensePlacement>> {
    let kind = prop_oneof![
        Just(DenseKind::Attention),
        Just(DenseKind::Router),
        Just(DenseKind::SharedExpert),
        Just(DenseKind::DenseFfn)
    ];
    let whole = prop_oneof![
        Just(DenseKind::Embedding),
        Just(DenseKind::TokenTable),
        Just(DenseKind::Head)
    ];
    let key = prop_oneof![(kind, (0u32..30).prop_map(Some)), (whole, Just(None))];
    btree_map(key, 0..n, 0..60).prop_map(|map| {
        map.into_iter()
            .map(|((kind, layer), tier)| DensePlacement {
                kind,
                layer,
                tier: TierIdx::new(tier),
            })
            .collect()
    })
}

fn any_prediction(n: usize) -> impl Strategy<Value = Prediction> {
    let parts = || prop_oneof![vec(any_amount(), n), Just(Vec::new())].prop_map(PerTier::from);
    let scalars = proptest::array::uniform5(any_amount());
    let since_3 = (any::<u32>(), any_amount(), parts(), parts());
    (scalars, parts(), parts(), parts(), any::<bool>(), since_3).prop_map(
        |(s, dense_s, expert_s, read_bytes, emulated, since_3)| {
            let (at, kv_s, prompt_gflops, few_gflops) = since_3;
            let [
                decode_tok_s,
                prompt_tok_s,
                overhead_s,
                expert_critical_s,
                hit_rate,
            ] = s;
            Prediction {
                decode_tok_s,
                prompt_tok_s,
                overhead_s,
                dense_s,
                expert_s,
                expert_critical_s,
                hit_rate,
                read_bytes,
                emulated,
                at,
                kv_s,
                prompt_gflops,
                few_gflops,
            }
        },
    )
}

fn any_reads() -> impl Strategy<Value = HomeReads> {
    let io = prop_oneof![Just(DriveIo::Direct), Just(DriveIo::Buffered)];
    let copy = ("[ -~]{1,20}", 0.001f64..0.14).prop_map(|(file, share)| ExpertCopy { file, share });
    (proptest::option::of(io), vec(copy, 0..=MAX_COPIES))
        .prop_map(|(io, copies)| HomeReads { io, copies })
}

fn any_solver() -> impl Strategy<Value = SolverReport> {
    let option = || proptest::option::of(any_amount());
    let goal = (
        any_text(),
        any_amount(),
        any_text(),
        option(),
        proptest::option::of(any::<u32>()),
        option(),
    );
    let goal = goal.prop_map(
        |(objective, value, unit, bound, batch, target_tok_s)| Goal {
            objective,
            value,
            unit,
            bound,
            batch,
            target_tok_s,
        },
    );
    let goal = proptest::option::of(goal);
    (
        any_text(),
        any_text(),
        any_amount(),
        option(),
        option(),
        any_amount(),
        goal,
    )
        .prop_map(
            |(backend, status, objective_s, bound_s, gap, solve_s, goal)| SolverReport {
                backend,
                status,
                objective_s,
                bound_s,
                gap,
                solve_s,
                goal,
            },
        )
}

fn any_plan() -> impl Strategy<Value = Placement> {
    any_tiers().prop_flat_map(|tiers| {
        let n = tiers.len();
        let lines = vec((proptest::array::uniform6(0u64..1 << 60), 0u64..1 << 60), n);
        let head = (
            any_text(),
            any_source(),
            proptest::option::of(any_source()),
            any_source(),
        );
        let index = any::<prop::sample::Index>;
        let sizes = (
            any::<u32>(),
            index(),
            prop::sample::select(&KvType::ALL[..]),
            index(),
            0u32..100,
        );
        let body = (
            any_dense(n),
            any_layers(tiers.clone()),
            any_solver(),
            any_prediction(n),
        );
        (
            Just(tiers),
            lines,
            head,
            sizes,
            body,
            any_amount(),
            any_amount(),
            any_reads(),
        )
            .prop_map(
                |(
                    tiers,
                    lines,
                    (name, model, profile, machine),
                    (context, kv, kv_type, staging, staging_experts),
                    body,
                    a,
                    b,
                    reads,
                )| {
                    let memory = memory(&tiers);
                    let last = tiers.len() - 1;
                    let line = |(at, (tier, (l, spare))): (usize, (Tier, ([u64; 6], u64)))| {
                        let home = if at == last { l[5] } else { 0 };
                        let [dense, pinned, slots, kv, staging, _] = l;
                        let bytes = TierBytes {
                            dense,
                            pinned,
                            slots,
                            kv,
                            staging,
                            home,
                        };
                        PlanTier {
                            tier,
                            budget_bytes: bytes.total() + spare,
                            bytes,
                        }
                    };
                    let (dense, layers, solver, predicted) = body;
                    let is_drive = tiers[last].is_drive();
                    let reads = if is_drive {
                        reads
                    } else {
                        HomeReads::default()
                    };
                    let mut plan = Placement {
                        name,
                        model,
                        profile,
                        machine,
                        layer_overhead_us: a,
                        token_overhead_us: b,
                        context,
                        sequences: 1,
                        checkpoints: 0,
                        window_chunk: (context % 2 == 1).then_some(context),
                        kv_tier: memory[kv.index(memory.len())],
                        kv_type,
                        host_kv: Vec::new(),
                        staging_tier: memory[staging.index(memory.len())],
                        staging_experts,
                        reads,
                        streaming: None,
                        tiers: tiers.into_iter().zip(lines).enumerate().map(line).collect(),
                        dense,
                        layers,
                        solver,
                        predicted,
                    };
                    let attention = |plan: &Placement| -> Vec<TierIdx> {
                        plan.dense
                            .iter()
                            .filter(|d| d.kind == DenseKind::Attention)
                            .map(|d| d.tier)
                            .collect()
                    };
                    // Where not all attention is on GPUs, what the processor attends to is not
                    // there.
                    let on_gpus = attention(&plan)
                        .iter()
                        .all(|&t| plan.tiers[t].tier.is_gpu());
                    let host = memory
                        .iter()
                        .copied()
                        .find(|&t| !plan.tiers[t].tier.is_gpu());
                    if plan.tiers[plan.kv_tier].tier.is_gpu() && !on_gpus {
                        match host {
                            Some(host) => plan.kv_tier = host,
                            None => plan.dense.retain(|d| d.kind != DenseKind::Attention),
                        }
                    }
                    // Every second layer on a GPU has its cache elsewhere, where there is a place.
                    let on_gpu = |d: &&DensePlacement| {
                        let is_gpu = plan.tiers[d.tier].tier.is_gpu();
                        d.kind == DenseKind::Attention && is_gpu
                    };
                    if !plan.tiers[plan.kv_tier].tier.is_gpu() {
                        let layers = plan.dense.iter().filter(on_gpu).filter_map(|d| d.layer);
                        let layers: BTreeSet<u32> = layers.filter(|l| l % 2 == 1).collect();
                        plan.host_kv = layers.into_iter().collect();
                    }
                    let groups = plan.dense.iter();
                    let groups = groups.filter(|d| d.kind == DenseKind::Attention);
                    let mut has: Vec<TierIdx> = groups.map(|d| plan.cache_tier(d)).collect();
                    if has.is_empty() {
                        has.push(plan.kv_tier);
                    }
                    let find = |wanted: &dyn Fn(&Tier) -> bool| {
                        let mut tiers = plan.tiers.enumerate();
                        tiers.find(|(_, t)| wanted(&t.tier)).map(|(at, _)| at)
                    };
                    let gpu = find(&|t| t.is_gpu());
                    let memory = find(&|t| t.kind == TierKind::Dram && !t.emulated);
                    plan.streaming = gpu.zip(memory).map(|(tier, from)| Streaming {
                        tier,
                        from,
                        experts: context % 7 + 1,
                        link_gbps: 0.5 + f64::from(context),
                        cpu_share: 1.0 / f64::from(1 + context % 5),
                    });
                    plan.tiers
                        .indices()
                        .zip(&mut plan.tiers)
                        .filter(|(t, _)| !has.contains(t))
                        .for_each(|(_, t)| t.bytes.kv = 0);
                    plan
                },
            )
    })
}

proptest! {
    #[test]
    fn any_plan_reads_back(plan in any_plan()) {
        let text = plan.encode();
        let back = load(&text);
        prop_assert_eq!(back.as_ref(), Ok(&plan), "{}", text);
    }

    #[test]
    fn damage_never_panics(
        at in any::<prop::sample::Index>(),
        cut in 0usize..40,
        insert in prop_oneof![vec(any::<u8>(), 0..4), "[-0-9,.\"=\\[\\]{}]{0,4}".prop_map(String::into_bytes)],
    ) {
        let mut bytes = V2.as_bytes().to_vec();
        let at = at.index(bytes.len());
        let end = (at + cut).min(bytes.len());
        bytes.splice(at..end, insert);
        if let Ok(plan) = decode(&bytes, Path::new("p.toml")) {
            prop_assert_eq!(load(&plan.encode()), Ok(plan));
        }
    }

    #[test]
    fn swapped_lines_never_panic(a in any::<prop::sample::Index>(), b in any::<prop::sample::Index>()) {
        let mut lines: Vec<&str> = V2.lines().collect();
        let (a, b) = (a.index(lines.len()), b.index(lines.len()));
        lines.swap(a, b);
        if let Ok(plan) = load(&lines.join("\n")) {
            prop_assert_eq!(load(&plan.encode()), Ok(plan));
        }
    }
}
