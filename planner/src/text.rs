//! Texts that users hand in as files or through pipes: UTF-8, with a byte order mark or without.
//! Other encodings are named, with a command that converts them.

use crate::hint::HintExt;
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use tier_plan_runtime::units::show_bytes;

/// Longest text in bytes, many times what any context holds.
const MAX_TEXT_BYTES: u64 = 256 << 20;

/// Bytes of a text that are looked at to tell UTF-16 without a byte order mark.
const UTF16_SAMPLE_BYTES: usize = 512;

/// Reads the text in a file. `what` says in errors what it is, as "the prompt".
///
/// # Errors
/// When the file cannot be read, or is not UTF-8 text.
pub fn read_file(what: &str, path: &Path) -> Result<String> {
    let name = format!("{what} {}", path.display());
    let file = File::open(path).with_context(|| format!("reading {name}"))?;
    read(&name, file)
}

/// Reads a text to its end. `name` names it in errors.
///
/// # Errors
/// When reading fails, or it is not UTF-8 text.
pub fn read(name: &str, reader: impl Read) -> Result<String> {
    let mut bytes = Vec::new();
    reader
        .take(MAX_TEXT_BYTES + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("reading {name}"))?;
    if bytes.len() as u64 > MAX_TEXT_BYTES {
        let large = || {
            bail!(
                "{name}: expected at most {} of text",
                show_bytes(MAX_TEXT_BYTES)
            )
        };
        return large().hint("pass a shorter text");
    }
    decode(name, bytes)
}

/// Returns the text that `bytes` are, without a byte order mark. `name` names it in errors.
///
/// # Errors
/// When they are not UTF-8 text.
pub fn decode(name: &str, bytes: Vec<u8>) -> Result<String> {
    if let Some(encoding) = wide_encoding(&bytes) {
        let wide = || bail!("{name}: {encoding} text, expected UTF-8");
        return wide().hint(format!(
            "convert it: iconv -f {encoding} -t UTF-8 FILE > NEW_FILE"
        ));
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(match text.strip_prefix('\u{feff}') {
            Some(rest) => rest.to_string(),
            None => text,
        }),
        Err(error) => {
            let at = error.utf8_error().valid_up_to();
            let byte = error.as_bytes()[at];
            let invalid = || {
                bail!("{name}: byte 0x{byte:02X} at offset {at} is not UTF-8, expected UTF-8 text")
            };
            invalid().hint(
                "convert it from the encoding that it has, such as: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW_FILE",
            )
        }
    }
}

/// Returns the name of an encoding with units of two or four bytes that `bytes` are certainly in.
pub(crate) fn wide_encoding(bytes: &[u8]) -> Option<&'static str> {
    match bytes {
        [0xff, 0xfe, 0, 0, ..] => return Some("UTF-32LE"),
        [0, 0, 0xfe, 0xff, ..] => return Some("UTF-32BE"),
        [0xff, 0xfe, ..] => return Some("UTF-16LE"),
        [0xfe, 0xff, ..] => return Some("UTF-16BE"),
        _ => {}
    }
    // Without a mark: Latin text has a zero in every unit, and UTF-8 text has none.
    let sample = &bytes[..bytes.len().min(UTF16_SAMPLE_BYTES) & !1];
    let all = |parity: usize, zero: bool| {
        let mut every_other = sample.iter().skip(parity).step_by(2);
        every_other.all(|b| (*b == 0) == zero)
    };
    match sample.len() {
        0..4 => None,
        _ if all(0, false) && all(1, true) => Some("UTF-16LE"),
        _ if all(0, true) && all(1, false) => Some("UTF-16BE"),
        _ => None,
    }
}

/// Returns the text with line ends as Unix has them, which models were trained on.
pub fn unix_lines(text: String) -> String {
    if text.contains("\r\n") {
        text.replace("\r\n", "\n")
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hint::hint_for;

    fn refused(bytes: &[u8]) -> (String, String) {
        let error = decode("the prompt p.txt", bytes.to_vec()).unwrap_err();
        (error.to_string(), hint_for(&error).unwrap())
    }

    fn utf16(text: &str, bytes: fn(u16) -> [u8; 2]) -> Vec<u8> {
        text.encode_utf16().flat_map(bytes).collect()
    }

    #[test]
    fn utf8_is_taken_with_and_without_a_mark() {
        for (bytes, text) in [
            ("", ""),
            ("\u{feff}", ""),
            ("\u{feff}Hé", "Hé"),
            ("H\u{feff}", "H\u{feff}"),
        ] {
            assert_eq!(decode("x", bytes.into()).unwrap(), text);
        }
        assert_eq!(decode("x", b"a\0bc".to_vec()).unwrap(), "a\0bc");
    }

    #[test]
    fn other_encodings_are_named_with_a_fix() {
        for (bytes, encoding) in [
            (utf16("\u{feff}Hi", u16::to_le_bytes), "UTF-16LE"),
            (utf16("\u{feff}Hi", u16::to_be_bytes), "UTF-16BE"),
            (utf16("Hi", u16::to_le_bytes), "UTF-16LE"),
            (utf16("Hi", u16::to_be_bytes), "UTF-16BE"),
            (vec![0xff, 0xfe, 0, 0, b'H', 0, 0, 0], "UTF-32LE"),
        ] {
            let (error, hint) = refused(&bytes);
            assert_eq!(
                error,
                format!("the prompt p.txt: {encoding} text, expected UTF-8")
            );
            assert!(hint.contains(&format!("iconv -f {encoding} ")), "{hint}");
        }
        let (error, hint) = refused(b"caf\xe9");
        assert!(error.contains("byte 0xE9 at offset 3"), "{error}");
        assert!(hint.contains("iconv"), "{hint}");
    }

    #[test]
    fn lines_end_as_in_unix() {
        assert_eq!(unix_lines("a\r\nb\rc\n".into()), "a\nb\rc\n");
    }
}
