//! Makes configurations of layers with their times: on a grid of counts, at will, and the cheapest of all of them.

use super::batch::{self, Spread};
use super::columns::{Charge, Config, Item, Meaning};
use super::grid::{Axes, Grid};
use super::room::{MAX_FAST, Room};
use super::table::Table;
use super::wishes::{LayerWishes, Wishes};
use crate::cost::{self, Ahead, ExpertStage, outcomes, stage_mean_s};
use crate::profile::{Evidence, Judged, LayerEvidence};
use crate::replay::{COLD, LayerTrace, Positions};
use std::collections::BTreeMap;
use tier_plan_runtime::formats::placement::{LayerPlacement, Pins, TierIdx};
use tier_plan_runtime::model::shape::ModelShape;

/// Part of the time that the grid is made for where it is only a beginning.
const BEGIN: f64 = 0.4;

/// Experts of one token on each path: tiers, then transfers; the pooled ones are first counted on the last tier.
type Paths = [u16; MAX_FAST + 2];

/// Makes configurations of layers, with their times.
pub struct Maker<'a> {
    pub(super) evidence: &'a Evidence,
    pub(super) room: &'a Room,
    /// Counts.
    pub grid: Grid,
    /// Tiers that can run out.
    scarce: Vec<TierIdx>,
    /// Steps between all configurations of every layer can be taken, since columns cost their seconds alone.
    pub whole: bool,
    charge: &'a Charge,
    /// By layer.
    pub(super) wishes: Vec<Fixed>,
}

/// The rank of an expert that is fixed to a tier: this plus the tier, beyond every rank.
const FIXED: u16 = 1 << 15;

/// What the user fixed of a layer, in the form that configurations need.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Fixed {
    /// Experts that configurations pin, the most used first; those fixed to the last tier at the end.
    free: Vec<u32>,
    /// `[n_expert]` rank among the free, or [`FIXED`] and the tier.
    rank: Vec<u16>,
    /// `[tiers]` experts fixed to each.
    on: Vec<u16>,
    /// The largest last cut: what lies behind it stays on the last tier.
    most: u16,
    wishes: LayerWishes,
}

impl Fixed {
    fn new(layer: &LayerEvidence, wishes: LayerWishes, home: TierIdx) -> Self {
        let fixed = |e: &u32| wishes.fixed.get(e).copied();
        let mut free: Vec<u32> = layer.order.iter().copied().filter(|e| fixed(e).is_none()).collect();
        let most = free.len() as u16;
        free.extend(layer.order.iter().copied().filter(|e| fixed(e) == Some(home)));
        let mut rank = vec![0u16; layer.order.len()];
        let mut on = vec![0u16; home + 1];
        free.iter().enumerate().for_each(|(at, &e)| rank[e as usize] = at as u16);
        for (&expert, &tier) in wishes.fixed.iter().filter(|(_, t)| **t != home) {
            rank[expert as usize] = FIXED + tier as u16;
            on[tier] += 1;
        }
        Fixed { free, rank, on, most, wishes }
    }
}

impl<'a> Maker<'a> {
    /// One for a model's layers, with the finest grid that can be searched in so many seconds.
    pub fn new(
        shape: &ModelShape,
        evidence: &'a Evidence,
        room: &'a Room,
        charge: &'a Charge,
        wishes: &Wishes,
        seconds: f64,
    ) -> Self {
        let all = shape.weight_bytes().saturating_add(room.brought_bytes());
        let time = room.tiers.len()..room.left_bytes.len();
        let scarce = (0..room.tiers.len()).filter(|&t| room.left_bytes[t] < all).chain(time).collect();
        let mut grid = Grid::new(evidence, room, seconds);
        let plain = charge.is_plain() && !wishes.of_experts();
        let steps = |layer: &LayerEvidence| matches!(layer.judged, Judged::Uniform) || Table::possible(layer);
        let whole = plain && !grid.full && evidence.layers.iter().all(steps);
        if whole {
            grid = Grid::new(evidence, room, seconds * BEGIN);
        }
        let home = room.home();
        let wishes = evidence.layers.iter().map(|l| Fixed::new(l, wishes.layer(l.shape.layer), home)).collect();
        Maker { evidence, room, grid, scarce, whole, charge, wishes }
    }

