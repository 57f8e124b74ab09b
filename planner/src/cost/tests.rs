use super::*;
use crate::profile::prefetch::Prefetch;
use tier_plan_runtime::formats::machine::Accelerator;

#[test]
fn draws_are_a_distribution_with_the_right_means() {
    let groups = [3, 0, 5, 12];
    let (mut sum, mut means) = (0.0, [0.0; 4]);
    draw(&groups, 4, |drawn, share| {
        assert_eq!(drawn.iter().sum::<u32>(), 4);
        sum += share;
        drawn
            .iter()
            .zip(&mut means)
            .for_each(|(&n, mean)| *mean += share * f64::from(n));
    });
    assert!((sum - 1.0).abs() < 1e-12);
    for (mean, size) in means.iter().zip(groups) {
        assert!((mean - 4.0 * f64::from(size) / 20.0).abs() < 1e-12);
    }
}

#[test]
fn the_stage_is_the_longest_path() {
    let tier = |kind, read_gbps, latency_us| Tier {
        name: String::new(),
        kind,
        capacity_bytes: 0,
        read_gbps,
        latency_us,
        emulated: true,
        unit: None,
        accelerator: Accelerator::default(),
        source: String::new(),
    };
    let tiers = [
        tier(TierKind::Vram, 100.0, 10.0),
        tier(TierKind::Dram, 20.0, 99.0),
        tier(TierKind::Cxl, 10.0, 2.0),
        tier(TierKind::Nvme, 1.0, 50.0),
    ];
    // An expert of 1 MB: 10, 50, 100 and 1000 µs.
    let stage = ExpertStage::new(
        &PerTier::from(tiers.clone()),
        1_000_000,
        Prefetch::default(),
    );
    let dram = TierIdx::new(1);
    let us = |experts: [u16; 5]| (stage.token_s(&experts, dram) * 1e6).round() as u32;
    assert_eq!(us([0, 0, 0, 0, 0]), 0);
    assert_eq!(us([8, 0, 0, 0, 0]), 90);
    assert_eq!(us([8, 3, 0, 0, 0]), 150);
    assert_eq!(us([8, 3, 2, 0, 0]), 200);
    assert_eq!(us([8, 4, 0, 0, 1]), 1050);
    assert_eq!(
        stage.seconds(&[8.0, 4.0, 0.0, 0.0, 1.0], dram),
        stage.token_s(&[8, 4, 0, 0, 1], dram)
    );
    // Behind a link that is slower than the drive, transfers take as long as on that; behind a
    // faster one, as the drive.
    let [vram, dram, cxl, nvme] = tiers.clone();
    for (link_gbps, wanted) in [(0.5, 2050), (4.0, 1050)] {
        let accelerator = Accelerator {
            link_gbps: Some(link_gbps),
            ..Accelerator::default()
        };
        let behind = PerTier::from([
            Tier {
                accelerator,
                ..vram.clone()
            },
            dram.clone(),
            cxl.clone(),
            nvme.clone(),
        ]);
        let stage = ExpertStage::new(&behind, 1_000_000, Prefetch::default());
        let us =
            |to: usize| (stage.token_s(&[8, 4, 0, 0, 1], TierIdx::new(to)) * 1e6).round() as u32;
        assert_eq!((us(0), us(1)), (wanted, 1050));
    }
    // The same experts on a DRAM that is the last tier: computed in place, or transferred after its
    // latency.
    let two = tiers[..2].iter().cloned().collect();
    let home = ExpertStage::new(&two, 1_000_000, Prefetch::default());
    assert!(home_in_place(&two) && !home_in_place(&PerTier::from(tiers)));
    assert_eq!(
        (home.token_s(&[8, 3, 0], TierIdx::new(1)) * 1e6).round() as u32,
        150
    );
    assert_eq!(
        (home.token_s(&[8, 0, 3], TierIdx::new(1)) * 1e6).round() as u32,
        249
    );
}

