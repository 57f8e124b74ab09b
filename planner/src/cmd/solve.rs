//! `tier-plan solve`: computes where every tensor should live, and writes the plan.

use super::profile::skew_json;
use crate::catalogue;
use crate::catalogue::Known;
use crate::cmd::args::{BudgetArgs, JsonArgs, KvArgs, ModelOrShape, check_position, context_of};
use crate::context::warn_beyond;
use crate::cost::steps::{Predictor, StepPrediction};
use crate::json::{path_json, tier_json};
use crate::parallel::{self, check_texts};
use crate::print::digits;
use crate::printable::printable;
use crate::profile::Evidence;
use crate::profile::stats::{Skew, skews};
use crate::solve::problem::constraints::Constraints;
use crate::solve::{Options, Problem, Solution, options, policy, solve, time_limit};
use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use std::path::PathBuf;
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::machine::Machine;
use tier_plan_runtime::formats::placement::{Placement, SlotPolicy};
use tier_plan_runtime::formats::profile::Profile;
use tier_plan_runtime::formats::safely::NewFolders;
use tier_plan_runtime::formats::{profile, safely};
use tier_plan_runtime::units::show_bytes;

/// Options of `tier-plan solve`.
#[derive(Debug, Args)]
#[command(
    about = "Compute where every tensor should live, and write placement.toml",
    after_long_help = "Example:\n  tier-plan solve MODEL.gguf -P MODEL.profile -M machine.toml --dram 3.4GiB -c 4096\n  \
                       tier-plan solve kimi-k2.5 -M optane-768 --fix vram:attention --objective cost"
)]
pub struct SolveArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelOrShape,
    /// Profile of the model [default: uniform access is assumed]
    #[arg(
        short = 'P',
        short_alias = 'p',
        long,
        value_name = "FILE",
        help_heading = "Model"
    )]
    pub profile: Option<PathBuf>,
    /// Machine file, or the name of a bundled machine
    #[arg(
        short = 'M',
        short_alias = 'm',
        long,
        value_name = "FILE",
        help_heading = "Machine"
    )]
    pub machine: PathBuf,
    /// Plan to write
    #[arg(
        short,
        long,
        value_name = "FILE",
        default_value = "placement.toml",
        help_heading = "Output"
    )]
    pub output: PathBuf,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub budget: BudgetArgs,
    /// Context length to plan the KV cache for; 0 is the model's training context
    #[arg(
        short,
        long,
        visible_alias = "ctx-size",
        alias = "ctx",
        value_name = "N",
        default_value_t = 1024,
        help_heading = "Memory"
    )]
    pub context: u32,
    /// Texts at once to plan the KV cache for [default: 1, or --batch]
    #[arg(long, value_name = "N", help_heading = "Memory")]
    pub parallel: Option<u32>,
    /// Position in the context to plan and predict for [default: half of the context]
    #[arg(long, value_name = "POSITION", help_heading = "Solver")]
    pub at: Option<u32>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub kv: KvArgs,
    /// Kind of plan to make
    #[arg(long, value_enum, default_value_t = Strategy::Optimal, help_heading = "Solver")]
    pub strategy: Strategy,
    /// Slot replacement policy; auto takes lru unless another one is faster on held-out prompts
    #[arg(long, value_enum, default_value_t = Policy::Auto, help_heading = "Solver")]
    pub policy: Policy,
    /// Quantity to minimize
    #[arg(long, value_enum, default_value_t = Objective::Latency, help_heading = "Solver")]
    pub objective: Objective,
    /// Sequences decoded together, for --objective throughput
    #[arg(long, value_name = "B", help_heading = "Solver")]
    pub batch: Option<u32>,
    /// Solver of the integer program where the heuristics do not meet the bound
    #[arg(long, value_enum, default_value_t = Backend::Microlp, help_heading = "Solver")]
    pub backend: Backend,
    /// Tokens per second to reach; --objective memory finds the least memory that does
    #[arg(long, value_name = "X", help_heading = "Solver")]
    pub target_tok_s: Option<f64>,
    /// Fix a tensor group to a tier, such as vram:attention or vram:experts:3-5:0-15; repeatable
    ///
    /// GROUP is attention, router, shared_expert, dense_ffn, embedding, token_table, head, cache, or experts.
    /// `experts` may be left out before numbers: `vram:3-5:0-15`. Experts fixed to the last tier
    /// are never pinned.
    #[arg(
        long,
        value_name = "TIER:GROUP[:LAYERS[:EXPERTS]]",
        value_delimiter = ' ',
        help_heading = "Solver"
    )]
    pub fix: Vec<String>,
    /// Keep a tensor group off a tier, such as cxl:experts:0-3 (no pins, no slots); repeatable
    #[arg(
        long,
        value_name = "TIER:GROUP[:LAYERS[:EXPERTS]]",
        value_delimiter = ' ',
        help_heading = "Solver"
    )]
    pub forbid: Vec<String>,
    /// Do not stream experts from main memory to a GPU for decoded tokens
    #[arg(long, help_heading = "Solver")]
    pub no_streaming: bool,
    /// Also write the plan of each baseline into this folder
    #[arg(long, value_name = "FOLDER", help_heading = "Output")]
    pub baselines: Option<PathBuf>,
    /// Time limit of the search, in seconds
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 10.0,
        help_heading = "Solver"
    )]
    pub time_limit: f64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

