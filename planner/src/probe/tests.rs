use super::disk::{BurstRate, IoRates};
use super::gpu::Gpus;
use super::nodes::NodeRate;
use super::*;
use tier_plan_runtime::formats::machine::{Accelerator, DriveIo, Extras, TierKind};
use tier_plan_runtime::formats::placement::ExpertCopy;

fn findings() -> Findings {
    let of = |value| Measured {
        value,
        spread: 0.01,
        iqr: 0.0125,
    };
    Findings {
        when: "2026-11-22T17:00:00Z".into(),
        host: "a processor".into(),
        threads: 2,
        isa: "avx512".into(),
        model: None,
        bare_gbps: 27.5,
        numa: None,
        kernels: vec![KernelRate {
            ty: TensorType::Q4_K,
            gbps: of(20.52),
            batch_gflops: of(950.0),
            few_gflops: Some(of(400.0)),
            share: None,
        }],
        compute_gbps: 20.5234,
        compute_iqr: 0.0321,
        prompt_gflops: 950.04,
        few_gflops: 400.04,
        dram_bytes: 20 << 30,
        dram_bytes_from: "the memory that is free".into(),
        disk: DiskRate {
            gbps: of(1.23456),
            latency_us: of(87.65),
            direct: true,
            io: None,
            piece_bytes: 2_654_208,
            bursts: [(1, 1.0), (2, 1.1), (4, 1.2), (8, 1.3)]
                .map(|(experts, gbps)| BurstRate { experts, gbps }),
        },
        disk_path: "model.gguf".into(),
        disk_bytes: 1 << 40,
        copies: Vec::new(),
        together: Together {
            compute_gbps: 17.0,
            disk_gbps: 1.1,
        },
        gpus: Gpus::default(),
        nodes: Vec::new(),
        power: Power::default(),
        fixed: Fixed {
            layer_us: 31.25,
            token_us: 12.0,
            entry_us: 1.0,
            how: "counted".into(),
        },
        doubts: Vec::new(),
    }
}

#[test]
fn a_machine_is_written_that_reads_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("machine.toml");
    let machine = findings().machine();
    machine.write(&path).unwrap();
    let back = tier_plan_runtime::formats::machine::read(&path).unwrap();
    assert_eq!(back, machine);
    let [dram, nvme] = &back.tiers[..] else {
        panic!("{:?}", back.tiers)
    };
    assert_eq!(
        (dram.kind, dram.read_gbps, dram.emulated),
        (TierKind::Dram, 20.5, false)
    );
    assert_eq!(
        (nvme.kind, nvme.read_gbps, nvme.latency_us),
        (TierKind::Nvme, 1.1, 87.7)
    );
    assert_eq!(
        back.extras,
        Extras {
            prompt_gflops: [("dram".to_string(), 950.0)].into(),
            few_gflops: [("dram".to_string(), 400.0)].into(),
            spread: [("dram".to_string(), 0.032), ("nvme".to_string(), 0.013)].into(),
            ..Extras::default()
        }
    );
    assert_eq!(back.prompt_gflops().as_slice(), [950.0, 950.0]);
    assert!(dram.source.contains("while the drive is read 17.0 GB/s"));
    assert!(
        dram.source
            .starts_with("measured 2026-11-22: matvecs of Q4_K with 2 threads and avx512 kernels")
    );
    assert!(
        back.description
            .contains("measured on 2026-11-22: a processor")
    );
}

fn copied(path: &str, alone_gbps: f64, together_gbps: f64) -> CopyRate {
    let mut disk = findings().disk;
    disk.gbps.value = alone_gbps;
    CopyRate {
        path: path.into(),
        disk,
        together_gbps,
    }
}

#[test]
fn copies_add_their_rates_to_that_of_the_drive() {
    let mut found = findings();
    // 1.1 GB/s of the model's drive, and what each other drive has both alone and in company.
    found.copies = vec![
        copied("/b/model.gguf", 2.2, 2.5),
        copied("/c/model.experts", 1.5, 1.1),
    ];
    let machine = found.machine();
    let drive = machine.tiers.last().unwrap();
    assert_eq!((drive.name.as_str(), drive.read_gbps), ("nvme", 4.4));
    assert!(
        drive
            .source
            .ends_with("alone 1.23 GB/s; with 2 on other drives, all at once"),
        "{}",
        drive.source
    );
    let copy = |file: &str, share| ExpertCopy {
        file: file.into(),
        share,
    };
    assert_eq!(
        machine.extras.copies["nvme"],
        [copy("/b/model.gguf", 0.5), copy("/c/model.experts", 0.25)]
    );
}

