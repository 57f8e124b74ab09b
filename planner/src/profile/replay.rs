//! Replays recorded routing through a layer's pins and slots.
//!
//! LRU slots are a stack algorithm (R. L. Mattson and others, 1970): a choice hits exactly when
//! fewer than `slots` pooled experts were used more recently. That number is the choice's stack
//! distance, or position. One pass over the trace ([`Positions`]) finds it for each choice, and
//! with it the hits of *every* number of slots. For the other policies the engine's own cache is
//! stepped ([`play`]), once per number of slots.
//!
//! Slots start empty and persist over the prompts in the order given. A prompt is a batch of its
//! distinct experts in the order of their last use. It changes what the slots hold, but only
//! decoded tokens are counted. The engine takes prompts of more than 512 tokens in several batches,
//! and policies other than LRU decide anew after each. Here a prompt is one batch, however long.

use std::collections::BTreeSet;
use tier_plan_runtime::experts::cache::{Access, SlotCache};
use tier_plan_runtime::formats::placement::SlotPolicy;
use tier_plan_runtime::formats::profile::{Profile, PromptTrace};

/// Position of an expert that was never used before: beyond any number of slots.
pub const COLD: u16 = u16::MAX;

/// One prompt in one layer, with what was decoded after it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Segment {
    /// Distinct experts of the prompt's tokens, the earliest last use first.
    touched: Vec<u16>,
    /// Tokens of the prompt.
    prompt: usize,
    /// Tokens decoded after the prompt.
    decoded: usize,
}

/// One step of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// A prompt, which is not counted.
    Prompt {
        /// `[token, used]` choices of the prompt's tokens.
        tokens: &'a [u16],
        /// Distinct experts of the prompt, the earliest last use first.
        touched: &'a [u16],
    },
    /// A decoded token's choices in router order.
    Token(&'a [u16]),
}

/// Recorded choices of one layer, over some prompts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerTrace {
    n_expert: usize,
    n_used: usize,
    segments: Vec<Segment>,
    /// `[decoded token, used]` in router order.
    chosen: Vec<u16>,
    /// `[prompt token, used]` in router order.
    prompt_chosen: Vec<u16>,
    /// `[n_expert]` uses by prompt tokens.
    prompt_uses: Vec<u64>,
    prompt_tokens: u64,
}

impl LayerTrace {
    /// Reads the choices of the profile's layer at position `layer`, over the prompts that `wanted`
    /// takes.
    ///
    /// The profile must have been checked against its own sizes.
    pub fn new(profile: &Profile, layer: usize, wanted: impl Fn(&PromptTrace) -> bool) -> Self {
        let mut trace = LayerTrace {
            n_expert: profile.n_expert as usize,
            n_used: profile.n_used as usize,
            segments: Vec::new(),
            chosen: Vec::new(),
            prompt_chosen: Vec::new(),
            prompt_uses: vec![0; profile.n_expert as usize],
            prompt_tokens: 0,
        };
        for (at, prompt) in profile
            .prompts
            .iter()
            .enumerate()
            .filter(|(_, p)| wanted(p))
        {
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
            for token in 0..first {
                trace
                    .prompt_chosen
                    .extend_from_slice(profile.chosen(at, token, layer));
            }
            trace.prompt_tokens += first as u64;
            for token in first..first + decoded {
                trace
                    .chosen
                    .extend_from_slice(profile.chosen(at, token, layer));
            }
            trace.segments.push(Segment {
                touched,
                prompt: first,
                decoded,
            });
        }
        trace
    }

    /// Makes a trace of given choices: `warm_up` fills the slots as a prompt does, `chosen` is
    /// judged.
    ///
    /// Both are `[token, used]`. All experts are below `n_expert`, and those of a token differ.
    pub fn made_up(n_expert: usize, n_used: usize, warm_up: &[u16], chosen: Vec<u16>) -> Self {
        let mut seen = vec![false; n_expert];
        let mut touched: Vec<u16> = warm_up
            .iter()
            .rev()
            .copied()
            .filter(|&e| !std::mem::replace(&mut seen[usize::from(e)], true))
            .collect();
        touched.reverse();
        let tokens = |choices: &[u16]| choices.len() / n_used.max(1);
        let segments = vec![Segment {
            touched,
            prompt: tokens(warm_up),
            decoded: tokens(&chosen),
        }];
        let prompt_chosen = warm_up.to_vec();
        let prompt_uses = vec![0; n_expert];
        LayerTrace {
            n_expert,
            n_used,
            segments,
            chosen,
            prompt_chosen,
            prompt_uses,
            prompt_tokens: 0,
        }
    }

    /// Returns the number of decoded tokens.
    pub fn tokens(&self) -> usize {
        self.segments.iter().map(|s| s.decoded).sum()
    }

    /// Returns `[decoded token, used]` choices, in router order.
    pub fn decoded(&self) -> &[u16] {
        &self.chosen
    }

    /// Returns the number of experts in the layer.
    pub fn n_expert(&self) -> usize {
        self.n_expert
    }

