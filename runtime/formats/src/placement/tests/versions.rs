//! What each version of plan files means, and which version a plan is written as.

use super::*;

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
        host_kv: Vec::new(),
        staging_tier: dram,
        staging_experts: 4,
        reads: HomeReads::default(),
        streaming: None,
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
            few_gflops: PerTier::default(),
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
fn version_10_says_how_fast_few_rows_are() {
    let plan = load(V10).unwrap();
    let rates = &plan.predicted.few_gflops;
    assert_eq!(*rates, PerTier::from([0.0, 40.25, 40.25]));
    // A tier without a figure has none in a machine file either.
    let known = [("dram".to_string(), 40.25), ("slow".to_string(), 40.25)];
    assert_eq!(plan.by_name(rates), known.into());
    assert_eq!(
        plan.encode(),
        V10,
        "a plan with a key of version 10 says so"
    );
    let mut without = plan.clone();
    without.predicted.few_gflops = PerTier::default();
    assert_eq!(without.encode(), V9);
    for (from, to, why) in [
        (
            "version = 10",
            "version = 9",
            "predicted.few_gflops is a key of version 10",
        ),
        (
            "vram = 0.0, dram = 40.25",
            "vram = -1.0, dram = 40.25",
            "-1",
        ),
        ("few_gflops = { vram", "few_gflops = { hbm", "hbm"),
    ] {
        assert!(V10.contains(from), "{from}");
        let error = load(&V10.replacen(from, to, 1)).unwrap_err().to_string();
        assert!(error.contains(why), "{why}: {error}");
    }
}

#[test]
fn version_11_says_which_experts_are_streamed() {
    let plan = load(V11).unwrap();
    let streaming = Streaming {
        tier: TierIdx::new(0),
        from: TierIdx::new(1),
        experts: 2,
        link_gbps: 8.5,
        cpu_share: 0.875,
    };
    assert_eq!(plan.streaming, Some(streaming));
    assert_eq!(
        plan.encode(),
        V11,
        "a plan with a key of version 11 says so"
    );
    let without = Placement {
        streaming: None,
        ..plan
    };
    assert!(without.encode().contains("\nversion = 10\n"));
    for (from, to, why) in [
        (
            "version = 11",
            "version = 10",
            "streaming is a key of version 11; write `version = 11`, or leave it out",
        ),
        (
            "{ tier = \"vram\", from",
            "{ tier = \"dram\", from",
            "streaming.tier is 'dram', which is not a GPU's memory",
        ),
        (
            "from = \"dram\"",
            "from = \"slow\"",
            "streaming.from is 'slow', but experts are streamed from main memory",
        ),
        (
            "from = \"dram\"",
            "from = \"ram\"",
            "streaming.from names the tier \"ram\", but the plan's tiers are vram, dram, slow",
        ),
        (
            "experts = 2, link",
            "experts = 0, link",
            "streaming.experts is 0, but must be between 1 and",
        ),
        (
            "link_gbps = 8.5",
            "link_gbps = 0.0",
            "streaming.link_gbps is 0, but must be a positive finite number of 10^9 bytes per second",
        ),
        (
            "cpu_share = 0.875",
            "cpu_share = nan",
            "streaming.cpu_share is NaN, but is a part of a rate",
        ),
        (
            "cpu_share = 0.875",
            "cpu_share = 1.5",
            "streaming.cpu_share is 1.5, but",
        ),
        ("cpu_share = 0.875", "speed = 1", "unknown field `speed`"),
    ] {
        assert!(V11.contains(from), "{from}");
        let error = load(&V11.replacen(from, to, 1)).unwrap_err();
        assert!(error.contains(why), "{why}: {error}");
    }
    // Neither a GPU nor main memory is emulated.
    let (before, after) = V11.split_at(V11.find("[[tier]]").unwrap());
    let emulated = after.replacen("emulated = false", "emulated = true", 1);
    let error = load(&(before.to_string() + &emulated)).unwrap_err();
    assert!(error.contains("not a GPU's memory"), "{error}");
}

#[test]
fn version_12_says_which_caches_are_kept_off_a_gpu() {
    let plan = load(V12).unwrap();
    assert_eq!(plan.host_kv, [1, 2, 5]);
    assert_eq!(
        plan.encode(),
        V12,
        "a plan with a key of version 12 says so"
    );
    let (vram, dram) = (TierIdx::new(0), TierIdx::new(1));
    assert_eq!(plan.cache_tiers(6), [vram, dram, dram, vram, dram, dram]);
    let without = Placement {
        host_kv: Vec::new(),
        ..plan
    };
    assert!(without.encode().contains("\nversion = 11\n"));
    for (from, to, why) in [
        (
            "version = 12",
            "version = 11",
            "host_kv is a key of version 12; write `version = 12`, or leave it out",
        ),
        (
            "\"1-2,5\"",
            "\"1-2,4\"",
            "host_kv names layer 4, whose attention is not on a GPU",
        ),
        (
            "\"1-2,5\"",
            "\"1-2,6\"",
            "host_kv names layer 6, whose attention is not on a GPU",
        ),
        ("\"1-2,5\"", "\"2,1\"", "host_kv: "),
        ("\"1-2,5\"", "\"0-99999\"", "host_kv: "),
        ("\"1-2,5\"", "\"1-2,x\"", "host_kv: "),
        ("\"1-2,5\"", "[1, 2]", "invalid type"),
    ] {
        assert!(V12.contains(from), "{from}");
        let error = load(&V12.replacen(from, to, 1)).unwrap_err();
        assert!(error.contains(why), "{why}: {error}");
    }
    let mut on_gpu = without.clone();
    on_gpu.dense.retain(|d| d.kind != DenseKind::Attention);
    let attention = |layer| DensePlacement {
        kind: DenseKind::Attention,
        layer: Some(layer),
        tier: vram,
    };
    on_gpu.dense.extend((0..6).map(attention));
    (on_gpu.kv_tier, on_gpu.host_kv) = (vram, vec![3]);
    on_gpu.tiers[dram].bytes.kv = 0;
    let error = load(&on_gpu.encode()).unwrap_err();
    assert!(
        error.contains("off its GPU, but kv_tier is 'vram'"),
        "{error}"
    );
}
