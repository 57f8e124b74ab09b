//! Bodies of responses, checked.

mod namespaces;

use crate::request::fields::{Fields, bad, shown};
use crate::request::format::{Format, of_schema};
use crate::request::read::{EFFORTS, MAX_TOKENS, name_results, sampling};
use crate::request::tools::{self, Choice, MAX_TOOLS, Tool, ToolCall, Tools};
use crate::request::{BadLine, Code, Endpoint, Message, Prompt, Request, Role, Stream, object};
pub(super) use namespaces::placed;
use namespaces::{called, tool};
use serde_json::{Map, Value, json};

/// Fields that would change an answer in a way that is not implemented, and what changes nothing.
const UNSUPPORTED: [(&str, &[&str]); 9] = [
    ("previous_response_id", &[]),
    ("conversation", &[]),
    ("background", &[]),
    ("prompt", &[]),
    ("max_tool_calls", &[]),
    ("top_logprobs", &[]),
    ("truncation", &["disabled"]),
    ("modalities", &["text"]),
    ("moderation", &[]),
];

/// Checks the body of a request. Returns it with what a response repeats of it.
pub(crate) fn request(id: &str, bytes: &[u8]) -> Result<(Request, Value), BadLine> {
    let body = object(bytes)?;
    let body = Fields::new(&body, "");
    check(body)?;
    let format = format(body)?;
    let tools = tools(body)?;
    let request = Request {
        custom_id: id.to_string(),
        endpoint: Endpoint::Chat,
        model: body.text("model")?.map(str::to_string),
        prompt: Prompt::Messages(conversation(body)?),
        max_tokens: body.count("max_output_tokens", 1..=MAX_TOKENS)?,
        sampling: sampling(body)?,
        stop: Vec::new(),
        n: 1,
        logprobs: None,
        ignore_eos: false,
        stream: Stream {
            wanted: body.flag("stream")?.unwrap_or(false),
            usage: true,
        },
        tools,
        variables: variables(body)?,
        format,
    };
    let get = |name: &str, default: Value| body.get(name).cloned().unwrap_or(default);
    let echo = json!({
        "instructions": get("instructions", Value::Null),
        "max_output_tokens": get("max_output_tokens", Value::Null),
        "parallel_tool_calls": request.tools.parallel,
        "reasoning": get("reasoning", json!({ "effort": null, "summary": null })),
        "temperature": get("temperature", Value::Null),
        "top_p": get("top_p", Value::Null),
        "text": get("text", json!({ "format": { "type": "text" } })),
        "tool_choice": get("tool_choice", "auto".into()),
        "tools": get("tools", json!([])),
    });
    Ok((request, echo))
}

/// Refuses what is not implemented.
fn check(body: Fields<'_>) -> Result<(), BadLine> {
    let changes = |value: &Value, neutral: &[&str]| match value {
        Value::Bool(is_true) => *is_true,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !neutral.contains(&text.as_str()),
        Value::Array(items) => !items
            .iter()
            .all(|item| item.as_str().is_some_and(|text| neutral.contains(&text))),
        _ => true,
    };
    let asked = UNSUPPORTED
        .iter()
        .find_map(|(name, neutral)| Some((name, body.get(name).filter(|v| changes(v, neutral))?)));
    match asked {
        None => Ok(()),
        Some((name, value)) => Err(unsupported(format!(
            "{name}: {} is not supported and would change the result; leave the field out",
            shown(value)
        ))),
    }
}

fn unsupported(message: String) -> BadLine {
    BadLine::new(Code::Unsupported, message)
}

fn variables(body: Fields<'_>) -> Result<Map<String, Value>, BadLine> {
    let mut variables = Map::new();
    let Some(reasoning) = body.get("reasoning") else {
        return Ok(variables);
    };
    let fields = tools::object("reasoning", reasoning)?;
    match fields.text("effort")? {
        None => {}
        Some(effort) if EFFORTS.contains(&effort) => {
            variables.insert("reasoning_effort".into(), effort.into());
        }
        Some(_) => {
            let expected = "\"none\", \"minimal\", \"low\", \"medium\", \"high\", or \"xhigh\"";
            return Err(fields.bad("effort", expected));
        }
    }
    Ok(variables)
}

fn format(body: Fields<'_>) -> Result<Format, BadLine> {
    let Some(text) = body.get("text") else {
        return Ok(Format::Text);
    };
    let Some(format) = tools::object("text", text)?.get("format") else {
        return Ok(Format::Text);
    };
    let fields = tools::object("text.format", format)?;
    match fields.text("type")? {
        Some("text") => Ok(Format::Text),
        Some("json_object") => of_schema("text.format", &json!({ "type": "object" })),
        Some("json_schema") => match fields.get("schema") {
            Some(schema) => of_schema("text.format.schema", schema),
            None => Err(fields.bad("schema", "a JSON schema")),
        },
        _ => Err(tools::kind(
            fields,
            "\"text\", \"json_object\", or \"json_schema\"",
        )),
    }
}

