use super::*;
use crate::machine::tests::any_text;
use crate::tier_idx::PerTier;
use proptest::collection::vec;
use proptest::prelude::*;

const V1: &str = include_str!("../../../../tests/data/formats/record.v1.json");
const V2: &str = include_str!("../../../../tests/data/formats/record.v2.json");
const V4: &str = include_str!("../../../../tests/data/formats/record.v4.json");
const V5: &str = include_str!("../../../../tests/data/formats/record.v5.json");
const V6: &str = include_str!("../../../../tests/data/formats/record.v6.json");
const V3: &str = include_str!("../../../../tests/data/formats/record.v3.json");

fn load(text: &str) -> Result<RunRecord, String> {
    decode(text.as_bytes(), Path::new("r.json")).map_err(|e| e.to_string())
}

#[test]
fn version_1_means_what_it_meant() {
    let source = |name: &str, hash: &str| {
        Some(SourceId {
            name: name.into(),
            hash: hash.into(),
        })
    };
    let want = RunRecord {
        plan: "ilp".into(),
        plan_status: "feasible".into(),
        plan_gap: Some(0.04),
        model: source("demo", "000102030405060708090a0b0c0d0e0f"),
        machine: source("demo-emulated", "202122232425262728292a2b2c2d2e2f"),
        when: "2026-11-22T17:00:00Z".into(),
        host: "a \"plain\" processor, 2 threads".into(),
        threads: 2,
        isa: "avx512".into(),
        emulated: true,
        prompt_tokens: 64,
        prompt_s: 0.25,
        decode_tokens: 3,
        decode_s: 0.5,
        first_token_s: 0.375,
        tiers: vec![
            TierRecord {
                name: "vram".into(),
                emulated: true,
                planned_bytes: 2_493_216,
                resident_bytes: 2_493_216,
                read_bytes: 6_000_000,
                busy_s: 0.125,
            },
            TierRecord {
                name: "dram".into(),
                emulated: false,
                planned_bytes: u64::MAX,
                resident_bytes: 4096,
                read_bytes: 0,
                busy_s: 0.0,
            },
        ],
        layers: vec![LayerRecord {
            layer: 1,
            pinned_hits: 9,
            slot_hits: 2,
            misses: 1,
            dense_s: 0.001,
            expert_s: 0.002,
            ..LayerRecord::default()
        }],
        predicted: Some(Prediction {
            decode_tok_s: 6.25,
            prompt_tok_s: 250.0,
            overhead_s: 0.00018,
            dense_s: PerTier::from([0.0002, 0.0]),
            expert_s: PerTier::from([0.0001, 0.0005]),
            expert_critical_s: 0.0007,
            hit_rate: 0.9375,
            read_bytes: PerTier::from([2e6, 500_000.5]),
            emulated: true,
            at: 0,
            kv_s: 0.0,
            prompt_gflops: PerTier::default(),
            few_gflops: PerTier::default(),
        }),
        parallel: Vec::new(),
        conditions: None,
        setup: None,
        output: vec![5, 4095, 17],
    };
    let record = load(V1).unwrap();
    assert_eq!(record, want);
    assert_eq!(
        record.encode(),
        V1,
        "the writer lays out version 1 as it always did"
    );
    let mut want = want;
    let predicted = want.predicted.as_mut().unwrap();
    (predicted.at, predicted.kv_s, predicted.prompt_gflops) =
        (96, 0.00025, PerTier::from([900.0, 50.5]));
    let layer = &mut want.layers[0];
    (layer.missed_bytes, layer.reading_s, layer.waited_s) = (30_000, 0.0015, 0.0005);
    let record = load(V2).unwrap();
    assert_eq!(record, want);
    assert_eq!(
        record.encode(),
        V2,
        "the writer lays out version 2 as it always did"
    );
    let steps = |texts, decode_tok_s, predicted| ParallelRecord {
        texts,
        prompt_tok_s: 250.5,
        decode_tok_s,
        gap_s: 0.125,
        gap_p95_s: 0.25,
        distinct_experts: 6.5,
        predicted,
        observed: None,
    };
    let predicted = ParallelPrediction {
        decode_tok_s: 31.25,
        gap_s: 0.128,
    };
    want.parallel = vec![steps(1, 8.0, None), steps(4, 32.0, Some(predicted))];
    assert_eq!(load(V3), Ok(want.clone()));
    assert_eq!(want.encode(), V3);
    let now = want.predicted.clone().map(|p| Prediction {
        decode_tok_s: 5.5,
        overhead_s: 0.0003,
        ..p
    });
    want.conditions = Some(Conditions {
        processors: Processors {
            share: Some(0.8125),
            stolen: Some(0.03125),
            others: Some(0.5),
            count: Some(2.0),
            pressure: None,
            preempted_per_s: Some(125.5),
        },
        rates: vec![TierRate {
            name: "dram".into(),
            planned_gbps: 33.0,
            measured_gbps: 26.25,
        }],
        predicted: now,
    });
    want.parallel[1].observed = Some(ParallelPrediction {
        decode_tok_s: 25.0,
        gap_s: 0.16,
    });
    assert_eq!(want.encode(), V4);
    assert_eq!(load(V4), Ok(want.clone()));
    assert_eq!(want.observed_tok_s(), Some(5.5));
    want.setup = Some(Setup {
        program: "0.9.0".into(),
        system: System {
            processor: Some("a \"plain\" processor".into()),
            processors: Some(2),
            memory_bytes: None,
        },
        model_bytes: 11_214_848,
        context: 1024,
        sequences: 1,
        kv_type: "q8_0".into(),
        tiers: vec![TierSetup {
            name: "vram".into(),
            kind: "vram".into(),
            budget_bytes: 3 << 20,
            read_gbps: Some(8.5),
        }],
    });
    assert_eq!(want.encode(), V5);
    assert_eq!(load(V5), Ok(want.clone()));
    assert!(!want.has_streamed());
    want.layers[0].streamed = 4;
    assert!(want.has_streamed());
    assert_eq!(want.encode(), V6);
    assert_eq!(load(V6), Ok(want.clone()));
    want.conditions = None;
    assert_eq!(want.observed_tok_s(), Some(6.25));
    want.predicted = None;
    assert_eq!(want.observed_tok_s(), None);
}

