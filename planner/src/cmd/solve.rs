//! `tier-plan solve`: finds where every tensor should live and writes the plan.

use super::profile::skew_json;
use crate::catalogue;
use crate::cli::{SolveArgs, Strategy};
use crate::cost::move_to;
use crate::profile::Evidence;
use crate::profile::stats::{Skew, skews};
use crate::solve::wishes::Wishes;
use crate::solve::{Inputs, Options, Solved, policy, solve_all, time_limit};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use tier_plan_runtime::formats::machine::Machine;
use tier_plan_runtime::formats::placement::{Placement, SlotPolicy};
use tier_plan_runtime::formats::{profile, safely};
use tier_plan_runtime::units::{parse_bytes, show_bytes};

/// Runs it.
pub fn run(args: &SolveArgs) -> Result<()> {
    let machine = catalogue::machine(&args.machine)?;
    ensure!(args.context > 0, "--context 0 holds no text; give 1 or more");
    check_at(args.at, args.context)?;
    let budgets = budgets(&args.budget, args.vram.as_deref(), args.dram.as_deref(), &machine)?;
    let known = catalogue::model(&args.model, args.quant.as_deref())?;
    let shape = &known.sizes;
    let profile = args.profile.as_deref().map(profile::read).transpose()?;
    if let (Some(profile), Some(path)) = (&profile, &args.profile) {
        profile.check_model(&shape.id, path)?;
    }
    let options = Options {
        strategy: args.strategy,
        time_limit_s: time_limit(args.time_limit)?,
        objective: args.objective,
        batch: args.batch,
        backend: args.backend,
        target_tok_s: args.target_tok_s,
        wishes: Wishes::parse(&args.fix, &args.forbid, shape, &machine)?,
    };
    ensure!(
        options.strategy == Strategy::Optimal || options.wishes.is_empty(),
        "--fix and --forbid are for --strategy optimal; the rules know nothing of them"
    );
    safely::check(&args.output)?;
    let inputs = Inputs {
        shape,
        profile: profile.as_ref(),
        machine: &machine,
        budgets,
        context: args.context,
        kv_type: args.kv_type,
    };
    let mut solved = solve_all(&inputs, &options)?;
    if let Some(policy) = policy::wanted(args.policy, args.strategy) {
        let evidence = Evidence::new(shape, profile.as_ref())?;
        solved.notes.extend(policy::refill(&mut solved.plan, &inputs, &evidence, policy)?);
    }
    solved.notes.splice(0..0, known.notes());
    if let Some(at) = args.at {
        std::iter::once(&mut solved.plan).chain(&mut solved.baselines).for_each(|plan| move_to(plan, shape, at));
    }
    let skews = profile.as_ref().map(skews).transpose()?.unwrap_or_default();

    if let Some(folder) = &args.baselines {
        fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    }
    solved.plan.write(&args.output)?;
    let mut written = Vec::new();
    if let Some(folder) = &args.baselines {
        for plan in &solved.baselines {
            let path = folder.join(format!("{}.toml", plan.name));
            plan.write(&path)?;
            written.push(path);
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&as_json(args, &solved, &skews, &written))?);
    } else {
        print_text(args, &solved, &skews, &written);
    }
    Ok(())
}

/// A place in the text that `--at` may name.
pub(super) fn check_at(at: Option<u32>, context: u32) -> Result<()> {
    let fits = at.is_none_or(|at| (1..=context).contains(&at));
    ensure!(fits, "--at {}: give 1 to {context}, the --context that is planned for", at.unwrap_or(0));
    Ok(())
}

