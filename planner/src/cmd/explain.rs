//! `tier-plan explain`: why a plan is as it is.

use crate::by_token::{self, Placed};
use crate::catalogue;
use crate::cmd::args::{JsonArgs, ModelOption, check_profile};
use crate::cost::steps::{Predictor, StepPrediction};
use crate::explain::{Explanation, LayerReason, Path, explain};
use crate::hint::HintExt;
use crate::parallel;
use crate::printable::printable;
use crate::profile::Evidence;
use crate::solve::time_limit;
use crate::whatif::bound;
use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};
use std::path::PathBuf;
use tier_plan_runtime::formats::placement::{self, PerTier, Placement, SlotPolicy, TierIdx};
use tier_plan_runtime::formats::ranges;
use tier_plan_runtime::model::shape::{DenseKind, ModelShape};
use tier_plan_runtime::units::{ByteUnit, show_bytes};

/// Options of `tier-plan explain`.
#[derive(Debug, Args)]
#[command(
    about = "Explain a plan: its bottleneck, and the value of more memory in each tier",
    after_long_help = "Example:\n  tier-plan explain placement.toml -m MODEL.gguf -P MODEL.profile"
)]
pub struct ExplainArgs {
    /// Plan to explain
    pub plan: PathBuf,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelOption,
    /// Time limit for the shadow prices, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    pub time_limit: f64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

/// Runs the command.
///
/// # Errors
/// When an option is invalid, a file cannot be read or written, or the model cannot be loaded.
pub fn run(args: &ExplainArgs) -> Result<()> {
    let time_limit_s = time_limit(args.time_limit)?;
    let plan = placement::read(&args.plan)?;
    let known = catalogue::model(&args.model.model, args.model.quant.as_deref())?;
    plan.check_model(&known.sizes.id, &args.plan)?;
    let profile = args.model.read_profile(&known)?;
    check_profile(&plan, &args.plan, profile.as_ref())?;
    if plan.profile.is_none() && profile.is_some() {
        let without = || {
            bail!(
                "--profile: {} was made without a profile",
                args.plan.display()
            )
        };
        return without().hint("leave --profile out");
    }
    let evidence = Evidence::new(&known.sizes, profile.as_ref())?;
    let why = explain(&plan, &known.sizes, &evidence, time_limit_s)?;
    let predictor = Predictor {
        plan: &plan,
        shape: &known.sizes,
        evidence: &evidence,
        at: plan.predicted.at,
    };
    let steps = match plan.sequences {
        1 => Vec::new(),
        most => parallel::predictions(&predictor, most),
    };
    let drafts = break_evens(&predictor);
    let by_token = by_token::placed(&plan, &known.sizes, &evidence);
    if args.format.json {
        let mut value = as_json(&plan, &why);
        value["by_token"] = by_token.iter().map(Placed::as_json).collect();
        value["drafts"] = drafts.iter().map(Draft::as_json).collect();
        value["sequences"] = json!(plan.sequences);
        value["parallel"] = parallel::as_json(&steps);
        println!("{}", serde_json::to_string_pretty(&value)?);
    } else {
        print_text(&plan, &known.sizes, &why, &by_token);
        print_steps(&steps);
        print_drafts(&drafts);
        for note in evidence.notes.iter().chain(&known.notes()) {
            println!("note: {note}");
        }
    }
    Ok(())
}

fn print_text(plan: &Placement, shape: &ModelShape, why: &Explanation, by_token: &[Placed]) {
    let (predicted, emulated) = (&plan.predicted, plan.tiers.iter().any(|t| t.tier.emulated));
    println!(
        "plan '{}' for {} on {}: predicted {:.2} tok/s{}",
        printable(&plan.name),
        printable(&plan.model.name),
        printable(&plan.machine.name),
        predicted.decode_tok_s,
        if emulated { " on emulated tiers" } else { "" }
    );
    println!();
    let bound = bound(plan);
    println!(
        "Where a token's {:.3} ms go, as predicted:",
        plan.solver.objective_s * 1e3
    );
    println!(
        "  {:<22} {:>9.3} ms",
        "fixed overheads",
        predicted.overhead_s * 1e3
    );
    for (at, tier) in plan.tiers.enumerate() {
        let part = |of: &PerTier<f64>| of.get(at).copied().unwrap_or(0.0) * 1e3;
        println!(
            "  {:<22} {:>9.3} ms for dense tensors, {:>9.3} ms for experts before overlap",
            printable(&tier.tier.name),
            part(&predicted.dense_s),
            part(&predicted.expert_s)
        );
    }
    println!(
        "  {:<22} {:>9.3} ms of the experts' time is left when the tiers overlap",
        "",
        predicted.expert_critical_s * 1e3
    );
    if !plan.host_kv.is_empty() {
        println!(
            "The KV cache of layers {} is on {}: a GPU multiplies their matrices, and the CPU attends.",
            ranges::show(&plan.host_kv),
            printable(&plan.tiers[plan.kv_tier].tier.name)
        );
    }
    if let Some(s) = &plan.streaming {
        println!(
            "Up to {} of a layer's experts are streamed from {} to {} for a token, where they compute.",
            s.experts,
            printable(&plan.tiers[s.from].tier.name),
            printable(&plan.tiers[s.tier].tier.name)
        );
    }
    println!(
        "The bottleneck is {}: {:.0} % of the time of a token.",
        bound.by,
        bound.share * 100.0
    );
    println!();
    let step = ByteUnit::of_step(shape.weight_bytes());
    let (unit, part) = (step.name(), step.per_gib());
    println!("What a {unit} more of each budget would bring, at the margin (shadow prices):");
    for tier in &why.tiers {
        let spare = if tier.spare_bytes > 0 {
            format!(", {} not used", show_bytes(tier.spare_bytes))
        } else {
            String::new()
        };
        println!(
            "  {:<8} {:+.4} predicted tok/s, {:.3} ms of a token{spare}",
            printable(&tier.name),
            tier.tok_s_per_gib * part,
            tier.seconds_per_gib * part * 1e3
        );
    }
    println!();
    dense(plan);
    if by_token::is_special(&by_token::parts(shape)) {
        println!("Chosen by the token alone, so known before the layer that reads it runs:");
        for placed in by_token {
            println!("  {}", printable(&placed.sentence()));
        }
        println!();
    }
    if why.layers.is_empty() {
        return;
    }
    println!(
        "Experts, layer by layer (a layer gets what saves more time than its bytes cost at those prices):"
    );
    let mut alike: Vec<(&LayerReason, Vec<u32>)> = Vec::new();
    for layer in &why.layers {
        match alike.iter_mut().find(|(first, _)| same(first, layer)) {
            Some((_, layers)) => layers.push(layer.layer),
            None => alike.push((layer, vec![layer.layer])),
        }
    }
    for (of, layers) in alike {
        println!("  {}", sentence(plan, of, &layers));
    }
}

/// Prints what is predicted for several texts at once, if the plan has room for them.
fn print_steps(steps: &[StepPrediction]) {
    let Some(last) = steps.last() else { return };
    println!(
        "The KV cache has room for {} texts at once. Predicted for their steps:",
        last.texts
    );
    for row in parallel::table(steps) {
        println!("  {row}");
    }
}

/// A step with a draft, as predicted.
struct Draft {
    /// Tokens of the step: one that comes anyway, and those of the draft.
    rows: u32,
    step: StepPrediction,
    /// Share of drafted tokens that has to be right; infinity where none suffices.
    break_even: f64,
}

impl Draft {
    fn as_json(&self) -> Value {
        json!({
            "rows": self.rows,
            "predicted_step_s": self.step.seconds,
            "predicted_distinct_experts": self.step.distinct_experts,
            "break_even_acceptance": self.break_even.is_finite().then_some(self.break_even),
        })
    }
}

/// Returns what drafts cost and would have to bring; nothing for a plan without rates.
fn break_evens(predictor: &Predictor<'_>) -> Vec<Draft> {
    let draft = |rows| {
        Some(Draft {
            rows,
            step: predictor.draft_step(rows)?,
            break_even: predictor.break_even_acceptance(rows)?,
        })
    };
    [2, 4, 8].into_iter().filter_map(draft).collect()
}

fn print_drafts(drafts: &[Draft]) {
    if drafts.is_empty() {
        return;
    }
    println!("Drafts (--draft), checked with the token that comes anyway, pay from:");
    for draft in drafts {
        let pays = if draft.break_even.is_finite() {
            format!("{:.0} % right tokens", draft.break_even * 100.0)
        } else {
            "no share of right tokens".to_string()
        };
        println!(
            "  {} tokens per step: {pays}; {:.2} ms, {:.1} distinct experts per layer",
            draft.rows,
            draft.step.seconds * 1e3,
            draft.step.distinct_experts
        );
    }
}

/// Ascending numbers with their runs closed up: `layers 0-3, 7`.
fn numbers(layers: &[u32]) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for &layer in layers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == layer => *last = layer,
            _ => runs.push((layer, layer)),
        }
    }
    let shown = runs.iter().map(|(a, b)| {
        if a == b {
            a.to_string()
        } else {
            format!("{a}-{b}")
        }
    });
    let shown: Vec<String> = shown.collect();
    format!(
        "{} {}",
        if layers.len() == 1 { "layer" } else { "layers" },
        shown.join(", ")
    )
}

