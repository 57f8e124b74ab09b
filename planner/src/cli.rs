//! The command line: clap structs and nothing else.

mod solve;
mod store;

pub use solve::{Backend, Objective, Policy, SolveArgs, Strategy};
pub use store::{ChecksumArgs, PackArgs, StoreArgs, VerifyArgs};

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use tier_plan_runtime::KvType;
use tier_plan_runtime::tiers::numa::NumaPolicy;

/// Plans where the tensors of a mixture-of-experts model should live, and runs the model from that plan.
#[derive(Debug, Parser)]
#[command(name = "tier-plan", version, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Take the bundled model through every stage and write a report
    Demo(DemoArgs),
    /// Show what a model file holds: architecture, shapes, bytes by group and type
    Inspect(InspectArgs),
    /// Measure this machine, and write machine.toml
    Probe(ProbeArgs),
    /// Fit a machine file to what runs on that machine took
    Calibrate(CalibrateArgs),
    /// Run calibration prompts and record which experts every token uses
    Profile(ProfileArgs),
    /// Find where every tensor should live, and write placement.toml
    Solve(SolveArgs),
    /// Say why a plan is as it is: what bounds it, and what more of each tier would bring
    Explain(ExplainArgs),
    /// Say what is different between two plans
    Diff(DiffArgs),
    /// Say a plan in the words of another engine, as near as it can come
    Export(ExportArgs),
    /// Predict what a model would do on a machine, without either
    WhatIf(WhatIfArgs),
    /// Generate text, from a plan if one is given
    Run(RunArgs),
    /// Put several plans or run records side by side in a report of charts and tables
    Compare(CompareArgs),
    /// Measure prompt and decode speed
    Bench(BenchArgs),
    /// Make the checksums that --verify compares with
    Checksum(ChecksumArgs),
    /// Copy a model's experts so that each lies in one piece, for `run` and `bench` where memory is short
    Pack(PackArgs),
    /// Write the logits of given tokens, to check one engine against another
    Logits(LogitsArgs),
    /// Measure how well the model predicts a text
    Perplexity(PerplexityArgs),
    /// Turn text into token ids
    Tokenize(TokenizeArgs),
    /// Compare the kernels that this machine runs with plain ones
    Selftest(SelftestArgs),
}

/// `demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Folder for the report; a dated one under reports/ when not given
    #[arg(short, long)]
    pub output: Option<PathBuf>,
    /// Threads; the physical cores when not given
    #[arg(long)]
    pub threads: Option<usize>,
    /// Tokens to generate per plan and prompt
    #[arg(long, default_value_t = 64)]
    pub tokens: u32,
}

/// `inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The GGUF file (the first part of a split model), a shape (.toml, or a name such as kimi-k2.5), or a profile
    pub model: PathBuf,
    /// Of a shape: the quantisation, q4_k_m when not given
    #[arg(long, value_name = "NAME")]
    pub quant: Option<String>,
    /// List every tensor
    #[arg(long)]
    pub tensors: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `probe`.
