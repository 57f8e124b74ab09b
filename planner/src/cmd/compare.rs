//! `tier-plan compare`: plans and run records side by side in a report.

mod tables;

use crate::cmd::args::{JsonArgs, ThreadArgs, at_least_one};
use crate::hint::HintExt;
use crate::json::path_json;
use crate::printable::printable;
use crate::profile::collect::Settings;
use crate::profile::prompts;
use crate::report::{self, PlanEntry, Report};
use crate::session::tokenizer;
use crate::trial::{Trial, curves, first_difference};
use crate::{bundled, host};
use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Args;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use tables::{table, within_line};
use tier_plan_runtime::formats::placement::{self, Placement};
use tier_plan_runtime::formats::profile::{self, Profile, Split};
use tier_plan_runtime::formats::record::{self, RunRecord};
use tier_plan_runtime::formats::safely;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::units::show_utc;

/// Options of `tier-plan compare`.
#[derive(Debug, Args)]
#[command(
    about = "Compare plans or run records in a report of charts and tables",
    after_long_help = "Example:\n  tier-plan compare plans/*.toml placement.toml -m MODEL.gguf -P MODEL.profile\n  \
                       tier-plan compare mine/*.record.json theirs/*.record.json --html report.html"
)]
pub struct CompareArgs {
    /// Plans (.toml) to run, or run records (.json) to read, of any models and machines
    #[arg(required = true, value_name = "PLAN|RECORD")]
    pub inputs: Vec<PathBuf>,
    /// GGUF file; required to run plans
    #[arg(short, long, value_name = "FILE", help_heading = "Model")]
    pub model: Option<PathBuf>,
    /// Profile, for the heat map and the hit-rate curves
    #[arg(short = 'P', long, value_name = "FILE", help_heading = "Model")]
    pub profile: Option<PathBuf>,
    /// Folder of the prompts that the profile was made from; plans run on the held-out ones
    /// [default: the bundled prompts]
    #[arg(long, value_name = "FOLDER")]
    pub prompts: Option<PathBuf>,
    /// Folder for the report [default: reports/DATE, unless --html is given]
    #[arg(short, long, value_name = "FOLDER", help_heading = "Output")]
    pub output: Option<PathBuf>,
    /// Write the report as one HTML file of at most 4 MiB to share
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub html: Option<PathBuf>,
    /// Tokens to generate per plan and prompt
    #[arg(
        short,
        long,
        visible_alias = "predict",
        alias = "tokens",
        value_name = "N",
        default_value_t = 64
    )]
    pub n_predict: u32,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub threads: ThreadArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

/// Default settings of a trial, equal to the defaults of `tier-plan profile`.
pub const SETTINGS: Settings = Settings {
    prompt_tokens: 192,
    decode_tokens: 64,
    temperature: 0.8,
    seed: 1,
};

/// Runs the command.
///
/// # Errors
/// When an option is invalid, a file cannot be read or written, or the model cannot be loaded.
pub fn run(args: &CompareArgs) -> Result<()> {
    let outputs = Outputs {
        folder: args.output.as_deref(),
        html: args.html.as_deref(),
    };
    outputs.check(&args.inputs)?;
    let mut plans: Vec<Placement> = Vec::new();
    let mut records: Vec<RunRecord> = Vec::new();
    for path in &args.inputs {
        match path.extension().and_then(|e| e.to_str()) {
            Some("toml") => plans.push(placement::read(path)?),
            Some("json") => records.push(record::read(path)?),
            _ => bail!(
                "{}: expected a plan (.toml) or a run record (.json)",
                path.display()
            ),
        }
    }
    name_apart(&mut plans, &args.inputs);
    let profile = args.profile.as_deref().map(profile::read).transpose()?;
    if let (Some(profile), Some(path)) = (&profile, &args.profile) {
        profile.check_traces("compare", path)?;
    }
    let mut report = report::from_records(records);
    if !plans.is_empty() {
        let model = args
            .model
            .as_deref()
            .context("no model given, expected --model FILE to run plans with")?;
        let entries = try_plans(args, model, &plans, profile.as_ref())?;
        if let Some(name) = first_difference(&entries) {
            bail!(
                "plan '{name}' generated another text than '{}'; placement must not change tokens",
                entries[0].name
            );
        }
        let texts = entries.iter().map(|e| e.records.len()).max().unwrap_or(0);
        report.notes.push(format!(
            "Every plan continued the same {texts} held-out prompts by {} tokens at most and generated the same tokens.",
            args.n_predict
        ));
        report.plans.splice(0..0, entries);
        report.title = report::title(&report);
    }
    finish(report, profile, outputs, args.format.json)
}

/// Where a report is to be written.
#[derive(Debug, Clone, Copy)]
struct Outputs<'a> {
    folder: Option<&'a Path>,
    html: Option<&'a Path>,
}

impl Outputs<'_> {
    /// Returns the folder, unless only one file is wanted.
    fn folder(&self, now: SystemTime) -> Option<PathBuf> {
        (self.folder.is_some() || self.html.is_none()).then(|| folder(self.folder, now))
    }

    /// Checks that the outputs can be written, and that none is an input.
    fn check(&self, inputs: &[PathBuf]) -> Result<()> {
        if let Some(folder) = self.folder(SystemTime::now()) {
            report::check(&folder)?;
        }
        let Some(html) = self.html else {
            return Ok(());
        };
        let real = |path: &Path| path.canonicalize().ok();
        if let Some(input) = inputs
            .iter()
            .find(|input| real(input).is_some_and(|input| Some(input) == real(html)))
        {
            bail!(
                "--html: {} is an input, expected another file",
                input.display()
            );
        }
        Ok(safely::check(html)?)
    }
}

