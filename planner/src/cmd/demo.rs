//! `tier-plan demo`: takes the bundled model through every stage, with the commands that a user
//! would type.

use super::{compare, dispatch, parse_alone};
use crate::bundled;
use crate::cmd::args::{ThreadArgs, at_least_one};
use crate::export::llama_cpp;
use crate::interrupt::{Interrupted, interrupted};
use crate::profile::collect::Settings;
use crate::profile::prompts;
use crate::session::tokenizer;
use crate::trial::Trial;
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime};
use tier_plan_runtime::formats::placement;
use tier_plan_runtime::formats::profile::Split;
use tier_plan_runtime::formats::safely::{NewFolders, TemporaryFolder};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::units::show_utc;

/// Options of `tier-plan demo`.
#[derive(Debug, Args)]
#[command(
    about = "Take the bundled model through every stage and write a report",
    after_long_help = "Example:\n  tier-plan demo -o reports/demo"
)]
pub struct DemoArgs {
    /// Folder for the report, which must not exist [default: reports/DATE-demo]
    #[arg(short, long, value_name = "FOLDER", help_heading = "Output")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub threads: ThreadArgs,
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
}

/// Tokens that every plan must generate alike, greedily.
const GREEDY: usize = 48;

/// The start of the text that the demo prints.
const PROMPT: &str = "And it came to pass in those days";

/// Runs the command.
///
/// # Errors
/// When the folder exists, or a stage fails.
pub fn run(args: &DemoArgs) -> Result<()> {
    let n_predict = at_least_one("--n-predict", args.n_predict)?.to_string();
    let threads: Vec<String> = match args.threads.checked()? {
        Some(threads) => vec!["-t".to_string(), threads.to_string()],
        None => Vec::new(),
    };
    let started = Instant::now();
    let model = bundled::path("demo/demo.gguf")?;
    let machine = bundled::path("machines/demo-emulated.toml")?;
    let (output, parent) = new_folder(args.output.as_deref())?;
    let _made = NewFolders::make(&parent)
        .with_context(|| format!("making the folder {}", output.display()))?;
    let mut unfinished = TemporaryFolder::create(&parent)
        .with_context(|| format!("making the folder {}", output.display()))?;
    show_final_name(unfinished.path(), &output);
    let folder = unfinished.path();
    let folder = folder.strip_prefix(".").unwrap_or(folder).to_path_buf();
    let plans = folder.join("plans");
    std::fs::create_dir(&plans)
        .with_context(|| format!("making the folder {}", plans.display()))?;
    let shown = |path: &Path| shorter(path).display().to_string();
    let (model_s, machine_s, folder_s) = (shown(&model), shown(&machine), shown(&folder));
    let (profile_s, plans_s) = (
        format!("{folder_s}/demo.profile"),
        format!("{folder_s}/plans"),
    );
    let optimal_s = format!("{plans_s}/optimal.toml");

    say(
        1,
        "What the model holds: most of its bytes are experts, and a token reads few of them.",
    );
    command(&["inspect", &model_s], &[])?;

    say(
        2,
        "Which experts it really uses: run calibration prompts of four domains and record every token's choice.",
    );
    command(&["profile", &model_s, "-o", &profile_s], &threads)?;

    say(
        3,
        "Where everything should live: an integer program over three tiers too small for the model, and four \
         baselines given the same bytes.",
    );
    let solve = [
        "solve", &model_s, "-P", &profile_s, "-M", &machine_s, "-c", "512", "-o", &optimal_s,
    ];
    command(&[&solve[..], &["--baselines", &plans_s]].concat(), &[])?;

    say(
        4,
        "Text from the plan: pinned experts stay, the others pass through slots, the rest is read from the file.",
    );
    let run = [
        "run", &model_s, "--plan", &optimal_s, "-p", PROMPT, "-n", "48", "--temp", "0.8", "--seed",
        "3",
    ];
    command(&[&run[..], &["--stats"]].concat(), &threads)?;
    if interrupted() {
        return Err(Interrupted.into());
    }

    let inputs = plan_files(&plans, &plans.join("optimal.toml"))?;
    say(
        5,
        "All plans side by side, on prompts that no plan was made from.",
    );
    same_text(&model, &inputs, args.threads.threads)?;
    let inputs: Vec<String> = inputs.iter().map(|plan| shown(plan)).collect();
    let compare = [
        &["compare"][..],
        &inputs.iter().map(String::as_str).collect::<Vec<_>>(),
        &[
            "-m",
            &model_s,
            "-P",
            &profile_s,
            "-n",
            &n_predict,
            "-o",
            &format!("{folder_s}/report"),
        ],
    ];
    command(&compare.concat(), &threads)?;
    let named = unfinished.publish(&output);
    ensure!(
        named.with_context(|| output.display().to_string())?,
        "--output: {} exists by now, expected a new folder",
        output.display()
    );
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

/// Prints a command line, and runs it without regard to environment variables.
fn command(line: &[&str], more: &[String]) -> Result<()> {
    let line: Vec<&str> = line
        .iter()
        .copied()
        .chain(more.iter().map(String::as_str))
        .collect();
    let quoted: Vec<String> = line.iter().map(|arg| llama_cpp::quoted(arg)).collect();
    println!("$ tier-plan {}\n", quoted.join(" "));
    dispatch(parse_alone(
        std::iter::once("tier-plan").chain(line).map(Into::into),
    )?)
}

/// Returns the path relative to the current folder if it is inside.
fn shorter(path: &Path) -> &Path {
    std::env::current_dir()
        .ok()
        .and_then(|here| path.strip_prefix(here).ok())
        .unwrap_or(path)
}

/// Returns the folder asked for, which must not exist, or a new dated one, and the folder above it.
fn new_folder(asked: Option<&Path>) -> Result<(PathBuf, PathBuf)> {
    let parent = |folder: &Path| match folder.parent() {
        Some(above) if !above.as_os_str().is_empty() => above.to_path_buf(),
        _ => PathBuf::from("."),
    };
    // Whatever has the name, even a link that leads nowhere.
    let is_free = |folder: &Path| folder.symlink_metadata().is_err();
    if let Some(folder) = asked {
        ensure!(
            is_free(folder),
            "--output: {} exists, expected a new folder",
            folder.display()
        );
        return Ok((folder.to_path_buf(), parent(folder)));
    }
    let now = show_utc(SystemTime::now())
        .replace(':', "")
        .replace('T', "-");
    let base = format!("reports/{}-demo", now.trim_end_matches('Z'));
    let names = std::iter::once(base.clone()).chain((2..1000).map(|n| format!("{base}-{n}")));
    let free = names.map(PathBuf::from).find(|folder| is_free(folder));
    let folder = free.with_context(|| format!("no free name like {base}"))?;
    Ok((folder.clone(), parent(&folder)))
}

/// Prints the final name of the output for its temporary one.
fn show_final_name(unfinished: &Path, output: &Path) {
    let name = |path: &Path| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    };
    crate::print::show_final_name(&name(unfinished), &name(output));
}

