//! Ctrl-C, SIGTERM and SIGHUP: a request that long work polls, and what a waiting chat does with
//! one.

use std::io::IsTerminal;
use std::sync::LazyLock;
use tier_plan_runtime::Cancel;
use tier_plan_runtime::os::signals::{self, OnSignal};

/// The request of the last signal.
static INTERRUPTED: LazyLock<Cancel> = LazyLock::new(Cancel::default);

/// Printed on Ctrl-C to a user who is being asked for a message.
const NOTICE: &str = "\n(Ctrl-C again, Ctrl-D or /quit ends)\n";

/// A command has ended with this exit code, and all that is to be said was said.
#[derive(Debug)]
pub struct Ended(pub u8);

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ended with exit code {}", self.0)
    }
}

impl std::error::Error for Ended {}

/// Guard while which a first signal requests an end instead of ending the program. A second one
/// ends it.
#[must_use = "signals set the request only while this lives"]
pub struct Catching(());

impl Drop for Catching {
    fn drop(&mut self) {
        signals::set_action(OnSignal::End);
    }
}

/// Makes signals set the request that [`interrupted`] returns, for callers that poll it often. Not
/// for work that leaves nothing behind and can be ended at once, such as loading a model.
pub fn catch_interrupts() -> Catching {
    signals::set_action(OnSignal::Cancel);
    signals::handle(&INTERRUPTED, NOTICE);
    Catching(())
}

/// Has signals do nothing while the guard lives, for a program that runs another one in the
/// foreground. A terminal sends Ctrl-C to both; see [`hand_on`] for other signals.
pub fn note_signals() -> Catching {
    signals::set_action(OnSignal::Note);
    signals::handle(&INTERRUPTED, NOTICE);
    Catching(())
}

/// Sends SIGTERM or SIGHUP on to a program, if one came since the last call.
pub fn hand_on(to: &std::process::Child) {
    // The terminal has sent a Ctrl-C to that program, too.
    if let Some(signal) = signals::taken()
        && signal != signals::SIGINT
    {
        // Fails where the program has ended.
        let _ = signals::send(to.id(), signal);
    }
}

/// Ends this program as SIGTERM does once standard input ends, so that it does not outlive the
/// program that holds the other end.
///
/// # Errors
/// When the system refuses a thread.
pub fn end_with_input() -> std::io::Result<()> {
    let watch = || {
        let ended = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        if ended.is_ok() && signals::send(std::process::id(), signals::SIGTERM).is_err() {
            std::process::exit(1);
        }
    };
    let thread = std::thread::Builder::new().name("parent".into());
    thread.spawn(watch).map(drop)
}

/// Returns whether a signal asked for an end.
pub fn interrupted() -> bool {
    INTERRUPTED.is_requested()
}

/// Returns the request itself, for an engine that polls it inside a pass.
pub fn request() -> Cancel {
    INTERRUPTED.clone()
}

/// Returns whether a signal asked the whole program to end, not only what it does at the moment:
/// SIGTERM or SIGHUP.
pub fn terminated() -> bool {
    signals::termination().is_some()
}

/// Sets whether a chat is waiting for a message, and forgets an earlier Ctrl-C.
pub fn waiting(yes: bool) {
    let action = match yes {
        false => OnSignal::Cancel,
        true if std::io::stdin().is_terminal() => OnSignal::AtPrompt,
        // A chat that reads from a pipe gets no further messages after Ctrl-C.
        true => OnSignal::End,
    };
    signals::set_action(action);
    INTERRUPTED.withdraw();
}

/// A signal ended a command early: no error message, and the exit code of [`exit_code`].
#[derive(Debug)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// Returns the exit code that a shell expects after the last signal, 130 after Ctrl-C.
pub fn exit_code() -> u8 {
    signals::exit_code()
}
