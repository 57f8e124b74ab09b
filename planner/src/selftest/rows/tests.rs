//! Rows of made-up outcomes.

use super::super::table::{How, Verdict};
use super::*;
use tier_plan_runtime::LoadError;
use tier_plan_runtime::cuda::CudaError;
use tier_plan_runtime::quant::TensorType;
use tier_plan_selftest::golden::GoldenErrors;
use tier_plan_selftest::gpu_rates::{LinkRates, Rates};
use tier_plan_selftest::launches::Launches;
use tier_plan_selftest::suite::GoldenStep;

/// Returns the timing of a model whose tokens take `token_s` seconds.
pub fn timed(token_s: f64) -> Timed {
    Timed {
        prompt_tokens: 512,
        prompt_s: 0.1,
        decode_tokens: 128,
        token_s,
        dense_s: 0.4 * token_s,
        expert_s: 0.5 * token_s,
        token_bytes: 800e6,
        cache_bytes: 1 << 20,
        launches: 300.0,
        layers: 24,
    }
}

fn some_gives() -> DeviceRates {
    let rates = Rates {
        launch_us: 2.0,
        round_trip_us: 10.0,
        read_gbps: 1000.0,
        to_device: LinkRates {
            pinned_gbps: 25.0,
            pageable_gbps: 10.0,
        },
        from_device: LinkRates {
            pinned_gbps: 24.0,
            pageable_gbps: 9.0,
        },
    };
    DeviceRates {
        rates,
        copy_gbps: 900.0,
        products: vec![(TensorType::Q4_K, 800.0)],
    }
}

fn device_failed() -> SelftestError {
    SelftestError::Gpu(CudaError::NoKernel("this".into()))
}

fn not_for_gpus() -> SelftestError {
    SelftestError::Load(LoadError::OnGpu {
        plan: "a plan".into(),
        tier: "vram".into(),
        group: "attention",
        layer: 3,
        why: "heads of 18 values".into(),
    })
}

fn some_results() -> Results {
    let golden = |exact, found| GoldenStep {
        exact,
        name: "a".into(),
        errors: found,
    };
    let all = |value: f64| GoldenErrors {
        tokens: 48,
        same_experts: 48,
        same_experts_nmse: value,
        prompt_nmse: value,
        decode_nmse: value / 2.0,
    };
    let nmse = |value: f64| Ok(all(value));
    Results {
        kernels: vec![(
            "products".into(),
            Ok(Outcome {
                compared: 5,
                worst: 0.25,
            }),
        )],
        logits: vec![
            (
                GpuShare::All,
                Ok(Outcome {
                    compared: 5,
                    worst: 1.5,
                }),
            ),
            (GpuShare::AllButExperts, Err(device_failed())),
        ],
        texts: vec![
            (
                GpuShare::All,
                Ok(TextMatch {
                    same: 64,
                    total: 64,
                    margin: None,
                }),
            ),
            (
                GpuShare::AllButExperts,
                Ok(TextMatch {
                    same: 63,
                    total: 64,
                    margin: Some(0.01),
                }),
            ),
        ],
        golden: vec![
            golden(true, nmse(1e-4)),
            golden(true, nmse(1.1e-4)),
            golden(false, nmse(1e-2)),
            golden(false, nmse(1.1e-2)),
            golden(true, Err(not_for_gpus())),
            golden(false, Err(device_failed())),
        ],
        launches: Some(Ok(Launches {
            layer: 12,
            outside: 3,
        })),
    }
}

fn verdicts(rows: &[Row]) -> Vec<Verdict> {
    rows.iter().map(Row::verdict).collect()
}

