//! `tier-plan bench`: prompt and decode speed, repeated.

mod joining;
mod parallel;
mod single;

use crate::cmd::args::{
    ComputeArgs, JsonArgs, KvArgs, MaxStep, MemoryArgs, ModelArgs, StoreArgs, at_least_one,
};
use crate::hint::HintExt;
use crate::opening::{Opening, Texts};
use crate::parallel::{check_texts, routing};
use crate::prepared::Prepared;
use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use tier_plan_runtime::formats::record::{Conditions, RunRecord};
use tier_plan_runtime::formats::safely;

/// Options of `tier-plan bench`.
#[derive(Debug, Args)]
#[command(
    about = "Measure prompt and decode speed",
    after_long_help = "Example:\n  tier-plan bench MODEL.gguf -p 512 -n 128 -r 5\n  \
                       tier-plan bench MODEL.gguf --memory 8GiB\n  \
                       tier-plan bench MODEL.gguf --parallel 1,2,4,8\n\n\
                       As in llama-bench, -p and -n are numbers of tokens here; elsewhere -p is the prompt."
)]
pub struct BenchArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// Prompt tokens to process
    #[arg(
        short = 'p',
        long,
        alias = "prompt",
        value_name = "N",
        default_value_t = 64,
        help_heading = "Generation"
    )]
    pub n_prompt: u32,
    /// Tokens to decode
    #[arg(
        short = 'n',
        long,
        aliases = ["tokens", "n-predict", "predict"],
        value_name = "N",
        default_value_t = 32,
        help_heading = "Generation"
    )]
    pub n_gen: u32,
    /// Repetitions, after one to warm up
    #[arg(
        short,
        long,
        visible_alias = "repetitions",
        value_name = "N",
        default_value_t = 3,
        help_heading = "Generation"
    )]
    pub repeat: u32,
    /// Measure steps of so many texts at once, one number after another, such as 1,2,4,8; `auto` is
    /// the number that `batch` takes
    #[arg(
        long,
        visible_alias = "np",
        value_name = "N[,N]",
        value_delimiter = ',',
        help_heading = "Generation"
    )]
    pub parallel: Vec<Count>,
    /// Measure also the time between two tokens while the prompt of the last text is read, within
    /// steps of so many milliseconds, or `auto` for what the predicted steps suggest
    #[arg(long, value_name = "N", help_heading = "Generation")]
    pub max_step_ms: Option<MaxStep>,
    /// Profile to predict steps of several texts with, if the plan was made from one [default: the
    /// one beside the model]
    #[arg(long, value_name = "FILE", help_heading = "Generation")]
    pub routing: Option<PathBuf>,
    /// Write what --parallel measures to a run record
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub record: Option<PathBuf>,
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
    pub compute: ComputeArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

/// A number of texts at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Count {
    /// This many.
    Texts(u32),
    /// As many as have the most predicted tokens per second.
    Auto,
}

impl Count {
    fn texts(self) -> Option<u32> {
        match self {
            Count::Texts(n) => Some(n),
            Count::Auto => None,
        }
    }
}

impl FromStr for Count {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Count::Auto);
        }
        let expected = |_| "expected auto, or numbers of texts".to_string();
        text.parse().map(Count::Texts).map_err(expected)
    }
}

/// Checked options of a benchmark.
struct BenchOptions<'a> {
    model: &'a Path,
    opening: Opening<'a>,
    /// Context that one repetition takes.
    context: u32,
    /// Numbers of texts at once, ascending; none to measure one text alone.
    texts: Vec<Count>,
}

