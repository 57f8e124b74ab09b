//! `tier-plan auto`: everything that a model needs to run well, in one command.

use super::run::{self, RunArgs};
use crate::auto::{Asked, listed};
use crate::cmd::args::MemoryArgs;
use anyhow::{Result, ensure};
use clap::Args;
use tier_plan_runtime::gguf::Gguf;

/// Options of `tier-plan auto`.
#[derive(Debug, Args)]
#[command(
    about = "Measure, plan, and run: `run --auto`, which keeps what it finds and learns from use",
    after_long_help = "Example:\n  tier-plan auto MODEL.gguf                              # chat, on a terminal\n  \
                       tier-plan auto hf:OWNER/REPO:Q4_K_M -p \"Once upon a time\"\n  \
                       tier-plan auto MODEL.gguf --show                       # where its files are\n  \
                       tier-plan serve MODEL.gguf --auto                      # the same for a server\n\n\
                       docs/auto.md says what it decides, and how to decide otherwise."
)]
pub struct AutoArgs {
    /// List the files of machine, profiles, and plans, and run nothing
    #[arg(long, conflicts_with_all = ["json", "record", "prompt", "file", "chat"], help_heading = "Output")]
    pub show: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub run: RunArgs,
}

/// Runs the command.
///
/// # Errors
/// As `tier-plan run`.
pub fn run(mut args: AutoArgs) -> Result<()> {
    let memory = &mut args.run.memory;
    let has_other = memory.plan.is_some() || memory.mmap;
    ensure!(
        !has_other,
        "--plan and --mmap: expected none with `auto`, which makes a plan; `tier-plan run` takes them"
    );
    memory.auto = true;
    match args.show {
        true => show(&args.run),
        false => run::run(&args.run),
    }
}

/// Lists the files of a model.
fn show(args: &RunArgs) -> Result<()> {
    let model = args.model.path()?;
    let id = Gguf::open(model)?.id();
    let memory: &MemoryArgs = &args.memory;
    let asked = Asked {
        auto: memory.auto()?.unwrap_or_default(),
        model,
        threads: args.compute.threads.checked()?,
        numa: args.compute.numa,
        shards: None,
    };
    for line in listed(&id, &asked)? {
        println!("{line}");
    }
    println!("explain a plan with: tier-plan explain PLAN -m MODEL [-P PROFILE]");
    Ok(())
}
