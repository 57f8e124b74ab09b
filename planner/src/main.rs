//! `tier-plan`: parses the command line, dispatches, and prints the error chain once.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use tier_plan_planner::chat::jinja::worker;
use tier_plan_planner::cmd::NoCommand;
use tier_plan_planner::interrupt::{self, Ended, Interrupted};
use tier_plan_planner::{cmd, print, replan};
use tier_plan_runtime::RunError;
use tier_plan_runtime::formats::safely;

fn main() -> ExitCode {
    if worker::is_requested(std::env::args_os()) {
        return worker::serve();
    }
    if replan::worker::is_requested(std::env::args_os()) {
        return replan::worker::serve(std::env::args_os());
    }
    tier_plan_runtime::gguf::report_bus_errors();
    safely::ignore_file_size_signal();
    let line = match cmd::parse(std::env::args_os()) {
        Ok(line) => line,
        Err(NoCommand::Line(error)) => error.exit(),
        Err(NoCommand::Config(error)) => {
            print::error(&error);
            return ExitCode::FAILURE;
        }
    };
    let ended = line.run();
    if let Err(error) = &ended
        && let Some(Ended(code)) = error.downcast_ref()
    {
        return ExitCode::from(*code);
    }
    match &ended {
        // No message after Ctrl-C, since the user knows.
        Err(error) if !error.is::<Interrupted>() && !is_canceled(error) => print::error(error),
        _ => {}
    }
    // What a shell expects after a signal, also where a command keeps or says something first.
    if interrupt::interrupted() {
        return ExitCode::from(interrupt::exit_code());
    }
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Whether a signal ended a pass whose command has nothing to keep.
fn is_canceled(error: &anyhow::Error) -> bool {
    let is = |cause: &(dyn std::error::Error + 'static)| {
        matches!(cause.downcast_ref(), Some(RunError::Canceled))
    };
    error.chain().any(is)
}