    /// The placement of the layer at this position that a configuration stands for.
    pub fn placement(&self, at: usize, config: &Config) -> LayerPlacement {
        let fixed = &self.wishes[at];
        let mut placed = config.placement(self.evidence.layers[at].shape.layer, &fixed.free, self.room.home());
        for (&expert, &tier) in fixed.wishes.fixed.iter().filter(|(_, t)| **t != self.room.home()) {
            match placed.pinned.iter_mut().find(|pins| pins.tier == tier) {
                Some(Pins { experts, .. }) => experts.push(expert),
                None => placed.pinned.push(Pins { tier, experts: vec![expert] }),
            }
        }
        placed.pinned.iter_mut().for_each(|pins| pins.experts.sort_unstable());
        placed.pinned.sort_by_key(|pins| pins.tier);
        placed
    }

    /// The configuration whose placement of the layer at this position has as many pins on each tier and the same slots.
    pub fn config_of(&self, at: usize, placed: &LayerPlacement) -> Option<Config> {
        let fixed = &self.wishes[at];
        let mut config = Config { cuts: [0; MAX_FAST], slots: placed.slots as u16, slot_tier: placed.slot_tier as u8 };
        let mut sum = 0;
        for tier in 0..self.room.home() {
            let pins = placed.pinned.iter().filter(|p| p.tier == tier).map(|p| p.experts.len()).sum::<usize>();
            sum += pins.checked_sub(usize::from(fixed.on[tier]))?;
            config.cuts[tier] = sum as u16;
        }
        (sum <= fixed.free.len()).then_some(config)
    }

    /// Experts of the layer at this position that configurations may pin.
    pub fn most(&self, at: usize) -> u16 {
        self.wishes[at].most
    }

    /// Layers that share their configurations, by position.
    fn alike(&self) -> Vec<Vec<usize>> {
        let mut alike: Vec<Vec<usize>> = Vec::new();
        let mut classes: BTreeMap<(u32, u32, u32, u64), usize> = BTreeMap::new();
        for (at, layer) in self.evidence.layers.iter().enumerate() {
            match layer.class.filter(|_| self.wishes[at].wishes == LayerWishes::default()) {
                None => alike.push(vec![at]),
                Some(class) => {
                    let key = (class, layer.shape.n_expert, layer.shape.n_used, layer.shape.expert_bytes);
                    let place = *classes.entry(key).or_insert_with(|| {
                        alike.push(Vec::new());
                        alike.len() - 1
                    });
                    alike[place].push(at);
                }
            }
        }
        alike
    }

    /// All layers' configurations on the grid, computed on all cores.
    pub fn items(&self) -> Vec<Item> {
        let alike = self.alike();
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(alike.len().max(1));
        let mut items: Vec<Option<Item>> = vec![None; alike.len()];
        std::thread::scope(|scope| {
            let chunk = alike.len().div_ceil(threads).max(1);
            for (members, items) in alike.chunks(chunk).zip(items.chunks_mut(chunk)) {
                scope.spawn(move || {
                    for (members, item) in members.iter().zip(items) {
                        let most = self.most(members[0]);
                        let cuts = self.grid.axis(0, most);
                        let axes = Axes { last_cuts: cuts.clone(), cuts, slots: None };
                        let mut made = Item {
                            meaning: Meaning::Experts(members.clone(), Vec::new()),
                            cost_s: Vec::new(),
                            bytes: Vec::new(),
                        };
                        self.extend(&mut made, &axes);
                        *item = Some(made);
                    }
                });
            }
        });
        items.into_iter().flatten().collect()
    }

