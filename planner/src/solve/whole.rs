//! All configurations of a layer at once, at given prices for bytes: a bound that none goes below, and the cheapest ones.
//!
//! Large layers have more configurations than can be listed: 384 experts over four tiers have thousands of millions. A
//! token's time is the longest of its paths, and a longest path is at least any weighted mean of the paths. With weights
//! that are fixed for each token, the layer's time comes apart into terms of one cut each, and one of the last cut and
//! the slots: its least value over *all* cuts and slots is found by adding up tables. That is a bound whatever the
//! weights. Where it isn't good enough, weights are moved towards the paths that are longest at its least point, and the
//! box of configurations is cut in two. What is best at such a point is also the next candidate to price exactly.

use super::columns::Config;
use super::room::{MAX_FAST, Room};
use super::steps::{Steps, Timed};
use super::table::Table;
use crate::cost::ExpertStage;
use crate::profile::LayerEvidence;
use std::collections::BTreeSet;
use std::time::Instant;
use tier_plan_runtime::formats::placement::TierIdx;

/// Times that the weights of a box are moved before it is cut in two.
const TRIES: u32 = 4;

/// Places that steps begin from.
const DESCENTS: usize = 4;

/// Width of the weights at first, as a share of a token's time.
const HEAT: f32 = 0.1;

/// Paths: the tiers, and the transfers.
const PATHS: usize = MAX_FAST + 2;

/// A box of configurations that have slots on one tier, or none.
struct Box {
    slot_tier: Option<TierIdx>,
    /// `[fast tiers]` then the slots: least and largest.
    low: [u16; MAX_FAST + 1],
    high: [u16; MAX_FAST + 1],
    /// Points tried in it, and the `[token, path]` mean of their path times; the parent's as long as there are none.
    points: Vec<Config>,
    mean: Vec<f32>,
    tried: u32,
    bound: f64,
    /// Where the weighted mean is least.
    point: Config,
}

/// A layer's tokens under any configuration.
struct Tokens<'a> {
    table: &'a Table,
    room: &'a Room,
    /// `[tiers]` seconds of an expert that computes from there, and fixed seconds if there is any.
    each: [f64; MAX_FAST + 1],
    fixed: [f64; MAX_FAST + 1],
    /// `[tiers]` the same of an expert that is brought to slots, or staging, there.
    brought: [(f64, f64); MAX_FAST + 1],
}

impl Timed for Tokens<'_> {
    fn seconds(&self, config: &Config) -> f64 {
        let mut sum = 0.0;
        self.paths(config, |_, times| sum += times.iter().copied().fold(0.0, f64::max));
        sum / self.table.tokens as f64
    }
}

impl Tokens<'_> {
    /// Calls `each` with every token's path times under a configuration.
    fn paths(&self, config: &Config, mut each: impl FnMut(usize, &[f64; PATHS])) {
        let (table, fast, n) = (self.table, self.room.home(), self.room.tiers.len());
        let last = if fast == 0 { 0 } else { config.cuts[fast - 1] };
        // `[token]` misses among the pooled choices that were used before.
        let mut again = vec![0u16; table.tokens];
        if config.slots > 0 {
            for &(token, position) in table.row(last) {
                again[token as usize / 2] += u16::from(position >= config.slots);
            }
        }
        let choices = table.ranks.chunks_exact(table.used).zip(table.cold.chunks_exact(table.used));
        for (token, ((ranks, cold), again)) in choices.zip(again).enumerate() {
            let mut counts = [0u16; PATHS];
            let (mut tier, mut pooled, mut missed) = (0, 0u16, again);
            for (&rank, &cold) in ranks.iter().zip(cold) {
                while tier < fast && rank >= config.cuts[tier] {
                    tier += 1;
                }
                if tier < fast {
                    counts[tier] += 1;
                } else {
                    pooled += 1;
                    missed += u16::from(cold);
                }
            }
            if config.slots > 0 {
                counts[usize::from(config.slot_tier)] += pooled;
                counts[n] = missed;
            } else if self.room.in_place {
                counts[fast] = pooled;
            } else {
                counts[self.room.staging_tier] += pooled;
                counts[n] = pooled;
            }
            let mut times = [0.0; PATHS];
            for path in 0..n {
                if counts[path] > 0 {
                    times[path] = self.fixed[path] + f64::from(counts[path]) * self.each[path];
                }
            }
            if counts[n] > 0 {
                let (each, fixed) = self.brought[usize::from(config.slot_tier)];
                times[n] = fixed + f64::from(counts[n]) * each;
            }
            each(token, &times);
        }
    }

    /// `[token, path]` times under a configuration.
    fn means(&self, config: &Config) -> Vec<f32> {
        let n = self.room.tiers.len() + 1;
        let mut means = vec![0.0; self.table.tokens * n];
        self.paths(config, |token, times| {
            means[token * n..][..n].iter_mut().zip(times).for_each(|(m, t)| *m = *t as f32);
        });
        means
    }
}

