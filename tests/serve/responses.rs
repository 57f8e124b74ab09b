//! OpenAI's responses.

use super::streams::{streamed, with_template};
use super::*;

const TEMPLATE: &str = r#"{% for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>
{{ {"name": c.function.name, "arguments": c.function.arguments} | tojson }}
</tool_call>{% endfor %}

{% endfor %}assistant:"#;

fn body() -> Value {
    json!({"model": "m", "instructions": "s", "input": "Hello", "max_output_tokens": 16, "temperature": 0})
}

/// Checks that the events of items are in order, and returns the response at the end.
fn ended(answer: &client::Answer) -> Value {
    let events = answer.events();
    for (i, (name, event)) in events.iter().enumerate() {
        assert_eq!(event["type"], name.as_deref().unwrap());
        assert_eq!(event["sequence_number"], i);
    }
    assert_eq!(events[0].1["type"], "response.created");
    let last = &events.last().unwrap().1["response"];
    let done: Vec<&Value> = events
        .iter()
        .filter(|(_, e)| e["type"] == "response.output_item.done")
        .map(|(_, e)| &e["item"])
        .collect();
    assert_eq!(
        done,
        last["output"]
            .as_array()
            .unwrap()
            .iter()
            .collect::<Vec<_>>()
    );
    last.clone()
}

#[test]
fn streamed_responses_are_the_whole_ones() {
    let (_folder, server) = with_template(TEMPLATE, &[]);
    let whole = server.post("/v1/responses", &body()).ok();
    assert_eq!(
        (&whole["object"], &whole["status"]),
        (&json!("response"), &json!("incomplete"))
    );
    assert_eq!(whole["incomplete_details"]["reason"], "max_output_tokens");
    let text = whole["output"][0]["content"][0]["text"].as_str().unwrap();
    assert_eq!(whole["usage"]["output_tokens"], 16);
    let stream = server.post("/v1/responses", &streamed(&body()));
    let last = ended(&stream);
    assert_eq!(last["output"][0]["content"], whole["output"][0]["content"]);
    let deltas: String = stream
        .events()
        .iter()
        .filter(|(_, e)| e["type"] == "response.output_text.delta")
        .map(|(_, e)| e["delta"].as_str().unwrap())
        .collect();
    assert_eq!(deltas, text);
    assert!(
        last["usage"]["input_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap()
            > 0
    );
    // It is the chat of the same messages.
    let chat = json!({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Hello"}],
        "max_tokens": 16, "temperature": 0});
    let chatted = server.post("/v1/chat/completions", &chat).ok();
    assert_eq!(chatted["choices"][0]["message"]["content"], text);
    let count = server.post("/v1/responses/input_tokens", &body()).ok();
    assert_eq!(count["input_tokens"], whole["usage"]["input_tokens"]);
    let count = server.post("/v1/chat/completions/input_tokens", &chat).ok();
    assert_eq!(count["input_tokens"], chatted["usage"]["prompt_tokens"]);
}

#[test]
fn calls_and_forms_of_responses() {
    let (_folder, server) = with_template(TEMPLATE, &[]);
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["n"], "additionalProperties": false});
    let mut asked = body();
    asked["max_output_tokens"] = 200.into();
    asked["tools"] = json!([{"type": "function", "name": "roll", "parameters": schema, "strict": true}, {"type": "web_search"}]);
    asked["tool_choice"] = "required".into();
    asked["parallel_tool_calls"] = false.into();
    let whole = server.post("/v1/responses", &asked).ok();
    assert_eq!(whole["status"], "completed", "{whole}");
    let call = &whole["output"][0];
    assert_eq!(
        (&call["type"], &call["name"]),
        (&json!("function_call"), &json!("roll"))
    );
    let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
    assert!((1..=9).contains(&arguments["n"].as_u64().unwrap()));
    let last = ended(&server.post("/v1/responses", &streamed(&asked)));
    assert_eq!(last["output"][0]["arguments"], call["arguments"]);
    // Its result goes on.
    asked["input"] = json!([
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        call,
        {"type": "function_call_output", "call_id": call["call_id"], "output": "6"},
    ]);
    asked["tool_choice"] = "none".into();
    asked["max_output_tokens"] = 3.into();
    assert_eq!(
        server.post("/v1/responses", &asked).ok()["output"][0]["type"],
        "message"
    );
    let mut form = body();
    form["max_output_tokens"] = 400.into();
    form["text"] = json!({"format": {"type": "json_schema", "name": "n", "schema": schema}});
    let answer = server.post("/v1/responses", &form).ok();
    let text = answer["output"][0]["content"][0]["text"].as_str().unwrap();
    assert!(
        serde_json::from_str::<Value>(text).unwrap()["n"].is_u64(),
        "{text}"
    );
}

#[test]
fn embeddings_are_refused_by_name() {
    let server = Served::start(&[]);
    let answer = server.post("/v1/embeddings", &json!({"input": "a"}));
    assert_eq!(
        (answer.status, &answer.json()["error"]["code"]),
        (501, &json!("unsupported"))
    );
    let kept = server.post(
        "/v1/responses",
        &json!({"input": "a", "previous_response_id": "r"}),
    );
    assert_eq!(
        (kept.status, &kept.json()["error"]["param"]),
        (400, &json!("previous_response_id"))
    );
}
