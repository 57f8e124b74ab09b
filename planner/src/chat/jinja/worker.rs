//! The process that renders a template: the program again, under limits that the system enforces.
//!
//! Steps that an interpreter counts bound neither the memory of one string operation, nor the stack
//! that a deep value takes, nor the time of one comparison. A process of its own bounds all of them
//! however a template is written, and can be ended at any moment. The parent writes a [`Request`] to
//! its standard input and reads a [`Reply`] from its standard output, both as JSON.

use super::{Compiled, FUEL, Surroundings};
use crate::interrupt::{Interrupted, interrupted};
use crate::subprocess;
use anyhow::{Context, Result, anyhow};
use minijinja::value::Value;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};
use std::borrow::Cow;
use std::ffi::OsString;
use std::io::{BufWriter, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, ExitCode, ExitStatus};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};
use tier_plan_runtime::os::{ProcessLimits, limit_process};

/// First argument of the program when it is to render a template.
const ARGUMENT: &str = "--internal-render-chat-template";

/// Address space of a worker in MiB.
const MAX_WORKER_MIB: u64 = 512;
/// Seconds that a worker may take, of CPU and of the clock.
const MAX_SECONDS: u64 = 10;
/// Time that a worker may take by the clock.
pub const MAX_TIME: Duration = Duration::from_secs(MAX_SECONDS);
/// Address space of the worker's stack, which deep templates and values use up.
const STACK_BYTES: usize = 64 << 20;
/// Most bytes of a rendered conversation.
const MAX_TEXT_BYTES: usize = 32 << 20;
/// Most bytes of a request or a reply: each byte of a text may be escaped by six.
const MAX_JSON_BYTES: u64 = 6 * MAX_TEXT_BYTES as u64 + (64 << 10);
/// How often a waiting parent looks for Ctrl-C.
const POLL: Duration = Duration::from_millis(20);
/// Stack of the thread that writes and reads; it only copies.
const COPY_STACK_BYTES: usize = 256 << 10;

/// What a worker is asked to do.
#[derive(Serialize, Deserialize)]
pub struct Request<'a> {
    /// The template.
    pub source: Cow<'a, str>,
    /// Text of the BOS token.
    pub bos: Cow<'a, str>,
    /// Text of the EOS token.
    pub eos: Cow<'a, str>,
    /// The conversation; `None` only compiles the template.
    pub messages: Option<Vec<Value>>,
    /// Tools that the model may call.
    #[serde(default)]
    pub tools: Cow<'a, Vec<Json>>,
    /// Variables beside those that every template sees.
    #[serde(default)]
    pub variables: Cow<'a, Map<String, Json>>,
}

/// What came of it.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// The rendered conversation, empty if there was none.
    Rendered(String),
    /// Why the template cannot be compiled or rejects the conversation.
    Refused(String),
    /// Which limit the template exceeded.
    Spent(String),
}

/// Returns whether this process was started as a worker.
pub fn is_requested(mut args: impl Iterator<Item = OsString>) -> bool {
    args.nth(1).is_some_and(|argument| argument == ARGUMENT)
}