fn try_plans(
    args: &CompareArgs,
    model: &Path,
    plans: &[Placement],
    profile: Option<&Profile>,
) -> Result<Vec<PlanEntry>> {
    let gguf = Arc::new(Gguf::open(model)?);
    for (plan, path) in plans.iter().zip(
        args.inputs
            .iter()
            .filter(|p| p.extension().is_some_and(|e| e == "toml")),
    ) {
        plan.check_model(&gguf.id(), path)?;
    }
    if let (Some(profile), Some(path)) = (profile, &args.profile) {
        profile.check_model(&gguf.id(), path)?;
    }
    let folder = match &args.prompts {
        Some(folder) => folder.clone(),
        None => bundled::path("prompts")?,
    };
    let mut prompts = prompts::read(&folder)?;
    prompts.retain(|p| p.split == Split::HeldOut);
    ensure!(
        !prompts.is_empty(),
        "{} has no held-out prompts (files named heldout*.txt)",
        folder.display()
    );
    let shortest = plans.iter().map(|p| p.context).min().unwrap_or(0);
    let n_predict = at_least_one("--n-predict", args.n_predict)?;
    if shortest <= n_predict {
        let full = format!(
            "--n-predict: {n_predict}, expected fewer than {shortest}, the context of a plan"
        );
        return Err(anyhow!(full)).hint("pass fewer, or solve again with a larger --context");
    }
    let prompt_tokens = SETTINGS.prompt_tokens.min(shortest - args.n_predict);
    let tokenizer = tokenizer(&gguf)?;
    let settings = Settings {
        decode_tokens: args.n_predict,
        prompt_tokens,
        ..SETTINGS
    };
    let trial = Trial {
        gguf,
        tokenizer: &tokenizer,
        prompts,
        settings,
        threads: args.threads.checked()?,
        profile,
    };
    plans
        .iter()
        .map(|plan| {
            if !args.format.json {
                eprintln!(
                    "running {} held-out prompts under plan '{}'",
                    trial.prompts.len(),
                    printable(&plan.name)
                );
            }
            trial.run(plan)
        })
        .collect()
}

/// Renames plans that share a name to their file names, so that charts can tell them apart.
fn name_apart(plans: &mut [Placement], inputs: &[PathBuf]) {
    let names: Vec<String> = plans.iter().map(|p| p.name.clone()).collect();
    let paths = inputs
        .iter()
        .filter(|p| p.extension().is_some_and(|e| e == "toml"));
    for (plan, path) in plans.iter_mut().zip(paths) {
        if names.iter().filter(|n| **n == plan.name).count() > 1
            && let Some(stem) = path.file_stem()
        {
            plan.name = stem.to_string_lossy().into_owned();
        }
    }
}

/// Returns the folder of a report: the one asked for, or one with the date.
fn folder(asked: Option<&Path>, now: SystemTime) -> PathBuf {
    let date = || show_utc(now).replace(':', "").replace('T', "-");
    asked.map_or_else(
        || PathBuf::from("reports").join(date().trim_end_matches('Z')),
        Path::to_path_buf,
    )
}

/// Adds what belongs to a report: its date, host, hit curves, and the runs that were kept beside it.
fn complete(report: &mut Report, profile: Option<Profile>, now: SystemTime, beside: Option<&Path>) {
    report.generated = show_utc(now);
    if report.host.is_empty() {
        report.host = host::describe();
    }
    if let Some(profile) = &profile {
        let best = report
            .plans
            .iter()
            .filter_map(|p| p.placement.as_ref())
            .find(|p| p.layers.iter().any(|l| l.slots > 0));
        report.curves = curves(profile, &best.into_iter().collect::<Vec<_>>());
    }
    report.profile = profile;
    if let Some(beside) = beside {
        let (history, unread) = report::history::read(beside);
        report.history = history;
        if unread > 0 {
            report.notes.push(format!(
                "{unread} run records of earlier reports could not be read and are left out."
            ));
        }
    }
    report.add_own_runs();
}

/// Completes a report, writes it, and prints where it is.
///
/// # Errors
/// When a folder or file cannot be written.
fn finish(
    mut report: Report,
    profile: Option<Profile>,
    outputs: Outputs<'_>,
    as_json: bool,
) -> Result<()> {
    let now = SystemTime::now();
    let folder = outputs.folder(now);
    let beside = folder.as_deref().map(|folder| {
        let parent = folder.parent().filter(|p| !p.as_os_str().is_empty());
        parent.unwrap_or(Path::new("."))
    });
    let beside_reports = beside.is_some();
    complete(&mut report, profile, now, beside);
    report::clean(&mut report)?;
    let mut written = Vec::new();
    if let Some(folder) = folder {
        written.push(("report", report::write(&folder, &report)?));
    }
    if let Some(html) = outputs.html {
        safely::write(html, report::shared_page(&report)?.as_bytes())?;
        written.push(("html", html.to_path_buf()));
    }
    if as_json {
        let mut value: serde_json::Value = serde_json::from_str(&report::summary_json(&report)?)?;
        for (key, path) in &written {
            value[key] = path_json(path);
        }
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    let groups = report::groups(&report);
    for (at, group) in groups.iter().enumerate() {
        if groups.len() > 1 {
            let gap = if at > 0 { "\n" } else { "" };
            println!("{gap}{}:", printable(&group.heading()));
        }
        table(&group.report.plans);
        within_line(&group.report.plans)
            .into_iter()
            .for_each(|line| println!("{line}"));
        for sentence in report::headline(&group.report) {
            println!("{sentence}");
        }
    }
    if let Some(history) = report::history_line(&report).filter(|_| beside_reports) {
        println!("{history}");
    }
    for (key, path) in written {
        println!("{key}: {}", path.display());
    }
    Ok(())
}
