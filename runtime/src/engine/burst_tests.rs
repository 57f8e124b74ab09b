use super::*;
use crate::plans::budget::within;
use crate::plans::in_memory::all_in_memory;
use crate::{KvType, LoadOptions, LogitsMode};
use std::path::Path;
use std::sync::Arc;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::kv::CacheRoom;
use tier_plan_formats::model::{describe, shape::shape_of};

fn stage(bytes: f64, seconds: f64) -> StageTime {
    StageTime { bytes, seconds }
}

#[test]
fn interrupted_stages_are_left_out() {
    let quiet = vec![stage(2e6, 1e-4); 9];
    assert!((rate(&quiet).unwrap() - 20.0).abs() < 1e-9);
    // Three of twelve took the milliseconds of another program's turn.
    let mut stages = quiet.clone();
    stages.extend([stage(2e6, 4e-3), stage(2e6, 3e-3), stage(1e6, 6e-3)]);
    assert_eq!(rate(&stages), rate(&quiet));
    // All slower by a third is a rate.
    let slow: Vec<StageTime> = quiet
        .iter()
        .map(|s| stage(s.bytes, s.seconds * 1.5))
        .collect();
    assert!((rate(&slow).unwrap() - 20.0 / 1.5).abs() < 1e-9);
    assert_eq!(rate(&quiet[..2]), None);
    assert_eq!(rate(&[]), None);
}

#[test]
fn large_and_small_stages_count_by_their_bytes() {
    let mixed = [stage(4e6, 2e-4), stage(1e6, 1e-4), stage(1e6, 1e-4)];
    assert!((rate(&mixed).unwrap() - 6e6 / 4e-4 / 1e9).abs() < 1e-9);
}

/// Loads the bundled model, with everything in memory or within a budget.
fn engine(budget: Option<u64>) -> Engine {
    let path = Path::new("../profiles/demo/demo.gguf");
    let gguf = Gguf::open(path).unwrap();
    let spec = describe(&gguf).unwrap();
    let shape = shape_of(&gguf, &spec);
    let plan = match budget {
        None => all_in_memory(&shape, 64, KvType::F16),
        Some(bytes) => {
            let room = CacheRoom::of_one(64);
            within(&gguf, &spec, &shape, room, KvType::F16, bytes)
                .unwrap()
                .plan
        }
    };
    let options = LoadOptions {
        threads: Some(2),
        ..LoadOptions::default()
    };
    Engine::load(Arc::new(gguf), &plan, &options, &mut |_, _| ()).unwrap()
}

#[test]
fn a_burst_measures_slots_and_changes_nothing() {
    let run = |with_bursts: bool| {
        let mut engine = engine(Some(42 << 20));
        let mut bursts = Bursts::default();
        let mut logits = engine
            .forward(&[1, 5, 9], LogitsMode::Last)
            .unwrap()
            .to_vec();
        let mut rate = None;
        for token in 20..40u32 {
            if with_bursts {
                engine.burst(Duration::from_micros(300), &mut bursts);
                rate = bursts.gbps()[TierIdx::FIRST];
            }
            logits = engine.forward(&[token], LogitsMode::Last).unwrap().to_vec();
        }
        let counters = engine.counters();
        let hits: Vec<[u64; 3]> = counters
            .layers
            .iter()
            .map(|l| [l.pinned_hits, l.slot_hits, l.misses])
            .collect();
        let bits: Vec<u32> = logits.iter().map(|x| x.to_bits()).collect();
        (
            bits,
            hits,
            counters.decode_tokens,
            engine.slot_contents(),
            rate,
        )
    };
    let (without, with) = (run(false), run(true));
    assert_eq!(with.0, without.0, "bits");
    assert_eq!(with.1, without.1, "hits and misses");
    assert_eq!(with.2, 20);
    assert_eq!(with.3, without.3, "slots");
    assert_eq!(without.4, None);
    let rate = with.4.expect("twenty bursts of several stages give a rate");
    assert!(rate.is_finite() && rate > 0.0);
}

#[test]
fn reads_of_decoded_tokens_are_timed() {
    let mut engine = engine(Some(42 << 20));
    engine.forward(&[1, 5, 9], LogitsMode::Last).unwrap();
    assert_eq!(engine.counters().drive.bytes, 0, "prompts do not count");
    for token in 20..60u32 {
        engine.forward(&[token], LogitsMode::Last).unwrap();
    }
    let counters = engine.counters();
    let missed: u64 = counters.layers.iter().map(|l| l.missed_bytes).sum();
    assert!(missed > 0, "the budget is too small for all experts");
    assert!(counters.drive.bytes > 0 && counters.drive.bursts > 0);
    assert!(counters.drive.busy > Duration::ZERO);
    engine.reset_counters();
    assert_eq!(engine.counters().drive.bytes, 0);
}

#[test]
fn a_model_in_a_mapped_file_that_may_have_to_be_read_is_not_measured() {
    let mut engine = engine(None);
    engine.forward(&[1, 5, 9], LogitsMode::Last).unwrap();
    let mut bursts = Bursts::default();
    for _ in 0..4 {
        engine.burst(Duration::from_micros(200), &mut bursts);
    }
    assert!(bursts.experts.iter().all(Vec::is_empty));
    assert_eq!(bursts.gbps().len(), engine.plan().tiers.len());
}

#[test]
fn a_canceled_engine_measures_nothing() {
    let engine = engine(Some(42 << 20));
    engine.cancel.request();
    let mut bursts = Bursts::default();
    engine.burst(Duration::from_millis(1), &mut bursts);
    assert!(bursts.gbps().iter().all(Option::is_none));
}
