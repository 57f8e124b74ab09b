//! The store while its pins and slots move: whatever is accessed meanwhile and whichever reads fail,
//! experts have the bytes of the file, and no memory is lost.

use super::ids::{ExpertId, LayerExpert};
use super::layer::{ExpertBacking, Layout};
use super::rearrange::Rearranged;
use super::store::ExpertStore;
use super::tests::{Choice, Reads, TestStep, fixture, matrices, setup, steps, store, take};
use crate::tiers::arena::{Arena, ArenaSlice};
use proptest::prelude::*;
use std::sync::Arc;
use tier_plan_cuda::experts::PinnedExperts;
use tier_plan_cuda::shim;
use tier_plan_formats::placement::{LayerPlacement, Pins, SlotPolicy, TierIdx};

/// Tiers with memory for experts; the one between them is the slow one.
const TIERS: [TierIdx; 2] = [TierIdx::FIRST, TierIdx::new(2)];

/// Tiers of GPUs.
const GPUS: [TierIdx; 2] = [TierIdx::new(3), TierIdx::new(4)];

/// Where a layer's experts are to be: the tier of each that is pinned, those of memory before those of
/// GPUs, and slots.
#[derive(Clone, Debug)]
struct Wanted {
    pins: Vec<Option<usize>>,
    slots: u32,
    slot_tier: usize,
    policy: SlotPolicy,
}

fn wanted(n_expert: usize) -> impl Strategy<Value = Wanted> {
    let policy = prop_oneof![
        Just(SlotPolicy::Lru),
        (1u32..20).prop_map(|half_life| SlotPolicy::Lfu { half_life }),
    ];
    let pins = proptest::collection::vec(proptest::option::weighted(0.6, 0usize..4), n_expert);
    (pins, 0u32..5, 0usize..2, policy).prop_map(|(pins, slots, slot_tier, policy)| Wanted {
        pins,
        slots,
        slot_tier,
        policy,
    })
}

/// Returns plans of layers that fit the bytes of the tiers and the places on GPUs, with as much of what is
/// wanted as does.
fn placements(
    store: &ExpertStore,
    wanted: &[Wanted],
    mut left: [usize; 2],
    places: [usize; 2],
) -> Vec<LayerPlacement> {
    let mut layers = Vec::new();
    for (layer, wanted) in wanted.iter().enumerate().take(store.layers.len()) {
        let bytes = store.layers[layer].expert_bytes();
        let mut places = places;
        let mut fits = |tier: usize| {
            let (left, needed) = match tier.checked_sub(TIERS.len()) {
                Some(gpu) => (&mut places[gpu], 1),
                None => (&mut left[tier], bytes),
            };
            let fits = *left >= needed;
            *left -= needed * usize::from(fits);
            fits
        };
        let tiers = [TIERS, GPUS].concat();
        let mut pinned: Vec<Pins> = tiers
            .iter()
            .map(|tier| Pins {
                tier: *tier,
                experts: Vec::new(),
            })
            .collect();
        let n_expert = store.layers[layer].n_expert();
        for (expert, tier) in wanted.pins.iter().enumerate().take(n_expert) {
            if let Some(tier) = tier.filter(|tier| fits(*tier)) {
                pinned[tier].experts.push(expert as u32);
            }
        }
        layers.push(LayerPlacement {
            layer: layer as u32,
            slots: (0..wanted.slots).filter(|_| fits(wanted.slot_tier)).count() as u32,
            pinned: pinned
                .into_iter()
                .filter(|p| !p.experts.is_empty())
                .collect(),
            slot_tier: TIERS[wanted.slot_tier],
            policy: wanted.policy,
        });
    }
    layers
}

/// Gives a store two GPUs with so many pins in each layer.
fn add_gpus(store: &mut ExpertStore, places: [usize; 2]) {
    let (_, spec, _) = fixture();
    let mut first = 0;
    let mut gpus = Vec::new();
    for (tier, places) in GPUS.into_iter().zip(places) {
        let mut gpu = PinnedExperts::new(shim::shared(), store.layers.len()).unwrap();
        for (at, (_, moe)) in spec.moe_layers().enumerate() {
            let experts = (first..first + places).map(|e| ExpertId::new(e as u32));
            let view = |expert| store.mapped_view(&store.layers[at], expert);
            let views: Vec<_> = experts.map(|e| (e, view(e), view(e).biases())).collect();
            let bytes = views
                .iter()
                .map(|(e, v, b)| (e.index(), v.bytes(b.as_ref())));
            let bytes: Vec<_> = bytes.collect();
            let (any, biased) = (view(ExpertId::new(0)), view(ExpertId::new(0)).biases());
            let kind = any.kind(moe);
            gpu.add_layer(at, kind, &bytes, 0, biased.is_some())
                .unwrap();
            let experts: Vec<ExpertId> = views.into_iter().map(|(e, ..)| e).collect();
            for expert in experts {
                store.layers[at].pin_on_gpu(expert.index(), tier);
            }
        }
        first += places;
        gpus.push((tier, gpu));
    }
    store.set_gpus(gpus);
}

