mod any;
mod model;

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
fn versions_mean_what_they_meant() {
    let plan = load(V1).unwrap();
    let tier = |name: &str, kind, capacity_bytes, read_gbps, latency_us| Tier {
        name: name.into(),
        kind,
        capacity_bytes,
        read_gbps,
        latency_us,
        emulated: true,
        unit: None,
        accelerator: Accelerator::default(),
        source: "declared".into(),
    };
    let [vram, dram] = [0, 1].map(TierIdx::new);
    let lines =
        |tier, budget_bytes, [dense, pinned, slots, kv, staging, home]: [u64; 6]| PlanTier {
            tier,
            budget_bytes,
            bytes: TierBytes {
                dense,
                pinned,
                slots,
                kv,
                staging,
                home,
            },
        };
    let dense = |kind, layer, tier| DensePlacement { kind, layer, tier };
    let layer = |layer, pinned: Vec<(TierIdx, Vec<u32>)>, slots, slot_tier| LayerPlacement {
        layer,
        pinned: pinned
            .into_iter()
            .map(|(tier, experts)| Pins { tier, experts })
            .collect(),
        slots,
        slot_tier,
        policy: SlotPolicy::Lru,
    };
    let all: Vec<u32> = (0..32).collect();
    let want = Placement {
        name: "ilp".into(),
        model: source("demo", "000102030405060708090a0b0c0d0e0f"),
        profile: Some(source("demo", "101112131415161718191a1b1c1d1e1f")),
        machine: source("demo-emulated", "202122232425262728292a2b2c2d2e2f"),
        layer_overhead_us: 20.0,
        token_overhead_us: 60.0,
        context: 1024,
        sequences: 1,
        checkpoints: 0,
        window_chunk: None,
        kv_tier: vram,
        kv_type: KvType::F16,
        staging_tier: dram,
        staging_experts: 4,
        reads: HomeReads::default(),
        tiers: PerTier::from([
            lines(
                tier("vram", TierKind::Vram, 3 << 20, 8.0, 5.0),
                3_000_000,
                [1_000_000, 900_000, 200_000, 393_216, 0, 0],
            ),
            lines(
                tier("dram", TierKind::Dram, 9 << 19, 1.0, 0.0),
                9 << 19,
                [524_288, 1_000_000, 600_000, 0, 4096, 0],
            ),
            lines(
                tier("slow", TierKind::Nvme, 64 << 20, 0.15, 40.0),
                64 << 20,
                [0, 0, 0, 0, 0, 6_000_000],
            ),
        ]),
        dense: vec![
            dense(DenseKind::Embedding, None, dram),
            dense(DenseKind::Attention, Some(0), vram),
            dense(DenseKind::Attention, Some(1), vram),
            dense(DenseKind::Attention, Some(2), vram),
            dense(DenseKind::Attention, Some(3), vram),
            dense(DenseKind::Attention, Some(4), dram),
            dense(DenseKind::Attention, Some(5), vram),
            dense(DenseKind::Router, Some(1), vram),
            dense(DenseKind::Router, Some(2), vram),
            dense(DenseKind::Router, Some(3), vram),
            dense(DenseKind::Router, Some(4), vram),
            dense(DenseKind::Router, Some(5), vram),
            dense(DenseKind::SharedExpert, Some(1), vram),
            dense(DenseKind::SharedExpert, Some(3), vram),
            dense(DenseKind::SharedExpert, Some(5), vram),
            dense(DenseKind::DenseFfn, Some(0), vram),
            dense(DenseKind::Head, None, vram),
        ],
        layers: vec![
            layer(
                1,
                vec![(vram, vec![0, 1, 2, 3, 7]), (dram, vec![5, 9, 10, 11])],
                2,
                vram,
            ),
            layer(2, vec![(dram, all.clone())], 0, dram),
            layer(3, vec![(dram, all.clone())], 0, dram),
            layer(4, vec![(dram, all)], 0, dram),
            layer(5, vec![], 8, dram),
        ],
        solver: SolverReport {
            backend: "microlp".into(),
            status: "feasible".into(),
            objective_s: 0.00125,
            bound_s: Some(0.0012),
            gap: Some(0.04),
            solve_s: 0.5,
            goal: None,
        },
        predicted: Prediction {
            decode_tok_s: 800.0,
            prompt_tok_s: 2500.5,
            overhead_s: 0.00018,
            dense_s: PerTier::from([0.0002, 0.00001, 0.0]),
            expert_s: PerTier::from([0.0001, 0.0005, 0.0007]),
            expert_critical_s: 0.0007,
            hit_rate: 0.9375,
            read_bytes: PerTier::from([2e6, 500_000.5, 1e5]),
            emulated: true,
            at: 0,
            kv_s: 0.0,
            prompt_gflops: PerTier::default(),
        },
    };
    assert_eq!(plan, want);
    let plan = load(V2).unwrap();
    let mut want = Placement {
        kv_type: KvType::Q8_0,
        ..want
    };
    assert_eq!(plan, want);
    assert_eq!(
        plan.encode(),
        V2,
        "the writer lays out version 2 as it always did"
    );
    let plan = load(V3).unwrap();
    want.layers[0].policy = SlotPolicy::Lfu { half_life: 16 };
    want.layers[4].policy = SlotPolicy::Adaptive {
        half_life: 64,
        recent_half_life: 2,
        recent_weight: 8,
    };
    (
        want.predicted.at,
        want.predicted.kv_s,
        want.predicted.prompt_gflops,
    ) = (512, 0.00005, PerTier::from([900.0, 50.5, 50.5]));
    let goal = Goal {
        objective: "memory".into(),
        value: 2_493_216.0,
        unit: "bytes".into(),
        bound: Some(2_400_000.0),
        batch: None,
        target_tok_s: Some(750.0),
    };
    want.solver.goal = Some(goal);
    assert_eq!(plan, want);
    assert_eq!(plan.encode(), V3, "a plan with a key of version 3 says so");
}

