//! Compressed attention on an emulated GPU: other windows and choices than those of the fixture, in
//! batches of any size, and texts that go back to the middle of a block.

use super::gpu_tests::{ALL, Experts, load, plan};
use super::rewritten_gqa_tests::fixture;
use super::rewritten_tests;
use crate::engine::{Engine, LogitsMode, Rows};
use crate::plans::in_memory::all_in_memory;
use std::sync::Arc;
use tier_plan_formats::gguf::{Gguf, Value};
use tier_plan_formats::model::describe;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::{ModelShape, shape_of};
use tier_plan_testing::nmse;

const CONTEXT: u32 = 160;

/// Largest error of logits from the processor's.
const SMALL_ERROR: f64 = 1e-9;

/// Blocks of 128 end within it.
fn tokens() -> Vec<u32> {
    (0..150).map(|i| i * i * 7 % 90 + 1).collect()
}

/// Returns the fixture with another window, and with another number of blocks that tokens choose.
fn with(window: u32, top_k: u32) -> (tempfile::NamedTempFile, Arc<Gguf>, ModelShape) {
    let mut writer = fixture("deepseek4");
    for (key, value) in [("sliding_window", window), ("indexer.top_k", top_k)] {
        writer.set(&format!("deepseek4.attention.{key}"), Value::U32(value));
    }
    let (file, gguf) = rewritten_tests::open(&writer);
    let shape = shape_of(&gguf, &describe(&gguf).unwrap());
    (file, gguf, shape)
}

/// An engine on a GPU for some texts, with some checkpoints.
fn on_gpu(
    gguf: &Arc<Gguf>,
    shape: &ModelShape,
    (texts, checkpoints): (u32, u32),
    batch: usize,
) -> Engine {
    let mut plan = plan(shape, (CONTEXT, KvType::F32), ALL, true, Experts::Gpu);
    (plan.sequences, plan.checkpoints) = (texts, checkpoints);
    plan.fill_sums(shape);
    for tier in &mut plan.tiers {
        tier.budget_bytes = tier.used_bytes();
    }
    load(gguf, &plan, batch)
}

/// Returns the logits of all tokens on the processor.
fn expected(gguf: &Arc<Gguf>, shape: &ModelShape) -> Vec<f32> {
    let mut engine = load(gguf, &all_in_memory(shape, CONTEXT, KvType::F32), 64);
    let logits = engine.forward(&tokens(), LogitsMode::All);
    logits.unwrap().to_vec()
}

#[test]
fn any_window_and_choice_gives_nearly_the_logits_of_the_processor() {
    let mut seen: Vec<Vec<f32>> = Vec::new();
    for (window, top_k, batch) in [
        (1, 1, 6),
        (5, 2, 1),
        (7, 30, 64),
        (33, 3, 20),
        (300, 1000, 16),
    ] {
        let (_file, gguf, shape) = with(window, top_k);
        let expected = expected(&gguf, &shape);
        let mut engine = on_gpu(&gguf, &shape, (1, 0), batch);
        let mut all = Vec::new();
        for part in tokens().chunks(batch) {
            all.extend_from_slice(engine.forward(part, LogitsMode::All).unwrap());
        }
        let error = nmse(&all, &expected);
        assert!(
            error < SMALL_ERROR,
            "{window}, {top_k}, batches of {batch}: {error:e}"
        );
        assert!(!seen.contains(&expected), "{window}, {top_k}");
        seen.push(expected);
    }
}

#[test]
fn a_text_on_a_gpu_goes_back_into_the_middle_of_a_block() {
    let (_file, gguf, shape) = with(5, 2);
    let (expected, text) = (expected(&gguf, &shape), tokens());
    let n_vocab = expected.len() / text.len();
    let mut engine = on_gpu(&gguf, &shape, (1, 5), 16);
    engine.forward(&text[..146], LogitsMode::Last).unwrap();
    for wanted in [145, 133, 39] {
        let left = engine.rewind(wanted);
        assert!(left <= wanted);
        // Another ending, which must leave nothing behind.
        engine.forward(&[7, 5, 3, 2], LogitsMode::Last).unwrap();
        let left = engine.rewind(left);
        let found = engine.forward(&text[left..], LogitsMode::All).unwrap();
        let error = nmse(found, &expected[left * n_vocab..]);
        assert!(error < SMALL_ERROR, "back to {left}: {error:e}");
    }
}

/// More texts than rows of a matvec in other places, so that recorded steps have many rows.
#[test]
fn many_texts_are_decoded_together() {
    let (_file, gguf, shape) = with(3, 1);
    let (expected, text) = (expected(&gguf, &shape), tokens());
    let n_vocab = expected.len() / text.len();
    let mut engine = on_gpu(&gguf, &shape, (10, 0), 16);
    let texts: Vec<_> = (0..10).map(|_| engine.add_sequence().unwrap()).collect();
    for (at, expected) in expected.chunks(n_vocab).take(14).enumerate() {
        let step = texts.iter().map(|sequence| Rows {
            sequence: *sequence,
            tokens: &text[at..at + 1],
            logits: Some(LogitsMode::Last),
        });
        let step: Vec<Rows<'_>> = step.collect();
        for found in engine.step(&step).unwrap().chunks(n_vocab) {
            let error = nmse(found, expected);
            assert!(error < SMALL_ERROR, "token {at}: {error:e}");
        }
    }
}
