//! Calls of tools, and answers that must have a form.

use super::streams::{streamed, together, with_template};
use super::*;

/// A template in the manner of Hermes.
const TEMPLATE: &str = r#"{% if tools %}Tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}

{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>
{{ {"name": c.function.name, "arguments": c.function.arguments} | tojson }}
</tool_call>{% endfor %}

{% endfor %}assistant:"#;

pub fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "city": {"type": "string", "enum": ["Paris", "Rome"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city", "days"],
        "additionalProperties": false,
    })
}

fn chat(choice: &Value) -> Value {
    json!({
        "messages": [{"role": "user", "content": "How is the weather?"}],
        "tools": [
            {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": schema()}},
            {"type": "function", "function": {"name": "now"}},
        ],
        "tool_choice": choice, "parallel_tool_calls": false, "max_tokens": 200, "temperature": 0,
    })
}

fn is_weather(arguments: &Value) -> bool {
    let days = arguments["days"].as_u64().unwrap_or(0);
    let city = arguments["city"].as_str().unwrap_or("");
    ["Paris", "Rome"].contains(&city) && (1..=9).contains(&days)
}

#[test]
fn a_demanded_call_comes_whole_and_as_a_stream() {
    let (_folder, server) = with_template(TEMPLATE, &["--parallel", "2"]);
    let body = chat(&json!({"type": "function", "function": {"name": "weather"}}));
    let whole = server.post("/v1/chat/completions", &body).ok();
    let choice = &whole["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{whole}");
    assert_eq!(choice["message"]["content"], Value::Null);
    let calls = choice["message"]["tool_calls"].as_array().unwrap();
    assert_eq!(calls.len(), 1);
    assert_eq!(calls[0]["function"]["name"], "weather");
    let arguments = calls[0]["function"]["arguments"].as_str().unwrap();
    assert!(
        is_weather(&serde_json::from_str(arguments).unwrap()),
        "{arguments}"
    );
    let stream = server.post("/v1/chat/completions", &streamed(&body));
    assert_eq!(
        together(&stream, "/delta/tool_calls/0/function/name"),
        ["weather"]
    );
    assert_eq!(
        together(&stream, "/delta/tool_calls/0/function/arguments"),
        [arguments]
    );
    assert_eq!(together(&stream, "/delta/content"), [""]);
    let events = stream.events();
    let reason = events
        .iter()
        .find_map(|(_, e)| e["choices"][0]["finish_reason"].as_str());
    assert_eq!(reason, Some("tool_calls"));
    // Any tool will do.
    let any = server
        .post("/v1/chat/completions", &chat(&"required".into()))
        .ok();
    let call = &any["choices"][0]["message"]["tool_calls"][0]["function"];
    assert!(
        ["weather", "now"].contains(&call["name"].as_str().unwrap()),
        "{any}"
    );
    // Without a call the answer is text.
    let none = server
        .post("/v1/chat/completions", &chat(&"none".into()))
        .ok();
    assert!(none["choices"][0]["message"]["tool_calls"].is_null());
}

#[test]
fn a_demanded_call_is_a_block_of_a_message() {
    let (_folder, server) = with_template(TEMPLATE, &[]);
    let body = json!({
        "max_tokens": 200, "temperature": 0,
        "messages": [{"role": "user", "content": "How is the weather?"}],
        "tools": [{"name": "weather", "input_schema": schema()}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": true},
    });
    let whole = server.post("/v1/messages", &body).ok();
    assert_eq!(whole["stop_reason"], "tool_use", "{whole}");
    let block = &whole["content"][0];
    assert_eq!(
        (&block["type"], &block["name"]),
        (&json!("tool_use"), &json!("weather"))
    );
    assert!(is_weather(&block["input"]), "{block}");
    let events = server.post("/v1/messages", &streamed(&body)).events();
    let json: String = events
        .iter()
        .filter_map(|(_, e)| e["delta"]["partial_json"].as_str())
        .collect();
    assert_eq!(
        serde_json::from_str::<Value>(&json).unwrap(),
        block["input"]
    );
    let stop = events
        .iter()
        .find_map(|(_, e)| e["delta"]["stop_reason"].as_str());
    assert_eq!(stop, Some("tool_use"));
    // The call and its result are a part of the next prompt.
    let mut next = body;
    let messages = next["messages"].as_array_mut().unwrap();
    messages.push(json!({"role": "assistant", "content": whole["content"]}));
    messages.push(json!({"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": block["id"], "content": "It rains."},
    ]}));
    next["tool_choice"] = json!({"type": "none"});
    next["max_tokens"] = 4.into();
    assert_eq!(
        server.post("/v1/messages", &next).ok()["stop_reason"],
        "max_tokens"
    );
}

