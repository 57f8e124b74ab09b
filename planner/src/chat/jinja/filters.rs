//! Filters and tests of Jinja2 that minijinja lacks or has otherwise.

use super::args::{all, bind, flag};
use super::json::to_json;
use super::{invalid, words};
use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, Error};

/// Adds the filters and tests.
pub(super) fn add(environment: &mut Environment<'static>) {
    environment.add_filter("tojson", to_json);
    environment.add_filter("attr", attribute);
    for name in ["default", "d"] {
        environment.add_filter(name, or_default);
    }
    environment.add_filter("string", string);
    environment.add_filter("pprint", |value: &Value| words::repr(value));
    environment.add_filter("xmlattr", xml_attributes);
    environment.add_filter("forceescape", |value: &Value| {
        let text = words::head(value, words::MAX_MADE_BYTES + 1);
        words::fits("forceescape", text.len())?;
        Ok::<_, Error>(Value::from_safe_string(escape(&text)))
    });
    environment.add_filter("striptags", strip_tags);
    environment.add_filter("urlencode", url_encode);
    environment.add_test("iterable", |value: &Value| {
        value.is_undefined() || is_sequence(value) || value.kind() == ValueKind::Iterable
    });
    environment.add_test("sequence", |value: &Value| {
        value.is_undefined() || is_sequence(value)
    });
    environment.add_test("mapping", |value: &Value| {
        value.kind() == ValueKind::Map && !words::is_namespace(value)
    });
    environment.add_test("callable", is_callable);
}

fn is_sequence(value: &Value) -> bool {
    match value.kind() {
        ValueKind::String | ValueKind::Bytes | ValueKind::Seq | ValueKind::Map => true,
        // A slice of a list is a list.
        ValueKind::Iterable => value.len().is_some(),
        _ => false,
    }
}

/// Whether a value is a function or a macro: an object that is neither a list nor a mapping.
fn is_callable(value: &Value) -> bool {
    let text = words::head(value, 10);
    value.as_object().is_some()
        && match value.kind() {
            ValueKind::Plain => true,
            ValueKind::Map => text.starts_with("<macro ") || text.starts_with("Variadic("),
            _ => false,
        }
}

/// Returns the value, or another where it is undefined or, if asked for, false.
fn or_default(value: &Value, args: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let [other, boolean] = bind("default", &all(args, named), ["default_value", "boolean"])?;
    if value.is_undefined() || (flag(&boolean) && !value.is_true()) {
        return Ok(other.unwrap_or_else(|| Value::from("")));
    }
    Ok(value.clone())
}

/// Gets an attribute, which the items of a mapping are not.
fn attribute(value: &Value, name: &str) -> Result<Value, Error> {
    let items_only = value.kind() == ValueKind::Map && !words::head(value, 1).starts_with('<');
    if items_only && value.downcast_object_ref::<Kwargs>().is_none() && !words::is_namespace(value)
    {
        return Ok(Value::UNDEFINED);
    }
    value.get_attr(name)
}

fn string(value: &Value) -> Result<Value, Error> {
    if value.kind() == ValueKind::String {
        return Ok(value.clone());
    }
    words::text(value).map(Value::from)
}

/// Escapes a text for HTML as Jinja2 does.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('\'', "&#39;")
        .replace('"', "&#34;")
}

fn xml_attributes(map: &Value, space: Option<bool>) -> Result<Value, Error> {
    let mut out = String::new();
    for key in map.try_iter()? {
        let value = map.get_item(&key)?;
        if value.is_none() || value.is_undefined() {
            continue;
        }
        let name = words::text(&key)?;
        if name.contains(|c: char| c.is_whitespace() || matches!(c, '/' | '>' | '=')) {
            return Err(invalid(format!(
                "xmlattr: '{name}' is no name of an attribute"
            )));
        }
        if space.unwrap_or(true) || !out.is_empty() {
            out.push(' ');
        }
        out.push_str(&format!(
            "{}=\"{}\"",
            escape(&name),
            escape(&words::text(&value)?)
        ));
    }
    Ok(Value::from_safe_string(out))
}

fn strip_tags(text: &str) -> String {
    let (mut out, mut rest) = (String::new(), text);
    while let Some(at) = rest.find('<') {
        let end = if rest[at..].starts_with("<!--") {
            rest[at..].find("-->").map(|end| end + 3)
        } else {
            rest[at..].find('>').map(|end| end + 1)
        };
        let Some(end) = end else { break };
        out.push_str(&rest[..at]);
        rest = &rest[at + end..];
    }
    out.push_str(rest);
    let words: Vec<&str> = out.split_whitespace().collect();
    words
        .join(" ")
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&#34;", "\"")
        .replace("&quot;", "\"")
        .replace("&#39;", "'")
        .replace("&amp;", "&")
}

fn url_encode(value: &Value) -> Result<String, Error> {
    if value.kind() == ValueKind::Map {
        let plus = |text: &str| percent_encode(text, false).replace("%20", "+");
        let mut pairs = Vec::new();
        for key in value.try_iter()? {
            let item = words::text(&value.get_item(&key)?)?;
            pairs.push(format!("{}={}", plus(&words::text(&key)?), plus(&item)));
        }
        return Ok(pairs.join("&"));
    }
    Ok(percent_encode(&words::text(value)?, true))
}

fn percent_encode(text: &str, keep_slash: bool) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'/' if keep_slash => out.push('/'),
            b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            byte if byte.is_ascii_alphanumeric() => out.push(char::from(byte)),
            byte => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}
