use super::problem::capacity::MAX_FAST;
use super::problem::columns;
use super::*;
use crate::cost::{self, predict, token_s};
use crate::profile::Judged;
use crate::profile::synthetic::{self, Random, Routing};
use enumeration::{cases, everything, exhaustive, is_nightly, treatments};
use proptest::prelude::{TestCaseError, prop_assert, prop_assert_eq, proptest};
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::machine::{Accelerator, Machine, Tier, TierKind};
use tier_plan_runtime::formats::placement::{
    LayerPlacement, PerTier, Pins, Placement, SlotPolicy, TierIdx,
};
use tier_plan_runtime::formats::profile::{Guesses, Profile};
use tier_plan_runtime::model::kv::KvRows;
use tier_plan_runtime::model::shape::{CacheShape, DenseKind, DenseShape, ExpertShape, ModelShape};

fn id(name: &str) -> SourceId {
    SourceId {
        name: name.to_string(),
        hash: "0".repeat(32),
    }
}

fn tier(name: &str, kind: TierKind, read_gbps: f64, latency_us: f64) -> Tier {
    Tier {
        name: name.to_string(),
        kind,
        capacity_bytes: 1 << 40,
        read_gbps,
        latency_us,
        // What lies on an emulated GPU has no constraints but its own limits.
        emulated: kind == TierKind::Vram,
        unit: None,
        accelerator: Accelerator::default(),
        source: String::new(),
    }
}

fn machine(tiers: Vec<Tier>) -> Machine {
    Machine {
        name: "test".to_string(),
        description: String::new(),
        tiers,
        layer_overhead_us: 3.0,
        token_overhead_us: 20.0,
        extras: Default::default(),
        id: id("machine"),
    }
}

fn three_tiers() -> Vec<Tier> {
    vec![
        tier("vram", TierKind::Vram, 300.0, 8.0),
        tier("dram", TierKind::Dram, 20.0, 0.0),
        tier("slow", TierKind::Nvme, 2.0, 60.0),
    ]
}

/// Two GPUs, the CPU's memory, another CPU's over the link, and a drive.
fn five_tiers() -> Vec<Tier> {
    vec![
        tier("gpu-a", TierKind::Vram, 300.0, 8.0),
        tier("gpu-b", TierKind::Vram, 150.0, 12.0),
        tier("dram", TierKind::Dram, 20.0, 0.0),
        tier("far", TierKind::Cxl, 11.0, 1.0),
        tier("slow", TierKind::Nvme, 2.0, 60.0),
    ]
}

fn shape(n_layer: u32, n_expert: u32, n_used: u32, expert_bytes: u64) -> ModelShape {
    let dense = |kind, layer, bytes, token_bytes| DenseShape {
        kind,
        layer,
        bytes,
        token_bytes,
        macs: bytes,
    };
    let mut groups = vec![
        dense(DenseKind::Embedding, None, 3 * expert_bytes, 100),
        dense(DenseKind::Head, None, 2 * expert_bytes, 2 * expert_bytes),
    ];
    groups.extend(
        (0..n_layer).map(|l| dense(DenseKind::Attention, Some(l), expert_bytes, expert_bytes)),
    );
    ModelShape {
        id: id("model"),
        arch: "test".to_string(),
        n_layer,
        hidden: 64,
        n_vocab: 100,
        context: 4096,
        caches: (0..n_layer)
            .map(|l| {
                if l == 0 {
                    cache(5)
                } else {
                    CacheShape::default()
                }
            })
            .collect(),
        dense: groups,
        experts: (0..n_layer)
            .map(|layer| ExpertShape {
                layer,
                n_expert,
                n_used,
                expert_bytes,
                expert_macs: expert_bytes,
                by_token: false,
            })
            .collect(),
        cpu_only: Vec::new(),
    }
}

/// Returns a KV cache of one row per position with `width` values.
fn cache(width: u64) -> CacheShape {
    CacheShape {
        rows: vec![KvRows {
            width,
            per_token: 1,
            every: 1,
            queries: 1,
            window: None,
            chosen: None,
        }],
        state_bytes: 0,
        more_readers: 0,
    }
}