#[test]
fn reading_ahead_hides_one_expert_at_most_behind_the_dense_stage() {
    let tier = |kind, read_gbps, latency_us, emulated| Tier {
        name: String::new(),
        kind,
        capacity_bytes: 1,
        read_gbps,
        latency_us,
        emulated,
        unit: None,
        accelerator: Accelerator::default(),
        source: String::new(),
    };
    let drive = |emulated| {
        [
            tier(TierKind::Dram, 10.0, 0.0, false),
            tier(TierKind::Nvme, 1.0, 100.0, emulated),
        ]
    };
    let missed_us = |tiers: &[Tier; 2], right, dense_bytes, missed| {
        let stage = ExpertStage::new(
            &PerTier::from(tiers.clone()),
            1_000_000,
            Prefetch {
                accuracy: right,
                dense_bytes,
                is_exact: false,
            },
        );
        (stage.path_s(2, missed, TierIdx::FIRST) * 1e6).round()
    };
    // A dense stage of 0.5 ms, and 1 ms for an expert.
    assert_eq!(
        missed_us(&drive(false), 0.8, 5_000_000, 3.0),
        3100.0 - 400.0
    );
    assert_eq!(missed_us(&drive(false), 0.8, 5_000_000, 0.0), 0.0);
    // A long one hides one expert.
    assert_eq!(missed_us(&drive(false), 1.0, 50_000_000, 3.0), 2100.0);
    // Too few good guesses, a device that is emulated, memory in place.
    assert_eq!(missed_us(&drive(false), 0.4, 5_000_000, 3.0), 3100.0);
    assert_eq!(missed_us(&drive(true), 0.8, 5_000_000, 3.0), 3100.0);
    let memory = [
        tier(TierKind::Dram, 10.0, 0.0, false),
        tier(TierKind::Pmem, 1.0, 100.0, false),
    ];
    assert_eq!(missed_us(&memory, 0.8, 5_000_000, 3.0), 3100.0);
}

mod whole {
    use super::super::*;
    use crate::catalogue::{self, Known};
    use crate::solve::options::Strategy;
    use crate::solve::{Options, Problem, solve_with_evidence, verify};
    use std::path::Path;
    use tier_plan_runtime::KvType;
    use tier_plan_runtime::formats::machine::{self, Machine};

    fn machine(gflops: Option<f64>) -> Machine {
        let products = gflops.map_or(String::new(), |rate| format!("prompt_gflops = {rate}\n"));
        let text = format!(
            "format = \"tier-plan machine\"\nversion = 2\nname = \"m\"\nlayer_overhead_us = 10\ntoken_overhead_us = 100\n\
             [[tier]]\nname = \"dram\"\nkind = \"dram\"\ncapacity = \"64GiB\"\nread_gbps = 50\nlatency_us = 0\n{products}\
             source = \"test\"\n"
        );
        machine::decode(text.as_bytes(), Path::new("m.toml")).unwrap()
    }

    fn plan(
        known: &Known,
        machine: &Machine,
        context: u32,
        kv_type: KvType,
    ) -> (Placement, Evidence) {
        let (shape, budgets) = (&known.sizes, vec![64 << 30]);
        let evidence = Evidence::uniform(shape).unwrap();
        let problem = Problem {
            shape,
            profile: None,
            machine,
            budgets,
            context,
            sequences: 1,
            kv_type,
            position: None,
        };
        let options = Options {
            strategy: Strategy::Optimal,
            time_limit_s: 1.0,
            ..Options::default()
        };
        (
            solve_with_evidence(&problem, &evidence, &options)
                .unwrap()
                .plan,
            evidence,
        )
    }

    #[test]
    fn a_token_takes_longer_the_further_it_looks_back() {
        let known = catalogue::model(Path::new("qwen3-30b-a3b"), Some("q4_k_m")).unwrap();
        let (mut plan, evidence) = plan(&known, &machine(None), 8192, KvType::F16);
        assert_eq!(plan.predicted.at, 4096);
        // 48 layers, 4 heads, keys and values of 128 values of 2 bytes each.
        let position = (48 * 4 * 2 * 128 * 2) as f64 / 50e9;
        assert!((plan.predicted.kv_s - 4096.0 * position).abs() < 1e-12);
        let before = token_s(&plan.predicted);
        plan.predicted = plan.predicted_at(&known.sizes, 96);
        assert!((before - token_s(&plan.predicted) - 4000.0 * position).abs() < 1e-12);
        plan.solver.objective_s = token_s(&plan.predicted);
        (plan.solver.bound_s, plan.solver.gap) = (None, None);
        assert_eq!(
            verify::verify(&plan, &known.sizes, &evidence),
            Vec::<String>::new()
        );
        assert_eq!(predict(&plan, &known.sizes, &evidence), plan.predicted);
        // A plan of an older version charges nothing, wherever it is moved to.
        let mut old = plan.clone();
        old.predicted.at = 0;
        old.predicted = predict(&old, &known.sizes, &evidence);
        let seconds = token_s(&old.predicted);
        old.predicted = old.predicted_at(&known.sizes, 5000);
        assert!((token_s(&plan.predicted) - seconds - 96.0 * position).abs() < 1e-12);
        assert_eq!((old.predicted.at, token_s(&old.predicted)), (0, seconds));
    }

