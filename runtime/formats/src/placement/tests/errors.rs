//! Plans that are refused, read or to be written.

use super::*;

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
            "version = 13",
            "placement plan version 13, but this program reads up to version 12; update tier-plan",
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