fn routing(seed: u64) -> Routing {
    Routing {
        skew: 0.9,
        repeat: 0.3,
        prompts: 8,
        prompt_tokens: 6,
        decode_tokens: 12,
        seed,
    }
}

/// Returns options whose time limit is 5 s in the gate, and 20 s with `TIER_PLAN_NIGHTLY=1`.
///
/// Small instances are solved to the optimum in less; larger ones take all of it.
fn options() -> Options {
    let time_limit_s = if is_nightly() { 20.0 } else { 5.0 };
    Options {
        time_limit_s,
        ..Options::default()
    }
}

/// Returns the options of a test that asks for a good plan, and not for the best one.
fn quick() -> Options {
    Options {
        depth: Depth::Quick,
        ..options()
    }
}

/// Makes a small instance: model, profile (or none), machine, budgets.
fn instance(seed: u64) -> (ModelShape, Option<Profile>, Machine, Vec<u64>) {
    let mut random = Random::new(seed + 1);
    let mut pick = |from: u64, to: u64| from + random.below((to - from + 1) as usize) as u64;
    let mut kinds = match pick(0, 9) {
        0..=2 => three_tiers(),
        3 => three_tiers().split_off(1),
        4 => three_tiers()[..2].to_vec(),
        5 => vec![
            tier("vram", TierKind::Vram, 100.0, 4.0),
            tier("dram", TierKind::Dram, 20.0, 0.0),
            tier("optane", TierKind::Pmem, 7.0, 1.0),
        ],
        6 => {
            let mut tiers = three_tiers();
            tiers.insert(2, tier("cxl", TierKind::Cxl, 9.0, 2.0));
            tiers
        }
        7 => {
            let mut tiers = three_tiers();
            tiers.insert(1, tier("gpu-b", TierKind::Vram, 120.0, 9.0));
            tiers
        }
        8 => {
            let mut tiers = five_tiers();
            tiers.pop();
            tiers
        }
        _ => five_tiers(),
    };
    // Some links are slower than the memory at the other end.
    if pick(0, 1) > 0 {
        let vram = kinds.iter_mut().filter(|t| t.kind == TierKind::Vram);
        vram.for_each(|t| {
            t.accelerator.link_gbps = Some(pick(5, 80) as f64 / 10.0);
            t.accelerator.layer_us = Some(pick(0, 40) as f64);
        });
    }
    let n_expert =
        pick(3, if kinds.len() > 3 { 4 } else { 5 }).min(if kinds.len() == 5 { 3 } else { 5 })
            as u32;
    let layers = pick(1, if kinds.len() == 5 { 1 } else { 2 }) as u32;
    let mut shape = shape(layers, n_expert, pick(1, 2) as u32, 1000);
    for layer in &mut shape.experts {
        layer.expert_bytes = pick(900, 1100) * 1000;
        layer.by_token = pick(0, 3) == 0;
    }
    if pick(0, 2) == 0 {
        shape.dense.push(DenseShape {
            kind: DenseKind::TokenTable,
            ..shape.dense[0]
        });
    }
    for group in &mut shape.dense {
        group.bytes = pick(300, 2000) * 1000;
        group.token_bytes = group.bytes / pick(1, 3);
    }
    // Up to 400 kB for the 100 positions of the tests; some layers are alike.
    let widths = [pick(0, 2000), pick(0, 2000)];
    for of in &mut shape.caches {
        *of = cache(widths[pick(0, 1) as usize]);
    }
    let mut profile = (pick(0, 4) > 0).then(|| synthetic::profile(&shape, &routing(seed)));
    // Predictions that are good for prefetching, and some that are not.
    if let Some(profile) = profile.as_mut().filter(|_| pick(0, 1) > 0) {
        profile.guesses = Some(
            (0..layers)
                .map(|_| Guesses {
                    made: 10,
                    right: pick(3, 10),
                })
                .collect(),
        );
    }
    let dense: u64 = shape.dense.iter().map(|d| d.bytes).sum();
    let experts = shape.weight_bytes() - dense;
    let home = kinds.len() - 1;
    let budgets = (0..kinds.len())
        .map(|t| match kinds[t].kind {
            _ if t == home => dense + experts,
            TierKind::Dram => dense + 8_000_000 + experts * pick(0, 60) / 100,
            _ => (dense + experts) * pick(0, 60) / 100,
        })
        .collect();
    (shape, profile, machine(kinds), budgets)
}

