//! `tier-plan pack`: a copy of a model's experts in which each lies in one piece.

use crate::cli::PackArgs;
use crate::session::{self, Interrupted, naming};
use crate::{progress, store};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::collections::HashSet;
use std::path::Path;
use std::time::SystemTime;
use tier_plan_runtime::experts::pack::{Pack, PackError, index, write};
use tier_plan_runtime::formats::{placement, profile, safely};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::describe;
use tier_plan_runtime::model::spec::ModelSpec;
use tier_plan_runtime::tiers::limits::file_system_bytes;
use tier_plan_runtime::units::{show_bytes, show_utc};

/// Free bytes of a file system that a copy must leave: full ones work badly.
const SPARE_BYTES: u64 = 64 << 20;

/// Runs it.
pub fn run(args: &PackArgs) -> Result<()> {
    let gguf = Gguf::open(&args.model)?;
    let spec = describe(&gguf).map_err(|e| naming(&args.model, e))?;
    ensure!(spec.moe_layers().next().is_some(), "{}: this model has no routed experts", args.model.display());
    let output = args.output.clone().unwrap_or_else(|| store::default_pack(&gguf));
    let index = index(&gguf, &spec, &experts(args, &gguf, &spec)?, show_utc(SystemTime::now()));
    let n: usize = index.layers.iter().map(|l| l.experts.len()).sum();
    ensure!(n > 0, "nothing to copy: the plan pins every expert");
    safely::check(&output)?;
    check_room(&output, index.expert_bytes())?;
    let catching = session::catch_interrupts();
    let bar = progress::bytes("copying experts");
    let written = write(&gguf, &spec, &index, &output, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        !session::interrupted()
    });
    bar.finish_and_clear();
    drop(catching);
    match written {
        Err(PackError::Interrupted) => return Err(Interrupted.into()),
        Err(PackError::Read(error)) => return Err(naming(&args.model, error)),
        Err(error) => return Err(error.into()),
        Ok(()) => {}
    }
    let saving = Pack::open(&gguf, &spec, &output)?.saving();
    let bytes = std::fs::metadata(&output).with_context(|| output.display().to_string())?.len();
    if args.json {
        let value = json!({
            "model": index.model.name,
            "experts_file": output,
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

/// The experts of each layer with routed ones, in the order in which they are to lie.
fn experts(args: &PackArgs, gguf: &Gguf, spec: &ModelSpec) -> Result<Vec<Vec<u32>>> {
    let mut experts: Vec<Vec<u32>> = spec.moe_layers().map(|(_, moe)| (0..moe.n_expert as u32).collect()).collect();
    if let Some(path) = &args.plan {
        let plan = placement::read(path)?;
        plan.check_model(&gguf.id(), path)?;
        for ((layer, _), experts) in spec.moe_layers().zip(&mut experts) {
            let placed = plan.layers.iter().filter(|l| l.layer as usize == layer);
            let pinned: HashSet<u32> = placed.flat_map(|l| &l.pinned).flat_map(|pins| &pins.experts).copied().collect();
            experts.retain(|e| !pinned.contains(e));
        }
    }
    if let Some(path) = &args.profile {
        let profile = profile::read(path)?;
        profile.check_model(&gguf.id(), path)?;
        let used = store::by_use(&profile);
        for ((layer, _), experts) in spec.moe_layers().zip(&mut experts) {
            let Some(order) = used.iter().find(|l| l.layer as usize == layer) else { continue };
            let rank = |e: u32| order.experts.iter().position(|u| *u == e).unwrap_or(usize::MAX);
            experts.sort_by_cached_key(|e| rank(*e));
        }
    }
    Ok(experts)
}

/// Refuses to begin what would fill the disk.
fn check_room(output: &Path, bytes: u64) -> Result<()> {
    let folder = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // A device or a pipe has no room of its own.
    if output.exists() && !output.is_file() {
        return Ok(());
    }
    if let Some((_, free)) = file_system_bytes(folder) {
        ensure!(
            bytes.saturating_add(SPARE_BYTES) <= free,
            "{}: the copy takes {}, but {} are free there; choose another folder with -o, or copy fewer experts with --plan",
            output.display(),
            show_bytes(bytes),
            show_bytes(free)
        );
    }
    Ok(())
}
