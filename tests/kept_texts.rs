//! Texts that are kept in a folder from run to run, and drafts: faster, and the same words.

use crate::common::{demo_model, json, refused, run_in, stderr, succeeded};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// A prompt of several pages of the KV cache.
fn prompt() -> String {
    "Once upon a time there was a small dog who liked to run in the park. ".repeat(20)
}

/// The answer of a run, and the prompt tokens that it read.
fn answer(folder: &Path, prompt: &str, more: &[&str]) -> (String, u64) {
    let model = demo_model();
    let mut args = vec!["run", model.to_str().unwrap(), "-p", prompt, "--json"];
    args.extend(["-n", "40", "--ctx", "1000", "--temp", "0", "--threads", "2"]);
    args.extend(more);
    let found = json(succeeded(run_in(folder, &args)));
    let text = found["text"].as_str().expect("a text").to_string();
    let read = found["prompt_tokens"].as_u64().expect("a count");
    (text, read)
}

#[test]
fn a_prompt_that_was_kept_is_not_read_again() {
    let folder = TempDir::new().unwrap();
    let kept = ["--cache-dir", "kept"];
    let (alone, all) = answer(folder.path(), &prompt(), &[]);
    assert_eq!(
        answer(folder.path(), &prompt(), &kept),
        (alone.clone(), all)
    );
    let (again, read) = answer(folder.path(), &prompt(), &kept);
    assert_eq!(again, alone);
    assert!((1..=64).contains(&read), "{read} of {all}");
    // A text that goes on differently shares what is the same.
    let other = prompt() + "But one day the dog could not find the way home.";
    let (expected, longer) = answer(folder.path(), &other, &[]);
    let (found, read) = answer(folder.path(), &other, &kept);
    assert_eq!(found, expected);
    assert!(read < longer - all + 64, "{read} of {longer}");
    // Another type of cache is another text.
    let (q8, read) = answer(
        folder.path(),
        &prompt(),
        &[&kept[..], &["--kv-type", "q8_0"]].concat(),
    );
    assert_eq!(
        (q8, read),
        answer(folder.path(), &prompt(), &["--kv-type", "q8_0"])
    );
}

#[test]
fn damaged_and_full_folders_cost_a_warning_and_no_word() {
    let folder = TempDir::new().unwrap();
    let kept = ["--cache-dir", "kept"];
    let (alone, all) = answer(folder.path(), &prompt(), &kept);
    for entry in fs::read_dir(folder.path().join("kept")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    }
    let model = demo_model();
    let mut args = vec!["run", model.to_str().unwrap(), "-n", "4", "--ctx", "1000"];
    let prompt = prompt();
    args.extend(["-p", &prompt, "--cache-dir", "kept"]);
    let output = succeeded(run_in(folder.path(), &args));
    let warnings = stderr(&output);
    let warnings: Vec<_> = warnings
        .lines()
        .filter(|l| l.starts_with("warning:"))
        .collect();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].ends_with("is not used: it is damaged or cut short"));
    assert_eq!(answer(folder.path(), &prompt, &kept).0, alone);
    // A folder that is too small for anything holds nothing.
    let small = ["--cache-dir", "small", "--cache-size", "1000"];
    for _ in 0..2 {
        assert_eq!(answer(folder.path(), &prompt, &small), (alone.clone(), all));
    }
    assert_eq!(
        fs::read_dir(folder.path().join("small")).unwrap().count(),
        0
    );
}

#[test]
fn a_folder_that_cannot_be_is_refused() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("file"), "x").unwrap();
    let model = demo_model();
    let args = |more: &[&'static str]| {
        let mut args = vec!["run".to_string(), model.to_str().unwrap().into()];
        args.extend(["-p", "x", "-n", "1"].map(String::from));
        args.extend(more.iter().map(|arg| arg.to_string()));
        args
    };
    let words = ["file", "kept texts can't be here"];
    refused(folder.path(), &args(&["--cache-dir", "file"]), &words);
    let size = args(&["--cache-dir", "kept", "--cache-size", "much"]);
    refused(folder.path(), &size, &["--cache-size much"]);
}

#[test]
fn drafts_change_no_word() {
    let folder = TempDir::new().unwrap();
    let (alone, all) = answer(folder.path(), &prompt(), &[]);
    let found = answer(folder.path(), &prompt(), &["--draft", "8"]);
    assert_eq!(found, (alone, all));
}
