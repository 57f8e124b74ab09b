//! Answers are as the OpenAPI document says.

use super::streams::{streamed, with_template};
use super::*;
use tier_plan_testing::schema::{check, target};

/// A template in the manner of Hermes, and of models that mark their reasoning.
const TEMPLATE: &str = r#"{% for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>
{{ {"name": c.function.name, "arguments": c.function.arguments} | tojson }}
</tool_call>{% endfor %}

{% endfor %}assistant:"#;

/// Checks an answer by what the document says of its path, status, and type.
pub(super) fn fits(document: &Value, method: &str, path: &str, answer: &Answer) {
    let operation = &document["paths"][path][method];
    let status = answer.status.to_string();
    let mut described = &operation["responses"][&status];
    if let Some(reference) = described.get("$ref") {
        described = target(document, reference);
    }
    let text = answer.text();
    assert!(
        described.is_object(),
        "{method} {path}: {status} is not described: {text}"
    );
    for (name, header) in described["headers"].as_object().into_iter().flatten() {
        let found = answer.header(&name.to_lowercase());
        assert!(
            found.is_some() || header["required"] != true,
            "{path}: no {name}"
        );
    }
    let kind = answer
        .header("content-type")
        .unwrap()
        .split(';')
        .next()
        .unwrap();
    let content = &described["content"][kind];
    assert!(
        content.is_object(),
        "{method} {path}: {kind} is not described"
    );
    let say = |error| panic!("{method} {path}: {error}: {text}");
    match kind {
        "application/json" => {
            check(document, &content["schema"], &answer.json()).unwrap_or_else(say);
        }
        "text/event-stream" => {
            for (name, data) in answer.events() {
                let data = data
                    .as_str()
                    .map_or_else(|| data.to_string(), str::to_string);
                let mut event = json!({ "data": data });
                if let Some(name) = name {
                    event["event"] = name.into();
                }
                check(document, &content["schema"], &event).unwrap_or_else(say);
            }
        }
        _ => check(document, &content["schema"], &text.as_str().into()).unwrap_or_else(say),
    }
}

fn chat(more: &Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0});
    let fields = more.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(fields);
    body
}

fn tools() -> Value {
    let parameters =
        json!({"type": "object", "properties": {"day": {"enum": ["Monday"]}}, "required": ["day"]});
    let function = json!({"name": "f", "description": "d", "parameters": parameters});
    json!([{"type": "function", "function": function}])
}

/// Requests with answers of every kind.
fn requests() -> Vec<(&'static str, Value)> {
    let input = json!({"input": "Hello", "max_output_tokens": 8, "temperature": 0});
    let mut call = input.clone();
    call["tools"] = json!([{"type": "function", "name": "f", "parameters": tools()[0]["function"]["parameters"]}]);
    call["tool_choice"] = "required".into();
    call["max_output_tokens"] = 100.into();
    let mut to_call = chat(&json!({"max_tokens": 100}));
    to_call["tools"] = json!([{"name": "f", "input_schema": tools()[0]["function"]["parameters"]}]);
    to_call["tool_choice"] = json!({"type": "any"});
    vec![
        // Refused: nothing is recorded.
        ("/plan", json!({"apply": true})),
        (
            "/v1/chat/completions",
            chat(&json!({"logprobs": true, "top_logprobs": 2, "n": 2})),
        ),
        (
            "/v1/chat/completions",
            chat(&json!({"tools": tools(), "tool_choice": "required", "max_tokens": 100})),
        ),
        ("/v1/chat/completions", json!({"messages": []})),
        ("/v1/chat/completions/input_tokens", chat(&json!({}))),
        (
            "/v1/completions",
            json!({"prompt": PROMPT, "max_tokens": 8, "logprobs": 2}),
        ),
        ("/v1/completions", json!({"prompt": [4_000_000_000u32]})),
        ("/v1/responses", input.clone()),
        ("/v1/responses", call),
        ("/v1/responses", json!({"input": 1})),
        ("/v1/responses/input_tokens", input),
        ("/v1/messages", chat(&json!({}))),
        ("/v1/messages", to_call),
        ("/v1/messages", chat(&json!({"max_tokens": 0}))),
        ("/v1/messages/count_tokens", chat(&json!({}))),
        (
            "/completion",
            json!({"prompt": PROMPT, "n_predict": 8, "n_probs": 2, "return_tokens": true}),
        ),
        (
            "/completion",
            json!({"prompt": PROMPT, "n_predict": 8, "response_fields": ["content", "timings/prompt_n"]}),
        ),
        (
            "/completion",
            json!({"prompt": PROMPT, "grammar": "root ::= [a-z]"}),
        ),
        ("/v1/embeddings", json!({})),
        ("/infill", json!({})),
        ("/v1/rerank", json!({})),
        ("/tokenize", json!({"content": PROMPT})),
        ("/tokenize", json!({"content": PROMPT, "with_pieces": true})),
        ("/detokenize", json!({"tokens": [1, 2, 3]})),
        ("/detokenize", json!({"tokens": "a"})),
        ("/apply-template", chat(&json!({"tools": tools()}))),
    ]
}

#[test]
fn answers_are_as_the_document_says() {
    let (_folder, server) = with_template(TEMPLATE, &["--parallel", "2"]);
    let document = server.get("/openapi.json").ok();
    let mut described = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        if methods.get("get").is_some() {
            described += 1;
            fits(
                &document,
                "get",
                path,
                &server.get(&path.replace("{id}", "demo")),
            );
        }
    }
    assert!(described >= 9, "{described}");
    fits(
        &document,
        "get",
        "/v1/models/{id}",
        &server.get("/v1/models/none"),
    );
    // Percent signs that spell no text.
    fits(
        &document,
        "get",
        "/v1/models/{id}",
        &server.get("/v1/models/%ff"),
    );
    let mut asked = std::collections::BTreeSet::new();
    for (path, body) in requests() {
        fits(&document, "post", path, &server.post(path, &body));
        asked.insert(path);
        if document["paths"][path]["post"]["responses"]["429"].is_object() {
            let answer = server.post(path, &streamed(&body));
            fits(&document, "post", path, &answer);
        }
    }
    let posts = document["paths"].as_object().unwrap().iter();
    for (path, methods) in posts.filter(|(_, methods)| methods.get("post").is_some()) {
        if methods["post"]["tags"][0] == "alias" {
            fits(&document, "post", path, &server.post(path, &json!({})));
        } else {
            assert!(asked.contains(path.as_str()), "{path} was not asked");
        }
    }
}

#[test]
fn refusals_are_as_the_document_says() {
    let server = Served::start(&["--api-key", "secret"]);
    let document = server.get("/openapi.json").ok();
    let operations = document["paths"].as_object().unwrap().iter();
    for (path, methods) in operations {
        for (method, operation) in methods.as_object().unwrap() {
            let ask = |headers: &[(&str, &str)]| {
                let method = method.to_uppercase();
                server.ask(&method, &path.replace("{id}", "demo"), headers, b"{}")
            };
            let without_key = ask(&[]);
            let is_open = operation["security"] == json!([]);
            assert_eq!(without_key.status == 401, !is_open, "{method} {path}");
            fits(&document, method, path, &without_key);
            let foreign = ask(&[("Origin", "https://evil.example"), ("x-api-key", "secret")]);
            assert_eq!(foreign.status, 403, "{method} {path}");
            fits(&document, method, path, &foreign);
        }
    }
}
