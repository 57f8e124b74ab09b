//! `tier-plan batch`: answers are those that each request has alone, and no run loses or doubles one.

use crate::common::{
    check_refusal, demo_model, json, refused, run_in, stderr, stdout, succeeded, tier_plan,
};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// A line with a request for a completion.
pub fn completion(id: &str, body: Value) -> String {
    let line = json!({"custom_id": id, "method": "POST", "url": "/v1/completions", "body": body});
    format!("{line}\n")
}

/// An empty folder with these requests.
pub fn place(lines: &[String]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("in.jsonl"), lines.concat()).unwrap();
    folder
}

/// The arguments of a batch.
pub fn arguments<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let model: &'static str =
        Box::leak(demo_model().to_str().unwrap().to_string().into_boxed_str());
    [&["batch", model, "in.jsonl", "-o", "out.jsonl"], more].concat()
}

pub fn batch(folder: &Path, more: &[&str]) -> Value {
    json(run_in(
        folder,
        &[&arguments(more)[..], &["--json"]].concat(),
    ))
}

/// The lines of an output by name, without the time.
pub fn answers(folder: &Path) -> BTreeMap<String, Value> {
    let text = fs::read_to_string(folder.join("out.jsonl")).unwrap();
    assert!(
        text.is_empty() || text.ends_with('\n'),
        "a torn line: {text:?}"
    );
    let mut found = BTreeMap::new();
    for line in text.lines() {
        let mut line: Value = serde_json::from_str(line).unwrap();
        if let Some(created) = line.pointer_mut("/response/body/created") {
            *created = Value::Null;
        }
        let name = line["custom_id"].as_str().map(str::to_string);
        let name = name.unwrap_or_else(|| format!("line {}", line["line"]));
        assert!(found.insert(name, line).is_none(), "answered twice: {text}");
    }
    found
}

pub fn choice(line: &Value) -> &Value {
    &line["response"]["body"]["choices"][0]
}

/// The text that `run` continues a prompt with.
pub fn alone(folder: &Path, prompt: &str, more: &[&str]) -> Value {
    let model = demo_model();
    let args = ["run", model.to_str().unwrap(), "-p", prompt, "--json"];
    json(run_in(folder, &[&args[..], more].concat()))["text"].clone()
}

/// Prompts of many lengths, some of which begin alike for several pages of the cache.
fn prompts() -> Vec<String> {
    let long =
        "And the earth was without form, and void; and darkness was upon the face of the deep. ";
    let start = long.repeat(8);
    vec![
        "In the beginning".to_string(),
        format!("{start}And God said"),
        "a".to_string(),
        format!("{start}And the Spirit"),
        format!("{start}And the Spirit moved"),
        long.repeat(3),
        "Now these are the names".to_string(),
    ]
}

#[test]
fn greedy_answers_are_those_of_single_runs_whatever_the_company() {
    let prompts = prompts();
    let lines: Vec<String> = (0..)
        .zip(&prompts)
        .map(|(i, prompt)| {
            let max_tokens = 20 + 10 * (i % 3);
            completion(
                &i.to_string(),
                json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}),
            )
        })
        .collect();
    let folder = place(&lines);
    let expected: Vec<Value> = (0..)
        .zip(&prompts)
        .map(|(i, prompt)| {
            let n = (20 + 10 * (i % 3)).to_string();
            alone(folder.path(), prompt, &["-n", &n])
        })
        .collect();
    // The last has so few pages that texts wait for each other, and are preempted.
    for more in [
        &["--parallel", "1"][..],
        &["--parallel", "3"],
        &[],
        &["--parallel", "2", "--context", "320"],
    ] {
        let _ = fs::remove_file(folder.path().join("out.jsonl"));
        let summary = batch(folder.path(), more);
        assert_eq!(summary["answered"], 7, "{more:?}: {summary}");
        let answers = answers(folder.path());
        for (i, expected) in expected.iter().enumerate() {
            let line = &answers[&i.to_string()];
            assert_eq!(choice(line)["text"], *expected, "{more:?}: {line}");
        }
        if more == ["--parallel", "1"] {
            let shared = summary["shared_tokens"].as_u64().unwrap();
            assert!(
                shared >= 64,
                "prompts that begin alike share pages: {summary}"
            );
        }
    }
}

