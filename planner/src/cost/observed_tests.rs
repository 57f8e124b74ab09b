use super::*;
use crate::catalogue::{self, Known};
use crate::cost::predict;
use crate::solve::options::Strategy;
use crate::solve::{Options, Problem, solve_with_evidence};
use std::path::Path;
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::machine::{self, Machine};

fn machine(emulated: bool) -> Machine {
    let text = format!(
        "format = \"tier-plan machine\"\nversion = 7\nname = \"m\"\nlayer_overhead_us = 20\ntoken_overhead_us = 200\n\
         [[tier]]\nname = \"dram\"\nkind = \"dram\"\ncapacity = \"64GiB\"\nread_gbps = 30\nlatency_us = 0\n\
         emulated = {emulated}\nprompt_gflops = 5000\nfew_gflops = 2500\nsource = \"test\"\n\
         [[tier]]\nname = \"nvme\"\nkind = \"nvme\"\ncapacity = \"1TB\"\nread_gbps = 2\nlatency_us = 100\n\
         emulated = {emulated}\nsource = \"test\"\n"
    );
    machine::decode(text.as_bytes(), Path::new("m.toml")).unwrap()
}

/// Plans Qwen3-30B-A3B, a model of 18.5 GB, within some bytes of main memory.
fn planned(gib: u64, emulated: bool) -> (Placement, Known, Evidence) {
    let known = catalogue::model(Path::new("qwen3-30b-a3b"), Some("q4_k_m")).unwrap();
    let evidence = Evidence::uniform(&known.sizes).unwrap();
    let machine = machine(emulated);
    let problem = Problem {
        shape: &known.sizes,
        profile: None,
        machine: &machine,
        budgets: vec![gib << 30, 900 << 30],
        context: 4096,
        sequences: 1,
        kv_type: KvType::F16,
        position: None,
    };
    let options = Options {
        strategy: Strategy::Optimal,
        time_limit_s: 1.0,
        ..Options::default()
    };
    let plan = solve_with_evidence(&problem, &evidence, &options)
        .unwrap()
        .plan;
    (plan, known, evidence)
}

fn observed(share: f64, gbps: [Option<f64>; 2]) -> Observed {
    Observed {
        share: Some(share),
        gbps: PerTier::from(gbps),
    }
}

fn near(a: f64, b: f64, within: f64) {
    assert!((a / b - 1.0).abs() < within, "{a} is not {b}");
}

#[test]
fn rates_as_planned_predict_what_was_planned() {
    for gib in [8, 32] {
        let (plan, known, evidence) = planned(gib, false);
        let at = plan.predicted.at;
        for given in [
            Observed::default(),
            observed(1.0, [None, None]),
            observed(1.0, [Some(30.0), Some(2.0)]),
            observed(1.0, [Some(f64::NAN), Some(-1.0)]),
        ] {
            assert!(given.is_as_planned(&plan), "{given:?}");
            let now = given.predict(&plan, &known.sizes, Some(&evidence), at);
            near(now.decode_tok_s, plan.predicted.decode_tok_s, 1e-9);
            let now = given.predict(&plan, &known.sizes, None, at);
            near(now.decode_tok_s, plan.predicted.decode_tok_s, 1e-9);
        }
        assert!(!observed(0.9, [None, None]).is_as_planned(&plan));
        assert!(!observed(1.0, [Some(29.0), None]).is_as_planned(&plan));
    }
}

#[test]
fn in_memory_all_but_the_fixed_times_follow_the_rate_of_memory() {
    let (plan, known, evidence) = planned(32, false);
    let was = plan.predicted.clone();
    let now = observed(1.0, [Some(15.0), None]);
    for evidence in [Some(&evidence), None] {
        let now = now.predict(&plan, &known.sizes, evidence, was.at);
        near(now.overhead_s, was.overhead_s, 1e-9);
        near(
            now.token_s() - now.overhead_s,
            2.0 * (was.token_s() - was.overhead_s),
            1e-9,
        );
        near(now.decode_tok_s * now.token_s(), 1.0, 1e-9);
    }
    // The share of the processors stretches fixed times too.
    let now = observed(0.5, [None, None]);
    let now = now.predict(&plan, &known.sizes, Some(&evidence), was.at);
    near(now.token_s(), 2.0 * was.token_s(), 1e-9);
    near(now.decode_tok_s, was.decode_tok_s / 2.0, 1e-9);
}