#[test]
fn conditions_are_checked() {
    for (from, to, why) in [
        (
            "\"share\": 0.8125",
            "\"share\": 1.5",
            "conditions.processors.share is 1.5, but must be between 0 and 1",
        ),
        (
            "\"stolen\": 0.03125",
            "\"stolen\": -0.5",
            "conditions.processors.stolen is -0.5",
        ),
        (
            "\"others\": 0.5",
            "\"others\": -1",
            "conditions.processors.others is -1",
        ),
        (
            "\"measured_gbps\": 26.25",
            "\"measured_gbps\": -1",
            "measured_gbps of tier 'dram' in conditions is -1",
        ),
        (
            "\"overhead_s\": 0.0003",
            "\"overhead_s\": -3",
            "conditions.predicted.overhead_s is -3",
        ),
        (
            "\"gap_s\": 0.16",
            "\"gap_s\": -1",
            "observed.gap_s of 4 texts is -1",
        ),
        (
            "\"pressure\": null",
            "\"load\": null",
            "unknown field `load`",
        ),
        (
            "\"version\": 4",
            "\"version\": 3",
            "conditions and observed are keys of version 4",
        ),
    ] {
        assert!(V4.contains(from), "{from}");
        let error = load(&V4.replacen(from, to, 1)).expect_err(to);
        assert!(error.contains(why), "wanted {why:?}, got {error:?}");
    }
}

#[test]
fn the_setup_is_checked() {
    for (from, to, why) in [
        (
            "\"read_gbps\": 8.5",
            "\"read_gbps\": -1",
            "read_gbps of tier 'vram' in setup is -1",
        ),
        (
            "\"processors\": 2",
            "\"hostname\": 2",
            "unknown field `hostname`",
        ),
        (
            "\"version\": 5",
            "\"version\": 4",
            "setup is a key of version 5",
        ),
    ] {
        let error = load(&V5.replacen(from, to, 1)).expect_err(to);
        assert!(error.contains(why), "wanted {why:?}, got {error:?}");
    }
}

