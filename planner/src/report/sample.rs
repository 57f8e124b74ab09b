//! Sample reports of any size for tests, with plausible numbers from a small generator.

use super::{HitCurve, PlanEntry, Report};
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::machine::{Accelerator, Tier, TierKind};
use tier_plan_runtime::formats::placement::{
    DensePlacement, HomeReads, LayerPlacement, PerTier, Pins, Placement, PlanTier, Prediction,
    SlotPolicy, SolverReport, TierBytes, TierIdx,
};
use tier_plan_runtime::formats::profile::{Profile, PromptTrace, Split};
use tier_plan_runtime::formats::record::{LayerRecord, RunRecord, TierRecord};
use tier_plan_runtime::model::shape::DenseKind;

const EXPERT_BYTES: u64 = 3_400_000;

/// A xorshift generator, so that samples are the same every time.
pub(super) struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Returns a number from 0 to 1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn id(name: &str) -> SourceId {
    SourceId {
        name: name.into(),
        hash: "0123456789abcdef0123456789abcdef".into(),
    }
}

/// Makes a profile with skewed access, where each layer has its own frequent experts.
pub(super) fn profile(layers: u32, experts: u32, used: u32) -> Profile {
    let mut rng = Rng(0x9E37_79B9_7F4A_7C15);
    let skew: Vec<f64> = (0..layers)
        .map(|l| 0.3 + 1.0 * f64::from(l % 5) / 5.0)
        .collect();
    let orders: Vec<Vec<u16>> = (0..layers)
        .map(|_| {
            let mut order: Vec<u16> = (0..experts as u16).collect();
            for i in (1..order.len()).rev() {
                order.swap(i, (rng.next() % (i as u64 + 1)) as usize);
            }
            order
        })
        .collect();
    let mut prompts = Vec::new();
    for p in 0..4u32 {
        let (prompt_tokens, decode_tokens) = (24u32, 96u32);
        let mut chosen = Vec::new();
        for _ in 0..prompt_tokens + decode_tokens {
            for layer in 0..layers as usize {
                let mut picked: Vec<u16> = Vec::new();
                while picked.len() < used as usize {
                    // A power of a uniform number favors the front of the layer's order.
                    let at =
                        (rng.unit().powf(1.0 + 1.6 * skew[layer]) * f64::from(experts)) as usize;
                    let expert = orders[layer][at.min(experts as usize - 1)];
                    if !picked.contains(&expert) {
                        picked.push(expert);
                    }
                }
                chosen.extend(picked);
            }
        }
        prompts.push(PromptTrace {
            domain: "stories".into(),
            name: format!("{p}.txt"),
            split: if p == 3 { Split::HeldOut } else { Split::Train },
            prompt_tokens,
            decode_tokens,
            weights: vec![64; chosen.len()],
            experts: chosen,
        });
    }
    Profile {
        model: id("sample-moe"),
        layers: (0..layers).map(|l| l + 1).collect(),
        n_expert: experts,
        n_used: used,
        made: "made up for tests".into(),
        prompts,
        counted: None,
        guesses: None,
        id: id("sample.profile"),
    }
}

fn tiers(count: usize, emulated: bool) -> Vec<Tier> {
    let all = [
        ("vram", TierKind::Vram, 400.0),
        ("dram", TierKind::Dram, 27.0),
        ("pmem", TierKind::Pmem, 6.0),
        ("nvme", TierKind::Nvme, 2.1),
    ];
    let chosen: Vec<usize> = match count {
        2 => vec![1, 3],
        3 => vec![0, 1, 3],
        _ => vec![0, 1, 2, 3],
    };
    let tier = |i: usize| {
        let (name, kind, read_gbps) = all[i];
        Tier {
            name: name.into(),
            kind,
            capacity_bytes: 1 << 40,
            read_gbps,
            latency_us: 80.0,
            emulated: emulated && kind != TierKind::Dram,
            unit: None,
            accelerator: Accelerator::default(),
            source: "made up".into(),
        }
    };
    chosen.into_iter().map(tier).collect()
}

/// How a sample plan pins.
#[derive(Clone, Copy, PartialEq)]
enum Style {
    ByFrequency,
    /// Pins by frequency, no slots.
    PinsOnly,
    ById,
    Nothing,
}

