use super::*;
use crate::cli::Strategy;
use crate::cost::{self, predict, token_s};
use crate::profile::synthetic::{self, Random, Routing};
use proptest::prelude::{ProptestConfig, TestCaseError, prop_assert, prop_assert_eq, proptest};
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::machine::{Accelerator, Tier, TierKind};
use tier_plan_runtime::formats::placement::{LayerPlacement, Pins, SlotPolicy};
use tier_plan_runtime::formats::profile::Guesses;
use tier_plan_runtime::model::kv::KvRows;
use tier_plan_runtime::model::shape::{CacheShape, DenseKind, DenseShape, ExpertShape};

fn id(name: &str) -> SourceId {
    SourceId { name: name.to_string(), hash: "0".repeat(32) }
}

fn tier(name: &str, kind: TierKind, read_gbps: f64, latency_us: f64) -> Tier {
    Tier {
        name: name.to_string(),
        kind,
        capacity_bytes: 1 << 40,
        read_gbps,
        latency_us,
        // Nothing but its own limits ties what lies on an emulated GPU together.
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

/// Two accelerators, the memory of the processor, another's over the link, and a drive.
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
    let dense = |kind, layer, bytes, token_bytes| DenseShape { kind, layer, bytes, token_bytes, macs: bytes };
    let mut groups = vec![
        dense(DenseKind::Embedding, None, 3 * expert_bytes, 100),
        dense(DenseKind::Head, None, 2 * expert_bytes, 2 * expert_bytes),
    ];
    groups.extend((0..n_layer).map(|l| dense(DenseKind::Attention, Some(l), expert_bytes, expert_bytes)));
    ModelShape {
        id: id("model"),
        arch: "test".to_string(),
        n_layer,
        hidden: 64,
        n_vocab: 100,
        context: 4096,
        caches: (0..n_layer).map(|l| if l == 0 { cache(5) } else { CacheShape::default() }).collect(),
        dense: groups,
        experts: (0..n_layer)
            .map(|layer| ExpertShape { layer, n_expert, n_used, expert_bytes, expert_macs: expert_bytes })
            .collect(),
    }
}

/// A layer's one row of so many values for each position.
fn cache(width: u64) -> CacheShape {
    CacheShape { rows: vec![KvRows { width, per_token: 1, queries: 1, window: None }], state_bytes: 0 }
}

fn routing(seed: u64) -> Routing {
    Routing { skew: 0.9, repeat: 0.3, prompts: 8, prompt_tokens: 6, decode_tokens: 12, seed }
}

fn options() -> Options {
    Options { strategy: Strategy::Optimal, time_limit_s: 20.0, ..Options::default() }
}

/// A small instance: machine, model, profile (or none), budgets.
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
    // Some links are slower than what is at the other end.
    if pick(0, 1) > 0 {
        let vram = kinds.iter_mut().filter(|t| t.kind == TierKind::Vram);
        vram.for_each(|t| {
            t.accelerator.link_gbps = Some(pick(5, 80) as f64 / 10.0);
            t.accelerator.layer_us = Some(pick(0, 40) as f64);
        });
    }
    let n_expert = pick(3, if kinds.len() > 3 { 4 } else { 5 }).min(if kinds.len() == 5 { 3 } else { 5 }) as u32;
    let layers = pick(1, if kinds.len() == 5 { 1 } else { 2 }) as u32;
    let mut shape = shape(layers, n_expert, pick(1, 2) as u32, 1000);
    for layer in &mut shape.experts {
        layer.expert_bytes = pick(900, 1100) * 1000;
    }
    for group in &mut shape.dense {
        group.bytes = pick(300, 2000) * 1000;
        group.token_bytes = group.bytes / pick(1, 3);
    }
    // Up to 400 kB for the 100 positions of the tests, in some layers the same.
    let widths = [pick(0, 2000), pick(0, 2000)];
    for of in &mut shape.caches {
        *of = cache(widths[pick(0, 1) as usize]);
    }
    let mut profile = (pick(0, 4) > 0).then(|| synthetic::profile(&shape, &routing(seed)));
    // Guesses that are good for reading ahead, and some that are not.
    if let Some(profile) = profile.as_mut().filter(|_| pick(0, 1) > 0) {
        profile.guesses = Some((0..layers).map(|_| Guesses { made: 10, right: pick(3, 10) }).collect());
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

/// Ways to treat one thing: bytes by tier, and seconds.
type Ways = Vec<(Vec<u64>, f64)>;

/// Every treatment of one layer: `(bytes by tier, seconds)`, found without the solver's code.
fn treatments(room: &Room, evidence: &crate::profile::LayerEvidence) -> Vec<(Vec<u64>, f64)> {
    let (n, home) = (room.tiers.len(), room.home());
    let e = evidence.shape;
    let stage = cost::ExpertStage::new(&room.tiers, e.expert_bytes, evidence.ahead);
    let mut found = Vec::new();
    let mut counts = vec![0u32; home];
    loop {
        let pinned_sum: u32 = counts.iter().sum();
        if pinned_sum <= e.n_expert {
            let pooled = e.n_expert - pinned_sum;
            let mut from = 0;
            let pinned: Vec<Pins> = counts
                .iter()
                .enumerate()
                .map(|(tier, &count)| {
                    let experts = evidence.order[from..from + count as usize].to_vec();
                    from += count as usize;
                    Pins { tier, experts }
                })
                .collect();
            let mut caches = vec![(0, room.staging_tier)];
            if !matches!(room.tiers[home].kind, TierKind::Dram) {
                let slots = (1..=pooled).filter(|&s| s >= e.n_used.min(pooled));
                caches.extend(slots.flat_map(|s| (0..home).map(move |tier| (s, tier))));
            }
            for (slots, slot_tier) in caches {
                let policy = SlotPolicy::Lru;
                let layer = LayerPlacement { layer: e.layer, pinned: pinned.clone(), slots, slot_tier, policy };
                let outcomes = cost::outcomes(&layer, evidence, &room.tiers, room.staging_tier);
                let mut bytes = vec![0; n];
                counts.iter().enumerate().for_each(|(t, &c)| bytes[t] += u64::from(c) * e.expert_bytes);
                bytes[slot_tier] += u64::from(slots) * e.expert_bytes;
                bytes[home] += u64::from(pooled) * e.expert_bytes;
                found.push((bytes, cost::stage_mean_s(&stage, &outcomes, layer.brought_to(room.staging_tier))));
            }
        }
        let Some(at) = counts.iter().position(|&c| c < e.n_expert) else { break };
        counts[..at].fill(0);
        counts[at] += 1;
    }
    found
}

/// The least seconds of all choices, by trying all that fit.
fn exhaustive(things: &[Vec<(Vec<u64>, f64)>], left: &[u64]) -> Option<f64> {
    let Some((first, rest)) = things.split_first() else { return Some(0.0) };
    let mut best: Option<f64> = None;
    for (bytes, seconds) in first {
        let after: Option<Vec<u64>> = left.iter().zip(bytes).map(|(l, b)| l.checked_sub(*b)).collect();
        if let Some(total) = after.and_then(|left| exhaustive(rest, &left)) {
            best = Some(best.map_or(total + seconds, |b| b.min(total + seconds)));
        }
    }
    best
}

/// By thing, all `(bytes by tier, seconds)`, and what is left for them. Attention has its layer's cache with it: on a real
/// GPU there, and else where the room has it. 100 positions are held, and 50 read.
fn everything(shape: &ModelShape, room: &Room, evidence: &Evidence) -> (Vec<Ways>, Vec<u64>) {
    let n = room.tiers.len();
    let mut things: Vec<Ways> = evidence.layers.iter().map(|l| treatments(room, l)).collect();
    for group in &shape.dense {
        let on = |t: usize| {
            let rate = |t: usize| room.tiers[t].read_gbps * 1e9;
            let mut bytes = vec![0; n];
            bytes[t] = group.bytes;
            let mut seconds = group.token_bytes as f64 / rate(t);
            if group.kind == DenseKind::Attention {
                seconds += room.tiers[t].accelerator.layer_us.unwrap_or(0.0) * 1e-6;
                let real = room.tiers[t].kind == TierKind::Vram && !room.tiers[t].emulated;
                let at = if real { t } else { room.kv_tier };
                let row =
                    shape.caches[group.layer.unwrap_or_default() as usize].rows.first().map_or(0, |r| 2 * r.width);
                bytes[at] += 100 * row;
                seconds += (50 * row) as f64 / rate(at);
            }
            (bytes, seconds)
        };
        let allowed = |t: &usize| group.kind == DenseKind::Embedding || room.tiers[*t].kind != TierKind::Nvme;
        things.push((0..n).filter(allowed).map(on).collect());
    }
    let mut left = room.left_bytes.clone();
    left[room.kv_tier] += room.kv_bytes;
    (things, left)
}

fn optimum(shape: &ModelShape, room: &Room, evidence: &Evidence) -> Option<f64> {
    let (things, left) = everything(shape, room, evidence);
    exhaustive(&things, &left)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2500))]

    #[test]
    fn small_instances_are_solved_to_the_optimum(seed in 0u64..u64::MAX / 2) {
        let (shape, profile, mut machine, budgets) = instance(seed);
        machine.tiers.iter_mut().for_each(|t| t.emulated &= seed % 2 == 0);
        let inputs = Inputs { shape: &shape, profile: profile.as_ref(), machine: &machine, budgets, context: 100, kv_type: KvType::F16 };
        let Ok(rooms) = Room::all(&inputs, &wishes::Wishes::default()) else { return Ok(()) };
        let evidence = Evidence::new(&shape, profile.as_ref()).map_err(|e| TestCaseError::fail(e.to_string()))?;
        let fixed = cost::overhead_s(shape.n_layer, machine.layer_overhead_us, machine.token_overhead_us);
        // Wherever the cache is.
        let of = |room: &Room| optimum(&shape, room, &evidence).map(|least| least + fixed);
        let least = rooms.iter().filter_map(of).min_by(f64::total_cmp);
        match (solve_all(&inputs, &options()), least) {
            (Ok(solved), Some(least)) => {
                let report = &solved.plan.solver;
                prop_assert!(report.bound_s.is_none_or(|b| b <= least * (1.0 + 1e-9)), "{report:?} {least}");
                // A rule that ignores the train split may be luckier than every plan that follows it.
                prop_assert!(report.objective_s <= least * (1.0 + 1e-9), "{report:?} {least}");
                prop_assert!(report.status.starts_with("feasible: ") || report.status == "optimal", "{report:?}");
                for plan in &solved.baselines {
                    prop_assert!(report.objective_s <= plan.solver.objective_s * (1.0 + 1e-9));
                    prop_assert_eq!(check::check(plan, &shape, &evidence), Vec::<String>::new());
                }
            }
            (Err(_), None) => {}
            (got, want) => prop_assert!(false, "{got:?} {want:?}"),
        }
    }
}