/// Kind of plan, as the command line spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Strategy {
    /// Integer program
    Optimal,
    /// Equal number of experts in every layer, chosen without a profile
    Uniform,
    /// Most used experts first, over all layers
    FrequencyFirst,
    /// No pins, slots only
    LruOnly,
    /// llama.cpp's rule: the experts of the first layers stay on the CPU
    FirstLayersCpu,
}

/// Slot replacement policy, as the command line spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    /// Policy with the most replayed hits, layer by layer
    Auto,
    /// Evict the least recently used expert
    Lru,
    /// Evict the least frequently used expert, with uses that decay
    Lfu,
    /// Evict by a learned mix of long-term and recent uses
    Adaptive,
}

/// Solver of the integer program, as the command line spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// microlp, in pure Rust
    Microlp,
    /// HiGHS
    #[cfg(feature = "highs")]
    Highs,
}

/// Quantity that a plan minimizes, as the command line spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Objective {
    /// Time of a decoded token
    Latency,
    /// Time per token when --batch sequences are decoded together
    Throughput,
    /// Price of one token per second: the memory used and the rest of the machine
    Cost,
    /// Energy per token; latency in another unit, since machine files have one power
    Energy,
    /// Memory above the last tier, by price if tiers have prices, that still reaches --target-tok-s
    Memory,
}

impl From<Strategy> for options::Strategy {
    fn from(value: Strategy) -> Self {
        match value {
            Strategy::Optimal => options::Strategy::Optimal,
            Strategy::Uniform => options::Strategy::Uniform,
            Strategy::FrequencyFirst => options::Strategy::FrequencyFirst,
            Strategy::LruOnly => options::Strategy::LruOnly,
            Strategy::FirstLayersCpu => options::Strategy::FirstLayersCpu,
        }
    }
}

impl From<Policy> for options::Policy {
    fn from(value: Policy) -> Self {
        match value {
            Policy::Auto => options::Policy::Auto,
            Policy::Lru => options::Policy::Lru,
            Policy::Lfu => options::Policy::Lfu,
            Policy::Adaptive => options::Policy::Adaptive,
        }
    }
}

impl From<Backend> for options::Backend {
    fn from(value: Backend) -> Self {
        match value {
            Backend::Microlp => options::Backend::Microlp,
            #[cfg(feature = "highs")]
            Backend::Highs => options::Backend::Highs,
        }
    }
}

