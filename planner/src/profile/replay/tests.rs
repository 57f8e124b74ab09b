use super::*;
use crate::profile::tests::profile_of;
use proptest::prelude::*;
use tier_plan_runtime::formats::profile::Split;

/// Prompts of one layer: each `(prompt tokens, decoded tokens)` of distinct choices.
fn traces(
    n: u16,
    k: usize,
) -> impl proptest::strategy::Strategy<Value = Vec<(usize, Vec<Vec<u16>>)>> {
    let ids: Vec<u16> = (0..n).collect();
    let token = proptest::sample::subsequence(ids, k).prop_shuffle();
    proptest::collection::vec((0usize..4, proptest::collection::vec(token, 4..12)), 1..4)
}

fn trace(n: u16, k: usize, prompts: &[(usize, Vec<Vec<u16>>)]) -> LayerTrace {
    let prompts: Vec<_> = prompts
        .iter()
        .map(|(first, tokens)| {
            (
                Split::HeldOut,
                *first,
                tokens.iter().map(|t| vec![t.clone()]).collect(),
            )
        })
        .collect();
    LayerTrace::new(&profile_of(u32::from(n), k as u32, 1, &prompts), 0, |_| {
        true
    })
}

/// Hits by stepping a cache, and the most any sequence of contents could hit.
fn step_hits(trace: &LayerTrace, pinned: &[bool], slots: u32) -> u64 {
    let mut cache = SlotCache::new(trace.n_expert() as u32, slots, SlotPolicy::Lru);
    let (mut out, mut hits) = (Vec::new(), 0);
    for (chosen, counted) in trace.steps() {
        let pooled: Vec<u32> = chosen
            .iter()
            .filter(|&&e| !pinned[usize::from(e)])
            .map(|&e| e.into())
            .collect();
        cache.step(&pooled, &mut out);
        let found = out
            .iter()
            .filter(|a| matches!(a, Access::Hit { .. }))
            .count();
        hits += if counted { found as u64 } else { 0 };
    }
    hits
}

/// Best over all contents after every step, by trying them all.
fn best_hits(trace: &LayerTrace, room: u32) -> u64 {
    let n = trace.n_expert();
    let fits = |set: &usize| set.count_ones() <= room;
    let mut best: Vec<Option<u64>> = (0..1 << n)
        .map(|set: usize| fits(&set).then_some(0))
        .collect();
    for (chosen, counted) in trace.steps() {
        let asked = chosen.iter().fold(0usize, |set, &e| set | 1 << e);
        let mut then = vec![None; 1 << n];
        for (set, value) in best.iter().enumerate() {
            let Some(value) = value else { continue };
            let hits = if counted {
                u64::from((set & asked).count_ones())
            } else {
                0
            };
            for to in (0..1usize << n).filter(|to| to & !(set | asked) == 0 && fits(to)) {
                then[to] = then[to].max(Some(value + hits));
            }
        }
        best = then;
    }
    best.into_iter().flatten().max().unwrap_or(0)
}

proptest! {
    #[test]
    fn one_pass_equals_stepping_every_cache(prompts in traces(9, 3), pins in proptest::collection::vec(any::<bool>(), 9)) {
        let trace = trace(9, 3, &prompts);
        let positions = Positions::new(&trace, &pins);
        prop_assert_eq!(&positions, &Positions::timed::<i32>(&trace, &pins));
        for (slots, hits) in positions.hit_curve(10).into_iter().enumerate() {
            prop_assert_eq!(hits, step_hits(&trace, &pins, slots as u32));
            prop_assert_eq!(hits, super::hits(&trace, &pins, slots as u32, SlotPolicy::Lru));
        }
    }

    #[test]
    fn the_ceiling_is_the_best_of_all_contents(prompts in traces(5, 2), room in 0u32..6) {
        let trace = trace(5, 2, &prompts);
        prop_assert_eq!(ceiling(&trace, room as usize), best_hits(&trace, room));
    }
}

/// Prompts are counted token by token, and decoded tokens are the only ones that hit.
#[test]
fn prompts_teach_and_are_not_judged() {
    // Expert 4 is the last of the prompt; 0 and 1 are what it uses most.
    let mut prompt = vec![vec![0, 1]; 6];
    prompt.push(vec![4, 2]);
    let decoded = vec![vec![3, 2], vec![0, 1]];
    let trace = trace(5, 2, &[(7, [prompt, decoded].concat())]);
    assert_eq!((trace.choices(), trace.events().count()), (18, 3));
    let pinned = [false; 5];
    // LRU has 4 and 2, then 3 and 2; the others keep 0 and 1.
    assert_eq!(hits(&trace, &pinned, 2, SlotPolicy::Lru), 1);
    for policy in [
        SlotPolicy::Lfu { half_life: 16 },
        SlotPolicy::Adaptive {
            half_life: 64,
            recent_half_life: 2,
            recent_weight: 1,
        },
    ] {
        assert_eq!(hits(&trace, &pinned, 2, policy), 2, "{policy}");
        let curve = hit_curve(&trace, &pinned, 5, policy);
        assert_eq!(
            curve.iter().map(|(slots, _)| *slots).collect::<Vec<_>>(),
            [0, 1, 2, 3, 4, 5]
        );
        assert_eq!((curve[0].1, curve[2].1, curve[5].1), (0, 2, 3));
    }
}

#[test]
fn a_trace_longer_than_the_clock_is_replayed_alike() {
    let mut random = crate::profile::synthetic::Random::new(9);
    let mut token = || {
        let first = random.below(30);
        [first as u16, (first + 1 + random.below(29)) as u16 % 30]
    };
    let chosen: Vec<u16> = (0..40_000).flat_map(|_| token()).collect();
    let trace = LayerTrace::made_up(30, 2, &[], chosen);
    assert_eq!(
        Positions::timed::<i16>(&trace, &[false; 30]),
        Positions::timed::<i32>(&trace, &[false; 30])
    );
}

#[test]
fn renumbering_keeps_positions() {
    let mut recency = Recency::<i16>::new(5);
    for e in [3, 1, 4, 1] {
        recency.touch(e);
    }
    let before: Vec<u16> = (0..5).map(|e| recency.position(e)).collect();
    recency.renumber();
    assert_eq!(
        before,
        (0..5).map(|e| recency.position(e)).collect::<Vec<_>>()
    );
    assert_eq!(before, [COLD, 0, COLD, 2, 1]);
    recency.now = i16::LAST + 1;
    recency.touch(0);
    assert_eq!(
        [
            recency.position(0),
            recency.position(1),
            recency.position(3)
        ],
        [0, 1, 3]
    );
}
