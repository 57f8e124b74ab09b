//! Tests objectives, targets, constraints, and the bound over all configurations against
//! enumeration.

use super::*;
use crate::cost::batch;
use crate::solve::bound::branch_and_bound::LayerSearch;
use crate::solve::options::Objective;
use crate::solve::problem::capacity::TICKS_PER_S;
use crate::solve::problem::constraints::Constraints;
use crate::solve::problem::reuse_table::ReuseTable;
use tier_plan_runtime::model::kv::KvType as Kv;

fn problem_of<'a>(
    shape: &'a ModelShape,
    profile: Option<&'a Profile>,
    machine: &'a Machine,
    budgets: &[u64],
) -> Problem<'a> {
    Problem {
        shape,
        profile,
        machine,
        budgets: budgets.to_vec(),
        context: 100,
        sequences: 1,
        kv_type: Kv::F16,
        position: None,
    }
}

proptest! {
    #![proptest_config(cases(250))]

    #[test]
    fn the_least_memory_for_a_speed_matches_enumeration(seed in 0u64..u64::MAX / 2, slower in 1.0f64..3.0) {
        let (shape, profile, mut machine, budgets) = instance(seed);
        machine.tiers.iter_mut().for_each(|t| t.emulated &= seed % 2 == 0);
        if machine.tiers.len() < 2 {
            return Ok(());
        }
        let problem = problem_of(&shape, profile.as_ref(), &machine, &budgets);
        let Ok(capacities) = Capacity::per_kv_tier(&problem, &Constraints::default()) else { return Ok(()) };
        let evidence = Evidence::new(&shape, profile.as_ref()).map_err(|e| TestCaseError::fail(e.to_string()))?;
        let Ok(fastest) = plan_of(&problem, &options()) else { return Ok(()) };
        let target = fastest.predicted.decode_tok_s / slower;
        let asked = Options { objective: Objective::Memory, target_tok_s: Some(target), ..options() };
        let plan = plan_of(&problem, &asked).map_err(|e| TestCaseError::fail(format!("{e:#}")))?;
        let fixed = cost::overhead_s(shape.n_layer, machine.layer_overhead_us, machine.token_overhead_us);
        let last = machine.tiers.len() - 1;
        let weigh = |(bytes, seconds): &(Vec<u64>, f64)| {
            let mut rows = bytes.clone();
            rows.push((seconds * TICKS_PER_S).ceil() as u64);
            (rows, bytes[..last].iter().sum::<u64>() as f64)
        };
        // The least over all KV tiers.
        let of = |capacity: &Capacity| {
            let (all, mut left) = everything(&shape, capacity, &evidence);
            let things: Vec<_> = all.iter().map(|t| t.iter().map(weigh).collect::<Vec<_>>()).collect();
            left.push(((1.0 / target - fixed).max(0.0) * TICKS_PER_S).floor() as u64);
            let constant = capacity.staging_bytes * u64::from(capacity.staging_tier.get() < last);
            exhaustive(&things, &left).map(|least| least + constant as f64)
        };
        let goal = plan.solver.goal.clone().ok_or_else(|| TestCaseError::fail("no goal"))?;
        prop_assert_eq!((goal.objective.as_str(), goal.unit.as_str()), ("memory", "bytes"));
        prop_assert!(plan.predicted.decode_tok_s >= target * (1.0 - 1e-9));
        let used: u64 = plan.tiers.iter().take(last).map(|t| t.used_bytes()).sum();
        prop_assert_eq!(used as f64, goal.value);
        // A baseline may reach the target without columns that do.
        match capacities.iter().filter_map(of).min_by(f64::total_cmp) {
            Some(least) => prop_assert!(goal.value <= least * (1.0 + 1e-9), "{} {}", goal.value, least),
            None => prop_assert!(plan.solver.status.starts_with("feasible")),
        }
        prop_assert!(goal.bound.is_none_or(|b| b <= goal.value * (1.0 + 1e-9)));
    }

    #[test]
    fn no_configuration_goes_below_the_bound(seed in 0u64..u64::MAX / 2, n_expert in 6u32..14, used in 1u32..4) {
        let shape = shape(1, n_expert, used, 1_000_000);
        let profile = synthetic::profile(&shape, &routing(seed));
        let mut random = Random::new(seed + 3);
        let kinds = [three_tiers(), instance(5).2.tiers, three_tiers().split_off(1), five_tiers()];
        let machine = machine(kinds[random.below(3)].clone());
        let budgets = vec![1 << 40; machine.tiers.len()];
        let problem = problem_of(&shape, Some(&profile), &machine, &budgets);
        let capacity = Capacity::new(&problem).map_err(|e| TestCaseError::fail(e.to_string()))?;
        let evidence = Evidence::recorded(&shape, &profile).map_err(|e| TestCaseError::fail(e.to_string()))?;
        let Judged::Recorded(trace) = &evidence.layers[0].judged else { return Ok(()) };
        let price: Vec<f64> = (0..machine.tiers.len())
            .map(|t| if t + 1 == machine.tiers.len() { 0.0 } else { random.unit() * 4e-11 / (t + 1) as f64 })
            .collect();
        let value = |(bytes, seconds): &(Vec<u64>, f64)| {
            seconds + bytes.iter().zip(&price).map(|(&b, p)| b as f64 * p).sum::<f64>()
        };
        let all = treatments(&capacity, &evidence.layers[0]);
        let least = all.iter().map(value).fold(f64::INFINITY, f64::min);
        let table = ReuseTable::new(&evidence.layers[0], trace).ok_or_else(|| TestCaseError::fail("no table"))?;
        let mut layer = LayerSearch::new(&table, &capacity, &evidence.layers[0], &price);
        let none = columns::Config { cuts: [0; MAX_FAST], slots: 0, slot_tier: capacity.staging_tier };
        let soon = || Instant::now() + Duration::from_secs(5);
        let bound = layer.bound(&[none], 1e-4, soon());
        prop_assert!(bound <= least * (1.0 + 1e-9), "{bound} {least}");
        prop_assert!(bound >= least * (1.0 - 2e-4), "{bound} {least}");
        // What local descent returns is priced as the cost model prices it.
        for timed in layer.cheapest(&[none], true, 4, soon()) {
            let (config, seconds) = (timed.config, timed.seconds);
            let placed = config.placement(0, &evidence.layers[0].order, capacity.fast());
            let stage = cost::ExpertStage::new(&capacity.tiers, 1_000_000, evidence.layers[0].prefetch);
            let outcomes = cost::outcomes(&placed, &evidence.layers[0], &capacity.tiers, capacity.staging_tier);
            let want = cost::stage_mean_s(&stage, &outcomes, placed.brought_to(capacity.staging_tier));
            prop_assert!((seconds - want).abs() <= 1e-9 * want, "{config:?} {seconds} {want}");
        }
    }

    #[test]
    fn dense_groups_fixed_by_hand_leave_the_best_of_the_rest(seed in 0u64..u64::MAX / 2) {
        let (shape, profile, machine, budgets) = instance(seed);
        let problem = problem_of(&shape, profile.as_ref(), &machine, &budgets);
        if Capacity::new(&problem).is_err() {
            return Ok(());
        }
        let evidence = Evidence::new(&shape, profile.as_ref()).map_err(|e| TestCaseError::fail(e.to_string()))?;
        let name = |t: usize| machine.tiers[t].name.clone();
        let fix = [format!("{}:head", name(0))];
        let forbid = [format!("{}:embedding", name(machine.tiers.len() - 1))];
        let Ok(constraints) = Constraints::parse(&fix, &forbid, &shape, &machine) else { return Ok(()) };
        // The fastest over all KV tiers.
        let of = |capacity: &Capacity| {
            let (mut things, left) = everything(&shape, capacity, &evidence);
            let last = capacity.fast();
            for (group, ways) in shape.dense.iter().zip(&mut things[evidence.layers.len()..]) {
                match group.kind {
                    DenseKind::Head => ways.retain(|w| w.0[0] > 0),
                    DenseKind::Embedding => ways.retain(|w| w.0[last] == 0),
                    _ => {}
                }
            }
            exhaustive(&things, &left)
        };
        let capacities = Capacity::per_kv_tier(&problem, &constraints);
        let least = capacities.iter().flatten().filter_map(of).min_by(f64::total_cmp);
        let fixed = cost::overhead_s(shape.n_layer, machine.layer_overhead_us, machine.token_overhead_us);
        match (plan_of(&problem, &Options { constraints: constraints.clone(), ..options() }), least) {
            (Ok(plan), Some(least)) => {
                prop_assert!(constraints.holds(&plan));
                let least = least + fixed;
                prop_assert!(plan.solver.objective_s <= least * (1.0 + 1e-9));
            }
            (Err(error), None) => prop_assert!(!error.to_string().is_empty()),
            (got, want) => prop_assert!(false, "{got:?} {want:?}"),
        }
    }
}

