//! `tier-plan diff`: differences between two plans.

use crate::cmd::args::JsonArgs;
use crate::diff::{Bytes, Diff, LayerChange, SettingChange, diff};
use crate::printable::printable;
use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};
use std::path::PathBuf;
use tier_plan_runtime::formats::placement::{self, Placement};
use tier_plan_runtime::formats::ranges;
use tier_plan_runtime::model::shape::DenseKind;
use tier_plan_runtime::units::show_bytes;

/// Options of `tier-plan diff`.
#[derive(Debug, Args)]
#[command(
    about = "Show the differences between two plans for the same model",
    after_long_help = "Example:\n  tier-plan diff plans/lru-only.toml placement.toml"
)]
pub struct DiffArgs {
    /// A plan
    #[arg(value_name = "OLD")]
    pub a: PathBuf,
    /// Another plan for the same model
    #[arg(value_name = "NEW")]
    pub b: PathBuf,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

/// Runs the command.
///
/// # Errors
/// When an option is invalid, a file cannot be read or written, or the model cannot be loaded.
pub fn run(args: &DiffArgs) -> Result<()> {
    let (a, b) = (placement::read(&args.a)?, placement::read(&args.b)?);
    let found = diff(&a, &b)?;
    if args.format.json {
        println!(
            "{}",
            serde_json::to_string_pretty(&as_json(&a, &b, &found))?
        );
    } else {
        print_text(args, &a, &b, &found);
    }
    Ok(())
}

fn words(kind: DenseKind) -> &'static str {
    match kind {
        DenseKind::Embedding => "embedding",
        DenseKind::TokenTable => "token_table",
        DenseKind::Attention => "attention",
        DenseKind::Router => "router",
        DenseKind::SharedExpert => "shared_expert",
        DenseKind::DenseFfn => "dense_ffn",
        DenseKind::Head => "head",
    }
}

fn print_text(args: &DiffArgs, a: &Placement, b: &Placement, found: &Diff) {
    println!(
        "{} ({}) → {} ({})",
        args.a.display(),
        printable(&a.name),
        args.b.display(),
        printable(&b.name)
    );
    let emulated = |plan: &Placement| {
        if plan.predicted.emulated {
            ", emulated"
        } else {
            ""
        }
    };
    let (before, after) = (a.predicted.decode_tok_s, b.predicted.decode_tok_s);
    if before > 0.0 && after > 0.0 {
        println!(
            "predicted: {before:.2}{} → {after:.2} tok/s{} ({:+.1} %), hit rate {:.1} → {:.1} %",
            emulated(a),
            emulated(b),
            (after / before - 1.0) * 100.0,
            a.predicted.hit_rate * 100.0,
            b.predicted.hit_rate * 100.0
        );
    }
    for SettingChange {
        name,
        before,
        after,
    } in &found.settings
    {
        println!("{name}: {before} → {after}");
    }
    if found.is_empty() {
        println!("both place everything alike");
        return;
    }
    println!();
    println!(
        "{:<10} {:>28} {:>28} {:>28} {:>28}",
        "tier", "used", "dense", "pinned", "slots"
    );
    for tier in &found.tiers {
        let pair = |line: fn(&Bytes) -> u64| {
            let show = |b: &Option<Bytes>| {
                b.as_ref()
                    .map_or("none".to_string(), |b| show_bytes(line(b)))
            };
            let (before, after) = (show(&tier.before), show(&tier.after));
            if tier.before.as_ref().map(line) == tier.after.as_ref().map(line) {
                before
            } else {
                format!("{before} → {after}")
            }
        };
        println!(
            "{:<10} {:>28} {:>28} {:>28} {:>28}",
            printable(&tier.name),
            pair(|b| b.used),
            pair(|b| b.dense),
            pair(|b| b.pinned),
            pair(|b| b.slots)
        );
    }
    if !found.dense.is_empty() {
        println!();
    }
    for group in &found.dense {
        let layers = if group.layers.is_empty() {
            String::new()
        } else {
            format!(" of layers {}", ranges::show(&group.layers))
        };
        println!(
            "{}{layers}: {} → {}",
            words(group.kind),
            group.from,
            group.to
        );
    }
    if !found.layers.is_empty() {
        println!();
        println!(
            "{} experts moved, in {} layers",
            found.experts_moved(),
            found.layers.len()
        );
    }
    for layer in &found.layers {
        println!("  layer {}: {}", layer.layer, sentence(layer));
    }
}

fn sentence(layer: &LayerChange) -> String {
    let moved = layer.moved.iter();
    let mut parts: Vec<String> = moved
        .map(|((from, to), experts)| {
            format!(
                "{} {from} → {to} ({})",
                experts.len(),
                ranges::show(experts)
            )
        })
        .collect();
    if layer.slots_changed() {
        let [(before, on), (after, now)] = &layer.slots;
        let place = |n: u32, tier: &str| {
            if n > 0 {
                format!("{n} on {tier}")
            } else {
                "0".to_string()
            }
        };
        if (before, on) != (after, now) {
            parts.push(format!(
                "slots {} → {}",
                place(*before, on),
                place(*after, now)
            ));
        }
    }
    if layer.policy_changed() {
        let [before, after] = layer.policies;
        parts.push(format!("policy of slots {before} → {after}"));
    }
    parts.join("; ")
}

fn as_json(a: &Placement, b: &Placement, found: &Diff) -> Value {
    let bytes = |of: &Option<Bytes>| {
        of.as_ref().map(|b| {
            json!({
                "budget_bytes": b.budget,
                "used_bytes": b.used,
                "dense_bytes": b.dense,
                "pinned_bytes": b.pinned,
                "slot_bytes": b.slots,
                "read_gbps": b.read_gbps,
            })
        })
    };
    let side = |plan: &Placement| {
        json!({
            "name": plan.name,
            "predicted_decode_tok_s": plan.predicted.decode_tok_s,
            "predicted_prompt_tok_s": plan.predicted.prompt_tok_s,
            "hit_rate": plan.predicted.hit_rate,
            "emulated": plan.predicted.emulated,
        })
    };
    json!({
        "model": a.model.name,
        "same": found.is_empty(),
        "before": side(a),
        "after": side(b),
        "settings": found.settings.iter()
            .map(|s| json!({"name": s.name, "before": s.before, "after": s.after})).collect::<Vec<_>>(),
        "tiers": found.tiers.iter()
            .map(|t| json!({"name": t.name, "before": bytes(&t.before), "after": bytes(&t.after)})).collect::<Vec<_>>(),
        "dense": found.dense.iter()
            .map(|d| json!({"kind": words(d.kind), "layers": d.layers, "from": d.from, "to": d.to})).collect::<Vec<_>>(),
        "experts_moved": found.experts_moved(),
        "layers": found.layers.iter().map(|l| json!({
            "layer": l.layer,
            "moved": l.moved.iter()
                .map(|((from, to), experts)| json!({"from": from, "to": to, "experts": experts})).collect::<Vec<_>>(),
            "slots_before": l.slots[0].0,
            "slots_after": l.slots[1].0,
            "slot_tier_before": l.slots[0].1,
            "slot_tier_after": l.slots[1].1,
            "policy_before": l.policies[0].name(),
            "policy_after": l.policies[1].name(),
        })).collect::<Vec<_>>(),
    })
}
