//! `tier-plan auto`: everything that a model needs to run well, in one command.

use super::run::{self, RunArgs};
use crate::auto::{Asked, listed};
use crate::cmd::args::MemoryArgs;
use crate::hub::ToFetch;
use anyhow::{Result, ensure};
use clap::Args;
use std::ffi::OsString;
use tier_plan_runtime::gguf::Gguf;

/// Options of `tier-plan auto`.
#[derive(Debug, Args)]
#[command(
    about = "Measure, plan, and run: `run --auto`, which keeps what it finds and learns from use",
    after_long_help = "Example:\n  tier-plan auto MODEL.gguf                              # chat, on a terminal\n  \
                       tier-plan auto hf:OWNER/REPO:Q4_K_M -p \"Once upon a time\"\n  \
                       tier-plan auto MODEL.gguf --show                       # where its files are\n  \
                       tier-plan auto MODEL.gguf --serve                      # the same for a server\n\n\
                       docs/auto.md says what it decides, and how to decide otherwise."
)]
pub struct AutoArgs {
    /// List the files of machine, profiles, and plans, and run nothing
    #[arg(long, conflicts_with_all = ["json", "record", "prompt", "file", "chat"], help_heading = "Output")]
    pub show: bool,
    /// Serve the model instead: `serve --auto`, with the options of `serve`
    #[arg(long, help_heading = "Server")]
    pub serve: bool,
    /// What is missing of a model that was given by name and of which only the header is here
    #[arg(skip)]
    pub to_fetch: Option<ToFetch>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub run: RunArgs,
}

/// Replaces `auto --serve` by `serve --auto`, before a line is parsed.
pub(super) fn served(line: Vec<OsString>) -> Vec<OsString> {
    let is_option = |arg: &OsString| arg.to_string_lossy().starts_with('-');
    let command = line.iter().skip(1).position(|arg| !is_option(arg));
    let command = command.map(|at| at + 1).filter(|at| line[*at] == "auto");
    let options = line.iter().take_while(|arg| *arg != "--");
    let flag = options.into_iter().position(|arg| arg == "--serve");
    let (Some(command), Some(flag)) = (command, flag) else {
        return line;
    };
    let replaced = line.into_iter().enumerate().map(|(at, arg)| match at {
        at if at == command => "serve".into(),
        at if at == flag => "--auto".into(),
        _ => arg,
    });
    replaced.collect()
}

/// Runs the command.
///
/// # Errors
/// As `tier-plan run`.
pub fn run(mut args: AutoArgs) -> Result<()> {
    ensure!(
        !args.serve,
        "--serve: expected on the command line, where it makes `auto` a `serve --auto`"
    );
    let memory = &mut args.run.memory;
    let has_other = memory.plan.is_some() || memory.mmap;
    ensure!(
        !has_other,
        "--plan and --mmap: expected none with `auto`, which makes a plan; `tier-plan run` takes them"
    );
    memory.auto = true;
    match args.show {
        true => show(&args),
        false => run::run(&args.run),
    }
}

/// Lists the files of a model.
fn show(AutoArgs { run, to_fetch, .. }: &AutoArgs) -> Result<()> {
    let model = run.model.path()?;
    let id = Gguf::open(model)?.id();
    let memory: &MemoryArgs = &run.memory;
    // What is not here yet will be read from the drive of its folder.
    let future = to_fetch.as_ref().and_then(|to_fetch| {
        let mut above = to_fetch.folder.ancestors();
        above.find(|folder| folder.is_dir())
    });
    let beside = match to_fetch {
        Some(_) => None,
        None => Some(model.with_extension("profile")),
    };
    let asked = Asked {
        auto: memory.auto()?.unwrap_or_default(),
        model: future.unwrap_or(model),
        threads: run.compute.threads.checked()?,
        numa: run.compute.numa,
        shards: None,
    };
    for line in listed(&id, &asked, beside)? {
        println!("{line}");
    }
    println!("explain a plan with: tier-plan explain PLAN -m MODEL [-P PROFILE]");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::served;

    #[test]
    fn auto_that_serves_is_serve() {
        let words = |line: &str| line.split(' ').map(Into::into).collect::<Vec<_>>();
        let lines = [
            (
                "tier-plan auto m --serve --port 81",
                "tier-plan serve m --auto --port 81",
            ),
            ("tier-plan -y auto --serve m", "tier-plan -y serve --auto m"),
            ("tier-plan auto m", "tier-plan auto m"),
            ("tier-plan run auto --serve", "tier-plan run auto --serve"),
            ("tier-plan auto m -- --serve", "tier-plan auto m -- --serve"),
        ];
        for (given, expected) in lines {
            assert_eq!(served(words(given)), words(expected), "{given}");
        }
    }
}
