//! Passes over all layers with reads ahead of the routers: whatever is predicted, and wherever a pass
//! ends early, an expert computes from the bytes of the file, and nothing is read twice.

use super::ids::ExpertId;
use super::layer::Layout;
use super::prefetch::Foresight;
use super::step::ExpertState;
use super::store::ExpertStore;
use super::tests::{Reads, Setup, check_buffers, drain, fixture, setup, shown, store};
use proptest::prelude::*;
use std::sync::{Arc, Mutex};
use tier_plan_formats::placement::SlotPolicy;

/// Experts per layer, and layers, of the fixture.
fn sizes() -> (u32, usize) {
    let (_, spec, _) = fixture();
    let moes: Vec<_> = spec.moe_layers().map(|(_, moe)| moe.n_expert).collect();
    (moes[0] as u32, moes.len())
}

/// One layer's part in a pass.
#[derive(Clone, Debug)]
struct Visit {
    /// In order of last use.
    used: Vec<u32>,
    /// Of the layer, made before the layer before it computes.
    predicted: Vec<u32>,
    from: Foresight,
    /// The pass ends before the layer's expert at this position computes.
    canceled_at: Option<usize>,
}

/// Computes a layer's experts in order, up to where the pass is canceled. Returns whether all were.
fn visit(store: &mut ExpertStore, layer: usize, visit: &Visit) -> bool {
    let chosen: Vec<u16> = visit.used.iter().map(|e| *e as u16).collect();
    store.note(layer, &chosen);
    let mut order = visit.used.clone();
    order.sort_unstable();
    let mut step = store.begin(layer, &visit.used, order);
    for at in 0..visit.used.len() {
        if visit.canceled_at == Some(at) {
            store.give_up(&mut step);
            return false;
        }
        while !step.is_ready(at) {
            if store.wait(&mut step).is_err() {
                return false;
            }
        }
        let (found, expected) = shown(store, &step, at);
        assert!(found == expected, "{at} of layer {layer}");
        store.release(&mut step, at);
    }
    store.finish(&mut step).is_ok()
}

/// Takes a pass through the layers. Returns whether it came to its end.
fn pass(store: &mut ExpertStore, visits: &[Visit]) -> bool {
    // Without effect where the slots have most experts.
    store.read_most(0, 4, 1000);
    for (layer, here) in visits.iter().enumerate() {
        if let Some(next) = visits.get(layer + 1) {
            store.wants_prediction(true);
            store.predict(layer + 1, next.predicted.iter().copied(), next.from);
        }
        if !visit(store, layer, here) {
            return false;
        }
    }
    true
}

fn visits() -> impl Strategy<Value = Vec<Visit>> {
    let (n, layers) = sizes();
    let experts =
        || proptest::sample::subsequence((0..n).collect::<Vec<_>>(), 1..=n as usize).prop_shuffle();
    let from = prop_oneof![
        Just(Foresight::Batch),
        Just(Foresight::Exact),
        Just(Foresight::Share)
    ];
    // Most predictions come true in part, as those of routers do.
    let visit = (
        experts(),
        experts(),
        any::<bool>(),
        from,
        proptest::option::weighted(0.1, 0..n as usize),
    );
    let visit = visit.prop_map(|(used, other, is_right, from, canceled_at)| {
        let mut predicted = if is_right { used.clone() } else { other };
        predicted.sort_unstable();
        Visit {
            used,
            predicted,
            from,
            canceled_at,
        }
    });
    proptest::collection::vec(visit, layers)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn reads_ahead_change_no_bytes(
        passes in proptest::collection::vec(visits(), 1..6),
        slots in 0usize..9,
        staging in 1usize..8,
        whole_pages in any::<bool>(),
        copy in proptest::option::of(any::<bool>()),
        policy in prop_oneof![Just(SlotPolicy::Lru), Just(SlotPolicy::Lfu { half_life: 4 })],
        failing in proptest::collection::vec(1u64..200, 0..3),
        slow_every in 0u64..5,
        warm in any::<bool>(),
    ) {
        let layout = if whole_pages { Layout::WholePages } else { Layout::Packed };
        let setup = Setup { policy, copy, ..setup(slots, staging, layout) };
        let reads = Reads::failing(failing);
        reads.lock().unwrap().slow_every = slow_every;
        let mut store = store(&setup, &reads);
        for (number, visits) in passes.iter().enumerate() {
            if warm && number == 1 {
                store.warm_up(&[(0, vec![0, 1, 2, 3]), (1, vec![5, 4])]).unwrap();
            }
            let is_canceled = visits.iter().any(|v| v.canceled_at.is_some_and(|at| at < v.used.len()));
            let has_ended = pass(&mut store, visits);
            prop_assert!(!has_ended || !is_canceled);
            check_buffers(&store, staging);
            // What a slot is said to hold, it holds.
            for (at, layer) in store.layers.iter().enumerate() {
                for (expert, slot) in layer.cache.resident() {
                    let Some(bytes) = &layer.slots[slot as usize] else {
                        panic!("slot {slot} of layer {at} holds expert {expert}, and is lent");
                    };
                    for part in &layer.parts {
                        let place = layer.slice_location(&store.gguf, part, expert as usize, layer.layout);
                        let all = store.gguf.bytes(&store.gguf.tensors()[part.tensor]);
                        let expected = &all[expert as usize * part.slice_bytes..][..part.slice_bytes];
                        prop_assert!(&bytes[place.buffer_offset..][..part.slice_bytes] == expected);
                    }
                }
            }
        }
        drain(&mut store, staging);
    }
}

