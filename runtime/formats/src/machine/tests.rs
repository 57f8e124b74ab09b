mod versions;

use super::*;
use proptest::prelude::*;

const V1: &[u8] = include_bytes!("../../../../tests/data/formats/machine.v1.toml");

fn load(text: &str) -> Result<Machine, String> {
    decode(text.as_bytes(), Path::new("m.toml")).map_err(|e| e.to_string())
}

fn v1_with(from: &str, to: &str) -> String {
    let text = std::str::from_utf8(V1).unwrap();
    assert!(text.contains(from), "{from}");
    text.replacen(from, to, 1)
}

#[test]
fn the_machines_that_ship_are_readable() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../profiles/machines");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let machine = read(&entry.unwrap().path()).unwrap();
        assert!(
            machine.tiers.iter().all(|t| !t.source.is_empty()),
            "{}",
            machine.name
        );
        names.push(machine.name);
    }
    for name in ["demo-emulated", "optane-768", "desktop-4090-ddr5-nvme"] {
        assert!(
            names.iter().any(|n| n == name),
            "{name} is not among {names:?}"
        );
    }
}

#[test]
fn the_demo_machine_is_emulated_throughout() {
    let demo = load(include_str!(
        "../../../../profiles/machines/demo-emulated.toml"
    ))
    .unwrap();
    let tiers: Vec<_> = demo
        .tiers
        .iter()
        .map(|t| (t.name.as_str(), t.capacity_bytes, t.read_gbps, t.latency_us))
        .collect();
    assert_eq!(
        tiers,
        [
            ("vram", 3 << 20, 8.0, 5.0),
            ("dram", 9 << 19, 1.0, 0.0),
            ("slow", 64 << 20, 0.15, 40.0)
        ]
    );
    assert!(demo.tiers.iter().all(|t| t.emulated));
    assert_eq!(
        (demo.layer_overhead_us, demo.token_overhead_us),
        (20.0, 60.0)
    );
}

