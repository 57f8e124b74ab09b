//! Streams: together they are the whole answer.

use super::*;

/// A template that any model can follow.
const TEMPLATE: &str =
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:";

pub fn with_template(template: &str, more: &[&str]) -> (tempfile::TempDir, Served) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("template.jinja");
    std::fs::write(&path, template).unwrap();
    let server = Served::start(&[&["--chat-template", path.to_str().unwrap()], more].concat());
    (folder, server)
}

pub fn streamed(body: &Value) -> Value {
    let mut body = body.clone();
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    body
}

/// What a stream says of each choice, put together as a client does.
pub fn together(answer: &Answer, at: &str) -> Vec<String> {
    let events = answer.events();
    assert_eq!(events.last().unwrap().1, "[DONE]");
    let mut texts: Vec<String> = Vec::new();
    for (_, event) in &events[..events.len() - 1] {
        for choice in event["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap() as usize;
            texts.resize(texts.len().max(index + 1), String::new());
            texts[index] += choice.pointer(at).and_then(Value::as_str).unwrap_or("");
        }
    }
    texts
}

#[test]
fn streamed_completions_are_the_whole_ones() {
    let server = Served::start(&["--parallel", "2"]);
    for more in [
        json!({}),
        json!({"n": 3, "temperature": 0.8, "seed": 3}),
        json!({"stop": ["e", " the"]}),
        json!({"logprobs": 2, "logit_bias": {"5": 3}}),
        json!({"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 1, "presence_penalty": 1}),
    ] {
        let mut body = completion(PROMPT, 20);
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let whole = server.post("/v1/completions", &body).ok();
        let stream = server.post("/v1/completions", &streamed(&body));
        let texts: Vec<&str> = whole["choices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| c["text"].as_str().unwrap())
            .collect();
        assert_eq!(together(&stream, "/text"), texts, "{body}");
        let events = stream.events();
        let usage = &events[events.len() - 2].1["usage"];
        assert_eq!(
            usage["completion_tokens"], whole["usage"]["completion_tokens"],
            "{body}"
        );
        for choice in whole["choices"].as_array().unwrap() {
            let last = events.iter().rev().filter_map(|(_, e)| {
                e["choices"]
                    .as_array()?
                    .iter()
                    .find(|c| c["index"] == choice["index"])
            });
            let reason = last.into_iter().next().unwrap();
            assert_eq!(reason["finish_reason"], choice["finish_reason"], "{body}");
        }
        if body.get("logprobs").is_some() {
            let all = |name: &str| -> Vec<Value> {
                let of = |e: &Value| e["choices"][0]["logprobs"][name].as_array().cloned();
                events.iter().filter_map(|(_, e)| of(e)).flatten().collect()
            };
            for name in ["tokens", "token_logprobs", "text_offset", "top_logprobs"] {
                let whole = whole["choices"][0]["logprobs"][name].as_array().unwrap();
                assert_eq!(all(name), *whole, "{name}");
                assert!(!whole.is_empty());
            }
        }
    }
}

#[test]
fn streamed_chats_are_the_whole_ones() {
    let (_folder, server) = with_template(TEMPLATE, &[]);
    let body = json!({
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Hello"}],
        "max_completion_tokens": 16, "temperature": 0, "logprobs": true, "top_logprobs": 2,
    });
    let whole = server.post("/v1/chat/completions", &body).ok();
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    let stream = server.post("/v1/chat/completions", &streamed(&body));
    let content = together(&stream, "/delta/content");
    assert_eq!(content[0], choice["message"]["content"].as_str().unwrap());
    let events = stream.events();
    assert_eq!(events[0].1["choices"][0]["delta"]["role"], "assistant");
    let tokens: Vec<Value> = events
        .iter()
        .filter_map(|(_, e)| e["choices"][0]["logprobs"]["content"].as_array().cloned())
        .flatten()
        .collect();
    assert_eq!(tokens, *choice["logprobs"]["content"].as_array().unwrap());
    assert_eq!(tokens.len(), 16);
    // The same tokens as a text that spells the prompt.
    let rendered = server
        .post("/apply-template", &json!({"messages": body["messages"]}))
        .ok();
    let rendered = rendered["prompt"].as_str().unwrap();
    assert_eq!(rendered, "system: s\nuser: Hello\nassistant:");
    let plain = server
        .post("/v1/completions", &completion(rendered, 16))
        .ok();
    assert_eq!(plain["choices"][0]["text"], choice["message"]["content"]);
}

#[test]
fn a_thought_that_the_template_opens_is_apart() {
    let (_folder, server) = with_template(&format!("{TEMPLATE}<think>"), &[]);
    let body = json!({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "temperature": 0});
    let whole = server.post("/v1/chat/completions", &body).ok();
    let message = &whole["choices"][0]["message"];
    let thinking = message["reasoning_content"].as_str().unwrap();
    assert!(!thinking.is_empty() && message["content"] == "", "{whole}");
    let stream = server.post("/v1/chat/completions", &streamed(&body));
    assert_eq!(together(&stream, "/delta/reasoning_content"), [thinking]);
    let messages = server.post("/v1/messages", &body).ok();
    let block = &messages["content"][0];
    assert_eq!(
        (&block["type"], &block["thinking"]),
        (&json!("thinking"), &json!(thinking))
    );
}

#[test]
fn streamed_messages_are_the_whole_ones() {
    let (_folder, server) = with_template(TEMPLATE, &[]);
    let body = json!({
        "model": "any", "system": [{"type": "text", "text": "s"}], "max_tokens": 16, "temperature": 0,
        "messages": [{"role": "user", "content": [{"type": "text", "text": long()}]}],
    });
    let whole = server.post("/v1/messages", &body).ok();
    assert_eq!(
        (&whole["type"], &whole["role"]),
        (&json!("message"), &json!("assistant"))
    );
    assert_eq!(whole["stop_reason"], "max_tokens");
    let count = server.post("/v1/messages/count_tokens", &body).ok();
    assert_eq!(count["input_tokens"], whole["usage"]["input_tokens"]);
    let stream = server.post("/v1/messages", &streamed(&body));
    let events = stream.events();
    let names: Vec<&str> = events
        .iter()
        .map(|(name, _)| name.as_deref().unwrap())
        .collect();
    assert_eq!(
        &names[..3],
        ["message_start", "ping", "content_block_start"]
    );
    assert_eq!(
        &names[names.len() - 3..],
        ["content_block_stop", "message_delta", "message_stop"]
    );
    for (name, event) in &events {
        assert_eq!(event["type"], name.as_deref().unwrap());
    }
    let text: String = events
        .iter()
        .filter_map(|(_, e)| e["delta"]["text"].as_str())
        .collect();
    assert_eq!(text, whole["content"][0]["text"].as_str().unwrap());
    let usage = &events[0].1["message"]["usage"];
    assert!(
        usage["cache_read_input_tokens"].as_u64().unwrap() >= 64,
        "{usage}"
    );
    let n = |usage: &Value| {
        usage["input_tokens"].as_u64().unwrap() + usage["cache_read_input_tokens"].as_u64().unwrap()
    };
    assert_eq!(n(usage), n(&whole["usage"]));
    let mut stopped = body;
    let stop: String = text.trim_start().chars().skip(4).take(2).collect();
    stopped["stop_sequences"] = json!([stop]);
    let whole = server.post("/v1/messages", &stopped).ok();
    assert_eq!(
        (&whole["stop_reason"], &whole["stop_sequence"]),
        (&json!("stop_sequence"), &json!(stop))
    );
}

#[test]
fn a_model_without_a_template_says_so() {
    let server = Served::start(&[]);
    let body = json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1});
    for path in ["/v1/chat/completions", "/v1/messages", "/apply-template"] {
        let answer = server.post(path, &body);
        assert_eq!(answer.status, 400, "{path}");
        assert!(
            answer.text().contains("--chat-template"),
            "{}",
            answer.text()
        );
    }
}