/// Fills the tiers of a sample plan with what its layers put there.
fn plan_tiers(tiers: Vec<Tier>, layers: &[LayerPlacement], experts: u32) -> PerTier<PlanTier> {
    let slow = tiers.len() - 1;
    let total = u64::from(experts) * layers.len() as u64;
    let pins = |tier: TierIdx| -> u64 {
        layers
            .iter()
            .flat_map(|l| &l.pinned)
            .filter(|p| p.tier == tier)
            .map(|p| p.experts.len() as u64)
            .sum()
    };
    let all_pins: u64 = TierIdx::first(tiers.len()).map(pins).sum();
    tiers
        .into_iter()
        .enumerate()
        .map(|(t, tier)| {
            let slots: u64 = layers
                .iter()
                .filter(|l| l.slot_tier.get() == t)
                .map(|l| u64::from(l.slots))
                .sum();
            // Every plan's slots are in the tier before the last, which therefore gets the most.
            let share = if t + 1 == slow { 7 } else { 3 };
            PlanTier {
                tier,
                budget_bytes: if t == slow {
                    1 << 44
                } else {
                    EXPERT_BYTES * total * share / 16 + 60_000_000
                },
                bytes: TierBytes {
                    dense: if t == 0 { 40_000_000 } else { 0 },
                    pinned: pins(TierIdx::new(t)) * EXPERT_BYTES,
                    slots: slots * EXPERT_BYTES,
                    kv: if t == 0 { 9_000_000 } else { 0 },
                    staging: if t + 1 == slow { 8_000_000 } else { 0 },
                    home: if t == slow {
                        (total - all_pins) * EXPERT_BYTES
                    } else {
                        0
                    },
                },
            }
        })
        .collect()
}

fn placement(
    profile: &Profile,
    name: &str,
    tier_count: usize,
    style: Style,
    emulated: bool,
) -> Placement {
    let experts = profile.n_expert;
    let tiers = tiers(tier_count, emulated);
    let fast = tiers.len() - 1;
    let share = super::view::usage(profile)
        .expect("samples have tokens")
        .share;
    let layers: Vec<LayerPlacement> = profile
        .layers
        .iter()
        .zip(&share)
        .enumerate()
        .map(|(l, (layer, share))| {
            let mut order: Vec<u32> = (0..experts).collect();
            if matches!(style, Style::ByFrequency | Style::PinsOnly) {
                order.sort_by(|a, b| share[*b as usize].total_cmp(&share[*a as usize]));
            }
            let each = if style == Style::Nothing {
                0
            } else {
                experts / 8 + (l as u32 % 3)
            };
            let mut rest = order.into_iter();
            let mut pinned = Vec::new();
            for tier in TierIdx::first(fast) {
                let mut list: Vec<u32> = rest.by_ref().take(each as usize).collect();
                list.sort_unstable();
                if !list.is_empty() {
                    pinned.push(Pins {
                        tier,
                        experts: list,
                    });
                }
            }
            let slots = match style {
                Style::ById | Style::PinsOnly => 0,
                Style::Nothing => experts * 3 / 8,
                Style::ByFrequency => experts / 8 + (l as u32 * 5) % (experts / 8).max(1),
            };
            LayerPlacement {
                layer: *layer,
                pinned,
                slots,
                slot_tier: TierIdx::new(fast - 1),
                policy: SlotPolicy::Lru,
            }
        })
        .collect();
    let plan_tiers = plan_tiers(tiers, &layers, experts);
    Placement {
        name: name.into(),
        model: id("sample-moe"),
        profile: Some(profile.id.clone()),
        machine: id("sample-machine"),
        layer_overhead_us: 20.0,
        token_overhead_us: 200.0,
        context: 1024,
        sequences: 1,
        checkpoints: 0,
        window_chunk: None,
        reads: HomeReads::default(),
        streaming: None,
        kv_tier: TierIdx::FIRST,
        kv_type: KvType::F16,
        host_kv: Vec::new(),
        staging_tier: TierIdx::new(fast - 1),
        staging_experts: 2,
        tiers: plan_tiers,
        dense: vec![DensePlacement {
            kind: DenseKind::Head,
            layer: None,
            tier: TierIdx::FIRST,
        }],
        layers,
        solver: SolverReport {
            backend: "microlp".into(),
            status: if name == "ilp" {
                "optimal".into()
            } else {
                "baseline".into()
            },
            objective_s: 0.05,
            bound_s: Some(0.0499),
            gap: (name == "ilp").then_some(0.0004),
            solve_s: 0.8,
            goal: None,
        },
        predicted: Prediction::default(),
    }
}

/// Makes a profile of `layers` layers, and a plan with pins and slots for it.
pub(super) fn small_placement(layers: u32) -> (Profile, Placement) {
    let profile = profile(layers, 32, 4);
    let placement = placement(&profile, "ilp", 3, Style::ByFrequency, true);
    (profile, placement)
}

const NAMES: [&str; 8] = [
    "ilp",
    "frequency-first",
    "uniform",
    "lru-only",
    "first-layers-cpu",
    "ilp-without-slots",
    "hand-made-override",
    "all-on-slow-tier",
];