impl From<Objective> for options::Objective {
    fn from(value: Objective) -> Self {
        match value {
            Objective::Latency => options::Objective::Latency,
            Objective::Throughput => options::Objective::Throughput,
            Objective::Cost => options::Objective::Cost,
            Objective::Energy => options::Objective::Energy,
            Objective::Memory => options::Objective::Memory,
        }
    }
}

/// Checked options, with the files that they name.
struct SolveOptions {
    model: Known,
    profile: Option<Profile>,
    machine: Machine,
    /// `[tiers]` budgets in bytes.
    budgets: Vec<u64>,
    context: u32,
    sequences: u32,
    kv_type: KvType,
    solver: Options,
}

impl SolveOptions {
    /// Checks the options before any plan is made.
    fn from_args(args: &SolveArgs) -> Result<Self> {
        let machine = catalogue::machine_for(&args.machine, args.model.path()?)?;
        let budgets = args.budget.bytes(&machine)?;
        let model = catalogue::model(args.model.path()?, args.model.quant.as_deref())?;
        let context = context_of(args.context, &model.sizes);
        check_position(args.at, context)?;
        warn_beyond(context.into(), model.longest_context);
        let sequences = match (args.parallel, args.batch) {
            (Some(texts), _) => check_texts("--parallel", texts, context)?,
            (None, Some(batch)) => check_texts("--batch", batch, context)?,
            (None, None) => 1,
        };
        let profile = args.profile.as_deref().map(profile::read).transpose()?;
        if let (Some(profile), Some(path)) = (&profile, &args.profile) {
            profile.check_model(&model.sizes.id, path)?;
        }
        let solver = Options {
            strategy: args.strategy.into(),
            policy: args.policy.into(),
            depth: crate::solve::options::Depth::Full,
            time_limit_s: time_limit(args.time_limit)?,
            objective: args.objective.into(),
            batch: args.batch,
            backend: args.backend.into(),
            target_tok_s: args.target_tok_s,
            constraints: Constraints::parse(&args.fix, &args.forbid, &model.sizes, &machine)?,
            streaming: !args.no_streaming,
        };
        ensure!(
            args.strategy == Strategy::Optimal || solver.constraints.is_empty(),
            "--fix and --forbid: a baseline cannot follow them, expected --strategy optimal"
        );
        safely::check(&args.output)?;
        if let Some(folder) = &args.baselines {
            safely::check_folder(folder).context("--baselines")?;
        }
        let kv_type = args.kv.checked()?.unwrap_or_default();
        Ok(Self {
            model,
            profile,
            machine,
            budgets,
            context,
            sequences,
            kv_type,
            solver,
        })
    }
}

/// Runs the command.
///
/// # Errors
/// When an option is invalid, a file cannot be read or written, or the model cannot be loaded.
pub fn run(args: &SolveArgs) -> Result<()> {
    let options = SolveOptions::from_args(args)?;
    let (shape, profile) = (&options.model.sizes, options.profile.as_ref());
    let problem = Problem {
        shape,
        profile,
        machine: &options.machine,
        budgets: options.budgets,
        context: options.context,
        sequences: options.sequences,
        kv_type: options.kv_type,
        position: args.at,
    };
    let mut solved = solve(&problem, &options.solver)?;
    solved.notes.splice(0..0, options.model.notes());
    let skews = profile.map(skews).transpose()?.unwrap_or_default();
    let steps = steps(&problem, &solved.plan)?;

    let _made = args
        .baselines
        .as_deref()
        .map(NewFolders::make)
        .transpose()?;
    solved.plan.write(&args.output)?;
    let mut written = Vec::new();
    if let Some(folder) = &args.baselines {
        for plan in &solved.baselines {
            let path = folder.join(format!("{}.toml", plan.name));
            plan.write(&path)?;
            written.push(path);
        }
    }
    if args.format.json {
        let mut value = as_json(args, &solved, &skews, &written);
        value["parallel"] = parallel::as_json(&steps);
        println!("{}", serde_json::to_string_pretty(&value)?);
    } else {
        print_text(&solved, &skews, &steps);
        println!("wrote {}", args.output.display());
        for path in &written {
            println!("wrote {}", path.display());
        }
    }
    Ok(())
}