/// A larger instance with its evidence.
fn larger() -> (ModelShape, Profile, Machine, Vec<u64>) {
    let shape = shape(12, 40, 4, 1_000_000);
    let routing = Routing { skew: 1.0, repeat: 0.2, prompts: 12, prompt_tokens: 20, decode_tokens: 40, seed: 7 };
    let profile = synthetic::profile(&shape, &routing);
    (shape, profile, machine(three_tiers()), vec![80_000_000, 160_000_000, 1 << 40])
}

#[test]
fn rules_use_their_bytes_and_never_beat_the_program() -> Result<()> {
    let (shape, profile, machine, budgets) = larger();
    let inputs = Inputs {
        shape: &shape,
        profile: Some(&profile),
        machine: &machine,
        budgets,
        context: 1000,
        kv_type: KvType::F16,
    };
    let solved = solve_all(&inputs, &Options { time_limit_s: 30.0, ..options() })?;
    assert_eq!(solved.baselines.len(), 4);
    for plan in &solved.baselines {
        // Less than one expert is left of each fast tier, but for the slots' even spread over the layers.
        for tier in &plan.tiers[..2] {
            let spare = tier.budget_bytes - tier.used_bytes();
            // and the room for pages.
            let pages = (tier.budget_bytes as f64 * room::page_share(&shape)) as u64;
            assert!(spare < 4_000_000 + pages, "{} leaves {spare} of {}", plan.name, tier.tier.name);
        }
        assert!(solved.plan.solver.objective_s < plan.solver.objective_s);
    }
    assert!(solved.plan.solver.gap.is_some_and(|gap| gap < 1e-3), "{:?}", solved.plan.solver);
    assert!(solved.ceiling_hit_rate.is_some_and(|c| c >= solved.plan.predicted.hit_rate));
    let by_name = |name: &str| solved.baselines.iter().find(|b| b.name == name);
    assert!(by_name("lru-only").is_some_and(|p| p.layers.iter().all(|l| l.pinned.is_empty())));
    assert!(
        by_name("first-layers-cpu")
            .is_some_and(|p| p.layers[11].pinned == [Pins { tier: 0, experts: (0..40).collect() }])
    );
    Ok(())
}

