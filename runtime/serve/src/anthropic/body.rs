//! Bodies of Anthropic's endpoints, checked.

use crate::request::fields::{Fields, bad, shown};
use crate::request::format::{Format, of_schema};
use crate::request::read::{EFFORTS, MAX_TOKENS, name_results, sampling, stop_strings};
use crate::request::tools::{self, Choice, Tool, ToolCall, Tools};
use crate::request::{BadLine, Code, Endpoint, Message, Prompt, Request, Role, Stream, object};
use serde_json::{Map, Value};

/// Fields that would change an answer in a way that is not implemented.
const UNSUPPORTED: [&str; 2] = ["mcp_servers", "container"];

/// Start of a block that Claude Code puts before the system prompt for its provider's accounts. It
/// differs between conversations, so no prompt would begin like one that is kept.
const BILLING: &str = "x-anthropic-billing-header:";

/// Checks the body of a request.
pub(crate) fn request(id: &str, bytes: &[u8]) -> Result<Request, BadLine> {
    let body = object(bytes)?;
    let body = Fields::new(&body, "");
    if body.get("max_tokens").is_none() {
        return Err(body.bad("max_tokens", "a whole number from 1"));
    }
    read(id, body)
}

/// Checks the body of a request whose tokens are to be counted.
pub(crate) fn counted(id: &str, bytes: &[u8]) -> Result<Request, BadLine> {
    let body = object(bytes)?;
    read(id, Fields::new(&body, ""))
}

fn read(id: &str, body: Fields<'_>) -> Result<Request, BadLine> {
    check(body)?;
    Ok(Request {
        custom_id: id.to_string(),
        endpoint: Endpoint::Chat,
        model: body.text("model")?.map(str::to_string),
        prompt: Prompt::Messages(conversation(body)?),
        max_tokens: body.count("max_tokens", 1..=MAX_TOKENS)?,
        sampling: sampling(body)?,
        stop: stop_strings(body, "stop_sequences")?,
        n: 1,
        logprobs: None,
        ignore_eos: false,
        stream: Stream {
            wanted: body.flag("stream")?.unwrap_or(false),
            usage: true,
        },
        tools: tools(body)?,
        variables: variables(body)?,
        format: format(body)?,
    })
}

/// Refuses what is not implemented.
fn check(body: Fields<'_>) -> Result<(), BadLine> {
    let empty = |value: &Value| matches!(value, Value::Array(items) if items.is_empty());
    let asked = |name: &&&str| body.get(name).is_some_and(|value| !empty(value));
    match UNSUPPORTED.iter().find(asked) {
        Some(name) => Err(unsupported(format!(
            "{name}: not supported, and would change the result; leave the field out"
        ))),
        None => Ok(()),
    }
}

fn unsupported(message: String) -> BadLine {
    BadLine::new(Code::Unsupported, message)
}

/// Returns the variables of the template that a request sets: whether to reason, and how much.
fn variables(body: Fields<'_>) -> Result<Map<String, Value>, BadLine> {
    let mut variables = Map::new();
    if let Some(thinking) = body.get("thinking") {
        let fields = tools::object("thinking", thinking)?;
        let enabled = match fields.text("type")? {
            Some("enabled" | "adaptive") => true,
            Some("disabled") => false,
            _ => return Err(fields.bad("type", "\"enabled\", \"adaptive\", or \"disabled\"")),
        };
        // The names that templates have for it.
        variables.insert("enable_thinking".into(), enabled.into());
        variables.insert("thinking".into(), enabled.into());
    }
    if let Some(config) = body.get("output_config") {
        let fields = tools::object("output_config", config)?;
        match fields.text("effort")? {
            Some("max") => {
                variables.insert("reasoning_effort".into(), "xhigh".into());
            }
            Some(effort) if EFFORTS.contains(&effort) => {
                variables.insert("reasoning_effort".into(), effort.into());
            }
            None => {}
            Some(_) => {
                let expected = "\"low\", \"medium\", \"high\", \"xhigh\", or \"max\"";
                return Err(fields.bad("effort", expected));
            }
        }
    }
    Ok(variables)
}

/// Reads what an answer must be, from a field of `output_config`, or from the older one beside it.
fn format(body: Fields<'_>) -> Result<Format, BadLine> {
    let config = match body.get("output_config") {
        Some(config) => tools::object("output_config", config)?.get("format"),
        None => None,
    };
    let (place, value) = match (config, body.get("output_format")) {
        (Some(_), Some(_)) => {
            let expected = "one form of the answer, beside output_config.format";
            return Err(body.bad("output_format", expected));
        }
        (Some(value), None) => ("output_config.format", value),
        (None, Some(value)) => ("output_format", value),
        (None, None) => return Ok(Format::Text),
    };
    let fields = tools::object(place, value)?;
    match (fields.text("type")?, fields.get("schema")) {
        (Some("json_schema"), Some(schema)) => of_schema(&fields.place("schema"), schema),
        (Some("json_schema"), None) => Err(fields.bad("schema", "a JSON schema")),
        _ => Err(tools::kind(fields, "\"json_schema\"")),
    }
}

