//! What a run was set up with: its machine as the system describes it, and what its plan counts on.
//!
//! Records are sent to others, so nothing here names a person, a host, or a place in a file system.

use crate::placement::Placement;
use crate::text::check_amount;
use serde::{Deserialize, Serialize};

/// What a run was set up with.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setup {
    /// Version of the program.
    pub program: String,
    /// The machine that it ran on.
    pub system: System,
    /// Bytes of the model's weights.
    pub model_bytes: u64,
    /// Tokens of context per text that the plan has room for.
    pub context: u32,
    /// Texts at once that the plan has room for.
    pub sequences: u32,
    /// Storage type of the KV cache, such as `q8_0`.
    pub kv_type: String,
    /// Tiers of the plan, fastest first.
    pub tiers: Vec<TierSetup>,
}

/// A machine as its system describes it. What the system does not tell is `None`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct System {
    /// Name of the processor.
    pub processor: Option<String>,
    /// Processors that threads can run on.
    pub processors: Option<u32>,
    /// Bytes of main memory.
    pub memory_bytes: Option<u64>,
}

/// A tier as the plan counts on it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierSetup {
    /// Name of the tier in the plan.
    pub name: String,
    /// Kind of memory, such as `dram`.
    pub kind: String,
    /// Bytes that the plan may use.
    pub budget_bytes: u64,
    /// Rate at which the plan counts on reading it, in 10⁹ bytes per second; `None` where none was
    /// measured.
    pub read_gbps: Option<f64>,
}

impl Setup {
    /// Describes a plan for a model of so many bytes, on a machine.
    pub fn new(program: &str, system: System, model_bytes: u64, plan: &Placement) -> Self {
        let tiers = plan.tiers.iter().map(|t| TierSetup {
            name: t.tier.name.clone(),
            kind: t.tier.kind.as_str().to_string(),
            budget_bytes: t.budget_bytes,
            read_gbps: t.tier.has_known_rate().then_some(t.tier.read_gbps),
        });
        Self {
            program: program.to_string(),
            system,
            model_bytes,
            context: plan.context,
            sequences: plan.sequences,
            kv_type: plan.kv_type.to_string(),
            tiers: tiers.collect(),
        }
    }

    /// Says what is wrong with the numbers.
    pub(super) fn check(&self) -> Result<(), String> {
        for tier in &self.tiers {
            let what = format!("read_gbps of tier '{}' in setup", tier.name);
            check_amount(&what, tier.read_gbps.unwrap_or(0.0))?;
        }
        Ok(())
    }
}
