//! This program started again, for work that must not harm the process that asks for it.

use std::ffi::OsStr;
use std::io;
use std::process::{Command, Stdio};

/// Returns a command that runs this program with an argument, with pipes to and from it. It says nothing
/// on standard error.
///
/// # Errors
/// When the system does not tell where the program is.
pub(crate) fn command(argument: impl AsRef<OsStr>) -> io::Result<Command> {
    // The link also leads to a program whose file was replaced since it started.
    let program = if cfg!(target_os = "linux") {
        "/proc/self/exe".into()
    } else {
        std::env::current_exe()?
    };
    let mut command = Command::new(program);
    // Ctrl-C on the terminal is the parent's to hear.
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    command
        .arg(argument)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    Ok(command)
}
