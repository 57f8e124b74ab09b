//! `tier-plan`: parses the command line, dispatches, and prints the error chain once.
#![forbid(unsafe_code)]

use clap::Parser;
use std::io::Write;
use std::process::ExitCode;
use tier_plan_planner::session::Interrupted;
use tier_plan_planner::{cli, cmd};

fn main() -> ExitCode {
    match cmd::dispatch(cli::Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever pressed Ctrl-C knows; this is what a shell expects of the signal.
        Err(error) if error.is::<Interrupted>() => ExitCode::from(130),
        Err(error) => {
            // With standard error gone there is nobody to tell.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
