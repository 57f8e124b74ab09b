//! `tier-plan doctor`: checks this machine.

use crate::cmd::args::{JsonArgs, ThreadArgs};
use crate::doctor::{Options, Status, examine};
use crate::hub::ToFetch;
use anyhow::{Result, bail};
use clap::Args;
use std::path::PathBuf;

/// Options of `tier-plan doctor`.
#[derive(Debug, Args)]
#[command(
    about = "Check this machine: what is amiss, what that costs, and how to mend it",
    after_long_help = "Example:\n  tier-plan doctor\n  tier-plan doctor MODEL.gguf --measure\n\n\
                       docs/doctor.md lists the checks. Reports name no user, so they can go into bug reports."
)]
pub struct DoctorArgs {
    /// GGUF file to check the machine for: does it fit, and how fast would it be
    #[arg(
        value_name = "MODEL",
        conflicts_with = "model_option",
        help_heading = "Model"
    )]
    pub model: Option<PathBuf>,
    /// GGUF file, as an option instead of the argument MODEL
    #[arg(
        short = 'm',
        long = "model",
        value_name = "FILE",
        help_heading = "Model"
    )]
    pub model_option: Option<PathBuf>,
    /// Tokens of context to plan for; 0 is the model's training context [default: 4096, or the
    /// model's if that is less]
    #[arg(
        short,
        long,
        visible_alias = "ctx-size",
        alias = "ctx",
        value_name = "N",
        value_parser = crate::cmd::args::context_value,
        help_heading = "Model"
    )]
    pub context: Option<u32>,
    /// Machine file that `tier-plan probe` wrote here, whose rates predictions take [default:
    /// machine.toml in the current folder, if it is there]
    #[arg(short = 'M', long, value_name = "FILE", help_heading = "Model")]
    pub machine: Option<PathBuf>,
    /// Measure the drive for some seconds: with MODEL its experts, else a temporary file of 1 GiB
    #[arg(long, help_heading = "Storage")]
    pub measure: bool,
    /// What is missing of a model that was given by name and of which only the header is here
    #[arg(skip)]
    pub to_fetch: Option<ToFetch>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub threads: ThreadArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

/// Runs the command.
///
/// # Errors
/// When an option is invalid, or a check fails.
pub fn run(args: &DoctorArgs) -> Result<()> {
    let model = args.model.as_deref().or(args.model_option.as_deref());
    let report = examine(&Options {
        model,
        to_fetch: args.to_fetch.as_ref(),
        machine: args.machine.as_deref(),
        context: args.context,
        threads: args.threads.checked()?,
        measure: args.measure,
    })?;
    if args.format.json {
        println!("{}", serde_json::to_string_pretty(&report.as_json())?);
    } else {
        for check in &report.checks {
            println!("{}", check.line());
        }
        println!("{}", report.summary());
    }
    let failures = report.count(Status::Failure);
    if failures > 0 {
        bail!(
            "{failures} of {} checks failed; each such line says what mends it",
            report.checks.len()
        );
    }
    Ok(())
}
