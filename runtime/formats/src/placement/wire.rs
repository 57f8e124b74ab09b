//! The text of versions 1 to 12 of a plan, read through wire structs for safety; [`super::write`]
//! writes it.

mod decode;

use super::{PerTier, PlanTier, SlotPolicy, Streaming, TierBytes, TierIdx};
use crate::copies::WireCopy;
use crate::machine::{Accelerator, Tier, WireIo, WireKind};
use crate::model::shape::DenseKind;
use crate::source_id::SourceId;
use crate::text::quote;
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};

pub(super) use decode::decode;

/// Dense groups that every layer may have, with their keys.
pub(super) const BY_LAYER: [(DenseKind, &str); 4] = [
    (DenseKind::Attention, "attention"),
    (DenseKind::Router, "router"),
    (DenseKind::SharedExpert, "shared_expert"),
    (DenseKind::DenseFfn, "dense_ffn"),
];

/// The tiers by name.
struct Names {
    by_name: HashMap<String, TierIdx>,
    all: Vec<String>,
}

impl Names {
    fn new(tiers: &[WireTier]) -> Names {
        let all: Vec<String> = tiers.iter().map(|t| t.name.clone()).collect();
        let by_name = all
            .iter()
            .enumerate()
            .map(|(at, name)| (name.clone(), TierIdx::new(at)))
            .collect();
        Names { by_name, all }
    }

    fn find(&self, name: &str, what: &str) -> Result<TierIdx, String> {
        self.by_name.get(name).copied().ok_or_else(|| {
            format!(
                "{what} names the tier {}, but the plan's tiers are {}",
                quote(name),
                self.all.join(", ")
            )
        })
    }