    /// Adds the configurations on the given axes that fit the tiers, but for those that others are no worse than.
    pub fn extend(&self, item: &mut Item, axes: &Axes) {
        let Meaning::Experts(members, _) = &item.meaning else { return };
        let layer = &self.evidence.layers[members[0]];
        let stage = self.stage(layer);
        let fixed = &self.wishes[members[0]];
        let before = item.len();
        match &layer.judged {
            _ if self.charge.batch.is_some() => self.batched(item, layer, fixed, &stage, axes),
            Judged::Recorded(trace) => self.recorded(item, layer, fixed, trace, &stage, axes),
            Judged::Uniform => self.uniform(item, layer, fixed, &stage, axes),
        }
        item.drop_dominated(before, self.room.left_bytes.len(), &self.scarce);
    }

    /// Adds one configuration, whatever the grid; `None` if it does not fit.
    pub fn add(&self, item: &mut Item, config: Config) -> Option<usize> {
        let Meaning::Experts(members, configs) = &item.meaning else { return None };
        if let Some(at) = configs.iter().position(|c| *c == config) {
            return Some(at);
        }
        let layer = &self.evidence.layers[members[0]];
        let stage = self.stage(layer);
        let at = members[0];
        let fixed = &self.wishes[at];
        let seconds = match self.charge.batch {
            Some(batch) => {
                let sums = self.touched(layer, fixed, batch);
                self.batch_s(&stage, layer, fixed, &sums, &config, batch)
            }
            None => {
                let placed = self.placement(at, &config);
                let found = outcomes(&placed, layer, &self.room.tiers, self.room.staging_tier);
                stage_mean_s(&stage, &found, placed.brought_to(self.room.staging_tier))
            }
        };
        self.push(item, layer, fixed, config, seconds).then(|| item.len() - 1)
    }

    /// A layer's expert stage.
    pub(super) fn stage(&self, layer: &LayerEvidence) -> ExpertStage {
        // A step over several sequences is reckoned without reading ahead.
        let ahead = if self.charge.batch.is_some() { Ahead::default() } else { layer.ahead };
        ExpertStage::new(&self.room.tiers, layer.shape.expert_bytes, ahead)
    }

    pub(super) fn push(
        &self,
        item: &mut Item,
        layer: &LayerEvidence,
        fixed: &Fixed,
        config: Config,
        seconds: f64,
    ) -> bool {
        let (home, n, each) = (self.room.home(), self.room.tiers.len(), layer.shape.expert_bytes);
        let mut bytes = [0u64; MAX_FAST + 1];
        let mut pooled = u64::from(layer.shape.n_expert);
        let forbidden = &fixed.wishes.forbidden;
        for (tier, pins) in config.pins(home).enumerate() {
            if pins > 0 && forbidden.contains(&tier) {
                return false;
            }
            let pins = u64::from(pins) + u64::from(fixed.on[tier]);
            bytes[tier] = pins * each;
            pooled -= pins;
        }
        if config.slots > 0 {
            if forbidden.contains(&usize::from(config.slot_tier)) {
                return false;
            }
            bytes[usize::from(config.slot_tier)] += u64::from(config.slots) * each;
        }
        bytes[home] += pooled * each;
        let last = if home == 0 { 0 } else { config.cuts[home - 1] };
        let fits = last <= fixed.most && bytes[..n].iter().zip(&self.room.left_bytes).all(|(b, left)| b <= left);
        if let (true, Meaning::Experts(_, configs)) = (fits, &mut item.meaning) {
            configs.push(config);
            item.cost_s.push(self.charge.cost(seconds, &bytes[..n]));
            self.charge.rows(seconds, &bytes[..n], &mut item.bytes);
        }
        fits
    }

    /// `[free experts + 1]` chance sums of the free experts by rank, then `[tiers]` those of the fixed ones.
    fn touched(&self, layer: &LayerEvidence, fixed: &Fixed, batch: u32) -> (Vec<f64>, Vec<f64>) {
        let touched = batch::touched(layer, batch);
        let mut sum = 0.0;
        let sums = fixed.free.iter().map(|&e| {
            sum += touched[e as usize];
            sum
        });
        let sums = std::iter::once(0.0).chain(sums).collect();
        let mut on = vec![0.0; self.room.tiers.len()];
        fixed
            .wishes
            .fixed
            .iter()
            .filter(|(_, t)| **t != self.room.home())
            .for_each(|(&e, &t)| on[t] += touched[e as usize]);
        (sums, on)
    }

