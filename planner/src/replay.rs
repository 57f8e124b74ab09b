//! Replays recorded routing through a layer's pins and slots.
//!
//! Slots are the stack algorithm of [`tier_plan_runtime::exec::slots`]: a choice hits exactly when fewer than
//! `slots` pooled experts were used more recently. So one pass over the trace finds, for each choice, how many that
//! are, and with it the hits of *every* number of slots.
//!
//! Slots start empty and persist over the prompts in the order given. A prompt is a batch of its distinct experts in
//! the order of their last use: it changes what the slots hold, but only decoded tokens are counted.

use std::collections::BTreeSet;
use tier_plan_runtime::formats::profile::{Profile, PromptTrace};

/// The recency position of an expert that was never used before: beyond any number of slots.
pub const COLD: u16 = u16::MAX;

/// One prompt in one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Segment {
    /// Distinct experts of the prompt's tokens, the one whose last use is earliest first.
    touched: Vec<u16>,
    /// Decoded tokens after it.
    decoded: usize,
}

/// The recorded choices of one layer, over some prompts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerTrace {
    n_expert: usize,
    n_used: usize,
    segments: Vec<Segment>,
    /// `[decoded token, used]` in router order.
    chosen: Vec<u16>,
    /// `[n_expert]` uses by prompt tokens.
    prompt_uses: Vec<u64>,
    prompt_tokens: u64,
}

impl LayerTrace {
    /// The choices of the profile's layer at position `layer`, over the prompts that `wanted` takes. The profile must
    /// have been checked against its own sizes.
    pub fn new(profile: &Profile, layer: usize, wanted: impl Fn(&PromptTrace) -> bool) -> Self {
        let mut trace = LayerTrace {
            n_expert: profile.n_expert as usize,
            n_used: profile.n_used as usize,
            segments: Vec::new(),
            chosen: Vec::new(),
            prompt_uses: vec![0; profile.n_expert as usize],
            prompt_tokens: 0,
        };
        for (at, prompt) in profile.prompts.iter().enumerate().filter(|(_, p)| wanted(p)) {
            let (first, decoded) = (prompt.prompt_tokens as usize, prompt.decode_tokens as usize);
            let mut seen = vec![false; trace.n_expert];
            let mut touched = Vec::new();
            for token in (0..first).rev() {
                for &expert in profile.chosen(at, token, layer).iter().rev() {
                    trace.prompt_uses[usize::from(expert)] += 1;
                    if !std::mem::replace(&mut seen[usize::from(expert)], true) {
                        touched.push(expert);
                    }
                }
            }
            touched.reverse();
            trace.prompt_tokens += first as u64;
            for token in first..first + decoded {
                trace.chosen.extend_from_slice(profile.chosen(at, token, layer));
            }
            trace.segments.push(Segment { touched, decoded });
        }
        trace
    }

    /// Made-up choices: `warm_up` (`[token, used]`) fills the slots as a prompt does, `chosen` (the same shape) is
    /// judged. All experts are below `n_expert`, and those of a token different.
    pub fn made_up(n_expert: usize, n_used: usize, warm_up: &[u16], chosen: Vec<u16>) -> Self {
        let mut seen = vec![false; n_expert];
        let mut touched: Vec<u16> =
            warm_up.iter().rev().copied().filter(|&e| !std::mem::replace(&mut seen[usize::from(e)], true)).collect();
        touched.reverse();
        let segments = vec![Segment { touched, decoded: chosen.len() / n_used.max(1) }];
        LayerTrace { n_expert, n_used, segments, chosen, prompt_uses: vec![0; n_expert], prompt_tokens: 0 }
    }

    /// Decoded tokens.
    pub fn tokens(&self) -> usize {
        self.segments.iter().map(|s| s.decoded).sum()
    }

    /// Experts in the layer.
    pub fn n_expert(&self) -> usize {
        self.n_expert
    }

    /// Experts a token uses.
    pub fn n_used(&self) -> usize {
        self.n_used
    }

    /// The steps in order: `(choices, counted)`, where a prompt's batch is not counted.
    pub fn steps(&self) -> impl Iterator<Item = (&[u16], bool)> + '_ {
        let mut rest = &self.chosen[..];
        self.segments.iter().flat_map(move |segment| {
            let (decoded, after) = rest.split_at(segment.decoded * self.n_used);
            rest = after;
            let prompt = (!segment.touched.is_empty()).then_some((&segment.touched[..], false));
            prompt.into_iter().chain(decoded.chunks_exact(self.n_used.max(1)).map(|c| (c, true)))
        })
    }

    /// `[n_expert]` share of decoded tokens that choose each expert.
    pub fn decode_share(&self) -> Vec<f64> {
        let mut uses = vec![0u64; self.n_expert];
        for &expert in &self.chosen {
            uses[usize::from(expert)] += 1;
        }
        let tokens = self.tokens().max(1) as f64;
        uses.iter().map(|&n| n as f64 / tokens).collect()
    }

    /// `[n_expert]` share of prompt tokens that choose each expert, if there are any.
    pub fn prompt_share(&self) -> Option<Vec<f64>> {
        let tokens = self.prompt_tokens as f64;
        (self.prompt_tokens > 0).then(|| self.prompt_uses.iter().map(|&n| n as f64 / tokens).collect())
    }
}

