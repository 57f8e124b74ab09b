//! Python's `%`: the rest of a floor division, or a text formatted as by C's `printf`.

use super::words::MAX_PADDED_CHARS;
use super::{invalid, words};
use minijinja::Error;
use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Value, ValueKind};

/// A conversion of a format.
struct Conversion<'a> {
    /// Name of the value, if values have names.
    name: Option<&'a str>,
    /// Flags, width, and precision.
    options: String,
    letter: char,
}

/// Reads the conversion behind a `%`. Returns it with what follows.
fn conversion(text: &str) -> Result<(Conversion<'_>, &str), Error> {
    let unended = || invalid("%: a conversion without its end");
    let (name, spec) = match text.strip_prefix('(') {
        Some(named) => {
            let (name, spec) = named.split_once(')').ok_or_else(unended)?;
            (Some(name), spec)
        }
        None => (None, text),
    };
    let sizes = ['h', 'l', 'L'];
    let end = spec.find(|c: char| c == '%' || (c.is_alphabetic() && !sizes.contains(&c)));
    let (options, rest) = spec.split_at(end.ok_or_else(unended)?);
    let letter = rest.chars().next().ok_or_else(unended)?;
    let conversion = Conversion {
        name,
        options: options.replace(sizes, ""),
        letter,
    };
    Ok((conversion, &rest[letter.len_utf8()..]))
}

/// Checks that no width or precision of a conversion, written out or in `widths`, is larger than
/// padding may be.
///
/// # Errors
/// When one does.
pub(super) fn fits_width(conversion: &str, widths: &[Value]) -> Result<(), Error> {
    let written = conversion.split(|c: char| !c.is_ascii_digit());
    let mut written = written.filter(|digits| !digits.is_empty());
    let is_large = |digits: &str| !digits.parse().is_ok_and(|n: usize| n <= MAX_PADDED_CHARS);
    let given = widths.iter();
    let mut given = given.filter_map(|width| i128::try_from(width.clone()).ok());
    if written.any(is_large) || given.any(|n| n.unsigned_abs() > MAX_PADDED_CHARS as u128) {
        return Err(invalid(format!(
            "a width of a format, expected at most {MAX_PADDED_CHARS}"
        )));
    }
    Ok(())
}

/// Formats `values` as C's `printf` does, one conversion after the other.
fn formatted(text: &str, values: &Value) -> Result<String, Error> {
    let mut args = if values.is_tuple() {
        values.try_iter()?.collect::<Vec<_>>()
    } else {
        vec![values.clone()]
    }
    .into_iter();
    let short = || invalid("%: fewer values than the format has conversions");
    let (mut out, mut rest) = (String::new(), text);
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        let (conversion, after) = conversion(&rest[at + 1..])?;
        rest = after;
        if conversion.letter == '%' {
            out.push('%');
            continue;
        }
        let widths = conversion.options.matches('*').count();
        let mut needed: Vec<Value> = args.by_ref().take(widths).collect();
        let value = match conversion.name {
            Some(name) => values.get_item(&Value::from(name))?,
            None => args.next().ok_or_else(short)?,
        };
        // Texts are made here, since they are Python's.
        let (letter, value) = match conversion.letter {
            's' => ('s', Value::from(words::text(&value)?)),
            'r' | 'a' => ('s', Value::from(words::repr(&value)?)),
            'd' | 'i' | 'u' if value.is_number() && !value.is_integer() => {
                ('d', Value::from(f64::try_from(value)?.trunc() as i128))
            }
            letter => (letter, value),
        };
        needed.push(value);
        let single = format!("%{}{letter}", conversion.options);
        fits_width(&single, &needed[..needed.len().min(widths)])?;
        out.push_str(&format(FormatStyle::Printf, &single, &needed)?);
        words::fits("%", out.len())?;
    }
    if values.kind() != ValueKind::Map && args.next().is_some() {
        return Err(invalid("%: more values than the format has conversions"));
    }
    out.push_str(rest);
    Ok(out)
}

/// Returns `left % right`. The source is rewritten to call it, see [`super::source`].
pub(super) fn percent(left: &Value, right: &Value) -> Result<Value, Error> {
    if let Some(text) = left.as_str() {
        return formatted(text, right).map(Value::from);
    }
    let number = |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool);
    if !number(left) || !number(right) {
        return Err(invalid(format!(
            "unsupported operand types for %: {} and {}",
            left.kind(),
            right.kind()
        )));
    }
    let integers = i128::try_from(left.clone())
        .ok()
        .zip(i128::try_from(right.clone()).ok());
    let float = |value: &Value| value.kind() == ValueKind::Number && !value.is_integer();
    match integers {
        Some((a, b)) if !float(left) && !float(right) => {
            // The rest has the sign of the divisor. Only the quotient of the least number by -1
            // overflows, and its rest is 0.
            let rest = match b {
                0 => return Err(invalid("modulo by zero")),
                -1 => 0,
                b => a % b,
            };
            let rest = if rest != 0 && (rest < 0) != (b < 0) {
                rest + b
            } else {
                rest
            };
            Ok(i64::try_from(rest).map_or_else(|_| Value::from(rest), Value::from))
        }
        _ => {
            let (a, b) = (f64::try_from(left.clone())?, f64::try_from(right.clone())?);
            if b == 0.0 {
                return Err(invalid("modulo by zero"));
            }
            let rest = a % b;
            let rest = if rest != 0.0 && (rest < 0.0) != (b < 0.0) {
                rest + b
            } else {
                rest
            };
            Ok(Value::from(rest))
        }
    }
}