#[test]
fn drawn_answers_depend_on_the_seed_alone() {
    let drawn = |id: &str, more: Value| {
        let mut body = json!({"prompt": "In the beginning", "max_tokens": 12, "temperature": 0.9});
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        completion(id, body)
    };
    let folder = place(&[
        drawn("seven", json!({"seed": 7})),
        drawn("again", json!({"seed": 7, "n": 2})),
        drawn("one", json!({})),
        drawn("two", json!({})),
    ]);
    batch(folder.path(), &["--parallel", "1"]);
    let first = answers(folder.path());
    fs::remove_file(folder.path().join("out.jsonl")).unwrap();
    batch(folder.path(), &["--parallel", "8"]);
    assert_eq!(answers(folder.path()), first);
    let more = ["-n", "12", "--temp", "0.9", "--seed", "7"];
    let expected = alone(folder.path(), "In the beginning", &more);
    assert_eq!(choice(&first["seven"])["text"], expected);
    let again = &first["again"]["response"]["body"]["choices"];
    assert_eq!(again[0]["text"], expected);
    assert_ne!(again[1]["text"], expected);
    assert_ne!(choice(&first["one"])["text"], choice(&first["two"])["text"]);
}

#[test]
fn lines_that_can_not_be_answered_are_told_and_the_others_answered() {
    let context = json!({"prompt": "word ".repeat(5000)});
    let folder = place(&[
        "{\n".to_string(),
        completion("good", json!({"prompt": "a", "max_tokens": 2})),
        completion("hot", json!({"prompt": "a", "temperature": -1})),
        completion("tool", json!({"prompt": "a", "tools": [1]})),
        completion("long", context),
        completion("token", json!({"prompt": [1, 4_000_000_000u64]})),
        completion(
            "bias",
            json!({"prompt": "a", "logit_bias": {"4000000000": 1}}),
        ),
        json!({"custom_id": "chat", "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": "a"}]}})
        .to_string()
            + "\n",
        completion(
            "size",
            json!({"prompt": "a", "n": 128, "max_tokens": 1000, "logprobs": 20}),
        ),
    ]);
    let output = succeeded(run_in(folder.path(), &arguments(&[])));
    assert!(
        stderr(&output).contains("8 have no answer"),
        "{}",
        stderr(&output)
    );
    let answers = answers(folder.path());
    assert!(choice(&answers["good"])["text"].is_string());
    for (name, code, words) in [
        ("line 1", "invalid_json", "expected a JSON object"),
        ("hot", "invalid_request", "body.temperature: -1, expected 0"),
        ("tool", "unsupported", "body.tools"),
        ("long", "context_length_exceeded", "pass a shorter prompt"),
        ("token", "invalid_request", "body.prompt[1]: 4000000000"),
        (
            "bias",
            "invalid_request",
            "body.logit_bias: token 4000000000",
        ),
        ("chat", "unsupported", "--chat-template FILE"),
        ("size", "invalid_request", "ask for fewer tokens"),
    ] {
        let line = &answers[name];
        assert_eq!(
            (&line["response"], &line["error"]["code"]),
            (&Value::Null, &json!(code)),
            "{line}"
        );
        let message = line["error"]["message"].as_str().unwrap();
        assert!(message.contains(words), "{words:?} in {message}");
    }
}

