//! Right bodies that together have every field in every form.

use serde_json::{Value, json};

/// Returns an object with the fields of several.
fn joined(all: &[Value]) -> Value {
    let fields = all.iter().flat_map(|one| one.as_object().unwrap().clone());
    Value::Object(fields.collect())
}

fn sampling() -> Value {
    json!({
        "model": "m", "temperature": 0.5, "top_k": 40, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1,
        "repeat_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"7": 1.5},
        "seed": 3, "stream": true,
    })
}

fn generation() -> Value {
    let own = json!({
        "max_tokens": 7, "max_completion_tokens": 7, "stop": ["a"], "n": 2, "ignore_eos": false,
        "stream_options": {"include_usage": true},
    });
    joined(&[sampling(), own])
}

/// Fields that are not implemented, each with the value beside empty ones that is taken.
fn unsupported() -> Value {
    json!({
        "function_call": "none", "modalities": ["text"], "best_of": 1, "length_penalty": 1.0, "typical_p": 1,
        "echo": false, "functions": [], "min_tokens": 0, "documents": {},
    })
}

fn tools() -> Value {
    json!({
        "tools": [{"type": "function", "function": {
            "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": true,
        }}],
        "tool_choice": {"type": "function", "function": {"name": "f"}}, "parallel_tool_calls": false,
    })
}

fn of_template() -> Value {
    json!({"reasoning_effort": "low", "chat_template_kwargs": {"x": 1}})
}

/// Bodies, each with one form of the answer.
fn with_forms(body: &Value) -> Vec<Value> {
    let schema = json!({"type": "object"});
    let forms = [
        json!({"response_format": {"type": "text"}}),
        json!({"response_format": {"type": "json_object", "schema": schema}}),
        json!({"response_format": {"type": "json_schema", "json_schema": {"schema": "{}"}}}),
        json!({"json_schema": schema}),
        json!({"guided_json": schema}),
        json!({"guided_regex": "a+"}),
        json!({"guided_choice": ["a", "b"]}),
        json!({"guided_grammar": "start: \"a\""}),
        json!({"grammar": "root ::= \"a\""}),
        json!({"structured_outputs": {"json": schema}}),
        json!({"structured_outputs": {"regex": "a"}}),
        json!({"structured_outputs": {"choice": ["a"]}}),
        json!({"structured_outputs": {"grammar": "a"}}),
        json!({"structured_outputs": {"json_object": true}}),
    ];
    forms
        .iter()
        .map(|form| joined(&[body.clone(), form.clone()]))
        .collect()
}

fn conversation() -> Value {
    json!([
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}], "reasoning_content": null},
        {"role": "assistant", "content": "b", "reasoning_content": "t", "tool_calls": []},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "i", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
        {"role": "tool", "content": "r", "tool_call_id": "i", "name": "f"},
    ])
}

pub fn chats() -> Vec<Value> {
    let body = json!({"messages": [{"role": "user", "content": "a"}]});
    let mut all = with_forms(&body);
    let own = json!({"messages": conversation(), "logprobs": true, "top_logprobs": 3});
    all.push(joined(&[
        generation(),
        own,
        tools(),
        of_template(),
        unsupported(),
    ]));
    all.push(joined(&[
        body,
        tools(),
        json!({"tool_choice": {"type": "function", "name": "f"}, "stop": "a", "n_predict": -1}),
        json!({"logit_bias": [[7, 1.5], [8, false]], "add_generation_prompt": true}),
    ]));
    all
}

pub fn completions() -> Vec<Value> {
    let mut all = with_forms(&json!({"prompt": "a"}));
    let own = json!({"prompt": [1, 2], "logprobs": 3, "tools": [], "tool_choice": "auto", "reasoning_effort": ""});
    all.push(joined(&[generation(), own, unsupported()]));
    all.push(json!({"prompt": ["a"]}));
    all.push(json!({"prompt": [[1, 2]]}));
    all
}

