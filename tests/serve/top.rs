//! `tier-plan top` as lines, against a server, none, and one that goes away.

use super::*;
use crate::common::{refused, stdout, succeeded};
use std::io::{BufRead, BufReader, Read};
use std::process::Command;

fn url(server: &Served) -> String {
    format!("http://127.0.0.1:{}", server.port)
}

#[test]
fn one_line_of_json_has_what_the_server_does() {
    let server = Served::start(&["--parallel", "2", "--alias", "watched"]);
    let is_done = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        // A text ends within a window or two, so others follow it.
        scope.spawn(|| {
            while !is_done.load(Ordering::Relaxed) {
                server
                    .post("/v1/completions", &completion(&long(), 500))
                    .ok();
            }
        });
        let folder = tempfile::tempdir().unwrap();
        let url = url(&server);
        let look = || run_in(folder.path(), &["top", &url, "--once", "--json"]);
        let seen: Vec<_> = (0..5).map(|_| look()).collect();
        is_done.store(true, Ordering::Relaxed);
        seen
    });
    let seen: Vec<Value> = seen.into_iter().map(json).collect();
    for line in &seen {
        assert_eq!(
            (&line["connected"], &line["model"], &line["emulated"]),
            (&json!(true), &json!("watched"), &json!(false))
        );
        assert_eq!(line["plan"], "all-in-dram", "{line}");
        assert_eq!(line["tiers"][0]["read_gbps"], Value::Null, "{line}");
        assert!(
            line["tiers"][0]["used_bytes"].as_u64().unwrap() > 0,
            "{line}"
        );
        assert_eq!(line["requests"]["failed"], 0, "{line}");
        assert_eq!(line["queue"]["max_running"], 2, "{line}");
        assert!(line["window_s"].as_f64().unwrap() > 0.9, "{line}");
    }
    let rates = seen.iter().filter(|line| {
        line["decode_tok_s"].as_f64() > Some(0.0) && line["text_tok_s"].as_f64() > Some(0.0)
    });
    let busy: Vec<_> = rates.collect();
    assert!(!busy.is_empty(), "no text at work in {seen:?}");
    for line in busy {
        assert_eq!(line["hit_rate"], 1.0, "everything is in memory: {line}");
    }
}

#[test]
fn an_emulated_plan_is_labelled_and_has_its_rates() {
    let folder = tempfile::tempdir().unwrap();
    let (model, machine) = (demo_model(), crate::common::demo_machine());
    let (model, machine) = (model.to_str().unwrap(), machine.to_str().unwrap());
    succeeded(run_in(
        folder.path(),
        &[
            "solve",
            model,
            "-m",
            machine,
            "--strategy",
            "lru-only",
            "-o",
            "plan.toml",
        ],
    ));
    let plan = folder.path().join("plan.toml");
    let server = Served::start(&["--plan", plan.to_str().unwrap()]);
    let line = json(run_in(
        folder.path(),
        &["top", &url(&server), "--once", "--json"],
    ));
    assert_eq!(
        (&line["plan"], &line["emulated"]),
        (&json!("lru-only"), &json!(true))
    );
    let last = line["tiers"].as_array().unwrap().last().unwrap();
    assert_eq!(
        (&last["emulated"], &last["read_gbps"]),
        (&json!(true), &json!(0.15))
    );
    let words = stdout(&succeeded(run_in(
        folder.path(),
        &["top", "--url", &url(&server), "--once"],
    )));
    assert_eq!(words.lines().count(), 1, "{words}");
    for part in ["plan lru-only", " of 0.15 GB/s", "emulated tiers"] {
        assert!(words.contains(part), "{part} in {words}");
    }
}

#[test]
fn a_server_that_is_missing_or_refuses_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let free = listener.local_addr().unwrap().port();
    drop(listener);
    let missing = format!("http://127.0.0.1:{free}");
    for args in [
        vec!["top", &missing],
        vec!["top", &missing, "--once", "--json"],
    ] {
        refused(
            folder.path(),
            &args,
            &["no answer from a server", "tier-plan serve"],
        );
    }
    let server = Served::start(&["--api-key", "right"]);
    let url = url(&server);
    for args in [
        vec!["top", &url],
        vec!["top", &url, "--api-key", "wrong", "--once"],
    ] {
        refused(folder.path(), &args, &["wants a key", "--api-key"]);
    }
    let args = ["top", &url, "--api-key", "right", "--once", "--json"];
    assert_eq!(json(run_in(folder.path(), &args))["connected"], true);
    let bad = ["top", &url, "--url", &url];
    let output = run_in(folder.path(), &bad);
    assert_eq!(output.status.code(), Some(2), "two addresses");
}