/// Returns the plan of a solution.
fn plan_of(problem: &Problem<'_>, options: &Options) -> Result<Placement> {
    Ok(solve(problem, options)?.plan)
}

/// A larger instance with its evidence.
fn larger() -> (ModelShape, Profile, Machine, Vec<u64>) {
    let shape = shape(12, 40, 4, 1_000_000);
    let routing = Routing {
        skew: 1.0,
        repeat: 0.2,
        prompts: 12,
        prompt_tokens: 20,
        decode_tokens: 40,
        seed: 7,
    };
    let profile = synthetic::profile(&shape, &routing);
    (
        shape,
        profile,
        machine(three_tiers()),
        vec![80_000_000, 160_000_000, 1 << 40],
    )
}

#[test]
fn baselines_use_their_bytes_and_never_beat_the_optimum() -> Result<()> {
    let (shape, profile, machine, budgets) = larger();
    let problem = Problem {
        shape: &shape,
        profile: Some(&profile),
        machine: &machine,
        budgets,
        context: 1000,
        sequences: 1,
        kv_type: KvType::F16,
        position: None,
    };
    // Ends as soon as the gap is closed; the limit is for machines that are busy.
    let solved = solve(
        &problem,
        &Options {
            time_limit_s: 60.0,
            ..options()
        },
    )?;
    assert_eq!(solved.baselines.len(), 4);
    for plan in &solved.baselines {
        // Less than one expert is left of each fast tier, besides the slots' even spread over the
        // layers
        for tier in plan.tiers.iter().take(2) {
            let spare = tier.budget_bytes - tier.used_bytes();
            // and page padding.
            let pages = (tier.budget_bytes as f64 * problem::capacity::page_share(&shape)) as u64;
            assert!(
                spare < 4_000_000 + pages,
                "{} leaves {spare} of {}",
                plan.name,
                tier.tier.name
            );
        }
        assert!(solved.plan.solver.objective_s < plan.solver.objective_s);
    }
    assert!(
        solved.plan.solver.gap.is_some_and(|gap| gap < 1e-3),
        "{:?}",
        solved.plan.solver
    );
    assert!(
        solved
            .ceiling_hit_rate
            .is_some_and(|c| c >= solved.plan.predicted.hit_rate)
    );
    let by_name = |name: &str| solved.baselines.iter().find(|b| b.name == name);
    assert!(by_name("lru-only").is_some_and(|p| p.layers.iter().all(|l| l.pinned.is_empty())));
    assert!(
        by_name("first-layers-cpu").is_some_and(|p| p.layers[11].pinned
            == [Pins {
                tier: TierIdx::FIRST,
                experts: (0..40).collect()
            }])
    );
    Ok(())
}

#[test]
fn a_real_drive_leaves_room_for_page_padding() -> Result<()> {
    let shape = shape(4, 16, 2, 2_000_000);
    let capacity = |emulated: bool, dram: u64| {
        let mut tiers = three_tiers();
        tiers[2].emulated = emulated;
        let machine = machine(tiers);
        let budgets = vec![10_000_000, dram, 1 << 40];
        let problem = Problem {
            shape: &shape,
            profile: None,
            machine: &machine,
            budgets,
            context: 10,
            sequences: 1,
            kv_type: KvType::F16,
            position: None,
        };
        Capacity::new(&problem).map(|capacity| capacity.left_bytes)
    };
    let (real, emulated) = (capacity(false, 60_000_000)?, capacity(true, 60_000_000)?);
    let kept = emulated[1] - real[1];
    // Slots and staging as the engine makes them: three slices, each with at most two pages more.
    let buffers = (real[1] - 18_000_000) / 2_000_000 + 4;
    assert!(
        kept >= buffers * 6 * 4096 * 9 / 10 && kept < 2_000_000,
        "{kept} for {buffers} buffers"
    );
    // The dense groups of 18 MB have no slots among them. A model that fits in memory needs none.
    assert_eq!(real[0], emulated[0]);
    assert_eq!(capacity(false, 200_000_000)?, capacity(true, 200_000_000)?);
    Ok(())
}

