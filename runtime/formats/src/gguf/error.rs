//! Why a GGUF file was refused: the file, the thing in it, what was expected, what was found, and
//! the hint.

use super::foreign_types::named;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a GGUF file could not be opened, or lacks something that was asked of it.
#[derive(Debug, Error)]
pub enum GgufError {
    /// The operating system refused to open or map the file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said. It is part of the message and so no
        /// [`source`](std::error::Error::source): a printed chain of causes would repeat it.
        r#source: std::io::Error,
    },
    /// The file is of another kind.
    #[error("{}: not a GGUF model: it {found}; {hint}", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it looks like, as the end of a sentence that begins with `it`.
        found: String,
        /// What to do, as a clause.
        hint: &'static str,
    },
    /// GGUF, but of a version or byte order that this program does not read.
    #[error("{}: {what}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// What was found, what this program reads, and what to do.
        what: String,
    },
    /// The file is shorter than its own header says.
    #[error(
        "{}: the file is cut short: {what}, but it has only {file_bytes} bytes; {}{missing} bytes are missing: download it again, or resume the download",
        path.display(), if *at_least { "at least " } else { "" }
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What reaches past the end.
        what: String,
        /// Bytes the file has.
        file_bytes: u64,
        /// Bytes it would need beyond those.
        missing: u64,
        /// The header itself is cut, so more may be missing.
        at_least: bool,
    },
    /// Something in the header cannot be right.
    #[error("{}: {what}; the file is damaged or was written wrongly: download it again, or convert the model again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        what: String,
    },
    /// A tensor has an element type without a decoder.
    #[error("{}: tensor '{tensor}' has type {type_id}{}, which this program does not read; it reads {supported}: choose another quantization of this model", path.display(), named(*type_id))]
    UnsupportedType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The type's number in the file.
        type_id: u32,
        /// Names of the types that are read.
        supported: String,
    },
    /// The parts of a split model do not fit together.
    #[error("{}: {what}", path.display())]
    Split {
        /// The part that is missing or does not fit.
        path: PathBuf,
        /// What was expected, what was found, and what to do.
        what: String,
    },
    /// A metadata key is not there.
    #[error("{}: metadata key '{key}' is missing (expected {expected}): this model can't be run without it; convert it again with a newer converter", path.display())]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The kind of value it should have.
        expected: String,
    },
    /// A metadata key has a value of the wrong kind.
    #[error("{}: metadata key '{key}': expected {expected}, found {found}; convert the model again", path.display())]
    WrongValue {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The kind of value it should have.
        expected: String,
        /// Kind and, where short, content of what is there.
        found: String,
    },
}

impl GgufError {
    pub(super) fn io(path: &Path, source: std::io::Error) -> Self {
        GgufError::Io {
            path: path.to_path_buf(),
            r#source,
        }
    }

    /// Whether the system had no memory for what was asked.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, GgufError::Io { source, .. } if source.kind() == std::io::ErrorKind::OutOfMemory)
    }

    pub(super) fn damaged(path: &Path, what: impl Into<String>) -> Self {
        GgufError::Damaged {
            path: path.to_path_buf(),
            what: what.into(),
        }
    }

    pub(super) fn split(path: &Path, what: impl Into<String>) -> Self {
        GgufError::Split {
            path: path.to_path_buf(),
            what: what.into(),
        }
    }
}
