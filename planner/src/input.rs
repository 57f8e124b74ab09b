//! Text that a user hands in: read whole, but only up to a limit, whatever a file's size says.

use crate::hint::HintExt;
use anyhow::{Context, Result, anyhow};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use tier_plan_runtime::units::show_bytes;

/// Most bytes of a text. No context holds as many.
pub const MAX_TEXT_BYTES: u64 = 256 << 20;

/// Reads a text file; `what` names it in messages, as in `reading the prompt`.
///
/// # Errors
/// When it can't be read, has more than [`MAX_TEXT_BYTES`], or is not UTF-8.
pub fn read_text(path: &Path, what: &str) -> Result<String> {
    let named = || format!("reading {what} {}", path.display());
    let file = File::open(path).with_context(named)?;
    read_limited(file, MAX_TEXT_BYTES, &named())
}

/// Reads a text to its end; `named` is what was attempted, for messages.
///
/// # Errors
/// As [`read_text`], with `limit` as the limit.
pub fn read_limited(from: impl Read, limit: u64, named: &str) -> Result<String> {
    let mut text = String::new();
    from.take(limit.saturating_add(1))
        .read_to_string(&mut text)
        .with_context(|| named.to_string())?;
    if text.len() as u64 > limit {
        let large = format!("{named}: expected at most {} of text", show_bytes(limit));
        return Err(anyhow!(large)).hint("pass a shorter text");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_has_a_limit_even_if_it_never_ends() {
        assert_eq!(read_limited(&b"abc"[..], 3, "reading x").unwrap(), "abc");
        let endless = read_limited(std::io::repeat(b'a'), 1000, "reading x");
        assert!(
            endless
                .unwrap_err()
                .to_string()
                .starts_with("reading x: expected at most 1000")
        );
        assert!(read_limited(&[0xff][..], 3, "reading x").is_err());
    }
}
