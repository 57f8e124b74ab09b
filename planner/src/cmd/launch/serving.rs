//! The server that a client talks to: waiting for it, and starting one as a process of its own.

use super::setup::{Endpoint, host, model};
use crate::client::Client;
use crate::cmd::serve::ServeArgs;
use crate::export::shell;
use crate::hint::HintExt;
use crate::interrupt::Ended;
use crate::progress;
use crate::subprocess;
use anyhow::{Context, Result, anyhow, bail};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use indicatif::ProgressBar;
use serde_json::json;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often a loading server is asked how far it is.
const POLL: Duration = Duration::from_millis(250);

/// Time that a server has to end.
const GRACE: Duration = Duration::from_secs(15);

/// Options of `serve` that are not for a server of one client.
const LEFT_OUT: [&str; 6] = ["model", "host", "port", "cors", "api_key", "end_with_input"];

/// The option that names the model.
const MODEL: &str = "model_option";

/// Options of `serve`, as the command line has them.
#[derive(Debug, Clone, Default)]
pub struct ServingArgs {
    model: Option<OsString>,
    /// Options beside the model, in the form `--name=value`.
    options: Vec<OsString>,
    /// The first of them that the command line itself has.
    first: Option<String>,
}

/// Returns the options of `serve` that can be given here.
fn options() -> Vec<Arg> {
    let serve = ServeArgs::augment_args(Command::new("serve"));
    let all = serve.get_arguments();
    all.filter(|arg| !LEFT_OUT.contains(&arg.get_id().as_str()))
        .cloned()
        .map(|arg| match arg.get_id() == MODEL {
            true => arg
                .help("GGUF file to start a server with, which ends with the client")
                .conflicts_with("url"),
            false => arg,
        })
        .collect()
}

