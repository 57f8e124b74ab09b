use super::*;
use crate::cost::batch::step_s;
use crate::profile::prefetch::Prefetch;
use crate::solve::options::Objective;
use crate::solve::{Options, Problem, solve_with_evidence};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use tier_plan_runtime::engine::{Rows, SequenceId};
use tier_plan_runtime::formats::machine::{self, Machine};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::Model;
use tier_plan_runtime::model::kv::CacheRoom;
use tier_plan_runtime::plans::in_memory::in_memory_with;
use tier_plan_runtime::{Engine, KvType, LoadOptions, LogitsMode};

/// Tokens of a text's prompt, and tokens decoded after it.
const PROMPT: u32 = 4;
const DECODED: u32 = 32;

/// Texts that there is room for.
const TEXTS: u32 = 8;

fn room() -> CacheRoom {
    CacheRoom {
        sequences: TEXTS,
        ..CacheRoom::of_one(PROMPT + DECODED)
    }
}

/// Three emulated tiers that are so slow that real work hides behind their declared times.
fn slow_machine() -> Machine {
    let tier = |name: &str, kind: &str, capacity: &str, rest: &str| {
        format!(
            "[[tier]]\nname = \"{name}\"\nkind = \"{kind}\"\ncapacity = \"{capacity}\"\n{rest}\nemulated = true\n\
             source = \"test\"\n"
        )
    };
    let text = format!(
        "format = \"tier-plan machine\"\nversion = 1\nname = \"m\"\nlayer_overhead_us = 300\ntoken_overhead_us = 900\n{}{}{}",
        tier("vram", "vram", "3MiB", "read_gbps = 0.8\nlatency_us = 50"),
        tier("dram", "dram", "6MiB", "read_gbps = 0.2\nlatency_us = 0"),
        tier(
            "slow",
            "nvme",
            "64MiB",
            "read_gbps = 0.05\nlatency_us = 400"
        ),
    );
    machine::decode(text.as_bytes(), Path::new("m.toml")).unwrap()
}

fn demo() -> Model {
    Model::open("../profiles/demo/demo.gguf".as_ref()).unwrap()
}

fn load(gguf: &Arc<Gguf>, plan: &Placement) -> Engine {
    Engine::load(gguf.clone(), plan, &LoadOptions::default(), &mut |_, _| ()).unwrap()
}

/// Tokens of texts, decoded together.
struct Decoded {
    /// `[layer, text, token, used]` experts.
    experts: Vec<Vec<Vec<u16>>>,
    /// Mean seconds of a step.
    step_s: f64,
    /// Mean seconds of a step that the emulated tiers declared.
    declared_s: f64,
}

/// Decodes some texts together.
fn decode(engine: &mut Engine, n_texts: u32) -> Decoded {
    let spec = engine.spec();
    let (n_vocab, moe) = (spec.n_vocab, spec.moe_layers().map(|(_, moe)| moe.n_used));
    let used: Vec<usize> = moe.collect();
    let ids: Vec<SequenceId> = (0..n_texts)
        .map(|_| engine.add_sequence().unwrap())
        .collect();
    let mut experts = vec![vec![Vec::new(); ids.len()]; used.len()];
    let prompt = |text: u32| (0..PROMPT).map(move |i| (text * 131 + i * 17) % n_vocab as u32);
    let mut next: Vec<Vec<u32>> = (0..n_texts).map(|text| prompt(text).collect()).collect();
    let mut seconds = 0.0;
    for step in 0..=DECODED {
        let rows: Vec<Rows<'_>> = ids
            .iter()
            .zip(&next)
            .map(|(&sequence, tokens)| Rows {
                sequence,
                tokens,
                logits: Some(LogitsMode::Last),
            })
            .collect();
        let started = Instant::now();
        let logits = engine.step(&rows).unwrap();
        let took = started.elapsed().as_secs_f64();
        let best = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
        next = logits
            .chunks(n_vocab)
            .map(|row| vec![best(row).unwrap_or(0) as u32])
            .collect();
        if step == 0 {
            engine.reset_counters();
            continue;
        }
        seconds += took;
        let mut chosen = engine.routing().experts.as_slice();
        let texts = 0..ids.len();
        for (text, (layer, &used)) in
            texts.flat_map(|text| used.iter().enumerate().map(move |l| (text, l)))
        {
            let (own, rest) = chosen.split_at(used);
            experts[layer][text].extend_from_slice(own);
            chosen = rest;
        }
    }
    ids.into_iter().for_each(|id| engine.remove_sequence(id));
    Decoded {
        experts,
        step_s: seconds / f64::from(DECODED),
        declared_s: engine.counters().declared.as_secs_f64() / f64::from(DECODED),
    }
}

