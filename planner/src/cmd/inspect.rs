//! `tier-plan inspect`: contents of a model file, without reading its weights.

use crate::by_token::{self, ByToken};
use crate::catalogue::{self, Named};
use crate::cmd::args::{JsonArgs, ModelArgs};
use crate::opening::naming;
use crate::printable::printable;
use crate::special;
use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::profile;
use tier_plan_runtime::formats::shape::{Architecture, Mix};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::describe;
use tier_plan_runtime::model::kv::CacheRoom;
use tier_plan_runtime::model::shape::{CacheShape, DenseKind, ModelShape, shape_of};
use tier_plan_runtime::units::show_bytes;

/// Options of `tier-plan inspect`.
#[derive(Debug, Args)]
#[command(
    about = "Show a model file's architecture, shapes, and bytes by tensor group and type; also reads shapes and profiles",
    after_long_help = "Example:\n  tier-plan inspect MODEL.gguf\n  tier-plan inspect kimi-k2.5 --quant q2_k"
)]
pub struct InspectArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// Quantization to assume for a shape [default: q4_k_m]
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    pub quant: Option<String>,
    /// List every tensor
    #[arg(long, help_heading = "Output")]
    pub tensors: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub output: JsonArgs,
}

/// Bytes and tensors of one type.
#[derive(Default)]
struct TypeSum {
    tensors: u64,
    bytes: u64,
}

/// Checks that the drive gives the beginning of a file, without which it would be taken for one of
/// another kind.
///
/// # Errors
/// When reading fails.
fn check_readable(path: &Path) -> Result<()> {
    if path.is_file() {
        File::open(path)
            .and_then(|mut file| file.read(&mut [0]))
            .with_context(|| format!("reading {}", path.display()))?;
    }
    Ok(())
}

/// Runs the command.
///
/// # Errors
/// When an option is invalid, a file cannot be read or written, or the model cannot be loaded.
pub fn run(args: &InspectArgs) -> Result<()> {
    let model = args.model.path()?;
    if profile::is_profile(model) {
        ensure!(
            !args.tensors && args.quant.is_none(),
            "--tensors and --quant apply to models, and this is a profile"
        );
        return super::profile::show(&profile::read(model)?, model, args.output.json);
    }
    check_readable(model)?;
    if let Named::Shape(shape) = catalogue::named(model)? {
        ensure!(
            !args.tensors,
            "--tensors: '{}' is a shape, which has no tensors to list",
            shape.name
        );
        return show_shape(
            &shape,
            catalogue::mix(args.quant.as_deref())?,
            args.output.json,
        );
    }
    ensure!(
        args.quant.is_none(),
        "--quant applies to shapes, and {} is a model file",
        model.display()
    );
    let gguf = Gguf::open(model)?;
    let spec = describe(&gguf).map_err(|e| naming(model, e))?;
    let shape = shape_of(&gguf, &spec);
    let mut types: BTreeMap<&str, TypeSum> = BTreeMap::new();
    for tensor in gguf.tensors() {
        let sum = types.entry(tensor.ty.name()).or_default();
        sum.tensors += 1;
        sum.bytes += tensor.n_bytes;
    }
    let groups = groups(&shape);
    let special = special::special(&spec);
    if args.output.json {
        print_json(args, &gguf, &shape, &types, &groups, &special)
    } else {
        print_text(args, &gguf, &shape, &types, &groups, &special);
        Ok(())
    }
}

/// Bytes by tensor group over all layers: name, bytes held, bytes a decoded token reads.
fn groups(shape: &ModelShape) -> Vec<(&'static str, u64, u64)> {
    let kinds = [
        ("embedding", DenseKind::Embedding),
        ("token table", DenseKind::TokenTable),
        ("attention", DenseKind::Attention),
        ("router", DenseKind::Router),
        ("shared experts", DenseKind::SharedExpert),
        ("dense feed-forward", DenseKind::DenseFfn),
        ("head", DenseKind::Head),
    ];
    let mut rows: Vec<_> = kinds
        .into_iter()
        .map(|(name, kind)| {
            let of_kind = shape.dense.iter().filter(|d| d.kind == kind);
            of_kind.fold((name, 0, 0), |(name, bytes, token), d| {
                (name, bytes + d.bytes, token + d.token_bytes)
            })
        })
        .filter(|(_, bytes, _)| *bytes > 0)
        .collect();
    if !shape.experts.is_empty() {
        let held = shape
            .experts
            .iter()
            .map(|e| e.expert_bytes * u64::from(e.n_expert))
            .sum();
        let token = shape
            .experts
            .iter()
            .map(|e| e.expert_bytes * u64::from(e.n_used))
            .sum();
        rows.push(("routed experts", held, token));
    }
    rows
}