/// Reads the tools.
fn tools(body: Fields<'_>) -> Result<Tools, BadLine> {
    let list: Vec<Tool> = tools::list(body, |place, item| {
        let fields = tools::object(place, item)?;
        match fields.text("type")? {
            None | Some("custom") => tools::tool(fields, "input_schema"),
            Some(_) => Err(tools::kind(fields, "\"custom\"")),
        }
    })?;
    let Some(choice) = body.get("tool_choice") else {
        return Tools::checked(body, list, Choice::Auto, true);
    };
    let fields = tools::object("tool_choice", choice)?;
    let choice = match fields.text("type")? {
        Some("tool") => tools::named(fields, fields.get("name"))?,
        Some("any") => Choice::Required,
        Some("auto") => Choice::Auto,
        Some("none") => Choice::None,
        _ => {
            let expected = "\"auto\", \"any\", \"tool\", or \"none\"";
            return Err(fields.bad("type", expected));
        }
    };
    let alone = fields.flag("disable_parallel_tool_use")?.unwrap_or(false);
    Tools::checked(body, list, choice, !alone)
}

/// Returns the system message and those of the conversation.
fn conversation(body: Fields<'_>) -> Result<Vec<Message>, BadLine> {
    let mut all = Vec::new();
    if let Some(system) = body.get("system") {
        let mut blocks = Blocks {
            is_system: true,
            ..Blocks::default()
        };
        blocks.read("system", system, None)?;
        all.push(Message::new(Role::System, &blocks.text));
    }
    let items = match body.get("messages") {
        Some(Value::Array(items)) if !items.is_empty() => items,
        _ => return Err(body.bad("messages", "an array of one or more messages")),
    };
    for (i, item) in items.iter().enumerate() {
        let place = format!("messages[{i}]");
        let Value::Object(fields) = item else {
            return Err(bad(
                &place,
                Some(item),
                "an object with a role and a content",
            ));
        };
        let fields = Fields::new(fields, &place);
        let role = match fields.text("role")? {
            Some("user") => Role::User,
            Some("assistant") => Role::Assistant,
            Some("system") => Role::System,
            _ => return Err(fields.bad("role", "\"user\", \"assistant\", or \"system\"")),
        };
        let Some(content) = fields.get("content") else {
            return Err(fields.bad("content", "a string or an array of blocks"));
        };
        let mut blocks = Blocks::default();
        let speaker = Some(role).filter(|role| *role != Role::System);
        blocks.read(&fields.place("content"), content, speaker)?;
        blocks.add_messages(role, &mut all);
    }
    if all.last().is_some_and(|last| last.role == Role::Assistant) {
        let last = items.len() - 1;
        return Err(unsupported(format!(
            "messages[{last}].role: \"assistant\" as the last message is not supported, expected \"user\""
        )));
    }
    name_results(&mut all);
    Ok(all)
}

/// What the blocks of a message have.
#[derive(Default)]
struct Blocks {
    text: String,
    thinking: String,
    calls: Vec<ToolCall>,
    /// Results of calls, each with the call's name.
    results: Vec<Message>,
    /// Whether they are the system prompt.
    is_system: bool,
}

impl Blocks {
    /// Reads a content: a string, or blocks. Without a role it has text only.
    fn read(&mut self, place: &str, content: &Value, role: Option<Role>) -> Result<(), BadLine> {
        let blocks = match content {
            Value::String(text) => {
                self.text.push_str(text);
                return Ok(());
            }
            Value::Array(blocks) => blocks,
            _ => return Err(bad(place, Some(content), "a string or an array of blocks")),
        };
        for (i, block) in blocks.iter().enumerate() {
            let place = format!("{place}[{i}]");
            let Value::Object(fields) = block else {
                return Err(bad(&place, Some(block), "an object with a type"));
            };
            self.block(Fields::new(fields, &place), role)?;
        }
        Ok(())
    }

