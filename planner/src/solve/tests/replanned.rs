//! Plans of loaded models made anew, on random small instances with GPUs: what a loaded model can't change
//! stays, what it can is valid and fits, and the same uses move nothing a second time.

use super::*;
use crate::replan::replan;
use tier_plan_runtime::formats::placement::{PerTier, validate};
use tier_plan_serve::Question;

/// A plan of a small model on a machine with GPUs, its uses later, and more of these uses.
struct Loaded {
    shape: ModelShape,
    plan: Placement,
    uses: Profile,
}

fn loaded(seed: u64) -> Option<Loaded> {
    let mut random = Random::new(seed);
    let mut draw = |from: usize, to: usize| from + random.below(to - from + 1);
    let n_used = draw(1, 3) as u32;
    let mut shape = shape(draw(1, 4) as u32, draw(4, 20) as u32, n_used, 2_000_000);
    for experts in &mut shape.experts {
        experts.expert_bytes = 1_000_000 + 100_000 * draw(0, 9) as u64;
    }
    let mut tiers = vec![tier("gpu-a", TierKind::Vram, 300.0, 8.0)];
    if draw(0, 1) == 1 {
        let rate = [200.0, 300.0][draw(0, 1)];
        tiers.push(tier("gpu-b", TierKind::Vram, rate, 8.0));
    }
    tiers.push(tier("dram", TierKind::Dram, 20.0, 0.0));
    match draw(0, 2) {
        0 => tiers.push(tier("slow", TierKind::Nvme, 2.0, 60.0)),
        1 => tiers.push(tier("slow", TierKind::Pmem, 5.0, 1.0)),
        _ => {}
    }
    tiers.iter_mut().for_each(|tier| tier.emulated = false);
    let total = shape.weight_bytes() as usize;
    let mut budgets: Vec<u64> = tiers
        .iter()
        .map(|tier| match tier.kind {
            TierKind::Vram => draw(1_000_000, 1_000_000 + total / 2) as u64,
            _ => draw(12_000_000, 12_000_000 + total) as u64,
        })
        .collect();
    if let Some(last) = budgets.last_mut() {
        *last = 1 << 40;
    }
    let sequences = [1, 1, 4][draw(0, 2)];
    let slots_on_gpu = draw(0, 1) == 1;
    let extra = draw(0, 2) as u32;
    let of = |seed| synthetic::profile(&shape, &routing(seed));
    let (before, uses) = (of(seed), of(seed + 1));
    let machine = machine(tiers);
    let problem = Problem {
        shape: &shape,
        profile: Some(&before),
        machine: &machine,
        budgets,
        context: 1000,
        sequences,
        kv_type: KvType::F16,
        position: None,
    };
    let options = Options {
        objective: match sequences {
            1 => Objective::Latency,
            _ => Objective::Throughput,
        },
        ..quick()
    };
    // Where the GPU has no room for what must be there, there is no plan to begin with.
    let mut plan = solve(&problem, &options).ok()?.plan;
    let has_tier_behind = machine
        .tiers
        .last()
        .is_some_and(|t| t.kind != TierKind::Dram);
    for layer in plan
        .layers
        .iter_mut()
        .filter(|_| slots_on_gpu && has_tier_behind)
    {
        // Slots in the place of some pins.
        let on_gpu = layer.pinned.iter_mut().find(|p| p.tier == TierIdx::FIRST);
        let slots = n_used + extra;
        if let Some(pins) = on_gpu.filter(|pins| pins.experts.len() > slots as usize)
            && layer.slots == 0
        {
            pins.experts.truncate(pins.experts.len() - slots as usize);
            (layer.slots, layer.slot_tier) = (slots, TierIdx::FIRST);
        }
    }
    plan.fill_sums(&shape);
    Some(Loaded { shape, plan, uses })
}

/// Returns the pins and the number of slots that each layer has on GPUs.
fn on_gpus(plan: &Placement) -> Vec<(Vec<Pins>, u32)> {
    let is_gpu = |tier: TierIdx| plan.tiers[tier].tier.is_gpu();
    let layers = plan.layers.iter();
    layers
        .map(|layer| {
            let pins = layer.pinned.iter().filter(|pins| is_gpu(pins.tier));
            let slots = if is_gpu(layer.slot_tier) {
                layer.slots
            } else {
                0
            };
            (pins.cloned().collect(), slots)
        })
        .collect()
}

/// Returns how many that are.
fn counts(plan: &Placement) -> Vec<(Vec<(TierIdx, usize)>, u32)> {
    let layers = on_gpus(plan).into_iter();
    let count = |pins: Pins| (pins.tier, pins.experts.len());
    layers
        .map(|(pins, slots)| (pins.into_iter().map(count).collect(), slots))
        .collect()
}

#[test]
fn gpus_keep_their_numbers_of_pins_and_slots() -> Result<()> {
    let n = if is_nightly() { 600 } else { 60 };
    let (mut with_pins, mut with_slots) = (0, 0);
    for seed in 0..n {
        let Some(Loaded { shape, plan, uses }) = loaded(seed) else {
            continue;
        };
        assert_eq!(validate(&plan, &shape), Vec::new());
        let tiers = plan.tiers.iter();
        let room: PerTier<u64> = tiers.map(|t| t.bytes.pinned + t.bytes.slots).collect();
        let ask = |plan: &Placement| {
            let question = Question {
                plan: plan.clone(),
                room: room.clone(),
                uses: uses.clone(),
                time_limit_s: 1.0,
            };
            Ok::<_, anyhow::Error>(replan(&shape, &question)?.plan)
        };
        let other = ask(&plan)?;
        assert_eq!(validate(&other, &shape), Vec::new());
        assert_eq!(counts(&other), counts(&plan), "{seed}");
        for (tier, room) in other.tiers.iter().zip(&room) {
            let held = tier.bytes.pinned + tier.bytes.slots;
            assert!(held <= *room, "{seed}: {tier:?}");
        }
        assert_eq!(on_gpus(&ask(&other)?), on_gpus(&other), "{seed}");
        let layers = on_gpus(&plan);
        with_pins += u64::from(layers.iter().any(|(pins, _)| !pins.is_empty()));
        with_slots += u64::from(layers.iter().any(|(_, slots)| *slots > 0));
    }
    assert!(
        2 * with_pins > n && 10 * with_slots > n,
        "{with_pins} and {with_slots} of {n}"
    );
    Ok(())
}
