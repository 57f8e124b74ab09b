//! Where texts are kept from run to run.

use crate::printable::printable;
use anyhow::{Context, Result};
use clap::Args;
use std::path::PathBuf;
use tier_plan_runtime::Engine;
use tier_plan_runtime::units::parse_bytes;

/// A folder of kept texts.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Generation")]
pub struct KeptArgs {
    /// Keep the KV cache of texts in this folder, so that a later run that begins with the same
    /// words reads them from there
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Size of that folder; what was used least recently goes first
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "20GiB",
        requires = "cache_dir"
    )]
    pub cache_size: String,
}

impl KeptArgs {
    /// Returns the size.
    ///
    /// # Errors
    /// When it is not a size.
    pub fn bytes(&self) -> Result<u64> {
        parse_bytes(&self.cache_size).with_context(|| format!("--cache-size {}", self.cache_size))
    }

    /// Has an engine keep its texts in the folder, if there is one.
    ///
    /// # Errors
    /// When the size is not one, or the folder can't be used.
    pub fn open(&self, engine: &mut Engine) -> Result<()> {
        if let Some(folder) = &self.cache_dir {
            engine.keep_in(folder, self.bytes()?)?;
        }
        Ok(())
    }

    /// Keeps the engine's own text, if there is a folder, and [warns](Self::warn).
    pub fn keep(&self, engine: &mut Engine) {
        if self.cache_dir.is_some() {
            engine.keep();
            self.warn(engine);
        }
    }

    /// Prints what there is to be said about files of kept texts.
    pub fn warn(&self, engine: &mut Engine) {
        for note in engine.take_kept_notes() {
            eprintln!("warning: {}", printable(&note));
        }
    }
}
