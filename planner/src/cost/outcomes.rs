//! What tokens do in one layer under a placement: how many of their experts take each path.

use super::home_in_place;
use crate::profile::replay::{LayerTrace, Positions, play};
use crate::profile::{Judged, LayerEvidence};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::OnceLock;
use tier_plan_runtime::experts::cache::{Access, SlotCache};
use tier_plan_runtime::formats::machine::Tier;
use tier_plan_runtime::formats::placement::{LayerPlacement, PerTier, Pins, SlotPolicy, TierIdx};

/// Experts of a layer up to which logarithms of factorials are kept.
const USUAL_EXPERTS: usize = 1024;

/// What tokens do in one layer: the share of tokens by their experts on each path.
///
/// A key is `[tiers + 1]` experts: computed from each tier, then transferred.
pub type Outcomes = BTreeMap<Vec<u16>, f64>;

/// The paths that a layer's experts take under a placement.
struct LayerPaths<'a> {
    layer: &'a LayerPlacement,
    /// `[n_expert]` tiers of pinned experts.
    pinned_on: Vec<Option<TierIdx>>,
    n_tiers: usize,
    staging: TierIdx,
    in_place: bool,
}

impl LayerPaths<'_> {
    /// Returns the experts of a token on each path, with its pinned choices counted.
    fn of_pinned(&self, chosen: &[u16]) -> Vec<u16> {
        let mut experts = vec![0u16; self.n_tiers + 1];
        for tier in chosen
            .iter()
            .filter_map(|&e| self.pinned_on[usize::from(e)])
        {
            experts[tier.get()] += 1;
        }
        experts
    }

    /// Counts a missed choice, which is transferred unless it computes in place.
    fn add_miss(&self, experts: &mut [u16], gets_slot: bool) {
        let home = self.n_tiers - 1;
        if !gets_slot && self.in_place {
            experts[home] += 1;
        } else {
            experts[home + 1] += 1;
            let to = if gets_slot {
                self.layer.slot_tier
            } else {
                self.staging
            };
            experts[to.get()] += 1;
        }
    }

    fn is_pinned(&self) -> Vec<bool> {
        self.pinned_on.iter().map(Option::is_some).collect()
    }

    /// Steps the layer's slot cache through recorded tokens.
    fn stepped(&self, trace: &LayerTrace, n_expert: u32) -> Outcomes {
        let mut outcomes = Outcomes::new();
        let share = 1.0 / trace.tokens().max(1) as f64;
        let mut cache = SlotCache::new(n_expert, self.layer.slots, self.layer.policy);
        play(trace, &self.is_pinned(), &mut cache, |chosen, accesses| {
            let mut experts = self.of_pinned(chosen);
            for access in accesses {
                match access {
                    Access::Hit { .. } => experts[self.layer.slot_tier.get()] += 1,
                    Access::Fill { .. } => self.add_miss(&mut experts, true),
                    Access::Staged => self.add_miss(&mut experts, false),
                }
            }
            *outcomes.entry(experts).or_insert(0.0) += share;
        });
        outcomes
    }

    /// Replays recorded tokens with LRU, by stack distances.
    fn replayed_lru(&self, trace: &LayerTrace) -> Outcomes {
        let mut outcomes = Outcomes::new();
        let positions = Positions::new(trace, &self.is_pinned());
        let share = 1.0 / positions.tokens().max(1) as f64;
        let slots = self.layer.slots;
        for (token, (chosen, _)) in trace.steps().filter(|(_, counted)| *counted).enumerate() {
            let mut experts = self.of_pinned(chosen);
            let pooled = positions.token(token);
            for (at, &position) in pooled.iter().enumerate() {
                if u32::from(position) < slots {
                    experts[self.layer.slot_tier.get()] += 1;
                } else {
                    self.add_miss(&mut experts, pooled.len() - at <= slots as usize);
                }
            }
            *outcomes.entry(experts).or_insert(0.0) += share;
        }
        outcomes
    }

    /// Draws tokens whose experts are all equally likely.
    fn drawn(&self, n_expert: u32, n_used: u32) -> Outcomes {
        let mut outcomes = Outcomes::new();
        let n = self.n_tiers;
        // Groups of alike experts: pinned by tier, resident in slots, neither.
        let mut groups = vec![0u32; n];
        self.pinned_on
            .iter()
            .flatten()
            .for_each(|&tier| groups[tier.get()] += 1);
        let pooled = n_expert - groups.iter().sum::<u32>();
        let resident = self.layer.slots.min(pooled);
        groups.extend([resident, pooled - resident]);
        draw(&groups, n_used, |drawn, share| {
            let mut experts: Vec<u16> = drawn[..n].iter().map(|&n| n as u16).chain([0]).collect();
            let (hits, missed) = (drawn[n], drawn[n + 1]);
            experts[self.layer.slot_tier.get()] += hits as u16;
            for at in 0..missed {
                self.add_miss(&mut experts, hits + at < resident);
            }
            *outcomes.entry(experts).or_insert(0.0) += share;
        });
        outcomes
    }
}

