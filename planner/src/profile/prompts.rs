//! Reads calibration prompts: a folder with one folder per domain, each with text files.

use crate::input::read_text;
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::profile::Split;

/// One calibration prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// Name of its folder.
    pub domain: String,
    /// Name of its file.
    pub name: String,
    /// Split of the prompt: files named `heldout*` only judge plans.
    pub split: Split,
    /// Content of the file.
    pub text: String,
}

impl Prompt {
    /// Returns the prompt's name for messages: `prompt DOMAIN/NAME`.
    pub fn title(&self) -> String {
        format!("prompt {}/{}", self.domain, self.name)
    }
}

/// Reads all prompts under a folder, in the order of domains and file names.
pub fn read(folder: &Path) -> Result<Vec<Prompt>> {
    let mut prompts = Vec::new();
    for domain in sorted(folder)?.into_iter().filter(|p| p.is_dir()) {
        for file in sorted(&domain)?
            .into_iter()
            .filter(|p| p.extension().is_some_and(|e| e == "txt"))
        {
            let text = read_text(&file, "the prompt")?;
            ensure!(
                !text.trim().is_empty(),
                "the prompt {} has no text; write some, or remove it",
                file.display()
            );
            let name = file_name(&file);
            let split = if name.starts_with("heldout") {
                Split::HeldOut
            } else {
                Split::Train
            };
            prompts.push(Prompt {
                domain: file_name(&domain),
                name,
                split,
                text,
            });
        }
    }
    ensure!(
        !prompts.is_empty(),
        "{} has no prompts; expected one folder a domain, each with .txt files",
        folder.display()
    );
    Ok(prompts)
}

fn sorted(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder)
        .with_context(|| format!("reading the prompts folder {}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| {
            Ok(entry
                .with_context(|| format!("listing {}", folder.display()))?
                .path())
        })
        .collect::<Result<_>>()?;
    paths.sort();
    Ok(paths)
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map_or_else(String::new, |n| n.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_domains_and_heldout_files_are_held_out() {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in [
            ("b/train-1.txt", "x"),
            ("a/heldout-1.txt", "y"),
            ("a/notes.md", "z"),
            ("README.md", "w"),
        ] {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let prompts = read(dir.path()).unwrap();
        let found: Vec<_> = prompts
            .iter()
            .map(|p| (p.domain.as_str(), p.name.as_str(), p.split))
            .collect();
        assert_eq!(
            found,
            [
                ("a", "heldout-1.txt", Split::HeldOut),
                ("b", "train-1.txt", Split::Train)
            ]
        );
    }

    #[test]
    fn an_empty_folder_says_what_was_expected() {
        let dir = tempfile::tempdir().unwrap();
        let error = format!("{:#}", read(dir.path()).unwrap_err());
        assert!(error.contains("one folder a domain"), "{error}");
    }
}
