//! The forms in which families of models write calls.

use super::Call;
use super::reader::{Fault, Read, Reader};
use super::typed::typed;
use crate::request::tools::Tool;
use serde_json::{Map, Value};

/// Reads calls that are JSON between two marks: objects one after the other, or an array of them.
pub(super) fn json(reader: &mut Reader<'_>, marks: [&str; 2], _: &[Tool]) -> Read<Vec<Call>> {
    let [open, close] = marks;
    reader.expect(open)?;
    let mut calls = Vec::new();
    loop {
        match reader.json()? {
            Value::Array(items) => {
                for item in items {
                    calls.push(call_of(item)?);
                }
            }
            item => calls.push(call_of(item)?),
        }
        while {
            reader.space();
            reader.skip(",") || reader.skip(";")
        } {}
        if !reader.is_at("{") && !reader.is_at("[") {
            break;
        }
    }
    if close.is_empty() {
        return Ok(calls);
    }
    reader.close(close)?;
    Ok(calls)
}

/// Returns the call that an object is: a name, and arguments under one of the names for them.
fn call_of(item: Value) -> Read<Call> {
    let Value::Object(mut fields) = item else {
        return Err(Fault::Other);
    };
    if let Some(Value::Object(inner)) = fields.get("function") {
        let mut inner = inner.clone();
        for (name, value) in fields {
            if name != "function" {
                inner.entry(name).or_insert(value);
            }
        }
        fields = inner;
    }
    let mut take = |names: &[&str]| names.iter().find_map(|name| fields.shift_remove(*name));
    let name = match take(&["name", "tool_name", "function"]) {
        Some(Value::String(name)) if !name.is_empty() => name,
        _ => return Err(Fault::Other),
    };
    let arguments = match take(&["arguments", "parameters", "args"]) {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(Value::String(text)) => match crate::request::value::parse(text.as_bytes()) {
            Ok(Value::Object(arguments)) => arguments,
            _ => return Err(Fault::Other),
        },
        Some(_) => return Err(Fault::Other),
    };
    let id = match take(&["id", "tool_call_id"]) {
        Some(Value::String(id)) if !id.is_empty() => Some(id),
        _ => None,
    };
    Ok(Call {
        id,
        name,
        arguments: Value::Object(arguments).to_string(),
    })
}

/// Returns a call with arguments that are a JSON object.
pub(super) fn with_object(name: &str, arguments: Value) -> Read<Call> {
    let name = name.trim();
    let is_name = !name.is_empty() && !name.contains(['<', '{', '"']) && !name.contains('\n');
    if !is_name || !arguments.is_object() {
        return Err(Fault::Other);
    }
    Ok(Call {
        id: None,
        name: name.to_string(),
        arguments: arguments.to_string(),
    })
}

/// Reads the form of Qwen3-Coder: `<function=NAME>`, `<parameter=KEY>` with a value on lines of its
/// own, `</parameter>`, `</function>`, in a pair of marks that models forget at times. Functionary has
/// a JSON object instead of parameters.
pub(super) fn functions(
    reader: &mut Reader<'_>,
    marks: [&str; 2],
    tools: &[Tool],
) -> Read<Vec<Call>> {
    let mut ahead = *reader;
    let is_marked = ahead.skip(marks[0]) && !marks[0].starts_with("<function=");
    if is_marked {
        ahead.space();
        if ahead.is_at("{") {
            // The form of earlier models of the family.
            return json(reader, marks, tools);
        }
        *reader = ahead;
    }
    let mut calls = Vec::new();
    loop {
        reader.space();
        if !calls.is_empty() && !reader.is_at("<function=") {
            break;
        }
        reader.expect("<function=")?;
        let name = reader.until(">")?;
        reader.space();
        if reader.is_at("{") {
            let arguments = reader.json()?;
            calls.push(with_object(name, arguments)?);
            reader.close("</function>")?;
            continue;
        }
        let mut arguments = Map::new();
        while reader.is_at("<parameter=") {
            reader.expect("<parameter=")?;
            let key = reader.until(">")?.trim();
            let text = reader.until("</parameter>")?;
            let text = text.strip_prefix('\n').unwrap_or(text);
            let text = text.strip_suffix('\n').unwrap_or(text);
            arguments.insert(key.to_string(), typed(tools, name.trim(), key, text));
            reader.space();
        }
        calls.push(with_object(name, arguments.into())?);
        reader.close("</function>")?;
    }
    if is_marked {
        reader.close(marks[1])?;
    }
    Ok(calls)
}

