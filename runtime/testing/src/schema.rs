//! JSON schemas, as far as the OpenAPI document of the server uses them.

use serde_json::{Map, Value};

/// Keywords that say nothing of a value.
const NOTES: [&str; 2] = ["description", "contentMediaType"];

/// Checks a value by a schema whose references point into `document`.
///
/// # Errors
/// Where the value does not fit: the place and what is wrong there.
///
/// # Panics
/// When a schema has a keyword that is not known here, or a reference that leads nowhere.
pub fn check(document: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    let fields = schema.as_object().expect("a schema is an object");
    for (keyword, expected) in fields {
        let checked = match keyword.as_str() {
            "$ref" => check(document, target(document, expected), value),
            "type" | "const" | "enum" => simple(keyword, expected, value),
            "anyOf" => any_of(document, expected, value),
            "not" => match check(document, expected, value) {
                Ok(()) => Err(format!("is what it must not be: {expected}")),
                Err(_) => Ok(()),
            },
            "items" => elements(document, expected, value),
            "properties" => properties(document, expected, value),
            "required" => required(expected, value),
            "propertyNames" => names(document, expected, value),
            "additionalProperties" => additional(document, fields, expected, value),
            "pattern" => pattern(expected, value),
            "contentSchema" => content(document, expected, value),
            note if NOTES.contains(&note) => Ok(()),
            limit => limits(limit, expected, value),
        };
        checked?;
    }
    Ok(())
}

/// Returns the schema that a reference points to.
///
/// # Panics
/// When there is none.
pub fn target<'d>(document: &'d Value, reference: &Value) -> &'d Value {
    let path = reference.as_str().and_then(|path| path.strip_prefix('#'));
    let found = path.and_then(|path| document.pointer(path));
    found.unwrap_or_else(|| panic!("{reference} points nowhere"))
}

fn at<T>(place: &str, found: Result<T, String>) -> Result<T, String> {
    found.map_err(|error| format!("{place}: {error}"))
}

fn simple(keyword: &str, expected: &Value, value: &Value) -> Result<(), String> {
    let fits = match (keyword, expected) {
        ("const", expected) => is_equal(expected, value),
        (_, Value::Array(all)) if keyword == "enum" => all.iter().any(|one| is_equal(one, value)),
        (_, Value::Array(all)) => all.iter().any(|kind| is_kind(kind, value)),
        (_, kind) => is_kind(kind, value),
    };
    let wrong = || format!("{value} does not fit {keyword} {expected}");
    if fits { Ok(()) } else { Err(wrong()) }
}

/// Whether values are equal. Numbers count by value, so that 1 is 1.0.
fn is_equal(one: &Value, other: &Value) -> bool {
    match (one.as_f64(), other.as_f64()) {
        (Some(one), Some(other)) => one == other,
        _ => one == other,
    }
}

fn is_kind(kind: &Value, value: &Value) -> bool {
    match kind.as_str().expect("a type is a string") {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        kind => panic!("no such type: {kind}"),
    }
}

fn any_of(document: &Value, expected: &Value, value: &Value) -> Result<(), String> {
    let mut wrong = Vec::new();
    for schema in expected.as_array().expect("anyOf is an array") {
        match check(document, schema, value) {
            Ok(()) => return Ok(()),
            Err(error) => wrong.push(error),
        }
    }
    Err(format!("none of these fits: {}", wrong.join(" | ")))
}

fn elements(document: &Value, expected: &Value, value: &Value) -> Result<(), String> {
    let mut items = value.as_array().into_iter().flatten().enumerate();
    items.try_for_each(|(i, item)| at(&format!("[{i}]"), check(document, expected, item)))
}

fn properties(document: &Value, expected: &Value, value: &Value) -> Result<(), String> {
    let all = expected
        .as_object()
        .expect("properties are an object")
        .iter();
    let mut there = all.filter_map(|(name, schema)| Some((name, schema, value.get(name)?)));
    there.try_for_each(|(name, schema, value)| at(name, check(document, schema, value)))
}

fn required(expected: &Value, value: &Value) -> Result<(), String> {
    let Value::Object(fields) = value else {
        return Ok(());
    };
    let mut names = expected.as_array().expect("required is an array").iter();
    let lacks = |name: &&Value| !fields.contains_key(name.as_str().expect("a name"));
    names
        .find(lacks)
        .map_or(Ok(()), |name| Err(format!("{name} is missing")))
}

fn names(document: &Value, expected: &Value, value: &Value) -> Result<(), String> {
    let keys = value.as_object().into_iter().flat_map(Map::keys);
    let mut keys = keys.map(|key| Value::from(key.as_str()));
    keys.try_for_each(|key| check(document, expected, &key))
}

fn additional(
    document: &Value,
    fields: &Map<String, Value>,
    expected: &Value,
    value: &Value,
) -> Result<(), String> {
    let known = fields.get("properties").unwrap_or(&Value::Null);
    let others = value.as_object().into_iter().flatten();
    let mut others = others.filter(|(name, _)| known.get(name.as_str()).is_none());
    others.try_for_each(|(name, value)| at(name, check(document, expected, value)))
}