#[test]
fn errors_say_what_and_how_to_mend() {
    let cases = [
        (v1_with("format = \"tier-plan machine\"", "format = \"tier-plan placement\""), "not a machine file: its format is \"tier-plan placement\"; profiles/machines holds examples"),
        (v1_with("version = 1", "version = 8"), "machine file version 8, but this program reads up to version 7; update tier-plan"),
        (v1_with("kind = \"dram\"", "kind = \"dram\"\nprompt_gflops = 1"), "prompt_gflops and calibration are keys of version 2; write `version = 2`"),
        (v1_with("kind = \"nvme\"", "kind = \"nvme\"\nio = \"direct\""), "io is a key of version 5; write `version = 5`"),
        (v1_with("kind = \"nvme\"", "kind = \"nvme\"\ncopies = [{ file = \"/b/m.gguf\", share = 0.5 }]"), "copies is a key of version 6; write `version = 6`"),
        (v1_with("version = 1", "version = 0"), "version is 0, but versions start at 1"),
        (v1_with("version = 1", "version = -4"), "version is -4"),
        (v1_with("version = 1\n", ""), "no version; write `version = 7`"),
        (v1_with("version = 1", "version = \"1\""), "line 4: invalid type"),
        (v1_with("kind = \"vram\"", "kind = \"hbm\""), "line 11: unknown variant `hbm`, expected one of `vram`, `dram`, `pmem`, `cxl`, `nvme`"),
        (v1_with("latency_us = 10", "latency_ns = 10"), "line 14: unknown field `latency_ns`"),
        (v1_with("latency_us = 10\n", ""), "missing field `latency_us`"),
        (v1_with("\"24GiB\"", "\"24 gigs\""), "line 12: '24 gigs' is not a size: write a number with B, KiB"),
        (v1_with("\"24GiB\"", "-1"), "a number of bytes or a size like \"24GiB\""),
        (v1_with("\"24GiB\"", "0"), "tier 'vram' has a capacity of 0; leave the tier out"),
        (v1_with("\"24GiB\"", "\"9EiB\""), "is not a size"),
        (v1_with("\"24GiB\"", "\"12000000TiB\""), "is 13194139533312000000 bytes, which is more than the format can hold"),
        (v1_with("read_gbps = 860", "read_gbps = 0"), "read_gbps of tier 'vram' is 0, but must be a positive finite number"),
        (v1_with("read_gbps = 860", "read_gbps = inf"), "read_gbps of tier 'vram' is inf"),
        (v1_with("read_gbps = 860", "read_gbps = nan"), "read_gbps of tier 'vram' is NaN"),
        (v1_with("latency_us = 10", "latency_us = -1"), "latency_us of tier 'vram' is -1"),
        (v1_with("layer_overhead_us = 20.5", "layer_overhead_us = nan"), "layer_overhead_us is NaN"),
        (v1_with("read_gbps = 860", "read_gbps = 60"), "tier 'vram' (60 GB/s) stands before tier 'dram' (65.25 GB/s); list the tiers from fastest to slowest"),
        (v1_with("name = \"vram\"", "name = \"dram\""), "two tiers are named 'dram'; give each its own name"),
        (v1_with("name = \"vram\"", "name = \"v=1\""), "tier name \"v=1\" must be 1 to 64 letters"),
        (v1_with("kind = \"dram\"", "kind = \"cxl\""), "no tier of kind \"dram\"; add the main memory"),
        (v1_with("kind = \"vram\"", "kind = \"dram\""), "tiers 'vram' and 'dram' are both of kind \"dram\", and 'vram' does not say which NUMA node it is; there can be only one, or one for each `node`"),
        ("format = \"tier-plan machine\"\nversion = 1\nname = \"x\"\nlayer_overhead_us = 0\ntoken_overhead_us = 0\ntier = []".into(), "no tier; add a [[tier]] table"),
        ("format = \"tier-plan machine\"\nversion = [".into(), "line 2: "),
        (String::new(), "not a machine file: it is empty"),
        ("name = \"x\"".into(), "it is text that names no tier-plan format"),
        ("GGUF\u{3}\0\0\0".into(), "not a machine file: it is a GGUF model; profiles/machines holds examples"),
        ("{\"format\": \"tier-plan run record\"}".into(), "not a machine file: it is a run record"),
        ("\u{7f}ELF\u{2}".into(), "it is binary data that starts with 7f 45 4c 46"),
        ("tierprof".into(), "it is a tier-plan profile"),
    ];
    for (text, why) in cases {
        let error = load(&text).unwrap_err();
        assert!(
            error.starts_with("m.toml: ") && error.contains(why),
            "wanted {why:?}, got {error:?}"
        );
    }
    let latin1 = [V1, b"# caf\xe9\n"].concat();
    let error = decode(&latin1, Path::new("m.toml"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains(&format!(
            "byte {} is not UTF-8; save the file as UTF-8",
            V1.len() + 5
        )),
        "{error}"
    );
    let bytes = decode(b"\xff\xfe\0x", Path::new("m.toml"))
        .unwrap_err()
        .to_string();
    assert!(
        bytes.contains("binary data that starts with ff fe 00 78"),
        "{bytes}"
    );
}

#[test]
fn files_are_refused_by_kind_and_size_without_being_parsed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    // 1 TiB, of which only the first bytes exist.
    let file = std::fs::File::create(&path).unwrap();
    std::io::Write::write_all(&mut &file, b"GGUF").unwrap();
    file.set_len(1 << 40).unwrap();
    let error = read(&path).unwrap_err().to_string();
    assert!(error.contains("it is a GGUF model"), "{error}");

    let path = dir.path().join("large.toml");
    std::fs::write(&path, [V1, &vec![b'#'; 2 << 20]].concat()).unwrap();
    let error = read(&path).unwrap_err().to_string();
    assert!(
        error.contains("larger than 1.00 MiB, the most that a machine file may have"),
        "{error}"
    );
    std::fs::write(&path, vec![b'#'; 2 << 20]).unwrap();
    assert!(
        read(&path)
            .unwrap_err()
            .to_string()
            .contains("names no tier-plan format")
    );
    let missing = read(&dir.path().join("none.toml")).unwrap_err();
    assert!(
        missing.to_string().contains("none.toml: No such file"),
        "{missing}"
    );
    assert!(
        std::error::Error::source(&missing).is_none(),
        "the cause would be printed twice"
    );
}

#[test]
fn only_a_sound_machine_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.toml");
    let mut machine = decode(V1, &path).unwrap();
    machine.write(&path).unwrap();
    assert_eq!(read(&path).unwrap(), machine.clone().identified());
    machine.tiers[0].read_gbps = f64::NAN;
    assert!(
        machine
            .write(&path)
            .unwrap_err()
            .to_string()
            .contains("read_gbps of tier 'vram' is NaN")
    );
    assert!(read(&path).is_ok(), "the file from before is still there");
}

#[test]
fn capacities_are_written_for_people_when_exact() {
    for (bytes, text) in [
        (24 << 30, "\"24GiB\""),
        (4_718_592, "\"4.5MiB\""),
        (1 << 40, "\"1TiB\""),
        (768_000_000_000, "\"768GB\""),
        (1025, "1025"),
        (1, "1"),
    ] {
        let shown = super::write::show_capacity(bytes);
        assert_eq!(shown, text);
    }
}

pub(crate) fn any_text() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z0-9 -]{0,12}", "\\PC{0,8}", "[\\x00-\\x7f]{0,8}"]
}

