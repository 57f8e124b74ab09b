//! The model of a soak, its engines, and the memory that they take.

use super::{CONTEXT, ROOM};
use std::path::Path;
use std::sync::Arc;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::describe;
use tier_plan_runtime::model::kv::CacheRoom;
use tier_plan_runtime::model::shape::shape_of;
use tier_plan_runtime::plans::budget::{Budgeted, within};
use tier_plan_runtime::plans::in_memory::all_in_memory;
use tier_plan_runtime::tiers::limits::memory_limit;
use tier_plan_runtime::{Engine, KvType, LoadOptions};

/// Memory of this process's own; 0 where the system does not tell.
pub fn resident_bytes() -> u64 {
    resident_bytes_of("self")
}

/// Memory of a process's own, by its number.
pub fn resident_bytes_of(process: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

/// Returns an engine for several texts with slots for a part of the experts; with `whole`, one for a
/// text alone with all in memory.
pub fn load(gguf: &Arc<Gguf>, whole: bool) -> Engine {
    let spec = describe(gguf).unwrap();
    let shape = shape_of(gguf, &spec);
    let (plan, batch) = if whole {
        (all_in_memory(&shape, CONTEXT, KvType::F16), None)
    } else {
        let room = CacheRoom {
            sequences: ROOM,
            checkpoints: 4 * ROOM,
            ..CacheRoom::of_one(CONTEXT)
        };
        let plan = |budget| within(gguf, &spec, &shape, room, KvType::F16, budget);
        let least = plan(1 << 20).unwrap_err().least_bytes;
        let experts = shape.experts.iter();
        let experts: u64 = experts
            .map(|e| e.expert_bytes * u64::from(e.n_expert))
            .sum();
        // Half of the experts have slots, or as many as there is memory for.
        let limit = memory_limit().map_or(u64::MAX, |limit| limit.bytes);
        let Budgeted { plan, batch, .. } = plan(limit.min(least + experts / 2)).unwrap();
        (plan, Some(batch))
    };
    let options = LoadOptions {
        threads: Some(2),
        batch,
        ..LoadOptions::default()
    };
    Engine::load(Arc::clone(gguf), &plan, &options, &mut |_, _| {}).unwrap()
}

/// Returns how long the soak lasts.
pub fn minutes() -> f64 {
    let minutes = std::env::var("SOAK_MINUTES").ok();
    minutes.map_or(1.0, |text| text.parse().expect("SOAK_MINUTES: a number"))
}

/// Opens the model.
pub fn open(path: &Path) -> Arc<Gguf> {
    Arc::new(Gguf::open(path).expect("SOAK_MODEL"))
}