#[test]
fn results_are_held_to_their_bounds() {
    use Verdict::{Failed, Met, Missed, NotRun};
    let rows = results(&some_results(), None, None);
    let expected = [
        Met, Met, Missed, Met, Missed, NotRun, Failed, Missed, Failed, Met, Missed, Met,
    ];
    assert_eq!(verdicts(&rows), expected, "{rows:?}");
    let wrong: Vec<bool> = rows.iter().map(Row::is_wrong).collect();
    assert_eq!(
        wrong.iter().filter(|w| **w).count(),
        6,
        "misses and failures of results, not what can't run"
    );
    let why = |row: &Row| match &row.found {
        Found::NotRun(why) => why.clone(),
        _ => String::new(),
    };
    assert!(
        why(&rows[5]).contains("heads of 18 values"),
        "{:?}",
        rows[5]
    );
    assert!(rows[10].note.contains("1.00 %"), "{:?}", rows[10]);
    let last = &rows[11];
    assert!(
        last.how == How::Counted && !last.results && last.found == Found::Figure(12.0),
        "{last:?}"
    );
    let mut other = some_results();
    other.golden[1].errors = Ok(GoldenErrors {
        tokens: 48,
        same_experts: 7,
        same_experts_nmse: 1e-6,
        prompt_nmse: 5e-4,
        decode_nmse: 1e-9,
    });
    let rows = results(&other, None, None);
    assert!(
        rows[2].verdict() == Met && rows[2].note.contains("token 8"),
        "{:?}",
        rows[2]
    );
    let mut many = some_results();
    many.launches = Some(Ok(Launches {
        layer: 13,
        outside: 3,
    }));
    let rows = results(&many, None, None);
    assert_eq!(rows[11].verdict(), Missed);
    assert!(!rows[11].is_wrong(), "slow is not wrong");
}

#[test]
fn what_is_missing_or_senseless_is_said() {
    let mut found = some_results();
    (found.golden, found.logits, found.texts) = (Vec::new(), Vec::new(), Vec::new());
    let rows = results(&found, Some("give --golden"), Some("run from a clone"));
    use Verdict::{Met, NotRun};
    assert_eq!(verdicts(&rows), [Met, NotRun, NotRun, Met]);
    assert!(!rows.iter().any(Row::is_wrong));
    let mut found = some_results();
    found.kernels.push((
        "wrong".into(),
        Ok(Outcome {
            compared: 5,
            worst: f64::NAN,
        }),
    ));
    let rows = results(&found, None, None);
    assert_eq!(verdicts(&rows), [Met, Verdict::Missed, NotRun, NotRun]);
    assert!(rows[1].is_wrong());
    let rows = gives(&Err(SelftestError::Stopped));
    assert_eq!(verdicts(&rows), [NotRun]);
}

#[test]
fn rates_are_measured_and_nothing_is_asked_of_them() {
    let rows = gives(&Ok(some_gives()));
    assert_eq!(rows.len(), 9);
    assert!(
        rows.iter()
            .all(|r| r.verdict() == Verdict::NoTarget && r.how == How::Measured)
    );
    assert!(
        rows[3].note.contains("read and bytes written") && rows[3].found == Found::Figure(900.0)
    );
}

fn some_speeds(resident: Timed, hybrid: Timed, processor: Timed) -> Speeds {
    Speeds {
        fully_on_gpu: Ok(resident),
        hybrid: Some(Ok(hybrid)),
        processor: Ok(processor),
    }
}

fn row<'a>(rows: &'a [Row], what: &str) -> &'a Row {
    rows.iter()
        .find(|row| row.what.contains(what))
        .unwrap_or_else(|| panic!("no row '{what}' in {rows:?}"))
}

#[test]
fn speeds_are_held_to_their_bounds() {
    let model = Model {
        name: "a model",
        judged: true,
    };
    // 800 MB at 70 % of 1000 GB/s, and a little more.
    for (token_s, share, prompt_s, times) in [
        (800e6 / 699e9, Verdict::Missed, 5.1, Verdict::Met),
        (800e6 / 701e9, Verdict::Met, 4.9, Verdict::Missed),
    ] {
        let processor = Timed {
            prompt_s,
            ..timed(0.05)
        };
        let found = some_speeds(timed(token_s), timed(0.03), processor);
        let rows = speeds(&found, &some_gives(), model);
        assert_eq!(row(&rows, "read rate").verdict(), share);
        assert_eq!(
            row(&rows, "times as fast as the processor").verdict(),
            times
        );
        // Without judgement, for a model that says nothing about real ones.
        let rows = speeds(
            &found,
            &some_gives(),
            Model {
                judged: false,
                ..model
            },
        );
        assert!(verdicts(&rows).iter().all(|v| *v == Verdict::NoTarget));
    }
    let short = Timed {
        prompt_tokens: 64,
        ..timed(0.05)
    };
    let rows = speeds(
        &some_speeds(timed(0.01), timed(0.03), short),
        &some_gives(),
        model,
    );
    assert!(
        row(&rows, "times as fast").note.contains("favours the GPU"),
        "{rows:?}"
    );
}

