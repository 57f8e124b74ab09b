//! Input that cannot work: each is refused with exit code 1 and one line that names the thing, what
//! was expected and the mend, before any work, and with nothing written.

mod machines;
mod models;
mod options;
mod plans;
mod texts;

use crate::common::{demo_machine, demo_model, refused, root, run_in, succeeded};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A folder to run in, with short names for the bundled files.
struct Place {
    folder: TempDir,
    demo: String,
    machine: String,
    other: String,
}

impl Place {
    fn new() -> Self {
        let text = |path: PathBuf| path.to_str().unwrap().to_string();
        Self {
            folder: tempfile::tempdir().unwrap(),
            demo: text(demo_model()),
            machine: text(demo_machine()),
            other: text(root().join("tests/data/quant/Q4_0.gguf")),
        }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path().join(name), bytes).unwrap();
    }

    fn folder(&self, name: &str) {
        fs::create_dir_all(self.path().join(name)).unwrap();
    }

    fn refused(&self, args: &[&str], words: &[&str]) -> String {
        refused(self.path(), args, words)
    }

    /// A plan for the bundled model, made without a profile.
    fn plan(&self) -> String {
        let args = [
            "solve",
            &self.demo,
            "-m",
            &self.machine,
            "--strategy",
            "lru-only",
            "--context",
            "64",
        ];
        succeeded(run_in(
            self.path(),
            &[&args[..], &["-o", "plan.toml"]].concat(),
        ));
        fs::read_to_string(self.path().join("plan.toml")).unwrap()
    }

    /// One short prompt of each split.
    fn prompts(&self) {
        self.folder("prompts/a");
        self.write("prompts/a/train-1.txt", "In the beginning");
        self.write("prompts/a/heldout-1.txt", "And the earth was without form");
    }

    /// A profile of the bundled model.
    fn profile(&self) {
        self.prompts();
        let args = [
            "profile",
            &self.demo,
            "--prompts",
            "prompts",
            "-o",
            "demo.profile",
        ];
        succeeded(run_in(
            self.path(),
            &[&args[..], &["--prompt-tokens", "4", "--decode-tokens", "4"]].concat(),
        ));
    }
}

/// Replaces the first occurrence, which must be there.
fn swap(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "{from} is not in {text}");
    text.replacen(from, to, 1)
}

/// Every place where `needle` begins.
fn places(bytes: &[u8], needle: &[u8]) -> Vec<usize> {
    bytes
        .windows(needle.len())
        .enumerate()
        .filter(|(_, w)| *w == needle)
        .map(|(at, _)| at)
        .collect()
}