pub(crate) fn any_rate() -> impl Strategy<Value = f64> {
    prop_oneof![
        0.001f64..10_000.0,
        Just(1e-300),
        Just(1e300),
        (1u32..1000).prop_map(f64::from)
    ]
}

fn any_accelerator() -> impl Strategy<Value = Accelerator> {
    let time = || proptest::option::of(0f64..500.0);
    let known = (proptest::option::of(any_rate()), time(), time());
    known.prop_map(|(link_gbps, layer_us, resident_layer_us)| Accelerator {
        link_gbps,
        layer_us,
        resident_layer_us,
    })
}

/// One to five tiers, exactly one of them main memory, in no order; any but the last one may say
/// which of its kind it is.
pub(crate) fn any_tiers() -> impl Strategy<Value = Vec<Tier>> {
    let kind = prop_oneof![
        Just(TierKind::Vram),
        Just(TierKind::Pmem),
        Just(TierKind::Cxl),
        Just(TierKind::Nvme)
    ];
    let capacity = prop_oneof![
        1u64..=i64::MAX as u64,
        (1u64..5000).prop_map(|g| g << 30),
        (1u64..99).prop_map(|m| m << 19)
    ];
    let tier = (
        kind,
        capacity,
        any_rate(),
        0f64..500.0,
        any::<bool>(),
        any::<bool>(),
        any_accelerator(),
        any_text(),
    );
    (
        proptest::collection::vec(tier, 1..=5),
        any::<prop::sample::Index>(),
    )
        .prop_map(|(tiers, dram)| {
            let dram = dram.index(tiers.len());
            let mut out = Vec::new();
            let slowest = tiers.iter().map(|t| t.2).fold(f64::INFINITY, f64::min);
            let last = tiers.len() - 1;
            for (at, tier) in tiers.into_iter().enumerate() {
                let (
                    kind,
                    capacity_bytes,
                    read_gbps,
                    latency_us,
                    emulated,
                    has_unit,
                    accelerator,
                    source,
                ) = tier;
                let kind = if at == dram { TierKind::Dram } else { kind };
                let name = format!("{kind}-{at}");
                // Whatever they are sorted by, one of the slowest tiers comes last.
                let may_have = kind != TierKind::Nvme && at != last && read_gbps > slowest;
                let unit = (has_unit && may_have).then_some(at as u32);
                let accelerator = match accelerator {
                    all if kind == TierKind::Vram && !emulated => all,
                    Accelerator { link_gbps, .. } if kind == TierKind::Vram => Accelerator {
                        link_gbps,
                        ..Default::default()
                    },
                    _ => Accelerator::default(),
                };
                out.push(Tier {
                    name,
                    kind,
                    capacity_bytes,
                    read_gbps,
                    latency_us,
                    emulated,
                    unit,
                    accelerator,
                    source,
                });
            }
            out
        })
}

fn any_machine() -> impl Strategy<Value = Machine> {
    let amount = || proptest::option::of(0f64..1e6);
    let fitted = (any_text(), any::<u32>(), 0f64..10.0, 0f64..10.0).prop_map(
        |(when, records, error_before, error_after)| Calibration {
            when,
            records,
            error_before,
            error_after,
        },
    );
    let of_2 = (
        proptest::option::of(any_rate()),
        proptest::option::of(fitted),
    );
    let rates = || {
        [
            any_rate(),
            any_rate(),
            any_rate(),
            any_rate(),
            any_rate(),
            any_rate(),
        ]
    };
    let link = rates().prop_map(
        |[
            to_gbps,
            to_pageable_gbps,
            from_gbps,
            from_pageable_gbps,
            contended_gbps,
            other,
        ]| {
            let dram_contended_gbps = other;
            Link {
                to_gbps,
                to_pageable_gbps,
                from_gbps,
                from_pageable_gbps,
                contended_gbps,
                dram_contended_gbps,
            }
        },
    );
    let io = prop_oneof![Just(DriveIo::Direct), Just(DriveIo::Buffered)];
    let of_3 = (
        proptest::option::of(link),
        proptest::option::of(any_text()),
        proptest::option::of(io),
    );
    let extras = (
        0.01f64..=1.0,
        proptest::option::of(0.1f64..100.0),
        amount(),
        amount(),
        amount(),
        of_2,
        of_3,
    );
    (
        any_text(),
        any_text(),
        any_tiers(),
        0f64..1e6,
        0f64..1e6,
        extras,
    )
        .prop_map(|(name, description, mut tiers, layer, token, extras)| {
            let (
                efficiency,
                load_gbps,
                price_usd,
                watts,
                each,
                (gflops, calibration),
                (link, watts_source, io),
            ) = extras;
            tiers.sort_by(|a, b| b.read_gbps.total_cmp(&a.read_gbps));
            let id = SourceId {
                name: String::new(),
                hash: String::new(),
            };
            let usd_per_gb = each
                .map(|price| (tiers[0].name.clone(), price))
                .into_iter()
                .collect();
            let prompt_gflops: BTreeMap<String, f64> = gflops
                .map(|rate| (tiers[0].name.clone(), rate))
                .into_iter()
                .collect();
            let links: BTreeMap<String, Link> = link
                .map(|link| (tiers[0].name.clone(), link))
                .into_iter()
                .collect();
            let drive = tiers.iter().find(|tier| tier.is_drive());
            let last = tiers.last().filter(|tier| tier.is_drive());
            let copies = io.and(last).map(|tier| {
                let file = "/b/a \"model\".gguf".to_string();
                (tier.name.clone(), vec![ExpertCopy { file, share: 0.25 }])
            });
            let io = io.zip(drive).map(|(io, tier)| (tier.name.clone(), io));
            let extras = Extras {
                efficiency,
                load_gbps,
                price_usd,
                watts,
                watts_source,
                io: io.into_iter().collect(),
                copies: copies.into_iter().collect(),
                usd_per_gb,
                spread: links
                    .iter()
                    .map(|(name, link)| (name.clone(), link.to_gbps))
                    .collect(),
                few_gflops: prompt_gflops
                    .iter()
                    .filter(|_| efficiency < 0.5)
                    .map(|(name, rate)| (name.clone(), rate / 2.0))
                    .collect(),
                prompt_gflops,
                links,
                calibration,
            };
            Machine {
                name,
                description,
                tiers,
                layer_overhead_us: layer,
                token_overhead_us: token,
                extras,
                id,
            }
            .identified()
        })
}

