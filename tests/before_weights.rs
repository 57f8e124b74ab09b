//! What is refused before a byte of weights is read, and model files that are cut or become shorter.

#[cfg(target_os = "linux")]
use crate::common::tier_plan;
use crate::common::{demo_model, refused, root, run_in, stderr, succeeded};
use std::fs;
#[cfg(target_os = "linux")]
use std::path::Path;

#[test]
fn a_prompt_that_cannot_fit_says_how_much_is_too_much() {
    let folder = tempfile::tempdir().unwrap();
    let model = demo_model();
    let model = model.to_str().unwrap();
    fs::write(folder.path().join("long.txt"), "x".repeat(20_000_000)).unwrap();
    let run = ["run", model, "--context", "64", "-n", "1", "-f", "long.txt"];
    let words = ["context full", "64 available", "larger --context"];
    let error = refused(folder.path(), &run, &words);
    assert_eq!(error.lines().count(), 1, "{error}");
    refused(
        folder.path(),
        &["run", model, "-p", ""],
        &["prompt is empty", "--prompt"],
    );
}

#[test]
fn pieces_of_a_file_are_to_be_joined() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = fs::read(demo_model()).unwrap();
    let (first, second) = bytes.split_at(bytes.len() / 2);
    for (name, piece) in [
        ("m.gguf.part1of2", first),
        ("m.gguf.part2of2", second),
        ("m.gguf-split-a", first),
        ("m.gguf-split-b", second),
        ("m.gguf.001", first),
        ("m.gguf.ab", second),
    ] {
        fs::write(folder.path().join(name), piece).unwrap();
        refused(folder.path(), &["run", name, "-p", "a"], &[name, "`cat "]);
    }
    let name = "m.gguf.part";
    fs::write(folder.path().join(name), first).unwrap();
    refused(folder.path(), &["run", name, "-p", "a"], &["not finished"]);
}

#[test]
fn texts_that_would_take_much_memory_are_refused_by_that() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, text: String| fs::write(folder.path().join(name), text).unwrap();
    let head = "format = \"tier-plan placement\"\nversion = 1\n";
    put(
        "many.toml",
        format!("{head}x = [{}]", "{a={}},".repeat(2_000_000)),
    );
    put("deep.toml", format!("{head}{}x = 1", "a.".repeat(100_000)));
    refused(
        folder.path(),
        &["diff", "many.toml", "many.toml"],
        &["many.toml", "memory"],
    );
    refused(
        folder.path(),
        &["diff", "deep.toml", "deep.toml"],
        &["deep.toml", "nested"],
    );
    let record = "{\"format\": \"tier-plan run record\", \"version\": 1, \"layers\": [";
    put("many.json", record.to_string() + &"{},".repeat(4_000_000));
    let compare = ["compare", "many.json", "-o", "r"];
    refused(folder.path(), &compare, &["many.json", "memory"]);
}

/// Talks to a chat whose mapped model becomes shorter before the first message.
#[cfg(target_os = "linux")]
#[test]
fn a_mapped_model_that_becomes_shorter_is_an_error() {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::process::Stdio;
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("m.gguf");
    fs::copy(demo_model(), &model).unwrap();
    let mut chat = tier_plan()
        .args([
            Path::new("run"),
            &model,
            Path::new("--chat"),
            Path::new("--mmap"),
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut err = BufReader::new(chat.stderr.take().unwrap());
    let mut line = String::new();
    // The plan is printed once the model is loaded.
    while !line.contains("no plan given") {
        line.clear();
        assert!(err.read_line(&mut line).unwrap() > 0);
    }
    let file = fs::OpenOptions::new().write(true).open(&model).unwrap();
    file.set_len(4096).unwrap();
    chat.stdin
        .take()
        .unwrap()
        .write_all(b"Once upon\n")
        .unwrap();
    let mut rest = String::new();
    err.read_to_string(&mut rest).unwrap();
    assert_eq!(chat.wait().unwrap().code(), Some(1), "{rest}");
    let errors: Vec<&str> = rest.lines().filter(|l| l.starts_with("error:")).collect();
    assert!(errors.len() == 1 && errors[0].contains("m.gguf"), "{rest}");
}

#[test]
fn a_model_of_another_kind_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let matrix = root().join("tests/data/imatrix/demo.imatrix.gguf");
    let run = ["run", matrix.to_str().unwrap(), "-p", "a"];
    refused(
        folder.path(),
        &run,
        &["importance matrix", "--from-imatrix"],
    );
    let model = demo_model();
    let tokens = run_in(folder.path(), &["tokenize", model.to_str().unwrap(), "a"]);
    assert_eq!(stderr(&succeeded(tokens)), "");
}
