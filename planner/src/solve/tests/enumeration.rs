//! Holds the solver to exhaustive enumeration on small instances.

use super::*;
use proptest::prelude::ProptestConfig;

/// Choices for one thing: `[tiers]` bytes, and seconds.
pub(super) type Ways = Vec<(Vec<u64>, f64)>;

/// Returns every choice for one layer, found without the solver's code.
pub(super) fn treatments(
    capacity: &Capacity,
    evidence: &crate::profile::LayerEvidence,
) -> Vec<(Vec<u64>, f64)> {
    let (n, home) = (capacity.tiers.len(), capacity.fast());
    let e = evidence.shape;
    let stage = cost::ExpertStage::new(&capacity.tiers, e.expert_bytes, evidence.prefetch);
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
                    Pins {
                        tier: TierIdx::new(tier),
                        experts,
                    }
                })
                .collect();
            let mut caches = vec![(0, capacity.staging_tier)];
            if !matches!(capacity.tiers[capacity.home()].kind, TierKind::Dram) {
                let slots = (1..=pooled).filter(|&s| s >= e.n_used.min(pooled));
                caches.extend(slots.flat_map(|s| TierIdx::first(home).map(move |tier| (s, tier))));
            }
            for (slots, slot_tier) in caches {
                let policy = SlotPolicy::Lru;
                let layer = LayerPlacement {
                    layer: e.layer,
                    pinned: pinned.clone(),
                    slots,
                    slot_tier,
                    policy,
                };
                let outcomes =
                    cost::outcomes(&layer, evidence, &capacity.tiers, capacity.staging_tier);
                let mut bytes = vec![0; n];
                counts
                    .iter()
                    .enumerate()
                    .for_each(|(t, &c)| bytes[t] += u64::from(c) * e.expert_bytes);
                bytes[slot_tier.get()] += u64::from(slots) * e.expert_bytes;
                bytes[home] += u64::from(pooled) * e.expert_bytes;
                found.push((
                    bytes,
                    cost::stage_mean_s(&stage, &outcomes, layer.brought_to(capacity.staging_tier)),
                ));
            }
        }
        let Some(at) = counts.iter().position(|&c| c < e.n_expert) else {
            break;
        };
        counts[..at].fill(0);
        counts[at] += 1;
    }
    found
}

/// Returns the least seconds over all choices that fit, by exhaustive enumeration.
pub(super) fn exhaustive(things: &[Vec<(Vec<u64>, f64)>], left: &[u64]) -> Option<f64> {
    let Some((first, rest)) = things.split_first() else {
        return Some(0.0);
    };
    let mut best: Option<f64> = None;
    for (bytes, seconds) in first {
        let after: Option<Vec<u64>> = left
            .iter()
            .zip(bytes)
            .map(|(l, b)| l.checked_sub(*b))
            .collect();
        if let Some(total) = after.and_then(|left| exhaustive(rest, &left)) {
            best = Some(best.map_or(total + seconds, |b| b.min(total + seconds)));
        }
    }
    best
}

/// Returns all choices by thing, and the bytes left for them.
///
/// Attention has its layer's KV cache with it: on a real GPU there, and else on the KV tier. That of
/// keys and values may be on the KV tier though attention is on a GPU, which takes its `layer_us` once
/// more. 100 positions are held, and 50 read.
pub(super) fn everything(
    shape: &ModelShape,
    capacity: &Capacity,
    evidence: &Evidence,
) -> (Vec<Ways>, Vec<u64>) {
    let n = capacity.tiers.len();
    let mut things: Vec<Ways> = evidence
        .layers
        .iter()
        .map(|l| treatments(capacity, l))
        .collect();
    for group in &shape.dense {
        let is_real_gpu =
            |t: TierIdx| capacity.tiers[t].kind == TierKind::Vram && !capacity.tiers[t].emulated;
        let of_layer = || &shape.caches[group.layer.unwrap_or_default() as usize];
        let can_be_apart = group.kind == DenseKind::Attention
            && of_layer().rows.iter().any(|r| r.per_token == 2)
            && !is_real_gpu(capacity.kv_tier);
        let on = |(t, is_apart): (TierIdx, bool)| {
            let rate = |t: TierIdx| capacity.tiers[t].read_gbps * 1e9;
            let mut bytes = vec![0; n];
            bytes[t.get()] = group.bytes;
            let mut seconds = group.token_bytes as f64 / rate(t);
            let on_drive = capacity.tiers[t].kind == TierKind::Nvme;
            if group.kind == DenseKind::TokenTable && on_drive {
                seconds += capacity.tiers[t].latency_us * 1e-6;
            }
            if group.kind == DenseKind::Attention {
                let trips = if is_apart { 2.0 } else { 1.0 };
                seconds += trips * capacity.tiers[t].accelerator.layer_us.unwrap_or(0.0) * 1e-6;
                let at = if is_real_gpu(t) && !is_apart {
                    t
                } else {
                    capacity.kv_tier
                };
                let row = of_layer()
                    .rows
                    .first()
                    .map_or(0, |r| 2 * r.width * r.per_token);
                bytes[at.get()] += 100 * row;
                seconds += (50 * row) as f64 / rate(at);
            }
            (bytes, seconds)
        };
        let allowed = |t: &TierIdx| {
            group.kind.is_named_by_tokens() || capacity.tiers[*t].kind != TierKind::Nvme
        };
        let tiers = capacity.tiers.indices().filter(allowed);
        let ways = tiers.flat_map(|t| {
            let apart = (can_be_apart && is_real_gpu(t)).then_some((t, true));
            [(t, false)].into_iter().chain(apart)
        });
        things.push(ways.map(on).collect());
    }
    let mut left = capacity.left_bytes.clone();
    left[capacity.kv_tier.get()] += capacity.kv_bytes;
    (things, left)
}

