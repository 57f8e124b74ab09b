//! `tier-plan batch`: what texts of one step do for each other, and that none takes another with it.

use crate::batch::{alone, answers, batch, choice, completion, place};
use crate::common::{demo_model, json, run_in};
use serde_json::json;
use std::fs;
use std::io::Write;
use std::path::Path;
use tier_plan_runtime::gguf::{Draft, DraftTensor, Gguf};

/// Requests that come together and begin alike compute the common pages once.
#[test]
fn what_requests_of_one_step_share_is_computed_once() {
    let system =
        "And the earth was without form, and void; and darkness was upon the face. ".repeat(12);
    let prompt = |i: usize| format!("{system}{i}. And God said");
    let request = |i: usize, n: usize| {
        let body = json!({"prompt": prompt(i), "max_tokens": 8, "temperature": 0, "n": n});
        completion(&i.to_string(), body)
    };
    let folder = place(&[request(0, 1), request(1, 1), request(2, 3), request(3, 1)]);
    let summary = batch(folder.path(), &["--parallel", "8"]);
    let count = |key: &str| summary[key].as_u64().unwrap();
    let each = count("prompt_tokens") / 6;
    // The system prompt without its last, partial page; the choices of a request share more.
    let least = 5 * (each.saturating_sub(8) / 64 * 64 - 64);
    assert!(
        each > 3 * 64 && count("shared_tokens") >= least,
        "{summary}"
    );
    assert_eq!(count("preempted"), 0);
    let answers = answers(folder.path());
    for i in 0..4 {
        let expected = alone(folder.path(), &prompt(i), &["-n", "8"]);
        for choice in answers[&i.to_string()]["response"]["body"]["choices"]
            .as_array()
            .unwrap()
        {
            assert_eq!(choice["text"], expected, "{i}");
        }
    }
}

/// The bundled model with an embedding of `token` that is not a number. Its output matrix, which is
/// its embedding, is a tensor of its own here.
fn damaged_model(folder: &Path, token: usize) -> String {
    let path = folder.join("damaged.gguf");
    let gguf = Gguf::open(&demo_model()).unwrap();
    let keys = gguf.metadata().iter().cloned();
    let mut draft = keys.fold(Draft::default(), |draft, (key, value)| {
        draft.key(key, value)
    });
    let embedding = gguf.tensor("token_embd.weight").unwrap();
    for tensor in gguf.tensors() {
        draft.tensor(&tensor.name, tensor.ty, &tensor.dims).unwrap();
    }
    draft
        .tensor("output.weight", embedding.ty, &embedding.dims)
        .unwrap();
    let mut file = fs::File::create(&path).unwrap();
    let mut fill = |tensor: &DraftTensor, out: &mut dyn Write| {
        let found = gguf.tensor(&tensor.name).unwrap_or(embedding);
        let mut bytes = gguf.bytes(found).to_vec();
        if tensor.name == embedding.name {
            let row = bytes.len() / embedding.dims[1] as usize;
            // A scale with all bits set is no number.
            bytes[token * row..][..row].fill(0xff);
        }
        out.write_all(&bytes)
    };
    draft.write(&mut file, &mut fill).unwrap();
    path.to_str().unwrap().to_string()
}

#[test]
fn a_text_that_can_not_go_on_is_refused_and_the_others_answered() {
    let text = |id: &str, tokens: &[u32], n: usize| {
        let body = json!({"prompt": tokens, "max_tokens": 6, "temperature": 0, "n": n});
        completion(id, body)
    };
    let good: Vec<u32> = (300..420).collect();
    let folder = place(&[
        text("first", &good[..70], 1),
        text("bad", &[&good[..70], &[999][..]].concat(), 2),
        text("last", &good, 1),
    ]);
    let alone = place(&[text("first", &good[..70], 1), text("last", &good, 1)]);
    let model = damaged_model(folder.path(), 999);
    let run = |folder: &Path| {
        let list = ["batch", &model, "in.jsonl", "-o", "out.jsonl", "--json"];
        json(run_in(folder, &list))
    };
    let summary = run(folder.path());
    assert_eq!(
        (&summary["answered"], &summary["refused"]),
        (&json!(2), &json!(1))
    );
    let found = answers(folder.path());
    let error = &found["bad"]["error"];
    assert_eq!(
        (&error["code"], &found["bad"]["line"]),
        (&json!("server_error"), &json!(2))
    );
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("position 70 are not numbers"), "{message}");
    run(alone.path());
    let expected = answers(alone.path());
    for name in ["first", "last"] {
        assert_eq!(choice(&found[name]), choice(&expected[name]));
    }
    // What is answered and refused is not done again.
    let again = run(folder.path());
    assert_eq!(again["answered_before"], 3);
}
