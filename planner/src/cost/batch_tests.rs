use super::*;
use crate::catalogue::{self, Known};
use crate::solve::options::Objective;
use crate::solve::{Options, Problem, solve_with_evidence, verify};
use std::path::Path;
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::machine::{self, Accelerator, Machine};
use tier_plan_runtime::model::kv::CacheRoom;

const MB: u64 = 1_000_000;

fn tier(kind: TierKind, read_gbps: f64, latency_us: f64, emulated: bool) -> Tier {
    Tier {
        name: String::new(),
        kind,
        capacity_bytes: 0,
        read_gbps,
        latency_us,
        emulated,
        unit: None,
        accelerator: Accelerator::default(),
        source: String::new(),
    }
}

/// Main memory with 100 µs per megabyte, and a drive with 1000.
fn tiers(emulated: bool) -> PerTier<Tier> {
    PerTier::from([
        tier(TierKind::Dram, 10.0, 0.0, emulated),
        tier(TierKind::Nvme, 1.0, 100.0, emulated),
    ])
}

fn group(kind: DenseKind, token_bytes: u64) -> DenseShape {
    DenseShape {
        kind,
        layer: None,
        bytes: token_bytes,
        token_bytes,
        macs: 2 * token_bytes,
    }
}

/// Rates with many rows, where those with few are not known.
fn many(rates: &PerTier<f64>) -> MatmulRates<'_> {
    static NONE: std::sync::LazyLock<PerTier<f64>> = std::sync::LazyLock::new(PerTier::default);
    MatmulRates {
        many: rates,
        few: &NONE,
    }
}

fn us(seconds: f64) -> f64 {
    (seconds * 1e9).round() / 1e3
}

#[test]
fn dense_weights_are_read_once_per_micro_batch() {
    let (tiers, gflops) = (tiers(false), PerTier::from([100.0, 0.0]));
    let of = |texts, kind, bytes| {
        let step = Step::new(texts, &tiers, many(&gflops));
        us(step.dense_s(&group(kind, bytes), TierIdx::FIRST, &tiers[TierIdx::FIRST]))
    };
    // A megabyte is read in 100 µs; a row of its two million values takes 40 µs beside others.
    assert_eq!(of(1, DenseKind::Attention, MB), 100.0);
    assert_eq!(of(4, DenseKind::Attention, MB), (4.0 + 4.0) * 40.0);
    assert_eq!(of(4, DenseKind::Head, MB), (4.0 + 4.0) * 40.0);
    assert_eq!(of(4, DenseKind::Embedding, 10_000), 4.0);
    // 1024 rows are two micro-batches of dense weights, and one head.
    assert_eq!(
        of(1024, DenseKind::Attention, MB),
        2.0 * (512.0 + 4.0) * 40.0
    );
    assert_eq!(of(1024, DenseKind::Head, MB), (1024.0 + 4.0) * 40.0);
    // 3000 rows are two passes of three micro-batches.
    assert_eq!(
        of(3000, DenseKind::Attention, MB),
        6.0 * (500.0 + 4.0) * 40.0
    );
    assert_eq!(of(3000, DenseKind::Head, MB), 2.0 * (1500.0 + 4.0) * 40.0);
    let step = Step::new(3000, &tiers, many(&gflops));
    assert_eq!(us(step.overhead_s(10, 5.0, 70.0)), 2.0 * 70.0 + 6.0 * 50.0);
    // Without a rate, and on emulated tiers, a step of any texts reads once.
    let emulated = self::tiers(true);
    for (tiers, gflops) in [(&tiers, PerTier::default()), (&emulated, gflops)] {
        let step = Step::new(16, tiers, many(&gflops));
        let dense = group(DenseKind::Attention, MB);
        assert!(!step.has_arithmetic());
        assert_eq!(
            us(step.dense_s(&dense, TierIdx::FIRST, &tiers[TierIdx::FIRST])),
            100.0
        );
    }
}

