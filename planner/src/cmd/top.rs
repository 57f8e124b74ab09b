//! `tier-plan top`: what a running server does, on a terminal.

use crate::cmd::args::{JsonArgs, ServerArgs};
use crate::top::view::Theme;
use crate::top::{self, LineOptions};
use anyhow::Result;
use clap::Args;
use std::io::IsTerminal;

/// Options of `tier-plan top`.
#[derive(Debug, Args)]
#[command(
    about = "Watch a running server: tiers, hits, reads, speed beside its prediction, and texts at work",
    after_long_help = "Example:\n  tier-plan serve MODEL.gguf &\n  tier-plan top\n\n  \
                       tier-plan top http://127.0.0.1:8081 --once --json     # one second, for a program\n\n\
                       Where the output is no terminal, a line is printed per second. Keys: q ends, p pauses, \
                       ? is help."
)]
pub struct TopArgs {
    /// Where the server is, as with --url
    #[arg(value_name = "URL", conflicts_with = "url")]
    pub address: Option<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub server: ServerArgs,
    /// Print one line and end
    #[arg(long, help_heading = "Output")]
    pub once: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

/// Runs the command.
///
/// # Errors
/// When an option is invalid, the server refuses, or there is none and lines are printed.
pub fn run(args: &TopArgs) -> Result<()> {
    let client = args.server.client_at(args.address.as_deref())?;
    let is_plain = |term: &std::ffi::OsStr| term == "dumb";
    let is_terminal = std::io::stdout().is_terminal()
        && !std::env::var_os("TERM").is_some_and(|term| is_plain(&term));
    if is_terminal && !args.once && !args.format.json {
        return top::watch(client, Theme::of(std::env::var_os("NO_COLOR").as_deref()));
    }
    let options = LineOptions {
        once: args.once,
        json: args.format.json,
    };
    top::print_lines(client, options)
}
