//! Arguments about where experts come from: checksums, packed copies, slots that do not begin empty.

use clap::Args;
use std::path::{Path, PathBuf};

/// `checksum`.
#[derive(Debug, Args)]
pub struct ChecksumArgs {
    /// The GGUF file (the first part of a split model)
    pub model: PathBuf,
    /// Where to write them; beside the model, with the ending `.sums`, when not given
    #[arg(short, long)]
    pub output: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Whether to trust the model's file.
#[derive(Debug, Default, Args)]
pub struct VerifyArgs {
    /// Compare all that is loaded, and every expert that is read later, with checksums: of FILE, or those beside the
    /// model (`.sums`), which are made if they are not there
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    pub verify: Option<Option<PathBuf>>,
}

impl VerifyArgs {
    /// The file, if one is named, if they are asked for.
    pub fn asked(&self) -> Option<Option<&Path>> {
        self.verify.as_ref().map(Option::as_deref)
    }
}

/// What may be done about experts that come from the file.
#[derive(Debug, Default, Args)]
pub struct StoreArgs {
    /// Verification.
    #[command(flatten)]
    pub verify: VerifyArgs,
    /// Read experts from this copy that `tier-plan pack` made; from the one beside the model (`.experts`), if it is
    /// there, when not given
    #[arg(long, value_name = "FILE")]
    pub pack: Option<PathBuf>,
    /// Begin with the experts in the slots that this file lists, if it is there, and write it at the end
    #[arg(long, value_name = "FILE")]
    pub slots: Option<PathBuf>,
    /// Fill slots that are empty with the experts that this profile shows to be used most
    #[arg(long, value_name = "PROFILE")]
    pub warm: Option<PathBuf>,
}

/// `pack`.
#[derive(Debug, Args)]
pub struct PackArgs {
    /// The GGUF file (the first part of a split model)
    pub model: PathBuf,
    /// Where to write the copy; beside the model, with the ending `.experts`, when not given
    #[arg(short, long)]
    pub output: Option<PathBuf>,
    /// Only the experts that this plan leaves on its last tier
    #[arg(long)]
    pub plan: Option<PathBuf>,
    /// The experts of a layer that this profile shows to be used most come first
    #[arg(short, long)]
    pub profile: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