/// Returns a pass in which every prediction is right.
fn foreseen(used: &[Vec<u32>]) -> Vec<Visit> {
    let visit = |used: &Vec<u32>| {
        let mut predicted = used.clone();
        predicted.sort_unstable();
        Visit {
            used: used.clone(),
            predicted,
            from: Foresight::Batch,
            canceled_at: None,
        }
    };
    used.iter().map(visit).collect()
}

#[test]
fn a_cold_prompt_reads_every_byte_once() {
    let (n, layers) = sizes();
    for (slots, staging) in [
        (0, 4),
        (3, 4),
        (n as usize / 2, 3),
        (n as usize, 3),
        (5, 16),
    ] {
        for slow_every in [0, 3] {
            let reads = Arc::new(Mutex::new(Reads {
                slow_every,
                ..Reads::default()
            }));
            let mut store = store(&setup(slots, staging, Layout::Packed), &reads);
            let backwards: Vec<u32> = (0..n).rev().collect();
            assert!(pass(&mut store, &foreseen(&vec![backwards; layers])));
            drain(&mut store, staging);
            let mut log = std::mem::take(&mut reads.lock().unwrap().log);
            log.sort_unstable();
            let ends = log.iter().map(|(offset, len)| offset + *len as u64);
            let starts = log.iter().skip(1).map(|(offset, _)| *offset);
            assert!(ends.zip(starts).all(|(end, start)| end <= start), "twice");
            let bytes: u64 = log.iter().map(|(_, len)| *len as u64).sum();
            let all = (0..layers).map(|l| store.expert_bytes(l) * u64::from(n));
            assert_eq!(bytes, all.sum::<u64>(), "{slots} slots, {staging} staging");
            // The next pass finds what the slots kept.
            let before = reads.lock().unwrap().count;
            let kept: Vec<Vec<u32>> = store.residents();
            if 2 * slots > n as usize {
                assert!(pass(&mut store, &foreseen(&kept)));
                let after = reads.lock().unwrap().count;
                assert_eq!(before, after, "{slots} slots, {staging} staging");
            }
            drain(&mut store, staging);
        }
    }
}

#[test]
fn empty_slots_take_what_staging_has_no_room_for() {
    let (n, layers) = sizes();
    let slots = n as usize - 2;
    let reads = Arc::default();
    let mut store = store(&setup(slots, 3, Layout::WholePages), &reads);
    let all: Vec<u32> = (0..n).collect();
    store.predict(1, all.iter().copied(), Foresight::Batch);
    store.start_predicted();
    assert_eq!(
        store.prefetcher.prefetches.len(),
        slots + 1,
        "and one in staging"
    );
    assert!(layers > 1 && store.layers[1].cache.resident().next().is_none());
    // No step has begun, so all of them land.
    while store.prefetcher.is_reading() {
        let completion = store.files.as_ref().unwrap().wait().unwrap();
        assert!(store.take_completion(completion).is_none());
    }
    // The most recent ones stay: all but the first two, of which one computes in a borrowed slot.
    let mut step = store.begin(1, &all, all.clone());
    let n_ready = (0..n as usize).filter(|at| step.is_ready(*at)).count();
    assert_eq!((step.misses, n_ready), (u64::from(n), slots + 1));
    let n_in_slots =
        (0..n as usize).filter(|at| matches!(step.states[*at], ExpertState::InSlot(_)));
    assert_eq!(n_in_slots.count(), slots);
    for at in 0..n as usize {
        while !step.is_ready(at) {
            store.wait(&mut step).unwrap();
        }
        let (found, expected) = shown(&store, &step, at);
        assert!(found == expected, "{at}");
        store.release(&mut step, at);
    }
    store.finish(&mut step).unwrap();
    let kept = |expert: u32| store.layers[1].cache.contains(expert);
    assert!(all.iter().all(|e| kept(*e) == (*e >= 2)));
    let count = store.take_prefetch_count();
    assert_eq!(
        (count.useful, count.in_time),
        (slots as u64 + 1, slots as u64 + 1)
    );
    assert!(store.layers[1].is_pooled(ExpertId::new(0)));
}