#[test]
fn a_plan_may_be_for_several_texts() {
    let plan = load(V6).unwrap();
    assert_eq!((plan.sequences, plan.room().positions()), (4, 4096));
    assert_eq!((plan.checkpoints, plan.room().states()), (8, 12));
    assert_eq!(plan.encode(), V6, "a plan with a key of version 6 says so");
    let one = Placement {
        sequences: 1,
        checkpoints: 0,
        ..plan
    };
    assert_eq!(one.encode(), V5);
    let error = load(&V6.replacen("version = 6", "version = 5", 1)).unwrap_err();
    assert!(
        error.contains("sequences and checkpoints are keys of version 6; write `version = 6`"),
        "{error}"
    );
}

#[test]
fn before_version_8_the_embedding_stands_for_tables() {
    use crate::model::shape::DenseShape;
    let shape = |kinds: &[DenseKind]| ModelShape {
        id: source("m", ""),
        arch: String::new(),
        n_layer: 0,
        hidden: 0,
        n_vocab: 0,
        context: 0,
        caches: Vec::new(),
        experts: Vec::new(),
        cpu_only: Vec::new(),
        dense: kinds
            .iter()
            .map(|&kind| DenseShape {
                kind,
                layer: None,
                bytes: 1,
                token_bytes: 1,
                macs: 0,
            })
            .collect(),
    };
    let of_model = |plan: Placement| -> Vec<(DenseKind, usize)> {
        let dense = plan.dense.iter().filter(|d| d.layer.is_none());
        dense.map(|d| (d.kind, d.tier.get())).collect()
    };
    let (embedding, table, head) = (DenseKind::Embedding, DenseKind::TokenTable, DenseKind::Head);
    for (text, kinds, expected) in [
        (V7, &[embedding, head][..], &[(embedding, 1), (head, 0)][..]),
        (
            V7,
            &[embedding, table, head],
            &[(embedding, 1), (table, 1), (head, 0)],
        ),
        (V7, &[table, head], &[(table, 1), (head, 0)]),
        (
            V8,
            &[embedding, table, head],
            &[(embedding, 1), (table, 2), (head, 0)],
        ),
    ] {
        let plan = load(text).unwrap().with_tables_of(&shape(kinds));
        assert_eq!(of_model(plan), expected, "{kinds:?}");
    }
}

