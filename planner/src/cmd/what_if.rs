//! `tier-plan what-if`: what a model would do on a machine, from shapes and rates alone.

use super::solve::{budgets, check_at};
use crate::catalogue;
use crate::cli::WhatIfArgs;
use crate::progress;
use crate::report;
use crate::solve::time_limit;
use crate::whatif::purchase::{Purchase, purchases};
use crate::whatif::sweep::{Range, Sweep, at_size, sweep};
use crate::whatif::{Answer, Question, answer, as_json, bound, purchases_json};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use tier_plan_runtime::formats::{profile, safely};
use tier_plan_runtime::units::show_bytes;

/// Runs it.
pub fn run(args: &WhatIfArgs) -> Result<()> {
    ensure!(args.context > 0, "--context 0 holds no text; give 1 or more");
    check_at(args.at, args.context)?;
    let range = args.sweep.as_deref().map(Range::parse).transpose()?;
    ensure!(range.is_none() || args.machine.len() == 1, "--sweep is for one machine; give --machine once");
    ensure!(range.is_some() || args.output.is_none(), "--output is the folder of a sweep; give --sweep too");
    let time_limit_s = time_limit(args.time_limit)?;
    let known = catalogue::model(&args.model, args.quant.as_deref())?;
    let machines = args.machine.iter().map(|m| catalogue::machine(m)).collect::<Result<Vec<_>>>()?;
    let mut profile = args.profile.as_deref().map(profile::read).transpose()?;
    if let (Some(profile), Some(path)) = (&mut profile, &args.profile) {
        match &known.shape {
            None => profile.check_model(&known.sizes.id, path)?,
            // Routing is the same in every quantisation; layers and experts are still compared.
            Some(_) => profile.model = known.sizes.id.clone(),
        }
    }
    let questions = machines
        .iter()
        .map(|machine| {
            let budgets = budgets(&args.budget, args.vram.as_deref(), args.dram.as_deref(), machine)?;
            let (known, profile) = (&known, profile.as_ref());
            let (at, kv_type) = (args.at, args.kv_type);
            Ok(Question { known, machine, budgets, profile, context: args.context, at, kv_type, time_limit_s })
        })
        .collect::<Result<Vec<_>>>()?;
    if let (Some(range), Some(question)) = (&range, questions.first()) {
        return run_sweep(args, question, range);
    }
    let answers: Vec<Result<Answer>> = questions.iter().map(answer).collect();
    let bought = questions.iter().zip(&answers).map(|(question, answer)| match answer {
        Ok(answer) => purchases(question, answer),
        Err(_) => Ok(Vec::new()),
    });
    let bought = bought.collect::<Result<Vec<_>>>()?;
    if args.json {
        let mut values: Vec<Value> = questions.iter().zip(&answers).map(|(q, a)| as_json(q, a)).collect();
        for (value, bought) in values.iter_mut().zip(&bought) {
            value["notes"] = json!(known.notes());
            value["purchases"] = purchases_json(bought);
        }
        let value = if values.len() == 1 { values.remove(0) } else { json!({ "answers": values }) };
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

/// Three digits or so.
fn digits(value: f64) -> String {
    let digits = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.digits$}")
}

fn show(question: &Question<'_>, answer: &Result<Answer>) {
    let (sizes, machine) = (&question.known.sizes, question.machine);
    println!("{} on {} ({}), context {}", sizes.id.name, machine.name, machine.description, question.context);
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => {
            println!("  no plan: {error:#}");
            return;
        }
    };
    let Some(middle) = answer.middle() else { return };
    let [speed, low, high] = answer.decode_tok_s();
    let emulated = if machine.tiers.iter().any(|t| t.emulated) { ", emulated tiers" } else { "" };
    let cases: Vec<String> =
        answer.cases.iter().map(|c| format!("{} {}", c.routing, digits(c.decode_tok_s()))).collect();
    if answer.cases.len() > 1 {
        println!(
            "  predicted decode: {} tok/s ({} to {}; by routing: {}){emulated}",
            digits(speed),
            digits(low),
            digits(high),
            cases.join(", ")
        );
    } else {
        println!("  predicted decode: {} tok/s ({}){emulated}", digits(speed), middle.routing);
    }
    let (plan, bound) = (&middle.plan, bound(&middle.plan));
    let gap = plan.solver.gap.map_or("nothing proven".to_string(), |gap| format!("proven gap {:.3} %", gap * 100.0));
    println!("  plan: {}, {gap} ({})", plan.solver.status, plan.solver.backend);
    println!(
        "  bound by {}: {:.1} ms a token, {:.0} % of the time of one{}",
        bound.by,
        bound.seconds * 1e3,
        bound.share * 100.0,
        if plan.tiers.len() > 1 { " (tiers overlap)" } else { "" }
    );
    let prompt = digits(plan.predicted.prompt_tok_s);
    if plan.predicted.prompt_gflops.is_empty() {
        println!("  predicted prompt limit: {prompt} tok/s (reads alone: the machine file has no prompt_gflops)");
    } else {
        println!("  predicted prompt: {prompt} tok/s (the longer of reads and products, step by step)");
    }
    println!(
        "  keys and values ({}): {:.2} ms of a token that looks back at {} positions",
        plan.kv_type,
        plan.predicted.kv_s * 1e3,
        plan.predicted.at
    );
    for (at, tier) in plan.tiers.iter().enumerate() {
        println!(
            "  {:<8} {:>9} of {:>9} used, {:>8} read a token at {} GB/s",
            tier.tier.name,
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
        println!("  power: {watts:.0} W, {} J a token", digits(joules));
    }
    if let (Some(price), Some(each)) = (answer.price_usd, answer.tok_s_per_1000_usd()) {
        println!("  price: ${price:.0}, {} tok/s for each $1000", digits(each));
    }
    for note in middle.notes.iter().filter(|n| !n.starts_with("no profile")) {
        println!("  note: {note}");
    }
}

/// What the next money should go to, in a sentence; nothing where no price is known.
fn next_purchase(bought: &[Purchase]) -> Option<String> {
    let best = bought.first()?;
    if !best.helps() {
        return Some(format!(
            "next purchase: ${:.0} more of any tier with a price gain less than 1 %, predicted: what bounds it is elsewhere",
            best.usd
        ));
    }
    let gain = |p: &Purchase| format!("{} tok/s", digits(p.tok_s));
    let others: Vec<String> = bought[1..].iter().map(|p| format!("{} {}", p.tier, gain(p))).collect();
    let others = if others.is_empty() { String::new() } else { format!("; the same on {}", others.join(", ")) };
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
        let Some((answer, middle)) = answer.as_ref().ok().and_then(|a| Some((a, a.middle()?))) else {
            println!("{name:<24} {:>7}", "no plan");
            continue;
        };
        let [speed, low, high] = answer.decode_tok_s();
        let show = |value: Option<f64>| value.map_or("-".to_string(), digits);
        println!(
            "{name:<24} {:>7} {:>15} {:>9} {:>12} {:>8} {:>10} {:>11}",
            digits(speed),
            format!("{} to {}", digits(low), digits(high)),
            middle.plan.solver.gap.map_or("-".to_string(), |g| format!("{:.3} %", g * 100.0)),
            bound(&middle.plan).by,
            show(answer.joules_per_token()),
            answer.price_usd.map_or("-".to_string(), |p| format!("${p:.0}")),
            show(answer.tok_s_per_1000_usd())
        );
    }
    println!();
}