/// Returns the outcomes of one layer under its placement, over the evidence's tokens.
pub fn outcomes(
    layer: &LayerPlacement,
    evidence: &LayerEvidence,
    tiers: &PerTier<Tier>,
    staging: TierIdx,
) -> Outcomes {
    let (n_expert, n_used) = (evidence.shape.n_expert, evidence.shape.n_used);
    let pinned_on = pinned_on(layer, n_expert as usize);
    let in_place = home_in_place(tiers);
    let paths = LayerPaths {
        layer,
        pinned_on,
        n_tiers: tiers.len(),
        staging,
        in_place,
    };
    match &evidence.judged {
        Judged::Recorded(trace) if layer.policy != SlotPolicy::Lru => {
            paths.stepped(trace, n_expert)
        }
        Judged::Recorded(trace) => paths.replayed_lru(trace),
        Judged::Uniform => paths.drawn(n_expert, n_used),
    }
}

/// The outcomes of a plan's layers, replayed once for layers that are alike and placed alike.
#[derive(Default)]
pub(super) struct Replays<'a> {
    known: Vec<(&'a LayerPlacement, &'a LayerEvidence, Rc<Outcomes>)>,
}

impl<'a> Replays<'a> {
    /// Returns the outcomes of one layer; the tiers are those of the layers before.
    pub(super) fn outcomes(
        &mut self,
        layer: &'a LayerPlacement,
        evidence: &'a LayerEvidence,
        tiers: &PerTier<Tier>,
        staging: TierIdx,
    ) -> Rc<Outcomes> {
        let is_same = |(placed, of, _): &&(&LayerPlacement, &LayerEvidence, _)| {
            evidence.is_like(of) && is_placed_alike(placed, layer)
        };
        if let Some((.., known)) = self.known.iter().find(is_same) {
            return known.clone();
        }
        let found = Rc::new(outcomes(layer, evidence, tiers, staging));
        if evidence.class.is_some() {
            self.known.push((layer, evidence, found.clone()));
        }
        found
    }
}

/// Whether two layers have the same experts in the same places.
fn is_placed_alike(one: &LayerPlacement, other: &LayerPlacement) -> bool {
    (one.slots, one.slot_tier, one.policy) == (other.slots, other.slot_tier, other.policy)
        && one.pinned == other.pinned
}

/// Returns `[n_expert]` tiers of a layer's pinned experts.
fn pinned_on(layer: &LayerPlacement, n_expert: usize) -> Vec<Option<TierIdx>> {
    let mut pinned_on = vec![None; n_expert];
    for Pins { tier, experts } in &layer.pinned {
        for &expert in experts {
            if let Some(on) = pinned_on.get_mut(expert as usize) {
                *on = Some(*tier);
            }
        }
    }
    pinned_on
}

/// Calls `each` with every way in which `k` distinct experts fall on groups of the given sizes.
///
/// The second argument is its probability when all sets are equally likely (the multivariate
/// hypergeometric distribution).
pub fn draw(groups: &[u32], k: u32, mut each: impl FnMut(&[u32], f64)) {
    let total: u32 = groups.iter().sum();
    // Logarithms for the usual counts are made once.
    static USUAL: OnceLock<Vec<f64>> = OnceLock::new();
    let usual = USUAL.get_or_init(|| ln_factorials(USUAL_EXPERTS));
    let made;
    let ln_fact = if total as usize <= USUAL_EXPERTS {
        usual
    } else {
        made = ln_factorials(total as usize);
        &made
    };
    let ln_choose =
        |n: u32, k: u32| ln_fact[n as usize] - ln_fact[k as usize] - ln_fact[(n - k) as usize];
    let all = ln_choose(total, k.min(total));
    let mut drawn = vec![0u32; groups.len()];
    fill(
        groups,
        0,
        k.min(total),
        -all,
        &mut drawn,
        &mut Draw {
            ln_choose: &ln_choose,
            each: &mut each,
        },
    );
}

/// What every level of [`draw`]'s recursion calls.
struct Draw<'a, C, E> {
    ln_choose: &'a C,
    each: &'a mut E,
}

/// Draws `left` experts from the groups at `at` and after, with `ln` the probability so far.
fn fill<C: Fn(u32, u32) -> f64, E: FnMut(&[u32], f64)>(
    groups: &[u32],
    at: usize,
    left: u32,
    ln: f64,
    drawn: &mut [u32],
    draw: &mut Draw<'_, C, E>,
) {
    if at == groups.len() {
        if left == 0 {
            (draw.each)(drawn, ln.exp());
        }
        return;
    }
    let after: u32 = groups[at + 1..].iter().sum();
    for n in left.saturating_sub(after)..=left.min(groups[at]) {
        drawn[at] = n;
        let ln = ln + (draw.ln_choose)(groups[at], n);
        fill(groups, at + 1, left - n, ln, drawn, draw);
    }
}

/// Returns `[n + 1]` natural logarithms of 0!, 1!, ..., n!.
fn ln_factorials(n: usize) -> Vec<f64> {
    let mut sum = 0.0;
    std::iter::once(0.0)
        .chain((1..=n).map(|i| {
            sum += (i as f64).ln();
            sum
        }))
        .collect()
}
