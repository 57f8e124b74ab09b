//! Completions in llama.cpp's own form.

use super::streams::{streamed, with_template};
use super::*;

fn body(more: &Value) -> Value {
    let mut body = json!({"prompt": PROMPT, "n_predict": 12, "temperature": 0});
    let fields = more.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(fields);
    body
}

#[test]
fn an_answer_is_the_text_of_a_single_run_whole_and_as_a_stream() {
    let server = Served::start(&["--parallel", "2"]);
    let whole = server.post("/completion", &body(&json!({}))).ok();
    assert_eq!(whole["content"], alone(PROMPT, 12));
    assert_eq!(whole["prompt"], PROMPT);
    assert_eq!(
        (&whole["stop"], &whole["stop_type"], &whole["truncated"]),
        (&json!(true), &json!("limit"), &json!(false))
    );
    assert_eq!(
        (&whole["tokens_predicted"], &whole["tokens"]),
        (&json!(12), &json!([]))
    );
    assert_eq!(whole["generation_settings"]["n_predict"], 12);
    assert_eq!(whole["timings"]["predicted_n"], 12);
    // The other path of it, and a prompt of tokens.
    let tokens = server.post("/tokenize", &json!({"content": PROMPT})).ok()["tokens"].clone();
    let of_tokens = server
        .post("/completions", &body(&json!({"prompt": tokens})))
        .ok();
    assert!(of_tokens["content"].is_string());

    let asked = body(&json!({"return_tokens": true, "n_probs": 2}));
    let with_tokens = server.post("/completion", &asked).ok();
    assert_eq!(with_tokens["content"], whole["content"]);
    let ids = with_tokens["tokens"].as_array().unwrap();
    assert_eq!(ids.len(), 12);
    let probabilities = with_tokens["completion_probabilities"].as_array().unwrap();
    let named: Vec<&Value> = probabilities.iter().map(|token| &token["id"]).collect();
    assert_eq!(named, ids.iter().collect::<Vec<_>>());
    assert!(
        probabilities
            .iter()
            .all(|token| token["top_logprobs"].as_array().unwrap().len() == 2)
    );

    let stream = server.post("/completion", &streamed(&body(&json!({}))));
    let events: Vec<Value> = stream
        .events()
        .into_iter()
        .map(|(_, event)| event)
        .collect();
    let (last, chunks) = events.split_last().unwrap();
    assert!(chunks.iter().all(|chunk| chunk["stop"] == false));
    let text: String = chunks
        .iter()
        .map(|chunk| chunk["content"].as_str().unwrap())
        .collect();
    assert_eq!(whole["content"], text);
    let sent: Vec<&Value> = chunks
        .iter()
        .flat_map(|c| c["tokens"].as_array().unwrap())
        .collect();
    assert_eq!(sent, ids.iter().collect::<Vec<_>>());
    assert_eq!(
        (&last["stop"], &last["content"]),
        (&json!(true), &json!(""))
    );
    assert_eq!(last["has_new_line"], whole["has_new_line"]);
}

#[test]
fn an_answer_says_why_it_ends_and_has_the_fields_that_are_wanted() {
    let server = Served::start(&["--parallel", "1", "--context", "128"]);
    let text = alone(PROMPT, 12);
    let word: String = text.as_str().unwrap().chars().skip(8).take(3).collect();
    let stopped = server
        .post("/completion", &body(&json!({"stop": [word]})))
        .ok();
    assert_eq!(
        (&stopped["stop_type"], &stopped["stopping_word"]),
        (&json!("word"), &json!(word))
    );
    let names = json!([
        "content",
        "stop_type",
        "generation_settings/n_predict",
        "no/such"
    ]);
    let cut = server
        .post("/completion", &body(&json!({"response_fields": names})))
        .ok();
    let expected =
        json!({"content": text, "stop_type": "limit", "generation_settings/n_predict": 12});
    assert_eq!(cut, expected);
    // As many as fit.
    let endless = body(&json!({"n_predict": -1, "ignore_eos": true}));
    let full = server.post("/completion", &endless).ok();
    assert_eq!(
        (&full["stop_type"], &full["truncated"]),
        (&json!("limit"), &json!(true))
    );
    let n = |name: &str| full[name].as_u64().unwrap();
    assert_eq!(n("tokens_evaluated") + n("tokens_predicted"), 129);
}

#[test]
fn what_llama_cpp_has_beside_it_is_there_or_refused_by_name() {
    let template = "{% for m in messages %}{{ m.content }}\n{% endfor %}";
    let (_folder, server) = with_template(template, &[]);
    let chat = json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 2});
    assert_eq!(
        server.post("/chat/completions", &chat).ok()["object"],
        "chat.completion"
    );
    assert_eq!(server.get("/models").ok()["object"], "list");
    for path in ["/infill", "/embedding", "/rerank"] {
        let refused = server.post(path, &json!({}));
        assert_eq!(refused.status, 501, "{path}");
        assert_eq!(
            refused.json()["error"]["type"],
            "not_supported_error",
            "{path}"
        );
    }
    for (more, words) in [
        (json!({"grammar": "root = a"}), "grammar: "),
        (json!({"samplers": ["top_k"]}), "samplers: "),
        (json!({"prompt": ["a", "b"]}), "prompt: 2 prompts"),
        (json!({"n": 2}), "n: 2"),
    ] {
        let refused = server.post("/completion", &body(&more));
        let message = refused.json()["error"]["message"]
            .as_str()
            .unwrap()
            .to_string();
        assert!(
            refused.status == 400 && message.starts_with(words),
            "{message}"
        );
    }
}
