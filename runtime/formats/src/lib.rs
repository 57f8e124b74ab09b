//! Every file that tier-plan reads or writes, as domain types with one codec each.
//!
//! | module | file | what it holds |
//! |---|---|---|
//! | [`gguf`] | `*.gguf` | the container of a model: metadata and tensors, mapped |
//! | [`model`] | – | the network in a GGUF file: layers, tensors, and their sizes |
//! | [`shape`] | `profiles/models/*.toml` | a network by its dimensions, without weights |
//! | [`machine`] | `machine.toml` | the memory tiers of a machine with their rates |
//! | [`profile`] | `*.profile` | which experts each token chose |
//! | [`placement`] | `placement.toml` | where every tensor lives, and the predicted speed |
//! | [`record`] | `*.record.json` | what a run did, and how fast |
//! | [`pack`], [`sums`], [`slots`], [`logprobs`] | | copies of experts, checksums, warm slots, reference logits |
//!
//! A file says its version and what it was made from. A reader refuses a newer version and names
//! both. Writers go through [`safely`], so a file is either complete or absent. Wire structs are
//! private to each codec. This crate knows no solver, no device, and no arithmetic.
//!
//! The path from a model to its sizes:
//!
//! ```
//! use std::path::Path;
//! use tier_plan_formats::model::Model;
//! use tier_plan_formats::units::show_bytes;
//!
//! let model = Model::open(Path::new("../../profiles/demo/demo.gguf"))?;
//! let shape = model.shape();
//! assert_eq!(shape.arch, "qwen3moe");
//! println!(
//!     "{} layers, {} of weights, {} read per token",
//!     shape.n_layer,
//!     show_bytes(shape.weight_bytes()),
//!     show_bytes(shape.token_bytes()),
//! );
//! # Ok::<(), tier_plan_formats::model::ModelError>(())
//! ```
#![deny(unsafe_code)]

pub mod folders;
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
pub mod tier_idx;
pub mod units;

mod copies;
mod cost;
mod framed;
mod kind;
pub mod ranges;
mod text;

pub use source_id::SourceId;

use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a file of one of these formats could not be read or written.
#[derive(Debug, Error)]
pub enum FormatError {
    /// The operating system refused to read or write the file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said. It is part of the message and so no
        /// [`source`](std::error::Error::source): a printed chain of causes would repeat it.
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
        /// The field, what was found, and what was expected.
        what: String,
    },
}

impl FormatError {
    /// Returns the error of a wrong value. `what` names the field, the value, and what was
    /// expected.
    pub(crate) fn invalid(path: &Path, what: impl Into<String>) -> FormatError {
        FormatError::Invalid {
            path: path.into(),
            what: what.into(),
        }
    }
}

/// Refuses a file made for another model; `file` is `plan` or `profile`.
fn check_model(
    made_for: &SourceId,
    given: &SourceId,
    file: &str,
    hint: &str,
    path: &Path,
) -> Result<(), FormatError> {
    if made_for.hash == given.hash {
        return Ok(());
    }
    Err(FormatError::invalid(
        path,
        format!(
            "this {file} was made for the model {made_for}, but the model given is {given}; {hint}"
        ),
    ))
}

#[cfg(test)]
mod doc_tests;