pub(super) fn optimum(shape: &ModelShape, capacity: &Capacity, evidence: &Evidence) -> Option<f64> {
    let (things, left) = everything(shape, capacity, evidence);
    exhaustive(&things, &left)
}

pub(super) use tier_plan_testing::is_nightly;

/// Returns a configuration with the cases of a test.
///
/// The gate runs a tenth of them, a nightly run all.
pub(super) fn cases(nightly: u32) -> ProptestConfig {
    ProptestConfig::with_cases(if is_nightly() {
        nightly
    } else {
        nightly.div_ceil(10)
    })
}

/// Holds the solver to exhaustive enumeration on one small instance.
fn check_against_enumeration(seed: u64) -> std::result::Result<(), TestCaseError> {
    let (mut shape, profile, mut machine, budgets) = instance(seed);
    // Some layers have keys and values, of as many bytes together.
    for (layer, cache) in shape.caches.iter_mut().enumerate() {
        if seed >> (3 + layer) & 1 == 1 {
            let rows = &mut cache.rows[0];
            (rows.width, rows.per_token) = (rows.width / 2, 2);
        }
    }
    machine
        .tiers
        .iter_mut()
        .for_each(|t| t.emulated &= seed.is_multiple_of(2));
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
    let Ok(capacities) = Capacity::per_kv_tier(&problem, &Constraints::default()) else {
        return Ok(());
    };
    let evidence =
        Evidence::new(&shape, profile).map_err(|e| TestCaseError::fail(e.to_string()))?;
    let overhead_s = cost::overhead_s(
        shape.n_layer,
        machine.layer_overhead_us,
        machine.token_overhead_us,
    );
    // The least over all KV tiers.
    let least_of =
        |capacity: &Capacity| optimum(&shape, capacity, &evidence).map(|least| least + overhead_s);
    let least = capacities
        .iter()
        .filter_map(least_of)
        .min_by(f64::total_cmp);
    match (solve(&problem, &options()), least) {
        (Ok(solved), Some(least)) => {
            let report = &solved.plan.solver;
            prop_assert!(
                report.bound_s.is_none_or(|b| b <= least * (1.0 + 1e-9)),
                "{report:?} {least}"
            );
            // A baseline that ignores the train split may be better than every plan that follows
            // it.
            prop_assert!(
                report.objective_s <= least * (1.0 + 1e-9),
                "{report:?} {least}"
            );
            let is_optimal = report.status == "optimal";
            prop_assert!(
                report.status.starts_with("feasible: ") || is_optimal,
                "{report:?}"
            );
            for plan in &solved.baselines {
                prop_assert!(report.objective_s <= plan.solver.objective_s * (1.0 + 1e-9));
                prop_assert_eq!(
                    verify::verify(plan, &shape, &evidence),
                    Vec::<String>::new()
                );
            }
        }
        (Err(_), None) => {}
        (got, want) => prop_assert!(false, "{got:?} {want:?}"),
    }
    Ok(())
}

/// Tests that small instances are solved to the optimum, one per seed modulo their number, so that
/// cores share them. Each has an eighth of 2,500 cases.
macro_rules! small_instances {
    ($($name:ident => $shard:literal),* $(,)?) => {
        proptest! {
            #![proptest_config(cases(2500 / 8 + 1))]
            $(
                #[test]
                fn $name(seed in 0u64..u64::MAX / 16) {
                    check_against_enumeration(8 * seed + $shard)?;
                }
            )*
        }
    };
}

small_instances! {
    small_instances_are_solved_to_the_optimum_0 => 0,
    small_instances_are_solved_to_the_optimum_1 => 1,
    small_instances_are_solved_to_the_optimum_2 => 2,
    small_instances_are_solved_to_the_optimum_3 => 3,
    small_instances_are_solved_to_the_optimum_4 => 4,
    small_instances_are_solved_to_the_optimum_5 => 5,
    small_instances_are_solved_to_the_optimum_6 => 6,
    small_instances_are_solved_to_the_optimum_7 => 7,
}
