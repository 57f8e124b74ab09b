//! Runs llama.cpp's `llama-bench` on the same file, if its path is given.

use super::table::{Found, Row, Target};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tier_plan_selftest::speed::{Effort, Timed};

const PART: &str = "llama.cpp";

/// Time limit of one run.
const LIMIT: Duration = Duration::from_secs(15 * 60);

/// What the peer measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Peer {
    /// Prompt tokens per second.
    pub prompt_tok_s: f64,
    /// Decoded tokens per second.
    pub decode_tok_s: f64,
    /// Build description that the peer reports.
    pub build: String,
}

/// Runs `llama-bench` on a file with all layers on GPU number `device`.
///
/// # Errors
/// When it cannot be started, fails, exceeds the time limit, or prints something unexpected.
pub fn measure(
    program: &Path,
    model: &Path,
    device: usize,
    effort: Effort,
    stop: &dyn Fn() -> bool,
) -> Result<Peer> {
    let (prompt, decode) = (effort.prompt, effort.decode);
    let mut command = Command::new(program);
    command
        .arg("-m")
        .arg(model)
        .args(["-ngl", "99", "-sm", "none", "-mg"])
        .arg(device.to_string());
    command.args(["-p", &prompt.to_string(), "-n", &decode.to_string()]);
    command.args(["-r", &effort.rounds.to_string(), "-o", "json"]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let shown = program.display();
    let mut child = command
        .spawn()
        .with_context(|| format!("{shown} can't be run; --peer wants the path of llama-bench"))?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    // Both pipes are read at once: a full pipe would block the child.
    let readers = collect(out).and_then(|out| Ok((out, collect(err)?)));
    let (out, err) = match readers {
        Ok(readers) => readers,
        Err(error) => {
            // The child may have exited meanwhile.
            let _ = child.kill();
            let _ = child.wait();
            return Err(error).context("starting a thread that reads what --peer prints");
        }
    };
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child
            .try_wait()
            .with_context(|| format!("waiting for {shown}"))?
        {
            break status;
        }
        if stop() || start.elapsed() > LIMIT {
            // The child may have exited meanwhile.
            let _ = child.kill();
            let _ = child.wait();
            ensure!(
                stop(),
                "{shown} was ended after {} minutes",
                LIMIT.as_secs() / 60
            );
            bail!("{shown} was ended");
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let text = |thread: std::thread::JoinHandle<Vec<u8>>| {
        String::from_utf8_lossy(&thread.join().unwrap_or_default()).into_owned()
    };
    let (out, err) = (text(out), text(err));
    let last = err
        .lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("it said nothing");
    ensure!(status.success(), "{shown} failed ({status}): {last}");
    parse(&out, prompt, decode).with_context(|| format!("what {shown} printed"))
}

fn collect(
    from: Option<impl Read + Send + 'static>,
) -> std::io::Result<std::thread::JoinHandle<Vec<u8>>> {
    std::thread::Builder::new().spawn(move || {
        let mut bytes = Vec::new();
        // Output before an error is kept.
        let _ = from.map(|mut from| from.read_to_end(&mut bytes));
        bytes
    })
}

/// Parses the JSON output: a list of tests, one of the prompt and one of decoding.
fn parse(text: &str, prompt: usize, decode: usize) -> Result<Peer> {
    let tests: Value =
        serde_json::from_str(text).context("is no JSON; --peer wants llama-bench of llama.cpp")?;
    let tests = tests
        .as_array()
        .context("is no list of tests; --peer wants llama-bench of llama.cpp")?;
    let rate = |n_prompt: usize, n_gen: usize| -> Result<f64> {
        let is_it = |t: &&Value| t["n_prompt"] == n_prompt && t["n_gen"] == n_gen;
        let test = tests.iter().find(is_it);
        let test = test.with_context(|| {
            format!("has no test of {n_prompt} prompt and {n_gen} decoded tokens")
        })?;
        let rate = test["avg_ts"]
            .as_f64()
            .filter(|rate| rate.is_finite() && *rate > 0.0);
        rate.with_context(|| {
            format!("has no speed (avg_ts) for {n_prompt} prompt and {n_gen} decoded tokens")
        })
    };
    let (prompt_tok_s, decode_tok_s) = (rate(prompt, 0)?, rate(0, decode)?);
    let said = |key: &str| match &tests[0][key] {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => "unknown".into(),
    };
    let build = format!(
        "build {} ({}), {} on {}",
        said("build_number"),
        said("build_commit"),
        said("backends"),
        said("gpu_info")
    );
    Ok(Peer {
        prompt_tok_s,
        decode_tok_s,
        build,
    })
}

/// Returns rows of the peer's speeds beside the speeds measured here.
pub fn rows(found: &Result<Peer>, here: Option<&Timed>, judged: bool) -> Vec<Row> {
    let none = |found| vec![Row::without(PART, "llama-bench", found)];
    let (peer, here) = match (found, here) {
        (Ok(peer), Some(here)) => (peer, here),
        (Err(error), _) => return none(Found::Failed(format!("{error:#}"))),
        (Ok(_), None) => return none(Found::NotRun("the model was not timed here".into())),
    };
    let row = |what: &str, here: f64, there: f64| {
        let note = format!("{here:.1} tok/s here, {there:.1} there: {}", peer.build);
        let row = Row::figure(PART, what, here / there, "×").noting(note);
        if judged {
            row.with(Target::AtLeast(1.0))
        } else {
            row
        }
    };
    vec![
        row(
            "decoding, all on the GPU, times as fast",
            here.tok_s(),
            peer.decode_tok_s,
        ),
        row(
            "a prompt, all on the GPU, times as fast",
            here.prompt_tok_s(),
            peer.prompt_tok_s,
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selftest::table::Verdict;

    const OUTPUT: &str = r#"[
        {"build_commit": "abc", "build_number": 11434, "backends": "CUDA", "gpu_info": "a GPU",
         "n_prompt": 512, "n_gen": 0, "avg_ts": 4000.0},
        {"n_prompt": 0, "n_gen": 128, "avg_ts": 150.5}
    ]"#;

    #[test]
    fn its_output_is_read() {
        let peer = parse(OUTPUT, 512, 128).unwrap();
        assert_eq!((peer.prompt_tok_s, peer.decode_tok_s), (4000.0, 150.5));
        assert!(
            peer.build.contains("11434") && peer.build.contains("CUDA"),
            "{}",
            peer.build
        );
        let why = |text: &str, prompt| format!("{:#}", parse(text, prompt, 128).unwrap_err());
        assert!(why("usage: …", 512).contains("no JSON"));
        assert!(why("{}", 512).contains("no list"));
        assert!(why("[]", 512).contains("no test of 512"));
        assert!(why(OUTPUT, 64).contains("no test of 64"));
        assert!(why(&OUTPUT.replace("4000.0", "0.0"), 512).contains("avg_ts"));
        assert!(why(&OUTPUT.replace("4000.0", "\"fast\""), 512).contains("avg_ts"));
    }

    #[test]
    fn rows_have_ratios_or_the_reason() {
        let here = crate::selftest::rows::tests::timed(0.005);
        let peer = Peer {
            prompt_tok_s: here.prompt_tok_s(),
            decode_tok_s: 250.0,
            build: "a build".into(),
        };
        let rows = rows(&Ok(peer), Some(&here), true);
        assert_eq!(rows[0].found, Found::Figure(0.8));
        assert_eq!(
            rows.iter().map(Row::verdict).collect::<Vec<_>>(),
            [Verdict::Missed, Verdict::Met]
        );
        let failed = super::rows(&Err(anyhow::anyhow!("nothing there")), None, true);
        assert_eq!(failed[0].found, Found::Failed("nothing there".into()));
        assert!(failed.len() == 1 && !failed[0].is_wrong());
    }

    #[test]
    fn a_program_that_is_none_is_a_clear_error() {
        let effort = Effort {
            prompt: 512,
            decode: 128,
            ..Effort::LITTLE
        };
        let run =
            |program: &Path, stop: bool| measure(program, Path::new("a.gguf"), 0, effort, &|| stop);
        let why = format!(
            "{:#}",
            run(Path::new("/nowhere/llama-bench"), false).unwrap_err()
        );
        assert!(
            why.contains("/nowhere/llama-bench can't be run") && why.contains("--peer"),
            "{why}"
        );
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let folder = tempfile::tempdir().unwrap();
            let script = |name: &str, text: &str| {
                let path = folder.path().join(name);
                std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
                path
            };
            let why = format!(
                "{:#}",
                run(&script("fails", "echo no such model >&2; exit 3"), false).unwrap_err()
            );
            assert!(
                why.contains("no such model") && why.contains("failed"),
                "{why}"
            );
            let why = format!(
                "{:#}",
                run(&script("chats", "echo hello"), false).unwrap_err()
            );
            assert!(why.contains("no JSON"), "{why}");
            let works = script("works", &format!("cat <<'END'\n{OUTPUT}\nEND"));
            assert_eq!(run(&works, false).unwrap().decode_tok_s, 150.5);
            let why = format!(
                "{:#}",
                run(&script("hangs", "exec sleep 600"), true).unwrap_err()
            );
            assert!(why.contains("was ended"), "{why}");
        }
    }
}
