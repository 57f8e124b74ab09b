//! What tokens alone choose: rows of tables, and the experts of hash-routed layers. Their reads are
//! known before the layer that uses them runs.

use crate::cost::{ExpertStage, FixedTimes, group_read_s, outcomes, stage_mean_s};
use crate::profile::prefetch::Prefetch;
use crate::profile::{Evidence, LayerEvidence};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use tier_plan_runtime::formats::placement::{Placement, TierIdx};
use tier_plan_runtime::formats::ranges;
use tier_plan_runtime::model::gpu::Part;
use tier_plan_runtime::model::shape::{DenseKind, ModelShape};
use tier_plan_runtime::units::show_bytes;

/// A part of a model of which tokens alone choose what is read.
#[derive(Debug, Clone, PartialEq)]
pub struct ByToken {
    /// Tables, or routed experts.
    pub part: Part,
    /// Layers of the experts; none of a table.
    pub layers: Vec<u32>,
    /// Bytes of all of it.
    pub bytes: u64,
    /// Bytes that a token reads of it.
    pub token_bytes: u64,
}

/// Such a part under a plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Placed {
    /// The part.
    pub part: ByToken,
    /// Names of the tiers that have some of it, fastest first.
    pub tiers: Vec<String>,
    /// Predicted seconds of a decoded token for it, overlap counted.
    pub seconds: f64,
    /// Seconds more that it would be if nothing was read ahead.
    pub hidden_s: f64,
}

/// Returns the parts of a model of which tokens alone choose what is read.
pub fn parts(shape: &ModelShape) -> Vec<ByToken> {
    let tables = shape.dense.iter().filter(|d| d.kind.is_named_by_tokens());
    let tables = tables.map(|d| ByToken {
        part: Part::Dense(d.kind),
        layers: Vec::new(),
        bytes: d.bytes,
        token_bytes: d.token_bytes,
    });
    let layers = || shape.experts.iter().filter(|e| e.by_token);
    let sum = |count: fn(&_) -> u32| {
        let bytes = layers().map(|e| e.expert_bytes.saturating_mul(count(e).into()));
        bytes.fold(0, u64::saturating_add)
    };
    let experts = ByToken {
        part: Part::Experts,
        layers: layers().map(|e| e.layer).collect(),
        bytes: sum(|e| e.n_expert),
        token_bytes: sum(|e| e.n_used),
    };
    tables
        .chain(Some(experts).filter(|e| !e.layers.is_empty()))
        .collect()
}

/// Whether there is more than the embedding, which every model has.
pub fn is_special(parts: &[ByToken]) -> bool {
    let embedding = Part::Dense(DenseKind::Embedding);
    parts.iter().any(|part| part.part != embedding)
}

/// Returns where a plan has those parts, and what they cost a token.
pub fn placed(plan: &Placement, shape: &ModelShape, evidence: &Evidence) -> Vec<Placed> {
    let name = |tier: &TierIdx| plan.tiers[*tier].tier.name.clone();
    let place = |part: ByToken| match part.part {
        Part::Dense(kind) => {
            let groups = plan.dense.iter().filter(|d| d.kind == kind);
            let tiers: BTreeSet<TierIdx> = groups.map(|d| d.tier).collect();
            let read_s =
                |t: &TierIdx| group_read_s(kind, &plan.tiers[*t].tier, part.token_bytes as f64);
            Placed {
                seconds: tiers.iter().map(read_s).sum(),
                tiers: tiers.iter().map(name).collect(),
                hidden_s: 0.0,
                part,
            }
        }
        Part::Experts => experts(plan, shape, evidence, part),
    };
    parts(shape).into_iter().map(place).collect()
}