/// Serves one request, and returns the exit code of the process.
pub fn serve() -> ExitCode {
    let limits = ProcessLimits {
        address_space_bytes: MAX_WORKER_MIB << 20,
        cpu_seconds: MAX_SECONDS,
    };
    if limit_process(limits).is_err() {
        return ExitCode::FAILURE;
    }
    // A thread has the stack that is stated here, whatever the shell's limit is.
    let reply = std::thread::Builder::new()
        .stack_size(STACK_BYTES)
        .spawn(|| answer(std::io::stdin().lock(), FUEL))
        .map(std::thread::JoinHandle::join);
    let reply = match reply {
        Ok(Ok(reply)) => reply,
        Ok(Err(_)) => Reply::Refused("can't be rendered: it brings the renderer to a stop".into()),
        Err(_) => return ExitCode::FAILURE,
    };
    let mut out = BufWriter::new(std::io::stdout().lock());
    let written = serde_json::to_writer(&mut out, &reply).is_ok() && out.flush().is_ok();
    if written {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Reads a request and renders it in at most `fuel` steps. Public for fuzzing only.
#[doc(hidden)]
pub fn answer(input: impl Read, fuel: u64) -> Reply {
    let mut json = Vec::new();
    let request = input
        .take(MAX_JSON_BYTES)
        .read_to_end(&mut json)
        .ok()
        .and_then(|_| serde_json::from_slice::<Request<'_>>(&json).ok());
    let Some(request) = request else {
        return Reply::Refused("can't be rendered: the request did not arrive".into());
    };
    drop(json);
    let rendered = Compiled::new(&request.source, None).and_then(|template| {
        let template = template.with_fuel(fuel);
        request.messages.map_or(Ok(String::new()), |messages| {
            let around = Surroundings {
                tools: request.tools.into_owned(),
                variables: request.variables.into_owned(),
            };
            template.render(messages, &around, &request.bos, &request.eos)
        })
    });
    match rendered {
        Ok(text) if text.len() > MAX_TEXT_BYTES => Reply::Spent(format!(
            "writes {} bytes, expected at most {MAX_TEXT_BYTES}",
            text.len()
        )),
        Ok(text) => Reply::Rendered(text),
        Err(reason) => Reply::Refused(reason),
    }
}

/// Has a new process serve `request` within `time`, of which it takes off what it used.
///
/// # Errors
/// When no process can be started, and [`Interrupted`] on Ctrl-C.
pub fn ask(request: &Request<'_>, time: &mut Duration) -> Result<Reply> {
    let mut worker = Worker::start().map_err(|error| {
        anyhow!("starting a process for the chat template: {error}; raise the limit of processes")
    })?;
    let (input, output) = worker.pipes().context("the pipes of a new process")?;
    std::thread::scope(|scope| {
        let (sender, receiver) = channel();
        std::thread::Builder::new()
            .stack_size(COPY_STACK_BYTES)
            .spawn_scoped(scope, move || {
                let _ = sender.send(exchange(request, input, output));
            })
            .map_err(|error| {
                anyhow!(
                    "starting a thread for the chat template: {error}; raise the limit of processes"
                )
            })?;
        // Rounds are counted, not the clock, which goes on while the program is stopped.
        while !time.is_zero() {
            let began = Instant::now();
            let received = receiver.recv_timeout(POLL);
            *time = time.saturating_sub(began.elapsed().min(POLL));
            match received {
                Ok(json) => return worker.reply(json),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) if interrupted() => {
                    worker.kill();
                    return Err(Interrupted.into());
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        // Ends the pipes, and with them the thread.
        worker.kill();
        Ok(Reply::Spent(too_slow()))
    })
}

fn too_slow() -> String {
    format!("takes more than {MAX_SECONDS} seconds")
}

/// Writes the request and reads the reply, up to the most that one may have. What is missing shows
/// in the worker's exit code.
fn exchange(request: &Request<'_>, input: ChildStdin, output: ChildStdout) -> Vec<u8> {
    let mut input = BufWriter::new(input);
    let _ = serde_json::to_writer(&mut input, request);
    // Dropping it ends the worker's input.
    let _ = input.flush();
    drop(input);
    let mut json = Vec::new();
    let _ = output.take(MAX_JSON_BYTES).read_to_end(&mut json);
    json
}

/// A process that is ended when nothing waits for it anymore.
struct Worker(Child);

impl Worker {
    fn start() -> std::io::Result<Self> {
        subprocess::command(ARGUMENT)?.spawn().map(Self)
    }

    fn pipes(&mut self) -> Option<(ChildStdin, ChildStdout)> {
        Some((self.0.stdin.take()?, self.0.stdout.take()?))
    }

    fn kill(&mut self) {
        // Fails only if the process has ended.
        let _ = self.0.kill();
    }

    /// Returns the reply that the worker wrote, or what its end tells.
    fn reply(&mut self, json: Vec<u8>) -> Result<Reply> {
        let status = self
            .0
            .wait()
            .context("waiting for the chat template's process")?;
        if status.success()
            && let Ok(reply) = serde_json::from_slice(&json)
        {
            return Ok(reply);
        }
        if interrupted() {
            return Err(Interrupted.into());
        }
        Ok(Reply::Spent(why_ended(status)))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
        let _ = self.0.wait();
    }
}

/// Returns which limit ended a worker without a reply.
#[cfg(unix)]
fn why_ended(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    /// The limit of CPU time; the number is that of Linux and of the BSDs.
    const SIGXCPU: i32 = 24;
    /// The system's answer to a group or a machine without memory.
    const SIGKILL: i32 = 9;
    match status.signal() {
        Some(SIGXCPU) => too_slow(),
        Some(SIGKILL) => "takes more memory than there is".to_string(),
        Some(_) => format!("takes more than {MAX_WORKER_MIB} MiB of memory, or nests too deeply"),
        None => format!("can't be rendered: its process ended with {status}"),
    }
}

#[cfg(not(unix))]
fn why_ended(status: ExitStatus) -> String {
    format!("can't be rendered: its process ended with {status}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served(source: &str, messages: Option<Vec<Value>>) -> Reply {
        served_within(source, messages, FUEL)
    }

    fn served_within(source: &str, messages: Option<Vec<Value>>, fuel: u64) -> Reply {
        let request = Request {
            source: source.into(),
            bos: "<s>".into(),
            eos: "".into(),
            messages,
            tools: Cow::default(),
            variables: Cow::default(),
        };
        let json = serde_json::to_string(&request).unwrap();
        answer(json.as_bytes(), fuel)
    }

    #[test]
    fn a_request_is_answered() {
        let message = Value::from_pairs([("role", "user"), ("content", "a\u{0}\"ü")]);
        let reply = served(
            "{{ bos_token }}{{ messages[0].content }}",
            Some(vec![message]),
        );
        assert!(matches!(reply, Reply::Rendered(text) if text == "<s>a\u{0}\"ü"));
        assert!(matches!(served("{{ zork.a }}", None), Reply::Rendered(text) if text.is_empty()));
        assert!(matches!(
            served("{{ zork.a }}", Some(vec![])),
            Reply::Refused(_)
        ));
        assert!(matches!(served("{% for %}", None), Reply::Refused(_)));
        assert!(matches!(
            answer(&b"{\"source\": \"a"[..], FUEL),
            Reply::Refused(_)
        ));
    }

    #[test]
    fn steps_are_counted() {
        let loops =
            "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}";
        let reply = served_within(loops, Some(vec![]), 100_000);
        assert!(matches!(reply, Reply::Refused(why) if why.contains("takes")));
        let fewer = loops.replace("90000", "90");
        let reply = served_within(&fewer, Some(vec![]), 100_000);
        assert!(matches!(reply, Reply::Rendered(text) if text.is_empty()));
    }

    #[test]
    fn long_texts_are_refused() {
        let doubled = "{% set ns = namespace(x='0123456789abcdef') %}\
            {% for i in range(22) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}";
        assert!(matches!(
            served(doubled, Some(vec![])),
            Reply::Spent(_) | Reply::Refused(_)
        ));
    }

    #[test]
    fn only_the_first_argument_asks_for_a_worker() {
        let args = |args: &[&str]| {
            is_requested(
                args.iter()
                    .map(OsString::from)
                    .collect::<Vec<_>>()
                    .into_iter(),
            )
        };
        assert!(args(&["tier-plan", ARGUMENT]));
        assert!(!args(&["tier-plan", "run", ARGUMENT]) && !args(&["tier-plan"]));
    }
}
