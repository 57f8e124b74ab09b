//! Several texts in one engine with attention on a GPU, which is emulated on the processor: the
//! kernels are those of a real one.

use super::gpu_tests::{ALL, Experts, Watched, keep_kv_on_host, load, plan};
use super::sequences_tests::{CONTEXT, Company, Fixture, TEXTS, action, rows, text, text_of};
use crate::engine::{Engine, LogitsMode, Rows, SequenceId};
use crate::options::LoadOptions;
use crate::plans::in_memory::all_in_memory;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use std::collections::BTreeSet;
use std::sync::Arc;
use tier_plan_cuda::Device;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::DenseKind;
use tier_plan_formats::placement::{Placement, TierIdx};
use tier_plan_testing::{is_nightly, nmse};

/// Largest error of a token's logits from the processor's, as in the tests of single texts.
const SMALL_ERROR: f64 = 1e-5;

/// Grouped queries, windows with sinks, latents, delta nets, short convolutions, norms and factors on
/// what blocks make, Mamba-2 with experts in a smaller space, indexers whose choice is shared, windows
/// and indexers of latents, Kimi delta attention, block-sparse attention, indexers of blocks, compressed
/// attention, and n-grams beside blocks with mean keys.
const NAMES: [(&str, &str); 14] = [
    ("arch", "qwen3moe"),
    ("arch", "gpt-oss"),
    ("arch", "deepseek-v3"),
    ("arch", "qwen3next"),
    ("arch2", "lfm2moe"),
    ("arch2", "afmoe"),
    ("arch2", "nemotron_h_moe"),
    ("arch2", "glm-dsa"),
    ("arch2", "dots3note"),
    ("arch2", "kimi-linear"),
    ("arch2", "minimax-m3"),
    ("arch2", "glm5-next"),
    ("arch2", "deepseek4"),
    ("arch2", "qwen4exp"),
];

/// Inputs of tokens, and keys and values that layers share: all on a GPU, or nothing.
const TOGETHER: (&str, &str) = ("arch2", "gemma4");

fn nearly(found: &[u32], expected: &[u32]) -> bool {
    let floats = |bits: &[u32]| bits.iter().map(|x| f32::from_bits(*x)).collect::<Vec<_>>();
    nmse(&floats(found), &floats(expected)) < SMALL_ERROR
}

/// A plan for some texts: everything on the GPU; experts in the file with slots in main memory, and
/// half of the KV cache there, or slots on the GPU; or no more than every second layer's attention on the GPU.
fn plan_for(
    fixture: &Fixture,
    kv_type: KvType,
    (sequences, checkpoints): (u32, u32),
    part: usize,
) -> Placement {
    let (shape, of) = (&fixture.shape, (CONTEXT, kv_type));
    let odd = |kind: DenseKind, layer: Option<u32>| {
        kind == DenseKind::Attention && layer.is_some_and(|layer| layer % 2 == 1)
    };
    let mut plan = match part {
        0 => plan(shape, of, ALL, true, Experts::Gpu),
        1 | 2 => plan(shape, of, ALL, true, Experts::File),
        _ => plan(shape, of, odd, false, Experts::Memory),
    };
    if part == 2 {
        let layers = plan.layers.iter_mut().zip(&shape.experts);
        layers.for_each(|(layer, of)| {
            (layer.slots, layer.slot_tier) = (of.n_expert / 2, TierIdx::FIRST);
        });
    }
    (plan.sequences, plan.checkpoints) = (sequences, checkpoints);
    if part == 1 {
        keep_kv_on_host(&mut plan, shape, |layer| layer % 2 == 0);
    }
    plan.fill_sums(shape);
    for tier in &mut plan.tiers {
        tier.budget_bytes = tier.used_bytes();
    }
    plan
}

#[test]
fn texts_on_a_gpu_have_nearly_the_logits_that_they_have_alone_on_the_processor() {
    let strategy = (
        prop::collection::vec(action(), 4..24),
        0..3usize,
        0..6u32,
        prop_oneof![Just(3usize), Just(16), Just(512)],
    );
    let kv_types = [KvType::F32, KvType::F16, KvType::Q8_0];
    // At night all kinds of plans for each model, otherwise two in turn.
    let (cases, plans) = if is_nightly() { (32, 4) } else { (1, 2) };
    for (number, (folder, name)) in NAMES.into_iter().enumerate() {
        let fixture = Fixture::of(folder, name);
        let alone = kv_types.map(|kv| {
            let texts = 0..TEXTS as usize;
            texts
                .map(|t| fixture.alone(&text(t), kv))
                .collect::<Vec<_>>()
        });
        // The same cases in every run: where two experts are nearly tied, the other may be chosen.
        let mut runner = TestRunner::deterministic();
        let parts = (0..plans).map(|i| (number + 4 / plans * i) % 4);
        for part in parts.flat_map(|part| std::iter::repeat_n(part, cases)) {
            let tree = strategy.new_tree(&mut runner).unwrap();
            let (actions, kv, checkpoints, batch) = tree.current();
            let plan = plan_for(&fixture, kv_types[kv], (TEXTS, checkpoints), part);
            let engine = load(&fixture.gguf, &plan, batch);
            Company::new(&fixture, engine, &alone[kv], nearly).act_all(&actions);
        }
    }
}