impl<'a> BenchOptions<'a> {
    fn from_args(args: &'a BenchArgs) -> Result<Self> {
        at_least_one("--repeat", args.repeat)?;
        ensure!(
            args.n_prompt > 0 || args.n_gen > 0,
            "--n-prompt and --n-gen: both 0, expected something to measure"
        );
        // Decoding needs at least one token before it.
        let context = args.n_prompt.max(1).checked_add(args.n_gen);
        let context =
            context.context("--n-prompt and --n-gen: too many tokens to count, expected fewer")?;
        let mut texts = args.parallel.clone();
        texts.sort_unstable();
        texts.dedup();
        for count in &texts {
            if let Some(n) = count.texts() {
                check_texts("--parallel", n, context)?;
            }
        }
        ensure!(
            args.routing.is_none() || !texts.is_empty() && args.memory.plan.is_some(),
            "--routing: no steps of several texts to predict, expected --plan and --parallel too"
        );
        ensure!(
            args.max_step_ms.is_none() || !texts.is_empty(),
            "--max-step-ms: no steps of several texts to measure, expected --parallel too"
        );
        if let Some(path) = &args.record {
            ensure!(
                !texts.is_empty(),
                "--record: no steps of several texts to write, expected --parallel too"
            );
            safely::check(path)?;
        }
        let opening =
            crate::cmd::args::opening(&args.memory, &args.kv, &args.store, &args.compute)?;
        let opening = Opening {
            context: opening.plan.is_none().then_some(context),
            texts: match texts.iter().filter_map(|count| count.texts()).max() {
                Some(most) => Texts::Count(most),
                None if texts.is_empty() => Texts::One,
                None => Texts::Auto,
            },
            ..opening
        };
        Ok(Self {
            model: args.model.path()?,
            opening,
            context,
            texts,
        })
    }
}

/// Runs the command.
///
/// # Errors
/// When an option is invalid, a file cannot be read or written, or the model cannot be loaded.
pub fn run(args: &BenchArgs) -> Result<()> {
    let options = BenchOptions::from_args(args)?;
    let prepared = Prepared::open(options.model, options.opening)?;
    let (needed, planned) = (options.context, prepared.plan_context());
    if needed > planned {
        let full = format!(
            "--n-prompt and --n-gen: {} and {}, expected at most {planned} together, the context of the plan",
            args.n_prompt, args.n_gen
        );
        return Err(anyhow!(full)).hint(format!(
            "pass fewer, or solve again with --context {needed}"
        ));
    }
    if options.texts.is_empty() {
        return single::run(args, &mut prepared.load()?);
    }
    let routing = routing(args.routing.as_deref(), options.model, &prepared)?;
    parallel::run(args, &options.texts, &mut prepared.load()?, routing)
}

/// Returns the conditions as a run record has them.
fn conditions_json(conditions: &Conditions) -> Result<Value> {
    let record = RunRecord {
        conditions: Some(conditions.clone()),
        ..RunRecord::default()
    };
    let mut value: Value = serde_json::from_str(&record.encode())?;
    Ok(value["conditions"].take())
}

fn greedy(logits: &[f32]) -> u32 {
    let best = logits
        .iter()
        .enumerate()
        .max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
    best.map_or(0, |(i, _)| i as u32)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// Returns the tokens that a text begins with.
///
/// Timing works with any tokens. These spread over the vocabulary, so that routing does too, and
/// each text has others.
fn prompt(n_vocab: usize, text: u32, tokens: u32) -> Vec<u32> {
    let first = u64::from(text).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let token = |i: u64| {
        let mixed = first.wrapping_add(i).wrapping_mul(2_654_435_761);
        (mixed % n_vocab.max(1) as u64) as u32
    };
    (0..u64::from(tokens)).map(token).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }

    #[test]
    fn texts_begin_differently() {
        let texts: Vec<Vec<u32>> = (0..32).map(|text| prompt(4096, text, 16)).collect();
        assert_eq!(texts[0][..2], [0, (2_654_435_761u64 % 4096) as u32]);
        for (i, text) in texts.iter().enumerate() {
            assert!(text.iter().all(|token| *token < 4096));
            assert!(texts[..i].iter().all(|other| other != text));
        }
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(greedy(&[1.0, 5.0, 5.0]), 1);
    }
}