#[derive(Debug, Args)]
pub struct ProbeArgs {
    /// Where to write the machine file
    #[arg(short, long, default_value = "machine.toml")]
    pub output: PathBuf,
    /// Measure with this model's tensor types, reading its own experts from its file
    #[arg(long, value_name = "FILE", conflicts_with = "slow_dir")]
    pub model: Option<PathBuf>,
    /// Measure the file system of this folder, with a file of 1 GiB that is deleted afterwards; the current folder when
    /// neither this nor --model is given
    #[arg(long, value_name = "FOLDER")]
    pub slow_dir: Option<PathBuf>,
    /// Threads; the physical cores when not given
    #[arg(long)]
    pub threads: Option<usize>,
    /// Make each memory node of the machine a tier, measured by itself
    #[arg(long)]
    pub numa_tiers: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `calibrate`.
#[derive(Debug, Args)]
pub struct CalibrateArgs {
    /// Run records (.json) of plans that were made for this machine file, under different budgets
    #[arg(required = true)]
    pub records: Vec<PathBuf>,
    /// The machine file, which is replaced where --output is not given, or the name of one that comes with the program
    #[arg(short, long)]
    pub machine: PathBuf,
    /// Where to write the fitted machine file
    #[arg(short, long)]
    pub output: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `profile`.
#[derive(Debug, Args)]
pub struct ProfileArgs {
    /// The GGUF file; with --from-imatrix a shape does too, and it may be left out
    #[arg(required_unless_present = "from_imatrix")]
    pub model: Option<PathBuf>,
    /// Run nothing: take the counts of an importance matrix (GGUF) that somebody made of this model
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompts", "tokenizer_pre", "restart", "threads"])]
    pub from_imatrix: Option<PathBuf>,
    /// Folder with one folder a domain, each with text files; those named `heldout*` only judge plans
    #[arg(long)]
    pub prompts: Option<PathBuf>,
    /// Where to write the profile; MODEL's stem (or the matrix's) with `.profile` in the current folder when not given
    #[arg(short, long)]
    pub output: Option<PathBuf>,
    /// Tokens of each prompt to process
    #[arg(long, default_value_t = 192)]
    pub prompt_tokens: u32,
    /// Tokens to decode after each prompt
    #[arg(long, default_value_t = 128)]
    pub decode_tokens: u32,
    /// Temperature of the decoded text; 0 takes the likeliest token
    #[arg(long, default_value_t = 0.8)]
    pub temperature: f32,
    /// Seed of the decoded text
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Split text with this pattern instead of the one that the file names
    #[arg(long, value_name = "NAME")]
    pub tokenizer_pre: Option<String>,
    /// Start again even if an unfinished profile is there
    #[arg(long)]
    pub restart: bool,
    /// Verification.
    #[command(flatten)]
    pub verify: VerifyArgs,
    /// Threads; the physical cores when not given
    #[arg(long)]
    pub threads: Option<usize>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `explain`.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// The plan
    pub plan: PathBuf,
    /// What it was made for: a GGUF file, or a shape (.toml, or a name such as kimi-k2.5)
    #[arg(long)]
    pub model: PathBuf,
    /// Of a shape: the quantisation, q4_k_m when not given
    #[arg(long, value_name = "NAME")]
    pub quant: Option<String>,
    /// The profile it was made from, if it was made from one
    #[arg(short, long)]
    pub profile: Option<PathBuf>,
    /// Spend at most this many seconds on the prices
    #[arg(long, default_value_t = 5.0)]
    pub time_limit: f64,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `diff`.
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// A plan
    pub a: PathBuf,
    /// Another plan for the same model
    pub b: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The plan
    pub plan: PathBuf,
    /// What it was made for: a GGUF file, or a shape (.toml, or a name such as kimi-k2.5)
    #[arg(long)]
    pub model: PathBuf,
    /// Of a shape: the quantisation, q4_k_m when not given
    #[arg(long, value_name = "NAME")]
    pub quant: Option<String>,
    /// The profile it was made from; sglang and ktransformers are given its counts
    #[arg(short, long)]
    pub profile: Option<PathBuf>,
    /// The engine
    #[arg(long, value_enum)]
    pub to: ExportTo,
    /// The file to write: a script for llama.cpp; expert-counts.json for the others when not given
    #[arg(short, long)]
    pub output: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Engines that plans are exported to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportTo {
    /// A command line: whole layers of experts on the GPU or the CPU
    #[value(name = "llama.cpp")]
    LlamaCpp,
    /// How often each expert was used, for its `frequency` placement
    Ktransformers,
    /// How often each expert was used, for its expert-parallel load balancer
    Sglang,
    /// Nothing: it reads no placement and no counts, and says so
    Vllm,
}

/// `what-if`.
#[derive(Debug, Args)]
pub struct WhatIfArgs {
    /// A shape by name (kimi-k2.5) or file (.toml), or a GGUF file
    #[arg(long)]
    pub model: PathBuf,
    /// Of a shape: the quantisation, q4_k_m when not given
    #[arg(long, value_name = "NAME")]
    pub quant: Option<String>,
    /// A machine by name (optane-768) or file; may be given several times
    #[arg(short, long, required = true)]
    pub machine: Vec<PathBuf>,
    /// How the experts are used; without it, the range over three supposed kinds of routing
    #[arg(short, long)]
    pub profile: Option<PathBuf>,
    /// Context length to plan the key and value cache for
    #[arg(long, default_value_t = 4096)]
    pub context: u32,
    /// Predict for tokens that look back at this many positions; half of the context when not given
    #[arg(long, value_name = "POSITIONS")]
    pub at: Option<u32>,
    /// How keys and values are stored: f16, q8_0 (about half of it) or f32
    #[arg(long, value_name = "TYPE", default_value_t = KvType::F16)]
    pub kv_type: KvType,
    /// Budget of a tier, as NAME=SIZE (`vram=11GiB`); the tier's capacity when not given
    #[arg(short, long, value_name = "TIER=SIZE")]
    pub budget: Vec<String>,
    /// Budget of the tier named vram
    #[arg(long, value_name = "SIZE")]
    pub vram: Option<String>,
    /// Budget of the tier named dram
    #[arg(long, value_name = "SIZE")]
    pub dram: Option<String>,
    /// Ask for a tier of one size after another, like dram=64GiB..512GiB:8
    #[arg(long, value_name = "TIER=FROM..TO[:STEPS]")]
    pub sweep: Option<String>,
    /// Of a sweep: a folder for its table and chart
    #[arg(short, long, value_name = "FOLDER")]
    pub output: Option<PathBuf>,
    /// Stop improving a plan after this many seconds
    #[arg(long, default_value_t = 3.0)]
    pub time_limit: f64,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Where text comes from and how tokens are drawn.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// Temperature; 0 takes the likeliest token
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Keep the K likeliest tokens; 0 keeps all
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Keep the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,
    /// Drop tokens less likely than this share of the likeliest
    #[arg(long, default_value_t = 0.0)]
    pub min_p: f32,
    /// Divide the logits of recent tokens by this
    #[arg(long, default_value_t = 1.0)]
    pub repeat_penalty: f32,
    /// How many recent tokens that concerns
    #[arg(long, default_value_t = 64)]
    pub repeat_last_n: usize,
    /// Seed
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The GGUF file
    pub model: PathBuf,
    /// The plan; when not given, everything is in main memory, or as much as fits
    #[arg(long)]
    pub plan: Option<PathBuf>,
    /// Leave the weights where the system maps the file instead of copying them to huge pages: starts at once, is slower
    #[arg(long, conflicts_with_all = ["plan", "dram"])]
    pub mmap: bool,
    /// Use no more memory than this, all of it counted: what does not fit is read from the file as it is needed; the
    /// memory that there is, or that the control group allows, when not given
    #[arg(long, value_name = "SIZE", conflicts_with = "plan")]
    pub dram: Option<String>,
    /// Where memory is short: pin the experts that this profile shows to be used most
    #[arg(long, value_name = "FILE", conflicts_with = "plan")]
    pub profile: Option<PathBuf>,
    /// The text to continue; without it and without --file a chat begins, on a terminal
    #[arg(short, long, conflicts_with = "file")]
    pub prompt: Option<String>,
    /// A file with the text to continue; `-` is standard input
    #[arg(short, long)]
    pub file: Option<PathBuf>,
    /// Tokens to generate at most; 128, in a chat as many as fit, when not given
    #[arg(short = 'n', long)]
    pub tokens: Option<u32>,
    /// Chat even where standard input is no terminal: every line is a message
    #[arg(long, conflicts_with_all = ["prompt", "file", "json", "record"])]
    pub chat: bool,
    /// In a chat: what the model should know before it begins
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["prompt", "file"])]
    pub system: Option<String>,
    /// In a chat: a file with the Jinja template to use instead of the model's
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "file"])]
    pub chat_template: Option<PathBuf>,
    /// Split text with this pattern instead of the one that the file names
    #[arg(long, value_name = "NAME")]
    pub tokenizer_pre: Option<String>,
    /// Sampling.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Context length; the model's own or the plan's when not given
    #[arg(long)]
    pub ctx: Option<u32>,
    /// How keys and values are stored: f16, q8_0 or f32; the plan's when not given, f16 without a plan
    #[arg(long, value_name = "TYPE")]
    pub kv_type: Option<KvType>,
    /// Go on past the end-of-text token
    #[arg(long)]
    pub ignore_eos: bool,
    /// Write what the run did to this file
    #[arg(long)]
    pub record: Option<PathBuf>,
    /// Experts that come from the file.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Print hits, misses, bytes and times by layer
    #[arg(long)]
    pub stats: bool,
    /// On a machine with several memory nodes: `interleave` spreads memory over all of them, a number keeps memory and
    /// threads on that node
    #[arg(long, value_name = "POLICY")]
    pub numa: Option<NumaPolicy>,
    /// Threads; the physical cores when not given
    #[arg(long)]
    pub threads: Option<usize>,
    /// Print JSON instead of text
    #[arg(long)]
    pub json: bool,
}