fn gpu(device: u32, gbps: f64) -> gpu::GpuRate {
    use tier_plan_selftest::gpu_rates::{Contended, Experts, LinkRates, Rates};
    gpu::GpuRate {
        name: "a GPU".into(),
        device,
        emulated: false,
        total_bytes: 32 << 30,
        free_bytes: 31 << 30,
        rates: Rates {
            launch_us: 2.0,
            round_trip_us: 8.0,
            read_gbps: 900.0,
            to_device: LinkRates {
                pinned_gbps: 25.0,
                pageable_gbps: 9.0,
            },
            from_device: LinkRates {
                pinned_gbps: 26.0,
                pageable_gbps: 8.0,
            },
        },
        contended: Contended {
            to_device_gbps: 21.0,
            beside: 15.0,
            alone: 18.75,
        },
        products: vec![(TensorType::Q4_K, gbps)],
        compute_gbps: gbps,
        experts: Some(Experts {
            expert_bytes: 2_000_000,
            used: 8,
            token_us: 60.0,
            batch_gflops: 5e4,
        }),
        layers: Ok(gpu::Layers {
            layer_us: 34.56,
            resident_token_us: 260.0,
            n_layer: 10,
        }),
        of: "Q4_K".into(),
        power: Part {
            name: "a GPU".into(),
            watts: Some(350.0),
            how: "limit read from the driver".into(),
        },
    }
}

#[test]
fn gpus_are_tiers_with_their_links_and_power() {
    let mut found = findings();
    found.gpus.found = vec![gpu(0, 400.0), gpu(1, 800.0)];
    found.power = Power {
        watts: Some(475.0),
        how: "limits".into(),
    };
    let machine = found.machine();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("machine.toml");
    machine.write(&path).unwrap();
    assert_eq!(
        tier_plan_runtime::formats::machine::read(&path).unwrap(),
        machine
    );
    let tiers: Vec<_> = machine
        .tiers
        .iter()
        .map(|t| (t.name.as_str(), t.unit, t.read_gbps))
        .collect();
    // The fastest first, each with its own number.
    assert_eq!(
        tiers,
        [
            ("vram1", Some(1), 800.0),
            ("vram0", Some(0), 400.0),
            ("dram", None, 20.5),
            ("nvme", None, 1.1)
        ]
    );
    assert_eq!(machine.tiers[0].capacity_bytes, 30 << 30);
    // 16 MB at 400 GB/s are 40 µs; what is left of 60 is the latency. At 800 GB/s they are 20.
    assert_eq!(
        (machine.tiers[1].latency_us, machine.tiers[0].latency_us),
        (20.0, 40.0)
    );
    // The CPU keeps four fifths of its rate, which is 20.5 with all formats of the model.
    let link = machine.extras.links["vram0"];
    assert_eq!(
        (link.contended_gbps, link.dram_contended_gbps),
        (21.0, 16.4)
    );
    // A tenth of what a token takes there beyond the 12 µs of its own.
    let wanted = Accelerator {
        link_gbps: Some(9.0),
        layer_us: Some(34.6),
        resident_layer_us: Some(24.8),
    };
    assert_eq!(machine.tiers[0].accelerator, wanted);
    assert_eq!(machine.prompt_gflops().as_slice(), [5e4, 5e4, 950.0, 950.0]);
    assert_eq!(
        (machine.extras.watts, machine.extras.watts_source.as_deref()),
        (Some(475.0), Some("limits"))
    );
    found.gpus.found = vec![gpu::GpuRate {
        emulated: true,
        compute_gbps: 5.0,
        ..gpu(0, 5.0)
    }];
    let machine = found.machine();
    let emulated = &machine.tiers[1];
    assert_eq!(
        (emulated.name.as_str(), emulated.emulated),
        ("vram", true),
        "slower than main memory, and after it"
    );
    assert!(
        emulated.source.contains("a GPU, which is emulated"),
        "{}",
        emulated.source
    );
    assert_eq!(
        emulated.accelerator,
        Accelerator {
            link_gbps: Some(9.0),
            ..Accelerator::default()
        }
    );
    found.gpus.found[0] = gpu::GpuRate {
        layers: Err("no model".into()),
        ..gpu(0, 400.0)
    };
    assert_eq!(found.machine().tiers[0].accelerator, emulated.accelerator);
}

