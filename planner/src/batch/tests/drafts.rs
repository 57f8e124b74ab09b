//! Tests of drafts in a batch: the answers stay the same.

use crate::batch::*;
use crate::session::tokenizer;
use serde_json::{Value, json};
use std::fs;
use std::sync::Arc;
use std::time::Duration;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::Model;
use tier_plan_runtime::model::kv::CacheRoom;
use tier_plan_runtime::plans::in_memory::in_memory_with;
use tier_plan_runtime::sampler::SamplerConfig;
use tier_plan_runtime::schedule::{RowsTime, StepCost};
use tier_plan_runtime::{Engine, KvType, LoadOptions};

/// Requests whose texts repeat themselves, greedy and drawn, with stop strings and without.
fn requests() -> String {
    let again = "In the beginning God created the heaven and the earth. ".repeat(6);
    let bodies = [
        json!({"prompt": again, "max_tokens": 60, "temperature": 0}),
        json!({"prompt": &again[20..], "max_tokens": 33, "temperature": 0.4, "seed": 3, "n": 2}),
        json!({"prompt": "And God said", "max_tokens": 70, "temperature": 0, "logprobs": 1}),
        json!({"prompt": again, "max_tokens": 50, "temperature": 0, "stop": "the"}),
        json!({"prompt": &again[7..], "max_tokens": 1, "temperature": 0}),
    ];
    let line = |(id, body): (usize, &Value)| {
        let id = id.to_string();
        let line = json!({"custom_id": id, "url": "/v1/completions", "body": body});
        format!("{line}\n")
    };
    bodies.iter().enumerate().map(line).collect()
}

/// An estimate by which rows are nearly free, so that every draft pays until steps are measured.
fn cheap_rows() -> StepCost {
    let point = |rows: usize, ms| RowsTime {
        rows,
        time: Duration::from_millis(ms),
    };
    StepCost::predicted(
        [point(1, 1000), point(1000, 1001)],
        [point(16, 1), point(512, 9)],
    )
}

/// Returns the choices of all answers, and what was done.
fn answers(gguf: &Arc<Gguf>, max_drafts: usize) -> (Vec<Value>, Summary) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("in.jsonl"), requests()).unwrap();
    let mut input = Input::open(&path("in.jsonl")).unwrap();
    let mut output = Output::open(&path("out.jsonl"), &input).unwrap();
    let model = Model::open(gguf.path()).unwrap();
    let room = CacheRoom {
        sequences: 4,
        ..CacheRoom::of_one(256)
    };
    let plan = in_memory_with(model.shape(), room, KvType::F16);
    let options = LoadOptions::default();
    let mut engine = Engine::load(Arc::clone(gguf), &plan, &options, &mut |_, _| {}).unwrap();
    let tokenizer = Arc::new(tokenizer(gguf).unwrap());
    let grammars = Grammars::new(Arc::clone(&tokenizer), None, "body.");
    let prompts = Prompts {
        tokenizer: &tokenizer,
        template: None,
        n_vocab: engine.spec().n_vocab,
        context: 256,
        max_tokens: None,
        path: "body.",
    };
    let options = Options {
        model: "m",
        sampling: SamplerConfig::default(),
        max_texts: 4,
        max_step: None,
        max_drafts,
        grammars: &grammars,
        cost: Some(cheap_rows()),
        on_step: &mut |_| {},
    };
    let batch = Batch::new(&mut engine, &prompts, &mut input, &mut output, options);
    let summary = batch.run().unwrap();
    let pages = engine.pages();
    assert_eq!(pages.free, pages.total, "a page is lost");
    let text = fs::read_to_string(path("out.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    let mut lines: Vec<Value> = lines.collect();
    lines.sort_by_key(|line| line["custom_id"].to_string());
    let choices = lines
        .iter()
        .map(|line| line["response"]["body"]["choices"].clone());
    (choices.collect(), summary)
}

#[test]
fn answers_are_the_same_with_drafts() {
    let gguf = Arc::new(Gguf::open(&tier_plan_testing::demo_model()).unwrap());
    let (plain, summary) = answers(&gguf, 0);
    assert_eq!((summary.answered, summary.drafted_tokens), (5, 0));
    for max_drafts in [1, 8] {
        // Measured times decide whether a text goes on with drafts, so in a single run all that are
        // made may be wrong.
        let is_enough = (0..10).any(|_| {
            let (found, with) = answers(&gguf, max_drafts);
            assert_eq!(found, plain, "{max_drafts}");
            assert_eq!(with.generated_tokens, summary.generated_tokens);
            with.accepted_tokens > 0
        });
        assert!(is_enough, "no draft of {max_drafts} was right");
    }
}
