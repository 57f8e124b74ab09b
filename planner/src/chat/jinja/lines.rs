//! Filters that lay out text.

use super::args::{all, bind, flag, integer, missing, optional, size};
use super::invalid;
use super::methods::is_space;
use super::words::{self, MAX_PADDED_CHARS};
use minijinja::value::{Kwargs, Rest, Value};
use minijinja::{Environment, Error};

/// Adds the filters.
pub(super) fn add(environment: &mut Environment<'static>) {
    environment.add_filter("replace", replace);
    environment.add_filter("trim", trim);
    environment.add_filter("center", center);
    environment.add_filter("truncate", truncate);
    environment.add_filter("indent", indent);
    environment.add_filter("wordwrap", wrap);
    environment.add_filter("wordcount", |text: &str| text.split_whitespace().count());
}

fn replace(text: &Value, args: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let [old, new, count] = bind("replace", &all(args, named), ["old", "new", "count"])?;
    let old = words::text(&old.ok_or_else(|| missing("replace"))?)?;
    let new = words::text(&new.ok_or_else(|| missing("replace"))?)?;
    // As in Python, a negative number is all.
    let count = integer("replace", &count)?.and_then(|n| usize::try_from(n).ok());
    let text = words::text(text)?;
    words::replaced(&text, &old, &new, count.unwrap_or(usize::MAX))
}

fn trim(text: &Value, args: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let [chars] = bind("trim", &all(args, named), ["chars"])?;
    let text = words::text(text)?;
    Ok(match optional("trim", &chars)? {
        Some(chars) => text.trim_matches(|c| chars.contains(c)),
        None => text.trim_matches(is_space),
    }
    .to_string())
}

fn center(text: &str, args: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let [width] = bind("center", &all(args, named), ["width"])?;
    let width = size("center", &width)?.unwrap_or(80);
    let missing = width.saturating_sub(text.chars().count());
    if missing > MAX_PADDED_CHARS {
        return Err(invalid(format!("center: a width of {width} is too large")));
    }
    let left = missing / 2 + (missing & width & 1);
    Ok([&" ".repeat(left), text, &" ".repeat(missing - left)].concat())
}

fn truncate(text: &str, args: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let names = ["length", "killwords", "end", "leeway"];
    let [length, kill, end, leeway] = bind("truncate", &all(args, named), names)?;
    let length = size("truncate", &length)?.unwrap_or(255);
    let end = optional("truncate", &end)?.unwrap_or("...");
    let leeway = size("truncate", &leeway)?.unwrap_or(5);
    let end_length = end.chars().count();
    if length < end_length {
        return Err(invalid(format!(
            "truncate: a length of {length}, expected at least {end_length}"
        )));
    }
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text.to_string());
    }
    let cut: String = text.chars().take(length - end_length).collect();
    let kept = if flag(&kill) {
        cut.as_str()
    } else {
        cut.rsplit_once(' ').map_or(cut.as_str(), |(kept, _)| kept)
    };
    Ok(kept.to_string() + end)
}

/// Indents the lines after the first, unless they are blank.
fn indent(text: &str, args: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let [width, first, blank] = bind("indent", &all(args, named), ["width", "first", "blank"])?;
    let prefix = match width.as_ref().and_then(Value::as_str) {
        Some(prefix) => prefix.to_string(),
        None => {
            let width = size("indent", &width)?.unwrap_or(4);
            if width > MAX_PADDED_CHARS {
                return Err(invalid(format!("indent: a width of {width} is too large")));
            }
            " ".repeat(width)
        }
    };
    let mut out = String::new();
    for (n, line) in text.split('\n').enumerate() {
        if n > 0 {
            out.push('\n');
        }
        let indented = match n {
            0 => flag(&first),
            _ => flag(&blank) || !line.is_empty(),
        };
        if indented {
            words::fits("indent", out.len().saturating_add(prefix.len()))?;
            out.push_str(&prefix);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// Breaks lines at spaces so that they have at most so many characters. Longer words are broken.
fn wrap(text: &str, args: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let names = ["width", "break_long_words", "wrapstring"];
    let [width, long, end] = bind("wordwrap", &all(args, named), names)?;
    let width = size("wordwrap", &width)?.unwrap_or(79);
    let break_long = long.is_none_or(|long| long.is_true());
    let end = optional("wordwrap", &end)?.unwrap_or("\n");
    if width == 0 {
        return Err(invalid("wordwrap: a width of 0, expected 1 or more"));
    }
    let wrapped: Vec<String> = text
        .lines()
        .flat_map(|line| match wrap_line(line, width, break_long) {
            lines if lines.is_empty() => vec![String::new()],
            lines => lines,
        })
        .collect();
    let ends = wrapped.len().saturating_mul(end.len());
    words::fits("wordwrap", ends.saturating_add(text.len()))?;
    Ok(wrapped.join(end))
}

fn wrap_line(line: &str, width: usize, break_long: bool) -> Vec<String> {
    let (mut lines, mut current, mut length) = (Vec::new(), String::new(), 0);
    for word in line.split_inclusive(' ') {
        let mut word: Vec<char> = word.chars().collect();
        let spaces = usize::from(word.last() == Some(&' '));
        if length + word.len() - spaces > width && length > 0 {
            lines.push(std::mem::take(&mut current).trim_end().to_string());
            length = 0;
        }
        while break_long && word.len() - spaces > width {
            lines.push(word.drain(..width).collect());
        }
        length += word.len();
        current.extend(word);
    }
    let current = current.trim_end();
    lines.extend((!current.is_empty()).then(|| current.to_string()));
    lines
}
