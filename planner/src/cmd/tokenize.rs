//! `tier-plan tokenize`: text to token ids.

use crate::cli::TokenizeArgs;
use crate::session::tokenizer_with;
use anyhow::Result;
use tier_plan_runtime::gguf::Gguf;

/// Runs it.
pub fn run(args: &TokenizeArgs) -> Result<()> {
    let tokenizer = tokenizer_with(&Gguf::open(&args.model)?, args.tokenizer_pre.as_deref())?;
    let ids = tokenizer.encode(&args.text, !args.no_special)?;
    if args.ids {
        println!("{}", serde_json::to_string(&ids)?);
    } else {
        for id in ids {
            println!("{id:>8}  {:?}", String::from_utf8_lossy(&tokenizer.token_bytes(id)));
        }
    }
    Ok(())
}
