//! The reuse table: a layer's recorded tokens, replayed for every set of pins at once.
//!
//! Columns pin the experts of the first ranks and pool the rest. So the LRU stack distance of a
//! choice under a last cut is the number of experts from that rank on which were used since the
//! chosen one was (R. L. Mattson and others, 1970; [`crate::profile::replay`]). The table has those
//! experts of each choice as a set of ranks: one bit per expert, and the number of members behind
//! each word. Every distance under every cut is then one shift and one count of bits, and a table
//! takes a hundredth of what the distances themselves would.

use crate::profile::replay::LayerTrace;
use crate::profile::{Judged, LayerEvidence};

/// Bytes that the table of one layer may take.
const MAX_TABLE_BYTES: usize = 192 << 20;

/// Experts per word of a set.
const WORD: usize = u64::BITS as usize;

/// One layer's recorded tokens, with what was used between two uses of an expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReuseTable {
    /// Experts of the layer.
    pub(crate) n_expert: usize,
    /// Experts that a token uses.
    pub(crate) used: usize,
    /// Tokens that plans are judged on.
    pub(crate) tokens: usize,
    /// `[token, used]` ranks by falling use, ascending.
    pub(crate) ranks: Vec<u16>,
    /// `[token, used]` whether the choice is the expert's first use.
    pub(crate) cold: Vec<bool>,
    /// Words of a set of experts; a word without members follows the last expert.
    words: usize,
    /// `[token, used, words]` experts, by rank, used since the chosen one was; none at a first use.
    since: Vec<u64>,
    /// `[token, used, words]` members of the set behind each word.
    behind: Vec<u16>,
}

/// A pooled choice of an expert that was used before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ReusedChoice {
    /// Twice the token, plus one at its deepest choice unless a pooled choice of it is cold.
    pub(crate) key: u32,
    /// Pooled experts used more recently.
    pub(crate) position: u16,
}

/// Sizes of a layer's table.
struct TableSize {
    choices: usize,
    words: usize,
}

fn table_size(layer: &LayerEvidence) -> Option<TableSize> {
    let Judged::Recorded(trace) = &layer.judged else {
        return None;
    };
    let choices = trace.tokens().checked_mul(trace.n_used())?;
    let words = trace.n_expert() / WORD + 1;
    let is_ordered = layer.order.len() == trace.n_expert();
    (choices > 0 && is_ordered).then_some(TableSize { choices, words })
}

impl ReuseTable {
    /// Whether a layer can have a table.
    pub fn is_possible(layer: &LayerEvidence) -> bool {
        table_size(layer).is_some_and(|TableSize { choices, words }| {
            let per_choice = words * (size_of::<u64>() + size_of::<u16>());
            let bytes = choices.saturating_mul(per_choice);
            choices < u32::MAX as usize / 4 && bytes <= MAX_TABLE_BYTES
        })
    }

    /// Replays a layer. Returns `None` if the table would be too large.
    pub fn new(layer: &LayerEvidence, trace: &LayerTrace) -> Option<Self> {
        if !ReuseTable::is_possible(layer) {
            return None;
        }
        let TableSize { choices, words } = table_size(layer)?;
        let (n, used, tokens) = (trace.n_expert(), trace.n_used(), trace.tokens());
        let mut rank = vec![0u16; n];
        layer
            .order
            .iter()
            .enumerate()
            .for_each(|(at, &expert)| rank[expert as usize] = at as u16);
        let mut table = ReuseTable {
            n_expert: n,
            used,
            tokens,
            ranks: Vec::with_capacity(choices),
            cold: Vec::with_capacity(choices),
            words,
            since: vec![0; choices * words],
            behind: vec![0; choices * words],
        };
        let mut recency = Recency::new(n);
        let mut chosen_ranks = Vec::new();
        for (chosen, counted) in trace.steps() {
            chosen_ranks.clear();
            chosen_ranks.extend(chosen.iter().map(|&e| rank[usize::from(e)]));
            if counted {
                table.append(&chosen_ranks, &mut recency);
            }
            recency.touch(&chosen_ranks);
        }
        table.count_behind();
        Some(table)
    }

    /// Returns the bytes that the table takes.
    pub(crate) fn bytes(&self) -> usize {
        let per_choice = self.words * (size_of::<u64>() + size_of::<u16>());
        self.ranks.len() * (per_choice + size_of::<u16>() + size_of::<bool>())
    }

    /// Appends one token's choices, with the experts used since each was.
    fn append(&mut self, chosen: &[u16], recency: &mut Recency) {
        let from = self.ranks.len();
        self.ranks.extend_from_slice(chosen);
        self.ranks[from..].sort_unstable();
        recency.set.fill(0);
        let mut found = 0;
        self.cold.resize(from + chosen.len(), true);
        for &rank in &recency.order {
            if let Ok(at) = self.ranks[from..].binary_search(&rank) {
                let choice = from + at;
                self.cold[choice] = false;
                self.since[choice * self.words..][..self.words].copy_from_slice(&recency.set);
                found += 1;
                if found == chosen.len() {
                    break;
                }
            }
            recency.set[usize::from(rank) / WORD] |= 1 << (usize::from(rank) % WORD);
        }
    }