/// Makes a report of `plans` plans for a model of `layers` × `experts` over `tier_count` tiers.
pub(super) fn report(
    layers: u32,
    experts: u32,
    used: u32,
    tier_count: usize,
    plans: usize,
    emulated: bool,
) -> Report {
    let profile = profile(layers, experts, used);
    let mut rng = Rng(77);
    let entries = NAMES
        .iter()
        .take(plans)
        .enumerate()
        .map(|(i, name)| {
            let style = match i {
                1 | 5 => Style::PinsOnly,
                2 | 4 => Style::ById,
                3 | 7 => Style::Nothing,
                _ => Style::ByFrequency,
            };
            let mut placement = placement(&profile, name, tier_count, style, emulated);
            let rate = 18.2 / (1.0 + 0.31 * i as f64);
            let off = 0.94 + 0.12 * rng.unit();
            let n = placement.tiers.len();
            let token = 1.0 / (rate * off);
            placement.predicted = Prediction {
                decode_tok_s: rate * off,
                prompt_tok_s: rate * 7.0,
                overhead_s: token * 0.05,
                dense_s: (0..n)
                    .map(|t| if t == 0 { token * 0.2 } else { 0.0 })
                    .collect(),
                expert_s: (0..n)
                    .map(|t| token * [0.1, 0.25, 0.45, 0.4][t.min(3)])
                    .collect(),
                expert_critical_s: token * 0.75,
                hit_rate: 0.8,
                read_bytes: PerTier::from_fn(n, |_| 1e8),
                emulated,
                ..Prediction::default()
            };
            let records = (0..3)
                .map(|r| {
                    record(
                        &placement,
                        rate * (0.97 + 0.03 * r as f64),
                        emulated,
                        &mut rng,
                    )
                })
                .collect();
            PlanEntry {
                name: (*name).to_string(),
                placement: Some(placement),
                records,
            }
        })
        .collect();
    let curves = profile
        .layers
        .iter()
        .map(|layer| {
            let bend = 0.08 + 0.3 * f64::from(layer * 7 % 11) / 11.0;
            let slots: Vec<u32> = (0..=16).map(|i| i * experts / 16).collect();
            let hit_rate = slots
                .iter()
                .map(|s| 1.0 - (-f64::from(*s) / f64::from(experts) / bend).exp())
                .collect();
            HitCurve {
                label: "LRU, held-out prompts".into(),
                layer: *layer,
                slots,
                hit_rate,
            }
        })
        .collect();
    Report {
        title: "Plans for sample-moe".into(),
        generated: "2026-11-22T17:00:00Z".into(),
        host: "A sample processor, 2 cores".into(),
        plans: entries,
        profile: Some(profile),
        curves,
        history: Vec::new(),
        notes: vec!["All plans produced the same tokens.".into()],
    }
}

fn record(placement: &Placement, rate: f64, emulated: bool, rng: &mut Rng) -> RunRecord {
    let tokens = 64u64;
    let seconds = tokens as f64 / rate;
    let count = placement.layers.len() as f64;
    RunRecord {
        plan: placement.name.clone(),
        plan_status: placement.solver.status.clone(),
        plan_gap: placement.solver.gap,
        model: Some(placement.model.clone()),
        machine: Some(placement.machine.clone()),
        when: "2026-11-22T16:50:00Z".into(),
        host: "A sample processor, 2 cores".into(),
        threads: 2,
        isa: "avx512".into(),
        emulated,
        prompt_tokens: 48,
        prompt_s: 48.0 / (rate * 7.0),
        decode_tokens: tokens,
        decode_s: seconds,
        first_token_s: 0.9,
        tiers: placement
            .tiers
            .iter()
            .map(|t| TierRecord {
                name: t.tier.name.clone(),
                emulated: t.tier.emulated,
                planned_bytes: t.used_bytes(),
                resident_bytes: t.used_bytes(),
                read_bytes: 1_000_000_000,
                busy_s: seconds * (0.2 + 0.2 * rng.unit()),
            })
            .collect(),
        layers: placement
            .layers
            .iter()
            .map(|l| LayerRecord {
                layer: l.layer,
                pinned_hits: 120,
                slot_hits: 70,
                misses: 30 + rng.next() % 30,
                dense_s: 0.2 / rate / count,
                expert_s: (0.55 + 0.35 * rng.unit()) / rate / count,
                missed_bytes: 30_000_000,
                reading_s: 0.3 / rate / count,
                waited_s: 0.2 / rate / count,
                streamed: 0,
            })
            .collect(),
        predicted: Some(placement.predicted.clone()),
        parallel: Vec::new(),
        conditions: None,
        setup: None,
        output: vec![1, 2, 3],
    }
}