    /// A GPU with so much memory before main memory.
    fn with_gpu(vram: &str) -> Machine {
        let text = format!(
            "format = \"tier-plan machine\"\nversion = 4\nname = \"m\"\nlayer_overhead_us = 10\ntoken_overhead_us = 100\n\
             [[tier]]\nname = \"vram\"\nkind = \"vram\"\ncapacity = \"{vram}\"\nread_gbps = 800\nlatency_us = 30\n\
             layer_us = 40\nresident_layer_us = 25\nsource = \"test\"\n\
             [[tier]]\nname = \"dram\"\nkind = \"dram\"\ncapacity = \"64GiB\"\nread_gbps = 50\nlatency_us = 0\nsource = \"test\"\n"
        );
        machine::decode(text.as_bytes(), Path::new("m.toml")).unwrap()
    }

    #[test]
    fn a_model_that_fully_on_gpu_a_gpu_has_fixed_times_of_its_own() {
        let known = catalogue::model(Path::new("qwen3-30b-a3b"), Some("q4_k_m")).unwrap();
        let shape = &known.sizes;
        let evidence = Evidence::uniform(shape).unwrap();
        let plan = |vram: &str, bytes: u64| {
            let machine = with_gpu(vram);
            let problem = Problem {
                shape,
                profile: None,
                machine: &machine,
                budgets: vec![bytes, 64 << 30],
                context: 1024,
                sequences: 1,
                kv_type: KvType::F16,
                position: None,
            };
            let options = Options {
                strategy: Strategy::Optimal,
                time_limit_s: 1.0,
                ..Options::default()
            };
            solve_with_evidence(&problem, &evidence, &options)
                .unwrap()
                .plan
        };
        let layers = f64::from(shape.n_layer);
        // All of it, embedding apart: neither the layers' own fixed time nor launches are waited
        // for.
        let all = plan("32GiB", 32 << 30);
        assert!((all.predicted.overhead_s - (100.0 + 25.0 * layers) * 1e-6).abs() < 1e-12);
        let read = all.predicted.read_bytes[TierIdx::FIRST] / 800e9;
        let vram_s = all.predicted.dense_s[TierIdx::FIRST] + all.predicted.expert_critical_s;
        assert!((vram_s / read - 1.0).abs() < 1e-9, "{vram_s} {read}");
        assert_eq!(verify::verify(&all, shape, &evidence), Vec::<String>::new());
        assert!(
            all.solver
                .bound_s
                .is_some_and(|b| b <= all.solver.objective_s),
            "{:?}",
            all.solver
        );
        // Experts in main memory: attention is still worth its launches, one row of them a layer.
        let some = plan("4GiB", 4 << 30);
        let attention = some
            .dense
            .iter()
            .filter(|d| d.kind == DenseKind::Attention && d.tier == TierIdx::FIRST)
            .count() as f64;
        assert_eq!(attention, layers);
        assert!((some.predicted.overhead_s - (100.0 + 10.0 * layers) * 1e-6).abs() < 1e-12);
        let dense: f64 =
            some.dense
                .iter()
                .filter(|d| d.tier == TierIdx::FIRST)
                .fold(0.0, |sum, d| {
                    let group = shape
                        .dense
                        .iter()
                        .find(|g| (g.kind, g.layer) == (d.kind, d.layer));
                    sum + group.map_or(0.0, |g| g.token_bytes as f64)
                });
        assert!(
            (some.predicted.dense_s[TierIdx::FIRST] - dense / 800e9 - 40e-6 * layers).abs() < 1e-9,
            "{:?}",
            some.predicted
        );
        assert_eq!(
            verify::verify(&some, shape, &evidence),
            Vec::<String>::new()
        );
    }