/// Predicts steps of as many texts as the plan has room for; none where that is one.
fn steps(problem: &Problem<'_>, plan: &Placement) -> Result<Vec<StepPrediction>> {
    if plan.sequences == 1 {
        return Ok(Vec::new());
    }
    let evidence = Evidence::new(problem.shape, problem.profile)?;
    let predictor = Predictor {
        plan,
        shape: problem.shape,
        evidence: &evidence,
        at: plan.predicted.at,
    };
    Ok(parallel::predictions(&predictor, plan.sequences))
}

/// Returns the baselines from slowest to fastest, then the plan.
fn rows(solved: &Solution) -> Vec<&Placement> {
    let mut rows: Vec<&Placement> = solved
        .baselines
        .iter()
        .filter(|b| b.name != solved.plan.name)
        .collect();
    rows.sort_by(|a, b| {
        a.predicted
            .decode_tok_s
            .total_cmp(&b.predicted.decode_tok_s)
    });
    rows.push(&solved.plan);
    rows
}

fn print_text(solved: &Solution, skews: &[Skew], steps: &[StepPrediction]) {
    let plan = &solved.plan;
    let emulated = plan.tiers.iter().any(|t| t.tier.emulated);
    let (context, kv_type) = (plan.context, plan.kv_type);
    println!(
        "{} on {}, context {context}, keys and values {kv_type}{}",
        printable(&plan.model.name),
        printable(&plan.machine.name),
        match plan.sequences {
            1 => String::new(),
            n => format!(", {n} texts at once"),
        }
    );
    for tier in &plan.tiers {
        let label = if tier.tier.emulated {
            " (emulated)"
        } else {
            ""
        };
        println!(
            "  {}{label}: {} GB/s, budget {}",
            printable(&tier.tier.name),
            digits(tier.tier.read_gbps),
            show_bytes(tier.budget_bytes)
        );
    }
    println!();
    // Without a rate of products, prompts are predicted from reads alone.
    let prompt = if plan.predicted.prompt_gflops.is_empty() {
        "prompt limit"
    } else {
        "prompt tok/s"
    };
    let mut head = format!(
        "{:<18} {:>13} {:>13} {:>9}",
        "plan", "decode tok/s", prompt, "hit rate"
    );
    for tier in &plan.tiers {
        head += &format!(" {:>12}", printable(&tier.tier.name));
    }
    println!(
        "predicted, for tokens that look back at {} positions:",
        plan.predicted.at
    );
    println!("{head}");
    for row in rows(solved) {
        let predicted = &row.predicted;
        let mut line = format!(
            "{:<18} {:>13} {:>13} {:>8.1}%",
            printable(&row.name),
            speed(predicted.decode_tok_s),
            speed(predicted.prompt_tok_s),
            predicted.hit_rate * 100.0
        );
        for tier in &row.tiers {
            line += &format!(" {:>12}", show_bytes(tier.used_bytes()));
        }
        println!("{line}");
    }
    println!();
    let solver = &plan.solver;
    let gap = solver.gap.map_or("no proven bound".to_string(), |gap| {
        format!("proven gap {:.4} %", gap * 100.0)
    });
    let with_lru = plan
        .layers
        .iter()
        .all(|l| l.slots == 0 || l.policy == SlotPolicy::Lru);
    let of = if with_lru {
        ""
    } else {
        " of pins and slots with lru"
    };
    println!(
        "{}: {}, {gap}{of}, {:.2} s ({})",
        printable(&plan.name),
        solver.status,
        solver.solve_s,
        solver.backend
    );
    let other = solved.baselines.iter().filter(|b| b.name != plan.name);
    if let Some(best) = other.max_by(|a, b| {
        a.predicted
            .decode_tok_s
            .total_cmp(&b.predicted.decode_tok_s)
    }) {
        let times = plan.predicted.decode_tok_s / best.predicted.decode_tok_s;
        println!(
            "predicted {times:.3} × the best baseline ({}) at equal bytes",
            printable(&best.name)
        );
    }
    if let Some(ceiling) = solved.ceiling_hit_rate {
        println!(
            "hit rate {:.1} %; knowing the future, as many resident experts could reach {:.1} %",
            plan.predicted.hit_rate * 100.0,
            ceiling * 100.0
        );
    }
    if let Some(all) = skews.first() {
        println!("routing is {}", all.words());
    }
    if !steps.is_empty() {
        println!("predicted for several texts at once:");
        parallel::table(steps)
            .iter()
            .for_each(|row| println!("{row}"));
    }
    if let Some(goal) = &solver.goal {
        println!(
            "{}: {} {}, predicted",
            goal.objective,
            amount(goal.value),
            goal.unit
        );
    }
    for line in &solved.summary {
        println!("{line}");
    }
    for note in &solved.notes {
        println!("note: {note}");
    }
    if emulated {
        println!(
            "note: speeds are predicted for emulated tiers, whose rates are declared, not measured"
        );
    }
}