/// Prints the sizes that shapes and model files have in common.
fn print_sizes(shape: &ModelShape, groups: &[(&'static str, u64, u64)]) {
    println!(
        "{} layers, hidden {}, vocabulary {}, context {}",
        shape.n_layer, shape.hidden, shape.n_vocab, shape.context
    );
    if let Some(first) = shape.experts.first() {
        let sizes = shape.experts.iter().map(|e| e.expert_bytes);
        let (min, max) = (sizes.clone().min().unwrap_or(0), sizes.max().unwrap_or(0));
        let size = if min == max {
            show_bytes(min)
        } else {
            format!("{} to {}", show_bytes(min), show_bytes(max))
        };
        println!(
            "{} layers with {} routed experts each, {} used per token; an expert takes {size}",
            shape.experts.len(),
            first.n_expert,
            first.n_used
        );
    }
    let kv = |ty: KvType| show_bytes(ty.token_bytes(shape));
    println!(
        "key and value cache: {} per token of context as f16, {} as q8_0",
        kv(KvType::F16),
        kv(KvType::Q8_0)
    );
    print_windows(shape);
    if shape.state_bytes() > 0 {
        println!(
            "recurrent state: {}, whatever the length of the context",
            show_bytes(shape.state_bytes())
        );
    }
    println!();
    println!(
        "{:<20} {:>12} {:>7} {:>18}",
        "group", "bytes", "share", "read per token"
    );
    let total = shape.weight_bytes();
    for (name, bytes, token) in groups {
        let share = *bytes as f64 / total as f64 * 100.0;
        println!(
            "{name:<20} {:>12} {share:>6.1}% {:>18}",
            show_bytes(*bytes),
            show_bytes(*token)
        );
    }
    println!(
        "{:<20} {:>12} {:>6}% {:>18}",
        "all",
        show_bytes(total),
        100,
        show_bytes(shape.token_bytes())
    );
    let parts = by_token::parts(shape);
    let special = by_token::is_special(&parts);
    for part in parts.iter().filter(|_| special) {
        println!("chosen by the token alone: {}", part.sentence());
    }
}

fn show_shape(of: &Architecture, mix: Mix, as_json: bool) -> Result<()> {
    let shape = of.model_shape(mix);
    let (groups, parameters) = (groups(&shape), of.parameters());
    let bits = shape.weight_bytes() as f64 * 8.0 / parameters.total as f64;
    if as_json {
        let mut value = sizes_json(&shape, &groups);
        value["shape"] = json!(of.name);
        value["quant"] = json!(mix.name());
        value["approximate"] = json!(true);
        value["parameters"] = json!(parameters.total);
        value["active_parameters"] = json!(parameters.active);
        value["bits_per_weight"] = json!(bits);
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    println!(
        "{} ({}), a shape without weights: {}",
        printable(&of.name),
        printable(&of.arch),
        printable(&of.description)
    );
    println!("source: {}", of.source);
    let billions = |n: u64| n as f64 / 1e9;
    println!(
        "{:.1}e9 parameters, {:.2}e9 active; at {} about {bits:.2} bits each",
        billions(parameters.total),
        billions(parameters.active),
        mix.name()
    );
    print_sizes(&shape, &groups);
    println!();
    println!(
        "Tensor types are those that llama.cpp gives a {} file when nothing is overridden; a published file differs by some \
         percent. Other sizes: --quant {}.",
        mix.name(),
        Mix::ALL.map(Mix::name).join("|")
    );
    Ok(())
}

fn print_text(
    args: &InspectArgs,
    gguf: &Gguf,
    shape: &ModelShape,
    types: &BTreeMap<&str, TypeSum>,
    groups: &[(&'static str, u64, u64)],
    special: &[String],
) {
    println!(
        "{} ({}, {} in {} part(s))",
        printable(&shape.id.name),
        printable(&shape.arch),
        show_bytes(gguf.file_bytes()),
        gguf.n_parts()
    );
    if let Some(family) = special::family(&shape.arch) {
        println!("family: {family}");
    }
    for what in special {
        println!("special: {what}");
    }
    print_sizes(shape, groups);
    let total = shape.weight_bytes();
    println!();
    println!("{:<20} {:>12} {:>15}", "tensor type", "bytes", "tensors");
    for (name, sum) in types {
        println!(
            "{name:<20} {:>12} {:>15}",
            show_bytes(sum.bytes),
            sum.tensors
        );
    }
    let tensors: u64 = gguf.tensors().iter().map(|t| t.n_bytes).sum();
    if tensors > total {
        println!(
            "\n{} of tensors are not used for generating text",
            show_bytes(tensors - total)
        );
    }
    if args.tensors {
        println!();
        for tensor in gguf.tensors() {
            println!(
                "{:<44} {:<8} {:>12}  {:?}",
                printable(&tensor.name),
                tensor.ty,
                show_bytes(tensor.n_bytes),
                tensor.dims
            );
        }
    }
}

/// Prints how many layers have a sliding window, and what that saves where the context is as long as
/// the model was trained for.
fn print_windows(shape: &ModelShape) {
    let mut windows: BTreeMap<u64, usize> = BTreeMap::new();
    for window in shape.caches.iter().filter_map(CacheShape::window) {
        *windows.entry(window).or_default() += 1;
    }
    if windows.is_empty() {
        return;
    }
    let each = windows
        .iter()
        .map(|(window, n)| format!("{n} of {} layers see {window} positions", shape.n_layer));
    let each: Vec<String> = each.collect();
    let bytes = |room| show_bytes(KvType::F16.cache_bytes(shape, room));
    let room = CacheRoom::of_one(shape.context).for_model(shape);
    println!(
        "sliding windows: {}; the cache of {} tokens takes {} as f16, {} with all positions",
        each.join(", "),
        shape.context,
        bytes(room),
        bytes(room.whole())
    );
}

fn sizes_json(shape: &ModelShape, groups: &[(&'static str, u64, u64)]) -> Value {
    json!({
        "name": shape.id.name,
        "hash": shape.id.hash,
        "arch": shape.arch,
        "weight_bytes": shape.weight_bytes(),
        "token_bytes": shape.token_bytes(),
        "kv_bytes_per_token": KvType::F16.token_bytes(shape),
        "kv_q8_0_bytes_per_token": KvType::Q8_0.token_bytes(shape),
        "state_bytes": shape.state_bytes(),
        "windows": shape.caches.iter().map(CacheShape::window).collect::<Vec<_>>(),
        "context_bytes": KvType::F16.cache_bytes(shape, CacheRoom::of_one(shape.context).for_model(shape)),
        "n_layer": shape.n_layer,
        "hidden": shape.hidden,
        "n_vocab": shape.n_vocab,
        "context": shape.context,
        "groups": groups.iter().map(|(name, bytes, token)| json!({
            "name": name, "bytes": bytes, "token_bytes": token,
        })).collect::<Vec<_>>(),
        "experts": shape.experts.iter().map(|e| json!({
            "layer": e.layer, "n_expert": e.n_expert, "n_used": e.n_used, "expert_bytes": e.expert_bytes,
            "by_token": e.by_token,
        })).collect::<Vec<_>>(),
        "by_token": by_token::parts(shape).iter().map(ByToken::as_json).collect::<Vec<_>>(),
    })
}

fn print_json(
    args: &InspectArgs,
    gguf: &Gguf,
    shape: &ModelShape,
    types: &BTreeMap<&str, TypeSum>,
    groups: &[(&'static str, u64, u64)],
    special: &[String],
) -> Result<()> {
    let mut value = sizes_json(shape, groups);
    value["family"] = json!(special::family(&shape.arch));
    value["special"] = json!(special);
    value["parts"] = json!(gguf.n_parts());
    value["file_bytes"] = json!(gguf.file_bytes());
    value["types"] = types
        .iter()
        .map(|(name, sum)| json!({ "name": name, "tensors": sum.tensors, "bytes": sum.bytes }))
        .collect();
    if args.tensors
        && let Some(object) = value.as_object_mut()
    {
        let tensors = gguf.tensors().iter().map(|t| {
            json!({ "name": t.name, "type": t.ty.name(), "dims": t.dims, "bytes": t.n_bytes, "part": t.part, "offset": t.offset })
        });
        object.insert("tensors".into(), tensors.collect());
    }
    println!("{}", serde_json::to_string_pretty(&value)?);
    Ok(())
}
