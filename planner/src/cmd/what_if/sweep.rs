//! `tier-plan what-if --sweep`: predictions for every size of a tier, as lines, JSON, and files.

use super::{WhatIfArgs, next_purchase};
use crate::print::digits;
use crate::printable::printable;
use crate::progress;
use crate::report;
use crate::whatif::purchase::{Purchase, purchases};
use crate::whatif::sweep::{Point, Range, Sweep, at_size, sweep};
use crate::whatif::{Answer, Question, Supposed, bound, purchases_json};
use anyhow::Result;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::safely;
use tier_plan_runtime::formats::safely::NewFolders;
use tier_plan_runtime::units::show_bytes;

/// Predicts every size of a tier, prints a line for each or JSON, and draws the curve where a folder is
/// named.
///
/// # Errors
/// When no size can be predicted, or a file cannot be written.
pub(super) fn run(args: &WhatIfArgs, question: &Question<'_>, range: &Range) -> Result<()> {
    let bar = progress::count("sweeping", range.sizes.len() as u64);
    let supposed = Supposed::new(question)?;
    let swept = sweep(question, &supposed, range, |done| {
        bar.set_position(done as u64)
    })?;
    bar.finish_and_clear();
    let rows = rows(&swept);
    // Past the knee more of this tier gains little, so other tiers are priced there.
    let after = swept.knee.and_then(|knee| swept.points.get(knee));
    let bought = match after.and_then(|point| Some((point, point.answer.as_ref().ok()?))) {
        Some((point, answer)) => {
            after_knee(question, &swept.tier, point.bytes, (answer, &supposed))
        }
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
    let written = args
        .output
        .as_deref()
        .map(|folder| write_sweep(folder, question, &swept, &value))
        .transpose()?;
    if args.format.json {
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    println!(
        "{} on {}, context {}: predicted decode tok/s by size of {}",
        printable(&question.known.sizes.id.name),
        printable(&question.machine.name),
        question.context,
        swept.tier
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
            middle
                .plan
                .solver
                .gap
                .map_or("-".to_string(), |g| format!("{:.3} %", g * 100.0)),
            bound(&middle.plan).by,
            answer
                .price_usd
                .map_or("-".to_string(), |p| format!("${p:.0}")),
            answer.tok_s_per_1000_usd().map_or("-".to_string(), digits),
            if swept.knee == Some(at) {
                "  <- knee"
            } else {
                ""
            }
        );
    }
    if let Some(line) = next_purchase(&bought) {
        println!("at the knee: {line}");
    }
    if let Some(Err(error)) = swept.points.first().map(|p| &p.answer) {
        println!(
            "no plan at {}: {error:#}",
            show_bytes(swept.points[0].bytes)
        );
    }
    for note in question.known.notes() {
        println!("note: {note}");
    }
    for path in written.iter().flatten() {
        println!("wrote {path}");
    }
    Ok(())
}

/// Returns the purchases at the size where more of the swept tier stops to pay.
fn after_knee(
    question: &Question<'_>,
    tier: &str,
    bytes: u64,
    (answer, supposed): (&Answer, &Supposed),
) -> Vec<Purchase> {
    let Some((machine, budgets)) = at_size(question, tier, bytes) else {
        return Vec::new();
    };
    purchases(
        &Question {
            machine: &machine,
            budgets,
            ..question.clone()
        },
        answer,
        supposed,
    )
}

/// Returns the points as `--json` prints them.
fn rows(swept: &Sweep) -> Vec<Value> {
    let row = |(at, point): (usize, &Point)| match &point.answer {
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
        Err(error) => {
            json!({ "bytes": point.bytes, "fits": false, "reason": format!("{error:#}") })
        }
    };
    swept.points.iter().enumerate().map(row).collect()
}

/// Files of a sweep: chart, table, and all numbers.
pub(super) const FILES: [&str; 3] = ["sweep.svg", "sweep.csv", "sweep.json"];

fn write_sweep(
    folder: &Path,
    question: &Question<'_>,
    swept: &Sweep,
    value: &Value,
) -> Result<Vec<String>> {
    let curve = report::Curve {
        model: question.known.sizes.id.name.clone(),
        machine: question.machine.name.clone(),
        tier: swept.tier.clone(),
        emulated: question.machine.tiers.iter().any(|t| t.emulated),
        points: swept
            .points
            .iter()
            .map(|p| (p.bytes, p.answer.as_ref().ok().map(Answer::decode_tok_s)))
            .collect(),
        knee: swept.knee,
    };
    let drawn = report::draw_curve(&curve)?;
    let json = serde_json::to_string_pretty(value)? + "\n";
    let files = [drawn.svg, drawn.csv, json];
    let files: Vec<(PathBuf, Vec<u8>)> = FILES
        .iter()
        .zip(files)
        .map(|(name, content)| (folder.join(name), content.into_bytes()))
        .collect();
    let _made = NewFolders::make(folder)?;
    safely::write_together(&files)?;
    let written = files.iter().map(|(path, _)| path.display().to_string());
    Ok(written.collect())
}