#[test]
fn streamed_experts_are_checked() {
    for (from, to, why) in [
        (
            "\"streamed\": 4",
            "\"streamed\": -4",
            "invalid value: integer `-4`",
        ),
        (
            "\"version\": 6",
            "\"version\": 5",
            "streamed of a layer is a key of version 6",
        ),
    ] {
        let error = load(&V6.replacen(from, to, 1)).expect_err(to);
        assert!(error.contains(why), "wanted {why:?}, got {error:?}");
    }
    let none = load(&V6.replacen("\"streamed\": 4", "\"streamed\": 0", 1)).unwrap();
    assert_eq!(none.encode(), V5, "none need no key");
}

#[test]
fn an_empty_record_reads_back() {
    let empty = RunRecord::default();
    let text = empty.encode();
    assert!(text.ends_with("\"output\": []\n}\n"), "{text}");
    assert_eq!(load(&text), Ok(empty));
}

#[test]
fn errors_say_what_and_how_to_mend() {
    let cases = [
        (
            "tier-plan run record",
            "tier-plan machine",
            "not a run record: its format is \"tier-plan machine\"; `tier-plan run` can write one",
        ),
        (
            "\"version\": 1",
            "\"version\": 7",
            "run record version 7, but this program reads up to version 6; update tier-plan",
        ),
        (
            "\"version\": 1",
            "\"version\": 0",
            "version is 0, but versions start at 1",
        ),
        ("\"version\": 1,", "", "no version; write `version = 6`"),
        (
            "\"isa\"",
            "\"simd\"",
            "unknown field `simd`, expected one of",
        ),
        ("  \"threads\": 2,\n", "", "missing field `threads`"),
        (
            "\"threads\": 2",
            "\"threads\": -2",
            "invalid value: integer `-2`, expected u32 at line 17 column",
        ),
        (
            "\"prompt_s\": 0.25",
            "\"prompt_s\": -0.25",
            "prompt_s is -0.25, but must be a finite number that is not negative",
        ),
        (
            "\"decode_s\": 0.5",
            "\"decode_s\": null",
            "invalid type: null, expected f64",
        ),
        (
            "\"decode_s\": 0.5",
            "\"decode_s\": 1e999",
            "number out of range",
        ),
        (
            "\"busy_s\": 0.125",
            "\"busy_s\": -1",
            "busy_s of tier 'vram' is -1",
        ),
        (
            "\"expert_s\": 0.002",
            "\"expert_s\": -1",
            "expert_s of layer 1 is -1",
        ),
        (
            "\"hit_rate\": 0.9375",
            "\"hit_rate\": -1",
            "predicted.hit_rate is -1",
        ),
        ("      0.0005\n", "      -1\n", "predicted.expert_s is -1"),
        (
            "\"hit_rate\": 0.9375",
            "\"hit_rate\": 0.9375, \"at\": 3",
            "predicted.at, kv_s and prompt_gflops are keys of version 2",
        ),
        (
            "\"layers\": [",
            "\"parallel\": [{\"texts\": 1, \"prompt_tok_s\": 1, \"decode_tok_s\": 1, \"gap_s\": 1, \
             \"gap_p95_s\": 1, \"distinct_experts\": 1, \"predicted\": null}], \"layers\": [",
            "parallel is a key of version 3",
        ),
        ("17]\n}", "17]", "EOF while parsing"),
    ];
    for (from, to, why) in cases {
        assert!(V1.contains(from), "{from}");
        let error = load(&V1.replacen(from, to, 1)).expect_err(to);
        assert!(
            error.starts_with("r.json: ") && error.contains(why),
            "{to}: wanted {why:?}, got {error:?}"
        );
    }
    for (bytes, why) in [
        (
            &b"GGUF\x03\0\0\0"[..],
            "not a run record: it is a GGUF model",
        ),
        (b"{}", "it is text that names no tier-plan format"),
        (b"[1, 2]", "it is text that names no tier-plan format"),
        (b"", "it is empty"),
        (
            b"format = \"tier-plan placement\"",
            "it is a placement plan",
        ),
    ] {
        let error = decode(bytes, Path::new("r.json")).unwrap_err().to_string();
        assert!(error.contains(why), "wanted {why:?}, got {error:?}");
    }
}