/// Adds the rest of a text after what is kept of it, keeps it, and removes it. Returns how many
/// tokens were kept, and the last logits.
fn read(engine: &mut Engine, tokens: &[u32]) -> (usize, Vec<u32>) {
    let (sequence, n) = engine.begin_sequence(tokens).unwrap();
    let n_vocab = engine.spec().n_vocab;
    // Token by token, as they are decoded.
    let mut found = Vec::new();
    for token in &tokens[n..] {
        let rest = Rows {
            sequence,
            tokens: &[*token],
            logits: Some(LogitsMode::Last),
        };
        found = rows(engine.step(&[rest]).unwrap(), n_vocab).remove(0);
    }
    engine.keep_sequence(sequence);
    engine.remove_sequence(sequence);
    assert!(engine.take_kept_notes().is_empty());
    (n, found)
}

#[test]
fn what_a_gpu_has_of_a_text_is_kept_in_memory_and_in_files() {
    for (folder, name, checkpoints) in [
        ("arch", "qwen3moe", 0),
        ("arch", "deepseek-v3", 0),
        ("arch", "qwen3next", 5),
        ("arch2", "nemotron_h_moe", 5),
        ("arch2", "deepseek32", 0),
        ("arch2", "minimax-m3", 0),
        ("arch2", "glm5-next", 5),
        ("arch2", "deepseek4", 5),
        ("arch2", "qwen4exp", 5),
        (TOGETHER.0, TOGETHER.1, 0),
    ] {
        // Scores that are not scaled show where 8 bits are rounded to the other side: read anew, too, the
        // error was 2e-5 with 8 bits, 6e-10 with 16, and 6e-13 with 32.
        let kv_type = if name == TOGETHER.1 {
            KvType::F16
        } else {
            KvType::Q8_0
        };
        let fixture = Fixture::of(folder, name);
        let folder = tempfile::tempdir().unwrap();
        let open = |part: usize| {
            let plan = plan_for(&fixture, kv_type, (2, checkpoints), part);
            let mut engine = load(&fixture.gguf, &plan, 512);
            engine.keep_in(folder.path(), 1 << 30).unwrap();
            engine
        };
        let mut other = text(0)[..31].to_vec();
        other[27] += 1;
        let alone = fixture.alone(&other, kv_type);
        let mut engine = open(0);
        assert_eq!(read(&mut engine, &text(0)[..30]).0, 0, "{name}");
        let (n, found) = read(&mut engine, &other);
        assert!(n >= 24 && nearly(&found, &alone[30]), "{name}: {n}");
        // Another program has the same bits; one that has other parts on the GPU begins anew.
        assert_eq!(read(&mut open(0), &other), (24, found), "{name}");
        if name != TOGETHER.1 {
            assert_eq!(read(&mut open(3), &other).0, 0, "{name}");
        }
        // So does one that has a cache in main memory, which finds its own again.
        if !plan_for(&fixture, kv_type, (2, checkpoints), 1)
            .host_kv
            .is_empty()
        {
            let (n, found) = read(&mut open(1), &other);
            assert_eq!(n, 0, "{name}");
            assert!(nearly(&found, &alone[30]), "{name}");
            assert_eq!(read(&mut open(1), &other), (24, found), "{name}");
        }
    }
}