/// Returns the evidence of the first texts' experts.
fn evidence(shape: &ModelShape, decoded: &Decoded, n_texts: usize) -> Evidence {
    let mut evidence = Evidence::uniform(shape).unwrap();
    for (layer, experts) in evidence.layers.iter_mut().zip(&decoded.experts) {
        let (n_expert, used) = (layer.shape.n_expert as usize, layer.shape.n_used as usize);
        let trace = LayerTrace::made_up(n_expert, used, &[], experts[..n_texts].concat());
        layer.share = trace.decode_share();
        layer.order = (0..layer.shape.n_expert).collect();
        let share = layer.share.clone();
        layer
            .order
            .sort_by(|&a, &b| share[b as usize].total_cmp(&share[a as usize]));
        layer.judged = Judged::Recorded(trace);
        (layer.prefetch, layer.class) = (Prefetch::default(), None);
    }
    evidence
}

fn plan(shape: &ModelShape, evidence: &Evidence, machine: &Machine) -> Placement {
    let problem = Problem {
        shape,
        profile: None,
        machine,
        budgets: machine.tiers.iter().map(|t| t.capacity_bytes).collect(),
        context: room().context,
        sequences: TEXTS,
        kv_type: KvType::F16,
        position: None,
    };
    let options = Options {
        objective: Objective::Throughput,
        batch: Some(TEXTS),
        time_limit_s: 2.0,
        ..Options::default()
    };
    solve_with_evidence(&problem, evidence, &options)
        .unwrap()
        .plan
}

/// Steps of several texts on emulated tiers take what was predicted.
#[test]
fn emulated_steps_take_the_predicted_time() {
    let model = demo();
    let (gguf, shape) = (model.gguf(), model.shape());
    let free = in_memory_with(shape, room(), KvType::F16);
    let all = decode(&mut load(gguf, &free), TEXTS);
    let plan = plan(shape, &evidence(shape, &all, 8), &slow_machine());
    assert!(
        plan.layers.iter().any(|l| l.slots > 0) || plan.layers.iter().any(|l| !l.pinned.is_empty())
    );
    let mut engine = load(gguf, &plan);
    for texts in [8, 2] {
        // Once to fill the slots.
        decode(&mut engine, texts);
        let measured = decode(&mut engine, texts);
        for (layer, before) in measured.experts.iter().zip(&all.experts) {
            assert_eq!(
                layer[..],
                before[..texts as usize],
                "tokens depend on company"
            );
        }
        let evidence = evidence(shape, &all, texts as usize);
        let predictor = Predictor {
            plan: &plan,
            shape,
            evidence: &evidence,
            at: PROMPT + DECODED / 2,
        };
        let predicted = predictor.step(texts).unwrap();
        // A busy machine adds to what is declared, never to what was predicted of it.
        assert!(measured.step_s >= measured.declared_s, "paced too little");
        let differs = measured.declared_s / predicted.seconds - 1.0;
        assert!(
            differs.abs() < 0.02,
            "{texts} texts: {differs:+.4}, {predicted:?}"
        );
    }
}

#[test]
fn a_replay_of_even_use_is_what_is_expected() {
    let model = demo();
    let shape = model.shape();
    let evidence = Evidence::uniform(shape).unwrap();
    let plan = plan(shape, &evidence, &slow_machine());
    let predictor = Predictor {
        plan: &plan,
        shape,
        evidence: &evidence,
        at: plan.predicted.at,
    };
    for texts in [4, 8, 64] {
        let (replayed, expected) = (
            predictor.step(texts).unwrap(),
            step_s(&plan, shape, &evidence, texts),
        );
        let differs = replayed.seconds / expected - 1.0;
        assert!(differs.abs() < 0.05, "{texts}: {differs:+.3}");
        let e = shape.experts[0];
        let share = f64::from(e.n_used) / f64::from(e.n_expert);
        let distinct = f64::from(e.n_expert) * Use::of(share, f64::from(texts)).experts;
        assert!(
            (replayed.distinct_experts / distinct - 1.0).abs() < 0.03,
            "{replayed:?}"
        );
    }
    // So many that nothing is replayed.
    let many = predictor.step(5000).unwrap();
    let expected = step_s(&plan, shape, &evidence, 5000);
    assert!((many.seconds / expected - 1.0).abs() < 1e-9);
    assert_eq!(predictor.step(0), None);
}

#[test]
fn the_most_tokens_within_a_gap_are_found() {
    let model = demo();
    let shape = model.shape();
    let evidence = Evidence::uniform(shape).unwrap();
    let plan = plan(shape, &evidence, &slow_machine());
    let predictor = Predictor {
        plan: &plan,
        shape,
        evidence: &evidence,
        at: plan.predicted.at,
    };
    let best = |most, gap| predictor.best_parallel(most, gap).unwrap();
    // More texts share more reads, as far as the plan has room.
    assert_eq!(best(1000, f64::INFINITY).texts, 8);
    assert_eq!(best(5, f64::INFINITY).texts, 5);
    // Within the gap of five texts.
    let five = predictor.step(5).unwrap();
    let within = best(1000, five.seconds * 1.000_001);
    assert!(within.texts >= 5 && within.texts < 8 && within.seconds <= five.seconds * 1.01);
    // One text, if none is fast enough.
    assert_eq!(best(1000, 0.0).texts, 1);
    let mut unknown = plan.clone();
    unknown.predicted = Default::default();
    let predictor = Predictor {
        plan: &unknown,
        ..predictor
    };
    assert_eq!(predictor.best_parallel(8, 1.0), None);
}