#[test]
fn a_few_rows_take_what_was_measured_of_them() {
    let tiers = tiers(false);
    // Two million values with four rows: 8 operations each take 200 µs at 80 GFLOP/s.
    let (many, few) = (&PerTier::from([100.0; 2]), &PerTier::from([80.0, 0.0]));
    let step = Step::new(4, &tiers, MatmulRates { many, few });
    let of = |at: usize, texts| {
        let step = Step {
            texts,
            ..step.clone()
        };
        let dense = group(DenseKind::Attention, MB);
        us(step.dense_s(&dense, TierIdx::new(at), &tiers[TierIdx::FIRST]))
    };
    assert_eq!(of(0, 4), 200.0);
    assert_eq!(of(0, 8), (8.0 + 1.0) * 40.0);
    // Nothing is known of few rows on the second tier.
    assert_eq!(of(1, 4), (4.0 + HALF_ROWS) * 40.0);
    // Few rows are not faster than many, and many don't wait for memory as few do.
    assert_eq!(half_rows(100.0, 150.0), 0.0);
    assert_eq!(half_rows(100.0, 10.0), HALF_ROWS);
    assert_eq!(half_rows(0.0, 150.0), HALF_ROWS);
}

#[test]
fn rows_use_experts_as_independent_draws_do() {
    let half = Use::of(0.5, 2.0);
    assert_eq!((half.experts, half.once, half.rows), (0.75, 0.5, 1.0));
    // One row uses an expert once or not at all.
    let one = Use::of(0.25, 1.0);
    assert_eq!((one.experts, one.once, one.rows), (0.25, 0.25, 0.25));
    let always = Use::of(1.0, 7.0);
    assert_eq!((always.experts, always.once, always.rows), (1.0, 0.0, 7.0));
    let counted: Use = [0, 1, 5]
        .map(Use::counted)
        .into_iter()
        .fold(half, |a, b| a + b);
    assert_eq!(
        (counted.experts, counted.once, counted.rows),
        (2.75, 1.5, 7.0)
    );
}

#[test]
fn an_expert_stage_is_the_longest_of_reads_and_arithmetic() {
    let layer = ExpertShape {
        layer: 0,
        n_expert: 8,
        n_used: 2,
        expert_bytes: MB,
        expert_macs: 2 * MB,
        by_token: false,
    };
    let dram = TierIdx::FIRST;
    let stage = |emulated, gflops: [f64; 2]| {
        let tiers = tiers(emulated);
        let step = Step::new(8, &tiers, many(&PerTier::from(gflops)));
        PassStage::new(&step, &tiers, &layer, dram)
    };
    // Of three experts in memory, one has a row, the others two and five.
    let used = [1, 2, 5]
        .map(Use::counted)
        .into_iter()
        .fold(Use::default(), |a, b| a + b);
    let on = PerTier::from([used, Use::default()]);
    let of = |stage: &PassStage, missed| us(stage.busiest_s(&on, missed, dram));
    // Reads of 100 µs each; the lone row is one of them, and seven rows with four more for each of
    // two experts take 40 µs each.
    let real = stage(false, [100.0, 0.0]);
    assert_eq!(of(&real, 0.0), 100.0 + 15.0 * 40.0);
    assert_eq!(of(&real, 2.0), 100.0 + 2.0 * 1000.0);
    assert_eq!(of(&stage(false, [0.0, 0.0]), 0.0), 300.0);
    assert_eq!(of(&stage(true, [100.0, 0.0]), 0.0), 300.0);
    // Six pooled experts are expected to be used; half of the pool has slots.
    let pooled = Use {
        experts: 6.0,
        once: 2.0,
        rows: 12.0,
    };
    let spread = Spread {
        pinned: PerTier::from_fn(2, |_| Use::default()),
        pooled,
        n_pooled: 8.0,
        slots: 4,
        slot_tier: dram,
    };
    assert_eq!(
        us(stage(true, [0.0, 0.0]).seconds(&spread)),
        100.0 + 3.0 * 1000.0
    );
    let none = Spread {
        slots: 0,
        ..spread.clone()
    };
    assert_eq!(
        us(stage(true, [0.0, 0.0]).seconds(&none)),
        100.0 + 6.0 * 1000.0
    );
    let all = Spread { slots: 8, ..spread };
    assert_eq!(us(stage(true, [0.0, 0.0]).seconds(&all)), 600.0);
}

fn machine(gflops: &str) -> Machine {
    let text = format!(
        "format = \"tier-plan machine\"\nversion = 2\nname = \"m\"\nlayer_overhead_us = 10\ntoken_overhead_us = 100\n\
         [[tier]]\nname = \"dram\"\nkind = \"dram\"\ncapacity = \"64GiB\"\nread_gbps = 50\nlatency_us = 0\n{gflops}\
         source = \"test\"\n"
    );
    machine::decode(text.as_bytes(), Path::new("m.toml")).unwrap()
}