    fn count_behind(&mut self) {
        let sets = self.since.chunks_exact(self.words);
        for (set, behind) in sets.zip(self.behind.chunks_exact_mut(self.words)) {
            let mut members = 0;
            for (word, behind) in set.iter().zip(behind).rev() {
                *behind = members;
                members += word.count_ones() as u16;
            }
        }
    }

    /// Returns the pooled experts used more recently than a choice, `[token, used]`, under a last
    /// cut.
    #[inline]
    pub(crate) fn position(&self, choice: usize, cut: u16) -> u16 {
        let at = choice * self.words + usize::from(cut) / WORD;
        let pooled = self.since[at] >> (usize::from(cut) % WORD);
        self.behind[at] + pooled.count_ones() as u16
    }

    /// Writes the reused choices under a last cut, token after token.
    pub(crate) fn row(&self, cut: u16, row: &mut Vec<ReusedChoice>) {
        row.clear();
        let used = self.used;
        for token in 0..self.tokens {
            let ranks = &self.ranks[token * used..][..used];
            let from = row.len();
            let (mut deepest, mut any_cold) = (from, false);
            for at in ranks.partition_point(|&r| r < cut)..used {
                let choice = token * used + at;
                if self.cold[choice] {
                    any_cold = true;
                    continue;
                }
                let position = self.position(choice, cut);
                if row.len() > from && position > row[deepest].position {
                    deepest = row.len();
                }
                let key = 2 * token as u32;
                row.push(ReusedChoice { key, position });
            }
            if row.len() > from && !any_cold {
                row[deepest].key += 1;
            }
        }
    }
}

/// The experts used so far, by rank.
struct Recency {
    /// Ranks, the most recently used first.
    order: Vec<u16>,
    /// `[n_expert]` scratch: whether the rank is among those being touched.
    touched: Vec<bool>,
    /// `[words]` scratch: a set of ranks.
    set: Vec<u64>,
}

impl Recency {
    fn new(n_expert: usize) -> Self {
        Recency {
            order: Vec::with_capacity(2 * n_expert),
            touched: vec![false; n_expert],
            set: vec![0; n_expert / WORD + 1],
        }
    }

    /// Uses experts one after the other, so that the last one is the most recent.
    fn touch(&mut self, ranks: &[u16]) {
        ranks
            .iter()
            .for_each(|&r| self.touched[usize::from(r)] = true);
        let touched = &self.touched;
        self.order.retain(|&r| !touched[usize::from(r)]);
        self.order.splice(0..0, ranks.iter().rev().copied());
        ranks
            .iter()
            .for_each(|&r| self.touched[usize::from(r)] = false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::prefetch::Prefetch;
    use crate::profile::replay::{COLD, Positions};
    use crate::profile::synthetic::{Random, Routing, profile};
    use crate::profile::tests::shape;

    /// Holds every distance under every cut to a replay with the pinned experts taken out.
    #[test]
    fn distances_are_those_of_a_replay() {
        for (n_expert, n_used, seed) in [(1, 1, 1), (9, 3, 2), (64, 5, 3), (65, 8, 4), (130, 2, 5)]
        {
            let routing = Routing {
                skew: 0.7,
                repeat: 0.4,
                prompts: 3,
                prompt_tokens: 5,
                decode_tokens: 30,
                seed,
            };
            let shape = shape(n_expert, n_used);
            let profile = profile(&shape, &routing);
            let trace = LayerTrace::new(&profile, 0, |_| true);
            // Any order of the experts has its distances.
            let mut order: Vec<u32> = (0..n_expert).collect();
            let mut random = Random::new(seed);
            (1..order.len()).for_each(|i| order.swap(i, random.below(i + 1)));
            let layer = LayerEvidence {
                shape: shape.experts[0],
                order: order.clone(),
                share: Vec::new(),
                prompt_share: Vec::new(),
                judged: Judged::Recorded(trace.clone()),
                prefetch: Prefetch::default(),
                class: None,
            };
            let table = ReuseTable::new(&layer, &trace).unwrap();
            for cut in 0..=n_expert as u16 {
                let pinned: Vec<bool> = (0..n_expert)
                    .map(|e| order[..usize::from(cut)].contains(&e))
                    .collect();
                let replayed = Positions::new(&trace, &pinned);
                let mut row = Vec::new();
                table.row(cut, &mut row);
                for token in 0..table.tokens {
                    let mut wanted = replayed.token(token).to_vec();
                    let is_cold = wanted.contains(&COLD);
                    wanted.retain(|&p| p != COLD);
                    wanted.sort_unstable();
                    let of_token = row.iter().filter(|c| c.key as usize / 2 == token);
                    let mut found: Vec<u16> = of_token.clone().map(|c| c.position).collect();
                    found.sort_unstable();
                    assert_eq!(found, wanted, "{n_expert} {cut} {token}");
                    // The deepest pays what is fixed, unless a first use does.
                    let marked: Vec<u16> = of_token
                        .filter(|c| c.key % 2 == 1)
                        .map(|c| c.position)
                        .collect();
                    let deepest = wanted.last().filter(|_| !is_cold).copied();
                    assert_eq!(marked, deepest.into_iter().collect::<Vec<_>>());
                }
            }
        }
    }
}