#[test]
fn the_longest_step_and_the_first_estimate_follow_the_prediction() {
    let model = demo();
    let shape = model.shape();
    let evidence = Evidence::uniform(shape).unwrap();
    let plan = plan(shape, &evidence, &slow_machine());
    let predictor = Predictor {
        plan: &plan,
        shape,
        evidence: &evidence,
        at: plan.predicted.at,
    };
    let step = |texts| predictor.step(texts).unwrap().seconds;
    for texts in [1, 4, 8] {
        let longest = predictor.max_step(texts).unwrap();
        let expected = (2.0 * step(texts)).max(step(texts + 16)).max(0.05);
        assert!((longest.as_secs_f64() - expected).abs() < 1e-6);
        let cost = predictor.step_cost(texts).unwrap();
        let close = |rows, seconds: f64| {
            let found = cost.predict(rows, 0).as_secs_f64();
            assert!(
                (found / seconds - 1.0).abs() < 0.01,
                "{rows}: {found} {seconds}"
            );
        };
        close(1, step(1));
        close(texts.max(2) as usize, step(texts.max(2)));
        // The least chunk is within the longest step, and a whole batch of a prompt takes longer.
        let rows = cost.prompt_rows_within(texts as usize, longest);
        assert!((MIN_CHUNK..BATCH as usize).contains(&rows), "{rows}");
    }
    let mut unknown = plan.clone();
    unknown.predicted = Default::default();
    let predictor = Predictor {
        plan: &unknown,
        ..predictor
    };
    assert_eq!(predictor.max_step(4), None);
    assert!(predictor.step_cost(4).is_none());
}

#[test]
fn drafts_break_even_where_their_step_costs_what_they_bring() {
    assert_eq!(break_even(2, 1.0), 0.0);
    assert!((break_even(2, 1.3) - 0.3).abs() < 1e-9);
    // 1 + 1/2 + 1/4 + 1/8
    assert!((break_even(4, 1.875) - 0.5).abs() < 1e-9);
    assert!((break_even(8, 8.0) - 1.0).abs() < 1e-9);
    assert_eq!(break_even(2, 2.1), f64::INFINITY);
    let model = demo();
    let shape = model.shape();
    let evidence = Evidence::uniform(shape).unwrap();
    let plan = plan(shape, &evidence, &slow_machine());
    let predictor = Predictor {
        plan: &plan,
        shape,
        evidence: &evidence,
        at: plan.predicted.at,
    };
    // Tokens that have nothing in common are texts of their own.
    let (row, apart) = (predictor.draft_step(4).unwrap(), predictor.step(4).unwrap());
    assert!((row.seconds / apart.seconds - 1.0).abs() < 0.05);
    assert_eq!(predictor.draft_step(1), predictor.step(1));
    for rows in [2, 4, 8] {
        let a = predictor.break_even_acceptance(rows).unwrap();
        let brought = (1..rows).fold(1.0, |sum, _| 1.0 + a * sum);
        let cost = predictor.draft_step(rows).unwrap().seconds / predictor.step(1).unwrap().seconds;
        assert!((brought / cost - 1.0).abs() < 1e-6, "{rows}: {a}");
    }
}

#[test]
fn tokens_in_a_row_share_the_experts_that_they_share_in_the_record() {
    let model = demo();
    let shape = model.shape();
    let experts = shape.experts[0];
    let (n_used, n_expert) = (experts.n_used as usize, experts.n_expert as usize);
    // Four tokens in a row choose the same experts, and no others do at the same time.
    let token = |t: usize| {
        let first = (t / 4 + t / 128) * n_used;
        (0..n_used).map(move |i| ((first + i) % n_expert) as u16)
    };
    let trace: Vec<u16> = (0..512).flat_map(token).collect();
    let decoded = Decoded {
        experts: vec![vec![trace]; shape.experts.len()],
        step_s: 0.0,
        declared_s: 0.0,
    };
    let evidence = evidence(shape, &decoded, 1);
    let plan = plan(shape, &evidence, &slow_machine());
    let predictor = Predictor {
        plan: &plan,
        shape,
        evidence: &evidence,
        at: plan.predicted.at,
    };
    let distinct = |step: StepPrediction| step.distinct_experts / n_used as f64;
    assert!((distinct(predictor.draft_step(4).unwrap()) - 1.0).abs() < 1e-9);
    assert!(distinct(predictor.step(4).unwrap()) > 1.5);
}

#[test]
fn counts_reach_the_most() {
    let counts: Vec<u32> = counts_up_to(9).collect();
    assert_eq!(counts, [1, 2, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(counts_up_to(1).collect::<Vec<_>>(), [1]);
    let many: Vec<u32> = counts_up_to(u32::MAX).collect();
    assert!(many.len() < 150 && many.last() == Some(&u32::MAX));
}
