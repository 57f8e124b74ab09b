//! What a file that is not GGUF looks like, so that the message can say how it came about.

use super::error::GgufError;
use super::pieces;
use std::path::Path;

const DOWNLOAD: &str = "download the .gguf file itself again";
const CONVERT: &str = "convert the model to GGUF first, or download a .gguf of it";
const UNPACK: &str = "unpack it and name the .gguf file in it";

/// Returns the error for a file that does not begin as a GGUF file does.
pub(super) fn foreign(bytes: &[u8], path: &Path) -> GgufError {
    let (found, hint) = match known(bytes) {
        Some(known) => known,
        None if pieces::is_piece(path) => return pieces::error(path),
        None => unknown(bytes),
    };
    GgufError::Foreign {
        path: path.to_path_buf(),
        found,
        hint,
    }
}

/// Recognizes a file by what it begins with.
fn known(bytes: &[u8]) -> Option<(String, &'static str)> {
    let head = head(bytes);
    if head.is_empty() {
        return Some(("is empty".into(), DOWNLOAD));
    }
    if head.starts_with(b"version https://git-lfs") {
        return Some((
            lfs(head),
            "fetch the content with `git lfs pull`, or download the file itself",
        ));
    }
    let by_magic: &[(&[u8], &str, &str)] = &[
        (
            b"FUGG",
            "is GGUF in big-endian byte order",
            "use a little-endian file of this model",
        ),
        (b"lmgg", "is a GGML file, from before GGUF", CONVERT),
        (b"fmgg", "is a GGMF file, from before GGUF", CONVERT),
        (b"tjgg", "is a GGJT file, from before GGUF", CONVERT),
        (b"algg", "is a GGLA adapter file", CONVERT),
        (
            b"PK\x03\x04",
            "looks like a ZIP archive (PyTorch checkpoints are ZIP archives too)",
            CONVERT,
        ),
        (b"\x1f\x8b", "looks like gzip-compressed data", UNPACK),
        (
            b"\x28\xb5\x2f\xfd",
            "looks like Zstandard-compressed data",
            UNPACK,
        ),
        (b"\xfd7zXZ\x00", "looks like xz-compressed data", UNPACK),
        (
            b"\x04\x22\x4d\x18",
            "looks like LZ4-compressed data",
            UNPACK,
        ),
        (b"Rar!", "looks like a RAR archive", UNPACK),
        (b"BZh", "looks like bzip2-compressed data", UNPACK),
        (b"7z\xbc\xaf\x27\x1c", "looks like a 7-Zip archive", UNPACK),
        (b"\x89HDF\r\n", "looks like an HDF5 file", CONVERT),
        (b"%PDF-", "looks like a PDF document", DOWNLOAD),
        (b"\x7fELF", "looks like a program", DOWNLOAD),
    ];
    if let Some((_, found, hint)) = by_magic.iter().find(|(magic, ..)| head.starts_with(magic)) {
        return Some(((*found).into(), hint));
    }
    if head.get(257..262) == Some(b"ustar") {
        return Some(("looks like a tar archive".into(), UNPACK));
    }
    // Safetensors: the length of a JSON header as u64, then the header.
    if let Some(length) = head.first_chunk::<8>().map(|b| u64::from_le_bytes(*b))
        && head.get(8) == Some(&b'{')
        && length <= bytes.len() as u64
    {
        return Some(("looks like a safetensors file".into(), CONVERT));
    }
    if head.len() >= 2 && head[0] == 0x80 && (2..=5).contains(&head[1]) {
        return Some((
            "looks like a Python pickle (an old PyTorch checkpoint)".into(),
            CONVERT,
        ));
    }
    if head.first() == Some(&0x08) && head.get(2) == Some(&0x12) && has(head, b"onnx") {
        return Some(("looks like an ONNX file".into(), CONVERT));
    }
    if head.get(4..8) == Some(b"TFL3") {
        return Some(("looks like a TensorFlow Lite file".into(), CONVERT));
    }
    None
}

/// Describes a file that begins like nothing known.
fn unknown(bytes: &[u8]) -> (String, &'static str) {
    let head = head(bytes);
    if head.iter().all(|&b| b == 0) {
        return (
            "begins with zeros only, as a download does that reserved its space and never finished"
                .into(),
            DOWNLOAD,
        );
    }
    let text = String::from_utf8_lossy(head);
    let trimmed = text.trim_start_matches('\u{feff}').trim_start();
    let lower: String = trimmed
        .chars()
        .take(64)
        .collect::<String>()
        .to_ascii_lowercase();
    if ["<!doctype html", "<html", "<head", "<?xml"]
        .iter()
        .any(|tag| lower.starts_with(tag))
    {
        return (
            "looks like a web page".into(),
            "the download gave a page instead of the file: use the direct link, and log in first if the model asks for it",
        );
    }
    let printable = head
        .iter()
        .all(|&b| b >= 0x20 && b != 0x7f || matches!(b, b'\t' | b'\n' | b'\r'));
    if printable {
        let start: String = trimmed.chars().take(40).collect();
        let kind = if trimmed.starts_with(['{', '[']) {
            "JSON"
        } else {
            "text"
        };
        return (
            format!("looks like {kind} that begins {start:?}"),
            "name a .gguf file",
        );
    }
    let start = &head[..head.len().min(4)];
    (
        format!("begins with the bytes {start:02x?} and not with 'GGUF'"),
        "name a .gguf file, or download it again",
    )
}

/// Returns the bytes that decide what a file is.
fn head(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.len().min(4096)]
}

fn has(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// Describes the file that a Git LFS pointer stands for.
fn lfs(head: &[u8]) -> String {
    let text = String::from_utf8_lossy(head);
    match text
        .lines()
        .find_map(|l| l.strip_prefix("size "))
        .and_then(|s| s.trim().parse::<u64>().ok())
    {
        Some(size) => format!("is a Git LFS pointer to a file of {size} bytes, not the file"),
        None => "is a Git LFS pointer, not the file it stands for".into(),
    }
}