#[test]
fn tokens_of_several_texts_go_through_a_gpu_without_coming_back() {
    for (folder, name) in NAMES.into_iter().chain([TOGETHER]) {
        let (fixture, kv_type) = (Fixture::of(folder, name), KvType::F16);
        let plan = plan_for(&fixture, kv_type, (3, 0), 0);
        let device = Arc::new(Watched::new(usize::MAX));
        let give = |_: usize| Ok(Arc::clone(&device) as Arc<dyn Device>);
        let options = LoadOptions {
            threads: Some(2),
            ..LoadOptions::default()
        };
        let gguf = Arc::clone(&fixture.gguf);
        let loaded = Engine::load_on(gguf, &plan, &options, Some(&give), &mut |_, _| {});
        let mut engine = loaded.unwrap();
        let n_vocab = engine.spec().n_vocab;
        let texts: Vec<_> = (0..3)
            .map(|t| (engine.add_sequence().unwrap(), text(t)))
            .collect();
        let alone = [0, 1, 2].map(|t| fixture.alone(&text(t), kv_type));
        // Prompts of several lengths, all of them with something.
        for (t, (sequence, tokens)) in texts.iter().enumerate() {
            let prompt = Rows {
                sequence: *sequence,
                tokens: &tokens[..3 + 4 * t],
                logits: None,
            };
            engine.step(&[prompt]).unwrap();
        }
        engine.reset_counters();
        let mut uses = 0;
        for i in 0..6 {
            let step: Vec<Rows<'_>> = texts
                .iter()
                .enumerate()
                .map(|(t, (sequence, tokens))| Rows {
                    sequence: *sequence,
                    tokens: &tokens[3 + 4 * t + i..4 + 4 * t + i],
                    // One text wants none.
                    logits: (t != 1).then_some(LogitsMode::Last),
                })
                .collect();
            device.take();
            let found = rows(engine.step(&step).unwrap(), n_vocab);
            let [launches, reads, _, recordings] = device.take();
            assert_eq!(
                (reads, recordings),
                (2, usize::from(i == 1)),
                "{name}, step {i}"
            );
            assert_eq!(launches > 0, i < 2, "{name}, step {i}: {launches} launches");
            for (found, t) in found.iter().zip([0, 2]) {
                assert!(
                    nearly(found, &alone[t][3 + 4 * t + i]),
                    "{name}, step {i}, text {t}"
                );
            }
            let per_token = engine.routing().experts.len() / 3;
            let used = fixture.shape.experts.iter().scan(0, |first, layer| {
                let n_used = layer.n_used as usize;
                let at = *first..*first + n_used;
                *first = at.end;
                let of_tokens = engine.routing().experts.chunks_exact(per_token);
                let of_layer = of_tokens.flat_map(|token| &token[at.clone()]);
                Some(of_layer.collect::<BTreeSet<_>>().len() as u64)
            });
            uses += used.sum::<u64>();
        }
        let layers = &engine.counters().layers;
        let hits: u64 = layers.iter().map(|layer| layer.pinned_hits).sum();
        assert_eq!(hits, uses, "{name}: an expert counts once per step");
        assert_eq!(engine.counters().decode_tokens, 18);
    }
}

#[test]
fn texts_pass_through_recurrent_states_together() {
    for (folder, name) in [
        ("arch", "qwen3next"),
        ("arch2", "lfm2moe"),
        ("arch2", "nemotron_h_moe"),
        ("arch2", "kimi-linear"),
        ("arch2", "glm5-next"),
        ("arch2", "qwen4exp"),
    ] {
        let (fixture, kv_type) = (Fixture::of(folder, name), KvType::F16);
        let plan = plan_for(&fixture, kv_type, (3, 0), 0);
        // The launches of a step that decodes a token of so many texts.
        let launches = |n: usize| {
            let device = Arc::new(Watched::new(usize::MAX));
            let give = |_: usize| Ok(Arc::clone(&device) as Arc<dyn Device>);
            let (gguf, options) = (Arc::clone(&fixture.gguf), LoadOptions::default());
            let loaded = Engine::load_on(gguf, &plan, &options, Some(&give), &mut |_, _| {});
            let mut engine = loaded.unwrap();
            let texts: Vec<_> = (0..n)
                .map(|t| (engine.add_sequence().unwrap(), text(t)))
                .collect();
            let mut step = |at: std::ops::Range<usize>| {
                let rows = texts.iter().map(|(sequence, tokens)| Rows {
                    sequence: *sequence,
                    tokens: &tokens[at.clone()],
                    logits: Some(LogitsMode::Last),
                });
                device.take();
                engine.step(&rows.collect::<Vec<_>>()).unwrap();
                device.take()[0]
            };
            step(0..5);
            step(5..6)
        };
        assert_eq!(launches(1), launches(3), "{name}");
    }
}