/// Returns all bytes of memory for experts.
fn held_bytes(store: &ExpertStore) -> usize {
    let of_layer = |layer: &super::layer::LayerExperts| {
        let experts = (0..layer.n_expert() as u32).map(ExpertId::new);
        let pins = experts.filter_map(|expert| match layer.backing(expert) {
            ExpertBacking::Pinned { bytes, .. } => Some(bytes),
            _ => None,
        });
        let slots = layer.slots.iter().flatten();
        pins.chain(slots).map(ArenaSlice::capacity).sum::<usize>()
    };
    store.layers.iter().map(of_layer).sum::<usize>() + store.rearranger.free_bytes()
}

/// Fails if a pinned expert has other bytes than the file.
fn check_pins(store: &ExpertStore) {
    for layer in &store.layers {
        for expert in (0..layer.n_expert() as u32).map(ExpertId::new) {
            let ExpertBacking::Pinned { bytes, layout, .. } = layer.backing(expert) else {
                continue;
            };
            assert!(
                !layer.cache.contains(expert.get()),
                "it has no use for a slot"
            );
            for part in &layer.parts {
                let all = store.gguf.bytes(&store.gguf.tensors()[part.tensor]);
                let expected = &all[expert.index() * part.slice_bytes..][..part.slice_bytes];
                let place = layer.slice_location(&store.gguf, part, expert.index(), *layout);
                let found = &bytes[place.buffer_offset..][..part.slice_bytes];
                assert!(found == expected, "{expert:?}");
            }
        }
    }
}

/// Fails if an expert that is pinned on a GPU has other bytes there than in the file.
pub(crate) fn check_pins_on_gpus(store: &ExpertStore) {
    for (at, layer) in store.layers.iter().enumerate() {
        for expert in (0..layer.n_expert() as u32).map(ExpertId::new) {
            if let ExpertBacking::Gpu(tier) = layer.backing(expert) {
                let found = store.bytes_of_pin(at, expert, *tier);
                let expected = matrices(store, layer, expert.get());
                assert!(found == expected, "{expert:?} of layer {at}");
            }
        }
    }
}

/// Fails if experts are elsewhere than a plan that has come to its end says.
fn check_arrangement(store: &ExpertStore, plan: &[LayerPlacement], ended: Rearranged) {
    let (mut missing_pins, mut missing_slots) = (0, 0);
    for (now, wanted) in store.arrangement().iter().zip(plan) {
        let n = |pins: &[Pins]| {
            pins.iter()
                .map(|pins| pins.experts.len() as u64)
                .sum::<u64>()
        };
        missing_pins += n(&wanted.pinned) - n(&now.pins);
        missing_slots += u64::from(wanted.slots - now.slots);
        for pins in &now.pins {
            let wanted = wanted
                .pinned
                .iter()
                .find(|wanted| wanted.tier == pins.tier)
                .unwrap();
            assert!(
                pins.experts
                    .iter()
                    .all(|expert| wanted.experts.contains(expert))
            );
        }
        assert_eq!(
            (now.policy, now.slot_tier),
            (wanted.policy, wanted.slot_tier)
        );
    }
    assert_eq!(
        missing_pins,
        ended.failed_pins + ended.left_pins,
        "{ended:?}"
    );
    assert_eq!(missing_slots, ended.left_slots, "{ended:?}");
    // All layers have experts of one size.
    let bytes = store.layers[0].expert_bytes() as u64;
    assert_eq!(ended.done_bytes + missing_pins * bytes, ended.total_bytes);
}

/// Gives a store a second tier with room for `n` experts of its first layer. Returns the bytes for
/// experts on both tiers, without what whole pages take.
fn add_tier(store: &mut ExpertStore, n: usize) -> [usize; 2] {
    let bytes = n * store.layers[0].expert_bytes();
    let memory = Arena::new("second", bytes as u64)
        .unwrap()
        .take(bytes)
        .unwrap();
    store.rearranger.add_memory(TIERS[1], memory);
    let slots = store
        .layers
        .iter()
        .map(|l| l.slots.len() * l.expert_bytes());
    [slots.sum(), bytes]
}

