//! The command line. One file per subcommand holds its options, its help and its `run`.

pub mod args;
pub mod auto;
pub mod batch;
pub mod bench;
pub mod calibrate;
pub mod chat;
pub mod checksum;
pub mod compare;
pub mod completions;
pub mod config;
pub mod config_file;
#[cfg(test)]
mod config_tests;
pub mod demo;
pub mod diff;
pub mod doctor;
mod environment;
pub mod explain;
pub mod export;
pub mod inspect;
pub mod launch;
pub mod logits;
pub mod man;
pub mod models;
mod names;
pub mod pack;
pub mod perplexity;
pub mod probe;
pub mod profile;
pub mod replan;
pub mod run;
pub mod selftest;
pub mod serve;
pub mod solve;
#[cfg(test)]
mod tests;
pub mod tokenize;
pub mod top;
pub mod what_if;

use anyhow::Result;
use clap::error::ErrorKind;
use clap::{FromArgMatches, Parser, Subcommand};
use config_file::Config;
use std::ffi::OsString;

/// What the long help of every command ends with.
const EXIT_CODES: &str = "\
Exit codes:
  0    success
  1    error: `error: …` on standard error, and `hint: …` if there is advice
  2    the command line cannot be parsed
  130  interrupted by Ctrl-C (129 by SIGHUP, 143 by SIGTERM)

Environment variables and ~/.config/tier-plan/config.toml set defaults; the command line overrides them. Four more:
  TIER_PLAN_CONFIG configuration file; empty for none
  TIER_PLAN_ISA    CPU kernels: scalar, avx2, avx512, amx, neon [default: the best]
  TIER_PLAN_IO     file reads: direct (O_DIRECT) or buffered [default: direct]
  TIER_PLAN_NVRTC  library that compiles GPU kernels [default: searched for]";

/// Worked example of the whole program.
const EXAMPLE: &str = "\
Example:
  tier-plan auto MODEL.gguf                            # measures, plans, and runs

  tier-plan run MODEL.gguf -p \"Once upon a time\"       # runs within the memory that there is

  tier-plan probe                                      # measure the machine: machine.toml
  tier-plan profile MODEL.gguf                         # count expert use: MODEL.profile
  tier-plan solve MODEL.gguf -P MODEL.profile -M machine.toml
  tier-plan run MODEL.gguf --plan placement.toml -p \"Once upon a time\"";

/// Command line of `tier-plan`.
#[derive(Debug, Parser)]
#[command(
    name = "tier-plan",
    version,
    propagate_version = true,
    about = "Run mixture-of-experts models that don't fit in memory, from a computed placement",
    after_long_help = EXAMPLE
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Fetch a model that is given by name without asking
    #[arg(short, long, global = true, help_heading = "Model")]
    yes: bool,
}

/// A command line: the command, and what holds for every one.
#[derive(Debug)]
pub struct Line {
    command: Command,
    yes: bool,
}

impl Line {
    /// Resolves the model if it is given by name, and runs the command.
    ///
    /// # Errors
    /// Those of the command, and when the model cannot be had.
    pub fn run(self) -> Result<()> {
        let (command, _model) = names::resolved(self.command, self.yes)?;
        dispatch(command)
    }
}