#[test]
fn planted_mistakes_are_found() -> Result<()> {
    let (shape, profile, machine, budgets) = larger();
    let problem = Problem {
        shape: &shape,
        profile: Some(&profile),
        machine: &machine,
        budgets,
        context: 1000,
        sequences: 1,
        kv_type: KvType::F16,
        position: None,
    };
    let evidence = Evidence::recorded(&shape, &profile)?;
    let solved = solve(
        &problem,
        &Options {
            strategy: Strategy::FrequencyFirst,
            time_limit_s: 1.0,
            ..Options::default()
        },
    )?;
    let good = solved.plan;
    assert_eq!(
        verify::verify(&good, &shape, &evidence),
        Vec::<String>::new()
    );
    let finds = |word: &str, spoil: &dyn Fn(&mut Placement)| {
        let mut plan = good.clone();
        spoil(&mut plan);
        let wrong = verify::verify(&plan, &shape, &evidence).join("; ");
        assert!(wrong.contains(word), "{word}: {wrong}");
    };
    finds("not once", &|p| {
        p.dense.pop();
    });
    finds("2 times", &|p| p.dense.push(p.dense[0].clone()));
    finds("nothing computes", &|p| p.dense[1].tier = TierIdx::new(2));
    finds("twice", &|p| {
        let expert = p.layers[3].pinned[0].experts[0];
        p.layers[3].pinned[1].experts.push(expert);
    });
    finds("expert 40 of 40", &|p| {
        p.layers[3].pinned[0].experts.push(40)
    });
    finds("where none can be", &|p| {
        p.layers[3].pinned[0].tier = TierIdx::new(2)
    });
    finds("says", &|p| p.tiers[TierIdx::FIRST].bytes.pinned -= 1);
    finds("over its budget", &|p| {
        p.tiers[TierIdx::FIRST].budget_bytes -= 4_000_000
    });
    finds("above its capacity", &|p| {
        p.tiers[TierIdx::FIRST].budget_bytes = 2 << 40
    });
    finds("says", &|p| p.layers[0].slots = 4);
    finds("slots on tier", &|p| {
        (p.layers[0].slots, p.layers[0].slot_tier) = (4, TierIdx::new(2))
    });
    finds("pooled", &|p| p.layers[0].slots = 400);
    finds("layers with experts", &|p| {
        p.layers.pop();
    });
    finds("a replay gives", &|p| {
        p.predicted.decode_tok_s *= 1.0 + 1e-6
    });
    finds("objective", &|p| p.solver.objective_s *= 1.0 + 1e-6);
    finds("proven bound", &|p| {
        p.solver.bound_s = Some(p.solver.objective_s * 1.01)
    });
    finds("not 'model'", &|p| {
        p.model = SourceId {
            name: "other".to_string(),
            hash: "1".repeat(32),
        }
    });
    finds("a replay gives", &|p| {
        let mine = p.layers[5].pinned[0].experts.remove(0);
        let other = p.layers[5].pinned[1].experts.remove(0);
        p.layers[5].pinned[0].experts.push(other);
        p.layers[5].pinned[1].experts.push(mine);
    });
    Ok(())
}

