//! Tests of the whole reader, against files that another writer made and against files made to be
//! wrong.

mod ask;
mod malformed;
mod parts;
mod random;
mod reading;

use std::path::{Path, PathBuf};

/// A file of the repository, by its path from the top.
fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(path)
}

/// A fixture, by name.
fn fixture(name: &str) -> PathBuf {
    repository("tests/data/gguf").join(name)
}

/// That the message holds every one of the pieces.
#[track_caller]
fn says(message: &str, pieces: &[&str]) {
    for piece in pieces {
        assert!(message.contains(piece), "expected {piece:?} in: {message}");
    }
}