    /// Seconds of a step's stage by its tokens.
    fn batch_s(
        &self,
        stage: &ExpertStage,
        layer: &LayerEvidence,
        fixed: &Fixed,
        (sums, on): &(Vec<f64>, Vec<f64>),
        config: &Config,
        batch: u32,
    ) -> f64 {
        let home = self.room.home();
        let mut pinned = on.clone();
        let mut from = 0;
        for (tier, pinned) in pinned.iter_mut().enumerate().take(home) {
            let to = usize::from(config.cuts[tier]);
            *pinned += sums[to] - sums[from];
            from = to;
        }
        let n_fixed: u32 = fixed.on.iter().map(|&n| u32::from(n)).sum();
        let spread = Spread {
            pinned,
            pooled: sums[sums.len() - 1] - sums[from],
            n_pooled: f64::from(layer.shape.n_expert - n_fixed) - from as f64,
            slots: (config.slots.into(), config.slot_tier.into()),
        };
        batch::stage_s(stage, &spread, self.room.in_place, self.room.staging_tier) / f64::from(batch)
    }

    fn batched(&self, item: &mut Item, layer: &LayerEvidence, fixed: &Fixed, stage: &ExpertStage, axes: &Axes) {
        let Some(batch) = self.charge.batch else { return };
        let sums = self.touched(layer, fixed, batch);
        let home = self.room.home();
        for &last in axes.last_cuts.iter().filter(|&&last| last <= fixed.most && (home > 0 || last == 0)) {
            let slots = self.slot_axis(axes, fixed.free.len() as u16 - last, layer.shape.n_used as u16);
            self.sequences(&axes.cuts, last, layer.shape.expert_bytes, |cuts| {
                let none = Config { cuts, slots: 0, slot_tier: self.room.staging_tier as u8 };
                let with =
                    |tier: TierIdx| slots.iter().map(move |&slots| Config { cuts, slots, slot_tier: tier as u8 });
                for config in std::iter::once(none).chain(self.room.slot_tiers().flat_map(with)) {
                    let seconds = self.batch_s(stage, layer, fixed, &sums, &config, batch);
                    self.push(item, layer, fixed, config, seconds);
                }
            });
        }
    }

    /// Without slots every pooled choice is missed, unless it computes in place.
    fn stage_pooled(&self, experts: &mut Paths) {
        let home = self.room.home();
        if !self.room.in_place {
            let pooled = std::mem::take(&mut experts[home]);
            experts[self.room.staging_tier] += pooled;
            experts[home + 1] += pooled;
        }
    }

    /// Slot counts for so many pooled experts.
    fn slot_axis(&self, axes: &Axes, pooled: u16, used: u16) -> Vec<u16> {
        if self.room.slot_tiers().is_empty() || pooled == 0 {
            return Vec::new();
        }
        let least = used.min(pooled);
        match &axes.slots {
            None => self.grid.axis(least, pooled),
            Some(slots) => slots.iter().copied().filter(|s| (least..=pooled).contains(s)).collect(),
        }
    }

    /// Calls `each` with every non-decreasing sequence of cuts that ends in `last`, if its pins fit the tiers.
    fn sequences(&self, cuts: &[u16], last: u16, expert_bytes: u64, mut each: impl FnMut([u16; MAX_FAST])) {
        let fast = self.room.home();
        let mut stack = vec![(0usize, [0u16; MAX_FAST])];
        if fast == 0 {
            each([0; MAX_FAST]);
            return;
        }
        while let Some((tier, so_far)) = stack.pop() {
            let from = if tier == 0 { 0 } else { so_far[tier - 1] };
            let fits = |to: u16| u64::from(to - from) * expert_bytes <= self.room.left_bytes[tier];
            let mut go = |to: u16| {
                let mut sequence = so_far;
                sequence[tier] = to;
                if tier + 1 == fast { each(sequence) } else { stack.push((tier + 1, sequence)) }
            };
            if tier + 1 == fast {
                if fits(last) {
                    go(last);
                }
            } else {
                cuts.iter().copied().filter(|&to| to >= from && to <= last && fits(to)).for_each(&mut go);
            }
        }
    }

