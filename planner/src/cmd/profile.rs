//! `tier-plan profile`: which experts a model uses, over calibration prompts.

use crate::bundled;
use crate::catalogue::{self, Named};
use crate::cmd::args::sampling;
use crate::cmd::args::{JsonArgs, PreTokenizerArgs, ThreadArgs, VerifyArgs, at_least_one};
use crate::hint::HintExt;
use crate::json::path_json;
use crate::opening::Opening;
use crate::prepared::Prepared;
use crate::printable::printable;
use crate::profile::collect::{
    Calibration, Settings, Unfinished, check_experts, collect, tokenize,
};
use crate::profile::stats::{Skew, skews};
use crate::profile::{imatrix, prompts};
use anyhow::{Context, Result, anyhow};
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::profile::{Phase, Profile};
use tier_plan_runtime::formats::safely;
use tier_plan_runtime::sampler::SamplerConfig;

/// Options of `tier-plan profile`.
#[derive(Debug, Args)]
#[command(
    about = "Run calibration prompts and record which experts every token uses",
    after_long_help = "Example:\n  tier-plan profile MODEL.gguf --prompts my-prompts -o MODEL.profile\n  \
                       tier-plan profile kimi-k2 --from-imatrix imatrix.gguf"
)]
pub struct ProfileArgs {
    /// GGUF file; with --from-imatrix a shape works too, or none at all
    #[arg(
        value_name = "MODEL",
        required_unless_present_any = ["from_imatrix", "model_option"],
        conflicts_with = "model_option",
        help_heading = "Model"
    )]
    pub model: Option<PathBuf>,
    /// GGUF file, as an option instead of the argument MODEL
    #[arg(
        short = 'm',
        long = "model",
        value_name = "FILE",
        help_heading = "Model"
    )]
    pub model_option: Option<PathBuf>,
    /// Run nothing, and take the counts of this llama.cpp importance matrix (GGUF)
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["prompts", "tokenizer_pre", "restart", "threads"],
        help_heading = "Model"
    )]
    pub from_imatrix: Option<PathBuf>,
    /// Folder with one folder of text files per domain; files named heldout* only judge plans
    /// [default: the bundled prompts]
    #[arg(long, value_name = "FOLDER", help_heading = "Generation")]
    pub prompts: Option<PathBuf>,
    /// Profile to write [default: MODEL.profile in the current folder]
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    pub output: Option<PathBuf>,
    /// Tokens of each prompt to process
    #[arg(
        long,
        value_name = "N",
        default_value_t = 192,
        help_heading = "Generation"
    )]
    pub prompt_tokens: u32,
    /// Tokens to decode after each prompt
    #[arg(
        long,
        value_name = "N",
        default_value_t = 128,
        help_heading = "Generation"
    )]
    pub decode_tokens: u32,
    /// Temperature of the decoded text; 0 is greedy
    #[arg(
        long,
        visible_alias = "temp",
        value_name = "T",
        allow_negative_numbers = true,
        default_value_t = 0.8,
        help_heading = "Generation"
    )]
    pub temperature: f32,
    /// Seed of the decoded text
    #[arg(
        short,
        long,
        value_name = "N",
        default_value_t = 1,
        help_heading = "Generation"
    )]
    pub seed: u64,
    /// Start again even if there is an unfinished profile
    #[arg(long, help_heading = "Generation")]
    pub restart: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub pre: PreTokenizerArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub verify: VerifyArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub threads: ThreadArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

impl ProfileArgs {
    fn model(&self) -> Option<&Path> {
        self.model.as_deref().or(self.model_option.as_deref())
    }

    /// Returns the checked settings of the calibration runs.
    fn settings(&self) -> Result<Settings> {
        let config = SamplerConfig {
            temperature: self.temperature,
            ..SamplerConfig::default()
        };
        sampling::check(&config)?;
        Ok(Settings {
            prompt_tokens: at_least_one("--prompt-tokens", self.prompt_tokens)?,
            decode_tokens: self.decode_tokens,
            temperature: self.temperature,
            seed: self.seed,
        })
    }
}