/// How many pooled experts were used more recently than each pooled choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Positions {
    /// `[pooled choice]` in router order, token after token; [`COLD`] at a first use.
    at: Vec<u16>,
    /// `[decoded token + 1]` where each token's choices start.
    starts: Vec<u32>,
}

impl Positions {
    /// Replays the trace with the pinned experts (`[n_expert]`) taken out of the pool.
    pub fn new(trace: &LayerTrace, pinned: &[bool]) -> Self {
        let mut recency = Recency::new(trace.n_expert);
        let mut at = Vec::with_capacity(trace.chosen.len());
        let mut starts = Vec::with_capacity(trace.tokens() + 1);
        for (chosen, counted) in trace.steps() {
            let pooled = || chosen.iter().map(|&e| usize::from(e)).filter(|&e| !pinned[e]);
            if counted {
                starts.push(at.len() as u32);
                at.extend(pooled().map(|e| recency.position(e)));
            }
            pooled().for_each(|e| recency.touch(e));
        }
        starts.push(at.len() as u32);
        Positions { at, starts }
    }

    /// Decoded tokens.
    pub fn tokens(&self) -> usize {
        self.starts.len() - 1
    }

    /// The positions of one token's pooled choices, in router order.
    pub fn token(&self, token: usize) -> &[u16] {
        &self.at[self.starts[token] as usize..self.starts[token + 1] as usize]
    }

    /// Pooled choices in all.
    pub fn accesses(&self) -> usize {
        self.at.len()
    }

    /// `[most + 1]` hits for 0, 1, ... `most` slots.
    pub fn hit_curve(&self, most: usize) -> Vec<u64> {
        let mut curve = vec![0u64; most + 1];
        for &position in &self.at {
            if let Some(hits) = curve.get_mut(usize::from(position) + 1) {
                *hits += 1;
            }
        }
        let mut sum = 0;
        for hits in &mut curve {
            sum += *hits;
            *hits = sum;
        }
        curve
    }
}

/// When each expert was last used. Counting the later ones is a straight pass over at most some thousand integers,
/// which the compiler vectorises; a tree would not pay at these sizes.
struct Recency {
    /// `[n_expert]` time of last use, -1 when never.
    last: Vec<i32>,
    now: i32,
}

impl Recency {
    fn new(n_expert: usize) -> Self {
        Recency { last: vec![-1; n_expert], now: 0 }
    }

    fn position(&self, expert: usize) -> u16 {
        let time = self.last[expert];
        if time < 0 {
            return COLD;
        }
        self.last.iter().map(|&other| u16::from(other > time)).sum()
    }

    fn touch(&mut self, expert: usize) {
        if self.now == i32::MAX {
            self.renumber();
        }
        self.last[expert] = self.now;
        self.now += 1;
    }

    /// Keeps the order and starts counting from 0 again.
    fn renumber(&mut self) {
        let mut used: Vec<usize> = (0..self.last.len()).filter(|&e| self.last[e] >= 0).collect();
        used.sort_by_key(|&e| self.last[e]);
        self.now = used.len() as i32;
        for (time, expert) in used.into_iter().enumerate() {
            self.last[expert] = time as i32;
        }
    }
}