/// Bytes the plan may use of each tier.
pub(super) fn budgets(flags: &[String], vram: Option<&str>, dram: Option<&str>, machine: &Machine) -> Result<Vec<u64>> {
    let mut asked: Vec<(String, &str, String)> = Vec::new();
    for text in flags {
        let Some((name, size)) = text.split_once('=') else {
            bail!("--budget {text}: write TIER=SIZE, like dram=11GiB");
        };
        asked.push((name.trim().to_string(), size, format!("--budget {text}")));
    }
    for (name, size) in [("vram", vram), ("dram", dram)] {
        if let Some(size) = size {
            asked.push((name.to_string(), size, format!("--{name} {size}")));
        }
    }
    let mut budgets: Vec<Option<u64>> = vec![None; machine.tiers.len()];
    for (name, size, flag) in asked {
        let Some(at) = machine.tiers.iter().position(|t| t.name == name) else {
            let names: Vec<&str> = machine.tiers.iter().map(|t| t.name.as_str()).collect();
            bail!("{flag}: machine '{}' has no tier '{name}'; its tiers are {}", machine.name, names.join(", "));
        };
        let bytes = parse_bytes(size).with_context(|| flag.clone())?;
        let capacity = machine.tiers[at].capacity_bytes;
        ensure!(
            bytes <= capacity,
            "{flag}: tier '{name}' holds {}; give that or less, or correct the machine file",
            show_bytes(capacity)
        );
        ensure!(budgets[at].is_none(), "{flag}: tier '{name}' was given a budget before; give one");
        budgets[at] = Some(bytes);
    }
    Ok(budgets.iter().zip(&machine.tiers).map(|(b, tier)| b.unwrap_or(tier.capacity_bytes)).collect())
}

/// The baselines from slowest to fastest, then the plan unless it is one of them.
fn rows(solved: &Solved) -> Vec<&Placement> {
    let mut rows: Vec<&Placement> = solved.baselines.iter().filter(|b| b.name != solved.plan.name).collect();
    rows.sort_by(|a, b| a.predicted.decode_tok_s.total_cmp(&b.predicted.decode_tok_s));
    rows.push(&solved.plan);
    rows
}