/// Runs the command.
///
/// # Errors
/// When an option is invalid, a file cannot be read or written, or the model cannot be loaded.
pub fn run(args: &ProfileArgs) -> Result<()> {
    if let Some(matrix) = &args.from_imatrix {
        return from_imatrix(args, matrix);
    }
    let model = args
        .model()
        .context("no model given, expected MODEL or --model")?;
    if let Named::Shape(shape) = catalogue::named(model)? {
        let unfit = format!(
            "'{}' is a shape, which has no weights to run, expected a GGUF file",
            shape.name
        );
        return Err(anyhow!(unfit))
            .hint("pass --from-imatrix with an importance matrix of that model");
    }
    let (settings, threads) = (args.settings()?, args.threads.checked()?);
    let context = args.prompt_tokens.checked_add(args.decode_tokens);
    let context = context
        .context("--prompt-tokens and --decode-tokens: too many tokens to count, expected fewer")?;
    let folder = match &args.prompts {
        Some(folder) => folder.clone(),
        None => bundled::path("prompts")?,
    };
    let prompts = prompts::read(&folder)?;
    let output = output(args, model);
    safely::check_file(&output)?;
    let unfinished = Unfinished::open(&output, args.restart)?;
    let opening = Opening {
        context: Some(context),
        threads,
        verify: args.verify.asked(),
        ..Opening::default()
    };
    let prepared = Prepared::open(model, opening)?;
    check_experts(prepared.gguf(), prepared.spec())?;
    let tokenizer = prepared.tokenizer_with(args.pre.tokenizer_pre.as_deref())?;
    let tokens = tokenize(&tokenizer, &prompts, &settings)?;
    let mut session = prepared.load()?;
    let catching = crate::interrupt::catch_interrupts();
    let run = Calibration {
        tokenizer: &tokenizer,
        prompts: &prompts,
        tokens: &tokens,
        settings,
    };
    let profile = collect(&mut session, &run, &output, unfinished)?;
    // The profile is written, and its statistics may take a while.
    drop(catching);
    show(&profile, &output, args.format.json)
}

/// Returns the path to write: the one asked for, or the stem of the input file in the current
/// folder.
fn output(args: &ProfileArgs, from: &Path) -> PathBuf {
    args.output.clone().unwrap_or_else(|| {
        let mut name = PathBuf::from(from.file_stem().unwrap_or_default());
        name.as_mut_os_string().push(".profile");
        name
    })
}

fn from_imatrix(args: &ProfileArgs, matrix: &Path) -> Result<()> {
    let known = args
        .model()
        .map(|model| catalogue::model(model, None))
        .transpose()?;
    // A shape's name has dots of its own.
    let stem = known
        .as_ref()
        .and_then(|k| k.shape.as_ref())
        .map(|(of, _)| PathBuf::from(format!("{}.gguf", of.name)));
    let output = output(args, stem.as_deref().or(args.model()).unwrap_or(matrix));
    safely::check(&output)?;
    let mut profile = imatrix::read(matrix, known.as_ref().map(|k| &k.sizes))?;
    if let Some((of, _)) = known.as_ref().and_then(|k| k.shape.as_ref()) {
        // Counts hold for every quantization.
        profile.model.name = of.name.clone();
        profile = profile.identified();
    }
    profile.write(&output)?;
    show(&profile, &output, args.format.json)
}