    #[test]
    fn attention_is_bound_by_bytes_or_by_products() {
        let known = catalogue::model(Path::new("qwen3-30b-a3b"), Some("q4_k_m")).unwrap();
        // Eight query heads to each of four heads of keys and values of 128 values, in 48 layers.
        let operations = 2.0 * f64::from(48 * 2 * 4 * 128 * 8) * 512.0;
        let (slow, evidence) = plan(&known, &machine(Some(100.0)), 1024, KvType::F16);
        assert!(
            (slow.predicted.kv_s / (operations / 16e9) - 1.0).abs() < 1e-9,
            "{}",
            slow.predicted.kv_s
        );
        assert_eq!(
            verify::verify(&slow, &known.sizes, &evidence),
            Vec::<String>::new()
        );
        let (fast, _) = plan(&known, &machine(Some(1e6)), 1024, KvType::F16);
        let bytes = f64::from(48 * 4 * 2 * 128 * 2) * 512.0;
        assert!(
            (fast.predicted.kv_s / (bytes / 50e9) - 1.0).abs() < 1e-9,
            "{}",
            fast.predicted.kv_s
        );
    }

    #[test]
    fn state_is_read_and_written_and_windows_end() {
        use tier_plan_runtime::model::kv::KvRows;
        let mut known = catalogue::model(Path::new("qwen3-30b-a3b"), Some("q4_k_m")).unwrap();
        let of = |window| {
            vec![KvRows {
                width: 64,
                per_token: 10,
                every: 1,
                queries: 4,
                window,
                chosen: None,
            }]
        };
        known.sizes.caches = vec![
            CacheShape {
                rows: of(None),
                state_bytes: 0,
                more_readers: 0,
            },
            CacheShape {
                rows: of(Some(128)),
                state_bytes: 0,
                more_readers: 0,
            },
            CacheShape {
                rows: Vec::new(),
                state_bytes: 1_000_000,
                more_readers: 0,
            },
        ];
        let (plan, _) = plan(&known, &machine(None), 2000, KvType::Q8_0);
        // 64 values in 8 bits take 64 bytes and two scales.
        let bytes = (68 * 10 * (1000 + 128) + 2 * 1_000_000) as f64;
        assert!((plan.predicted.kv_s - bytes / 50e9).abs() < 1e-15);
    }

    #[test]
    fn prompts_are_bound_by_reads_or_by_products() {
        let known = catalogue::model(Path::new("qwen3-30b-a3b"), Some("q4_k_m")).unwrap();
        let shape = &known.sizes;
        let reads = plan(&known, &machine(None), 1024, KvType::F16).0.predicted;
        assert!(reads.prompt_gflops.is_empty());
        let fast = plan(&known, &machine(Some(1e9)), 1024, KvType::F16)
            .0
            .predicted;
        assert!(
            (fast.prompt_tok_s / reads.prompt_tok_s - 1.0).abs() < 1e-4,
            "so fast that reads are what is left"
        );
        let slow = plan(&known, &machine(Some(10.0)), 1024, KvType::F16)
            .0
            .predicted;
        // Nearly all is products then: two operations for each value of each token, of the head for
        // one.
        let dense: u64 = shape
            .dense
            .iter()
            .filter(|d| d.layer.is_some())
            .map(|d| d.macs)
            .sum();
        // All 128 experts are used, and each takes four rows more; a head's floats run at a third
        // of the rate.
        let rows = |e: &ExpertShape| 512.0 * f64::from(e.n_used) + 4.0 * 128.0;
        let experts: f64 = shape
            .experts
            .iter()
            .map(|e| rows(e) * e.expert_macs as f64)
            .sum();
        let pairs = (512 * 513 / 2) as f64;
        let attention = pairs * f64::from(48 * 2 * 32 * 128) / 0.33;
        let seconds = 2.0 * (512.0 * dense as f64 + experts + attention) / 10e9;
        let expected = f64::from(BATCH) / seconds;
        assert!(
            (slow.prompt_tok_s / expected - 1.0).abs() < 0.01,
            "{} {expected}",
            slow.prompt_tok_s
        );
        assert_eq!(
            slow.expert_critical_s, reads.expert_critical_s,
            "of decoding, only attention has products to speak of"
        );
        // A batch chooses nearly every one of 128 experts, so a read of all but the embedding is
        // what reads take.
        let embedding: u64 = shape
            .dense
            .iter()
            .filter(|d| d.kind == DenseKind::Embedding)
            .map(|d| d.bytes)
            .sum();
        let bytes = (shape.weight_bytes() - embedding) as f64;
        assert!((reads.prompt_tok_s / (f64::from(BATCH) * 50e9 / bytes) - 1.0).abs() < 0.02);
    }

    use tier_plan_runtime::model::shape::{CacheShape, DenseKind, ExpertShape};
}