proptest! {
    #[test]
    fn any_machine_reads_back(machine in any_machine()) {
        let text = machine.encode();
        prop_assert_eq!(decode(text.as_bytes(), Path::new("m.toml")).unwrap(), machine);
    }

    #[test]
    fn damage_never_panics(at in any::<prop::sample::Index>(), cut in 0usize..40, insert in proptest::collection::vec(any::<u8>(), 0..6)) {
        let mut bytes = V1.to_vec();
        let at = at.index(bytes.len());
        let end = (at + cut).min(bytes.len());
        bytes.splice(at..end, insert);
        if let Ok(machine) = decode(&bytes, Path::new("m.toml")) {
            prop_assert_eq!(load(&machine.encode()).unwrap().tiers, machine.tiers);
        }
    }
}

#[test]
fn extras_are_read_checked_and_left_out_by_default() {
    let plain = decode(V1, Path::new("m.toml")).unwrap();
    assert_eq!(plain.computing_tiers(), plain.tiers);
    assert!(!plain.encode().contains("efficiency"));
    let extra =
        "layer_overhead_us = 20.5\nefficiency = 0.5\nload_gbps = 3\nprice_usd = 1200\nwatts = 300";
    let text = v1_with("layer_overhead_us = 20.5", extra).replacen(
        "kind = \"dram\"",
        "kind = \"dram\"\nusd_per_gb = 2",
        1,
    );
    let machine = load(&text).unwrap();
    assert_eq!(
        machine.extras.usd_per_gb,
        BTreeMap::from([("dram".to_string(), 2.0)])
    );
    assert_eq!(
        (
            machine.extras.load_gbps,
            machine.extras.price_usd,
            machine.extras.watts
        ),
        (Some(3.0), Some(1200.0), Some(300.0))
    );
    // What the CPU computes on is slower by the efficiency; the accelerator and the drive are not.
    let rates: Vec<f64> = machine
        .computing_tiers()
        .iter()
        .map(|t| t.read_gbps)
        .collect();
    assert_eq!(rates, [860.0, 32.625, 19.7, 18.0, 6.4]);
    assert!(
        machine.computing_tiers()[1]
            .source
            .starts_with("65.25 GB/s × 0.5 efficiency; ")
    );
    for (to, words) in [
        (
            "efficiency = 0",
            "efficiency is 0, but must be above 0 and at most 1",
        ),
        ("efficiency = 1.5", "efficiency is 1.5"),
        ("efficiency = nan", "efficiency is NaN"),
    ] {
        let error = load(&text.replacen("efficiency = 0.5", to, 1)).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
    assert!(
        load(&text.replacen("load_gbps = 3", "load_gbps = -3", 1))
            .unwrap_err()
            .contains("load_gbps is -3")
    );
    assert!(
        load(&text.replacen("watts = 300", "watts = inf", 1))
            .unwrap_err()
            .contains("watts is inf")
    );
    assert!(
        load(&text.replacen("usd_per_gb = 2", "usd_per_gb = -2", 1))
            .unwrap_err()
            .contains("of tier 'dram' is -2")
    );
}
