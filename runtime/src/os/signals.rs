//! Signals that ask a program to end: SIGINT (Ctrl-C), SIGTERM and SIGHUP.
//!
//! The handler needs no thread, so it serves where the system allows none. It only touches atomics
//! and calls functions that are safe in a handler.

use crate::cancel::Cancel;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

/// What a signal requests to stop, and what is printed for a user who is being asked for input.
static HANDLED: OnceLock<(Cancel, &str)> = OnceLock::new();

/// Whether a signal ends the process at once.
static ENDS_AT_ONCE: AtomicBool = AtomicBool::new(true);

/// Whether the first Ctrl-C only prints the notice.
static AT_PROMPT: AtomicBool = AtomicBool::new(false);

/// Whether signals are only noted.
static ONLY_NOTED: AtomicBool = AtomicBool::new(false);

/// The last signal that came; 0 for none.
static LAST: AtomicI32 = AtomicI32::new(0);

/// What a first signal does. A second one ends the process, unless signals are only noted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnSignal {
    /// Ends the process.
    End,
    /// Requests that the work stops.
    Cancel,
    /// Ctrl-C prints how to end; others end the process.
    AtPrompt,
    /// Does nothing but what [`taken`] tells, however often it comes.
    Note,
}

/// Sets what a first signal does from now on.
pub fn set_action(action: OnSignal) {
    AT_PROMPT.store(action == OnSignal::AtPrompt, Ordering::SeqCst);
    ENDS_AT_ONCE.store(action == OnSignal::End, Ordering::SeqCst);
    ONLY_NOTED.store(action == OnSignal::Note, Ordering::SeqCst);
}

/// Returns the signal that came since the last call, if one did.
pub fn taken() -> Option<i32> {
    match LAST.swap(0, Ordering::SeqCst) {
        0 => None,
        signal => Some(signal),
    }
}

/// Sends a signal to a process of this user.
///
/// # Errors
/// When there is no such process, or the system has no signals.
#[cfg(unix)]
pub fn send(process: u32, signal: i32) -> std::io::Result<()> {
    // Zero and negative numbers would mean groups of processes.
    let process = i32::try_from(process).ok().filter(|process| *process > 0);
    let process = process.ok_or(std::io::ErrorKind::InvalidInput)?;
    // SAFETY: the call takes no pointers.
    match unsafe { libc::kill(process, signal) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Sends nothing.
///
/// # Errors
/// Always.
#[cfg(not(unix))]
pub fn send(_: u32, _: i32) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// Returns the signal that came, if it is one that asks the whole program to end: SIGTERM or SIGHUP.
pub fn termination() -> Option<i32> {
    match LAST.load(Ordering::SeqCst) {
        0 | SIGINT => None,
        signal => Some(signal),
    }
}

/// Returns the exit code that a shell expects of a program that ended on the last signal.
pub fn exit_code() -> u8 {
    let signal = match LAST.load(Ordering::SeqCst) {
        0 => SIGINT,
        signal => signal,
    };
    128 + signal as u8
}

/// The signal of Ctrl-C.
#[cfg(unix)]
pub const SIGINT: i32 = libc::SIGINT;
/// The signal of Ctrl-C.
#[cfg(not(unix))]
pub const SIGINT: i32 = 2;

/// The signal that asks a program to end.
#[cfg(unix)]
pub const SIGTERM: i32 = libc::SIGTERM;
/// The signal that asks a program to end.
#[cfg(not(unix))]
pub const SIGTERM: i32 = 15;

/// Has SIGINT, SIGTERM and SIGHUP do what [`set_action`] says, with `cancel` as the request and
/// `notice` as what [`OnSignal::AtPrompt`] prints. A signal that the process was started to ignore,
/// as by `nohup`, stays ignored. Only the first call counts.
#[cfg(unix)]
pub fn handle(cancel: &Cancel, notice: &'static str) {
    if HANDLED.set((cancel.clone(), notice)).is_err() {
        return;
    }
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let mut old = std::mem::MaybeUninit::<libc::sigaction>::uninit();
        // SAFETY: `old` has room for the action, and is read only if the call filled it.
        let ignored = unsafe {
            libc::sigaction(signal, std::ptr::null(), old.as_mut_ptr()) == 0
                && old.assume_init().sa_sigaction == libc::SIG_IGN
        };
        if ignored {
            continue;
        }
        // SAFETY: all bytes zero are a valid action with an empty mask, and `on_signal` has the
        // signature of a handler without SA_SIGINFO and calls only what is safe in one.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// Does nothing: signals keep their default action.
#[cfg(not(unix))]
pub fn handle(_: &Cancel, _: &'static str) {}

#[cfg(unix)]
extern "C" fn on_signal(signal: libc::c_int) {
    LAST.store(signal, Ordering::SeqCst);
    if ONLY_NOTED.load(Ordering::SeqCst) {
        return;
    }
    let handled = HANDLED.get();
    let requested = handled.is_none_or(|(cancel, _)| cancel.request());
    let prompting = AT_PROMPT.load(Ordering::SeqCst);
    if requested || ENDS_AT_ONCE.load(Ordering::SeqCst) || (prompting && signal != SIGINT) {
        // SAFETY: `_exit` is safe in a handler.
        unsafe { libc::_exit(128 + signal) }
    }
    if let Some((_, notice)) = handled.filter(|_| prompting) {
        // SAFETY: `write` is safe in a handler, and the buffer is a constant.
        unsafe { libc::write(libc::STDERR_FILENO, notice.as_ptr().cast(), notice.len()) };
    }
}