/// Layers that one sentence can be about.
fn same(a: &LayerReason, b: &LayerReason) -> bool {
    let near = |a: f64, b: f64| (a - b).abs() < 5e-4;
    (&a.pinned, a.slots, a.policy, a.expert_bytes, a.longest)
        == (&b.pinned, b.slots, b.policy, b.expert_bytes, b.longest)
        && a.by_token == b.by_token
        && near(a.pin_hits, b.pin_hits)
        && near(a.slot_hits, b.slot_hits)
}

fn sentence(plan: &Placement, of: &LayerReason, layers: &[u32]) -> String {
    let name = |tier: TierIdx| plan.tiers[tier].tier.name.as_str();
    let mut parts: Vec<String> = of
        .pinned
        .enumerate()
        .filter(|(_, n)| **n > 0)
        .map(|(t, n)| format!("{n} pinned on {}", name(t)))
        .collect();
    if of.slots.0 > 0 {
        let policy = if of.policy == SlotPolicy::Lru {
            String::new()
        } else {
            format!(" ({})", of.policy)
        };
        parts.push(format!(
            "{} slots on {}{policy}",
            of.slots.0,
            name(of.slots.1)
        ));
    }
    if parts.is_empty() {
        parts.push(format!("all on {}", name(plan.home_tier())));
    }
    let longest = match of.longest {
        Path::Computing(tier) => format!("computing from {}", name(tier)),
        Path::Reading => format!("reads from {}", name(plan.home_tier())),
    };
    let border = match of.border {
        (Some(least), Some(most)) if least > most => format!(
            "; the least used pin serves {:.2} % of tokens, the most used other would {:.2} %",
            least * 100.0,
            most * 100.0
        ),
        (Some(_), Some(_)) => "; pins are no better than others here".to_string(),
        _ => String::new(),
    };
    let chosen = if of.by_token {
        ", chosen by the token"
    } else {
        ""
    };
    format!(
        "{}{chosen}: {}; pins serve {:.1} % of choices, slots {:.1} %; {:.3} ms, longest {longest}{border}",
        numbers(layers),
        parts.join(", "),
        of.pin_hits.max(0.0) * 100.0,
        of.slot_hits * 100.0,
        of.seconds * 1e3
    )
}