#[test]
fn chats_have_the_prompt_of_their_template() {
    let body = json!({"prompt": "In the beginning", "max_tokens": 8});
    let chat = json!({"custom_id": "chat", "url": "/v1/chat/completions", "body": {
        "messages": [{"role": "system", "content": "In the "}, {"role": "user", "content": "beginning"}],
        "max_completion_tokens": 8, "logprobs": true, "top_logprobs": 2,
    }});
    let folder = place(&[completion("text", body), format!("{chat}\n")]);
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
    fs::write(folder.path().join("chat.jinja"), template).unwrap();
    batch(folder.path(), &["--chat-template", "chat.jinja"]);
    let answers = answers(folder.path());
    let chat = choice(&answers["chat"]);
    assert_eq!(chat["message"]["content"], choice(&answers["text"])["text"]);
    let tokens = chat["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len(), 8);
    for token in tokens {
        // Greedy: each is the most likely one.
        assert_eq!(token["logprob"], token["top_logprobs"][0]["logprob"]);
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 2);
    }
    assert_eq!(
        answers["chat"]["response"]["body"]["usage"]["completion_tokens"],
        8
    );
}

#[test]
fn stop_strings_end_an_answer_and_are_not_in_it() {
    let folder = place(&[]);
    let text = alone(folder.path(), "In the beginning", &["-n", "24"]);
    let text = text.as_str().unwrap();
    // From the middle of the text, across tokens.
    let at = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let stop: String = text[at..].chars().take(6).collect();
    let before = &text[..text.find(&stop).unwrap()];
    let body =
        json!({"prompt": "In the beginning", "max_tokens": 24, "stop": [stop], "logprobs": 0});
    fs::write(folder.path().join("in.jsonl"), completion("a", body)).unwrap();
    batch(folder.path(), &[]);
    let answers = answers(folder.path());
    let choice = choice(&answers["a"]);
    assert_eq!(
        (&choice["text"], &choice["finish_reason"]),
        (&json!(before), &json!("stop"))
    );
    let tokens = choice["logprobs"]["tokens"].as_array().unwrap();
    let joined: String = tokens.iter().map(|t| t.as_str().unwrap()).collect();
    assert!(joined.starts_with(before), "{joined:?}, {before:?}");
}

/// Requests that take a while together.
fn many(n: usize) -> Vec<String> {
    let body = |i: usize| json!({"prompt": format!("{i} In the beginning"), "max_tokens": 40, "ignore_eos": true});
    (0..n)
        .map(|i| completion(&i.to_string(), body(i)))
        .collect()
}

#[test]
fn a_run_goes_on_where_an_earlier_one_was_cut_off() {
    let folder = place(&many(6));
    batch(folder.path(), &[]);
    let whole = answers(folder.path());
    let path = folder.path().join("out.jsonl");
    let bytes = fs::read(&path).unwrap();
    let third = bytes
        .iter()
        .enumerate()
        .filter(|(_, b)| **b == b'\n')
        .nth(2)
        .unwrap()
        .0
        + 1;
    for torn in [third, third + 1, third + 40, bytes.len() - 1] {
        fs::write(&path, &bytes[..torn]).unwrap();
        let summary = batch(folder.path(), &[]);
        let before = if torn == bytes.len() - 1 { 5 } else { 3 };
        assert_eq!(
            (&summary["answered_before"], &summary["answered"]),
            (&json!(before), &json!(6 - before))
        );
        assert_eq!(answers(folder.path()), whole);
    }
    // Everything is answered, which is not an error.
    let summary = batch(folder.path(), &[]);
    assert_eq!(summary["answered"], 0);
}

