//! What whole-program tests share: the program, its files, and what every error must look like.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

pub use tier_plan_testing::{demo_model, root};

/// The bundled machine of three emulated tiers.
pub fn demo_machine() -> PathBuf {
    root().join("profiles/machines/demo-emulated.toml")
}

/// The program, with no input and nothing of the caller's settings.
pub fn tier_plan() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tier-plan"));
    command.stdin(Stdio::null());
    let variables = std::env::vars_os().map(|(name, _)| name);
    let ours = variables.filter(|name| {
        name.to_str()
            .is_some_and(|name| name.starts_with("TIER_PLAN_"))
    });
    for name in ours.filter(|name| name != "TIER_PLAN_NVRTC") {
        command.env_remove(name);
    }
    command.env("TIER_PLAN_CONFIG", "");
    command
}

/// Runs the program in a folder.
pub fn run_in<S: AsRef<OsStr>>(folder: &Path, args: &[S]) -> Output {
    tier_plan().current_dir(folder).args(args).output().unwrap()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The run must have ended well, and printed nothing that only a terminal understands.
pub fn succeeded(output: Output) -> Output {
    let (out, err) = (stdout(&output), stderr(&output));
    assert!(output.status.success(), "{:?}\n{out}{err}", output.status);
    for text in [&out, &err] {
        assert!(
            !text.contains(['\r', '\u{1b}', '\u{8}']),
            "progress in a pipe: {text:?}"
        );
        assert!(!text.contains("[="), "progress in a pipe: {text}");
    }
    output
}

pub fn json(output: Output) -> serde_json::Value {
    serde_json::from_str(&stdout(&succeeded(output))).unwrap()
}

/// Every file and folder below a folder.
pub fn listing(folder: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path.clone());
            }
            found.insert(path);
        }
    }
    found
}

/// The program must refuse: exit code 1, one line `error: …`, which has all `words` with the line
/// `hint: …` after it, no cause twice, nothing written. Returns the line.
pub fn refused<S: AsRef<OsStr>>(folder: &Path, args: &[S], words: &[&str]) -> String {
    let before = listing(folder);
    let output = run_in(folder, args);
    let line = check_refusal(&output, words);
    assert_eq!(
        listing(folder),
        before,
        "left something behind after: {line}"
    );
    line
}

/// See [`refused`].
pub fn check_refusal(output: &Output, words: &[&str]) -> String {
    check_refusal_with(output, 1, words)
}

/// As [`check_refusal`], with another exit code, such as that of a signal.
pub fn check_refusal_with(output: &Output, code: i32, words: &[&str]) -> String {
    let err = stderr(output);
    assert_eq!(
        output.status.code(),
        Some(code),
        "{:?}\n{}{err}",
        output.status,
        stdout(output)
    );
    assert!(
        !err.contains("panicked") && !err.contains("RUST_BACKTRACE"),
        "{err}"
    );
    let lines: Vec<&str> = err.lines().filter(|l| l.contains("error:")).collect();
    assert_eq!(lines.len(), 1, "expected one line `error: …`: {err}");
    let line = lines[0];
    let (_, hint) = err.split_once(line).unwrap();
    let hint = hint.trim();
    assert!(line.starts_with("error: "), "{err}");
    assert!(
        hint.is_empty() || hint.starts_with("hint: "),
        "only a hint may follow the error: {err}"
    );
    for word in words {
        assert!(
            line.contains(word) || hint.contains(word),
            "expected {word:?} in {line:?} or {hint:?}"
        );
    }
    let causes: Vec<&str> = line.split(": ").collect();
    assert!(
        !causes.windows(2).any(|pair| pair[0] == pair[1]),
        "a cause is printed twice: {line}"
    );
    line.to_string()
}

/// Two domains with two texts each, cut from the bundled prompts.
pub fn write_prompts(folder: &Path, chars: usize) {
    for domain in ["code", "scripture"] {
        fs::create_dir_all(folder.join(domain)).unwrap();
        for name in ["train-1.txt", "heldout-1.txt"] {
            let text = fs::read_to_string(root().join("profiles/prompts").join(domain).join(name))
                .unwrap();
            let cut: String = text.chars().take(chars).collect();
            fs::write(folder.join(domain).join(name), cut).unwrap();
        }
    }
}

/// Starts the program with pipes for what it prints.
pub fn piped(command: &mut Command) -> Child {
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Sends a signal such as `-INT` to a program.
#[cfg(unix)]
pub fn send(signal: &str, child: &Child) {
    let kill = Command::new("kill")
        .args([signal, &child.id().to_string()])
        .status();
    assert!(kill.unwrap().success());
}
