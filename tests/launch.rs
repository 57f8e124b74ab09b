//! `tier-plan launch`: a client gets what makes it talk to a server, its exit code is the command's,
//! and no server is left behind.

use crate::common::{check_refusal, demo_model, piped, run_in, send, stderr, stdout, tier_plan};
use crate::serve::client::Served;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// A template with tools, in whose form calls are known.
const TEMPLATE: &str = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}\
    {{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\
    {{ {\"name\": c.function.name, \"arguments\": c.function.arguments} | tojson }}</tool_call>{% endfor %}\n\
    {% endfor %}assistant:";

/// Folder with a client of each name, which runs a script of a shell, and a template.
fn clients(script: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["claude", "codex", "opencode"] {
        let path = folder.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::write(folder.path().join("template.jinja"), TEMPLATE).unwrap();
    folder
}

/// The command with the clients of a folder before all others, and without the caller's settings.
fn launch(folder: &Path, client: &str) -> Command {
    let mut command = tier_plan();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(folder.to_path_buf()).chain(std::env::split_paths(&path));
    command.env("PATH", std::env::join_paths(folders).unwrap());
    for name in ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"] {
        command.env_remove(name);
    }
    command.current_dir(folder).args(["launch", client]);
    command
}

fn served(folder: &Path, more: &[&str]) -> (Served, String) {
    let template = folder.join("template.jinja");
    let args = ["--chat-template", template.to_str().unwrap()];
    let server = Served::start(&[&args, more].concat());
    let url = format!("http://127.0.0.1:{}", server.port);
    (server, url)
}

/// The variables that a client printed with `env`.
fn variable<'o>(out: &'o str, name: &str) -> Option<&'o str> {
    let value = |line: &'o str| line.strip_prefix(name)?.strip_prefix('=');
    out.lines().find_map(value)
}

#[test]
fn clients_get_the_server_and_their_own_arguments() {
    let folder = clients(
        "env\nprintf 'arg %s\\n' \"$@\"\nwhile [ $# -gt 0 ]; do [ \"$1\" = --settings ] && cat \"$2\"; shift; done",
    );
    let (_server, url) = served(
        folder.path(),
        &[
            "--api-key",
            "secret",
            "--alias",
            "demo",
            "--context",
            "1000",
        ],
    );
    let run = |client: &str, args: &[&str]| {
        let mut command = launch(folder.path(), client);
        command
            .args(["--url", &url])
            .env("TIER_PLAN_API_KEY", "secret");
        command
            .env("ANTHROPIC_API_KEY", "other")
            .env("CLAUDE_CODE_USE_BEDROCK", "1");
        let output = command.arg("--").args(args).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        output
    };
    let claude = run("claude", &["-p", "a b"]);
    let warned = stderr(&claude);
    assert!(
        warned.contains("context of 1000 tokens is too small for Claude Code")
            && !warned.contains("refuses tools"),
        "{warned}"
    );
    let out = stdout(&claude);
    for (name, value) in [
        ("ANTHROPIC_BASE_URL", url.as_str()),
        ("ANTHROPIC_AUTH_TOKEN", "secret"),
        ("ANTHROPIC_MODEL", "demo"),
        ("ANTHROPIC_DEFAULT_HAIKU_MODEL", "demo"),
        ("CLAUDE_CODE_MAX_CONTEXT_TOKENS", "1000"),
        ("CLAUDE_CODE_MAX_OUTPUT_TOKENS", "250"),
        ("CLAUDE_CODE_ATTRIBUTION_HEADER", "0"),
    ] {
        assert_eq!(variable(&out, name), Some(value), "{name}: {out}");
    }
    for name in ["ANTHROPIC_API_KEY", "CLAUDE_CODE_USE_BEDROCK"] {
        assert_eq!(variable(&out, name), None, "{name}");
    }
    // The settings say the same, and are gone with the client.
    let settings: Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    assert_eq!(settings["env"]["ANTHROPIC_BASE_URL"], url);
    assert_eq!(settings["env"]["ANTHROPIC_API_KEY"], "");
    let args: Vec<&str> = out
        .lines()
        .filter_map(|line| line.strip_prefix("arg "))
        .collect();
    assert_eq!((args[0], &args[2..]), ("--settings", &["-p", "a b"][..]));
    assert!(!Path::new(args[1]).exists(), "{}", args[1]);
    // The user's own settings stand alone.
    let own = stdout(&run("claude", &["--settings=x.json"]));
    assert!(
        own.contains("arg --settings=x.json") && !own.contains("arg --settings\n"),
        "{own}"
    );

    let out = stdout(&run("codex", &["exec", "hi"]));
    let args: Vec<&str> = out
        .lines()
        .filter_map(|line| line.strip_prefix("arg "))
        .collect();
    let config = format!(
        "model_providers.tier-plan={{name=\"tier-plan\",base_url=\"{url}/v1\",wire_api=\"responses\",\
         stream_idle_timeout_ms=3600000,env_key=\"TIER_PLAN_API_KEY\"}}"
    );
    let expected = [
        "-c",
        "model_provider=\"tier-plan\"",
        "-c",
        "model=\"demo\"",
        "-c",
        "model_context_window=1000",
        "-c",
        &config,
        "exec",
        "hi",
    ];
    assert_eq!(args, expected);
    assert_eq!(variable(&out, "TIER_PLAN_API_KEY"), Some("secret"));

    let out = stdout(&run("opencode", &["run", "hi"]));
    let config: Value =
        serde_json::from_str(variable(&out, "OPENCODE_CONFIG_CONTENT").unwrap()).unwrap();
    assert_eq!(config["model"], "tier-plan/demo");
    let provider = &config["provider"]["tier-plan"];
    assert_eq!(provider["options"]["baseURL"], format!("{url}/v1"));
    assert_eq!(provider["options"]["apiKey"], "{env:TIER_PLAN_API_KEY}");
    assert_eq!(provider["models"]["demo"]["limit"]["context"], 1000);
    assert!(out.ends_with("arg run\narg hi\n"), "{out}");
}

#[test]
fn what_would_run_is_printed_without_the_key() {
    let folder = clients("echo started");
    let (_server, url) = served(folder.path(), &["--api-key", "s3cret"]);
    let files = |folder: &Path| crate::common::listing(folder);
    let before = files(folder.path());
    for client in ["claude", "codex", "opencode"] {
        let mut command = launch(folder.path(), client);
        command.args(["--url", &url, "--api-key", "s3cret", "--print", "--", "a'b"]);
        let out = stdout(&command.env("TMPDIR", folder.path()).output().unwrap());
        assert!(!out.contains("s3cret") && !out.contains("started"), "{out}");
        assert!(
            out.contains("TIER_PLAN_API_KEY=***") && out.contains(&url),
            "{out}"
        );
        let last = out.lines().last().unwrap();
        assert!(
            last.starts_with(client) && last.ends_with(r"'a'\''b'"),
            "{last}"
        );
    }
    assert_eq!(files(folder.path()), before);
    // With a model there is no server yet; its command line is printed, too.
    let mut command = launch(folder.path(), "codex");
    command.args([
        "--print",
        "--api-key",
        "s3cret",
        "--model",
        "some model.gguf",
        "--context",
        "64",
        "--mmap",
    ]);
    let out = stdout(&command.output().unwrap());
    let first = out.lines().next().unwrap();
    assert_eq!(
        first,
        "tier-plan serve --host=127.0.0.1 --port=0 '--model=some model.gguf' --context=64 --mmap &"
    );
    assert!(
        out.contains("http://127.0.0.1:PORT/v1") && !out.contains("s3cret"),
        "{out}"
    );
}

#[test]
fn the_exit_code_is_that_of_the_client() {
    let folder =
        clients("for last; do :; done\ncase $last in kill) kill -9 $$;; *) exit $last;; esac");
    let (_server, url) = served(folder.path(), &[]);
    for (arg, code) in [("0", 0), ("3", 3), ("130", 130), ("kill", 137)] {
        let output = launch(folder.path(), "codex")
            .args(["--url", &url, "--", arg])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        assert!(!stderr(&output).contains("error"), "{}", stderr(&output));
    }
}

#[test]
fn what_is_missing_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = launch(folder.path(), "opencode");
    let output = command.env("PATH", folder.path()).output().unwrap();
    check_refusal(
        &output,
        &["opencode: not found", "npm install -g opencode-ai"],
    );
    // A file that can't be run is no client.
    fs::write(folder.path().join("claude"), "").unwrap();
    let output = launch(folder.path(), "claude")
        .env("PATH", folder.path())
        .output()
        .unwrap();
    check_refusal(
        &output,
        &[
            "claude: not found",
            "npm install -g @anthropic-ai/claude-code",
        ],
    );

    let folder = clients("exit 0");
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", closed.local_addr().unwrap());
    drop(closed);
    let with = |args: &[&str]| launch(folder.path(), "claude").args(args).output().unwrap();
    check_refusal(
        &with(&["--url", &url]),
        &["no answer from a server", &url, "tier-plan serve"],
    );
    check_refusal(&with(&["--url", "https://a"]), &["--url: https://a", "TLS"]);
    check_refusal(&with(&["--api-key", "a b"]), &["--api-key"]);
    check_refusal(
        &with(&["--context", "64"]),
        &["--context: an option of a server", "--model FILE"],
    );
    let (_server, url) = served(folder.path(), &["--api-key", "secret"]);
    check_refusal(
        &with(&["--url", &url]),
        &["wants a key", "TIER_PLAN_API_KEY"],
    );
    check_refusal(&with(&["--url", &url, "--api-key", "x"]), &["wants a key"]);
    // What a server of its own says is said once.
    check_refusal(&with(&["--model", "missing.gguf"]), &["missing.gguf"]);
}

#[test]
fn tools_that_the_template_has_no_place_for_are_warned_of() {
    let folder = clients("exit 0");
    let path = folder.path().join("template.jinja");
    fs::write(path, "{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
    let (_server, url) = served(folder.path(), &[]);
    let output = launch(folder.path(), "codex")
        .args(["--url", &url])
        .output()
        .unwrap();
    let warned = stderr(&output);
    assert!(
        warned.contains("warning: the server refuses tools, which Codex needs")
            && warned.contains("template"),
        "{warned}"
    );
}

/// Whether a process runs.
fn runs(process: &str) -> bool {
    let found = Command::new("kill").args(["-0", process]).output().unwrap();
    found.status.success()
}

/// Waits until a process has ended.
fn ends(process: &str) {
    let start = Instant::now();
    while runs(process) {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "process {process} is still there"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Starts a client with a server of its own. Both processes are written to files.
fn with_model(folder: &Path) -> Command {
    let mut command = launch(folder, "codex");
    let (model, template) = (demo_model(), folder.join("template.jinja"));
    command
        .arg("--model")
        .arg(model)
        .arg("--chat-template")
        .arg(template);
    command.args(["--context", "1000", "--server-log", "log.txt"]);
    command
}

/// The process of the server that listens where the client was told to.
fn server_of(launch: u32) -> String {
    let children = fs::read_to_string(format!("/proc/{launch}/task/{launch}/children")).unwrap();
    let is_server = |process: &&str| {
        let line = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains("--end-with-input")
    };
    children
        .split_whitespace()
        .find(is_server)
        .unwrap_or_else(|| panic!("{children}"))
        .to_string()
}

/// Waits for a file that a client writes, and returns what is in it.
fn written(path: &Path) -> String {
    let start = Instant::now();
    loop {
        match fs::read_to_string(path) {
            Ok(text) if text.ends_with('\n') => return text.trim().to_string(),
            _ => {
                assert!(
                    start.elapsed() < Duration::from_secs(60),
                    "no {}",
                    path.display()
                );
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

#[test]
fn a_server_of_its_own_is_ready_and_ends_with_the_client() {
    // A client that asks the server it was told of.
    let folder = clients(
        "for a; do case $a in model_providers*) u=${a#*base_url=\\\"}; u=${u%%\\\"*};; esac; done; echo $u; exit 4",
    );
    let output: Output = with_model(folder.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    let url = stdout(&output);
    let address = url
        .trim()
        .strip_prefix("http://")
        .unwrap()
        .strip_suffix("/v1")
        .unwrap();
    assert!(address.starts_with("127.0.0.1:"), "{url}");
    assert!(
        std::net::TcpStream::connect(address).is_err(),
        "the server still listens"
    );
    let log = fs::read_to_string(folder.path().join("log.txt")).unwrap();
    assert!(log.contains(": ready") && log.contains("0 failed"), "{log}");
    assert!(
        stderr(&output).contains("too small for Codex"),
        "{}",
        stderr(&output)
    );
}

#[cfg(target_os = "linux")]
#[test]
fn no_signal_leaves_a_server_behind() {
    let wait =
        "trap 'echo got > got; exit 7' TERM HUP\necho $$ > client\nwhile :; do sleep 0.1; done";
    for (signal, code) in [("-TERM", Some(7)), ("-HUP", Some(7)), ("-KILL", None)] {
        let folder = clients(wait);
        let mut child = piped(&mut with_model(folder.path()));
        let client = written(&folder.path().join("client"));
        let server = server_of(child.id());
        assert!(runs(&server) && runs(&client));
        send(signal, &child);
        assert_eq!(child.wait().unwrap().code(), code, "{signal}");
        ends(&server);
        match code {
            Some(_) => assert_eq!(written(&folder.path().join("got")), "got"),
            // Nothing can tell the client.
            None => assert!(
                Command::new("kill")
                    .args(["-9", &client])
                    .status()
                    .unwrap()
                    .success()
            ),
        }
    }
    // Ctrl-C is the client's, which may go on.
    let folder = clients(
        "trap 'echo $$ > again' INT\necho $$ > client\nwhile [ ! -e stop ]; do sleep 0.1; done; exit 5",
    );
    let mut child = piped(&mut with_model(folder.path()));
    let client = written(&folder.path().join("client"));
    let server = server_of(child.id());
    for _ in 0..3 {
        send("-INT", &child);
    }
    assert!(
        Command::new("kill")
            .args(["-INT", &client])
            .status()
            .unwrap()
            .success()
    );
    written(&folder.path().join("again"));
    assert!(child.try_wait().unwrap().is_none() && runs(&server));
    fs::write(folder.path().join("stop"), "").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(5));
    assert!(!runs(&server), "the server outlived the command");
}

#[test]
fn a_server_that_ends_first_is_reported() {
    let folder = clients("echo $$ > client\nwhile [ ! -e stop ]; do sleep 0.1; done");
    let child = piped(&mut with_model(folder.path()));
    written(&folder.path().join("client"));
    let server = server_of(child.id());
    assert!(
        Command::new("kill")
            .args(["-9", &server])
            .status()
            .unwrap()
            .success()
    );
    std::thread::sleep(Duration::from_millis(300));
    fs::write(folder.path().join("stop"), "").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(
        stderr(&output).contains("warning: the server ended before codex"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn its_help_has_the_options_of_a_server() {
    let folder = tempfile::tempdir().unwrap();
    let help = stdout(&run_in(folder.path(), &["launch", "--help"]));
    for option in [
        "--url",
        "--plan",
        "--context",
        "--parallel",
        "--print",
        "--server-log",
    ] {
        assert!(help.contains(option), "{option}");
    }
    for option in ["--host", "--port", "--cors", "end-with-input"] {
        assert!(!help.contains(option), "{option}");
    }
}