#[test]
fn mistakes_are_told_before_the_model_is_loaded_and_change_nothing() {
    let folder = place(&many(1));
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    let refuse = |args: &[&str], words: &[&str]| {
        let model = demo_model();
        let args = [&["batch", model.to_str().unwrap()], args].concat();
        refused(folder.path(), &args, words)
    };
    refuse(&["no.jsonl", "-o", "out.jsonl"], &["no.jsonl"]);
    refuse(&[".", "-o", "out.jsonl"], &["not a regular file"]);
    refuse(
        &["in.jsonl", "-o", "no/out.jsonl"],
        &["does not exist; create it"],
    );
    refuse(
        &["in.jsonl", "-o", "in.jsonl"],
        &["line 1 is not an answer of a batch"],
    );
    refuse(
        &["in.jsonl", "-o", "out.jsonl", "-n", "0"],
        &["--n-predict: 0"],
    );
    write("empty.jsonl", "\n");
    refuse(
        &["empty.jsonl", "-o", "out.jsonl"],
        &["no requests", "custom_id"],
    );
    write("twice.jsonl", &many(1)[0].repeat(2));
    refuse(
        &["twice.jsonl", "-o", "out.jsonl"],
        &["line 2 has the custom_id \"0\" of line 1"],
    );
    write("notes", "my notes");
    refuse(
        &["in.jsonl", "-o", "notes"],
        &["notes: line 1", "choose another output"],
    );
    let other = run_in(
        folder.path(),
        &["batch", "no.gguf", "in.jsonl", "-o", "out.jsonl"],
    );
    check_refusal(&other, &["no.gguf"]);
    assert!(!folder.path().join("out.jsonl").exists());
}

#[cfg(unix)]
mod on_unix {
    use super::*;
    use crate::common::send;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    /// Starts a batch that takes a while, and waits until it has answered something.
    fn begun(folder: &Path) -> std::process::Child {
        let length = || fs::metadata(folder.join("out.jsonl")).map_or(0, |m| m.len());
        let before = length();
        let mut command = tier_plan();
        command
            .current_dir(folder)
            .args(arguments(&["--parallel", "2"]));
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let until = Instant::now() + Duration::from_secs(120);
        while length() <= before {
            assert!(Instant::now() < until, "no answer comes");
            std::thread::sleep(Duration::from_millis(5));
        }
        child
    }

    #[test]
    fn signals_leave_whole_lines_and_one_process_writes() {
        let folder = place(&many(120));
        let mut interrupted = 0;
        for (signal, code) in [("-INT", Some(130)), ("-KILL", None)] {
            let mut child = begun(folder.path());
            // It must not end before the other process looks.
            send("-STOP", &child);
            let busy = run_in(folder.path(), &arguments(&[]));
            check_refusal(
                &busy,
                &["another process is writing", "choose another output"],
            );
            send(signal, &child);
            send("-CONT", &child);
            let asked = Instant::now();
            let ended = child.wait().unwrap();
            assert!(
                asked.elapsed() < Duration::from_secs(3),
                "{:?}",
                asked.elapsed()
            );
            assert_eq!(ended.code(), code);
            if code.is_some() {
                interrupted = answers(folder.path()).len();
                assert!(interrupted < 120);
            }
        }
        let summary = batch(folder.path(), &[]);
        let before = summary["answered_before"].as_u64().unwrap();
        assert!(before >= interrupted as u64);
        assert_eq!(summary["answered"].as_u64().unwrap(), 120 - before);
        assert_eq!(answers(folder.path()).len(), 120);
    }

    #[test]
    fn a_full_disk_keeps_whole_lines() {
        let folder = place(&many(12));
        let script = "ulimit -f 3; exec \"$0\" \"$@\"";
        let program = tier_plan();
        let output = Command::new("sh")
            .current_dir(folder.path())
            .args(["-c", script])
            .arg(program.get_program())
            .args(arguments(&[]))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        check_refusal(&output, &["out.jsonl", "the same command goes on"]);
        let kept = answers(folder.path()).len();
        assert!((1..12).contains(&kept), "{kept}");
        let summary = batch(folder.path(), &[]);
        assert_eq!(summary["answered_before"], kept);
        assert_eq!(answers(folder.path()).len(), 12);
        assert_eq!(stdout(&output), "");
    }
}