#[test]
fn a_real_drive_leaves_room_for_pages() -> Result<()> {
    let shape = shape(4, 16, 2, 2_000_000);
    let room = |emulated: bool, dram: u64| {
        let mut tiers = three_tiers();
        tiers[2].emulated = emulated;
        let machine = machine(tiers);
        let budgets = vec![10_000_000, dram, 1 << 40];
        let inputs =
            Inputs { shape: &shape, profile: None, machine: &machine, budgets, context: 10, kv_type: KvType::F16 };
        Room::new(&inputs).map(|room| room.left_bytes)
    };
    let (real, emulated) = (room(false, 60_000_000)?, room(true, 60_000_000)?);
    let kept = emulated[1] - real[1];
    // Slots and staging as the engine makes them: three slices, at most two pages more each.
    let buffers = (real[1] - 18_000_000) / 2_000_000 + 4;
    assert!(kept >= buffers * 6 * 4096 * 9 / 10 && kept < 2_000_000, "{kept} for {buffers} buffers");
    // The dense groups of 18 MB have no slots among them, and what is all in memory needs none.
    assert_eq!(real[0], emulated[0]);
    assert_eq!(room(false, 200_000_000)?, room(true, 200_000_000)?);
    Ok(())
}

#[test]
fn planted_mistakes_are_found() -> Result<()> {
    let (shape, profile, machine, budgets) = larger();
    let inputs = Inputs {
        shape: &shape,
        profile: Some(&profile),
        machine: &machine,
        budgets,
        context: 1000,
        kv_type: KvType::F16,
    };
    let evidence = Evidence::recorded(&shape, &profile)?;
    let solved =
        solve_all(&inputs, &Options { strategy: Strategy::FrequencyFirst, time_limit_s: 1.0, ..Options::default() })?;
    let good = solved.plan;
    assert_eq!(check::check(&good, &shape, &evidence), Vec::<String>::new());
    let finds = |word: &str, spoil: &dyn Fn(&mut Placement)| {
        let mut plan = good.clone();
        spoil(&mut plan);
        let wrong = check::check(&plan, &shape, &evidence).join("; ");
        assert!(wrong.contains(word), "{word}: {wrong}");
    };
    finds("not once", &|p| {
        p.dense.pop();
    });
    finds("2 times", &|p| p.dense.push(p.dense[0].clone()));
    finds("nothing computes", &|p| p.dense[1].tier = 2);
    finds("twice", &|p| {
        let expert = p.layers[3].pinned[0].experts[0];
        p.layers[3].pinned[1].experts.push(expert);
    });
    finds("expert 40 of 40", &|p| p.layers[3].pinned[0].experts.push(40));
    finds("where none can be", &|p| p.layers[3].pinned[0].tier = 2);
    finds("says", &|p| p.tiers[0].bytes.pinned -= 1);
    finds("over its budget", &|p| p.tiers[0].budget_bytes -= 4_000_000);
    finds("above its capacity", &|p| p.tiers[0].budget_bytes = 2 << 40);
    finds("says", &|p| p.layers[0].slots = 4);
    finds("slots on tier", &|p| (p.layers[0].slots, p.layers[0].slot_tier) = (4, 2));
    finds("pooled", &|p| p.layers[0].slots = 400);
    finds("layers with experts", &|p| {
        p.layers.pop();
    });
    finds("a replay gives", &|p| p.predicted.decode_tok_s *= 1.0 + 1e-6);
    finds("objective", &|p| p.solver.objective_s *= 1.0 + 1e-6);
    finds("proven bound", &|p| p.solver.bound_s = Some(p.solver.objective_s * 1.01));
    finds("not 'model'", &|p| p.model = SourceId { name: "other".to_string(), hash: "1".repeat(32) });
    finds("a replay gives", &|p| {
        let mine = p.layers[5].pinned[0].experts.remove(0);
        let other = p.layers[5].pinned[1].experts.remove(0);
        p.layers[5].pinned[0].experts.push(other);
        p.layers[5].pinned[1].experts.push(mine);
    });
    Ok(())
}

