//! Tests of the files of a batch: inputs, outputs, and the lines of answers.

use super::{chat, completion};
use crate::batch::*;
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::path::Path;
use tempfile::TempDir;
use tier_plan_runtime::sampler::{LogProbability, TokenLogProbabilities};

fn line(id: &str, prompt: &str) -> String {
    json!({"custom_id": id, "url": "/v1/completions", "body": {"prompt": prompt}}).to_string()
        + "\n"
}

/// A folder with an input of these bytes.
fn input(bytes: impl AsRef<[u8]>) -> (TempDir, anyhow::Result<Input>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("in.jsonl");
    fs::write(&path, bytes).unwrap();
    let input = Input::open(&path);
    (folder, input)
}

#[test]
fn lines_are_found_again() {
    let text = format!(
        "\u{feff}{}\r\n\n  \n{{\n{}",
        line("a", "x").trim(),
        line("b", "y").trim()
    );
    let (_folder, input) = input(text);
    let mut input = input.unwrap();
    let lines = input.in_order();
    assert_eq!(
        lines.iter().map(|l| l.number).collect::<Vec<_>>(),
        [1, 4, 5]
    );
    assert_eq!(input.read(&lines[0]).unwrap().unwrap().custom_id, "a");
    assert_eq!(
        input.read(&lines[1]).unwrap().unwrap_err().code,
        Code::InvalidJson
    );
    assert_eq!(input.read(&lines[2]).unwrap().unwrap().custom_id, "b");
    assert_eq!((input.line_of("b"), input.line_of("c")), (Some(5), None));
}

#[test]
fn prompts_that_begin_alike_follow_each_other() {
    let [one, two] = ["x", "y"].map(|c| c.repeat(5000));
    let prompts = [
        &one,
        &two,
        "short",
        &format!("{one}1"),
        &format!("{two}2"),
        &format!("{}z", &one[..300]),
    ];
    let text: String = prompts
        .iter()
        .enumerate()
        .map(|(i, p)| line(&i.to_string(), p))
        .collect();
    let (_folder, input) = input(text);
    let order: Vec<usize> = input.unwrap().in_order().iter().map(|l| l.number).collect();
    assert_eq!(order, [1, 4, 6, 2, 5, 3]);
}

#[test]
fn inputs_that_make_no_batch_are_refused() {
    let refused = |bytes: &[u8], words: &str| {
        let error = format!("{:#}", input(bytes).1.unwrap_err());
        assert!(error.contains(words), "{words:?} in {error}");
    };
    refused(b"", "no requests");
    refused(b"\n \n", "no requests");
    refused(&[0xff, 0xfe, b'{', 0], "UTF-16LE");
    let twice = line("a", "x") + &line("b", "x") + &line("a", "y");
    refused(twice.as_bytes(), "line 3 has the custom_id \"a\" of line 1");
    assert!(Input::open(Path::new("/dev/null")).is_err());
    assert!(Input::open(Path::new("/no/such/file")).is_err());
}

#[test]
fn long_lines_and_changed_files_are_noticed() {
    let long = line("long", &"x".repeat(MAX_LINE_BYTES as usize));
    let (folder, opened) = input(long + &line("b", "y"));
    let mut opened = opened.unwrap();
    let lines = opened.in_order();
    let bad = opened.read(&lines[0]).unwrap().unwrap_err();
    assert!(
        bad.message.contains("expected at most 16777216"),
        "{}",
        bad.message
    );
    assert!(opened.read(&lines[1]).unwrap().is_ok());
    fs::write(folder.path().join("in.jsonl"), line("c", "y")).unwrap();
    assert!(opened.read(&lines[1]).is_err());
}

fn answer(request: &Request) -> Value {
    let choice = Choice {
        text: "b".into(),
        thinking: None,
        calls: Vec::new(),
        finish: Finish::Stop,
        n_tokens: 1,
        tokens: None,
    };
    crate::batch::line(&Answered {
        request,
        model: "m",
        created: 7,
        prompt_tokens: 3,
        choices: &[choice],
        piece: &|_| Vec::new(),
        id: "7",
    })
}

#[test]
fn a_torn_line_is_cut_off_and_answers_are_kept() {
    let (folder, opened) = input(line("a", "x") + "{\n" + &line("b", "y"));
    let mut opened = opened.unwrap();
    let path = folder.path().join("out.jsonl");
    let mut output = Output::open(&path, &opened).unwrap();
    let lines = opened.in_order();
    let request = opened.read(&lines[0]).unwrap().unwrap();
    let bad = opened.read(&lines[1]).unwrap().unwrap_err();
    output.append(1, &answer(&request)).unwrap();
    output.append(2, &refusal(2, &bad)).unwrap();
    output.sync().unwrap();
    drop(output);
    let whole = fs::read(&path).unwrap();
    for torn in [
        "",
        "{",
        "{\"id\":\"batch_req_00",
        "{\"id\":\"batch_req_0\",\"custom_id\":\"b\"}",
    ] {
        let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(torn.as_bytes()).unwrap();
        let output = Output::open(&path, &opened).unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole, "{torn}");
        let answered = [1, 2, 4].map(|n| output.has_answer(n));
        assert_eq!((answered, output.n_answered()), ([true, true, false], 2));
    }
}

