//! Paths in the words of a shell, whatever bytes they have.

use super::llama_cpp::quoted;
use crate::printable::is_control;
use std::ffi::OsStr;
use std::path::Path;

/// Returns a path quoted for a script, which any POSIX shell reads back byte for byte.
pub fn quoted_bytes(path: &Path) -> Vec<u8> {
    if let Some(text) = path.to_str() {
        return quoted(text).into_bytes();
    }
    let mut script = vec![b'\''];
    for byte in bytes(path.as_os_str()) {
        match byte {
            b'\'' => script.extend(br"'\''"),
            byte => script.push(*byte),
        }
    }
    script.push(b'\'');
    script
}

/// Returns a path quoted for a terminal: as in a script, or as `$'…'` (bash, zsh, ksh) if it has
/// bytes that are no text.
pub fn shown(path: &Path) -> String {
    if let Some(text) = path.to_str().filter(|text| !text.chars().any(is_control)) {
        return quoted(text);
    }
    let mut shown = String::from("$'");
    for byte in bytes(path.as_os_str()) {
        match byte {
            b'\'' | b'\\' => shown.extend(['\\', char::from(*byte)]),
            b' '..=b'~' => shown.push(char::from(*byte)),
            // Three octal digits: of hexadecimal ones a shell would take more than two.
            byte => shown.push_str(&format!("\\{byte:03o}")),
        }
    }
    shown.push('\'');
    shown
}

#[cfg(unix)]
fn bytes(path: &OsStr) -> &[u8] {
    std::os::unix::ffi::OsStrExt::as_bytes(path)
}

#[cfg(not(unix))]
fn bytes(path: &OsStr) -> &[u8] {
    path.as_encoded_bytes()
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;
    use std::process::Command;

    #[test]
    fn a_shell_reads_the_path_back() {
        for name in [
            &b"a b"[..],
            b"it's",
            b"m\xff.gguf",
            b"\xff'\\n\n\x1b7",
            b"-x",
            b"$HOME",
        ] {
            let path = Path::new(OsStr::from_bytes(name));
            let mut script = b"printf %s ".to_vec();
            script.extend(quoted_bytes(path));
            let mut shell = Command::new("sh");
            let read = shell.arg("-c").arg(OsStr::from_bytes(&script));
            assert_eq!(read.output().unwrap().stdout, name, "{path:?}");
            assert!(!shown(path).chars().any(is_control), "{path:?}");
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_shown_as_octal() {
        let shown_of = |name: &[u8]| shown(Path::new(OsStr::from_bytes(name)));
        assert_eq!(shown_of(b"m.gguf"), "m.gguf");
        assert_eq!(shown_of(b"m\xff7.gguf"), r"$'m\3777.gguf'");
        assert_eq!(shown_of(b"a'\n\\"), r"$'a\'\012\\'");
    }
}
