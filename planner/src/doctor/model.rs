//! A model on this machine: whether it opens, fits, and how fast it would be.

use super::forecast::cost;
use super::{Change, Check, Forecast, Process, files};
use crate::budget::{self, Decision, Fit};
use crate::hub::{self, ToFetch};
use crate::opening::{Opening, naming};
use crate::prepared::context_without_plan;
use crate::printable::printable;
use anyhow::Result;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use tier_plan_runtime::cuda::source::{matvec_kernel, module_of};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::kernels::{BAND_ROWS, Kernels, RowOrder};
use tier_plan_runtime::model::describe;
use tier_plan_runtime::model::shape::{ModelShape, shape_of};
use tier_plan_runtime::model::spec::ModelSpec;
use tier_plan_runtime::quant::TensorType;
use tier_plan_runtime::tiers::limits::Limit;
use tier_plan_runtime::units::show_bytes;

/// Memory in which every model fits.
const ENOUGH_BYTES: u64 = 1 << 50;

/// A model that can be described.
pub struct Opened {
    pub(super) gguf: Gguf,
    pub(super) spec: ModelSpec,
    pub(super) shape: ModelShape,
    context: u32,
}

/// The model that is checked.
pub struct Given<'a> {
    /// Its file.
    pub path: &'a Path,
    /// What is missing of it, if the file has no more than the header.
    pub to_fetch: Option<&'a ToFetch>,
}

impl Given<'_> {
    /// Returns how commands name the model.
    pub(super) fn shown(&self) -> String {
        match self.to_fetch {
            Some(to_fetch) => to_fetch.name.clone(),
            None => self.path.display().to_string(),
        }
    }

    /// Returns the options with which `profile` writes a profile of the model, and with which `run`
    /// takes it.
    fn profile_options(&self) -> [String; 2] {
        match self.to_fetch {
            Some(_) => ["-o model.profile", "--profile model.profile"].map(str::to_string),
            None => {
                let beside = self.path.with_extension("profile");
                [String::new(), format!("--profile {}", beside.display())]
            }
        }
    }
}

impl Opened {
    /// Opens a model for a context of tokens; that of `run` when `None`.
    ///
    /// # Errors
    /// When it is no model, damaged, incomplete, or of an unknown architecture.
    pub fn open(given: &Given<'_>, context: Option<u32>) -> Result<Self> {
        let gguf = Gguf::open(given.path)?;
        let spec = describe(&gguf).map_err(|error| naming(Path::new(&given.shown()), error))?;
        let shape = shape_of(&gguf, &spec);
        Ok(Self {
            context: context_without_plan(&shape, context),
            gguf,
            spec,
            shape,
        })
    }

    /// Returns the model as plans are chosen for it.
    pub(super) fn model(&self) -> budget::Model<'_> {
        budget::Model {
            gguf: &self.gguf,
            spec: &self.spec,
            shape: &self.shape,
            context: self.context,
        }
    }
}

/// Checks a model, whether it opened or not. `forecast` may say why there is none.
pub(super) fn checks(
    given: &Given<'_>,
    opened: &Result<Opened>,
    process: &Process,
    limit: Option<&Limit>,
    forecast: Result<&Forecast<'_>, &str>,
) -> Vec<Check> {
    let opened = match opened {
        Ok(opened) => opened,
        Err(error) => {
            return vec![Check::ok("model.file", files::said(error)).failure(format!(
                "get the file as the line says, then `tier-plan inspect {}`",
                given.shown()
            ))];
        }
    };
    let mut checks = vec![
        file(given, opened),
        types(opened, process),
        fit(given, opened, limit, forecast.ok()),
        speed(opened, forecast),
    ];
    checks.extend(files::beside(given, opened));
    checks
}

/// Tells where a model would be fetched to, and whether it fits there.
pub(super) fn fetch(to_fetch: &ToFetch, free_bytes: Option<u64>) -> Check {
    let id = "model.fetch";
    let bytes = to_fetch.missing_bytes;
    let of_all = match to_fetch.total_bytes {
        total if total == bytes => String::new(),
        total => format!(" of {}", show_bytes(total)),
    };
    let (size, folder) = (show_bytes(bytes), to_fetch.folder.display());
    let free = free_bytes.map_or("unknown bytes".to_string(), show_bytes);
    let found = format!("{size}{of_all} to fetch to {folder}, where {free} are free");
    let check = Check::ok(id, found)
        .fact("folder", folder.to_string())
        .fact("missing_bytes", bytes)
        .fact("total_bytes", to_fetch.total_bytes)
        .fact("free_bytes", free_bytes);
    match free_bytes {
        Some(free) if !hub::fits(bytes, free) => check.failure(hub::SPACE_HINT),
        _ => check,
    }
}

fn file(given: &Given<'_>, opened: &Opened) -> Check {
    let (gguf, shape) = (&opened.gguf, &opened.shape);
    let name = given.path.file_name().unwrap_or(given.path.as_os_str());
    let listed = given.to_fetch.map(|to_fetch| to_fetch.total_bytes);
    let bytes = listed.unwrap_or_else(|| gguf.file_bytes());
    let parts = match gguf.n_parts() {
        1 => String::new(),
        n => format!(", all {n} parts"),
    };
    Check::ok(
        "model.file",
        format!(
            "{}: {}, {}{parts}",
            printable(&name.to_string_lossy()),
            printable(&shape.arch),
            show_bytes(bytes)
        ),
    )
    .fact("arch", shape.arch.as_str())
    .fact("bytes", bytes)
    .fact("parts", gguf.n_parts())
    .fact("hash", shape.id.hash.as_str())
}