/// Prints how skewed the access is, by domain, on held-out prompts.
///
/// # Errors
/// When the profile has no usable records.
pub fn show(profile: &Profile, output: &Path, as_json: bool) -> Result<()> {
    let skews = skews(profile)?;
    let tokens = |phase| profile.n_tokens(Some(phase), None);
    let (prompt_tokens, decode_tokens) = (tokens(Phase::Prompt), tokens(Phase::Decode));
    if as_json {
        let value = json!({
            "profile": path_json(output),
            "model": profile.model.name,
            "prompts": profile.prompts.len(),
            "prompt_tokens": prompt_tokens,
            "decode_tokens": decode_tokens,
            "n_expert": profile.n_expert,
            "n_used": profile.n_used,
            "layers": profile.layers,
            "made": profile.made,
            "counted": profile.counted.is_some(),
            "skew": skews.iter().map(skew_json).collect::<Vec<_>>(),
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    if profile.counted.is_some() {
        return show_counted(profile, &skews, output);
    }
    println!(
        "{} prompts of {} domains: {prompt_tokens} prompt tokens and {decode_tokens} decoded, {} layers of {} experts",
        profile.prompts.len(),
        profile.domains().len(),
        profile.layers.len(),
        profile.n_expert
    );
    let Some(all) = skews.first() else {
        println!("no tokens were decoded, so the skew is unknown");
        return Ok(());
    };
    if all.held_out {
        println!(
            "share of held-out choices that go to the favorites of the train prompts (in brackets: if routing were uniform)"
        );
    } else {
        println!(
            "share of choices that go to the favorites of the same prompts (in brackets: if routing were uniform)"
        );
    }
    print!("{:<14}", "domain");
    for uniform in all.uniform {
        print!(" {:>19}", format!("{:.0} % of experts", uniform * 100.0));
    }
    println!(
        " {:>19} {:>18}  {}",
        "as many LRU slots*", "experts in effect", "verdict"
    );
    for skew in &skews {
        print!("{:<14}", skew.domain.as_deref().unwrap_or("all"));
        for (caught, uniform) in skew.caught.iter().zip(skew.uniform) {
            print!(
                " {:>19}",
                format!("{:.1} % ({:.1} %)", caught * 100.0, uniform * 100.0)
            );
        }
        let verdict = skew.verdict().name();
        println!(
            " {:>17.1} % {:>18.1}  {verdict}",
            skew.cached[1] * 100.0,
            skew.effective_experts
        );
    }
    println!(
        "* hits with {:.0} % of the experts as slots, nothing pinned",
        all.uniform[1] * 100.0
    );
    println!("{}", all.words());
    println!("profile: {}", output.display());
    Ok(())
}

fn show_counted(profile: &Profile, skews: &[Skew], output: &Path) -> Result<()> {
    println!("{}: {}", printable(&profile.model.name), profile.made);
    let Some(all) = skews.first() else {
        return Ok(());
    };
    println!(
        "{} layers of {} experts, {} used per token, at least {} tokens counted in each layer",
        profile.layers.len(),
        profile.n_expert,
        profile.n_used,
        all.tokens
    );
    println!(
        "share of the counted choices that go to the favorites (in brackets: if routing were uniform)"
    );
    for ((uniform, caught), cached) in all.uniform.iter().zip(all.caught).zip(all.cached) {
        println!(
            "{:>5.0} % of experts: {:>5.1} % ({:.1} %); as many LRU slots would hit {:.1} % of independent choices",
            uniform * 100.0,
            caught * 100.0,
            uniform * 100.0,
            cached * 100.0
        );
    }
    println!("experts in effect: {:.1}", all.effective_experts);
    println!("{}", all.words());
    println!(
        "note: counts have no order and come from prompts only: plans made from them are judged on tokens drawn from them"
    );
    println!("profile: {}", output.display());
    Ok(())
}

/// Returns a skew as `--json` prints it.
pub fn skew_json(skew: &Skew) -> serde_json::Value {
    json!({
        "domain": skew.domain,
        "tokens": skew.tokens,
        "uniform": skew.uniform,
        "caught": skew.caught,
        "cached": skew.cached,
        "counted": skew.counted,
        "held_out": skew.held_out,
        "effective_experts": skew.effective_experts,
        "verdict": skew.verdict().name(),
    })
}