#[test]
fn version_8_has_token_tables() {
    let plan = load(V8).unwrap();
    let table = plan.dense.iter().find(|d| d.kind == DenseKind::TokenTable);
    assert_eq!(
        (table.unwrap().layer, table.unwrap().tier),
        (None, plan.home_tier())
    );
    assert_eq!(plan.encode(), V8, "a plan with a key of version 8 says so");
    let mut without = plan.clone();
    without.dense.retain(|d| d.kind != DenseKind::TokenTable);
    assert_eq!(without.encode(), V7);
    let error = load(&V8.replacen("version = 8", "version = 7", 1)).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("dense.token_table is a key of version 8"),
        "{text}"
    );
}

#[test]
fn version_9_says_how_the_drive_is_read() {
    let plan = load(V9).unwrap();
    let copy = |file: &str, share| ExpertCopy {
        file: file.into(),
        share,
    };
    let copies = vec![
        copy("/mnt/b/demo.experts", 0.25),
        copy("/mnt/c/demo.gguf", 0.5),
    ];
    let io = Some(DriveIo::Buffered);
    assert_eq!(plan.reads, HomeReads { io, copies });
    assert_eq!(plan.reads.own_share(), 0.25);
    assert_eq!(plan.encode(), V9, "a plan with a key of version 9 says so");
    let mut without = plan.clone();
    without.reads = HomeReads::default();
    let emulated = "latency_us = 40.0\nemulated = true";
    let real = "latency_us = 40.0\nemulated = false";
    assert_eq!(without.encode(), V8.replacen(emulated, real, 1));
    for (from, to, why) in [
        (
            "version = 9",
            "version = 8",
            "io and copies are keys of version 9",
        ),
        ("\"buffered\"", "\"mapped\"", "unknown variant `mapped`"),
        (
            "share = 0.5",
            "share = 0.75",
            "the share of the copy \"/mnt/b/demo.experts\" is 0.25",
        ),
        (
            "share = 0.5",
            "share = 0.0",
            "the share of the copy \"/mnt/c/demo.gguf\" is 0, expected above 0",
        ),
        ("share = 0.5", "share = nan", "is NaN, expected above 0"),
        ("share = 0.5", "speed = 0.5", "unknown field `speed`"),
        ("/mnt/c/demo.gguf", "", "the file of a copy is empty"),
        (real, emulated, "the last tier is not a drive that is read"),
    ] {
        assert!(V9.contains(from), "{from}");
        let error = load(&V9.replacen(from, to, 1)).unwrap_err().to_string();
        assert!(error.contains(why), "{why}: {error}");
    }
    let many = "copies = [".to_string() + &"{ file = \"x\", share = 0.01 }, ".repeat(8) + "{";
    let error = load(&V9.replacen("copies = [{", &many, 1)).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("10 copies are named, but 7 are the most"),
        "{error}"
    );
}

#[test]
fn a_plan_may_keep_the_windows_of_layers_only() {
    let plan = load(V7).unwrap();
    assert_eq!(plan.window_chunk, Some(512));
    assert_eq!(plan.encode(), V7, "a plan with a key of version 7 says so");
    let whole = Placement {
        window_chunk: None,
        ..plan
    };
    assert_eq!(whole.encode(), V6);
    let error = load(&V7.replacen("version = 7", "version = 6", 1)).unwrap_err();
    assert!(
        error.contains("window_chunk is a key of version 7; write `version = 7`"),
        "{error}"
    );
    let error = load(&V7.replacen("window_chunk = 512", "window_chunk = 0", 1)).unwrap_err();
    assert!(error.contains("window_chunk is 0"), "{error}");
}

