//! Pins and slots that move while a text is generated: no bit of it changes, and what is in memory is
//! what the plan says.

use crate::golden_arch::{Spread, context, engine, three_tiers};
use tier_plan_runtime::engine::{RearrangeError, Rearranged};
use tier_plan_runtime::formats::machine::TierKind;
use tier_plan_runtime::formats::placement::{Pins, Placement, PlanTier, SlotPolicy, TierIdx};
use tier_plan_runtime::model::shape::ModelShape;
use tier_plan_runtime::model::shape_of_file;
use tier_plan_runtime::{Engine, KvType, LogitsMode};
use tier_plan_testing::{Golden, Random, is_nightly, models};

/// Tiers with memory for experts.
const MEMORY: [TierIdx; 2] = [TierIdx::new(0), TierIdx::new(1)];

/// Returns a plan over two tiers of memory, with room on the slow one for all experts.
fn three(golden: &Golden, shape: &ModelShape, spread: Spread) -> Placement {
    let mut plan = three_tiers(shape, context(golden), spread);
    plan.tiers[TierIdx::new(2)].budget_bytes = 1 << 40;
    plan
}

fn spread(pin_every: u32, slots: u32, slow: TierKind, real: Option<u64>) -> Spread {
    Spread {
        pin_every,
        slots,
        slot_tier: TierIdx::new(1),
        extra_staging: 2,
        slow,
        real,
    }
}

/// Returns a plan that differs from `plan` in pins and slots, drawn from what fits in their place.
fn other(plan: &Placement, shape: &ModelShape, random: &mut Random) -> Placement {
    let mut other = plan.clone();
    other.name = "other".into();
    other.predicted.decode_tok_s = 7.0;
    let mut left = MEMORY.map(|t| plan.tiers[t].bytes.pinned + plan.tiers[t].bytes.slots);
    for (layer, experts) in other.layers.iter_mut().zip(&shape.experts) {
        let mut fits = |tier: usize| {
            let fits = left[tier] >= experts.expert_bytes;
            left[tier] -= experts.expert_bytes * u64::from(fits);
            fits
        };
        let mut pinned: [Vec<u32>; 2] = Default::default();
        for expert in 0..experts.n_expert {
            let tier = random.below(4) as usize;
            if tier < 2 && fits(tier) {
                pinned[tier].push(expert);
            }
        }
        let n_pooled =
            u64::from(experts.n_expert) - pinned.iter().map(|p| p.len() as u64).sum::<u64>();
        let slot_tier = random.below(2) as usize;
        layer.slots = (0..random.below(n_pooled + 1))
            .filter(|_| fits(slot_tier))
            .count() as u32;
        layer.slot_tier = MEMORY[slot_tier];
        layer.policy = if random.below(2) == 0 {
            SlotPolicy::Lru
        } else {
            SlotPolicy::Lfu { half_life: 8 }
        };
        let pins = MEMORY.into_iter().zip(pinned);
        layer.pinned = pins.map(|(tier, experts)| Pins { tier, experts }).collect();
    }
    other.fill_sums(shape);
    other
}

/// Returns the logits of all decoded tokens. Before each token, `before` may do something.
fn decode(
    golden: &Golden,
    engine: &mut Engine,
    mut before: impl FnMut(&mut Engine, usize),
) -> Vec<f32> {
    let mut all = engine
        .forward(&golden.tokens, LogitsMode::Last)
        .unwrap()
        .to_vec();
    for (i, token) in golden.greedy.iter().enumerate() {
        before(engine, i);
        all.extend_from_slice(engine.forward(&[*token], LogitsMode::Last).unwrap());
    }
    all
}

/// Comes to the end of what moves.
fn finish(engine: &mut Engine) -> Rearranged {
    while engine.rearranging().is_some() {
        engine.continue_rearranging();
        std::thread::sleep(std::time::Duration::from_micros(50));
    }
    engine.rearranged().unwrap()
}

/// Fails if what is loaded is not what the engine's plan says, or that not what was wanted.
fn check(engine: &Engine, wanted: &Placement) {
    let plan = engine.plan();
    assert_eq!(
        (&plan.name, &plan.predicted),
        (&wanted.name, &wanted.predicted)
    );
    let pins = |plan: &Placement| -> Vec<Vec<Pins>> {
        let layers = plan.layers.iter();
        let pins = layers.map(|l| {
            l.pinned
                .iter()
                .filter(|p| !p.experts.is_empty())
                .cloned()
                .collect()
        });
        pins.collect()
    };
    assert_eq!(pins(plan), pins(wanted));
    let slots = |plan: &Placement| -> Vec<_> {
        plan.layers
            .iter()
            .map(|l| (l.slots, l.slot_tier, l.policy))
            .collect()
    };
    assert_eq!(slots(plan), slots(wanted));
    let used: Vec<u64> = wanted.tiers.iter().map(PlanTier::used_bytes).collect();
    assert_eq!(engine.resident_bytes().as_slice(), used);
}

