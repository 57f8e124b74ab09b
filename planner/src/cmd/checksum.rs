//! `tier-plan checksum`: checksums of every expert and tensor of a model, for `--verify`.

use crate::cli::ChecksumArgs;
use crate::session::naming;
use crate::verify;
use anyhow::Result;
use serde_json::json;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::describe;
use tier_plan_runtime::units::show_bytes;

/// Runs it.
pub fn run(args: &ChecksumArgs) -> Result<()> {
    let gguf = Gguf::open(&args.model)?;
    let spec = describe(&gguf).map_err(|e| naming(&args.model, e))?;
    let output = args.output.clone().unwrap_or_else(|| verify::default_path(&gguf));
    let sums = verify::make(&gguf, &spec, &output)?;
    let slices: usize = sums.tensors.iter().map(|t| t.slices.len()).sum();
    let bytes: u64 = gguf.tensors().iter().map(|t| t.n_bytes).sum();
    if args.json {
        let value = json!({
            "model": sums.model.name,
            "sums": output,
            "tensors": sums.tensors.len(),
            "slices": slices,
            "bytes": bytes,
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
    } else {
        let tensors = sums.tensors.len();
        println!("{}: {slices} slices of {tensors} tensors, {} of weights", output.display(), show_bytes(bytes));
    }
    Ok(())
}
