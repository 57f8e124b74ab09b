//! `tier-plan checksum`: writes checksums of every expert and tensor of a model, for `--verify`.

use crate::cmd::args::{JsonArgs, ModelArgs};
use crate::json::path_json;
use crate::opening::naming;
use crate::verify;
use anyhow::Result;
use clap::Args;
use serde_json::json;
use std::path::PathBuf;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::describe;
use tier_plan_runtime::units::show_bytes;

/// Options of `tier-plan checksum`.
#[derive(Debug, Args)]
#[command(
    about = "Write the checksums that --verify compares with",
    after_long_help = "Example:\n  tier-plan checksum MODEL.gguf -o MODEL.sums\n  tier-plan run MODEL.gguf --verify -p Hello"
)]
pub struct ChecksumArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// File to write [default: MODEL.sums]
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

/// Runs the command.
///
/// # Errors
/// When an option is invalid, a file cannot be read or written, or the model cannot be loaded.
pub fn run(args: &ChecksumArgs) -> Result<()> {
    let model = args.model.path()?;
    let gguf = Gguf::open(model)?;
    let spec = describe(&gguf).map_err(|e| naming(model, e))?;
    let output = args
        .output
        .clone()
        .unwrap_or_else(|| verify::default_path(&gguf));
    let sums = verify::make(&gguf, &spec, &output)?;
    let slices: usize = sums.tensors.iter().map(|t| t.slices.len()).sum();
    let bytes: u64 = gguf.tensors().iter().map(|t| t.n_bytes).sum();
    if args.format.json {
        let value = json!({
            "model": sums.model.name,
            "sums": path_json(&output),
            "tensors": sums.tensors.len(),
            "slices": slices,
            "bytes": bytes,
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
    } else {
        let tensors = sums.tensors.len();
        println!(
            "{}: {slices} slices of {tensors} tensors, {} of weights",
            output.display(),
            show_bytes(bytes)
        );
    }
    Ok(())
}
