//! Prompts, texts, and conversations that cannot begin.

use super::Place;
use crate::common::{run_in, succeeded};
use std::fs;

#[test]
fn prompts_that_cannot_be_continued() {
    let p = Place::new();
    p.plan();
    p.write("empty.txt", "");
    p.write("bytes.txt", [0xff, 0xfe, 0xfd]);
    let long = "In the beginning God created the heaven and the earth. ".repeat(10);
    p.write("long.txt", &long);
    p.refused(
        &["run", &p.demo, "-p", ""],
        &["prompt is empty", "--prompt or --file"],
    );
    p.refused(&["run", &p.demo, "-f", "empty.txt"], &["prompt is empty"]);
    // Standard input, which is empty here.
    p.refused(&["run", &p.demo], &["prompt is empty"]);
    p.refused(&["run", &p.demo, "-f", "-"], &["prompt is empty"]);
    p.refused(
        &["run", &p.demo, "-f", "nosuch.txt"],
        &["nosuch.txt", "No such file"],
    );
    p.refused(
        &["run", &p.demo, "-f", "bytes.txt"],
        &["bytes.txt", "UTF-8"],
    );
    p.refused(
        &["run", &p.demo, "-f", "long.txt", "--ctx", "8"],
        &["context full", "8 available", "larger --context"],
    );
    let planned = ["run", &p.demo, "-f", "long.txt", "--plan", "plan.toml"];
    p.refused(
        &planned,
        &["context full", "64 available", "larger --context"],
    );
    p.refused(
        &[&planned[..], &["--json", "--record", "r.json"]].concat(),
        &["context full"],
    );
}

#[test]
fn texts_that_cannot_be_scored() {
    let p = Place::new();
    p.plan();
    p.folder("folder");
    p.write("empty.txt", "");
    p.write("bytes.txt", [0xff, 0xfe, 0xfd]);
    let text = "In the beginning God created the heaven and the earth. ".repeat(10);
    p.write("text.txt", &text);
    p.write("other.txt", text.replace("heaven", "sea"));
    let args = [
        "perplexity",
        &p.demo,
        "--file",
        "text.txt",
        "--ctx",
        "16",
        "--windows",
        "2",
    ];
    succeeded(run_in(
        p.path(),
        &[&args[..], &["--save-logits-base", "base.logprobs"]].concat(),
    ));
    let score = |args: &[&str], words: &[&str]| {
        p.refused(&[&["perplexity", &p.demo], args].concat(), words);
    };
    score(&["--file", "nosuch.txt"], &["nosuch.txt", "No such file"]);
    score(&["--file", "bytes.txt"], &["bytes.txt", "UTF-8"]);
    score(&["--file", "empty.txt"], &["0 tokens", "longer text"]);
    score(
        &["--file", "text.txt"],
        &["one window of 512", "smaller --context"],
    );
    score(
        &["--file", "text.txt", "--ctx", "0"],
        &["--context: 0", "4 or more"],
    );
    score(
        &["--file", "text.txt", "--windows", "0"],
        &["--windows: 0", "1 or more"],
    );
    score(
        &["--file", "text.txt", "--ctx", "128", "--plan", "plan.toml"],
        &["--context: 128", "64 tokens", "--context 128"],
    );
    let save = ["--file", "text.txt", "--ctx", "16", "--save-logits-base"];
    score(
        &[&save[..], &["folder"]].concat(),
        &["folder", "name a file inside it"],
    );
    score(&[&save[..], &["no/x"]].concat(), &["no/x", "create it"]);
    let base = fs::read(p.path().join("base.logprobs")).unwrap();
    p.write("cut.logprobs", &base[..base.len() / 2]);
    score(
        &["--logits-base", "cut.logprobs"],
        &["cut.logprobs", "cut short", "tier-plan perplexity"],
    );
    score(
        &["--logits-base", &p.machine],
        &["demo-emulated.toml", "tier-plan perplexity"],
    );
    score(
        &["--logits-base", "base.logprobs", "--ctx", "8"],
        &["--context: 8", "16 tokens"],
    );
    let other = ["--logits-base", "base.logprobs", "--file", "other.txt"];
    score(&other, &["base.logprobs", "differs", "leave --file out"]);
    p.refused(
        &["perplexity", &p.other, "--logits-base", "base.logprobs"],
        &["4096", "96"],
    );
    p.refused(
        &["perplexity", &p.other, "--file", "text.txt", "--ctx", "16"],
        &["Q4_0.gguf", "no tokenizer"],
    );
}

#[test]
fn conversations_that_cannot_begin() {
    let p = Place::new();
    p.plan();
    p.write("open.jinja", "{{ messages");
    let chat = |args: &[&str], words: &[&str]| {
        p.refused(&[&["run", &p.demo, "--chat"], args].concat(), words);
    };
    chat(&["-n", "0"], &["--n-predict: 0", "1 or more"]);
    chat(&["--ctx", "1"], &["one token", "larger --context"]);
    chat(
        &["--ctx", "1", "--plan", "plan.toml"],
        &["one token", "larger --context"],
    );
    chat(&["--threads", "0"], &["--threads: 0"]);
    chat(&["--temperature", "nan"], &["--temperature: NaN"]);
    chat(
        &["--chat-template", "nosuch.jinja"],
        &["nosuch.jinja", "No such file"],
    );
    chat(
        &["--chat-template", "open.jinja"],
        &["template", "line 1", "--chat-template FILE"],
    );
    chat(&["--tokenizer-pre", "nosuch"], &["'nosuch'", "qwen2"]);
    p.refused(&["run", &p.other, "--chat"], &["Q4_0.gguf", "no tokenizer"]);
}

#[test]
fn tokens_that_are_none() {
    let p = Place::new();
    p.plan();
    let logits = |args: &[&str], words: &[&str]| {
        p.refused(&[&["logits", &p.demo, "-o", "l"], args].concat(), words);
    };
    logits(&["--tokens", "1,4096"], &["token 4096", "0 to 4095"]);
    logits(
        &["--tokens", "4294967295"],
        &["token 4294967295", "0 to 4095"],
    );
    logits(
        &["--tokens", "1", "--greedy", "4294967295"],
        &["--greedy", "fewer"],
    );
    logits(
        &[
            "--tokens",
            "1",
            "--greedy",
            "64",
            "--plan",
            "plan.toml",
            "--threads",
            "0",
        ],
        &["--threads: 0"],
    );
    logits(
        &["--tokens", "1", "--greedy", "65", "--plan", "plan.toml"],
        &["--greedy", "at most 64", "--context 66"],
    );
}
