//! Every policy against its contract in the plainest form, and against what an engine sees.

use super::*;
use proptest::prelude::*;

/// Generates distinct choices of up to `k` of `n` experts, token by token.
fn steps(n: u32, k: usize) -> impl Strategy<Value = Vec<Vec<u32>>> {
    let ids: Vec<u32> = (0..n).collect();
    let step = proptest::sample::subsequence(ids, 0..=k).prop_shuffle();
    proptest::collection::vec(step, 1..40)
}

/// Returns hits by the contract of LRU in its plainest form: all experts ever used, most recent
/// first.
fn naive(recent: &mut Vec<u32>, chosen: &[u32], n_slots: usize) -> Vec<bool> {
    let hits = chosen
        .iter()
        .map(|e| {
            recent
                .iter()
                .position(|r| r == e)
                .is_some_and(|p| p < n_slots)
        })
        .collect();
    for &e in chosen {
        recent.retain(|&r| r != e);
        recent.insert(0, e);
    }
    hits
}

proptest! {
    #[test]
    fn slots_hold_the_most_recent(steps in steps(9, 6), n_slots in 0u32..10) {
        let mut cache = SlotCache::new(9, n_slots, SlotPolicy::Lru);
        let (mut recent, mut out) = (Vec::new(), Vec::new());
        // What the slots hold by applying the accesses, as an engine does.
        let mut held = vec![None; n_slots as usize];
        for chosen in &steps {
            let before = held.clone();
            let hits = naive(&mut recent, chosen, n_slots as usize);
            cache.step(chosen, &mut out);
            prop_assert_eq!(out.len(), chosen.len());
            for ((access, &expert), hit) in out.iter().zip(chosen).zip(hits) {
                match *access {
                    Access::Hit { slot } => {
                        prop_assert!(hit);
                        prop_assert_eq!(before[slot as usize], Some(expert));
                    }
                    Access::Fill { slot, evicted } => {
                        prop_assert!(!hit);
                        prop_assert_eq!(held[slot as usize], evicted);
                        if chosen.len() <= n_slots as usize {
                            prop_assert!(evicted.is_none_or(|v| !chosen.contains(&v)));
                        }
                        held[slot as usize] = Some(expert);
                    }
                    Access::Staged => prop_assert!(!hit && chosen.len() > n_slots as usize),
                }
            }
            let resident: Vec<u32> = cache.resident().map(|(e, _)| e).rev().collect();
            prop_assert_eq!(&resident[..], &recent[..recent.len().min(n_slots as usize)]);
            for (expert, slot) in cache.resident() {
                prop_assert_eq!(held[slot as usize], Some(expert));
            }
        }
    }

    #[test]
    fn a_larger_cache_holds_what_a_smaller_one_does(steps in steps(8, 5), small in 0u32..8, more in 1u32..4) {
        let (mut a, mut b) = (SlotCache::new(8, small, SlotPolicy::Lru), SlotCache::new(8, small + more, SlotPolicy::Lru));
        let mut out = Vec::new();
        for chosen in &steps {
            a.step(chosen, &mut out);
            b.step(chosen, &mut out);
            prop_assert!(a.resident().all(|(e, _)| b.contains(e)));
        }
    }
}

#[test]
fn a_forgotten_expert_leaves_its_slot() {
    let mut cache = SlotCache::new(4, 2, SlotPolicy::Lru);
    let mut out = Vec::new();
    cache.step(&[3, 1], &mut out);
    cache.forget(3);
    cache.forget(0);
    assert_eq!(cache.resident().collect::<Vec<_>>(), [(1, 1)]);
    cache.step(&[3], &mut out);
    assert_eq!(
        out,
        [Access::Fill {
            slot: 0,
            evicted: None
        }]
    );
    cache.step(&[2], &mut out);
    assert_eq!(
        out,
        [Access::Fill {
            slot: 1,
            evicted: Some(1)
        }]
    );
}

#[test]
fn what_does_not_fit_is_staged_in_router_order() {
    let mut cache = SlotCache::new(4, 2, SlotPolicy::Lru);
    let mut out = Vec::new();
    cache.step(&[3, 1, 2], &mut out);
    assert_eq!(
        out,
        [
            Access::Staged,
            Access::Fill {
                slot: 0,
                evicted: None
            },
            Access::Fill {
                slot: 1,
                evicted: None
            }
        ]
    );
    cache.step(&[1, 0], &mut out);
    assert_eq!(
        out,
        [
            Access::Hit { slot: 0 },
            Access::Fill {
                slot: 1,
                evicted: Some(2)
            }
        ]
    );
}

#[test]
fn bad_input_does_no_harm() {
    let mut cache = SlotCache::new(3, 2, SlotPolicy::Lru);
    let mut out = Vec::new();
    cache.step(&[7, 1, 1, u32::MAX], &mut out);
    assert_eq!(out.len(), 4);
    assert_eq!((out[0], out[3]), (Access::Staged, Access::Staged));
    assert_eq!(cache.resident().count(), 1);
    assert_eq!(SlotCache::new(3, 9, SlotPolicy::Lru).n_slots(), 3);
}

