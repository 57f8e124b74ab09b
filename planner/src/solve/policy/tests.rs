use super::*;
use crate::profile::synthetic::{self, Routing};
use crate::profile::tests::{id, profile_of, shape};
use crate::solve::{Options, solve};
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::machine::{Accelerator, Machine, Tier, TierKind};
use tier_plan_runtime::model::shape::ModelShape;

fn machine(home: TierKind) -> Machine {
    let tier = |name: &str, kind, read_gbps, latency_us| Tier {
        name: name.to_string(),
        kind,
        capacity_bytes: 1 << 40,
        read_gbps,
        latency_us,
        // A real drive would leave room for page padding.
        emulated: true,
        unit: None,
        accelerator: Accelerator::default(),
        source: String::new(),
    };
    Machine {
        name: "test".to_string(),
        description: String::new(),
        tiers: vec![
            tier("dram", TierKind::Dram, 20.0, 0.0),
            tier("slow", home, 2.0, 10.0),
        ],
        layer_overhead_us: 1.0,
        token_overhead_us: 1.0,
        extras: Default::default(),
        id: id("machine"),
    }
}

/// A layer of 8 experts of which a token uses 2, with memory for `slots` beside what every plan
/// needs.
fn small(slots: u64, home: TierKind) -> (ModelShape, Machine, Vec<u64>) {
    let mut shape = shape(8, 2);
    shape.experts[0].expert_bytes = 1_000_000;
    // Staging holds a token's experts and some more on a block device.
    let staging = if home == TierKind::Nvme { 4 } else { 0 };
    (
        shape,
        machine(home),
        vec![(slots + staging) * 1_000_000 + 100, 8_000_000],
    )
}

fn tokens(choices: &[[u16; 2]]) -> Vec<Vec<Vec<u16>>> {
    choices.iter().map(|c| vec![c.to_vec()]).collect()
}

/// Two favorites, and others that occur once between them.
fn favorites() -> Vec<Vec<Vec<u16>>> {
    let between = (0..40u16).flat_map(|i| [[0, 1], [2 + i % 6, 2 + (i + 1) % 6], [1, 0]]);
    tokens(&between.collect::<Vec<_>>())
}

/// The experts used last are used once more, and then not for long.
fn fashions() -> Vec<Vec<Vec<u16>>> {
    let pairs = (0..60u16).flat_map(|i| [[2 * (i % 4), 2 * (i % 4) + 1]; 2]);
    tokens(&pairs.collect::<Vec<_>>())
}

fn plan(problem: &Problem<'_>) -> Placement {
    let options = Options {
        strategy: Strategy::LruOnly,
        time_limit_s: 1.0,
        ..Options::default()
    };
    let plan = solve(problem, &options).unwrap().plan;
    assert!(
        plan.layers
            .iter()
            .all(|l| l.slots == 2 && l.policy == SlotPolicy::Lru),
        "{:?}",
        plan.layers
    );
    plan
}

/// Returns the plan of these prompts with LRU, the plan with a policy, and the note about it.
fn refilled(
    train: Vec<Vec<Vec<u16>>>,
    held_out: Vec<Vec<Vec<u16>>>,
    home: TierKind,
    policy: Policy,
) -> (Placement, Placement, Option<String>) {
    let (shape, machine, budgets) = small(2, home);
    let profile = profile_of(
        8,
        2,
        1,
        &[(Split::Train, 0, train), (Split::HeldOut, 0, held_out)],
    );
    let kv_type = KvType::F16;
    let problem = Problem {
        shape: &shape,
        profile: Some(&profile),
        machine: &machine,
        budgets,
        context: 1,
        sequences: 1,
        kv_type,
        position: None,
    };
    let evidence = Evidence::new(&shape, Some(&profile)).unwrap();
    let before = plan(&problem);
    let mut after = before.clone();
    let said = refill(&mut after, &problem, &evidence, policy).unwrap();
    assert_eq!(
        verify::verify(&after, &shape, &evidence),
        Vec::<String>::new()
    );
    (before, after, said)
}

#[test]
fn favorites_are_kept_where_held_out_prompts_have_them_too() {
    for home in [TierKind::Nvme, TierKind::Pmem] {
        let (before, after, said) = refilled(favorites(), favorites(), home, Policy::Auto);
        assert_ne!(after.layers[0].policy, SlotPolicy::Lru);
        assert!(after.solver.objective_s < before.solver.objective_s);
        assert!(
            after.predicted.hit_rate > before.predicted.hit_rate + 0.2,
            "{said:?}"
        );
        assert_eq!(before.tiers, after.tiers, "no byte moves");
        let said = said.unwrap();
        assert!(
            said.starts_with("slots are refilled by")
                && said.contains("in 1 layer: predicted hit rate"),
            "{said}"
        );
        assert_eq!(
            summary(&after),
            serde_json::json!({after.layers[0].policy.name(): 1})
        );
    }
}