#[test]
fn a_hybrid_token_is_held_to_its_parts() {
    let model = Model {
        name: "a model",
        judged: true,
    };
    // 20 ms of experts on the CPU, 24 round trips of 10 µs.
    let processor = Timed {
        expert_s: 0.02,
        ..timed(0.05)
    };
    let verdict = |token_s: f64| {
        let hybrid = Timed {
            token_s,
            dense_s: 0.003,
            expert_s: token_s - 0.003,
            ..timed(token_s)
        };
        let rows = speeds(
            &some_speeds(timed(0.01), hybrid, processor),
            &some_gives(),
            model,
        );
        row(&rows, "its time of a token").verdict()
    };
    let bound = 1.15 * 0.02 + 24.0 * 10e-6;
    assert_eq!(
        [verdict(bound - 1e-6), verdict(bound + 1e-6)],
        [Verdict::Met, Verdict::Missed]
    );
    // Where the GPU's part is the longer one, it counts: without the round trips, with the head.
    let hybrid = Timed {
        token_s: 0.050,
        dense_s: 0.030,
        expert_s: 0.015,
        ..timed(0.05)
    };
    let parts = Parts::new(&hybrid, &processor, 10.0);
    let near = |a: f64, b: f64| (a - b).abs() < 1e-12;
    assert!(
        near(parts.gpu_s, 0.035 - 240e-6)
            && near(parts.trips_s, 240e-6)
            && parts.processor_s == 0.02,
        "{parts:?}"
    );
    assert!(near(parts.allowed_s(), 1.15 * (0.035 - 240e-6) + 240e-6));
    assert_eq!(Parts::new(&hybrid, &processor, 1e6).gpu_s, 0.0);
}

#[test]
fn what_could_not_be_timed_is_a_row() {
    let model = Model {
        name: "a model",
        judged: true,
    };
    let found = Speeds {
        fully_on_gpu: Err(device_failed()),
        hybrid: None,
        processor: Ok(timed(0.05)),
    };
    let rows = speeds(&found, &some_gives(), model);
    assert_eq!(verdicts(&rows), [Verdict::Failed, Verdict::NotRun]);
    let found = Speeds {
        fully_on_gpu: Ok(timed(0.05)),
        hybrid: Some(Ok(timed(0.05))),
        processor: Err(device_failed()),
    };
    let rows = speeds(&found, &some_gives(), model);
    use Verdict::{Failed, Missed, NoTarget};
    assert_eq!(
        verdicts(&rows),
        [NoTarget, Missed, Failed, NoTarget, NoTarget]
    );
    let found = Speeds {
        hybrid: Some(Err(SelftestError::Stopped)),
        ..found
    };
    assert_eq!(
        verdicts(&speeds(&found, &some_gives(), model)),
        [NoTarget, Missed, Failed, Verdict::NotRun]
    );
}

#[test]
fn predictions_stand_beside_what_was_measured() {
    let verdict = |measured| predicted("x", measured, &Ok(100.0), true).verdict();
    assert_eq!(
        [verdict(89.9), verdict(90.1), verdict(109.9), verdict(110.1)],
        {
            use Verdict::{Met, Missed};
            [Missed, Met, Met, Missed]
        }
    );
    let row = predicted("x", 95.0, &Ok(100.0), false);
    assert!(
        row.verdict() == Verdict::NoTarget && row.note.contains("-5.0 %"),
        "{row:?}"
    );
    let row = predicted("x", 95.0, &Err("no drive".into()), true);
    assert_eq!(row.found, Found::NotRun("no drive".into()));
}