#[test]
fn outputs_of_others_are_left_alone() {
    let (folder, opened) = input(line("a", "x"));
    let opened = opened.unwrap();
    let path = folder.path().join("out.jsonl");
    let other = json!({"id": "batch_req_1", "custom_id": "z", "response": null, "error": null});
    for (bytes, words) in [
        (
            other.to_string() + "\n",
            "line 1 answers custom_id \"z\", which is not in",
        ),
        (line("a", "x"), "line 1 is not an answer of a batch"),
        ("notes".to_string(), "line 1 is not an answer of a batch"),
        (
            refusal(1, &Request::parse(b"").unwrap_err()).to_string() + "\nnotes",
            "line 2 is not",
        ),
    ] {
        fs::write(&path, &bytes).unwrap();
        let error = format!("{:#}", Output::open(&path, &opened).unwrap_err());
        assert!(error.contains(words), "{words:?} in {error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), bytes);
    }
}

#[test]
fn one_process_alone_writes_an_output() {
    let (folder, opened) = input(line("a", "x"));
    let opened = opened.unwrap();
    let path = folder.path().join("out.jsonl");
    let first = Output::open(&path, &opened).unwrap();
    let error = Output::open(&path, &opened).unwrap_err().to_string();
    assert!(error.contains("another process is writing"), "{error}");
    // An output without answers is not left behind.
    drop(first);
    assert!(!path.exists());
    drop(Output::open(&path, &opened).unwrap());
    fs::write(&path, "").unwrap();
    drop(Output::open(&path, &opened).unwrap());
    assert!(path.exists());
}

#[test]
fn answers_have_the_fields_of_the_interface() {
    let request = completion(json!({"logprobs": 1})).unwrap();
    let line = answer(&request);
    assert_eq!(line["custom_id"], "1");
    assert_eq!(line["error"], Value::Null);
    assert_eq!(line["response"]["status_code"], 200);
    let body = &line["response"]["body"];
    assert_eq!(body["object"], "text_completion");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    let usage = json!({"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4});
    assert_eq!(body["usage"], usage);
    // Equal in every run, so that a repeated run can be compared.
    assert_eq!(line, answer(&request));
    let chat = answer(&chat(json!({})).unwrap());
    assert_eq!(
        chat["response"]["body"]["choices"][0]["message"]["content"],
        "b"
    );
}

#[test]
fn log_probabilities_are_listed_per_token() {
    let one = |token, value| LogProbability { token, value };
    let token = |start, token| TokenText {
        start,
        logprobs: TokenLogProbabilities {
            chosen: one(token, -0.5),
            top: vec![one(1, f32::NEG_INFINITY)],
        },
    };
    let choice = Choice {
        text: "éb".into(),
        thinking: Some("hm".into()),
        calls: Vec::new(),
        finish: Finish::Length,
        n_tokens: 2,
        tokens: Some(vec![token(0, 0), token(2, 1)]),
    };
    let pieces = ["é".as_bytes().to_vec(), vec![0xff]];
    let body = |request: Request| {
        let answered = Answered {
            request: &request,
            model: "m",
            created: 7,
            prompt_tokens: 3,
            choices: std::slice::from_ref(&choice),
            piece: &|token| pieces[token as usize].clone(),
            id: "7",
        };
        crate::batch::line(&answered)["response"]["body"]["choices"][0].clone()
    };
    let old = body(completion(json!({})).unwrap());
    let expected = json!({
        "tokens": ["é", "bytes:\\xff"], "token_logprobs": [-0.5, -0.5], "text_offset": [0, 1],
        "top_logprobs": [{"bytes:\\xff": -9999.0}, {"bytes:\\xff": -9999.0}],
    });
    assert_eq!(old["logprobs"], expected);
    let new = body(chat(json!({})).unwrap());
    assert_eq!(new["message"]["reasoning_content"], "hm");
    let first = &new["logprobs"]["content"][0];
    assert_eq!(
        (&first["token"], &first["bytes"]),
        (&json!("é"), &json!([195, 169]))
    );
    assert_eq!(first["top_logprobs"][0]["logprob"], -9999.0);
}