#[test]
fn lru_stays_where_it_is_faster() {
    // Another policy wins on the train prompts and loses on the held-out ones.
    let (before, after, said) = refilled(favorites(), fashions(), TierKind::Nvme, Policy::Auto);
    assert_eq!(before, after);
    let said = said.unwrap();
    assert!(
        said.starts_with("slots stay with lru: ") && said.contains("% tok/s"),
        "{said}"
    );
    // LRU wins on both.
    let (before, after, _) = refilled(fashions(), fashions(), TierKind::Nvme, Policy::Auto);
    assert!(after.solver.objective_s <= before.solver.objective_s);
}

#[test]
fn a_requested_policy_is_applied() {
    for (policy, name) in [
        (Policy::Lfu, "lfu"),
        (Policy::Adaptive, "adaptive"),
        (Policy::Lru, "lru"),
    ] {
        let (_, after, said) = refilled(favorites(), fashions(), TierKind::Nvme, policy);
        assert_eq!(after.layers[0].policy.name(), name);
        assert!(said.is_some_and(|said| said.contains(name)));
    }
    assert_eq!(
        to_apply(Policy::Auto, Strategy::Optimal),
        Some(Policy::Auto)
    );
    assert_eq!(to_apply(Policy::Auto, Strategy::LruOnly), None);
    assert_eq!(to_apply(Policy::Lfu, Strategy::LruOnly), Some(Policy::Lfu));
    assert_eq!(to_apply(Policy::Lru, Strategy::Optimal), None);
}

#[test]
fn without_recorded_tokens_there_is_nothing_to_learn() {
    let (shape, machine, budgets) = small(2, TierKind::Nvme);
    let kv_type = KvType::F16;
    let problem = Problem {
        shape: &shape,
        profile: None,
        machine: &machine,
        budgets,
        context: 1,
        sequences: 1,
        kv_type,
        position: None,
    };
    let evidence = Evidence::new(&shape, None).unwrap();
    let before = plan(&problem);
    let mut after = before.clone();
    assert_eq!(
        refill(&mut after, &problem, &evidence, Policy::Auto).unwrap(),
        None
    );
    assert_eq!(before, after);
    let said = refill(&mut after, &problem, &evidence, Policy::Adaptive)
        .unwrap()
        .unwrap();
    assert_eq!(after.layers[0].policy, DEFAULT_ADAPTIVE);
    assert!(said.contains("nothing was recorded"), "{said}");
}

/// Coordinate search finds about as many hits as trying all parameters.
#[test]
fn learning_finds_good_parameters() {
    let mut shape = shape(24, 3);
    shape.experts[0].expert_bytes = 1_000_000;
    let routing = Routing {
        skew: 0.7,
        repeat: 0.4,
        prompts: 6,
        prompt_tokens: 20,
        decode_tokens: 120,
        seed: 7,
    };
    let profile = synthetic::profile(&shape, &routing);
    let trace = LayerTrace::new(&profile, 0, |p| p.split == Split::Train);
    let layers = [ContendedLayer {
        at: 0,
        slots: 6,
        pinned: vec![false; 24],
        trace,
    }];
    let all: Vec<&ContendedLayer> = layers.iter().collect();
    let count = |policy| hits_of(&all, policy)[0];
    let found = count(best_adaptive(&all));
    let mut most = 0;
    for &half_life in ADAPTIVE_AXES[0] {
        for &recent in ADAPTIVE_AXES[1] {
            for &weight in ADAPTIVE_AXES[2] {
                most = most.max(count(adaptive([half_life, recent, weight])));
            }
        }
    }
    assert!(found as f64 >= most as f64 * 0.97, "{found} of {most}");
    assert!(found >= count(DEFAULT_ADAPTIVE));
    assert!(
        LFU_HALF_LIVES
            .iter()
            .all(|&half_life| count(best_lfu(&all)) >= count(SlotPolicy::Lfu { half_life }))
    );
    assert_eq!(
        DEFAULT_ADAPTIVE,
        adaptive([
            ADAPTIVE_AXES[0][2],
            ADAPTIVE_AXES[1][1],
            ADAPTIVE_AXES[2][4]
        ])
    );
}
