//! Options of the commands that generate many texts together.

use super::{ComputeArgs, KeptArgs, KvArgs, MemoryArgs, PreTokenizerArgs, SamplingArgs, StoreArgs};
use super::{TokenLimit, context_value, opening};
use crate::cmd::batch::Parallel;
use crate::opening::Opening;
use crate::text;
use anyhow::{Result, ensure};
use clap::Args;
use std::path::PathBuf;

/// How texts are generated together, and where the model lies meanwhile.
#[derive(Debug, Args)]
pub struct TextsArgs {
    /// Texts to generate at once; `auto` is up to 16 as the memory allows, of those as many as have
    /// the most predicted tokens per second
    #[arg(
        long,
        value_name = "N",
        default_value = "auto",
        help_heading = "Generation"
    )]
    pub parallel: Parallel,
    /// Profile to predict steps of several texts with, if the plan was made from one [default: the
    /// one beside the model]
    #[arg(long, value_name = "FILE", help_heading = "Generation")]
    pub routing: Option<PathBuf>,
    /// Draft up to N tokens per text and step from what followed the same words earlier in the text,
    /// where that pays by measured times and hits; the answers stay the same
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(0..=8),
        help_heading = "Generation"
    )]
    pub draft: usize,
    /// Most tokens per answer for requests that do not say; -1 is no limit [default: 16 for
    /// completions, no limit for chats]
    #[arg(
        short,
        long,
        visible_alias = "predict",
        alias = "tokens",
        value_name = "N",
        allow_negative_numbers = true,
        help_heading = "Generation"
    )]
    pub n_predict: Option<TokenLimit>,
    /// Context length of a text in tokens; 0 is the model's training context
    /// [default: the plan's; without a plan the model's, up to 4096]
    #[arg(
        short,
        long,
        visible_alias = "ctx-size",
        alias = "ctx",
        value_name = "N",
        allow_negative_numbers = true,
        value_parser = context_value,
        help_heading = "Generation"
    )]
    pub context: Option<u32>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub pre: PreTokenizerArgs,
    /// File with a Jinja chat template to use instead of the model's
    #[arg(
        long,
        visible_alias = "chat-template-file",
        value_name = "FILE",
        help_heading = "Chat"
    )]
    pub chat_template: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub memory: MemoryArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub kv: KvArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub store: StoreArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub kept: KeptArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub compute: ComputeArgs,
}

impl TextsArgs {
    /// Returns how the model is opened.
    ///
    /// # Errors
    /// When an option of the memory is invalid.
    pub fn opening(&self) -> Result<Opening<'_>> {
        Ok(Opening {
            context: self.context,
            texts: self.parallel.texts(),
            ..opening(&self.memory, &self.kv, &self.store, &self.compute)?
        })
    }

    /// Returns the most tokens of an answer; `None` where each kind of request has its own.
    ///
    /// # Errors
    /// When it is 0.
    pub fn max_tokens(&self) -> Result<Option<Option<usize>>> {
        let is_none = self.n_predict == Some(TokenLimit::Count(0));
        ensure!(!is_none, "--n-predict: 0, expected 1 or more");
        Ok(self.n_predict.map(TokenLimit::count))
    }

    /// Reads the chat template that was given.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn template(&self) -> Result<Option<String>> {
        let given = self.chat_template.as_deref();
        given
            .map(|path| text::read_file("the chat template", path))
            .transpose()
    }
}
