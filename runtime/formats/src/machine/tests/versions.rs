//! Files of every version mean what they meant.

use super::*;

#[test]
fn version_1_means_what_it_meant() {
    let machine = decode(V1, Path::new("m.toml")).unwrap();
    let tier =
        |name: &str, kind, capacity_bytes, read_gbps, latency_us, emulated, source: &str| Tier {
            name: name.into(),
            kind,
            capacity_bytes,
            read_gbps,
            latency_us,
            emulated,
            unit: None,
            accelerator: Accelerator::default(),
            source: source.into(),
        };
    let want = Machine {
        name: "workstation \"A\"".into(),
        description: "Five kinds of memory in one fixture".into(),
        layer_overhead_us: 20.5,
        token_overhead_us: 60.0,
        tiers: vec![
            tier("vram", TierKind::Vram, 24 << 30, 860.0, 10.0, false, "spec"),
            tier(
                "dram",
                TierKind::Dram,
                103_079_215_104,
                65.25,
                0.0,
                false,
                "measured 2026-11-22",
            ),
            tier(
                "pmem-0",
                TierKind::Pmem,
                768_000_000_000,
                39.4,
                0.305,
                false,
                "arXiv 1903.05714",
            ),
            tier(
                "cxl",
                TierKind::Cxl,
                4_718_592,
                36.0,
                0.25,
                true,
                "declared",
            ),
            tier(
                "nvme",
                TierKind::Nvme,
                2_000_000_000_001,
                6.4,
                100.0,
                false,
                "probe",
            ),
        ],
        extras: Extras::default(),
        id: SourceId {
            name: "workstation \"A\"".into(),
            hash: machine.id.hash.clone(),
        },
    };
    assert_eq!(machine, want);
    assert_eq!(machine.id.hash, "9212bdf36ab9cdd3108aee9de938bbf1");
}

const V2: &str = include_str!("../../../../../tests/data/formats/machine.v2.toml");