/// The search of one layer at some prices.
pub struct Layer<'a> {
    steps: Steps<'a, Tokens<'a>>,
}

impl<'a> Layer<'a> {
    /// One for a layer's table.
    pub fn new(table: &'a Table, room: &'a Room, layer: &LayerEvidence, price: &[f64]) -> Self {
        let expert_bytes = layer.shape.expert_bytes;
        let stage = ExpertStage::new(&room.tiers, expert_bytes, layer.ahead);
        let (mut each, mut fixed, mut brought) = ([0.0; MAX_FAST + 1], [0.0; MAX_FAST + 1], [(0.0, 0.0); MAX_FAST + 1]);
        let n = room.tiers.len();
        for tier in 0..n {
            (each[tier], fixed[tier]) = stage.path(tier, tier);
            brought[tier] = stage.path(n, tier);
        }
        let tokens = Tokens { table, room, each, fixed, brought };
        let counts = [table.n_expert as u16, table.used as u16];
        Layer { steps: Steps::new(tokens, room, counts, expert_bytes, price) }
    }

    /// The cheapest configurations that steps from some known ones lead to, and if it is to be `thorough` from where the
    /// weighted means are least, the best first, with their seconds.
    pub fn cheapest(&mut self, start: &[Config], thorough: bool, deadline: Instant) -> Vec<(Config, f64)> {
        start.iter().for_each(|config| {
            self.steps.value(config);
        });
        // Where the weighted means are least is another place to begin.
        let mut begin = start.to_vec();
        for mut this in if thorough { self.boxes(start) } else { Vec::new() } {
            for _ in 0..2 {
                if Instant::now() >= deadline {
                    break;
                }
                self.tighten(&mut this);
                let (point, means) = (this.point, self.steps.timed.means(&this.point));
                this.mean.iter_mut().zip(&means).for_each(|(m, new)| *m += (new - *m) / 2.0);
                if self.steps.fits(&point) && !begin.contains(&point) {
                    begin.push(point);
                }
            }
        }
        let descents = start.len().max(DESCENTS);
        self.steps.cheapest(begin, descents, deadline)
    }

    /// The configurations around some, the best first, with their seconds.
    pub fn around(&mut self, these: &BTreeSet<Config>, deadline: Instant) -> Vec<(Config, f64)> {
        self.steps.around(these, deadline)
    }

    /// Seconds and priced bytes that no configuration goes below: searches from some known ones until that is within
    /// `close` (relative) of the best, or the deadline passes. Minus infinity if there was no time at all.
    pub fn bound(&mut self, start: &[Config], close: f64, deadline: Instant) -> f64 {
        let mut best: Option<(Config, f64)> = None;
        for config in start {
            let value = self.steps.value(config);
            if best.is_none_or(|(_, least)| value < least) {
                best = Some((*config, value));
            }
        }
        let mut boxes = self.boxes(start);
        let mut closed = f64::INFINITY;
        while let Some(at) = (0..boxes.len()).min_by(|&a, &b| boxes[a].bound.total_cmp(&boxes[b].bound)) {
            let least = best.map_or(f64::INFINITY, |b| b.1);
            if boxes[at].bound >= least - close * least.abs() || Instant::now() >= deadline {
                break;
            }
            let mut this = boxes.swap_remove(at);
            self.tighten(&mut this);
            if this.bound == f64::INFINITY {
                continue;
            }
            let point = this.point;
            let value = self.steps.value(&point);
            if self.steps.fits(&point) && best.is_none_or(|(_, least)| value < least) {
                best = Some((point, value));
            }
            let least = best.map_or(f64::INFINITY, |b| b.1);
            if this.bound >= least - close * least.abs() {
                closed = closed.min(this.bound);
                continue;
            }
            if this.low == this.high {
                closed = closed.min(value);
                continue;
            }
            let means = self.steps.timed.means(&point);
            if this.points.contains(&point) {
                this.tried += 1;
            } else {
                this.points.push(point);
            }
            let share = if this.points.len() == 1 { 1.0 } else { 1.0 / this.points.len() as f32 };
            this.mean.iter_mut().zip(&means).for_each(|(m, new)| *m += (new - *m) * share);
            this.tried += 1;
            if this.tried > TRIES
                && let Some(halves) = self.split(&this)
            {
                boxes.extend(halves);
            } else {
                boxes.push(this);
            }
        }
        boxes.iter().map(|b| b.bound).fold(closed, f64::min)
    }

