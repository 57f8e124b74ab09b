//! `tier-plan pack`: copies a model's experts so that each is one contiguous block.

use crate::cmd::args::{JsonArgs, ModelArgs};
use crate::interrupt::Interrupted;
use crate::json::path_json;
use crate::opening::naming;
use crate::{progress, store};
use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::json;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use tier_plan_runtime::experts::pack::{Pack, PackError, index, write};
use tier_plan_runtime::formats::{placement, profile, safely};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::describe;
use tier_plan_runtime::model::spec::ModelSpec;
use tier_plan_runtime::tiers::limits::file_system_space;
use tier_plan_runtime::units::{show_bytes, show_utc};

/// Options of `tier-plan pack`.
#[derive(Debug, Args)]
#[command(
    about = "Copy a model's experts so that each is contiguous in the file, for `run` and `bench` when memory is short",
    after_long_help = "Example:\n  tier-plan pack MODEL.gguf -P MODEL.profile\n  tier-plan run MODEL.gguf --memory 8GiB -p Hello"
)]
pub struct PackArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// File to write [default: MODEL.experts]
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    pub output: Option<PathBuf>,
    /// Copy only the experts that this plan leaves on its last tier
    #[arg(long, value_name = "FILE")]
    pub plan: Option<PathBuf>,
    /// Put the experts that this profile shows as most used first in each layer
    #[arg(short = 'P', short_alias = 'p', long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

/// Free bytes that a copy must leave on its file system, since full ones work badly.
const SPARE_BYTES: u64 = 64 << 20;

/// Runs the command.
///
/// # Errors
/// When an option is invalid, a file cannot be read or written, or the model cannot be loaded.
pub fn run(args: &PackArgs) -> Result<()> {
    let model = args.model.path()?;
    let gguf = Gguf::open(model)?;
    let spec = describe(&gguf).map_err(|e| naming(model, e))?;
    ensure!(
        spec.moe_layers().next().is_some(),
        "{}: this model has no routed experts",
        model.display()
    );
    let output = args
        .output
        .clone()
        .unwrap_or_else(|| store::default_pack(&gguf));
    let index = index(
        &gguf,
        &spec,
        &experts(args, &gguf, &spec)?,
        show_utc(SystemTime::now()),
    );
    let n: usize = index.layers.iter().map(|l| l.experts.len()).sum();
    ensure!(n > 0, "nothing to copy: the plan pins every expert");
    // The copy is opened when it is complete.
    safely::check_file(&output)?;
    check_room(&output, index.expert_bytes())?;
    let catching = crate::interrupt::catch_interrupts();
    let bar = progress::bytes("copying experts");
    let written = write(&gguf, &spec, &index, &output, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        !crate::interrupt::interrupted()
    });
    bar.finish_and_clear();
    drop(catching);
    match written {
        Err(PackError::Interrupted) => return Err(Interrupted.into()),
        Err(PackError::Read(error)) => return Err(naming(model, error)),
        Err(error) => return Err(error.into()),
        Ok(()) => {}
    }
    let saving = Pack::open(&gguf, &spec, &output)?.saving();
    let bytes = std::fs::metadata(&output)
        .with_context(|| output.display().to_string())?
        .len();
    if args.format.json {
        let value = json!({
            "model": index.model.name,
            "experts_file": path_json(&output),
            "experts": n,
            "layers": index.layers.len(),
            "bytes": bytes,
            "read_bytes_before": saving.before_bytes,
            "read_bytes": saving.after_bytes,
            "stretches_before": saving.stretches,
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
    } else {
        println!(
            "{}: {n} experts of {} layers, {}; a miss reads {} from it, instead of {} in {:.0} places",
            output.display(),
            index.layers.len(),
            show_bytes(bytes),
            show_bytes(saving.after_bytes as u64),
            show_bytes(saving.before_bytes as u64),
            saving.stretches
        );
    }
    Ok(())
}

/// Returns the experts of each MoE layer in the order in which to write them.
fn experts(args: &PackArgs, gguf: &Gguf, spec: &ModelSpec) -> Result<Vec<Vec<u32>>> {
    let mut experts: Vec<Vec<u32>> = spec
        .moe_layers()
        .map(|(_, moe)| (0..moe.n_expert as u32).collect())
        .collect();
    if let Some(path) = &args.plan {
        let plan = placement::read(path)?;
        plan.check_model(&gguf.id(), path)?;
        for ((layer, _), experts) in spec.moe_layers().zip(&mut experts) {
            let placed = plan.layers.iter().filter(|l| l.layer as usize == layer);
            let pinned: HashSet<u32> = placed
                .flat_map(|l| &l.pinned)
                .flat_map(|pins| &pins.experts)
                .copied()
                .collect();
            experts.retain(|e| !pinned.contains(e));
        }
    }
    if let Some(path) = &args.profile {
        let profile = profile::read(path)?;
        profile.check_model(&gguf.id(), path)?;
        let used = store::by_use(&profile);
        for ((layer, _), experts) in spec.moe_layers().zip(&mut experts) {
            let Some(order) = used.iter().find(|l| l.layer as usize == layer) else {
                continue;
            };
            let rank = |e: u32| {
                order
                    .experts
                    .iter()
                    .position(|u| *u == e)
                    .unwrap_or(usize::MAX)
            };
            experts.sort_by_cached_key(|e| rank(*e));
        }
    }
    Ok(experts)
}

/// Checks that the copy fits the file system, before hours of copying.
fn check_room(output: &Path, bytes: u64) -> Result<()> {
    // A link's target is what gets the bytes.
    let target = std::fs::canonicalize(output);
    let target = target.as_deref().unwrap_or(output);
    let folder = target
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    if let Some(free) = file_system_space(folder).map(|space| space.free_bytes) {
        ensure!(
            bytes.saturating_add(SPARE_BYTES) <= free,
            "{}: the copy takes {}, but {} are free there",
            output.display(),
            show_bytes(bytes),
            show_bytes(free)
        );
    }
    Ok(())
}
