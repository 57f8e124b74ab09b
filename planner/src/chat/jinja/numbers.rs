//! Filters that make numbers of texts, and texts of numbers.

use super::args::{all, bind, integer};
use super::invalid;
use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, Error};

/// Adds the filters.
pub(super) fn add(environment: &mut Environment<'static>) {
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("filesizeformat", file_size);
}

/// Converts to an integer, or to another value what cannot be converted.
fn int(value: &Value, args: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let [other, base] = bind("int", &all(args, named), ["default", "base"])?;
    let base = integer("int", &base)?.unwrap_or(10);
    let of_float = |x: f64| (x.abs() < 1e38).then(|| Value::from(x.trunc() as i128));
    let number = match value.as_str() {
        Some(text) => {
            let digits = text.trim().replace('_', "");
            integer_of(&digits, base).or_else(|| digits.parse().ok().and_then(of_float))
        }
        None if value.kind() == ValueKind::Bool => Some(Value::from(i64::from(value.is_true()))),
        None if value.is_integer() => Some(value.clone()),
        None => f64::try_from(value.clone()).ok().and_then(of_float),
    };
    let small = number.map(|n| i64::try_from(n.clone()).map_or(n, Value::from));
    Ok(small.or(other).unwrap_or_else(|| Value::from(0)))
}

/// Reads an integer in a base; 0 is the base that its prefix tells.
fn integer_of(digits: &str, base: i64) -> Option<Value> {
    let (sign, rest) = match digits.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", digits.strip_prefix('+').unwrap_or(digits)),
    };
    let lower = rest.to_lowercase();
    let prefixes = [("0x", 16), ("0o", 8), ("0b", 2)];
    let prefixed = prefixes.iter().find_map(|&(prefix, radix)| {
        let digits = lower.strip_prefix(prefix)?;
        (base == radix || base == 0).then_some((digits, radix))
    });
    let (digits, radix) = prefixed.unwrap_or((&lower, if base == 0 { 10 } else { base }));
    let radix = u32::try_from(radix)
        .ok()
        .filter(|radix| (2..=36).contains(radix))?;
    if digits.starts_with(['+', '-']) {
        return None;
    }
    i128::from_str_radix(&format!("{sign}{digits}"), radix)
        .ok()
        .map(Value::from)
}

/// Converts to a float, or to another value what cannot be converted.
fn float(value: &Value, args: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let [other] = bind("float", &all(args, named), ["default"])?;
    let number = match value.as_str() {
        Some(text) => text.trim().replace('_', "").parse::<f64>().ok(),
        None => f64::try_from(value.clone()).ok(),
    };
    let number = number.map(Value::from).or(other);
    Ok(number.unwrap_or_else(|| Value::from(0.0)))
}

fn file_size(value: &Value, binary: Option<bool>) -> Result<String, Error> {
    let bytes = f64::try_from(value.clone())
        .map_err(|_| invalid(format!("filesizeformat: a {}", value.kind())))?;
    let binary = binary.unwrap_or(false);
    let base: f64 = if binary { 1024.0 } else { 1000.0 };
    if bytes == 1.0 {
        return Ok("1 Byte".into());
    }
    if bytes < base {
        return Ok(format!("{} Bytes", bytes.trunc()));
    }
    // A thousand of the last unit and more have it, too.
    let letters = ["k", "M", "G", "T", "P", "E", "Z", "Y"];
    let (mut amount, mut n) = (bytes / base, 0);
    while amount >= base && n + 1 < letters.len() {
        amount /= base;
        n += 1;
    }
    let letter = if binary {
        letters[n].to_uppercase() + "i"
    } else {
        letters[n].to_string()
    };
    Ok(format!("{amount:.1} {letter}B"))
}
