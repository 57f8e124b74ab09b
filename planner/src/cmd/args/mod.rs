//! Groups of options that several commands share, and the types of their values.
//!
//! One option has one meaning: `-p` is the prompt, `-P` the profile, `-c` the context. `-m` is the
//! model, as in llama.cpp; only the commands that take a machine (`solve`, `what-if`, `calibrate`)
//! still accept it as an old spelling of `-M/--machine`.

mod kept;
mod kv;
mod memory;
mod model;
pub mod sampling;
mod server;
mod texts;
mod value;

pub use kept::KeptArgs;
pub use kv::KvArgs;
pub use memory::{BudgetArgs, MemoryArgs, StoreArgs, VerifyArgs};
pub use model::{ModelArgs, ModelOption, ModelOrShape, check_profile};
pub use sampling::SamplingArgs;
pub use server::{ServerArgs, check_key};
pub use texts::TextsArgs;
pub use value::{MaxStep, Seed, TokenLimit, context as context_value};

use crate::opening::{Opening, Texts, check_threads};
use anyhow::{Result, ensure};
use clap::Args;
use tier_plan_runtime::model::shape::ModelShape;
use tier_plan_runtime::tiers::numa::NumaPolicy;

/// Number of threads.
#[derive(Debug, Default, Args)]
pub struct ThreadArgs {
    /// Threads that compute [default: physical cores]
    #[arg(
        short,
        long,
        value_name = "N",
        allow_negative_numbers = true,
        value_parser = value::threads,
        help_heading = "Compute"
    )]
    pub threads: Option<usize>,
}

impl ThreadArgs {
    /// Returns the number asked for.
    ///
    /// # Errors
    /// When it is outside 1 to 1024.
    pub fn checked(&self) -> Result<Option<usize>> {
        check_threads(self.threads)?;
        Ok(self.threads)
    }
}

/// Threads and NUMA placement of a process that runs a model.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Compute")]
pub struct ComputeArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub threads: ThreadArgs,
    /// NUMA policy: `shard` stripes weights over all nodes, and each node's threads read their own;
    /// `interleave` spreads memory only; a number keeps memory and threads on that node
    /// [default: the system's]
    #[arg(long, value_name = "POLICY")]
    pub numa: Option<NumaPolicy>,
}

/// Form of standard output.
#[derive(Debug, Default, Args)]
pub struct JsonArgs {
    /// Print JSON to standard output
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

/// Pre-tokenizer override.
#[derive(Debug, Default, Args)]
pub struct PreTokenizerArgs {
    /// Pre-tokenizer (split pattern) to use instead of the model file's
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    pub tokenizer_pre: Option<String>,
}

/// Returns `count` unless it is 0.
///
/// # Errors
/// `<option>: 0, expected 1 or more`.
pub fn at_least_one(option: &str, count: u32) -> Result<u32> {
    ensure!(count > 0, "{option}: 0, expected 1 or more");
    Ok(count)
}

/// Returns the context to plan for: `--context`, or the model's training context for 0.
pub fn context_of(context: u32, shape: &ModelShape) -> u32 {
    if context == 0 { shape.context } else { context }
}

/// Checks that `--at` is a position inside the context.
///
/// # Errors
/// When it is 0 or larger than the context.
pub fn check_position(at: Option<u32>, context: u32) -> Result<()> {
    let fits = at.is_none_or(|at| (1..=context).contains(&at));
    ensure!(
        fits,
        "--at: {}, expected 1 to {context}, the context that is planned for",
        at.unwrap_or(0)
    );
    Ok(())
}

/// Returns the checked options that all commands share which run a model.
///
/// # Errors
/// When one of them is invalid.
pub fn opening<'a>(
    memory: &'a MemoryArgs,
    kv: &KvArgs,
    store: &'a StoreArgs,
    compute: &ComputeArgs,
) -> Result<Opening<'a>> {
    Ok(Opening {
        plan: memory.plan.as_deref(),
        auto: memory.auto()?,
        memory: memory.bytes()?,
        profile: memory.profile.as_deref(),
        context: None,
        texts: Texts::One,
        threads: compute.threads.checked()?,
        kv_type: kv.checked()?,
        mapped: memory.mmap,
        numa: compute.numa,
        verify: store.verify.asked(),
        pack: store.pack.as_deref(),
        slots: store.slots.as_deref(),
        warm: store.warm.as_deref(),
    })
}
