//! `tier-plan what-if`: predicts a model on a machine from its shape and the machine's rates alone.

mod sweep;

use crate::catalogue::{self, Known};
use crate::cmd::args::{BudgetArgs, JsonArgs, KvArgs, ModelOrShape, check_position, context_of};
use crate::context::warn_beyond;
use crate::hub;
use crate::parallel::{self, check_texts};
use crate::print::digits;
use crate::printable::printable;
use crate::solve::time_limit;
use crate::whatif::purchase::{Purchase, purchases};
use crate::whatif::sweep::Range;
use crate::whatif::{Answer, Question, Supposed, answer_supposing, as_json, bound, purchases_json};
use anyhow::{Result, ensure};
use clap::Args;
use serde_json::{Value, json};
use std::path::PathBuf;
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::machine::Machine;
use tier_plan_runtime::formats::profile::Profile;
use tier_plan_runtime::formats::{profile, safely};
use tier_plan_runtime::units::show_bytes;

/// Options of `tier-plan what-if`.
#[derive(Debug, Args)]
#[command(
    about = "Predict speed and cost from a model's shape or header and a machine file; needs neither weights nor the machine",
    after_long_help = "Example:\n  tier-plan what-if kimi-k2.5 -M optane-768\n  \
                       tier-plan what-if hf:OWNER/REPO:Q4_K_M      # on this machine; fetches no weights\n  \
                       tier-plan what-if glm-4.5-air -M desktop-4090-ddr5-nvme --sweep dram=16GiB..96GiB -o sweep"
)]
pub struct WhatIfArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelOrShape,
    /// Machine file, or the name of a bundled machine (optane-768); repeatable [default: this
    /// machine, by machine.toml in the current folder or a short measurement]
    #[arg(
        short = 'M',
        short_alias = 'm',
        long,
        value_name = "FILE",
        help_heading = "Machine"
    )]
    pub machine: Vec<PathBuf>,
    /// Profile of expert use [default: the range over three kinds of routing]
    #[arg(
        short = 'P',
        short_alias = 'p',
        long,
        value_name = "FILE",
        help_heading = "Model"
    )]
    pub profile: Option<PathBuf>,
    /// Context length to plan the KV cache for; 0 is the model's training context
    #[arg(
        short,
        long,
        visible_alias = "ctx-size",
        alias = "ctx",
        value_name = "N",
        default_value_t = 4096,
        help_heading = "Prediction"
    )]
    pub context: u32,
    /// Texts at once to plan the KV cache for
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        help_heading = "Prediction"
    )]
    pub parallel: u32,
    /// Position in the context to plan and predict for [default: half of the context]
    #[arg(long, value_name = "POSITION", help_heading = "Prediction")]
    pub at: Option<u32>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub kv: KvArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub budget: BudgetArgs,
    /// Predict for a tier of one size after another, such as dram=64GiB..512GiB:8
    #[arg(
        long,
        value_name = "TIER=FROM..TO[:STEPS]",
        help_heading = "Prediction"
    )]
    pub sweep: Option<String>,
    /// Folder for the table and chart of a sweep
    #[arg(short, long, value_name = "FOLDER", help_heading = "Output")]
    pub output: Option<PathBuf>,
    /// Time limit per plan, in seconds
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 10.0,
        help_heading = "Prediction"
    )]
    pub time_limit: f64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

/// Checked options, with the files that they name.
struct WhatIfOptions {
    model: Known,
    machines: Vec<Machine>,
    /// `[machines]` budgets of the tiers in bytes.
    budgets: Vec<Vec<u64>>,
    profile: Option<Profile>,
    context: u32,
    sequences: u32,
    at: Option<u32>,
    kv_type: KvType,
    range: Option<Range>,
    time_limit_s: f64,
}

impl WhatIfOptions {
    /// Checks the options before any plan is made.
    fn from_args(args: &WhatIfArgs) -> Result<Self> {
        let range = args.sweep.as_deref().map(Range::parse).transpose()?;
        let n_machines = args.machine.len();
        ensure!(
            range.is_none() || n_machines <= 1,
            "--machine: {n_machines} machines, expected one with --sweep"
        );
        ensure!(
            range.is_some() || args.output.is_none(),
            "--output: no sweep to write, expected --sweep too"
        );
        if let Some(folder) = &args.output {
            safely::check_folder(folder)?;
            if folder.exists() {
                sweep::FILES
                    .iter()
                    .try_for_each(|name| safely::check(&folder.join(name)))?;
            }
        }
        let time_limit_s = time_limit(args.time_limit)?;
        let model = catalogue::model(args.model.path()?, args.model.quant.as_deref())?;
        let context = context_of(args.context, &model.sizes);
        check_position(args.at, context)?;
        warn_beyond(context.into(), model.longest_context);
        let sequences = check_texts("--parallel", args.parallel, context)?;
        let machines = machines(&args.machine)?;
        let mut profile = args.profile.as_deref().map(profile::read).transpose()?;
        if let (Some(profile), Some(path)) = (&mut profile, &args.profile) {
            match &model.shape {
                None => profile.check_model(&model.sizes.id, path)?,
                // Routing is independent of quantization; layers and experts are still compared.
                Some(_) => profile.model = model.sizes.id.clone(),
            }
        }
        let budgets = machines
            .iter()
            .map(|machine| args.budget.bytes(machine))
            .collect::<Result<Vec<_>>>()?;
        let (at, kv_type) = (args.at, args.kv.checked()?.unwrap_or_default());
        Ok(Self {
            model,
            machines,
            budgets,
            profile,
            context,
            sequences,
            at,
            kv_type,
            range,
            time_limit_s,
        })
    }

