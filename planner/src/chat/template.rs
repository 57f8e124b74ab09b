//! Chat templates: Jinja as Hugging Face runs it, so that the model sees the format it was trained
//! on.
//!
//! Templates come with model files and are not trusted: they get no file access, and a bounded
//! number of steps.

use super::message::Message;
use anyhow::{Result, anyhow};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind};
use minijinja_contrib::pycompat::unknown_method_callback;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Most steps of rendering, enough for thousands of turns.
const FUEL: u64 = 50_000_000;
const NAME: &str = "chat template";
/// Deepest value that is serialized as JSON.
const JSON_DEPTH: usize = 64;

/// A compiled template.
pub struct Template {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl Template {
    /// Compiles `source`. `bos` and `eos` are the texts of the BOS and EOS tokens.
    ///
    /// # Errors
    /// When the template cannot be compiled.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self> {
        Self::at(source, bos, eos, None)
    }

    /// Compiles `source` like [`new`](Self::new), with `now` instead of the clock.
    pub fn at(source: &str, bos: &str, eos: &str, now: Option<SystemTime>) -> Result<Self> {
        let mut environment = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        let syntax = syntax.trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| failed("can't be read", &e))?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<Value, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_function("strftime_now", move |format: String| {
            strftime(&format, now.unwrap_or_else(SystemTime::now))
        });
        environment
            .add_template_owned(NAME, without_generation_marks(source))
            .map_err(|e| failed("can't be read", &e))?;
        Ok(Self {
            environment,
            bos: bos.to_string(),
            eos: eos.to_string(),
        })
    }

    /// Renders a conversation up to where the model should answer.
    ///
    /// # Errors
    /// When the template rejects the conversation or takes too many steps.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let messages: Vec<Value> = messages.iter().map(Message::value).collect();
        let values = Value::from_pairs([
            ("messages", Value::from(messages)),
            ("add_generation_prompt", Value::from(true)),
            ("bos_token", Value::from(self.bos.as_str())),
            ("eos_token", Value::from(self.eos.as_str())),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ]);
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|e| failed("can't be read", &e))?;
        template.render(values).map_err(|e| failed("failed", &e))
    }
}

fn failed(what: &str, error: &Error) -> anyhow::Error {
    let line = error
        .line()
        .map(|l| format!(", line {l}"))
        .unwrap_or_default();
    let detail = error
        .detail()
        .map(str::to_string)
        .unwrap_or_else(|| error.kind().to_string());
    anyhow!("the chat template {what}{line}: {detail}; give another with --chat-template FILE")
}

/// Replaces Hugging Face's `{% generation %}`, which only marks text for training, by a block
/// without effect and with equal handling of white space.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let Some(end) = tag.find("%}").map(|e| e + 2) else {
            rest = tag;
            break;
        };
        let signs: &[char] = &['-', '+'];
        match tag[2..end - 2].trim_matches(signs).trim() {
            "generation" => out.push_str(&tag[..end].replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag[..end].replacen("endgeneration", "endif", 1)),
            _ => out.push_str(&tag[..end]),
        }
        rest = &tag[end..];
    }
    out.push_str(rest);
    out
}

/// Serializes JSON as Python's `json.dumps(value, ensure_ascii=False)`, which models were trained
/// on.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get::<Option<usize>>("indent")?.map(|n| n.min(16));
    // Both are what this writes anyway.
    let _: Option<bool> = options.get("ensure_ascii")?;
    let _: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let mut out = String::new();
    write_json(value, indent, 0, &mut out)?;
    // Safe: no template escapes it again.
    Ok(Value::from_safe_string(out))
}

fn write_json(
    value: &Value,
    indent: Option<usize>,
    depth: usize,
    out: &mut String,
) -> Result<(), Error> {
    if depth > JSON_DEPTH {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "tojson: nested too deeply",
        ));
    }
    let line = |depth: usize, out: &mut String| {
        if let Some(indent) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => out.push_str("null"),
        ValueKind::Bool | ValueKind::Number => out.push_str(&value.to_string().to_lowercase()),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            let mut any = false;
            for item in value.try_iter()? {
                if std::mem::replace(&mut any, true) {
                    out.push_str(comma);
                }
                line(depth + 1, out);
                write_json(&item, indent, depth + 1, out)?;
            }
            if any {
                line(depth, out);
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            let mut any = false;
            for key in value.try_iter()? {
                if std::mem::replace(&mut any, true) {
                    out.push_str(comma);
                }
                line(depth + 1, out);
                write_string(&key.to_string(), out);
                out.push_str(": ");
                write_json(&value.get_item(&key)?, indent, depth + 1, out)?;
            }
            if any {
                line(depth, out);
            }
            out.push('}');
        }
        _ => write_string(
            value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_string)
                .as_str(),
            out,
        ),
    }
    Ok(())
}