fn run_sweep(args: &WhatIfArgs, question: &Question<'_>, range: &Range) -> Result<()> {
    let bar = progress::count("sweeping", range.sizes.len() as u64);
    let swept = sweep(question, range, |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    let rows = rows(&swept);
    // After the knee more of this tier brings little, so the question is what does.
    let after = swept.knee.and_then(|knee| swept.points.get(knee));
    let bought = match after.and_then(|point| Some((point, point.answer.as_ref().ok()?))) {
        Some((point, answer)) => after_knee(question, &swept, point.bytes, answer)?,
        None => Vec::new(),
    };
    let value = json!({
        "model": question.known.sizes.id.name,
        "machine": question.machine.name,
        "context": question.context,
        "predicted": true,
        "emulated": question.machine.tiers.iter().any(|t| t.emulated),
        "tier": swept.tier,
        "knee_bytes": swept.knee.map(|k| swept.points[k].bytes),
        "points": rows,
        "purchases_at_knee": purchases_json(&bought),
        "notes": question.known.notes(),
    });
    let written = args.output.as_deref().map(|folder| write_sweep(folder, question, &swept, &value)).transpose()?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    println!(
        "{} on {}, context {}: predicted decode tok/s by size of {}",
        question.known.sizes.id.name, question.machine.name, question.context, swept.tier
    );
    println!(
        "{:>10} {:>8} {:>16} {:>9} {:>12} {:>10} {:>11}",
        swept.tier, "tok/s", "range", "gap", "bound by", "price", "tok/s/$1000"
    );
    for (at, point) in swept.points.iter().enumerate() {
        let size = show_bytes(point.bytes);
        let found = match &point.answer {
            Ok(answer) => answer.middle().map(|middle| (answer, middle)),
            Err(_) => None,
        };
        let Some((answer, middle)) = found else {
            println!("{size:>10} {:>8}", "no plan");
            continue;
        };
        let [speed, low, high] = answer.decode_tok_s();
        println!(
            "{size:>10} {:>8} {:>16} {:>9} {:>12} {:>10} {:>11}{}",
            digits(speed),
            format!("{} to {}", digits(low), digits(high)),
            middle.plan.solver.gap.map_or("-".to_string(), |g| format!("{:.3} %", g * 100.0)),
            bound(&middle.plan).by,
            answer.price_usd.map_or("-".to_string(), |p| format!("${p:.0}")),
            answer.tok_s_per_1000_usd().map_or("-".to_string(), digits),
            if swept.knee == Some(at) { "  <- knee" } else { "" }
        );
    }
    if let Some(line) = next_purchase(&bought) {
        println!("at the knee: {line}");
    }
    if let Some(Err(error)) = swept.points.first().map(|p| &p.answer) {
        println!("no plan at {}: {error:#}", show_bytes(swept.points[0].bytes));
    }
    for note in question.known.notes() {
        println!("note: {note}");
    }
    for path in written.iter().flatten() {
        println!("wrote {path}");
    }
    Ok(())
}

/// What to buy where more of the swept tier has stopped to pay.
fn after_knee(question: &Question<'_>, swept: &Sweep, bytes: u64, answer: &Answer) -> Result<Vec<Purchase>> {
    let Some((machine, budgets)) = at_size(question, &swept.tier, bytes) else { return Ok(Vec::new()) };
    purchases(&Question { machine: &machine, budgets, ..question.clone() }, answer)
}

/// The points in the words of `--json`.
fn rows(swept: &Sweep) -> Vec<Value> {
    let row = |(at, point): (usize, &crate::whatif::sweep::Point)| match &point.answer {
        Ok(answer) => {
            let [speed, low, high] = answer.decode_tok_s();
            let middle = answer.middle();
            json!({
                "bytes": point.bytes,
                "fits": true,
                "decode_tok_s": speed,
                "decode_tok_s_low": low,
                "decode_tok_s_high": high,
                "prompt_tok_s_limit": middle.map(|m| m.plan.predicted.prompt_tok_s),
                "gap": middle.and_then(|m| m.plan.solver.gap),
                "status": middle.map(|m| m.plan.solver.status.clone()),
                "bound_by": middle.map(|m| bound(&m.plan).by),
                "hit_rate": middle.map(|m| m.plan.predicted.hit_rate),
                "price_usd": answer.price_usd,
                "tok_s_per_1000_usd": answer.tok_s_per_1000_usd(),
                "knee": swept.knee == Some(at),
            })
        }
        Err(error) => json!({ "bytes": point.bytes, "fits": false, "reason": format!("{error:#}") }),
    };
    swept.points.iter().enumerate().map(row).collect()
}

fn write_sweep(folder: &Path, question: &Question<'_>, swept: &Sweep, value: &Value) -> Result<Vec<String>> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let curve = report::Curve {
        model: question.known.sizes.id.name.clone(),
        machine: question.machine.name.clone(),
        tier: swept.tier.clone(),
        emulated: question.machine.tiers.iter().any(|t| t.emulated),
        points: swept.points.iter().map(|p| (p.bytes, p.answer.as_ref().ok().map(Answer::decode_tok_s))).collect(),
        knee: swept.knee,
    };
    let drawn = report::draw_curve(&curve)?;
    let json = serde_json::to_string_pretty(value)? + "\n";
    let mut written = Vec::new();
    for (name, content) in [("sweep.svg", &drawn.svg), ("sweep.csv", &drawn.csv), ("sweep.json", &json)] {
        let path = folder.join(name);
        safely::write(&path, content.as_bytes())?;
        written.push(path.display().to_string());
    }
    Ok(written)
}
