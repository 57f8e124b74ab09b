//! Copies of a model's experts on other drives, as plans and machine files name them.

use crate::text::{float, quote};
use serde::Deserialize;

/// A copy of the model's experts on another drive.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertCopy {
    /// Path of the file: the model once more (the first part of a split one), or packed experts.
    pub file: String,
    /// Part of the last tier's rate that this copy's drive has, above 0; the model's own drive has
    /// what all copies leave.
    pub share: f64,
}

/// Most copies that are named.
pub const MAX_COPIES: usize = 7;

/// Most bytes of a path.
const MAX_PATH: usize = 4096;

/// Returns the part of the last tier's rate that the model's own drive has.
pub fn own_share(copies: &[ExpertCopy]) -> f64 {
    1.0 - copies.iter().map(|copy| copy.share).sum::<f64>()
}

/// Why copies are refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Violation {
    #[error("{found} copies are named, but {MAX_COPIES} are the most")]
    TooMany { found: usize },
    #[error(
        "the file of a copy is empty, longer than {MAX_PATH} bytes, or has control characters; write its path"
    )]
    NoFile,
    #[error(
        "the share of the copy {} is {share}, expected above 0, and below 1 with those of all copies together",
        quote(file)
    )]
    Share { file: String, share: f64 },
}

/// Fails unless all copies can be read from, and leave a share to the model's own drive.
pub(crate) fn check(copies: &[ExpertCopy]) -> Result<(), Violation> {
    if copies.len() > MAX_COPIES {
        return Err(Violation::TooMany {
            found: copies.len(),
        });
    }
    for copy in copies {
        if !is_path(&copy.file) {
            return Err(Violation::NoFile);
        }
        let is_share = copy.share > 0.0 && copy.share < 1.0;
        if !is_share || own_share(copies) <= 0.0 {
            return Err(Violation::Share {
                file: copy.file.clone(),
                share: copy.share,
            });
        }
    }
    Ok(())
}

/// Whether a text can be a path that messages show.
fn is_path(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_PATH && !text.chars().any(char::is_control)
}

/// Encodes copies as a TOML array of [`WireCopy`].
pub(crate) fn encode(copies: &[ExpertCopy]) -> String {
    let copies = copies.iter().map(|copy| {
        let (file, share) = (quote(&copy.file), float(copy.share));
        format!("{{ file = {file}, share = {share} }}")
    });
    format!("[{}]", copies.collect::<Vec<_>>().join(", "))
}

/// [`ExpertCopy`] as files spell it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WireCopy {
    file: String,
    share: f64,
}

impl From<WireCopy> for ExpertCopy {
    fn from(wire: WireCopy) -> ExpertCopy {
        ExpertCopy {
            file: wire.file,
            share: wire.share,
        }
    }
}