fn throughput(known: &Known, machine: &Machine, texts: u32) -> (Placement, Evidence) {
    let evidence = Evidence::uniform(&known.sizes).unwrap();
    let problem = Problem {
        shape: &known.sizes,
        profile: None,
        machine,
        budgets: vec![64 << 30],
        context: 1000,
        sequences: texts,
        kv_type: KvType::F16,
        position: None,
    };
    let options = Options {
        objective: Objective::Throughput,
        batch: Some(texts),
        time_limit_s: 1.0,
        ..Options::default()
    };
    let plan = solve_with_evidence(&problem, &evidence, &options)
        .unwrap()
        .plan;
    (plan, evidence)
}

#[test]
fn a_step_adds_up_for_a_whole_model() {
    let known = catalogue::model(Path::new("qwen3-30b-a3b"), Some("q4_k_m")).unwrap();
    let shape = &known.sizes;
    let (plan, evidence) = throughput(&known, &machine(""), 16);
    // The KV cache has whole pages for each of 16 texts, and every check counts them alike.
    let room = CacheRoom {
        sequences: 16,
        ..CacheRoom::of_one(1000)
    };
    assert_eq!((plan.sequences, room.positions()), (16, 16 * 1024));
    let kv = KvType::F16.cache_bytes(shape, room);
    assert_eq!(plan.tiers[TierIdx::FIRST].bytes.kv, kv);
    assert_eq!(
        verify::verify(&plan, shape, &evidence),
        Vec::<String>::new()
    );
    let mut short = plan.clone();
    short.tiers[TierIdx::FIRST].bytes.kv = KvType::F16.cache_bytes(shape, CacheRoom::of_one(1000));
    assert!(verify::verify(&short, shape, &evidence)[0].contains("kv bytes"));
    // 16 rows of 8 of 128 experts, and everything else once.
    let distinct = 128.0 * (1.0 - (1.0f64 - 8.0 / 128.0).powi(16));
    let experts: f64 = shape
        .experts
        .iter()
        .map(|e| distinct * e.expert_bytes as f64)
        .sum();
    let dense: f64 = shape
        .dense
        .iter()
        .map(|g| match g.kind {
            DenseKind::Embedding => 16.0 * g.token_bytes as f64,
            _ => g.token_bytes as f64,
        })
        .sum();
    // 48 layers, 4 heads, keys and values of 128 values of 2 bytes each, at half of the context.
    let cache = 16.0 * f64::from(48 * 4 * 2 * 128 * 2) * 500.0;
    let seconds = (100.0 + 48.0 * 10.0) * 1e-6 + (experts + dense + cache) / 50e9;
    let step = step_s(&plan, shape, &evidence, 16);
    assert!((step / seconds - 1.0).abs() < 1e-9, "{step} {seconds}");
    // One text's step is a token.
    let one = step_s(&plan, shape, &evidence, 1);
    assert!((one / plan.predicted.token_s() - 1.0).abs() < 1e-9);
    // With little arithmetic per second, that is what steps of many texts take.
    let (slow, evidence) = throughput(&known, &machine("prompt_gflops = 50\n"), 256);
    let goal = slow.solver.goal.clone().unwrap();
    let value = step_s(&slow, shape, &evidence, 256) / 256.0;
    assert!((goal.value / value - 1.0).abs() < 1e-9 && goal.bound.is_some());
    // Of 256 rows, each expert has sixteen, and each matrix costs four more.
    let dense: f64 = shape
        .dense
        .iter()
        .filter(|g| g.kind != DenseKind::Embedding)
        .map(|g| (256.0 + HALF_ROWS) * g.macs as f64)
        .sum();
    let experts: f64 = shape
        .experts
        .iter()
        .map(|e| 128.0 * (16.0 + HALF_ROWS) * e.expert_macs as f64)
        .sum();
    let step = 2.0 * (dense + experts) / 50e9 + 256.0 * slow.predicted.kv_s + 580e-6;
    assert!(
        (256.0 * value / step - 1.0).abs() < 1e-3,
        "{value} {}",
        step / 256.0
    );
}
