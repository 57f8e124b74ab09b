//! Names and weights that are meant to hurt: nothing of them acts on a terminal, no output is lost to a name, and
//! results that are no numbers are errors.

use crate::common::{
    check_refusal, demo_machine, demo_model, json, run_in, stderr, stdout, succeeded,
};
use std::fs;
use std::path::Path;
use std::process::Output;
use tempfile::TempDir;
use tier_plan_planner::printable::is_control;
use tier_plan_runtime::gguf::Gguf;

/// Writes a copy of the bundled model whose bytes `change` has changed.
fn changed_model(folder: &Path, change: impl FnOnce(&Gguf, &mut Vec<u8>)) {
    let gguf = Gguf::open(&demo_model()).unwrap();
    let mut bytes = fs::read(demo_model()).unwrap();
    change(&gguf, &mut bytes);
    fs::write(folder.join("m.gguf"), bytes).unwrap();
}

/// A folder with a model whose name has control characters.
fn evil_name() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    changed_model(folder.path(), |gguf, bytes| {
        let name = gguf.id().name;
        let mut evil = "\u{1b}[31m\n\u{202e}\u{9b}".to_string();
        evil.truncate(evil.len().min(name.len()));
        let evil = format!(
            "{evil:x<width$}",
            width = evil.chars().count() + name.len() - evil.len()
        );
        let at = bytes.windows(name.len()).position(|w| w == name.as_bytes());
        bytes[at.unwrap()..][..name.len()].copy_from_slice(evil.as_bytes());
    });
    folder
}

/// The output must have no control characters but line breaks and tabs, and the name on one line.
fn is_harmless(output: &Output) {
    let text = stdout(output) + &stderr(output);
    let bad = |c: &char| is_control(*c) && !matches!(c, '\n' | '\t');
    assert_eq!(text.chars().find(bad), None, "{text:?}");
    assert!(text.contains(r"\u001b[31m\n"), "{text:?}");
}

#[test]
fn names_in_a_model_do_not_act_on_the_terminal() {
    let folder = evil_name();
    let machine = demo_machine();
    let machine = machine.to_str().unwrap();
    let run = |args: &[&str]| is_harmless(&succeeded(run_in(folder.path(), args)));
    run(&["inspect", "m.gguf"]);
    run(&["inspect", "m.gguf", "--json"]);
    run(&["bench", "m.gguf", "-p", "2", "-n", "1", "-r", "1"]);
    let solve = [
        "solve",
        "m.gguf",
        "-m",
        machine,
        "--context",
        "64",
        "--strategy",
        "lru-only",
    ];
    run(&[&solve[..], &["-o", "plan.toml"]].concat());
    run(&["explain", "plan.toml", "--model", "m.gguf"]);
}

#[test]
fn errors_are_one_line_whatever_they_name() {
    let folder = evil_name();
    let evil = "no\u{1b}[31m\nerror: such\u{202e}.gguf";
    for args in [
        vec!["inspect", evil],
        vec!["run", evil, "-p", "x"],
        vec![
            "run", "m.gguf", "-p", "x", "--memory", "1MiB", "--plan", evil,
        ],
        vec!["diff", evil, evil],
    ] {
        let output = run_in(folder.path(), &args);
        let text = stderr(&output);
        assert!(
            !text.chars().any(|c| is_control(c) && c != '\n'),
            "{text:?}"
        );
        assert!(!text.contains("\nerror: such"), "{text:?}");
    }
    let output = run_in(folder.path(), &["inspect", evil]);
    check_refusal(&output, &[r"no\u001b[31m\nerror: such\u202e.gguf"]);
}

