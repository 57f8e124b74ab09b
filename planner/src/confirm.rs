//! Asking for a yes on a terminal.

use crate::printable::one_line;
use anyhow::{Context, Result};
use std::io::{BufRead, IsTerminal, Write};

/// Returns whether a question would be seen and could be answered.
pub fn can_ask() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Asks a question on one line, and returns whether the answer is yes.
///
/// # Errors
/// When the terminal cannot be written or read.
pub fn confirmed(question: &str) -> Result<bool> {
    let mut screen = std::io::stderr().lock();
    screen.write_all(one_line(question).as_bytes())?;
    screen.flush()?;
    drop(screen);
    let mut line = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut line)
        .context("reading the answer")?;
    Ok(is_yes(&line))
}

fn is_yes(line: &str) -> bool {
    ["y", "yes"].contains(&line.trim().to_ascii_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_yes_is_yes() {
        for line in ["y", "Y\n", " yes \r\n", "YES"] {
            assert!(is_yes(line), "{line:?}");
        }
        for line in ["", "\n", "n", "no", "yep", "1"] {
            assert!(!is_yes(line), "{line:?}");
        }
    }
}