#[test]
fn experts_fixed_by_hand_are_where_they_were_put() -> Result<()> {
    let (shape, profile, machine, budgets) = larger();
    for profile in [Some(&profile), None] {
        let problem = problem_of(&shape, profile, &machine, &budgets);
        let evidence = Evidence::new(&shape, profile)?;
        let fix = [
            "vram:3-5:0-2",
            "dram:experts:3:7,9",
            "slow:experts:6:0-19",
            "dram:attention:0-1",
        ]
        .map(String::from);
        let forbid = ["vram:experts:7-8", "vram:head"].map(String::from);
        let constraints = Constraints::parse(&fix, &forbid, &shape, &machine)?;
        let plan = plan_of(
            &problem,
            &Options {
                constraints: constraints.clone(),
                ..quick()
            },
        )?;
        assert!(constraints.holds(&plan));
        assert_eq!(
            verify::verify(&plan, &shape, &evidence),
            Vec::<String>::new()
        );
        assert_eq!(
            (
                plan.pinned_tier(4, 1),
                plan.pinned_tier(3, 9),
                plan.pinned_tier(6, 19)
            ),
            (Some(TierIdx::new(0)), Some(TierIdx::new(1)), None)
        );
        assert!(
            plan.layers[7]
                .pinned
                .iter()
                .all(|pins| pins.tier != TierIdx::FIRST)
        );
        let free = plan_of(&problem, &quick())?;
        assert!(!constraints.holds(&free));
        // A quick search ends a little before the optimum.
        assert!(free.solver.objective_s <= plan.solver.objective_s * (1.0 + 1e-3));
    }
    Ok(())
}

