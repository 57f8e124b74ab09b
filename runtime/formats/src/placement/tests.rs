mod any;
mod errors;
mod model;
mod versions;

use super::*;
use crate::machine::{Accelerator, DriveIo, TierKind};

const V1: &str = include_str!("../../../../tests/data/formats/placement.v1.toml");
const V2: &str = include_str!("../../../../tests/data/formats/placement.v2.toml");
const V3: &str = include_str!("../../../../tests/data/formats/placement.v3.toml");
const V4: &str = include_str!("../../../../tests/data/formats/placement.v4.toml");
const V5: &str = include_str!("../../../../tests/data/formats/placement.v5.toml");

const V6: &str = include_str!("../../../../tests/data/formats/placement.v6.toml");
const V7: &str = include_str!("../../../../tests/data/formats/placement.v7.toml");
const V8: &str = include_str!("../../../../tests/data/formats/placement.v8.toml");
const V9: &str = include_str!("../../../../tests/data/formats/placement.v9.toml");
const V10: &str = include_str!("../../../../tests/data/formats/placement.v10.toml");
const V11: &str = include_str!("../../../../tests/data/formats/placement.v11.toml");
const V12: &str = include_str!("../../../../tests/data/formats/placement.v12.toml");

fn load(text: &str) -> Result<Placement, String> {
    decode(text.as_bytes(), Path::new("p.toml")).map_err(|e| e.to_string())
}

fn v1_with(from: &str, to: &str) -> String {
    assert!(V1.contains(from), "{from}");
    V1.replacen(from, to, 1)
}

fn source(name: &str, hash: &str) -> SourceId {
    SourceId {
        name: name.into(),
        hash: hash.into(),
    }
}

#[test]
fn a_tier_may_be_a_memory_node_or_a_gpu() {
    let plan = load(V4).unwrap();
    let units: Vec<_> = plan
        .tiers
        .iter()
        .map(|t| (t.tier.device(), t.tier.node()))
        .collect();
    assert_eq!(units, [(Some(1), None), (None, Some(0)), (None, None)]);
    assert_eq!(plan.encode(), V4, "a plan with a key of version 4 says so");
    let without = Placement {
        tiers: plan
            .tiers
            .iter()
            .map(|t| PlanTier {
                tier: Tier {
                    unit: None,
                    ..t.tier.clone()
                },
                ..t.clone()
            })
            .collect(),
        ..plan
    };
    assert_eq!(without.encode(), V3);
    for (from, to, words) in [
        (
            "version = 4",
            "version = 3",
            "device is a key of version 4; write `version = 4`",
        ),
        (
            "device = 1",
            "node = 1",
            "tier 'vram' is of kind \"vram\": which one it is says `device`, the number of the GPU",
        ),
        (
            "node = 0",
            "device = 0",
            "tier 'dram' is of kind \"dram\": which one it is says `node`, the number of the NUMA node",
        ),
        (
            "node = 0",
            "node = 5000",
            "node of tier 'dram' is 5000, but 1023 is the most",
        ),
    ] {
        assert!(V4.contains(from), "{from}");
        let error = load(&V4.replacen(from, to, 1)).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn pinned_experts_are_found() {
    let plan = load(V1).unwrap();
    assert_eq!(plan.pinned_tier(0, 7), Some(TierIdx::new(0)));
    assert_eq!(plan.pinned_tier(0, 9), Some(TierIdx::new(1)));
    assert_eq!(plan.pinned_tier(0, 4), None);
    assert_eq!(plan.pinned_tier(3, 31), Some(TierIdx::new(1)));
    assert_eq!(plan.pinned_tier(9, 0), None);
    assert_eq!(plan.home_tier(), TierIdx::new(2));
    assert_eq!(plan.tiers[TierIdx::new(0)].used_bytes(), 2_493_216);
}

#[test]
fn a_plan_for_another_model_names_both() {
    let plan = load(V1).unwrap();
    let path = Path::new("p.toml");
    assert!(
        plan.check_model(&source("renamed", "000102030405060708090a0b0c0d0e0f"), path)
            .is_ok()
    );
    let error = plan
        .check_model(&source("other", "ffffffffffffffffffffffffffffffff"), path)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "p.toml: this plan was made for the model 'demo' (000102030405), but the model given is 'other' \
         (ffffffffffff); give the plan's own model, or run `tier-plan solve` for this one"
    );
}

#[test]
fn what_is_left_out_is_empty() {
    let text = v1_with("profile = { name", "# profile = { name")
        .replace("bound_s =", "# bound_s =")
        .replace("gap =", "# gap =");
    let text = text
        .replace("dense_s = {", "# ")
        .replace("dram = 0.0005, ", "");
    let plan = load(&text).unwrap();
    assert_eq!(
        (plan.profile, plan.solver.bound_s, plan.solver.gap),
        (None, None, None)
    );
    assert_eq!(plan.predicted.dense_s, PerTier::default());
    assert_eq!(
        plan.predicted.expert_s,
        PerTier::from([0.0001, 0.0, 0.0007])
    );
}
