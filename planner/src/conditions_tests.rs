use super::*;
use crate::catalogue;
use tier_plan_runtime::KvType;
use tier_plan_runtime::plans::in_memory::all_in_memory;

/// A plan for main memory that counts on 20 GB/s, and its sizes.
fn planned(emulated: bool) -> (Placement, ModelShape, Evidence) {
    let known = catalogue::model(Path::new("qwen3-30b-a3b"), Some("q4_k_m")).unwrap();
    let evidence = Evidence::uniform(&known.sizes).unwrap();
    let mut plan = all_in_memory(&known.sizes, 1024, KvType::F16);
    plan.tiers.iter_mut().for_each(|t| {
        (t.tier.read_gbps, t.tier.emulated) = (20.0, emulated);
    });
    (plan.predicted.at, plan.layer_overhead_us) = (512, 10.0);
    plan.predicted = crate::cost::predict(&plan, &known.sizes, &evidence);
    (plan, known.sizes, evidence)
}

fn given(share: Option<f64>, gbps: Option<f64>) -> Given {
    Given {
        usage: Usage {
            seconds: 2.0,
            share,
            others: Some(0.9),
            processors: Some(2.0),
            stolen: Some(0.02),
            ..Usage::default()
        },
        observed: Observed {
            share,
            gbps: PerTier::from([gbps]),
        },
    }
}

fn conditions(given: &Given, emulated: bool) -> Option<Conditions> {
    let (plan, shape, evidence) = planned(emulated);
    given.conditions(&plan, &shape, Some(&plan.predicted), || Some(evidence))
}

#[test]
fn a_quiet_run_is_told_as_before() {
    for (share, gbps) in [
        (None, None),
        (Some(1.0), Some(20.0)),
        (Some(0.97), Some(20.2)),
        (Some(1.0), None),
    ] {
        assert_eq!(
            conditions(&given(share, gbps), false),
            None,
            "{share:?} {gbps:?}"
        );
        assert_eq!(conditions(&given(share, gbps), true), None);
    }
    let line = prediction_line(24.1, 19.5, "", None);
    assert_eq!(line, "predicted 24.1 tok/s, measured 19.5 (-19.1 %)");
    let record = RunRecord::default();
    assert_eq!(busy_line([&record].into_iter()), None);
}

#[test]
fn a_moment_tells_nothing() {
    let mut short = given(Some(0.3), Some(5.0));
    short.usage.seconds = 0.15;
    assert_eq!(conditions(&short, false), None);
    assert!(!short.is_busy());
}

#[test]
fn evidence_is_asked_for_only_where_rates_differ() {
    let (plan, shape, _) = planned(false);
    let never = || panic!("nothing differs");
    let quiet = given(Some(1.0), Some(20.0));
    assert_eq!(
        quiet.conditions(&plan, &shape, Some(&plan.predicted), never),
        None
    );
}

#[test]
fn slow_memory_and_a_busy_machine_are_named() {
    let busy = conditions(&given(Some(0.81), Some(16.0)), false).unwrap();
    let (plan, ..) = planned(false);
    let now = busy.predicted.clone().unwrap();
    assert!(now.decode_tok_s < 0.7 * plan.predicted.decode_tok_s);
    assert_eq!(
        describe(&busy),
        "dram 16.0 instead of 20.0 GB/s, processors 81 %"
    );
    let shown = Conditions {
        predicted: Some(Prediction {
            decode_tok_s: 19.8,
            ..now
        }),
        ..busy
    };
    assert_eq!(
        prediction_line(24.1, 19.5, "", Some(&shown)),
        "predicted 24.1 tok/s as planned, 19.8 with the rates of this run (dram 16.0 instead of 20.0 GB/s, processors \
         81 %), measured 19.5 (-19.1 % and -1.5 %)"
    );
    assert_eq!(
        describe_processors(&shown.processors),
        "its threads got 81 % of the processors' time, other programs used 0.9 of 2 processors, a hypervisor took 2 %"
    );
}

#[test]
fn a_busy_machine_is_told_of_emulated_runs_that_know_no_rates() {
    let busy = conditions(&given(Some(0.5), None), true).unwrap();
    assert_eq!((busy.predicted.clone(), busy.rates.len()), (None, 0));
    let record = |share: f64| RunRecord {
        emulated: true,
        conditions: Some(Conditions {
            processors: Processors {
                share: Some(share),
                ..busy.processors
            },
            ..busy.clone()
        }),
        ..RunRecord::default()
    };
    let records = [RunRecord::default(), record(0.9), record(0.5), record(0.7)];
    let line = busy_line(records.iter()).unwrap();
    assert!(
        line.starts_with(
            "This machine was busy: its threads got 50 % of the processors' time, other"
        ),
        "{line}"
    );
    assert!(
        line.contains("emulated tiers declare") && !line.contains('\n'),
        "{line}"
    );
    assert_eq!(busy_line(records[..1].iter()), None);
}

#[test]
fn threads_that_wait_for_one_another_make_no_busy_machine() {
    let waiting = |others: Option<f64>, stolen: f64| Processors {
        share: Some(0.66),
        others,
        stolen: Some(stolen),
        count: Some(2.0),
        ..Processors::default()
    };
    assert!(!is_busy(&waiting(Some(0.04), 0.0)));
    assert!(is_busy(&waiting(Some(0.4), 0.0)));
    assert!(is_busy(&waiting(Some(0.04), 0.05)));
    // A system that does not tell.
    assert!(is_busy(&waiting(None, 0.0)));
}

#[test]
fn a_run_without_a_prediction_has_nothing_to_hold_rates_against() {
    let (plan, shape, _) = planned(false);
    let busy = given(Some(0.6), Some(9.0));
    assert_eq!(busy.conditions(&plan, &shape, None, || None), None);
}

#[test]
fn a_few_reads_say_nothing_about_a_drive() {
    let (plan, ..) = planned(false);
    let tier = Tier {
        latency_us: 100.0,
        ..plan.tiers.iter().next().unwrap().tier.clone()
    };
    let reads = |bytes, bursts| DriveUse {
        bytes,
        busy: Duration::from_millis(10),
        bursts,
    };
    assert_eq!(drive_gbps(reads(9 << 20, 2), &tier), None);
    assert_eq!(drive_gbps(reads(1 << 20, 50), &tier), None);
    let rate = drive_gbps(reads(16 << 20, 20), &tier).unwrap();
    assert!((rate - f64::from(16 << 20) / 8e-3 / 1e9).abs() < 1e-9);
}