#[test]
fn steps_of_texts_are_checked() {
    for (from, to, why) in [
        ("\"texts\": 4", "\"texts\": 1", "1 texts after 1"),
        ("\"texts\": 1", "\"texts\": 0", "0 texts after 0"),
        (
            "\"gap_p95_s\": 0.25",
            "\"gap_p95_s\": -1",
            "gap_p95_s of 1 texts is -1",
        ),
        (
            "\"gap_s\": 0.128",
            "\"gap_s\": -1",
            "predicted.gap_s of 4 texts is -1",
        ),
    ] {
        let error = load(&V3.replacen(from, to, 1)).expect_err(to);
        assert!(error.contains(why), "wanted {why:?}, got {error:?}");
    }
}

#[test]
fn only_a_sound_record_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.json");
    let record = load(V1).unwrap();
    record.write(&path).unwrap();
    assert_eq!(read(&path).unwrap(), record);
    let bad = RunRecord {
        first_token_s: f64::NAN,
        ..record.clone()
    };
    assert!(
        bad.write(&path)
            .unwrap_err()
            .to_string()
            .contains("first_token_s is NaN")
    );
    let bad = RunRecord {
        plan_gap: Some(f64::INFINITY),
        ..record.clone()
    };
    assert!(
        bad.write(&path)
            .unwrap_err()
            .to_string()
            .contains("gap is inf")
    );
    assert_eq!(
        read(&path).unwrap(),
        record,
        "the file from before is still there"
    );
}

/// Numbers with few digits, which the JSON reader gets exactly right; others may differ in the last
/// bit.
fn any_amount() -> impl Strategy<Value = f64> {
    (0u32..1 << 30, 0i32..9).prop_map(|(n, e)| f64::from(n) / 10f64.powi(e))
}