#[test]
fn constraints_on_what_is_missing_or_too_large_are_refused() -> Result<()> {
    let (shape, profile, machine, budgets) = larger();
    let refused = |fix: &[&str], forbid: &[&str], words: &[&str]| {
        let text = |of: &[&str]| of.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        let error = Constraints::parse(&text(fix), &text(forbid), &shape, &machine)
            .err()
            .map(|e| format!("{e:#}"));
        let error = error.unwrap_or_default();
        assert!(
            words.iter().all(|w| error.contains(w)),
            "{words:?}: {error}"
        );
    };
    refused(&["vram"], &[], &["--fix vram", "TIER:WHAT"]);
    refused(&["gpu:head"], &[], &["no tier 'gpu'", "vram, dram, slow"]);
    refused(&["vram:heads"], &[], &["'heads'", "attention, router"]);
    refused(&["vram:99"], &[], &["layer 99", "layers 0 to 11 have"]);
    refused(&["vram:3:40"], &[], &["experts 0 to 39, not 40"]);
    refused(&["vram:3:a"], &[], &["neither one expert"]);
    refused(&["vram:router"], &[], &["has no router"]);
    refused(&["vram:attention:3:1"], &[], &["only experts have numbers"]);
    refused(&["slow:head"], &[], &["only the embedding"]);
    refused(
        &["vram:3:1", "dram:3:1-2"],
        &[],
        &["expert 1 of layer 3", "'vram' before"],
    );
    refused(
        &["vram:head", "dram:head"],
        &[],
        &["head of the model", "'vram' before"],
    );
    refused(
        &["vram:3:1"],
        &["vram:experts"],
        &["expert 1 of layer 3", "--forbid"],
    );
    refused(&["vram:head"], &["vram:head"], &["leave no tier for head"]);
    refused(&[], &["vram:experts:3:1"], &["whole layers"]);
    refused(&[], &["slow:experts"], &["last tier"]);
    // What is fixed is more than the tier holds.
    let constraints = Constraints::parse(&["vram:experts:0-3".to_string()], &[], &shape, &machine)?;
    let problem = problem_of(&shape, Some(&profile), &machine, &budgets);
    let error = plan_of(
        &problem,
        &Options {
            constraints,
            ..options()
        },
    )
    .err()
    .map(|e| format!("{e:#}"))
    .unwrap_or_default();
    assert!(
        ["--fix puts", "'vram'", "too much", "raise the budget"]
            .iter()
            .all(|w| error.contains(w)),
        "{error}"
    );
    Ok(())
}