/// A subcommand with its options. The help of each stands beside its options.
#[derive(Debug, Subcommand)]
#[allow(missing_docs)]
pub enum Command {
    Demo(demo::DemoArgs),
    Inspect(inspect::InspectArgs),
    Probe(probe::ProbeArgs),
    Doctor(doctor::DoctorArgs),
    Config(config::ConfigArgs),
    Calibrate(calibrate::CalibrateArgs),
    Profile(profile::ProfileArgs),
    Solve(solve::SolveArgs),
    Explain(explain::ExplainArgs),
    Diff(diff::DiffArgs),
    Export(export::ExportArgs),
    WhatIf(what_if::WhatIfArgs),
    Auto(auto::AutoArgs),
    Run(run::RunArgs),
    Batch(batch::BatchArgs),
    Serve(serve::ServeArgs),
    Launch(launch::LaunchArgs),
    Top(top::TopArgs),
    Models(models::ModelsArgs),
    Replan(replan::ReplanArgs),
    Compare(compare::CompareArgs),
    Bench(bench::BenchArgs),
    Checksum(checksum::ChecksumArgs),
    Pack(pack::PackArgs),
    Logits(logits::LogitsArgs),
    Perplexity(perplexity::PerplexityArgs),
    Tokenize(tokenize::TokenizeArgs),
    Selftest(selftest::SelftestArgs),
    Completions(completions::CompletionsArgs),
    Man(man::ManArgs),
}

/// Why a command line gives no command.
#[derive(Debug)]
pub enum NoCommand {
    /// It cannot be parsed, or asks for help or the version.
    Line(clap::Error),
    /// The configuration file is wrong.
    Config(anyhow::Error),
}

/// Parses a command line, program name first. Environment variables and the configuration file give
/// options that it leaves out.
///
/// # Errors
/// When it cannot be parsed, or asks for help or the version; else when the file is wrong.
pub fn parse<I: IntoIterator<Item = OsString>>(line: I) -> Result<Line, NoCommand> {
    let line = auto::served(environment::long_names(line));
    let parse = |config: &Config| {
        let command = environment::with_defaults(command(), config, &line);
        let matches = command.try_get_matches_from(&line)?;
        let Cli { command, yes } = Cli::from_arg_matches(&matches)?;
        Ok(Line { command, yes })
    };
    match config_file::load(&command()) {
        Ok(config) => parse(&config).map_err(NoCommand::Line),
        // Help needs no file, and an option that is required may have been in it.
        Err(wrong) => match parse(&Config::default()) {
            Err(error) if error.kind() != ErrorKind::MissingRequiredArgument => {
                Err(NoCommand::Line(error))
            }
            _ => Err(NoCommand::Config(wrong)),
        },
    }
}

/// Parses a command line without regard to the environment.
///
/// # Errors
/// When it cannot be parsed.
pub fn parse_alone<I: IntoIterator<Item = OsString>>(line: I) -> Result<Command, clap::Error> {
    let matches = command().try_get_matches_from(environment::long_names(line))?;
    Ok(Cli::from_arg_matches(&matches)?.command)
}

/// Returns clap's description of the command line, with the exit codes in every long help.
fn command() -> clap::Command {
    fn with_exit_codes(command: clap::Command) -> clap::Command {
        let example = command
            .get_after_long_help()
            .map(ToString::to_string)
            .unwrap_or_default();
        command.after_long_help(format!("{example}\n\n{EXIT_CODES}"))
    }
    with_exit_codes(<Cli as clap::CommandFactory>::command()).mut_subcommands(with_exit_codes)
}

/// Runs a subcommand.
///
/// # Errors
/// Those of the subcommand.
pub fn dispatch(command: Command) -> Result<()> {
    match command {
        Command::Inspect(args) => inspect::run(&args),
        Command::Probe(args) => probe::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Config(args) => config::run(&args),
        Command::Models(args) => models::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Profile(args) => profile::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Auto(args) => auto::run(args),
        Command::Run(args) => run::run(&args),
        Command::Batch(args) => batch::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Launch(args) => launch::run(&args),
        Command::Top(args) => top::run(&args),
        Command::Replan(args) => replan::run(&args),
        Command::Solve(args) => solve::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Checksum(args) => checksum::run(&args),
        Command::Pack(args) => pack::run(&args),
        Command::Logits(args) => logits::run(&args),
        Command::Perplexity(args) => perplexity::run(&args),
        Command::Tokenize(args) => tokenize::run(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Diff(args) => diff::run(&args),
        Command::WhatIf(args) => what_if::run(&args),
        Command::Selftest(args) => selftest::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => man::run(&args),
    }
}
