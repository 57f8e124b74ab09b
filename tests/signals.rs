//! Signals end the program soon, and what it has is kept.

use crate::common::{demo_machine, demo_model, piped, run_in, send, stderr, succeeded, tier_plan};
use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How soon a signal must end the program. What takes longer on a busy machine is the system.
const SOON: Duration = Duration::from_secs(3);

/// Writes a plan whose prompt takes minutes of declared time, and a long prompt.
fn slow_plan(folder: &Path) {
    let (model, machine) = (demo_model(), demo_machine());
    let solve = [
        "solve",
        model.to_str().unwrap(),
        "-m",
        machine.to_str().unwrap(),
    ];
    succeeded(run_in(
        folder,
        &[&solve[..], &["--strategy", "lru-only", "-o", "plan.toml"]].concat(),
    ));
    let plan = fs::read_to_string(folder.join("plan.toml")).unwrap();
    let slow = plan.replace("read_gbps = 0.15", "read_gbps = 0.0001");
    assert_ne!(plan, slow);
    fs::write(folder.join("slow.toml"), slow).unwrap();
    fs::write(
        folder.join("long.txt"),
        "In the beginning God created. ".repeat(100),
    )
    .unwrap();
}

/// Waits for a program that a signal was sent to, and returns its exit code.
fn ends_soon(child: &mut Child) -> Option<i32> {
    let start = Instant::now();
    while start.elapsed() < SOON {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    panic!("the program went on after the signal");
}

/// Reads standard error until a line contains `word`.
fn wait_for(child: &mut Child, word: &str) {
    let from = child.stderr.as_mut().unwrap();
    let (mut seen, mut byte) = (Vec::new(), [0]);
    while !String::from_utf8_lossy(&seen).contains(word) {
        assert_eq!(
            from.read(&mut byte).unwrap(),
            1,
            "{}",
            String::from_utf8_lossy(&seen)
        );
        seen.push(byte[0]);
    }
}

#[test]
fn a_first_signal_ends_a_prompt_on_slow_tiers() {
    let folder = tempfile::tempdir().unwrap();
    slow_plan(folder.path());
    for (signal, code) in [("-INT", 130), ("-TERM", 143), ("-HUP", 129)] {
        let mut command = tier_plan();
        command
            .current_dir(folder.path())
            .arg("run")
            .arg(demo_model());
        command.args([
            "--plan",
            "slow.toml",
            "-f",
            "long.txt",
            "-n",
            "4",
            "--record",
            "r.json",
        ]);
        let mut child = piped(&mut command);
        wait_for(&mut child, "counted");
        std::thread::sleep(Duration::from_millis(500));
        send(signal, &child);
        assert_eq!(ends_soon(&mut child), Some(code), "{signal}");
    }
}

/// A program that was started to ignore a signal, as by `nohup`, goes on ignoring it.
#[test]
fn an_ignored_signal_stays_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new("sh");
    command
        .current_dir(folder.path())
        .args(["-c", "trap '' HUP; exec \"$@\"", "sh"]);
    command
        .arg(tier_plan().get_program())
        .arg("run")
        .arg(demo_model());
    command.args([
        "-p",
        "In the beginning",
        "-n",
        "300",
        "--ignore-eos",
        "--record",
        "r.json",
    ]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    send("-HUP", &child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(folder.path().join("r.json").exists());
}

/// The text so far stays, and the record says what was done.
#[test]
fn an_interrupted_run_keeps_what_it_has() {
    let temporary = tempfile::tempdir().unwrap();
    let mut command = tier_plan();
    command
        .current_dir(temporary.path())
        .arg("run")
        .arg(demo_model());
    command.args([
        "-p",
        "And it came to pass in those days",
        "-n",
        "100000",
        "--ctx",
        "100100",
        "--ignore-eos",
        "--record",
        "r.json",
    ]);
    let mut child = piped(&mut command);
    let mut first = [0];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut first)
        .unwrap();
    send("-INT", &child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert!(
        !stderr(&output).contains("error") && stderr(&output).contains("tok/s"),
        "{}",
        stderr(&output)
    );
    let record: serde_json::Value =
        serde_json::from_slice(&fs::read(temporary.path().join("r.json")).unwrap()).unwrap();
    let tokens = record["output"].as_array().unwrap().len();
    assert!((1..100_000).contains(&tokens), "{tokens}");
}

/// Loading leaves nothing behind, so a signal ends it at once, in a chat as elsewhere.
#[cfg(target_os = "linux")]
#[test]
fn a_first_signal_ends_loading() {
    let folder = tempfile::tempdir().unwrap();
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        let mut chat = tier_plan();
        chat.current_dir(folder.path()).arg("run").arg(demo_model());
        // Each of the few reads takes seconds.
        chat.args(["--chat", "--threads", "1"])
            .env("LD_PRELOAD", &crate::outputs::SHIM.1)
            .env("FAULT", "read-slow");
        let mut chat = chat
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_secs(2));
        assert!(chat.try_wait().unwrap().is_none(), "loading has ended");
        send(signal, &chat);
        assert!(ends_with(&mut chat, signal, code), "{signal}");
    }
}

/// Whether the program ends soon with the code of the signal, or of the signal itself where it
/// does not catch it at that moment.
#[cfg(target_os = "linux")]
fn ends_with(child: &mut Child, signal: &str, code: i32) -> bool {
    use std::os::unix::process::ExitStatusExt;
    let own = if signal == "-INT" { 2 } else { 15 };
    match ends_soon(child) {
        Some(found) => found == code,
        None => child.wait().unwrap().signal() == Some(own),
    }
}

/// What was scored or said is printed, and the exit code is that of the signal.
#[test]
fn what_is_cut_short_says_so_in_its_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    slow_plan(folder.path());
    let model = demo_model();
    let model = model.to_str().unwrap();
    let score = [
        "perplexity",
        model,
        "--plan",
        "slow.toml",
        "-f",
        "long.txt",
        "--ctx",
        "64",
    ];
    let chat = ["run", model, "--plan", "slow.toml", "--chat"];
    for (args, word) in [(&score[..], "counted"), (&chat[..], "counted")] {
        let mut command = tier_plan();
        command.current_dir(folder.path()).args(args);
        let mut child = piped(command.stdin(Stdio::piped()));
        let mut input = child.stdin.take().unwrap();
        input.write_all(b"In the beginning\n").unwrap();
        wait_for(&mut child, word);
        std::thread::sleep(Duration::from_millis(500));
        send("-TERM", &child);
        assert_eq!(ends_soon(&mut child), Some(143), "{args:?}");
    }
}