    /// Returns one question per machine.
    fn questions(&self) -> Vec<Question<'_>> {
        let question = |(machine, budgets): (_, &Vec<u64>)| Question {
            known: &self.model,
            machine,
            budgets: budgets.clone(),
            profile: self.profile.as_ref(),
            context: self.context,
            sequences: self.sequences,
            at: self.at,
            kv_type: self.kv_type,
            time_limit_s: self.time_limit_s,
        };
        self.machines
            .iter()
            .zip(&self.budgets)
            .map(question)
            .collect()
    }
}

/// Returns the machines that are named, or this one.
fn machines(named: &[PathBuf]) -> Result<Vec<Machine>> {
    if named.is_empty() {
        let folder = hub::folder().unwrap_or_else(|| PathBuf::from("."));
        return Ok(hub::this_machine(&folder, true)?.into_iter().collect());
    }
    named.iter().map(|m| catalogue::machine(m)).collect()
}

/// Runs the command.
///
/// # Errors
/// When an option is invalid, a file cannot be read or written, or the model cannot be loaded.
pub fn run(args: &WhatIfArgs) -> Result<()> {
    let options = WhatIfOptions::from_args(args)?;
    let (known, questions) = (&options.model, options.questions());
    if let (Some(range), Some(question)) = (&options.range, questions.first()) {
        return sweep::run(args, question, range);
    }
    let (mut answers, mut bought) = (Vec::new(), Vec::new());
    for question in &questions {
        let asked = Supposed::new(question).and_then(|supposed| {
            let answer = answer_supposing(question, &supposed)?;
            let bought = purchases(question, &answer, &supposed);
            Ok((answer, bought))
        });
        let (answer, of_tiers) = match asked {
            Ok((answer, of_tiers)) => (Ok(answer), of_tiers),
            Err(error) => (Err(error), Vec::new()),
        };
        answers.push(answer);
        bought.push(of_tiers);
    }
    if args.format.json {
        let mut values: Vec<Value> = questions
            .iter()
            .zip(&answers)
            .map(|(q, a)| as_json(q, a))
            .collect();
        for (value, bought) in values.iter_mut().zip(&bought) {
            value["notes"] = json!(known.notes());
            value["purchases"] = purchases_json(bought);
        }
        let value = if values.len() == 1 {
            values.remove(0)
        } else {
            json!({ "answers": values })
        };
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    for ((question, answer), bought) in questions.iter().zip(&answers).zip(&bought) {
        show(question, answer);
        if let Some(line) = next_purchase(bought) {
            println!("  {line}");
        }
        println!();
    }
    if questions.len() > 1 {
        table(&questions, &answers);
    }
    for note in known.notes() {
        println!("note: {note}");
    }
    Ok(())
}

fn show(question: &Question<'_>, answer: &Result<Answer>) {
    let (sizes, machine) = (&question.known.sizes, question.machine);
    println!(
        "{} on {} ({}), context {}",
        printable(&sizes.id.name),
        printable(&machine.name),
        printable(&machine.description),
        question.context
    );
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => {
            println!("  no plan: {error:#}");
            return;
        }
    };
    let Some(middle) = answer.middle() else {
        return;
    };
    let [speed, low, high] = answer.decode_tok_s();
    let emulated = if machine.tiers.iter().any(|t| t.emulated) {
        ", emulated tiers"
    } else {
        ""
    };
    let cases: Vec<String> = answer
        .cases
        .iter()
        .map(|c| format!("{} {}", c.routing, digits(c.decode_tok_s())))
        .collect();
    if answer.cases.len() > 1 {
        println!(
            "  predicted decode: {} tok/s ({} to {}; by routing: {}){emulated}",
            digits(speed),
            digits(low),
            digits(high),
            cases.join(", ")
        );
    } else {
        println!(
            "  predicted decode: {} tok/s ({}){emulated}",
            digits(speed),
            middle.routing
        );
    }
    if !middle.steps.is_empty() {
        println!(
            "  predicted for several texts at once ({}):",
            middle.routing
        );
        let rows = parallel::table(&middle.steps);
        rows.iter().for_each(|row| println!("  {row}"));
    }
    let (plan, bound) = (&middle.plan, bound(&middle.plan));
    let gap = plan.solver.gap.map_or("nothing proven".to_string(), |gap| {
        format!("proven gap {:.3} %", gap * 100.0)
    });
    println!(
        "  plan: {}, {gap} ({})",
        plan.solver.status, plan.solver.backend
    );
    println!(
        "  bound by {}: {:.1} ms per token, {:.0} % of its time{}",
        bound.by,
        bound.seconds * 1e3,
        bound.share * 100.0,
        if plan.tiers.len() > 1 {
            " (tiers overlap)"
        } else {
            ""
        }
    );
    let prompt = digits(plan.predicted.prompt_tok_s);
    if plan.predicted.prompt_gflops.is_empty() {
        println!(
            "  predicted prompt limit: {prompt} tok/s (reads alone: the machine file has no prompt_gflops)"
        );
    } else {
        println!(
            "  predicted prompt: {prompt} tok/s (the longer of reads and products, step by step)"
        );
    }
    println!(
        "  keys and values ({}): {:.2} ms of a token that looks back at {} positions",
        plan.kv_type,
        plan.predicted.kv_s * 1e3,
        plan.predicted.at
    );
    for (at, tier) in plan.tiers.enumerate() {
        println!(
            "  {:<8} {:>9} of {:>9} used, {:>8} read per token at {} GB/s",
            printable(&tier.tier.name),
            show_bytes(tier.used_bytes()),
            show_bytes(tier.budget_bytes),
            show_bytes(plan.predicted.read_bytes.get(at).map_or(0, |b| *b as u64)),
            digits(tier.tier.read_gbps)
        );
    }
    match answer.load_s {
        Some(seconds) => println!("  loading: {} s", digits(seconds)),
        None => println!("  loading: the machine file has no load_gbps"),
    }
    if let (Some(watts), Some(joules)) = (answer.watts, answer.joules_per_token()) {
        println!("  power: {watts:.0} W, {} J per token", digits(joules));
    }
    if let (Some(price), Some(each)) = (answer.price_usd, answer.tok_s_per_1000_usd()) {
        println!(
            "  price: ${price:.0}, {} tok/s for each $1000",
            digits(each)
        );
    }
    for note in middle.notes.iter().filter(|n| !n.starts_with("no profile")) {
        println!("  note: {note}");
    }
}