    /// Returns the number of experts that a token uses.
    pub fn n_used(&self) -> usize {
        self.n_used
    }

    /// Returns the number of choices, those of prompts included.
    pub fn choices(&self) -> usize {
        self.chosen.len() + self.prompt_chosen.len()
    }

    /// Returns the steps in order.
    pub fn events(&self) -> impl Iterator<Item = Event<'_>> + '_ {
        let (mut decoded, mut prompts) = (&self.chosen[..], &self.prompt_chosen[..]);
        self.segments.iter().flat_map(move |segment| {
            let (own, after) = decoded.split_at(segment.decoded * self.n_used);
            let (tokens, later) = prompts.split_at(segment.prompt * self.n_used);
            (decoded, prompts) = (after, later);
            let touched = &segment.touched[..];
            let prompt = (!touched.is_empty()).then_some(Event::Prompt { tokens, touched });
            prompt
                .into_iter()
                .chain(own.chunks_exact(self.n_used.max(1)).map(Event::Token))
        })
    }

    /// Returns the steps in order, as choices and whether they are counted. A prompt is not.
    pub fn steps(&self) -> impl Iterator<Item = (&[u16], bool)> + '_ {
        self.events().map(|event| match event {
            Event::Prompt { touched, .. } => (touched, false),
            Event::Token(chosen) => (chosen, true),
        })
    }

    /// Returns `[n_expert]` shares of decoded tokens that choose each expert.
    pub fn decode_share(&self) -> Vec<f64> {
        let mut uses = vec![0u64; self.n_expert];
        for &expert in &self.chosen {
            uses[usize::from(expert)] += 1;
        }
        let tokens = self.tokens().max(1) as f64;
        uses.iter().map(|&n| n as f64 / tokens).collect()
    }

    /// Returns `[n_expert]` shares of prompt tokens that choose each expert, if there are any.
    pub fn prompt_share(&self) -> Option<Vec<f64>> {
        let tokens = self.prompt_tokens as f64;
        (self.prompt_tokens > 0).then(|| {
            self.prompt_uses
                .iter()
                .map(|&n| n as f64 / tokens)
                .collect()
        })
    }
}

/// LRU stack distances: how many pooled experts were used more recently than each pooled choice.
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
        // Experts up to which 16-bit times are seldom renumbered.
        const MAX_EXPERTS_16_BIT: usize = i16::LAST / 2;
        if trace.n_expert <= MAX_EXPERTS_16_BIT {
            Self::timed::<i16>(trace, pinned)
        } else {
            Self::timed::<i32>(trace, pinned)
        }
    }

    fn timed<T: Time>(trace: &LayerTrace, pinned: &[bool]) -> Self {
        let mut recency = Recency::<T>::new(trace.n_expert);
        let mut at = Vec::with_capacity(trace.chosen.len());
        let mut starts = Vec::with_capacity(trace.tokens() + 1);
        for (chosen, counted) in trace.steps() {
            let pooled = || {
                chosen
                    .iter()
                    .map(|&e| usize::from(e))
                    .filter(|&e| !pinned[e])
            };
            if counted {
                starts.push(at.len() as u32);
                at.extend(pooled().map(|e| recency.position(e)));
            }
            pooled().for_each(|e| recency.touch(e));
        }
        starts.push(at.len() as u32);
        Positions { at, starts }
    }

    /// Returns the number of decoded tokens.
    pub fn tokens(&self) -> usize {
        self.starts.len() - 1
    }

    /// Returns the positions of one token's pooled choices, in router order.
    pub fn token(&self, token: usize) -> &[u16] {
        &self.at[self.starts[token] as usize..self.starts[token + 1] as usize]
    }

    /// Returns the number of pooled choices.
    pub fn accesses(&self) -> usize {
        self.at.len()
    }

    /// Returns `[most + 1]` hits for 0, 1, ... `most` slots.
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

/// Steps a layer's slots through a trace with the pinned experts (`[n_expert]`) taken out of the
/// pool.
///
/// Calls `each` for every decoded token, with its choices and the accesses of its pooled ones.
pub fn play(
    trace: &LayerTrace,
    pinned: &[bool],
    cache: &mut SlotCache,
    mut each: impl FnMut(&[u16], &[Access]),
) {
    let (mut pooled, mut out) = (Vec::new(), Vec::new());
    for event in trace.events() {
        let chosen = match event {
            Event::Prompt { tokens, touched } => {
                for token in tokens.chunks_exact(trace.n_used.max(1)) {
                    cache.note(token.iter().copied().map(u32::from));
                }
                touched
            }
            Event::Token(chosen) => {
                cache.note(chosen.iter().copied().map(u32::from));
                chosen
            }
        };
        pooled.clear();
        pooled.extend(
            chosen
                .iter()
                .filter(|&&e| !pinned[usize::from(e)])
                .map(|&e| u32::from(e)),
        );
        cache.settle(&pooled, &mut out);
        if let Event::Token(chosen) = event {
            each(chosen, &out);
        }
    }
}