/// Comes to the end of a rearrangement.
fn finish(store: &mut ExpertStore) -> Rearranged {
    for _ in 0..100_000 {
        if let Some(ended) = store.continue_rearranging() {
            return ended;
        }
        std::thread::sleep(std::time::Duration::from_micros(20));
    }
    panic!("it comes to no end: {:?}", store.rearranging());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn experts_move_and_keep_their_bytes(
        plans in proptest::collection::vec((proptest::collection::vec(wanted(8), 3), steps()), 1..4),
        slots in 0usize..6,
        staging in prop_oneof![Just(0usize), 1usize..16],
        whole_pages in any::<bool>(),
        second in 0usize..6,
        places in [0usize..4, 0usize..4],
        failing in proptest::collection::vec(1u64..200, 0..8),
    ) {
        let layout = if whole_pages { Layout::WholePages } else { Layout::Packed };
        let setup = setup(slots, staging, layout);
        let mut store = store(&setup, &Reads::failing(failing));
        let room = add_tier(&mut store, second);
        add_gpus(&mut store, places);
        let all = held_bytes(&store);
        for (wanted, steps) in &plans {
            let plan = placements(&store, wanted, room, places);
            prop_assert_eq!(store.too_large(&plan), None);
            store.rearrange(&plan);
            let mut ended = None;
            for TestStep { used: Choice { layer, experts }, batch, .. } in steps {
                // A token's experts are all in flight at once, so staging must hold them.
                let batch = *batch || (staging > 0 && experts.len() > staging);
                let _ = take(&mut store, *layer, experts, batch);
                ended = store.continue_rearranging().or(ended);
                check_pins(&store);
                check_pins_on_gpus(&store);
            }
            let ended = ended.unwrap_or_else(|| finish(&mut store));
            check_pins(&store);
            check_pins_on_gpus(&store);
            for (tier, places) in GPUS.into_iter().zip(places) {
                for layer in 0..store.layers.len() {
                    prop_assert_eq!(store.places_on_gpu(layer, tier), places);
                }
            }
            check_arrangement(&store, &plan, ended);
            prop_assert_eq!(store.rearranging(), None);
            prop_assert_eq!(held_bytes(&store), all);
        }
    }
}

#[test]
fn scattered_holes_become_one() {
    // Pins of two layers lie between each other, and slots for whole pages are larger than pins.
    let setup = setup(3, 2, Layout::WholePages);
    let mut store = store(&setup, &Arc::default());
    let n_layers = store.layers.len();
    let plan = |pins: &[u32], slots: u32| -> Vec<LayerPlacement> {
        let layer = |layer| LayerPlacement {
            layer,
            pinned: vec![Pins {
                tier: TIERS[0],
                experts: pins.to_vec(),
            }],
            slots,
            slot_tier: TIERS[0],
            policy: SlotPolicy::Lru,
        };
        (0..n_layers as u32).map(layer).collect()
    };
    store.rearrange(&plan(&[0, 1, 2, 3, 4, 5, 6, 7], 0));
    assert_eq!(finish(&mut store).left_pins, 0);
    let odd = [1, 3, 5, 7];
    store.rearrange(&plan(&odd, 0));
    finish(&mut store);
    // The even experts have left holes that are smaller than a slot, and the memory behind the pins has
    // room for fewer slots than there are layers.
    let room = store.layers[0].buffer_bytes(Layout::WholePages);
    let dropped = 4 * n_layers * store.layers[0].expert_bytes();
    let behind = store.rearranger.free_bytes() - dropped;
    assert!(store.layers[0].expert_bytes() < room && behind / room < n_layers);
    store.rearrange(&plan(&odd, 1));
    let ended = finish(&mut store);
    assert_eq!((ended.left_slots, ended.left_pins), (0, 0));
    check_pins(&store);
    (0..n_layers).for_each(|layer| take(&mut store, layer, &[0, 1, 2, 3], false).unwrap());
}