#[test]
fn a_target_out_of_reach_says_by_how_much() {
    let (shape, profile, machine, budgets) = larger();
    let problem = problem_of(&shape, Some(&profile), &machine, &budgets);
    let asked = Options {
        objective: Objective::Memory,
        target_tok_s: Some(1e6),
        ..options()
    };
    let error = plan_of(&problem, &asked)
        .err()
        .map(|e| format!("{e:#}"))
        .unwrap_or_default();
    let words = [
        "reaches 1000000.000 tok/s",
        "ms per token too slow",
        "most of its time",
        "--target-tok-s",
    ];
    assert!(words.iter().all(|w| error.contains(w)), "{error}");
}

#[test]
fn batches_read_each_distinct_expert_once() -> Result<()> {
    let (shape, profile, machine, budgets) = larger();
    let mut problem = problem_of(&shape, Some(&profile), &machine, &budgets);
    problem.sequences = 32;
    let evidence = Evidence::recorded(&shape, &profile)?;
    let asked = |batch| Options {
        objective: Objective::Throughput,
        batch: Some(batch),
        ..options()
    };
    let mut last = f64::INFINITY;
    for batch in [1, 4, 32] {
        let solved = solve(&problem, &asked(batch))?;
        let goal = solved.plan.solver.goal.clone().context("no goal")?;
        let value = batch::step_s(&solved.plan, &shape, &evidence, batch) / f64::from(batch);
        assert!((goal.value - value).abs() < 1e-12 * value && goal.batch == Some(batch));
        assert!(
            goal.bound
                .is_some_and(|b| b <= value * (1.0 + 1e-9) && b > 0.9 * value),
            "{goal:?}"
        );
        assert!(value < last, "a larger batch shares more reads");
        last = value;
        for rule in &solved.baselines {
            let other = batch::step_s(rule, &shape, &evidence, batch) / f64::from(batch);
            assert!(
                value <= other * (1.0 + 1e-9),
                "{} {value} {other}",
                rule.name
            );
        }
    }
    // With enough sequences that every expert is used, a step reads all of them once.
    let touched = batch::touched(&evidence.layers[0], f64::from(1 << 20));
    let Judged::Recorded(trace) = &evidence.layers[0].judged else {
        return Ok(());
    };
    let ever = trace.decode_share().iter().filter(|s| **s > 0.0).count() as f64;
    let used: f64 = touched.iter().map(|used| used.experts).sum();
    assert!((used - ever).abs() < 1e-6);
    assert!(
        plan_of(
            &problem,
            &Options {
                objective: Objective::Throughput,
                ..options()
            }
        )
        .is_err()
    );
    Ok(())
}

