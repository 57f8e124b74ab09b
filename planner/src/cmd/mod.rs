//! One file a subcommand, each with one `run`.

use crate::cli::Command;
use anyhow::Result;

/// Runs the chosen subcommand.
pub fn dispatch(command: Command) -> Result<()> {
    match command {
        other => anyhow::bail!("{other:?} is being built"),
    }
}
