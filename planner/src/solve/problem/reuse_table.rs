//! The reuse table: a layer's recorded tokens, replayed for every set of pins at once.
//!
//! That costs little more than a replay for one set. For a choice of an expert of rank `r`, the
//! experts used more recently are counted from the last rank down to each possible last cut. The
//! counts are the LRU stack distances of [`crate::profile::replay`].

use crate::profile::replay::LayerTrace;
use crate::profile::{Judged, LayerEvidence};

/// Bytes that the stack distances of one layer may take.
const MAX_TABLE_BYTES: usize = 192 << 20;

/// One layer's recorded tokens, with the stack distances under every last cut.
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
    /// `[n_expert + 2]` where the choices of each last cut begin.
    begin: Vec<usize>,
    /// By last cut: the pooled choices that were used before.
    reused: Vec<ReusedChoice>,
}

/// A pooled choice of an expert that was used before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ReusedChoice {
    /// Twice the token, plus one at its deepest choice unless a pooled choice of it is cold.
    pub(crate) key: u32,
    /// Pooled experts used more recently.
    pub(crate) position: u16,
}

impl ReusedChoice {
    pub(crate) fn token(self) -> usize {
        self.key as usize / 2
    }
}

/// Sizes of a layer's table.
struct TableSize {
    choices: usize,
    reused: usize,
}

fn table_size(layer: &LayerEvidence) -> Option<TableSize> {
    let Judged::Recorded(trace) = &layer.judged else {
        return None;
    };
    let choices = trace.tokens().checked_mul(trace.n_used())?;
    let reused = choices.checked_mul(trace.n_expert() + 1)?;
    let is_ordered = layer.order.len() == trace.n_expert();
    (choices > 0 && is_ordered).then_some(TableSize { choices, reused })
}

impl ReuseTable {
    /// Whether a layer can have a table.
    pub fn is_possible(layer: &LayerEvidence) -> bool {
        table_size(layer).is_some_and(|TableSize { choices, reused }| {
            let bytes = reused.saturating_mul(size_of::<ReusedChoice>());
            choices < u32::MAX as usize / 4 && bytes <= MAX_TABLE_BYTES
        })
    }

    /// Replays a layer. Returns `None` if the table would be too large.
    pub fn new(layer: &LayerEvidence, trace: &LayerTrace) -> Option<Self> {
        if !ReuseTable::is_possible(layer) {
            return None;
        }
        let (n, used, tokens) = (trace.n_expert(), trace.n_used(), trace.tokens());
        let mut rank = vec![0u16; n];
        layer
            .order
            .iter()
            .enumerate()
            .for_each(|(at, &expert)| rank[expert as usize] = at as u16);
        let mut ranks = Vec::with_capacity(tokens * used);
        let mut cold = Vec::with_capacity(tokens * used);
        let mut seen = vec![false; n];
        // `[cut]` choices of experts from that rank on that were used before.
        let mut warm = vec![0usize; n + 1];
        for (chosen, counted) in trace.steps() {
            if counted {
                let from = ranks.len();
                ranks.extend(chosen.iter().map(|&e| rank[usize::from(e)]));
                ranks[from..].sort_unstable();
                for &rank in &ranks[from..] {
                    let before = seen[usize::from(rank)];
                    cold.push(!before);
                    warm[usize::from(rank)] += usize::from(before);
                }
            }
            chosen
                .iter()
                .for_each(|&e| seen[usize::from(rank[usize::from(e)])] = true);
        }
        for cut in (0..n).rev() {
            warm[cut] += warm[cut + 1];
        }
        let mut begin = vec![0usize; n + 2];
        for cut in 0..=n {
            begin[cut + 1] = begin[cut] + warm[cut];
        }
        let reused = vec![ReusedChoice::default(); begin[n + 1]];
        let mut table = ReuseTable {
            n_expert: n,
            used,
            tokens,
            ranks,
            cold,
            begin,
            reused,
        };
        table.fill(trace, &rank)?;
        Some(table)
    }

    /// Counts the stack distances for all cuts, token by token.
    fn fill(&mut self, trace: &LayerTrace, rank: &[u16]) -> Option<()> {
        let (n, used) = (self.n_expert, self.used);
        // `[rank]` time of last use, from 1; 0 when never.
        let mut last = vec![0u32; n];
        let mut now = 0u32;
        // `[cut]` where its next choice goes.
        let mut next = self.begin.clone();
        // `[used][cut]` of one token.
        let mut positions = vec![0u16; used * n];
        let mut token = 0;
        for (chosen, counted) in trace.steps() {
            if counted {
                let ranks = &self.ranks[token * used..][..used];
                let cold = &self.cold[token * used..][..used];
                let choices = ranks.iter().zip(cold).zip(positions.chunks_exact_mut(n));
                for ((&rank, _), positions) in choices.filter(|((_, cold), _)| !**cold) {
                    let rank = usize::from(rank);
                    let time = last[rank];
                    let mut later = last[rank + 1..]
                        .iter()
                        .map(|&t| u16::from(t > time))
                        .sum::<u16>();
                    for (position, &other) in
                        positions[..=rank].iter_mut().zip(&last[..=rank]).rev()
                    {
                        later += u16::from(other > time);
                        *position = later;
                    }
                }
                self.append(token, &positions, &mut next);
                token += 1;
            }
            for &expert in chosen {
                now = now.checked_add(1)?;
                last[usize::from(rank[usize::from(expert)])] = now;
            }
        }
        Some(())
    }

    /// Appends one token's choices to every cut's row.
    fn append(&mut self, token: usize, positions: &[u16], next: &mut [usize]) {
        let (n, used) = (self.n_expert, self.used);
        let ranks = &self.ranks[token * used..][..used];
        let cold = &self.cold[token * used..][..used];
        let cold_ranks = ranks.iter().zip(cold).filter(|(_, cold)| **cold);
        let coldest = cold_ranks.map(|(r, _)| usize::from(*r)).max();
        for cut in 0..=usize::from(ranks[used - 1]) {
            let first = ranks.partition_point(|&r| usize::from(r) < cut);
            let from = next[cut];
            let mut deepest = from;
            for choice in (first..used).filter(|&c| !cold[c]) {
                let position = positions[choice * n + cut];
                self.reused[next[cut]] = ReusedChoice {
                    key: 2 * token as u32,
                    position,
                };
                if position > self.reused[deepest].position {
                    deepest = next[cut];
                }
                next[cut] += 1;
            }
            if next[cut] > from && coldest.is_none_or(|c| c < cut) {
                self.reused[deepest].key += 1;
            }
        }
    }

    /// Returns the reused choices under a last cut.
    pub(crate) fn row(&self, cut: u16) -> &[ReusedChoice] {
        let cut = usize::from(cut);
        &self.reused[self.begin[cut]..self.begin[cut + 1]]
    }
}
