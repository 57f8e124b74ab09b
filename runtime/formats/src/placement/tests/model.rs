//! A plan beside its model: sums are made in one place, and every planted mistake is found.

use super::*;
use crate::model::Model;

/// The fixture's tiers, filled with the demo model: dense weights on the first, the first four
/// experts of each layer pinned on the second, two slots, and the rest on the drive.
fn plan_for(shape: &ModelShape) -> Placement {
    let mut plan = load(V1).unwrap();
    plan.model = shape.id.clone();
    plan.dense = shape
        .dense
        .iter()
        .map(|d| DensePlacement {
            kind: d.kind,
            layer: d.layer,
            tier: TierIdx::new(0),
        })
        .collect();
    let layer = |experts: &crate::model::shape::ExpertShape| LayerPlacement {
        layer: experts.layer,
        pinned: vec![Pins {
            tier: TierIdx::new(1),
            experts: (0..4).collect(),
        }],
        slots: 2,
        slot_tier: TierIdx::new(1),
        policy: SlotPolicy::Lru,
    };
    plan.layers = shape.experts.iter().map(layer).collect();
    plan.staging_experts = shape.experts.iter().map(|e| e.n_used).max().unwrap_or(0);
    plan.fill_sums(shape);
    plan.tiers
        .iter_mut()
        .for_each(|t| t.budget_bytes = t.used_bytes());
    plan
}

#[test]
fn the_tally_counts_every_byte_of_the_model_once() {
    let model = Model::open(Path::new("../../profiles/demo/demo.gguf")).unwrap();
    let shape = model.shape();
    let plan = plan_for(shape);
    let tally = plan.tally(shape);
    let weights: u64 = tally.iter().map(|t| t.dense + t.pinned + t.home).sum();
    assert_eq!(weights, shape.weight_bytes());
    let experts: u64 = shape.experts.iter().map(|e| e.expert_bytes).sum();
    assert_eq!(
        (tally[TierIdx::new(1)].pinned, tally[TierIdx::new(1)].slots),
        (4 * experts, 2 * experts)
    );
    assert_eq!(
        tally[TierIdx::new(0)].kv,
        plan.kv_type.cache_bytes(shape, plan.room())
    );
    assert_eq!(validate(&plan, shape), []);
    // Whatever is out of range or unknown counts nothing.
    let mut wild = plan;
    wild.dense[0].tier = TierIdx::new(99);
    wild.dense[1].layer = Some(4000);
    wild.layers[0].pinned[0].tier = TierIdx::new(99);
    (wild.layers[1].slot_tier, wild.kv_tier, wild.staging_tier) =
        (TierIdx::new(99), TierIdx::new(99), TierIdx::new(99));
    let sums: u64 = wild.tally(shape).iter().map(TierBytes::total).sum();
    assert!(sums < tally.iter().map(TierBytes::total).sum());
}

#[test]
fn planted_mistakes_are_found() {
    let model = Model::open(Path::new("../../profiles/demo/demo.gguf")).unwrap();
    let shape = model.shape();
    let finds = |mistake: &dyn Fn(&mut Placement), words: &str| {
        let mut plan = plan_for(shape);
        mistake(&mut plan);
        let found: Vec<String> = validate(&plan, shape)
            .iter()
            .map(Violation::to_string)
            .collect();
        assert!(
            found.iter().any(|message| message.contains(words)),
            "wanted {words:?}, got {found:?}"
        );
    };
    finds(
        &|p| p.model.hash = "0".into(),
        "it was made for 'tier-plan demo'",
    );
    finds(&|p| p.tiers = PerTier::default(), "it has no tiers");
    finds(
        &|p| p.tiers[TierIdx::new(1)].budget_bytes -= 1,
        "but its budget_bytes is",
    );
    finds(
        &|p| {
            (
                p.tiers[TierIdx::new(0)].tier.emulated,
                p.tiers[TierIdx::new(0)].bytes.staging,
            ) = (false, 1)
        },
        "which can hold neither",
    );
    finds(
        &|p| p.tiers[TierIdx::new(1)].tier.kind = TierKind::Nvme,
        "only the last tier may be one",
    );
    finds(
        &|p| p.dense[1].layer = Some(99),
        "layer 99, but the model has no such tensor group",
    );
    finds(&|p| p.dense.push(p.dense[1].clone()), "is placed twice");
    finds(&|p| p.dense.truncate(3), "it does not place the");
    finds(
        &|p| p.dense[3].tier = TierIdx::new(2),
        "must not be on a block device",
    );
    finds(
        &|p| p.dense[3].tier = TierIdx::new(3),
        "is tier number 3, but the plan has 3",
    );
    finds(
        &|p| p.layers.truncate(1),
        "it has 1 layers with routed experts, the model",
    );
    finds(
        &|p| p.layers[0].layer += 1,
        "it has routed experts in layer 1, the model in layer 0",
    );
    finds(
        &|p| p.layers[0].pinned[0].experts.push(9999),
        "layer 0: expert 9999 is pinned, but",
    );
    finds(
        &|p| p.layers[0].pinned[0].experts.push(3),
        "layer 0: expert 3 is pinned to both",
    );
    finds(
        &|p| p.layers[0].pinned[0].tier = TierIdx::new(2),
        "layer 0: experts are pinned on the slow tier",
    );
    finds(&|p| p.layers[0].slots = 9999, "9999 slots for");
    finds(
        &|p| p.layers[0].slot_tier = TierIdx::new(2),
        "layer 0: there are slots on the slow tier",
    );
    finds(
        &|p| p.tiers[TierIdx::new(1)].bytes.pinned += 1,
        "bytes of pinned experts, but they take",
    );
    finds(
        &|p| p.tiers[TierIdx::new(0)].bytes.kv -= 1,
        "bytes for the KV cache and recurrent state, but",
    );
    finds(
        &|p| p.staging_experts = 0,
        "staging holds 0 experts, but a token may need",
    );
}