/// Returns a sentence on the best purchase; `None` if no price is known.
fn next_purchase(bought: &[Purchase]) -> Option<String> {
    let best = bought.first()?;
    if !best.helps() {
        return Some(format!(
            "next purchase: ${:.0} more of any tier with a price gain less than 1 %, predicted: what bounds it is elsewhere",
            best.usd
        ));
    }
    let gain = |p: &Purchase| format!("{} tok/s", digits(p.tok_s));
    let others: Vec<String> = bought[1..]
        .iter()
        .map(|p| format!("{} {}", p.tier, gain(p)))
        .collect();
    let others = if others.is_empty() {
        String::new()
    } else {
        format!("; the same on {}", others.join(", "))
    };
    Some(format!(
        "next purchase: {} more of {} for ${:.0}: {} predicted, before {}{others}",
        show_bytes(best.bytes),
        best.tier,
        best.usd,
        gain(best),
        digits(best.before_tok_s)
    ))
}

fn table(questions: &[Question<'_>], answers: &[Result<Answer>]) {
    println!("predicted:");
    println!(
        "{:<24} {:>7} {:>15} {:>9} {:>12} {:>8} {:>10} {:>11}",
        "machine", "tok/s", "range", "gap", "bound by", "J/token", "price", "tok/s/$1000"
    );
    for (question, answer) in questions.iter().zip(answers) {
        let name = &question.machine.name;
        let Some((answer, middle)) = answer.as_ref().ok().and_then(|a| Some((a, a.middle()?)))
        else {
            println!("{name:<24} {:>7}", "no plan");
            continue;
        };
        let [speed, low, high] = answer.decode_tok_s();
        let show = |value: Option<f64>| value.map_or("-".to_string(), digits);
        println!(
            "{name:<24} {:>7} {:>15} {:>9} {:>12} {:>8} {:>10} {:>11}",
            digits(speed),
            format!("{} to {}", digits(low), digits(high)),
            middle
                .plan
                .solver
                .gap
                .map_or("-".to_string(), |g| format!("{:.3} %", g * 100.0)),
            bound(&middle.plan).by,
            show(answer.joules_per_token()),
            answer
                .price_usd
                .map_or("-".to_string(), |p| format!("${p:.0}")),
            show(answer.tok_s_per_1000_usd())
        );
    }
    println!();
}
