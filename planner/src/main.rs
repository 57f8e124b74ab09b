//! `tier-plan`: parses the command line, dispatches, and prints the error chain once.
#![forbid(unsafe_code)]

mod cli;
mod cmd;
mod report;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    match cmd::dispatch(cli::Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
