//! Engines whose main memory is several tiers, one a memory node.

use crate::engine::{Engine, LogitsMode};
use crate::error::LoadError;
use crate::options::LoadOptions;
use crate::plans::in_memory::all_in_memory;
use crate::tiers::nodes::nodes;
use std::path::Path;
use std::sync::Arc;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::machine::TierKind;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::ModelShape;
use tier_plan_formats::model::{describe, shape::shape_of};
use tier_plan_formats::placement::{Pins, Placement, TierIdx};

fn open(name: &str) -> (Arc<Gguf>, ModelShape) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/data")
        .join(name);
    let gguf = Arc::new(Gguf::open(&path).unwrap());
    let shape = shape_of(&gguf, &describe(&gguf).unwrap());
    (gguf, shape)
}

/// Every third expert pinned on one node, every third on another; the rest in slots of the second,
/// from a drive.
fn two_nodes(shape: &ModelShape, context: u32, node: u32) -> Placement {
    let mut plan = all_in_memory(shape, context, KvType::F16);
    let drive = &mut plan.tiers[TierIdx::new(0)];
    let mut first = drive.clone();
    (drive.tier.name, drive.tier.kind, drive.tier.emulated) = ("slow".into(), TierKind::Nvme, true);
    drive.tier.read_gbps = 1e6;
    (first.tier.name, first.tier.unit) = ("dram0".into(), Some(node));
    let mut second = first.clone();
    // A node of another machine, which this one stands for.
    (second.tier.name, second.tier.unit, second.tier.emulated) =
        ("dram1".into(), Some(node + 1), true);
    second.tier.read_gbps = 1e6;
    for (layer, experts) in plan.layers.iter_mut().zip(&shape.experts) {
        let every_third = |from: u32| (from..experts.n_expert).step_by(3).collect::<Vec<u32>>();
        layer.pinned = [0, 1]
            .map(|tier| Pins {
                tier: TierIdx::new(tier),
                experts: every_third(tier as u32),
            })
            .to_vec();
        (layer.slots, layer.slot_tier) = (2, TierIdx::new(1));
        plan.staging_experts = plan.staging_experts.max(experts.n_used);
    }
    plan.tiers = [first, second].into_iter().chain(plan.tiers).collect();
    plan.fill_sums(shape);
    plan.tiers
        .iter_mut()
        .for_each(|t| t.budget_bytes = t.used_bytes());
    plan
}

#[test]
fn a_plan_over_nodes_gives_the_same_text_or_says_which_node_is_missing() {
    let (gguf, shape) = open("arch/qwen3moe.gguf");
    let options = LoadOptions {
        threads: Some(2),
        batch: Some(7),
        ..LoadOptions::default()
    };
    let load = |plan: &Placement| Engine::load(Arc::clone(&gguf), plan, &options, &mut |_, _| {});
    let error = match load(&two_nodes(&shape, 32, 1000)).map(|_| ()) {
        Err(error @ LoadError::Node { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    };
    // A system without nodes has none to name.
    let Some(node) = nodes()
        .ok()
        .and_then(|nodes| nodes.first().map(|n| n.number))
    else {
        return;
    };
    assert!(error.contains("no NUMA node 1000, only"), "{error}");
    let plan = two_nodes(&shape, 32, node);
    // As a file says it, too.
    let plan = tier_plan_formats::placement::decode(plan.encode().as_bytes(), Path::new("p.toml"))
        .unwrap();
    let mut engine = match load(&plan) {
        // A sandbox may forbid it.
        Err(LoadError::Arena(_)) => return,
        other => other.unwrap(),
    };
    let planned: Vec<u64> = plan.tiers.iter().map(|t| t.used_bytes()).collect();
    assert_eq!(engine.resident_bytes().as_slice(), planned);
    let mut plain = load(&all_in_memory(&shape, 32, KvType::F16)).unwrap();
    let tokens: Vec<u32> = (0..20).map(|i| (i * 37 + 5) % 96).collect();
    let expected = plain.forward(&tokens, LogitsMode::All).unwrap();
    assert_eq!(engine.forward(&tokens, LogitsMode::All).unwrap(), expected);
    assert_eq!(
        engine.forward(&[3], LogitsMode::Last).unwrap(),
        plain.forward(&[3], LogitsMode::Last).unwrap()
    );
}