impl Args for ServingArgs {
    fn augment_args(command: Command) -> Command {
        command.args(options())
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for ServingArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut args = Self::default();
        for arg in options() {
            args.take(&arg, matches);
        }
        Ok(args)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl ServingArgs {
    /// Takes the values that an option was given.
    fn take(&mut self, arg: &Arg, matches: &ArgMatches) {
        let id = arg.get_id().as_str();
        let source = matches.value_source(id);
        let (Some(long), Some(ValueSource::CommandLine | ValueSource::EnvVariable)) =
            (arg.get_long(), source)
        else {
            return;
        };
        let raw: Vec<&OsStr> = matches.get_raw(id).into_iter().flatten().collect();
        if id == MODEL {
            self.model = raw.first().map(|value| (*value).to_os_string());
            return;
        }
        if source == Some(ValueSource::CommandLine) {
            self.first.get_or_insert_with(|| format!("--{long}"));
        }
        if matches!(arg.get_action(), ArgAction::SetTrue) {
            if matches.get_flag(id) {
                self.options.push(format!("--{long}").into());
            }
            return;
        }
        for value in raw {
            let mut option = OsString::from(format!("--{long}="));
            option.push(value);
            self.options.push(option);
        }
    }

    /// Returns the model to serve, if one is to be served.
    pub fn model(&self) -> Option<&Path> {
        self.model.as_deref().map(Path::new)
    }

    /// Sets the model to serve.
    pub fn set_model(&mut self, model: &Path) {
        self.model = Some(model.as_os_str().to_os_string());
    }

    /// Checks that options of a server come with a model.
    ///
    /// # Errors
    /// When one does not.
    pub fn check(&self) -> Result<()> {
        match (&self.first, &self.model) {
            (Some(first), None) => {
                let message = format!("{first}: an option of a server, expected --model beside it");
                Err(anyhow!(message))
                    .hint("pass --model FILE, or give the option to `tier-plan serve`")
            }
            _ => Ok(()),
        }
    }

    /// Returns the options of `serve`.
    fn options(&self) -> impl Iterator<Item = OsString> {
        let mut model = OsString::from("--model=");
        model.push(self.model.as_deref().unwrap_or_default());
        let own = ["--host=127.0.0.1", "--port=0"].map(OsString::from);
        own.into_iter().chain([model]).chain(self.options.clone())
    }

    /// Returns the command line for a shell.
    pub fn shown(&self) -> String {
        let words = self.options().map(|word| shell::shown(Path::new(&word)));
        format!("tier-plan serve {} &", words.collect::<Vec<_>>().join(" "))
    }
}

/// A server of this program, which ends with it.
pub(super) struct Serving {
    child: Child,
    /// Where the server waits for the end of its input.
    input: Option<ChildStdin>,
    /// The log, until the server is ready.
    lines: Option<Receiver<String>>,
    /// The last line of the log, which says why the server has ended.
    last: Arc<Mutex<Option<String>>>,
    ended: bool,
}

impl Serving {
    /// Starts a server on a free port.
    ///
    /// # Errors
    /// When the system refuses a process, or the file for the log can't be written.
    pub fn start(args: &ServingArgs, key: Option<&str>, log: Option<&Path>) -> Result<Self> {
        let log = log.map(|path| {
            let name = || format!("--server-log: {}", path.display());
            File::create(path).with_context(name)
        });
        let log = log.transpose()?;
        let mut command = subprocess::command("serve").context("the path of this program")?;
        command.args(args.options()).arg("--end-with-input");
        if let Some(key) = key {
            command.env("TIER_PLAN_API_KEY", key);
        }
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().context("starting a server")?;
        let (sender, lines) = channel();
        let last = Arc::default();
        let mut serving = Self {
            input: child.stdin.take(),
            lines: Some(lines),
            last: Arc::clone(&last),
            ended: false,
            child,
        };
        let from = serving.child.stderr.take().context("the server's log")?;
        let reader = std::thread::Builder::new().name("log".into());
        let read = move || {
            let from = BufReader::new(from);
            read_log(from, &sender, &last, log);
        };
        reader.spawn(read).context("reading the server's log")?;
        Ok(serving)
    }

    /// Waits until the server takes requests. What it says until then is printed.
    ///
    /// # Errors
    /// [`Ended`] where it ends before.
    pub fn ready(&mut self, key: Option<&str>) -> Result<Endpoint> {
        let Some(lines) = self.lines.take() else {
            bail!("the server was waited for before");
        };
        let url = loop {
            match lines.recv_timeout(POLL) {
                Ok(line) => match line.strip_suffix(": loading the model") {
                    Some(url) => break url.to_string(),
                    None => eprintln!("{line}"),
                },
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(Ended(1).into()),
            }
        };
        let child = &mut self.child;
        let reached = wait(&Client::new(&url, key)?, |bar| {
            bar.suspend(|| lines.try_iter().for_each(|line| eprintln!("{line}")));
            match child.try_wait() {
                Ok(Some(_)) => Err(Ended(1).into()),
                _ => Ok(()),
            }
        });
        if reached.is_err() && matches!(child.try_wait(), Ok(Some(_))) {
            // It has said why, and the end of that may still be on its way.
            while let Ok(line) = lines.recv_timeout(Duration::from_secs(1)) {
                eprintln!("{line}");
            }
            return Err(Ended(1).into());
        }
        reached
    }

    /// Returns why the server has ended, if it has.
    pub fn why_ended(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok().flatten()?;
        self.ended = true;
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        Some(last.clone().unwrap_or_else(|| status.to_string()))
    }
}

impl Drop for Serving {
    /// Ends the server, and waits for it.
    fn drop(&mut self) {
        drop(self.input.take());
        let start = Instant::now();
        while !self.ended && start.elapsed() < GRACE {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(20)),
                _ => return,
            }
        }
        // Fails only where it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until a server takes requests, and returns what is known of it. Meanwhile `check` is called
/// with the progress bar.
///
/// # Errors
/// When the server can't be reached, or is none of this program's; and those of `check`.
pub(super) fn wait(
    client: &Client,
    mut check: impl FnMut(&ProgressBar) -> Result<()>,
) -> Result<Endpoint> {
    let bar = progress::count("loading the model", 100);
    loop {
        check(&bar)?;
        let (status, health) = client.look("/health")?;
        match (status, health["progress"].as_f64()) {
            (200, _) => break,
            (503, Some(share)) => bar.set_position((share.clamp(0.0, 1.0) * 100.0) as u64),
            // The error says why.
            _ => client.get("/health").map(drop)?,
        }
        std::thread::sleep(POLL);
    }
    bar.finish_and_clear();
    known(client)
}

/// Returns what is known of a server that takes requests.
fn known(client: &Client) -> Result<Endpoint> {
    let props = client.get("/props")?;
    let context = props["n_ctx"].as_u64();
    let (Some(context), Some(name)) = (context, props["model_alias"].as_str()) else {
        bail!(
            "{}: another server, expected one of `tier-plan serve`",
            client.url()
        );
    };
    Ok(Endpoint {
        url: client.url().to_string(),
        host: host(client.url()).to_string(),
        key: client.key().map(str::to_string),
        model: model(name),
        context: usize::try_from(context).ok(),
        refusal: refusal(client),
    })
}

/// Returns why the server refuses requests with tools, if it does.
fn refusal(client: &Client) -> Option<String> {
    let body = json!({
        "messages": [{ "role": "user", "content": "a" }],
        "tools": [{ "name": "f", "input_schema": { "type": "object", "properties": {} } }],
    });
    let counted = client.post("/v1/messages/count_tokens", &body);
    counted.err().map(|error| format!("{error:#}"))
}

/// Hands on the lines of a log until it ends.
fn read_log(
    from: impl BufRead,
    to: &Sender<String>,
    last: &Mutex<Option<String>>,
    mut log: Option<File>,
) {
    for line in from.split(b'\n') {
        let Ok(line) = line else { return };
        if let Some(file) = &mut log {
            // A full disk is no reason to stop reading, which would stop the server.
            let _ = file.write_all(&line).and_then(|()| file.write_all(b"\n"));
        }
        let line = String::from_utf8_lossy(&line).into_owned();
        *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(line.clone());
        let _ = to.send(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cmd::{self, parse_alone};

    fn parsed(line: &str) -> Result<ServingArgs, clap::Error> {
        match parse_alone(line.split_whitespace().map(Into::into))? {
            cmd::Command::Launch(args) => Ok(args.serving),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn options_of_a_server_are_handed_on_as_they_were_given() {
        let args = parsed(
            "tier-plan launch codex -m m.gguf -c 4096 -ctk q8_0 -ctv q8_0 --mmap --logit-bias 1+2 --logit-bias 3-4 \
             --api-key k -- -c x --mmap",
        );
        let args = args.unwrap();
        args.check().unwrap();
        let options = args.options().map(|word| word.into_string().unwrap());
        let line: Vec<String> = options.collect();
        assert_eq!(
            line[..3],
            ["--host=127.0.0.1", "--port=0", "--model=m.gguf"]
        );
        for option in [
            "--context=4096",
            "--cache-type-k=q8_0",
            "--cache-type-v=q8_0",
            "--mmap",
            "--logit-bias=1+2",
            "--logit-bias=3-4",
        ] {
            let n = line.iter().filter(|word| *word == option).count();
            assert_eq!(n, 1, "{option} in {line:?}");
        }
        assert!(
            !line.iter().any(|word| word.contains("api-key")),
            "{line:?}"
        );
        // It is a command line of `serve`.
        let whole = ["tier-plan", "serve"].map(String::from);
        let whole = whole.into_iter().chain(line);
        assert!(parse_alone(whole.map(Into::into)).is_ok());
    }

    #[test]
    fn a_model_and_a_url_exclude_each_other() {
        assert!(parsed("tier-plan launch codex -m m --url http://a").is_err());
        assert!(parsed("tier-plan launch codex --server-log f").is_err());
        assert!(parsed("tier-plan launch other").is_err());
        assert!(parsed("tier-plan launch").is_err());
        let alone = parsed("tier-plan launch codex --parallel 2").unwrap();
        let error = alone.check().unwrap_err().to_string();
        assert!(
            error.starts_with("--parallel: an option of a server"),
            "{error}"
        );
        assert!(
            parsed("tier-plan launch codex -- --parallel 2")
                .unwrap()
                .check()
                .is_ok()
        );
    }
}