    /// Boxes that hold all configurations: one for each tier of slots, and one without.
    fn boxes(&self, start: &[Config]) -> Vec<Box> {
        let fast = self.steps.room.home();
        let most = self.steps.timed.table.n_expert as u16;
        let variants = self.steps.room.slot_tiers().map(Some).chain([None]);
        variants
            .map(|slot_tier| {
                let (mut low, mut high) = ([0; MAX_FAST + 1], [0; MAX_FAST + 1]);
                high[..fast].fill(most);
                if slot_tier.is_some() {
                    (low[fast], high[fast]) = ((self.steps.timed.table.used as u16).min(most), most);
                    low[fast] = 1;
                }
                let at = start.iter().filter(|c| (c.slots > 0).then_some(usize::from(c.slot_tier)) == slot_tier);
                let at = at.min_by(|a, b| self.steps.known_value(a).total_cmp(&self.steps.known_value(b)));
                let begin = at.or(start.first()).copied().map(|mut c| {
                    match slot_tier {
                        Some(tier) => {
                            c.slot_tier = tier as u8;
                            let last = if fast == 0 { 0 } else { c.cuts[fast - 1] };
                            if let Some((least, pooled)) = self.steps.slot_range(last) {
                                c.slots = c.slots.clamp(least, pooled);
                            }
                        }
                        None => (c.slots, c.slot_tier) = (0, self.steps.room.staging_tier as u8),
                    }
                    c
                });
                let point = begin.unwrap_or(Config {
                    cuts: [0; MAX_FAST],
                    slots: 0,
                    slot_tier: self.steps.room.staging_tier as u8,
                });
                Box {
                    slot_tier,
                    low,
                    high,
                    points: vec![point],
                    mean: self.steps.timed.means(&point),
                    tried: 1,
                    bound: f64::NEG_INFINITY,
                    point,
                }
            })
            .collect()
    }