/// Formats a number with about five significant digits.
fn amount(value: f64) -> String {
    if value >= 1e7 || (value != 0.0 && value < 1e-3) {
        format!("{value:.4e}")
    } else {
        format!("{value:.5}")
    }
}

/// Formats tokens per second with about three significant digits.
fn speed(tok_s: f64) -> String {
    let digits = if tok_s < 10.0 {
        2
    } else {
        usize::from(tok_s < 100.0)
    };
    format!("{tok_s:.digits$}")
}

fn as_json(args: &SolveArgs, solved: &Solution, skews: &[Skew], written: &[PathBuf]) -> Value {
    let plan = |plan: &Placement| {
        json!({
            "name": plan.name,
            "predicted_decode_tok_s": plan.predicted.decode_tok_s,
            "predicted_prompt_tok_s": plan.predicted.prompt_tok_s,
            "hit_rate": plan.predicted.hit_rate,
            "status": plan.solver.status,
            "backend": plan.solver.backend,
            "objective_s": plan.solver.objective_s,
            "bound_s": plan.solver.bound_s,
            "gap": plan.solver.gap,
            "solve_s": plan.solver.solve_s,
            "policies": policy::summary(plan),
            "objective": plan.solver.goal.as_ref().map_or("latency", |g| g.objective.as_str()),
            "objective_value": plan.solver.goal.as_ref().map_or(plan.solver.objective_s, |g| g.value),
            "objective_unit": plan.solver.goal.as_ref().map_or("s", |g| g.unit.as_str()),
            "objective_bound": plan.solver.goal.as_ref().map_or(plan.solver.bound_s, |g| g.bound),
            "overhead_s": plan.predicted.overhead_s,
            "dense_s": plan.predicted.dense_s.as_slice(),
            "expert_s": plan.predicted.expert_s.as_slice(),
            "expert_critical_s": plan.predicted.expert_critical_s,
            "at": plan.predicted.at,
            "kv_s": plan.predicted.kv_s,
            "prompt_gflops": plan.predicted.prompt_gflops.as_slice(),
            "few_gflops": plan.predicted.few_gflops.as_slice(),
            "read_bytes": plan.predicted.read_bytes.as_slice(),
            "tiers": plan.tiers.iter().map(tier_json).collect::<Vec<_>>(),
        })
    };
    let mut value = plan(&solved.plan);
    let baselines: Vec<Value> = solved.baselines.iter().map(plan).collect();
    let skews: Vec<Value> = skews.iter().map(skew_json).collect();
    value["plan"] = path_json(&args.output);
    value["baselines"] = json!(baselines);
    value["baseline_plans"] = written.iter().map(path_json).collect();
    value["ceiling_hit_rate"] = json!(solved.ceiling_hit_rate);
    value["skew"] = json!(skews);
    value["notes"] = json!(solved.notes);
    value["verdict"] = json!(solved.summary);
    value
}