fn any_record() -> impl Strategy<Value = RunRecord> {
    let tier = (any_text(), any::<bool>(), any::<[u64; 3]>(), any_amount()).prop_map(
        |(name, emulated, [planned_bytes, resident_bytes, read_bytes], busy_s)| TierRecord {
            name,
            emulated,
            planned_bytes,
            resident_bytes,
            read_bytes,
            busy_s,
        },
    );
    let layer = (
        any::<u32>(),
        any::<[u64; 5]>(),
        proptest::array::uniform4(any_amount()),
    )
        .prop_map(
            |(
                layer,
                [pinned_hits, slot_hits, misses, missed_bytes, streamed],
                [dense_s, expert_s, reading_s, waited_s],
            )| {
                LayerRecord {
                    layer,
                    pinned_hits,
                    slot_hits,
                    misses,
                    dense_s,
                    expert_s,
                    missed_bytes,
                    reading_s,
                    waited_s,
                    streamed,
                }
            },
        );
    let source = || {
        proptest::option::of(
            (any_text(), any_text()).prop_map(|(name, hash)| SourceId { name, hash }),
        )
    };
    let predicted = (
        proptest::array::uniform5(any_amount()),
        vec(any_amount(), 0..3),
        any::<bool>(),
    )
        .prop_map(|([a, b, c, d, e], parts, emulated)| Prediction {
            decode_tok_s: a,
            prompt_tok_s: b,
            overhead_s: c,
            dense_s: parts.clone().into(),
            expert_s: parts.iter().map(|x| x.floor()).collect(),
            expert_critical_s: d,
            hit_rate: e,
            read_bytes: parts.iter().map(|x| x.floor() + 1.0).collect(),
            emulated,
            at: u32::from(emulated),
            kv_s: b,
            prompt_gflops: parts.into(),
            few_gflops: PerTier::default(),
        });
    let words = proptest::array::uniform6(any_text());
    let times = (
        any_amount(),
        any_amount(),
        any_amount(),
        proptest::option::of(any_amount()),
    );
    let steps = (
        proptest::array::uniform5(any_amount()),
        proptest::option::of((any_amount(), any_amount())),
    )
        .prop_map(|([a, b, c, d, e], predicted)| ParallelRecord {
            texts: 0,
            prompt_tok_s: a,
            decode_tok_s: b,
            gap_s: c,
            gap_p95_s: d,
            distinct_experts: e,
            predicted: predicted.map(|(decode_tok_s, gap_s)| ParallelPrediction {
                decode_tok_s,
                gap_s,
            }),
            observed: predicted.map(|(gap_s, decode_tok_s)| ParallelPrediction {
                decode_tok_s,
                gap_s,
            }),
        });
    let parallel = vec(steps, 0..3).prop_map(|mut all| {
        (1..)
            .zip(&mut all)
            .for_each(|(texts, steps)| steps.texts = texts);
        all
    });
    let lists = (
        vec(tier, 0..3),
        vec(layer, 0..3),
        parallel,
        vec(any::<u32>(), 0..20),
    );
    (
        words,
        source(),
        source(),
        times,
        any::<(u64, u64, u32, bool)>(),
        lists,
        proptest::option::of(predicted),
    )
        .prop_map(
            |(
                words,
                model,
                machine,
                times,
                (prompt_tokens, decode_tokens, threads, emulated),
                lists,
                predicted,
            )| {
                let [plan, plan_status, when, host, isa, _] = words;
                let (prompt_s, decode_s, first_token_s, plan_gap) = times;
                let (tiers, layers, parallel, output) = lists;
                let conditions = emulated.then(|| Conditions {
                    processors: Processors {
                        share: Some(1.0),
                        others: plan_gap,
                        ..Processors::default()
                    },
                    rates: vec![TierRate {
                        name: host.clone(),
                        planned_gbps: prompt_s,
                        measured_gbps: decode_s,
                    }],
                    predicted: predicted.clone(),
                });
                let setup = emulated.then(|| Setup {
                    program: plan.clone(),
                    system: System {
                        processor: Some(host.clone()),
                        processors: Some(threads),
                        memory_bytes: plan_gap.map(|_| prompt_tokens),
                    },
                    model_bytes: decode_tokens,
                    context: threads,
                    sequences: 1,
                    kv_type: isa.clone(),
                    tiers: vec![TierSetup {
                        name: host.clone(),
                        kind: isa.clone(),
                        budget_bytes: decode_tokens,
                        read_gbps: plan_gap.map(|_| decode_s),
                    }],
                });
                RunRecord {
                    conditions,
                    setup,
                    plan,
                    plan_status,
                    plan_gap,
                    model,
                    machine,
                    when,
                    host,
                    threads,
                    isa,
                    emulated,
                    prompt_tokens,
                    prompt_s,
                    decode_tokens,
                    decode_s,
                    first_token_s,
                    tiers,
                    layers,
                    predicted,
                    parallel,
                    output,
                }
            },
        )
}

proptest! {
    #[test]
    fn any_record_reads_back(record in any_record()) {
        let text = record.encode();
        prop_assert_eq!(load(&text), Ok(record), "{}", text);
    }

    #[test]
    fn damage_never_panics(at in any::<prop::sample::Index>(), cut in 0usize..40, insert in "[-0-9,.\"\\[\\]{}e]{0,5}") {
        let mut bytes = V1.as_bytes().to_vec();
        let at = at.index(bytes.len());
        let end = (at + cut).min(bytes.len());
        bytes.splice(at..end, insert.into_bytes());
        if let Ok(record) = decode(&bytes, Path::new("r.json")) {
            prop_assert!(load(&record.encode()).is_ok());
        }
    }
}
