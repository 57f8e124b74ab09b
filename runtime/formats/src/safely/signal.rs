//! The signal of a file that grows past the limit of a process.
#![allow(unsafe_code)]

/// Makes a write past the limit of file sizes (`ulimit -f`) an error, instead of the end of the
/// process without a word. For the start of a program.
pub fn ignore_file_size_signal() {
    #[cfg(unix)]
    // SAFETY: ignoring a signal installs no handler, so no code runs in a signal's context.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}
