//! `tier-plan`: parses the command line, dispatches, and prints the error chain once.
#![forbid(unsafe_code)]

use clap::Parser;
use std::io::Write;
use std::process::ExitCode;
use tier_plan_planner::{cli, cmd};

fn main() -> ExitCode {
    match cmd::dispatch(cli::Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // With standard error gone there is nobody to tell.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