#[test]
fn memory_nodes_are_tiers() {
    let node = |number: u32, gbps: f64, processors: Vec<u32>| NodeRate {
        node: tier_plan_runtime::tiers::nodes::Node {
            number,
            total_bytes: 64 << 30,
            free_bytes: 32 << 30,
            processors,
        },
        alone_gbps: gbps,
        own_gbps: None,
        gbps,
        capacity_bytes: 30 << 30,
    };
    let mut found = findings();
    found.nodes = vec![
        node(0, 18.0, vec![0]),
        node(1, 19.0, vec![1]),
        node(2, 9.0, vec![]),
    ];
    let machine = found.machine();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("machine.toml");
    machine.write(&path).unwrap();
    assert_eq!(
        tier_plan_runtime::formats::machine::read(&path).unwrap(),
        machine
    );
    let tiers: Vec<_> = machine
        .tiers
        .iter()
        .map(|t| (t.name.as_str(), t.kind, t.node()))
        .collect();
    assert_eq!(
        tiers,
        [
            ("dram1", TierKind::Dram, Some(1)),
            ("dram0", TierKind::Dram, Some(0)),
            ("cxl2", TierKind::Cxl, Some(2)),
            ("nvme", TierKind::Nvme, None)
        ]
    );
    assert_eq!(machine.prompt_gflops().as_slice(), [950.0; 4]);
}

#[test]
fn a_drive_faster_than_the_kernels_is_still_the_slow_tier() {
    let mut found = findings();
    found.disk.gbps.value = 60.0;
    found.together.disk_gbps = 55.0;
    let machine = found.machine();
    assert_eq!(machine.tiers[1].read_gbps, machine.tiers[0].read_gbps);
}

#[test]
fn the_mean_rate_is_that_of_the_whole_token() {
    let of = |ty, rate, share| KernelRate {
        ty,
        gbps: Measured {
            value: rate,
            ..Measured::default()
        },
        batch_gflops: Measured {
            value: rate,
            ..Measured::default()
        },
        few_gflops: None,
        share,
    };
    // Half of the bytes at 10 and half at 30 take 0.05 + 0.0167 of a second for each 10⁹.
    let rates = [
        of(TensorType::Q4_K, 10.0, Some(0.5)),
        of(TensorType::F32, 30.0, Some(0.5)),
    ];
    assert!((mean_rate(&rates) - 15.0).abs() < 1e-9);
    let rates = [
        of(TensorType::F32, 30.0, None),
        of(TensorType::Q4_K, 10.0, None),
    ];
    assert_eq!(
        (
            mean_rate(&rates),
            mean_gflops(&rates, |rate| rate.batch_gflops)
        ),
        (10.0, 10.0)
    );
    // A byte of Q4_K holds 32 / 4.5 as many values as one of F32, so 7.1 times as many products are
    // at 10.
    let rates = [
        of(TensorType::Q4_K, 10.0, Some(0.5)),
        of(TensorType::F32, 30.0, Some(0.5)),
    ];
    let times = 32.0 / 4.5;
    assert_eq!(
        mean_gflops(&[of(TensorType::Q4_K, 10.0, Some(0.0))], |_| {
            Measured::default()
        }),
        0.0
    );
    assert!(
        (mean_gflops(&rates, |rate| rate.batch_gflops)
            - (times + 1.0) / (times / 10.0 + 1.0 / 30.0))
            .abs()
            < 1e-9
    );
}

