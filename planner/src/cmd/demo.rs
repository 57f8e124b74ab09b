//! `tier-plan demo`: the bundled model through every stage, by the same subcommands that a user would call.

use super::{compare, inspect, profile, run, solve};
use crate::bundled;
use crate::cli::{
    Backend, CompareArgs, DemoArgs, InspectArgs, Objective, Policy, ProfileArgs, RunArgs, SamplingArgs, SolveArgs,
    StoreArgs, Strategy, VerifyArgs,
};
use crate::profile::collect::Settings;
use crate::profile::prompts;
use crate::session::{interrupted, tokenizer};
use crate::trial::Trial;
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime};
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::placement;
use tier_plan_runtime::formats::profile::Split;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::units::show_utc;

/// Tokens that every plan must continue greedily with the same text.
const GREEDY: usize = 48;

/// The start of the text that the demo prints.
const PROMPT: &str = "And it came to pass in those days";

/// Runs it.
pub fn run(args: &DemoArgs) -> Result<()> {
    ensure!(args.tokens > 0, "--tokens 0 measures nothing; give 1 or more");
    let started = Instant::now();
    let model = bundled::path("demo/demo.gguf")?;
    let machine = bundled::path("machines/demo-emulated.toml")?;
    let folder = free_folder(args.output.as_deref())?;
    let plans = folder.join("plans");
    std::fs::create_dir_all(&plans).with_context(|| format!("making the folder {}", plans.display()))?;
    let shown = |path: &Path| shorter(path).display().to_string();
    let (model_s, machine_s, folder_s) = (shown(&model), shown(&machine), shown(&folder));

    say(1, "What the model holds: most of its bytes are experts, and a token reads few of them.");
    command(&format!("inspect {model_s}"));
    inspect::run(&InspectArgs { model: model.clone(), quant: None, tensors: false, json: false })?;

    let profile_path = folder.join("demo.profile");
    say(2, "Which experts it really uses: run calibration prompts of four domains and record every token's choice.");
    command(&format!("profile {model_s} -o {folder_s}/demo.profile"));
    let threads = args.threads;
    profile::run(&profile_args(&model, &profile_path, threads))?;

    say(
        3,
        "Where everything should live: an integer program over three tiers too small for the model, and four rules \
         of thumb given the same bytes.",
    );
    command(&format!(
        "solve {model_s} -p {folder_s}/demo.profile -m {machine_s} -o {folder_s}/plans/optimal.toml --baselines \
         {folder_s}/plans"
    ));
    let optimal = plans.join("optimal.toml");
    solve::run(&solve_args(&model, &profile_path, &machine, &optimal, &plans))?;

    say(4, "Text from the plan: pinned experts stay, the others pass through slots, the rest is read from the file.");
    command(&format!(
        "run {model_s} --plan {folder_s}/plans/optimal.toml -p {PROMPT:?} -n 48 --temperature 0.8 --seed 3"
    ));
    run::run(&run_args(&model, &optimal, threads))?;
    ensure!(!interrupted(), "interrupted; what was written so far is in {folder_s}");

    let inputs = plan_files(&plans, &optimal)?;
    say(5, "All plans side by side, on prompts that no plan was made from.");
    same_text(&model, &inputs, args)?;
    command(&format!(
        "compare {folder_s}/plans/*.toml --model {model_s} --profile {folder_s}/demo.profile -o {folder_s}/report"
    ));
    compare::run(&CompareArgs {
        inputs,
        model: Some(model),
        profile: Some(profile_path),
        prompts: None,
        output: Some(folder.join("report")),
        tokens: args.tokens,
        threads,
        json: false,
    })?;
    println!();
    println!(
        "The tiers of this demo are emulated: their rates and sizes are declared in {machine_s}, in the proportions"
    );
    println!(
        "of a desktop with a GPU, so that the plans differ as they would there. The demo took {:.0} s.",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

fn say(step: u32, what: &str) {
    println!("\n[{step}/5] {what}");
}

fn command(line: &str) {
    println!("$ tier-plan {line}\n");
}

/// Relative to the current folder where that is shorter.
fn shorter(path: &Path) -> &Path {
    std::env::current_dir().ok().and_then(|here| path.strip_prefix(here).ok()).unwrap_or(path)
}

/// The folder asked for, which must not exist, or a new dated one.
fn free_folder(asked: Option<&Path>) -> Result<PathBuf> {
    if let Some(folder) = asked {
        ensure!(!folder.exists(), "{} exists; nothing is overwritten, give another --output", folder.display());
        return Ok(folder.to_path_buf());
    }
    let now = show_utc(SystemTime::now()).replace(':', "").replace('T', "-");
    let base = format!("reports/{}-demo", now.trim_end_matches('Z'));
    let names = std::iter::once(base.clone()).chain((2..1000).map(|n| format!("{base}-{n}")));
    names.map(PathBuf::from).find(|p| !p.exists()).with_context(|| format!("no free name like {base}"))
}

/// The plans written by `solve`, the optimal one first.
fn plan_files(folder: &Path, optimal: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("listing {}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|e| e.ok().map(|e| e.path())).filter(|p| p != optimal).collect();
    files.sort();
    files.insert(0, optimal.to_path_buf());
    Ok(files)
}

/// Placement changes speed, never tokens: every plan must continue a prompt with the same likeliest tokens.
fn same_text(model: &Path, plans: &[PathBuf], args: &DemoArgs) -> Result<()> {
    let gguf = Arc::new(Gguf::open(model)?);
    let tokenizer = tokenizer(&gguf)?;
    let mut prompts = prompts::read(&bundled::path("prompts")?)?;
    prompts.retain(|p| p.split == Split::HeldOut);
    let settings = Settings { decode_tokens: GREEDY as u32, ..compare::SETTINGS };
    let trial = Trial { gguf, tokenizer: &tokenizer, prompts, settings, threads: args.threads };
    let mut expected = None;
    for path in plans {
        let plan = placement::read(path)?;
        let tokens = trial.greedy(&plan, GREEDY)?;
        match &expected {
            None => expected = Some(tokens),
            Some(first) if *first != tokens => {
                bail!("plan '{}' generates another text than the others; placement must not change tokens", plan.name)
            }
            Some(_) => {}
        }
    }
    println!("greedy text of {GREEDY} tokens: the same, token for token, under all {} plans", plans.len());
    Ok(())
}

fn profile_args(model: &Path, output: &Path, threads: Option<usize>) -> ProfileArgs {
    ProfileArgs {
        model: Some(model.to_path_buf()),
        from_imatrix: None,
        prompts: None,
        output: Some(output.to_path_buf()),
        prompt_tokens: compare::SETTINGS.prompt_tokens,
        decode_tokens: 128,
        temperature: compare::SETTINGS.temperature,
        seed: compare::SETTINGS.seed,
        tokenizer_pre: None,
        restart: false,
        verify: VerifyArgs::default(),
        threads,
        json: false,
    }
}

fn solve_args(model: &Path, profile: &Path, machine: &Path, output: &Path, baselines: &Path) -> SolveArgs {
    SolveArgs {
        quant: None,
        model: model.to_path_buf(),
        profile: Some(profile.to_path_buf()),
        machine: machine.to_path_buf(),
        output: output.to_path_buf(),
        budget: Vec::new(),
        vram: None,
        dram: None,
        context: 512,
        at: None,
        kv_type: KvType::F16,
        objective: Objective::Latency,
        batch: None,
        backend: Backend::Microlp,
        target_tok_s: None,
        fix: Vec::new(),
        forbid: Vec::new(),
        strategy: Strategy::Optimal,
        policy: Policy::Auto,
        baselines: Some(baselines.to_path_buf()),
        time_limit: 10.0,
        json: false,
    }
}

fn run_args(model: &Path, plan: &Path, threads: Option<usize>) -> RunArgs {
    RunArgs {
        model: model.to_path_buf(),
        plan: Some(plan.to_path_buf()),
        mmap: false,
        numa: None,
        dram: None,
        profile: None,
        prompt: Some(PROMPT.to_string()),
        file: None,
        tokens: Some(48),
        chat: false,
        system: None,
        chat_template: None,
        tokenizer_pre: None,
        sampling: SamplingArgs {
            temperature: 0.8,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            seed: 3,
        },
        ctx: None,
        kv_type: None,
        ignore_eos: false,
        record: None,
        store: StoreArgs::default(),
        stats: true,
        threads,
        json: false,
    }
}