#[test]
fn a_tier_of_vram_may_say_how_fast_its_link_is() {
    let plan = load(V5).unwrap();
    assert_eq!(
        plan.tiers[TierIdx::new(0)].tier.accelerator.link_gbps,
        Some(9.25)
    );
    assert_eq!(plan.encode(), V5, "a plan with a key of version 5 says so");
    let mut without = plan;
    without.tiers[TierIdx::new(0)].tier.accelerator = Accelerator::default();
    assert_eq!(without.encode(), V4);
    for (from, to, words) in [
        (
            "version = 5",
            "version = 4",
            "link_gbps is a key of version 5; write `version = 5`, or leave it out",
        ),
        (
            "link_gbps = 9.25",
            "link_gbps = -1",
            "link_gbps of tier 'vram' is -1, but must be a positive finite number",
        ),
        (
            "node = 0",
            "node = 0\nlink_gbps = 9.25",
            "tier 'dram' is of kind \"dram\": only VRAM has link_gbps",
        ),
    ] {
        assert!(V5.contains(from), "{from}");
        let error = load(&V5.replacen(from, to, 1)).unwrap_err();
        assert!(error.contains(words), "{error}");
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
fn an_objective_is_whole_and_of_version_3() {
    let refused = |text: String, words: &str| {
        let error = load(&text).unwrap_err();
        assert!(error.contains(words), "{error}");
    };
    refused(
        V3.replace("version = 3", "version = 2"),
        "of version 3; write `version = 3`",
    );
    refused(
        V3.replace("objective_unit = \"bytes\"\n", ""),
        "go together",
    );
    refused(
        V2.replace("version = 2", "version = 3")
            .replace("gap = 0.04", "gap = 0.04\nbatch = 4"),
        "go together",
    );
    refused(
        V3.replace("objective_value = 2493216.0", "objective_value = -1.0"),
        "objective_value",
    );
}

#[test]
fn a_plan_that_does_not_say_how_keys_are_stored_means_16_bits() {
    let f16 = V2.replace("kv_type = \"q8_0\"", "kv_type = \"f16\"");
    assert_eq!(load(&V2.replace("kv_type = \"q8_0\"\n", "")), load(&f16));
    assert_eq!(load(V1), load(&f16));
    assert_eq!(load(V1).unwrap().encode(), f16);
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
fn errors_say_what_and_how_to_mend() {
    let cases = [
        (
            "format = \"tier-plan placement\"",
            "format = \"tier-plan machine\"",
            "not a placement plan: its format is \"tier-plan machine\"; `tier-plan solve` writes one",
        ),
        (
            "version = 1",
            "version = 10",
            "placement plan version 10, but this program reads up to version 9; update tier-plan",
        ),
        (
            "context = 1024",
            "context = 1024\nkv_type = \"f16\"",
            "kv_type is a key of version 2; write `version = 2`",
        ),
        (
            "version = 1",
            "version = 2\nkv_type = \"q4\"",
            "kv_type: unknown KV cache type 'q4': expected f16, q8_0, or f32",
        ),
        (
            "hit_rate = 0.9375",
            "hit_rate = 0.9375\nat = 5",
            "predicted.at, kv_s and prompt_gflops are keys of version 3",
        ),
        (
            "context = 1024",
            "context = 1024\ncolor = 3",
            "line 6: unknown field `color`, expected one of `format`",
        ),
        (
            "experts = 4 }",
            "experts = 4, size = 2 }",
            "line 7: unknown field `size`",
        ),
        ("slots = 2", "slots = 2\nslot = 1", "unknown field `slot`"),
        (
            "policy = \"lru\"",
            "policy = \"fifo\"",
            "unknown variant `fifo`, expected one of `lru`, `lfu`, `adaptive`",
        ),
        (
            "policy = \"lru\"",
            "policy = \"lfu\"",
            "layer 1: the policy \"lfu\" is of version 3; write `version = 3`",
        ),
        (
            "policy = \"lru\"",
            "policy = \"lru\"\nhalf_life = 3",
            "half_life is not a parameter of the policy \"lru\"; leave it",
        ),
        ("slots = 2", "slots = -2", "invalid value: integer `-2`"),
        (
            "slots = 2",
            "slots = 70000",
            "layer 1: 70000 slots, but 65536 is the most",
        ),
        (
            "kv_tier = \"vram\"",
            "kv_tier = \"hbm\"",
            "kv_tier names the tier \"hbm\", but the plan's tiers are vram, dram, slow",
        ),
        (
            "kv_tier = \"vram\"",
            "kv_tier = \"slow\"",
            "kv_tier is 'slow', a block device; choose a tier of memory",
        ),
        (
            "tier = \"dram\", experts",
            "tier = \"slow\", experts",
            "the tier of staging is 'slow', a block device",
        ),
        (
            "experts = 4 }",
            "experts = 4000000000 }",
            "staging holds 4000000000 experts, but 1048576 is the most",
        ),
        (
            "slot_tier = \"vram\"",
            "slot_tier = \"slow\"",
            "layer 1: slot_tier is 'slow', a block device",
        ),
        (
            "slot_tier = \"vram\"",
            "slot_tier = \"x\"",
            "layer 1: slot_tier names the tier \"x\"",
        ),
        (
            "dram = \"5,9-11\"",
            "hbm = \"5\"",
            "layer 1: pinned names the tier \"hbm\"",
        ),
        (
            "dram = \"5,9-11\"",
            "dram = \"5,7\"",
            "layer 1: expert 7 is pinned to both 'vram' and 'dram'; keep one",
        ),
        (
            "dram = \"5,9-11\"",
            "dram = \"0-4294967295\"",
            "layer 1: expert 4294967295 is past 65535",
        ),
        (
            "dram = \"5,9-11\"",
            "dram = \"9,5\"",
            "layer 1: expert 5 comes after expert 9; write each once",
        ),
        (
            "layers = \"2-4\"",
            "layers = \"2-4294967295\"",
            "layer 4294967295 is past 4095",
        ),
        (
            "layers = \"2-4\"",
            "layers = \"1-4\"",
            "layer 1 comes after layer 1; list each layer once",
        ),
        (
            "layers = \"2-4\"",
            "layer = 2\nlayers = \"2-4\"",
            "each [[layer]] needs either layer = 3 or layers",
        ),
        (
            "layers = \"2-4\"",
            "layers = \"\"",
            "a [[layer]] table names no layer",
        ),
        ("layer = 5", "layer = 4096", "layer 4096 is past 4095"),
        ("layer = 5", "layer = 3", "layer 3 comes after layer 4"),
        (
            "layers = \"0\", tier",
            "layers = \"0-9999\", tier",
            "dense.dense_ffn: layer 9999 is past 4095",
        ),
        (
            "{ layers = \"4\", tier",
            "{ layers = \"3-4\", tier",
            "the attention group of layer 3 is placed twice; keep one",
        ),
        (
            "head = \"vram\"",
            "head = \"x\"",
            "dense.head names the tier \"x\"",
        ),
        (
            "budget_bytes = 3000000",
            "budget_bytes = 2493215",
            "the lines of tier 'vram' add up to 2493216 bytes (2.38 MiB), but its budget_bytes is 2493215 (2.38 MiB)",
        ),
        (
            "home_bytes = 0",
            "home_bytes = 1",
            "home_bytes of tier 'vram' must be 0: pooled experts live on the last tier",
        ),
        (
            "dense_bytes = 1000000",
            "dense_bytes = 9223372036854775807",
            "add up to 9223372036856269023 bytes",
        ),
        (
            "name = \"slow\"",
            "name = \"dram\"",
            "names the tier \"slow\", but the plan's tiers are vram, dram, dram",
        ),
        (
            "gap = 0.04",
            "gap = inf",
            "solver.gap is inf; leave it out when nothing is proven",
        ),
        (
            "objective_s = 0.00125",
            "objective_s = -1",
            "solver.objective_s is -1, but must be a finite number",
        ),
        ("bound_s = 0.0012", "bound_s = nan", "solver.bound_s is NaN"),
        (
            "overhead_s = 0.00018",
            "overhead_s = nan",
            "predicted.overhead_s is NaN",
        ),
        (
            "dram = 1e-5",
            "dram = -1e-5",
            "predicted.dense_s is -0.00001",
        ),
        (
            "dram = 1e-5",
            "x = 1e-5",
            "predicted.dense_s names the tier \"x\"",
        ),
        (
            "token_overhead_us = 60.0",
            "token_overhead_us = inf",
            "token_overhead_us is inf",
        ),
        (
            "machine = { name",
            "# machine = { name",
            "missing field `machine`",
        ),
    ];
    for (from, to, why) in cases {
        let error = load(&v1_with(from, to)).expect_err(to);
        assert!(
            error.starts_with("p.toml: ") && error.contains(why),
            "{to}: wanted {why:?}, got {error:?}"
        );
    }
    let cases = [
        (
            "half_life = 16",
            "",
            "layer 1: the policy \"lfu\" needs half_life; write a number",
        ),
        (
            "half_life = 16",
            "half_life = 0",
            "layer 1: half_life is 0 tokens, but must be between 1 and 65536",
        ),
        (
            "half_life = 16",
            "half_life = 16\nrecent_weight = 2",
            "recent_weight is not a parameter of the policy \"lfu\"",
        ),
        (
            "recent_half_life = 2",
            "recent_half_life = 65537",
            "layer 5: recent_half_life is 65537 tokens, but must be",
        ),
        (
            "recent_half_life = 2\n",
            "",
            "layer 5: the policy \"adaptive\" needs recent_half_life",
        ),
        (
            "recent_weight = 8",
            "recent_weight = 1025",
            "layer 5: recent_weight is 1025, but 1024 is the most",
        ),
        (
            "version = 3",
            "version = 2",
            "are keys of version 3; write `version = 3`",
        ),
    ];
    for (from, to, why) in cases {
        assert!(V3.contains(from), "{from}");
        let error = load(&V3.replacen(from, to, 1)).expect_err(to);
        assert!(
            error.starts_with("p.toml: ") && error.contains(why),
            "{to}: wanted {why:?}, got {error:?}"
        );
    }
    let error = decode(b"GGUF\x03\0\0\0", Path::new("p.toml"))
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "p.toml: not a placement plan: it is a GGUF model; `tier-plan solve` writes one"
    );
    // Four lines beyond any sum of 64 bits.
    let huge = V1.replace("_bytes = 0\n", "_bytes = 9223372036854775807\n");
    assert!(
        load(&huge)
            .unwrap_err()
            .contains("add up to more bytes than can be counted")
    );
    assert!(
        load(&v1_with(
            "budget_bytes = 3000000",
            "budget_bytes = 18446744073709551615"
        ))
        .is_err()
    );
}

#[test]
fn a_short_text_cannot_ask_for_much_memory() {
    let error = load(&v1_with(
        "layers = \"2-4\"\npinned = { dram = \"0-31\" }",
        "layers = \"2-4\"\npinned = { dram = \"0-65535\" }",
    ));
    assert_eq!(error.unwrap().layers[1].pinned[0].experts.len(), 65_536);
    let error = load(&v1_with(
        "layers = \"2-4\"\npinned = { dram = \"0-31\" }",
        "layers = \"2-4000\"\npinned = { dram = \"0-65535\" }",
    ));
    assert!(
        error
            .unwrap_err()
            .contains("layers 2-4000: the file lists more than 4194304")
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

#[test]
fn only_a_sound_plan_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.toml");
    let plan = load(V1).unwrap();
    plan.write(&path).unwrap();
    assert_eq!(read(&path).unwrap(), plan);
    let refuse = |change: fn(&mut Placement), why: &str| {
        let mut plan = plan.clone();
        change(&mut plan);
        let error = plan.write(&path).unwrap_err().to_string();
        assert!(error.contains(why), "wanted {why:?}, got {error:?}");
        assert!(
            load(&plan.encode()).is_err() || why.contains("no layer"),
            "{why}: written yet read"
        );
    };
    refuse(
        |p| p.kv_tier = TierIdx::new(3),
        "kv_tier is tier number 3, but the plan has 3",
    );
    refuse(
        |p| p.layers[0].slot_tier = TierIdx::new(9),
        "layer 1: slot_tier is tier number 9",
    );
    refuse(
        |p| p.layers[0].pinned[0].tier = TierIdx::new(9),
        "layer 1: a tier of pinned experts is tier number 9",
    );
    refuse(
        |p| p.layers[0].pinned[1].tier = TierIdx::new(0),
        "tier 'vram' is listed twice under pinned",
    );
    refuse(
        |p| p.layers[0].pinned[0].experts = vec![3, 3],
        "on tier 'vram', expert 3 comes after expert 3",
    );
    refuse(|p| p.layers.swap(0, 1), "layer 1 comes after layer 2");
    refuse(
        |p| p.predicted.dense_s = PerTier::from([1.0; 4]),
        "predicted.dense_s has 4 parts, but the plan has 3 tiers",
    );
    refuse(
        |p| p.dense[0].layer = Some(0),
        "the embedding group stands in layer 0, but has no layer",
    );
    refuse(
        |p| p.dense[1].layer = None,
        "the attention group has no layer",
    );
    refuse(|p| p.tiers = PerTier::default(), "no tier");
    refuse(
        |p| p.tiers[TierIdx::new(1)].bytes.kv = 1,
        "kv_bytes of tier 'dram' must be 0: a layer's KV cache is on",
    );
    // A real GPU has its own layers' keys and values, and no others.
    refuse(
        |p| p.tiers[TierIdx::new(0)].tier.emulated = false,
        "kv_tier is 'vram', a GPU's memory, but the attention of layer 4 is on 'dram', and so its KV cache can't",
    );
    refuse(
        |p| {
            (
                p.tiers[TierIdx::new(0)].tier.emulated,
                p.kv_tier,
                p.tiers[TierIdx::new(1)].bytes.kv,
            ) = (false, TierIdx::new(1), 64);
            p.dense.iter_mut().for_each(|d| d.tier = TierIdx::new(0));
        },
        "kv_bytes of tier 'dram' must be 0: a layer's KV cache is on the GPU that has its attention",
    );
    let mut split = plan.clone();
    (split.tiers[TierIdx::new(0)].tier.emulated, split.kv_tier) = (false, TierIdx::new(1));
    (
        split.tiers[TierIdx::new(1)].bytes.kv,
        split.tiers[TierIdx::new(1)].budget_bytes,
        split.tiers[TierIdx::new(1)].tier.capacity_bytes,
    ) = (64, 1 << 30, 1 << 30);
    split.write(&dir.path().join("split.toml")).unwrap();
    assert_eq!(
        split.cache_tiers(7),
        [0, 0, 0, 0, 1, 0, 1].map(TierIdx::new)
    );
    assert_eq!(
        read(&path).unwrap(),
        plan,
        "the file from before is still there"
    );
}