fn write_string(text: &str, out: &mut String) {
    // A string always has a JSON form.
    out.push_str(&serde_json::to_string(text).unwrap_or_default());
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
];

/// Formats a time in UTC with the `strftime` conversions that templates use. Other conversions stay
/// as they are.
fn strftime(format: &str, moment: SystemTime) -> String {
    let seconds = moment
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
        .as_secs();
    let days = seconds / 86400;
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let month_name = MONTHS[(month as usize - 1) % 12];
    let day_name = DAYS[(days % 7) as usize];
    let mut out = String::new();
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let plain = chars.next_if_eq(&'-').is_some();
        let number = |n: u64| {
            if plain {
                n.to_string()
            } else {
                format!("{n:02}")
            }
        };
        match chars.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&number(year % 100)),
            Some('m') => out.push_str(&number(month)),
            Some('d') => out.push_str(&number(day)),
            Some('e') => out.push_str(&format!("{day:2}")),
            Some('H') => out.push_str(&number(hour)),
            Some('I') => out.push_str(&number((hour + 11) % 12 + 1)),
            Some('M') => out.push_str(&number(minute)),
            Some('S') => out.push_str(&number(second)),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('F') => out.push_str(&format!("{year}-{month:02}-{day:02}")),
            Some('T') => out.push_str(&format!("{hour:02}:{minute:02}:{second:02}")),
            Some('Z') => out.push_str("UTC"),
            Some('z') => out.push_str("+0000"),
            Some('%') => out.push('%'),
            other => {
                out.push('%');
                out.extend(plain.then_some('-'));
                out.extend(other);
            }
        }
    }
    out
}

/// Returns year, month and day of a number of days after 1970-01-01. Months count from March, so
/// that the leap day is the last of a year, and years in eras of 400.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right() {
        // 951782400 is 2000-02-29, 1709164800 is 2024-02-29, both midnight.
        let at = |s: u64, f: &str| strftime(f, UNIX_EPOCH + Duration::from_secs(s));
        assert_eq!(
            at(0, "%A %Y-%m-%d %H:%M:%S"),
            "Thursday 1970-01-01 00:00:00"
        );
        assert_eq!(at(951_782_400, "%d %B %Y"), "29 February 2000");
        assert_eq!(
            at(
                1_709_164_800 + 86_400 + 47_105,
                "%a %-d %b %y, %I:%M %p %Q %%"
            ),
            "Fri 1 Mar 24, 01:05 PM %Q %"
        );
        assert_eq!(at(1_735_689_599, "%F %T"), "2024-12-31 23:59:59");
    }

    #[test]
    fn generation_marks_do_nothing() {
        let template = Template::new(
            "a {%- generation %}b{% endgeneration -%} c{% if true %}d{% endif %}{%",
            "",
            "",
        );
        assert!(template.is_err(), "an open tag is an error");
        let template = Template::new("a {%- generation %}b{% endgeneration -%} c", "", "").unwrap();
        assert_eq!(template.render(&[]).unwrap(), "abc");
    }

    #[test]
    fn json_is_pythons() {
        let source = r#"{{ {"b": [1, true, none, "<é'\n\">"], "a": {}} | tojson }}|{{ [{"x": 1}] | tojson(indent=2) }}"#;
        let text = Template::new(source, "", "").unwrap().render(&[]).unwrap();
        assert_eq!(
            text,
            "{\"b\": [1, true, null, \"<é'\\n\\\">\"], \"a\": {}}|[\n  {\n    \"x\": 1\n  }\n]"
        );
    }

    #[test]
    fn endless_templates_are_stopped() {
        let many = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}";
        let error = Template::new(many, "", "")
            .unwrap()
            .render(&[])
            .unwrap_err()
            .to_string();
        assert!(error.contains("the chat template failed"), "{error}");
    }
}