#[test]
fn moving_experts_change_no_bit() {
    let mut random = Random(7);
    let arch = |folder| {
        models(folder)
            .into_iter()
            .map(move |name| format!("{folder}/{name}"))
    };
    for (nth, name) in arch("arch").chain(arch("arch2")).enumerate() {
        let golden = Golden::read(&name);
        let shape = shape_of_file(&golden.path).unwrap();
        if shape.experts.is_empty() {
            continue;
        }
        let spreads = [
            spread(3, 2, TierKind::Nvme, None),
            spread(4, 2, TierKind::Nvme, Some(1 << 20)),
            spread(3, 1, TierKind::Pmem, None),
            spread(3, 0, TierKind::Cxl, None),
        ];
        // One of them per model, unless there is time.
        let all = is_nightly();
        let spreads = spreads.into_iter().enumerate();
        for (_, spread) in spreads.filter(|(i, _)| all || *i == nth % 4) {
            let plan = three(&golden, &shape, spread);
            let expected = decode(&golden, &mut engine(&golden, &plan, 64), |_, _| ());
            let mut moving = engine(&golden, &plan, 64);
            let (mut wanted, mut complete) = (plan.clone(), true);
            let found = decode(&golden, &mut moving, |engine, i| {
                if i % 3 == 1 && engine.rearranging().is_none() {
                    if complete {
                        check(engine, &wanted);
                    }
                    wanted = other(&plan, &shape, &mut random);
                    engine.rearrange(wanted.clone()).unwrap();
                    complete = false;
                } else if i % 3 == 0 && i > 0 {
                    let ended = finish(engine);
                    complete = ended.left_pins + ended.left_slots + ended.failed_pins == 0;
                }
            });
            assert!(found == expected, "{name}, {spread:?}");
            finish(&mut moving);
            // And back.
            moving.rearrange(plan.clone()).unwrap();
            let ended = finish(&mut moving);
            assert_eq!(ended.done_bytes, ended.total_bytes, "{name}: {ended:?}");
            if ended.left_slots == 0 {
                check(&moving, &plan);
            }
        }
    }
}

#[test]
fn what_can_not_move_is_refused_by_name() {
    let golden = Golden::read("arch/qwen3moe");
    let shape = shape_of_file(&golden.path).unwrap();
    let plan = three(&golden, &shape, spread(3, 1, TierKind::Nvme, None));
    let mut engine = engine(&golden, &plan, 64);
    let refused = |engine: &mut Engine, change: &dyn Fn(&mut Placement)| {
        let mut other = plan.clone();
        change(&mut other);
        let error = engine.rearrange(other).unwrap_err();
        assert!(engine.rearranging().is_none());
        error.to_string()
    };
    let moved_dense = refused(&mut engine, &|plan| {
        let moved = plan
            .dense
            .iter_mut()
            .find(|d| d.tier < TierIdx::new(2))
            .unwrap();
        moved.tier = TierIdx::new(1 - moved.tier.get());
        plan.tiers
            .iter_mut()
            .for_each(|t| t.budget_bytes = u64::MAX);
        plan.fill_sums(&shape);
    });
    assert!(
        moved_dense.contains("place of dense tensors"),
        "{moved_dense}"
    );
    let longer = refused(&mut engine, &|plan| {
        plan.kv_type = KvType::F16;
        plan.fill_sums(&shape);
    });
    assert!(longer.contains("KV cache"), "{longer}");
    let more = refused(&mut engine, &|plan| {
        plan.layers[0].slots += 1;
        plan.tiers
            .iter_mut()
            .for_each(|t| t.budget_bytes = u64::MAX);
        plan.fill_sums(&shape);
    });
    assert!(more.contains("on tier 'dram'"), "{more}");
    let wrong = refused(&mut engine, &|plan| {
        plan.layers[0].pinned[0].experts.push(10_000)
    });
    assert!(wrong.contains("does not fit the model"), "{wrong}");

    engine.rearrange(plan.clone()).unwrap();
    let busy = engine.rearrange(plan.clone());
    assert!(matches!(busy, Err(RearrangeError::UnderWay)), "{busy:?}");
}