/// Checks the JSON in a text.
fn content(document: &Value, expected: &Value, value: &Value) -> Result<(), String> {
    let Some(text) = value.as_str() else {
        return Ok(());
    };
    let parsed = serde_json::from_str(text).map_err(|error| format!("{text:?}: {error}"))?;
    at("content", check(document, expected, &parsed))
}

/// Checks a pattern of the one kind that is used: a class of characters with a number of them.
fn pattern(expected: &Value, value: &Value) -> Result<(), String> {
    let Some(text) = value.as_str() else {
        return Ok(());
    };
    let pattern = expected.as_str().expect("a pattern is a string");
    let parts = pattern
        .strip_prefix("^[")
        .and_then(|rest| rest.strip_suffix("}$"))
        .and_then(|rest| rest.split_once("]{"))
        .and_then(|(class, counts)| Some((class, counts.split_once(',')?)));
    let (class, (least, most)) = parts.unwrap_or_else(|| panic!("another kind: {pattern}"));
    let range: (usize, usize) = (
        least.parse().expect("a count"),
        most.parse().expect("a count"),
    );
    let n = text.chars().count();
    let fits = (range.0..=range.1).contains(&n) && text.chars().all(|c| is_in(class, c));
    if fits {
        Ok(())
    } else {
        Err(format!("{text:?} does not match {pattern}"))
    }
}

/// Whether a class such as `a-z_` has a character.
fn is_in(class: &str, c: char) -> bool {
    let class: Vec<char> = class.chars().collect();
    let mut i = 0;
    while i < class.len() {
        let is_range = i + 2 < class.len() && class[i + 1] == '-';
        let (last, step) = if is_range {
            (class[i + 2], 3)
        } else {
            (class[i], 1)
        };
        if (class[i]..=last).contains(&c) {
            return true;
        }
        i += step;
    }
    false
}

fn limits(keyword: &str, expected: &Value, value: &Value) -> Result<(), String> {
    let limit = expected
        .as_f64()
        .unwrap_or_else(|| panic!("no such keyword: {keyword}"));
    let length = |n: Option<usize>| n.map(|n| n as f64);
    let (found, is_least) = match keyword {
        "minimum" | "exclusiveMinimum" => (value.as_f64(), true),
        "maximum" => (value.as_f64(), false),
        "minLength" => (
            length(value.as_str().map(|text| text.chars().count())),
            true,
        ),
        "maxLength" => (
            length(value.as_str().map(|text| text.chars().count())),
            false,
        ),
        "minItems" => (length(value.as_array().map(Vec::len)), true),
        "maxItems" => (length(value.as_array().map(Vec::len)), false),
        "maxProperties" => (length(value.as_object().map(Map::len)), false),
        _ => panic!("no such keyword: {keyword}"),
    };
    let is_outside = |found: f64| match keyword {
        "exclusiveMinimum" => found <= limit,
        _ if is_least => found < limit,
        _ => found > limit,
    };
    match found {
        Some(found) if is_outside(found) => Err(format!("{found} is outside {keyword} {limit}")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_fit_or_say_where_they_do_not() {
        let document = json!({ "a": { "type": "integer", "minimum": 1 } });
        let schema = json!({
            "type": "object", "required": ["n"],
            "properties": { "n": { "$ref": "#/a" }, "list": { "type": ["array", "null"], "items": { "enum": ["x", 1] } },
                "json": { "type": "string", "contentMediaType": "application/json", "contentSchema": { "$ref": "#/a" } } },
            "propertyNames": { "pattern": "^[a-z_-]{1,5}$" },
            "additionalProperties": { "anyOf": [{ "const": true }, { "type": "string", "maxLength": 2 }] },
        });
        let fits = |value: Value| check(&document, &schema, &value);
        for good in [
            json!({"n": 1}),
            json!({"n": 2.0, "list": null, "o_-": "ab"}),
            json!({"n": 7, "list": ["x", 1.0], "b": true}),
            json!({"n": 7, "json": "7"}),
        ] {
            assert_eq!(fits(good), Ok(()));
        }
        for (bad, place) in [
            (json!([]), "[] does not"),
            (json!({}), "\"n\" is missing"),
            (json!({"n": 0}), "n: 0 is outside"),
            (json!({"n": 1.5}), "n: 1.5"),
            (json!({"n": 1, "list": ["y"]}), "list: [0]: \"y\""),
            (json!({"n": 1, "o": "abc"}), "o: none of these"),
            (json!({"n": 1, "json": "{"}), "json: \"{\""),
            (json!({"n": 1, "json": "0"}), "json: content: 0 is outside"),
            (json!({"n": 1, "longer": "a"}), "\"longer\" does not match"),
        ] {
            let error = fits(bad).unwrap_err();
            assert!(error.starts_with(place), "{place} in {error}");
        }
    }
}