/// The most hits that any policy could have with `room` experts resident, the future known: the residents with the
/// nearest next use are kept (L. A. Belády, 1966), a token's choices are looked up together, and what is resident at
/// the start is chosen freely too. An upper bound for every mix of pins and slots of the same bytes.
pub fn ceiling(trace: &LayerTrace, room: usize) -> u64 {
    let steps: Vec<(&[u16], bool)> = trace.steps().collect();
    // The step of the next counted use after each use, if it comes before a prompt's; found from the end.
    let mut next = vec![u32::MAX; trace.n_expert];
    let mut after: Vec<Vec<u32>> = Vec::with_capacity(steps.len());
    for (at, (chosen, counted)) in steps.iter().enumerate().rev() {
        after.push(chosen.iter().map(|&e| next[usize::from(e)]).collect());
        // A prompt brings its experts in for nothing, so there is no use in having kept one for it.
        let when = if *counted { at as u32 } else { u32::MAX };
        chosen.iter().for_each(|&e| next[usize::from(e)] = when);
    }
    after.reverse();

    let mut resident: BTreeSet<(u32, u16)> = (0..trace.n_expert).map(|e| (next[e], e as u16)).collect();
    let mut due = next;
    let shrink = |resident: &mut BTreeSet<(u32, u16)>| {
        while resident.len() > room {
            resident.pop_last();
        }
    };
    shrink(&mut resident);
    let mut hits = 0;
    for ((chosen, counted), after) in steps.iter().zip(&after) {
        for (&expert, &then) in chosen.iter().zip(after) {
            let was = resident.remove(&(due[usize::from(expert)], expert));
            hits += u64::from(was && *counted);
            due[usize::from(expert)] = then;
        }
        resident.extend(chosen.iter().zip(after).map(|(&expert, &then)| (then, expert)));
        shrink(&mut resident);
    }
    hits
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::profile::tests::profile_of;
    use proptest::prelude::*;
    use tier_plan_runtime::exec::slots::{Access, SlotCache};
    use tier_plan_runtime::formats::profile::Split;

    /// Prompts of one layer: each `(prompt tokens, decoded tokens)` of distinct choices.
    fn traces(n: u16, k: usize) -> impl proptest::strategy::Strategy<Value = Vec<(usize, Vec<Vec<u16>>)>> {
        let ids: Vec<u16> = (0..n).collect();
        let token = proptest::sample::subsequence(ids, k).prop_shuffle();
        proptest::collection::vec((0usize..4, proptest::collection::vec(token, 4..12)), 1..4)
    }

    fn trace(n: u16, k: usize, prompts: &[(usize, Vec<Vec<u16>>)]) -> LayerTrace {
        let prompts: Vec<_> = prompts
            .iter()
            .map(|(first, tokens)| (Split::HeldOut, *first, tokens.iter().map(|t| vec![t.clone()]).collect()))
            .collect();
        LayerTrace::new(&profile_of(u32::from(n), k as u32, 1, &prompts), 0, |_| true)
    }

    /// Hits by stepping a cache, and the most any sequence of contents could hit.
    fn step_hits(trace: &LayerTrace, pinned: &[bool], slots: u32) -> u64 {
        let mut cache = SlotCache::new(trace.n_expert() as u32, slots);
        let (mut out, mut hits) = (Vec::new(), 0);
        for (chosen, counted) in trace.steps() {
            let pooled: Vec<u32> = chosen.iter().filter(|&&e| !pinned[usize::from(e)]).map(|&e| e.into()).collect();
            cache.step(&pooled, &mut out);
            let found = out.iter().filter(|a| matches!(a, Access::Hit { .. })).count();
            hits += if counted { found as u64 } else { 0 };
        }
        hits
    }

    /// Best over all contents after every step, by trying them all.
    fn best_hits(trace: &LayerTrace, room: u32) -> u64 {
        let n = trace.n_expert();
        let fits = |set: &usize| set.count_ones() <= room;
        let mut best: Vec<Option<u64>> = (0..1 << n).map(|set: usize| fits(&set).then_some(0)).collect();
        for (chosen, counted) in trace.steps() {
            let asked = chosen.iter().fold(0usize, |set, &e| set | 1 << e);
            let mut then = vec![None; 1 << n];
            for (set, value) in best.iter().enumerate() {
                let Some(value) = value else { continue };
                let hits = if counted { u64::from((set & asked).count_ones()) } else { 0 };
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
            for (slots, hits) in positions.hit_curve(10).into_iter().enumerate() {
                prop_assert_eq!(hits, step_hits(&trace, &pins, slots as u32));
            }
        }

        #[test]
        fn the_ceiling_is_the_best_of_all_contents(prompts in traces(5, 2), room in 0u32..6) {
            let trace = trace(5, 2, &prompts);
            prop_assert_eq!(ceiling(&trace, room as usize), best_hits(&trace, room));
        }
    }

    #[test]
    fn renumbering_keeps_positions() {
        let mut recency = Recency::new(5);
        for e in [3, 1, 4, 1] {
            recency.touch(e);
        }
        let before: Vec<u16> = (0..5).map(|e| recency.position(e)).collect();
        recency.renumber();
        assert_eq!(before, (0..5).map(|e| recency.position(e)).collect::<Vec<_>>());
        assert_eq!(before, [COLD, 0, COLD, 2, 1]);
        recency.now = i32::MAX;
        recency.touch(0);
        assert_eq!([recency.position(0), recency.position(1), recency.position(3)], [0, 1, 3]);
    }
}
