//! Estimates the memory that parsing a text would take, before a parser is let loose on it.
//!
//! A parser builds hundreds of bytes for some pairs of characters (`{}`, `1,`) and nothing for most
//! others. So a file's length says little, and a text is weighed by what a parser would build: one
//! look at each byte, no allocation.

/// Most bytes that a parser may need, by the estimate. Real files need some megabytes.
pub(super) const MAX_PARSE_BYTES: u64 = 1 << 30;

/// Deepest nesting of keys and values. Parsers and destructors recurse.
const MAX_DEPTH: u32 = 128;

/// Bytes that the TOML parser keeps per token.
const TOML_TOKEN_BYTES: u64 = 64;
/// Bytes of a TOML key or value, as an element of its table or array.
const TOML_VALUE_BYTES: u64 = 512;
/// Bytes of a JSON object or array in the structs that it is read into.
const JSON_OBJECT_BYTES: u64 = 512;
/// Bytes of a JSON array's element, with room to grow.
const JSON_ELEMENT_BYTES: u64 = 48;

/// What parsing a text would take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Cost {
    /// Bytes of memory, estimated from above.
    pub bytes: u64,
    /// Deepest nesting of keys and values.
    pub depth: u32,
}

impl Cost {
    /// Returns what is wrong with a text that would take too much, if it would.
    pub fn check(self) -> Result<(), String> {
        if self.bytes > MAX_PARSE_BYTES {
            return Err(format!(
                "it has so many values that reading them may take {} of memory, expected at most {}",
                crate::units::show_bytes(self.bytes),
                crate::units::show_bytes(MAX_PARSE_BYTES)
            ));
        }
        if self.depth > MAX_DEPTH {
            return Err(format!(
                "its values are nested {} deep, expected at most {MAX_DEPTH}",
                self.depth
            ));
        }
        Ok(())
    }
}

/// Returns the cost of a TOML text.
pub(super) fn of_toml(text: &[u8]) -> Cost {
    let mut cost = Cost::default();
    let (mut open, mut dots) = (0u32, 0u32);
    let mut at = 0;
    while let Some(&byte) = text.get(at) {
        let rest = &text[at..];
        let (len, value) = match byte {
            b'#' => (line(rest), false),
            b'"' | b'\'' => (toml_string(rest, byte), false),
            b'=' | b',' => {
                dots = 0;
                (1, true)
            }
            b'.' => {
                dots += 1;
                (1, true)
            }
            b'[' | b'{' => {
                open += 1;
                dots = 0;
                (1, true)
            }
            b']' | b'}' => {
                open = open.saturating_sub(1);
                (1, false)
            }
            b'\n' => {
                dots = 0;
                (1, false)
            }
            b' ' | b'\t' => (run(rest, |b| matches!(b, b' ' | b'\t')), false),
            _ => (run(rest, |b| !br##" #"'=,.[]{}\n\t"##.contains(&b)), false),
        };
        at += len;
        cost.bytes += TOML_TOKEN_BYTES + if value { TOML_VALUE_BYTES } else { 0 };
        cost.depth = cost.depth.max(open.saturating_add(dots));
    }
    cost
}

/// Returns the cost of a JSON text.
pub(super) fn of_json(text: &[u8]) -> Cost {
    let mut cost = Cost::default();
    let mut open = 0u32;
    let mut at = 0;
    while let Some(&byte) = text.get(at) {
        at += 1;
        match byte {
            b'"' => at += string_end(&text[at..], b'"', false),
            b'{' | b'[' => {
                open += 1;
                cost.depth = cost.depth.max(open);
                cost.bytes += JSON_OBJECT_BYTES;
            }
            b'}' | b']' => open = open.saturating_sub(1),
            b',' => cost.bytes += JSON_ELEMENT_BYTES,
            _ => {}
        }
    }
    cost
}

/// Returns the length of the line that `rest` begins with, without its end.
fn line(rest: &[u8]) -> usize {
    run(rest, |b| b != b'\n')
}

/// Returns how many bytes at the start of `rest` belong; at least 1.
fn run(rest: &[u8], belongs: impl Fn(u8) -> bool) -> usize {
    let len = rest.iter().position(|b| !belongs(*b));
    len.unwrap_or(rest.len()).max(1)
}

/// Returns the length of the string that `rest` begins with, quotes included.
fn toml_string(rest: &[u8], quote: u8) -> usize {
    let escapes = quote == b'"';
    if rest.starts_with(&[quote; 3]) {
        let mut at = 3;
        while at < rest.len() && !rest[at..].starts_with(&[quote; 3]) {
            at += if escapes && rest[at] == b'\\' { 2 } else { 1 };
        }
        (at + 3).min(rest.len())
    } else if escapes {
        1 + string_end(&rest[1..], quote, true)
    } else {
        let end = rest[1..].iter().position(|b| *b == quote || *b == b'\n');
        end.map_or(rest.len(), |end| end + 2)
    }
}

/// Returns the length up to and with the closing `quote`, past escaped characters. A string of one
/// line also ends where the line does.
fn string_end(rest: &[u8], quote: u8, one_line: bool) -> usize {
    let mut at = 0;
    while let Some(&byte) = rest.get(at) {
        at += 1;
        match byte {
            b'\\' => at += 1,
            b'\n' if one_line => break,
            byte if byte == quote => break,
            _ => {}
        }
    }
    at.min(rest.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_count_and_text_does_not() {
        let toml = |text: &str| of_toml(text.as_bytes()).bytes;
        let json = |text: &str| of_json(text.as_bytes()).bytes;
        let long = ",{".repeat(1000);
        assert_eq!(toml("a = \"\""), toml(&format!("a = \"{long}\"")));
        assert_eq!(toml("a = ''"), toml(&format!("a = '{long}'")));
        assert_eq!(toml("a = ''''''"), toml(&format!("a = '''\n{long}\n'''")));
        let escaped = format!(r#"a = """{long}\"""{long}""""#);
        assert_eq!(toml("a = ''"), toml(&escaped));
        assert_eq!(toml("#"), toml(&format!("# \" {long}")));
        assert!(toml("a = [{}, {}]") > toml("a = [{}]"));
        assert!(toml(&format!("'\n{long}")) > 1000 * TOML_VALUE_BYTES);
        assert_eq!(json("[\"\"]"), json(&format!("[\"\\\"{long}\"]")));
        assert!(json("[1,1,1]") > json("[1,1]"));
    }

    #[test]
    fn much_that_is_built_of_little_is_too_much() {
        for pair in ["{a={}},", "1,", "a.a.", "a=1\n", "[[x]]\n", "\n\n", "{}"] {
            let text = pair.repeat((64 << 20) / pair.len());
            assert!(of_toml(text.as_bytes()).check().is_err(), "{pair:?}");
        }
        for pair in ["{},", "[]", "1,"] {
            let text = pair.repeat((64 << 20) / pair.len());
            assert!(of_json(text.as_bytes()).check().is_err(), "{pair:?}");
        }
        let text = format!("a = '{}'", "x".repeat(64 << 20));
        assert_eq!(of_toml(text.as_bytes()).check(), Ok(()));
    }

    #[test]
    fn deep_nesting_is_refused() {
        let depth = |text: String| of_toml(text.as_bytes()).depth;
        assert_eq!(depth("a.b.c = [[1]]".into()), 2);
        for text in ["a.".repeat(200), "[".repeat(200), "{a=".repeat(200)] {
            assert!(of_toml(text.as_bytes()).check().is_err(), "{text}");
        }
        assert!(of_json("[".repeat(200).as_bytes()).check().is_err());
    }
}