pub fn of_llama() -> Vec<Value> {
    let mut all = with_forms(&json!({"prompt": "a"}));
    let own = json!({
        "prompt": [1, 2], "n_predict": 7.0, "n": 1, "n_probs": 3, "logprobs": 3, "repeat_last_n": 8,
        "return_tokens": true, "response_fields": ["content"], "n_cmpl": 1, "top_n_sigma": -1.0,
        "adaptive_target": -1, "t_max_predict_ms": -1, "n_indent": 0, "samplers": [], "tools": [],
    });
    all.push(joined(&[generation(), unsupported(), own]));
    all.push(json!({"prompt": ["a"], "n_predict": -1}));
    all.push(json!({"prompt": [[1, 2]]}));
    all
}

pub fn messages() -> Vec<Value> {
    let own = json!({
        "max_tokens": 7, "stop_sequences": ["a"], "system": [{"type": "text", "text": "s"}],
        "thinking": {"type": "enabled"}, "mcp_servers": [], "container": null,
        "output_config": {"effort": "max", "format": {"type": "json_schema", "schema": {"type": "object"}}},
        "tools": [{"type": "custom", "name": "f", "description": "d", "input_schema": {"type": "object"}, "strict": true}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": true},
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "t"}, {"type": "redacted_thinking"}, {"type": "text", "text": "b"},
                {"type": "tool_use", "id": "i", "name": "f", "input": {"x": 1}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "i", "content": [{"type": "text", "text": "r"}]},
                {"type": "text", "text": "c"},
            ]},
        ],
    });
    let other = json!({
        "max_tokens": 7, "messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}],
        "tool_choice": {"type": "tool", "name": "f"},
        "output_format": {"type": "json_schema", "schema": {"type": "object"}},
    });
    vec![joined(&[sampling(), own]), other]
}

pub fn responses() -> Vec<Value> {
    let own = json!({
        "instructions": "s", "max_output_tokens": 7, "parallel_tool_calls": false, "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
        "tools": [
            {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": true},
            {"type": "web_search"},
            {"type": "namespace", "name": "n", "tools": [
                {"type": "function", "name": "g", "description": "d", "parameters": {"type": "object"}, "strict": true},
            ]},
        ],
        "tool_choice": {"type": "function", "name": "g", "namespace": "n"}, "truncation": "disabled", "modalities": ["text"],
        "background": false, "previous_response_id": null,
        "input": [
            {"type": "message", "role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "t"}]},
            {"type": "function_call", "call_id": "i", "name": "g", "namespace": "n", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "i", "output": [{"type": "input_text", "text": "o"}]},
        ],
    });
    let other =
        json!({"input": "a", "text": {"format": {"type": "json_object"}}, "tool_choice": "auto"});
    let function = json!({"type": "function", "name": "f", "description": "d", "parameters": {}, "strict": false});
    let with_namespace = json!({
        "input": [
            {"type": "function_call", "call_id": "i", "namespace": "n", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "i", "output": "o"},
        ],
        "tools": [{"type": "namespace", "name": "n", "tools": [function]}],
        "tool_choice": {"type": "function", "namespace": "n", "name": "f"},
    });
    vec![joined(&[sampling(), own]), other, with_namespace]
}

pub fn to_tokenize() -> Vec<Value> {
    vec![json!({"content": "a", "add_special": true, "with_pieces": true})]
}

pub fn to_detokenize() -> Vec<Value> {
    vec![json!({"tokens": [1, 2]})]
}

pub fn to_render() -> Vec<Value> {
    let own = json!({"messages": conversation()});
    let named =
        json!({"tool_choice": {"type": "function", "name": "f"}, "add_generation_prompt": true});
    vec![
        joined(&[own.clone(), tools(), of_template()]),
        joined(&[own, tools(), named]),
    ]
}

pub(super) fn plans() -> Vec<Value> {
    vec![json!({"apply": true, "min_gain": 0.5, "time_limit_s": 3})]
}