    fn block(&mut self, block: Fields<'_>, role: Option<Role>) -> Result<(), BadLine> {
        let text = |name: &str| match block.text(name)? {
            Some(text) => Ok(text),
            None => Err(block.bad(name, "a string")),
        };
        match (block.text("type")?, role) {
            (Some("text"), _) if self.is_system && text("text")?.starts_with(BILLING) => {}
            (Some("text"), _) => self.text.push_str(text("text")?),
            (Some("thinking"), Some(_)) => self.thinking.push_str(text("thinking")?),
            // What is hidden can't be shown to this model.
            (Some("redacted_thinking"), Some(_)) => {}
            (Some("tool_use"), Some(Role::Assistant)) => self.calls.push(ToolCall {
                id: text("id")?.to_string(),
                name: text("name")?.to_string(),
                arguments: tools::arguments(block, "input")?,
            }),
            (Some("tool_result"), Some(Role::User)) => {
                let mut inner = Blocks::default();
                if let Some(content) = block.get("content") {
                    inner.read(&block.place("content"), content, None)?;
                }
                self.results.push(Message {
                    call_id: Some(text("tool_use_id")?.to_string()),
                    ..Message::new(Role::Tool, &inner.text)
                });
            }
            (Some(_), _) => {
                let found = block.get("type").map_or_else(String::new, shown);
                let expected = match role {
                    None => "\"text\"",
                    Some(Role::Assistant) => "\"text\", \"thinking\", or \"tool_use\"",
                    Some(_) => "\"text\" or \"tool_result\"",
                };
                let place = block.place("type");
                let message =
                    format!("{place}: {found} is not supported here, expected {expected}");
                return Err(unsupported(message));
            }
            (None, _) => return Err(block.bad("type", "\"text\" or another kind of block")),
        }
        Ok(())
    }

