//! Tools of a response: functions, and namespaces of functions, which Codex sends.
//!
//! Templates and forms of calls know functions with one name. So a function of a namespace has both
//! names in one for the model, and apart again in the answer.

use crate::request::BadLine;
use crate::request::fields::Fields;
use crate::request::tools::{self, Tool};
use serde_json::Value;

/// Tools of OpenAI's own servers. One that is offered need not be used, so they are left out of what
/// the model sees.
const HOSTED: [&str; 3] = ["web_search", "web_search_preview", "web_search_2025_08_26"];

/// Longest names of a namespace and of a function in one, in bytes. Together they are as long as the
/// name of another function may be.
const MAX_NAMESPACE_BYTES: usize = 62;
const MAX_INNER_BYTES: usize = 64;

/// Returns a name of bounded length.
fn name_of<'v>(fields: Fields<'v>, max_bytes: usize) -> Result<&'v str, BadLine> {
    let name = fields.text("name")?;
    let fits = |name: &&str| name.len() <= max_bytes && tools::is_name(name);
    name.filter(fits).ok_or_else(|| {
        let expected =
            format!("a name of 1 to {max_bytes} letters, digits, or characters of \"_-.:/\"");
        fields.bad("name", &expected)
    })
}

/// Returns the name under which the model sees a function of a namespace.
fn full_name(namespace: &str, name: &str) -> String {
    format!("{namespace}__{name}")
}

/// Returns the full name of the function that an item with the field `namespace` names.
pub(super) fn called(item: Fields<'_>, name: String) -> Result<String, BadLine> {
    let namespace = item.text("namespace")?.filter(|text| !text.is_empty());
    Ok(namespace.map_or(name.clone(), |namespace| full_name(namespace, &name)))
}

/// A function as a request has it.
pub(in crate::responses) struct Placed<'v> {
    pub namespace: &'v str,
    pub name: &'v str,
}

/// Returns the namespace and the name of a function that the model calls by its full name, if a
/// request has it in a namespace. `tools` are the request's.
pub(in crate::responses) fn placed<'v>(tools: &'v Value, called: &str) -> Option<Placed<'v>> {
    let lists = tools.as_array()?.iter().filter_map(|item| {
        let is_namespace = item["type"] == "namespace";
        Some((item["name"].as_str()?, item["tools"].as_array()?)).filter(|_| is_namespace)
    });
    let mut all = lists.flat_map(|(namespace, list)| {
        let names = list.iter().filter_map(|tool| tool["name"].as_str());
        names.map(move |name| Placed { namespace, name })
    });
    all.find(|placed| full_name(placed.namespace, placed.name) == called)
}

/// Reads a tool, or those of a namespace.
pub(super) fn tool(place: &str, item: &Value) -> Result<Vec<Tool>, BadLine> {
    let fields = tools::object(place, item)?;
    match fields.text("type")? {
        Some("function") => Ok(vec![tools::tool(fields, "parameters")?]),
        Some(kind) if HOSTED.contains(&kind) => Ok(Vec::new()),
        Some("namespace") => {
            let namespace = name_of(fields, MAX_NAMESPACE_BYTES)?;
            tools::list(fields, |place, item| {
                let inner = tools::object(place, item)?;
                match (inner.text("type")?, item) {
                    (Some("function"), Value::Object(object)) => {
                        let name = full_name(namespace, name_of(inner, MAX_INNER_BYTES)?);
                        let mut object = object.clone();
                        object.insert("name".into(), name.into());
                        tools::tool(Fields::new(&object, place), "parameters")
                    }
                    _ => Err(tools::kind(inner, "\"function\"")),
                }
            })
        }
        _ => Err(tools::kind(fields, "\"function\" or \"namespace\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::tools::Choice;
    use crate::request::{Prompt, Request};
    use crate::responses::request;
    use serde_json::json;

    fn read(body: Value) -> Result<(Request, Value), BadLine> {
        request("id", body.to_string().as_bytes())
    }

    /// Tools of Codex 0.171, shortened.
    #[test]
    fn functions_of_a_namespace_have_full_names() {
        let (request, echo) = read(json!({
            "input": [
                {"type": "message", "id": "msg_1", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {"type": "function_call", "namespace": "multi_agent_v1", "name": "close_agent", "arguments": "{}", "call_id": "i"},
                {"type": "function_call_output", "call_id": "i", "output": "o"},
            ],
            "tools": [
                {"type": "function", "name": "exec_command", "strict": false, "parameters": {"type": "object"}},
                {"type": "namespace", "name": "multi_agent_v1", "description": "d", "tools": [
                    {"type": "function", "name": "close_agent", "parameters": {"type": "object"}},
                    {"type": "function", "name": "exec_command", "parameters": {"type": "object"}},
                ]},
                {"type": "web_search", "external_web_access": false},
            ],
            "tool_choice": {"type": "function", "namespace": "multi_agent_v1", "name": "close_agent"},
        }))
        .unwrap();
        let names: Vec<&str> = request
            .tools
            .list
            .iter()
            .map(|tool| tool.name.as_str())
            .collect();
        let full = "multi_agent_v1__close_agent";
        assert_eq!(
            names,
            ["exec_command", full, "multi_agent_v1__exec_command"]
        );
        assert_eq!(request.tools.choice, Choice::Named(full.into()));
        let Prompt::Messages(messages) = &request.prompt else {
            panic!("{request:?}");
        };
        assert_eq!(messages[1].calls[0].name, full);
        let of = |called| placed(&echo["tools"], called).map(|p| (p.namespace, p.name));
        assert_eq!(of(full), Some(("multi_agent_v1", "close_agent")));
        assert_eq!(of("exec_command"), None);
        for (tool, words) in [
            (
                json!({"type": "namespace", "tools": []}),
                "tools[0].name: missing",
            ),
            (
                json!({"type": "namespace", "name": "n", "tools": 7}),
                "tools[0].tools: 7",
            ),
            (
                json!({"type": "namespace", "name": "n", "tools": [{"type": "x"}]}),
                "tools[0].tools[0].type: \"x\"",
            ),
            (
                json!({"type": "namespace", "name": "n n", "tools": [{"type": "function", "name": "f"}]}),
                "tools[0].name: \"n n\"",
            ),
        ] {
            let bad = read(json!({"input": "a", "tools": [tool]})).unwrap_err();
            assert!(
                bad.message.starts_with(words),
                "{words:?} in {}",
                bad.message
            );
        }
        let many: Vec<Value> = (0..300)
            .map(|i| json!({"type": "function", "name": format!("f{i}")}))
            .collect();
        let space = |name| json!({"type": "namespace", "name": name, "tools": many});
        let bad = read(json!({"input": "a", "tools": [space("n"), space("m")]})).unwrap_err();
        assert!(bad.message.contains("at most 512 tools"), "{}", bad.message);
    }
}
