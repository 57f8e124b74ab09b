//! Ctrl-C: a flag that long work polls, and what a waiting chat does with it.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether Ctrl-C was pressed.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether a chat is waiting for a message, so that Ctrl-C has nothing to stop.
static WAITING: AtomicBool = AtomicBool::new(false);

/// Whether a [`Catching`] exists, so that [`interrupted`] is polled.
static CATCHING: AtomicBool = AtomicBool::new(false);

/// Guard while which Ctrl-C sets a flag instead of ending the program. A second Ctrl-C ends it.
#[must_use = "Ctrl-C sets the flag only while this lives"]
pub struct Catching(());

impl Drop for Catching {
    fn drop(&mut self) {
        CATCHING.store(false, Ordering::SeqCst);
    }
}

/// Makes Ctrl-C set the flag that [`interrupted`] returns, for callers that poll it often. Not for
/// loading a model, which may take minutes and can be ended at once.
pub fn catch_interrupts() -> Catching {
    // Fails only if a handler is set already, and then that one serves.
    let _ = ctrlc::set_handler(|| {
        let waiting = WAITING.load(Ordering::SeqCst);
        // A chat that reads from a pipe gets no further messages after Ctrl-C.
        let idle = !CATCHING.load(Ordering::SeqCst) || (waiting && !std::io::stdin().is_terminal());
        if idle || INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        if waiting {
            eprintln!("\n(Ctrl-C again, Ctrl-D or /quit ends)");
        }
    });
    CATCHING.store(true, Ordering::SeqCst);
    Catching(())
}

/// Returns whether Ctrl-C was pressed.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Sets whether a chat is waiting for a message, and forgets an earlier Ctrl-C.
pub fn waiting(yes: bool) {
    WAITING.store(yes, Ordering::SeqCst);
    INTERRUPTED.store(false, Ordering::SeqCst);
}

/// Ctrl-C ended a command early: exit code 130 and no error message.
#[derive(Debug)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}