    /// Numbers in the order of the tiers; a tier that is not named has 0, and no name at all means
    /// no numbers.
    fn by_tier(&self, parts: BTreeMap<String, f64>, what: &str) -> Result<PerTier<f64>, String> {
        if parts.is_empty() {
            return Ok(PerTier::default());
        }
        let mut out = PerTier::from_fn(self.all.len(), |_| 0.0);
        for (name, x) in parts {
            out[self.find(&name, what)?] = x;
        }
        Ok(out)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    #[serde(rename = "format")]
    _format: String,
    version: u64,
    name: String,
    context: u32,
    sequences: Option<u32>,
    checkpoints: Option<u32>,
    window_chunk: Option<u32>,
    kv_tier: String,
    kv_type: Option<String>,
    host_kv: Option<String>,
    staging: WireStaging,
    io: Option<WireIo>,
    #[serde(default)]
    copies: Vec<WireCopy>,
    streaming: Option<WireStreaming>,
    layer_overhead_us: f64,
    token_overhead_us: f64,
    made_from: WireMadeFrom,
    solver: WireSolver,
    predicted: WirePrediction,
    dense: WireDense,
    #[serde(default)]
    tier: Vec<WireTier>,
    #[serde(default)]
    layer: Vec<WireLayer>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireStaging {
    tier: String,
    experts: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireStreaming {
    tier: String,
    from: String,
    experts: u32,
    link_gbps: f64,
    cpu_share: f64,
}

impl WireStreaming {
    fn named(self, names: &Names) -> Result<Streaming, String> {
        Ok(Streaming {
            tier: names.find(&self.tier, "streaming.tier")?,
            from: names.find(&self.from, "streaming.from")?,
            experts: self.experts,
            link_gbps: self.link_gbps,
            cpu_share: self.cpu_share,
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireMadeFrom {
    model: WireSource,
    profile: Option<WireSource>,
    machine: WireSource,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireSource {
    name: String,
    hash: String,
}

impl From<WireSource> for SourceId {
    fn from(wire: WireSource) -> SourceId {
        SourceId {
            name: wire.name,
            hash: wire.hash,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireSolver {
    backend: String,
    status: String,
    objective_s: f64,
    bound_s: Option<f64>,
    gap: Option<f64>,
    solve_s: f64,
    objective: Option<String>,
    objective_value: Option<f64>,
    objective_unit: Option<String>,
    objective_bound: Option<f64>,
    batch: Option<u32>,
    target_tok_s: Option<f64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WirePrediction {
    decode_tok_s: f64,
    prompt_tok_s: f64,
    hit_rate: f64,
    emulated: bool,
    overhead_s: f64,
    expert_critical_s: f64,
    #[serde(default)]
    dense_s: BTreeMap<String, f64>,
    #[serde(default)]
    expert_s: BTreeMap<String, f64>,
    #[serde(default)]
    read_bytes: BTreeMap<String, f64>,
    at: Option<u32>,
    kv_s: Option<f64>,
    #[serde(default)]
    prompt_gflops: BTreeMap<String, f64>,
    #[serde(default)]
    few_gflops: BTreeMap<String, f64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireDense {
    embedding: Option<String>,
    token_table: Option<String>,
    head: Option<String>,
    #[serde(default)]
    attention: Vec<WireGroup>,
    #[serde(default)]
    router: Vec<WireGroup>,
    #[serde(default)]
    shared_expert: Vec<WireGroup>,
    #[serde(default)]
    dense_ffn: Vec<WireGroup>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireGroup {
    layers: String,
    tier: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireTier {
    name: String,
    kind: WireKind,
    capacity_bytes: u64,
    read_gbps: f64,
    latency_us: f64,
    emulated: bool,
    node: Option<u32>,
    device: Option<u32>,
    link_gbps: Option<f64>,
    layer_us: Option<f64>,
    resident_layer_us: Option<f64>,
    source: String,
    budget_bytes: u64,
    dense_bytes: u64,
    pinned_bytes: u64,
    slot_bytes: u64,
    kv_bytes: u64,
    staging_bytes: u64,
    home_bytes: u64,
}

impl WireTier {
    fn accelerator(&self) -> Accelerator {
        let &WireTier {
            link_gbps,
            layer_us,
            resident_layer_us,
            ..
        } = self;
        Accelerator {
            link_gbps,
            layer_us,
            resident_layer_us,
        }
    }

    fn into_tier(self) -> PlanTier {
        PlanTier {
            tier: Tier {
                accelerator: self.accelerator(),
                name: self.name,
                kind: self.kind.into(),
                capacity_bytes: self.capacity_bytes,
                read_gbps: self.read_gbps,
                latency_us: self.latency_us,
                emulated: self.emulated,
                unit: self.node.or(self.device),
                source: self.source,
            },
            budget_bytes: self.budget_bytes,
            bytes: TierBytes {
                dense: self.dense_bytes,
                pinned: self.pinned_bytes,
                slots: self.slot_bytes,
                kv: self.kv_bytes,
                staging: self.staging_bytes,
                home: self.home_bytes,
            },
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireLayer {
    layer: Option<u32>,
    layers: Option<String>,
    #[serde(default)]
    pinned: BTreeMap<String, String>,
    slots: u32,
    slot_tier: String,
    policy: WirePolicy,
    half_life: Option<u32>,
    recent_half_life: Option<u32>,
    recent_weight: Option<u32>,
}

impl WireLayer {
    /// Reads the policy with its parameters: all that it has, and no others.
    fn policy(&self, version: u64) -> Result<SlotPolicy, String> {
        let given = [
            ("half_life", self.half_life),
            ("recent_half_life", self.recent_half_life),
            ("recent_weight", self.recent_weight),
        ];
        let value = |at: usize| given[at].1.unwrap_or_default();
        let (policy, takes) = match self.policy {
            WirePolicy::Lru => (SlotPolicy::Lru, 0),
            WirePolicy::Lfu => (
                SlotPolicy::Lfu {
                    half_life: value(0),
                },
                1,
            ),
            WirePolicy::Adaptive => {
                let [half_life, recent_half_life, recent_weight] = [0, 1, 2].map(value);
                (
                    SlotPolicy::Adaptive {
                        half_life,
                        recent_half_life,
                        recent_weight,
                    },
                    3,
                )
            }
        };
        let (name, since) = (policy.name(), policy.since_version());
        if version < since {
            return Err(format!(
                "the policy \"{name}\" is of version {since}; write `version = {since}`"
            ));
        }
        if let Some((key, _)) = given[takes..].iter().find(|(_, value)| value.is_some()) {
            return Err(format!(
                "{key} is not a parameter of the policy \"{name}\"; leave it out"
            ));
        }
        if let Some((key, _)) = given[..takes].iter().find(|(_, value)| value.is_none()) {
            return Err(format!(
                "the policy \"{name}\" needs {key}; write a number of tokens or a weight"
            ));
        }
        Ok(policy)
    }
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum WirePolicy {
    Lru,
    Lfu,
    Adaptive,
}