/// Plans that no planner would make are still charged as the contract says, few slots included.
#[test]
fn the_prediction_is_a_token_by_token_simulation() -> Result<()> {
    let shape = shape(2, 9, 3, 1_000_000);
    let profile = synthetic::profile(&shape, &routing(5));
    let evidence = Evidence::recorded(&shape, &profile)?;
    for tiers in [three_tiers(), three_tiers()[..2].to_vec(), instance(0).2.tiers] {
        let machine = machine(tiers);
        let budgets = vec![1 << 40; machine.tiers.len()];
        let inputs = Inputs {
            shape: &shape,
            profile: Some(&profile),
            machine: &machine,
            budgets,
            context: 10,
            kv_type: KvType::F16,
        };
        let plan = solve(&inputs, &Options { strategy: Strategy::Uniform, time_limit_s: 1.0, ..Options::default() })?;
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
                layer.pinned = pins.into_iter().enumerate().map(|(tier, experts)| Pins { tier, experts }).collect();
                layer.slots = random.below(pooled + 1) as u32;
                layer.slot_tier = random.below(fast);
                layer.policy = [
                    SlotPolicy::Lru,
                    SlotPolicy::Lfu { half_life: 4 },
                    SlotPolicy::Adaptive { half_life: 16, recent_half_life: 2, recent_weight: 3 },
                ][random.below(3)];
            }
            let predicted = token_s(&predict(&plan, &shape, &evidence));
            let stepped = check::token_s(&plan, &shape, &evidence);
            assert!((predicted - stepped).abs() < 1e-12 * stepped, "{predicted} {stepped}");
        }
    }
    Ok(())
}