#[test]
fn repetitions_have_a_median_and_a_spread() {
    assert_eq!(
        Measured::of(vec![3.0, 1.0, 2.0]),
        Measured {
            value: 2.0,
            spread: 1.0,
            iqr: 0.5
        }
    );
    assert_eq!(Measured::of(vec![]), Measured::default());
    // One slow moment among many is no spread worth a warning.
    let mut many = vec![10.0; 100];
    many[50] = 5.0;
    let measured = Measured::of_many(&many);
    assert!(
        measured.value == 10.0 && measured.spread < 0.03,
        "{measured:?}"
    );
    // A slow fifth is.
    many[40..60].fill(5.0);
    assert!(Measured::of_many(&many).spread > 0.4);
}

#[test]
fn shares_are_of_a_tokens_bytes() {
    let path = crate::bundled::path("demo/demo.gguf").unwrap();
    let (gguf, spec) = open(&path).unwrap();
    let shares = shares(&gguf, &spec);
    assert!((shares.iter().map(|(_, s)| s).sum::<f64>() - 1.0).abs() < 1e-9);
    let of = |ty| {
        shares
            .iter()
            .find(|(t, _)| *t == ty)
            .map_or(0.0, |(_, s)| *s)
    };
    assert!(
        of(TensorType::Q4_K) > 0.2 && of(TensorType::BF16) == 0.0,
        "{shares:?}"
    );
}

#[test]
fn the_page_cache_must_be_clearly_faster() {
    for (direct_gbps, buffered_gbps, best) in [
        (1.0, 1.04, DriveIo::Direct),
        (1.0, 1.06, DriveIo::Buffered),
        (2.0, 1.0, DriveIo::Direct),
    ] {
        let io = IoRates {
            direct_gbps,
            buffered_gbps,
        };
        assert_eq!(io.best(), best, "{io:?}");
        let mut found = findings();
        found.disk.io = Some(io);
        let machine = found.machine();
        let text = machine.encode();
        let io = format!("io = \"{}\"", best.as_str());
        assert!(
            text.contains("version = 7\n") && text.contains(&io),
            "{text}"
        );
        let back = tier_plan_runtime::formats::machine::decode(text.as_bytes(), Path::new("m"));
        assert_eq!(back.unwrap().extras.io["nvme"], best);
    }
    // What the environment asked for is not written.
    assert!(findings().machine().extras.io.is_empty());
}

#[test]
fn a_drive_is_read_in_experts() {
    let path = crate::bundled::path("demo/demo.gguf").unwrap();
    let (gguf, spec) = open(&path).unwrap();
    let mut disk = Disk::of_model(&gguf, &spec).unwrap();
    disk.choose_io(Duration::ZERO).unwrap();
    let rate = disk.measure(Duration::ZERO).unwrap();
    assert!(
        rate.gbps.value > 0.0 && rate.latency_us.value > 0.0,
        "{rate:?}"
    );
    assert!((40_000..60_000).contains(&rate.piece_bytes), "{rate:?}");
    if let Some(io) = rate.io {
        assert!(io.direct_gbps > 0.0 && io.buffered_gbps > 0.0, "{io:?}");
        assert_eq!(rate.direct, io.best() == DriveIo::Direct);
    }
}

#[test]
fn memory_is_rated_without_the_drive() {
    let model = crate::bundled::path("demo/demo.gguf").unwrap();
    let found = measure(&Settings {
        model: Some(&model),
        threads: Some(1),
        is_quick: true,
        ..Settings::default()
    })
    .unwrap();
    // The rate beside a busy drive is a measurement of its own, and plans don't count on it.
    assert!(found.together.compute_gbps > 0.0);
    assert_ne!(found.compute_gbps, found.together.compute_gbps);
    assert!(found.compute_gbps <= mean_rate(&found.kernels));
    assert!(
        found.prompt_gflops > 0.0 && found.few_gflops > 0.0,
        "{found:?}"
    );
}

#[test]
fn a_models_own_layers_are_timed() {
    let path = crate::bundled::path("demo/demo.gguf").unwrap();
    let own = fixed::own_layers(&path, 1, Duration::from_millis(100)).unwrap();
    assert!(
        own.layer_us.is_finite() && own.expert_gbps.value > 0.0,
        "{own:?}"
    );
}
