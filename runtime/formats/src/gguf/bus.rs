//! Bus errors: a mapped file became shorter, or its drive failed, and its bytes are looked at.
//!
//! The system sends `SIGBUS` then, which ends a process without a word. A program may ask for one
//! line of error and exit code 1 instead. Nothing can go on from there: the thread that looked at
//! the bytes has nothing to go on with.

use std::path::Path;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

/// Mappings that are watched at once; those beyond get an error without a name.
const MAX_WATCHED: usize = 256;

/// A mapping, as the signal handler finds it.
struct Slot {
    /// First address; 0 where the slot is free.
    start: AtomicUsize,
    /// One past the last address.
    end: AtomicUsize,
    /// The line to print, followed by a NUL.
    line: AtomicPtr<u8>,
}

static SLOTS: [Slot; MAX_WATCHED] = [const {
    Slot {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        line: AtomicPtr::new(std::ptr::null_mut()),
    }
}; MAX_WATCHED];

/// A mapping that bus errors are reported for, until this is dropped.
#[derive(Debug)]
pub(super) struct Watched(usize);

impl Watched {
    /// Watches `map`, the bytes of `path`; `None` where too many are watched already.
    pub(super) fn new(map: &[u8], path: &Path) -> Option<Self> {
        let start = map.as_ptr() as usize;
        let (at, slot) = SLOTS.iter().enumerate().find(|(_, slot)| {
            let claimed = slot
                .start
                .compare_exchange(0, start, Ordering::SeqCst, Ordering::SeqCst);
            claimed.is_ok()
        })?;
        let name: String = path
            .display()
            .to_string()
            .chars()
            .map(|c| if c.is_control() { '\u{fffd}' } else { c })
            .collect();
        let line = format!(
            "error: {name}: the file became shorter after it was opened, or its drive failed; run again once it is whole\n\0"
        );
        // Kept for good: a handler may read it at any time, and a program opens few models.
        let line = Box::leak(line.into_boxed_str().into_boxed_bytes());
        slot.line.store(line.as_mut_ptr(), Ordering::SeqCst);
        slot.end.store(start + map.len(), Ordering::SeqCst);
        Some(Self(at))
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let slot = &SLOTS[self.0];
        slot.end.store(0, Ordering::SeqCst);
        slot.start.store(0, Ordering::SeqCst);
    }
}

/// Makes a bus error in an open model's mapped bytes end the process with one line on standard
/// error and exit code 1. Other bus errors end it as before.
pub fn report_bus_errors() {
    #[cfg(unix)]
    // SAFETY: `action` is a valid value of the system's structure, whose all-zero bytes are an empty
    // mask and no flags, and the handler does only what a signal handler may.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = report as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
    }
}

/// Handles the signal. It may interrupt anything, so it only reads atomics and calls functions that
/// are safe in signal handlers.
#[cfg(unix)]
extern "C" fn report(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: with `SA_SIGINFO` the system passes a valid `info`, whose address is set for SIGBUS.
    // Lines are never freed and end in a NUL. `write`, `_exit`, and `signal` may be called here.
    unsafe {
        let address = (*info).si_addr() as usize;
        for slot in &SLOTS {
            let (start, end) = (
                slot.start.load(Ordering::SeqCst),
                slot.end.load(Ordering::SeqCst),
            );
            let line = slot.line.load(Ordering::SeqCst);
            if (start..end).contains(&address) && !line.is_null() {
                libc::write(libc::STDERR_FILENO, line.cast(), libc::strlen(line.cast()));
                libc::_exit(1);
            }
        }
        // The instruction runs again, and the default action ends the process.
        libc::signal(signal, libc::SIG_DFL);
    }
}
