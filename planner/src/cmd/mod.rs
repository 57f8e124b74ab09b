//! One file a subcommand, each with one `run`.

pub mod bench;
pub mod calibrate;
pub mod chat;
pub mod checksum;
pub mod compare;
pub mod demo;
pub mod diff;
pub mod explain;
pub mod export;
pub mod inspect;
pub mod logits;
pub mod pack;
pub mod perplexity;
pub mod probe;
pub mod profile;
pub mod run;
pub mod selftest;
pub mod solve;
pub mod tokenize;
pub mod what_if;

use crate::cli::Command;
use anyhow::Result;

/// Runs the chosen subcommand.
pub fn dispatch(command: Command) -> Result<()> {
    match command {
        Command::Inspect(args) => inspect::run(&args),
        Command::Probe(args) => probe::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Profile(args) => profile::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Run(args) => run::run(&args),
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
    }
}