#[test]
fn what_cannot_fit_says_what_would() {
    let shape = shape(4, 8, 2, 1_000_000);
    let machine = machine(three_tiers());
    let refused = |budgets: [u64; 3], context: u32, words: &[&str]| {
        let inputs = Inputs {
            shape: &shape,
            profile: None,
            machine: &machine,
            budgets: budgets.to_vec(),
            context,
            kv_type: KvType::F16,
        };
        let error = solve_all(&inputs, &options()).err().map(|e| format!("{e:#}")).unwrap_or_default();
        assert!(words.iter().all(|w| error.contains(w)), "{words:?}: {error}");
    };
    refused([0, 3_000_000, 1 << 40], 0, &["'dram'", "4 experts in flight", "raise the budget of 'dram' by"]);
    refused([0, 4_000_000, 1 << 40], 1000, &["'dram'", "context", "raise the budget of 'dram' by 9.77 KiB"]);
    refused([0, 4_005_000, 1 << 40], 1000, &["context", "or give --context 500"]);
    refused([0, 4_008_000, 1 << 40], 1000, &["context", "or give --kv-type q8_0", "or give --context 800"]);
    refused([0, 9_000_000, 1 << 40], 0, &["dense tensors", "'vram' and 'dram'", "raise the budget of 'dram' by"]);
    refused([0, 14_000_000, 9_000_000], 0, &["the weights", "raise the budget of 'slow' by"]);
    refused([8_000_000, 5_999_999, 1 << 41], 0, &["budget of tier 'slow'", "lower"]);
    // The sums fit, but not without cutting a group in two.
    refused([500_000, 9_500_000, 1 << 40], 0, &["no way to divide", "largest dense group"]);
}

