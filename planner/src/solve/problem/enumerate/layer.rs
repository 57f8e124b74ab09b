//! Enumerates one layer's columns: recorded routing, uniform routing, and steps over a batch.

use super::{ColumnEnumerator, FIXED_RANK, FixedExperts, Paths};
use crate::cost::{self, ExpertStage};
use crate::profile::LayerEvidence;
use crate::profile::replay::{COLD, LayerTrace, Positions};
use crate::solve::problem::capacity::{Capacity, MAX_FAST};
use crate::solve::problem::columns::{Config, Item};
use crate::solve::problem::grid::Axes;
use tier_plan_runtime::formats::placement::TierIdx;

/// Seconds of transferring missed experts to a tier's slots.
struct Transfers {
    to: TierIdx,
    /// `[n_used + 1]` seconds by the number of misses.
    seconds: Vec<f64>,
}

/// The LRU stack distances of a trace's pooled choices, ascending within each token.
#[derive(Default)]
struct StackDistances {
    positions: Vec<u16>,
    /// `[tokens + 1]` where each token's positions begin.
    starts: Vec<usize>,
}

impl StackDistances {
    /// Replays a trace with the pinned experts taken out of the pool.
    fn replay(&mut self, trace: &LayerTrace, pinned: &[bool]) {
        let replayed = Positions::new(trace, pinned);
        self.positions.clear();
        self.starts.clear();
        for token in 0..replayed.tokens() {
            let from = self.positions.len();
            self.starts.push(from);
            self.positions.extend_from_slice(replayed.token(token));
            self.positions[from..].sort_unstable();
        }
        self.starts.push(self.positions.len());
    }

    fn tokens(&self) -> impl Iterator<Item = &[u16]> {
        self.starts
            .windows(2)
            .map(|span| &self.positions[span[0]..span[1]])
    }
}

/// The enumeration of one layer's columns on some axes.
pub(super) struct LayerColumns<'a, 'b> {
    pub(super) enumerator: &'a ColumnEnumerator<'b>,
    pub(super) layer: &'a LayerEvidence,
    pub(super) fixed: &'a FixedExperts,
    pub(super) stage: ExpertStage,
    pub(super) axes: &'a Axes,
}

impl LayerColumns<'_, '_> {
    fn capacity(&self) -> &Capacity {
        self.enumerator.capacity
    }

    fn n_used(&self) -> u16 {
        self.layer.shape.n_used as u16
    }

    fn push(&self, item: &mut Item, config: Config, seconds: f64) {
        self.enumerator
            .push(item, self.layer, self.fixed, config, seconds);
    }

