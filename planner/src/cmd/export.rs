//! `tier-plan export`: a plan, or the counts it was made from, in the words of another engine.

use crate::catalogue;
use crate::cli::{ExportArgs, ExportTo};
use crate::export::{counts, llama_cpp};
use crate::profile::Evidence;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::placement::{self, Placement};
use tier_plan_runtime::formats::profile::{self, Profile};
use tier_plan_runtime::formats::safely;
use tier_plan_runtime::model::shape::ModelShape;
use tier_plan_runtime::units::show_bytes;

/// Why there is nothing to write for it.
const VLLM: &str = "vLLM reads neither a placement of experts nor counts of their use: its load balancer (--enable-eplb, \
                    --eplb-config) counts while it serves, --expert-placement-strategy is only linear or round_robin, and \
                    all experts are in GPU memory. Use --to sglang for an engine that starts from counts, or --to \
                    llama.cpp for one that leaves experts in main memory";

/// Runs it.
pub fn run(args: &ExportArgs) -> Result<()> {
    if args.to == ExportTo::Vllm {
        bail!("{VLLM}");
    }
    let plan = placement::read(&args.plan)?;
    let known = catalogue::model(&args.model, args.quant.as_deref())?;
    plan.check_model(&known.sizes.id, &args.plan)?;
    let profile = args.profile.as_deref().map(profile::read).transpose()?;
    if let (Some(profile), Some(path)) = (&profile, &args.profile) {
        profile.check_model(&known.sizes.id, path)?;
    }
    if let Some(output) = &args.output {
        safely::check(output)?;
    }
    match args.to {
        ExportTo::LlamaCpp => llama_cpp(args, &plan, &known.sizes, profile.as_ref()),
        ExportTo::Sglang | ExportTo::Ktransformers => counted(args, &plan, &known.sizes, profile.as_ref()),
        ExportTo::Vllm => bail!("{VLLM}"),
    }
}

fn llama_cpp(args: &ExportArgs, plan: &Placement, shape: &ModelShape, profile: Option<&Profile>) -> Result<()> {
    match (&plan.profile, profile) {
        (Some(made_from), None) => {
            bail!("{} was made from the profile {made_from}; give it with --profile", args.plan.display())
        }
        (Some(made_from), Some(given)) => ensure!(
            made_from.hash == given.id.hash,
            "{} was made from the profile {made_from}, but the profile given is {}; give its own",
            args.plan.display(),
            given.id
        ),
        _ => {}
    }
    // A plan made without a profile is judged without one.
    let evidence = Evidence::new(shape, profile.filter(|_| plan.profile.is_some()))?;
    let found = llama_cpp::command_line(plan, shape, &evidence)?;
    let mut line = format!("llama-server -m {}", llama_cpp::quoted(&args.model.display().to_string()));
    for arg in &found.args {
        line.push(' ');
        line.push_str(&llama_cpp::quoted(arg));
    }
    if let Some(output) = &args.output {
        safely::write(output, format!("#!/bin/sh\nexec {line} \"$@\"\n").as_bytes())?;
    }
    let lost = found.predicted.as_ref().map(|p| llama_cpp::loss(plan, p));
    let emulated = plan.tiers.iter().any(|t| t.tier.emulated);
    if args.json {
        let value = json!({
            "to": "llama.cpp",
            "command": line,
            "args": found.args,
            "gpu_layers": found.gpu_layers,
            "expert_layers_on_gpu": found.expert_layers,
            "vram_bytes": found.vram_bytes,
            "vram_budget_bytes": found.vram_budget_bytes,
            "predicted_plan_decode_tok_s": plan.predicted.decode_tok_s,
            "predicted_decode_tok_s": found.predicted.as_ref().map(|p| p.decode_tok_s),
            "predicted_loss": lost,
            "emulated": emulated,
            "notes": found.notes,
            "written": args.output,
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    println!("{line}");
    println!();
    println!(
        "experts of {} of {} layers on the GPU, {} of {} of VRAM by the plan's count",
        found.expert_layers.len(),
        shape.experts.len(),
        show_bytes(found.vram_bytes),
        show_bytes(found.vram_budget_bytes)
    );
    if let (Some(predicted), Some(lost)) = (&found.predicted, lost) {
        println!(
            "predicted{}: {:.2} tok/s with whole layers, {:.2} with the plan: {:.0} % lost to the coarser placement (at \
             the plan's rates; llama.cpp's own kernels differ)",
            if emulated { " for emulated tiers" } else { "" },
            predicted.decode_tok_s,
            plan.predicted.decode_tok_s,
            lost.max(0.0) * 100.0
        );
    }
    for note in &found.notes {
        println!("note: {note}");
    }
    if let Some(output) = &args.output {
        println!("wrote {}", output.display());
    }
    Ok(())
}

fn counted(args: &ExportArgs, plan: &Placement, shape: &ModelShape, profile: Option<&Profile>) -> Result<()> {
    let to = if args.to == ExportTo::Sglang { "sglang" } else { "ktransformers" };
    let profile =
        profile.with_context(|| format!("--to {to} writes how often each expert was used; give --profile"))?;
    let table = counts::counts(shape, profile)?;
    let output = args.output.clone().unwrap_or_else(|| PathBuf::from("expert-counts.json"));
    safely::check(&output)?;
    safely::write(&output, serde_json::to_string(&counts::to_json(&table))?.as_bytes())?;
    let lines = launch(args.to, &output, plan);
    if args.json {
        let value = json!({
            "to": to,
            "written": output,
            "layers": table.len(),
            "experts": table.first().map_or(0, Vec::len),
            "commands": lines,
        });
        let value: Value = value;
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    for line in &lines {
        println!("{line}");
    }
    println!();
    println!("note: {to} has no use for the plan itself, only for the counts of its profile");
    println!("wrote {}", output.display());
    Ok(())
}

/// What to type then.
fn launch(to: ExportTo, counts: &Path, plan: &Placement) -> Vec<String> {
    let file = llama_cpp::quoted(&counts.display().to_string());
    if to != ExportTo::Ktransformers {
        return vec![format!("python -m sglang.launch_server --model MODEL --init-expert-location {file}")];
    }
    // It reads tensors as PyTorch saves them, so PyTorch is to save them.
    let tensors = counts.with_extension("pt");
    let script = format!(
        "import json, torch; torch.save({{'{key}': torch.tensor(json.load(open({from:?}))['{key}'])}}, {to:?})",
        key = counts::KEY,
        from = counts.display().to_string(),
        to = tensors.display().to_string()
    );
    let vram = |tier: usize| plan.tiers[tier].tier.kind == tier_plan_runtime::formats::machine::TierKind::Vram;
    let on_gpu = |l: &placement::LayerPlacement| -> usize {
        l.pinned.iter().filter(|pins| vram(pins.tier)).map(|pins| pins.experts.len()).sum()
    };
    let each = plan.layers.iter().map(on_gpu).sum::<usize>() / plan.layers.len().max(1);
    vec![
        format!("python -c {}", llama_cpp::quoted(&script)),
        format!(
            "python -m sglang.launch_server --model MODEL --kt-num-gpu-experts {each} --kt-expert-placement-strategy \
             frequency --init-expert-location {}",
            llama_cpp::quoted(&tensors.display().to_string())
        ),
    ]
}
