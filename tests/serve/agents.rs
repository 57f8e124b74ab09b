//! What coding agents send: system messages in the middle of a conversation, and functions in
//! namespaces.

use super::streams::{streamed, with_template};
use super::*;

/// Returns the prompt that a template makes of a conversation in Anthropic's form, by its tokens.
fn prompt(server: &Served, messages: Value) -> String {
    let asked = json!({"messages": messages});
    let answer = server.post("/apply-template", &asked).ok();
    answer["prompt"].as_str().unwrap().to_string()
}

#[test]
fn late_system_messages_reach_the_model_under_any_template() {
    let talk = json!([
        {"role": "system", "content": "S1"},
        {"role": "user", "content": "U1"},
        {"role": "system", "content": "S2"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "U2"},
        {"role": "system", "content": "S3"},
    ]);
    let printed = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}";
    let (_folder, server) = with_template(printed, &[]);
    let all = "[system:S1][user:U1][system:S2][assistant:A1][user:U2][system:S3]";
    assert_eq!(prompt(&server, talk.clone()), all);
    let joined = "[system:S1][user:U1\n\nS2][assistant:A1][user:U2\n\nS3]";
    let left_out = "{% for m in messages %}{% if m.role != 'system' or loop.first %}[{{ m.role }}:{{ m.content }}]{% endif %}{% endfor %}";
    let rejected = "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('System message must be at the beginning.') }}{% endif %}[{{ m.role }}:{{ m.content }}]{% endfor %}";
    for template in [left_out, rejected] {
        let (_folder, server) = with_template(template, &[]);
        assert_eq!(prompt(&server, talk.clone()), joined, "{template}");
        // Anthropic's form has them since Claude Code sends them.
        let body =
            json!({"max_tokens": 2, "system": "S1", "messages": talk.as_array().unwrap()[1..]});
        let answer = server.post("/v1/messages", &body).ok();
        let chat = json!({"messages": [
            {"role": "system", "content": "S1"}, {"role": "user", "content": "U1\n\nS2"},
            {"role": "assistant", "content": "A1"}, {"role": "user", "content": "U2\n\nS3"},
        ]});
        let count = server.post("/v1/chat/completions/input_tokens", &chat).ok();
        let usage = &answer["usage"];
        let n = usage["input_tokens"].as_u64().unwrap()
            + usage["cache_read_input_tokens"].as_u64().unwrap();
        assert_eq!(count["input_tokens"], n);
    }
    // A template that rejects the conversation for another reason says that one.
    let never = "{{ raise_exception('no such talk') }}";
    let (_folder, server) = with_template(never, &[]);
    let refused = server.post("/apply-template", &json!({"messages": talk}));
    assert_eq!(refused.status, 400);
    assert!(
        refused.text().contains("no such talk"),
        "{}",
        refused.text()
    );
}

#[test]
fn a_function_of_a_namespace_is_called_by_both_its_names() {
    let template = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% for m in messages %}\
        {{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n\
        {{ {\"name\": c.function.name, \"arguments\": c.function.arguments} | tojson }}\n</tool_call>{% endfor %}\n\
        {% endfor %}assistant:";
    let (_folder, server) = with_template(template, &[]);
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["n"], "additionalProperties": false});
    let mut asked = json!({
        "input": "Hello", "max_output_tokens": 200, "temperature": 0, "parallel_tool_calls": false,
        "tools": [{"type": "namespace", "name": "dice", "description": "d", "tools": [
            {"type": "function", "name": "roll", "parameters": schema, "strict": true},
        ]}],
        "tool_choice": "required",
    });
    let whole = server.post("/v1/responses", &asked).ok();
    let call = &whole["output"][0];
    assert_eq!(
        (&call["type"], &call["namespace"], &call["name"]),
        (&json!("function_call"), &json!("dice"), &json!("roll")),
        "{whole}"
    );
    let stream = server.post("/v1/responses", &streamed(&asked));
    let events = stream.events();
    let data = |kind: &str| {
        let found = events.iter().find(|(_, event)| event["type"] == kind);
        found.unwrap_or_else(|| panic!("no {kind}")).1.clone()
    };
    let item = &data("response.output_item.done")["item"];
    assert_eq!(
        (&item["namespace"], &item["name"]),
        (&json!("dice"), &json!("roll"))
    );
    assert_eq!(
        data("response.function_call_arguments.done")["name"],
        "roll"
    );
    // The conversation goes on with the call as it came.
    asked["input"] = json!([
        {"type": "message", "role": "user", "content": "Hello"},
        call,
        {"type": "function_call_output", "call_id": call["call_id"], "output": "6"},
    ]);
    asked["tool_choice"] = "none".into();
    asked["max_output_tokens"] = 2.into();
    let answer = server.post("/v1/responses", &asked).ok();
    assert_eq!(answer["output"][0]["type"], "message", "{answer}");
}
