//! `tier-plan`: parses the command line, dispatches, and prints the error chain once.
#![forbid(unsafe_code)]

use std::io::Write;
use std::process::ExitCode;
use tier_plan_planner::chat::jinja::worker;
use tier_plan_planner::interrupt::Interrupted;
use tier_plan_planner::{cmd, hint};

fn main() -> ExitCode {
    if worker::is_requested(std::env::args_os()) {
        return worker::serve();
    }
    let command = match cmd::parse(std::env::args_os()) {
        Ok(command) => command,
        Err(error) => error.exit(),
    };
    match cmd::dispatch(command) {
        Ok(()) => ExitCode::SUCCESS,
        // The exit code that a shell expects after Ctrl-C; no message, since the user knows.
        Err(error) if error.is::<Interrupted>() => ExitCode::from(130),
        Err(error) => {
            let hint =
                hint::hint_for(&error).map_or(String::new(), |hint| format!("\nhint: {hint}"));
            // A closed standard error leaves no place for a message.
            let _ = writeln!(std::io::stderr(), "error: {error:#}{hint}");
            ExitCode::FAILURE
        }
    }
}