#[test]
fn cost_and_energy_are_latency_where_there_is_one_price() -> Result<()> {
    let (shape, profile, mut machine, budgets) = larger();
    let asked = |objective| Options {
        objective,
        ..quick()
    };
    let fails = |machine: &Machine, objective: Objective, word: &str| {
        let problem = problem_of(&shape, Some(&profile), machine, &budgets);
        let error = plan_of(&problem, &asked(objective))
            .err()
            .map(|e| format!("{e:#}"))
            .unwrap_or_default();
        assert!(error.contains(word), "{word}: {error}");
    };
    fails(&machine, Objective::Energy, "`watts`");
    fails(&machine, Objective::Cost, "`usd_per_gb`");
    fails(&machine, Objective::Memory, "--target-tok-s");
    (machine.extras.watts, machine.extras.price_usd) = (Some(200.0), Some(3000.0));
    let problem = problem_of(&shape, Some(&profile), &machine, &budgets);
    let fastest = plan_of(&problem, &quick())?;
    for (objective, times) in [(Objective::Energy, 200.0), (Objective::Cost, 3000.0)] {
        let solved = solve(&problem, &asked(objective))?;
        let goal = solved.plan.solver.goal.clone().context("no goal")?;
        assert!((goal.value - times * solved.plan.solver.objective_s).abs() < 1e-9 * goal.value);
        assert!((solved.plan.solver.objective_s / fastest.solver.objective_s - 1.0).abs() < 1e-3);
        assert!(
            solved
                .notes
                .iter()
                .any(|n| n.contains("latency in another unit"))
        );
    }
    Ok(())
}

#[test]
fn expensive_memory_is_left_out_where_it_is_not_worth_its_price() -> Result<()> {
    let (shape, profile, mut machine, budgets) = larger();
    machine.extras.price_usd = Some(1.0);
    let usd =
        |vram: f64| [("vram", vram), ("dram", 2.0), ("slow", 0.0)].map(|(n, p)| (n.to_string(), p));
    let mut used = Vec::new();
    for vram in [0.01, 1e6] {
        machine.extras.usd_per_gb = usd(vram).into_iter().collect();
        let problem = problem_of(&shape, Some(&profile), &machine, &budgets);
        let plan = plan_of(
            &problem,
            &Options {
                objective: Objective::Cost,
                ..options()
            },
        )?;
        let fastest = plan_of(&problem, &quick())?;
        let price = |p: &Placement| {
            p.tiers
                .iter()
                .map(|t| t.used_bytes() as f64 * 1e-9 * machine.extras.usd_per_gb[&t.tier.name])
                .sum::<f64>()
        };
        assert!(
            price(&plan) * plan.solver.objective_s
                <= price(&fastest) * fastest.solver.objective_s * (1.0 + 1e-9)
        );
        used.push(plan.tiers[TierIdx::FIRST].used_bytes());
    }
    assert!(used[0] > 1000 && used[1] == 0, "{used:?}");
    Ok(())
}

/// The train split suggests the wrong experts; a baseline that ignores it is faster on held-out
/// tokens.
#[test]
fn a_baseline_that_is_faster_on_held_out_tokens_is_taken() -> Result<()> {
    use crate::profile::tests::profile_of;
    use tier_plan_runtime::formats::profile::Split;
    let mut shape = shape(1, 8, 1, 1_000_000);
    shape.id = crate::profile::tests::id("m");
    // Trained on odd experts and judged on even ones, each used equally often: uniform pins every
    // second.
    let tokens = |first: u16| {
        (0..64)
            .map(|t| vec![vec![first + 2 * (t % 4)]])
            .collect::<Vec<_>>()
    };
    let profile = profile_of(
        8,
        1,
        1,
        &[(Split::Train, 0, tokens(1)), (Split::HeldOut, 0, tokens(0))],
    );
    let machine = machine(vec![
        tier("dram", TierKind::Dram, 20.0, 0.0),
        tier("slow", TierKind::Pmem, 2.0, 1.0),
    ]);
    let dense: u64 = shape.dense.iter().map(|d| d.bytes).sum();
    let problem = problem_of(
        &shape,
        Some(&profile),
        &machine,
        &[dense + 4_001_000, 1 << 40],
    );
    let solved = solve(&problem, &options())?;
    let uniform = solved
        .baselines
        .iter()
        .find(|b| b.name == "uniform")
        .context("no uniform")?;
    assert!(solved.plan.solver.objective_s <= uniform.solver.objective_s * (1.0 + 1e-9));
    assert!(
        solved
            .plan
            .solver
            .status
            .contains("faster on held-out tokens"),
        "{}",
        solved.plan.solver.status
    );
    assert!(solved.notes.iter().any(|n| n.contains("nothing is proven")));
    assert!(
        solved.summary.iter().any(|v| v.contains("at equal bytes")),
        "{:?}",
        solved.summary
    );
    Ok(())
}