    /// Finds the least weighted mean over a box.
    fn tighten(&self, this: &mut Box) {
        let (table, fast, n) = (self.steps.timed.table, self.steps.room.home(), self.steps.room.tiers.len());
        let (n_expert, used) = (table.n_expert, table.used);
        let paths = n + 1;
        // Weights: the longest path's, spread over those that are nearly as long.
        let longest: Vec<f32> = this.mean.chunks_exact(paths).map(|m| m.iter().copied().fold(0.0, f32::max)).collect();
        let heat = (longest.iter().sum::<f32>() / longest.len().max(1) as f32 * HEAT / this.tried as f32).max(1e-12);
        // `[path][rank]` weighted seconds of the experts of each rank, if they are on this path.
        let mut on = vec![0.0f64; paths * n_expert];
        // `[token]` weight of the transfers.
        let mut moved = vec![0.0f64; table.tokens];
        let pools_on = match this.slot_tier {
            Some(tier) => tier,
            None if self.steps.room.in_place => fast,
            None => self.steps.room.staging_tier,
        };
        for (token, ranks) in table.ranks.chunks_exact(used).enumerate() {
            let mean = &this.mean[token * paths..][..paths];
            let mut weight = [0.0f64; PATHS];
            let mut sum = 0.0;
            for (w, &m) in weight.iter_mut().zip(mean) {
                *w = f64::from((m - longest[token]) / heat).exp();
                sum += *w;
            }
            for path in 0..n {
                let w = weight[path] / sum;
                let on = &mut on[path * n_expert..][..n_expert];
                // What starts a path is paid once a token: exactly so for the first tier's pins, whose first expert is the
                // token's most used one; else at least an expert's part of it.
                let whole = path == 0 && pools_on != 0;
                let part = if whole { 0.0 } else { self.steps.timed.fixed[path] / used as f64 };
                for &rank in ranks {
                    on[usize::from(rank)] += w * (self.steps.timed.each[path] + part);
                }
                if whole {
                    on[usize::from(ranks[0])] += w * self.steps.timed.fixed[path];
                }
            }
            moved[token] = weight[n] / sum;
        }
        let scale = 1.0 / table.tokens as f64;
        // `[tier][cut]` seconds and priced bytes of the experts before a cut, if they are on this tier.
        let before: Vec<Vec<f64>> = (0..n)
            .map(|path| {
                let mut sum = 0.0;
                let price = self.steps.price[path];
                let steps = on[path * n_expert..][..n_expert].iter().map(|&s| {
                    sum += s * scale + price;
                    sum
                });
                std::iter::once(0.0).chain(steps).collect()
            })
            .collect();
        // The pooled ones compute on one tier, but their home copies are on the last.
        let pooled = |cut: usize| {
            let left = (n_expert - cut) as f64;
            let compute = before[pools_on][n_expert] - before[pools_on][cut] - self.steps.price[pools_on] * left;
            compute + self.steps.price[fast] * left
        };
        let brought_to = this.slot_tier.unwrap_or(self.steps.room.staging_tier);
        let (each, fixed) = self.steps.timed.brought[brought_to];
        let (each, fixed) = (each * scale, fixed * scale);
        // Without slots every pooled choice is moved: `[cut]`.
        let mut all_moved = vec![0.0; n_expert + 1];
        if this.slot_tier.is_none() && !self.steps.room.in_place {
            for (token, ranks) in table.ranks.chunks_exact(used).enumerate() {
                ranks.iter().for_each(|&r| all_moved[usize::from(r)] += moved[token] * each);
                all_moved[usize::from(ranks[used - 1])] += moved[token] * fixed;
            }
            for cut in (0..n_expert).rev() {
                all_moved[cut] += all_moved[cut + 1];
            }
        }
        // Best so far for each cut of the tier before, and which cut that was: `[tier][cut]`.
        let mut least = vec![0.0f64; n_expert + 1];
        let mut from: Vec<Vec<u16>> = Vec::with_capacity(fast);
        for tier in 0..fast.saturating_sub(1) {
            let (mut best, mut best_at) = (f64::INFINITY, 0u16);
            let mut trace = vec![0u16; n_expert + 1];
            for cut in 0..=n_expert {
                if (usize::from(this.low[tier])..=usize::from(this.high[tier])).contains(&cut) {
                    let value = least[cut] + before[tier][cut] - before[tier + 1][cut];
                    if value < best {
                        (best, best_at) = (value, cut as u16);
                    }
                }
                trace[cut] = best_at;
                least[cut] = best;
            }
            from.push(trace);
        }
        let mut bound = f64::INFINITY;
        let mut point = this.point;
        // With slots: `[2 token + deepest]` seconds of a miss, `[cut]` those of the choices that no slots can serve.
        let mut of_miss = Vec::new();
        let mut never = vec![0.0f64; n_expert + 1];
        if this.slot_tier.is_some() {
            of_miss.extend(moved.iter().flat_map(|w| [w * each, w * (each + fixed)]));
            let choices = table.ranks.chunks_exact(used).zip(table.cold.chunks_exact(used));
            for ((ranks, cold), weight) in choices.zip(&moved) {
                let mut deepest = None;
                for (&rank, _) in ranks.iter().zip(cold).filter(|(_, cold)| **cold) {
                    never[usize::from(rank)] += weight * each;
                    deepest = Some(rank);
                }
                if let Some(rank) = deepest {
                    never[usize::from(rank)] += weight * fixed;
                }
            }
            for cut in (0..n_expert).rev() {
                never[cut] += never[cut + 1];
            }
        }
        // Two sums for each position: additions to one would wait for each other.
        let mut sums = vec![[0.0f64; 2]; n_expert + 1];
        let lasts = if fast == 0 { 0..=0 } else { usize::from(this.low[fast - 1])..=usize::from(this.high[fast - 1]) };
        for last in lasts {
            let base = least[last] + if fast > 0 { before[fast - 1][last] } else { 0.0 } + pooled(last);
            if !base.is_finite() {
                continue;
            }
            let (value, slots) = match this.slot_tier {
                None => (base + all_moved[last], 0),
                Some(tier) => {
                    let Some((fewest, most)) = self.steps.slot_range(last as u16) else { continue };
                    let (low, high) = (this.low[fast].max(fewest), this.high[fast].min(most));
                    if low > high {
                        continue;
                    }
                    let bottom = low - 1;
                    let sums = &mut sums[..=usize::from(high - bottom)];
                    sums.fill([0.0; 2]);
                    for (at, &(token, position)) in table.row(last as u16).iter().enumerate() {
                        let place = position.clamp(bottom, high) - bottom;
                        sums[usize::from(place)][at & 1] += of_miss[token as usize];
                    }
                    let (mut missed, mut best, mut best_at) = (never[last], f64::INFINITY, low);
                    for slots in (low..=high).rev() {
                        let [a, b] = sums[usize::from(slots - bottom)];
                        missed += a + b;
                        let value = missed + self.steps.price[tier] * f64::from(slots);
                        if value < best {
                            (best, best_at) = (value, slots);
                        }
                    }
                    (base + best, best_at)
                }
            };
            if value < bound {
                bound = value;
                let slot_tier = this.slot_tier.unwrap_or(self.steps.room.staging_tier) as u8;
                point = Config { cuts: [0; MAX_FAST], slots, slot_tier };
                let mut cut = last as u16;
                for tier in (0..fast).rev() {
                    if tier + 1 < fast {
                        cut = from[tier][usize::from(cut)];
                    }
                    point.cuts[tier] = cut;
                }
            }
        }
        if bound > this.bound || !bound.is_finite() {
            this.bound = bound;
        }
        this.point = point;
    }

