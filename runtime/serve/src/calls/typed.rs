//! Values of parameters that forms write without quotes, by the schema of the tool.

use crate::request::tools::Tool;
use crate::request::value;
use serde_json::Value;

/// Returns the value that a text is, as the schema of the parameter has it. A text that does not suit
/// its schema stays a string, so that nothing of it is lost.
pub(super) fn typed(tools: &[Tool], name: &str, key: &str, text: &str) -> Value {
    let tool = tools.iter().find(|tool| tool.name == name);
    let schema = tool.and_then(|tool| tool.parameters.get("properties")?.get(key));
    let mut types = Vec::new();
    if let (Some(schema), Some(tool)) = (schema, tool) {
        gather(schema, &tool.parameters, MAX_REFERENCES, &mut types);
    }
    if types.is_empty() {
        // Without a type, only what can be nothing else is taken for JSON.
        let is_nested = text.trim_start().starts_with(['{', '[']);
        let parsed = is_nested.then(|| value::parse(text.as_bytes()).ok());
        return parsed.flatten().unwrap_or_else(|| text.into());
    }
    let trimmed = text.trim();
    if types.contains(&"null") && matches!(trimmed, "null" | "None") {
        return Value::Null;
    }
    if types.contains(&"string") {
        return text.into();
    }
    let parsed = match trimmed {
        "True" => Some(true.into()),
        "False" => Some(false.into()),
        _ => value::parse(trimmed.as_bytes()).ok(),
    };
    let parsed = parsed.filter(|value| types.iter().any(|name| is_a(value, name)));
    parsed.unwrap_or_else(|| text.into())
}

/// Whether a value has a type of JSON schemas.
fn is_a(value: &Value, name: &str) -> bool {
    match name {
        "integer" => {
            value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|n| n.fract() == 0.0)
        }
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "object" => value.is_object(),
        "array" => value.is_array(),
        "null" => value.is_null(),
        _ => true,
    }
}

/// Most references that are followed, one after the other.
pub(crate) const MAX_REFERENCES: usize = 8;

/// Gathers the types that a schema within `root` allows.
pub(crate) fn gather<'s>(
    schema: &'s Value,
    root: &'s Value,
    left: usize,
    types: &mut Vec<&'s str>,
) {
    let reference = schema.get("$ref").and_then(Value::as_str);
    let referred = reference.and_then(|text| root.pointer(text.strip_prefix('#')?));
    if let (Some(referred), Some(left)) = (referred, left.checked_sub(1)) {
        gather(referred, root, left, types);
    }
    match schema.get("type") {
        Some(Value::String(name)) => types.push(name),
        Some(Value::Array(names)) => types.extend(names.iter().filter_map(Value::as_str)),
        _ => {}
    }
    for name in ["anyOf", "oneOf", "allOf"] {
        let of = schema.get(name).and_then(Value::as_array);
        of.into_iter()
            .flatten()
            .for_each(|schema| gather(schema, root, left, types));
    }
    let values = schema.get("enum").and_then(Value::as_array);
    let all_strings = |values: &Vec<Value>| values.iter().all(Value::is_string);
    if types.is_empty() && values.is_some_and(all_strings) {
        types.push("string");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn texts_are_what_their_schema_says() {
        let parameters = json!({"type": "object", "properties": {
            "s": {"type": "string"}, "i": {"type": "integer"}, "n": {"type": "number"}, "b": {"type": "boolean"},
            "o": {"type": "object"}, "a": {"type": "array"}, "e": {"enum": ["1", "x"]},
            "r": {"$ref": "#/$defs/r"}, "loop": {"$ref": "#/properties/loop"},
            "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "both": {"type": ["integer", "null"]},
        }, "$defs": {"r": {"type": "integer"}}});
        let tools = [Tool {
            name: "f".into(),
            description: None,
            parameters,
            strict: false,
        }];
        let value = |key: &str, text: &str| typed(&tools, "f", key, text);
        for (key, text, expected) in [
            ("s", "12", json!("12")),
            ("s", " a\nb ", json!(" a\nb ")),
            ("i", " 12 ", json!(12)),
            ("i", "12.5", json!("12.5")),
            ("r", "3", json!(3)),
            ("loop", "3", json!("3")),
            ("n", "1.5", json!(1.5)),
            ("b", "true", json!(true)),
            ("b", "False", json!(false)),
            ("b", "perhaps", json!("perhaps")),
            ("o", "{\"a\": [1]}", json!({"a": [1]})),
            ("a", "[1, 2]", json!([1, 2])),
            ("a", "{}", json!("{}")),
            ("e", "1", json!("1")),
            ("maybe", "null", json!(null)),
            ("maybe", "12", json!("12")),
            ("both", "7", json!(7)),
            ("both", "null", json!(null)),
            ("unknown", "12", json!("12")),
            ("unknown", "{\"a\": 1}", json!({"a": 1})),
            ("unknown", "{a}", json!("{a}")),
        ] {
            assert_eq!(value(key, text), expected, "{key} {text}");
        }
        assert_eq!(typed(&tools, "g", "i", "12"), json!("12"));
    }
}