#[test]
fn both_causes_multiply() {
    let (plan, known, evidence) = planned(32, false);
    let given = observed(0.8, [Some(24.0), None]);
    let replaced = given.replaced(&plan);
    near(
        replaced.tiers.iter().next().unwrap().tier.read_gbps,
        19.2,
        1e-9,
    );
    near(replaced.layer_overhead_us, 25.0, 1e-9);
    near(replaced.token_overhead_us, 250.0, 1e-9);
    assert!(
        replaced
            .predicted
            .prompt_gflops
            .iter()
            .all(|rate| (*rate - 4000.0).abs() < 1e-9)
    );
    let few = &replaced.predicted.few_gflops;
    assert!(few.len() == 2 && few.iter().all(|rate| (*rate - 2000.0).abs() < 1e-9));
    let now = given.predict(&plan, &known.sizes, Some(&evidence), plan.predicted.at);
    assert_eq!(now, predict(&replaced, &known.sizes, &evidence));
}

#[test]
fn a_slow_drive_takes_over_where_experts_are_missed() {
    let (plan, known, evidence) = planned(8, false);
    let was = plan.predicted.clone();
    assert!(
        was.hit_rate < 0.95,
        "the budget is too small for all experts"
    );
    let predict = |gbps: f64, evidence: Option<&Evidence>| {
        let given = observed(1.0, [None, Some(gbps)]);
        given.predict(&plan, &known.sizes, evidence, was.at)
    };
    let slow = predict(0.5, Some(&evidence));
    assert!(slow.decode_tok_s < 0.5 * was.decode_tok_s, "{slow:?}");
    // Rows of the embedding may be on the drive; what memory reads takes as long as before.
    assert_eq!(slow.dense_s.first(), was.dense_s.first());
    assert!(slow.expert_critical_s > 2.0 * was.expert_critical_s);
    // Without evidence it is estimated: the order and most of the size stay.
    near(predict(0.5, None).token_s(), slow.token_s(), 0.15);
    assert!(predict(4.0, None).decode_tok_s > was.decode_tok_s);
    // A faster drive leaves the time of memory.
    let fast = predict(2000.0, Some(&evidence));
    assert!(fast.decode_tok_s > was.decode_tok_s);
    assert!(fast.token_s() > fast.overhead_s + fast.dense_s.iter().sum::<f64>());
    // The processors do not slow the drive down.
    let replaced = observed(0.5, [None, None]).replaced(&plan);
    near(
        replaced.tiers.iter().last().unwrap().tier.read_gbps,
        2.0,
        1e-9,
    );
}

#[test]
fn declared_rates_stay() {
    let (plan, known, evidence) = planned(8, true);
    let given = observed(0.5, [Some(10.0), Some(0.1)]);
    assert_eq!(given.replaced(&plan), plan);
    let now = given.predict(&plan, &known.sizes, Some(&evidence), plan.predicted.at);
    near(now.decode_tok_s, plan.predicted.decode_tok_s, 1e-9);
    assert_eq!(given.rates(&plan).count(), 0);
}

#[test]
fn a_share_of_nothing_stays_finite() {
    let (plan, known, evidence) = planned(32, false);
    for share in [0.0, -1.0, f64::NAN, f64::MIN_POSITIVE, 7.0] {
        let now = observed(share, [Some(f64::MAX), Some(f64::MIN_POSITIVE)]);
        for evidence in [Some(&evidence), None] {
            let now = now.predict(&plan, &known.sizes, evidence, 100);
            assert!(
                now.decode_tok_s.is_finite() && now.decode_tok_s >= 0.0,
                "{share}: {now:?}"
            );
        }
    }
}