#[test]
fn a_new_pin_is_copied_from_its_slot() {
    let setup = setup(2, 2, Layout::WholePages);
    // No read after the first two succeeds.
    let reads = Reads::failing(Vec::new());
    let mut store = store(&setup, &reads);
    add_tier(&mut store, 2);
    take(&mut store, 0, &[6, 7], false).unwrap();
    let n_reads = reads.lock().unwrap().count;
    reads.lock().unwrap().failing = (n_reads + 1..n_reads + 1000).collect();
    let mut plan = placements(&store, &[], [0, 0], [0, 0]);
    for layer in 0..store.layers.len() {
        let experts = if layer == 0 { vec![7] } else { Vec::new() };
        plan.push(LayerPlacement {
            layer: layer as u32,
            pinned: vec![Pins {
                tier: TIERS[1],
                experts,
            }],
            slots: 2,
            slot_tier: TIERS[0],
            policy: SlotPolicy::Lru,
        });
    }
    store.rearrange(&plan);
    let ended = finish(&mut store);
    assert_eq!(
        (ended.done_bytes, ended.failed_pins),
        (store.expert_bytes(0), 0)
    );
    check_pins(&store);
    let target = LayerExpert {
        layer: 0,
        expert: ExpertId::new(7),
    };
    assert!(matches!(
        store.layers[0].backing(target.expert),
        ExpertBacking::Pinned { tier, .. } if *tier == TIERS[1]
    ));
    let mut step = store.begin(0, &[6, 7], vec![6, 7]);
    assert_eq!((step.pinned_hits, step.slot_hits, step.misses), (1, 1, 0));
    (0..2).for_each(|at| store.release(&mut step, at));
    store.finish(&mut step).unwrap();
}

#[test]
fn a_slot_that_is_given_up_becomes_the_pin_of_its_expert() {
    for layout in [Layout::Packed, Layout::WholePages] {
        let setup = setup(3, 4, layout);
        let reads = Reads::failing(Vec::new());
        let mut store = store(&setup, &reads);
        let held = held_bytes(&store);
        (0..store.layers.len()).for_each(|l| take(&mut store, l, &[5, 6, 7], false).unwrap());
        let n_reads = reads.lock().unwrap().count;
        let layer = |layer| LayerPlacement {
            layer,
            pinned: vec![Pins {
                tier: TIERS[0],
                experts: vec![6, 7],
            }],
            slots: 1,
            slot_tier: TIERS[0],
            policy: SlotPolicy::Lru,
        };
        let plan: Vec<_> = (0..store.layers.len() as u32).map(layer).collect();
        store.rearrange(&plan);
        let ended = finish(&mut store);
        check_arrangement(&store, &plan, ended);
        check_pins(&store);
        assert_eq!(reads.lock().unwrap().count, n_reads, "nothing is read");
        for layer in 0..store.layers.len() {
            let mut step = store.begin(layer, &[5, 6, 7], vec![5, 6, 7]);
            assert_eq!((step.pinned_hits, step.slot_hits, step.misses), (2, 1, 0));
            (0..3).for_each(|at| {
                let (found, expected) = super::tests::shown(&store, &step, at);
                assert!(found == expected);
                store.release(&mut step, at);
            });
            store.finish(&mut step).unwrap();
        }
        assert_eq!(held_bytes(&store), held);
    }
}

#[test]
fn a_pin_that_buffers_have_no_room_for_stays_where_it_is() {
    let setup = setup(2, 2, Layout::WholePages);
    let mut store = store(&setup, &Arc::default());
    // A packed copy of the even experts, for buffers that hold no others.
    let layer = &mut store.layers[0];
    let places: Vec<_> = (0..8u64).map(|e| (e % 2 == 0).then_some(e << 16)).collect();
    layer.use_copy(1, &places, |expert| expert % 2 == 0);
    let bytes = layer.expert_bytes();
    let mut arena = Arena::new("pins", 2 * bytes as u64).unwrap();
    for expert in [2, 3] {
        layer.pin(expert, TIERS[0], arena.take(bytes).unwrap());
    }
    let too_large = |tier: TierIdx, experts: &[u32]| {
        let plan = LayerPlacement {
            layer: 0,
            pinned: vec![Pins {
                tier,
                experts: experts.to_vec(),
            }],
            slots: 2,
            slot_tier: TIERS[0],
            policy: SlotPolicy::Lru,
        };
        store.too_large(&[plan])
    };
    assert_eq!(too_large(TIERS[0], &[3]), None, "expert 2 is in the copy");
    assert_eq!(too_large(TIERS[0], &[2]), Some((0, 3)));
    let why = "it is on the slow tier until it is on the other one";
    assert_eq!(too_large(TIERS[1], &[2, 3]), Some((0, 3)), "{why}");
}
