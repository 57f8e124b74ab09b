//! `tier-plan tokenize`: text to token ids.

use crate::cmd::args::PreTokenizerArgs;
use crate::session::tokenizer_with;
use anyhow::{Context, Result};
use clap::Args;
use std::path::{Path, PathBuf};
use tier_plan_runtime::gguf::Gguf;

/// Options of `tier-plan tokenize`.
#[derive(Debug, Args)]
#[command(
    about = "Convert text to token ids",
    after_long_help = "Example:\n  tier-plan tokenize MODEL.gguf \"Hello world\"\n  tier-plan tokenize -m MODEL.gguf -p \"Hello world\" --ids"
)]
pub struct TokenizeArgs {
    /// GGUF file; with -m, the text
    #[arg(value_name = "MODEL", help_heading = "Model")]
    pub first: Option<String>,
    /// Text to tokenize
    #[arg(value_name = "TEXT")]
    pub second: Option<String>,
    /// GGUF file, as an option instead of the argument MODEL
    #[arg(short, long, value_name = "FILE", help_heading = "Model")]
    pub model: Option<PathBuf>,
    /// Text to tokenize, as an option instead of the argument TEXT
    #[arg(short, long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Print the ids as a JSON array
    #[arg(long, help_heading = "Output")]
    pub ids: bool,
    /// Read special tokens in the text as plain text, and add none
    #[arg(long)]
    pub no_special: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub pre: PreTokenizerArgs,
}

impl TokenizeArgs {
    /// Sets the model, whichever argument it was given as.
    pub fn set_model(&mut self, model: &Path) {
        let is_argument = self.second.is_some() || self.model.is_none();
        if is_argument {
            self.first = self.second.take();
        }
        self.model = Some(model.to_path_buf());
    }

    /// Returns the model and the text, from arguments or options.
    ///
    /// # Errors
    /// When one of them is missing.
    pub fn inputs(&self) -> Result<(PathBuf, &str)> {
        let (model, text) = match (&self.first, &self.second, &self.model) {
            // Two arguments are model and text, whatever the environment gives for --model.
            (Some(model), Some(text), _) => (Some(PathBuf::from(model)), Some(text)),
            (first, None, Some(model)) => (Some(model.clone()), first.as_ref()),
            (first, second, _) => (first.as_ref().map(PathBuf::from), second.as_ref()),
        };
        let model = model.context("no model given, expected MODEL or --model")?;
        Ok((
            model,
            self.prompt
                .as_ref()
                .or(text)
                .context("no text given, expected TEXT or --prompt")?,
        ))
    }
}

/// Runs the command.
///
/// # Errors
/// When an option is invalid, a file cannot be read or written, or the model cannot be loaded.
pub fn run(args: &TokenizeArgs) -> Result<()> {
    let (model, text) = args.inputs()?;
    let tokenizer = tokenizer_with(&Gguf::open(&model)?, args.pre.tokenizer_pre.as_deref())?;
    let ids = tokenizer.encode(text, !args.no_special)?;
    if args.ids {
        println!("{}", serde_json::to_string(&ids)?);
    } else {
        for id in ids {
            let piece = tokenizer.token_bytes(id);
            println!(
                "{id:>8}  {}",
                serde_json::to_string(&String::from_utf8_lossy(&piece))?
            );
        }
    }
    Ok(())
}
