//! Generated text on a terminal. A model may write any bytes, and a terminal obeys some of them:
//! they move the cursor, change its title, or write to the clipboard.

use std::borrow::Cow;
use std::fmt::Write;

/// Filter of text that is shown as it is generated, piece by piece.
#[derive(Debug, Clone, Default)]
pub struct Screen {
    escapes: bool,
    /// Whether the last piece ended in a carriage return that is not shown yet.
    after_cr: bool,
}

impl Screen {
    /// Creates a filter for a terminal, or for a file or pipe, which gets every byte.
    pub fn new(is_terminal: bool) -> Self {
        Self {
            escapes: is_terminal,
            after_cr: false,
        }
    }

    /// Returns what to write for the next piece of text. On a terminal, control characters are
    /// escaped (`\x1b`), except tabs and line ends.
    pub fn show<'t>(&mut self, text: &'t str) -> Cow<'t, str> {
        let is_plain = |c: char| c == '\n' || c == '\t' || !c.is_control();
        if !self.escapes || (!self.after_cr && text.chars().all(is_plain)) {
            return Cow::Borrowed(text);
        }
        let mut shown = String::with_capacity(text.len() + 16);
        for c in text.chars() {
            // A lone carriage return would let later text overwrite the line.
            if std::mem::take(&mut self.after_cr) {
                shown.push_str(if c == '\n' { "\r" } else { "\\r" });
            }
            match c {
                '\r' => self.after_cr = true,
                _ if is_plain(c) => shown.push(c),
                // Writing to a string cannot fail.
                _ => drop(write!(shown, "\\x{:02x}", u32::from(c))),
            }
        }
        Cow::Owned(shown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a terminal gets of pieces.
    fn shown(pieces: &[&str]) -> String {
        let mut screen = Screen::new(true);
        pieces.iter().map(|p| screen.show(p).into_owned()).collect()
    }

    #[test]
    fn a_terminal_gets_no_control_characters() {
        assert_eq!(shown(&["a\tb\n", "é"]), "a\tb\né");
        assert_eq!(shown(&["\u{1b}]0;t\u{7}"]), "\\x1b]0;t\\x07");
        // A sequence in two tokens, and the one-character form of its beginning.
        assert_eq!(shown(&["\u{1b}", "[31m"]), "\\x1b[31m");
        assert_eq!(shown(&["\u{9b}31m\u{7f}\u{0}"]), "\\x9b31m\\x7f\\x00");
    }

    #[test]
    fn line_ends_pass_and_lone_returns_do_not() {
        assert_eq!(shown(&["a\r\nb", "\r", "\nc"]), "a\r\nb\r\nc");
        assert_eq!(shown(&["a\rb", "\r", "\r", "c"]), "a\\rb\\r\\rc");
    }

    #[test]
    fn a_pipe_gets_every_byte() {
        let mut screen = Screen::new(false);
        assert_eq!(screen.show("\u{1b}[31m\r"), "\u{1b}[31m\r");
        assert_eq!(screen.show("x"), "x");
    }
}