/// Plans that the solver would not make are charged as documented too, few slots included.
#[test]
fn the_prediction_is_a_token_by_token_simulation() -> Result<()> {
    let shape = shape(2, 9, 3, 1_000_000);
    let profile = synthetic::profile(&shape, &routing(5));
    let evidence = Evidence::recorded(&shape, &profile)?;
    for tiers in [
        three_tiers(),
        three_tiers()[..2].to_vec(),
        instance(0).2.tiers,
    ] {
        let machine = machine(tiers);
        let budgets = vec![1 << 40; machine.tiers.len()];
        let problem = Problem {
            shape: &shape,
            profile: Some(&profile),
            machine: &machine,
            budgets,
            context: 10,
            sequences: 1,
            kv_type: KvType::F16,
            position: None,
        };
        let plan = plan_of(
            &problem,
            &Options {
                strategy: Strategy::Uniform,
                time_limit_s: 1.0,
                ..Options::default()
            },
        )?;
        let mut random = Random::new(3);
        for _ in 0..100 {
            let mut plan = plan.clone();
            let fast = plan.tiers.len() - 1;
            for layer in &mut plan.layers {
                let mut pins = vec![Vec::new(); fast];
                for expert in 0..9 {
                    let tier = random.below(2 * fast + 1);
                    if tier < fast {
                        pins[tier].push(expert);
                    }
                }
                let pooled = 9 - pins.iter().map(Vec::len).sum::<usize>();
                layer.pinned = TierIdx::first(fast)
                    .zip(pins)
                    .map(|(tier, experts)| Pins { tier, experts })
                    .collect();
                layer.slots = random.below(pooled + 1) as u32;
                layer.slot_tier = TierIdx::new(random.below(fast));
                layer.policy = [
                    SlotPolicy::Lru,
                    SlotPolicy::Lfu { half_life: 4 },
                    SlotPolicy::Adaptive {
                        half_life: 16,
                        recent_half_life: 2,
                        recent_weight: 3,
                    },
                ][random.below(3)];
            }
            let predicted = token_s(&predict(&plan, &shape, &evidence));
            let stepped = verify::token_s(&plan, &shape, &evidence);
            assert!(
                (predicted - stepped).abs() < 1e-12 * stepped,
                "{predicted} {stepped}"
            );
        }
    }
    Ok(())
}

#[test]
fn infeasible_problems_get_a_hint() {
    let shape = shape(4, 8, 2, 1_000_000);
    let machine = machine(three_tiers());
    let refused = |budgets: [u64; 3], context: u32, words: &[&str]| {
        let problem = Problem {
            shape: &shape,
            profile: None,
            machine: &machine,
            budgets: budgets.to_vec(),
            context,
            sequences: 1,
            kv_type: KvType::F16,
            position: None,
        };
        let error = solve(&problem, &options())
            .err()
            .map(|e| format!("{e:#}"))
            .unwrap_or_default();
        assert!(
            words.iter().all(|w| error.contains(w)),
            "{words:?}: {error}"
        );
    };
    refused(
        [0, 3_000_000, 1 << 40],
        0,
        &[
            "'dram'",
            "4 experts in flight",
            "raise the budget of 'dram' by",
        ],
    );
    refused(
        [0, 4_000_000, 1 << 40],
        1000,
        &[
            "'dram'",
            "context",
            "raise the budget of 'dram' by 9.77 KiB",
        ],
    );
    refused(
        [0, 4_005_000, 1 << 40],
        1000,
        &["context", "or give --context 500"],
    );
    refused(
        [0, 4_008_000, 1 << 40],
        1000,
        &["context", "or give --kv-type q8_0", "or give --context 800"],
    );
    refused(
        [0, 9_000_000, 1 << 40],
        0,
        &[
            "dense tensors",
            "'vram' and 'dram'",
            "raise the budget of 'dram' by",
        ],
    );
    refused(
        [0, 14_000_000, 9_000_000],
        0,
        &["the weights", "raise the budget of 'slow' by"],
    );
    refused(
        [8_000_000, 5_999_999, 1 << 41],
        0,
        &["budget of tier 'slow'", "lower"],
    );
    // The sums fit, but not without cutting a group in two.
    refused(
        [500_000, 9_500_000, 1 << 40],
        0,
        &["no way to divide", "largest dense group"],
    );
}

#[test]
fn everything_in_fast_memory_is_optimal() -> Result<()> {
    let shape = shape(4, 8, 2, 1_000_000);
    let profile = synthetic::profile(&shape, &routing(1));
    let machine = machine(vec![tier("dram", TierKind::Dram, 20.0, 0.0)]);
    let budgets = vec![1 << 30];
    let problem = Problem {
        shape: &shape,
        profile: Some(&profile),
        machine: &machine,
        budgets,
        context: 10,
        sequences: 1,
        kv_type: KvType::F16,
        position: None,
    };
    let solved = solve(&problem, &options())?;
    assert_eq!(solved.plan.solver.status, "optimal");
    // Halfway through the context: five positions of a row of five 16-bit values.
    let expected = 20e-6 + 4.0 * 3e-6 + (shape.token_bytes() + 5 * 5 * 2) as f64 / 20e9;
    assert!((solved.plan.solver.objective_s - expected).abs() < 1e-12);
    Ok(())
}