/// Reads the form of GLM: a name, then pairs of `<arg_key>` and `<arg_value>`.
pub(super) fn pairs(reader: &mut Reader<'_>, marks: [&str; 2], tools: &[Tool]) -> Read<Vec<Call>> {
    reader.expect(marks[0])?;
    let name = reader.before(&['<'])?.trim();
    let mut arguments = Map::new();
    loop {
        reader.space();
        if !reader.skip("<arg_key>") {
            break;
        }
        let key = reader.until("</arg_key>")?.trim();
        reader.space();
        reader.expect("<arg_value>")?;
        let text = reader.until("</arg_value>")?;
        arguments.insert(key.to_string(), typed(tools, name, key, text));
    }
    reader.close(marks[1])?;
    Ok(vec![with_object(name, arguments.into())?])
}

/// Reads the form of DeepSeek V3 and R1 (a word for the kind of tool, then the name, then JSON in a
/// fence) and of V3.1 (a name, then JSON).
pub(super) fn deepseek(reader: &mut Reader<'_>, marks: [&str; 2], _: &[Tool]) -> Read<Vec<Call>> {
    reader.expect(marks[0])?;
    let mut calls = Vec::new();
    loop {
        reader.space();
        if !calls.is_empty() && !reader.is_at("<｜tool▁call▁begin｜>") {
            break;
        }
        reader.expect("<｜tool▁call▁begin｜>")?;
        let head = reader.until("<｜tool▁sep｜>")?;
        reader.space();
        let call = if reader.is_at("{") {
            with_object(head, reader.json()?)?
        } else {
            let name = reader.until("\n")?;
            reader.space();
            reader.expect("```json")?;
            let arguments = reader.json()?;
            reader.close("```")?;
            with_object(name, arguments)?
        };
        calls.push(call);
        reader.close("<｜tool▁call▁end｜>")?;
    }
    reader.close(marks[1])?;
    Ok(calls)
}

/// Reads the form of Kimi K2: the identifier `functions.NAME:NUMBER`, then JSON.
pub(super) fn kimi(reader: &mut Reader<'_>, marks: [&str; 2], _: &[Tool]) -> Read<Vec<Call>> {
    reader.expect(marks[0])?;
    let mut calls = Vec::new();
    loop {
        reader.space();
        if !calls.is_empty() && !reader.is_at("<|tool_call_begin|>") {
            break;
        }
        reader.expect("<|tool_call_begin|>")?;
        let id = reader.until("<|tool_call_argument_begin|>")?.trim();
        let name = id.strip_prefix("functions.").unwrap_or(id);
        let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let name = match name.rsplit_once(':') {
            Some((name, number)) if is_number(number) => name,
            _ => name,
        };
        let arguments = reader.json()?;
        calls.push(Call {
            id: Some(id.to_string()),
            ..with_object(name, arguments)?
        });
        reader.close("<|tool_call_end|>")?;
    }
    reader.close(marks[1])?;
    Ok(calls)
}

/// Reads the form of MiniMax M2: `<invoke name="NAME">` with elements `<parameter name="KEY">`.
pub(super) fn invokes(
    reader: &mut Reader<'_>,
    marks: [&str; 2],
    tools: &[Tool],
) -> Read<Vec<Call>> {
    elements(reader, marks, "", tools)
}