/// `compare`.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Plans (.toml), which are run, or run records (.json), which are read
    #[arg(required = true)]
    pub inputs: Vec<PathBuf>,
    /// The GGUF file; needed to run plans
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// The profile, for the heat map and the curves; its held-out prompts are what plans run on
    #[arg(long)]
    pub profile: Option<PathBuf>,
    /// Folder of the prompts that the profile was made from
    #[arg(long)]
    pub prompts: Option<PathBuf>,
    /// Folder for the report; a dated one under reports/ when not given
    #[arg(short, long)]
    pub output: Option<PathBuf>,
    /// Tokens to generate per plan and prompt
    #[arg(long, default_value_t = 64)]
    pub tokens: u32,
    /// Threads; the physical cores when not given
    #[arg(long)]
    pub threads: Option<usize>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// The GGUF file
    pub model: PathBuf,
    /// The plan; when not given, everything is in main memory, or as much as fits
    #[arg(long)]
    pub plan: Option<PathBuf>,
    /// Leave the weights where the system maps the file instead of copying them to huge pages: starts at once, is slower
    #[arg(long, conflicts_with_all = ["plan", "dram"])]
    pub mmap: bool,
    /// Use no more memory than this, all of it counted: what does not fit is read from the file as it is needed; the
    /// memory that there is, or that the control group allows, when not given
    #[arg(long, value_name = "SIZE", conflicts_with = "plan")]
    pub dram: Option<String>,
    /// Where memory is short: pin the experts that this profile shows to be used most
    #[arg(long, value_name = "FILE", conflicts_with = "plan")]
    pub profile: Option<PathBuf>,
    /// Prompt tokens to process
    #[arg(short, long, default_value_t = 64)]
    pub prompt: u32,
    /// Tokens to decode
    #[arg(short = 'n', long, default_value_t = 32)]
    pub tokens: u32,
    /// Repetitions
    #[arg(short, long, default_value_t = 3)]
    pub repeat: u32,
    /// Experts that come from the file.
    #[command(flatten)]
    pub store: StoreArgs,
    /// How keys and values are stored: f16, q8_0 or f32; the plan's when not given, f16 without a plan
    #[arg(long, value_name = "TYPE")]
    pub kv_type: Option<KvType>,
    /// On a machine with several memory nodes: `interleave` spreads memory over all of them, a number keeps memory and
    /// threads on that node
    #[arg(long, value_name = "POLICY")]
    pub numa: Option<NumaPolicy>,
    /// Threads; the physical cores when not given
    #[arg(long)]
    pub threads: Option<usize>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `logits`.