/// Two texts decode beyond the first chunk of 256 positions; one ends, and another takes its place at
/// another position of the same chunk. With a window, it attends to a chunk more than the one before.
#[test]
fn a_recorded_step_serves_for_every_position_in_its_chunks() {
    // Three at night only.
    let names = [
        ("arch", "gpt-oss"),
        ("arch2", "deepseek4"),
        ("arch2", "qwen4exp"),
        ("arch2", "glm-dsa"),
        ("arch", "qwen3moe"),
    ];
    for (folder, name) in &names[..if is_nightly() { 5 } else { 2 }] {
        let fixture = Fixture::of(folder, name);
        let (kv_type, len) = (KvType::F32, 300);
        let mut plan = plan(&fixture.shape, (len, kv_type), ALL, true, Experts::Gpu);
        plan.sequences = 2;
        plan.fill_sums(&fixture.shape);
        plan.tiers
            .iter_mut()
            .for_each(|tier| tier.budget_bytes = tier.used_bytes());
        let mut engine = load(&fixture.gguf, &plan, 64);
        let n_vocab = engine.spec().n_vocab;
        let texts = [0, 1, 2].map(|number| text_of(number, len as usize));
        let mut plan = all_in_memory(&fixture.shape, len, kv_type);
        plan.fill_sums(&fixture.shape);
        let mut plain = load(&fixture.gguf, &plan, 64);
        let alone = texts.each_ref().map(|text| {
            plain.clear();
            rows(plain.forward(text, LogitsMode::All).unwrap(), n_vocab)
        });
        let begin = |engine: &mut Engine, which: usize, n: usize| {
            let sequence = engine.add_sequence().unwrap();
            let prompt = Rows {
                sequence,
                tokens: &texts[which][..n],
                logits: None,
            };
            engine.step(&[prompt]).unwrap();
            sequence
        };
        let decode = |engine: &mut Engine, both: [(SequenceId, usize); 2]| {
            for _ in 0..4 {
                let past = both.map(|(sequence, _)| engine.n_past_of(sequence));
                let step = [0, 1].map(|i| Rows {
                    sequence: both[i].0,
                    tokens: &texts[both[i].1][past[i]..past[i] + 1],
                    logits: Some(LogitsMode::Last),
                });
                let found = rows(engine.step(&step).unwrap(), n_vocab);
                for i in [0, 1] {
                    let (which, at) = (both[i].1, past[i]);
                    assert!(
                        nearly(&found[i], &alone[which][at]),
                        "{name} {which} at {at}"
                    );
                }
            }
        };
        let first = begin(&mut engine, 0, 290);
        let second = begin(&mut engine, 1, 280);
        decode(&mut engine, [(first, 0), (second, 1)]);
        engine.remove_sequence(second);
        let third = begin(&mut engine, 2, 258);
        decode(&mut engine, [(first, 0), (third, 2)]);
    }
}

#[test]
fn there_may_be_more_texts_than_planned_as_long_as_there_are_pages() {
    let fixture = Fixture::new("qwen3moe");
    let mut engine = load(
        &fixture.gguf,
        &plan_for(&fixture, KvType::F16, (1, 0), 0),
        512,
    );
    let n_vocab = engine.spec().n_vocab;
    let texts = [0, 1, 2].map(|number| (engine.add_sequence().unwrap(), text(number)));
    let alone = [0, 1, 2].map(|number| fixture.alone(&text(number), KvType::F16));
    for at in 0..8 {
        let step = texts.each_ref().map(|(sequence, tokens)| Rows {
            sequence: *sequence,
            tokens: &tokens[at..at + 1],
            logits: Some(LogitsMode::Last),
        });
        let found = rows(engine.step(&step).unwrap(), n_vocab);
        for (found, alone) in found.iter().zip(&alone) {
            assert!(nearly(found, &alone[at]), "token {at}");
        }
    }
}

#[test]
fn a_recorded_step_serves_for_texts_with_other_states_where_launches_are_not_told_them() {
    for (folder, name, serves) in [
        ("arch", "qwen3next", true),
        ("arch2", "nemotron_h_moe", true),
        ("arch2", "qwen4exp", true),
        ("arch2", "glm5-next", true),
        (TOGETHER.0, TOGETHER.1, true),
        ("arch2", "deepseek4", false),
    ] {
        texts_by_turns(folder, name, serves);
    }
}

fn texts_by_turns(folder: &str, name: &str, serves: bool) {
    let fixture = Fixture::of(folder, name);
    let plan = plan_for(&fixture, KvType::F16, (2, 0), 0);
    let device = Arc::new(Watched::new(usize::MAX));
    let give = |_: usize| Ok(Arc::clone(&device) as Arc<dyn Device>);
    let (gguf, options) = (Arc::clone(&fixture.gguf), LoadOptions::default());
    let loaded = Engine::load_on(gguf, &plan, &options, Some(&give), &mut |_, _| {});
    let mut engine = loaded.unwrap();
    let texts = [0, 1].map(|number| (engine.add_sequence().unwrap(), text(number)));
    let alone = [0, 1].map(|number| fixture.alone(&text(number), KvType::F16));
    let n_vocab = engine.spec().n_vocab;
    // Three tokens of one text, then three of the other.
    for at in 0..12 {
        for (which, (sequence, tokens)) in texts.iter().enumerate() {
            for token in at * 3..(at + 1) * 3 {
                let step = Rows {
                    sequence: *sequence,
                    tokens: &tokens[token..token + 1],
                    logits: Some(LogitsMode::Last),
                };
                let found = rows(engine.step(&[step]).unwrap(), n_vocab);
                assert!(
                    nearly(&found[0], &alone[which][token]),
                    "{name}, {which} {token}"
                );
            }
        }
    }
    let recordings = device.take()[3];
    // Of the first text once, or of each turn.
    assert_eq!(recordings, if serves { 1 } else { 24 }, "{name}");
}