#[test]
fn templates_see_tools_calls_and_results() {
    let (_folder, server) = with_template(TEMPLATE, &[]);
    let mut body = chat(&"auto".into());
    body["messages"] = json!([
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "i", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Rome\", \"b\": [1]}"}},
        ]},
        {"role": "tool", "tool_call_id": "i", "content": "It rains."},
    ]);
    let prompt = server.post("/apply-template", &body).ok()["prompt"].clone();
    let prompt = prompt.as_str().unwrap();
    assert!(
        prompt.starts_with("Tools: {\"type\": \"function\", \"function\": {\"name\": \"weather\""),
        "{prompt}"
    );
    let call = "assistant: <tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\", \"b\": [1]}}\n</tool_call>";
    assert!(prompt.contains(call), "{prompt}");
    assert!(prompt.contains("tool: It rains."), "{prompt}");
    // A template without a place for them says so.
    let (_folder, plain) = with_template("{% for m in messages %}{{ m.content }}{% endfor %}", &[]);
    let refused = plain.post("/v1/chat/completions", &chat(&"auto".into()));
    assert_eq!(
        (refused.status, &refused.json()["error"]["param"]),
        (400, &json!("tools"))
    );
    let refused = plain.post("/apply-template", &body);
    assert_eq!(
        (refused.status, &refused.json()["error"]["code"]),
        (400, &json!("unsupported"))
    );
}

#[test]
fn answers_have_the_form_that_is_asked_for() {
    let (_folder, server) = with_template(TEMPLATE, &["--parallel", "2"]);
    let mut body = json!({
        "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 400, "temperature": 0.8, "seed": 5, "n": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "w", "strict": true, "schema": schema()}},
    });
    let whole = server.post("/v1/chat/completions", &body).ok();
    let texts: Vec<&str> = whole["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| choice["message"]["content"].as_str().unwrap())
        .collect();
    for text in &texts {
        assert!(is_weather(&serde_json::from_str(text).unwrap()), "{text}");
    }
    let stream = server.post("/v1/chat/completions", &streamed(&body));
    assert_eq!(together(&stream, "/delta/content"), texts);
    body["response_format"] =
        json!({"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}});
    let refused = server.post("/v1/chat/completions", &body);
    assert_eq!(
        (refused.status, &refused.json()["error"]["param"]),
        (400, &json!("response_format"))
    );
    let mut wrong = completion(PROMPT, 20);
    wrong["grammar"] = "root ::= \"a\"\n  other ::= (".into();
    let refused = server.post("/v1/completions", &wrong).json();
    assert_eq!(refused["error"]["param"], "grammar", "{refused}");
    let message = refused["error"]["message"].as_str().unwrap();
    assert!(message.starts_with("grammar: line 2: the end"), "{message}");
    for (name, value, expected) in [
        ("guided_choice", json!(["yes", "no"]), vec!["yes", "no"]),
        (
            "grammar",
            json!("root ::= \"<\" (\n inner | [x-y]) # one\ninner ::= \"z\" \">\"?"),
            vec!["<x", "<y", "<z", "<z>"],
        ),
        (
            "guided_regex",
            json!("[ab]{2}"),
            vec!["aa", "ab", "ba", "bb"],
        ),
    ] {
        let mut body = completion(PROMPT, 20);
        body[name] = value;
        let answer = server.post("/v1/completions", &body).ok();
        let text = answer["choices"][0]["text"].as_str().unwrap();
        assert!(expected.contains(&text), "{name}: {text}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
}

/// A template in the manner of Qwen, where an answer begins where the prompt ends.
const QWEN: &str = r#"{% for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant{{ '\n' }}"#;

#[test]
fn calls_that_come_back_are_in_the_cache_as_the_model_wrote_them() {
    let (_folder, server) = with_template(QWEN, &["--parallel", "2"]);
    let mut body = chat(&json!({"type": "function", "function": {"name": "weather"}}));
    body["temperature"] = json!(0.7);
    body["seed"] = 3.into();
    let first = server.post("/v1/chat/completions", &body).ok();
    let call = &first["choices"][0]["message"]["tool_calls"][0];
    let arguments: Value =
        serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    let n = |answer: &Value, pointer: &str| answer.pointer(pointer).unwrap().as_u64().unwrap();
    let n_first = n(&first, "/usage/prompt_tokens") + n(&first, "/usage/completion_tokens");
    body["tool_choice"] = "auto".into();
    body["max_tokens"] = 4.into();
    // As a client of its own mind writes it: another order of keys, and spaces.
    let turn = |id: &Value, city: &Value, days: &Value| {
        let text = format!("{{ \"days\" : {days},\n\"city\":{city} }}");
        let mut next = body.clone();
        let messages = next["messages"].as_array_mut().unwrap();
        messages.push(json!({"role": "assistant", "content": null, "tool_calls": [
            {"id": id, "type": "function", "function": {"name": "weather", "arguments": text}},
        ]}));
        messages.push(json!({"role": "tool", "tool_call_id": id, "content": "It rains."}));
        let answer = server.post("/v1/chat/completions", &next).ok();
        n(&answer, "/usage/prompt_tokens_details/cached_tokens")
    };
    // The last token that was drawn is not computed.
    let cached = turn(&call["id"], &arguments["city"], &arguments["days"]);
    assert!(cached + 1 >= n_first, "{cached} of {n_first}: {first}");
    // Another call is what the client says.
    let days = json!(arguments["days"].as_u64().unwrap() % 9 + 1);
    let other = turn(&call["id"], &arguments["city"], &days);
    assert!(other + 5 < n_first, "{other} of {n_first}");
    let other = turn(&json!("unknown"), &arguments["city"], &arguments["days"]);
    assert!(other + 5 < n_first, "{other} of {n_first}");
}
