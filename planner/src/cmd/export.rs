//! `tier-plan export`: writes a plan, or the counts it was made from, for another engine.

use crate::catalogue;
use crate::cmd::args::{JsonArgs, ModelOption, check_profile};
use crate::export::{counts, llama_cpp, shell};
use crate::json::path_json;
use crate::profile::Evidence;
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::placement::{self, Placement};
use tier_plan_runtime::formats::profile::Profile;
use tier_plan_runtime::formats::safely;
use tier_plan_runtime::model::shape::ModelShape;
use tier_plan_runtime::units::show_bytes;

/// Options of `tier-plan export`.
#[derive(Debug, Args)]
#[command(
    about = "Export a plan as flags or files for another engine",
    after_long_help = "Example:\n  tier-plan export placement.toml -m MODEL.gguf -P MODEL.profile --to llama.cpp"
)]
pub struct ExportArgs {
    /// Plan to export
    pub plan: PathBuf,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelOption,
    /// Engine to export to; sglang and ktransformers get the counts of the profile
    #[arg(long, value_enum, value_name = "ENGINE")]
    pub to: ExportTo,
    /// File to write: a script for llama.cpp, counts for the others [default: no script;
    /// expert-counts.json]
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

/// Engine that a plan is exported to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportTo {
    /// A command line: experts of whole layers on the GPU or the CPU
    #[value(name = "llama.cpp")]
    LlamaCpp,
    /// Use counts per expert, for its `frequency` placement
    Ktransformers,
    /// Use counts per expert, for its expert-parallel load balancer
    Sglang,
    /// Nothing: vLLM reads neither placements nor counts, and the error says so
    Vllm,
}

/// Error for vLLM, which has nothing to export to.
const VLLM: &str = "vLLM reads neither a placement of experts nor counts of their use: its load balancer (--enable-eplb, \
                    --eplb-config) counts while it serves, --expert-placement-strategy is only linear or round_robin, and \
                    all experts are in GPU memory. Use --to sglang for an engine that starts from counts, or --to \
                    llama.cpp for one that leaves experts in main memory";

/// Runs the command.
///
/// # Errors
/// When an option is invalid, a file cannot be read or written, or the model cannot be loaded.
pub fn run(args: &ExportArgs) -> Result<()> {
    if args.to == ExportTo::Vllm {
        bail!("{VLLM}");
    }
    let plan = placement::read(&args.plan)?;
    let known = catalogue::model(&args.model.model, args.model.quant.as_deref())?;
    plan.check_model(&known.sizes.id, &args.plan)?;
    let profile = args.model.read_profile(&known)?;
    if let Some(output) = &args.output {
        safely::check(output)?;
    }
    match args.to {
        ExportTo::LlamaCpp => llama_cpp(args, &plan, &known.sizes, profile.as_ref()),
        ExportTo::Sglang | ExportTo::Ktransformers => {
            counted(args, &plan, &known.sizes, profile.as_ref())
        }
        ExportTo::Vllm => bail!("{VLLM}"),
    }
}

fn llama_cpp(
    args: &ExportArgs,
    plan: &Placement,
    shape: &ModelShape,
    profile: Option<&Profile>,
) -> Result<()> {
    check_profile(plan, &args.plan, profile)?;
    // A plan made without a profile is judged without one.
    let evidence = Evidence::new(shape, profile.filter(|_| plan.profile.is_some()))?;
    let found = llama_cpp::command_line(plan, shape, &evidence)?;
    let model = &args.model.model;
    let quoted = found.args.iter().map(|arg| llama_cpp::quoted(arg));
    let options: String = quoted.map(|arg| format!(" {arg}")).collect();
    let line = format!("llama-server -m {}{options}", shell::shown(model));
    if let Some(output) = &args.output {
        let mut script = b"#!/bin/sh\nexec llama-server -m ".to_vec();
        script.extend(shell::quoted_bytes(model));
        script.extend(format!("{options} \"$@\"\n").bytes());
        safely::write(output, &script)?;
    }
    let lost = found.predicted.as_ref().map(|p| llama_cpp::loss(plan, p));
    let emulated = plan.tiers.iter().any(|t| t.tier.emulated);
    if args.format.json {
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
            "written": args.output.as_ref().map(path_json),
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

fn counted(
    args: &ExportArgs,
    plan: &Placement,
    shape: &ModelShape,
    profile: Option<&Profile>,
) -> Result<()> {
    let to = if args.to == ExportTo::Sglang {
        "sglang"
    } else {
        "ktransformers"
    };
    let profile = profile
        .with_context(|| format!("--to {to}: no use counts to write, expected --profile FILE"))?;
    let table = counts::counts(shape, profile)?;
    let output = args
        .output
        .clone()
        .unwrap_or_else(|| PathBuf::from("expert-counts.json"));
    safely::check(&output)?;
    safely::write(
        &output,
        serde_json::to_string(&counts::to_json(&table))?.as_bytes(),
    )?;
    let lines = launch(args.to, &output, plan);
    if args.format.json {
        let value = json!({
            "to": to,
            "written": path_json(&output),
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
    println!("note: {to} uses only the counts of the profile, not the plan");
    println!("wrote {}", output.display());
    Ok(())
}

/// Returns the command lines that use the counts.
fn launch(to: ExportTo, counts: &Path, plan: &Placement) -> Vec<String> {
    let file = shell::shown(counts);
    if to != ExportTo::Ktransformers {
        return vec![format!(
            "python -m sglang.launch_server --model MODEL --init-expert-location {file}"
        )];
    }
    // ktransformers reads tensors that PyTorch saved.
    let tensors = shell::shown(&counts.with_extension("pt"));
    let script = format!(
        "import json, sys, torch; torch.save({{'{key}': torch.tensor(json.load(open(sys.argv[1]))['{key}'])}}, sys.argv[2])",
        key = counts::KEY,
    );
    let vram = |tier: placement::TierIdx| {
        plan.tiers[tier].tier.kind == tier_plan_runtime::formats::machine::TierKind::Vram
    };
    let on_gpu = |l: &placement::LayerPlacement| -> usize {
        l.pinned
            .iter()
            .filter(|pins| vram(pins.tier))
            .map(|pins| pins.experts.len())
            .sum()
    };
    let each = plan.layers.iter().map(on_gpu).sum::<usize>() / plan.layers.len().max(1);
    vec![
        format!("python -c {} {file} {tensors}", llama_cpp::quoted(&script)),
        format!(
            "python -m sglang.launch_server --model MODEL --kt-num-gpu-experts {each} --kt-expert-placement-strategy \
             frequency --init-expert-location {tensors}"
        ),
    ]
}