    /// For each tier that slots may be on, seconds of bringing none to `used` missed experts there.
    fn transfers(&self, stage: &ExpertStage, used: u16) -> Vec<(TierIdx, Vec<f64>)> {
        let path = self.room.tiers.len();
        let to = |tier: TierIdx| (tier, (0..=used).map(|m| stage.path_s(path, f64::from(m), tier)).collect());
        self.room.slot_tiers().map(to).collect()
    }

    fn recorded(
        &self,
        item: &mut Item,
        layer: &LayerEvidence,
        fixed: &Fixed,
        trace: &LayerTrace,
        stage: &ExpertStage,
        axes: &Axes,
    ) {
        let (home, n) = (self.room.home(), self.room.tiers.len());
        let used = layer.shape.n_used as u16;
        let tokens = trace.tokens().max(1) as f64;
        let rank = &fixed.rank;
        // `[token, used]` ranks in ascending order, so that the pins of any cuts are counted by one short scan.
        let mut ranks: Vec<u16> = Vec::new();
        for (chosen, _) in trace.steps().filter(|(_, counted)| *counted) {
            let from = ranks.len();
            ranks.extend(chosen.iter().map(|&e| rank[usize::from(e)]));
            ranks[from..].sort_unstable();
        }
        let transfers = self.transfers(stage, used);
        let mut delta: Vec<f64> = Vec::new();
        let mut sorted: Vec<u16> = Vec::new();
        let mut starts: Vec<usize> = Vec::new();
        for &last in axes.last_cuts.iter().filter(|&&last| last <= fixed.most) {
            if home == 0 && last > 0 {
                break;
            }
            let pinned: Vec<bool> = rank.iter().map(|&r| r < last || r >= FIXED).collect();
            let positions = Positions::new(trace, &pinned);
            sorted.clear();
            starts.clear();
            for token in 0..positions.tokens() {
                let from = sorted.len();
                starts.push(from);
                sorted.extend_from_slice(positions.token(token));
                sorted[from..].sort_unstable();
            }
            starts.push(sorted.len());
            let pooled = fixed.free.len() as u16 - last;
            let slots = self.slot_axis(axes, pooled, used);
            self.sequences(&axes.cuts, last, layer.shape.expert_bytes, |cuts| {
                let counts = |token: &[u16]| {
                    let mut experts = Paths::default();
                    let mut tier = 0;
                    for &rank in token {
                        // Those fixed to a tier come last.
                        if let Some(on) = rank.checked_sub(FIXED) {
                            experts[usize::from(on)] += 1;
                            continue;
                        }
                        while tier < home && rank >= cuts[tier] {
                            tier += 1;
                        }
                        experts[tier] += 1;
                    }
                    experts
                };
                let config = |slots, slot_tier: TierIdx| Config { cuts, slots, slot_tier: slot_tier as u8 };
                let each_token = || ranks.chunks_exact(usize::from(used)).map(counts);
                let plain: f64 = each_token()
                    .map(|mut experts| {
                        self.stage_pooled(&mut experts);
                        stage.token_s(&experts[..=n], self.room.staging_tier)
                    })
                    .sum();
                self.push(item, layer, fixed, config(0, self.room.staging_tier), plain / tokens);
                if slots.is_empty() {
                    return;
                }
                for (tier, transfer) in &transfers {
                    let (tier, transfer) = (*tier, &transfer[..]);
                    delta.clear();
                    delta.resize(usize::from(pooled) + 1, 0.0);
                    for (mut experts, span) in each_token().zip(starts.windows(2)) {
                        let mut missed = usize::from(std::mem::take(&mut experts[home]));
                        experts[tier] += missed as u16;
                        let compute = stage.token_s(&experts[..n], tier);
                        let mut now = compute.max(transfer[missed]);
                        delta[0] += now;
                        for &position in sorted[span[0]..span[1]].iter().take_while(|&&p| p != COLD) {
                            missed -= 1;
                            let then = compute.max(transfer[missed]);
                            delta[usize::from(position) + 1] += then - now;
                            now = then;
                        }
                    }
                    let mut at = slots.iter().peekable();
                    let mut sum = 0.0;
                    for (count, change) in delta.iter().enumerate() {
                        sum += change;
                        if at.next_if(|&&s| usize::from(s) == count).is_some() {
                            self.push(item, layer, fixed, config(count as u16, tier), sum / tokens);
                        }
                    }
                }
            });
        }
    }

