//! Holds searches that begin with other searches' columns to enumeration, and to searches that do
//! not.

use super::*;
use crate::solve::options::Depth;
use enumeration::optimum;

/// Returns a problem's fastest plan by a quick search that begins with a pool's columns.
fn quick(
    problem: &Problem<'_>,
    evidence: &Evidence,
    pool: &ColumnPool,
) -> std::result::Result<Placement, TestCaseError> {
    let options = Options {
        depth: Depth::Quick,
        time_limit_s: 60.0,
        ..Options::default()
    };
    let solved = solve_with_pool(problem, evidence, pool, &options);
    let plan = solved
        .map_err(|e| TestCaseError::fail(format!("{e:#}")))?
        .plan;
    prop_assert_eq!(
        verify::verify(&plan, problem.shape, evidence),
        Vec::<String>::new()
    );
    Ok(plan)
}

/// Relative distance from the optimum that a quick search may have in a model of one layer, where
/// nothing makes up for a column that it did not try.
const MAX_GAP: f64 = 0.01;

proptest! {
    #![proptest_config(cases(120))]

    /// One layer of 12 experts on four tiers, against all of its columns.
    #[test]
    fn quick_searches_are_near_the_optimum_warm_and_cold(
        seed in 0u64..u64::MAX / 2,
        used in 1u32..4,
        grown in 0usize..3,
        recorded in proptest::prelude::any::<bool>(),
    ) {
        let mut tiers = three_tiers();
        tiers.insert(2, tier("cxl", TierKind::Cxl, 9.0, 2.0));
        let (shape, machine) = (shape(1, 12, used, 1_000_000), machine(tiers));
        let profile = recorded.then(|| synthetic::profile(&shape, &routing(seed)));
        let evidence = Evidence::new(&shape, profile.as_ref())
            .map_err(|e| TestCaseError::fail(e.to_string()))?;
        let mut random = Random::new(seed);
        let mut mb = |from: u64, to: u64| (from + random.below((to - from) as usize) as u64) * 1_000_000;
        let budgets = vec![mb(0, 9), mb(14, 20), mb(0, 6), 1 << 30];
        let more = mb(1, 6);
        let problem = |budgets: &[u64]| Problem {
            shape: &shape,
            profile: profile.as_ref(),
            machine: &machine,
            budgets: budgets.to_vec(),
            context: 100,
            sequences: 1,
            kv_type: KvType::F16, position: None, };
        let small = problem(&budgets);
        let mut budgets = budgets;
        budgets[grown] += more;
        let large = problem(&budgets);
        let pool = ColumnPool::default();
        quick(&small, &evidence, &pool)?;
        let copy = pool.clone();
        let warm = quick(&large, &evidence, &pool)?.solver.objective_s;
        let cold = quick(&large, &evidence, &ColumnPool::default())?.solver.objective_s;
        // What is added to a pool is not added to its copies.
        prop_assert_eq!(warm, quick(&large, &evidence, &copy)?.solver.objective_s);
        let capacities = Capacity::per_kv_tier(&large, &Constraints::default())
            .map_err(|e| TestCaseError::fail(e.to_string()))?;
        let overhead_s = cost::overhead_s(
            shape.n_layer,
            machine.layer_overhead_us,
            machine.token_overhead_us,
        );
        let least = capacities
            .iter()
            .filter_map(|capacity| optimum(&shape, capacity, &evidence))
            .fold(f64::INFINITY, f64::min)
            + overhead_s;
        for found in [warm, cold] {
            // A baseline may pin experts that columns do not.
            prop_assert!(found <= least * (1.0 + MAX_GAP), "{} {} {}", warm, cold, least);
        }
    }
}

/// Layers of recorded routing begin in groups, which must not change what the columns mean. An
/// expert is a large part of these small tiers, so that the gap is wide.
#[test]
fn many_layers_come_near_a_bound_over_all_columns() -> Result<()> {
    let shape = shape(20, 64, 4, 1_000_000);
    let profile = synthetic::profile(&shape, &routing(11));
    let evidence = Evidence::recorded(&shape, &profile)?;
    let mut tiers = three_tiers();
    tiers.insert(2, tier("cxl", TierKind::Cxl, 9.0, 2.0));
    let machine = machine(tiers);
    let problem = Problem {
        shape: &shape,
        profile: Some(&profile),
        machine: &machine,
        budgets: vec![200_000_000, 300_000_000, 200_000_000, 1 << 40],
        context: 100,
        sequences: 1,
        kv_type: KvType::F16,
        position: None,
    };
    let solve = |depth| {
        // A full search takes all the time there is for a bound over all columns.
        let options = Options {
            depth,
            time_limit_s: if is_nightly() { 20.0 } else { 4.0 },
            ..Options::default()
        };
        solve_with_evidence(&problem, &evidence, &options)
    };
    let [quick, full] = [solve(Depth::Quick)?, solve(Depth::Full)?];
    for solved in [&quick, &full] {
        let report = &solved.plan.solver;
        assert!(report.gap.is_some_and(|gap| gap < 0.02), "{report:?}");
        assert_eq!(
            verify::verify(&solved.plan, &shape, &evidence),
            Vec::<String>::new()
        );
    }
    let [quick, full] = [quick, full].map(|solved| solved.plan.solver.objective_s);
    assert!((quick / full - 1.0).abs() < 5e-3, "{quick} {full}");
    Ok(())
}

/// The same problem has the same plan, whatever threads do.
#[test]
fn the_same_problem_has_the_same_plan() -> Result<()> {
    let (shape, profile, machine, budgets) = larger();
    let evidence = Evidence::recorded(&shape, &profile)?;
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
    let options = Options {
        depth: Depth::Quick,
        time_limit_s: 120.0,
        ..Options::default()
    };
    let plan = || {
        let mut plan = solve_with_evidence(&problem, &evidence, &options)?.plan;
        plan.solver.solve_s = 0.0;
        Ok::<_, anyhow::Error>(plan)
    };
    let first = plan()?;
    for _ in 0..3 {
        assert_eq!(plan()?, first);
    }
    Ok(())
}
