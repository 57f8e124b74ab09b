//! Text from files made fit for a terminal, a log, and a table: no control characters, one line.
//!
//! Names in models, plans and machine files, file names, and the messages of errors about them can
//! hold anything. An escape sequence would act on the terminal, and an override of the writing
//! direction would make a line read as another one.

use std::borrow::Cow;
use std::fmt::Write;

/// Most characters of a name that are shown.
const MAX_NAME_CHARS: usize = 200;

/// Most characters of an error that are shown.
const MAX_LINE_CHARS: usize = 4000;

/// Returns a name without control characters and line breaks, cut to a length that fits a table.
///
/// ```
/// use tier_plan_runtime::printable::printable;
///
/// assert_eq!(printable("red \u{1b}[31m"), r"red \u001b[31m");
/// assert_eq!(printable("two\nlines"), r"two\nlines");
/// ```
pub fn printable(name: &str) -> Cow<'_, str> {
    escaped(name, true, MAX_NAME_CHARS)
}

/// Returns a message on one line and without control characters.
pub fn one_line(message: &str) -> Cow<'_, str> {
    escaped(message, true, MAX_LINE_CHARS)
}

/// Returns text of several lines without control characters, line breaks and tabs aside.
pub fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, false, usize::MAX)
}

/// Whether a character acts on what shows it instead of being shown.
pub fn is_control(c: char) -> bool {
    // Control characters of ASCII and of Latin-1, line separators, and marks and overrides of the
    // writing direction.
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn escaped(text: &str, is_one_line: bool, max_chars: usize) -> Cow<'_, str> {
    let stays = |c: char| !is_control(c) || (!is_one_line && matches!(c, '\n' | '\t'));
    if text.chars().all(stays) && (text.len() <= max_chars || text.chars().count() <= max_chars) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len().min(4 * max_chars.min(text.len())));
    for (i, c) in text.chars().enumerate() {
        if i == max_chars {
            safe.push('…');
            break;
        }
        match c {
            c if stays(c) => safe.push(c),
            '\n' => safe.push_str("\\n"),
            '\r' => safe.push_str("\\r"),
            '\t' => safe.push_str("\\t"),
            // As in JSON, so that a string of JSON keeps its value.
            c => {
                let _ = write!(safe, "\\u{:04x}", u32::from(c));
            }
        }
    }
    Cow::Owned(safe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_text_stays_as_it_is() {
        for text in ["", "a b", "Grüße, 世界 👋", r"C:\n"] {
            assert!(matches!(printable(text), Cow::Borrowed(same) if same == text));
        }
        assert_eq!(lines("a\tb\nc"), "a\tb\nc");
    }

    #[test]
    fn no_control_character_and_no_override_passes() {
        let bad = (0..0x20u32)
            .chain(0x7f..0xa0)
            .chain([0x200e, 0x200f])
            .chain(0x2028..0x202f)
            .chain(0x2066..0x206a);
        for c in bad.filter_map(char::from_u32) {
            let text = format!("a{c}b");
            assert!(!printable(&text).contains(c), "{c:?}");
            assert!(!one_line(&text).contains(c), "{c:?}");
            assert_eq!(lines(&text).contains(c), matches!(c, '\n' | '\t'), "{c:?}");
        }
    }

    #[test]
    fn a_string_of_json_keeps_its_value() {
        let value = serde_json::json!("\u{7f}\u{9b}31m\u{202e}\u{1b}\n");
        let printed = value.to_string();
        let safe = lines(&printed);
        assert!(!safe.chars().any(is_control));
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&safe).unwrap(),
            value
        );
    }

    #[test]
    fn lengths_are_bounded() {
        let long = "é".repeat(10_000);
        assert_eq!(printable(&long).chars().count(), MAX_NAME_CHARS + 1);
        assert_eq!(one_line(&long).chars().count(), MAX_LINE_CHARS + 1);
        assert_eq!(lines(&long), long);
        assert!(printable(&"\u{1b}".repeat(10_000)).len() <= 6 * MAX_NAME_CHARS + 3);
    }
}