fn tools(body: Fields<'_>) -> Result<Tools, BadLine> {
    let list: Vec<Tool> = tools::list(body, tool)?.into_iter().flatten().collect();
    if list.len() > MAX_TOOLS {
        let expected = format!("at most {MAX_TOOLS} tools in all namespaces");
        return Err(body.bad("tools", &expected));
    }
    let choice = match body.get("tool_choice") {
        None => Choice::Auto,
        Some(Value::String(word)) => tools::word_of(body, word)?,
        Some(value) => {
            let fields = tools::object("tool_choice", value)?;
            match fields.text("type")? {
                Some("function") => match tools::named(fields, fields.get("name"))? {
                    Choice::Named(name) => Choice::Named(called(fields, name)?),
                    choice => choice,
                },
                _ => return Err(tools::kind(fields, "\"function\"")),
            }
        }
    };
    let parallel = body.flag("parallel_tool_calls")?.unwrap_or(true);
    Tools::checked(body, list, choice, parallel)
}

/// Returns the messages that instructions and input are.
fn conversation(body: Fields<'_>) -> Result<Vec<Message>, BadLine> {
    let mut talk = Talk::default();
    if let Some(instructions) = body.text("instructions")? {
        talk.add(Role::System, instructions);
    }
    match body.get("input") {
        Some(Value::String(text)) => talk.add(Role::User, text),
        Some(Value::Array(items)) if !items.is_empty() => {
            for (i, item) in items.iter().enumerate() {
                let place = format!("input[{i}]");
                talk.item(tools::object(&place, item)?)?;
            }
        }
        _ => return Err(body.bad("input", "a text, or an array of one or more items")),
    }
    let mut messages = talk.messages;
    name_results(&mut messages);
    match messages.last() {
        Some(last) if last.role == Role::Assistant && last.calls.is_empty() => {
            let message = "input: an answer as the last item is not supported, expected a message of the user";
            Err(unsupported(message.to_string()))
        }
        _ => Ok(messages),
    }
}

/// Messages that items become.
#[derive(Default)]
struct Talk {
    messages: Vec<Message>,
    /// Reasoning that belongs to the next item of an answer.
    thinking: Option<String>,
}

impl Talk {
    /// Adds a text. Templates take one system message, so those at the start are joined.
    fn add(&mut self, role: Role, text: &str) {
        if role == Role::System
            && let [first] = self.messages.as_mut_slice()
            && first.role == Role::System
        {
            first.content = format!("{}\n\n{text}", first.content);
            return;
        }
        let thinking = match role {
            Role::Assistant => self.thinking.take(),
            _ => None,
        };
        self.messages.push(Message {
            thinking,
            ..Message::new(role, text)
        });
    }

    fn item(&mut self, item: Fields<'_>) -> Result<(), BadLine> {
        match item.text("type")? {
            None | Some("message") => {
                let role = match item.text("role")? {
                    Some("user") => Role::User,
                    Some("assistant") => Role::Assistant,
                    Some("system" | "developer") => Role::System,
                    _ => {
                        let expected = "\"user\", \"assistant\", \"system\", or \"developer\"";
                        return Err(item.bad("role", expected));
                    }
                };
                let text = text(item, "content")?;
                self.add(role, &text);
            }
            Some("function_call") => self.call(item)?,
            Some("function_call_output") => {
                let id = item.text("call_id")?;
                let id = id.ok_or_else(|| item.bad("call_id", "the call's name"))?;
                self.messages.push(Message {
                    call_id: Some(id.to_string()),
                    ..Message::new(Role::Tool, &text(item, "output")?)
                });
            }
            // What is hidden in it can't be shown to this model.
            Some("reasoning") => {
                if item.get("content").is_some() {
                    let text = text(item, "content")?;
                    self.thinking = Some(text).filter(|text| !text.is_empty());
                }
            }
            Some(_) => {
                let expected =
                    "\"message\", \"function_call\", \"function_call_output\", or \"reasoning\"";
                return Err(tools::kind(item, expected));
            }
        }
        Ok(())
    }

    /// Adds a call to the answer at the end.
    fn call(&mut self, item: Fields<'_>) -> Result<(), BadLine> {
        let need = |name: &str| match item.text(name)? {
            Some(text) if !text.is_empty() => Ok(text.to_string()),
            _ => Err(item.bad(name, "a text")),
        };
        let call = ToolCall {
            id: need("call_id")?,
            name: called(item, need("name")?)?,
            arguments: tools::arguments(item, "arguments")?,
        };
        if self
            .messages
            .last()
            .is_none_or(|last| last.role != Role::Assistant)
        {
            self.add(Role::Assistant, "");
        }
        if let Some(last) = self.messages.last_mut() {
            last.calls.push(call);
        }
        Ok(())
    }
}

