//! A better plan for a loaded model, of what its texts choose: pins and slots elsewhere, all else as it
//! is.

pub mod worker;

use crate::cost::predict;
use crate::explain;
use crate::profile::Evidence;
use crate::solve::options::{Objective, Policy};
use crate::solve::problem::capacity::page_share;
use crate::solve::problem::constraints::Constraints;
use crate::solve::{self, Options, Problem};
use anyhow::{Context, Result, ensure};
use tier_plan_runtime::formats::machine::Machine;
use tier_plan_runtime::formats::placement::{PerTier, Placement, TierIdx};
use tier_plan_runtime::model::shape::ModelShape;
use tier_plan_serve::{Question, Replanned};

/// Makes a plan that differs from the present one in pins and slots alone, from what texts chose.
///
/// # Errors
/// When the uses are of another model or too few, or the plan has nothing to choose.
pub fn replan(shape: &ModelShape, question: &Question) -> Result<Replanned> {
    let Question {
        plan,
        room,
        uses,
        time_limit_s,
    } = question;
    ensure!(
        !shape.experts.is_empty(),
        "the model has no routed experts, so there is nothing to move"
    );
    let evidence = Evidence::new(shape, Some(uses))?;
    let budgets = budgets(shape, plan, room);
    let machine = machine_of(plan, &budgets);
    let problem = Problem {
        shape,
        profile: Some(uses),
        machine: &machine,
        budgets,
        context: plan.context,
        sequences: plan.sequences,
        kv_type: plan.kv_type,
        position: (plan.predicted.at > 0).then_some(plan.predicted.at),
    };
    let goal = plan.solver.goal.as_ref();
    let batch = goal.filter(|goal| goal.objective == Objective::Throughput.name());
    let options = Options {
        policy: Policy::Auto,
        time_limit_s: *time_limit_s,
        objective: match batch {
            Some(_) => Objective::Throughput,
            None => Objective::Latency,
        },
        batch: batch.and_then(|goal| goal.batch),
        constraints: Constraints::keeping(plan, &evidence),
        // What is streamed stays so: the buffers for it are there.
        streaming: false,
        ..Options::default()
    };
    let solved = solve::solve_with_evidence(&problem, &evidence, &options)
        .context("making a plan of what texts chose")?;

    let mut new = plan.clone();
    new.name = "replanned".into();
    new.profile = Some(uses.id.clone());
    new.solver = solved.plan.solver;
    new.layers = solved.plan.layers;
    trim(&mut new, shape, room);
    let [now, then] = [plan, &new].map(|plan| predict(plan, shape, &evidence));
    if plan.predicted.decode_tok_s > 0.0 {
        new.predicted = then.clone();
    }
    let has_speeds = plan.predicted.decode_tok_s > 0.0;
    let mut notes = solved.notes;
    if !has_speeds {
        notes.push(
            "the present plan was made without a machine file, so rates are supposed: 20 GB/s of memory and 1 GB/s \
             of the drive"
                .to_string(),
        );
    }
    Ok(Replanned {
        plan: new,
        now,
        then,
        notes,
    })
}

/// Returns the machine that a plan was made for, as far as the plan says, with room for `budgets`.
fn machine_of(plan: &Placement, budgets: &[u64]) -> Machine {
    let mut machine = explain::machine_of(plan);
    for (tier, budget) in machine.tiers.iter_mut().zip(budgets) {
        tier.capacity_bytes = tier.capacity_bytes.max(*budget);
    }
    machine
}

/// Returns what each tier may hold: what it holds, and the share for whole pages that the solver sets
/// aside where they are read from a drive. The last one may hold all experts.
fn budgets(shape: &ModelShape, plan: &Placement, room: &PerTier<u64>) -> Vec<u64> {
    let last = plan.home_tier();
    let share = match plan.tiers[last].tier.is_drive() {
        true => page_share(shape),
        false => 0.0,
    };
    let budget = |tier: TierIdx| {
        let planned = &plan.tiers[tier];
        if tier == last {
            return planned.budget_bytes;
        }
        let bytes = planned.bytes;
        let beside = bytes.dense + bytes.kv + bytes.staging;
        let padded = room[tier] + bytes.staging;
        let pages = (padded as f64 * share / (1.0 - share)).ceil() as u64;
        beside.saturating_add(room[tier]).saturating_add(pages)
    };
    plan.tiers.indices().map(budget).collect()
}

/// Takes slots, and then pins, from a plan that has more of them than there is room for.
fn trim(plan: &mut Placement, shape: &ModelShape, room: &PerTier<u64>) {
    let last = plan.home_tier();
    for tier in plan.tiers.indices().filter(|tier| *tier != last) {
        loop {
            plan.fill_sums(shape);
            let bytes = plan.tiers[tier].bytes;
            if bytes.pinned + bytes.slots <= room[tier] || !take_one(plan, tier) {
                break;
            }
        }
    }
}