/// Generates policies of each kind, with parameters at both ends of their ranges.
fn policies() -> impl Strategy<Value = SlotPolicy> {
    let half_life = || prop_oneof![1u32..40, Just(tier_plan_formats::placement::MAX_HALF_LIFE)];
    prop_oneof![
        Just(SlotPolicy::Lru),
        half_life().prop_map(|half_life| SlotPolicy::Lfu { half_life }),
        (half_life(), half_life(), 0u32..=1024).prop_map(
            |(half_life, recent_half_life, recent_weight)| {
                SlotPolicy::Adaptive {
                    half_life,
                    recent_half_life,
                    recent_weight,
                }
            }
        ),
    ]
}

/// Applies a step's accesses to the slots, as an engine does, and checks what every access must be
/// under any policy.
fn apply(
    held: &mut [Option<u32>],
    cache: &SlotCache,
    chosen: &[u32],
    out: &[Access],
) -> Result<(), TestCaseError> {
    prop_assert_eq!(out.len(), chosen.len());
    let before = held.to_vec();
    for (access, &expert) in out.iter().zip(chosen) {
        match *access {
            Access::Hit { slot } => prop_assert_eq!(before[slot as usize], Some(expert)),
            Access::Fill { slot, evicted } => {
                prop_assert!(!before.contains(&Some(expert)));
                prop_assert_eq!(held[slot as usize], evicted);
                if chosen.len() <= held.len() {
                    prop_assert!(evicted.is_none_or(|v| !chosen.contains(&v)));
                }
                held[slot as usize] = Some(expert);
            }
            Access::Staged => prop_assert!(!before.contains(&Some(expert))),
        }
    }
    let mut resident: Vec<(u32, u32)> = cache.resident().collect();
    resident.sort_by_key(|(_, slot)| *slot);
    let expected: Vec<(u32, u32)> = held
        .iter()
        .enumerate()
        .filter_map(|(slot, e)| e.map(|e| (e, slot as u32)))
        .collect();
    prop_assert_eq!(resident, expected);
    Ok(())
}

/// Returns the score of an expert by the formula: a use weighs half as much a half-life later.
fn score(policy: SlotPolicy, history: &[Vec<u32>], expert: u32) -> f64 {
    let decayed = |half_life: u32| -> f64 {
        let ages = history
            .iter()
            .rev()
            .enumerate()
            .filter(|(_, chosen)| chosen.contains(&expert));
        ages.map(|(age, _)| 0.5f64.powf(age as f64 / f64::from(half_life)))
            .sum()
    };
    match policy {
        SlotPolicy::Lru => history
            .iter()
            .rposition(|chosen| chosen.contains(&expert))
            .map_or(0.0, |at| at as f64 + 1.0),
        SlotPolicy::Lfu { half_life } => decayed(half_life),
        SlotPolicy::Adaptive {
            half_life,
            recent_half_life,
            recent_weight,
        } => decayed(half_life) + f64::from(recent_weight) * decayed(recent_half_life),
    }
}

/// Tokens in batches: a batch of one is a decoded token.
fn batches() -> impl Strategy<Value = Vec<Vec<Vec<u32>>>> {
    let token = proptest::sample::subsequence((0..9u32).collect::<Vec<_>>(), 3).prop_shuffle();
    let size = prop_oneof![4 => 1usize..2, 1 => 2usize..6];
    proptest::collection::vec(
        size.prop_flat_map(move |n| proptest::collection::vec(token.clone(), n)),
        1..40,
    )
}

/// Returns a batch's distinct experts in the order of their last use.
fn by_last_use(tokens: &[Vec<u32>]) -> Vec<u32> {
    let mut order: Vec<u32> = Vec::new();
    for expert in tokens.iter().flatten() {
        order.retain(|e| e != expert);
        order.push(*expert);
    }
    order
}