/// Reads the form of DeepSeek V3.2: that of MiniMax with a prefix in each tag, where a parameter says
/// whether it is a string.
pub(super) fn dsml(reader: &mut Reader<'_>, marks: [&str; 2], tools: &[Tool]) -> Read<Vec<Call>> {
    elements(reader, marks, "｜DSML｜", tools)
}

fn elements(
    reader: &mut Reader<'_>,
    marks: [&str; 2],
    prefix: &str,
    tools: &[Tool],
) -> Read<Vec<Call>> {
    let invoke = format!("<{prefix}invoke name=");
    let parameter = format!("<{prefix}parameter name=");
    let [invoke_end, parameter_end] =
        ["invoke", "parameter"].map(|name| format!("</{prefix}{name}>"));
    reader.expect(marks[0])?;
    let mut calls = Vec::new();
    loop {
        reader.space();
        if !calls.is_empty() && !reader.is_at(&invoke) {
            break;
        }
        reader.expect(&invoke)?;
        let name = unquoted(reader.until(">")?);
        let mut arguments = Map::new();
        loop {
            reader.space();
            if !reader.skip(&parameter) {
                break;
            }
            let (key, is_string) = attributes(reader.until(">")?);
            let text = reader.until(&parameter_end)?;
            let value = match is_string {
                None => typed(tools, name, key, text),
                Some(true) => text.into(),
                Some(false) => crate::request::value::parse(text.trim().as_bytes())
                    .unwrap_or_else(|_| text.into()),
            };
            arguments.insert(key.to_string(), value);
        }
        calls.push(with_object(name, arguments.into())?);
        reader.close(&invoke_end)?;
    }
    reader.close(marks[1])?;
    Ok(calls)
}

/// Returns the name of a parameter, and whether it says that it is a string.
fn attributes(text: &str) -> (&str, Option<bool>) {
    match text.rsplit_once(" string=") {
        Some((key, kind)) => (unquoted(key), Some(unquoted(kind) == "true")),
        None => (unquoted(text), None),
    }
}

fn unquoted(text: &str) -> &str {
    text.trim().trim_matches(['"', '\''])
}

/// Reads the forms of Mistral after its mark: an array of calls, or a name, perhaps an identifier, and
/// an object.
pub(super) fn mistral(
    reader: &mut Reader<'_>,
    marks: [&str; 2],
    tools: &[Tool],
) -> Read<Vec<Call>> {
    let mut ahead = *reader;
    ahead.expect(marks[0])?;
    ahead.space();
    if ahead.is_at("[{") || ahead.is_at("[ ") || ahead.is_at("[\n") || ahead.is_at("[]") {
        return json(reader, [marks[0], ""], tools);
    }
    reader.expect(marks[0])?;
    reader.space();
    let name = reader.before(&['[', '{'])?;
    let id = if reader.skip("[CALL_ID]") {
        Some(reader.before(&['[', '{'])?.trim())
    } else {
        None
    };
    reader.skip("[ARGS]");
    let call = with_object(name, reader.json()?)?;
    Ok(vec![Call {
        id: id.filter(|id| !id.is_empty()).map(str::to_string),
        ..call
    }])
}

/// Reads a call of Llama 3, which is an object by itself: a call only if a tool has its name.
pub(super) fn bare(reader: &mut Reader<'_>, marks: [&str; 2], tools: &[Tool]) -> Read<Vec<Call>> {
    reader.space();
    reader.skip(";");
    reader.space();
    reader.skip(marks[0]);
    let Value::Object(fields) = reader.json()? else {
        return Err(Fault::Other);
    };
    let has_arguments = fields.contains_key("parameters") || fields.contains_key("arguments");
    let call = call_of(Value::Object(fields))?;
    if has_arguments && tools.iter().any(|tool| tool.name == call.name) {
        Ok(vec![call])
    } else {
        Err(Fault::Other)
    }
}