/// Takes a slot, or else a pin, from the layer that has most of them on a tier. Returns whether there
/// was one.
fn take_one(plan: &mut Placement, tier: TierIdx) -> bool {
    let with_slots = plan
        .layers
        .iter_mut()
        .filter(|l| l.slots > 0 && l.slot_tier == tier);
    if let Some(layer) = with_slots.max_by_key(|layer| layer.slots) {
        layer.slots -= 1;
        return true;
    }
    let pins = plan.layers.iter_mut().flat_map(|layer| &mut layer.pinned);
    let on_tier = pins.filter(|pins| pins.tier == tier);
    let most = on_tier.max_by_key(|pins| pins.experts.len());
    most.and_then(|pins| pins.experts.pop()).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::tests::{Prompt, profile_of, shape};
    use tier_plan_runtime::KvType;
    use tier_plan_runtime::formats::machine::{Accelerator, TierKind};
    use tier_plan_runtime::formats::machine::{Extras, Tier};
    use tier_plan_runtime::formats::placement::{LayerPlacement, Prediction, Streaming};
    use tier_plan_runtime::formats::profile::{Profile, Split};
    use tier_plan_runtime::model::shape::{DenseKind, DenseShape};

    fn machine() -> Machine {
        let tier = |name: &str, kind, read_gbps| Tier {
            name: name.into(),
            kind,
            capacity_bytes: 1 << 40,
            read_gbps,
            latency_us: 0.0,
            emulated: true,
            unit: None,
            accelerator: Accelerator::default(),
            source: String::new(),
        };
        Machine {
            id: crate::profile::tests::id("machine"),
            name: "machine".into(),
            description: String::new(),
            tiers: vec![
                tier("fast", TierKind::Dram, 100e-6),
                tier("middle", TierKind::Pmem, 10e-6),
                tier("slow", TierKind::Nvme, 1e-6),
            ],
            layer_overhead_us: 0.0,
            token_overhead_us: 1.0,
            extras: Extras::default(),
        }
    }

    fn model() -> ModelShape {
        let mut shape = shape(16, 2);
        shape.dense = [(DenseKind::Head, None), (DenseKind::Attention, Some(0))]
            .map(|(kind, layer)| DenseShape {
                kind,
                layer,
                bytes: 20,
                token_bytes: 20,
                macs: 20,
            })
            .to_vec();
        shape
    }

    /// Texts whose tokens choose from four experts, of which `first` is the first.
    fn uses(first: u16) -> Profile {
        let token = |n: usize| {
            vec![vec![
                first + n as u16 % 4,
                first + (n as u16 + 1 + n as u16 / 4) % 4,
            ]]
        };
        let tokens: Vec<Vec<Vec<u16>>> = (0..64).map(token).collect();
        let distinct = |tokens: &[Vec<Vec<u16>>]| {
            let token = |t: &Vec<Vec<u16>>| {
                if t[0][0] == t[0][1] {
                    vec![vec![first, first + 1]]
                } else {
                    t.clone()
                }
            };
            tokens.iter().map(token).collect::<Vec<_>>()
        };
        let tokens = distinct(&tokens);
        let prompts: [Prompt; 2] = [
            (Split::Train, 0, tokens.clone()),
            (Split::HeldOut, 0, tokens),
        ];
        profile_of(16, 2, 1, &prompts)
    }

    fn solved(uses: &Profile) -> Placement {
        solved_on(&machine(), &model(), vec![75, 60, 1000], uses)
    }

    fn solved_on(
        machine: &Machine,
        shape: &ModelShape,
        budgets: Vec<u64>,
        uses: &Profile,
    ) -> Placement {
        let problem = Problem {
            shape,
            profile: Some(uses),
            machine,
            budgets,
            context: 8,
            sequences: 1,
            kv_type: KvType::F16,
            position: None,
        };
        solve::solve(&problem, &Options::default()).unwrap().plan
    }

    /// Returns the bytes of pins and slots by tier.
    fn held(plan: &Placement) -> PerTier<u64> {
        let tiers = plan.tiers.iter();
        tiers.map(|t| t.bytes.pinned + t.bytes.slots).collect()
    }

    fn question(plan: &Placement, room: &PerTier<u64>, uses: Profile) -> Question {
        Question {
            plan: plan.clone(),
            room: room.clone(),
            uses,
            time_limit_s: 5.0,
        }
    }

    #[test]
    fn experts_follow_what_texts_choose_and_all_else_stays() {
        let (shape, plan) = (model(), solved(&uses(0)));
        let room = held(&plan);
        let ask = |uses| replan(&shape, &question(&plan, &room, uses));
        let again = ask(uses(0)).unwrap();
        assert!(
            again.then.token_s() >= 0.999 * again.now.token_s(),
            "there is nothing to gain"
        );

        let other = ask(uses(8)).unwrap();
        let gain = other.now.token_s() / other.then.token_s();
        assert!(gain > 2.0, "{gain}");
        assert!(other.then.hit_rate > other.now.hit_rate);
        assert_eq!(other.plan.predicted, other.then);
        assert_eq!(
            (&other.plan.dense, other.plan.kv_tier, &other.plan.host_kv),
            (&plan.dense, plan.kv_tier, &plan.host_kv)
        );
        for (tier, room) in other.plan.tiers.iter().zip(&room).take(2) {
            assert!(tier.bytes.pinned + tier.bytes.slots <= *room, "{tier:?}");
        }
        let violations = tier_plan_runtime::formats::placement::validate(&other.plan, &shape);
        assert!(violations.is_empty(), "{violations:?}");
    }

    /// Returns how many pins and slots each layer has on the first tier, and the pins themselves.
    fn on_gpu(plan: &Placement) -> (Vec<(usize, u32)>, Vec<u32>) {
        let pins = |l: &LayerPlacement| {
            let pins = l.pinned.iter().filter(|pins| pins.tier == TierIdx::FIRST);
            pins.flat_map(|pins| pins.experts.clone())
                .collect::<Vec<u32>>()
        };
        let slots = |l: &LayerPlacement| match l.slot_tier == TierIdx::FIRST {
            true => l.slots,
            false => 0,
        };
        let layers = plan.layers.iter();
        let counts = layers.clone().map(|l| (pins(l).len(), slots(l)));
        (counts.collect(), layers.flat_map(pins).collect())
    }

    #[test]
    fn pins_on_a_gpu_follow_what_texts_choose_and_keep_their_number() {
        let (shape, mut machine) = (model(), machine());
        (machine.tiers[0].kind, machine.tiers[0].emulated) = (TierKind::Vram, false);
        let plan = solved_on(&machine, &shape, vec![55, 70, 1000], &uses(0));
        let (counts, pins) = on_gpu(&plan);
        assert!(pins.len() > 1 && pins.iter().all(|e| *e < 4), "{plan:?}");
        for slots in [0, 2] {
            let mut plan = plan.clone();
            if slots > 0 {
                // Slots beside the pins, and none in main memory.
                let layer = &mut plan.layers[0];
                layer.pinned.retain(|pins| pins.tier == TierIdx::FIRST);
                layer.pinned[0].experts.truncate(pins.len() - 1);
                (layer.slots, layer.slot_tier) = (slots, TierIdx::FIRST);
                plan.tiers[TierIdx::FIRST].budget_bytes = 1000;
                plan.fill_sums(&shape);
            }
            let counts = match slots {
                0 => counts.clone(),
                _ => on_gpu(&plan).0,
            };
            plan.streaming = Some(Streaming {
                tier: TierIdx::FIRST,
                from: TierIdx::new(1),
                experts: 1,
                link_gbps: 1e-6,
                cpu_share: 1.0,
            });
            let other = replan(&shape, &question(&plan, &held(&plan), uses(8))).unwrap();
            let (now, pins) = on_gpu(&other.plan);
            assert_eq!(now, counts);
            assert!(pins.iter().all(|e| (8..12).contains(e)), "{pins:?}");
            let gain = other.now.token_s() / other.then.token_s();
            assert!(gain > 1.2, "{gain}");
            assert_eq!(other.plan.streaming, plan.streaming);
        }
    }

    #[test]
    fn what_does_not_fit_is_taken_away() {
        let (shape, mut plan) = (model(), solved(&uses(0)));
        let room = PerTier::from([20, 10, 0]);
        trim(&mut plan, &shape, &room);
        for tier in [0, 1].map(TierIdx::new) {
            let bytes = plan.tiers[tier].bytes;
            assert!(bytes.pinned + bytes.slots <= room[tier]);
        }
    }

    #[test]
    fn a_plan_without_rates_predicts_none() {
        let (shape, mut plan) = (model(), solved(&uses(0)));
        plan.predicted = Prediction::default();
        let room = held(&plan);
        let ask = |uses| replan(&shape, &question(&plan, &room, uses));
        let other = ask(uses(8)).unwrap();
        assert_eq!(other.plan.predicted, Prediction::default());
        assert!(
            other
                .notes
                .iter()
                .any(|note| note.contains("without a machine file"))
        );
        let none = profile_of(16, 2, 1, &[]);
        assert!(ask(none).is_err());
    }
}