/// Returns the hits of a policy, with the pinned experts (`[n_expert]`) taken out of the pool.
pub fn hits(trace: &LayerTrace, pinned: &[bool], slots: u32, policy: SlotPolicy) -> u64 {
    let mut cache = SlotCache::new(trace.n_expert as u32, slots, policy);
    let mut hits = 0;
    play(trace, pinned, &mut cache, |_, accesses| {
        hits += accesses
            .iter()
            .filter(|access| matches!(access, Access::Hit { .. }))
            .count() as u64;
    });
    hits
}

/// Returns the hits of a policy by number of slots, up to `most`.
///
/// LRU has every number. The others have about twenty, since each takes a replay of its own.
pub fn hit_curve(
    trace: &LayerTrace,
    pinned: &[bool],
    most: usize,
    policy: SlotPolicy,
) -> Vec<(u32, u64)> {
    if policy == SlotPolicy::Lru {
        return (0..)
            .zip(Positions::new(trace, pinned).hit_curve(most))
            .collect();
    }
    const MAX_SAMPLES: usize = 20;
    let mut sizes: Vec<u32> = (0..=MAX_SAMPLES)
        .map(|at| (most * at / MAX_SAMPLES) as u32)
        .collect();
    sizes.dedup();
    sizes
        .into_iter()
        .map(|slots| (slots, hits(trace, pinned, slots, policy)))
        .collect()
}

/// Integer type of times: as short as the number of experts allows, since memory bandwidth bounds
/// the counting.
trait Time: Copy + Ord {
    /// Time before all others.
    const NEVER: Self;
    /// The largest time.
    const LAST: usize;

    /// Converts a time, which is at most [`LAST`](Self::LAST).
    fn at(at: usize) -> Self;
}

impl Time for i16 {
    const NEVER: i16 = -1;
    const LAST: usize = i16::MAX as usize;

    fn at(at: usize) -> i16 {
        at as i16
    }
}

impl Time for i32 {
    const NEVER: i32 = -1;
    const LAST: usize = i32::MAX as usize;

    fn at(at: usize) -> i32 {
        at as i32
    }
}

/// Last use of each expert.
///
/// Counting the later uses is a straight pass over at most some thousand integers, which the
/// compiler vectorizes. A tree would not pay at these sizes.
struct Recency<T> {
    /// `[n_expert]` time of last use.
    last: Vec<T>,
    now: usize,
}

impl<T: Time> Recency<T> {
    fn new(n_expert: usize) -> Self {
        Recency {
            last: vec![T::NEVER; n_expert],
            now: 0,
        }
    }

    fn position(&self, expert: usize) -> u16 {
        let time = self.last[expert];
        if time == T::NEVER {
            return COLD;
        }
        self.last.iter().map(|&other| u16::from(other > time)).sum()
    }

    fn touch(&mut self, expert: usize) {
        if self.now > T::LAST {
            self.renumber();
        }
        self.last[expert] = T::at(self.now);
        self.now += 1;
    }

    /// Renumbers the times from 0, in their order.
    fn renumber(&mut self) {
        let mut used: Vec<usize> = (0..self.last.len())
            .filter(|&e| self.last[e] != T::NEVER)
            .collect();
        used.sort_by_key(|&e| self.last[e]);
        self.now = used.len();
        for (time, expert) in used.into_iter().enumerate() {
            self.last[expert] = T::at(time);
        }
    }
}

/// Returns the most hits that any policy can have with `n_resident` experts (L. A. Belády, 1966).
///
/// The future is known: the experts with the nearest next use are kept. A token's choices are
/// looked up together, and the experts resident at the start are chosen freely too. This bounds
/// every mix of pins and slots of the same bytes.
pub fn ceiling(trace: &LayerTrace, n_resident: usize) -> u64 {
    let steps: Vec<(&[u16], bool)> = trace.steps().collect();
    // Step of the next counted use after each use, unless a prompt's use comes first; found from
    // the end.
    let mut next = vec![u32::MAX; trace.n_expert];
    let mut after: Vec<Vec<u32>> = Vec::with_capacity(steps.len());
    for (at, (chosen, counted)) in steps.iter().enumerate().rev() {
        after.push(chosen.iter().map(|&e| next[usize::from(e)]).collect());
        // A prompt brings its experts in at no cost, so it does not pay to have kept one for it.
        let when = if *counted { at as u32 } else { u32::MAX };
        chosen.iter().for_each(|&e| next[usize::from(e)] = when);
    }
    after.reverse();

    let mut resident: BTreeSet<(u32, u16)> =
        (0..trace.n_expert).map(|e| (next[e], e as u16)).collect();
    let mut due = next;
    let shrink = |resident: &mut BTreeSet<(u32, u16)>| {
        while resident.len() > n_resident {
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
        resident.extend(
            chosen
                .iter()
                .zip(after)
                .map(|(&expert, &then)| (then, expert)),
        );
        shrink(&mut resident);
    }
    hits
}

#[cfg(test)]
mod tests;