#[test]
fn everything_in_fast_memory_is_optimal() -> Result<()> {
    let shape = shape(4, 8, 2, 1_000_000);
    let profile = synthetic::profile(&shape, &routing(1));
    let machine = machine(vec![tier("dram", TierKind::Dram, 20.0, 0.0)]);
    let budgets = vec![1 << 30];
    let inputs = Inputs {
        shape: &shape,
        profile: Some(&profile),
        machine: &machine,
        budgets,
        context: 10,
        kv_type: KvType::F16,
    };
    let solved = solve_all(&inputs, &options())?;
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
    for (context, kv_type, bytes) in [(1, KvType::F16, 10), (2000, KvType::F16, 10), (2000, KvType::Q8_0, 7)] {
        let budgets = budgets.clone();
        let inputs = Inputs { shape: &shape, profile: Some(&profile), machine: &machine, budgets, context, kv_type };
        let evidence = Evidence::new(&shape, Some(&profile))?;
        let plan = solve_all(&inputs, &options())?.plan;
        let kv_bytes: u64 = plan.tiers.iter().map(|t| t.bytes.kv).sum();
        assert_eq!((kv_bytes, plan.kv_type), (bytes * u64::from(context) + 123_456, kv_type));
        assert_eq!(check::check(&plan, &shape, &evidence), Vec::<String>::new());
        shape.caches[3].state_bytes += 1;
        assert!(!check::check(&plan, &shape, &evidence).is_empty());
        shape.caches[3].state_bytes -= 1;
    }
    Ok(())
}

mod gpus;

mod goals;

/// Both solvers of the integer program find the same, and as cheap as the whole search does.
#[cfg(feature = "highs")]
#[test]
fn highs_agrees_with_microlp() -> Result<()> {
    use crate::cli::Backend;
    let mut tried = 0;
    for seed in 0..60 {
        let (shape, profile, machine, budgets) = instance(seed * 7919);
        let kv_type = KvType::F16;
        let inputs =
            Inputs { shape: &shape, profile: profile.as_ref(), machine: &machine, budgets, context: 100, kv_type };
        let Ok(room) = Room::new(&inputs) else { continue };
        let evidence = Evidence::new(&shape, profile.as_ref())?;
        let goal = Goal::new(Objective::Latency, None, None, &inputs)?;
        let charge = Charge::new(&goal, (1.0, 1.0));
        let wishes = Wishes::default();
        let maker = Maker::new(&shape, &evidence, &room, &charge, &wishes, 10.0);
        let mut items = columns::dense_items(&shape, &room, &charge, &wishes);
        items.extend(maker.items());
        let Ok(dual) = dual::maximise(&items, &room, None, Instant::now() + Duration::from_secs(10)) else { continue };
        let [a, b] = [Backend::Microlp, Backend::Highs]
            .map(|s| program::solve(&items, &room, &dual, None, program::MAX_COLUMNS, 10.0, s));
        match (a.choice, b.choice) {
            (Some(a), Some(b)) => {
                tried += 1;
                assert!((a.cost_s - b.cost_s).abs() <= 1e-7 * a.cost_s, "{seed}: {} {}", a.cost_s, b.cost_s);
            }
            (None, None) => {}
            (a, b) => panic!("{seed}: {a:?} {b:?}"),
        }
    }
    assert!(tried > 20, "{tried}");
    Ok(())
}
