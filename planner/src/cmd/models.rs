//! `tier-plan models`: lists the GGUF files that are here, and removes cached ones.

use crate::cmd::args::JsonArgs;
use crate::confirm::{can_ask, confirmed};
use crate::folders;
use crate::hint::HintExt;
use crate::json::path_json;
use crate::models::{Found, Places, list, removal};
use crate::print::digits;
use crate::printable::printable;
use anyhow::{Result, anyhow, ensure};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use std::path::PathBuf;
use tier_plan_runtime::units::show_bytes;

/// Version of the JSON form.
const VERSION: u64 = 1;

/// Options of `tier-plan models`.
#[derive(Debug, Args)]
#[command(
    about = "List the GGUF files in this folder, in folders of models, and in the cache of Hugging Face",
    after_long_help = "Example:\n  tier-plan models --models-dir ~/models\n  tier-plan models rm hf:owner/repo:Q4_K_M"
)]
pub struct ModelsArgs {
    #[command(subcommand)]
    #[allow(missing_docs)]
    pub action: Option<Action>,
    /// Folder of models to list with the folders in it; repeatable
    #[arg(long, value_name = "FOLDER", help_heading = "Model")]
    pub models_dir: Vec<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

/// What to do instead of listing.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// Remove a model from the cache of Hugging Face, after asking
    Rm {
        /// Name as the list shows it or the end of it, a path in the cache, or a name such as
        /// hf:OWNER/REPO:QUANTIZATION
        #[arg(value_name = "NAME")]
        name: String,
        /// Remove without asking
        #[arg(short, long)]
        force: bool,
    },
}

/// Runs the command.
///
/// # Errors
/// When there is no such model, it is not to be removed, or the system refuses.
pub fn run(args: &ModelsArgs) -> Result<()> {
    let found = list(&Places {
        here: Some(PathBuf::from(".")),
        folders: args.models_dir.clone(),
        hugging_face: crate::hub::folder(),
    });
    if let Some(Action::Rm { name, force }) = &args.action {
        return remove(name, *force, &found);
    }
    if args.format.json {
        let models: Vec<Value> = found.iter().map(as_json).collect();
        let value = json!({ "version": VERSION, "models": models });
        println!("{}", serde_json::to_string_pretty(&value)?);
    } else {
        print_text(&found);
    }
    Ok(())
}

fn remove(name: &str, force: bool, models: &[Found]) -> Result<()> {
    let removal = removal(name, models, &folders::variable)?;
    let what = format!(
        "{}: {} file(s), {}",
        printable(&removal.name),
        removal.links.len(),
        show_bytes(removal.bytes)
    );
    if !force {
        if !can_ask() {
            return Err(anyhow!("{what}: not removed without a yes")).hint("pass --force");
        }
        ensure!(
            confirmed(&format!("remove {what}? [y/N] "))?,
            "{what}: not removed"
        );
    }
    removal.remove()?;
    println!("removed {what}");
    Ok(())
}

fn print_text(found: &[Found]) {
    if found.is_empty() {
        println!(
            "no GGUF files in this folder or the cache of Hugging Face; --models-dir FOLDER, or models-dir in the \
             configuration file, names more folders"
        );
        return;
    }
    let width = found
        .iter()
        .map(|f| printable(&f.name).chars().count())
        .max();
    let width = width.unwrap_or(0).min(80);
    for model in found {
        let name = printable(&model.name);
        let bytes = show_bytes(model.bytes);
        if let Some(error) = &model.error {
            println!("{name:<width$} {bytes:>10}  {}", printable(error));
            continue;
        }
        let arch = printable(model.arch.as_deref().unwrap_or("unknown"));
        let quantization = model.quantization.as_deref().unwrap_or("unknown");
        let parameters = model.parameters.map_or(0.0, |n| n as f64 / 1e9);
        let mut beside = Vec::new();
        match model.plans.len() {
            0 => {}
            1 => beside.push("a plan".to_string()),
            n => beside.push(format!("{n} plans")),
        }
        beside.extend(model.profile.as_ref().map(|_| "a profile".to_string()));
        beside.extend(model.pack.as_ref().map(|_| "packed experts".to_string()));
        beside.extend(model.measured.as_ref().map(|m| {
            let day = m.when.split('T').next().unwrap_or_default();
            format!("{} tok/s on {}", digits(m.decode_tok_s), printable(day))
        }));
        println!(
            "{name:<width$} {bytes:>10}  {arch}, {quantization}, {parameters:.2}e9 parameters{}{}",
            if beside.is_empty() { "" } else { "; " },
            beside.join(", ")
        );
    }
}

fn as_json(model: &Found) -> Value {
    json!({
        "name": model.name,
        "path": path_json(&model.path),
        "cached": model.cached_in.is_some(),
        "bytes": model.bytes,
        "parts": model.parts,
        "arch": model.arch,
        "quantization": model.quantization,
        "parameters": model.parameters,
        "plans": model.plans.iter().map(path_json).collect::<Vec<_>>(),
        "profile": model.profile.as_ref().map(path_json),
        "pack": model.pack.as_ref().map(path_json),
        "decode_tok_s": model.measured.as_ref().map(|m| m.decode_tok_s),
        "measured": model.measured.as_ref().map(|m| m.when.clone()),
        "error": model.error,
    })
}