    /// Two halves of a box, cut where the points tried differ most.
    fn split(&self, this: &Box) -> Option<[Box; 2]> {
        let fast = self.steps.room.home();
        let of = |c: &Config, at: usize| if at == fast { c.slots } else { c.cuts[at] };
        let brought_to = this.slot_tier.unwrap_or(self.steps.room.staging_tier);
        let moved = self.steps.timed.brought[brought_to].0;
        let slower = |at: usize| if at + 1 >= fast { moved } else { self.steps.timed.each[at + 1] };
        let range = |at: usize| {
            let least = this.points.iter().map(|c| of(c, at)).min().unwrap_or(this.low[at]);
            let most = this.points.iter().map(|c| of(c, at)).max().unwrap_or(this.high[at]);
            (least.max(this.low[at]), most.min(this.high[at]))
        };
        let spread = |at: usize| {
            let (least, most) = range(at);
            f64::from(most.saturating_sub(least)) * slower(at)
        };
        let wide = |at: usize| f64::from(this.high[at] - this.low[at]) * slower(at) * 1e-3;
        let weight = |at: usize| spread(at) + wide(at);
        let at = (0..=fast).max_by(|&a, &b| weight(a).total_cmp(&weight(b)))?;
        if this.high[at] == this.low[at] {
            return None;
        }
        let (least, most) = range(at);
        let (least, most) = if least < most { (least, most) } else { (this.low[at], this.high[at]) };
        let middle = least + (most - least) / 2;
        let half = |low: u16, high: u16| {
            let inside = |c: &&Config| (low..=high).contains(&of(c, at));
            let points: Vec<Config> = this.points.iter().filter(inside).copied().collect();
            let mut mean = this.mean.clone();
            if !points.is_empty() {
                mean.fill(0.0);
                let share = 1.0 / points.len() as f32;
                points
                    .iter()
                    .for_each(|c| mean.iter_mut().zip(self.steps.timed.means(c)).for_each(|(m, t)| *m += t * share));
            }
            let tried = TRIES - 2;
            let (slot_tier, bound, point) = (this.slot_tier, this.bound, this.point);
            let mut new = Box { slot_tier, low: this.low, high: this.high, points, mean, tried, bound, point };
            (new.low[at], new.high[at]) = (low, high);
            new
        };
        Some([half(this.low[at], middle), half(middle + 1, this.high[at])])
    }
}