    /// Adds the messages that the blocks are: results of calls come before the text beside them.
    fn add_messages(self, role: Role, all: &mut Vec<Message>) {
        let has_results = !self.results.is_empty();
        all.extend(self.results);
        if has_results && self.text.is_empty() {
            return;
        }
        let thinking = Some(self.thinking).filter(|t| !t.is_empty() && role == Role::Assistant);
        all.push(Message {
            thinking,
            calls: self.calls,
            ..Message::new(role, &self.text)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read_json(body: Value) -> Result<Request, BadLine> {
        request("id", body.to_string().as_bytes())
    }

    #[test]
    fn contents_are_strings_or_blocks() {
        let request = read_json(json!({
            "model": "m", "max_tokens": 7, "stop_sequences": ["\n"], "temperature": 0.5, "top_k": 3,
            "stream": true, "metadata": {"user_id": "u"}, "tools": [],
            "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "t", "signature": "x"}, {"type": "text", "text": "b"},
                ]},
                {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]},
            ],
        }))
        .unwrap();
        let expected = vec![
            Message::new(Role::System, "s"),
            Message::new(Role::User, "a"),
            Message {
                thinking: Some("t".into()),
                ..Message::new(Role::Assistant, "b")
            },
            Message::new(Role::User, "cd"),
        ];
        assert_eq!(request.prompt, Prompt::Messages(expected));
        assert_eq!((request.max_tokens, request.stream.wanted), (Some(7), true));
        assert_eq!(request.stop, ["\n"]);
        assert_eq!(request.sampling.top_k, Some(3));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let one = |content: Value| json!([{"role": "user", "content": content}]);
        for (body, words) in [
            (json!({"messages": one(json!("a"))}), "max_tokens: missing"),
            (json!({"max_tokens": 1}), "messages: missing"),
            (
                json!({"max_tokens": 1, "messages": []}),
                "messages: an array",
            ),
            (json!({"max_tokens": 1, "messages": [7]}), "messages[0]: 7"),
            (
                json!({"max_tokens": 1, "messages": one(json!(7))}),
                "messages[0].content: 7",
            ),
            (
                json!({"max_tokens": 1, "messages": one(json!([7]))}),
                "messages[0].content[0]: 7",
            ),
            (
                json!({"max_tokens": 1, "messages": one(json!([{"type": "image"}]))}),
                "messages[0].content[0].type: \"image\" is not supported here",
            ),
            (
                json!({"max_tokens": 1, "messages": one(json!([{"type": "text"}]))}),
                "messages[0].content[0].text: missing",
            ),
            (
                json!({"max_tokens": 1, "messages": [{"role": "tool", "content": "a"}]}),
                "messages[0].role: \"tool\"",
            ),
            (
                json!({"max_tokens": 1, "messages": [{"role": "system", "content": [{"type": "thinking"}]}]}),
                "messages[0].content[0].type: \"thinking\" is not supported here",
            ),
            (
                json!({"max_tokens": 1, "messages": [{"role": "assistant", "content": "a"}]}),
                "messages[0].role: \"assistant\" as the last",
            ),
            (
                json!({"max_tokens": 1, "messages": one(json!("a")), "system": 7}),
                "system: 7, expected a string",
            ),
            (
                json!({"max_tokens": 1, "messages": one(json!("a")), "tools": [{}]}),
                "tools[0].name: missing",
            ),
            (
                json!({"max_tokens": 1, "messages": one(json!("a")), "tools": [{"type": "bash_20250124", "name": "bash"}]}),
                "tools[0].type: \"bash_20250124\" is not supported",
            ),
            (
                json!({"max_tokens": 1, "messages": one(json!("a")), "tools": [{"name": "a b"}]}),
                "tools[0].name: \"a b\"",
            ),
            (
                json!({"max_tokens": 1, "messages": one(json!("a")), "tools": [{"name": "f"}, {"name": "f"}]}),
                "tools[1]: a second tool",
            ),
            (
                json!({"max_tokens": 1, "messages": one(json!("a")), "tool_choice": {"type": "any"}}),
                "tool_choice: an object, expected a tool",
            ),
            (
                json!({"max_tokens": 1, "messages": one(json!([{"type": "tool_use", "id": "i", "name": "f"}]))}),
                "messages[0].content[0].type: \"tool_use\" is not supported here",
            ),
            (
                json!({"max_tokens": 1, "messages": one(json!("a")), "thinking": {"type": "deep"}}),
                "thinking.type: \"deep\"",
            ),
            (
                json!({"max_tokens": 1, "messages": one(json!("a")), "stop_sequences": [""]}),
                "stop_sequences: \"\"",
            ),
        ] {
            let bad = read_json(body).unwrap_err();
            assert!(
                bad.message.starts_with(words),
                "{words:?} in {}",
                bad.message
            );
        }
    }

    /// The first request of Claude Code 2.1, shortened.
    #[test]
    fn claude_code_is_understood() {
        let request = read_json(json!({
            "model": "m", "max_tokens": 32000, "stream": true,
            "system": [
                {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.1c0; cc_entrypoint=cli;"},
                {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
            ],
            "messages": [
                {"role": "user", "content": [
                    {"type": "text", "text": "<system-reminder>\nToday\n</system-reminder>\n"},
                    {"type": "text", "text": "Say hello", "cache_control": {"type": "ephemeral"}},
                ]},
                {"role": "system", "content": "Available agent types"},
            ],
            "tools": [{"name": "Bash", "description": "d", "eager_input_streaming": true, "input_schema": {
                "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object",
                "properties": {"command": {"type": "string"}}, "required": ["command"], "additionalProperties": false,
            }}],
            "metadata": {"user_id": "{\"session_id\":\"s\"}"},
            "thinking": {"type": "adaptive"},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "output_config": {"effort": "high"},
        }))
        .unwrap();
        let reminder = "<system-reminder>\nToday\n</system-reminder>\nSay hello";
        let expected = vec![
            Message::new(Role::System, "You are an agent."),
            Message::new(Role::User, reminder),
            Message::new(Role::System, "Available agent types"),
        ];
        assert_eq!(request.prompt, Prompt::Messages(expected));
        assert_eq!(request.tools.list.len(), 1);
        assert_eq!(request.variables["reasoning_effort"], "high");
        // It is a block of the system prompt alone that is left out.
        let said = read_json(json!({"max_tokens": 1, "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x-anthropic-billing-header: a"}]},
        ]}))
        .unwrap();
        let expected = Message::new(Role::User, "x-anthropic-billing-header: a");
        assert_eq!(said.prompt, Prompt::Messages(vec![expected]));
    }

    #[test]
    fn calls_and_their_results_are_messages() {
        let request = read_json(json!({
            "max_tokens": 7, "thinking": {"type": "disabled"},
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": true},
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [
                    {"type": "text", "text": "b"},
                    {"type": "tool_use", "id": "i", "name": "f", "input": {"x": 1}},
                ]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "i", "content": [{"type": "text", "text": "r"}]},
                    {"type": "text", "text": "c"},
                ]},
            ],
        }))
        .unwrap();
        let Prompt::Messages(messages) = &request.prompt else {
            panic!("{request:?}");
        };
        let roles: Vec<Role> = messages.iter().map(|message| message.role).collect();
        assert_eq!(roles, [Role::User, Role::Assistant, Role::Tool, Role::User]);
        let arguments = json!({"x": 1}).as_object().unwrap().clone();
        let call = ToolCall {
            id: "i".into(),
            name: "f".into(),
            arguments,
        };
        assert_eq!(messages[1].calls, [call]);
        let result = &messages[2];
        assert_eq!(
            (result.content.as_str(), result.name.as_deref()),
            ("r", Some("f"))
        );
        assert!(!request.tools.parallel && request.tools.may_call());
        assert_eq!(request.variables["enable_thinking"], false);
    }
}