/// Names the kernels of every tensor type, by the bytes that have it.
fn types(opened: &Opened, process: &Process) -> Check {
    let id = "model.types";
    let mut bytes: BTreeMap<TensorType, u64> = BTreeMap::new();
    for tensor in opened.gguf.tensors() {
        let sum = bytes.entry(tensor.ty).or_default();
        *sum = sum.saturating_add(tensor.n_bytes);
    }
    let all: u64 = bytes.values().fold(0, |sum, n| sum.saturating_add(*n));
    let mut types: Vec<(TensorType, u64)> = bytes.into_iter().collect();
    types.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    let kernels = process
        .used
        .as_ref()
        .ok()
        .and_then(|isa| Kernels::with_isa(*isa));
    let (mut words, mut facts) = (Vec::new(), Vec::new());
    for (ty, bytes) in types {
        let share = bytes as f64 / all.max(1) as f64 * 100.0;
        let isa = kernels.map_or("no", |kernels| kernels.isa().name());
        let interleaved = kernels
            .is_some_and(|kernels| kernels.fastest_order(ty, BAND_ROWS) == RowOrder::Interleaved);
        let on_gpu = module_of(matvec_kernel(ty)).is_some();
        let order = if interleaved {
            ", rows interleaved"
        } else {
            ""
        };
        words.push(format!("{ty} {share:.1} % ({isa} kernels{order})"));
        facts.push(json!({
            "type": ty.to_string(),
            "bytes": bytes,
            "kernels": isa,
            "interleaved": interleaved,
            "gpu_kernels": on_gpu,
        }));
    }
    Check::ok(id, words.join(", ")).fact("types", Value::Array(facts))
}

fn fit(
    given: &Given<'_>,
    opened: &Opened,
    limit: Option<&Limit>,
    forecast: Option<&Forecast<'_>>,
) -> Check {
    let id = "model.fit";
    let smaller = format!(
        "free memory, fetch a smaller quantization, or try `tier-plan run {} --context 1024`",
        given.shown()
    );
    let Decision { chosen, notes, .. } =
        match budget::decide(opened.model(), &Opening::default(), limit) {
            Ok(decision) => decision,
            Err(error) => return Check::ok(id, files::said(&error)).failure(smaller),
        };
    let weights = opened.shape.weight_bytes();
    let facts = |check: Check, fits: Option<bool>| {
        check
            .fact("fits", fits)
            .fact("weight_bytes", weights)
            .fact("context", opened.context)
    };
    let Some(limit) = limit else {
        let found = format!(
            "unknown: the system reports no limit for {}",
            show_bytes(weights)
        );
        return facts(Check::ok(id, found), None);
    };
    let within = format!("{} ({})", show_bytes(limit.bytes), limit.source);
    match chosen.fit() {
        Fit::Memory => facts(
            Check::ok(
                id,
                format!("{} of weights fit {within}", show_bytes(weights)),
            ),
            Some(true),
        ),
        Fit::Budget => {
            let slots: u64 = chosen.plan.layers.iter().map(|l| u64::from(l.slots)).sum();
            let experts: u64 = opened
                .shape
                .experts
                .iter()
                .map(|e| u64::from(e.n_expert))
                .sum();
            let share = slots as f64 / experts.max(1) as f64;
            let found = format!(
                "{} of weights do not fit {within}: {:.0} % of the experts have slots",
                show_bytes(weights),
                share * 100.0
            );
            let all = Change {
                limit_bytes: Some(ENOUGH_BYTES),
                ..Change::default()
            };
            let (model, [write, take]) = (given.shown(), given.profile_options());
            let write = format!("{model} {write}");
            facts(Check::ok(id, found), Some(false))
                .fact("slot_share", share)
                .warning(cost(
                    "experts without a slot are read from the drive when they are chosen",
                    forecast,
                    &all,
                ))
                .mend(format!(
                    "tier-plan profile {} && tier-plan run {model} {take}, which keeps the most used experts",
                    write.trim_end()
                ))
        }
        Fit::Mapped => {
            let why = notes.into_iter().next().unwrap_or_default();
            let found = why.trim_start_matches("warning: ").to_string();
            facts(Check::ok(id, found), Some(false)).failure(smaller)
        }
    }
}

fn speed(opened: &Opened, forecast: Result<&Forecast<'_>, &str>) -> Check {
    let id = "model.speed";
    let forecast = match forecast {
        Ok(forecast) => forecast,
        Err(why) => return Check::ok(id, format!("not predicted: {why}")),
    };
    let Some(tok_s) = forecast.tok_s(&Change::default()) else {
        let why = if forecast.has_drive() {
            "the system would read the mapped file again and again"
        } else {
            "the rate of the drive is unknown; pass --measure, or make machine.toml with `tier-plan probe`"
        };
        return Check::ok(id, format!("not predicted: {why}"));
    };
    Check::ok(
        id,
        format!(
            "predicted {} tok/s when decoding in the middle of {} tokens, from {}",
            crate::print::digits(tok_s),
            opened.context,
            forecast.from()
        ),
    )
    .fact("decode_tok_s", tok_s)
    .fact("rates_from", forecast.from())
}
