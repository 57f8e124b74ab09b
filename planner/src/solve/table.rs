//! A layer's recorded tokens, replayed for every set of pins at once.
//!
//! That costs little more than a replay for one: for a choice of an expert of rank `r`, the experts used more recently are
//! counted from the last rank down to each possible last cut.

use crate::profile::{Judged, LayerEvidence};
use crate::replay::LayerTrace;

/// Bytes that the positions of one layer may take.
const MOST_BYTES: usize = 192 << 20;

/// One layer's recorded tokens in the form that all cuts can be looked up in.
pub struct Table {
    /// Experts of the layer.
    pub(super) n_expert: usize,
    /// Experts that a token uses.
    pub(super) used: usize,
    /// Tokens that plans are judged on.
    pub(super) tokens: usize,
    /// `[token, used]` ranks by falling use, ascending.
    pub(super) ranks: Vec<u16>,
    /// `[token, used]` whether it is the first use of all.
    pub(super) cold: Vec<bool>,
    /// `[n_expert + 2]` where the entries of each last cut begin.
    begin: Vec<usize>,
    /// By last cut, the pooled choices that were used before: twice the token (plus one at the token's deepest, unless a
    /// pooled choice of it is cold), and how many pooled experts were used more recently.
    entries: Vec<(u32, u16)>,
}

/// Choices in all, and those used before with their ranks.
fn count(layer: &LayerEvidence) -> Option<(usize, usize)> {
    let Judged::Recorded(trace) = &layer.judged else { return None };
    let accesses = trace.tokens().checked_mul(trace.n_used())?;
    let entries = accesses.checked_mul(trace.n_expert() + 1)?;
    (accesses > 0 && layer.order.len() == trace.n_expert()).then_some((accesses, entries))
}

impl Table {
    /// Whether a layer can have a table.
    pub fn possible(layer: &LayerEvidence) -> bool {
        count(layer).is_some_and(|(accesses, entries)| {
            accesses < u32::MAX as usize / 4 && entries.saturating_mul(size_of::<(u32, u16)>()) <= MOST_BYTES
        })
    }

    /// Replays a layer; `None` if the table would be too large.
    pub fn new(layer: &LayerEvidence, trace: &LayerTrace) -> Option<Self> {
        if !Table::possible(layer) {
            return None;
        }
        let (n, used, tokens) = (trace.n_expert(), trace.n_used(), trace.tokens());
        let mut rank = vec![0u16; n];
        layer.order.iter().enumerate().for_each(|(at, &expert)| rank[expert as usize] = at as u16);
        let (mut ranks, mut cold) = (Vec::with_capacity(tokens * used), Vec::with_capacity(tokens * used));
        let mut seen = vec![false; n];
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
            chosen.iter().for_each(|&e| seen[usize::from(rank[usize::from(e)])] = true);
        }
        for cut in (0..n).rev() {
            warm[cut] += warm[cut + 1];
        }
        let mut begin = vec![0usize; n + 2];
        for cut in 0..=n {
            begin[cut + 1] = begin[cut] + warm[cut];
        }
        let mut table = Table { n_expert: n, used, tokens, ranks, cold, entries: vec![(0, 0); begin[n + 1]], begin };
        table.fill(trace, &rank)?;
        Some(table)
    }

    /// Counts the positions for all cuts, token by token.
    fn fill(&mut self, trace: &LayerTrace, rank: &[u16]) -> Option<()> {
        let (n, used) = (self.n_expert, self.used);
        // `[rank]` time of last use, from 1; 0 when never.
        let mut last = vec![0u32; n];
        let mut now = 0u32;
        let mut at = self.begin.clone();
        // `[used][cut]` of one token.
        let mut positions = vec![0u16; used * n];
        let mut token = 0;
        for (chosen, counted) in trace.steps() {
            if counted {
                let ranks = &self.ranks[token * used..][..used];
                let cold = &self.cold[token * used..][..used];
                for ((&own, _), positions) in
                    ranks.iter().zip(cold).zip(positions.chunks_exact_mut(n)).filter(|((_, cold), _)| !**cold)
                {
                    let own = usize::from(own);
                    let time = last[own];
                    let mut later = last[own + 1..].iter().map(|&t| u16::from(t > time)).sum::<u16>();
                    for (position, &other) in positions[..=own].iter_mut().zip(&last[..=own]).rev() {
                        later += u16::from(other > time);
                        *position = later;
                    }
                }
                let coldest = ranks.iter().zip(cold).filter(|(_, cold)| **cold).map(|(r, _)| usize::from(*r)).max();
                for cut in 0..=usize::from(ranks[used - 1]) {
                    let first = ranks.partition_point(|&r| usize::from(r) < cut);
                    let from = at[cut];
                    let mut deepest = from;
                    for choice in (first..used).filter(|&c| !cold[c]) {
                        let position = positions[choice * n + cut];
                        self.entries[at[cut]] = (2 * token as u32, position);
                        if position > self.entries[deepest].1 {
                            deepest = at[cut];
                        }
                        at[cut] += 1;
                    }
                    if at[cut] > from && coldest.is_none_or(|c| c < cut) {
                        self.entries[deepest].0 += 1;
                    }
                }
                token += 1;
            }
            for &expert in chosen {
                now = now.checked_add(1)?;
                last[usize::from(rank[usize::from(expert)])] = now;
            }
        }
        Some(())
    }

    /// The entries of a last cut.
    pub(super) fn row(&self, cut: u16) -> &[(u32, u16)] {
        let cut = usize::from(cut);
        &self.entries[self.begin[cut]..self.begin[cut + 1]]
    }
}