proptest! {
    #[test]
    fn the_slots_hold_the_highest_scores(policy in policies(), batches in batches(), n_slots in 0u32..10) {
        let mut cache = SlotCache::new(9, n_slots, policy);
        let (mut out, mut history) = (Vec::new(), Vec::new());
        let mut held = vec![None; n_slots as usize];
        for tokens in batches {
            let chosen = by_last_use(&tokens);
            let before: Vec<u32> = held.iter().flatten().copied().collect();
            if let [token] = &tokens[..] {
                cache.step(token, &mut out);
            } else {
                tokens.iter().for_each(|token| cache.note(token.iter().copied()));
                cache.settle(&chosen, &mut out);
            }
            apply(&mut held, &cache, &chosen, &out)?;
            history.extend(tokens);
            // Of what was there or was used nothing better than the worst resident is left out.
            let now: Vec<u32> = held.iter().flatten().copied().collect();
            let left_out = || before.iter().chain(&chosen).filter(|e| !now.contains(e));
            prop_assert!(left_out().next().is_none() || now.len() == n_slots as usize);
            let stays = |e: u32| chosen.len() <= n_slots as usize && before.contains(&e) && chosen.contains(&e);
            if policy != SlotPolicy::Lru {
                for (&inside, &outside) in now.iter().flat_map(|i| left_out().map(move |o| (i, o))) {
                    let (a, b) = (score(policy, &history, inside), score(policy, &history, outside));
                    prop_assert!(a >= b * (1.0 - 1e-3) || stays(inside), "{inside} has score {a}, {outside} {b}");
                }
            }
        }
    }

    /// With a half-life of a token every count is a whole number of units, so a plain sort gives
    /// the very same slots.
    #[test]
    fn a_plain_sort_agrees(batches in batches(), n_slots in 3u32..10) {
        let mut cache = SlotCache::new(9, n_slots, SlotPolicy::Lfu { half_life: 1 });
        let mut out = Vec::new();
        let (mut counts, mut last, mut resident, mut time) = ([0u64; 9], [0; 9], Vec::<u32>::new(), 0);
        for tokens in batches.iter().filter(|tokens| tokens.len() == 1) {
            let chosen = &tokens[0];
            counts.iter_mut().for_each(|count| *count /= 2);
            for &expert in chosen {
                time += 1;
                counts[expert as usize] += 1 << 16;
                last[expert as usize] = time;
            }
            let hits: Vec<bool> = chosen.iter().map(|e| resident.contains(e)).collect();
            let is_safe = |e: &u32| resident.contains(e) && chosen.contains(e);
            let mut best: Vec<u32> = (0..9).filter(|e| resident.contains(e) || chosen.contains(e)).collect();
            best.sort_by_key(|&e| std::cmp::Reverse((is_safe(&e), counts[e as usize], last[e as usize])));
            best.truncate(n_slots as usize);
            resident = best;
            cache.step(chosen, &mut out);
            prop_assert_eq!(hits, out.iter().map(|a| matches!(a, Access::Hit { .. })).collect::<Vec<_>>());
            let mut found: Vec<u32> = cache.resident().map(|(e, _)| e).collect();
            prop_assert!(found.is_sorted_by_key(|&e| (counts[e as usize], last[e as usize])));
            found.sort_unstable();
            resident.sort_unstable();
            prop_assert_eq!(&found, &resident);
        }
    }

    #[test]
    fn a_batch_of_one_is_a_token(policy in policies(), steps in steps(9, 6), n_slots in 0u32..10) {
        let (mut a, mut b) = (SlotCache::new(9, n_slots, policy), SlotCache::new(9, n_slots, policy));
        let (mut of_a, mut of_b) = (Vec::new(), Vec::new());
        for chosen in &steps {
            a.step(chosen, &mut of_a);
            b.note(chosen.iter().copied());
            b.settle(chosen, &mut of_b);
            prop_assert_eq!(&of_a, &of_b);
        }
    }

    #[test]
    fn what_is_forgotten_is_filled_again(
        policy in policies(),
        steps in steps(9, 6),
        forgotten in proptest::collection::vec(0u32..12, 40),
        n_slots in 1u32..10,
    ) {
        let mut cache = SlotCache::new(9, n_slots, policy);
        let mut out = Vec::new();
        let mut held = vec![None; n_slots as usize];
        for (chosen, lost) in steps.iter().zip(forgotten) {
            cache.step(chosen, &mut out);
            apply(&mut held, &cache, chosen, &out)?;
            cache.forget(lost);
            held.iter_mut().filter(|h| **h == Some(lost)).for_each(|h| *h = None);
        }
    }
}

#[test]
fn a_single_use_does_not_drive_out_a_favorite() {
    for policy in [
        SlotPolicy::Lfu { half_life: 16 },
        SlotPolicy::Adaptive {
            half_life: 64,
            recent_half_life: 2,
            recent_weight: 1,
        },
    ] {
        let mut cache = SlotCache::new(4, 2, policy);
        let mut out = Vec::new();
        for _ in 0..4 {
            cache.step(&[0, 1], &mut out);
        }
        cache.step(&[2], &mut out);
        assert_eq!(out, [Access::Staged], "{policy:?}");
        assert!(cache.contains(0) && cache.contains(1) && !cache.contains(2));
        // Asked for again and again, it gets a slot.
        let mut asked = 1;
        while !cache.contains(2) {
            cache.step(&[2], &mut out);
            asked += 1;
        }
        assert!((2..30).contains(&asked), "{policy:?} {asked}");
    }
}

#[test]
fn bad_input_does_no_harm_to_any_policy() {
    for policy in [
        SlotPolicy::Lfu { half_life: 0 },
        SlotPolicy::Adaptive {
            half_life: u32::MAX,
            recent_half_life: 0,
            recent_weight: u32::MAX,
        },
    ] {
        let mut cache = SlotCache::new(3, 2, policy);
        let mut out = Vec::new();
        for _ in 0..1000 {
            cache.step(&[7, 1, 1, u32::MAX], &mut out);
            assert_eq!(
                (out.len(), out[0], out[3]),
                (4, Access::Staged, Access::Staged)
            );
            assert_eq!(cache.resident().count(), 1);
        }
        cache.step(&[0, 1, 2], &mut out);
        assert_eq!(cache.resident().count(), 2);
    }
}
