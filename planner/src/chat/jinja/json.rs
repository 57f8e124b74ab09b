//! The filter `tojson`: Python's `json.dumps`, which models were trained on.

use super::invalid;
use super::words::{MAX_DEPTH, fits, float};
use minijinja::Error;
use minijinja::value::{Kwargs, Rest, Value, ValueKind};

/// How JSON is laid out.
struct Layout {
    /// What a level is indented by, if each item has a line.
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

/// Serializes a value as transformers does: `tojson(ensure_ascii=False, indent=None,
/// separators=None, sort_keys=False)`, without escapes for HTML.
pub(super) fn to_json(value: &Value, args: Rest<Value>, options: Kwargs) -> Result<Value, Error> {
    const NAMES: [&str; 4] = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let mut options_by_place: [Option<Value>; 4] = [const { None }; 4];
    if args.len() > NAMES.len() {
        return Err(invalid("tojson: too many arguments"));
    }
    for (place, value) in options_by_place.iter_mut().zip(args.iter()) {
        *place = Some(value.clone());
    }
    for (place, name) in options_by_place.iter_mut().zip(NAMES) {
        if options.has(name) {
            *place = Some(options.get(name)?);
        }
    }
    options.assert_all_used()?;
    let [ensure_ascii, indent, separators, sort_keys] = options_by_place;
    let set = |option: Option<Value>| option.filter(|value| !value.is_none());
    let indent = set(indent).map(|indent| match indent.as_str() {
        Some(text) => text.to_string(),
        None => " ".repeat(indent.as_usize().unwrap_or(0).min(64)),
    });
    let (item, key) = match set(separators) {
        Some(pair) => (
            pair.get_item_by_index(0)?.to_string(),
            pair.get_item_by_index(1)?.to_string(),
        ),
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
    };
    let layout = Layout {
        indent,
        item_separator: item,
        key_separator: key,
        ensure_ascii: ensure_ascii.is_some_and(|value| value.is_true()),
        sort_keys: sort_keys.is_some_and(|value| value.is_true()),
    };
    // A line has as many indents as its value is deep.
    let indent = layout.indent.as_ref().map_or(0, String::len);
    fits("tojson", indent.saturating_mul(MAX_DEPTH))?;
    let mut out = String::new();
    layout.write(value, 0, &mut out)?;
    Ok(Value::from(out))
}

impl Layout {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid("tojson: nested too deeply"));
        }
        fits("tojson", out.len())?;
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => out.push_str(&value.to_string()),
            ValueKind::Number => out.push_str(&json_float(f64::try_from(value.clone())?)),
            ValueKind::String => self.quote(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                out.push('[');
                let mut any = false;
                for item in value.try_iter()? {
                    self.separate(&mut any, depth, out);
                    self.write(&item, depth + 1, out)?;
                }
                self.close(any, depth, ']', out);
            }
            ValueKind::Map => self.write_map(value, depth, out)?,
            kind => {
                return Err(invalid(format!(
                    "tojson: no JSON for a value of type {kind}"
                )));
            }
        }
        Ok(())
    }

    fn write_map(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if self.sort_keys {
            keys.sort();
        }
        out.push('{');
        let mut any = false;
        for key in keys {
            self.separate(&mut any, depth, out);
            let name = match key.kind() {
                ValueKind::String => key.to_string(),
                ValueKind::None => "null".into(),
                ValueKind::Bool => key.to_string().to_lowercase(),
                ValueKind::Number if key.is_integer() => key.to_string(),
                ValueKind::Number => json_float(f64::try_from(key.clone())?),
                kind => {
                    return Err(invalid(format!(
                        "tojson: a key is of type {kind}, expected a string"
                    )));
                }
            };
            self.quote(&name, out);
            out.push_str(&self.key_separator);
            self.write(&value.get_item(&key)?, depth + 1, out)?;
        }
        self.close(any, depth, '}', out);
        Ok(())
    }

    /// Writes what is before an item.
    fn separate(&self, any: &mut bool, depth: usize, out: &mut String) {
        if std::mem::replace(any, true) {
            out.push_str(&self.item_separator);
        }
        self.break_line(depth + 1, out);
    }

    fn close(&self, any: bool, depth: usize, mark: char, out: &mut String) {
        if any {
            self.break_line(depth, out);
        }
        out.push(mark);
    }

    fn break_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    fn quote(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                '\0'..' ' => out.push_str(&format!("\\u{:04x}", u32::from(c))),
                '\u{7f}'.. if self.ensure_ascii && c != '\u{7f}' => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

fn json_float(x: f64) -> String {
    match x {
        x if x.is_nan() => "NaN".into(),
        f64::INFINITY => "Infinity".into(),
        f64::NEG_INFINITY => "-Infinity".into(),
        x => float(x),
    }
}