/// Starts the command with its output in a pipe.
fn lines_of(url: &str) -> std::process::Child {
    let mut command: Command = tier_plan();
    command.args(["top", url, "--json"]);
    piped(&mut command)
}

#[test]
fn lines_follow_until_a_signal_and_a_lost_server_is_one_of_them() {
    let mut server = Served::start(&[]);
    let mut top = lines_of(&url(&server));
    let mut out = BufReader::new(top.stdout.take().unwrap());
    let mut next = || -> Value {
        let mut line = String::new();
        assert_ne!(out.read_line(&mut line).unwrap(), 0, "no line");
        serde_json::from_str(&line).unwrap()
    };
    let (first, second) = (next(), next());
    assert_eq!(first["connected"], true);
    assert!(second["uptime_s"].as_f64() > first["uptime_s"].as_f64());
    server.stop();
    let mut line = next();
    while line["connected"] == true {
        line = next();
    }
    assert!(!line["error"].as_str().unwrap().is_empty(), "{line}");
    let (one, two) = (next(), next());
    let wait = |line: &Value| line["retry_in_s"].as_f64().unwrap();
    assert!(wait(&one) < wait(&two) && wait(&two) <= 5.0, "{one} {two}");
    send("-TERM", &top);
    let mut error = String::new();
    top.stderr
        .take()
        .unwrap()
        .read_to_string(&mut error)
        .unwrap();
    assert_eq!(error, "", "quiet");
    assert!(!top.wait().unwrap().success());
}

/// Runs the command on a terminal that `script` makes, types `keys` once the view has drawn `word`,
/// and returns what came and the exit code.
#[cfg(target_os = "linux")]
fn on_terminal(url: &str, word: &str, keys: &[u8]) -> Option<(String, Option<i32>)> {
    use std::io::Write;
    use std::process::Stdio;
    let program = tier_plan();
    let program = program.get_program().to_str().unwrap().to_string();
    let line = format!("stty cols 100 rows 30; exec {program} top {url}");
    let mut script = Command::new("script");
    script.args(["-q", "-e", "-c", &line, "/dev/null"]);
    script.env("TERM", "xterm").stdin(Stdio::piped());
    script.stdout(Stdio::piped()).stderr(Stdio::null());
    // Some systems have no `script`.
    let mut child = script.spawn().ok()?;
    let mut out = child.stdout.take().unwrap();
    let (mut came, mut buffer) = (Vec::new(), [0; 4096]);
    while !String::from_utf8_lossy(&came).contains(word) {
        let n = out.read(&mut buffer).unwrap();
        assert_ne!(n, 0, "no {word:?} in {:?}", String::from_utf8_lossy(&came));
        came.extend_from_slice(&buffer[..n]);
    }
    let mut input = child.stdin.take().unwrap();
    input.write_all(keys).unwrap();
    out.read_to_end(&mut came).unwrap();
    drop(input);
    let code = child.wait().unwrap().code();
    Some((String::from_utf8_lossy(&came).into_owned(), code))
}

#[test]
#[cfg(target_os = "linux")]
fn the_view_is_drawn_and_the_terminal_restored() {
    let server = Served::start(&["--alias", "watched"]);
    // Ctrl-L draws anew, without a question to the terminal, which `script` would not answer.
    for (keys, expected) in [(&b"q"[..], 0), (b"\x0c?p q", 0), (b"\x03", 130)] {
        let Some((came, code)) = on_terminal(&url(&server), "watched", keys) else {
            return;
        };
        assert_eq!(code, Some(expected), "{came:?}");
        let (entered, left) = (came.find("\x1b[?1049h"), came.rfind("\x1b[?1049l"));
        assert!(entered.is_some() && left > entered, "{came:?}");
        assert!(
            came.rfind("\x1b[?25h") > came.rfind("\x1b[?25l"),
            "cursor: {came:?}"
        );
    }
}