/// Returns the plans written by `solve`, the optimal one first.
fn plan_files(folder: &Path, optimal: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("listing {}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| p != optimal)
        .collect();
    files.sort();
    files.insert(0, optimal.to_path_buf());
    Ok(files)
}

/// Checks that every plan continues a prompt with the same most likely tokens: placement changes
/// speed, never tokens.
fn same_text(model: &Path, plans: &[PathBuf], threads: Option<usize>) -> Result<()> {
    let gguf = Arc::new(Gguf::open(model)?);
    let tokenizer = tokenizer(&gguf)?;
    let mut prompts = prompts::read(&bundled::path("prompts")?)?;
    prompts.retain(|p| p.split == Split::HeldOut);
    let settings = Settings {
        decode_tokens: GREEDY as u32,
        ..compare::SETTINGS
    };
    let trial = Trial {
        gguf,
        tokenizer: &tokenizer,
        prompts,
        settings,
        threads,
        profile: None,
    };
    let mut expected = None;
    for path in plans {
        let plan = placement::read(path)?;
        let tokens = trial.greedy(&plan, GREEDY)?;
        match &expected {
            None => expected = Some(tokens),
            Some(first) if *first != tokens => {
                bail!(
                    "plan '{}' generates another text than the others; placement must not change tokens",
                    plan.name
                )
            }
            Some(_) => {}
        }
    }
    println!(
        "greedy text of {GREEDY} tokens: the same, token for token, under all {} plans",
        plans.len()
    );
    Ok(())
}