    /// Returns the last cuts of the axes that the layer allows.
    fn last_cuts(&self) -> impl Iterator<Item = u16> + '_ {
        let has_fast = self.capacity().fast() > 0;
        let allowed = move |&last: &u16| last <= self.fixed.max_cut && (has_fast || last == 0);
        self.axes.last_cuts.iter().copied().filter(allowed)
    }

    /// Returns the number of experts that are pooled under a last cut.
    fn n_pooled(&self, last_cut: u16) -> u16 {
        self.fixed.free.len() as u16 - last_cut
    }

    /// Returns the numbers of slots to try for `pooled` experts, ascending.
    fn slot_axis(&self, pooled: u16) -> Vec<u16> {
        if self.capacity().slot_tiers().len() == 0 || pooled == 0 {
            return Vec::new();
        }
        let least = self.n_used().min(pooled);
        if let Some((_, settled)) = self.fixed.constraints.slots {
            let settled = settled as u16;
            return (settled <= pooled).then_some(settled).into_iter().collect();
        }
        match &self.axes.slots {
            None => self.enumerator.grid.axis(least, pooled),
            Some(slots) => slots
                .iter()
                .copied()
                .filter(|s| (least..=pooled).contains(s))
                .collect(),
        }
    }

    /// Calls `each` with every non-decreasing sequence of cuts that ends in `last` and fits.
    fn for_each_cuts(&self, last: u16, mut each: impl FnMut([u16; MAX_FAST])) {
        let fast = self.capacity().fast();
        let expert_bytes = self.layer.shape.expert_bytes;
        let mut stack = vec![(0usize, [0u16; MAX_FAST])];
        if fast == 0 {
            each([0; MAX_FAST]);
            return;
        }
        while let Some((tier, so_far)) = stack.pop() {
            let from = if tier == 0 { 0 } else { so_far[tier - 1] };
            let left = self.capacity().left_bytes[tier];
            let fits = |to: u16| u64::from(to - from) * expert_bytes <= left;
            let mut go = |to: u16| {
                let mut sequence = so_far;
                sequence[tier] = to;
                if tier + 1 == fast {
                    each(sequence)
                } else {
                    stack.push((tier + 1, sequence))
                }
            };
            if tier + 1 == fast {
                if fits(last) {
                    go(last);
                }
            } else {
                let cuts = self.axes.cuts.iter().copied();
                cuts.filter(|&to| to >= from && to <= last && fits(to))
                    .for_each(&mut go);
            }
        }
    }

    /// Returns the transfers to each tier that slots may be on.
    fn transfers(&self) -> Vec<Transfers> {
        let path = self.capacity().tiers.len();
        let seconds = |to: TierIdx| {
            (0..=self.n_used())
                .map(|missed| self.stage.path_s(path, f64::from(missed), to))
                .collect()
        };
        self.capacity()
            .slot_tiers()
            .map(|to| Transfers {
                to,
                seconds: seconds(to),
            })
            .collect()
    }

    /// Returns the seconds of a token without slots.
    ///
    /// Every pooled choice is missed then, unless pooled experts compute in place.
    fn staged_s(&self, mut experts: Paths) -> f64 {
        let Capacity {
            in_place,
            staging_tier,
            ..
        } = *self.capacity();
        let home = self.capacity().fast();
        if !in_place {
            let pooled = std::mem::take(&mut experts[home]);
            experts[staging_tier.get()] += pooled;
            experts[home + 1] += pooled;
        }
        self.stage
            .token_s(&experts[..=self.capacity().tiers.len()], staging_tier)
    }

    /// Adds the columns of a step over several sequences.
    pub(super) fn batched(&self, item: &mut Item) {
        let Some(step) = &self.enumerator.charge.step else {
            return;
        };
        let touched = self.enumerator.touched(self.layer, self.fixed, step);
        let staging_tier = self.capacity().staging_tier;
        for last in self.last_cuts() {
            let slots = self.slot_axis(self.n_pooled(last));
            self.for_each_cuts(last, |cuts| {
                let none = Config {
                    cuts,
                    slots: 0,
                    slot_tier: staging_tier,
                };
                let with = |slot_tier: TierIdx| {
                    slots.iter().map(move |&slots| Config {
                        cuts,
                        slots,
                        slot_tier,
                    })
                };
                let configs =
                    std::iter::once(none).chain(self.capacity().slot_tiers().flat_map(with));
                for config in configs {
                    self.push(item, config, touched.seconds(&config));
                }
            });
        }
    }

    /// Adds the columns of a layer with recorded tokens.
    pub(super) fn recorded(&self, item: &mut Item, trace: &LayerTrace) {
        let staging_tier = self.capacity().staging_tier;
        let used = usize::from(self.n_used());
        let tokens = trace.tokens().max(1) as f64;
        let ranks = self.token_ranks(trace);
        let transfers = self.transfers();
        let mut distances = StackDistances::default();
        let mut changes: Vec<f64> = Vec::new();
        for last in self.last_cuts() {
            distances.replay(trace, &self.fixed.pinned_up_to(last));
            let pooled = self.n_pooled(last);
            let slots = self.slot_axis(pooled);
            self.for_each_cuts(last, |cuts| {
                let paths = || {
                    ranks
                        .chunks_exact(used)
                        .map(|token| self.paths_of(token, &cuts))
                };
                let staged: f64 = paths().map(|experts| self.staged_s(experts)).sum();
                let none = Config {
                    cuts,
                    slots: 0,
                    slot_tier: staging_tier,
                };
                self.push(item, none, staged / tokens);
                if slots.is_empty() {
                    return;
                }
                for transfers in &transfers {
                    changes.clear();
                    changes.resize(usize::from(pooled) + 1, 0.0);
                    for (experts, positions) in paths().zip(distances.tokens()) {
                        self.add_changes(experts, positions, transfers, &mut changes);
                    }
                    let mut wanted = slots.iter().peekable();
                    let mut sum = 0.0;
                    for (count, change) in changes.iter().enumerate() {
                        sum += change;
                        if wanted.next_if(|&&s| usize::from(s) == count).is_some() {
                            let (slots, slot_tier) = (count as u16, transfers.to);
                            self.push(
                                item,
                                Config {
                                    cuts,
                                    slots,
                                    slot_tier,
                                },
                                sum / tokens,
                            );
                        }
                    }
                }
            });
        }
    }

    /// Returns `[token, used]` ranks, ascending, so that one short scan counts the pins of any
    /// cuts.
    fn token_ranks(&self, trace: &LayerTrace) -> Vec<u16> {
        let rank = &self.fixed.rank;
        let mut ranks: Vec<u16> = Vec::new();
        for (chosen, _) in trace.steps().filter(|(_, counted)| *counted) {
            let from = ranks.len();
            ranks.extend(chosen.iter().map(|&e| rank[usize::from(e)]));
            ranks[from..].sort_unstable();
        }
        ranks
    }

    /// Returns a token's experts on each tier; those fixed to a tier have the last ranks.
    #[inline]
    fn paths_of(&self, ranks: &[u16], cuts: &[u16; MAX_FAST]) -> Paths {
        let home = self.capacity().fast();
        let mut experts = Paths::default();
        let mut tier = 0;
        for &rank in ranks {
            if let Some(fixed_tier) = rank.checked_sub(FIXED_RANK) {
                experts[usize::from(fixed_tier)] += 1;
                continue;
            }
            while tier < home && rank >= cuts[tier] {
                tier += 1;
            }
            experts[tier] += 1;
        }
        experts
    }

    /// Adds, by number of slots, what each slot more changes of a token's time.
    ///
    /// `changes[0]` is the time without any hit.
    #[inline]
    fn add_changes(
        &self,
        mut experts: Paths,
        positions: &[u16],
        transfers: &Transfers,
        changes: &mut [f64],
    ) {
        let (home, n) = (self.capacity().fast(), self.capacity().tiers.len());
        let mut missed = usize::from(std::mem::take(&mut experts[home]));
        experts[transfers.to.get()] += missed as u16;
        let compute = self.stage.token_s(&experts[..n], transfers.to);
        let mut now = compute.max(transfers.seconds[missed]);
        changes[0] += now;
        for &position in positions.iter().take_while(|&&p| p != COLD) {
            missed -= 1;
            let then = compute.max(transfers.seconds[missed]);
            changes[usize::from(position) + 1] += then - now;
            now = then;
        }
    }

    /// Adds the columns of a layer whose experts are all equally likely.
    pub(super) fn uniform(&self, item: &mut Item) {
        let (home, used) = (self.capacity().fast(), self.n_used());
        let n = self.capacity().tiers.len();
        let staging_tier = self.capacity().staging_tier;
        let transfers = self.transfers();
        for last in self.last_cuts() {
            let pooled = self.n_pooled(last);
            let slots = self.slot_axis(pooled);
            let misses = miss_shares(&slots, pooled, used);
            self.for_each_cuts(last, |cuts| {
                let none = Config {
                    cuts,
                    slots: 0,
                    slot_tier: staging_tier,
                };
                let pins = none.pins(home).zip(&self.fixed.per_tier);
                let mut groups: Vec<u32> = pins
                    .map(|(pins, &fixed)| u32::from(pins) + u32::from(fixed))
                    .collect();
                groups.push(pooled.into());
                let mut tokens: Vec<(Paths, f64)> = Vec::new();
                cost::draw(&groups, used.into(), |drawn, share| {
                    let mut experts = Paths::default();
                    experts
                        .iter_mut()
                        .zip(drawn)
                        .for_each(|(n, &d)| *n = d as u16);
                    tokens.push((experts, share));
                });
                let staged = tokens
                    .iter()
                    .map(|&(experts, share)| share * self.staged_s(experts));
                self.push(item, none, staged.sum());
                for transfers in &transfers {
                    let computes: Vec<UniformToken> = tokens
                        .iter()
                        .map(|&(mut experts, share)| {
                            let pooled = std::mem::take(&mut experts[home]);
                            experts[transfers.to.get()] += pooled;
                            let compute_s = self.stage.token_s(&experts[..n], transfers.to);
                            UniformToken {
                                compute_s,
                                pooled: usize::from(pooled),
                                share,
                            }
                        })
                        .collect();
                    for (&slots, misses) in slots.iter().zip(&misses) {
                        let mean = |token: &UniformToken| {
                            let by_misses = misses[token.pooled].iter().zip(&transfers.seconds);
                            let mean_s: f64 =
                                by_misses.map(|(p, t)| p * token.compute_s.max(*t)).sum();
                            token.share * mean_s
                        };
                        let config = Config {
                            cuts,
                            slots,
                            slot_tier: transfers.to,
                        };
                        self.push(item, config, computes.iter().map(mean).sum());
                    }
                }
            });
        }
    }
}

/// Tokens of one outcome under uniform routing.
struct UniformToken {
    /// Seconds of the computation.
    compute_s: f64,
    /// Choices of pooled experts per token.
    pooled: usize,
    /// Share of all tokens.
    share: f64,
}

/// Returns `[slots][pooled choices][misses]` shares under uniform routing.
fn miss_shares(slots: &[u16], pooled: u16, used: u16) -> Vec<Vec<Vec<f64>>> {
    slots
        .iter()
        .map(|&slots| {
            (0..=used.min(pooled))
                .map(|choices| {
                    let mut shares = vec![0.0; usize::from(choices) + 1];
                    let groups = [u32::from(slots), u32::from(pooled - slots)];
                    cost::draw(&groups, choices.into(), |drawn, share| {
                        shares[drawn[1] as usize] += share
                    });
                    shares
                })
                .collect()
        })
        .collect()
}