#[test]
fn recurrent_state_has_its_room_whatever_the_context() -> Result<()> {
    let (mut shape, profile, machine, budgets) = larger();
    shape.caches[3].state_bytes = 123_456;
    for (context, kv_type, bytes) in [
        (1, KvType::F16, 10),
        (2000, KvType::F16, 10),
        (2000, KvType::Q8_0, 7),
    ] {
        let budgets = budgets.clone();
        let problem = Problem {
            shape: &shape,
            profile: Some(&profile),
            machine: &machine,
            budgets,
            context,
            sequences: 1,
            kv_type,
            position: None,
        };
        let evidence = Evidence::new(&shape, Some(&profile))?;
        let plan = solve(&problem, &quick())?.plan;
        let kv_bytes: u64 = plan.tiers.iter().map(|t| t.bytes.kv).sum();
        assert_eq!(
            (kv_bytes, plan.kv_type),
            (bytes * u64::from(context) + 123_456, kv_type)
        );
        assert_eq!(
            verify::verify(&plan, &shape, &evidence),
            Vec::<String>::new()
        );
        shape.caches[3].state_bytes += 1;
        assert!(!verify::verify(&plan, &shape, &evidence).is_empty());
        shape.caches[3].state_bytes -= 1;
    }
    Ok(())
}

mod by_token;

mod enumeration;

mod gpus;

mod host_kv;

mod replanned;

mod goals;

mod streaming;

mod warm;

/// Both solvers of the integer program find choices of the same cost.
#[cfg(feature = "highs")]
#[test]
fn highs_agrees_with_microlp() -> Result<()> {
    use super::bound::lagrangian;
    use super::primal::choice::Master;
    use super::primal::mip;
    use super::problem::columns::Charge;
    use super::problem::enumerate::ColumnEnumerator;
    let mut tried = 0;
    for seed in 0..60 {
        let (shape, profile, machine, budgets) = instance(seed * 7919);
        let (profile, kv_type) = (profile.as_ref(), KvType::F16);
        let problem = Problem {
            shape: &shape,
            profile,
            machine: &machine,
            budgets,
            context: 100,
            sequences: 1,
            kv_type,
            position: None,
        };
        let Ok(capacity) = Capacity::new(&problem) else {
            continue;
        };
        let evidence = Evidence::new(&shape, profile)?;
        let objective = ObjectiveFunction::new(Objective::Latency, None, None, &problem)?;
        let charge = Charge::linear(&objective);
        let constraints = Constraints::default();
        let enumerator =
            ColumnEnumerator::new(&shape, &evidence, &capacity, &charge, &constraints, 10.0);
        let mut items = columns::dense_items(&shape, &capacity, &charge, &constraints);
        items.extend(enumerator.items());
        let soon = Instant::now() + Duration::from_secs(10);
        let Ok(dual) = lagrangian::maximize(&items, &capacity, None, soon) else {
            continue;
        };
        let master = Master {
            items: &items,
            capacity: &capacity,
            dual: &dual,
        };
        let limits = mip::Limits {
            max_columns: mip::MAX_COLUMNS,
            seconds: 10.0,
        };
        let [a, b] =
            [Backend::Microlp, Backend::Highs].map(|s| mip::solve(&master, None, limits, s));
        match (a.choice, b.choice) {
            (Some(a), Some(b)) => {
                tried += 1;
                assert!(
                    (a.cost_s - b.cost_s).abs() <= 1e-7 * a.cost_s,
                    "{seed}: {} {}",
                    a.cost_s,
                    b.cost_s
                );
            }
            (None, None) => {}
            (a, b) => panic!("{seed}: {a:?} {b:?}"),
        }
    }
    assert!(tried > 20, "{tried}");
    Ok(())
}
