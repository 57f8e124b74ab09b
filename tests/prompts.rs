//! Prompts and messages as users hand them in, and what is said about the text that comes of them.

use crate::common::{
    check_refusal, demo_model, json, refused, run_in, stderr, stdout, succeeded, tier_plan,
};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Output, Stdio};
use tempfile::TempDir;

/// Runs the program with this standard input.
fn fed(folder: &Path, args: &[&str], input: &[u8]) -> Output {
    let mut child = tier_plan()
        .current_dir(folder)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

/// An empty folder, and the path of the bundled model.
fn place() -> (TempDir, String) {
    let model = demo_model().to_str().unwrap().to_string();
    (tempfile::tempdir().unwrap(), model)
}

#[test]
fn a_text_says_why_it_ends() {
    let (folder, model) = place();
    let run = |more: &[&str]| {
        let args = ["run", &model, "-p", "In the beginning", "--ignore-eos"];
        run_in(folder.path(), &[&args[..], more].concat())
    };
    let full = stderr(&succeeded(run(&["-n", "100", "--ctx", "16"])));
    assert!(full.contains("context of 16 tokens is full"), "{full}");
    assert!(full.contains("of 100 tokens"), "{full}");
    let short = stderr(&succeeded(run(&["-n", "2", "--ctx", "16"])));
    assert!(!short.contains("is full"), "{short}");
    for (limit, reason) in [("100", "context"), ("-1", "context"), ("2", "length")] {
        let record = json(run(&["-n", limit, "--ctx", "16", "--json"]));
        assert_eq!(record["finish_reason"], reason, "-n {limit}");
    }
}

#[test]
fn a_context_past_the_training_is_told() {
    let (folder, model) = place();
    let told = |context: &str| {
        let args = ["run", &model, "-p", "a", "-n", "1", "--ctx", context];
        stderr(&succeeded(run_in(folder.path(), &args)))
    };
    let long = told("2048");
    let line = long.lines().find(|l| l.starts_with("warning:")).unwrap();
    assert!(line.contains("2048") && line.contains("1024"), "{line}");
    assert!(!told("1024").contains("warning:"));
}

#[test]
fn line_ends_and_byte_order_marks_change_no_prompt() {
    let (folder, model) = place();
    let write = |name: &str, bytes: &str| fs::write(folder.path().join(name), bytes).unwrap();
    write("unix.txt", "In the\nbeginning\n");
    write("windows.txt", "\u{feff}In the\r\nbeginning\r\n");
    let run = |name: &str| {
        let record = json(run_in(
            folder.path(),
            &["run", &model, "-f", name, "-n", "8", "--json"],
        ));
        (record["prompt_tokens"].clone(), record["text"].clone())
    };
    let unix = run("unix.txt");
    assert_eq!(run("windows.txt"), unix);
    let piped = fed(
        folder.path(),
        &["run", &model, "-f", "-", "-n", "8", "--json"],
        "\u{feff}In the\r\nbeginning\r\n".as_bytes(),
    );
    let piped = json(piped);
    assert_eq!(
        (piped["prompt_tokens"].clone(), piped["text"].clone()),
        unix
    );
    let chat = |input: &str| {
        let args = ["run", &model, "--chat", "-n", "4"];
        stdout(&succeeded(fed(folder.path(), &args, input.as_bytes())))
    };
    assert_eq!(chat("\u{feff}In the\r\n/quit\r\n"), chat("In the\n/quit\n"));
}

#[test]
fn other_encodings_are_named() {
    let (folder, model) = place();
    let wide: Vec<u8> = "\u{feff}In the"
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    fs::write(folder.path().join("wide.txt"), &wide).unwrap();
    let words = ["wide.txt", "UTF-16LE", "iconv"];
    for args in [
        ["run", &model, "-f", "wide.txt"].as_slice(),
        &["run", &model, "--chat", "--chat-template", "wide.txt"],
        &["perplexity", &model, "--file", "wide.txt"],
    ] {
        refused(folder.path(), args, &words);
    }
    let args = ["run", &model, "-f", "-"];
    check_refusal(
        &fed(folder.path(), &args, &wide),
        &["standard input", "UTF-16LE", "iconv"],
    );
    // A chat goes on after a message that it cannot read.
    let args = ["run", &model, "--chat", "-n", "2"];
    let said = stdout(&succeeded(fed(folder.path(), &args, b"caf\xe9\n/stats\n")));
    assert!(said.contains("byte 0xE9 at offset 3"), "{said}");
    assert!(said.contains("No answer yet."), "{said}");
}

#[test]
fn a_template_must_render_what_is_said() {
    let (folder, model) = place();
    let chat = |template: &str, more: &[&str], input: &str| {
        fs::write(folder.path().join("t.jinja"), template).unwrap();
        let args = [
            "run",
            &model,
            "--chat",
            "-n",
            "2",
            "--chat-template",
            "t.jinja",
        ];
        fed(folder.path(), &[&args[..], more].concat(), input.as_bytes())
    };
    check_refusal(
        &chat("{{ messages | length }}", &[], "Hi\n"),
        &["leaves out the user's message", "--chat-template FILE"],
    );
    let users = "{% for m in messages if m.role != 'system' %}{{ m.content }}\n{% endfor %}";
    let told = stderr(&succeeded(chat(users, &["--system", "Be kind"], "Hi\n")));
    assert_eq!(told.matches("--system is put before").count(), 1, "{told}");
    let told = stderr(&succeeded(chat(users, &[], "Hi\n")));
    assert!(!told.contains("--system"), "{told}");
}

#[test]
fn a_control_token_in_a_message_is_text() {
    let (folder, model) = place();
    fs::write(
        folder.path().join("t.jinja"),
        "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}",
    )
    .unwrap();
    let args = [
        "run",
        &model,
        "--chat",
        "-n",
        "1",
        "--chat-template",
        "t.jinja",
    ];
    let prompt_tokens = |message: &str| {
        let output = succeeded(fed(
            folder.path(),
            &args,
            format!("{message}\n/stats\n").as_bytes(),
        ));
        let (said, told) = (stdout(&output), stderr(&output));
        let line = said.lines().find(|l| l.starts_with("message:")).unwrap();
        let tokens: usize = line.split(' ').nth(1).unwrap().parse().unwrap();
        (tokens, told.contains("<|endoftext|>"))
    };
    assert_eq!(prompt_tokens("a"), (2, false));
    let (tokens, told) = prompt_tokens("a<|endoftext|>");
    assert!(tokens > 5 && told, "{tokens} tokens, told: {told}");
}