#[derive(Debug, Args)]
pub struct LogitsArgs {
    /// The GGUF file
    pub model: PathBuf,
    /// Token ids, separated by commas
    #[arg(long, value_delimiter = ',', required = true)]
    pub tokens: Vec<u32>,
    /// Where to write little-endian f32 `[tokens, vocab]`
    #[arg(short, long)]
    pub output: PathBuf,
    /// The plan; everything in main memory when not given
    #[arg(long)]
    pub plan: Option<PathBuf>,
    /// Also decode this many tokens greedily and print their ids as a JSON array
    #[arg(long, default_value_t = 0)]
    pub greedy: u32,
    /// Threads; the physical cores when not given
    #[arg(long)]
    pub threads: Option<usize>,
}

/// `perplexity`.
#[derive(Debug, Args)]
pub struct PerplexityArgs {
    /// The GGUF file
    pub model: PathBuf,
    /// The text
    #[arg(short, long, required_unless_present = "logits_base")]
    pub file: Option<PathBuf>,
    /// The plan; everything in main memory when not given
    #[arg(long)]
    pub plan: Option<PathBuf>,
    /// Tokens of a window, of which the second half is scored; 512 when not given
    #[arg(long)]
    pub ctx: Option<u32>,
    /// Windows at most
    #[arg(long)]
    pub windows: Option<u32>,
    /// How keys and values are stored: f16, q8_0 or f32; the plan's when not given, f16 without a plan
    #[arg(long, value_name = "TYPE")]
    pub kv_type: Option<KvType>,
    /// Write the log-probabilities of the whole vocabulary to this file, for others to be compared with
    #[arg(long, value_name = "FILE", conflicts_with = "logits_base")]
    pub save_logits_base: Option<PathBuf>,
    /// Compare with the log-probabilities in this file, on its own text
    #[arg(long, value_name = "FILE")]
    pub logits_base: Option<PathBuf>,
    /// Verification.
    #[command(flatten)]
    pub verify: VerifyArgs,
    /// Split text with this pattern instead of the one that the file names
    #[arg(long, value_name = "NAME")]
    pub tokenizer_pre: Option<String>,
    /// Threads; the physical cores when not given
    #[arg(long)]
    pub threads: Option<usize>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `tokenize`.
#[derive(Debug, Args)]
pub struct TokenizeArgs {
    /// The GGUF file
    pub model: PathBuf,
    /// The text
    pub text: String,
    /// Print the ids as a JSON array
    #[arg(long)]
    pub ids: bool,
    /// Treat special tokens in the text as plain text, and add none
    #[arg(long)]
    pub no_special: bool,
    /// Split text with this pattern instead of the one that the file names
    #[arg(long, value_name = "NAME")]
    pub tokenizer_pre: Option<String>,
}

/// `selftest`.
#[derive(Debug, Args)]
pub struct SelftestArgs {
    /// Check a GPU: its kernels, golden values and whole models on it; measure its memory, its link and a model of real
    /// shapes; and compare all of it with targets
    #[arg(long)]
    pub gpu: bool,
    /// The GPU, by the driver's number
    #[arg(long, value_name = "NUMBER", default_value_t = 0, requires = "gpu")]
    pub device: usize,
    /// Results only: kernels, golden values and the bundled model; nothing is timed
    #[arg(long, requires = "gpu", conflicts_with_all = ["model", "peer"])]
    pub quick: bool,
    /// The model that is timed; a synthetic one of real shapes, as deep as there is room for, when not given
    #[arg(long, value_name = "FILE", requires = "gpu")]
    pub model: Option<PathBuf>,
    /// Folder with golden values in arch and quant; the source's tests/data when not given
    #[arg(long, value_name = "FOLDER", requires = "gpu")]
    pub golden: Option<PathBuf>,
    /// llama.cpp's llama-bench, built with CUDA: run it on the same model, and compare
    #[arg(long, value_name = "PATH", requires = "gpu")]
    pub peer: Option<PathBuf>,
    /// Folder for the table, as text and JSON; a dated one under reports/ when not given
    #[arg(short, long, value_name = "FOLDER", requires = "gpu")]
    pub output: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
