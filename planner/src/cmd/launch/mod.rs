//! `tier-plan launch`: starts a coding agent that talks to a server.
//!
//! Nothing is written into the configuration of the agent. It gets variables, options, and, where
//! its own files would win over variables, a temporary file.

mod clients;
mod serving;
mod setup;

use crate::cmd::args::ServerArgs;
use crate::cmd::batch::model_name;
use crate::hint::HintExt;
use crate::interrupt::{self, Ended};
use crate::printable::printable;
use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use clients::Client;
use serving::{Serving, ServingArgs};
use setup::Endpoint;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

/// How often a running client is looked at.
const POLL: Duration = Duration::from_millis(50);

/// Options of `tier-plan launch`.
#[derive(Debug, Args)]
#[command(
    about = "Start a coding agent (Claude Code, Codex, opencode) that talks to a server",
    after_long_help = "Example:\n  tier-plan serve MODEL.gguf --context 65536 &\n  \
                       tier-plan launch claude\n\n  \
                       tier-plan launch codex --model MODEL.gguf --context 65536 -- exec \"Explain this folder\"\n\n\
                       docs/SERVING.md has the settings, for use without this command."
)]
pub struct LaunchArgs {
    /// Agent to start, which must be installed
    #[arg(value_name = "CLIENT")]
    pub client: ClientName,
    /// Options and arguments of the agent
    #[arg(value_name = "ARGS", last = true)]
    pub args: Vec<OsString>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub server: ServerArgs,
    /// Print the variables and the command line instead of starting the agent, with `***` for the key
    #[arg(long, visible_alias = "dry-run", help_heading = "Client")]
    pub print: bool,
    /// File for the log of the server that --model starts [default: none is kept]
    #[arg(
        long,
        value_name = "FILE",
        requires = "model_option",
        help_heading = "Client"
    )]
    pub server_log: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub serving: ServingArgs,
}

/// Name of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ClientName {
    /// Claude Code
    Claude,
    /// OpenAI's Codex
    Codex,
    /// opencode
    Opencode,
}

/// Runs the command.
///
/// # Errors
/// When an option is invalid, the agent is not installed, or no server can be reached; and
/// [`Ended`] with the exit code of an agent that fails.
pub fn run(args: &LaunchArgs) -> Result<()> {
    let client = args.client.client();
    args.server.check()?;
    args.serving.check()?;
    if args.print {
        return print(args, client);
    }
    let program = client.find()?;
    let mut serving = match args.serving.model() {
        None => None,
        Some(_) => Some(Serving::start(
            &args.serving,
            args.server.api_key.as_deref(),
            args.server_log.as_deref(),
        )?),
    };
    let endpoint = match &mut serving {
        None => reached(args)?,
        Some(serving) => serving.ready(args.server.api_key.as_deref())?,
    };
    client.warn(&endpoint);
    let mut setup = client.setup(&endpoint, &args.args);
    setup.write()?;
    let mut command = Command::new(&program);
    setup.apply(&mut command);
    let status = watch(command, client, serving.as_mut());
    // The server ends before the command does.
    drop(serving);
    drop(setup);
    match code(status?) {
        0 => Ok(()),
        code => Err(Ended(code).into()),
    }
}

/// Returns the server at the address that was given, once it takes requests.
fn reached(args: &LaunchArgs) -> Result<Endpoint> {
    serving::wait(&args.server.client()?, |_| Ok(()))
}

/// Prints what would be run.
fn print(args: &LaunchArgs, client: &Client) -> Result<()> {
    let endpoint = match args.serving.model() {
        None => reached(args)?,
        Some(model) => {
            println!("{}", args.serving.shown());
            Endpoint {
                url: "http://127.0.0.1:PORT".to_string(),
                host: "127.0.0.1".to_string(),
                key: args.server.api_key.clone(),
                model: setup::model(&model_name(model)),
                context: None,
                refusal: None,
            }
        }
    };
    client.warn(&endpoint);
    print!(
        "{}",
        client.setup(&endpoint, &args.args).shown(client.program)
    );
    Ok(())
}

/// Runs the client, and hands on the signals that it would not get. A server that ends meanwhile is
/// reported once the client has ended, since that has the terminal.
fn watch(
    mut command: Command,
    client: &Client,
    mut serving: Option<&mut Serving>,
) -> Result<ExitStatus> {
    let _noting = interrupt::note_signals();
    let child = command.spawn();
    let mut child: Child = child.with_context(|| format!("starting {}", client.program))?;
    let mut ended = None;
    loop {
        let waited = child.try_wait();
        if let Some(status) = waited.with_context(|| format!("waiting for {}", client.program))? {
            if let Some(why) = ended {
                eprintln!("warning: the server ended before {}: {why}", client.program);
            }
            return Ok(status);
        }
        interrupt::hand_on(&child);
        if ended.is_none() {
            ended = serving.as_mut().and_then(|serving| serving.why_ended());
        }
        std::thread::sleep(POLL);
    }
}

/// Returns the exit code of a client, as a shell has it.
fn code(status: ExitStatus) -> u8 {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        return 128 + signal as u8;
    }
    // Codes of other systems may be larger.
    let code = status.code().unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}

impl ClientName {
    fn client(self) -> &'static Client {
        match self {
            ClientName::Claude => &clients::CLAUDE,
            ClientName::Codex => &clients::CODEX,
            ClientName::Opencode => &clients::OPENCODE,
        }
    }
}

impl Client {
    /// Returns the path of the program.
    fn find(&self) -> Result<PathBuf> {
        let found = clients::find(self.program, std::env::var_os("PATH").as_deref());
        found
            .with_context(|| {
                format!(
                    "{}: not found, expected {} in a folder of PATH",
                    self.program, self.name
                )
            })
            .hint(format!("install it with `{}`", self.install))
    }

    /// Warns of a server that the client won't work well with.
    fn warn(&self, endpoint: &Endpoint) {
        if let Some(refusal) = &endpoint.refusal {
            eprintln!(
                "warning: the server refuses tools, which {} needs: {}",
                self.name,
                printable(refusal)
            );
        }
        let Some(context) = endpoint.context else {
            return;
        };
        let first = self.first_tokens;
        let (n, wanted) = (first / 1000, (4 * first).next_power_of_two());
        if context < first {
            eprintln!(
                "warning: the server's context of {context} tokens is too small for {}, whose instructions and \
                 tools alone have about {n},000: serve with --context {wanted}",
                self.name
            );
        } else if context < 2 * first {
            eprintln!(
                "warning: the server's context of {context} tokens leaves little for a conversation, since the \
                 instructions and tools of {} have about {n},000: better serve with --context {wanted}",
                self.name
            );
        }
    }
}