fn dense(plan: &Placement) {
    println!(
        "Dense tensors: every token reads all of them, so a byte of theirs is worth more in a fast tier than an expert's:"
    );
    let kinds = [
        ("attention", DenseKind::Attention),
        ("routers", DenseKind::Router),
        ("shared experts", DenseKind::SharedExpert),
        ("dense feed-forward", DenseKind::DenseFfn),
        ("head", DenseKind::Head),
        ("embedding (one row per token)", DenseKind::Embedding),
        ("token table (a few rows per token)", DenseKind::TokenTable),
    ];
    for (words, kind) in kinds {
        let of_kind: Vec<TierIdx> = plan
            .dense
            .iter()
            .filter(|d| d.kind == kind)
            .map(|d| d.tier)
            .collect();
        let places: Vec<String> = plan
            .tiers
            .enumerate()
            .filter_map(|(t, tier)| {
                let here = of_kind.iter().filter(|&&on| on == t).count();
                let many = if of_kind.len() > 1 {
                    format!("{here} of {} on ", of_kind.len())
                } else {
                    "on ".into()
                };
                (here > 0).then(|| format!("{many}{}", printable(&tier.tier.name)))
            })
            .collect();
        if !places.is_empty() {
            println!("  {words}: {}", places.join(", "));
        }
    }
    println!();
}

fn as_json(plan: &Placement, why: &Explanation) -> Value {
    let bound = bound(plan);
    let name = |tier: TierIdx| plan.tiers[tier].tier.name.as_str();
    json!({
        "plan": plan.name,
        "model": plan.model.name,
        "predicted": true,
        "emulated": plan.tiers.iter().any(|t| t.tier.emulated),
        "decode_tok_s": plan.predicted.decode_tok_s,
        "bound_by": bound.by,
        "bound_by_share": bound.share,
        "overhead_s": plan.predicted.overhead_s,
        "host_kv": plan.host_kv,
        "streaming": plan.streaming.map(|s| json!({
            "tier": name(s.tier),
            "from": name(s.from),
            "experts": s.experts,
            "link_gbps": s.link_gbps,
            "cpu_share": s.cpu_share,
        })),
        "tiers": why.tiers.enumerate().map(|(at, t)| json!({
            "name": t.name,
            "tok_s_per_gib": t.tok_s_per_gib,
            "seconds_per_gib": t.seconds_per_gib,
            "spare_bytes": t.spare_bytes,
            "dense_s": plan.predicted.dense_s.get(at),
            "expert_s": plan.predicted.expert_s.get(at),
        })).collect::<Vec<_>>(),
        "layers": why.layers.iter().map(|l| json!({
            "layer": l.layer,
            "by_token": l.by_token,
            "expert_bytes": l.expert_bytes,
            "pinned": l.pinned.enumerate().filter(|(_, n)| **n > 0)
                .map(|(t, n)| (name(t).to_string(), json!(n))).collect::<serde_json::Map<_, _>>(),
            "slots": l.slots.0,
            "slot_tier": name(l.slots.1),
            "policy": l.policy.name(),
            "pin_hits": l.pin_hits,
            "slot_hits": l.slot_hits,
            "expert_s": l.seconds,
            "longest": match l.longest {
                Path::Computing(tier) => format!("computing from {}", name(tier)),
                Path::Reading => "reading".to_string(),
            },
            "least_used_pin": l.border.0,
            "most_used_other": l.border.1,
        })).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::numbers;

    #[test]
    fn runs_of_layers_are_closed_up() {
        assert_eq!(numbers(&[3]), "layer 3");
        assert_eq!(numbers(&[0, 1, 2, 5, 7, 8]), "layers 0-2, 5, 7-8");
    }
}
