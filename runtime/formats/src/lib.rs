//! Every file that tier-plan reads or writes, as domain types with one codec each.
//!
//! A file says its version and what it was made from. A reader refuses a newer version and names both; writers go
//! through [`safely`] so that a file is either whole or not there. Wire structs are private to each codec.

pub mod gguf;
pub mod logprobs;
pub mod machine;
pub mod model;
pub mod pack;
pub mod placement;
pub mod profile;
pub mod record;
pub mod safely;
pub mod shape;
pub mod slots;
pub mod source_id;
pub mod sums;
pub mod units;

mod framed;
mod kind;
pub mod ranges;
mod text;

pub use source_id::SourceId;

use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a file of ours could not be read or written.
#[derive(Debug, Error)]
pub enum FormatError {
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said. It is part of the message, so it is no source of its own (the raw name says so):
        /// whoever prints the chain of causes would print it twice.
        r#source: std::io::Error,
    },
    /// The file is of another kind.
    #[error("{}: not a {expected}: {found}", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// The kind of file that was expected, `placement plan` and the like.
        expected: &'static str,
        /// What was found instead.
        found: String,
    },
    /// The file was written by a newer program.
    #[error("{}: {what} version {found}, but this program reads up to version {supported}; update tier-plan", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// The kind of file.
        what: &'static str,
        /// The version in the file.
        found: u64,
        /// The newest version this program reads.
        supported: u64,
    },
    /// A value is wrong.
    #[error("{}: {what}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The field, what was expected, what was found, and the mend.
        what: String,
    },
}

impl FormatError {
    /// A wrong value: `what` names the field, what was expected, what was found, and the mend.
    pub(crate) fn invalid(path: &Path, what: impl Into<String>) -> FormatError {
        FormatError::Invalid { path: path.into(), what: what.into() }
    }
}

/// Refuses a file made for another model; `file` is `plan` or `profile`.
fn check_model(made_for: &SourceId, given: &SourceId, file: &str, mend: &str, path: &Path) -> Result<(), FormatError> {
    if made_for.hash == given.hash {
        return Ok(());
    }
    Err(FormatError::invalid(
        path,
        format!("this {file} was made for the model {made_for}, but the model given is {given}; {mend}"),
    ))
}

#[cfg(test)]
mod doc_tests;
