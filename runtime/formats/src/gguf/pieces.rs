//! Files that were cut into pieces by bytes, as hosts with a limit on file sizes ask for: only joined
//! are they a model. (A split model has parts that are files of their own, see `split`.)

use super::error::GgufError;
use std::path::Path;

/// Endings that a download has before it is finished.
const UNFINISHED: &[&str] = &[
    ".part",
    ".partial",
    ".crdownload",
    ".download",
    ".incomplete",
    ".opdownload",
    ".aria2",
    ".!qb",
];

/// Returns whether a name is that of one piece of a file: `m.gguf.part1of2`, `m.gguf-split-a`,
/// `m.gguf.001`, `m.gguf.aa`.
pub(super) fn is_piece(path: &Path) -> bool {
    let name = file_name(path);
    // Letters or digits that count the pieces.
    let counts = |text: &str| {
        let digits =
            !text.is_empty() && text.len() <= 5 && text.bytes().all(|b| b.is_ascii_digit());
        let letters = (1..=3).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_lowercase());
        digits || letters
    };
    let numbered = |text: &str| {
        let text = text.trim_start_matches(['-', '_', '.']);
        match text.split_once("of") {
            Some((number, count)) => {
                let trimmed = |text: &str| text.trim_matches(['-', '_', '.']).to_string();
                counts(&trimmed(number)) && counts(&trimmed(count))
            }
            None => counts(text),
        }
    };
    for mark in ["part", "split", "chunk", "piece"] {
        if let Some((before, after)) = name.rsplit_once(mark)
            && before.ends_with(['.', '-', '_'])
            && numbered(after.trim_end_matches(".gguf"))
        {
            return true;
        }
    }
    name.rsplit_once(".gguf").is_some_and(|(_, after)| {
        !after.is_empty() && counts(after.trim_start_matches(['.', '-', '_']))
    })
}

/// Returns whether a name is that of a download that goes on.
pub(super) fn is_unfinished(path: &Path) -> bool {
    let name = file_name(path);
    UNFINISHED.iter().any(|end| name.ends_with(end))
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().to_lowercase())
        .unwrap_or_default()
}

/// Returns the error of one piece.
pub(super) fn error(path: &Path) -> GgufError {
    GgufError::split(
        path,
        "this is one piece of a file that was cut by bytes: join all pieces in their order, as with `cat PIECE1 PIECE2 > MODEL.gguf`, and name the whole file",
    )
}

/// Explains the error of a file that is cut short, where its name says why it is.
pub(super) fn explain(error: GgufError) -> GgufError {
    match error {
        GgufError::Truncated { path, .. } if is_piece(&path) => self::error(&path),
        GgufError::Truncated { path, .. } if is_unfinished(&path) => GgufError::split(
            &path,
            "the name says that this download is not finished: finish it, and name the whole file",
        ),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_pieces() {
        for name in [
            "m.gguf.part1of2",
            "m.gguf.part-1-of-2",
            "m.gguf-part-a",
            "m.Q4_K_M.gguf-split-a",
            "m.split-01.gguf",
            "M.GGUF.PARTAA",
            "m.gguf.001",
            "m.gguf.aa",
            "m.gguf-ab",
            "m.gguf.part_3",
        ] {
            assert!(is_piece(Path::new(name)), "{name}");
        }
        for name in [
            "m.gguf",
            "m-00001-of-00002.gguf",
            "m.gguf.bak2",
            "apart.gguf",
            "party.gguf",
            "m-part.gguf",
            "split.gguf",
            "m.gguf.part",
            "",
        ] {
            assert!(!is_piece(Path::new(name)), "{name}");
        }
    }

    #[test]
    fn names_of_unfinished_downloads() {
        for name in [
            "m.gguf.part",
            "m.gguf.crdownload",
            "Unconfirmed 12.crdownload",
        ] {
            assert!(is_unfinished(Path::new(name)), "{name}");
        }
        assert!(!is_unfinished(Path::new("m.gguf")));
    }
}
