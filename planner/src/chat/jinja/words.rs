//! Values as Python writes them.

use super::invalid;
use minijinja::Error;
use minijinja::value::{Value, ValueKind};
use std::fmt::{self, Write};

/// Deepest value that is written as text.
pub(super) const MAX_DEPTH: usize = 200;

/// Longest text that padding may add, in characters.
pub(super) const MAX_PADDED_CHARS: usize = 1 << 20;

/// Longest text that one call may make, in bytes: that of a whole conversation.
pub(super) const MAX_MADE_BYTES: usize = 32 << 20;

/// Checks that a text of `bytes`, or more, may be made.
///
/// # Errors
/// When it is longer than one call may make. `what` is called.
pub(super) fn fits(what: &str, bytes: usize) -> Result<(), Error> {
    if bytes <= MAX_MADE_BYTES {
        return Ok(());
    }
    Err(invalid(format!(
        "{what}: a text of more than {MAX_MADE_BYTES} bytes"
    )))
}

/// Returns a text with `old` replaced by `new`, at most `count` times.
///
/// # Errors
/// When it is too long.
pub(super) fn replaced(text: &str, old: &str, new: &str, count: usize) -> Result<String, Error> {
    if new.len() > old.len() {
        let n = text.matches(old).take(count).count();
        let more = n.saturating_mul(new.len() - old.len());
        fits("replace", text.len().saturating_add(more))?;
    }
    Ok(text.replacen(old, new, count))
}

/// The beginning of a text that is being written.
struct Head {
    text: String,
    max_bytes: usize,
}

impl Write for Head {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.max_bytes - self.text.len();
        let fitting = &text[..text.floor_char_boundary(room)];
        self.text.push_str(fitting);
        if fitting.len() == text.len() {
            Ok(())
        } else {
            Err(fmt::Error)
        }
    }
}

/// Returns the beginning of minijinja's text of a value, which may be large beyond all memory.
pub(super) fn head(value: &Value, max_bytes: usize) -> String {
    let text = String::new();
    let mut head = Head { text, max_bytes };
    // An error only tells that there is more.
    let _ = write!(head, "{value}");
    head.text
}

/// Returns whether Python may write a value otherwise than minijinja does.
pub(super) fn differs(value: &Value) -> bool {
    match value.kind() {
        ValueKind::Number => !value.is_integer(),
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map | ValueKind::Bytes => true,
        _ => false,
    }
}

/// Returns Python's `str(value)`.
pub(super) fn text(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    match value.kind() {
        ValueKind::String => out.push_str(value.as_str().unwrap_or_default()),
        ValueKind::Undefined => {}
        _ => write_repr(value, 0, &mut out)?,
    }
    Ok(out)
}

/// Returns Python's `repr(value)`.
pub(super) fn repr(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    write_repr(value, 0, &mut out)?;
    Ok(out)
}

/// Appends Python's `repr(value)`.
fn write_repr(value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(invalid("a value is nested too deeply to be written"));
    }
    fits("str", out.len())?;
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::Number if !value.is_integer() => {
            out.push_str(&float(f64::try_from(value.clone())?));
        }
        ValueKind::String => quote(value.as_str().unwrap_or_default(), out),
        ValueKind::Bytes => {
            out.push('b');
            let bytes = value.as_bytes().unwrap_or_default();
            let mut quoted = String::new();
            quote(
                &bytes.iter().map(|&b| char::from(b)).collect::<String>(),
                &mut quoted,
            );
            for c in quoted.chars() {
                match c {
                    '\u{80}'.. => out.push_str(&format!("\\x{:02x}", u32::from(c))),
                    c => out.push(c),
                }
            }
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let tuple = value.is_tuple();
            out.push(if tuple { '(' } else { '[' });
            let mut len = 0;
            for item in value.try_iter()? {
                if len > 0 {
                    out.push_str(", ");
                }
                write_repr(&item, depth + 1, out)?;
                len += 1;
            }
            if tuple && len == 1 {
                out.push(',');
            }
            out.push(if tuple { ')' } else { ']' });
        }
        ValueKind::Map if is_namespace(value) && depth < MAX_DEPTH => {
            out.push_str("<Namespace ");
            write_items(value, depth, out)?;
            out.push('>');
        }
        ValueKind::Map => write_items(value, depth, out)?,
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// Whether a value is a namespace, whose items are attributes.
pub(super) fn is_namespace(value: &Value) -> bool {
    value
        .as_object()
        .is_some_and(|object| object.type_name().ends_with("::Namespace"))
}

/// Appends the items of a mapping.
fn write_items(value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
    out.push('{');
    for (n, key) in value.try_iter()?.enumerate() {
        if n > 0 {
            out.push_str(", ");
        }
        write_repr(&key, depth + 1, out)?;
        out.push_str(": ");
        write_repr(&value.get_item(&key)?, depth + 1, out)?;
    }
    out.push('}');
    Ok(())
}

/// Appends a text in Python's quotes.
fn quote(text: &str, out: &mut String) {
    let mark = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(mark);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == mark => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&match u32::from(c) {
                code @ ..0x100 => format!("\\x{code:02x}"),
                code => format!("\\u{code:04x}"),
            }),
            c => out.push(c),
        }
    }
    out.push(mark);
}

/// Returns Python's `repr` of a float: the shortest digits that read back equal, with an exponent
/// below 1e-4 and from 1e16.
pub(super) fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = x.to_string();
    if plain.contains('.') {
        plain
    } else {
        plain + ".0"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_pythons() {
        for (x, text) in [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (1e16, "1e+16"),
            (123_456_789_012_345_680.0, "1.2345678901234568e+17"),
            (9_999_999_999_999_998.0, "9999999999999998.0"),
            (1e-4, "0.0001"),
            (1.5e-5, "1.5e-05"),
            (1e300, "1e+300"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(float(x), text);
        }
    }
}