#[test]
fn version_2_means_what_it_meant() {
    let machine = load(V2).unwrap();
    let calibration = Calibration {
        when: "2026-11-22T17:00:00Z".into(),
        records: 6,
        error_before: 0.125,
        error_after: 0.02,
    };
    assert_eq!(machine.extras.calibration, Some(calibration));
    let rates = [("vram".to_string(), 80000.0), ("dram".to_string(), 950.5)];
    assert_eq!(machine.extras.prompt_gflops, BTreeMap::from(rates));
    // The processor computes on main memory, Optane and what it has read from the drive alike.
    assert_eq!(
        machine.prompt_gflops(),
        PerTier::from([80000.0, 950.5, 950.5, 950.5])
    );
    assert_eq!(
        machine.encode(),
        V2,
        "the writer lays out version 2 as it always did"
    );
    let without = V2.replace("prompt_gflops = 950.5\n", "");
    assert_eq!(
        load(&without).unwrap().prompt_gflops(),
        PerTier::from([80000.0, 0.0, 0.0, 0.0])
    );
    assert_eq!(
        decode(V1, Path::new("m.toml")).unwrap().prompt_gflops(),
        PerTier::default()
    );
    for (from, to, words) in [
        (
            "prompt_gflops = 950.5",
            "prompt_gflops = 0",
            "prompt_gflops of tier 'dram' is 0, but must be a positive",
        ),
        (
            "error_after = 0.02",
            "error_after = -1.0",
            "calibration.error_after is -1",
        ),
        ("records = 6", "record = 6", "unknown field `record`"),
    ] {
        let error = load(&V2.replace(from, to)).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
}

const V3: &str = include_str!("../../../../../tests/data/formats/machine.v3.toml");

#[test]
fn version_3_means_what_it_meant() {
    let machine = load(V3).unwrap();
    let units: Vec<_> = machine
        .tiers
        .iter()
        .map(|t| (t.device(), t.node()))
        .collect();
    assert_eq!(
        units,
        [
            (Some(0), None),
            (None, Some(0)),
            (None, Some(1)),
            (None, Some(2)),
            (None, None)
        ]
    );
    let link = Link {
        to_gbps: 25.5,
        to_pageable_gbps: 9.25,
        from_gbps: 26.0,
        from_pageable_gbps: 8.0,
        contended_gbps: 21.0,
        dram_contended_gbps: 50.0,
    };
    assert_eq!(
        machine.extras.links,
        BTreeMap::from([("vram".to_string(), link)])
    );
    assert!(
        machine
            .extras
            .watts_source
            .as_ref()
            .is_some_and(|s| s.starts_with("limits: package-0 150 W"))
    );
    assert_eq!(
        machine.encode(),
        V3,
        "the writer lays out version 3 as it always did"
    );
    for (from, to, words) in [
        (
            "version = 3",
            "version = 2",
            "watts_source and link are keys of version 3; write `version = 3`",
        ),
        (
            "to_gbps = 25.5",
            "to_gbps = 0",
            "link.to_gbps of tier 'vram' is 0, but must be a positive finite number",
        ),
        ("to_gbps = 25.5, ", "", "missing field `to_gbps`"),
        (
            "node = 1",
            "node = 0",
            "tiers 'dram0' and 'dram1' both have node 0; merge them",
        ),
        (
            "node = 2",
            "node = 1",
            "tiers 'dram1' and 'cxl' both have node 1; merge them",
        ),
        (
            "node = 1\n",
            "",
            "'dram1' does not say which NUMA node it is",
        ),
        (
            "node = 1",
            "device = 1",
            "tier 'dram1' is of kind \"dram\": which one it is says `node`",
        ),
        (
            "device = 0",
            "node = 0",
            "tier 'vram' is of kind \"vram\": which one it is says `device`",
        ),
        (
            "source = \"probe\"",
            "node = 0\nsource = \"probe\"",
            "tier 'nvme' is a block device, which has no node",
        ),
    ] {
        assert!(V3.contains(from), "{from}");
        let error = load(&V3.replacen(from, to, 1)).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
    let old = V3.replace("version = 3", "version = 2");
    let old: Vec<&str> = old
        .lines()
        .filter(|l| !l.starts_with("watts_source") && !l.starts_with("link"))
        .collect();
    assert!(
        load(&old.join("\n"))
            .unwrap_err()
            .contains("device is a key of version 3; write `version = 3`")
    );
    let without_drive = V3.split("\n[[tier]]\nname = \"nvme\"").next().unwrap();
    let error = load(without_drive).unwrap_err();
    assert!(
        error.contains(
            "tier 'cxl' is the last one, where experts stay in the mapped file, and has a `node`"
        ),
        "{error}"
    );
}

const V4: &str = include_str!("../../../../../tests/data/formats/machine.v4.toml");

#[test]
fn version_4_means_what_it_meant() {
    let machine = load(V4).unwrap();
    let known = Accelerator {
        link_gbps: Some(9.25),
        layer_us: Some(35.5),
        resident_layer_us: Some(22.0),
    };
    assert_eq!(machine.tiers[0].accelerator, known);
    assert!(
        machine.tiers[1..]
            .iter()
            .all(|t| t.accelerator == Accelerator::default())
    );
    assert_eq!(
        machine.encode(),
        V4,
        "the writer lays out version 4 as it always did"
    );
    let [vram, dram, .., nvme] = &machine.tiers[..] else {
        panic!("five tiers")
    };
    let us = |to: &Tier, from: &Tier| (to.transfer_s(from, 1e6) * 1e7).round() / 10.0;
    assert_eq!(
        (us(vram, dram), us(vram, nvme), us(dram, nvme)),
        (108.1, 156.3, 156.3)
    );
    for (from, to, words) in [
        (
            "version = 4",
            "version = 3",
            "link_gbps is a key of version 4; write `version = 4`, or leave it out",
        ),
        (
            "link_gbps = 9.25",
            "link_gbps = 0",
            "link_gbps of tier 'vram' is 0, but must be a positive finite number",
        ),
        (
            "link_gbps = 9.25",
            "link_gbps = inf",
            "link_gbps of tier 'vram' is inf, but must be",
        ),
        (
            "layer_us = 35.5",
            "layer_us = -1",
            "layer_us of tier 'vram' is -1",
        ),
        (
            "emulated = false",
            "emulated = true",
            "tier 'vram' is emulated and takes what the machine declares for a layer",
        ),
        (
            "node = 1",
            "node = 1\nlink_gbps = 9.25",
            "tier 'dram1' is of kind \"dram\": only VRAM has link_gbps",
        ),
    ] {
        assert!(V4.contains(from), "{from}");
        let error = load(&V4.replacen(from, to, 1)).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
}

const V5: &str = include_str!("../../../../../tests/data/formats/machine.v5.toml");

#[test]
fn version_5_means_what_it_meant() {
    let machine = load(V5).unwrap();
    let spread = &machine.extras.spread;
    assert_eq!(
        (spread.get("dram0"), spread.get("nvme")),
        (Some(&0.035), Some(&0.25))
    );
    assert_eq!(
        machine.encode(),
        V5,
        "the writer lays out version 5 as it always did"
    );
    // A file without the keys is of an older version.
    let mut without = machine.clone();
    without.extras.spread.clear();
    without.extras.io.clear();
    assert!(without.encode().contains("\nversion = 4\n"));
    for (from, to, words) in [
        (
            "version = 5",
            "version = 4",
            "spread is a key of version 5; write `version = 5`, or leave it out",
        ),
        (
            "spread = 0.25",
            "spread = -0.25",
            "spread of tier 'nvme' is -0.25",
        ),
        (
            "spread = 0.25",
            "spread = nan",
            "spread of tier 'nvme' is NaN",
        ),
    ] {
        assert!(V5.contains(from), "{from}");
        let error = load(&V5.replacen(from, to, 1)).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
}

const V6: &str = include_str!("../../../../../tests/data/formats/machine.v6.toml");

#[test]
fn version_6_means_what_it_meant() {
    let machine = load(V6).unwrap();
    let copy = |file: &str, share| ExpertCopy {
        file: file.into(),
        share,
    };
    let copies = vec![
        copy("/mnt/b/model.gguf", 0.4),
        copy("/mnt/c/model.experts", 0.25),
    ];
    assert_eq!(
        machine.extras.copies,
        BTreeMap::from([("nvme".to_string(), copies)])
    );
    assert_eq!(
        machine.encode(),
        V6,
        "the writer lays out version 6 as it always did"
    );
    // A file without the key is of an older version.
    let mut without = machine.clone();
    without.extras.copies.clear();
    assert!(without.encode().contains("\nversion = 5\n"));
    for (from, to, words) in [
        (
            "version = 6",
            "version = 5",
            "copies is a key of version 6; write `version = 6`, or leave it out",
        ),
        (
            "share = 0.4",
            "share = 0.8",
            "copies of tier 'nvme': the share of the copy \"/mnt/b/model.gguf\" is 0.8, expected above 0, and below 1",
        ),
        (
            "share = 0.4",
            "share = nan",
            "the share of the copy \"/mnt/b/model.gguf\" is NaN",
        ),
        (
            "/mnt/b/model.gguf",
            "",
            "copies of tier 'nvme': the file of a copy is empty",
        ),
        (
            "emulated = false\nio = \"direct\"",
            "emulated = true",
            "tier 'nvme' has the key copies, but experts are read from the last tier only",
        ),
    ] {
        assert!(V6.contains(from), "{from}");
        let error = load(&V6.replacen(from, to, 1)).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
}

const V7: &str = include_str!("../../../../../tests/data/formats/machine.v7.toml");

#[test]
fn version_7_means_what_it_meant() {
    let machine = load(V7).unwrap();
    // The processor computes on main memory and on what it has read from the drive alike.
    assert_eq!(machine.few_gflops(), PerTier::from([320.25, 320.25]));
    assert_eq!(machine.prompt_gflops(), PerTier::from([405.5, 405.5]));
    assert_eq!(
        machine.encode(),
        V7,
        "the writer lays out version 7 as it always did"
    );
    // A file without the key is of an older version.
    let mut without = machine.clone();
    without.extras.few_gflops.clear();
    assert!(without.encode().contains("\nversion = 2\n"));
    assert_eq!(without.few_gflops(), PerTier::default());
    for (from, to, words) in [
        (
            "version = 7",
            "version = 6",
            "few_gflops is a key of version 7; write `version = 7`, or leave it out",
        ),
        (
            "few_gflops = 320.25",
            "few_gflops = 0",
            "few_gflops of tier 'dram' is 0, but must be a positive",
        ),
    ] {
        assert!(V7.contains(from), "{from}");
        let error = load(&V7.replacen(from, to, 1)).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_drive_may_say_how_it_is_read() {
    let text = V5;
    let machine = load(text).unwrap();
    let io = BTreeMap::from([("nvme".to_string(), DriveIo::Buffered)]);
    assert_eq!(machine.extras.io, io);
    assert!(machine.encode().contains("version = 5\n"));
    assert_eq!(load(&machine.encode()).unwrap().extras, machine.extras);
    let elsewhere = text.replacen("node = 2\n", "io = \"direct\"\n", 1);
    let emulated = text.replacen("emulated = false\nio", "emulated = true\nio", 1);
    for text in [elsewhere, emulated] {
        let error = load(&text).unwrap_err();
        assert!(
            error.contains("has the key io, but is not a drive that is read"),
            "{error}"
        );
    }
    let unknown = load(&text.replacen("\"buffered\"", "\"fast\"", 1)).unwrap_err();
    assert!(
        unknown.contains("unknown variant `fast`, expected `direct` or `buffered`"),
        "{unknown}"
    );
}