    fn uniform(&self, item: &mut Item, layer: &LayerEvidence, fixed: &Fixed, stage: &ExpertStage, axes: &Axes) {
        let (home, n) = (self.room.home(), self.room.tiers.len());
        let used = layer.shape.n_used as u16;
        let transfers = self.transfers(stage, used);
        for &last in axes.last_cuts.iter().filter(|&&last| last <= fixed.most) {
            if home == 0 && last > 0 {
                break;
            }
            let pooled = fixed.free.len() as u16 - last;
            // `[slots][pooled choices]` the distribution of misses.
            let slots = self.slot_axis(axes, pooled, used);
            let misses: Vec<Vec<Vec<f64>>> = slots
                .iter()
                .map(|&s| {
                    (0..=used.min(pooled))
                        .map(|q| {
                            let mut shares = vec![0.0; usize::from(q) + 1];
                            let groups = [u32::from(s), u32::from(pooled - s)];
                            cost::draw(&groups, q.into(), |drawn, share| shares[drawn[1] as usize] += share);
                            shares
                        })
                        .collect()
                })
                .collect();
            self.sequences(&axes.cuts, last, layer.shape.expert_bytes, |cuts| {
                let config = |slots, slot_tier: TierIdx| Config { cuts, slots, slot_tier: slot_tier as u8 };
                let mut groups: Vec<u32> =
                    config(0, 0).pins(home).zip(&fixed.on).map(|(pins, &on)| u32::from(pins) + u32::from(on)).collect();
                groups.push(pooled.into());
                let mut tokens: Vec<(Paths, f64)> = Vec::new();
                cost::draw(&groups, used.into(), |drawn, share| {
                    let mut experts = Paths::default();
                    experts.iter_mut().zip(drawn).for_each(|(n, &d)| *n = d as u16);
                    tokens.push((experts, share));
                });
                let plain: f64 = tokens
                    .iter()
                    .map(|&(mut experts, share)| {
                        self.stage_pooled(&mut experts);
                        share * stage.token_s(&experts[..=n], self.room.staging_tier)
                    })
                    .sum();
                self.push(item, layer, fixed, config(0, self.room.staging_tier), plain);
                for (tier, transfer) in &transfers {
                    let tier = *tier;
                    let computes: Vec<(f64, usize, f64)> = tokens
                        .iter()
                        .map(|&(mut experts, share)| {
                            let q = std::mem::take(&mut experts[home]);
                            experts[tier] += q;
                            (stage.token_s(&experts[..n], tier), usize::from(q), share)
                        })
                        .collect();
                    for (&s, misses) in slots.iter().zip(&misses) {
                        let mean = |(compute, q, share): &(f64, usize, f64)| {
                            let over: f64 = misses[*q].iter().zip(transfer).map(|(p, t)| p * compute.max(*t)).sum();
                            share * over
                        };
                        self.push(item, layer, fixed, config(s, tier), computes.iter().map(mean).sum());
                    }
                }
            });
        }
    }
}
