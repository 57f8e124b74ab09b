//! Methods of Python's values.

use super::args::{bind, integer, missing, optional, string};
use super::invalid;
use super::printf::fits_width;
use super::words::{MAX_MADE_BYTES, MAX_PADDED_CHARS, fits, head, replaced, text};
use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Tuple, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;

/// Calls a method that the value itself does not have.
pub(super) fn call(
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    match (value.kind(), method) {
        (ValueKind::String, _) => {
            let s = value.as_str().unwrap_or_default();
            split_method(s, method, args)
                .or_else(|| search_method(s, method, args))
                .or_else(|| pad_method(s, method, args))
                .or_else(|| change_method(s, method, args))
                .or_else(|| question(s, method, args))
                .unwrap_or_else(|| Err(Error::from(ErrorKind::UnknownMethod)))
        }
        (ValueKind::Bytes, "decode") => {
            let bytes = value.as_bytes().unwrap_or_default();
            let text = std::str::from_utf8(bytes).map_err(|_| invalid("decode: no UTF-8"))?;
            Ok(Value::from(text))
        }
        (ValueKind::Map | ValueKind::Seq, "copy") => bind(method, args, []).map(|[]| value.clone()),
        (ValueKind::Seq | ValueKind::Iterable, "index") => {
            let [wanted] = bind(method, args, ["value"])?;
            let wanted = wanted.ok_or_else(|| missing(method))?;
            value
                .try_iter()?
                .position(|item| item == wanted)
                .map(Value::from)
                .ok_or_else(|| invalid("index: the value is not in the list"))
        }
        (ValueKind::Seq | ValueKind::Iterable, "count") => {
            let [wanted] = bind(method, args, ["value"])?;
            let wanted = wanted.ok_or_else(|| missing(method))?;
            Ok(Value::from(
                value.try_iter()?.filter(|v| *v == wanted).count(),
            ))
        }
        _ => pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// Whether Python takes a character for white space.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

type Outcome = Option<Result<Value, Error>>;

fn split_method(s: &str, method: &str, args: &[Value]) -> Outcome {
    Some(match method {
        "split" | "rsplit" => split(s, method, args),
        "splitlines" => split_lines(s, args),
        "partition" | "rpartition" => bind(method, args, ["sep"]).and_then(|[sep]| {
            let sep = string(method, &sep)?;
            if sep.is_empty() {
                return Err(invalid(format!("{method}: the separator is empty")));
            }
            let parts = match method {
                "partition" => s
                    .split_once(sep)
                    .map(|(a, b)| [a, sep, b])
                    .unwrap_or([s, "", ""]),
                _ => s
                    .rsplit_once(sep)
                    .map(|(a, b)| [a, sep, b])
                    .unwrap_or(["", "", s]),
            };
            Ok(Value::from(Tuple::from(parts.map(Value::from))))
        }),
        "join" => bind(method, args, ["iterable"]).and_then(|[items]| {
            let mut out = String::new();
            for (n, item) in items
                .ok_or_else(|| missing(method))?
                .try_iter()?
                .enumerate()
            {
                fits(method, out.len().saturating_add(s.len()))?;
                if n > 0 {
                    out.push_str(s);
                }
                out.push_str(string(method, &Some(item))?);
            }
            Ok(Value::from(out))
        }),
        _ => return None,
    })
}

fn split(s: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let [sep, most] = bind(method, args, ["sep", "maxsplit"])?;
    let most = integer(method, &most)?.unwrap_or(-1);
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let from_end = method == "rsplit";
    let parts: Vec<&str> = match optional(method, &sep)? {
        Some("") => return Err(invalid(format!("{method}: the separator is empty"))),
        Some(sep) if from_end => {
            let mut parts: Vec<&str> = s.rsplitn(most.saturating_add(1), sep).collect();
            parts.reverse();
            parts
        }
        Some(sep) => s.splitn(most.saturating_add(1), sep).collect(),
        None if from_end => {
            let (mut parts, mut rest) = (Vec::new(), s.trim_end_matches(is_space));
            while parts.len() < most
                && let Some(at) = rest.rfind(is_space)
            {
                let space = rest[at..].chars().next().map_or(1, char::len_utf8);
                parts.push(&rest[at + space..]);
                rest = rest[..at].trim_end_matches(is_space);
            }
            if parts.len() >= most || !rest.is_empty() {
                parts.extend((!rest.is_empty()).then_some(rest));
            }
            parts.reverse();
            parts
        }
        None => {
            let (mut parts, mut rest) = (Vec::new(), s.trim_start_matches(is_space));
            while parts.len() < most
                && let Some(at) = rest.find(is_space)
            {
                parts.push(&rest[..at]);
                rest = rest[at..].trim_start_matches(is_space);
            }
            parts.extend((!rest.is_empty()).then_some(rest));
            parts
        }
    };
    Ok(parts.into_iter().map(Value::from).collect())
}

fn split_lines(s: &str, args: &[Value]) -> Result<Value, Error> {
    let [keep] = bind("splitlines", args, ["keepends"])?;
    let keep = keep.is_some_and(|keep| keep.is_true());
    let is_end = |c: char| matches!(c, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let (mut lines, mut rest) = (Vec::new(), s);
    while let Some(at) = rest.find(is_end) {
        let len = if rest[at..].starts_with("\r\n") {
            2
        } else {
            rest[at..].chars().next().map_or(1, char::len_utf8)
        };
        lines.push(Value::from(&rest[..if keep { at + len } else { at }]));
        rest = &rest[at + len..];
    }
    lines.extend((!rest.is_empty()).then(|| Value::from(rest)));
    Ok(Value::from(lines))
}

/// Returns the bytes of the characters `start..end`, which count from the end if negative, or
/// `None` if `start` is beyond the text.
fn range(s: &str, start: Option<i64>, end: Option<i64>) -> Option<(usize, usize)> {
    if start.is_none() && end.is_none() {
        return Some((0, s.len()));
    }
    let count = i64::try_from(s.chars().count()).unwrap_or(i64::MAX);
    let place = |n: i64| {
        if n < 0 {
            n.saturating_add(count).max(0)
        } else {
            n
        }
    };
    let (start, end) = (
        place(start.unwrap_or(0)),
        place(end.unwrap_or(count)).min(count),
    );
    let byte = |n: i64| {
        s.char_indices()
            .nth(usize::try_from(n).unwrap_or(usize::MAX))
            .map_or(s.len(), |(at, _)| at)
    };
    (start <= end).then(|| (byte(start), byte(end)))
}

fn search_method(s: &str, method: &str, args: &[Value]) -> Outcome {
    Some(match method {
        "find" | "rfind" | "index" | "rindex" => find(s, method, args),
        "startswith" | "endswith" => starts_or_ends(s, method, args),
        "count" => bind(method, args, ["sub", "start", "end"]).and_then(|[sub, start, end]| {
            let sub = string(method, &sub)?;
            let within = range(s, integer(method, &start)?, integer(method, &end)?);
            let n = within.map_or(0, |(a, b)| match sub {
                "" => s[a..b].chars().count() + 1,
                sub => s[a..b].matches(sub).count(),
            });
            Ok(Value::from(n))
        }),
        _ => return None,
    })
}

fn find(s: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let [sub, start, end] = bind(method, args, ["sub", "start", "end"])?;
    let sub = string(method, &sub)?;
    let found = range(s, integer(method, &start)?, integer(method, &end)?).and_then(|(a, b)| {
        let at = if method.starts_with('r') {
            s[a..b].rfind(sub)
        } else {
            s[a..b].find(sub)
        };
        at.map(|at| s[..a + at].chars().count())
    });
    match found {
        Some(at) => Ok(Value::from(at)),
        None if method.ends_with("index") => {
            Err(invalid(format!("{method}: the text is not there")))
        }
        None => Ok(Value::from(-1)),
    }
}

fn starts_or_ends(s: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let [affix, start, end] = bind(method, args, ["affix", "start", "end"])?;
    let within = range(s, integer(method, &start)?, integer(method, &end)?);
    let has = |affix: &str| {
        within.is_some_and(|(a, b)| match method {
            "startswith" => s[a..b].starts_with(affix),
            _ => s[a..b].ends_with(affix),
        })
    };
    let affix = affix.ok_or_else(|| missing(method))?;
    if affix.is_tuple() {
        for one in affix.try_iter()? {
            if has(string(method, &Some(one))?) {
                return Ok(Value::from(true));
            }
        }
        return Ok(Value::from(false));
    }
    Ok(Value::from(has(string(method, &Some(affix))?)))
}

fn pad_method(s: &str, method: &str, args: &[Value]) -> Outcome {
    if !matches!(
        method,
        "ljust" | "rjust" | "center" | "zfill" | "expandtabs"
    ) {
        return None;
    }
    Some(
        bind(method, args, ["width", "fillchar"]).and_then(|[width, fill]| {
            if method == "expandtabs" {
                return Ok(Value::from(expand_tabs(
                    s,
                    integer(method, &width)?.unwrap_or(8),
                )?));
            }
            let width = integer(method, &width)?.ok_or_else(|| missing(method))?;
            let fill =
                optional(method, &fill)?.unwrap_or(if method == "zfill" { "0" } else { " " });
            if fill.chars().count() != 1 {
                return Err(invalid(format!("{method}: the fill is not one character")));
            }
            let width = usize::try_from(width).unwrap_or(0);
            let missing = width.saturating_sub(s.chars().count());
            if missing > MAX_PADDED_CHARS {
                return Err(invalid(format!(
                    "{method}: a width of {width}, expected at most {MAX_PADDED_CHARS}"
                )));
            }
            // Python puts the odd one left if the width is odd.
            let left = match method {
                "ljust" => 0,
                "center" => missing / 2 + (missing & width & 1),
                _ => missing,
            };
            let sign = usize::from(method == "zfill" && s.starts_with(['+', '-']));
            Ok(Value::from(
                [
                    &s[..sign],
                    &fill.repeat(left),
                    &s[sign..],
                    &fill.repeat(missing - left),
                ]
                .concat(),
            ))
        }),
    )
}

fn expand_tabs(s: &str, size: i64) -> Result<String, Error> {
    let size = usize::try_from(size).unwrap_or(0);
    if size > MAX_PADDED_CHARS {
        return Err(invalid(format!(
            "expandtabs: {size}, expected at most {MAX_PADDED_CHARS}"
        )));
    }
    let (mut out, mut column) = (String::new(), 0);
    for c in s.chars() {
        match c {
            '\t' => {
                let fill = if size == 0 { 0 } else { size - column % size };
                fits("expandtabs", out.len() + fill)?;
                out.extend(std::iter::repeat_n(' ', fill));
                column += fill;
            }
            c => {
                out.push(c);
                column = if matches!(c, '\n' | '\r') {
                    0
                } else {
                    column + 1
                };
            }
        }
    }
    Ok(out)
}

fn change_method(s: &str, method: &str, args: &[Value]) -> Outcome {
    let plain = |make: &dyn Fn() -> String| bind(method, args, []).map(|[]| Value::from(make()));
    Some(match method {
        "upper" => plain(&|| s.to_uppercase()),
        "lower" | "casefold" => plain(&|| match method {
            "casefold" => s.to_lowercase().replace('ß', "ss"),
            _ => s.to_lowercase(),
        }),
        "swapcase" => plain(&|| swap_case(s)),
        "title" => plain(&|| title(s)),
        "capitalize" => plain(&|| capitalize(s)),
        "strip" | "lstrip" | "rstrip" => bind(method, args, ["chars"]).and_then(|[chars]| {
            let chars = optional(method, &chars)?;
            let strips = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
            Ok(Value::from(match method {
                "strip" => s.trim_matches(strips),
                "lstrip" => s.trim_start_matches(strips),
                _ => s.trim_end_matches(strips),
            }))
        }),
        "removeprefix" | "removesuffix" => bind(method, args, ["affix"]).and_then(|[affix]| {
            let affix = string(method, &affix)?;
            let rest = match method {
                "removeprefix" => s.strip_prefix(affix),
                _ => s.strip_suffix(affix),
            };
            Ok(Value::from(rest.unwrap_or(s)))
        }),
        "replace" => bind(method, args, ["old", "new", "count"]).and_then(|[old, new, count]| {
            let (old, new) = (string(method, &old)?, string(method, &new)?);
            let count = integer(method, &count)?.unwrap_or(-1);
            let count = usize::try_from(count).unwrap_or(usize::MAX);
            replaced(s, old, new, count).map(Value::from)
        }),
        "translate" => bind(method, args, ["table"]).and_then(|[table]| {
            translate(s, &table.ok_or_else(|| missing(method))?).map(Value::from)
        }),
        "encode" => bind(method, args, ["encoding", "errors"]).and_then(|[encoding, _]| {
            let encoding = optional(method, &encoding)?.unwrap_or("utf-8");
            match encoding.to_lowercase().replace(['-', '_'], "").as_str() {
                "utf8" => Ok(Value::from_bytes(s.as_bytes().to_vec())),
                "ascii" | "latin1" if s.is_ascii() => Ok(Value::from_bytes(s.as_bytes().to_vec())),
                _ => Err(invalid(format!("encode: '{encoding}', expected utf-8"))),
            }
        }),
        "format" => str_format(s, args).map(Value::from),
        "format_map" => bind(method, args, ["mapping"]).and_then(|[map]| {
            let map = map.ok_or_else(|| missing(method))?;
            let named = map
                .try_iter()?
                .map(|key| Ok((text(&key)?, map.get_item(&key)?)))
                .collect::<Result<Vec<_>, Error>>()?;
            let named = Value::from(named.into_iter().collect::<Kwargs>());
            str_format(s, &[named]).map(Value::from)
        }),
        _ => return None,
    })
}

/// Formats `args` as Python's `str.format` does.
fn str_format(s: &str, args: &[Value]) -> Result<String, Error> {
    let fields = s.split('{').skip(1);
    let specs = fields.filter_map(|field| field.split('}').next()?.split_once(':'));
    for (_, spec) in specs {
        fits_width(spec, &[])?;
    }
    // Each field may have the longest argument.
    let bytes = |value: &Value| match value.as_str() {
        Some(text) => text.len(),
        None => head(value, MAX_MADE_BYTES + 1).len(),
    };
    let longest = args.iter().map(bytes).max().unwrap_or(0);
    fits("format", s.matches('{').count().saturating_mul(longest))?;
    format(FormatStyle::StrFormat, s, args)
}

fn swap_case(s: &str) -> String {
    let swap = |c: char| {
        if c.is_uppercase() {
            c.to_lowercase().collect::<String>()
        } else {
            c.to_uppercase().collect()
        }
    };
    s.chars().map(swap).collect()
}

/// Returns a text with the first letter of every run of letters in upper case, the rest in lower.
pub(super) fn title(s: &str) -> String {
    let (mut out, mut within) = (String::new(), false);
    for c in s.chars() {
        if within {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        within = c.is_alphabetic() && (c.is_uppercase() || c.is_lowercase());
    }
    out
}

/// Returns a text with its first character in upper case, the rest in lower.
pub(super) fn capitalize(s: &str) -> String {
    let mut chars = s.chars();
    let first: String = chars
        .next()
        .into_iter()
        .flat_map(char::to_uppercase)
        .collect();
    first + &chars.as_str().to_lowercase()
}

fn translate(s: &str, table: &Value) -> Result<String, Error> {
    let mut out = String::new();
    for c in s.chars() {
        let to = table.get_item(&Value::from(u32::from(c)))?;
        match to.kind() {
            ValueKind::Undefined => out.push(c),
            ValueKind::None => {}
            ValueKind::String => {
                let to = to.as_str().unwrap_or_default();
                fits("translate", out.len().saturating_add(to.len()))?;
                out.push_str(to);
            }
            _ => {
                let code = u32::try_from(to).ok().and_then(char::from_u32);
                out.push(code.ok_or_else(|| invalid("translate: no character has that number"))?);
            }
        }
    }
    Ok(out)
}

/// Answers the methods `is…`.
fn question(s: &str, method: &str, args: &[Value]) -> Outcome {
    let all = |test: &dyn Fn(char) -> bool| !s.is_empty() && s.chars().all(test);
    let cased = |other: &dyn Fn(char) -> bool, wanted: &dyn Fn(char) -> bool| {
        s.chars().any(wanted) && !s.chars().any(other)
    };
    let answer = match method {
        "isascii" => s.is_ascii(),
        "isalpha" => all(&|c| c.is_alphabetic()),
        "isalnum" => all(&|c| c.is_alphanumeric()),
        "isnumeric" => all(&|c| c.is_numeric()),
        "isdigit" => all(&|c| c.is_ascii_digit() || (c.is_numeric() && is_superscript(c))),
        "isdecimal" => all(&|c| c.is_ascii_digit()),
        "isspace" => all(&is_space),
        "islower" => cased(&|c| c.is_uppercase(), &|c| c.is_lowercase()),
        "isupper" => cased(&|c| c.is_lowercase(), &|c| c.is_uppercase()),
        "istitle" => s.chars().any(char::is_alphabetic) && title(s) == s,
        "isprintable" => s.chars().all(|c| !c.is_control()),
        "isidentifier" => {
            s.starts_with(|c: char| c == '_' || c.is_alphabetic())
                && s.chars().all(|c| c == '_' || c.is_alphanumeric())
        }
        _ => return None,
    };
    Some(bind(method, args, []).map(|[]| Value::from(answer)))
}

fn is_superscript(c: char) -> bool {
    matches!(c, '²' | '³' | '¹' | '⁰' | '⁴'..='⁹' | '₀'..='₉')
}