#[test]
fn logits_that_are_no_numbers_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    changed_model(folder.path(), |gguf, bytes| {
        let tensor = gguf
            .tensors()
            .iter()
            .find(|t| t.name == "output_norm.weight")
            .unwrap();
        let at = tensor.offset as usize;
        // All bits set are a NaN in every float format.
        bytes[at..at + tensor.n_bytes as usize].fill(0xff);
    });
    fs::create_dir_all(folder.path().join("prompts/a")).unwrap();
    let text = "In the beginning God created the heaven and the earth. ".repeat(40);
    for name in ["train1.txt", "heldout1.txt"] {
        fs::write(folder.path().join("prompts/a").join(name), &text).unwrap();
    }
    fs::write(folder.path().join("text"), &text).unwrap();
    let refused = |args: &[&str], position: &str| {
        let output = run_in(folder.path(), args);
        check_refusal(&output, &["not numbers", "damaged", position]);
        assert_eq!(stdout(&output), "");
    };
    refused(&["run", "m.gguf", "-p", "the", "-n", "4"], "position");
    refused(
        &[
            "run",
            "m.gguf",
            "-p",
            "the",
            "-n",
            "4",
            "--temperature",
            "0.8",
        ],
        "position",
    );
    refused(
        &["logits", "m.gguf", "--tokens", "1,2,3", "-o", "l"],
        "position 0",
    );
    refused(
        &["bench", "m.gguf", "-p", "5", "-n", "2", "-r", "1"],
        "position 4",
    );
    refused(
        &["perplexity", "m.gguf", "-f", "text", "--context", "32"],
        "position",
    );
    let profile = ["profile", "m.gguf", "--prompts", "prompts", "-o", "p"];
    refused(
        &[
            &profile[..],
            &["--prompt-tokens", "4", "--decode-tokens", "2"],
        ]
        .concat(),
        "position 3",
    );
    assert!(!folder.path().join("l").exists() && !folder.path().join("p").exists());
}

#[cfg(unix)]
mod bytes_that_are_no_text {
    use super::*;
    use std::ffi::{OsStr, OsString};
    use std::os::unix::ffi::OsStrExt;

    fn args(args: &[&[u8]]) -> Vec<OsString> {
        args.iter()
            .map(|arg| OsStr::from_bytes(arg).to_os_string())
            .collect()
    }

    #[test]
    fn json_names_any_file_and_a_script_the_file_that_was_given() {
        let folder = tempfile::tempdir().unwrap();
        let name = OsStr::from_bytes(b"m\xff'.gguf");
        fs::copy(demo_model(), folder.path().join(name)).unwrap();
        let machine = demo_machine();
        let machine = machine.as_os_str().as_bytes();
        let model = name.as_bytes();
        let run = |list: &[&[u8]]| json(run_in(folder.path(), &args(list)));
        let sums = run(&[b"checksum", model, b"-o", b"\xff.sums", b"--json"]);
        assert_eq!(sums["sums"], "\u{fffd}.sums");
        let plan = run(&[
            b"solve",
            model,
            b"-m",
            machine,
            b"--context",
            b"64",
            b"--strategy",
            b"lru-only",
            b"-o",
            b"\xff.toml",
            b"--json",
        ]);
        assert_eq!(plan["plan"], "\u{fffd}.toml");
        let script = run(&[
            b"export",
            b"\xff.toml",
            b"--model",
            model,
            b"--to",
            b"llama.cpp",
            b"-o",
            b"\xff.sh",
            b"--json",
        ]);
        assert_eq!(script["written"], "\u{fffd}.sh");
        let line = script["command"].as_str().unwrap();
        assert!(
            line.starts_with(r"llama-server -m $'m\377\'.gguf'"),
            "{line}"
        );
        let written = fs::read(folder.path().join(OsStr::from_bytes(b"\xff.sh"))).unwrap();
        let quoted = br"'m"
            .iter()
            .chain(b"\xff")
            .chain(br"'\''.gguf'")
            .copied()
            .collect::<Vec<u8>>();
        assert!(
            written.windows(quoted.len()).any(|w| w == quoted),
            "{written:?}"
        );
    }
}