fn print_text(args: &SolveArgs, solved: &Solved, skews: &[Skew], written: &[PathBuf]) {
    let plan = &solved.plan;
    let emulated = plan.tiers.iter().any(|t| t.tier.emulated);
    let (context, kv_type) = (plan.context, plan.kv_type);
    println!("{} on {}, context {context}, keys and values {kv_type}", plan.model.name, plan.machine.name);
    for tier in &plan.tiers {
        let label = if tier.tier.emulated { " (emulated)" } else { "" };
        println!("  {}{label}: {} GB/s, budget {}", tier.tier.name, tier.tier.read_gbps, show_bytes(tier.budget_bytes));
    }
    println!();
    // Without a rate of products, prompts are predicted from reads alone.
    let prompt = if plan.predicted.prompt_gflops.is_empty() { "prompt limit" } else { "prompt tok/s" };
    let mut head = format!("{:<18} {:>13} {:>13} {:>9}", "plan", "decode tok/s", prompt, "hit rate");
    for tier in &plan.tiers {
        head += &format!(" {:>12}", tier.tier.name);
    }
    println!("predicted, for tokens that look back at {} positions:", plan.predicted.at);
    println!("{head}");
    for row in rows(solved) {
        let predicted = &row.predicted;
        let mut line = format!(
            "{:<18} {:>13} {:>13} {:>8.1}%",
            row.name,
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
    let gap = solver.gap.map_or("no proven bound".to_string(), |gap| format!("proven gap {:.4} %", gap * 100.0));
    let with_lru = plan.layers.iter().all(|l| l.slots == 0 || l.policy == SlotPolicy::Lru);
    let of = if with_lru { "" } else { " of pins and slots with lru" };
    println!("{}: {}, {gap}{of}, {:.2} s ({})", plan.name, solver.status, solver.solve_s, solver.backend);
    let other = solved.baselines.iter().filter(|b| b.name != plan.name);
    if let Some(best) = other.max_by(|a, b| a.predicted.decode_tok_s.total_cmp(&b.predicted.decode_tok_s)) {
        let times = plan.predicted.decode_tok_s / best.predicted.decode_tok_s;
        println!("predicted {times:.3} × the best rule of thumb ({}) at equal bytes", best.name);
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
    if let Some(goal) = &solver.goal {
        println!("{}: {} {}, predicted", goal.objective, amount(goal.value), goal.unit);
    }
    for line in &solved.verdict {
        println!("{line}");
    }
    for note in &solved.notes {
        println!("note: {note}");
    }
    if emulated {
        println!("note: speeds are predicted for emulated tiers, whose rates are declared, not measured");
    }
    println!("wrote {}", args.output.display());
    for path in written {
        println!("wrote {}", path.display());
    }
}

/// A number with five digits or so.
fn amount(value: f64) -> String {
    if value >= 1e7 || (value != 0.0 && value < 1e-3) { format!("{value:.4e}") } else { format!("{value:.5}") }
}

/// Tokens a second with three digits or so.
fn speed(tok_s: f64) -> String {
    let digits = if tok_s < 10.0 { 2 } else { usize::from(tok_s < 100.0) };
    format!("{tok_s:.digits$}")
}

fn as_json(args: &SolveArgs, solved: &Solved, skews: &[Skew], written: &[PathBuf]) -> Value {
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
            "dense_s": plan.predicted.dense_s,
            "expert_s": plan.predicted.expert_s,
            "expert_critical_s": plan.predicted.expert_critical_s,
            "at": plan.predicted.at,
            "kv_s": plan.predicted.kv_s,
            "prompt_gflops": plan.predicted.prompt_gflops,
            "read_bytes": plan.predicted.read_bytes,
            "tiers": plan.tiers.iter().map(|t| json!({
                "name": t.tier.name,
                "emulated": t.tier.emulated,
                "budget_bytes": t.budget_bytes,
                "used_bytes": t.used_bytes(),
                "dense_bytes": t.bytes.dense,
                "pinned_bytes": t.bytes.pinned,
                "slot_bytes": t.bytes.slots,
                "kv_bytes": t.bytes.kv,
                "staging_bytes": t.bytes.staging,
                "home_bytes": t.bytes.home,
            })).collect::<Vec<_>>(),
        })
    };
    let mut value = plan(&solved.plan);
    let baselines: Vec<Value> = solved.baselines.iter().map(plan).collect();
    let skews: Vec<Value> = skews.iter().map(skew_json).collect();
    value["plan"] = json!(args.output);
    value["baselines"] = json!(baselines);
    value["baseline_plans"] = json!(written);
    value["ceiling_hit_rate"] = json!(solved.ceiling_hit_rate);
    value["skew"] = json!(skews);
    value["notes"] = json!(solved.notes);
    value["verdict"] = json!(solved.verdict);
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;
    use tier_plan_runtime::formats::SourceId;
    use tier_plan_runtime::formats::machine::{Accelerator, Tier, TierKind};

    fn asked(flags: &[&str]) -> Result<Vec<u64>> {
        let tier = |name: &str, kind, capacity_bytes| Tier {
            name: name.to_string(),
            kind,
            capacity_bytes,
            read_gbps: 1.0,
            latency_us: 0.0,
            emulated: false,
            unit: None,
            accelerator: Accelerator::default(),
            source: String::new(),
        };
        let machine = Machine {
            name: "m".to_string(),
            description: String::new(),
            tiers: vec![tier("dram", TierKind::Dram, 1 << 30), tier("slow", TierKind::Nvme, 1 << 40)],
            layer_overhead_us: 0.0,
            token_overhead_us: 0.0,
            extras: Default::default(),
            id: SourceId { name: "m".to_string(), hash: String::new() },
        };
        let line = [&["tier-plan", "solve", "model.gguf", "-m", "machine.toml"], flags].concat();
        match Cli::try_parse_from(line)?.command {
            Command::Solve(args) => budgets(&args.budget, args.vram.as_deref(), args.dram.as_deref(), &machine),
            _ => bail!("not solve"),
        }
    }

    #[test]
    fn budgets_are_read_and_refused() -> Result<()> {
        assert_eq!(asked(&[])?, [1 << 30, 1 << 40]);
        assert_eq!(asked(&["--dram", "3MiB"])?, [3 << 20, 1 << 40]);
        assert_eq!(asked(&["-b", "slow=1GiB", "--budget", "dram=0"])?, [0, 1 << 30]);
        let refused = |flags: &[&str], word: &str| {
            let error = asked(flags).err().map(|e| format!("{e:#}")).unwrap_or_default();
            assert!(error.contains(word), "{word}: {error}");
        };
        refused(&["--vram", "1GiB"], "has no tier 'vram'; its tiers are dram, slow");
        refused(&["--dram", "2GiB"], "holds 1.00 GiB");
        refused(&["--dram", "1MiB", "-b", "dram=2MiB"], "give one");
        refused(&["-b", "dram"], "TIER=SIZE");
        refused(&["--dram", "much"], "is not a size");
        Ok(())
    }
}