/// Returns where a plan has the experts that tokens choose, and what they cost a token.
fn experts(plan: &Placement, shape: &ModelShape, evidence: &Evidence, part: ByToken) -> Placed {
    let rates = FixedTimes::of(plan, shape).tiers;
    let (mut seconds, mut without_s) = (0.0, 0.0);
    let mut tiers = BTreeSet::new();
    let layers = plan.layers.iter().zip(&evidence.layers);
    for (layer, evidence) in layers.filter(|(_, e)| e.shape.by_token) {
        let pins = layer.pinned.iter().filter(|pins| !pins.experts.is_empty());
        tiers.extend(pins.map(|pins| pins.tier));
        tiers.extend((layer.slots > 0).then_some(layer.slot_tier));
        let pinned: usize = layer.pinned.iter().map(|pins| pins.experts.len()).sum();
        let all_pinned = pinned >= evidence.shape.n_expert as usize;
        tiers.extend((!all_pinned).then_some(plan.home_tier()));
        let found = outcomes(layer, evidence, &rates, plan.staging_tier);
        let to = layer.brought_to(plan.staging_tier);
        let stage_s = |prefetch| {
            let evidence = LayerEvidence {
                prefetch,
                ..evidence.clone()
            };
            let stage = ExpertStage::of_plan(plan, shape, &rates, &evidence);
            stage_mean_s(&stage, &found, to)
        };
        seconds += stage_s(evidence.prefetch);
        without_s += stage_s(Prefetch::default());
    }
    let name = |tier: &TierIdx| plan.tiers[*tier].tier.name.clone();
    Placed {
        tiers: tiers.iter().map(name).collect(),
        seconds,
        hidden_s: (without_s - seconds).max(0.0),
        part,
    }
}

impl ByToken {
    /// Returns its name, `experts of layers 0-2`.
    pub fn name(&self) -> String {
        match self.part {
            Part::Dense(DenseKind::TokenTable) => "token table".into(),
            Part::Dense(kind) => kind.to_string(),
            Part::Experts => {
                let one = if self.layers.len() == 1 {
                    "layer"
                } else {
                    "layers"
                };
                format!("experts of {one} {}", ranges::show(&self.layers))
            }
        }
    }

    /// Returns when its reads begin, in words.
    pub fn read_ahead(&self) -> &'static str {
        match self.part {
            Part::Dense(DenseKind::TokenTable) => "asked for as soon as the token is known",
            Part::Dense(_) => "read when the token is known",
            Part::Experts => "read from when the dense stage of their layer begins, or earlier",
        }
    }

    /// Returns a sentence on a part that is not placed yet.
    pub fn sentence(&self) -> String {
        format!(
            "{}: {} of {} per token, {}",
            self.name(),
            show_bytes(self.token_bytes),
            show_bytes(self.bytes),
            self.read_ahead()
        )
    }

    /// Returns it as JSON.
    pub fn as_json(&self) -> Value {
        json!({
            "part": self.part.name(),
            "layers": self.layers,
            "bytes": self.bytes,
            "token_bytes": self.token_bytes,
            "read_ahead": self.read_ahead(),
        })
    }
}

impl Placed {
    /// Returns a sentence on what a plan does with it.
    pub fn sentence(&self) -> String {
        let hidden = if self.hidden_s > 0.0 {
            format!(", and {:.3} ms hidden behind it", self.hidden_s * 1e3)
        } else {
            String::new()
        };
        format!(
            "{}, on {}: {:.3} ms of a token{hidden}",
            self.part.sentence(),
            self.tiers.join(" and "),
            self.seconds * 1e3
        )
    }

    /// Returns it as JSON.
    pub fn as_json(&self) -> Value {
        let mut value = self.part.as_json();
        value["tiers"] = json!(self.tiers);
        value["token_s"] = json!(self.seconds);
        value["hidden_s"] = json!(self.hidden_s);
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue;
    use std::path::Path;

    fn of(name: &str) -> Vec<ByToken> {
        let known = catalogue::model(Path::new(name), Some("q4_k_m")).unwrap();
        parts(&known.sizes)
    }

    #[test]
    fn tables_and_hash_routed_layers_are_named_with_their_bytes() {
        let parts = of("deepseek-v4-flash");
        let names: Vec<String> = parts.iter().map(ByToken::name).collect();
        assert_eq!(names, ["embedding", "experts of layers 0-2"]);
        assert_eq!(parts[1].layers, [0, 1, 2]);
        // 6 of 256 experts are read.
        assert_eq!(parts[1].bytes / 256 * 6, parts[1].token_bytes);

        let parts = of("qwen3.8-flash-next");
        let table = parts.iter().find(|p| p.name() == "token table").unwrap();
        let rows = table.bytes / 320_001_536;
        assert_eq!(table.token_bytes, 16 * rows);
        let said = table.sentence();
        assert!(
            said.contains("per token, asked for as soon as the token is known"),
            "{said}"
        );
        assert_eq!(table.as_json()["part"], "token_table");

        let plain = of("qwen3-30b-a3b");
        assert!(
            plain.len() == 1 && !is_special(&plain),
            "the embedding alone"
        );
        assert!(is_special(&parts));
    }
}