/// Reads a text, or parts that have text.
fn text(item: Fields<'_>, name: &str) -> Result<String, BadLine> {
    let place = item.place(name);
    let parts = match item.get(name) {
        Some(Value::String(text)) => return Ok(text.clone()),
        Some(Value::Array(parts)) => parts,
        _ => return Err(item.bad(name, "a text, or an array of parts")),
    };
    let mut all = String::new();
    for (i, part) in parts.iter().enumerate() {
        let place = format!("{place}[{i}]");
        let Value::Object(fields) = part else {
            return Err(bad(&place, Some(part), "an object with a type and a text"));
        };
        let part = Fields::new(fields, &place);
        match part.text("type")? {
            Some("input_text" | "output_text" | "text" | "reasoning_text" | "summary_text") => {
                match part.text("text")? {
                    Some(text) => all.push_str(text),
                    None => return Err(part.bad("text", "a string")),
                }
            }
            _ => return Err(tools::kind(part, "\"input_text\" or \"output_text\"")),
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<(Request, Value), BadLine> {
        request("id", body.to_string().as_bytes())
    }

    /// Items in the order in which Codex sends them.
    #[test]
    fn items_become_messages() {
        let (request, echo) = read(json!({
            "model": "m", "instructions": "s", "store": false, "stream": true, "prompt_cache_key": "k",
            "include": ["reasoning.encrypted_content"], "reasoning": {"effort": "medium", "summary": "auto"},
            "text": {"verbosity": "low"}, "tool_choice": "auto", "parallel_tool_calls": false,
            "tools": [
                {"type": "function", "name": "shell", "strict": false, "parameters": {"type": "object"}},
                {"type": "web_search"},
            ],
            "input": [
                {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "d"}]},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}], "encrypted_content": null},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
                {"type": "function_call", "name": "shell", "arguments": "{\"x\": 1}", "call_id": "i"},
                {"type": "function_call", "name": "shell", "arguments": "{}", "call_id": "j"},
                {"type": "function_call_output", "call_id": "i", "output": "o"},
                {"type": "function_call_output", "call_id": "j", "output": [{"type": "input_text", "text": "p"}]},
            ],
        }))
        .unwrap();
        let Prompt::Messages(messages) = &request.prompt else {
            panic!("{request:?}");
        };
        let roles: Vec<Role> = messages.iter().map(|message| message.role).collect();
        assert_eq!(
            roles,
            [
                Role::System,
                Role::User,
                Role::Assistant,
                Role::Tool,
                Role::Tool
            ]
        );
        assert_eq!(messages[0].content, "s\n\nd");
        let answer = &messages[2];
        assert_eq!(
            (answer.content.as_str(), answer.thinking.as_deref()),
            ("b", Some("t"))
        );
        assert_eq!(answer.calls.len(), 2);
        assert_eq!(answer.calls[0].arguments["x"], 1);
        assert_eq!(
            (messages[4].content.as_str(), messages[4].name.as_deref()),
            ("p", Some("shell"))
        );
        assert_eq!(request.tools.list.len(), 1);
        assert!(!request.tools.parallel && request.stream.wanted);
        assert_eq!(request.variables["reasoning_effort"], "medium");
        assert_eq!(
            (&echo["instructions"], &echo["tool_choice"]),
            (&json!("s"), &json!("auto"))
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, words) in [
            (json!({}), "input: missing"),
            (json!({"input": []}), "input: an array, expected"),
            (json!({"input": [7]}), "input[0]: 7, expected an object"),
            (json!({"input": [{"role": "x"}]}), "input[0].role: \"x\""),
            (
                json!({"input": [{"role": "user"}]}),
                "input[0].content: missing",
            ),
            (
                json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
                "input[0].content[0].type: \"input_image\" is not supported",
            ),
            (
                json!({"input": [{"type": "item_reference"}]}),
                "input[0].type: \"item_reference\" is not supported",
            ),
            (
                json!({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}),
                "input[0].call_id: missing",
            ),
            (
                json!({"input": [{"type": "function_call", "name": "f", "call_id": "i", "arguments": "x"}]}),
                "input[0].arguments: \"x\"",
            ),
            (
                json!({"input": [{"role": "assistant", "content": "a"}]}),
                "input: an answer as the last",
            ),
            (
                json!({"input": "a", "previous_response_id": "r"}),
                "previous_response_id: \"r\" is not supported",
            ),
            (
                json!({"input": "a", "background": true}),
                "background: true is not supported",
            ),
            (
                json!({"input": "a", "truncation": "auto"}),
                "truncation: \"auto\" is not supported",
            ),
            (
                json!({"input": "a", "tools": [{"type": "custom", "name": "f"}]}),
                "tools[0].type: \"custom\" is not supported",
            ),
            (
                json!({"input": "a", "text": {"format": {"type": "json_schema"}}}),
                "text.format.schema: missing",
            ),
            (
                json!({"input": "a", "reasoning": {"effort": "much"}}),
                "reasoning.effort: \"much\"",
            ),
            (
                json!({"input": "a", "max_output_tokens": 0}),
                "max_output_tokens: 0",
            ),
        ] {
            let bad = read(body).unwrap_err();
            assert!(
                bad.message.starts_with(words),
                "{words:?} in {}",
                bad.message
            );
        }
        let neutral = json!({"input": "a", "background": false, "previous_response_id": null, "truncation": "disabled", "top_logprobs": 0});
        assert!(read(neutral).is_ok());
    }
}
